"""Output folders that one command owns while it runs, with all its processes."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from common.files import check_parent, locked

FILE_TIMEOUT = 10.0  # s; network file systems may take a moment to show a new file elsewhere


@contextmanager
def own_folder(folder: Path, option: str, *, lock: str) -> Iterator[None]:
    """Make an output folder and keep other runs out of it while the block runs; the main process holds the lock.

    A folder that it made and that is empty at the end, as after a refused setting, is removed.

    Args:
        folder: the output folder.
        option: that names it, for messages.
        lock: name of the lock's file in it, one for each kind of run.

    Raises:
        ValueError: in every process, another run is using the folder, or a process cannot write there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        _prepare(folder, option)
        refused = problem = None
        if PartialState().is_main_process:
            try:
                problem = stack.enter_context(locked(folder / lock, f"{option}: {folder}"))
            except ValueError as error:
                refused = f"{error}; wait for it or stop it, or choose another {option}"
        [refused] = broadcast_object_list([refused])
        if refused:
            raise ValueError(refused)
        if problem:
            print(f"warning: {option}: the storage of {folder} has no file locks ({problem}), so that a second "
                  "run in it would not be noticed", flush=True)  # fmt: skip
        yield


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # not empty, or removed by another process
        for folder in folders:
            folder.rmdir()


def _prepare(folder: Path, option: str) -> None:
    """Make the output folder and check that all processes can write to it, before anything slow starts."""
    check_parent(option, folder)
    try:
        Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)  # what a link leads to
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{option}: cannot write to {folder}: {error.strerror}") from error
    _check_shared(folder, option)


def _check_shared(folder: Path, option: str) -> None:
    """Raise ValueError, in every process, unless each of them sees what the main process writes into `folder`."""
    state = PartialState()
    [name] = broadcast_object_list([f".seen-by-all-{uuid.uuid4().hex}"])
    if state.is_main_process:
        (folder / name).touch()
    state.wait_for_everyone()
    seen = gather_object([_appears(folder / name)])
    if state.is_main_process:
        (folder / name).unlink()
    if not all(seen):
        raise ValueError(
            f"{option}: process {seen.index(False)} does not see what process 0 writes there (here: {folder}); "
            "put it on storage that all machines share"
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + FILE_TIMEOUT
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
