"""The data of a run: splits, sampling by weight, lengths, checked before anything slow starts."""

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import ProcessorMixin
from trl import ModelConfig

from common.console import print_rank0
from data_prep import join_folds, load_splits
from data_prep.balance import draw
from models.loading import load_processor
from training.config import DataArguments, TrainingSettings
from training.lengths import SampleLengths, check_lengths, measure_lengths


def open_processor(data_args: DataArguments, model_args: ModelConfig) -> ProcessorMixin:
    limits = {"min_pixels": data_args.min_pixels, "max_pixels": data_args.max_pixels}
    return load_processor(model_args.model_name_or_path, **limits, revision=model_args.model_revision)


def load_data(data_args: DataArguments, training_args: TrainingSettings) -> DatasetDict:
    """Load the splits and check that those needed are there."""
    splits = load_splits(data_args.dataset_path, data_args.image_dir, show_progress=PartialState().is_main_process)
    splits = join_folds(splits, data_args.fold)
    if "train" not in splits or len(splits["train"]) == 0:
        raise ValueError(f"dataset_path: {data_args.dataset_path} has no training split, only {sorted(splits)}")
    if training_args.eval_strategy != "no" and len(splits.get("validation", ())) == 0:
        rule = "set eval_strategy: no, or prepare the data with one"
        raise ValueError(f"dataset_path: {data_args.dataset_path} has no validation split; {rule}")
    return splits


def draw_by_weight(train: Dataset, seed: int) -> Dataset:
    """Return the training split with its samples as often as `data_prep convert --balance` weighed them."""
    if set(train["weight"]) == {1.0}:
        return train
    indices = draw(train["weight"], seed=seed)
    print_rank0(f"drawn by weight: an epoch sees {len(set(indices)):,} different samples of {len(train):,}")
    return train.select(indices)


def check_data(
    splits: DatasetDict, processor: ProcessorMixin, training_args: TrainingSettings
) -> dict[str, SampleLengths]:
    """Refuse samples over max_length now and not in the middle of the night; return the lengths by split."""
    names = ["train", "validation"] if training_args.eval_strategy != "no" else ["train"]
    with PartialState().local_main_process_first():  # the others find them in the cache
        lengths = {name: measure_lengths(splits[name], processor) for name in names}
    for name in names[::-1]:
        check_lengths(lengths[name], splits[name]["id"], training_args.max_length, split=name)
    if training_args.train_sampling_strategy == "group_by_length":
        splits["train"] = splits["train"].add_column(training_args.length_column_name, lengths["train"].total)
    return lengths
