"""Two GPUs learn what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.runs import rows_of, train_args

ROOT = Path(__file__).parents[2]
FSDP2 = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
TOWER = {"freeze_vision_encoder": "false", "train_merger": "true"}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes two GPUs or more")
@pytest.mark.parametrize("config", [FSDP2, ROOT / "accelerate_config.yaml"], ids=lambda path: path.stem)
def test_two_gpus_learn_as_one(tiny_base, mixed_data, tmp_path, config):
    settings = {"use_cpu": "false", "bf16": "true", "dtype": "bfloat16", "bnb_4bit_quant_storage": "bfloat16"}
    settings |= {"max_steps": 12, "save_steps": 12, "eval_strategy": "no", "per_device_train_batch_size": 1, **TOWER}
    for name, options in (("one", ["--num_processes", "1"]), ("two", ["--config_file", config])):
        own = {**settings, "gradient_accumulation_steps": 2 if name == "one" else 1}
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": "0"} if name == "one" else {})}
        command = [Path(sys.executable).with_name("accelerate"), "launch", *options, "train_sft.py"]
        words = [*command, *train_args(tiny_base, mixed_data, tmp_path / name, **own)]
        ended = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=environment)
        assert ended.returncode == 0, ended.stderr
    curves = [torch.tensor(rows_of(tmp_path / name, "loss")) for name in ("one", "two")]
    torch.testing.assert_close(*curves, atol=0.05, rtol=0)  # bfloat16
