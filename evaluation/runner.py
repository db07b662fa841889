"""Answers the questions of all runs, divided among the processes; answers in the journal are not repeated."""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path

from accelerate import PartialState
from transformers import ProcessorMixin

from common.console import print_rank0
from common.files import ADAPTER_WEIGHTS, digest_of_file
from common.progress import progress
from data_prep.sizes import fit_options, fit_size
from evaluation.batching import AUTO, load_ahead, order_batches, token_budget
from evaluation.dealing import batch_costs, deal
from evaluation.engines import ENGINES, open_engine, score_given
from evaluation.journal import Journal
from evaluation.questions import Questions
from models.adapters import base_of, find_file, loading_settings
from models.loading import load_config, load_processor
from publishing.model_card import RUN_TITLES

POLL_SECONDS = 1.0  # between looks at other processes' answers
PIECES, PIECE_BYTES = 16, 1 << 16  # of a file of weights, of which a digest is made


def open_journal(args: argparse.Namespace, out: Path, runs: dict[str, Questions], state: PartialState) -> Journal:
    """Open the journal in `out`, for the settings and questions of this evaluation.

    Raises:
        ValueError: it holds answers to other questions, or made with other settings, or files of something else.
    """
    if not args.overwrite:
        Journal.check_foreign(out)
    elif state.is_main_process:
        Journal.clear(out)
    state.wait_for_everyone()
    validation = runs.get("validation")
    names = ("split", "batch_size", "max_new_tokens", "min_pixels", "max_pixels")
    settings = {
        **{name: getattr(args, name) for name in names},
        **loading_settings(args.adapter, base=args.base, quantization=args.quantization, dtype=args.dtype),
        "base": args.base and Path(args.base).name,
        "base_weights": _base_digest(args),
        "questions": runs["adapter"].content_digest(),
        "images": runs["adapter"].image_digest(),
        "validation": validation and validation.content_digest() + validation.image_digest(),
        "adapter": _weights_digest(args.adapter or args.model),
        "engine": None if args.engine == ENGINES[0] else args.engine,  # None: as in files of before there were two
    }
    with state.main_process_first():
        return Journal(out, settings, state.process_index)


def _base_digest(args: argparse.Namespace) -> str | None:
    """Return what changes with the weights of an adapter's base in a folder: sizes and pieces of its files."""
    base = (args.base or base_of(args.adapter)[0]) if args.adapter else None
    if base is None or not Path(base).is_dir():
        return None  # one of the Hub has a revision
    files = [path for path in sorted(Path(base).iterdir()) if path.suffix in (".safetensors", ".bin")]
    content = [(path.name, path.stat().st_size, _digest_of_pieces(path)) for path in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _digest_of_pieces(path: Path) -> str:
    """Return a digest of some of a file's bytes, in equal steps: other weights differ nearly everywhere."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for start in range(0, size, max(PIECE_BYTES, size // PIECES)):
            file.seek(start)
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def _weights_digest(name: str) -> str:
    """Return what changes with the weights of an adapter or model: of a large model the files' sizes and times."""
    folder = Path(name)
    if path := find_file(name, ADAPTER_WEIGHTS):
        return digest_of_file(path)
    files = [path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".json")]
    content = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest() if files else name


def choose_runs(args: argparse.Namespace, runs: dict[str, Questions], journal: Journal) -> dict[str, Questions]:
    """Return the runs that the options ask for, and those that an earlier evaluation has completed."""
    requested = {"adapter", "validation", *(("base", "shuffled") if args.baseline else ())}
    kept = [
        name
        for name, questions in runs.items()
        if name not in requested and journal.has(name, range(len(questions.rows)))
    ]
    if kept:
        print_rank0(f"{'kept of earlier answers':<26}{', '.join(RUN_TITLES[name] for name in kept)}")
    if args.baseline and "shuffled" not in runs:
        print_rank0("images are not shuffled: that needs two samples with images")
    return {name: questions for name, questions in runs.items() if name in requested or name in kept}


def answer_questions(
    args: argparse.Namespace, runs: dict[str, Questions], journal: Journal, state: PartialState
) -> None:
    """Answer this process's share of the batches that the journal lacks, or whose scores are of other candidates."""
    end_process_group(state)
    if all(_is_complete(journal, questions, name, range(len(questions.rows))) for name, questions in runs.items()):
        return
    limits = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    processor = load_processor(args.adapter or args.model, **limits)
    check_image_sizes(list(runs.values()), processor)
    warn_of_long_references(processor, runs["adapter"], args.max_new_tokens)
    batches = order_batches(runs, processor, args, choose_budget(args))
    missing = [(name, indices) for name, indices in batches if not _is_complete(journal, runs[name], name, indices)]
    if share := _own_share(missing, runs, processor, args.max_new_tokens, state):
        adapters = [args.adapter] if args.adapter else []
        with open_engine(adapters, args.base or args.model, args, journal.folder / "vllm.log") as engine:
            answered = _answer_batches(engine, runs, share, journal, args)
            for rows in progress(answered, "answering", len(share), "batches", shown=state.is_main_process):
                journal.add(rows)
    if state.is_main_process:
        wait_for_others(journal, runs, missing)


def choose_budget(args: argparse.Namespace) -> int:
    """Return how many tokens a batch may have, see `token_budget`; 0 where the number of questions is given."""
    if args.batch_size != AUTO:
        return 0
    base, revision = args.base or args.model, None
    if base is None:
        base, revision = base_of(args.adapter)
    return token_budget(load_config(base, revision=revision))


def end_process_group(state: PartialState) -> None:
    """End what the processes have in common, as soon as all have read the journal.

    Each answers its share alone, and no one waits in a collective, which would fail once another needs more than its
    time limit (ten minutes with NCCL) longer.
    """
    state.wait_for_everyone()
    state.destroy_process_group()


def _own_share(
    batches: list, runs: dict[str, Questions], processor: ProcessorMixin, max_new_tokens: int, state: PartialState
) -> list:
    if state.num_processes == 1:
        return batches
    costs = batch_costs(batches, runs, processor, max_new_tokens)
    return deal(batches, costs, state.num_processes)[state.process_index]


def wait_for_others(journal: Journal, runs: dict[str, Questions], batches: list) -> None:
    """Return when the files of all processes together hold these batches.

    The launcher ends all processes when one fails; there is no other limit.
    """
    while not all(_is_complete(journal, runs[name], name, indices) for name, indices in batches):
        time.sleep(POLL_SECONDS)
        journal.read_others()


def collect_rows(runs: dict[str, Questions], journal: Journal) -> dict[str, list[dict]]:
    """Return the rows of each run, with the samples' columns as they are now."""
    return journal.finish(
        {name: [questions.columns(index) for index in range(len(questions.rows))] for name, questions in runs.items()}
    )


def _is_complete(journal: Journal, questions: Questions, name: str, indices: Sequence[int]) -> bool:
    return journal.has(name, indices) and all(
        journal.rows[name, index].get("candidates") == candidates and "scores" in journal.rows[name, index]
        for index in indices
        if (candidates := questions.columns(index).get("candidates"))
    )


def check_image_sizes(runs: list[Questions], processor: ProcessorMixin) -> None:
    """Raise ValueError for samples with an image that the model cannot get; sizes are known without decoding."""
    options, reasons = fit_options(processor.image_processor), {}
    for questions in runs:
        for sample in questions.images.select_columns(["id", "image_sizes"]):
            try:
                for width, height in sample["image_sizes"]:
                    fit_size(width, height, **options)
            except ValueError as error:
                reasons.setdefault(sample["id"], str(error))
    if reasons:
        name, reason = next(iter(reasons.items()))
        rule = "raise --max-pixels, or leave them out of the data"
        raise ValueError(
            f"--dataset: {len(reasons)} samples have an unusable image, the first is {name!r}: {reason}; {rule}"
        )


def warn_of_long_references(processor: ProcessorMixin, questions: Questions, max_new_tokens: int) -> None:
    """Print how many reference answers, with the token that ends them, are longer than answers may be."""
    references = [row["reference"] for row in questions.rows]
    lengths = [len(ids) + 1 for ids in processor.tokenizer(references, verbose=False)["input_ids"]]
    if too_long := sum(length > max_new_tokens for length in lengths):
        count = f"{too_long:,} of {len(lengths):,} reference answers are longer than --max-new-tokens {max_new_tokens}"
        print_rank0(f"warning: {count}, the longest has {max(lengths):,} tokens: such answers would be cut")


def _answer_batches(
    engine, runs: dict[str, Questions], batches: list, journal: Journal, args: argparse.Namespace
) -> Iterator[list[dict]]:
    """Yield the rows of each batch: the sample's columns, its answer, and the scores of its candidates.

    Answers in the journal are kept: such a batch has new labels, and is only scored.
    """
    examples_of = ([runs[name][index] for index in indices] for name, indices in batches)
    loaded = load_ahead(examples_of, engine.processors[None])
    for (name, indices), examples in zip(batches, loaded, strict=True):
        questions = runs[name]
        rows = [{"run": name, "index": index, **questions.columns(index)} for index in indices]
        for row, example in zip(rows, examples, strict=True):
            if questions.image_rows[row["index"]] != questions.samples[row["index"]]:
                row["image_of"] = example["image_of"]
        adapter = next(iter(engine.adapters), None) if questions.adapter else None
        candidates = [questions.candidates[index] if questions.candidates else {} for index in indices]
        texts = [
            list(answers.values()) if len(answers) > 1 else [] for answers in candidates
        ]  # else nothing to choose
        if questions.generate and not journal.has(name, indices):
            predictions, cut, scores = engine.answer_and_score(examples, args.max_new_tokens, texts, adapter=adapter)
            for row, prediction, is_cut in zip(rows, predictions, cut, strict=True):
                row |= {"prediction": prediction, **({"cut": True} if is_cut else {})}
        else:
            for row in rows if questions.generate else []:
                answered = journal.rows[name, row["index"]]
                row |= {key: answered[key] for key in ("prediction", "cut") if key in answered}
            scores = score_given(engine, examples, texts, adapter=adapter)
        for row, answers, values in zip(rows, candidates, scores, strict=True):
            if values:
                check_finite(row["id"], values)
                row["scores"] = dict(zip(answers, values, strict=True))
        yield rows


def check_finite(sample: str, scores: list[float]) -> None:
    """Raise ValueError for likelihoods that are no numbers, as a model in float16 can have."""
    if not all(map(isfinite, scores)):
        problem = f"sample {sample!r}: the likelihoods of the labels are not finite"
        raise ValueError(f"{problem}; compute in another dtype (--dtype bfloat16 or float32)")
