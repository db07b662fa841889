"""Planned memory agrees with measured memory; a dry run writes nothing; a plan without model, data or GPU."""

import copy
import re
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from common.cli import run

import pytest
import torch
from peft import get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLConfig

import plan_run
import train_sft
from benchmarks.gpu_7b import quantise
from helpers.runs import train_args
from helpers.weights import bytes_of
from models.families import FAMILIES, family_of, published_config
from models.flops import wide_share
from models.loading import load_model
from models.lora import build_lora_config, detach_vision_inputs
from planning import page
from planning.activations import make_batch, trace_model, trace_step
from planning.estimates import CONTEXT, MemoryPlan, describe_lengths, divide_weights, find_warnings, steps_per_epoch
from planning.selective import stored_by_layer
from planning.shapes import add_lora, build_without_weights, count_weights, read_config, weight_bytes, with_layers
from planning.smoke_test import tiny_config
from training.config import parse_config
from training.lengths import SampleLengths
from training.memory_probe import optimizer_bytes
from training.settings import AUTO

RECIPES = sorted(Path("configs").glob("skin*.yaml"))
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
BILLIONS = {  # parameters, as the models' pages on the Hub give them
    "Qwen2-VL-2B": 2.21, "Qwen2-VL-7B": 8.29, "Qwen2-VL-72B": 73.4, "Qwen2.5-VL-3B": 3.75, "Qwen2.5-VL-7B": 8.29,
    "Qwen2.5-VL-32B": 33.5, "Qwen2.5-VL-72B": 73.4, "Qwen3-VL-2B": 2.13, "Qwen3-VL-4B": 4.44, "Qwen3-VL-8B": 8.77,
    "Qwen3-VL-32B": 33.4, "Qwen3.5-0.8B": 0.873, "Qwen3.5-2B": 2.274, "Qwen3.5-4B": 4.66, "Qwen3.5-9B": 9.653,
    "Qwen3.5-27B": 27.781, "Qwen3.6-27B": 27.781, "Qwen3.8-27B": 27.781,
    "Qwen3-VL-30B-A3B": 31.07, "Qwen3-VL-235B-A22B": 235, "Qwen3.5-35B-A3B": 35, "Qwen3.6-35B-A3B": 35,
}  # fmt: skip


@pytest.mark.parametrize(("quantization", "double_quant"), [("nf4", True), ("nf4", False), (None, False)])
def test_planned_weights_are_those_of_the_loaded_model(tiny_base, quantization, double_quant):
    options = {"quantization": quantization, "double_quant": double_quant}
    model = load_model(str(tiny_base), dtype=torch.float32, **options)
    planned = weight_bytes(
        AutoConfig.from_pretrained(tiny_base), quantized=quantization is not None, double_quant=double_quant,
        dtype=torch.float32,
    )  # fmt: skip
    print(f"{options}: planned / loaded = {sum(planned.values()) / bytes_of(model):.4f}")
    assert sum(planned.values()) == pytest.approx(bytes_of(model), rel=0.01)
    adapted = get_peft_model(model, build_lora_config(model, **LORA))
    without = add_lora(build_without_weights(read_config(str(tiny_base))[0], torch.float32), LORA)
    assert without.get_nb_trainable_parameters()[0] == adapted.get_nb_trainable_parameters()[0]


def draft_layer(model):
    """Return the weights of Qwen3.5's layer for speculative decoding, which is published and not loaded.

    Of models with experts only the model card's total is known, which does not count it.
    """
    if not family_of(model).linear_attention or family_of(model).experts:
        return 0
    language, hidden = model.model.language_model, model.config.text_config.hidden_size
    return sum(p.numel() for p in language.layers[-1].parameters()) + 2 * hidden**2


def test_published_shapes_have_as_many_weights_as_the_models():
    for name, expected in BILLIONS.items():
        model = build_without_weights(published_config(f"Qwen/{name}-Instruct"), torch.bfloat16)
        count = sum(p.numel() for p in model.parameters()) + draft_layer(model)
        assert count / 1e9 == pytest.approx(expected, rel=0.0035)
    assert BILLIONS.keys() == {name for family in FAMILIES.values() for name in family.shapes}


def small_config(hidden, intermediate, heads, kv_heads, tower):
    sixth = hidden // heads // 6
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [hidden // heads // 2 - 2 * sixth, sixth, sixth],
    }
    text = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 4, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": 512, "rope_parameters": rope, "bos_token_id": None,
        "eos_token_id": None, "layer_types": ["full_attention"] * 4,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": tower, "intermediate_size": 2 * tower, "num_heads": 4, "out_hidden_size": hidden,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=500, video_token_id=501)


def measured_step(config, tokens, image_tokens, *, checkpointing, quantized=False):
    """Return the bytes that autograd saves, and the most that the CPU's allocator held, its inputs included."""
    model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=torch.float32).requires_grad_(False)
    if quantized:
        for layer in model.model.language_model.layers:
            quantise(layer, torch.float32)
        model.is_loaded_in_4bit = True
    model = get_peft_model(model, build_lora_config(model, **LORA)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        detach_vision_inputs(model)
    batch = make_batch(config, tokens, image_tokens, nullcontext())
    weights, saved = {p.data_ptr() for p in model.parameters()}, {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def step():
        hidden = model.get_base_model().model(**batch, use_cache=False).last_hidden_state
        hidden.backward(torch.ones_like(hidden))

    with saved_tensors_hooks(keep, lambda x: x):
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    changes = [(e.start_ns(), e.nbytes()) for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes):
        live += change
        peak = max(peak, live)
    inputs = batch["pixel_values"].nbytes
    saved.pop(batch["pixel_values"].data_ptr(), None)
    return sum(saved.values()) + inputs, peak + inputs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("shape", "tokens", "image_tokens"),
    [
        ((128, 512, 4, 2, 64), 640, 400),
        pytest.param((256, 768, 4, 4, 128), 512, 256, marks=pytest.mark.slow),
        pytest.param((192, 1024, 6, 2, 64), 900, 300, marks=pytest.mark.slow),
    ],
)
def test_planned_activations_are_what_a_cpu_holds(shape, tokens, image_tokens, checkpointing):
    config = small_config(*shape)
    saved, peak = measured_step(config, tokens, image_tokens, checkpointing=checkpointing)
    model = add_lora(build_without_weights(config, torch.float32), LORA)
    step = {"tokens": tokens, "image_tokens": image_tokens, "checkpointing": checkpointing}
    planned = trace_step(model, **step, dtype=torch.float32)
    print(f"{shape}, {step}: planned / measured = peak {planned.peak / peak:.3f}, saved {planned.saved / saved:.3f}")
    assert planned.peak == pytest.approx(peak, rel=0.15)
    if not checkpointing:  # what a checkpoint holds, it holds without autograd
        assert planned.saved == pytest.approx(saved, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpointing", "train_vision"),
    [("Qwen2.5-VL-3B", True, False), ("Qwen2.5-VL-3B", False, True), ("Qwen3-VL-2B", True, True)],
)
def test_memory_of_all_layers_follows_from_a_few(name, checkpointing, train_vision):
    config = with_layers(published_config(name), 6)
    config.vision_config.depth, config.vision_config.deepstack_visual_indexes = 2, [0]
    lora = {**LORA, "train_vision": train_vision}
    step = {"tokens": 512, "image_tokens": 300, "checkpointing": checkpointing, "dtype": torch.bfloat16}
    complete = trace_step(add_lora(build_without_weights(config, torch.bfloat16), lora), **step)
    assert trace_model(config, lora, **step) == complete


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_memory_of_layers_of_two_kinds_follows_from_two_periods(checkpointing):
    config = with_layers(published_config("Qwen3.5-0.8B"), 12)
    config.vision_config.depth = 2
    step = {"tokens": 512, "image_tokens": 300, "checkpointing": checkpointing, "dtype": torch.bfloat16}
    complete = trace_step(add_lora(build_without_weights(config, torch.bfloat16), LORA), **step)
    assert trace_model(config, LORA, **step) == complete


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_in_nf4_keep_no_other_activations(checkpointing):
    config, step = small_config(256, 768, 4, 4, 128), {"tokens": 512, "image_tokens": 256}
    saved, peak = measured_step(config, 512, 256, checkpointing=checkpointing, quantized=True)
    model = add_lora(build_without_weights(config, torch.float32), LORA)
    planned = trace_step(model, **step, checkpointing=checkpointing, dtype=torch.float32)
    out_of_nf4 = count_weights(config).largest * 4
    print(f"NF4, {checkpointing}: planned / measured = peak {(planned.peak + out_of_nf4) / peak:.3f}")
    assert planned.peak + out_of_nf4 == pytest.approx(peak, rel=0.15)
    if not checkpointing:
        assert planned.saved == pytest.approx(saved, rel=0.15)


def plans_7b(*words, compiled):
    """Return the plans of the 7B recipe for `benchmarks.gpu_7b`'s samples, 81 % image tokens."""
    settings = parse_config(["--use_cpu", "true", "--optim", "adamw_torch", "--attn_implementation", "varlen", *words])
    return page.plan_memory(published_config("Qwen2.5-VL-7B"), settings, 0.81, 8192, compiled=compiled)


@pytest.mark.slow
def test_the_plan_meets_what_was_measured_on_an_h100():
    """GB reserved, from benchmarks/README.md."""
    plain, whole = plans_7b(compiled=False), plans_7b(compiled=True)
    selective, host = whole[True, "selective"], plans_7b("--offload_embedding", "true", compiled=True)
    cases = {
        "checkpointing": (plain[True, True], 8192, 12.9),
        "no checkpointing, parts compiled": (plain[True, False], 4096, 49.5),
        "all recomputed in compiled layers": (whole[True, True], 8192, 12.8),
        "all recomputed in compiled layers, small packs": (whole[True, True], 2752, 9.3),
        "the same, embedding offloaded": (host[True, True], 3584, 8.6),
        "selective, 6 of 28 wide": (selective.with_wide(6), 8192, 21.5),
        "selective, 28 of 28 wide": (selective.with_wide(28), 8192, 34.8),
        "selective, 28 of 28 wide, large packs": (selective.with_wide(28), 16384, 61.1),
        "no checkpointing, compiled": (whole[True, False], 8192, 63.7),
    }
    for name, (plan, tokens, measured) in cases.items():
        planned = (plan.total(tokens) - CONTEXT) / 1e9
        print(f"{name}, {tokens}: {planned:.1f} planned / {measured} reserved = {planned / measured:.3f}")
    for plan, tokens, measured in cases.values():
        assert (plan.total(tokens) - CONTEXT) / 1e9 == pytest.approx(measured, rel=0.05)


@cache
def plan_recipes_model(name, settings):
    parsed = parse_config([*settings, "--model_name_or_path", name, "--use_cpu", "true"])
    return page.plan_memory(read_config(name, local_files_only=True)[0], parsed, 0.8, 4096, compiled=True)


@pytest.mark.slow
def test_selective_plans_keep_wide_products_where_there_is_room():
    plans = plan_recipes_model("Qwen/Qwen2.5-VL-7B-Instruct", ("--config", "configs/skin.yaml"))
    chosen = {gpu: page.choose_plan(plans, "auto", True, 8192, gpu)[1] for gpu in (None, 12, 24, 32, 80)}
    assert chosen.pop(12).name == "NF4, checkpointing"
    assert [plan.name for plan in chosen.values()] == [
        f"NF4, selective, {count} of 28 wide" for count in (0, 4, 16, 28)
    ]
    assert [round(plan.recomputed, 2) for plan in chosen.values()] == [0.58, 0.5, 0.25, 0.0]
    assert chosen[32].total(8192) <= 0.9 * 32e9 < chosen[32].total(8192) + chosen[32].wide * 8192
    settings = parse_config(["--use_cpu", "true"])
    packs = {gpu: page.plan_packs(plans, settings, 400, gpu) for gpu in (None, 12, 16, 24, 80)}
    assert packs == {None: 4096, 12: 4096, 16: 4096, 24: 8192, 80: 8192}
    assert page.plan_packs(plans, settings, 5000, 12) == 8192  # no other holds the longest sample


def test_a_compiled_layer_stores_what_selective_recomputation_says():
    model = add_lora(build_without_weights(published_config("Qwen2.5-VL-7B"), torch.bfloat16), LORA)
    narrow, wide, inputs, held = stored_by_layer(model, torch.bfloat16)
    lora = 7 * LORA["r"]
    assert narrow == 2 * (4 * 3584 + 2 * 512 + lora) + 4 * 28  # q, o, down and attention; k and v; LoRA; log-sums
    assert held == 5 * 2 * 18944
    assert wide == 2 * 2 * 18944 and inputs == 2 * (6 * 3584 + 18944)  # no dropout, and so no masks
    assert wide_share(model) == 2 * 18944 / (3 * 18944 + 2 * 3584 + 2 * 512)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_fits_the_gpu_that_it_states(path):
    settings = parse_config(["--config", str(path), "--use_cpu", "true", "--fp16", "false"])
    _, training, model = settings
    stated = int(re.search(r"on one GPU with (\d+) GB", path.read_text().splitlines()[0])[1])
    plans = plan_recipes_model(model.model_name_or_path, ("--config", "configs/skin.yaml"))
    batch = settings.pack_tokens
    if batch == AUTO:
        batch = page.plan_packs(plans, settings, 4096, stated)
    _, plan = page.choose_plan(plans, training.gradient_checkpointing, model.load_in_4bit, batch, stated)
    print(f"{path.stem}: {plan.total(batch) / 1e9:.1f} of {stated} GB, {plan.name}")
    assert plan.total(batch) / 1e9 <= 0.95 * stated  # the driver and the screen take some


@pytest.mark.slow
def test_processes_that_share_the_base_hold_their_part_and_three_layers():
    shard = plan_recipes_model("Qwen/Qwen2.5-VL-32B-Instruct", ("--shard_base", "true"))[True, True].fixed
    whole = plan_recipes_model("Qwen/Qwen2.5-VL-32B-Instruct", ())[True, True].fixed
    language = whole["language layers, NF4"]
    assert shard.pop("complete layers") == 3 * language // 64
    embedding = whole["embeddings, LM head"] // 2
    assert shard.pop("buffer of the embedding") == embedding - 2 * language // 64
    halved = {"vision tower", "embeddings, LM head", "language layers, NF4"}
    assert shard == {name: size // 2 if name in halved else size for name, size in whole.items()}


@pytest.mark.slow
def test_an_embedding_in_the_hosts_memory_is_missing_from_the_plan():
    host = plan_recipes_model("Qwen/Qwen2.5-VL-7B-Instruct", ("--offload_embedding", "true"))[True, True].fixed
    whole = plan_recipes_model("Qwen/Qwen2.5-VL-7B-Instruct", ())[True, True].fixed
    both = whole.pop("embeddings, LM head")
    assert both == 2 * 152064 * 3584 * 2 == 2 * host.pop("LM head")
    assert host == whole


def test_an_embedding_that_is_the_head_or_on_the_host_is_not_shared():
    parts = {"embeddings, LM head": 100, "language layers, NF4": 80}
    assert divide_weights(parts, 2, layers=8, tied=True) == {
        **parts,
        "language layers, NF4": 40,
        "complete layers": 30,
    }
    parts = {"LM head": 50, "language layers, NF4": 80}
    assert divide_weights(parts, 2, layers=8, tied=False) == {
        "LM head": 25, "language layers, NF4": 40, "complete layers": 30,
    }  # fmt: skip


def test_the_largest_batch_just_fits():
    plan = plan_small()
    tokens = plan.largest(2e9)
    assert plan.total(tokens) <= 2e9 < plan.total(tokens + 256)
    assert plan.largest(1e6) == 0


@pytest.mark.parametrize(
    ("gpu", "batch", "lines"),
    [
        (3.0, 4096, ["fits       3 GB"]),
        (1.9, 4096, ["too large  for 1.9 GB", "with offload_embedding: true it fits as it is", "small fits, with"]),
        (0.65, 4096, ["too large  for 0.65 GB", "with offload_embedding: true small fits, with batches of up to"]),
        (
            0.1,
            4096,
            ["too large  for 0.1 GB", "nothing in the table fits: use a smaller model, or lower max_pixels and"],
        ),
    ],
)
def test_the_verdict_names_the_smallest_change_that_fits(capsys, gpu, batch, lines):
    plan = plan_small()
    code = page.print_verdict([plan], plan, batch, 256, gpu, spare=5 * 10**8)
    said = capsys.readouterr().out.splitlines()
    assert code == (0 if "fits" in lines[0] else 1)
    assert len(said) == len(lines) and all(line in found for line, found in zip(lines, said, strict=True)), said


def plan_small():
    model = add_lora(build_without_weights(small_config(128, 512, 4, 2, 64), torch.float32), LORA)
    traced = trace_step(model, tokens=512, image_tokens=0, checkpointing=True, dtype=torch.float32)
    return MemoryPlan("small", {"weights": 1}, traced, 512, text_share=1.0, hidden=128, itemsize=4)


def test_qwen3_traces_through_its_deep_stack():
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1}
    text |= {"num_key_value_heads": 1, "head_dim": 64, "vocab_size": 512}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 1, "out_hidden_size": 64}
    config = Qwen3VLConfig(
        text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]}, image_token_id=5
    )
    model = add_lora(build_without_weights(config, torch.float32), LORA)
    traced = trace_step(model, tokens=64, image_tokens=32, checkpointing=False, dtype=torch.float32)
    assert traced.peak >= traced.saved > traced.tower > 0


@pytest.mark.parametrize("name", [max(family.shapes) for family in FAMILIES.values()])
def test_a_tiny_model_keeps_vocabulary_and_patches(name):
    config = published_config(name)
    tiny = tiny_config(config)
    assert type(tiny) is type(config)
    assert tiny.text_config.vocab_size == config.text_config.vocab_size
    assert tiny.vision_config.patch_size == config.vision_config.patch_size
    assert sum(p.numel() for p in build_without_weights(tiny, torch.float32).parameters()) < 45e6


def test_optimizers_bytes_go_by_their_names():
    assert optimizer_bytes("adamw_torch_fused") == 8
    assert optimizer_bytes("paged_adamw_8bit") == 2 * (1 + 4 / 256)
    assert optimizer_bytes("lion_32bit") == 4
    assert optimizer_bytes("sgd") == 0


def test_lengths_and_steps():
    lengths = SampleLengths(total=[100, 200, 300, 400], image=[50, 150, 250, 350])
    assert describe_lengths(lengths) == "250 a sample, median 250, 95 % up to 400, longest 400; 80 % image"
    assert steps_per_epoch(lengths.total, pack_tokens=500, batch=1, accumulate=2, seed=0, epochs=2) == 1
    assert steps_per_epoch(lengths.total, pack_tokens=None, batch=1, accumulate=3, seed=0, epochs=2) == 2


def test_a_step_has_the_samples_of_the_recipe_though_an_epoch_ends_with_a_smaller_one(capsys):
    args = SimpleNamespace(
        max_steps=100, num_train_epochs=3, per_device_train_batch_size=4, gradient_accumulation_steps=1
    )
    settings = SimpleNamespace(training=args, pack_tokens=None, order_seed=0)
    found = page.print_steps(SampleLengths(total=[48] * 6, image=[16] * 6), settings)
    assert found == (100, 50, 4)
    assert capsys.readouterr().out == "steps      100 of 4 samples; 50 epochs\n"


def test_probable_mistakes_give_warnings():
    splits = {"train": {"label": ["nevus", "melanoma"]}, "test": {"label": ["nevus", None]}}
    warnings = find_warnings(splits, learning_rate=2e-4, samples_per_step=4, warmup=2)
    assert warnings == [
        "learning_rate 0.0002 is high for steps of 4 samples: above 0.0001",
        "warmup_steps: 2 are few; Adam's averages need some steps before the full rate",
        "test has no sample of melanoma",
    ]
    assert find_warnings(None, learning_rate=2e-4, samples_per_step=32, warmup=10) == []


def test_the_plan_says_which_settings_come_too_late_for_the_run(capsys):
    args = parse_config(["--config", "configs/demo.yaml", "--warmup_steps", "3", "--logging_steps", "3"]).training
    page.print_warnings(None, args, page.Steps(run=3, epochs=1, samples=32))
    page.print_warnings(None, args, page.Steps(run=None, epochs=None, samples=32))
    line = "warning    warmup_steps: 3 cover all 3 steps of the run; the rate never reaches its peak"
    assert [text for text in capsys.readouterr().out.splitlines() if "warmup" in text] == [line]


def test_an_unreachable_model_is_planned_from_its_published_shapes(demo_data, capsys):
    words = ["--config", "configs/skin.yaml", "--dataset_path", str(demo_data), "--gpu", "10"]
    assert plan_run.main(words) == 1
    page = capsys.readouterr().out
    assert "Qwen/Qwen2.5-VL-7B-Instruct: cannot be read here, its shapes are known" in page
    assert "no tokenizer here: image tokens are exact" in page
    assert "20,185,088 parameters: language model 20,185,088" in page
    assert "* NF4, checkpointing" in page
    assert "too large  for 10 GB" in page
    lines = page[page.index("too large") :].splitlines()[1:]
    assert lines[0].strip() == "with offload_embedding: true it fits as it is"
    assert re.fullmatch(r"NF4, checkpointing fits, with batches of up to [\d,]+ tokens", lines[1].strip())
    assert "NF4, checkpointing fits, with batches of up to" in page
    assert max(map(len, page.splitlines())) <= 100


def test_without_model_or_data_there_is_one_line_or_a_plan_of_memory(tiny_base, tmp_path, capsys):
    assert run(lambda: plan_run.main(["--model_name_or_path", "nobody/nothing"])) == 1
    assert capsys.readouterr().err.startswith("error: model_name_or_path: no model in 'nobody/nothing', ")
    with pytest.raises(SystemExit):
        plan_run.main(["--lerning_rate", "1"])
    assert capsys.readouterr().err.startswith("plan_run.py: unknown option '--lerning_rate'; did you mean")
    words = train_args(tiny_base, tmp_path / "none", tmp_path / "out")
    assert plan_run.main([*words, "--gpu", "8"]) == 0
    page = capsys.readouterr().out
    assert "only memory, at 80 % image tokens" in page
    assert "fits       8 GB" in page


@pytest.mark.parametrize("packed", [False, True])
def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny_base, demo_data, tmp_path, capsys, packed):
    settings = {"dry_run": "true"}
    if packed:
        settings |= {"packing": "true", "attn_implementation": "varlen", "pack_tokens": 512}
        settings |= {"per_device_train_batch_size": 1, "model_name_or_path": tiny_base}
    words = train_args(tiny_base, demo_data, tmp_path / "out", **settings)
    assert run(lambda: train_sft.main(words)) == 0
    page = capsys.readouterr().out
    assert "3 batches collated, one forward and backward in a tiny model: loss " in page
    assert "largest batch, tokens" in page
    assert list(Path(tmp_path).iterdir()) == []


def test_a_dry_run_ends_with_one_line_on_bad_data(tiny_base, demo_data, tmp_path, capsys):
    words = train_args(tiny_base, demo_data, tmp_path / "out", dry_run="true", max_length=20)
    assert run(lambda: train_sft.main(words)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: max_length: ")
    assert len(error.splitlines()) == 1
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize("limits", [{"max_pixels": 784}, {"min_pixels": 200000}, {"max_pixels": 100}])
def test_wrong_pixel_limits_are_an_error_with_and_without_the_processor(
    tiny_base, demo_data, tmp_path, capsys, limits
):
    rule = r"error: (min_pixels \d+ is above max_pixels \d+|max_pixels: expected at least 784)"
    for base in (tiny_base, "Qwen/Qwen2.5-VL-7B-Instruct"):
        words = train_args(base, demo_data, tmp_path / "out", **limits)
        assert run(lambda words=words: plan_run.main(words)) == 1
        assert re.match(rule, capsys.readouterr().err)


def test_the_plan_packs_in_the_order_of_the_run(tiny_base, demo_data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(page, "steps_per_epoch", lambda *args, seed, **options: seen.append(seed) or 1)
    for options in ({"seed": 7}, {"seed": 7, "data_seed": 11}):
        assert plan_run.main(train_args(tiny_base, demo_data, tmp_path / "out", **options)) == 0
    assert seen == [7, 11]


def test_the_plan_leaves_out_what_the_run_would(tiny_base, demo_data, tmp_path, capsys):
    words = train_args(tiny_base, demo_data, tmp_path / "out", max_steps=-1, num_train_epochs=1)
    with pytest.raises(ValueError, match="too_long: all 32 train samples are over max_length 20"):
        plan_run.main([*words, "--max_length", "20", "--too_long", "drop"])
    assert "too long   32 samples are over max_length 20, and left out" in capsys.readouterr().out


def test_a_plan_whose_run_would_refuse_samples_ends_with_1(tiny_base, demo_data, tmp_path, capsys):
    assert plan_run.main([*train_args(tiny_base, demo_data, tmp_path / "out"), "--max_length", "20"]) == 1
    assert (
        "32 samples are over max_length 20: the run refuses them, see max_length and too_long"
        in capsys.readouterr().out
    )


def test_a_pack_that_is_too_small_names_the_number_that_fits(tiny_base, demo_data, tmp_path):
    packed = {"packing": "true", "attn_implementation": "varlen", "pack_tokens": 256, "max_length": 4096}
    words = train_args(tiny_base, demo_data, tmp_path / "out", **packed, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match=r"found 4096 and 256; the longest sample has \d+, so set max_length: \d+$"):
        plan_run.main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stray"], "unexpected argument 'stray'"),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value"),
        (["--no-4bit"], "unknown option '--no_4bit'; use --load_in_4bit false"),
    ],
)
def test_plan_run_signs_its_errors(capsys, words, message):
    with pytest.raises(SystemExit):
        plan_run.main(words)
    assert capsys.readouterr().err.startswith(f"plan_run.py: {message}")


def test_a_wrong_value_in_a_recipe_is_signed_too(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("lora_r: many\n")
    with pytest.raises(SystemExit):
        plan_run.main(["--config", str(tmp_path / "a.yaml")])
    assert "a.yaml: lora_r: invalid int value: 'many'" in capsys.readouterr().err
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nseed: 3\n")
    with pytest.raises(SystemExit):
        plan_run.main(["--config", str(tmp_path / "b.yaml")])
    assert "a.yaml: lora_r: invalid int value: 'many'" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--shard_base", "true"], ["--compile_layers", "false"]])
def test_selective_recomputation_without_complete_compiled_layers_is_refused(more):
    words = [
        "--config",
        "configs/skin.yaml",
        "--dataset_path",
        "/nope",
        "--gradient_checkpointing",
        "selective",
        *more,
    ]
    with pytest.raises(ValueError, match="gradient_checkpointing: selective"):
        plan_run.main(words)
