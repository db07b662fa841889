"""The folder of uploads, which is deleted when the page is closed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def private_uploads() -> Iterator[str]:
    """Yield a new folder, of this user alone, for Gradio's files; it is deleted when the block ends.

    Gradio reads the folder's name when it is imported, and otherwise uses one that all users of a machine share.
    """
    with tempfile.TemporaryDirectory(prefix="uploads-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield folder
