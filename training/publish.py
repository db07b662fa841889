"""The Hub during training: the repository is claimed before it starts, checkpoints are pushed while it runs."""

from accelerate import PartialState

from common.console import print_rank0
from common.hub_client import open_repository
from publishing.hub import BackgroundPush, push_adapter
from training.callbacks import PushCallback
from training.settings import Settings
from training.trainer import SafeSFTTrainer


def claim_repository(settings: Settings) -> str | None:
    """Make sure now that the adapter can be pushed later; return the repository's id in the process that will push."""
    if not settings.training.push_to_hub:
        if settings.training.hub_model_id:
            print_rank0(f"push_to_hub is false: nothing is uploaded to {settings.training.hub_model_id}")
        return None
    if not PartialState().is_main_process:
        return None
    repo_id = settings.training.hub_model_id or settings.output_dir.resolve().name
    return open_repository(repo_id, **push_options(settings))


def push_options(settings: Settings) -> dict:
    return {"private": settings.training.hub_private_repo is not False, "revision": settings.training.hub_revision}


def push_checkpoints(trainer: SafeSFTTrainer, repo_id: str | None) -> BackgroundPush | None:
    """Push saved checkpoints in the background from now on, in the process that has claimed a repository."""
    if repo_id is None:
        return None
    background = BackgroundPush(repo_id, revision=trainer.args.hub_revision)
    trainer.add_callback(PushCallback(background))
    return background


def push_final(background: BackgroundPush | None, settings: Settings) -> None:
    """Push the finished adapter, in the process that pushes."""
    if background is not None:
        background.wait()
        print_rank0(f"pushed to {push_adapter(settings.output_dir, background.repo_id, **push_options(settings))}")
