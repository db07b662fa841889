"""Model and trainer of a run, built from its settings."""

import torch
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict
from peft import PeftModel, get_peft_model
from transformers import ProcessorMixin, ProgressCallback
from trl import ModelConfig, SFTTrainer

from collator import VisionSFTCollator
from common.console import print_rank0
from models.loading import load_model
from models.lora import build_lora_config, check_targets, check_trainable, count_trainable, end_gradients_at_tower
from training.callbacks import CurvesCallback, ProgressLine
from training.config import DataArguments, TrainingSettings, lora_settings
from training.distributed import asked_sharding, check_sharded
from training.lengths import SampleLengths
from training.memory_probe import fits, largest_batch
from training.trainer import PackedSFTTrainer, SafeSFTTrainer, pin_trainable_to_float32


def loading_settings(model_args: ModelConfig) -> dict:
    """Return the keywords of `load_model`: how the base model is loaded in training, and later for its adapter."""
    return {
        "quantization": "nf4" if model_args.load_in_4bit else None,
        "double_quant": model_args.use_bnb_nested_quant,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "revision": model_args.model_revision,
    }


def build_model(data_args: DataArguments, model_args: ModelConfig) -> PeftModel:
    """Load the base model and put LoRA on it, on what was asked for and on nothing else."""
    storage = model_args.bnb_4bit_quant_storage or "uint8"  # changes no result, and no other command shards
    model = load_model(model_args.model_name_or_path, **loading_settings(model_args), quant_storage=storage)
    lora = lora_settings(data_args, model_args)
    check_targets(model, lora["target_modules"])
    model = get_peft_model(model, build_lora_config(model, **lora))
    check_trainable(model, train_vision=lora["train_vision"], train_merger=lora["train_merger"])
    return model


def decide_checkpointing(
    model: PeftModel, processor: ProcessorMixin, train: Dataset, training_args: TrainingSettings,
    lengths: SampleLengths, pack_tokens: int | None,
) -> None:  # fmt: skip
    """Replace `gradient_checkpointing: auto`: activations are recomputed where the largest batch would not fit."""
    if training_args.gradient_checkpointing != "auto":
        return
    on, why = False, "there is no GPU"
    if training_args.device.type == "cuda":
        positions = largest_batch(
            lengths.total, batch_size=training_args.per_device_train_batch_size, pack_tokens=pack_tokens
        )
        collate = VisionSFTCollator(processor, packed=pack_tokens is not None)
        dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None
        found = gather_object(
            [fits(model, collate([train[n] for n in positions]), dtype=dtype, optim=str(training_args.optim.value))]
        )
        on, why = min(found)  # one process that lacks the memory decides for all
        on = not on
    print_rank0(f"gradient checkpointing {'on' if on else 'off'}: {why}")
    # transformers reads both names
    training_args.gradient_checkpointing = training_args.activation_checkpointing = on


def needs_blanks(model: PeftModel, lengths: SampleLengths) -> bool:
    """Tell whether batches without images must be given a blank one: a trained vision tower that one process does not
    call would have no gradients there, which the others wait for."""
    counts = count_trainable(model)
    return 0 in lengths.image and counts["vision tower"] + counts["merger"] > 0


def build_trainer(
    model: PeftModel, processor: ProcessorMixin, splits: DatasetDict, training_args: TrainingSettings,
    lengths: dict[str, SampleLengths], *, pack_tokens: int | None, run: dict,
) -> SFTTrainer:  # fmt: skip
    """Wire the model, the data and our collator into TRL's trainer; with `pack_tokens`, into the one that packs."""
    training_args.remove_unused_columns = False  # the collator names a sample by its id
    packed = pack_tokens is not None
    blanks = needs_blanks(model, lengths["train"])
    if training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = False  # every batch takes all weights that train
    make, packing = SafeSFTTrainer, {}
    if packed:
        make = PackedSFTTrainer
        packing = {f"{split}_lengths": own.total for split, own in lengths.items()} | {"pack_tokens": pack_tokens}
    trainer = make(
        model=model,
        args=training_args,
        data_collator=VisionSFTCollator(processor, max_length=training_args.max_length, packed=packed, blanks=blanks),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"] if training_args.eval_strategy != "no" else None,
        processing_class=processor,
        callbacks=[CurvesCallback],
        run=run,
        **packing,
    )
    check_sharded(trainer.accelerator, asked_sharding(training_args.deepspeed_plugin))
    # The family says that its own loss takes no token count, and the trainer then averages micro-batches as if
    # they held equally many answer tokens. SFTTrainer computes the loss itself and does take it.
    trainer.model_accepts_loss_kwargs = True
    pin_trainable_to_float32(trainer.model)
    if not (training_args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        end_gradients_at_tower(trainer.model)  # the reentrant form would lose the gradients within the blocks
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)  # prints dictionaries
        trainer.add_callback(ProgressLine)
    return trainer


def mixed_precision(trainer: SFTTrainer) -> str:
    """Return the autocast dtype that is really on; raise ValueError when it is not the recipe's."""
    asked = "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "no"
    found = trainer.accelerator.mixed_precision
    if found != asked:
        raise ValueError(
            f"mixed_precision: accelerate's configuration says {found}, the recipe's bf16 and fp16 say {asked}"
        )
    return "off" if found == "no" else found
