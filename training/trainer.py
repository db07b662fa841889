"""TRL's trainer with what a long run needs: sealed checkpoints, a stop before bad numbers, batches by a sampler."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from common.files import ADAPTER_WEIGHTS, share_weights
from models.adapters import CONFIG_NAME
from models.attention import uses_varlen, with_unread_mask
from models.flops import BatchShape, shape_of_batch, useful_flop
from models.lora import detach_vision_inputs
from models.sharding import is_sharded
from training.answer_loss import add_answers_head
from training.checkpoints import (
    delete,
    describe_restart,
    describe_write_error,
    is_write_error,
    list_checkpoints,
    rotate,
    seal,
)
from training.compat import HookTrainer, log_batch, set_token_count
from training.signals import shield_workers
from training.speed import SpeedCallback

TRAINING_ARGS = "training_args.bin"
NOT_IN_CHECKPOINTS = (
    TRAINING_ARGS,
    "README.md",
)  # the first may hold an access token; PEFT's card names a local base's path


class CollatorWithIds:
    """A collator whose batches also carry their samples' ids, for messages, and their `BatchShape`."""

    def __init__(self, collate: Callable[[list[dict]], dict]):
        self.collate = collate

    def __call__(self, examples: list[dict]) -> dict:
        batch = self.collate(examples)
        ids = [example["id"] for example in examples]
        return {**batch, "sample_ids": ids, "batch_shape": list(shape_of_batch(batch))}


class SafeSFTTrainer(HookTrainer):
    """`SFTTrainer` that keeps complete checkpoints only, and never steps on gradients that are not finite.

    Args:
        identity: what a run that resumes from a checkpoint must have in common with this one; JSON.
        train_batches: positions of each batch's samples, for all processes in turn; None leaves it to transformers.
        eval_batches: the same of the validation samples.
        keep_checkpoints: how many checkpoints stay; all when None. `args.save_total_limit` must be None, as rotation
            comes after sealing here.
        speed: counts what the steps compute.
        max_skipped_steps: how many float16 steps in a row may be skipped for gradients that are not finite.
        kwargs: as `SFTTrainer` takes them.

    Attributes:
        unsaved: the last checkpoint and the reason why it could not be saved; None when it was.
    """

    def __init__(
        self,
        *,
        identity: dict,
        speed: SpeedCallback,
        train_batches: Sampler[list[int]] | None = None,
        eval_batches: Sampler[list[int]] | None = None,
        keep_checkpoints: int | None = None,
        max_skipped_steps: int = 20,
        **kwargs,
    ):
        self.identity, self.keep_checkpoints, self.step_ids, self.resumed_step = identity, keep_checkpoints, [], 0
        self.max_skipped_steps, self.speed = max_skipped_steps, speed
        self.train_batches, self.eval_batches, self.unsaved = train_batches, eval_batches, None
        self.sums = {"train": [], "eval": []}  # of the batches since the last line of the log: what `_read_sums` reads
        super().__init__(**kwargs)
        self.data_collator = CollatorWithIds(self.data_collator)
        self.add_callback(FiniteCallback(self))
        self.add_callback(EpochCallback)
        self.add_callback(speed)
        self.add_callback(FewerWalksCallback(self))
        # The models' classes say that their own loss takes no token count, and the trainer then averages micro-batches
        # as if they held equally many answer tokens. SFTTrainer computes the loss itself and does take it.
        self.model_accepts_loss_kwargs = True
        pin_trainable_to_float32(self.model)
        add_answers_head(self.model.get_base_model())
        if not (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            # the reentrant form would lose the gradients within the blocks
            self.tower_hook = detach_vision_inputs(self.model)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> TrainOutput:
        if resume_from_checkpoint is not None:
            before = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            self.resumed_step = before.global_step
            counts = [row["num_tokens"] for row in before.log_history if "num_tokens" in row]
            set_token_count(self, int(counts[-1]) if counts else 0)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def set_initial_training_values(self, args, dataloader) -> tuple:
        """As transformers counts, but a checkpoint of the last step leaves no epoch to train: it looks for the last
        step after a step only, and would take one more."""
        epochs, *counts, steps = super().set_initial_training_values(args, dataloader)
        return (0 if self.resumed_step >= steps else epochs, *counts, steps)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As transformers does, but its loader takes no random number of the training: a stop leaves one out."""
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            return super().evaluate(*args, **kwargs)

    def floating_point_ops(self, inputs: dict) -> int:
        """Return the FLOP of a batch without what is computed twice; transformers would count frozen weights as if
        they trained, and the model's parameters anew in each step."""
        shape = BatchShape(*inputs["batch_shape"])
        self.speed.add(shape)
        return round(useful_flop(self.speed.work, shape))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.speed.read()
        self._read_sums()
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader:
        if self.train_batches is None:
            return shield_workers(super().get_train_dataloader())
        return self._loader(self.train_dataset, self.train_batches)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        return self._loader(self.eval_dataset if eval_dataset is None else eval_dataset, self.eval_batches)

    def _loader(self, dataset, batches: Sampler[list[int]]) -> DataLoader:
        args = self.args
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return shield_workers(self.accelerator.prepare(loader))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As TRL computes it, for packs without a stop of the GPU where nothing needs TRL's own head."""
        inputs = dict(inputs)
        ids = inputs.pop("sample_ids", [])
        inputs.pop("batch_shape", None)
        if model.training:
            self.step_ids += ids
        if "answer_rows" in inputs and not return_outputs and self.has_plain_loss:
            return self._answers_loss(model, inputs, num_items_in_batch)
        if "text_cu_seqlens" in inputs and uses_varlen(self.model):
            # Lets TRL count the tokens of a pack, which it else takes to be one; `varlen` does not look at it. SDPA
            # gets none: it reads the samples' borders off the positions.
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @cached_property  # a walk over all modules
    def has_plain_loss(self) -> bool:
        """Whether the loss is the mean over the answers' tokens, and the LM head is whole in each process."""
        plain = self.args.loss_type == "nll" and self.label_smoother is None and not self.aux_loss_enabled
        return plain and not (self.is_deepspeed_enabled or self.is_fsdp_enabled or is_sharded(self.model))

    def _answers_loss(self, model, inputs: dict, count: torch.Tensor | None) -> torch.Tensor:
        """Return the loss of a pack; `count` is the number of labels of the step in all processes."""
        scores = model(**with_unread_mask(self.model, inputs), answers_only=True)
        sums = torch.stack([scores.entropy.detach().sum(), scores.is_top1.sum()])
        counts = len(inputs["answer_rows"]), inputs["input_ids"].numel()
        self.sums["train" if model.training else "eval"].append((sums, counts))
        labels = torch.as_tensor(counts[0] if count is None else count)
        processes = 1 if count is None or not self.args.average_tokens_across_devices else self.args.world_size
        return -scores.log_probs.sum() / labels.clamp(min=1) * processes  # DDP averages gradients

    def _read_sums(self) -> None:
        """Hand the means over the batches of all processes to TRL's log. The GPU is waited for here alone."""
        for mode, sums in self.sums.items():
            if sums:
                on_gpu, counts = zip(*sums, strict=True)
                on_gpu = torch.stack(on_gpu)
                both = torch.cat([on_gpu, torch.tensor(counts).to(on_gpu)], dim=1)
                for row in self.accelerator.reduce(both).tolist():
                    log_batch(self, mode, *row)
                sums.clear()

    def save_checkpoint(self, save: Callable[[], None]) -> None:
        """Save, seal and rotate. When saving fails, as on a full disk, a single process continues, and earlier
        checkpoints stay.

        Raises:
            ValueError: a weight is not finite; nothing is written. Or saving failed in one of several processes.
        """
        check_finite(self.model, self.state.global_step)
        path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        problem = self._clear_and_check_space(path)
        if problem is None:
            try:
                self._save_and_seal(path, save)
            except Exception as error:  # safetensors and torch have their own for a full disk
                if not is_write_error(error):
                    raise
                problem = describe_write_error(error)
                if self.args.world_size > 1:  # the others wait for this one
                    raise ValueError(f"{path.name} was not saved: {problem}") from error
        self.unsaved = None if problem is None else f"{path.name} was not saved: {problem}"
        if problem is not None and self.args.should_save:
            shutil.rmtree(path, ignore_errors=True)
            print(f"warning: {path.name} was not saved, earlier ones stay: {problem}", flush=True)

    def save_final(self) -> None:
        """Save adapter and processor in the output folder.

        Raises:
            ValueError: that failed; no part of a new adapter is left.
        """
        folder = Path(self.args.output_dir)
        was_there = (folder / ADAPTER_WEIGHTS).exists()
        try:
            self.save_model()
            if self.args.should_save:
                share_weights(folder, CONFIG_NAME)
        except Exception as error:  # see `save_checkpoint`
            if not is_write_error(error):
                raise
            if not was_there:
                (folder / ADAPTER_WEIGHTS).unlink(missing_ok=True)
            reason = describe_write_error(error)
            restart = describe_restart(folder, self.args.resume_from_checkpoint, self.state.global_step)
            raise ValueError(f"output_dir: the adapter could not be saved in {folder}: {reason}; {restart}") from error

    def _clear_and_check_space(self, path: Path) -> str | None:
        """Delete what an earlier run left at `path`; return a message, the same in all processes, when a checkpoint of
        the last one's size would not fit."""
        message = None
        if self.args.should_save:
            delete(path)  # an incomplete or damaged one of an earlier run
            saved = list_checkpoints(path.parent)
            needed = sum(file.stat().st_size for file in saved[0].rglob("*")) if saved else 0
            if (free := shutil.disk_usage(path.parent).free) < needed:
                message = f"it takes {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free"
        return gather_object([message])[0]

    def _save_and_seal(self, path: Path, save: Callable[[], None]) -> None:
        save()
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            for name in NOT_IN_CHECKPOINTS:
                (path / name).unlink(missing_ok=True)
            (path.parent / "README.md").unlink(missing_ok=True)  # TRL's card; ours comes with the finished adapter
            share_weights(path, CONFIG_NAME)
            seal(path, self.identity)
            best = self.state.best_model_checkpoint
            rotate(path, self.keep_checkpoints, Path(best) if best else None)


def pin_trainable_to_float32(model: torch.nn.Module) -> None:
    """Keep LoRA weights in float32: `SFTTrainer` casts them to bfloat16, which loses small updates and is not undone
    on resume, so that the resumed run would differ from the one that was not stopped."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_finite(model: torch.nn.Module, step: int) -> None:
    """Raise ValueError when a trained weight is not finite, as after steps that are far too long."""
    bad = [name for name, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if bad:
        rule = "resume from the last checkpoint with a lower learning_rate"
        raise ValueError(f"step {step}: {len(bad)} weights are not finite, the first is {bad[0]}; not saved; {rule}")


class FiniteCallback(TrainerCallback):
    """Ends a run before a step on gradients that are not finite; one such step would make every weight NaN.

    In float16 a scaler skips such steps, and lowers its scale. A run that only skips is ended too.
    """

    def __init__(self, trainer: SafeSFTTrainer):
        self.trainer, self.skipped, self.in_a_row = trainer, 0, 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        ids, self.trainer.step_ids = self.trainer.step_ids, []
        scaler = self.trainer.accelerator.scaler
        norm = self._norm()
        scaled = args.fp16 if self.trainer.is_deepspeed_enabled else scaler is not None and scaler.is_enabled()
        if torch.isfinite(norm) or scaled:
            self._count_skipped(not torch.isfinite(norm), self.trainer.max_skipped_steps, state)
            return
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
        path = self._write_samples(Path(args.output_dir), state.global_step + 1, ids, bad)
        first = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        raise ValueError(
            f"step {state.global_step + 1}: the gradients are not finite, no weight was changed by them; its samples "
            f"({first}) are in {path}; look at them, or resume from the last checkpoint with a lower learning_rate"
        )

    def _count_skipped(self, skipped: bool, limit: int, state: TrainerState) -> None:
        self.skipped, self.in_a_row = self.skipped + skipped, (self.in_a_row + 1) * skipped
        none_taken = self.skipped == state.max_steps
        if self.in_a_row >= limit or none_taken:
            rule = "train in bfloat16 (bf16: true, fp16: false, dtype: bfloat16), or lower learning_rate"
            raise ValueError(
                f"step {state.global_step + 1}: {self.in_a_row} steps in a row had gradients that are not finite in "
                f"float16 and were skipped (max_skipped_steps: {limit}), so that nothing was learnt; {rule}"
            )

    def on_train_end(self, args, state, control, **kwargs):
        if self.skipped and state.is_world_process_zero:
            print(f"float16: {self.skipped} steps overflowed and were skipped", flush=True)

    def _norm(self) -> torch.Tensor:
        """Return the norm before clipping. DeepSpeed has already skipped a step that is not finite."""
        if not self.trainer.is_deepspeed_enabled:
            return torch.as_tensor(self.trainer.grad_norm)
        norm = torch.as_tensor(self.trainer.deepspeed.get_global_grad_norm())
        return torch.where(norm < 0, torch.nan, norm)  # -1 is what it returns where it does not return inf

    def _write_samples(self, output_dir: Path, step: int, ids: Sequence[str], bad: list[str]) -> Path:
        """Leave the step's samples, without their images, in a file of this process."""
        dataset = self.trainer.train_dataset.select_columns(["id", "messages", "image_sizes"])
        rows = [row for row in dataset if row["id"] in set(ids)]
        path = output_dir / f"not_finite_step_{step}_process_{self.trainer.args.process_index}.json"
        path.write_text(json.dumps({"step": step, "samples": rows, "gradients": bad}, indent=1), encoding="utf-8")
        return path


class EpochCallback(TrainerCallback):
    """Sets the epoch of the samples' order. In a resumed epoch of several processes accelerate does not reach it, and
    the run would continue in the first epoch's order."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        train_dataloader.set_epoch(state.global_step // steps)


class FewerWalksCallback(TrainerCallback):
    """Spares each step the walks over all modules, 2,400 in a 7B model with LoRA, that cost tens of milliseconds.

    `model.train()` walks on a change of mode only, and clipping and `zero_grad` see what trains. Sharded models keep
    the libraries' own ways, which replace or hide parameters.
    """

    def __init__(self, trainer: SafeSFTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            return
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.trained = trained
        trainer.model.train()  # its own flag may differ from those of its modules
        trainer.model.train = partial(train_on_change, trainer.model, trainer.model.train)
        trainer.model_wrapped.zero_grad = trainer.optimizer.zero_grad

    def on_train_end(self, args, state, control, **kwargs):
        for model, name in ((self.trainer.model, "train"), (self.trainer.model_wrapped, "zero_grad")):
            vars(model).pop(name, None)
        self.trainer.trained = None


def train_on_change(model: torch.nn.Module, walk: Callable, mode: bool = True) -> torch.nn.Module:
    return model if model.training == mode else walk(mode)
