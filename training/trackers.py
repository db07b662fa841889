"""Experiment trackers: they get a run's curves, settings, data and code; no path, no name of a machine."""

import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from transformers import TrainerCallback
from transformers.integrations import rewrite_logs

from publishing.run_facts import add_facts, read_facts
from training.settings import Settings

TRACKERS = {"tensorboard": TensorBoardTracker, "trackio": TrackioTracker, "wandb": WandBTracker}
# Switches off what wandb collects by itself: code, git remote, command line, folders, user and host.
WANDB_PRIVACY = {
    **{"disable_code": True, "disable_git": True, "save_code": False, "console": "off", "silent": True},
    **{"x_disable_meta": True, "x_disable_machine_info": True, "host": "not reported", "program": "train_sft.py"},
}


class TrackCallback(TrainerCallback):
    """Sends each log to the trackers that `start_trackers` returned, and ends them with the training."""

    def __init__(self, trackers: Sequence[GeneralTracker]):
        self.trackers = trackers

    def on_log(self, args, state, control, logs=None, **kwargs):
        for tracker in self.trackers:
            tracker.log(rewrite_logs(logs), step=state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        for tracker in self.trackers:
            tracker.finish()


def start_trackers(settings: Settings, *, resumed: bool) -> list[GeneralTracker]:
    """Start the trackers of `report_to` in the main process, in place of callbacks that would send them all paths.

    Args:
        settings: of the run.
        resumed: whether the run in the output folder is continued, and not a new one started.

    Raises:
        ValueError: one cannot be started, for example without a login.
    """
    names = [name for name in settings.training.report_to if name in TRACKERS]
    if not names or not PartialState().is_main_process:
        return []
    output_dir = settings.output_dir
    run_id = (resumed and read_facts(output_dir).get("run_id")) or uuid.uuid4().hex[:8]
    add_facts(output_dir, run_id=run_id)
    run_name = f"{settings.training.run_name or output_dir.resolve().name}-{run_id}"
    return [_open(name, settings.training.project, run_name, run_id, output_dir) for name in names]


def track_facts(trackers: Sequence[GeneralTracker], facts: dict) -> None:
    """Send what a run is to the trackers; `facts` have one level."""
    flat = {key: x if isinstance(x, str | int | float | None) else ", ".join(map(str, x)) for key, x in facts.items()}
    for tracker in trackers:
        tracker.store_init_configuration(flat)


def _open(name: str, project: str, run_name: str, run_id: str, output_dir: Path) -> GeneralTracker:
    options = {
        "tensorboard": {"run_name": run_name, "logging_dir": output_dir / "runs"},
        "trackio": {"run_name": project, "name": run_name, "resume": "allow", "private": True},
        "wandb": {
            "run_name": project, "name": run_name, "id": run_id, "resume": "allow", "dir": output_dir,
            "settings": WANDB_PRIVACY,
        },
    }  # fmt: skip
    try:
        tracker = TRACKERS[name](**options[name])
        tracker.start()
    except Exception as error:  # of types that only an installed tracker could name
        raise ValueError(f"report_to: {name} cannot be started: {' '.join(str(error).split())}") from error
    return tracker


def code_commit(root: Path = Path(__file__).parents[1]) -> str | None:
    """Return the commit that is checked out in a folder, None when it is not a git repository."""
    git = root / ".git"
    with suppress(OSError):
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        branch = head.removeprefix("ref: ")
        if branch == head:
            return head
        if (git / branch).is_file():
            return (git / branch).read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8").split("\n")
        return next((line.split()[0] for line in packed if line.endswith(f" {branch}")), None)
    return None
