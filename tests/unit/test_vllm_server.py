"""A server of our own: it is there when it answers, and gone when its starter is, however that ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation import vllm_server
from evaluation.vllm_server import start_server
from models.serving import Serving

SERVING = Serving(base="b", name="b", adapters={}, pixels={"min_pixels": 784, "max_pixels": 1568}, dtype="float32")
# In place of vLLM's environment: a Python that serves /health on the port it is given, deaf to SIGTERM, with a child.
HEALTHY = """
import http.server, os, pathlib, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "300"])
pathlib.Path("{pids}").write_text(f"{{os.getpid()}} {{child.pid}}")
print("telemetry", os.environ["VLLM_NO_USAGE_STATS"], os.environ.get("WORLD_SIZE"), flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """Return a function that has a script run in place of vLLM; the processes' numbers are in `pids`."""

    def use(script: str) -> Path:
        program = tmp_path / "python"
        (tmp_path / "program.py").write_text(script.format(pids=tmp_path / "pids"))
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "program.py"} "$@"\n')
        program.chmod(0o755)
        monkeypatch.setattr(vllm_server, "PYTHON", program)
        return tmp_path / "pids"

    monkeypatch.setattr(vllm_server, "STOP_SECONDS", 0.5)
    monkeypatch.setenv("WORLD_SIZE", "4")
    return use


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_answers_in_the_block_and_is_gone_after_it(fake_vllm, tmp_path):
    pids = fake_vllm(HEALTHY)
    with pytest.raises(KeyboardInterrupt), start_server(SERVING, tmp_path / "log") as client:
        numbers = [int(number) for number in pids.read_text().split()]
        assert client.is_ready() and all(map(alive, numbers))
        raise KeyboardInterrupt
    assert not any(map(alive, numbers))
    assert (tmp_path / "log").read_text() == "telemetry 1 None\n"


def test_a_server_is_gone_when_its_starter_is_killed(fake_vllm, tmp_path):
    pids = fake_vllm(HEALTHY)
    script = "import sys, time\nfrom pathlib import Path\nfrom evaluation import vllm_server\n"
    script += "from test_vllm_server import SERVING\n"
    script += "vllm_server.PYTHON, vllm_server.STOP_SECONDS = Path(sys.argv[1]), 0.5\n"
    script += "with vllm_server.start_server(SERVING, Path(sys.argv[2])):\n    print('up', flush=True)\n"
    script += "    time.sleep(300)\n"
    search = os.pathsep.join([str(Path(__file__).parent), str(vllm_server.ROOT)])
    starter = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "python", tmp_path / "log"], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": search}, cwd=vllm_server.ROOT,
    )  # fmt: skip
    assert starter.stdout.readline() == "up\n"
    numbers = [int(number) for number in pids.read_text().split()]
    assert all(map(alive, numbers))
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    deadline = time.monotonic() + 30
    while any(map(alive, numbers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, numbers))


def test_the_last_lines_of_a_server_that_ends_are_shown(fake_vllm, tmp_path, capsys):
    fake_vllm("print(*(f'line {{n}}' for n in range(40)), 'no room for the KV cache', sep='\\n'); raise SystemExit(7)")
    with (
        pytest.raises(ValueError, match=r"^vLLM ended \(exit code 7\); its log is .*log$"),
        start_server(SERVING, tmp_path / "log"),
    ):
        pass
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1] == "  vLLM: no room for the KV cache" and shown[-2] == "  vLLM: line 39" and len(shown) == 13


def test_a_missing_environment_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_server, "PYTHON", vllm_server.ROOT / ".venv-vllm" / "bin" / "no-python")
    with (
        pytest.raises(
            ValueError, match=r"no \.venv-vllm/bin/no-python: run `make vllm`, or name a server \(--server\)"
        ),
        start_server(SERVING, tmp_path / "log"),
    ):
        pass
