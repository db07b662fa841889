"""A process that has loaded the libraries and forks commands, alone or as several ranks: a second each instead of ten.

It reads requests from stdin, one JSON a line. A request with `command` starts it and is answered with the processes'
numbers, the leaders of process groups of their own; one with `wait` is answered with the exit codes. accelerate shards
no model over CPUs; a request that pretends tells it, once the ranks can talk, that they are GPUs.
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

from common.cli import run

import huggingface_hub.constants
import torch.distributed.fsdp
from accelerate import PartialState
from accelerate.utils import DistributedType

import eval_sft
import merge_adapter
import push_adapter
import train_sft
from benchmarks.reliability import child
from common import hub_client, output_folder
from evaluation import engines
from training.trainer import SafeSFTTrainer

COMMANDS = {module.__name__: module for module in (eval_sft, merge_adapter, push_adapter, train_sft)}
TIMEOUT = 120  # s; what takes longer hangs


def pretend(kind: str) -> None:
    """Have accelerate take the ranks for GPUs once the model is about to be built, as DeepSpeed's are: "DEEPSPEED"."""
    build = train_sft.build_model

    def build_after(*args):
        os.environ["ACCELERATE_USE_CPU"] = "false"
        PartialState().distributed_type = DistributedType[kind]
        return build(*args)

    train_sft.build_model = build_after


def spoil(step: int) -> None:
    """Make the loss of rank 1 NaN at a step."""
    compute = SafeSFTTrainer.compute_loss

    def compute_spoilt(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == step and self.args.process_index == 1 else loss

    SafeSFTTrainer.compute_loss = compute_spoilt


def slow_down(rank: int) -> None:
    """Make rank 1 at least ten times slower at answering, and every collective fail after five seconds."""
    init, generate = torch.distributed.init_process_group, engines.generate

    def init_impatiently(*args, **options):
        return init(*args, **{**options, "timeout": timedelta(seconds=5)})

    def generate_slowly(*args, **options):
        start = time.monotonic()
        answers = generate(*args, **options)
        time.sleep(max(3, 9 * (time.monotonic() - start)))
        return answers

    torch.distributed.init_process_group = init_impatiently
    if rank == 1:
        engines.generate = generate_slowly


def start(request: dict, rank: int, port: int) -> int:
    def before() -> None:
        os.setsid()
        if (ranks := len(request["ranks"])) > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            os.environ.update({key: str(value) for key, value in place.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(request["env"])
        importlib.reload(huggingface_hub.constants)  # of the Hub's address, its cache, and being offline
        hub_client.WAITS = (0.01,) * 4
        output_folder.FILE_TIMEOUT = 0.5
        if request["pretend"]:
            pretend(request["pretend"])
        if request["spoil"] is not None:
            spoil(request["spoil"])
        if request["slow"]:
            slow_down(rank)

    module, arguments = COMMANDS[request["command"]], request["ranks"][rank]
    return child(lambda: module.main(arguments), Path(f"{request['log']}.{rank}"), before)


def wait_for(processes: list[int]) -> list[int | None]:
    """Return the exit codes; None for a rank that had to be killed, as it did not end."""
    codes, deadline = dict.fromkeys(processes), time.monotonic() + TIMEOUT
    while None in codes.values():
        for process in [process for process, code in codes.items() if code is None]:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                return [codes[process] for process in processes]
        time.sleep(0.02)
    return list(codes.values())


def answer(request: dict) -> list[int | None]:
    if "wait" in request:
        return wait_for(request["wait"])
    port = free_port()
    return [start(request, rank, port) for rank in range(len(request["ranks"]))]


def serve() -> None:
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def free_port() -> int:
    """Return a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    run(serve)
