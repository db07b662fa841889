"""What each measure for speed brings on one GPU, every part in a process of its own, printed at once.

    python -m benchmarks.gpu_speed                     # one GPU with 80 GB, under 10 minutes
    python -m benchmarks.gpu_speed layers no-recompute # these parts alone
    python -m benchmarks.gpu_speed --tiny              # the same code on a CPU

The shapes and samples are those of `gpu_7b`. Gradients are compared with those of the plain model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.cli import run

import torch
from peft import get_peft_model
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks import gpu_7b
from collator import VisionSFTCollator
from demo.tiny_model import build_processor
from models.attention import takes_gqa, use_varlen
from models.compilation import compile_layers, keep_wide_products, language_layers
from models.flops import matmul_ceiling, shape_of_batch, useful_flop, work_of
from models.last_layer import spare_last_layer
from models.lora import build_lora_config
from models.recomputation import NARROW, NOTHING
from models.tower import speed_up_frozen_tower
from training.lengths import measure_lengths

LIMIT = 240  # s a part
# name: recompute every n-th language layer (0: none), how the layers are compiled, whether the tower is sped up and
# the last layer's MLP spared
SPEED = {
    "selective": (0, 28, True),  # a number: of layers that keep wide products
    "selective-12": (0, 12, True),
    "selective-0": (0, 0, True),
    "everything": (0, "everything", True),  # recomputed, within the compiled layers
    "no-recompute": (0, "layers", True),
    "layers": (1, "layers", True),
    "half": (2, "layers", True),
    "no-recompute-plain-ends": (0, "layers", False),
    "parts": (1, "parts", True),
    "eager": (1, None, True),
}
PARTS = ("exact", *SPEED)


def prepare(tiny: bool):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = build_processor(["the lesion shows a brown network with regular borders. What is shown?"])
    processor.image_processor.size = {"shortest_edge": 50176, "longest_edge": 602112}
    train = gpu_7b.draw_samples(24 if tiny else 400, (112, 84) if tiny else (600, 450))
    base = gpu_7b.build_model(processor, tiny, device)
    use_varlen(base)
    return base, processor, train, device


def exact(tiny: bool, *, compiled: bool) -> dict:
    """Return relative differences of loss and gradients from those of the plain model, recomputed and not."""
    base, processor, train, device = prepare(tiny)
    model = get_peft_model(base, build_lora_config(base, r=8, lora_alpha=16, lora_dropout=0.0)).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator(device).manual_seed(1))
    batch = VisionSFTCollator(processor, packed=True)([train[n] for n in range(6)])
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}

    def gradients() -> tuple[torch.Tensor, float]:
        torch.manual_seed(0)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        found = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found, loss.item()

    results = {"fewer K/V heads": takes_gqa(device)}
    reference, loss = gradients()

    def compare(name: str) -> None:
        found, new = gradients()
        results[name] = {
            "gradients": ((found - reference).norm() / reference.norm()).item(), "loss": abs(new - loss) / loss
        }  # fmt: skip
        print(name, results[name], flush=True)

    compare("the same again")
    speed_up_frozen_tower(base)
    compare("tower")
    spare_last_layer(model)
    compare("last layer")
    if compiled:
        for name, keep in {"compiled": None, "everything recomputed": NOTHING, "selective": NARROW}.items():
            start = time.perf_counter()
            compile_layers(base, keep=keep)
            compare(name)
            results[name]["seconds"] = time.perf_counter() - start
            if keep != NARROW:
                restore_layers(base)
        keep_wide_products(model, len(language_layers(model)))
        compare("selective, wide products kept")
    return results


def restore_layers(model) -> None:
    """Undo `compile_layers` with complete layers."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.__class__ = type(layer).__base__


class Prepare(gpu_7b.StepTimer):
    """Compile the layers and recompute every `every`-th language layer."""

    every, compiled, ends = 1, None, False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.ends:
            spare_last_layer(model)
        if self.compiled is not None:
            selective = isinstance(self.compiled, int)
            keep = NARROW if selective else NOTHING if self.compiled == "everything" else None
            compile_layers(model, whole=self.compiled != "parts", keep=keep)
            if selective:
                keep_wide_products(model, self.compiled)
        for number, layer in enumerate(model.get_base_model().model.language_model.layers):
            layer.gradient_checkpointing = layer.gradient_checkpointing and number % self.every == 0


def speed(name: str, tiny: bool, pack_tokens: int, steps: int, profiled: bool) -> dict:
    every, compiled, ends = SPEED[name]
    base, processor, train, device = prepare(tiny)
    measured = measure_lengths(train, processor)
    Prepare.ends = ends
    if ends:
        speed_up_frozen_tower(base)
    Prepare.every, Prepare.compiled = max(every, 1), compiled
    Prepare.profiled = steps + 1 if profiled else None
    gpu_7b.StepTimer = Prepare
    setting = gpu_7b.Setting(
        name, pack_tokens=pack_tokens, varlen=True, compiled=compiled is not None, checkpointing=every > 0
    )
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = gpu_7b.measure(setting, base, processor, train, measured.total, steps, Path(folder))
        result["seconds_in_all"] = time.perf_counter() - start
    if "error" not in result:
        result["useful_flops"] = result["tokens_per_second"] * useful_flop_of_token(
            base, processor, train, spared=ends
        )
        if device.type == "cuda":
            result["mfu"] = result["useful_flops"] / matmul_ceiling(device, torch.bfloat16)
    return result


def useful_flop_of_token(base, processor, train, *, spared: bool) -> float:
    """Return the FLOP of a token without what is computed twice, from the first samples."""
    shape = shape_of_batch(VisionSFTCollator(processor, packed=True)([train[n] for n in range(20)]))
    return useful_flop(work_of(base), shape if spared else shape._replace(spared=0)) / shape.tokens


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all when none is named")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, on a CPU too")
    parser.add_argument("--pack-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--profile", action="store_true", help="profile one more step")
    parser.add_argument("--here", action="store_true", help="run the one named part in this process")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        raise ValueError(f"PART: expected {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available() and not args.tiny:
        raise ValueError("no GPU here: --tiny runs the same code on a CPU")
    if args.here:
        [name] = args.parts
        size = 256 if args.tiny else args.pack_tokens
        result = (
            exact(args.tiny, compiled=not args.tiny)
            if name == "exact"
            else speed(name, args.tiny, size, args.steps, args.profile)
        )
        print(json.dumps({"part": name, **result}), flush=True)
        return
    options = (
        ["--tiny"] * args.tiny
        + ["--profile"] * args.profile
        + ["--pack-tokens", str(args.pack_tokens), "--steps", str(args.steps)]
    )
    for name in args.parts or PARTS:
        command = [sys.executable, "-m", "benchmarks.gpu_speed", name, "--here", *options]
        try:
            code = subprocess.run(command, timeout=LIMIT).returncode
            reason = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            reason = f"not done within {LIMIT} s"
        if reason:
            print(json.dumps({"part": name, "error": reason}), flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
