"""How much faster labels are scored from one encoding of image and question than by a forward pass for each label.

    python -m benchmarks.label_scoring

Takes the demo's adapter and test split (`make demo` makes both). Both sides score the same batches of the same answers
in turn: ours with `answering.score_answers`, the other with one padded forward pass over prompt and answer for each
label.
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
def separately(model, processor, examples: list[dict], answers: list[list[str]]) -> torch.Tensor:
    """Return what `score_answers` returns, by one forward pass for each label: (B, K)."""
    starts = encode_prompts(model, processor, examples)["attention_mask"].sum(1)
    columns = []
    for own in zip(*answers, strict=True):
        texts = [
            render(processor, example["messages"], add_generation_prompt=True) + text + family_of(model).end_token
            for example, text in zip(examples, own, strict=True)
        ]
        batch = encode(processor, examples, texts, padding_side="right")
        logs = model(**batch).logits[:, :-1].log_softmax(-1)
        taken = logs.gather(2, batch["input_ids"][:, 1:, None])[:, :, 0] * batch["attention_mask"][:, 1:]
        place = torch.arange(taken.size(1))
        columns.append((taken * (place >= starts[:, None] - 1)).sum(1))
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
    times, furthest = {score_answers: [], separately: []}, 0.0
    for number in range(args.rounds + 1):
        scores = {}
        for score, taken in times.items():
            start = time.perf_counter()
            scores[score] = torch.cat([score(model, processor, batch, [answers] * len(batch)) for batch in batches])
            if number:  # the first round warms up
                taken.append(time.perf_counter() - start)
        furthest = max(furthest, (scores[score_answers] - scores[separately]).abs().max().item())
    ours, theirs = (statistics.median(taken) for taken in times.values())
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {model.device}")
    print(f"{len(examples)} samples, {len(labels)} labels, batches of {args.batch_size}")
    print(f"one encoding, then the labels  {ours:6.2f} s")
    print(f"one forward pass a label       {theirs:6.2f} s, {ratio:.2f} times as long")
    print(f"largest difference of a log-likelihood  {furthest:.1e}")


if __name__ == "__main__":
    main()
