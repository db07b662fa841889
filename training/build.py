"""Model and trainer of a run, built from its settings."""

import copy
import dataclasses
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin, ProgressCallback

from collator import VisionSFTCollator
from common.console import print_rank0
from models.compat import ignore_in_ddp
from models.compilation import compile_layers, keep_wide_products, language_layers, takes_whole_layers, wide_bytes
from models.experts import add_stand_ins, format_experts, stand_ins
from models.families import family_of
from models.loading import load_config, load_model, resolve_dtype
from models.lora import build_lora_config, check_targets, check_trainable, count_trainable
from models.quantization import describe_stored, format_stored, resolve_quantization
from models.tower import speed_up_frozen_tower
from training.callbacks import CurvesCallback, ProgressLine
from training.data import TrainingData
from training.distributed import check_sharded, requested_sharding
from training.lengths import SampleLengths
from training.memory_probe import SPARE, fits, largest_batch, try_step
from training.resume import check_weights
from training.samplers import EpochOrder, LengthGroupedOrder, PackSampler, PaddedSampler, count_epochs
from training.settings import Settings, TrainingSettings
from training.trackers import TRACKERS
from training.trainer import SafeSFTTrainer


def build_model(settings: Settings, checkpoint: Path | None = None) -> PeftModel:
    """Load the base model and add LoRA to exactly the layers that the settings name; `checkpoint` has to fit it."""
    # changes no result, and no other command shards
    storage, options = settings.model.bnb_4bit_quant_storage or "uint8", settings.loading_options()
    print_experts(settings)
    model = load_model(settings.model.model_name_or_path, **options, quant_storage=storage)
    if stored := describe_stored(model):
        print_rank0(f"{'4 bit':<10} {format_stored(stored)}")
    lora = settings.lora_options()
    check_targets(model, lora["target_modules"])
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


def decide_checkpointing(
    model: PeftModel, processor: ProcessorMixin, data: TrainingData, settings: Settings
) -> bool | str:
    """Return whether activations are recomputed: True, False or "selective"; `auto` takes the last for complete
    compiled layers, else True where the largest batch would not fit otherwise.

    Raises:
        ValueError: "selective" for layers that cannot be compiled as a whole.
    """
    args = settings.training
    sharded = requested_sharding(args.deepspeed_plugin) == "FSDP2"
    selects = args.compile_layers and takes_whole_layers(model) and not sharded
    choice = args.gradient_checkpointing
    if choice == "selective" and not selects:
        name = "FSDP2" if sharded else f"{family_of(model).name}, of whose layers only parts are compiled"
        raise ValueError(f"gradient_checkpointing: selective is not for {name}; set it to auto, or to true")
    if choice != "auto":
        return choice
    if selects:
        return "selective"
    enough, reason = True, "there is no GPU"
    if args.device.type == "cuda":
        batch = collate_largest(processor, data, settings)
        # one process that lacks the memory decides for all
        enough, reason = min(gather_object([fits(model, batch, **step_options(settings))]))
    print_rank0(f"gradient checkpointing {'off' if enough else 'on'}: {reason}")
    return not enough


def collate_largest(processor: ProcessorMixin, data: TrainingData, settings: Settings) -> dict:
    """Return the largest batch of training, collated."""
    packed, lengths = settings.pack_tokens is not None, data.lengths["train"].total
    options = {"batch_size": settings.training.per_device_train_batch_size, "pack_tokens": settings.pack_tokens}
    samples = [data.splits["train"][n] for n in largest_batch(lengths, **options)]
    return VisionSFTCollator(processor, packed=packed)(samples)


def step_options(settings: Settings) -> dict:
    """Return the keywords of `try_step`."""
    args = settings.training
    return {
        "dtype": torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        "optim": str(args.optim.value),
    }


def keep_what_fits(model: PeftModel, processor: ProcessorMixin, data: TrainingData, settings: Settings) -> None:
    """Let as many compiled layers keep their wide products as the GPU's memory has room for; all without a GPU."""
    count = layers = len(language_layers(model))
    if settings.training.device.type == "cuda":
        batch, options = collate_largest(processor, data, settings), step_options(settings)
        used, free = try_step(model, batch, **options)
        size = wide_bytes(model, batch["input_ids"].numel(), 2 if options["dtype"] else 4)
        room = 0 if used is None else ((1 - SPARE) * free - used) / size
        count = min(gather_object([max(0, min(layers, int(room)))]))
    print_rank0(f"gradient checkpointing selective: {count} of {layers} layers also keep their wide products")
    keep_wide_products(model, count)


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
        "remove_unused_columns": False,  # the collator names a sample by its id
        "gradient_checkpointing": recompute is True,  # selective recomputation is in the compiled layers
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


def needs_dummy_image(model: PeftModel, lengths: SampleLengths) -> bool:
    """Return whether batches without images must be given a dummy one: a trained vision tower that one process does
    not call would have no gradients there, which the others wait for."""
    counts = count_trainable(model)
    return 0 in lengths.image and counts["vision tower"] + counts["merger"] > 0


def build_trainer(
    model: PeftModel, processor: ProcessorMixin, data: TrainingData, settings: Settings, *, identity: dict,
    recompute: bool | str,
) -> SafeSFTTrainer:  # fmt: skip
    """Wire model, data and collator into TRL's trainer.

    Args:
        model: see `build_model`.
        processor: the model's.
        data: see `load_data`.
        settings: of the run.
        identity: what a run that resumes from a checkpoint must have in common with this one.
        recompute: see `decide_checkpointing`.
    """
    speed_up_frozen_tower(model.get_base_model())
    if settings.training.compile_layers:
        print_rank0("the layers are compiled during the first steps, which then take a minute or two")
        sharded = requested_sharding(settings.training.deepspeed_plugin) == "FSDP2"
        compile_layers(model, whole=not (recompute is True or sharded), selective=recompute == "selective")
    args, pack_tokens = trainer_arguments(settings, recompute=recompute), settings.pack_tokens
    options = {"max_length": args.max_length, "packed": pack_tokens is not None}
    options["dummy_image"] = needs_dummy_image(model, data.lengths["train"])
    trainer = SafeSFTTrainer(
        model=model,
        args=args,
        data_collator=VisionSFTCollator(processor, **options),
        train_dataset=data.splits["train"],
        eval_dataset=data.splits["validation"] if settings.evaluates else None,
        processing_class=processor,
        callbacks=[CurvesCallback],
        identity=identity,
        train_batches=train_sampler(data.lengths["train"], args, pack_tokens),
        eval_batches=eval_sampler(data.lengths.get("validation"), args, pack_tokens),
        keep_checkpoints=settings.training.save_total_limit,
        max_skipped_steps=settings.training.max_skipped_steps,
    )
    if recompute == "selective":
        keep_what_fits(model, processor, data, settings)
    check_sharded(trainer.accelerator, requested_sharding(args.deepspeed_plugin))
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)  # print dictionaries
    trainer.add_callback(ProgressLine)
    return trainer
