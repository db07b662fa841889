"""Where the tokens of a pack go in layers with linear attention."""

import pytest
import torch

from models.families import FAMILIES
from models.linear_attention import check_kernels, check_triton, has_kernels, row_length, spread_layout


@pytest.mark.parametrize(
    ("samples", "places", "borders"),
    [
        ([0, 2, 3, 6], [0, 1, 5, 9, 10, 11], [0, 5, 9, 16]),
        ([0, 4], [0, 1, 2, 3], [0, 8]),
        ([0, 8], [*range(8)], [0, 8]),
        ([0, 9], [*range(9)], [0, 16]),
    ],
)
def test_a_gap_follows_each_sample_and_rows_are_a_multiple_of_eight(samples, places, borders):
    found, ends = spread_layout(torch.tensor(samples, dtype=torch.int32), samples[-1], 3)
    assert found.tolist() == places
    assert ends.tolist() == borders and ends.dtype == torch.int64
    assert ends[-1] == row_length(samples[-1], len(samples) - 1, 3)


def test_packing_is_refused_only_where_it_would_leak(monkeypatch):
    for available in (False, True):
        monkeypatch.setattr("models.linear_attention.is_flash_linear_attention_available", lambda: available)  # noqa: B023
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
        for kind, family in FAMILIES.items():
            assert has_kernels(family) is (available and kind.startswith("qwen3_5"))
            if family.linear_attention and not available:
                with pytest.raises(
                    ValueError, match=r"packing: in .*Qwen3.5.*, .* pip install flash-linear-attention"
                ):
                    check_kernels(FAMILIES[kind], packed=True)
                check_kernels(family, packed=False)
            else:
                check_kernels(family, packed=True)


HYBRID = next(family for family in FAMILIES.values() if family.linear_attention)


@pytest.mark.parametrize(
    ("triton", "capability", "refused"),
    [
        ("3.4.0", (9, 0), True),
        ("3.6.0+git1", (9, 0), True),
        ("3.7.0", (10, 0), True),
        ("3.3.1", (9, 0), False),
        ("3.7.1", (9, 0), False),
        ("3.8.0", (9, 0), False),
        ("3.6.0", (8, 9), False),
    ],
)
def test_a_triton_whose_gradients_are_wrong_on_the_gpu_is_refused_before_training(triton, capability, refused):
    if not refused:
        check_triton(HYBRID, triton, capability)
        return
    with pytest.raises(ValueError, match=r"pip install 'triton>=3\.7\.1'$") as error:
        check_triton(HYBRID, triton, capability)
    assert f"with Triton {triton} on a GPU of compute capability {capability[0]}.{capability[1]}" in str(error.value)
    assert "\n" not in str(error.value)


def test_with_other_kernels_that_triton_is_not_needed(monkeypatch):
    monkeypatch.setattr("models.linear_attention.is_installed", lambda name: name == "tilelang")
    check_triton(HYBRID, "3.6.0", (9, 0))
