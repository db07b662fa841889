"""Files that are complete or absent after an error or a kill at any point."""

import os
import signal
import sys

import pytest

from common.files import atomic_path, atomic_write


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
