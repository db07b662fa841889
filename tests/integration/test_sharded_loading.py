"""What each process holds of a model that is loaded in parts, and while it is loaded; what its layers return."""

import pytest

from demo.tiny_model import save_tiny_model
from helpers.runs import TEXTS
from helpers.sharded_loading import load_in_two
from helpers.sharded_states import compare_states

NOISE = 12e6  # bytes: what the C library keeps, and what quantising one layer takes


@pytest.mark.parametrize(
    "family, tied",
    [
        ("qwen2_5_vl", True),
        pytest.param("qwen3_vl", False, marks=pytest.mark.slow),
        pytest.param("qwen3_5", False, marks=pytest.mark.slow),
    ],
)
def test_the_parts_of_all_processes_are_the_model_that_one_process_loads(tmp_path, family, tied):
    save_tiny_model(tmp_path, TEXTS, hidden_size=64, num_layers=4, family=family, tied=tied)
    for found in load_in_two(tmp_path, compare=True):
        assert found["different"] == []


@pytest.mark.slow
def test_a_process_holds_its_share_and_loading_takes_one_unit_more(tmp_path):
    save_tiny_model(tmp_path, TEXTS, hidden_size=768, num_layers=24)
    for found in load_in_two(tmp_path):
        assert found["held"] == pytest.approx(found["whole"] / 2, rel=0.01)
        assert found["held"] < found["peak"] < found["held"] + found["unit"] + NOISE < 0.9 * found["whole"]


@pytest.mark.slow
def test_the_layers_of_a_sharded_model_return_what_those_of_the_whole_one_do(tmp_path):
    save_tiny_model(tmp_path, TEXTS, hidden_size=128, num_layers=3)
    assert compare_states(tmp_path, "float32") == {"plain": [0.0, 0.0], "compiled": [0.0, 0.0]}
