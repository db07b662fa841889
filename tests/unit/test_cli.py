"""Errors of a command are one line; which errors of the Hub are worth a second try."""

import argparse
import io
import os
import subprocess
import sys

from common.cli import port_number, positive_number, run

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from torch.utils.data import DataLoader

from common.hub_client import is_transient


class NetworkError(Exception):
    """As the Hub's client for HTTP has them: of a type of its own."""


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one line", "one line"),
        ("requires both:\n- Evaluation: NO\n\n  - Save: STEPS\n", "requires both: - Evaluation: NO - Save: STEPS"),
        ("a name with  two blanks", "a name with  two blanks"),
        ("\r\nfirst\r\nsecond\u2028third", "first second third"),
        ("", "ValueError"),
    ],
)
def test_an_error_is_one_line(capsys, text, line):
    assert run(lambda: raise_(ValueError(text))) == 1
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("text", ["nan", "-5", "0", "inf", "-inf", "1e400", "", "24GB", "٫5"])
def test_a_number_above_0_is_one(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected a number above 0, found {text!r}"):
        positive_number(text)
    assert (positive_number("24"), positive_number("0.5")) == (24, 0.5)


@pytest.mark.parametrize("text", ["0", "65536", "-1", "x"])
def test_a_port_that_cannot_be_is_refused_with_the_rule(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected a port from 1 to 65535, found '{text}'"):
        port_number(text)
    assert port_number("65535") == 65535


def test_a_name_that_the_terminal_has_no_characters_for_is_printed(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run(lambda: print("\udcff 痣")) == 0
    stdout.flush()
    assert stdout.buffer.getvalue() == b"\\udcff \\u75e3\n"


@pytest.mark.parametrize("target", ["/dev/full", "a pipe that nobody reads"])
def test_output_that_could_not_be_written_is_an_error(tmp_path, target):
    code = "from common.cli import run; import sys; sys.exit(run(lambda: print('x')))"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    read, write = os.pipe()
    os.close(read)
    out = os.open(target, os.O_WRONLY) if target.startswith("/") else write
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: [Errno ") and done.stderr.endswith(": 'standard output'\n")


class Broken:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ValueError("sample 'x': too narrow:\nline two")


def test_an_error_of_a_worker_is_its_message_without_the_traceback(capsys):
    assert run(lambda: list(DataLoader(Broken(), num_workers=1))) == 1
    assert capsys.readouterr().err == "error: sample 'x': too narrow: line two\n"


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError(), ConnectionRefusedError(), TimeoutError(), NetworkError(), RuntimeError("large files")],
)  # fmt: skip
def test_a_lost_connection_is_transient(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [TypeError(), KeyError("x"), AttributeError(), NotImplementedError(), FileNotFoundError(), PermissionError(),
     ValueError(), OfflineModeIsEnabled(), LocalEntryNotFoundError("x")],
)  # fmt: skip
def test_a_mistake_is_not_tried_again(error):
    assert not is_transient(error)


def test_what_a_console_cannot_show_does_not_end_a_command(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="cp1252", write_through=True))
    assert run(lambda: print("melanoma \u9ed1 \u00fc")) == 0
    assert shown.getvalue() == b"melanoma \\u9ed1 \xfc\n"
