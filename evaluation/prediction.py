"""Answers of one or several adapters to examples, printed or written to a file."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import compress, islice
from pathlib import Path
from typing import TextIO

from tqdm import tqdm
from transformers import TextStreamer

from common.files import atomic_path, check_parent, error_names
from common.progress import progress
from data_prep.sizes import fit_options, fit_size
from evaluation.examples import decode
from evaluation.label_matching import LABEL_PLACEHOLDER
from evaluation.questions import question_text

MAX_LINE = 10_000_000  # bytes


def answer_examples(
    engine, examples: Iterable[dict], args: argparse.Namespace, *, labels, stream: bool
) -> Iterator[dict]:
    """Yield a row for each example and adapter, in order, with its `prediction` or its `error`.

    Args:
        engine: see `open_engine`.
        examples: see `load_examples`.
        args: options of `predict.py`.
        labels: labels of `--top-k`.
        stream: whether to print the answer while it is generated.
    """
    examples = iter(examples)
    while batch := list(islice(examples, args.batch_size)):
        for name in engine.adapters or [None]:
            fit = partial(fit_size, **fit_options(engine.processors[name].image_processor))
            decoded = [decode(example, fit=fit) for example in batch]
            usable = [example for example in decoded if "error" not in example]
            answers = iter(_answer_batch(engine, name, usable, args, labels, stream) if usable else [])
            adapter = {"adapter": engine.adapters[name]} if len(engine.adapters) > 1 else {}
            for example in decoded:
                row = {key: value for key, value in example.items() if key not in ("images", "messages", "fitted")}
                yield {**row, **adapter, **({} if "error" in example else next(answers))}


def _answer_batch(
    engine, name: str | None, examples: list[dict], args: argparse.Namespace, labels, stream: bool
) -> list[dict]:
    """Return each example's question and answer, and with `--top-k` the likeliest labels and their probabilities."""
    tokenizer = engine.processors[name].tokenizer
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    answers, cut = engine.answers(examples, args.max_new_tokens, adapter=name, streamer=streamer)
    candidates = [args.wording.replace(LABEL_PLACEHOLDER, label) for label in labels or []]
    scores = engine.scores(examples, [candidates] * len(examples), adapter=name) if args.top_k else None
    questions = [question_text(example["messages"]) for example in examples]
    rows = [{"question": q, "prediction": answer} for q, answer in zip(questions, answers, strict=True)]
    for row in compress(rows, cut):
        row["cut"] = True
    if args.top_k:
        probabilities = scores.softmax(-1)
        for row, values in zip(rows, probabilities.tolist(), strict=True):
            ranked = sorted(zip(values, labels, strict=True), reverse=True)[: args.top_k]
            row["likeliest"] = {label: round(value, 4) for value, label in ranked}
    return rows


def check_out(out: Path, inputs: list[Path]) -> None:
    """Raise ValueError for a folder, an input, and any other file that `predict.py` did not write.

    A pipe passes. A file under the name of an open stream (`/dev/stdout` of a command whose output goes to a file)
    does not: two writers would overwrite each other.
    """
    if out.is_dir():
        raise ValueError(f"--out: {out} is a folder, expected a file")
    if out.is_fifo():
        return
    if Path(os.path.realpath(out)).is_symlink():
        raise ValueError(f"--out: {out} leads through links in a circle")
    check_parent("--out", out)
    if out.exists() and not out.is_file():
        raise ValueError(f"--out: {out} is a device, expected a file or a pipe; without --out answers are printed")
    if out.absolute().is_relative_to("/dev") or out.absolute().is_relative_to("/proc"):
        raise ValueError(f"--out: {out} stands for {out.resolve()}, which is open already; name that file")
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise ValueError(f"--out: {out} is what the questions are read from; name another file")
    if out.exists() and not _holds_answers(out):
        raise ValueError(f"--out: {out} exists and is no file of answers; name another file")


def _holds_answers(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.readline(MAX_LINE)
    try:
        row = json.loads(line) if line else {"prediction": ""}
    except (ValueError, RecursionError):
        return False
    # a row with a "run" is one of eval_sft.py
    return isinstance(row, dict) and "run" not in row and ("prediction" in row or "error" in row)


def write_answers(rows: Iterable[dict], out: Path | None, *, total: int, stream: bool) -> Counter:
    """Print the answers, or write them to a JSON Lines file; return how many are `skipped`, and how many are `cut`."""
    counts = Counter()
    rows = _counted(rows, counts)
    if out is None:
        for row in rows:
            print_answer(row, stream=stream, single=total == 1)
        return counts
    with _open_out(out) as file:
        for row in progress(rows, "answering", total, "questions"):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if "error" in row:
                tqdm.write(f"skipped {row['id']}: {row['error']}", file=sys.stderr)
    skipped = counts["skipped"]
    line = f"{total - skipped} answers in {out}" + (f", {skipped} skipped" if skipped else "")
    print(line, file=sys.stderr if out.is_fifo() else sys.stdout)  # the pipe may be stdout
    return counts


@contextmanager
def _open_out(out: Path) -> Iterator[TextIO]:
    """Open the file of the answers, which appears at its end; a pipe gets each answer at once."""
    if out.is_fifo():
        with error_names(out), out.open("w", encoding="utf-8") as file:
            yield file
        return
    with atomic_path(out) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        yield file


def _counted(rows: Iterable[dict], counts: Counter) -> Iterator[dict]:
    for row in rows:
        counts["skipped"] += "error" in row
        counts["cut"] += "cut" in row
        yield row


def print_answer(row: dict, *, stream: bool, single: bool) -> None:
    """Print one answer, unless it was streamed, or why there is none."""
    if "error" in row:
        print(f"skipped {row['id']}: {row['error']}", file=sys.stderr)
        return
    name = "" if single else f"{row['id']} [{row['adapter']}]: " if "adapter" in row else f"{row['id']}: "
    if not stream:
        print(name + row["prediction"])
    for label, probability in row.get("likeliest", {}).items():
        print(f"  {probability:.3f}  {label}")
