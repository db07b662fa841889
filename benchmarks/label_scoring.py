"""How much faster labels are scored from one encoding of image and question than by a forward pass for each label.

    python -m benchmarks.label_scoring

Uses the demo's adapter and test split (from `make demo`). Both sides score the same batches of the same answers
alternately: ours with `evaluation.generation.score_answers`, the other with one padded forward pass over prompt and
answer for each label.
"""

import argparse
import os
import platform
import statistics
import time
from datetime import date

import torch

from collator import encode, render
from data_prep import load_splits
from evaluation.generation import encode_prompts, score_answers
from models.adapters import load_answering_model
from models.families import family_of
from models.loading import load_processor


@torch.inference_mode()
def score_separately(model, processor, examples: list[dict], answers: list[list[str]]) -> torch.Tensor:
    """Return the log-likelihoods that `score_answers` returns, from one forward pass for each label: (B, K)."""
    starts = encode_prompts(model, processor, examples)["attention_mask"].sum(1)
    columns = []
    for label_answers in zip(*answers, strict=True):
        texts = [
            render(processor, example["messages"], add_generation_prompt=True) + text + family_of(model).end_token
            for example, text in zip(examples, label_answers, strict=True)
        ]
        batch = encode(processor, examples, texts, padding_side="right")
        log_probs = model(**batch).logits[:, :-1].log_softmax(-1)
        gathered = log_probs.gather(2, batch["input_ids"][:, 1:, None])[:, :, 0] * batch["attention_mask"][:, 1:]
        positions = torch.arange(gathered.size(1))
        columns.append((gathered * (positions >= starts[:, None] - 1)).sum(1))
    return torch.stack(columns, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="outputs/demo/adapter")
    parser.add_argument("--dataset", default="outputs/demo/data")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model, processor = load_answering_model(args.adapter), load_processor(args.adapter)
    samples = load_splits(args.dataset)["test"]
    labels = sorted(set(samples["label"]))
    examples = [{**sample, "messages": sample["messages"][:-1]} for sample in samples]
    batches = [examples[start : start + args.batch_size] for start in range(0, len(examples), args.batch_size)]
    answers = [f"This is {label}." for label in labels]
    times, largest_difference = {score_answers: [], score_separately: []}, 0.0
    for number in range(args.rounds + 1):
        scores = {}
        for score, durations in times.items():
            start = time.perf_counter()
            scores[score] = torch.cat([score(model, processor, batch, [answers] * len(batch)) for batch in batches])
            if number:  # the first round warms up
                durations.append(time.perf_counter() - start)
        largest_difference = max(
            largest_difference, (scores[score_answers] - scores[score_separately]).abs().max().item()
        )
    ours, theirs = (statistics.median(durations) for durations in times.values())
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {model.device}")
    print(f"{len(examples)} samples, {len(labels)} labels, batches of {args.batch_size}")
    print(f"one encoding, then the labels  {ours:6.2f} s")
    print(f"one forward pass a label       {theirs:6.2f} s, {ratio:.2f} times as long")
    print(f"largest difference of a log-likelihood  {largest_difference:.1e}")


if __name__ == "__main__":
    main()
