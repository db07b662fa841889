"""A recipe is read as it is meant; a typo, a contradiction or a setting without effect is an error."""

import re
from dataclasses import fields as fields_of
from pathlib import Path

import pytest
import torch
from trl import ModelConfig

from common.yaml_files import read_yaml
from training.config import DEFAULT_RECIPE, RENAMED, parse_config
from training.config_checks import ABOVE_ZERO, AT_LEAST, WITHOUT_EFFECT, check_device
from training.inheritance import SWITCHES
from training.settings import DataArguments, TrainingSettings
from training.short_help import OWN_WORDS, SETTINGS

BASE = """
dataset_path: data
model_name_or_path: base
output_dir: out
use_peft: true
use_cpu: true
bf16: false
"""


@pytest.fixture
def parse(tmp_path):
    def parse_text(text="", *options):
        path = tmp_path / "recipe.yaml"
        path.write_text(BASE + text if not text.startswith("#raw\n") else text[5:], encoding="utf-8")
        return parse_config(["--config", str(path), *options])

    return parse_text


def test_values_are_read_by_the_type_of_their_field(parse):
    data, training, model = parse(
        "learning_rate: 2e-4\nweight_decay: .5e-1\nmax_length: null\nlora_target_modules: [q_proj, v_proj]\n"
        "eval_strategy: no\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\nmax_pixels: 200704\nfreeze_vision_encoder: false\n"
    )
    assert (training.learning_rate, training.weight_decay) == (2e-4, 0.05)
    assert training.max_length is None
    assert training.eval_strategy == "no"
    assert training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    assert (data.max_pixels, data.freeze_vision_encoder) == (200704, False)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "auto"),
        ("gradient_checkpointing: auto\n", "auto"),
        ("gradient_checkpointing: true\n", True),
        ("gradient_checkpointing: false\n", False),
    ],
)
def test_gradient_checkpointing_is_auto_true_or_false(parse, text, found):
    _, training, _ = parse(text)
    assert training.gradient_checkpointing is found or training.gradient_checkpointing == found


@pytest.mark.parametrize(
    ("text", "found"), [("", "auto"), ("compile_layers: auto\n", "auto"), ("compile_layers: true\n", True)]
)
def test_compiling_is_auto_true_or_false(parse, text, found):
    assert parse(text)[1].compile_layers == found
    assert parse(text, "--compile_layers")[1].compile_layers is True
    assert parse(text, "--no_compile_layers")[1].compile_layers is False


def test_packs_are_auto_or_a_number_and_without_packing_auto_is_no_error(parse):
    assert parse()[0].pack_tokens == "auto" and parse()[1].packing is False
    packed = ["--packing", "true", "--attn_implementation", "varlen", "--per_device_train_batch_size", "1"]
    assert [parse("", *packed, *more).pack_tokens for more in ((), ("--pack_tokens", "512"))] == ["auto", 512]
    assert parse("pack_tokens: auto\n", "--packing", "false").pack_tokens is None


def test_thinking_is_off_or_on(parse):
    """In YAML 1.2 these words are text."""
    assert [parse(text)[0].thinking for text in ("", "thinking: off\n", "thinking: on\n")] == ["off", "off", "on"]
    assert parse("thinking: on\n", "--thinking", "off")[0].thinking == "off"
    with pytest.raises(ValueError, match="thinking: expected one of off, on, found 'True'"):
        parse("thinking: true\n")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("warmup_steps: 9\nlogging_steps: 10\n", []),
        ("warmup_steps: 10\n", ["warmup_steps: 10 cover all 10 steps of the run; the rate never reaches its peak"]),
        ("warmup_steps: 0.1\n", []),
        ("logging_steps: 11\n", ["logging_steps: 11 is past the run's 10 steps; no loss is logged"]),
        ("logging_strategy: epoch\nlogging_steps: 11\n", []),
        (
            "eval_strategy: steps\neval_delay: 11\n",
            ["eval_delay: 11 is past the run's 10 steps; there is no validation"],
        ),
    ],
)
def test_settings_that_come_too_late_for_the_run_are_said(parse, text, found):
    given = "" if "logging" in text else "logging_steps: 1\n"
    assert parse(text + given)[1].past_the_end(10) == found


def test_two_processes_prepare_images_unless_the_recipe_says_otherwise(parse):
    assert parse()[1].dataloader_num_workers == 2
    assert parse("dataloader_num_workers: 0\n")[1].dataloader_num_workers == 0


def test_options_override_the_recipe(parse):
    data, training, model = parse(
        "lora_r: 4\n", "--lora_r", "32", "--no_freeze_vision_encoder", "--max_steps=7", "--debug"
    )
    assert (model.lora_r, data.freeze_vision_encoder, training.max_steps) == (32, False, 7)


def test_debug_without_a_value_is_the_commands_and_with_one_the_trainers(parse):
    assert parse("", "--debug", "--lora_r", "4")[1].debug == []
    assert parse("", "--debug", "underflow_overflow")[1].debug == ["underflow_overflow"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 3\n", "recipe.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("batch_size: 3\n", "unknown key 'batch_size'; use per_device_train_batch_size: N"),
        (
            "gradient_checkpointing: yes\n",
            "gradient_checkpointing: expected auto, selective, true or false, found 'yes'",
        ),
        (
            "use_liger_kernel: true\n",
            "use_liger_kernel: would have no effect; the loss is fused already, comp",
        ),
        ("torch_compile: true\n", "torch_compile: would have no effect; use compile_layers"),
        (
            "gradient_checkpointing: selective\n",
            "gradient_checkpointing: selective needs attn_implementation: varlen; else set it to auto",
        ),
        ("lora_r: [8]\n", "recipe.yaml: lora_r: did not expect the list [8]"),
        ("seed: 1\nseed: 2\n", 'duplicate key "seed"'),
        ("eval_strategy: stepps\n", "stepps is not a valid IntervalStrategy"),
        ("use_peft: false\n", 'duplicate key "use_peft"'),
        ("load_in_4bit: true\nbnb_4bit_quant_type: fp4\n", "bnb_4bit_quant_type: expected 'nf4', found 'fp4'"),
        ("bnb_4bit_quant_storage: uint8\n", "bnb_4bit_quant_storage: would have no effect without load_in_4bit: true"),
        (
            "load_in_4bit: true\ndtype: bfloat16\nbnb_4bit_quant_storage: float32\n",
            "bnb_4bit_quant_storage: expected uint8 or the dtype bfloat16, found 'float32'",
        ),
        (
            "shard_base: true\nuse_dora: true\n",
            "use_dora: DoRA needs complete weights; set it to false, or shard_base",
        ),
        ("fsdp: full_shard\n", "fsdp: would have no effect; set shard_base: true"),
        ("lora_target_modules: [q_proj, 5]\n", "lora_target_modules: did not expect the list ['q_proj', 5]"),
        ("seed:\n", "recipe.yaml: seed: expected one value, found None"),
        ("seed: {a: 1}\n", "recipe.yaml: seed: expected one value, found {'a': 1}"),
        ("dtype: float33\n", "dtype: expected one of auto, bfloat16, float16, float32, found 'float33'"),
        ("lora_r: 0\n", "lora_r: expected at least 1, found 0"),
        ("max_pixels: 0\n", "max_pixels: expected at least 1, found 0"),
        ("learning_rate: nan\n", "learning_rate: expected a number, found nan"),
        ("learning_rate: -1.0\n", "learning_rate: expected a number above 0, found -1.0"),
        ("save_steps: 0\n", "save_steps: expected a number above 0, found 0"),
        ("eval_accumulation_steps: 0\n", "eval_accumulation_steps: expected at least 1, found 0"),
        ("neftune_noise_alpha: -1.0\n", "neftune_noise_alpha: expected at least 0, found -1.0"),
        ("eval_steps: 0\n", "eval_steps: expected a number above 0, found 0"),
        ("max_steps: 0\n", "max_steps: expected a number above 0, or -1 to count epochs, found 0"),
        ("ddp_timeout: -1\n", "ddp_timeout: expected at least 1, found -1"),
        ("batch_eval_metrics: true\n", "batch_eval_metrics: would have no effect; validation computes the loss and"),
        ("adam_epsilon: -1.0\n", "adam_epsilon: expected at least 0, found -1.0"),
        ("attn_implementation: x/kernel\n", "attn_implementation: expected one of varlen, sdpa, eager, flash_atten"),
        ("max_steps: -5\n", "max_steps: expected a number above 0, or -1 to count epochs, found -5"),
        ("lora_dropout: 1.0\n", "lora_dropout: expected a share below 1, found 1.0"),
        ("gradient_accumulation_steps: 0\n", "gradient_accumulation_steps: expected at least 1"),
        ("metric_for_best_model: acc\n", "metric_for_best_model: expected one of loss, mean_token_accuracy"),
        ("report_to: mlflow\n", "report_to: expected tensorboard, trackio, wandb or none, found 'mlflow'"),
        ("trackio_space_id: me/x\n", "trackio_space_id: would have no effect; set TRACKIO_SPACE_ID"),
        ("padding_free: true\n", "padding_free: would have no effect"),
        ("hub_token: secret\n", "hub_token: would have no effect; a token in a recipe ends up in files"),
        ("#raw\n[1, 2]\n", "expected lines of the form 'key: value'"),
        ("#raw\na: [b\n", "recipe.yaml, line 2, column 1: not YAML: expected ',' or ']'"),
        ("#raw\nx: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("#raw\n" + BASE.replace("use_peft: true\n", ""), "use_peft: must be true"),
        ("#raw\n" + BASE.replace("dataset_path: data\n", ""), "dataset_path: name the annotation file"),
        ("#raw\n" + BASE.replace("model_name_or_path: base\n", ""), "model_name_or_path: name the base model"),
    ],
)
def test_a_wrong_recipe_gives_one_clear_line(parse, text, message):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rat", "3"], "unknown option '--learning_rat'; did you mean 'learning_rate'?"),
        (["--lora", "3"], "unknown option '--lora'"),
        (["--no_4bit"], "unknown option '--no_4bit'; use --load_in_4bit false"),
        (["--use_4bit"], "unknown option '--use_4bit'; use --load_in_4bit true"),
        (["--batch_size=2"], "unknown option '--batch_size'; use --per_device_train_batch_size N"),
        (["--use-amp"], "unknown option '--use_amp'; use --bf16 true"),
        (["--no-amp"], "unknown option '--no_amp'; use --bf16 false --dtype float32"),
        (["--device", "cuda:1"], "use --use_cpu true for a CPU; CUDA_VISIBLE_DEVICES=N"),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["stray.yaml"], "unexpected argument 'stray.yaml'"),
    ],
)
def test_a_wrong_option_ends_with_code_2_and_one_line(parse, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        parse("", *options)
    assert stop.value.code == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1


def test_a_recipe_that_extends_another_has_the_last_word(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE + "seed: 1\nlora_r: 4\n")
    (tmp_path / "recipe.yaml").write_text("extends: base.yaml\nseed: 2\n")
    _, training, model = parse_config(["--config", str(tmp_path / "recipe.yaml"), "--lora_r", "6"])
    assert (training.seed, model.lora_r) == (2, 6)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "third.yaml").write_text("extends: ../recipe.yaml\nlora_r: 8\n")
    _, training, model = parse_config(["--config", str(tmp_path / "sub" / "third.yaml")])
    assert (training.seed, model.lora_r) == (2, 8)
    (tmp_path / "one.yaml").write_text("extends: two.yaml\n")
    (tmp_path / "two.yaml").write_text("extends: one.yaml\n")
    with pytest.raises(ValueError, match=r"one\.yaml: extends: the recipes extend each other"):
        parse_config(["--config", str(tmp_path / "one.yaml")])
    (tmp_path / "base.yaml").write_text(BASE + "sed: 1\n")
    with pytest.raises(ValueError, match=r"base\.yaml: unknown key 'sed'; did you mean 'seed'"):
        parse_config(["--config", str(tmp_path / "recipe.yaml")])


def test_a_missing_recipe_is_named():
    with pytest.raises(FileNotFoundError, match=r"--config: no file nope\.yaml"):
        parse_config(["--config", "nope.yaml"])


def test_the_tables_name_real_fields(parse):
    fields = {name for parsed in parse() for name in vars(parsed)}
    assert set(WITHOUT_EFFECT) <= fields
    assert not set(RENAMED) & fields
    assert {line.split(":")[0] for advice in RENAMED.values() for line in advice.split(", ")} <= fields
    assert {*AT_LEAST, *ABOVE_ZERO} <= fields


def test_the_shipped_recipe_holds_the_promised_defaults():
    data, training, model = parse_config(["--config", "configs/skin.yaml", "--use_cpu", "true", "--bf16", "false"])
    assert model.model_name_or_path == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert (model.lora_r, model.lora_alpha, model.lora_dropout, model.lora_target_modules) == (8, 16, 0.05, None)
    assert (model.load_in_4bit, model.use_bnb_nested_quant, model.bnb_4bit_quant_type) == (True, True, "nf4")
    assert (training.learning_rate, training.max_grad_norm, training.num_train_epochs) == (5e-5, 1.0, 3)
    assert (training.lr_scheduler_type, training.warmup_steps) == ("cosine", 10)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 4)
    assert (training.packing, data.pack_tokens, model.attn_implementation) == (True, "auto", "varlen")
    assert (training.save_steps, training.logging_steps, training.resume_from_checkpoint) == (250, 10, "auto")
    assert data.freeze_vision_encoder
    assert read_yaml(DEFAULT_RECIPE, "--config")["bf16"] is True


PACKED = ["--packing", "true", "--attn_implementation", "varlen"]
ONE = ["--per_device_train_batch_size", "1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--packing", "true", "--attn_implementation", "sdpa"], "packing: needs attn_implementation: varlen"),
        (
            [*PACKED, "--per_device_train_batch_size", "2"],
            "per_device_train_batch_size: would have no effect with pack",
        ),
        ([*PACKED, *ONE, "--train_sampling_strategy", "sequential"], "train_sampling_strategy: would have no effect"),
        (["--packing", "false", "--pack_tokens", "4096"], "pack_tokens: would have no effect without packing: true"),
        ([*PACKED, "--pack_tokens", "0"], "pack_tokens: expected at least 1, found 0"),
        ([*PACKED, "--pack_tokens", "many"], "pack_tokens: expected a whole number or auto, found 'many'"),
    ],
)
def test_packing_settings_that_cannot_work_are_refused(parse, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse("", *options)


@pytest.mark.parametrize(
    ("options", "frozen", "bf16", "checkpointing"),
    [
        (["--no-freeze_vision_encoder", "--bf16"], False, True, "auto"),
        (["--bf16", "--no_freeze-vision-encoder", "--max_steps", "-1"], False, True, "auto"),
        (["--freeze_vision_encoder", "--no-bf16", "--gradient-checkpointing"], True, False, True),
        (["--bf16=true", "--freeze-vision-encoder", "false", "--no_gradient_checkpointing"], False, True, False),
    ],
)
def test_a_switch_needs_no_value_and_takes_dashes_and_underscores(parse, options, frozen, bf16, checkpointing):
    data, training, _ = parse("", *options)
    assert (data.freeze_vision_encoder, training.bf16, training.gradient_checkpointing) == (
        frozen,
        bf16,
        checkpointing,
    )


ORIGINAL = {  # options of the script that this one replaces
    "dataset_path": "a.json", "image_dir": "images", "output_dir": "o", "model_name_or_path": "m",
    "learning_rate": 1e-4, "num_train_epochs": 2.0, "gradient_accumulation_steps": 3, "lora_r": 5, "lora_alpha": 6,
    "lora_dropout": 0.2, "logging_steps": 7, "save_steps": 8, "warmup_steps": 9, "max_steps": 11,
}  # fmt: skip


@pytest.mark.parametrize("dashes", [False, True])
def test_options_of_the_original_script_work_as_they_are(parse, dashes):
    words = [word for name, value in ORIGINAL.items() for word in (f"--{name}", str(value))]
    words = [word.replace("_", "-") if dashes and word.startswith("--") else word for word in words]
    values = {name: value for part in parse("", *words) for name, value in vars(part).items()}
    assert {name: values[name] for name in ORIGINAL} == ORIGINAL


def write_recipes(folder, base, own):
    (folder / "base.yaml").write_text(BASE + base)
    (folder / "own.yaml").write_text("extends: base.yaml\n" + own)
    return ["--config", str(folder / "own.yaml")]


PACKS = "packing: true\nattn_implementation: varlen\nper_device_train_batch_size: 1\npack_tokens: 512\n"
INHERITED = [  # (inherited, the recipe's own, what the inherited setting then is)
    (PACKS, "packing: false", {"pack_tokens": "auto", "packing": False}),
    (
        "attn_implementation: varlen\nper_device_train_batch_size: 4\ntrain_sampling_strategy: group_by_length\n"
        "dataloader_drop_last: true\n",
        "packing: true",
        {"per_device_train_batch_size": 1, "train_sampling_strategy": "random", "dataloader_drop_last": False},
    ),
    ("load_in_4bit: true\nbnb_4bit_quant_storage: uint8\n", "load_in_4bit: false", {"bnb_4bit_quant_storage": None}),
    (
        "eval_strategy: steps\nload_best_model_at_end: true\nmetric_for_best_model: loss\n",
        "eval_strategy: no",
        {"load_best_model_at_end": False, "metric_for_best_model": None},
    ),
    (
        "dataloader_num_workers: 2\ndataloader_prefetch_factor: 4\ndataloader_persistent_workers: true\n",
        "dataloader_num_workers: 0",
        {"dataloader_prefetch_factor": None, "dataloader_persistent_workers": False},
    ),
    (
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1.0e-6}\n",
        "lr_scheduler_type: linear",
        {"lr_scheduler_kwargs": None},
    ),
]


@pytest.mark.parametrize(("inherited", "own", "found"), INHERITED)
def test_a_setting_that_a_nearer_one_switches_off_is_not_inherited(tmp_path, inherited, own, found):
    for text, options in ((own + "\n", []), ("", f"--{own.replace(':', '')}".split())):
        parts = parse_config([*write_recipes(tmp_path, inherited, text), *options])
        values = {name: value for part in parts for name, value in vars(part).items()}
        assert {name: values[name] for name in found} == found


@pytest.mark.parametrize(
    ("base", "own", "options", "message"),
    [
        (PACKS, "packing: false\npack_tokens: 300\n", [], "pack_tokens: would have no effect without packing"),
        (PACKS, "pack_tokens: 300\n", ["--packing", "false", "--pack_tokens", "256"], "pack_tokens: would have no"),
        ("packing: false\n", "", ["--pack_tokens", "300"], "pack_tokens: would have no effect without packing: true"),
        ("", "load_in_4bit: false\nbnb_4bit_quant_storage: uint8\n", [], "bnb_4bit_quant_storage: would have no eff"),
        (
            "max_steps: 9\n",
            "num_train_epochs: 2\n",
            [],
            "num_train_epochs: would have no effect, as the inherited max",
        ),
        ("max_steps: 9\n", "", ["--num_train_epochs", "2"], "max_steps: 9 ends the run; set max_steps: -1 as well"),
    ],
)
def test_what_stands_beside_the_switch_or_nearer_is_an_error(tmp_path, base, own, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_config([*write_recipes(tmp_path, base, own), *options])


def test_a_cpu_computes_in_float32_unless_bf16_is_written_beside_it():
    assert parse_config(["--use_cpu", "true"])[1].bf16 is False
    assert parse_config(["--config", "configs/skin_16gb.yaml", "--use_cpu"])[1].fp16 is False
    assert parse_config(["--use_cpu", "true", "--bf16"])[1].bf16 is True


def test_a_recipe_without_precision_runs_a_cpu_in_float32(parse):
    assert parse("#raw\n" + BASE.replace("bf16: false\n", ""))[1].bf16 is False


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a computer without GPU")
@pytest.mark.parametrize("options", [[], ["--config", "configs/skin_16gb.yaml"], ["--config", "configs/skin_3b.yaml"]])
def test_without_a_gpu_the_error_says_what_to_do(options):
    with pytest.raises(ValueError, match=r"no GPU is visible .*plan_run\.py, or set use_cpu: true .* `make demo`"):
        parse_config(options)


def test_help_is_short_and_help_all_is_complete(capsys):
    pages = []
    for option in ("--help", "-h", "--help-all", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            parse_config([option], prog="plan_run.py")
        assert not stop.value.code
        pages.append(capsys.readouterr().out)
    short, same, long, same_long = pages
    assert short == same and long == same_long
    assert len(short.splitlines()) < 60 and max(map(len, short.splitlines())) <= 119
    assert "usage: plan_run.py" in short and "--help-all lists every setting" in short
    assert "--pack_tokens                   with packing: most tokens in a row, images included; auto takes" in short
    fields = {field.name for kind in (DataArguments, TrainingSettings, ModelConfig) for field in fields_of(kind)}
    assert {name for names in SETTINGS.values() for name in names} | set(OWN_WORDS) <= fields
    assert all(f"--{name}" in long for name in fields if name not in ("_n_gpu", "distributed_state"))


def test_the_switches_name_real_settings(parse):
    values = {name for part in parse() for name in vars(part)}
    assert {switch.name for switch in SWITCHES} | {name for switch in SWITCHES for name in switch.off} <= values


@pytest.mark.parametrize("text", ["q_proj,v_proj", "q_proj v_proj", "[q_proj, v_proj]", "q_proj; v_proj"])
def test_several_layers_in_one_text_are_told_apart(parse, text):
    rule = "write [q_proj, v_proj], on the command line q_proj v_proj"
    with pytest.raises(ValueError, match=re.escape(f"expected one name an entry, found {text!r}; {rule}")):
        parse("", "--lora_target_modules", text)
    assert parse("lora_target_modules: [q_proj, v_proj]").model.lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("name", ["dataset_path", "image_dir", "model_name_or_path"])
def test_the_adapter_is_not_saved_among_the_files_of_an_input(parse, tmp_path, name):
    folder = tmp_path / "inputs"
    folder.mkdir()
    options = [f"--{name}", str(folder), "--output_dir"]
    with pytest.raises(ValueError, match=f"output_dir: .*inputs/../inputs is the folder of {name}"):
        parse("", *options, f"{folder}/../inputs")
    inside = str(folder / "adapter")
    if name == "dataset_path":  # its plot would be a photo, its name a class
        with pytest.raises(ValueError, match=r"output_dir: .*/adapter is inside the folder of dataset_path; choose"):
            parse("", *options, inside)
    else:
        assert parse("", *options, inside).output_dir == folder / "adapter"


def test_a_revision_of_a_folder_would_have_no_effect(parse, tmp_path):
    with pytest.raises(ValueError, match=f"model_revision: would have no effect, as {tmp_path} is a folder"):
        parse("", "--model_name_or_path", str(tmp_path), "--model_revision", "v2")
    assert parse("", "--model_name_or_path", "Qwen/x", "--model_revision", "v2").model.model_revision == "v2"


@pytest.mark.parametrize("key", ["lora_dropout", "adam_beta1", "adam_beta2"])
def test_a_share_is_below_one(parse, key):
    with pytest.raises(ValueError, match=f"{key}: expected a share below 1, found 2.0"):
        parse("", f"--{key}", "2")


def test_an_empty_output_dir_is_not_the_current_folder(parse):
    with pytest.raises(ValueError, match="output_dir: expected a folder, found ''"):
        parse("", "--output_dir", "")


@pytest.mark.parametrize(("key", "value"), [("seed", -1), ("seed", 2**32), ("data_seed", -5)])
def test_a_seed_that_cannot_be_is_named_with_its_range(parse, key, value):
    with pytest.raises(ValueError, match=f"{key}: expected 0 to 4294967295, found {value}"):
        parse("", f"--{key}={value}")
    assert parse("", "--seed", str(2**32 - 1)).training.seed == 2**32 - 1


def test_the_home_folder_is_found_in_a_recipe_and_in_quoted_options(parse, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    settings = parse("image_dir: ~/images\nrun_name: a~/b", "--dataset_path", "~/data", "--output_dir=~/out")
    assert (settings.data.dataset_path, settings.data.image_dir) == ("/home/me/data", "/home/me/images")
    assert (settings.output_dir, settings.training.run_name) == (Path("/home/me/out"), "a~/b")


def test_activations_are_moved_off_a_gpu_alone_and_a_plan_needs_none():
    words = ["--config", "configs/demo.yaml", "--dataset_path", "x", "--activation_offloading", "true"]
    settings = parse_config([*words, "--model_name_or_path", "y"])
    with pytest.raises(ValueError, match="activation_offloading: needs a GPU, whose memory it spares; set it to f"):
        check_device(settings.training)
