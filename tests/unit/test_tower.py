"""The faster frozen tower sees what the published one sees."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

from collator import VisionSFTCollator
from models.loading import load_model
from models.lora import build_lora_config
from models.tower import FusedMLP, PatchProduct, multiply_patches, speed_up_frozen_tower


class Config:
    hidden_size, hidden_act = 16, "silu"

    def __init__(self, width):
        self.intermediate_size = width


@pytest.mark.parametrize(("width", "padded"), [(3420, 3456), (90, 128), (128, 128)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_padded_mlp_computes_the_same(width, padded, bias):
    torch.manual_seed(0)
    mlp, x = Qwen2_5_VLMLP(Config(width), bias=bias), torch.randn(7, 16)
    fused = FusedMLP(mlp)
    assert fused.gate_up.weight.shape == (2 * padded, 16) and fused.down.weight.shape == (16, padded)
    torch.testing.assert_close(fused(x), mlp(x), atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in fused.parameters())


def test_a_frozen_tower_sees_the_same_and_a_trained_one_stays_as_it_is(tiny_base, processor, demo_splits):
    batch = VisionSFTCollator(processor, packed=True)([demo_splits["train"][n] for n in range(3)])
    images = batch["pixel_values"], batch["image_grid_thw"]
    base = AutoModelForImageTextToText.from_pretrained(tiny_base).eval().requires_grad_(False)
    with torch.no_grad():
        expected = base.model.visual(*images).pooler_output
    options = {"r": 4, "lora_alpha": 8}
    model = get_peft_model(base, build_lora_config(base, train_vision=True, **options))
    assert speed_up_frozen_tower(model.get_base_model()) == 0
    base = model.unload()
    model = get_peft_model(base, build_lora_config(base, **options))
    names = {name for name in model.state_dict() if "lora_" in name}
    assert speed_up_frozen_tower(model.get_base_model()) == base.config.vision_config.depth + 1
    assert isinstance(base.model.visual.patch_embed.proj, PatchProduct)
    assert {name for name in model.state_dict() if "lora_" in name} == names
    with torch.no_grad():
        torch.testing.assert_close(base.model.visual(*images).pooler_output, expected, atol=1e-5, rtol=1e-4)


def test_every_loaded_model_multiplies_its_patches_with_the_published_weights(tiny_base, processor, demo_splits):
    batch = VisionSFTCollator(processor, packed=True)([demo_splits["train"][0]])
    images = batch["pixel_values"], batch["image_grid_thw"]
    stock = AutoModelForImageTextToText.from_pretrained(tiny_base).eval()
    loaded = load_model(str(tiny_base), quantization=None, dtype="float32").eval()
    assert isinstance(loaded.model.visual.patch_embed.proj, PatchProduct) and multiply_patches(loaded) == 0
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in stock.state_dict().items())
    with torch.no_grad():
        expected, found = (model.model.visual(*images).pooler_output for model in (stock, loaded))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_convolution_that_overlaps_stays_one(tiny_base):
    model = AutoModelForImageTextToText.from_pretrained(tiny_base)
    model.model.visual.patch_embed.proj.padding = (0, 1, 1)
    assert multiply_patches(model) == 0
