"""Errors of a command are one line; which errors of the Hub are worth a second try."""

import argparse
import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

from common.cli import OneLineParser, announce_loading, expand_home, port_number, positive_number, run

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from torch.utils.data import DataLoader
from transformers.utils.versions import require_version

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


@pytest.mark.parametrize(
    ("words", "out"),
    [
        (["--out", "~/x"], "/home/me/x"),
        (["--out=~/x"], "/home/me/x"),
        (["--out", "~"], "/home/me"),
        (["--out", "./~/x"], "~/x"),
        (["--out", "a~/x"], "a~/x"),
    ],
)
def test_the_home_folder_is_found_in_quoted_words_as_a_shell_finds_it_in_others(monkeypatch, words, out):
    monkeypatch.setenv("HOME", "/home/me")
    parser = OneLineParser()
    parser.add_argument("--out", type=Path)
    assert parser.parse_args(words).out == Path(out)
    commands = OneLineParser().add_subparsers()
    commands.add_parser("convert").add_argument("--out", type=Path)
    assert commands.choices["convert"].parse_args(words).out == Path(out)


@pytest.mark.parametrize("words", [["--out", ""], ["--out="]])
def test_an_option_without_a_value_as_of_an_unset_variable_is_refused_and_not_the_current_folder(capsys, words):
    parser = OneLineParser("x.py")
    parser.add_argument("--out", type=Path)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(words)
    assert capsys.readouterr().err == "x.py: argument --out: expected a value, found '' (--help lists the options)\n"


def test_no_folder_is_called_after_a_home_folder_that_there_is_not(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ValueError, match="~/x: this user has no home folder; write the path in full"):
        expand_home("~/x")


@pytest.mark.parametrize("name", ["HF_HOME", "HF_DATASETS_CACHE"])
def test_an_error_in_a_cache_names_the_variable_that_moves_it(monkeypatch, capsys, tmp_path, name):
    monkeypatch.setenv(name, str(tmp_path / "cache"))
    hint = f"; it is in the cache of Hugging Face's libraries: let {name} name another folder"
    for folder, expected in {"cache": hint, "data": ""}.items():
        error = OSError(errno.EROFS, "Read-only file system", str(tmp_path / folder / "x"))
        assert run(lambda error=error: raise_(error)) == 1
        assert capsys.readouterr().err == f"error: {error}{expected}\n"


def test_a_package_that_a_setting_needs_is_told_in_one_line(capsys):
    assert run(lambda: require_version("no-such-package>=1")) == 1
    assert re.fullmatch("error: .*'no-such-package>=1' distribution was not found.*\n", capsys.readouterr().err)


def test_removed_docstrings_are_told_before_transformers_asks_for_them():
    command = [sys.executable, "-OO", Path(__file__).parents[2] / "eval_sft.py", "--dataset", "x"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: PYTHONOPTIMIZE or -O: expected 1 at most, found 2")


def test_a_plotting_backend_that_is_not_there_ends_nothing():
    code = "import common.cli; from matplotlib.figure import Figure; Figure().savefig('/dev/null', format='png')"
    environment = {**os.environ, "MPLBACKEND": "nonsense"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[2], check=True)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_a_launchers_variable_that_is_no_number_is_named(monkeypatch, name):
    monkeypatch.setenv(name, "abc")
    with pytest.raises(SystemExit, match=f"variable {name}: expected a whole number, found 'abc'"):
        announce_loading()
    monkeypatch.setenv(name, "-1")
    announce_loading()


@pytest.mark.parametrize("command", ["train_sft.py", "eval_sft.py"])
def test_a_folder_that_was_deleted_is_told_before_the_libraries_end_the_process(tmp_path, command):
    script = Path(__file__).parents[2] / command
    code = f"import os, sys; os.rmdir(os.getcwd()); os.execv(sys.executable, [sys.executable, {str(script)!r}])"
    (tmp_path / "gone").mkdir()
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "gone", capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: the current folder was deleted; change to one that exists (cd)\n"


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


def test_an_error_about_many_records_has_a_line_for_each(capsys):
    def fail():
        error = ValueError("2 of 3 records have an error\n  a\n  b")
        error.lines = ["2 of 3 records have an error", "a", "b"]
        raise error

    assert run(fail) == 1
    assert capsys.readouterr().err.splitlines() == ["a", "b", "error: 2 of 3 records have an error"]
