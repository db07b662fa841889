"""Uploading adapters and merged models to the Hugging Face Hub: which files, and when."""

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

# Nothing else is uploaded: no data, no optimizer state, no images of patients.
PROCESSOR_FILES = (
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
ADAPTER_FILES = (ADAPTER_WEIGHTS, *PROCESSOR_FILES)
RUN_FILES = (LOADING_SETTINGS, "training_metrics.png")
MERGED_FILES = [
    *("config.json", "generation_config.json", "README.md", *PROCESSOR_FILES),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
]


def push_adapter(output_dir: Path, repo_id: str, *, revision: str | None = None, private: bool = True) -> str:
    """Upload adapter, processor, card, curves and results, and return the URL of the commit.

    Args:
        output_dir: folder of a run, or of one of its checkpoints.
        repo_id: "owner/name", as `open_repository` returns it.
        revision: branch to commit to; the main one when None.
        private: whether the repository is private; for the command in an error.

    Raises:
        ValueError: no adapter there, or the upload failed; the message has the command to push later.
    """
    check_adapter(output_dir)
    is_checkpoint = not (output_dir / LOADING_SETTINGS).is_file() and (output_dir.parent / LOADING_SETTINGS).is_file()
    options = [*(["--revision", revision] if revision else []), *([] if private else ["--public"])]
    command = shlex.join(["python", "push_adapter.py", str(output_dir), repo_id, *options])
    advice = f"; the adapter is in {output_dir}; to push it later: {command}"
    with readable_errors(f"not pushed to {repo_id}", advice):
        files = collect_files(output_dir.parent, output_dir) if is_checkpoint else collect_files(output_dir)
        message = "Upload adapter, processor and model card"
        return commit_files(files, repo_id, revision=revision, message=message).commit_url


def push_merged_model(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload a merged model and return the URL of the commit.

    Raises:
        ValueError: the upload failed; the message has the command to push later.
    """
    command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *(["--private"] if private else [])])
    advice = f"; the merged model is in {folder}; to push it later: {command}"
    with readable_errors(f"not pushed to {repo_id}", advice):
        options = {"allow_patterns": MERGED_FILES, "commit_message": "Upload merged model"}
        return with_retries(lambda: HfApi().upload_folder(repo_id=repo_id, folder_path=folder, **options)).commit_url


def check_adapter(folder: Path) -> None:
    """Raise ValueError if the folder has no adapter."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"no adapter in {folder}: {ADAPTER_WEIGHTS} is missing")


def collect_files(output_dir: Path, adapter_dir: Path | None = None) -> dict[str, bytes]:
    """Return the content of all files to upload, by path in the repository.

    Args:
        output_dir: folder of the run.
        adapter_dir: checkpoint to upload in place of the finished adapter.
    """
    source = adapter_dir or output_dir
    base = read_base(output_dir, adapter_dir)["name"]
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    written = {
        "adapter_config.json": json.dumps({**config, "base_model_name_or_path": base}, indent=2),
        TRAINING_FACTS: json.dumps(read_facts(output_dir, adapter_dir), indent=2, ensure_ascii=False),
        "README.md": make_card(output_dir, adapter_dir),
    }
    paths = {name: source / name for name in ADAPTER_FILES} | {name: output_dir / name for name in RUN_FILES}
    if read_metrics(source) is not None:
        paths |= {name: source / name for name in (EVALUATION_METRICS, *EVALUATION_PLOTS)}
    files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    return files | {name: text.encode() for name, text in written.items()}


def commit_files(files: dict[str, bytes], repo_id: str, *, revision: str | None, message: str) -> CommitInfo:
    """Commit all files at once; unchanged files are not sent again.

    Retries are safe even if only the response of a commit was lost, as the client makes no commit without changes.
    """

    def commit() -> CommitInfo:
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        return HfApi().create_commit(repo_id, operations, commit_message=message, revision=revision)

    return with_retries(commit)


class BackgroundPush:
    """Uploads checkpoints during training, one at a time; a failure is only a warning.

    A checkpoint that is saved during an upload is skipped, as a later one or the finished adapter follows.
    huggingface_hub's `CommitScheduler` does not fit: it uploads by the clock, incomplete checkpoints too, and expects
    files that only grow.
    """

    def __init__(self, repo_id: str, *, revision: str | None = None):
        self.repo_id, self.revision = repo_id, revision
        self.running: Thread | None = None
        disable_progress_bars()  # training has its own bar
        logging.set_verbosity_error()  # hides the client's messages on each retry

    def start(self, checkpoint: Path, output_dir: Path) -> None:
        """Read a checkpoint, which may be deleted before the upload ends, and upload it in the background."""
        if self.running is not None and self.running.is_alive():
            return
        try:
            files = collect_files(output_dir, checkpoint)
        except Exception as error:  # no error may end the training
            self._warn(checkpoint.name, error)
            return
        # daemon: a stopping run does not wait; an incomplete upload makes no commit
        self.running = Thread(target=self._push, args=(files, checkpoint.name), daemon=True)
        self.running.start()

    def wait(self) -> None:
        """Wait for the current upload."""
        if self.running is not None:
            self.running.join()

    def _push(self, files: dict[str, bytes], name: str) -> None:
        try:
            commit_files(files, self.repo_id, revision=self.revision, message=f"Upload {name}")
        except Exception as error:
            self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        line = f"warning: {name} not pushed to {self.repo_id}: {describe_error(error)}; training continues"
        tqdm.write(line, file=sys.stderr)
