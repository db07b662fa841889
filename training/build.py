"""Model and trainer of a run, built from its settings."""

import copy
import dataclasses
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin, ProgressCallback

from collator import VisionSFTCollator
from common.console import print_rank0
from models.compat import ignore_in_ddp
from models.compilation import compile_layers
from models.experts import add_stand_ins, format_experts, stand_ins
from models.families import family_of
from models.flops import matmul_ceiling, work_of
from models.last_layer import spare_last_layer
from models.linear_attention import TUNING_LINE, has_kernels
from models.loading import load_config, load_model, resolve_dtype
from models.lora import build_lora_config, check_targets, check_trainable, count_trainable
from models.quantization import describe_stored, format_stored, resolve_quantization
from models.recomputation import NARROW, NOTHING
from models.sharding import is_sharded
from models.tower import speed_up_frozen_tower
from training.callbacks import CurvesCallback, ProgressLine
from training.choices import (
    EVERYTHING,
    choose_compiling,
    choose_packs,
    choose_recomputation,
    keep_what_fits,
    needs_recomputation,
    step_options,
)
from training.data import TrainingData
from training.distributed import check_sharded, requested_sharding
from training.lengths import SampleLengths
from training.resume import check_weights
from training.samplers import EpochOrder, LengthGroupedOrder, PackSampler, PaddedSampler, count_epochs
from training.settings import AUTO, Settings, TrainingSettings
from training.speed import SpeedCallback
from training.trackers import TRACKERS
from training.trainer import SafeSFTTrainer


def build_model(settings: Settings, checkpoint: Path | None = None) -> PeftModel:
    """Load the base model and add LoRA to exactly the layers that the settings name; `checkpoint` has to fit it."""
    # what changes no result, and no other command needs
    own = {"quant_storage": settings.model.bnb_4bit_quant_storage or "uint8", "shard": settings.training.shard_base}
    own["frozen_tower"] = settings.data.freeze_vision_encoder and not settings.data.train_merger
    own["offload_embedding"] = settings.training.offload_embedding
    print_experts(settings)
    model = load_model(settings.model.model_name_or_path, **settings.loading_options(), **own)
    if stored := describe_stored(model):
        print_rank0(f"{'4 bit':<10} {format_stored(stored)}")
    lora = settings.lora_options()
    check_targets(model, lora["target_modules"])
    torch.manual_seed(settings.training.seed)  # LoRA starts from it alone: loading may draw, otherwise by each device
    model = attach_lora(model, lora)
    check_weights(checkpoint, model)
    return model


def print_experts(settings: Settings) -> None:
    """Print how the experts of a model that has some will be loaded."""
    name, options = settings.model.model_name_or_path, settings.loading_options()
    config = load_config(name, revision=options["revision"])
    if family_of(config).experts:
        quantization = resolve_quantization(name, config, options["quantization"])
        itemsize = resolve_dtype(options["dtype"], settings.training.device).itemsize
        line = format_experts(
            config, quantization=quantization, double_quant=options["double_quant"], itemsize=itemsize
        )
        print_rank0(f"{'experts':<10} {line}")


def attach_lora(model: PreTrainedModel, lora: dict) -> PeftModel:
    """Put LoRA on a base model, and check that exactly its weights train; see `Settings.lora_options`."""
    if lora["target_experts"]:
        add_stand_ins(model)
    model = get_peft_model(model, build_lora_config(model, **lora))
    ignore_in_ddp(model, list(stand_ins(model)))
    check_trainable(model, **{name: lora[name] for name in ("train_vision", "train_merger", "target_experts")})
    return model


def decide(
    model: PeftModel, processor: ProcessorMixin, data: TrainingData, settings: Settings
) -> tuple[Settings, bool | str]:
    """Decide what is `auto` in a recipe, and prepare the model's layers for it.

    Returns:
        Settings without `auto`, and whether activations are recomputed: True, False, "selective" or `EVERYTHING`.
    """
    settings = choose_compiling(model, data, settings)
    if has_kernels(family_of(model)):
        print_rank0(TUNING_LINE)
    recompute = choose_recomputation(model, settings)
    speed_up_frozen_tower(model.get_base_model())
    spare_last_layer(model)
    if settings.training.compile_layers:
        whole = recompute is not True
        compile_layers(model, whole=whole, keep={"selective": NARROW, EVERYTHING: NOTHING}.get(recompute))
    settings, recompute = choose_packs(model, processor, data, settings, recompute)
    if recompute == AUTO:
        recompute = needs_recomputation(model, processor, data, settings)
    return settings, recompute


def trainer_arguments(settings: Settings, *, recompute: bool | str) -> TrainingSettings:
    """Return arguments for TRL's trainer: a copy of the settings without what this pipeline does in its place."""
    args = copy.copy(settings.training)  # dataclasses.replace would set up the devices again
    find_unused = args.ddp_find_unused_parameters
    changes = {
        # the routers are frozen, and the loss that evens out their choices depends on what else is in a batch
        "router_aux_loss_coef": 0.0,
        "packing": False,  # TRL's takes no images; ours are batches of a sampler
        "push_to_hub": False,  # would upload the whole output folder
        "report_to": [name for name in args.report_to if name not in TRACKERS],  # would send paths
        "save_total_limit": None,  # rotation comes after sealing
        "dataloader_pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),  # else torch warns
        "remove_unused_columns": False,  # the collator names a sample by its id
        "gradient_checkpointing": recompute is True,  # otherwise it is in the compiled layers
        "activation_checkpointing": recompute is True,  # transformers reads both names
        "ddp_find_unused_parameters": bool(find_unused),  # each batch uses all weights that train
        # the samplers give each process equally many batches; accelerate cannot even out packs
        "accelerator_config": dataclasses.replace(args.accelerator_config, even_batches=False),
    }
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def train_sampler(lengths: SampleLengths, args: TrainingSettings, pack_tokens: int | None) -> Sampler | None:
    """Return the batches of an epoch for all processes; None for a strategy that transformers brings."""
    seed = args.seed if args.data_seed is None else args.data_seed  # as `Settings.order_seed`
    step = args.gradient_accumulation_steps * args.world_size
    if pack_tokens is not None:
        options = {"seed": seed, "multiple": step}
        first = PackSampler(lengths.total, pack_tokens, **options)
        return PackSampler(lengths.total, pack_tokens, **options, epochs=count_epochs(args, len(first) // step))
    batch_size, size = args.per_device_train_batch_size, len(lengths.total)
    orders = {
        "random": lambda: EpochOrder(size, seed=seed),
        "sequential": lambda: EpochOrder(size, seed=seed, shuffle=False),
        "group_by_length": lambda: LengthGroupedOrder(lengths.total, seed=seed, group=batch_size * step),
    }
    if (strategy := str(args.train_sampling_strategy)) not in orders:
        return None
    return PaddedSampler(
        orders[strategy](), batch_size, processes=args.world_size, drop_last=args.dataloader_drop_last
    )


def eval_sampler(lengths: SampleLengths | None, args: TrainingSettings, pack_tokens: int | None) -> Sampler | None:
    """Return the batches of the validation split for all processes; None without evaluation."""
    if lengths is None:
        return None
    if pack_tokens is not None:
        return PackSampler(lengths.total, pack_tokens, multiple=args.world_size, shuffle=False)
    order = EpochOrder(len(lengths.total), seed=args.seed, shuffle=False)
    return PaddedSampler(order, args.per_device_eval_batch_size, processes=args.world_size)


def needs_dummy_image(model: PeftModel, data: TrainingData) -> bool:
    """Return whether batches without images must be given a dummy one: the other processes would wait for one that
    does not call the vision tower, for its gradients where it trains, for its part of the weights where it is sharded.
    """
    if is_sharded(model):
        return any(0 in lengths.image for lengths in data.lengths.values())
    counts = count_trainable(model)
    return 0 in data.lengths["train"].image and counts["vision tower"] + counts["merger"] > 0


def build_trainer(
    model: PeftModel, processor: ProcessorMixin, data: TrainingData, settings: Settings, *, identity: dict,
    recompute: bool | str,
) -> SafeSFTTrainer:  # fmt: skip
    """Wire model, data and collator into TRL's trainer.

    Args:
        model: see `build_model` and `decide`.
        processor: the model's.
        data: see `load_data`.
        settings: of the run, without `auto`.
        identity: what a run that resumes from a checkpoint must have in common with this one.
        recompute: see `decide`.
    """
    args, pack_tokens = trainer_arguments(settings, recompute=recompute), settings.pack_tokens
    options = {"max_length": args.max_length, "packed": pack_tokens is not None}
    options["dummy_image"] = needs_dummy_image(model, data)
    trainer = SafeSFTTrainer(
        model=model,
        args=args,
        data_collator=VisionSFTCollator(processor, **options),
        train_dataset=data.splits["train"],
        eval_dataset=data.splits["validation"] if settings.evaluates else None,
        processing_class=processor,
        callbacks=[CurvesCallback],
        identity=identity,
        speed=SpeedCallback(work_of(model), device=args.device),
        train_batches=train_sampler(data.lengths["train"], args, pack_tokens),
        eval_batches=eval_sampler(data.lengths.get("validation"), args, pack_tokens),
        keep_checkpoints=settings.training.save_total_limit,
        max_skipped_steps=settings.training.max_skipped_steps,
    )
    trainer.speed.recomputed = 1.0 if recompute in (True, EVERYTHING) else 0.0
    if recompute == "selective":
        trainer.speed.recomputed = keep_what_fits(model, processor, data, settings)
    if args.device.type == "cuda":
        trainer.speed.ceiling = matmul_ceiling(args.device, step_options(settings)["dtype"] or torch.float32)
    check_sharded(trainer.accelerator, requested_sharding(args.deepspeed_plugin))
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)  # print dictionaries
    trainer.add_callback(ProgressLine)
    return trainer
