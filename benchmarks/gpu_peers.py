"""This pipeline beside stock TRL and Unsloth on one GPU: the same weights, photographs and LoRA, one call.

    python -m benchmarks.gpu_peers --trl DIR --unsloth DIR --out peers.json   # one GPU with 80 GB, under 10 minutes
    python -m benchmarks.gpu_peers --only ours unsloth
    python -m benchmarks.gpu_peers --tiny                                     # the same code on a CPU, without Unsloth

DIR is a folder with a side's packages (`pip install --target DIR`), before others on its PYTHONPATH; rows with flash
attention 2 need flash-attn in it. Unsloth 2026.10.9 takes transformers up to 5.17. What a side's forward pass leaves
on the GPU for its backward pass is the column "held": with 5.23 Unsloth recomputes nothing, though it is told to.
Each side runs in a process of its own; its tokens are those of the samples, without padding, its memory is what
PyTorch reserved: ours with loading and trials, the others' in the steps alone. What did not run is said.

Ours is `train_sft.py` with the recipe of the name; the seconds to the tenth step count from the start of the command.
"""

import argparse
import importlib.machinery
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

from common.cli import run

import torch
from transformers import AutoModelForImageTextToText

from benchmarks.gpu_7b import DEFAULT_SHAPES, build_demo_processor, build_shapes, draw_samples
from benchmarks.step_profile import launch_seconds
from models.flops import matmul_ceiling

# Run by a process of its own: a CUDA context takes memory too.
HOLD = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(float(sys.argv[1]) * 1e9), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""
ROOT, PEERS = Path(__file__).parents[1], Path(__file__).parent / "peers"
SAMPLES = 1200  # the last pack of an epoch is partly empty, which should be no large part of what is timed
STEPS, TENTH, LIMIT = 15, 10, 300  # of each side; the step until which ours is timed; s a side
REPAID = 60  # steps after which compiling has repaid itself, so that `compile_layers: auto` compiles
LOGGED = 5  # steps a line of the log, which waits for the GPU
COMPILED = {"compile_layers": "true", "gradient_checkpointing": "selective"}
PACKS_8192 = COMPILED | {"pack_tokens": 8192, "gradient_accumulation_steps": 1}
PACKS_16384 = PACKS_8192 | {"pack_tokens": 16384}
RECOMPUTED = {"compile_layers": "true", "gradient_checkpointing": "true"}
OFFLOADED = RECOMPUTED | {"activation_offloading": "true"}
SMALL = RECOMPUTED | {"offload_embedding": "true"}
PACKS_4096 = {"pack_tokens": 4096, "gradient_accumulation_steps": 2}
PACKS_3584 = {"pack_tokens": 3584, "max_length": 3584, "gradient_accumulation_steps": 3}
PACKS_2752 = {"pack_tokens": 2752, "max_length": 2752, "gradient_accumulation_steps": 3}  # 8,256 tokens a step


class Ours(NamedTuple):
    """One line of the table: settings beside configs/skin.yaml, GB that are free on the GPU (all when None), steps."""

    settings: dict
    free: float | None = None
    steps: int = STEPS


OURS = {
    "configs/skin.yaml": Ours({}, steps=REPAID),
    "packs of 16,384, selective, no dropout": Ours(PACKS_16384 | {"lora_dropout": 0}),
    "packs of 8,192, selective": Ours(PACKS_8192),
    "packs of 8,192, selective, no dropout": Ours(PACKS_8192 | {"lora_dropout": 0}),
    "packs of 8,192, selective, 24 GB free": Ours(PACKS_8192, free=24),
    "packs of 8,192, all recomputed": Ours(PACKS_8192 | RECOMPUTED),
    "packs of 8,192, all recomputed, offloaded": Ours(PACKS_8192 | OFFLOADED),
    "2 packs of 4,096, all recomputed": Ours(PACKS_4096 | RECOMPUTED),
    # of these 10.1 GB CUDA takes 0.5
    "3 packs of 3,584, all recomputed, embedding offloaded, 10.1 GB free": Ours(PACKS_3584 | SMALL, free=10.1),
    "3 packs of 2,752, all recomputed, 10.1 GB free": Ours(PACKS_2752 | RECOMPUTED, free=10.1),
}


class Side(NamedTuple):
    """One line of the table: a script in `peers`, the batch, which attention it wants, and whether it recomputes."""

    script: str
    batch: int
    flash: bool
    recompute: bool = True


SIDES = {
    "unsloth, batch 16": Side("unsloth_steps.py", 16, True),
    "unsloth, batch 16, nothing recomputed": Side("unsloth_steps.py", 16, True, recompute=False),
    "trl, flash attention 2, batch 32": Side("trl_steps.py", 32, True),
    "trl, flash attention 2, batch 4": Side("trl_steps.py", 4, True),
    "trl, its default, batch 16": Side("trl_steps.py", 16, False),
}


def save_inputs(folder: Path, *, tiny: bool) -> None:
    """Write random weights of the 7B's shapes, photographs, and the samples as each side reads them."""
    processor, device = build_demo_processor(DEFAULT_SHAPES), "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        config = build_shapes(processor, DEFAULT_SHAPES, tiny)
        base = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    base.save_pretrained(folder / "base", max_shard_size="4GB")
    processor.save_pretrained(folder / "base")
    (folder / "images").mkdir()
    rows, records = [], []
    for row in draw_samples(24 if tiny else SAMPLES, (112, 84) if tiny else (600, 450)):
        name, [asked, answered] = f"{row['id']}.jpg", row["messages"]
        (folder / "images" / name).write_bytes(row["images"][0]["bytes"])
        question = asked["content"].removeprefix("<image>")
        rows.append({"image": name, "question": question, "answer": answered["content"]})
        turns = [("human", asked["content"]), ("gpt", answered["content"])]
        conversation = [{"from": role, "value": text} for role, text in turns]
        records.append({"id": row["id"], "image": name, "conversations": conversation})
    (folder / "samples.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "annotations.json").write_text(json.dumps(records), encoding="utf-8")


def ensure_inputs(folder: Path, *, tiny: bool) -> None:
    """Write the inputs unless they are there, in a process of its own, which leaves no GPU memory taken."""
    if not (folder / "annotations.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save = [sys.executable, "-m", "benchmarks.gpu_peers", "--save", str(folder)]
        subprocess.run(save + ["--tiny"] * tiny, check=True)


def run_peer(side: Side, packages: Path | None, folder: Path, *, tiny: bool) -> dict:
    """Return what a side's script printed last, and all its lines."""
    has_flash = packages is not None and importlib.machinery.PathFinder.find_spec("flash_attn", [str(packages)])
    if side.flash and not has_flash and not tiny:
        return {"error": f"no flash-attn in {packages}" if packages else "no folder with its packages was given"}
    attention = "flash_attention_2" if side.flash and has_flash else "sdpa"
    size = build_demo_processor(DEFAULT_SHAPES).image_processor.size
    settings = {"folder": str(folder), "attention": attention, "size": dict(size), "steps": STEPS}
    settings |= {"batch": 2 if tiny else side.batch, "recompute": side.recompute}
    paths = [str(packages)] if packages else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    environment.pop("PYTORCH_ALLOC_CONF", None)  # common.cli has set it; this side decides for itself
    command = [sys.executable, str(PEERS / side.script), json.dumps(settings)]
    done = subprocess.run(command, env=environment, timeout=LIMIT, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    *lines, last = done.stdout.strip().splitlines()
    return {**json.loads(last), "output": [*lines, *done.stderr.splitlines()]}


@contextmanager
def free_memory(gigabytes: float | None) -> Iterator[None]:
    """Keep all but so much of the GPU's memory in another process, as if the card were smaller; all free when None."""
    if gigabytes is None or not torch.cuda.is_available():
        yield
        return
    with subprocess.Popen([sys.executable, "-c", HOLD, str(gigabytes)], stdin=PIPE, stdout=PIPE, text=True) as holder:
        holder.stdout.readline()  # it holds the memory, until its standard input ends
        yield


def run_ours(ours: Ours, folder: Path, *, tiny: bool) -> dict:
    """Return the speed of `train_sft.py` after its first steps, its memory, the seconds to its tenth step, and its
    lines with their seconds."""
    with free_memory(ours.free), tempfile.TemporaryDirectory() as output:
        options = {
            "model_name_or_path": folder / "base", "dataset_path": folder / "annotations.json",
            "image_dir": folder / "images", "output_dir": Path(output) / "run", "max_steps": ours.steps,
            "logging_steps": LOGGED, "eval_strategy": "no", "save_strategy": "no", **ours.settings,
        }  # fmt: skip
        if tiny:
            options |= {"pack_tokens": 256, "max_length": 256, "compile_layers": "false", "use_cpu": "true"}
            options |= {"gradient_checkpointing": "true", "gradient_accumulation_steps": 1}
        command = [sys.executable, str(ROOT / "train_sft.py"), "--config", str(ROOT / "configs" / "skin.yaml")]
        command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
        start, lines = time.perf_counter(), []
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        watchdog = threading.Timer(LIMIT, process.kill)
        watchdog.start()
        for line in process.stdout:
            lines.append((round(time.perf_counter() - start, 1), line.strip()))
        code = process.wait()
        watchdog.cancel()
        if code == -signal.SIGKILL:
            return {"error": f"not done within {LIMIT} s", "output": lines}
        if code:
            return {"error": lines[-1][1][:200] if lines else "no message", "output": lines}
        tenth = next(seconds for seconds, line in lines if f"{TENTH}/{ours.steps} " in line)
        speed = later_steps(Path(output) / "run" / "metrics.jsonl")
        return {**speed, "seconds_to_tenth_step": tenth, "output": lines}


def later_steps(metrics: Path) -> dict:
    """Return the mean speed of a run's lines of figures after the first, and its memory."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    _, *later = [row for row in rows if "tokens_per_second" in row]
    names = [name for name in ("tokens_per_second", "mfu", "hfu") if name in later[-1]]
    speed = {name: statistics.harmonic_mean([row[name] for row in later]) for name in names}
    return {**speed, "memory_gb": later[-1].get("reserved_gb")}


def table(results: dict[str, dict]) -> str:
    """Return a line for each side, beside Unsloth."""
    base = results.get("unsloth, batch 16", {}).get("tokens_per_second")
    lines = [f"{'':<42}{'tokens/s':>10}{'x Unsloth':>11}{'GB':>7}{'held':>7}{'10th step, s':>14}"]
    for name, result in results.items():
        if "error" in result:
            lines.append(f"{name:<42}  did not run: {result['error']}")
            continue
        speed = result["tokens_per_second"]
        figures = (base and speed / base, 2), (result.get("memory_gb"), 1), (result.get("held_gb"), 1)
        figures += ((result.get("seconds_to_tenth_step"), 0),)
        ratio, memory, held, tenth = (f"{x:.{n}f}" if x else "" for x, n in figures)
        lines.append(f"{name:<42}{speed:>10,.0f}{ratio:>11}{memory:>7}{held:>7}{tenth:>14}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="folder with stock TRL's packages; this environment's when left out")
    parser.add_argument("--unsloth", type=Path, help="folder with Unsloth's packages")
    parser.add_argument("--only", nargs="+", default=[""], help="sides whose name contains one of these words")
    parser.add_argument(
        "--folder", type=Path, help="for 17 GB of weights; they stay, and later commands use them (else none)"
    )
    parser.add_argument("--tiny", action="store_true", help="few narrow layers, on a CPU too")
    parser.add_argument("--out", type=Path, help="JSON file for the results, rewritten after each side")
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.save:
        save_inputs(args.save, tiny=args.tiny)
        return {}
    gpu = torch.cuda.is_available()
    if not gpu and not args.tiny:
        raise ValueError("no GPU here: --tiny runs the same code on a CPU")
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        ensure_inputs(folder, tiny=args.tiny)
        chosen = [name for name in (*(f"ours, {x}" for x in OURS), *SIDES) if any(word in name for word in args.only)]
        for name in chosen:
            results[name] = run_side(name, args, folder)
            figures = {key: value for key, value in results[name].items() if key != "output"}
            print(json.dumps({name: figures}), flush=True)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if gpu:
        ceiling, launch = matmul_ceiling(torch.device("cuda"), torch.bfloat16), launch_seconds(torch.device("cuda"))
        machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        print(f"{machine}, bf16 matmul ceiling {ceiling / 1e12:.0f} TFLOP/s, {1e6 * launch:.0f} us a launch")
    print(table(results))
    return results


def run_side(name: str, args: argparse.Namespace, folder: Path) -> dict:
    """Run one line of the table; what ends it is its result."""
    try:
        if name not in SIDES:
            return run_ours(OURS[name.removeprefix("ours, ")], folder, tiny=args.tiny)
        packages = args.unsloth if name.startswith("unsloth") else args.trl
        return run_peer(SIDES[name], packages, folder, tiny=args.tiny)
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {LIMIT} s"}


if __name__ == "__main__":
    sys.exit(run(lambda: main() and None))
