"""Annotation files and images become a `datasets.DatasetDict` of chat messages. Only `inspect` needs torch."""

from .convert import InvalidRecordsError, prepare_dataset
from .load import fingerprint, join_folds, load_splits
from .records import DataError

__all__ = ["DataError", "InvalidRecordsError", "fingerprint", "join_folds", "load_splits", "prepare_dataset"]
