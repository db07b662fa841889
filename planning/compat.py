"""Undocumented interfaces of torch and transformers, watched by tests/unit/test_compat_planning.py."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

__all__ = ["FakeTensorMode", "TorchDispatchMode", "replace_with_bnb_linear", "storage_key", "tree_leaves"]


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that all tensors of one storage share; tensors without content have no address."""
    return storage._cdata
