"""QLoRA steps of published shapes on one GPU: stock TRL, ours packed, and ours with each optimisation off.

    python -m benchmarks.gpu_7b --out figures.json      # one GPU with 40 GB or more, under 10 minutes
    python -m benchmarks.gpu_7b --shapes Qwen2.5-VL-7B Qwen3-VL-8B Qwen3.5-9B --only "packs of 8192"
    python -m benchmarks.gpu_7b --tiny                  # the same code on a CPU, in seconds, nothing compiled

Needs no weights: the shapes are those of models/families.py, the NF4 weights are random, the tokenizer is the demo's,
the images are drawn at 600 x 450 px. Each setting trains a few steps through its trainer; the last three are timed.
Tokens are those of the samples, without padding. FLOPs are counted by models/flops.py: HFU has those executed, MFU
leaves recomputation out, both as a share of the data sheet's peak. Qwen3.5 is packed where flash-linear-attention is
installed.
"""

import argparse
import gc
import io
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path

from common.cli import run

import torch
import transformers
import trl
from bitsandbytes.nn import Linear4bit, Params4bit
from datasets import Dataset, List, disable_progress_bars
from datasets import Image as ImageFeature
from peft import get_peft_model
from PIL import Image, ImageFilter
from transformers import AutoModelForImageTextToText, PreTrainedConfig, TrainerCallback
from transformers.utils import is_flash_linear_attention_available
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from benchmarks.step_profile import ProfileCallback
from collator import VisionSFTCollator
from data_prep.convert import FEATURES
from demo.tiny_model import build_config, build_processor
from models.attention import use_varlen
from models.compilation import compile_layers
from models.experts import WEIGHTS, add_stand_ins, nf4_name, use_frozen_experts
from models.families import FAMILIES, published_config
from models.flops import matmul_ceiling, recomputed_flop, shape_of_samples, useful_flop, work_of
from models.lora import build_lora_config
from models.thinking import set_thinking
from models.tower import multiply_patches
from planning.estimates import GPUS
from training.lengths import SampleLengths, measure_lengths
from training.samplers import EpochOrder, PackSampler, PaddedSampler, count_epochs
from training.speed import SpeedCallback
from training.trainer import SafeSFTTrainer, pin_trainable_to_float32

DEFAULT_SHAPES = "Qwen2.5-VL-7B"
TINY_LAYERS = 3  # with --tiny
TIMED = 3  # steps, the last ones
PEAKS = {"H200": GPUS["H100"], **GPUS}  # FLOP/s; both have the same chip


@dataclass
class Setting:
    """One line of the table: how the same samples are batched, and which optimisations are on."""

    name: str
    pack_tokens: int | None = None
    batch: int = 1
    accumulate: int = 1
    varlen: bool = False
    compiled: bool = False
    checkpointing: bool = True
    stock: bool = False
    target_experts: bool = False


def settings(
    tiny: bool, *, packs_are_exact: bool = True, borders_by_sdpa: bool = True, experts: bool = False
) -> list[Setting]:
    """Return the lines of the table that make sense for a model.

    Args:
        tiny: whether the packs are small.
        packs_are_exact: whether samples of a pack do not see each other; else there are no packs.
        borders_by_sdpa: whether that holds without varlen too.
        experts: whether the model has some; stock TRL then has no part that holds them in NF4.
    """
    sizes = (256, 512, 1024) if tiny else (4096, 8192, 16384)
    optimised = {"varlen": True, "compiled": True}
    packs = [Setting(f"ours, packs of {size}", pack_tokens=size, **optimised) for size in sizes]
    small, middle, _ = sizes
    rows = [
        Setting("stock TRL, batch 1 x 4", accumulate=4, stock=True),
        Setting("stock TRL, batch 16 x 1, its best", batch=2 if tiny else 16, stock=True),
        *packs,
        Setting(f"packs of {middle}, not compiled", pack_tokens=middle, varlen=True),
        Setting(f"packs of {middle}, not compiled, without varlen", pack_tokens=middle),
        Setting("without packing: batch 16", batch=2 if tiny else 16, **optimised),
        Setting(f"packs of {small}, without checkpointing", pack_tokens=small, checkpointing=False, **optimised),
    ]
    if experts:
        rows = [row for row in rows if not row.stock]
        rows.append(
            Setting(f"packs of {middle}, LoRA on experts", pack_tokens=middle, varlen=True, target_experts=True)
        )
    return [row for row in rows if row.pack_tokens is None or (packs_are_exact and (row.varlen or borders_by_sdpa))]


def draw_samples(
    count: int, side: tuple[int, int], seed: int = 0, words_per_answer: tuple[float, float] = (3.2, 0.7)
) -> Dataset:
    """Return drawn photographs with questions and answers of log-normal length, in the schema of `data_prep`."""
    rng, rows = random.Random(seed), []
    words = ("the", "lesion", "shows", "a", "brown", "network", "with", "regular", "borders", "and", "no", "ulcer")
    for number in range(count):
        file = io.BytesIO()
        Image.effect_noise(side, 60).filter(ImageFilter.GaussianBlur(2)).convert("RGB").save(file, "JPEG", quality=90)
        answer = " ".join(rng.choice(words) for _ in range(max(3, int(rng.lognormvariate(*words_per_answer)))))
        turns = [("user", "<image>What is shown?"), ("assistant", answer)]
        values = {
            "id": str(number),
            "images": [{"bytes": file.getvalue(), "path": None}],
            "messages": [{"role": role, "content": content} for role, content in turns],
            "image_sizes": [list(side)],
            "weight": 1.0,
        }
        rows.append({key: values.get(key) for key in FEATURES})
    return Dataset.from_list(rows, features=FEATURES).cast_column("images", List(ImageFeature(decode=False)))


def build_shapes(processor, shapes: str, tiny: bool) -> PreTrainedConfig:
    """Return the configuration of published shapes with the demo's tokens, or with `tiny` few layers of their kind."""
    published = published_config(shapes)
    sizes = {"hidden_size": 128, "num_layers": TINY_LAYERS, "family": published.model_type}
    config = build_config(processor.tokenizer, **sizes)
    if tiny:
        return config
    for name, value in config.to_dict().items():
        if name.endswith("_token_id"):
            setattr(published, name, value)
    return published


def build_demo_processor(shapes: str):
    """Return the processor of the shapes' family with the demo's tokenizer and images of 64 to 768 tokens."""
    kind = published_config(shapes).model_type
    texts, side = ["the lesion shows a brown network with regular borders. What is shown?"], FAMILIES[kind].token_side
    processor = build_processor(texts, family=kind)
    processor.image_processor.size = {"shortest_edge": 64 * side**2, "longest_edge": 768 * side**2}
    set_thinking(processor, "off")
    return processor


def build_model(processor, tiny: bool, device: torch.device, shapes: str = DEFAULT_SHAPES) -> torch.nn.Module:
    """Build the model with NF4 language layers, one by one, so that the weights are never all in 16 bit."""
    config = build_shapes(processor, shapes, tiny)
    layers, config.text_config.num_hidden_layers = config.text_config.num_hidden_layers, 1
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        stack, config = model.model.language_model.layers, model.config
        quantise(stack[0], dtype)
        for number in range(1, layers):
            stack.append(quantise(type(stack[0])(config.text_config, number), dtype))
    torch.set_default_dtype(before)
    config.text_config.num_hidden_layers = layers
    multiply_patches(model)
    use_frozen_experts(model)
    model.is_loaded_in_4bit = True  # as from_pretrained leaves it, for PEFT and TRL
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def quantise(layer: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Replace a layer's linear modules and experts with NF4 ones of random weights."""
    for module in [module for module in layer.modules() if hasattr(module, "num_experts")]:
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            torch.nn.init.normal_(
                module.weight, std=0.02
            )  # a router; of zeros, all tokens would go to the same experts
            continue
        for name in WEIGHTS:
            weight = torch.randn_like(getattr(module, name)) * 0.02
            delattr(module, name)
            options = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": True}
            setattr(module, nf4_name(name), Params4bit(weight, **options).to(weight.device))
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                new = Linear4bit(
                    child.in_features, child.out_features, bias=child.bias is not None, compute_dtype=dtype,
                    quant_type="nf4", compress_statistics=True,
                )  # fmt: skip
                weight = torch.randn_like(child.weight) * 0.02
                new.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
                new.support_avx512bf16_for_cpu = False  # that path cannot train
                if child.bias is not None:
                    new.bias = child.bias
                setattr(parent, name, new.to(weight.device))
    return layer


class StepTimer(TrainerCallback):
    """Record when each optimizer step ends."""

    profiled: int | None = None  # a step

    def __init__(self, device: torch.device):
        self.device, self.ends = device, []

    def on_step_end(self, args, state, control, **kwargs):
        if self.device.type == "cuda":  # the host does not wait, as in a run
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
        else:
            self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the times between the ends."""
        if self.device.type != "cuda":
            return [b - a for a, b in pairwise(self.ends)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self.ends)]


def stock_examples(train: Dataset) -> Dataset:
    """Return the samples for stock TRL: images without markers, which TRL places itself."""

    def plain(row: dict) -> dict:
        turns = [{**turn, "content": turn["content"].replace("<image>", "").strip()} for turn in row["messages"]]
        return {"messages": turns}

    others = [name for name in train.column_names if name not in ("messages", "images")]
    return train.map(plain, remove_columns=others).cast_column("images", List(ImageFeature()))


def make_trainer(
    setting: Setting, model, processor, train: Dataset, lengths, timer: StepTimer, steps: int, folder: Path
):
    args = SFTConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=setting.batch,
        gradient_accumulation_steps=setting.accumulate, gradient_checkpointing=setting.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False}, bf16=timer.device.type == "cuda",
        use_cpu=timer.device.type == "cpu", learning_rate=1e-4, max_length=None, report_to="none", logging_steps=1000,
        save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
        dataloader_num_workers=4 if timer.device.type == "cuda" else 0,
        dataset_kwargs={"skip_prepare_dataset": True}, accelerator_config={"even_batches": False},
        logging_nan_inf_filter=setting.stock,  # ours looks at the gradients
    )  # fmt: skip
    callbacks = [timer] if timer.profiled is None else [timer, ProfileCallback(timer.profiled)]
    common = {"model": model, "args": args, "processing_class": processor, "callbacks": callbacks}
    if setting.stock:
        collator = DataCollatorForVisionLanguageModeling(processor)
        return SFTTrainer(**common, train_dataset=stock_examples(train), data_collator=collator)
    collator = VisionSFTCollator(processor, packed=setting.pack_tokens is not None)
    if setting.pack_tokens is None:
        batches = PaddedSampler(EpochOrder(len(train), seed=0), setting.batch)
    else:
        multiple = setting.accumulate
        batches = PackSampler(lengths, setting.pack_tokens, multiple=multiple, epochs=count_epochs(args, 1))
    options = {"identity": {}, "train_batches": batches, "speed": SpeedCallback(work_of(model), device=timer.device)}
    return SafeSFTTrainer(**common, train_dataset=train, data_collator=collator, **options)


def measure(setting: Setting, base, processor, train: Dataset, lengths, steps: int, folder: Path) -> dict:
    """Train a few steps and return their median time, tokens and memory."""
    device = next(base.parameters()).device
    base.config._attn_implementation = "sdpa"
    if setting.varlen:
        use_varlen(base)
    if setting.target_experts:
        add_stand_ins(base)
    dropout = 0.0 if setting.target_experts else 0.05
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": dropout, "target_experts": setting.target_experts}
    model = get_peft_model(base, build_lora_config(base, **lora))
    timer = StepTimer(device)
    if not setting.checkpointing:
        base.gradient_checkpointing_disable()  # the previous setting's trainer may have switched it on
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    trainer = None
    try:
        count = steps + (timer.profiled is not None)
        trainer = make_trainer(setting, model, processor, train, lengths, timer, count, folder)
        if setting.stock:
            pin_trainable_to_float32(trainer.model)
        with torch.compiler.set_stance("default" if setting.compiled else "force_eager"):
            trainer.train()
        seconds = statistics.median(timer.seconds()[: steps - 1][-TIMED:])
        tokens = tokens_a_step(trainer, setting, lengths)
        memory = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else None
        return {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds, "memory_gb": memory}
    except torch.cuda.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        if trainer is not None and not setting.stock:
            trainer.tower_hook.remove()
        trainer = None
        base.disable_input_require_grads()  # for settings without checkpointing
        model.unload()
        gc.collect()
        torch.cuda.empty_cache()


def tokens_a_step(trainer: SFTTrainer, setting: Setting, lengths: list[int]) -> float:
    """Return the mean number of the samples' tokens in a step; padding does not count."""
    if setting.pack_tokens is not None:
        return sum(lengths) / len(trainer.get_train_dataloader())
    return statistics.mean(lengths) * setting.batch * setting.accumulate


def flops_per_second(
    base, setting: Setting, result: dict, lengths: SampleLengths, *, recomputed: bool = True
) -> float:
    """Return the FLOP/s of a setting by the count of `models.flops`, with or without what is computed twice."""
    work = work_of(base)
    shape = shape_of_samples(lengths.total, lengths.image, work.merge)
    again = recomputed_flop(work, shape, 1.0) if setting.checkpointing and recomputed else 0
    return result["tokens_per_second"] * (useful_flop(work, shape) + again) / shape.tokens


@torch.inference_mode()
def tower_times(base, processor, train: Dataset, images: int = 12) -> dict[str, float]:
    """Return the seconds of the tower's forward pass over some images with SDPA and with varlen, alternately."""
    batch = VisionSFTCollator(processor, packed=True)([train[n] for n in range(images)])
    parameter = next(base.model.visual.parameters())
    pixels = batch["pixel_values"].to(parameter), batch["image_grid_thw"].to(parameter.device)
    times = {"sdpa": [], "varlen": []}
    for _ in range(6):
        for name, durations in times.items():
            base.config._attn_implementation = "sdpa"
            if name == "varlen":
                use_varlen(base)
            start = time.perf_counter()
            base.model.visual(*pixels)
            if parameter.is_cuda:
                torch.cuda.synchronize()
            durations.append(time.perf_counter() - start)
    return {name: statistics.median(durations[2:]) for name, durations in times.items()}


def agreement(base, processor, train: Dataset, packs: list[str]) -> dict[str, dict[str, float]]:
    """Return the relative differences of a pack's loss and gradients from those of the padded samples with SDPA.

    With SDPA the difference is rounding; with varlen it should be no larger.

    Args:
        base: see `build_model`.
        processor: see `build_demo_processor`.
        train: see `draw_samples`.
        packs: of "packed, sdpa" and "packed, varlen", those that the model can.
    """
    samples, results = [train[n] for n in range(6)], {}
    model = get_peft_model(base, build_lora_config(base, r=8, lora_alpha=16, lora_dropout=0.0))
    device = next(base.parameters()).device
    for parameter in model.parameters():
        if parameter.requires_grad:  # B is zero at first, and A would have no gradient
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator(device).manual_seed(1))
    for name in ("padded, sdpa", *packs):
        base.config._attn_implementation = "sdpa"
        if name == "packed, varlen":
            use_varlen(base)
        batch = VisionSFTCollator(processor, packed=name != "padded, sdpa")(samples)
        batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        gradient = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        results[name] = (loss.detach(), gradient)
        model.zero_grad()
    model.unload()
    (reference_loss, reference_gradient), *others = results.values()
    return {
        name: {
            "loss": ((loss - reference_loss).abs() / reference_loss).item(),
            "gradient": ((gradient - reference_gradient).norm() / reference_gradient.norm()).item(),
        }
        for name, (loss, gradient) in zip(list(results)[1:], others, strict=True)
    }


def table(rows: list[dict], peak: float | None) -> str:
    first = rows[0].get("tokens_per_second")
    lines = [f"{'setting':<44}{'tokens/s':>10}{'ratio':>8}{'TFLOP/s':>9}{'HFU':>6}{'MFU':>6}{'GB':>7}"]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['name']:<44}{row['error']:>18}")
            continue
        hfu, mfu = (f"{row[name] / peak:.0%}" if peak else "" for name in ("flops", "useful_flops"))
        memory = f"{row['memory_gb']:.1f}" if row["memory_gb"] else ""
        ratio = f"{row['tokens_per_second'] / first:.2f}" if first else ""
        speed = f"{row['tokens_per_second']:,.0f}"
        lines.append(f"{row['name']:<44}{speed:>10}{ratio:>8}{row['flops'] / 1e12:>9.1f}{hfu:>6}{mfu:>6}{memory:>7}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[DEFAULT_SHAPES], help="names in models/families.py")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers and small images, on a CPU too")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="settings whose name contains one of these words")
    parser.add_argument("--profile", action="store_true", help="profile one more step of each compiled setting")
    parser.add_argument("--speed-only", action="store_true", help="leave out agreement and tower, which take minutes")
    parser.add_argument("--out", type=Path, help="JSON file for the results, rewritten after each model")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        raise ValueError("no GPU here: --tiny runs the same code on a CPU")
    if unknown := [name for name in args.shapes if published_config(name) is None]:
        raise ValueError(f"--shapes: unknown {', '.join(unknown)}; models/families.py has the known ones")
    disable_progress_bars()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    environment = {
        "date": str(date.today()), "machine": machine, "torch": torch.__version__,
        "transformers": transformers.__version__, "trl": trl.__version__,
    }  # fmt: skip
    print(", ".join(environment.values()))
    ceiling = matmul_ceiling(device, torch.bfloat16) if device.type == "cuda" else None
    peak = next((value for name, value in PEAKS.items() if name in machine), ceiling)
    models = {}
    for shapes in args.shapes:
        models[shapes] = measure_shapes(shapes, args, device)
        if args.out:
            args.out.write_text(
                json.dumps({**environment, "ceiling": ceiling, "peak": peak, "models": models}, indent=1)
            )
        print(f"\n{shapes}", table(models[shapes]["rows"], peak), sep="\n", flush=True)
    print(f"\nbf16 matmul ceiling: {ceiling / 1e12:.0f} of {peak / 1e12:.0f} TFLOP/s" if ceiling else "")


def measure_shapes(shapes: str, args: argparse.Namespace, device: torch.device) -> dict:
    """Return what is measured of one model: the table's `rows`, and `agreement` and `tower_seconds` where asked."""
    family = FAMILIES[published_config(shapes).model_type]
    linear = family.linear_attention
    exact = not linear or is_flash_linear_attention_available()
    packs = [name for name in ("packed, sdpa", "packed, varlen") if exact and ("varlen" in name or not linear)]
    processor = build_demo_processor(shapes)
    train = draw_samples(24 if args.tiny else 400, (112, 84) if args.tiny else (600, 450))
    lengths = measure_lengths(train, processor)
    image_share = sum(lengths.image) / sum(lengths.total)
    print(f"\n{shapes}: samples of {statistics.mean(lengths.total):.0f} tokens on average, {image_share:.0%} image")
    base = build_model(processor, args.tiny, device, shapes)
    found = {}
    if not args.speed_only:
        found = {
            "agreement": agreement(base, processor, train, packs),
            "tower_seconds": tower_times(base, processor, train),
        }
        print(f"beside padded SDPA, relative: {found['agreement']}")
        print(f"tower, seconds for 12 images: {found['tower_seconds']}", flush=True)
    if not args.tiny:
        compile_layers(base, whole=False)  # some settings recompute them
    found["rows"] = []
    with tempfile.TemporaryDirectory() as folder:
        options = {"packs_are_exact": exact, "borders_by_sdpa": not linear, "experts": bool(family.experts)}
        for setting in settings(args.tiny, **options):
            if args.only and not any(word in setting.name for word in args.only):
                continue
            steps = args.steps if setting.compiled else min(args.steps, 4)  # the first ones are spent on compiling
            StepTimer.profiled = steps + 1 if args.profile and setting.compiled else None
            result = measure(setting, base, processor, train, lengths.total, steps, Path(folder) / "run")
            if "error" not in result:
                result["flops"] = flops_per_second(base, setting, result, lengths)
                result["useful_flops"] = flops_per_second(base, setting, result, lengths, recomputed=False)
            found["rows"].append({"name": setting.name, **result})
            print(found["rows"][-1], flush=True)
    return found


if __name__ == "__main__":
    sys.exit(run(main))
