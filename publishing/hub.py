"""What is uploaded to the Hugging Face Hub, and what never is."""

import json
import shlex
import sys
from pathlib import Path
from threading import Thread

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.utils import disable_progress_bars, logging
from tqdm import tqdm

from common.files import ADAPTER_WEIGHTS, EVALUATION_METRICS, EVALUATION_PLOTS, LOADING_SETTINGS, TRAINING_FACTS
from common.hub_client import describe_error, readable_errors, with_retries
from publishing.model_card import make_card
from publishing.run_facts import read_base, read_facts, read_metrics

# Adapter, processor, card, curves, facts and figures: no data, no optimizer state, no picture of a patient.
OF_PROCESSOR = (
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
OF_ADAPTER = (ADAPTER_WEIGHTS, *OF_PROCESSOR)
OF_RUN = (LOADING_SETTINGS, "training_metrics.png")


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
    is_checkpoint = not (output_dir / LOADING_SETTINGS).is_file() and (output_dir.parent / LOADING_SETTINGS).is_file()
    options = [*(["--revision", revision] if revision else []), *([] if private else ["--public"])]
    later = shlex.join(["python", "push_adapter.py", str(output_dir), repo_id, *options])
    safe = f"; the adapter is safe in {output_dir}; to push it later: {later}"
    with readable_errors(f"not pushed to {repo_id}", safe):
        files = collect(output_dir.parent, output_dir) if is_checkpoint else collect(output_dir)
        message = "Upload adapter, processor and model card"
        return upload(files, repo_id, revision=revision, message=message).commit_url


def check_adapter(folder: Path) -> None:
    """Raise ValueError when there is no adapter in the folder."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"no adapter in {folder}: {ADAPTER_WEIGHTS} is missing")


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
        TRAINING_FACTS: json.dumps(read_facts(output_dir, adapter_dir), indent=2, ensure_ascii=False),
        "README.md": make_card(output_dir, adapter_dir),
    }
    paths = {name: source / name for name in OF_ADAPTER} | {name: output_dir / name for name in OF_RUN}
    if adapter_dir is None and read_metrics(output_dir) is not None:
        paths |= {name: output_dir / name for name in (EVALUATION_METRICS, *EVALUATION_PLOTS)}
    files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    return files | {name: text.encode() for name, text in made.items()}


def upload(files: dict[str, bytes], repo_id: str, *, revision: str | None, message: str) -> CommitInfo:
    """Commit all the files at once; those that the repository has already are not sent again.

    To try again is safe, also when the commit was made and only its answer was lost: nothing new makes no commit.
    """

    def commit() -> CommitInfo:
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=text) for name, text in sorted(files.items())]
        return HfApi().create_commit(repo_id, added, commit_message=message, revision=revision)

    return with_retries(commit)


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
        line = f"warning: {name} not pushed to {self.repo_id}: {describe_error(error)}; training goes on"
        tqdm.write(line, file=sys.stderr)
