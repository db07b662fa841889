"""Undocumented interfaces of torch and transformers, watched by tests/unit/test_compat_planning.py."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

__all__ = ["FakeTensorMode", "TorchDispatchMode", "put_nf4_layers", "storage_key", "tree_leaves"]


def put_nf4_layers(model: PreTrainedModel, config: BitsAndBytesConfig) -> PreTrainedModel:
    """Replace linear layers as `from_pretrained` does, on a model without weights."""
    return replace_with_bnb_linear(
        model, modules_to_not_convert=config.llm_int8_skip_modules, quantization_config=config
    )


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that all tensors of one storage share; tensors without content have no address."""
    return storage._cdata
