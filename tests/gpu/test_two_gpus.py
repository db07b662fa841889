"""Two GPUs learn what one does, also when each holds a part of the base model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from demo.tiny_model import save_tiny_model
from helpers.runs import TEXTS, rows_of, train_args
from helpers.sharded_loading import load_in_two

ROOT = Path(__file__).parents[2]
TIMEOUT = "280"  # s; a run that takes longer hangs, and its processes end with it
TOWER = {"freeze_vision_encoder": "false", "train_merger": "true"}
SHARDED = {"shard_base": "true"}
COMPILED = {"compile_layers": "true", "gradient_checkpointing": "true", "attn_implementation": "varlen"}
FORMS = {
    "ddp": TOWER,
    "sharded": {**SHARDED, **TOWER},
    "sharded, frozen tower, compiled": {**SHARDED, **COMPILED},
}
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes two GPUs or more")


def train(base, data, out, *, processes, **settings):
    """Train on so many GPUs."""
    defaults = {"use_cpu": "false", "bf16": "true", "dtype": "bfloat16", "eval_strategy": "steps", "eval_steps": 6}
    defaults |= {"max_steps": 12, "save_steps": 6, "save_total_limit": 5, "per_device_train_batch_size": 1}
    options = ["--num_processes", "1"] if processes == 1 else ["--config_file", str(ROOT / "accelerate_config.yaml")]
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": "0"} if processes == 1 else {})}
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", *options, "train_sft.py"]
    words = ["timeout", "--kill-after=10", TIMEOUT, *command, *train_args(base, data, out, **{**defaults, **settings})]
    ended = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("form", FORMS)
def test_two_gpus_learn_as_one(tiny_base, mixed_data, tmp_path, form):
    own = {name: value for name, value in FORMS[form].items() if name != "shard_base"}
    train(tiny_base, mixed_data, tmp_path / "one", processes=1, gradient_accumulation_steps=2, **own)
    train(tiny_base, mixed_data, tmp_path / "two", processes=2, **FORMS[form])
    curves = [torch.tensor(rows_of(tmp_path / name, "loss")) for name in ("one", "two")]
    torch.testing.assert_close(*curves, atol=0.05, rtol=0)  # bfloat16


def test_a_sharded_run_that_is_resumed_leaves_the_same_adapter(tiny_base, mixed_data, tmp_path):
    train(tiny_base, mixed_data, tmp_path / "whole", processes=2, **SHARDED)
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    train(tiny_base, mixed_data, tmp_path / "resumed", processes=2, **SHARDED)
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert adapters[0] == adapters[1]


def test_loading_in_parts_never_fills_a_gpu(tmp_path):
    save_tiny_model(tmp_path, TEXTS, hidden_size=2048, num_layers=16)
    for found in load_in_two(tmp_path, cpu=False, compare=True):
        assert found["different"] == []
        assert found["held"] == pytest.approx(found["whole"] / 2, rel=0.01)
        assert found["held"] < found["peak"] < found["held"] + 1.5 * found["unit"] < 0.95 * found["whole"]
