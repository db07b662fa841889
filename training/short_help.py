"""The short `--help` of train_sft.py: the settings that matter; TRL's parser describes all of them."""

import dataclasses

from common.yaml_files import read_yaml

SETTINGS = {
    "Data": ("dataset_path", "image_dir", "max_length", "too_long", "max_pixels", "min_pixels"),
    "Model": ("model_name_or_path", "load_in_4bit", "dtype", "lora_r", "lora_alpha", "lora_dropout",
              "freeze_vision_encoder"),
    "Training": ("learning_rate", "num_train_epochs", "max_steps", "warmup_steps", "packing", "pack_tokens",
                 "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16",
                 "fp16", "use_cpu", "seed"),
    "Output": ("output_dir", "save_steps", "logging_steps", "eval_strategy", "eval_steps", "resume_from_checkpoint",
               "allow_config_change", "report_to", "push_to_hub", "hub_model_id", "dry_run"),
}  # fmt: skip
OWN_WORDS = {  # where TRL's are long or say less
    "model_name_or_path": "base model: Hub id or folder",
    "load_in_4bit": "NF4 weights of the language model",
    "dtype": "of the arithmetic, and of what is not in 4 bit",
    "lora_r": "rank of the adapter",
    "lora_alpha": "its update is scaled by alpha / r",
    "lora_dropout": "share of the adapter's inputs that are dropped",
    "learning_rate": "peak of its schedule",
    "num_train_epochs": "how often each sample is seen",
    "seed": "of all random numbers",
    "max_length": "most tokens of a sample",
    "max_steps": "optimizer steps; -1 counts epochs",
    "warmup_steps": "steps until the full learning rate",
    "packing": "samples share rows of pack_tokens",
    "per_device_train_batch_size": "rows a GPU takes at once",
    "gradient_accumulation_steps": "times that many rows make a step",
    "bf16": "bfloat16 mixed precision",
    "fp16": "float16 mixed precision, for GPUs before Ampere",
    "use_cpu": "train a tiny model without a GPU",
    "output_dir": "folder of the adapter and its checkpoints",
    "save_steps": "steps between checkpoints",
    "logging_steps": "steps between lines of the log",
    "eval_strategy": "steps, epoch or no",
    "eval_steps": "steps between evaluations on the validation split",
    "resume_from_checkpoint": "auto, or the path of a checkpoint",
    "report_to": "tensorboard, wandb, trackio or none",
    "push_to_hub": "upload the adapter, to a private repository",
    "hub_model_id": "name of that repository: owner/name",
}


def format_short_help(prog: str, kinds: tuple[type, ...], recipe) -> str:
    """Return the settings that matter, with their values in a recipe.

    Args:
        prog: name of the command.
        kinds: the dataclasses of the settings.
        recipe: path of the recipe.
    """
    described = {field.name: field.metadata.get("help", "") for kind in kinds for field in dataclasses.fields(kind)}
    values = read_yaml(recipe, "--config")
    lines = [f"usage: {prog} [--config RECIPE.yaml] [--SETTING VALUE ...]", ""]
    lines.append(f"A recipe holds the settings; options override it. In brackets: the value in {recipe.name}.")
    for title, names in SETTINGS.items():
        lines += ["", title]
        for name in names:
            value = str(values[name]).lower() if isinstance(values.get(name), bool) else values.get(name)
            text = OWN_WORDS.get(name) or described[name].partition(". ")[0]
            lines.append(f"  --{name:<29} {text}" + (f" [{value}]" if name in values else ""))
    lines += ["", "Switches need no value: --bf16 is --bf16 true, and --no_bf16 is --bf16 false."]
    lines += ["--help-all lists every setting, --debug shows the traceback of an error; README.md explains the rest."]
    return "\n".join(lines) + "\n"
