"""Steps of configs/skin_16gb.yaml as a T4 runs them: float16, and attention by segments of one length.

    python -m benchmarks.gpu_float16 --folder /tmp/7b    # one GPU; 17 GB of disk, see benchmarks/gpu_peers.py
    python -m benchmarks.gpu_float16 --tiny              # the same code on a CPU, in bfloat16

Newer GPUs have a kernel for variable lengths, which a T4 lacks; it is switched off here. The weights are random, of
the 7B's shapes. A step is skipped where gradients are not finite; the loss scale, 65,536 at first, is then halved.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

from common.cli import run

import torch

import train_sft
from benchmarks.gpu_peers import ensure_inputs
from models import attention

CONFIG = Path(__file__).parents[1] / "configs" / "skin_16gb.yaml"
SETTLED = 5  # steps after which none may be skipped


def recipe(folder: Path, out: Path, args: argparse.Namespace) -> list[str]:
    """Return the options of train_sft.py."""
    values = {
        "config": CONFIG, "model_name_or_path": folder / "base", "dataset_path": folder / "annotations.json",
        "image_dir": folder / "images", "output_dir": out, "max_steps": args.steps, "logging_steps": 1,
        "gradient_accumulation_steps": args.accumulate, "eval_strategy": "no", "save_strategy": "no",
    }  # fmt: skip
    if args.tiny:
        values |= {"min_pixels": 28 * 28, "max_pixels": 112 * 112, "use_cpu": "true", "fp16": "false"}
        values |= {"dtype": "bfloat16", "bf16": "true"}
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def steps_of(metrics: Path) -> list[dict]:
    """Return the lines of a run's steps."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "grad_norm" in row]


def is_skipped(step: dict) -> bool:
    return step["grad_norm"] is None or not math.isfinite(float(step["grad_norm"]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for weights and photographs, which stay (else none)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--accumulate", type=int, default=8, help="packs a step")
    parser.add_argument("--tiny", action="store_true", help="few narrow layers, on a CPU too")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.tiny:
        raise ValueError("no GPU here: --tiny runs the same code on a CPU")
    attention._has_kernel = lambda device: False
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = args.folder or Path(temporary) / "inputs", Path(temporary) / "run"
        ensure_inputs(folder, tiny=args.tiny)
        if code := train_sft.main(recipe(folder, out, args)):
            return code
        steps = steps_of(out / "metrics.jsonl")
    skipped = [number for number, step in enumerate(steps, 1) if is_skipped(step)]
    late = [number for number in skipped if number > SETTLED]
    last = steps[-1]
    print(f"{len(steps)} steps, skipped: {skipped or 'none'}, after step {SETTLED}: {late or 'none'}")
    print(f"loss {steps[0]['loss']:.3f} to {last['loss']:.3f}, at most {last.get('reserved_gb') or 0:.1f} GB reserved")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(run(main))
