"""Two processes that load a model in parts, and what each of them holds.

On a CPU, which computes in float32, the folder's weights are in float32 too, so that they are mapped from the files
and not copied.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from models import sharding
from models.loading import load_model

OPTIONS = {"quantization": "nf4", "dtype": "bfloat16"}  # on a CPU float32 in any case
ROOT = Path(__file__).parents[2]
PROMPT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "100000"}  # the C library gives larger pieces back as soon as they are free


def load_in_two(folder: Path, *, compare: bool = False, cpu: bool = True) -> list[dict]:
    """Return what two processes hold of the model in `folder`, and needed while they loaded it, bytes.

    Returns:
        For each process: held; whole, of the complete model; unit, of the largest one; peak; and to `compare`,
        different: the weights that are not those of a model which is loaded as a whole.
    """
    processes = []
    port = str(free_port())
    for rank in map(str, range(2)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **place, **PROMPT_MALLOC, "PYTHONPATH": path}
        command = [sys.executable, __file__, str(folder), *["compare"] * compare, *["cpu"] * cpu]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
        processes.append(subprocess.Popen(command, **options))
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def used_memory() -> int:
    """Return the bytes that the process has needed on its GPU, or has now of memory that no file backs."""
    if PartialState().device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])


def watch_loading() -> list[int]:
    """Return a list to which loading adds the process's memory whenever a unit is complete, and when it is sharded."""
    seen, shard = [used_memory()], sharding.fully_shard

    def watched(*args, **kwargs):
        seen.append(used_memory())
        module = shard(*args, **kwargs)
        seen.append(used_memory())
        return module

    sharding.fully_shard = watched
    return seen


def held_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all weights in this process, with what describes those in 4 bit."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    in_4_bit = [module for module in model.modules() if isinstance(module, sharding.ShardedLinear4bit)]
    local += [x for m in in_4_bit for x in (*m.constants, m.quant_state.absmax) if x is not None]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in local}.values())


def differing(model: torch.nn.Module, whole: torch.nn.Module) -> list[str]:
    """Return the weights of the sharded model that, as FSDP2 puts them together, are not those of the whole one."""
    for unit in [module for module in model.modules() if isinstance(module, FSDPModule)]:
        unit.unshard()
    expected, found = dict(whole.named_parameters()), {}
    for name, parameter in model.named_parameters():
        assert not isinstance(parameter, DTensor)
        found[name] = parameter
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, sharding.ShardedLinear4bit) and name.endswith(".weight"):
            scales = expected[name].quant_state.absmax.view(torch.uint8)
            found[name] = parameter.view(torch.uint8)[: expected[name].numel() + scales.numel()]
            expected[name] = torch.cat([expected[name].data.flatten(), scales])
    assert found.keys() == expected.keys()
    return [name for name, x in found.items() if not torch.equal(x, torch.Tensor(expected[name]).view_as(x))]


def main(folder: str, *words: str) -> None:
    PartialState(cpu="cpu" in words)
    torch.ones(512, 512) @ torch.ones(512, 512)
    seen = watch_loading()
    model = load_model(folder, **OPTIONS, shard=True)
    figures = {
        "held": held_bytes(model),
        "whole": sum(p.numel() * p.element_size() for p in model.parameters()),
        "unit": max(unit_sizes(model)),
        "peak": max(seen) - seen[0],
    }
    if "compare" in words:
        figures["different"] = differing(model, load_model(folder, **OPTIONS))
    print(json.dumps(figures))
    dist.barrier()


def unit_sizes(model: torch.nn.Module) -> list[int]:
    """Return the bytes of each complete unit; the last is what the tower has beside its blocks."""
    sizes, seen = [], set()
    for unit in sharding.sharded_units(model):
        own = [p for p in unit.parameters() if p not in seen]
        seen |= set(own)
        sizes.append(sum(p.numel() * p.element_size() for p in own))
    return sizes


if __name__ == "__main__":
    main(*sys.argv[1:])
