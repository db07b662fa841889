"""Where the tokens of a pack go in layers with linear attention."""

import pytest
import torch

from models.families import FAMILIES
from models.linear_attention import check_packing, spread_layout


def test_a_gap_follows_each_sample_but_the_last():
    places, borders = spread_layout(torch.tensor([0, 2, 3, 6], dtype=torch.int32), 6, 3)
    assert places.tolist() == [0, 1, 5, 9, 10, 11]
    assert borders.tolist() == [0, 5, 9, 12] and borders.dtype == torch.int64


def test_one_sample_stays_where_it_is():
    places, borders = spread_layout(torch.tensor([0, 4], dtype=torch.int32), 4, 3)
    assert places.tolist() == [0, 1, 2, 3] and borders.tolist() == [0, 4]


def test_packing_is_refused_only_where_it_would_leak(monkeypatch):
    for available in (False, True):
        monkeypatch.setattr("models.linear_attention.is_flash_linear_attention_available", lambda: available)  # noqa: B023
        for kind, family in FAMILIES.items():
            if family.linear_attention and not available:
                with pytest.raises(
                    ValueError, match=r"packing: in .*Qwen3.5.*, .* pip install flash-linear-attention"
                ):
                    check_packing(FAMILIES[kind])
            else:
                check_packing(family)
