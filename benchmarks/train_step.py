"""Answer tokens trained per second on a CPU, in float32: ours packed, stock TRL, and a plain loop.

    python -m benchmarks.train_step                     # about 20 minutes
    python -m benchmarks.train_step --tower-width 160   # tower and language layers in the 7B model's proportion

A Qwen2.5-VL with random weights (hidden 512, 6 language layers, 6 tower blocks of which one attends across all; a
vocabulary of 339), LoRA on its language layers and a frozen tower, learns from 96 drawn photographs of six sizes.
Answers are of log-normal length, median 60 tokens, sigma 1. Complete optimizer steps are timed, with collating,
alternately in one process:

- ours: packs of about 8 samples' tokens, varlen;
- stock TRL: its trainer and its collator, which learns from answers only, padded batches of 8, SDPA;
- plain loop: one sample after the other through the processor, its image resized to 448 x 448 px, SDPA, labels on
  everything, 8 accumulated.

All sides have the case's limits of tokens an image, and each trains on every sample once a round. Supervised tokens
are the answers' with their `<|im_end|>`, whatever else a side has labels on (TRL: the newline after them, the plain
loop: images and questions too). Total tokens are those of the samples as a side sees them, without padding.
"""

import argparse
import io
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import count
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from peft import get_peft_model
from PIL import Image
from transformers import PrinterCallback, Qwen2_5_VLForConditionalGeneration
from trl.chat_template_utils import get_training_chat_template
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from benchmarks.gpu_7b import Setting, StepTimer, draw_samples, make_trainer
from collator import VisionSFTCollator, build_labels, render
from demo.tiny_model import build_config, build_processor
from models.attention import use_varlen
from models.lora import build_lora_config
from training.lengths import measure_lengths
from training.packing import pack_lengths

BATCH = 8
WORDS_PER_ANSWER = (4.1, 1.0)  # an answer's, log-normal; exp(4.1) is 60, and each word is a token
SIZES = ((600, 450), (450, 600), (640, 480), (448, 448), (750, 500), (800, 600))  # px
CASES = {"256-512 tokens an image": (256, 512), "about 110 tokens an image": (64, 110)}  # at least and at most
PLAIN_SIZE = (448, 448)


@dataclass
class Throughput:
    """Counts and duration of one side's round."""

    samples: int
    supervised: int
    total: int
    seconds: float


class RunTimer(StepTimer):
    """Record when training begins, too."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)


class CountingCollator:
    """A collator that also counts the samples, answer tokens and tokens of each batch."""

    def __init__(self, collate: Callable, processor):
        self.collate, self.reference, self.counts = collate, VisionSFTCollator(processor), []

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.collate(examples)
        ids = batch["input_ids"]
        labels = build_labels(ids, header_ids=self.reference.header_ids, end_id=self.reference.end_id)
        total = batch["attention_mask"].sum() if "attention_mask" in batch else ids.numel()
        self.counts.append((len(examples), int((labels >= 0).sum()), int(total)))
        return batch

    def throughput(self, batches: int, timer: StepTimer) -> Throughput:
        """Return the sums over the first batches: the loader may have prepared one more."""
        return Throughput(*map(sum, zip(*self.counts[:batches], strict=True)), seconds=timer.ends[-1] - timer.ends[0])


def build_base(processor, tiny: bool, tower_width: int) -> torch.nn.Module:
    config = build_config(processor.tokenizer, hidden_size=64 if tiny else 512, num_layers=2 if tiny else 6)
    vision = config.vision_config
    vision.depth, vision.fullatt_block_indexes = (2, [1]) if tiny else (6, [5])
    vision.num_heads = vision.num_heads * tower_width // vision.hidden_size
    vision.intermediate_size = vision.intermediate_size * tower_width // vision.hidden_size
    vision.hidden_size = tower_width
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config)


def adapt(base: torch.nn.Module) -> torch.nn.Module:
    return get_peft_model(base, build_lora_config(base, r=8, lora_alpha=16, lora_dropout=0.05)).train()


def by_trainer(
    setting: Setting, build: Callable, processor, train: Dataset, lengths: list[int], steps: int
) -> Throughput:
    base, timer = build(), RunTimer(torch.device("cpu"))
    if setting.varlen:
        use_varlen(base)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(setting, adapt(base), processor, train, lengths, timer, steps, Path(folder))
        trainer.model_accepts_loss_kwargs = True
        trainer.remove_callback(PrinterCallback)
        if setting.stock:
            answers = {"assistant_only_loss": True, "chat_template": get_training_chat_template(processor)}
            trainer.data_collator = DataCollatorForVisionLanguageModeling(processor, **answers)
        trainer.data_collator = counting = CountingCollator(trainer.data_collator, processor)
        trainer.train()
    return counting.throughput(steps, timer)


def plain_batch(rows: list[dict], processor) -> dict[str, torch.Tensor]:
    (row,) = rows
    image = Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB").resize(PLAIN_SIZE)
    batch = processor(text=[render(processor, row["messages"])], images=[image], return_tensors="pt")
    return {**batch, "labels": batch["input_ids"].clone()}


def by_plain_loop(build: Callable, processor, train: Dataset, steps: int) -> Throughput:
    model, timer = adapt(build()), RunTimer(torch.device("cpu"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    counting = CountingCollator(partial(plain_batch, processor=processor), processor)
    rows = train.shuffle(seed=0)
    timer.on_train_begin(None, None, None)
    for number in range(steps * BATCH):
        (model(**counting([rows[number % len(rows)]])).loss / BATCH).backward()
        if number % BATCH == BATCH - 1:
            optimizer.step()
            optimizer.zero_grad()
            timer.on_step_end(None, None, None)
    return counting.throughput(steps * BATCH, timer)


def choose_budget(lengths: list[int]) -> int:
    """Return the smallest pack, tokens, for which the samples need no more packs than there are batches."""
    least = max(BATCH * sum(lengths) // len(lengths), *lengths)
    return next(n for n in count(least) if n % 64 == 0 and len(pack_lengths(lengths, n)) <= len(lengths) // BATCH)


def compare(build: Callable, processor, train: Dataset, rounds: int, steps: int) -> dict[str, list[Throughput]]:
    """Return each side's throughput in each round, without the first round, which warms up."""
    lengths = measure_lengths(train, processor).total
    budget = choose_budget(lengths)
    packs = Setting("ours", pack_tokens=budget, varlen=True, checkpointing=False)
    stock = Setting("stock TRL", batch=BATCH, stock=True, checkpointing=False)
    sides = {s.name: partial(by_trainer, s, build, processor, train, lengths, steps) for s in (packs, stock)}
    sides["plain loop"] = partial(by_plain_loop, build, processor, train, steps)
    print(f"{len(lengths)} samples of {statistics.mean(lengths):.0f} tokens on average, packs of {budget}", flush=True)
    results = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, train_side in sides.items():
            results[name].append(train_side())
    return {name: throughputs[1:] for name, throughputs in results.items()}


def table(results: dict[str, list[Throughput]]) -> str:
    lines = [f"{'':<12}{'ms a sample':>12}{'supervised tokens/s':>21}{'tokens/s':>10}{'ours / side':>13}"]
    for name, throughputs in results.items():
        ms = statistics.median(1000 * one.seconds / one.samples for one in throughputs)
        supervised = statistics.median(one.supervised / one.seconds for one in throughputs)
        total = statistics.median(one.total / one.seconds for one in throughputs)
        pairs = zip(results["ours"], throughputs, strict=True)
        ratio = statistics.median(a.supervised / a.seconds * b.seconds / b.supervised for a, b in pairs)
        lines.append(f"{name:<12}{ms:>12.0f}{supervised:>21.1f}{total:>10.0f}{ratio:>13.2f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, dict[str, list[Throughput]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="per side and round; default: every sample once")
    parser.add_argument("--tower-width", type=int, help="hidden size of the tower; default: the language model's")
    parser.add_argument("--tiny", action="store_true", help="narrow layers, few and small images")
    args = parser.parse_args(argv)
    disable_progress_bars()
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    images_per_size, scale = (4, 8) if args.tiny else (16, 1)
    train = concatenate_datasets(
        [draw_samples(images_per_size, size, number, WORDS_PER_ANSWER) for number, size in enumerate(SIZES)]
    )
    processor = build_processor([turn["content"] for turns in train["messages"] for turn in turns])
    build = partial(build_base, processor, args.tiny, args.tower_width or (64 if args.tiny else 512))
    results = {}
    for name, limits in CASES.items():
        least, most = (tokens * 28 * 28 // scale for tokens in limits)
        processor.image_processor.size = {"shortest_edge": least, "longest_edge": most}
        print(name)
        results[name] = compare(build, processor, train, args.rounds, args.steps or len(train) // BATCH)
        print(table(results[name]), flush=True)
    return results


if __name__ == "__main__":
    main()
