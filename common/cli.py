"""Command lines: argument parsing, errors in one line, exit codes."""

import argparse
import gc
import io
import logging
import math
import os
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
if not (sys.stderr and sys.stderr.isatty()):
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # and those of transformers: in a file each is a wall
# PyTorch's threads spin while they wait for each other, which where other programs use the cores makes a tiny model up
# to forty times as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Says at import, on some CPUs, that an optional kernel is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


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
    """Announce the loading of libraries, before they are imported; not for `--help`."""
    if not {"-h", "--help", "--help-all"} & set(sys.argv):
        announce(f"{Path(sys.argv[0]).name}: loading libraries", "about 10 s, the first time up to a minute")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser with errors of one line, and options in full, with dashes or underscores."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_args([_with_dashes(word) for word in words], namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def _with_dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


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

    Such errors are `ValueError` and `OSError`; they print as one line. `--debug` shows the traceback, and any other
    error is a bug and shows it anyway.
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
    except (ValueError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        with suppress(OSError):
            _flush_stdout()
        print(f"error: {_one_line(error)}", file=sys.stderr)
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


def _one_line(error: Exception) -> str:
    """Return an error's text in one line, without the traceback that a DataLoader's worker puts before it."""
    text = str(error).strip()
    if text.startswith("Caught "):  # the lines of a traceback are indented, its last ones by four
        text = text.rpartition("\n    ")[2].partition("\n")[2].removeprefix("ValueError: ")
    return " ".join(line.strip() for line in text.splitlines() if line.strip()) or type(error).__name__
