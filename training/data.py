"""The data of a run: splits, sampling by weight, lengths; checked before anything slow starts."""

import json
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import ProcessorMixin

from common.console import print_rank0
from common.files import atomic_write
from data_prep import fingerprint, join_folds, load_splits
from data_prep.balance import draw
from data_prep.sizes import fit_options
from models.loading import load_processor
from models.thinking import check_thought, has_thoughts
from publishing.run_facts import describe_data
from training.lengths import (
    SampleLengths,
    check_pack_limit,
    describe_too_long,
    find_too_long,
    list_too_long,
    measure_lengths,
    select_lengths,
)
from training.settings import Settings

TOO_LONG = "too_long.jsonl"


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and validates on.

    Attributes:
        splits: all splits, "train" as an epoch sees it.
        lengths: of the samples of "train", and of "validation" if the run evaluates.
        facts: counts and fingerprint, see `describe_data`.
    """

    splits: DatasetDict
    lengths: dict[str, SampleLengths]
    facts: dict


def open_processor(settings: Settings, *, local_files_only: bool = False) -> ProcessorMixin:
    options = {"revision": settings.model.model_revision, "local_files_only": local_files_only}
    limits = {"min_pixels": settings.data.min_pixels, "max_pixels": settings.data.max_pixels}
    return load_processor(settings.model.model_name_or_path, **limits, thinking=settings.data.thinking, **options)


def load_data(settings: Settings, processor: ProcessorMixin, *, list_in: Path | None = None) -> TrainingData:
    """Load the splits, check every length, leave out what is too long if asked to, and sample by weight.

    Args:
        settings: of the run.
        processor: the model's.
        list_in: folder for `too_long.jsonl`, the samples over `max_length`; without it none is written.

    Raises:
        ValueError, FileNotFoundError: no such data, a split is missing, a sample is over `max_length`, or an answer's
            thought does not fit `thinking`.
    """
    splits = open_splits(settings)
    if has_thoughts(processor):
        check_thoughts(splits, settings.data.thinking)
    prepared = splits["train"]
    lengths = check_data(splits, processor, settings, list_in)
    facts = describe_data(splits, settings.data.dataset_path)
    if splits["train"] is not prepared:  # samples were left out
        facts["prepared_fingerprint"] = fingerprint(prepared)
    drawn = sample_by_weight(splits["train"], settings.training.seed)
    if drawn is not splits["train"]:
        splits["train"], lengths["train"] = drawn, measure_lengths(drawn, processor)
    return TrainingData(splits, lengths, facts)


def open_splits(settings: Settings) -> DatasetDict:
    """Load the splits and check that those needed are there."""
    path = settings.data.dataset_path
    splits = load_splits(path, settings.data.image_dir, show_progress=PartialState().is_main_process)
    splits = join_folds(splits, settings.data.fold)
    if "train" not in splits or len(splits["train"]) == 0:
        raise ValueError(f"dataset_path: {path} has no training split, only {sorted(splits)}")
    if settings.evaluates and len(splits.get("validation", ())) == 0:
        rule = "set eval_strategy: no, or prepare the data with one"
        raise ValueError(f"dataset_path: {path} has no validation split; {rule}")
    return splits


def check_thoughts(splits: DatasetDict, thinking: str) -> None:
    """Raise ValueError for answers to learn with a thought that `thinking` does not allow, or with a broken one."""
    wrong = [
        f"sample {sample_id!r}: {problem}"
        for split in (splits[name] for name in ("train", "validation") if name in splits)
        for sample_id, messages in zip(split["id"], split["messages"], strict=True)
        for message in messages
        if message["role"] == "assistant" and (problem := check_thought(message["content"], thinking))
    ]
    if wrong:
        raise ValueError(f"thinking: {len(wrong):,} answers have a wrong thought; the first is of {wrong[0]}")


def sample_by_weight(train: Dataset, seed: int) -> Dataset:
    """Return the training split with each sample as often as its weight from `data_prep convert --balance` says."""
    if set(train["weight"]) == {1.0}:
        return train
    indices = draw(train["weight"], seed=seed)
    print_rank0(f"sampled by weight: an epoch sees {len(set(indices)):,} different samples of {len(train):,}")
    return train.select(indices)


def check_data(
    splits: DatasetDict, processor: ProcessorMixin, settings: Settings, list_in: Path | None = None
) -> dict[str, SampleLengths]:
    """Return the lengths by split; refuse samples over `max_length` before the model is loaded, or leave them out."""
    names, limit = (["train", "validation"] if settings.evaluates else ["train"]), settings.training.max_length
    with PartialState().local_main_process_first():  # the others read them from the cache
        lengths = {name: measure_lengths(splits[name], processor) for name in names}
    check_pack_limit(limit, settings.pack_limit, max(max(each.total) for each in lengths.values()))
    rows = list_too_long(splits, lengths, limit)
    path = None if list_in is None else list_in / TOO_LONG
    if path is not None and PartialState().is_main_process:
        path.unlink(missing_ok=True)  # of an earlier start
        if rows:
            atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if rows and settings.data.too_long == "error":
        sizes, fit = {name: len(splits[name]) for name in names}, fit_options(processor.image_processor)
        raise ValueError(describe_too_long(rows, sizes, limit, fit, pack_tokens=settings.pack_limit, path=path))
    return leave_out(splits, lengths, limit, path) if rows else lengths


def leave_out(
    splits: DatasetDict, lengths: dict[str, SampleLengths], max_length: int, path: Path | None
) -> dict[str, SampleLengths]:
    """Leave samples over `max_length` out of the splits, in place; say how many; return the lengths of the rest."""
    kept_lengths = {}
    for name, counted in lengths.items():
        dropped = set(find_too_long(counted, max_length))
        kept = [n for n in range(len(counted.total)) if n not in dropped]
        if not kept:
            raise ValueError(f"too_long: all {len(dropped)} {name} samples are over max_length {max_length}")
        if dropped:
            listed = f", listed in {path}" if path is not None else ""
            print_rank0(f"too long   {len(dropped):,} of {len(counted.total):,} {name} samples left out{listed}")
            splits[name] = splits[name].select(kept)
        kept_lengths[name] = select_lengths(counted, kept)
    return kept_lengths
