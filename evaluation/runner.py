"""Answers every question that the journal lacks, each process its share."""

import argparse
import hashlib
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm

from common.files import ADAPTER_WEIGHTS
from evaluation.generation import answer, score_answers
from evaluation.journal import Journal
from evaluation.questions import Questions
from models.adapters import load_answering_model, loading_settings
from models.loading import load_processor
from publishing.run_facts import adapter_digest


def open_journal(args: argparse.Namespace, out: Path, runs: dict, state: PartialState) -> Journal:
    """Open the answers so far, once it is sure that they were made with the same settings on the same questions."""
    if args.overwrite and state.is_main_process:
        Journal.clear(out)
    state.wait_for_everyone()
    asked = runs["adapter"]
    content = json.dumps([asked.rows, asked.messages, asked.candidates, asked.images["image_sizes"][:]])
    names = ("split", "batch_size", "max_new_tokens", "min_pixels", "max_pixels", "no_probabilities")
    folder = Path(args.adapter)
    settings = {
        **{name: getattr(args, name) for name in names},
        **loading_settings(args.adapter, base=args.base, quantization=args.quantization, dtype=args.dtype),
        "base": args.base and Path(args.base).name,
        "questions": hashlib.sha256(content.encode()).hexdigest(),
        "adapter": adapter_digest(folder) if (folder / ADAPTER_WEIGHTS).is_file() else args.adapter,
    }
    if state.is_main_process:
        journal = Journal(out, settings, 0)
    state.wait_for_everyone()
    return journal if state.is_main_process else Journal(out, settings, state.process_index)


def ask_all(args: argparse.Namespace, runs: dict[str, Questions], journal: Journal, state: PartialState) -> None:
    """Answer every batch that the journal lacks, this process its share of them."""
    batches = [
        (name, range(start, min(start + args.batch_size, len(questions.rows))))
        for name, questions in runs.items()
        for start in range(0, len(questions.rows), args.batch_size)
    ]
    missing = [(name, indices) for name, indices in batches if not journal.has(name, indices)]
    if missing:
        processor = load_processor(args.adapter, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
        model = load_answering_model(args.adapter, base=args.base, quantization=args.quantization, dtype=args.dtype)
        own = missing[state.process_index :: state.num_processes]
        shown = {"total": len(own), "unit": "batch", "disable": not state.is_main_process}
        for rows in tqdm(_answers(model, processor, runs, own, args.max_new_tokens), **shown):
            journal.add(rows)
    state.wait_for_everyone()


def _answers(model, processor, runs: dict[str, Questions], batches: list, max_new_tokens: int) -> Iterator[list[dict]]:
    """Yield the rows of each batch: what is known of the sample, the answer, the scores of its label's answers."""
    for name, indices in batches:
        asked = runs[name]
        examples = [asked.example(index) for index in indices]
        rows = [{"run": name, "index": index, **asked.rows[index]} for index in indices]
        for row in rows:
            if (giver := asked.order[row["index"]]) != row["index"]:
                row["image_of"] = asked.rows[giver]["id"]
        with nullcontext() if asked.adapter else model.disable_adapter():
            if asked.generate:
                for row, text in zip(rows, answer(model, processor, examples, max_new_tokens), strict=True):
                    row["prediction"] = text
            if asked.candidates:
                _score(model, processor, examples, [asked.candidates[index] for index in indices], rows)
        yield rows


def _score(model, processor, examples: list[dict], candidates: list[dict[str, str]], rows: list[dict]) -> None:
    """Add `scores`, the log-likelihood of each label's answer, to the rows of samples that have such answers."""
    chosen = [n for n, own in enumerate(candidates) if len(own) > 1]
    if chosen:
        answers = [list(candidates[n].values()) for n in chosen]
        logs = score_answers(model, processor, [examples[n] for n in chosen], answers)
        for n, own in zip(chosen, logs.tolist(), strict=True):
            rows[n]["scores"] = dict(zip(candidates[n], own, strict=True))
