"""One process that holds a model as it is and then sharded, each plain and compiled, and what its layers return."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import get_peft_model
from transformers import AutoProcessor

from benchmarks.gpu_7b import draw_samples
from collator import VisionSFTCollator
from helpers.sharded_loading import ROOT, free_port
from models.attention import use_varlen
from models.compilation import compile_layers, language_layers
from models.loading import load_model
from models.lora import build_lora_config
from models.recomputation import NOTHING
from models.tower import speed_up_frozen_tower


def compare_states(folder: Path, dtype: str) -> dict[str, list[float]]:
    """Return, for plain and compiled, the largest relative difference of a layer's output when the model is sharded,
    and that of the gradient."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, str(folder), dtype]
    environment = {**os.environ, **place, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_step(folder: str, dtype: str, batch: dict, *, shard: bool, compiled: bool) -> tuple[list, torch.Tensor]:
    """Return the outputs of the tower's blocks and the language layers, and the gradient of LoRA."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = load_model(folder, quantization="nf4", dtype=dtype, shard=shard, frozen_tower=True)
    use_varlen(model)
    speed_up_frozen_tower(model)
    model = get_peft_model(model, build_lora_config(model, r=8, lora_alpha=16, lora_dropout=0.0)).train()
    if compiled:
        compile_layers(model, keep=NOTHING)
    states, base = [], model.get_base_model()
    for layer in (*base.model.visual.blocks, *language_layers(model)):
        layer.register_forward_hook(lambda _, inputs, out: states.append(out.detach().float()))
    with torch.autocast(PartialState().device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        model(**batch, use_cache=False).loss.backward()
    return states, torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def main(folder: str, dtype: str) -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = PartialState(cpu=not cuda).device
    samples = draw_samples(8, (336, 252))
    batch = VisionSFTCollator(AutoProcessor.from_pretrained(folder), packed=True)([samples[n] for n in range(8)])
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    differences = {}
    for compiled in (False, True):
        (states, gradient), (ours, own) = (
            run_step(folder, dtype, batch, shard=shard, compiled=compiled) for shard in (False, True)
        )
        furthest = max(relative(a, b) for a, b in zip(ours, states, strict=True))
        differences["compiled" if compiled else "plain"] = [furthest, relative(own, gradient)]
    print(json.dumps(differences))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
