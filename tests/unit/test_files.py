"""Files that are complete or absent after an error or a kill at any point."""

import errno
import fcntl
import json
import os
import signal
import sys

import pytest

from common import files
from common.files import atomic_path, atomic_write, locked, share_weights, suggest_file


@pytest.mark.parametrize("event", ["open", "os.rename"])
def test_a_kill_while_writing_leaves_the_old_file(tmp_path, event):
    path = tmp_path / "facts.json"
    atomic_write(path, "old")

    def kill(name: str, args: tuple) -> None:
        if name == event and str(args[0]).endswith(".unfinished"):
            os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        sys.addaudithook(kill)
        atomic_write(path, "new", durable=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_text() == "old"
    atomic_write(path, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["facts.json"] and path.read_text() == "new"


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    (tmp_path / "model.unfinished").mkdir()  # left by a killed process
    with pytest.raises(OSError), atomic_path(tmp_path / "model") as unfinished:
        unfinished.mkdir()
        raise OSError("no space left")
    assert not list(tmp_path.iterdir())
    with atomic_path(tmp_path / "model") as unfinished:
        unfinished.mkdir()
        (unfinished / "weights").touch()
    assert (tmp_path / "model" / "weights").is_file() and len(list(tmp_path.iterdir())) == 1


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    link, far = tmp_path / "link", tmp_path / "disk" / "answers"
    far.parent.mkdir()
    link.symlink_to(far)
    for text in ("first", "second"):  # the link leads to nothing at first
        with atomic_path(link) as unfinished:
            unfinished.write_text(text)
        assert link.is_symlink() and far.read_text() == text
    assert [path.name for path in far.parent.iterdir()] == ["answers"]


def test_two_processes_do_not_write_one_file(tmp_path):
    with atomic_path(tmp_path / "answers") as first:
        first.write_text("first")
        holder = f"{tmp_path / 'answers'} is in use by process {os.getpid()} on "
        with pytest.raises(ValueError, match=holder), atomic_path(tmp_path / "answers") as second:
            second.write_text("second")
        with atomic_path(tmp_path / "others") as second:
            second.write_text("second")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"answers": "first", "others": "second"}


def test_weights_are_readable_to_those_who_may_read_the_files_beside_them(tmp_path):
    modes = {"a.safetensors": 0o600, "b.safetensors": 0o644, "secret.txt": 0o600, "config.json": 0o640}
    for name, mode in modes.items():
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    share_weights(tmp_path, "config.json")
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "a.safetensors": 0o640, "b.safetensors": 0o640, "secret.txt": 0o600, "config.json": 0o640,
    }  # fmt: skip


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_failed_write_names_its_file(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "a"):
        fail()
    assert str(caught.value) == f"[Errno {number}] {os.strerror(number)}: '{tmp_path / 'a'}'"
    monkeypatch.setattr("pathlib.Path.write_bytes", fail)
    with pytest.raises(OSError, match=str(tmp_path / "b")):
        atomic_write(tmp_path / "b", "b")


def fail_with(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES])
def test_a_storage_without_fsync_is_named_once_and_the_file_is_there(tmp_path, monkeypatch, capsys, number):
    files._warn_no_fsync.cache_clear()
    monkeypatch.setattr(os, "fsync", fail_with(number))
    atomic_write(tmp_path / "a", "a", durable=True)
    atomic_write(tmp_path / "b", "b", durable=True)
    assert (tmp_path / "a").read_text() == "a" and (tmp_path / "b").read_text() == "b"
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: this storage has no fsync ({os.strerror(number)})")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_that_failed_is_an_error(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", fail_with(number))
    with pytest.raises(OSError) as caught:
        atomic_write(tmp_path / "a", "a", durable=True)
    assert caught.value.errno == number and not (tmp_path / "a").exists()


def in_child(work):
    """Run `work` in a process of its own; return its exit code."""
    if not (child := os.fork()):
        try:
            os._exit(work() or 0)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refused(path):
    """Return 7 if the lock is refused with a message that names this process's parent, 0 if it is given."""
    try:
        with locked(path, "output_dir: out"):
            return 0
    except ValueError as error:
        said = f"output_dir: out is in use by process {os.getppid()} on {os.uname().nodename}, started 2"
        return 7 if str(error).startswith(said) else 8


def test_a_lock_refuses_others_names_its_process_and_leaves_no_file(tmp_path):
    path = tmp_path / "training.lock"
    with locked(path, "x") as problem:
        assert problem is None and json.loads(path.read_text())["process"] == os.getpid()
        assert [in_child(lambda: refused(path)) for _ in range(2)] == [7, 7]
    assert not path.exists()
    assert in_child(lambda: refused(path)) == 0 and not path.exists()


def test_a_place_that_takes_no_file_is_said_without_the_name_of_the_lock(tmp_path):
    (tmp_path / "file").touch()
    message = pytest.raises(ValueError, match=r"^--out: m: cannot write there: Not a directory$")
    with message, locked(tmp_path / "file" / ".m.lock", "--out: m"):
        pass


def test_a_process_that_is_killed_leaves_no_lock_even_if_its_child_lives(tmp_path):
    path, (read, write), (started, starting) = tmp_path / "training.lock", os.pipe(), os.pipe()

    def hold_and_die():
        with locked(path, "x"):
            if not os.fork():  # as a DataLoader's worker does
                os.write(starting, b"x")
                os.close(write)
                os.read(read, 1)
                os._exit(0)
            os.read(started, 1)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(hold_and_die) == -signal.SIGKILL
    assert path.exists()
    with locked(path, "x") as problem:
        assert problem is None and json.loads(path.read_text())["process"] == os.getpid()
    for end in (read, write, started, starting):
        os.close(end)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_storage_without_locks_is_named(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", fail_with(number))
    with locked(tmp_path / "training.lock", "x") as problem:
        assert problem == os.strerror(number)
    assert not list(tmp_path.iterdir())


def test_a_link_to_nothing_is_called_so_and_its_own_name_is_not_suggested(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone.jpg")
    assert suggest_file(tmp_path / "a.jpg") == "; it is a link to what is not there"
    assert suggest_file(tmp_path / "A.jpg") == "; did you mean 'a.jpg'?"
