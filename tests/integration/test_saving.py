"""Runs that cannot save, that share a folder, that lack memory, or whose samples are too long: what they say last."""

import errno
import json
import os
import re
import resource
import signal

from common.cli import run

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from trl import SFTTrainer

import train_sft
from common.files import locked
from helpers.runs import train_args
from training import trainer as trainer_module
from training.checkpoints import describe_write_error, is_write_error, read_manifest, seal
from training.signals import EXIT_CODE, StopCallback
from training.trainer import SafeSFTTrainer

ADAPTER = "adapter_model.safetensors"
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
NO_EVALUATION = {"eval_strategy": "no"}


def train(base, data, out, **settings):
    """Return the exit code of a run."""
    return run(lambda: train_sft.main(train_args(base, data, out, **{**NO_EVALUATION, **settings})))


def last_line(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]


def fail_at(monkeypatch, *steps):
    """Let the disk be full for the checkpoints of some steps; of all without any."""

    def seal_or_fail(path, identity):
        if not steps or int(path.name[11:]) in steps:
            raise FULL
        seal(path, identity)

    monkeypatch.setattr(trainer_module, "seal", seal_or_fail)


def fail_final(monkeypatch, error):
    save = SFTTrainer.save_model

    def save_or_fail(self, output_dir=None, _internal_call=False):
        save(self, output_dir, _internal_call)
        if not _internal_call:
            raise error

    monkeypatch.setattr(SFTTrainer, "save_model", save_or_fail)


def stop_at(monkeypatch, step):
    class Stopped(StopCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                self._receive(signal.SIGTERM, None)

    monkeypatch.setattr(train_sft, "StopCallback", Stopped)


def test_a_storage_without_fsync_keeps_its_checkpoints(tiny_base, demo_data, tmp_path, monkeypatch):
    def unsupported(handle):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", unsupported)
    assert train(tiny_base, demo_data, tmp_path) == 0
    assert [read_manifest(tmp_path / f"checkpoint-{step}")["step"] for step in (2, 4)] == [2, 4]


def test_a_run_whose_last_checkpoint_was_not_saved_says_so_last(tiny_base, demo_data, tmp_path, monkeypatch, capsys):
    fail_at(monkeypatch, 4)
    assert train(tiny_base, demo_data, tmp_path) == 1
    reason = f"checkpoint-4 was not saved: {FULL}; the adapter in {tmp_path} is complete"
    assert last_line(capsys) == f"error: {reason}"
    assert (tmp_path / ADAPTER).is_file() and (tmp_path / "README.md").is_file()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_disk_that_is_free_again_is_no_failure(tiny_base, demo_data, tmp_path, monkeypatch, capsys):
    fail_at(monkeypatch, 2)
    assert train(tiny_base, demo_data, tmp_path) == 0
    assert f"warning: checkpoint-2 was not saved, earlier ones stay: {FULL}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("failed", "restart", "error"),
    [
        ((), "starts from the beginning", FULL),
        ((4,), "resumes from checkpoint-2", SafetensorError("I/O error: No space left on device (os error 28)")),
    ],
)
def test_a_final_save_that_fails_leaves_no_half_and_says_where_it_goes_on(
    tiny_base, demo_data, tmp_path, monkeypatch, capsys, error, failed, restart
):
    fail_at(monkeypatch, *failed)
    fail_final(monkeypatch, error)
    assert train(tiny_base, demo_data, tmp_path) == 1
    said = f"error: output_dir: the adapter could not be saved in {tmp_path}: {error}; the same command {restart}"
    assert last_line(capsys) == said
    assert not (tmp_path / ADAPTER).exists()


@pytest.mark.parametrize(
    ("failed", "restart"), [((), "starts from the beginning"), ((3,), "resumes from checkpoint-2")]
)
def test_a_stop_that_could_not_save_is_not_queued_again(
    tiny_base, demo_data, tmp_path, monkeypatch, capsys, failed, restart
):
    marker = tmp_path / "unsaved"
    monkeypatch.setenv("UNSAVED_MARKER", str(marker))
    fail_at(monkeypatch, *failed)
    stop_at(monkeypatch, 3)
    assert train(tiny_base, demo_data, tmp_path) == 1
    reason = f"checkpoint-3 was not saved: {FULL}; the same command {restart}"
    assert last_line(capsys) == f"error: stopped by SIGTERM at step 3; {reason}"
    assert not (tmp_path / ADAPTER).exists() and marker.exists()


def test_a_stop_that_saved_is_queued_again(tiny_base, demo_data, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 3)
    assert train(tiny_base, demo_data, tmp_path) == EXIT_CODE
    assert "stopped by SIGTERM at step 3; the same command resumes from checkpoint-3" in capsys.readouterr().out


def test_errors_of_writing_are_told_from_others(tmp_path):
    tensors, caught = {"x": torch.zeros(100_000)}, []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        for save in (torch.save, save_file):
            with pytest.raises(Exception) as error:
                save(tensors, str(tmp_path / "x"))
            caught.append(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [type(error) for error in caught] == [RuntimeError, SafetensorError]
    assert all(map(is_write_error, [*caught, FULL]))
    assert describe_write_error(caught[0]).startswith("the disk is full or fails (")
    others = [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("shapes do not match"),
        ValueError(),
        KeyError(),
    ]
    assert not any(map(is_write_error, others))


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(tiny_base, demo_data, tmp_path, capsys):
    assert train(tiny_base, demo_data, tmp_path) == 0
    before = sorted(tmp_path.rglob("*"))
    assert not (tmp_path / "training.lock").exists()
    with locked(tmp_path / "training.lock", "x"):
        capsys.readouterr()
        assert train(tiny_base, demo_data, tmp_path, max_steps=8, allow_config_change="true") == 1
        said = last_line(capsys)
    assert re.fullmatch(
        rf"error: output_dir: {tmp_path} is in use by process {os.getpid()} on \S+, started 2\S+; wait for it or "
        "stop it, or choose another output_dir", said,
    )  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "training.lock").write_text('{"process": 1, "host": "x", "started": "y"}')  # of a run that was killed
    assert train(tiny_base, demo_data, tmp_path) == 0


def test_out_of_memory_names_what_to_lower(tiny_base, demo_data, tmp_path, monkeypatch, capsys):
    def lack(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of ...")

    monkeypatch.setattr(SafeSFTTrainer, "compute_loss", lack)
    assert train(tiny_base, demo_data, tmp_path / "a") == 1
    said = last_line(capsys)
    assert said.startswith(
        "error: out of memory while training (CUDA out of memory. Tried to allocate 2.00 GiB.): set "
        "offload_embedding: true; set gradient_checkpointing: true; lower per_device_train_batch_size (now 2) and "
        "raise gradient_accumulation_steps as much; lower max_pixels (now 12544); take a smaller model"
    )
    packed = {"packing": "true", "pack_tokens": 256, "max_length": 256, "attn_implementation": "varlen"}
    packed |= {"per_device_train_batch_size": 1, "gradient_checkpointing": "true", "load_in_4bit": "false"}
    packed["offload_embedding"] = "true"
    assert train(tiny_base, demo_data, tmp_path / "b", **packed) == 1
    said = last_line(capsys)
    assert (
        "): lower pack_tokens (now 256), not below the longest sample; lower max_pixels (now 12544); set load_in_4"
        in said
    )


def test_out_of_memory_while_saving_is_no_full_disk(tiny_base, demo_data, tmp_path, monkeypatch, capsys):
    def lack(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer_module, "seal", lack)
    assert train(tiny_base, demo_data, tmp_path) == 1
    captured = capsys.readouterr()
    assert "was not saved" not in captured.out and "error: out of memory while training (CUDA out" in captured.err


def read_rows(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_samples_that_are_too_long_are_listed_and_left_out_if_asked_to(tiny_base, demo_data, tmp_path, capsys):
    listed = tmp_path / "too_long.jsonl"
    assert train(tiny_base, demo_data, tmp_path, max_length=20) == 1
    said = last_line(capsys)
    assert f"error: max_length: 32 of 32 train samples are over 20 tokens, listed in {listed}; the longest, " in said
    assert "max_pixels" not in said and said.endswith("shorten them, or leave them out by too_long: drop")
    totals = [row["tokens"] for row in read_rows(listed)]
    assert len(totals) == 32 and all(row["image_tokens"] == 16 and row["images"] == 1 for row in read_rows(listed))
    limit = sorted(totals)[16]
    over = sum(total > limit for total in totals)
    assert 0 < over < 32
    settings = {"max_length": limit, "too_long": "drop", "eval_strategy": "steps"}
    assert train(tiny_base, demo_data, tmp_path, **settings) == 0
    out = capsys.readouterr().out
    assert f"too long   {over} of 32 train samples left out, listed in {listed}" in out
    assert f"samples    {32 - over} train, " in out
    assert sum(row["split"] == "train" for row in read_rows(listed)) == over
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["data"]["splits"]["train"]["samples"] == 32 - over
    assert train(tiny_base, demo_data, tmp_path / "none", max_length=20, too_long="drop") == 1
    assert last_line(capsys) == "error: too_long: all 32 train samples are over max_length 20"


def test_a_cpu_run_of_a_gpu_recipe_says_and_records_float32(tiny_base, demo_data, tmp_path, capsys):
    settings = {"config": "configs/skin.yaml", "use_cpu": "true", "max_pixels": 12544, "min_pixels": 12544}
    settings |= {"per_device_train_batch_size": 1, "max_steps": 1, "save_steps": 1}
    assert train(tiny_base, demo_data, tmp_path, **settings) == 0
    assert "device     cpu, weights in float32, mixed precision off" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["dtype"] == "float32"
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (facts["settings"]["bf16"], facts["settings"]["fp16"]) == (False, False)


def test_a_refused_run_leaves_no_folder_that_it_made(tiny_base, demo_data, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for out in (tmp_path / "a" / "b", tmp_path / "mine"):
        assert train(tiny_base, demo_data, out, lora_target_modules="nope") == 1
    assert "lora_target_modules: nope not among" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not list((tmp_path / "mine").iterdir())


def test_a_link_to_a_folder_that_is_not_there_yet_is_followed(tiny_base, demo_data, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    assert train(tiny_base, demo_data, tmp_path / "link", max_steps=1) == 0
    assert (tmp_path / "disk" / "out" / "adapter_model.safetensors").is_file() and (tmp_path / "link").is_symlink()


def test_a_resumed_run_with_fewer_steps_than_it_has_done_is_told_how_many(tiny_base, demo_data, tmp_path, capsys):
    assert train(tiny_base, demo_data, tmp_path / "out") == 0
    assert train(tiny_base, demo_data, tmp_path / "out", max_steps=2, allow_config_change="true") == 1
    assert "it is at step 4, and the run has 2 steps now; set max_steps to 4 or more" in capsys.readouterr().err
