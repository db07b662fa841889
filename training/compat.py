"""What training needs of libraries beyond their public interfaces; tests/unit/test_compat_training.py watches it."""

from collections.abc import Callable

from trl import SFTTrainer


class CheckpointHookTrainer(SFTTrainer):
    """`SFTTrainer` with a hook around the saving of a checkpoint.

    transformers has callbacks after a save, but it deletes old checkpoints before them, and an error while saving
    reaches no callback.
    """

    def save_checkpoint(self, save: Callable[[], None]) -> None:
        """Save a checkpoint by calling `save`, in every process."""
        save()

    def _save_checkpoint(self, model, trial) -> None:
        self.save_checkpoint(lambda: super(CheckpointHookTrainer, self)._save_checkpoint(model, trial))


def set_token_count(trainer: SFTTrainer, count: int) -> None:
    """Set the number of tokens that a trainer has seen; on resume TRL would count from 0 again."""
    trainer._total_train_tokens = count
