"""A model on one GPU, on several by DDP, and sharded over them by FSDP2: speed, memory with loading, first losses.

    python -m benchmarks.gpu_fsdp --folder /tmp/7b --compile    # two GPUs, 17 GB of disk
    python -m benchmarks.gpu_fsdp --folder /tmp/32b --shapes Qwen2.5-VL-32B --parts one fsdp2    # 67 GB of disk
    python -m benchmarks.gpu_fsdp --tiny    # the same code on a CPU

Each part is a run of its own through the pipeline's own functions, with accelerate's launcher, NF4, packs and
checkpointing. The weights are random, of published shapes, and read from safetensors files that the first command
writes; all language layers have the same ones. All parts see the same packs in the same steps: one GPU accumulates
them. Memory is what PyTorch reserves at most, from the start of the process on, of the process that needs most.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.cli import run

import torch
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, disable_progress_bars, load_from_disk
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from benchmarks.gpu_7b import DEFAULT_SHAPES, StepTimer, build_demo_processor, build_shapes, draw_samples
from models.families import FAMILIES, published_config
from training.build import build_model, build_trainer, decide
from training.config import parse_config
from training.data import TrainingData, open_processor
from training.distributed import barrier_and_shutdown, check_distributed
from training.lengths import measure_lengths

ROOT = Path(__file__).parents[1]
PARTS = ("one", "ddp", "fsdp2")


def write_model(folder: Path, shapes: str, *, tiny: bool) -> None:
    """Write configuration, processor, random weights (a file for each language layer) and samples."""
    processor = build_demo_processor(shapes)
    config = build_shapes(processor, shapes, tiny)
    dtype = torch.float32 if tiny else torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    prefix, shared, files = FAMILIES[config.model_type].language_layers, {}, {}
    for name, tensor in model.state_dict().items():
        layer = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else "rest"
        files.setdefault(layer, {})[name] = tensor
    index = {}
    for layer, tensors in files.items():
        file = f"model-{layer}.safetensors"
        index |= dict.fromkeys(tensors, file)
        drawn = {name: draw(name, tensor, shared, prefix) for name, tensor in tensors.items()}
        save_file(drawn, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    processor.save_pretrained(folder)
    draw_samples(24 if tiny else 200, (112, 84) if tiny else (600, 450)).save_to_disk(folder / "samples")
    config.save_pretrained(folder)  # last: it says that the rest is there


def draw(name: str, like: torch.Tensor, shared: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """Return random weights for a tensor without any, the same ones for all language layers; norms scale by one."""
    key = name.removeprefix(prefix).partition(".")[2] if name.startswith(prefix) else name
    if name.startswith(prefix) and key in shared:
        return shared[key]
    if like.ndim == 1:
        drawn = torch.full(like.shape, float(name.endswith("weight")), dtype=like.dtype)
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"  # a GPU draws a hundred times as fast
        drawn = torch.empty(like.shape, dtype=like.dtype, device=device).normal_(std=0.02).cpu()
    if name.startswith(prefix):
        shared[key] = drawn
    return drawn


def recipe(folder: Path, out: Path, args: argparse.Namespace, part: str) -> list[str]:
    """Return the options of train_sft.py for a part."""
    values = {
        "config": ROOT / "configs" / "skin.yaml", "model_name_or_path": folder, "output_dir": out,
        "pack_tokens": args.pack_tokens, "max_length": args.pack_tokens, "max_steps": args.steps, "logging_steps": 1,
        "eval_strategy": "no", "save_strategy": "no", "disable_tqdm": "true", "lora_dropout": 0, "warmup_steps": 0,
        "gradient_checkpointing": "true", "activation_offloading": args.offload, "compile_layers": args.compile,
        "offload_embedding": args.offload_embedding,
        "gradient_accumulation_steps": args.processes if part == "one" else 1, "shard_base": part == "fsdp2",
    }  # fmt: skip
    if args.tiny:
        values |= {"min_pixels": 28 * 28, "max_pixels": 112 * 112}
    if not torch.cuda.is_available():
        values |= {"use_cpu": "true", "bf16": "false", "dtype": "float32", "optim": "adamw_torch"}
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def launch(folder: Path, args: argparse.Namespace, part: str) -> dict:
    """Run a part in processes of its own and return what it measured."""
    with tempfile.TemporaryDirectory() as out:
        result = Path(out) / "result.json"
        options = ["--num_processes", "1"]
        if part != "one":
            options = ["--config_file", ROOT / "accelerate_config.yaml", "--num_processes", args.processes]
        command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "benchmarks.gpu_fsdp"]
        command += ["--measure", result, *recipe(folder, Path(out) / "run", args, part)]
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": "0"} if part == "one" else {})}
        start = time.perf_counter()
        subprocess.run([str(word) for word in command], check=True, cwd=ROOT, env=environment)
        return {"part": part, **json.loads(result.read_text()), "total_seconds": time.perf_counter() - start}


def measure(result: Path, argv: list[str]) -> None:
    """Train as train_sft.py does, in each process of a part, and write what was measured."""
    start, settings = time.perf_counter(), parse_config(argv)
    check_distributed(settings)
    processor = open_processor(settings)
    samples: Dataset = load_from_disk(str(Path(settings.model.model_name_or_path) / "samples"))
    data = TrainingData(DatasetDict(train=samples), {"train": measure_lengths(samples, processor)}, {})
    torch.manual_seed(settings.training.seed)
    model = build_model(settings)
    loading = {"loading_seconds": time.perf_counter() - start, "loading_gb": reserved()}
    settings, recompute = decide(model, processor, data, settings)
    trainer = build_trainer(model, processor, data, settings, identity={}, recompute=recompute)
    timer = StepTimer(settings.training.device)
    trainer.add_callback(timer)
    trainer.train()
    seconds = statistics.median(timer.seconds()[len(timer.ends) // 2 :])
    rows = settings.training.gradient_accumulation_steps
    tokens = rows * sum(data.lengths["train"].total) / len(trainer.get_train_dataloader())
    found = gather_object([{**loading, "peak_gb": max(loading["loading_gb"], reserved())}])
    worst = {key: max(each[key] for each in found) for key in found[0]}
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if settings.training.process_index == 0:
        speed = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        result.write_text(json.dumps({**speed, **worst, "losses": losses}))
    barrier_and_shutdown()


def reserved() -> float:
    """Return the most memory that PyTorch has reserved on this process's GPU since its start, GB; 0 without one."""
    return torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else 0.0


def table(rows: list[dict]) -> str:
    names = {"one": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2"}
    lines = [f"{'':<10}{'tokens/s':>10}{'GB':>7}{'GB, loading':>13}{'s, loading':>12}  losses"]
    for row in rows:
        losses = " ".join(f"{loss:.4f}" for loss in row["losses"][:5])
        memory = f"{row['peak_gb']:>7.1f}{row['loading_gb']:>13.1f}{row['loading_seconds']:>12.0f}"
        lines.append(f"{names[row['part']]:<10}{row['tokens_per_second']:>10,.0f}{memory}  {losses}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    disable_progress_bars()
    if argv[:1] == ["--measure"]:
        return measure(Path(argv[1]), argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the model; it stays, and later commands use it (else none)")
    parser.add_argument("--shapes", default=DEFAULT_SHAPES, help="a name in models/families.py")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="none only writes the model")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="the second half is timed")
    parser.add_argument("--pack-tokens", type=int, help="4096; 256 with --tiny")
    parser.add_argument("--compile", action="store_true", help="compile_layers: true")
    parser.add_argument("--offload", action="store_true", help="activation_offloading: true")
    parser.add_argument("--offload-embedding", action="store_true", help="offload_embedding: true")
    parser.add_argument("--tiny", action="store_true", help="three narrow layers and small images, on a CPU too")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    args.pack_tokens = args.pack_tokens or (256 if args.tiny else 4096)
    if published_config(args.shapes) is None:
        raise ValueError(f"--shapes: unknown {args.shapes}; models/families.py has the known ones")
    if args.parts and not args.tiny and torch.cuda.device_count() < args.processes:
        raise ValueError(f"{torch.cuda.device_count()} GPUs here: --tiny runs the same code on a CPU")
    with tempfile.TemporaryDirectory() as temporary:
        measure_parts(args.folder or Path(temporary), args)


def measure_parts(folder: Path, args: argparse.Namespace) -> None:
    start = time.perf_counter()
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_model(folder, args.shapes, tiny=args.tiny)
        print(f"wrote {args.shapes} to {folder} in {time.perf_counter() - start:.0f} s", flush=True)
    rows = []
    for part in args.parts:
        rows.append(launch(folder, args, part))
        print(json.dumps(rows[-1]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1))
    print(f"\n{args.shapes}", table(rows), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
