"""Which checkpoints count, what a run that resumes must have in common with them, and which are kept."""

import random
import re

import pytest

from training import checkpoints
from training.checkpoints import (
    MANIFEST,
    choose_checkpoint,
    describe_restart,
    list_checkpoints,
    read_manifest,
    rotate,
    seal,
)
from training.resume import check_resumable, differences

RUN = {
    "settings": {"learning_rate": 0.1, "lora_r": 8},
    "base": {"name": "base"},
    "versions": {"torch": "2.15"},
    "processes": 1,
}
FILES = {"adapter_model.safetensors": b"weights" * 40, "optimizer.pt": b"averages" * 40, "trainer_state.json": b"{}"}


def make(output_dir, step, sealed=True):
    path = output_dir / f"checkpoint-{step}"
    path.mkdir()
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    if sealed:
        seal(path, RUN)
    return path


@pytest.fixture
def output_dir(tmp_path):
    """A run's folder with whole checkpoints of the steps 5, 10 and 100, and two things that are none."""
    for step in (5, 10, 100):
        make(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-200").touch()
    return tmp_path


def test_checkpoints_are_listed_newest_step_first(output_dir):
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-100", "checkpoint-10", "checkpoint-5"]


def test_a_sealed_checkpoint_is_whole_and_says_whose_it_is(output_dir):
    content = read_manifest(output_dir / "checkpoint-10")
    assert (content["step"], content["run"]) == (10, RUN)
    assert content["files"].keys() == FILES.keys()
    assert content["files"]["optimizer.pt"]["bytes"] == 320
    assert not (output_dir / "checkpoint-10" / f"{MANIFEST}.unfinished").exists()


def test_auto_takes_the_newest_whole_one_and_says_what_it_skipped(output_dir):
    assert choose_checkpoint(output_dir, "auto") == (output_dir / "checkpoint-100", [])
    (output_dir / "checkpoint-100" / MANIFEST).unlink()
    (output_dir / "checkpoint-10" / "adapter_model.safetensors").write_bytes(b"half")
    chosen, skipped = choose_checkpoint(output_dir, "auto")
    assert chosen == output_dir / "checkpoint-5"
    assert skipped == [
        f"checkpoint {output_dir}/checkpoint-100: no COMPLETE.json; its save was not completed",
        f"checkpoint {output_dir}/checkpoint-10: adapter_model.safetensors has 4 bytes instead of 280",
    ]


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip_first(path):
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def flip_last(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("damage", [delete, truncate, empty, zero, flip_first, flip_last])
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_damage_to_a_checkpoint_is_found(output_dir, name, damage):
    path = output_dir / "checkpoint-100"
    damage(path / name)
    with pytest.raises(ValueError, match=f"checkpoint-100: .*{re.escape(name)}"):
        choose_checkpoint(output_dir, str(path))
    assert choose_checkpoint(output_dir, "auto")[0] == output_dir / "checkpoint-10"


def test_a_manifest_with_another_content_or_in_another_place_is_refused(output_dir):
    path = output_dir / "checkpoint-100" / MANIFEST
    path.write_text(path.read_text().replace("0.1", "0.2"))
    with pytest.raises(ValueError, match=r"COMPLETE\.json is damaged, or of another checkpoint"):
        read_manifest(path.parent)
    (output_dir / "checkpoint-10").rename(output_dir / "checkpoint-11")
    with pytest.raises(ValueError, match=r"COMPLETE\.json is damaged, or of another checkpoint"):
        read_manifest(output_dir / "checkpoint-11")


def test_auto_starts_afresh_when_there_is_none(tmp_path):
    assert choose_checkpoint(tmp_path, "auto") == (None, [])
    assert choose_checkpoint(tmp_path, None) == (None, [])
    make(tmp_path, 3, sealed=False)
    assert choose_checkpoint(tmp_path, "auto")[0] is None


def test_a_fresh_start_never_writes_into_an_earlier_run(output_dir):
    with pytest.raises(ValueError, match=r"holds a run already \(checkpoint-100\); choose another output_dir"):
        choose_checkpoint(output_dir, None)


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_finished_adapter_without_checkpoints_is_never_overwritten(tmp_path, resume):
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="holds a finished adapter and no checkpoint; choose another one"):
        choose_checkpoint(tmp_path, resume)


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "metrics.jsonl"])
@pytest.mark.parametrize("resume", [None, "auto"])
def test_files_that_no_run_wrote_are_not_replaced(tmp_path, name, resume):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"output_dir: {tmp_path} holds a {name} that no run wrote"):
        choose_checkpoint(tmp_path, resume)
    (tmp_path / "run.json").touch()  # of a run that was killed before its first checkpoint
    assert choose_checkpoint(tmp_path, resume) == (None, [])


def test_a_named_checkpoint_must_exist(output_dir):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        choose_checkpoint(output_dir, str(output_dir / "nowhere"))


def test_a_named_checkpoint_is_not_resumed_beside_newer_ones(output_dir, tmp_path):
    newer = r"holds checkpoint-100, which is newer than checkpoint-10; resume with auto, move the newer ones away, or"
    with pytest.raises(ValueError, match=newer):
        choose_checkpoint(output_dir, str(output_dir / "checkpoint-10"))
    (output_dir / "checkpoint-100" / MANIFEST).unlink()  # does not count
    for folder in (output_dir, tmp_path / "another"):
        assert choose_checkpoint(folder, str(output_dir / "checkpoint-10"))[0] == output_dir / "checkpoint-10"


def test_where_a_run_goes_on_is_where_a_command_would(tmp_path):
    assert describe_restart(tmp_path, "auto", 5) == "the same command starts from the beginning"
    assert describe_restart(tmp_path, "x/checkpoint-3", 5) == "the same command starts from x/checkpoint-3 again"
    make(tmp_path, 4)
    make(tmp_path, 6)
    assert describe_restart(tmp_path, "auto", 5) == "the same command resumes from checkpoint-4"
    for resume in (None, "x/checkpoint-3"):
        assert describe_restart(tmp_path, resume, 5) == "--resume_from_checkpoint auto resumes from checkpoint-4"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"settings": {"learning_rate": 0.2, "lora_r": 8}}, "settings.learning_rate was 0.1 and is 0.2 now"),
        ({"settings": {"lora_r": 8}}, "settings.learning_rate was 0.1 and is None now"),
        ({"versions": {"torch": "2.16"}}, "versions.torch was '2.15' and is '2.16' now"),
        ({"processes": 2}, "processes was 1 and is 2 now"),
        ({"data": {"name": "x"}}, "data was None and is {'name': 'x'} now"),
    ],
)
def test_a_run_with_other_settings_resumes_only_when_allowed_to(output_dir, capsys, change, line):
    path = output_dir / "checkpoint-10"
    check_resumable(path, RUN, allow_change=False)
    check_resumable(None, {**RUN, **change}, allow_change=False)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=f"checkpoint-10: {re.escape(line)}; .* --allow_config_change"):
        check_resumable(path, {**RUN, **change}, allow_change=False)
    check_resumable(path, {**RUN, **change}, allow_change=True)
    assert capsys.readouterr().out == f"changed: {line}\n"


@pytest.mark.parametrize("allow_change", [True, False])
@pytest.mark.parametrize("change", [{"settings": {"learning_rate": 0.1, "lora_r": 16}}, {"base": {"name": "other"}}])
def test_weights_of_another_shape_are_refused_in_any_case(output_dir, change, allow_change):
    with pytest.raises(ValueError, match=r"(settings\.lora_r was 8|base\.name was 'base').*; its weights do not fit"):
        check_resumable(output_dir / "checkpoint-10", {**RUN, **change}, allow_change=allow_change)


def test_differences_name_whole_paths():
    before, now = {"base": {"name": "a"}, "data": {"name": 1, "x": 2}}, {"base": {"name": "b"}, "data": {"name": 1}}
    assert list(differences(before, now)) == [("base.name", "a", "b"), ("data.x", 2, None)]


def layout(rng, output_dir):
    steps = rng.sample(range(1, 500), rng.randint(0, 8))
    whole = {step for step in steps if rng.random() < 0.7}
    for step in steps:
        path = output_dir / f"checkpoint-{step}"
        path.mkdir(parents=True)
        if step in whole:
            (path / MANIFEST).touch()
    return set(steps), whole


def test_rotation_keeps_the_newest_whole_ones_the_best_and_what_is_newer(tmp_path):
    rng = random.Random(0)
    for case in range(1000):
        output_dir = tmp_path / str(case)
        output_dir.mkdir()
        steps, whole = layout(rng, output_dir)
        limit = rng.choice([None, 0, 1, 2, 3])
        best = rng.choice([None, *sorted(steps)])
        if not whole:
            continue
        saved = rng.choice([max(whole), *sorted(whole)])  # what is newer and whole is damaged
        rotate(output_dir / f"checkpoint-{saved}", limit, None if best is None else output_dir / f"checkpoint-{best}")
        left = {int(path.name[11:]) for path in output_dir.iterdir()}
        if limit is None:
            assert left == steps
            continue
        kept = sorted(step for step in whole if step <= saved)[-max(limit, 1) :]
        assert left == {*kept, *(step for step in steps if step > saved), *([] if best is None else [best])}


@pytest.mark.parametrize("limit", [1, None])
def test_of_a_link_to_a_checkpoint_of_another_run_only_the_link_is_deleted(output_dir, tmp_path, limit):
    other = tmp_path / "other"
    other.mkdir()
    before = read_manifest(make(other, 7))
    (output_dir / "checkpoint-7").symlink_to(other / "checkpoint-7")
    if limit:
        rotate(output_dir / "checkpoint-100", limit)
        assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-100"]
    else:
        checkpoints.delete(output_dir / "checkpoint-7")
        checkpoints.delete(output_dir / "checkpoint-7")  # there is none
    assert not (output_dir / "checkpoint-7").is_symlink()
    assert read_manifest(other / "checkpoint-7") == before
