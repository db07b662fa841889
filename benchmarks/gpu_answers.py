"""Answers a second of the transformers engine with published shapes, and where the time goes.

    python -m benchmarks.gpu_answers --out answers.json     # one GPU with 40 GB or more, two minutes
    python -m benchmarks.gpu_answers --no-graphs            # the same without captured decoding
    python -m benchmarks.gpu_answers --first-answer /tmp    # also benchmarks/first_answer.py, in that folder
    python -m benchmarks.gpu_answers --tiny                 # the same code on a CPU, in seconds

Needs no weights: the model is that of benchmarks/gpu_7b.py, random in NF4, with a LoRA adapter on its language model.
Each drawn photograph of 600 x 450 px is asked about three times, as `eval_sft.py --baseline` does: by the adapter, by
the base, and by the adapter with another photograph. No answer ends before 32 tokens. The likelihoods of seven labels
are computed too, as eval_sft.py does by adapter and base; one more pass computes them for the other photographs too.
First come two batches whose times do not count; captured graphs are kept from them. The seconds of the parts are
measured in one more pass that waits for the GPU after each part.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path

from common.cli import positive_int, run

import torch
import transformers
from datasets import disable_progress_bars
from peft import PeftModel, get_peft_model

from benchmarks.first_answer import measure as measure_first_answer
from benchmarks.gpu_7b import DEFAULT_SHAPES, build_demo_processor, build_model, draw_samples
from evaluation.batching import AUTO, batch_size, load_ahead, make_batches, token_budget
from evaluation.generation import (
    answer_and_score,
    base_of,
    decode,
    encode_prompts,
    read_prompts,
    score_continuations,
)
from evaluation.image_features import ImageFeatures
from evaluation.static_decoding import decoders_of
from models.adapters import decode_greedily
from models.answering import speed_up_answering
from models.attention import use_varlen
from models.lora import build_lora_config
from training.lengths import measure_lengths

LABELS = [
    "This is melanoma.", "This is a nevus.", "It shows basal cell carcinoma.", "This is actinic keratosis.",
    "This is a benign keratosis.", "It shows a dermatofibroma.", "This is a vascular lesion.",
]  # fmt: skip
RUNS = {"adapter": (True, 0), "base": (False, 0), "shuffled": (True, 1)}  # adapter enabled, shift of the photographs
SCORED = ("adapter", "base")  # runs whose labels' likelihoods eval_sft.py computes


def build_adapted(processor, args: argparse.Namespace, device: torch.device) -> PeftModel:
    """Return the shapes with an adapter that changes answers, whose answers have no end."""
    base = build_model(processor, args.tiny, device, args.shapes)
    use_varlen(base)  # as the recipes train
    model = get_peft_model(base, build_lora_config(base, r=16, lora_alpha=32, lora_dropout=0.0)).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    decode_greedily(base)
    base.generation_config.eos_token_id = None
    base.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def make_questions(count: int, side: tuple[int, int]) -> list[dict]:
    """Return examples with one photograph each."""
    samples = draw_samples(count, side)
    return [{"id": s["id"], "images": s["images"], "messages": s["messages"][:1]} for s in samples]


def batches_of_runs(examples: list[dict], lengths: list[int], args: argparse.Namespace, budget: int) -> list[tuple]:
    """Return each batch's run and examples; adapter and base take turns."""
    numbers = make_batches(lengths, args.batch_size, args.max_new_tokens, budget)
    order = [(name, batch) for batch in numbers for name in ("adapter", "base")]
    order += [("shuffled", batch) for batch in numbers]
    shift = {name: shift for name, (_, shift) in RUNS.items()}
    images = [example["images"] for example in examples]
    return [
        (name, [{**examples[n], "images": images[(n + shift[name]) % len(images)]} for n in batch])
        for name, batch in order
    ]


def answer_all(
    model, processor, batches: list[tuple], max_new_tokens: int, scored: tuple[str, ...] = SCORED
) -> tuple[float, int]:
    """Answer all batches as eval_sft.py does, and score in `scored` runs; return the seconds and number of answers."""
    features, answered = ImageFeatures(base_of(model)), 0
    start = time.perf_counter()
    loaded = load_ahead((examples for _, examples in batches), processor)
    for (name, _), examples in zip(batches, loaded, strict=True):
        with nullcontext() if RUNS[name][0] else model.disable_adapter():
            answers = [LABELS if name in scored else []] * len(examples)
            texts, cut, _ = answer_and_score(model, processor, examples, max_new_tokens, answers, features=features)
        if not all(cut):
            raise RuntimeError("an answer has ended")
        answered += len(texts)
    return time.perf_counter() - start, answered


@torch.inference_mode()
def measure_parts(model, processor, batches: list[tuple], max_new_tokens: int) -> dict[str, float]:
    """Return the seconds of each part, the GPU's work included; parts do not overlap here."""
    features, seconds = ImageFeatures(base_of(model)), Counter()

    def timed_features(*args):
        with timed(seconds, "patches and tower"):
            return features(*args)

    for name, examples in batches:
        with nullcontext() if RUNS[name][0] else model.disable_adapter():
            with timed(seconds, "image decoding"):
                [examples] = load_ahead([examples], processor)
            with timed(seconds, "encoding"):
                inputs = encode_prompts(model, processor, examples, features=timed_features)
            with timed(seconds, "prefill"):
                prefix = read_prompts(model, inputs)
            if name in SCORED:
                with timed(seconds, "scoring"):
                    score_continuations(model, processor, prefix, [LABELS] * len(examples))
            with timed(seconds, "decoding"):
                decode(model, prefix, max_new_tokens)
    seconds["tokens"] = seconds.pop("encoding") - seconds["patches and tower"]
    return dict(seconds)


@contextmanager
def timed(seconds: Counter, part: str) -> Iterator[None]:
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    seconds[part] += time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=DEFAULT_SHAPES, help="a name in models/families.py")
    parser.add_argument("--questions", type=positive_int, default=96, help="photographs; each is asked about 3 times")
    parser.add_argument("--batch-size", type=batch_size, default=AUTO)
    parser.add_argument("--max-new-tokens", type=positive_int, default=32)
    parser.add_argument("--no-graphs", action="store_true", help="decode step by step")
    parser.add_argument("--first-answer", type=Path, metavar="FOLDER", help="with 17 GB of space for a checkpoint")
    parser.add_argument("--tiny", action="store_true", help="few narrow layers, 12 small photographs, on a CPU too")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        raise ValueError("no GPU here: --tiny runs the same code on a CPU")
    disable_progress_bars()
    result = measure_first_answer(args.shapes, args.first_answer, tiny=args.tiny) if args.first_answer else {}
    result |= measure(args, device)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(args: argparse.Namespace, device: torch.device) -> dict:
    processor = build_demo_processor(args.shapes)
    count, side = (12, (112, 84)) if args.tiny else (args.questions, (600, 450))
    examples = make_questions(count, side)
    model = build_adapted(processor, args, device)
    speed_up_answering(model)
    decoders_of(model).failed = args.no_graphs
    lengths = measure_lengths(draw_samples(1, side), processor).total * count  # all photographs have one size
    batches = batches_of_runs(examples, lengths, args, token_budget(model.config))
    warmup, answered = answer_all(model, processor, batches[:2], args.max_new_tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    passes = [answer_all(model, processor, batches, args.max_new_tokens) for _ in range(1 if args.tiny else 2)]
    seconds, answered = statistics.median(seconds for seconds, _ in passes), passes[0][1]
    memory = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else None
    all_scored, _ = answer_all(model, processor, batches, args.max_new_tokens, scored=tuple(RUNS))
    return {
        "date": str(date.today()),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shapes": args.shapes,
        "batch": len(batches[0][1]),
        "prompt_tokens": encode_prompts(model, processor, examples[:1])["input_ids"].size(1),
        "graphs": sum(len(decoder.graphs) for decoder in decoders_of(model).kept.values()),
        "answers": answered,
        "first_batches_seconds": round(warmup, 2),
        "seconds": [round(seconds, 2) for seconds, _ in passes],
        "answers_per_second": round(answered / seconds, 2),
        "answers_per_second_all_scored": round(answered / all_scored, 2),
        "memory_gb": memory,
        "parts_seconds": {
            part: round(value, 2)
            for part, value in measure_parts(model, processor, batches, args.max_new_tokens).items()
        },
    }


if __name__ == "__main__":
    sys.exit(run(main))
