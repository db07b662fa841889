"""Runs a command until it ends, or until this process's standard input does: however its starter ends, so does it.

    python evaluation/supervisor.py SECONDS COMMAND ...      seconds between SIGTERM and SIGKILL

A process that is killed cannot stop its server. Its end of the pipe closes all the same.
"""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress


def main() -> int:
    _, seconds, *command = sys.argv
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while child.poll() is None:
        if select.select([sys.stdin], [], [], 0.2)[0] and not os.read(sys.stdin.fileno(), 1):
            break
    stop(child, float(seconds))
    return child.returncode


def stop(child: subprocess.Popen, seconds: float) -> None:
    """End a process and all that it has started."""
    signal_group(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while (child.poll() is None or signal_group(child.pid, 0)) and time.monotonic() < deadline:
        time.sleep(0.1)
    signal_group(child.pid, signal.SIGKILL)
    child.wait()


def signal_group(number: int, what: int) -> bool:
    """Signal a process group and return whether there is one."""
    with suppress(ProcessLookupError):
        os.killpg(number, what)
        return True
    return False


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the starter ends first, or closes the pipe
    sys.exit(main())
