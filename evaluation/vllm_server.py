"""A vLLM server of our own, in the environment of `make vllm`, on loopback."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from evaluation.chat_client import ChatClient
from models.serving import Serving, on_cpu

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SUPERVISOR = Path(__file__).with_name("supervisor.py")
START_TIMEOUT = 3600  # s; loading 72B from a slow disk
STOP_SECONDS = 15  # that it has to end by itself
SHOWN_LINES = 12  # of the log, when the server has ended
# Of our own launcher and environment; vLLM has others.
FOREIGN_VARIABLES = (
    "PYTHONPATH",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
NO_TELEMETRY = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}


@contextmanager
def start_server(serving: Serving, log: Path) -> Iterator[ChatClient]:
    """Start vLLM, wait until it answers, and yield a client; it is stopped when the block or this process ends.

    Args:
        serving: what to serve.
        log: file that gets the server's output.

    Raises:
        ValueError: vLLM is not installed, or ended before it answered; its last lines are then printed.
    """
    if not PYTHON.is_file():
        raise ValueError(f"--engine vllm: no {PYTHON.relative_to(ROOT)}: run `make vllm`, or name a server (--server)")
    log.parent.mkdir(parents=True, exist_ok=True)
    port = free_port()
    words = server_command(serving, port)
    environment = {k: v for k, v in os.environ.items() if k not in FOREIGN_VARIABLES} | NO_TELEMETRY
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, SUPERVISOR, str(STOP_SECONDS), *words], env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        print(f"{'vLLM':<26}starting; its log is {log}", file=sys.stderr, flush=True)
        client = ChatClient(f"http://127.0.0.1:{port}", lost=lambda: describe_end(process, log))
        wait_until_ready(client, process, log)
        yield client
    finally:
        process.stdin.close()
        process.wait()


def server_command(serving: Serving, port: int) -> list[str]:
    """Return the command that starts the server; on a CPU it computes in float32 and compiles nothing."""
    if cpu := not torch.cuda.is_available():
        serving = on_cpu(serving)
    module = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", serving.base]
    place = ["--host", "127.0.0.1", "--port", str(port), "--uvicorn-log-level", "warning"]
    return [*module, *serving.options(), *place, *(["--enforce-eager"] if cpu else [])]


def free_port() -> int:
    """Return a port of loopback that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(client: ChatClient, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not client.is_ready():
        if process.poll() is not None:
            raise ValueError(describe_end(process, log))
        if time.monotonic() > deadline:
            raise ValueError(f"--engine vllm: not ready after {START_TIMEOUT} s; its log is {log}")
        time.sleep(0.2)


def describe_end(process: subprocess.Popen, log: Path) -> str:
    """Print the last lines of the log of a server that does not answer, and return one line about it."""
    try:
        code = process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        return f"vLLM does not answer; its log is {log}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    print(*(f"  vLLM: {line}" for line in lines[-SHOWN_LINES:]), sep="\n", file=sys.stderr, flush=True)
    return f"vLLM ended (exit code {code}); its log is {log}"
