"""The kernels and compiled layers of a GPU compute what the plain code does."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from torch.utils.checkpoint import checkpoint

from demo.tiny_model import save_tiny_model
from helpers.runs import TEXTS
from helpers.sharded_states import compare_states
from models.attention import _try_gqa, run_by_length, run_kernel, takes_gqa
from models.host_embedding import HostEmbedding
from models.nf4_linear import pack_state, weight_of

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs an Ampere GPU or later"
)


@needs_gpu
@pytest.mark.parametrize("causal", [True, False])
def test_fewer_heads_of_keys_and_values_give_the_gradients_of_sdpa(causal):
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    assert takes_gqa(device)
    offsets = torch.tensor([0, 100, 137, 400], dtype=torch.int32, device=device)
    sides = [torch.randn(1, heads, 400, 128, device=device, dtype=torch.bfloat16) for heads in (28, 4, 4)]
    results = []
    for kernel in (run_kernel, run_by_length):
        copies = [side.clone().requires_grad_() for side in sides]
        output = kernel(*copies, offsets, 263, None, causal)
        output.float().square().sum().backward()
        results.append([output, *(x.grad for x in copies)])
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).float().norm() < 0.02 * expected.float().norm()


@needs_gpu
def test_the_trial_of_the_kernel_may_fall_into_a_layer_that_is_recomputed():
    """The layer counts the tensors that are saved for its backward pass, and there is no trial the second time."""
    _try_gqa.cache_clear()
    offsets = torch.tensor([0, 100, 400], dtype=torch.int32, device="cuda")
    sides = [torch.randn(1, n, 400, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2)]
    output = checkpoint(run_kernel, *sides, offsets, 300, None, True, use_reentrant=False)
    output.float().square().sum().backward()
    assert all(side.grad is not None for side in sides)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
def test_weights_come_out_of_4_bit_as_bitsandbytes_has_them(double, dtype):
    for shape in ((512, 3584), (300, 192), (2, 257 * 64)):
        options = {"quant_type": "nf4", "compress_statistics": double}
        weight = Params4bit(torch.randn(shape), requires_grad=False, **options).to("cuda")
        state = weight.quant_state
        state.dtype = dtype
        found = weight_of(pack_state(weight.data, state), shape, dtype)
        assert torch.equal(found, dequantize_4bit(weight.data, state))


@needs_gpu
def test_an_embedding_on_the_host_returns_its_rows_on_the_gpu():
    embedding = torch.nn.Embedding(512, 64, dtype=torch.bfloat16, device="cuda")
    for ids in torch.randint(512, (3, 1, 4096), device="cuda"):
        assert torch.equal(HostEmbedding(embedding.weight)(ids), embedding(ids))


@needs_gpu
def test_a_sharded_model_returns_what_the_whole_one_does(tmp_path):
    save_tiny_model(tmp_path, TEXTS, hidden_size=1024, num_layers=8)
    differences = compare_states(tmp_path, "bfloat16")
    print(differences)
    for states, gradient in differences.values():
        assert states < 0.02 and gradient < 0.05  # bfloat16


@needs_gpu
def test_compiled_selective_and_sped_up_models_have_the_plain_ones_gradients():
    from benchmarks.gpu_speed import exact

    results = exact(tiny=True, compiled=True)
    assert all(
        results[name]["gradients"] < 0.02
        for name in ("tower", "compiled", "everything recomputed", "selective", "selective, wide products kept")
    )
