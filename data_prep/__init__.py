"""From annotation files and images to a `datasets.DatasetDict` of chat messages. Needs no torch and no GPU."""

from .convert import InvalidRecordsError, prepare_dataset
from .load import join_folds, load_splits
from .records import DataError

__all__ = ["DataError", "InvalidRecordsError", "join_folds", "load_splits", "prepare_dataset"]
