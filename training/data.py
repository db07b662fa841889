"""The data of a run: splits, sampling by weight, lengths; checked before anything slow starts."""

from dataclasses import dataclass

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import ProcessorMixin

from common.console import print_rank0
from data_prep import join_folds, load_splits
from data_prep.balance import draw
from models.loading import load_processor
from publishing.run_facts import describe_data
from training.lengths import SampleLengths, check_lengths, measure_lengths
from training.settings import Settings


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
    return load_processor(settings.model.model_name_or_path, **limits, **options)


def load_data(settings: Settings, processor: ProcessorMixin) -> TrainingData:
    """Load the splits, sample the training split by weight, and check every length.

    Raises:
        ValueError, FileNotFoundError: no such data, a split is missing, or a sample is over `max_length`.
    """
    splits = open_splits(settings)
    facts = describe_data(splits, settings.data.dataset_path)
    splits["train"] = sample_by_weight(splits["train"], settings.training.seed)
    return TrainingData(splits, check_data(splits, processor, settings), facts)


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


def sample_by_weight(train: Dataset, seed: int) -> Dataset:
    """Return the training split with each sample as often as its weight from `data_prep convert --balance` says."""
    if set(train["weight"]) == {1.0}:
        return train
    indices = draw(train["weight"], seed=seed)
    print_rank0(f"sampled by weight: an epoch sees {len(set(indices)):,} different samples of {len(train):,}")
    return train.select(indices)


def check_data(splits: DatasetDict, processor: ProcessorMixin, settings: Settings) -> dict[str, SampleLengths]:
    """Return the lengths by split; raise ValueError for samples over `max_length` before the model is loaded."""
    names = ["train", "validation"] if settings.evaluates else ["train"]
    with PartialState().local_main_process_first():  # the others read them from the cache
        lengths = {name: measure_lengths(splits[name], processor) for name in names}
    for name in reversed(names):
        check_lengths(lengths[name], splits[name]["id"], settings.training.max_length, split=name)
    return lengths
