"""Annotation files and images become a `datasets.DatasetDict` of chat messages. Only `inspect` needs torch."""

import common.cli  # noqa: F401  before what takes seconds to import: it makes Ctrl-C one line

from .convert import InvalidRecordsError, prepare_dataset
from .load import fingerprint, join_folds, load_splits
from .records import DataError

__all__ = ["DataError", "InvalidRecordsError", "fingerprint", "join_folds", "load_splits", "prepare_dataset"]
