"""Answers of one or several adapters to examples, printed or written to a file."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import TextStreamer

from common.files import atomic_path
from data_prep.sizes import fit_options, fit_size
from evaluation.examples import decode
from evaluation.generation import generate_answers, score_answers
from evaluation.label_matching import LABEL_PLACEHOLDER
from evaluation.questions import question_text


def answer_examples(
    model, processors: dict, adapters: dict, examples: Iterable[dict], args: argparse.Namespace, *, labels, stream
) -> Iterator[dict]:
    """Yield a row for each example and adapter, in order, with its `prediction` or its `error`.

    Args:
        model: base model, with the adapters.
        processors: by the adapter's name in the model; one under None for the base model alone.
        adapters: path of each adapter by its name in the model.
        examples: see `load_examples`.
        args: options of `predict.py`.
        labels: labels of `--top-k`.
        stream: whether to print the answer while it is generated.
    """
    examples = iter(examples)
    while batch := list(islice(examples, args.batch_size)):
        for name, processor in processors.items():
            if len(adapters) > 1:
                model.set_adapter(name)
            fit = partial(fit_size, **fit_options(processor.image_processor))
            decoded = [decode(example, fit=fit) for example in batch]
            usable = [example for example in decoded if "error" not in example]
            answers = iter(_answer_batch(model, processor, usable, args, labels, stream) if usable else [])
            adapter = {"adapter": adapters[name]} if len(adapters) > 1 else {}
            for example in decoded:
                row = {key: value for key, value in example.items() if key not in ("images", "messages")}
                yield {**row, **adapter, **({} if "error" in example else next(answers))}


def _answer_batch(
    model, processor, examples: list[dict], args: argparse.Namespace, labels, stream: bool
) -> list[dict]:
    """Return each example's question and answer, and with `--top-k` the likeliest labels and their probabilities."""
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    answers = generate_answers(model, processor, examples, args.max_new_tokens, streamer=streamer)
    questions = [question_text(example["messages"]) for example in examples]
    rows = [{"question": q, "prediction": answer} for q, answer in zip(questions, answers, strict=True)]
    if args.top_k:
        candidates = [args.wording.replace(LABEL_PLACEHOLDER, label) for label in labels]
        probabilities = score_answers(model, processor, examples, [candidates] * len(examples)).softmax(-1)
        for row, values in zip(rows, probabilities.tolist(), strict=True):
            ranked = sorted(zip(values, labels, strict=True), reverse=True)[: args.top_k]
            row["likeliest"] = {label: round(value, 4) for value, label in ranked}
    return rows


def write_answers(rows: Iterable[dict], out: Path | None, *, total: int, stream: bool) -> int:
    """Print the answers, or write them to a JSON Lines file; return how many examples were skipped."""
    if out is None:
        return sum(print_answer(row, stream=stream, single=total == 1) for row in rows)
    skipped = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for row in tqdm(rows, total=total, unit="answer"):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if "error" in row:
                skipped += 1
                tqdm.write(f"skipped {row['id']}: {row['error']}", file=sys.stderr)
    print(f"{total - skipped} answers in {out}" + (f", {skipped} skipped" if skipped else ""))
    return skipped


def print_answer(row: dict, *, stream: bool, single: bool) -> bool:
    """Print one answer, unless it was streamed; return whether the example was skipped."""
    if "error" in row:
        print(f"skipped {row['id']}: {row['error']}", file=sys.stderr)
        return True
    name = "" if single else f"{row['id']} [{row['adapter']}]: " if "adapter" in row else f"{row['id']}: "
    if not stream:
        print(name + row["prediction"])
    for label, probability in row.get("likeliest", {}).items():
        print(f"  {probability:.3f}  {label}")
    return False
