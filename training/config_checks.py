"""Checks of a run's settings: what is missing, contradicts itself or would have no effect is an error."""

import dataclasses
import math
import re
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig

from models.attention import VARLEN, check_attention
from models.families import family_of
from models.quantization import stored_quantization
from training.settings import DataArguments, TrainingSettings
from training.trackers import TRACKERS

# The smallest sensible value; a smaller one would be ignored, or crash hours later.
AT_LEAST = {
    **dict.fromkeys(("min_pixels", "max_pixels", "max_length", "pack_tokens", "lora_r", "lora_alpha"), 1),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "save_total_limit"), 1),
    **dict.fromkeys(("gradient_accumulation_steps", "max_skipped_steps", "eval_accumulation_steps", "ddp_timeout"), 1),
    **dict.fromkeys(("lora_dropout", "max_grad_norm", "weight_decay", "warmup_steps", "dataloader_num_workers"), 0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha"), 0),
}
ABOVE_ZERO = ("learning_rate", "num_train_epochs", "logging_steps", "save_steps", "eval_steps")
BELOW_ONE = ("lora_dropout", "adam_beta1", "adam_beta2")
EVALUATED = ("loss", "mean_token_accuracy", "entropy")  # what an evaluation reports, each with eval_ before it

# Fields of TRL's dataclasses that this pipeline does not read. Setting one would do nothing, so it is an error.
WITHOUT_EFFECT = {
    "load_in_8bit": "the base model is in NF4 (load_in_4bit) or not quantised",
    "lora_target_parameters": "use lora_target_modules, or lora_target_experts",
    "router_aux_loss_coef": "routers are not trained",
    "lora_modules_to_save": "only LoRA weights are trained",
    "lora_task_type": "the adapter is for a causal language model",
    "model_init_kwargs": "use dtype, attn_implementation and model_revision",
    "trust_remote_code": "no code is run from a model's repository",
    "chat_template_path": "the processor's own chat template is used",
    "dataset_kwargs": "data_prep makes the data set",
    "dataset_num_proc": "data_prep makes the data set",
    "dataset_text_field": "the data set's schema is fixed",
    "eos_token": "the processor's own tokens are used",
    "pad_token": "the processor's own tokens are used",
    "shuffle_dataset": "training shuffles by itself in every epoch",
    "packing_strategy": "packs are made by best fit in shuffled windows",
    "eval_packing": "validation samples are packed when training samples are",
    "padding_free": "use packing: packs hold no padding",
    "logging_nan_inf_filter": "a run stops at the first gradients that are not finite",
    "fsdp": "set shard_base: true",
    "fsdp_config": "set shard_base: true",
    "deepspeed": "accelerate's configuration decides: configs/accelerate/zero2.yaml",
    "use_liger_kernel": "the loss is fused already, compile_layers fuses the layers; Liger's kernels fail beside them",
    "torch_compile": "use compile_layers",
    "torch_compile_backend": "use compile_layers",
    "torch_compile_mode": "use compile_layers",
    "pad_to_multiple_of": "batches are padded to their longest sample",
    "completion_only_loss": "the loss is always on the answers, and on nothing else",
    "assistant_only_loss": "the loss is always on the answers, and on nothing else",
    "save_only_model": "a run could not resume from such a checkpoint",
    "prediction_loss_only": "validation computes the loss and two metrics of tokens; eval_sft.py scores answers",
    "batch_eval_metrics": "validation computes the loss and two metrics of tokens; eval_sft.py scores answers",
    "eval_do_concat_batches": "validation keeps no logits",
    "length_column_name": "lengths are measured as the model gets the samples",
    "do_train": "training is what this command does",
    "do_predict": "predict.py answers the test split",
    "hub_strategy": "the adapter is pushed at every save and at the end",
    "hub_always_push": "the adapter is pushed at every save and at the end",
    "trackio_space_id": "set TRACKIO_SPACE_ID, which trackio reads; the Space is private",
    "trackio_bucket_id": "set TRACKIO_BUCKET_ID, which trackio reads",
    "trackio_static_space_id": "a run's dashboard stays as it is; `trackio sync` copies it",
    "hub_token": "a token in a recipe ends up in files; log in with `hf auth login` or set HF_TOKEN",
}


def check_settings(data: DataArguments, training: TrainingSettings, model: ModelConfig) -> None:
    """Raise ValueError for a setting that is missing, makes no sense, or would have no effect."""
    if data.dataset_path is None:
        raise ValueError("dataset_path: name the annotation file, the prepared folder or the Hub data set")
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path: name the base model")
    if not model.use_peft:
        raise ValueError("use_peft: must be true; LoRA adapters are what is trained here")
    if model.load_in_4bit and model.bnb_4bit_quant_type != "nf4":
        raise ValueError(f"bnb_4bit_quant_type: expected 'nf4', found {model.bnb_4bit_quant_type!r}")
    _check_storage(model)
    if training.shard_base and model.use_dora:
        raise ValueError("use_dora: DoRA needs complete weights; set it to false, or shard_base: false")
    if training.fp16 and training.device.type == "cpu":
        raise ValueError("fp16: needs a GPU; a CPU trains with bf16: true, or with both off")
    for settings in (data, training, model):
        for setting in dataclasses.fields(settings):
            _check_setting(setting, getattr(settings, setting.name))
    if data.min_pixels is not None and data.max_pixels is not None and data.min_pixels > data.max_pixels:
        raise ValueError(f"min_pixels {data.min_pixels} is above max_pixels {data.max_pixels}")
    if training.max_steps != -1 and training.max_steps <= 0:
        raise ValueError(f"max_steps: expected a number above 0, or -1 to count epochs, found {training.max_steps}")
    metric = training.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in EVALUATED:
        raise ValueError(f"metric_for_best_model: expected one of {', '.join(EVALUATED)}, found {metric!r}")
    if training.gradient_checkpointing == "selective" and training.compile_layers is False:
        raise ValueError("gradient_checkpointing: selective needs compile_layers: true; else set it to auto or true")
    if training.gradient_checkpointing == "selective" and model.attn_implementation != VARLEN:
        raise ValueError(f"gradient_checkpointing: selective needs attn_implementation: {VARLEN}; else set it to auto")
    check_attention(model.attn_implementation)
    _check_targets(model.lora_target_modules)
    if model.model_revision != "main" and Path(model.model_name_or_path or "").is_dir():
        raise ValueError(f"model_revision: would have no effect, as {model.model_name_or_path} is a folder")
    _check_output(data, training, model)
    _check_experts(data, training, model)
    _check_packing(data, training, model)
    _check_trackers(training.report_to)


def _check_targets(names: list[str] | str | None) -> None:
    """One text with several names would be looked for as one name; `ModelConfig` unpacks a list of one."""
    for name in [names] if isinstance(names, str) else names or ():
        if words := re.findall(r"[^\s,;\[\]\"']+", name) if re.search(r"[\s,;]", name) else None:
            rule = f"write [{', '.join(words)}], on the command line {' '.join(words)}"
            raise ValueError(f"lora_target_modules: expected one name an entry, found {name!r}; {rule}")


def _check_output(data: DataArguments, training: TrainingSettings, model: ModelConfig) -> None:
    """An adapter among the files of its data or base model would replace some of them."""
    if training.output_dir is None:
        return
    if not training.output_dir:
        raise ValueError("output_dir: expected a folder, found ''")
    inputs = {"dataset_path": data.dataset_path, "image_dir": data.image_dir}
    for name, path in {**inputs, "model_name_or_path": model.model_name_or_path}.items():
        if path and Path(path).is_dir() and Path(path).resolve() == Path(training.output_dir).resolve():
            raise ValueError(f"output_dir: {training.output_dir} is the folder of {name}; choose another one")
    data_set = Path(data.dataset_path)
    if data_set.is_dir() and Path(training.output_dir).resolve().is_relative_to(data_set.resolve()):
        raise ValueError(f"output_dir: {training.output_dir} is inside the folder of dataset_path; choose another one")


def _check_experts(data: DataArguments, training: TrainingSettings, model: ModelConfig) -> None:
    """PEFT's LoRA on parameters has fewer choices than that on layers."""
    if not data.lora_target_experts:
        return
    for name, value in {"lora_dropout": model.lora_dropout, "use_dora": model.use_dora}.items():
        if value:
            raise ValueError(
                f"{name}: LoRA on experts has none; set it to {type(value)(0)}, or lora_target_experts: false"
            )
    if training.compile_layers is True:
        raise ValueError("compile_layers: not with lora_target_experts: true; PEFT changes such layers in each pass")


def check_device(training: TrainingSettings) -> None:
    """Raise ValueError for what the device of this run cannot do, though the GPU of a plan may."""
    if training.activation_offloading and training.device.type == "cpu":
        raise ValueError("activation_offloading: needs a GPU, whose memory it spares; set it to false")


def check_base(settings: tuple[DataArguments, TrainingSettings, ModelConfig], config: PreTrainedConfig) -> None:
    """Raise ValueError for a setting that contradicts the base, by its configuration."""
    data, training, model = settings
    stored, name = stored_quantization(config), model.model_name_or_path
    if data.lora_target_experts and not family_of(config).experts:
        raise ValueError(f"lora_target_experts: {name} has no experts")
    if family_of(config).experts and training.shard_base:
        raise ValueError(f"shard_base: {name} has experts, which are not sharded here; set it to false")
    if training.offload_embedding and config.tie_word_embeddings:
        raise ValueError(
            f"offload_embedding: {name} uses the embedding as its LM head too, on the GPU; set it to false"
        )
    if stored is None:
        return
    if not model.load_in_4bit:
        raise ValueError(f"load_in_4bit: false, but {name} comes in 4 bit: set it to true, or name the 16-bit base")
    storage = stored["bnb_4bit_quant_storage"]
    if model.bnb_4bit_quant_storage not in (None, storage):
        rule = f"expected {storage}, in which {name} comes, found {model.bnb_4bit_quant_storage!r}"
        raise ValueError(f"bnb_4bit_quant_storage: {rule}")


def _check_trackers(names: list[str]) -> None:
    for name in names:
        if name not in (*TRACKERS, "kubeflow"):  # a cluster turns it on; it gets the progress only
            raise ValueError(f"report_to: expected {', '.join(TRACKERS)} or none, found {name!r}")
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to: {name} is not installed; `pip install {name}`, or write none")


def _check_storage(model: ModelConfig) -> None:
    """4-bit weights are stored as bytes, or in the dtype of the others."""
    storage, dtype = model.bnb_4bit_quant_storage, "bfloat16" if model.dtype == "auto" else model.dtype
    if storage is not None and not model.load_in_4bit:
        raise ValueError("bnb_4bit_quant_storage: would have no effect without load_in_4bit: true")
    if storage not in (None, "uint8", dtype):
        raise ValueError(f"bnb_4bit_quant_storage: expected uint8 or the dtype {dtype}, found {storage!r}")


def _check_packing(data: DataArguments, training: TrainingSettings, model: ModelConfig) -> None:
    if not training.packing:
        if data.pack_tokens != DataArguments.pack_tokens:
            raise ValueError("pack_tokens: would have no effect without packing: true")
        return
    if model.attn_implementation != VARLEN:
        rule = "which keeps the samples of a pack apart; or set packing: false"
        raise ValueError(f"packing: needs attn_implementation: {VARLEN}, {rule}")
    if training.per_device_train_batch_size != 1:
        rule = "set it to 1; pack_tokens says how much a row holds"
        raise ValueError(f"per_device_train_batch_size: would have no effect with packing: true; {rule}")
    for name, default in (("train_sampling_strategy", "random"), ("dataloader_drop_last", False)):
        if getattr(training, name) != default:
            raise ValueError(f"{name}: would have no effect with packing: true")


def _check_setting(setting: dataclasses.Field, value) -> None:
    name = setting.name
    # "auto" is None except on Trainium
    default = None if name == "pad_to_multiple_of" else setting.default
    if name in WITHOUT_EFFECT and value != default:
        raise ValueError(f"{name}: would have no effect; {WITHOUT_EFFECT[name]}")
    if (choices := setting.metadata.get("choices")) and value is not None and value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, found {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, found {value}")
    if name in AT_LEAST and not isinstance(value, str | None) and value < AT_LEAST[name]:
        raise ValueError(f"{name}: expected at least {AT_LEAST[name]}, found {value}")
    if name in ABOVE_ZERO and value is not None and value <= 0:
        raise ValueError(f"{name}: expected a number above 0, found {value}")
    if name in ("seed", "data_seed") and value is not None and not 0 <= value < 2**32:  # NumPy's range
        raise ValueError(f"{name}: expected 0 to {2**32 - 1}, found {value}")
    if name in BELOW_ONE and value >= 1:
        raise ValueError(f"{name}: expected a share below 1, found {value}")
