"""What planning/compat.py relies on: each test fails when torch or transformers changes it."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from models.families import FAMILIES, published_config
from models.loading import nf4_config
from planning.compat import FakeTensorMode, TorchDispatchMode, replace_with_bnb_linear, storage_key, tree_leaves
from planning.shapes import build_without_weights

pytestmark = pytest.mark.canary


def test_fake_tensors_have_shapes_gradients_and_no_content():
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, 1 << 40, requires_grad=True)
        (x * 2).backward(torch.empty_like(x))
    assert x.grad.shape == (3, 1 << 40), "torch: FakeTensorMode no longer traces without memory"


def test_tensors_of_one_storage_have_one_key():
    with FakeTensorMode():
        x, y = torch.empty(4), torch.empty(4)
        keys = [storage_key(tensor.untyped_storage()) for tensor in (x, x[1:], y)]
    assert keys[0] == keys[1] != keys[2], "torch: untyped_storage()._cdata no longer identifies a storage"


def test_a_dispatch_mode_sees_forward_and_backward_operations():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            seen.extend(x.shape for x in tree_leaves([result, {"other": None}]) if isinstance(x, torch.Tensor))
            return result

    x = torch.ones(2, 3, requires_grad=True)
    with Mode():
        (x @ torch.ones(3, 5)).sum().backward()
    assert torch.Size([2, 5]) in seen and seen.count(torch.Size([2, 3])), (
        "torch: TorchDispatchMode no longer sees all operations, or tree_leaves their results"
    )


def test_linear_layers_of_a_model_without_weights_become_nf4():
    config = published_config("Qwen2.5-VL-3B")
    config.text_config.num_hidden_layers = config.vision_config.depth = 1
    config.text_config.layer_types = ["full_attention"]
    family = FAMILIES[config.model_type]
    model, nf4 = build_without_weights(config, torch.bfloat16), nf4_config(family, torch.bfloat16)
    replace_with_bnb_linear(model, modules_to_not_convert=nf4.llm_int8_skip_modules, quantization_config=nf4)
    layers = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 7 and all(name.startswith(family.language_layers) for name in layers), (
        f"transformers: replace_with_bnb_linear no longer replaces exactly the language layers: {layers}"
    )
