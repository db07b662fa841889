"""Which batch is the largest, and what trying it leaves behind."""

import pytest
import torch
from peft import get_peft_model

from collator import VisionSFTCollator
from models.loading import load_model
from models.lora import build_lora_config
from training.memory_probe import forward_and_backward, is_out_of_memory, largest_batch


def test_the_largest_batch_holds_the_longest_samples():
    assert largest_batch([5, 9, 7, 9, 1], batch_size=2, pack_tokens=None) == [1, 3]


def test_the_largest_pack_is_the_fullest():
    assert sorted(largest_batch([60, 50, 50, 30], batch_size=1, pack_tokens=100)) == [1, 2]
    assert largest_batch([60], batch_size=1, pack_tokens=100) == [0]


def test_trying_a_batch_reaches_every_layer_and_changes_nothing(tiny_base, processor, demo_splits):
    model = load_model(str(tiny_base), quantization="nf4", dtype=torch.float32, attn_implementation="varlen")
    model = get_peft_model(model, build_lora_config(model, r=4, lora_alpha=8, lora_dropout=0.1)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for packed in (True, False):
        random = torch.get_rng_state()
        forward_and_backward(model, VisionSFTCollator(processor, packed=packed)(list(demo_splits["test"])), None)
        assert torch.equal(torch.get_rng_state(), random)
        assert not model.training
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)
        assert any(p.grad.abs().sum() > 0 for p in trained)
        model.zero_grad()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error, found):
    assert is_out_of_memory(error) == found
