"""Commands in processes of their own, forked by `fork_server.py`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Processes:
    """A command that was started.

    Attributes:
        pids: the ranks' processes, each the leader of a process group of its own.
        logs: what each rank prints.
    """

    def __init__(self, server: "ForkServer", pids: list[int], logs: list[Path]):
        self.server, self.pids, self.logs = server, pids, logs

    def wait(self) -> list[int | None]:
        """Return the exit codes when all have ended; None for one that did not end in time."""
        return self.server.request(wait=self.pids)

    def texts(self) -> list[str]:
        return [log.read_text() for log in self.logs]

    def wait_until(self, happened, *, seconds: float = 120) -> None:
        """Return as soon as `happened()` is true; fail when the first process ends before, or too much time passes."""
        deadline = time.monotonic() + seconds
        while not happened():
            status = Path(f"/proc/{self.pids[0]}/stat").read_text().rpartition(")")[2].split()[0]
            assert status != "Z" and time.monotonic() < deadline, self.texts()
            time.sleep(0.02)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to all process groups, workers included."""
        for pid in self.pids:
            os.killpg(pid, number)

    def left(self) -> bool:
        """Return whether any process of the groups is still there."""
        groups = {str(pid) for pid in self.pids}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if group in groups and state != "Z":
                return True
        return False


class ForkServer:
    """Starts commands in forked processes, several at a time if need be."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, 0
        search = os.pathsep.join([str(ROOT), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.fork_server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        )  # fmt: skip

    def request(self, **request) -> list:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, command: str, *ranks: list, env=None, pretend=None, spoil=None, slow=False) -> Processes:
        """Start a command.

        Args:
            command: a key of `fork_server.COMMANDS`.
            ranks: arguments of each rank.
            env: variables of the environment.
            pretend: see `fork_server.pretend`.
            spoil: step at which rank 1 computes a NaN.
            slow: see `fork_server.slow_down`.
        """
        log = self.folder / str(self.started)
        self.started += 1
        words = [[str(word) for word in rank] for rank in ranks]
        options = {"env": env or {}, "pretend": pretend, "spoil": spoil, "slow": slow, "log": str(log)}
        pids = self.request(command=command, ranks=words, **options)
        return Processes(self, pids, [Path(f"{log}.{rank}") for rank in range(len(ranks))])

    def run(self, command: str, *ranks: list, **options) -> tuple[list[int | None], list[str]]:
        """Start a command, wait for its end, and return exit codes and outputs."""
        started = self.start(command, *ranks, **options)
        return started.wait(), started.texts()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
