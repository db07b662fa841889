"""Only models/families.py knows the classes and module paths of a family."""

import re
from pathlib import Path

import pytest
import torch

from models.families import FAMILIES, families_of, family_of, published_config
from planning.shapes import build_without_weights

ROOT = Path(__file__).parents[2]
PACKAGES = ("models", "training", "planning", "evaluation", "publishing", "common", "data_prep", "demo")
FILES = [*ROOT.glob("*.py"), *(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))]
FILES += (ROOT / "configs" / "accelerate").iterdir()
NAMES = re.compile(r"Qwen\d(_\d)?_?VL|Qwen3_5|model\.visual|visual\.(blocks|merger)|language_model\.layers")


def test_no_other_product_file_names_a_class_or_a_module_path():
    families = ROOT / "models" / "families.py"
    assert [file for file in FILES if NAMES.search(file.read_text())] == [families]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_describes_its_published_models(kind):
    family = FAMILIES[kind]
    config = published_config(max(family.shapes))
    assert config.model_type == kind and family_of(config) is family
    assert family.token_side == config.vision_config.patch_size * config.vision_config.spatial_merge_size
    model = build_without_weights(config, torch.bfloat16)
    assert family_of(model) is family
    names = [name for name, _ in model.named_modules()]
    for prefix in (family.language_layers, family.vision, family.vision_blocks, *family.mergers):
        assert any(name.startswith(prefix) for name in names), prefix
    assert set(family.unquantized) <= set(names)


def test_an_unknown_published_name_has_no_configuration():
    assert published_config("nobody/nothing") is None
    name = max(FAMILIES["qwen2_vl"].shapes)
    assert published_config(f"Qwen/{name}-Instruct").to_dict() == published_config(name).to_dict()


def test_the_processor_names_its_families(processor):
    assert families_of(processor) == [FAMILIES["qwen2_5_vl"]]
