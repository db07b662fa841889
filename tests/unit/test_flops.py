"""Operations of a training step, counted by hand; what the log makes of them."""

import time

import pytest
import torch
from peft import get_peft_model

from collator import VisionSFTCollator
from models.families import FAMILIES, published_config
from models.flops import (
    BatchShape,
    language_weights,
    recomputed_flop,
    shape_of_batch,
    shape_of_samples,
    useful_flop,
    wide_share,
    work_of,
)
from models.loading import load_model
from models.lora import build_lora_config
from planning.shapes import add_lora, build_without_weights
from training.speed import SpeedCallback, format_speed

LORA = {"r": 8, "lora_alpha": 16}
CPU = torch.device("cpu")


def work_7b(**lora):
    return work_of(
        add_lora(build_without_weights(published_config("Qwen2.5-VL-7B"), torch.bfloat16), {**LORA, **lora})
    )


def test_the_work_of_a_7b_model_is_that_of_its_shapes():
    work, hidden, wide, tower = work_7b(), 3584, 18944, 1280
    layer = 2 * hidden**2 + 2 * 512 * hidden + 3 * hidden * wide
    assert work.language == 28 * layer
    assert work.trained == 20_185_088
    block = 4 * tower**2 + 3 * tower * 3420
    assert work.tower == 32 * block + 3 * 2 * 14**2 * tower
    assert work.merger == (4 * tower) ** 2 + 4 * tower * hidden
    assert (work.attention, work.merge, work.window) == (28 * hidden, 4, 64)
    assert (work.tower_attention, work.window_attention, work.tower_trains) == (4 * tower, 28 * tower, False)


def test_frozen_weights_cost_four_operations_a_token_and_trained_ones_six():
    work, sample = work_7b(), BatchShape(tokens=100, squares=0, patches=0, patch_squares=0)
    assert useful_flop(work, sample) == 100 * (4 * work.language + 6 * work.trained)
    assert recomputed_flop(work, sample, 1.0) == 100 * 2 * (work.language + work.trained)
    assert recomputed_flop(work, sample, 0.25) == 100 * 0.25 * 2 * work.language
    assert recomputed_flop(work, sample, 0.0) == 0


def test_tokens_that_the_last_layer_spares_cost_no_mlp_there():
    work, sample = work_7b(), BatchShape(tokens=100, squares=0, patches=0, patch_squares=0)
    assert work.last_mlp == 3 * 3584 * 18944
    less = useful_flop(work, sample) - useful_flop(work, sample._replace(spared=80))
    assert less == 80 * 4 * work.last_mlp
    assert work_of(build_without_weights(published_config("Qwen3-VL-30B-A3B"), torch.bfloat16)).last_mlp == 0


def test_attention_is_counted_by_the_samples_of_a_pack_and_a_frozen_tower_forward_only():
    work = work_7b()
    one, two = shape_of_samples([400], [0], work.merge), shape_of_samples([200, 200], [0, 0], work.merge)
    assert (one.squares, two.squares) == (160_000, 80_000)
    assert useful_flop(work, one) - useful_flop(work, two) == 3 * 2 * work.attention * 80_000
    image = BatchShape(tokens=0, squares=0, patches=1344, patch_squares=1344**2)
    windows = 4 * (work.tower_attention * 1344**2 + work.window_attention * 64 * 1344)
    assert useful_flop(work, image) == 2 * (work.tower + work.merger / 4) * 1344 + windows
    trained = work_7b(train_vision=True)
    assert trained.tower_trains and trained.language == work.language
    assert useful_flop(trained, image) > 2 * useful_flop(work, image)
    assert recomputed_flop(work, image, 1.0) == 0 < recomputed_flop(trained, image, 1.0)


@pytest.mark.parametrize("name", [max(family.shapes) for family in FAMILIES.values()])
def test_every_family_has_a_count(name):
    model = build_without_weights(published_config(name), torch.bfloat16)
    work = work_of(model)
    assert work.language == language_weights(model) and work.trained == 0
    assert all(value > 0 for value in (work.language, work.tower, work.merger, work.attention, work.tower_attention))
    assert 0 <= wide_share(model) < 1


def test_a_loaded_model_in_nf4_has_the_work_of_its_shapes(tiny_base):
    models = [load_model(str(tiny_base), quantization=kind, dtype=torch.float32) for kind in ("nf4", None)]
    adapted = [get_peft_model(model, build_lora_config(model, **LORA)) for model in models]
    assert work_of(adapted[0]) == work_of(adapted[1])


def test_a_batch_has_the_same_shape_packed_and_padded(processor, demo_splits):
    samples = list(demo_splits["test"])[:3]
    packed, padded = (shape_of_batch(VisionSFTCollator(processor, packed=kind)(samples)) for kind in (True, False))
    alone = [shape_of_batch(VisionSFTCollator(processor)([sample])) for sample in samples]
    assert padded == BatchShape(*map(sum, zip(*alone, strict=True))) == packed._replace(spared=0)
    learnt = sum((VisionSFTCollator(processor)([sample])["labels"] != -100).sum() for sample in samples)
    assert packed.spared == packed.tokens - learnt
    assert packed.tokens**2 > packed.squares > packed.tokens and packed.patches > 0


def test_the_log_has_the_steps_between_its_lines_without_the_first_step_and_evaluations(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    work = work_7b()
    speed = SpeedCallback(work, device=CPU)
    speed.recomputed, speed.ceiling = 1.0, 1e12
    speed.on_train_begin(None, None, None)

    def step(seconds):
        speed.add(BatchShape(50, 0, 0, 0))
        speed.add(BatchShape(50, 0, 0, 0))
        now[0] += seconds
        speed.on_step_end(None, None, None)

    step(100.0)  # compiles
    assert speed.read() == {}
    step(2.0)
    now[0] += 50.0
    speed.on_evaluate(None, None, None)
    step(3.0)
    found = speed.read()
    language = 4 * work.language + 6 * work.trained
    assert found["tokens_per_second"] == 200 / 5
    assert found["tflops"] == pytest.approx(40 * language / 1e12, rel=1e-3)
    assert found["mfu"] == pytest.approx(40 * language / 1e12, rel=1e-3)
    assert found["hfu"] == pytest.approx(40 * (language + 2 * work.language + 2 * work.trained) / 1e12, rel=1e-3)
    assert "reserved_gb" not in found and speed.read() == {}


def test_the_line_of_the_log_has_what_was_measured():
    assert format_speed({"loss": 1.0}) == ""
    gpu = {"tokens_per_second": 9360.0, "tflops": 285.4, "mfu": 0.364, "hfu": 0.52, "reserved_gb": 13.2}
    assert format_speed(gpu) == "   9,360 tokens/s   285 TFLOP/s   MFU 36% HFU 52%   13.2 GB"
    assert format_speed({"tokens_per_second": 800.0, "tflops": 0.00213}) == "   800 tokens/s   0.00213 TFLOP/s"
