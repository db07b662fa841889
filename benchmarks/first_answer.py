"""Seconds until `predict.py` has given one answer, from its start, with a checkpoint of published shapes.

    python -m benchmarks.first_answer --folder /tmp     # one GPU with 24 GB, 17 GB of disk, two minutes
    python -m benchmarks.first_answer --tiny            # the same code on a CPU, in half a minute

Needs no weights: base and adapter are random, in files as a download and a training leave them; in NF4 as trained. The
command runs as a user's would; the first run, whose files are read from disk, does not count. The stages are those of
one more process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.cli import run

QUESTION = "What is shown?"
TOKENS = 32


def save_checkpoint(folder: Path, shapes: str, *, tiny: bool) -> None:
    """Write a base model, an adapter for it and a photograph to `folder`."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForImageTextToText

    from benchmarks.gpu_7b import build_demo_processor, build_shapes
    from common.files import LOADING_SETTINGS
    from models.lora import build_lora_config

    processor, device = build_demo_processor(shapes), "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForImageTextToText.from_config(build_shapes(processor, shapes, tiny), dtype=torch.bfloat16)
    base.save_pretrained(folder / "base", max_shard_size="4GB")
    processor.save_pretrained(folder / "base")
    model = get_peft_model(base, build_lora_config(base, r=16, lora_alpha=32))
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    processor.save_pretrained(folder / "adapter")
    settings = {"quantization": "nf4", "dtype": "bfloat16", "attn_implementation": "varlen"}
    (folder / "adapter" / LOADING_SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    draw_photograph(folder / "photo.jpg")


def draw_photograph(path: Path) -> None:
    from PIL import Image

    Image.effect_noise((600, 450), 60).convert("RGB").save(path, quality=90)


def time_command(folder: Path) -> float:
    """Return the seconds of `predict.py` for one answer."""
    command = [
        sys.executable,
        "predict.py",
        "--adapter",
        str(folder / "adapter"),
        "--image",
        str(folder / "photo.jpg"),
    ]
    command += ["--question", QUESTION, "--max-new-tokens", str(TOKENS)]
    start = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"predict.py failed: {done.stderr.strip().splitlines()[-1:]}")
    return time.perf_counter() - start


def time_stages(folder: Path) -> dict[str, float]:
    """Return the seconds of a new process's stages."""
    command = [sys.executable, "-m", "benchmarks.first_answer", "--stages", str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def run_stages(folder: Path) -> dict[str, float]:
    """Do what `predict.py` does, and return the seconds of each part."""
    times = [time.perf_counter()]
    import predict
    from evaluation.engines import TransformersEngine, load_processors
    from models.adapters import load_adapters
    from models.answering import speed_up_answering

    times.append(time.perf_counter())
    args = predict.build_parser().parse_args(["--adapter", str(folder / "adapter")])
    model, names = load_adapters(args.adapter, base=None, quantization="auto", dtype=None)
    times.append(time.perf_counter())
    speed_up_answering(model)
    engine = TransformersEngine(model, names, load_processors(names, None, args), 1)
    times.append(time.perf_counter())
    example = {"id": "x", "images": [str(folder / "photo.jpg")]}
    example["messages"] = [{"role": "user", "content": f"<image>{QUESTION}"}]
    engine.answers([example], TOKENS, adapter="default")
    times.append(time.perf_counter())
    names = ("imports", "base and adapter", "processor", "answer")
    return {name: round(b - a, 2) for name, a, b in zip(names, times, times[1:], strict=False)}


def measure(shapes: str, parent: Path | None, *, tiny: bool) -> dict:
    """Return the seconds of three runs of the command, and of the stages of a fourth."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        # in a process of its own, so that nothing of it stays on the GPU
        command = [sys.executable, "-m", "benchmarks.first_answer", "--save", folder, "--shapes", shapes]
        subprocess.run(command + ["--tiny"] * tiny, check=True, stdout=sys.stderr)
        first, *warm = [time_command(Path(folder)) for _ in range(3)]
        return {
            "first_answer_seconds": [round(value, 2) for value in warm],
            "first_answer_seconds_at_first": round(first, 2),
            "first_answer_stages": time_stages(Path(folder)),
        }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="Qwen2.5-VL-7B", help="a name in models/families.py")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept meanwhile (default: the system's)")
    parser.add_argument("--tiny", action="store_true", help="few narrow layers, on a CPU too")
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stages", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.save:
        save_checkpoint(args.save, args.shapes, tiny=args.tiny)
    elif args.stages:
        print(json.dumps(run_stages(args.stages)))
    else:
        print(json.dumps(measure(args.shapes, args.folder, tiny=args.tiny), indent=1))


if __name__ == "__main__":
    sys.exit(run(main))
