"""What goes to the Hugging Face Hub, and what never does.

python -m hub outputs/skin you/skin            # push a finished run, private
python -m hub outputs/skin you/skin --public
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from cli import OneLineParser, run

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars, logging
from tqdm import tqdm

from card import FACTS, METRICS, PLOTS, RUN_FACTS, WEIGHTS, make_card, read_base, read_facts, read_metrics

# Adapter, processor, card, curves, facts and figures: no data, no optimizer state, no picture of a patient.
OF_PROCESSOR = (
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
OF_ADAPTER = (WEIGHTS, *OF_PROCESSOR)
OF_RUN = (RUN_FACTS, "training_metrics.png")
# The Hub's passing troubles, and how long to wait before each new try, s; the client retries large files alone.
BUSY = (408, 429, 500, 502, 503, 504)
WAITS = (1, 2, 4, 8)
ADVICE = {401: "; log in with `hf auth login`, or set HF_TOKEN", 403: "; the token may not write there"}


def open_repository(
    repo_id: str, *, private: bool = True, revision: str | None = None, repo_type: str = "model"
) -> str:
    """Make the repository if it does not exist, see that it can be written to, and return its full id.

    Done before training, so that a missing token costs a second and not a night.

    Args:
        repo_id: "name" or "owner/name".
        private: whether a repository that is made now is private.
        revision: branch to make if it does not exist; the main one when None.
        repo_type: "model" or "dataset".

    Raises:
        ValueError: no token, no network, no right to write, or a repository that is public and should not be.

    Source of the token: HF_TOKEN in the environment, or `hf auth login`.
    """
    if get_token() is None:
        raise ValueError(f"no token to push to {repo_id} with: log in with `hf auth login`, or set HF_TOKEN")
    with one_line(f"cannot push to {repo_id}"):
        repo_id, found = patiently(lambda: _claim(repo_id, private, repo_type))
    if found != private:
        words = {True: "private", False: "public"}
        rule = "ask for what it is (hub_private_repo, --public), or change it there"
        raise ValueError(f"{repo_id} is {words[found]} on the Hub and should be {words[private]}; {rule}")
    if revision is not None:
        with one_line(f"cannot push to {repo_id}, branch {revision}"):
            patiently(lambda: HfApi().create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True))
    return repo_id


def is_reachable() -> bool:
    """Tell whether the Hub answers: by one try, where loading from it makes six in half a minute, for each file."""
    try:
        with one_line("the Hub cannot be reached"):
            HfApi().repo_exists("Qwen/Qwen2.5-VL-7B-Instruct")
    except ValueError:
        return False
    return True


def _claim(repo_id: str, private: bool, repo_type: str) -> tuple[str, bool]:
    """Return the full id of a repository that is there now, and whether it is private."""
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True).repo_id
    api.auth_check(repo_id, repo_type=repo_type, write=True)
    return repo_id, api.repo_info(repo_id, repo_type=repo_type).private


def push_adapter(output_dir: Path, repo_id: str, *, revision: str | None = None, private: bool = True) -> str:
    """Upload a finished run's adapter, processor, card, curves and figures, and return the commit's address.

    Args:
        output_dir: the run's folder, or one of its checkpoints.
        repo_id: "owner/name", as `open_repository` gives it.
        revision: branch to commit to; the main one when None.
        private: as the repository is.

    Raises:
        ValueError: no adapter there, or it could not be uploaded; says how to push it later.
    """
    check_adapter(output_dir)
    is_checkpoint = not (output_dir / RUN_FACTS).is_file() and (output_dir.parent / RUN_FACTS).is_file()
    options = [*(["--revision", revision] if revision else []), *([] if private else ["--public"])]
    later = shlex.join(["python", "-m", "hub", str(output_dir), repo_id, *options])
    safe = f"; the adapter is safe in {output_dir}; to push it later: {later}"
    with one_line(f"not pushed to {repo_id}", safe):
        files = collect(output_dir.parent, output_dir) if is_checkpoint else collect(output_dir)
        message = "Upload adapter, processor and model card"
        return upload(files, repo_id, revision=revision, message=message).commit_url


def check_adapter(folder: Path) -> None:
    """Raise ValueError when there is no adapter in the folder."""
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"no adapter in {folder}: {WEIGHTS} is missing")


def collect(output_dir: Path, adapter_dir: Path | None = None) -> dict[str, bytes]:
    """Return all that is uploaded, by its path in the repository.

    Args:
        output_dir: the run's folder.
        adapter_dir: one of its checkpoints, to take instead of the finished adapter.
    """
    source = adapter_dir or output_dir
    base = read_base(output_dir, adapter_dir)["name"]
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    made = {
        "adapter_config.json": json.dumps({**config, "base_model_name_or_path": base}, indent=2),
        FACTS: json.dumps(read_facts(output_dir, adapter_dir), indent=2, ensure_ascii=False),
        "README.md": make_card(output_dir, adapter_dir),
    }
    paths = {name: source / name for name in OF_ADAPTER} | {name: output_dir / name for name in OF_RUN}
    if adapter_dir is None and read_metrics(output_dir) is not None:
        paths |= {name: output_dir / name for name in (METRICS, *PLOTS)}
    files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    return files | {name: text.encode() for name, text in made.items()}


def upload(files: dict[str, bytes], repo_id: str, *, revision: str | None, message: str) -> CommitInfo:
    """Commit all the files at once; those that the repository has already are not sent again.

    To try again is safe, also when the commit was made and only its answer was lost: nothing new makes no commit.
    """

    def commit() -> CommitInfo:
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=text) for name, text in sorted(files.items())]
        return HfApi().create_commit(repo_id, added, commit_message=message, revision=revision)

    return patiently(commit)


def patiently(call: Callable):
    """Return what a call of the Hub's client returns; try again, and say so, while the Hub is busy or out of reach."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:  # see `one_line`
            if not may_pass(error):
                raise
            tqdm.write(f"{explain(error)}; trying again in {wait} s", file=sys.stderr)
        time.sleep(wait)
    return call()


def may_pass(error: Exception) -> bool:
    """Tell whether an error may be gone in a few seconds: the Hub is busy or out of reach, and has not said no."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in BUSY
    return not isinstance(error, OSError | ValueError)


class BackgroundPush:
    """Takes saved checkpoints to the Hub while training goes on: one at a time, and a failure is only a warning.

    A checkpoint that is saved while another is on its way is passed over; the next save or the end brings a newer one.
    `CommitScheduler` would push by the clock, half-written checkpoints among them, and wants files that only grow.
    """

    def __init__(self, repo_id: str, *, revision: str | None = None):
        self.repo_id, self.revision = repo_id, revision
        self.running: Thread | None = None
        disable_progress_bars()  # training has a bar of its own
        logging.set_verbosity_error()  # the client's notes on each retry

    def start(self, checkpoint: Path, output_dir: Path) -> None:
        """Read a checkpoint's adapter, which may be rotated away before it is sent, and send it in the background."""
        if self.running is not None and self.running.is_alive():
            return
        try:
            files = collect(output_dir, checkpoint)
        except Exception as error:  # whatever it is, training is worth more
            self._warn(checkpoint.name, error)
            return
        # a run that is asked to stop does not wait for it; half a push makes no commit
        self.running = Thread(target=self._push, args=(files, checkpoint.name), daemon=True)
        self.running.start()

    def wait(self) -> None:
        """Wait until nothing is on its way."""
        if self.running is not None:
            self.running.join()

    def _push(self, files: dict[str, bytes], name: str) -> None:
        try:
            upload(files, self.repo_id, revision=self.revision, message=f"Upload {name}")
        except Exception as error:
            self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        line = f"warning: {name} not pushed to {self.repo_id}: {explain(error)}; training goes on"
        tqdm.write(line, file=sys.stderr)


@contextmanager
def one_line(before: str, after: str = "") -> Iterator[None]:
    """Turn whatever the Hub's client raises into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # its libraries for HTTP and for large files raise types of their own
        raise ValueError(f"{before}: {explain(error)}{after}") from error


def explain(error: Exception) -> str:
    """Return in one line why the Hub could not be reached, or did not take what it was sent."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, error.server_message
        text = f"the Hub says {status}{f' ({said})' if said else ''}{ADVICE.get(status, '')}"
    elif isinstance(error, OSError | ValueError):
        text = str(error) or type(error).__name__
    else:
        text = f"{type(error).__name__} at {HfApi().endpoint}: {error}"
    return " ".join(text.split())


def _cause(error: Exception) -> Exception:
    """Return what went wrong; the client wraps the error of one file."""
    wrapped = isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
    return error.__cause__ if wrapped else error


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", type=Path, help="folder of a run, or of one of its checkpoints")
    parser.add_argument("repo_id", help='"owner/name" on the Hub, or "name"')
    parser.add_argument("--public", action="store_true", help="for all to see (default: private)")
    parser.add_argument("--revision", help="branch (default: main)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_adapter(args.output_dir)
    repo_id = open_repository(args.repo_id, private=not args.public, revision=args.revision)
    url = push_adapter(args.output_dir, repo_id, revision=args.revision, private=not args.public)
    print(f"pushed to {url}")


if __name__ == "__main__":
    sys.exit(run(main))
