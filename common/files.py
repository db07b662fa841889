"""Names of the files of an output folder, and writing files so that they are complete or absent; JSON Lines."""

import difflib
import errno
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from itertools import islice
from pathlib import Path

# Files of an output folder.
LOADING_SETTINGS = "run.json"  # how the base model is loaded
TRAINING_FACTS = "facts.json"  # base, data, settings, progress; no path and no file name
EVALUATION_METRICS = "eval/metrics.json"
EVALUATION_SETTINGS = "eval/settings.json"  # names the adapter that was measured
EVALUATION_PLOTS = ("eval/abstention.png", "eval/confusion.png", "eval/reliability.png", "eval/subgroups.png")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_COMPARED = 5000  # names of a folder, when one is missing


def read_json(path: Path) -> dict | None:
    """Return the JSON object in a file; None when there is no such file.

    Raises:
        ValueError: it holds something else; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected an object, found {content!r:.60}")
    return content if path.is_file() else None


def read_json_lines(path: Path) -> list[dict]:
    """Return the rows of a JSON Lines file. `splitlines` would also split at U+2028 and U+0085 inside a text.

    Raises:
        ValueError: a line is not a JSON object; the message names file and line.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            if line:
                rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: damaged, expected a JSON object: {error}") from error
    return rows


# What fsync reports when bytes are lost. With any other error the storage, or the system, has no fsync for this.
WRITE_FAILED = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENXIO)
# What a lock that another process holds is reported as. With any other error the storage has no locks.
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


def digest_of_file(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomic_write(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a file so that readers get either the old or the new content, even if the process is killed.

    Args:
        path: file to write or replace.
        content: bytes, or text to encode as UTF-8.
        durable: wait until the content and the name are on the disk, so that they also survive a power failure.
    """
    unfinished = unfinished_path(path)
    with error_names(path):
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            fsync(unfinished)
        unfinished.replace(path)
        if durable:
            fsync(path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the path of a file or folder to write, which is renamed to `path` when the block ends without an error.

    A link stays, and what it leads to is written. After an error a folder is deleted; a file keeps what was written,
    under its temporary name.

    Raises:
        ValueError: another process is writing there.
    """
    path = Path(os.path.realpath(path))  # `resolve` has an error of its own for links in a circle
    unfinished = unfinished_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock"), str(path)):
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
        try:
            with error_names(path):
                yield unfinished
                unfinished.replace(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def check_parent(option: str, path: Path) -> None:
    """Raise ValueError if a file or folder cannot be made: one of the folders above it is a file, or for its name.

    Files inside hold paths, and JSON and safetensors write UTF-8 alone: that would fail after hours of work.
    """
    if str(path) != (printable := str(path).encode(errors="replace").decode()):
        raise ValueError(f"{option}: '{printable}' is not UTF-8; choose another name, or set LANG=C.UTF-8")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"{option}: {parent} is a file, and {path} cannot be in it")


def share_weights(folder: Path, like: str) -> None:
    """Let those read a folder's weights who may read its file `like`; since safetensors 0.8 their owner alone may."""
    for path in folder.glob("*.safetensors"):
        with suppress(OSError):  # a storage without permissions
            path.chmod((folder / like).stat().st_mode)


@contextmanager
def error_names(path: Path) -> Iterator[None]:
    """Let an OSError of the block name the file that is written; that of a failed write ("No space left") does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def unfinished_path(path: Path) -> Path:
    """Return the temporary name that `path` is written under."""
    return path.with_name(path.name + ".unfinished")


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk; where that is not supported, warn once.

    Windows has it for files only, some network folders for nothing.

    Raises:
        OSError: the bytes could not be written.
    """
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows asks for a writable one
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in WRITE_FAILED:
            raise
        if os.name != "nt" or path.is_file():
            _warn_no_fsync(error.strerror or str(error))


@cache
def _warn_no_fsync(reason: str) -> None:
    text = "warning: this storage has no fsync ({}): a power failure may cost the newest files"
    print(text.format(reason), file=sys.stderr, flush=True)


_HANDLES: set[int] = set()  # of locks; a child that outlives its parent, as workers do for seconds, must not hold one
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [os.close(_HANDLES.pop()) for _ in range(len(_HANDLES))])


@contextmanager
def locked(path: Path, what: str) -> Iterator[str | None]:
    """Hold the operating system's lock of a file while the block runs; the file is deleted at its end.

    The lock ends with its process, however that ends, so that a file which is left behind blocks nothing.

    Args:
        path: of the file; it names the process that holds the lock.
        what: is protected, for the message.

    Yields:
        None, or why this storage has no locks.

    Raises:
        ValueError: another process holds it; the message names it. Or no file can be made there.
    """
    handle, problem = _open_locked(path, what)
    _HANDLES.add(handle)
    try:
        yield problem
    finally:
        _HANDLES.remove(handle)
        with suppress(OSError):  # Windows deletes no open file
            path.unlink()
        os.close(handle)


def suggest_file(path: Path) -> str:
    """Return "; did you mean 'x'?" with the nearest name beside a missing file or folder, "" when there is none.

    Near are names in another case, with another ending or a typing error; those with other digits are other files.
    """
    if not path.parent.is_dir():
        return ""
    if path.is_symlink():
        return "; it is a link to what is not there"
    if path.exists():
        return "; it is a folder, a pipe or a device"
    beside = [other.name for other in islice(path.parent.iterdir(), MAX_COMPARED) if not other.name.startswith(".")]
    beside = [name for name in beside if _digits(Path(name).stem) == _digits(path.stem)]
    same = [name for name in beside if Path(name).stem.casefold() == path.stem.casefold()]
    alike = difflib.get_close_matches(path.stem, {Path(name).stem for name in beside}, n=1, cutoff=0.75)
    candidates = same or [name for name in beside if Path(name).stem in alike]
    near = difflib.get_close_matches(path.name, candidates, n=1, cutoff=0)
    return f"; did you mean {near[0]!r}?" if near else ""


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def _open_locked(path: Path, what: str) -> tuple[int, str | None]:
    while True:
        try:
            handle, problem = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), None
        except OSError as error:
            raise ValueError(f"{what}: cannot write there: {error.strerror}") from error
        try:
            _lock(handle)
        except OSError as error:
            if error.errno in HELD:
                holder = os.read(handle, 1000).decode(errors="replace")
                os.close(handle)
                raise ValueError(f"{what} is in use by {_describe_holder(holder)}") from error
            problem = error.strerror or str(error)
        if problem or _is_file(handle, path):
            break
        os.close(handle)  # its holder has just deleted it
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    os.truncate(handle, 0)
    os.write(handle, json.dumps({"process": os.getpid(), "host": platform.node(), "started": started}).encode())
    return handle, problem


def _lock(handle: int) -> None:
    """Lock a file, or raise OSError at once."""
    if os.name == "nt":
        import msvcrt

        os.lseek(handle, 1 << 20, os.SEEK_SET)  # behind the content, which others may then read
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf would end when this process reads the file


def _is_file(handle: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _describe_holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['process']} on {holder['host']}, started {holder['started']}"
    except (ValueError, KeyError, TypeError):  # it has not written yet
        return "another process"
