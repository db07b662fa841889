"""Which checkpoint a run goes on from, and which ones it passes over."""

import json

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import REQUIRED, check_checkpoint, choose_checkpoint, list_checkpoints


@pytest.fixture
def run(tmp_path):
    """A run's folder with whole checkpoints of the steps 5, 10 and 100, and two things that are none."""
    for step in (5, 10, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in REQUIRED:
            (folder / name).write_text("x")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        save_file({"w": torch.zeros(2)}, folder / "adapter_model.safetensors")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-200").touch()
    return tmp_path


def test_checkpoints_are_listed_newest_step_first(run):
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-100", "checkpoint-10", "checkpoint-5"]


def test_auto_takes_the_newest_usable_one_and_says_what_it_passed_over(run):
    assert choose_checkpoint(run, "auto") == (run / "checkpoint-100", [])
    (run / "checkpoint-100" / "optimizer.pt").unlink()
    (run / "checkpoint-10" / "adapter_model.safetensors").write_bytes(b"half")
    chosen, passed_over = choose_checkpoint(run, "auto")
    assert chosen == run / "checkpoint-5"
    assert passed_over[0] == f"checkpoint {run}/checkpoint-100: optimizer.pt is missing or empty"
    assert passed_over[1].startswith(f"checkpoint {run}/checkpoint-10: unreadable: ")


def test_auto_starts_afresh_when_there_is_none(tmp_path):
    assert choose_checkpoint(tmp_path, "auto") == (None, [])
    assert choose_checkpoint(tmp_path, None) == (None, [])


def test_a_fresh_start_never_writes_into_an_earlier_run(run):
    with pytest.raises(ValueError, match=r"holds a run already \(checkpoint-100\); choose another output_dir"):
        choose_checkpoint(run, None)


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_finished_adapter_without_checkpoints_is_never_overwritten(tmp_path, resume):
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="holds a finished adapter and no checkpoint; choose another one"):
        choose_checkpoint(tmp_path, resume)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_named_checkpoint_must_be_whole(run, name):
    path = run / "checkpoint-10"
    check_checkpoint(path)
    (path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"checkpoint-10: {name} is missing or empty"):
        choose_checkpoint(run, str(path))


def test_a_named_checkpoint_must_exist_and_parse(run):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        choose_checkpoint(run, str(run / "nowhere"))
    (run / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 1')
    with pytest.raises(ValueError, match="checkpoint-10: unreadable: "):
        check_checkpoint(run / "checkpoint-10")
