"""Command lines: argument parsing, errors in one line, exit codes."""

import argparse
import gc
import io
import logging
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# Imports make a million objects that stay. Searched for garbage as often as usual, they take a fifth longer.
_USUAL_THRESHOLDS = gc.get_threshold()
gc.set_threshold(200_000, 50, 1000)
# TRL sends telemetry at each start of a trainer; training on patients' images has to stay private.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # which would also ask for Gradio's newest version
os.environ["MPLBACKEND"] = "agg"  # figures go to files; a notebook's own, or a mistyped one, may not be there
if not (sys.stderr and sys.stderr.isatty()):
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # and those of transformers: in a file each is a wall
# PyTorch's threads spin for milliseconds while they wait for each other, which makes a tiny model up to forty times as
# slow where other programs use the cores. These are tens of microseconds, which cost nothing where they are free.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# Batches differ in length, and a GPU's memory would be reserved in pieces that fit none: 54.8 GB where 35.3 are enough
# (benchmarks/README.md). WSL fails at what these segments need (github.com/pytorch/pytorch/issues/192330).
if sys.platform == "linux" and "microsoft" not in platform.release().lower():
    if not any(name.endswith("_ALLOC_CONF") for name in os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
# Says at import, on some CPUs, that an optional kernel is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # says where its cache is, when the home cannot be written
CACHES = ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE")  # environment variables with a folder


_show_error = sys.excepthook


def _show_uncaught(kind: type[BaseException], error: BaseException, traceback) -> None:
    """Print what no one catches; Ctrl-C while a command still imports its libraries, before `run`, is one line."""
    if issubclass(kind, KeyboardInterrupt) and "--debug" not in sys.argv:
        print("interrupted", file=sys.stderr)
    else:
        _show_error(kind, error, traceback)


sys.excepthook = _show_uncaught  # the process then ends by the signal, which shells show as 130


def announce(step: str, duration: str) -> None:
    """Print what takes some seconds from now on, and how long; the first process alone does, to stderr."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{step} ({duration})", file=sys.stderr, flush=True)


def announce_loading() -> None:
    """Announce the loading of libraries, before they are imported; not for `--help`. End where they would fail."""
    try:
        Path.cwd()
    except FileNotFoundError:  # some libraries then end with a traceback, others the process
        sys.exit("error: the current folder was deleted; change to one that exists (cd)")
    if sys.flags.optimize > 1:
        sys.exit("error: PYTHONOPTIMIZE or -O: expected 1 at most, found 2, which removes docstrings that are needed")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if not (value := os.environ.get(name, "0")).removeprefix("-").isdecimal():
            sys.exit(f"error: the environment variable {name}: expected a whole number, found {value!r}")
    if not {"-h", "--help", "--help-all"} & set(sys.argv):
        announce(f"{Path(sys.argv[0]).name}: loading libraries", "about 10 s, the first time up to a minute")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser with errors of one line, options in full, with dashes or underscores, and `~` as a shell."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_args(self, args=None, namespace=None):
        words = [_with_dashes(word) for word in (sys.argv[1:] if args is None else args)]
        for option, value in zip(words, [*words, None][1:], strict=True):
            if option[:2] == "--" != option and (value == "" or option.endswith("=")):  # as of a variable without one
                self.error(f"argument {option.rstrip('=')}: expected a value, found ''")
        return super().parse_args(words, namespace)

    def parse_known_args(self, args=None, namespace=None):  # `parse_args` calls it, as TRL's parser does
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_expand_value(word) for word in words], namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def _with_dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _expand_value(word: str) -> str:
    name, equals, value = word.partition("=")
    return name + equals + expand_home(value) if word.startswith("--") else expand_home(word)


def expand_home(text: str) -> str:
    """Return a path with the home folder in place of `~`, as a shell does where the word has no quotes.

    Left as it is, a folder called `~` would be made here. `./~/x` names one.

    Raises:
        ValueError: the system knows no home folder of this user.
    """
    if text != "~" and not text.startswith(("~/", f"~{os.sep}")):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{text}: this user has no home folder; write the path in full") from error


def positive_int(text: str) -> int:
    """Read a whole number above 0 (the `type` of an option)."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def port_number(text: str) -> int:
    """Read the number of a port (the `type` of an option)."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, found {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """Read a finite number above 0 (the `type` of an option)."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:  # nan is not above 0
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return number


def run(main: Callable[[], int | None]) -> int:
    """Call `main` and return the exit code: 0 or that of `main`, 1 after a user error, 130 after Ctrl-C.

    Such errors are `ValueError` and `OSError`, and packages that a setting needs; they print as one line. `--debug`
    shows the traceback, and any other error is a bug and shows it anyway.
    """
    gc.freeze()  # what is imported stays
    gc.set_threshold(*_USUAL_THRESHOLDS)
    # Versions are pinned: users of a command need no warnings about future versions.
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console's code page must not end a run whose work is done
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
        _flush_stdout()
        return code
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if "--debug" in sys.argv:
            raise
        with suppress(OSError):
            _flush_stdout()
        # One about many records has `lines`, one for each; its class is of data_prep, a layer above this one.
        text, *details = map(_one_line, getattr(error, "lines", [error]))
        print(*details, f"error: {text}{_cache_of(error)}", sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _flush_stdout() -> None:
    """Write what was printed, so that a full disk or a closed pipe is an error, and no remark at Python's end."""
    try:
        if sys.stdout is not None:  # as it is when the caller closed it
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        error.filename = "standard output"
        raise


def _cache_of(error: Exception) -> str:
    """Return what to do about an error at a file of Hugging Face's caches, which no option names; "" for others."""
    named = {name: os.environ[name] for name in CACHES if os.environ.get(name)}
    folders = {"HF_HOME": "~/.cache/huggingface", **named}
    file = getattr(error, "filename", None)
    for name, folder in folders.items():
        with suppress(RuntimeError):  # no home folder
            if isinstance(file, str) and Path(file).is_relative_to(Path(folder).expanduser()):
                return f"; it is in the cache of Hugging Face's libraries: let {name} name another folder"
    return ""


def _one_line(error: Exception | str) -> str:
    """Return an error's text in one line, without the traceback that a DataLoader's worker puts before it."""
    text = str(error).strip()
    if text.startswith("Caught "):  # the lines of a traceback are indented, its last ones by four
        text = text.rpartition("\n    ")[2].partition("\n")[2].removeprefix("ValueError: ")
    return " ".join(line.strip() for line in text.splitlines() if line.strip()) or type(error).__name__
