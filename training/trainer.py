"""TRL's trainer with what a long run needs: sealed checkpoints, a stop before bad numbers, and packs."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from models.attention import REGISTERED
from training.checkpoints import list_checkpoints, rotate, seal
from training.samplers import PackSampler
from training.signals import shield_workers


def pin_trainable_to_float32(model: torch.nn.Module) -> None:
    """Keep LoRA weights in float32: `SFTTrainer` casts them to bfloat16, which loses small updates and is not undone
    on resume, so that the resumed run would differ from the one that was not stopped."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


SETTINGS_WITH_TOKENS = "training_args.bin"
NOT_KEPT = (SETTINGS_WITH_TOKENS, "README.md")  # PEFT's card names a local base by its path


class NamedBatches:
    """A collator whose batches also carry their samples' ids, for messages."""

    def __init__(self, collate: Callable[[list[dict]], dict]):
        self.collate = collate

    def __call__(self, examples: list[dict]) -> dict:
        return {**self.collate(examples), "sample_ids": [example["id"] for example in examples]}


class SafeSFTTrainer(SFTTrainer):
    """`SFTTrainer` that keeps whole checkpoints only, and never steps on gradients that are not finite.

    Args:
        run: what a run that goes on from a checkpoint must have in common with this one; JSON.
        kwargs: as `SFTTrainer` takes them.
    """

    def __init__(self, *, run: dict | None = None, **kwargs):
        self.run, self.limit, self.step_ids, self.steps_before = run or {}, kwargs["args"].save_total_limit, [], 0
        kwargs["args"].save_total_limit = None  # rotating comes after sealing, and not before
        super().__init__(**kwargs)
        self.data_collator = NamedBatches(self.data_collator)
        self.add_callback(FiniteCallback(self))
        self.add_callback(EpochCallback)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> TrainOutput:
        if resume_from_checkpoint is not None:
            before = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            self.steps_before = before.global_step
            counts = [row["num_tokens"] for row in before.log_history if "num_tokens" in row]
            self._total_train_tokens = int(counts[-1]) if counts else 0  # TRL would count from 0 again
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def set_initial_training_values(self, args, dataloader) -> tuple:
        """As transformers counts, but a checkpoint of the last step leaves no epoch to train: it looks for the last
        step after a step only, and would take one more."""
        epochs, *counts, steps = super().set_initial_training_values(args, dataloader)
        return (0 if self.steps_before >= steps else epochs, *counts, steps)

    def get_train_dataloader(self) -> DataLoader:
        return shield_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        return shield_workers(super().get_eval_dataloader(eval_dataset))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        ids = inputs.pop("sample_ids", [])
        if model.training:
            self.step_ids += ids
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _save_checkpoint(self, model, trial) -> None:
        """Save, seal and rotate. A disk that is full leaves a single process going, and earlier checkpoints whole.

        Raises:
            ValueError: a weight is not finite; nothing is written.
        """
        check_finite(model, self.state.global_step)
        path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        problem = self._lacking_room(path)
        if problem is None:
            try:
                self._write(path, model, trial)
            except (OSError, RuntimeError, SafetensorError) as error:  # what safetensors and torch make of ENOSPC
                if self.args.world_size > 1:  # the others wait for this one
                    raise
                problem = " ".join(str(error).split())
        if problem is not None and self.args.should_save:
            shutil.rmtree(path, ignore_errors=True)
            print(f"warning: {path.name} was not saved, earlier ones stay: {problem}", flush=True)

    def _lacking_room(self, path: Path) -> str | None:
        """Return a complaint when a checkpoint of the size of the last one would not fit, in all processes alike."""
        complaint = None
        if self.args.should_save:
            shutil.rmtree(path, ignore_errors=True)  # what a run before left, cut off or damaged
            found = list_checkpoints(path.parent)
            needed = sum(file.stat().st_size for file in found[0].rglob("*")) if found else 0
            if (free := shutil.disk_usage(path.parent).free) < needed:
                complaint = f"it takes {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free"
        return gather_object([complaint])[0]

    def _write(self, path: Path, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            for name in NOT_KEPT:
                (path / name).unlink(missing_ok=True)
            (path.parent / "README.md").unlink(missing_ok=True)  # TRL's card; ours comes with the finished adapter
            seal(path, self.run)
            best = self.state.best_model_checkpoint
            rotate(path.parent, self.limit, Path(best) if best else None)


def check_finite(model: torch.nn.Module, step: int) -> None:
    """Raise ValueError when a trained weight is not finite, as after steps that are far too long."""
    bad = [name for name, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if bad:
        rule = "go on from the last checkpoint with a lower learning_rate"
        raise ValueError(f"step {step}: {len(bad)} weights are not finite, the first is {bad[0]}; not saved; {rule}")


class FiniteCallback(TrainerCallback):
    """Ends a run before a step on gradients that are not finite; one such step would spoil every weight."""

    def __init__(self, trainer: SafeSFTTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        ids, self.trainer.step_ids = self.trainer.step_ids, []
        scaler = self.trainer.accelerator.scaler
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = self._norm(gradients)
        scaled = args.fp16 if self.trainer.is_deepspeed_enabled else scaler is not None and scaler.is_enabled()
        if torch.isfinite(norm) or scaled:  # a scaler skips such steps itself
            return
        bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
        path = self._write(Path(args.output_dir), state.global_step + 1, ids, bad)
        some = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        raise ValueError(
            f"step {state.global_step + 1}: the gradients are not finite, and nothing of it was kept; its samples "
            f"({some}) are in {path}; look at them, or go on from the last checkpoint with a lower learning_rate"
        )

    def _norm(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        """DeepSpeed keeps the gradients to itself, and has already passed over a step that is not finite."""
        if not self.trainer.is_deepspeed_enabled:
            return torch.nn.utils.get_total_norm(gradients.values())
        norm = torch.as_tensor(self.trainer.deepspeed.get_global_grad_norm())
        return torch.where(norm < 0, torch.nan, norm)  # -1 is its word for it where it does not say inf

    def _write(self, output_dir: Path, step: int, ids: list[str], bad: list[str]) -> Path:
        """Leave the step's samples, without their images, in a file of this process."""
        dataset = self.trainer.train_dataset.select_columns(["id", "messages", "image_sizes"])
        rows = [row for row in dataset if row["id"] in set(ids)]
        path = output_dir / f"not_finite_step_{step}_process_{self.trainer.args.process_index}.json"
        path.write_text(json.dumps({"step": step, "samples": rows, "gradients": bad}, indent=1), encoding="utf-8")
        return path


class EpochCallback(TrainerCallback):
    """Sets the epoch of the samples' order. In a resumed epoch of several processes accelerate does not reach it, and
    the run would go on in the first epoch's order."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        train_dataloader.set_epoch(state.global_step // steps)


class PackedSFTTrainer(SafeSFTTrainer):
    """Trainer whose batches are packs: several samples in one row, as many as a budget of tokens takes.

    Args:
        pack_tokens: most tokens in a pack.
        train_lengths: of the training samples, tokens.
        validation_lengths: of the validation samples; None without evaluation.
        kwargs: as `SafeSFTTrainer` takes them; the collator packs, and the model attends within samples.
    """

    def __init__(
        self,
        *,
        pack_tokens: int,
        train_lengths: Sequence[int],
        validation_lengths: Sequence[int] | None = None,
        **kwargs,
    ):
        self.pack_tokens, self.train_lengths, self.validation_lengths = pack_tokens, train_lengths, validation_lengths
        # Packs hold other numbers of samples, so accelerate cannot even them out; the sampler does.
        kwargs["args"].accelerator_config.even_batches = False
        super().__init__(**kwargs)

    @cached_property
    def train_packs(self) -> PackSampler:
        multiple = self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        options = {"seed": seed, "multiple": multiple}
        first = PackSampler(self.train_lengths, self.pack_tokens, **options)
        epochs = math.ceil(self.args.num_train_epochs)
        if self.args.max_steps > 0:
            epochs = math.ceil(self.args.max_steps * multiple / len(first)) + 1
        return PackSampler(self.train_lengths, self.pack_tokens, **options, epochs=epochs)

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self.train_packs)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        processes = self.args.world_size
        sampler = PackSampler(self.validation_lengths, self.pack_tokens, multiple=processes, shuffle=False)
        return self._loader(self.eval_dataset if eval_dataset is None else eval_dataset, sampler)

    def _loader(self, dataset, sampler: PackSampler) -> DataLoader:
        args = self.args
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return shield_workers(self.accelerator.prepare(loader))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As TRL computes it. A mask of ones lets TRL count the tokens, which it else takes to be one a pack; `varlen`
        goes by `pack_offsets` and does not look at it. SDPA gets none: it reads the borders off the positions."""
        if self.model.config._attn_implementation == REGISTERED:
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
