"""An adapter is loaded onto a base that it fits completely, or one line says how much of it does not fit."""

import json
import math
import os
import re
import shutil

from common.cli import run

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

import eval_sft
import merge_adapter
import predict
import push_adapter
from demo.tiny_model import save_tiny_model
from evaluation.merging import choose_base
from helpers.runs import TEXTS
from models.adapters import (
    attach_adapter,
    check_fits_base,
    load_adapters,
    load_answering_model,
    loading_settings,
    read_adapter_config,
)
from models.loading import load_model, load_processor, readable_out_of_memory
from models.lora import build_lora_config
from training.resume import check_weights

LAYER = "base_model.model.model.language_model.layers"


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """A folder with an adapter of 28 tensors that changes every layer of the language model."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    base = load_model(str(tiny_base), quantization=None, dtype="float32")
    model = get_peft_model(base, build_lora_config(base, r=4, lora_alpha=8, lora_dropout=0.0))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(folder)
    load_processor(str(tiny_base)).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"quantization": None, "dtype": "float32", "revision": None}))
    return folder


@pytest.fixture
def damaged(trained, tmp_path):
    """Return a function that copies the adapter with other tensors, and other entries of its configuration."""

    def change(edit=lambda tensors: tensors, **entries):
        folder = tmp_path / "damaged"
        shutil.copytree(trained, folder)
        weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        save_file(edit(load_file(weights)), weights, metadata={"format": "pt"})
        config.write_text(json.dumps({**json.loads(config.read_text()), **entries}))
        return folder

    return change


def rename(tensors):
    return {name.replace("model.language_model.layers", "model.layers"): x for name, x in tensors.items()}


def halve(tensors):
    return {name: x for number, (name, x) in enumerate(sorted(tensors.items())) if number % 2}


def cut(tensors):
    return {name: x[:, :32].contiguous() if ".lora_A." in name else x for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("edit", "entries", "message"),
    [
        (rename, {}, "28 of its 28 tensors have no place there, the first is base_model.model.model.layers.0."),
        (rename, {}, f"28 of the 28 expected ones are missing, the first is {LAYER}.0.mlp.down_proj.lora_A.weight"),
        (halve, {}, "base0: 14 of the 28 expected ones are missing"),
        (cut, {}, "14 of its 28 tensors have another shape, the first is"),
        (dict, {"r": 2}, "28 of its 28 tensors have another shape"),
        (dict, {"target_modules": ["q_proj", "v_proj"]}, "20 of its 28 tensors have no place there"),
        (dict, {"target_modules": r"transformer\.h\.\d+\.attn"}, "Target modules transformer"),
    ],
)
def test_what_does_not_fit_is_counted(damaged, edit, entries, message):
    folder = str(damaged(edit, **entries))
    for load in (load_answering_model, check_fits_base, lambda adapter: load_adapters([adapter], **DEFAULTS)):
        with pytest.raises(ValueError, match="does not fit") as caught:
            load(folder)
        assert message in str(caught.value) and folder in str(caught.value) and "\n" not in str(caught.value)


DEFAULTS = {"base": None, "quantization": "auto", "dtype": None}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 128, "num_layers": 2}, "28 of its 28 tensors have another shape"),
        ({"hidden_size": 64, "num_layers": 3}, "other: 14 of the 42 expected ones are missing"),
        ({"hidden_size": 64, "num_layers": 1}, "14 of its 28 tensors have no place there"),
        ({"hidden_size": 64, "num_layers": 2, "family": "qwen2_vl"}, "it is of Qwen2.5-VL, not Qwen2-VL"),
        ({"hidden_size": 64, "num_layers": 2, "family": "qwen3_vl"}, "it is of Qwen2.5-VL, not dense Qwen3-VL"),
    ],
)
def test_another_base_is_refused_by_every_command(trained, tmp_path, demo_raw, capsys, sizes, message):
    other = tmp_path / "other"
    save_tiny_model(other, TEXTS, **sizes)
    common = ["--adapter", str(trained), "--base", str(other)]
    question = ["--image", str(demo_raw / "images" / "0001.jpg"), "--question", "What?"]
    assert run(lambda: predict.main([*common, *question])) == 1
    assert run(lambda: merge_adapter.main([*common, "--out", str(tmp_path / "merged")])) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all(message in error for error in errors)
    if "family" in sizes:
        return
    model = load_model(str(other), quantization="nf4", dtype="float32")
    model = get_peft_model(model, build_lora_config(model, r=4, lora_alpha=8))
    with pytest.raises(ValueError, match="does not fit the base model other"):
        check_weights(trained, model)  # as a run does that resumes
    check_weights(None, model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"peft_type": "LO', "adapter_config.json is damaged: not JSON"),
        ("[1, 2]", "adapter_config.json is damaged: expected an object, found [1, 2]"),
        ("[" * 100_000, "adapter_config.json is damaged: not JSON"),
        ("{}", "adapter_config.json: 'peft_type': expected a text, found None"),
        ('{"peft_type": "LORA"}', "adapter_config.json: 'base_model_name_or_path': expected a text, found None"),
    ],
)
def test_a_damaged_configuration_is_not_called_missing(trained, tmp_path, capsys, content, message):
    folder = tmp_path / "damaged"
    shutil.copytree(trained, folder)
    (folder / "adapter_config.json").write_text(content)
    assert run(lambda: merge_adapter.main(["--adapter", str(folder), "--out", str(tmp_path / "merged")])) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}/") and message in error


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"r": "16"}, "does not work: TypeError"),
        ({"lora_alpha": None}, "does not work: TypeError"),
        ({"target_modules": "("}, "does not work: error: missing )"),
        ({"peft_type": "NOPE"}, "does not work: KeyError: 'NOPE'"),
        ({"task_type": "NOPE"}, "does not work: ValueError: Invalid task type: 'NOPE'"),
        ({"rank_pattern": 5}, "does not work: AttributeError"),
        ({"modules_to_save": ["lm_head"]}, "does not work: KeyError: 'base_model.model.lm_head.weight'"),
    ],
)
def test_an_entry_that_cannot_work_is_said_in_a_line(damaged, demo_raw, capsys, entries, message):
    question = ["--image", str(demo_raw / "images" / "0001.jpg"), "--question", "What?"]
    folder = damaged(**entries)
    assert run(lambda: predict.main(["--adapter", str(folder), *question])) == 1
    assert f"error: --adapter: the adapter_config.json of {folder} {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "run.json is damaged: expected an object, found [1]"),
        ("{", "run.json is damaged: not JSON"),
        ('{"quantization": "int3"}', "run.json: 'quantization': expected (None, 'nf4', 'stored'), found 'int3'"),
        ('{"dtype": "bfloat17"}', "run.json: 'dtype': expected ('bfloat16', 'float16', 'float32'), found 'bfloat17'"),
        ('{"dtype": ["x"]}', "run.json: 'dtype': expected"),
        ('{"revision": 5}', "run.json: 'revision': expected a text, found 5"),
        ('{"nope": 1}', "run.json: unknown entry 'nope'"),
        ('{"attn_implementation": "x/kernel"}', "run.json: 'attn_implementation': expected"),
    ],
)
def test_a_damaged_run_record_is_named(damaged, content, message):
    folder = damaged()
    (folder / "run.json").write_text(content)
    with pytest.raises(ValueError) as caught:
        load_answering_model(str(folder))
    assert message in str(caught.value)


def edit_json(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base: edit_json(base / "config.json", vision_config=[]), "the configuration of the model in "),
        (lambda base: edit_json(base / "config.json", image_token_id="x"), "the configuration of the model in "),
        (lambda base: edit_json(base / "config.json", dtype="float99"), "does not work: AttributeError"),
        (lambda base: (base / "chat_template.jinja").write_text("{% if %}"), "the chat template does not work"),
        (lambda base: (base / "chat_template.jinja").write_text('{{ raise_exception("no") }}'), "does not work: no"),
        (lambda base: (base / "chat_template.jinja").write_text("{{ messages.x.y }}"), "the chat template does not"),
        (lambda base: _set_patch(base, 0), "patch_size: expected a whole number above 0, found 0"),
        (lambda base: _set_patch(base, "14"), "patch_size: expected a whole number above 0, found '14'"),
    ],
)
def test_a_damaged_base_or_processor_is_said_in_a_line(tiny_base, tmp_path, demo_raw, capsys, change, message):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    change(base)
    question = ["--image", str(demo_raw / "images" / "0001.jpg"), "--question", "What?"]
    assert run(lambda: predict.main(["--base", str(base), *question])) == 1
    assert message in capsys.readouterr().err


def _set_patch(base, size):
    path = base / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"]["patch_size"] = size
    path.write_text(json.dumps(content))


def test_no_code_of_a_processor_is_offered_to_be_run(tiny_base, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    code = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    edit_json(base / "tokenizer_config.json", **code)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    assert type(load_processor(str(base)).tokenizer).__module__.startswith("transformers.")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": 3}, "12 are missing, the first is model.language_model.layers.2."),
        ({"num_hidden_layers": 1}, "have no place in it, the first is model.language_model.layers.1."),
        ({"intermediate_size": 96}, "6 have another shape, the first is model.language_model.layers.0.mlp.down_proj"),
    ],
)
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_base_whose_weights_do_not_fit_its_configuration_is_refused(
    tiny_base, tmp_path, entries, message, quantization
):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "config.json").read_text())
    config["text_config"] |= entries
    config["text_config"].pop("layer_types", None)
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^model '.*/base': its weights do not fit its config\.json: ") as caught:
        load_model(str(base), quantization=quantization, dtype="float32")
    assert message in str(caught.value)


def test_an_adapter_as_base_or_model_is_called_one(trained, demo_raw, capsys):
    assert run(lambda: eval_sft.main(["--model", str(trained), "--dataset", "x"])) == 1
    assert f"--model: {trained} is an adapter; write --adapter {trained}" in capsys.readouterr().err
    question = ["--image", str(demo_raw / "images" / "0001.jpg"), "--question", "What?"]
    assert run(lambda: predict.main(["--base", str(trained), *question])) == 1
    assert f"--base: {trained} is an adapter; write --adapter {trained}" in capsys.readouterr().err
    assert run(lambda: predict.main(["--base", str(trained), "--adapter", str(trained), *question])) == 1
    assert f"--base: {trained} is an adapter; name its base model" in capsys.readouterr().err


def test_the_second_adapter_is_checked_too(trained, damaged):
    with pytest.raises(ValueError, match="14 of the 28 expected ones are missing"):
        load_adapters([str(trained), str(damaged(halve))], **DEFAULTS)


def test_an_adapter_that_does_not_fit_is_not_pushed(damaged, capsys):
    assert run(lambda: push_adapter.main([str(damaged(rename)), "you/skin"])) == 1
    assert "28 of its 28 tensors have no place there" in capsys.readouterr().err


def test_an_adapter_with_absurd_weights_is_neither_loaded_nor_pushed(damaged):
    def change(tensors):
        next(iter(tensors.values()))[0, 0] = -1e36
        return tensors

    folder = damaged(change)
    for load in (load_answering_model, check_fits_base):
        with pytest.raises(ValueError, match=r"a weight of .* is 1\.0e\+36 in size, expected at most 10,000"):
            load(str(folder))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("chat_template.jinja", "no chat template; chat_template.jinja holds it"),
        ("tokenizer.json", "the tokenizer knows no words; tokenizer.json holds them"),
        ("tokenizer_config.json", "the tokenizer has no pad_token; tokenizer_config.json names it"),
    ],
)
def test_a_file_that_a_processor_lacks_is_named(trained, tmp_path, file, message):
    shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns(file))
    with pytest.raises(ValueError, match=f"^processor of '{tmp_path}/copy': {message}$"):
        load_processor(str(tmp_path / "copy"))


def test_weights_that_are_cut_off_are_found_before_the_base_is_read(damaged):
    folder = damaged()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"unreadable weights in adapter_model\.safetensors: "):
        read_adapter_config(str(folder))


def test_a_folder_without_an_adapter_is_called_one(tmp_path):
    with pytest.raises(ValueError, match=r"no adapter in .*, the folder has no adapter_config\.json$"):
        load_answering_model(str(tmp_path))


def test_an_adapter_with_nan_or_damaged_weights_is_neither_loaded_nor_pushed(damaged, capsys):
    folder = damaged(
        lambda tensors: {name: x / 0 if "layers.0.mlp.up_proj" in name else x for name, x in tensors.items()}
    )
    for load in (load_answering_model, check_fits_base):
        with pytest.raises(
            ValueError, match=r"2 tensors hold NaN or infinity, the first is .*layers\.0\.mlp\.up_proj"
        ):
            load(str(folder))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert run(lambda: push_adapter.main([str(folder), "you/skin"])) == 1
    assert "unreadable weights in adapter_model.safetensors: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("base", ["/gone/base", "outputs/gone/base", "../base"])
def test_a_base_that_is_not_where_the_training_had_it_is_told_with_the_option(damaged, base):
    folder = str(damaged(base_model_name_or_path=base))
    message = f"--adapter: {folder} was trained on the base {base!r}, and there is no such folder"
    for load in (load_answering_model, lambda adapter: choose_base(adapter, None)):
        with pytest.raises(ValueError, match=f"{re.escape(message)}.*; name it by --base"):
            load(folder)
    assert choose_base(folder, "elsewhere") == ("elsewhere", None)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_a_dtype_that_no_adapter_has_are_refused(damaged, dtype):
    folder = damaged(lambda tensors: {name: x.to(dtype) for name, x in tensors.items()})
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"28 tensors are {name}, expected float32, bfloat16, float16, float64"):
        load_answering_model(str(folder))


@pytest.mark.parametrize("alpha", [0, -32, math.nan, math.inf])
def test_a_scale_that_switches_the_adapter_off_or_round_is_refused(damaged, alpha):
    folder = damaged(lora_alpha=alpha)
    with pytest.raises(ValueError, match=f"'lora_alpha': expected a number above 0 and at most 10,000, found {alpha}"):
        load_answering_model(str(folder))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"alpha_pattern": {"q_proj": 0}}, "'q_proj': expected a number above 0 and at most 10,000, found 0"),
        ({"use_rslora": "false"}, "'use_rslora': expected true or false, found 'false'"),
        ({"use_dora": 1}, "'use_dora': expected true or false, found 1"),
    ],
)
def test_other_entries_that_would_change_the_scale_in_silence_are_refused(damaged, entries, message):
    with pytest.raises(ValueError, match=message):
        load_answering_model(str(damaged(**entries)))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.mkdir(), "it is a folder, a pipe or a device"),
        (os.mkfifo, "it is a folder, a pipe or a device"),
        (lambda path: path.symlink_to("gone"), "it is a link to what is not there"),
    ],
)
def test_something_else_in_place_of_the_weights_is_not_called_missing(damaged, make, what):
    weights = damaged() / "adapter_model.safetensors"
    weights.unlink()
    make(weights)
    with pytest.raises(ValueError, match=f"^--adapter: {weights} is no file; {what}$"):
        load_answering_model(str(weights.parent))


def test_what_is_to_be_known_of_an_adapter_is_printed_once(damaged, capsys):
    folder = damaged(entry_of_tomorrow=1)
    (folder / "run.json").unlink(missing_ok=True)
    for _ in range(2):
        loading_settings(str(folder), base=None, quantization="auto", dtype=None)
        load_answering_model(str(folder))
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert lines == [
        f"warning: the adapter_config.json of {folder}: Unexpected keyword arguments ['entry_of_tomorrow'] for class "
        "LoraConfig, these are ignored",
        f"{folder} does not say how its base was loaded; using 16 bit (--quantization)",
    ]


def test_a_base_that_is_gone_keeps_no_adapter_from_being_pushed(damaged, capsys):
    check_fits_base(str(damaged(base_model_name_or_path="/gone")))
    assert "not checked whether the adapter fits its base: no model in '/gone'" in capsys.readouterr().err


def test_a_fitting_adapter_has_an_effect(trained, tiny_base):
    base = load_model(str(tiny_base), quantization=None, dtype="float32")
    name = "model.language_model.layers.0.mlp.up_proj"
    weight = base.get_submodule(name).weight.clone()
    merged = attach_adapter(base, str(trained)).merge_and_unload()
    assert not torch.equal(merged.get_submodule(name).weight, weight)


def test_an_adapter_is_not_added_twice(trained, damaged, tmp_path, capsys):
    merged = tmp_path / "merged"
    merge_adapter.main(["--adapter", str(trained), "--out", str(merged)])
    again = ["--adapter", str(trained), "--base", str(merged)]
    assert run(lambda: merge_adapter.main([*again, "--out", str(tmp_path / "twice")])) == 1
    problem = f"--base: {merged} has an adapter merged into it already, and {trained} was trained without that one"
    assert problem in capsys.readouterr().err
    with pytest.raises(ValueError, match="has an adapter merged into it already"):
        load_answering_model(str(trained), base=str(merged))
    moved = merged.rename(tmp_path / "moved")
    other = damaged(lambda tensors: {name: 2 * x for name, x in tensors.items()})  # of the same base
    with pytest.raises(ValueError, match="has an adapter merged into it already"):
        load_answering_model(str(other), base=str(moved))
    config = other / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(moved)}))
    assert load_answering_model(str(other), base=str(moved)) is not None  # trained on the merged model


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_names_the_option_to_lower(error):
    with (
        pytest.raises(ValueError, match=r"^out of memory: lower --batch-size$"),
        readable_out_of_memory("lower --batch-size"),
    ):
        raise error


def test_other_errors_of_torch_are_left_alone():
    with pytest.raises(RuntimeError, match="shapes"), readable_out_of_memory("lower --batch-size"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
