"""What training needs of libraries beyond their public interfaces; tests/unit/test_compat_training.py watches it."""

from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel
from trl import SFTTrainer

from models.compat import ignore_in_ddp
from models.sharding import is_sharded


class HookTrainer(SFTTrainer):
    """`SFTTrainer` with a hook around the saving of a checkpoint, one for the gradients' norm, and DDP of its own.

    transformers has callbacks after a save, but it deletes old checkpoints before them, and an error while saving
    reaches no callback. It leaves DDP to accelerate, which refuses models with sharded weights. The norm it computes
    over all parameters, frozen ones included, and tells no callback.

    Attributes:
        trained: the parameters whose gradients are clipped; None lets transformers look through the model.
        grad_norm: of the last step, before clipping; None before the first.
    """

    trained: list[torch.nn.Parameter] | None = None
    grad_norm: torch.Tensor | float | None = None

    def _wrap_model(self, model, training: bool = True, dataloader=None):
        wrapped = super()._wrap_model(model, training, dataloader)
        if not training or wrapped is not model or not is_sharded(model):
            return wrapped
        return self._replicate_trained(model)

    def _replicate_trained(self, model) -> DistributedDataParallel:
        """DDP for what trains, beside sharded weights, which accelerate would refuse."""
        model = self.accelerator.prepare_model(model, evaluation_mode=True)  # autocast only
        ignore_in_ddp(model, [name for name, p in model.named_parameters() if not p.requires_grad])
        options = self.accelerator.ddp_handler.to_kwargs()
        return DistributedDataParallel(model, **{**options, "gradient_as_bucket_view": True})

    def save_checkpoint(self, save: Callable[[], None]) -> None:
        """Save a checkpoint by calling `save`, in every process."""
        save()

    def _save_checkpoint(self, model, trial) -> None:
        self.save_checkpoint(lambda: super(HookTrainer, self)._save_checkpoint(model, trial))

    def _clip_grad_norm(self, model) -> torch.Tensor:
        if self.trained is None:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None) -> torch.Tensor | float:
        if grad_norm is None and self.trained is not None:  # without clipping
            grad_norm = self.accelerator.clip_grad_norm_(self.trained, float("inf"))
        self.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.grad_norm


def set_token_count(trainer: SFTTrainer, count: int) -> None:
    """Set the number of tokens that a trainer has seen; on resume TRL would count from 0 again."""
    trainer._total_train_tokens = count


def log_batch(trainer: SFTTrainer, mode: str, entropy: float, right: float, labels: float, tokens: float) -> None:
    """Add a batch to what the trainer's next line of the log averages.

    Args:
        trainer: whose log it is.
        mode: "train" or "eval".
        entropy: sum over the labels, nats.
        right: predictions whose likeliest token is the label.
        labels: their number.
        tokens: of the batch's samples.
    """
    metrics = trainer._metrics[mode]
    metrics["entropy"].append(entropy / labels)
    metrics["mean_token_accuracy"].append(right / labels)
    if mode == "train":
        trainer._total_train_tokens += round(tokens)
    metrics["num_tokens"] = [trainer._total_train_tokens]
