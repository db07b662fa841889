"""Answers the questions of all runs, divided among the processes; answers in the journal are not repeated."""

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm

from common.files import ADAPTER_WEIGHTS
from evaluation.generation import generate_answers, score_answers
from evaluation.journal import Journal
from evaluation.questions import Questions
from models.adapters import load_answering_model, loading_settings
from models.loading import load_processor
from publishing.run_facts import adapter_digest


def open_journal(args: argparse.Namespace, out: Path, runs: dict[str, Questions], state: PartialState) -> Journal:
    """Open the journal in `out`, for the settings and questions of this evaluation.

    Raises:
        ValueError: it holds answers to other questions, or made with other settings.
    """
    if args.overwrite and state.is_main_process:
        Journal.clear(out)
    state.wait_for_everyone()
    names = ("split", "batch_size", "max_new_tokens", "min_pixels", "max_pixels")
    folder = Path(args.adapter)
    settings = {
        **{name: getattr(args, name) for name in names},
        **loading_settings(args.adapter, base=args.base, quantization=args.quantization, dtype=args.dtype),
        "base": args.base and Path(args.base).name,
        "questions": runs["adapter"].content_digest(),
        "adapter": adapter_digest(folder) if (folder / ADAPTER_WEIGHTS).is_file() else args.adapter,
    }
    with state.main_process_first():
        return Journal(out, settings, state.process_index)


def answer_questions(
    args: argparse.Namespace, runs: dict[str, Questions], journal: Journal, state: PartialState
) -> None:
    """Answer this process's share of the batches that the journal lacks, or whose scores are of other candidates."""
    batches = [
        (name, range(start, min(start + args.batch_size, len(questions.rows))))
        for name, questions in runs.items()
        for start in range(0, len(questions.rows), args.batch_size)
    ]
    missing = [(name, indices) for name, indices in batches if not _is_complete(journal, runs[name], name, indices)]
    if missing:
        processor = load_processor(args.adapter, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
        model = load_answering_model(args.adapter, base=args.base, quantization=args.quantization, dtype=args.dtype)
        share = missing[state.process_index :: state.num_processes]
        answered = _answer_batches(model, processor, runs, share, journal, args.max_new_tokens)
        for rows in tqdm(answered, total=len(share), unit="batch", disable=not state.is_main_process):
            journal.add(rows)
    state.wait_for_everyone()


def collect_rows(runs: dict[str, Questions], journal: Journal) -> dict[str, list[dict]]:
    """Return the rows of each run, with the samples' columns as they are now."""
    return journal.finish(
        {name: [questions.columns(index) for index in range(len(questions.rows))] for name, questions in runs.items()}
    )


def _is_complete(journal: Journal, questions: Questions, name: str, indices: range) -> bool:
    return journal.has(name, indices) and all(
        journal.rows[name, index].get("candidates") == candidates
        for index in indices
        if (candidates := questions.columns(index).get("candidates"))
    )


def _answer_batches(
    model, processor, runs: dict[str, Questions], batches: list, journal: Journal, max_new_tokens: int
) -> Iterator[list[dict]]:
    """Yield the rows of each batch: the sample's columns, its answer, and the scores of its candidates.

    Answers in the journal are kept: such a batch has new labels, and is only scored.
    """
    for name, indices in batches:
        questions = runs[name]
        examples = [questions.example(index) for index in indices]
        rows = [{"run": name, "index": index, **questions.columns(index)} for index in indices]
        answered = questions.generate and journal.has(name, indices)
        for row in rows:
            if (image_row := questions.image_rows[row["index"]]) != row["index"]:
                row["image_of"] = questions.rows[image_row]["id"]
        with nullcontext() if questions.adapter else model.disable_adapter():
            if answered:
                for row in rows:
                    row["prediction"] = journal.rows[name, row["index"]]["prediction"]
            elif questions.generate:
                for row, text in zip(rows, generate_answers(model, processor, examples, max_new_tokens), strict=True):
                    row["prediction"] = text
            if questions.candidates:
                _add_scores(model, processor, examples, [questions.candidates[index] for index in indices], rows)
        yield rows


def _add_scores(model, processor, examples: list[dict], candidates: list[dict[str, str]], rows: list[dict]) -> None:
    """Add `scores`, the log-likelihood of each candidate by label, to the rows of samples with candidates."""
    if scored := [n for n, answers in enumerate(candidates) if len(answers) > 1]:
        answers = [list(candidates[n].values()) for n in scored]
        scores = score_answers(model, processor, [examples[n] for n in scored], answers)
        for n, values in zip(scored, scores.tolist(), strict=True):
            rows[n]["scores"] = dict(zip(candidates[n], values, strict=True))
