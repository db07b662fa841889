"""What must hold for every model family, each with its published classes."""

import json
import re
import shutil

from common.cli import run

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessor, LlavaProcessor
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.utils import is_flash_linear_attention_available

import merge_adapter
import predict
import train_sft
from collator import VisionSFTCollator, encode, load_pixels, render, render_prompt
from demo.tiny_model import save_tiny_model
from evaluation.generation import generate, score_answers
from helpers.runs import TEXTS, train_args
from helpers.stored import save_stored
from helpers.weights import bytes_of
from models.adapters import load_answering_model
from models.attention import use_varlen
from models.families import FAMILIES, NAMES
from models.loading import load_config, load_model, load_processor
from models.lora import build_lora_config, check_trainable, count_trainable
from models.sharding import sharded_units
from planning.shapes import weight_bytes
from training.lengths import measure_lengths

WITHOUT_BORDERS = modeling_qwen3_5.torch_chunk_gated_delta_rule
LAYERS = 3  # one after the two that Qwen3-VL's tower adds to
THINKING = [f"{name}-thinking" for name, family in FAMILIES.items() if family.thinks and not family.experts]
STORED = "qwen2_5_vl-stored"  # comes in 4 bit, two language layers and some of the tower's in 16 bit
SKIPPED = ["lm_head", "model.visual.merger", "model.visual.blocks.0.mlp"]
SKIPPED += [f"model.language_model.layers.{path}" for path in ("0.mlp.down_proj", "2.self_attn.q_proj")]
PACKED = {"packing": "true", "pack_tokens": 256, "per_device_train_batch_size": 1}
BY_LENGTH = {"packing": "false", "train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2}
SETTINGS = {
    "max_pixels": 12544,
    "max_length": 256,
    "attn_implementation": "varlen",
    "per_device_eval_batch_size": 1,
    "freeze_vision_encoder": "false",
    "train_merger": "true",
    "learning_rate": 1e-2,
    "warmup_steps": 0,
}


@pytest.fixture(scope="module", params=[*FAMILIES, *THINKING, STORED])
def variant(request):
    """A family; one that thinks a second time with `thinking: on`; one whose base comes in 4 bit."""
    if FAMILIES[request.param.partition("-")[0]].linear_attention and is_flash_linear_attention_available():
        pytest.skip("transformers takes the kernels of flash-linear-attention where they are installed, on a CPU too")
    return request.param


@pytest.fixture(scope="module")
def family(variant):
    return variant.partition("-")[0]


@pytest.fixture(scope="module")
def thinking(variant):
    return "on" if variant in THINKING else "off"


@pytest.fixture(scope="module")
def settings(family, thinking):
    return {**SETTINGS, **(BY_LENGTH if FAMILIES[family].linear_attention else PACKED), "thinking": thinking}


@pytest.fixture(scope="module")
def base_in_16_bit(family, tmp_path_factory):
    """A folder with a tiny model of the family, its head tied to its embeddings as in the real small ones."""
    folder = tmp_path_factory.mktemp(family)
    save_tiny_model(folder, TEXTS, hidden_size=64, num_layers=LAYERS, family=family, tied=True)
    return folder


@pytest.fixture(scope="module")
def base(base_in_16_bit, variant, tmp_path_factory):
    if variant == STORED:
        return save_stored(base_in_16_bit, tmp_path_factory.mktemp(variant), SKIPPED)
    return base_in_16_bit


@pytest.fixture
def processor(base, family, thinking):
    limits = {"min_pixels": FAMILIES[family].token_side ** 2, "max_pixels": 112 * 112}
    return load_processor(str(base), **limits, thinking=thinking)


@pytest.fixture
def plain(base, variant):
    if variant == STORED:
        return load_model(str(base), quantization="stored", dtype="float32").eval()
    return AutoModelForImageTextToText.from_pretrained(base).eval()


@pytest.fixture(params=["sdpa", "varlen"])
def model(request, plain, family, monkeypatch):
    """A model that packs keep their samples apart in."""
    if FAMILIES[family].linear_attention:
        if request.param == "sdpa":
            pytest.skip("linear attention takes borders by `use_varlen` only")
        for module in (modeling_qwen3_5, modeling_qwen3_5_moe):
            monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", rule_with_borders)
    if request.param == "varlen":
        use_varlen(plain)
    return plain


def rule_with_borders(query, key, value, *, g, beta, cu_seqlens=None, **options):
    """What flash-linear-attention's kernel does, by transformers' own recurrence for each sample."""
    rule = WITHOUT_BORDERS
    if cu_seqlens is None:
        return rule(query, key, value, g=g, beta=beta, **options)
    sides = [x.split(cu_seqlens.diff().tolist(), dim=1) for x in (query, key, value, g, beta)]
    outputs = [rule(q, k, v, g=g, beta=b, **options)[0] for q, k, v, g, b in zip(*sides, strict=True)]
    return torch.cat(outputs, dim=1), None


def linear_layers(model, path):
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and path in name}


def photo(width, height):
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def sample(name, images, *texts):
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"id": name, "images": [photo(*size) for size in images], "image_sizes": images, "messages": messages}


SAMPLES = [
    sample("two images", [(112, 112), (70, 150)], "<image>What?", "It is\n\nmelanoma.", "And <image>? Dark?", "light"),
    sample("no image", [], "Hello?", "It is psoriasis."),
    sample("one image", [(130, 97)], "<image>\nWhat condition is shown?", "vitiligo"),
    sample("narrow", [(31, 300)], "Look <image> here", "This is melanoma."),
]
PROMPTS = [{**one, "messages": one["messages"][:-1]} for one in SAMPLES]
ANSWERS = ["melanoma", "It is psoriasis, vitiligo, urticaria."]


def test_exactly_the_answers_and_their_ends_are_supervised(processor, thinking):
    """With thoughts, an empty one is learnt where an answer has none; without, it belongs to the prompt."""
    encode_text = processor.tokenizer.encode
    start = "<think>\n\n</think>\n\n" if thinking == "on" else ""
    for one in SAMPLES:
        labels = VisionSFTCollator(processor)([one])["labels"][0]
        answers = [m["content"] for m in one["messages"] if m["role"] == "assistant"]
        expected = [token for text in answers for token in encode_text(f"{start}{text}<|im_end|>")]
        assert labels[labels != -100].tolist() == expected


def test_a_batch_equals_the_processors(processor):
    texts = [render(processor, one["messages"]) for one in SAMPLES]
    images = [image for one in SAMPLES for image in load_pixels(one, processor)]
    options = {"text_kwargs": {"padding": True}, "images_kwargs": {"do_resize": False}, "return_tensors": "pt"}
    theirs = processor(text=texts, images=images, **options)
    ours = encode(processor, SAMPLES, texts, padding_side="right")
    assert set(ours) == set(theirs)
    assert all(torch.allclose(ours[name], value, atol=1e-6) for name, value in theirs.items())


def test_measured_lengths_equal_the_collated_ones(processor):
    table = Dataset.from_list([{**one, "images": None, "label": None} for one in SAMPLES])
    lengths = measure_lengths(table, processor)
    batches = [VisionSFTCollator(processor)([one]) for one in SAMPLES]
    assert lengths.total == [batch["input_ids"].size(1) for batch in batches]
    assert lengths.image == [int(batch["mm_token_type_ids"].sum()) for batch in batches]


def test_a_token_covers_the_area_that_the_processor_says(processor, base, family):
    side = FAMILIES[family].token_side
    square = {"id": "x", **sample("x", [(4 * side, 4 * side)], "<image>", "x")}
    processor.image_processor.size = {"shortest_edge": 1024, "longest_edge": 160 * 160}
    assert VisionSFTCollator(processor)([square])["mm_token_type_ids"].sum() == 16
    with pytest.raises(ValueError, match=f"max_pixels: expected at least {side**2}, the area of one token, found 700"):
        load_processor(str(base), max_pixels=700)


def test_positions_are_those_of_the_model(processor, plain):
    row, start = VisionSFTCollator(processor, packed=True)(SAMPLES), 0
    for one in SAMPLES:
        batch = VisionSFTCollator(processor)([one])
        names = ("input_ids", "image_grid_thw", "mm_token_type_ids", "attention_mask")
        expected, _ = plain.model.get_rope_index(**{name: batch[name] for name in names if name in batch})
        end = start + batch["input_ids"].size(1)
        assert torch.equal(row["position_ids"][1:, :, start:end], expected)
        assert torch.equal(row["position_ids"][0, 0, start:end], torch.arange(end - start))
        start = end
    assert row["position_ids"].shape == (4, 1, start)


def test_a_pack_has_the_logits_loss_and_gradients_of_separate_samples(processor, model):
    pack = VisionSFTCollator(processor, packed=True)(SAMPLES[:3])
    together = model(**pack, use_cache=False)
    together.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits, losses = [], []
    for one in SAMPLES[:3]:
        batch = VisionSFTCollator(processor)([one])
        alone = model(**batch)
        logits.append(alone.logits.detach())
        losses.append(alone.loss * (batch["labels"] != -100).sum())
    loss = sum(losses) / (pack["labels"] != -100).sum()
    loss.backward()
    assert (together.logits - torch.cat(logits, dim=1)).abs().max() < 1e-4
    assert together.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert all(
        torch.allclose(gradients[name], p.grad, atol=1e-5) for name, p in model.named_parameters() if name in gradients
    )


@torch.no_grad()
def test_every_image_feature_reaches_the_answer(processor, plain):
    """Otherwise exact packs would prove nothing about what Qwen3-VL adds after its first layers."""
    batch = VisionSFTCollator(processor)(SAMPLES[:1])
    before = plain(**batch).logits[0, -1]
    mergers = [m for name, m in plain.model.visual.named_children() if "merger" in name]
    last = [layers[-1] if isinstance(layers, torch.nn.ModuleList) else layers for layers in mergers]
    for merger in last:
        hook = merger.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        assert (plain(**batch).logits[0, -1] - before).abs().max() > 1e-3
        hook.remove()


@pytest.mark.parametrize("tied", [True, False])
def test_exactly_the_language_models_linear_layers_are_in_nf4(base, family, variant, tied, tmp_path):
    """Of a base that comes in 4 bit: exactly what it comes with."""
    if not tied:
        base = tmp_path
        save_tiny_model(base, TEXTS, hidden_size=64, num_layers=LAYERS, family=family)
        base = save_stored(base, tmp_path / "stored", SKIPPED) if variant == STORED else base
    model = load_model(str(base), quantization="nf4", dtype="float32")
    expected = linear_layers(model, "model.language_model.layers.")
    if variant == STORED:
        expected = {name for name in linear_layers(model, "") if not name.startswith(tuple(SKIPPED))}
    assert len(expected) >= 4 * LAYERS
    assert {name for name, module in model.named_modules() if isinstance(module, Linear4bit)} == expected
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_planned_weights_are_those_of_the_loaded_model(base, variant, quantization):
    if variant == STORED and quantization is None:
        pytest.skip("it cannot be loaded in 16 bit")
    model = load_model(str(base), quantization=quantization, dtype="float32")
    options = {"quantized": quantization is not None, "double_quant": True, "dtype": torch.float32}
    assert sum(weight_bytes(load_config(str(base)), **options).values()) == pytest.approx(bytes_of(model), rel=0.01)


@pytest.mark.parametrize("flags", [{}, {"train_vision": True}, {"train_merger": True}], ids=str)
def test_lora_reaches_exactly_the_requested_parts(base, family, flags):
    model = load_model(str(base), quantization="nf4", dtype="float32")
    language = {
        name for name in linear_layers(model, "language_model.layers") if name.endswith(FAMILIES[family].lora_targets)
    }
    adapted = {"train_vision": linear_layers(model, "visual.blocks."), "train_merger": linear_layers(model, "merger")}
    assert len(language) >= 3 * LAYERS and [len(part) >= 2 for part in adapted.values()] == [True, True]
    model = get_peft_model(model, build_lora_config(model, r=4, lora_alpha=8, lora_dropout=0.0, **flags))
    expected = set().union(language, *(part for flag, part in adapted.items() if flag in flags))
    assert set(model.targeted_module_names) == expected
    check_trainable(model, **{"train_vision": False, "train_merger": False, **flags})
    assert count_trainable(model)["other"] == 0


@pytest.fixture(scope="module")
def adapter(base, demo_data, settings, tmp_path_factory):
    """Four NF4 steps, packed where the family can, that adapt language model, tower and merger."""
    out = tmp_path_factory.mktemp("run") / "adapter"
    train_sft.main(train_args(base, demo_data, out, **settings))
    return out


def test_a_resumed_run_leaves_the_same_adapter_file(base, demo_data, settings, adapter, tmp_path):
    shutil.copytree(adapter / "checkpoint-2", tmp_path / "checkpoint-2")
    train_sft.main(train_args(base, demo_data, tmp_path, **settings))
    files = [folder / "adapter_model.safetensors" for folder in (adapter, adapter / "checkpoint-2", tmp_path)]
    complete, half, resumed = (file.read_bytes() for file in files)
    assert resumed == complete != half


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_packs_that_would_not_be_exact_are_refused_at_the_start(base, family, demo_data, settings, tmp_path, capsys):
    if not FAMILIES[family].linear_attention:
        pytest.skip("packs are exact everywhere")
    words = train_args(base, demo_data, tmp_path / "out", **{**SETTINGS, **PACKED})
    for dry_run in ("false", "true"):
        assert run(lambda: train_sft.main([*words, "--dry_run", dry_run])) == 1  # noqa: B023
        error = capsys.readouterr().err.strip()
        assert error.startswith(
            f"error: packing: in {FAMILIES[family].name}, samples of a pack stay apart only on a GPU"
        )
        assert "pip install flash-linear-attention, or set packing: false and" in error and "\n" not in error


def test_the_adapters_folder_asks_as_its_training_did(adapter, processor, family, thinking):
    assert json.loads((adapter / "run.json").read_text())["thinking"] == thinking
    end = ("<think>\n" if thinking == "on" else "<think>\n\n</think>\n\n") if FAMILIES[family].thinks else ""
    for one in PROMPTS:
        prompts = {render_prompt(side, one["messages"]) for side in (processor, load_processor(str(adapter)))}
        assert len(prompts) == 1 and prompts.pop().endswith(f"<|im_start|>assistant\n{end}")


@pytest.mark.slow
def test_recomputed_activations_leave_the_same_adapter(base, demo_data, settings, adapter, tmp_path):
    train_sft.main(train_args(base, demo_data, tmp_path, **settings, gradient_checkpointing="true"))
    expected, recomputed = weights(adapter), weights(tmp_path)
    assert all(torch.allclose(recomputed[name], value, atol=1e-6) for name, value in expected.items())


@pytest.mark.slow
def test_compiled_layers_leave_nearly_the_same_adapter(base, demo_data, settings, tmp_path):
    settings = {**settings, "learning_rate": 1e-3}
    for name in ("true", "false"):
        train_sft.main(train_args(base, demo_data, tmp_path / name, **settings, compile_layers=name))
    expected, compiled = weights(tmp_path / "false"), weights(tmp_path / "true")
    assert all(torch.allclose(compiled[name], value, atol=1e-5) for name, value in expected.items())


def test_the_merged_model_has_the_adapters_logits(adapter, base_in_16_bit, variant, tmp_path, capsys):
    words = ["--adapter", str(adapter), "--out", str(tmp_path / "model"), "--dtype", "float16"]
    merge_adapter.main([*words, *(["--base", str(base_in_16_bit)] if variant == STORED else [])])
    out = capsys.readouterr().out
    distance, effect = map(float, re.search(r"logits +([\d.]+)% from .* base's by ([\d.]+)%", out).groups())
    assert distance < 1 < 10 < effect


def test_an_adapter_answers_about_images(adapter, demo_data, thinking, tmp_path, capsys):
    """With thoughts, an answer starts with the opening that its prompt ends with: a cut one is known as a thought."""
    out = tmp_path / "answers.jsonl"
    predict.main(["--adapter", str(adapter), "--dataset", str(demo_data), "--out", str(out), "--max-new-tokens", "8"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4 and all(row["prediction"].startswith("<think>") == (thinking == "on") for row in rows)


def test_answers_and_their_scores_do_not_depend_on_the_batch(base, processor):
    settings = {"quantization": "nf4", "dtype": "float32"}
    model = load_answering_model(None, base=str(base), **settings)
    alone = [score_answers(model, processor, [one], [ANSWERS]) for one in PROMPTS]
    together = score_answers(model, processor, PROMPTS, [ANSWERS] * len(PROMPTS))
    assert torch.allclose(torch.cat(alone), together, atol=1e-4)
    assert generate(model, processor, PROMPTS, 6)[0] == [generate(model, processor, [one], 6)[0][0] for one in PROMPTS]


@torch.no_grad()
def test_scored_answers_have_the_likelihoods_of_complete_sequences(base, processor):
    """Not shared: prompt and answer in one pass, without a cache."""
    model = load_answering_model(None, base=str(base), quantization="auto", dtype="float32")
    shared = score_answers(model, processor, PROMPTS, [ANSWERS] * len(PROMPTS))
    for one, row in zip(PROMPTS, shared, strict=True):
        prompt = render_prompt(processor, one["messages"], skip_thought=True)
        for answer, score in zip(ANSWERS, row, strict=True):
            batch = encode(processor, [one], [f"{prompt}{answer}<|im_end|>"], padding_side="right")
            count = len(processor.tokenizer(f"{answer}<|im_end|>")["input_ids"])
            ids, logs = batch["input_ids"][0, -count:], model(**batch).logits[0, -count - 1 : -1].log_softmax(-1)
            assert logs.gather(1, ids[:, None]).sum().item() == pytest.approx(score.item(), abs=1e-4)


def test_fsdp2_shards_all_matrices_and_a_layer_at_a_time(plain):
    units = sharded_units(plain)
    inside = {id(p) for unit in units for p in unit.parameters()}
    outside = {
        name.removeprefix("model.language_model."): p for name, p in plain.named_parameters() if id(p) not in inside
    }
    assert {name: p.ndim for name, p in outside.items()} == {"embed_tokens.weight": 2, "norm.weight": 1}  # tied
    layers = [plain.get_submodule(f"model.language_model.layers.{n}") for n in range(LAYERS)]
    assert [unit for unit in units if unit in layers] == layers


@pytest.mark.parametrize("kind", ["qwen3_omni_moe", "qwen2", "llava", "qwen2_5_omni"])
def test_a_model_of_another_family_is_refused_before_its_weights(kind, tmp_path, demo_data, capsys):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    rule = f"'{tmp_path}': expected a model of {NAMES}; its model_type is {kind}"
    for check in (load_config, lambda name: load_model(name, quantization=None, dtype="float32")):
        with pytest.raises(ValueError, match=re.escape(rule)):
            check(str(tmp_path))
    assert run(lambda: train_sft.main(train_args(tmp_path, demo_data, tmp_path / "out"))) == 1
    assert capsys.readouterr().err.strip() == f"error: {rule}"


def test_a_processor_of_another_family_is_refused(processor, tmp_path):
    LlavaProcessor(CLIPImageProcessor(), processor.tokenizer, patch_size=14).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{NAMES}; its processor is a LlavaProcessor"):
        load_processor(str(tmp_path))


def test_another_generation_prompt_is_refused(processor):
    """As in Qwen3-VL's thinking models: prompts would differ between training and inference."""
    opening = "{% if add_generation_prompt %}<thought>\n{% endif %}"
    processor.chat_template += opening
    with pytest.raises(ValueError, match=r"expected the generation prompt .*, found .*<thought>"):
        VisionSFTCollator(processor)
