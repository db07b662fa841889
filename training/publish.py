"""The Hub during training: the repository is claimed before it starts, checkpoints are pushed while it runs."""

from pathlib import Path

from accelerate import PartialState
from trl import SFTTrainer

from common.hub_client import open_repository
from publishing.hub import BackgroundPush
from training.callbacks import PushCallback
from training.config import TrainingSettings


def claim_repository(training_args: TrainingSettings) -> str | None:
    """Make sure now that the adapter can be pushed later; return the repository's id in the process that will push.

    The trainer's own push is switched off: it would upload the whole output folder.
    """
    push, training_args.push_to_hub = training_args.push_to_hub, False
    if not push or not PartialState().is_main_process:
        return None
    repo_id = training_args.hub_model_id or Path(training_args.output_dir).resolve().name
    return open_repository(repo_id, **push_options(training_args))


def push_options(training_args: TrainingSettings) -> dict:
    return {"private": training_args.hub_private_repo is not False, "revision": training_args.hub_revision}


def push_every_save(trainer: SFTTrainer, repo_id: str | None) -> BackgroundPush | None:
    """Push saved checkpoints in the background from now on, in the process that has claimed a repository."""
    if repo_id is None:
        return None
    background = BackgroundPush(repo_id, revision=trainer.args.hub_revision)
    trainer.add_callback(PushCallback(background))
    return background
