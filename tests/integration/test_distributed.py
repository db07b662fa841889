"""Several processes: one model learnt by all, the same data for all, other numbers of them, and sharded models."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from collator import VisionSFTCollator
from data_prep import load_splits
from helpers.runs import rows_of, train_args
from helpers.stored import save_stored
from training.checkpoints import read_manifest
from training.samplers import EpochOrder

ROOT = Path(__file__).parents[2]
ADAPTER = "adapter_model.safetensors"
TOWER = {"freeze_vision_encoder": "false", "train_merger": "true"}
PACKED = {"packing": "true", "pack_tokens": 256, "max_length": 256, "attn_implementation": "varlen"}
FORMS = {"padded": {}, "packed": PACKED}
ZERO2, NODES = (ROOT / "configs" / "accelerate" / f"{name}.yaml" for name in ("zero2", "multi_node"))
SAVED = {"save_steps": 6, "max_steps": 12, "save_total_limit": 5}
SHARDED = {**SAVED, "shard_base": "true"}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture
def train(fork_server, tiny_base, mixed_data):
    """Run training in several processes, each with its own settings, and return exit codes and outputs."""
    defaults = {"eval_strategy": "no", "max_steps": 20, "save_steps": 20, "per_device_train_batch_size": 1}

    def run(out, *ranks, **options):
        words = [train_args(tiny_base, mixed_data, out, **{**defaults, **rank}) for rank in ranks]
        return fork_server.run("train_sft", *words, **options)

    return run


def done(result):
    """Return the outputs of ranks that have all ended well."""
    codes, texts = result
    assert set(codes) == {0}, texts
    return texts


def assert_same_curves(left, right, *, steps, keys=("loss", "grad_norm")):
    curves = [rows_of(out, *keys) for out in (left, right)]
    assert len(curves[0]) == steps
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", [pytest.param("padded", marks=pytest.mark.slow), "packed"])
def test_two_processes_learn_as_one_although_one_of_them_sees_no_image(train, mixed_data, tmp_path, form):
    settings = {**FORMS[form], **TOWER, "eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 1}
    done(train(tmp_path / "one", {**settings, "gradient_accumulation_steps": 2}))
    done(train(tmp_path / "two", settings, settings))
    assert_same_curves(tmp_path / "one", tmp_path / "two", steps=20, keys=("loss", "grad_norm", "num_tokens"))
    evaluated = [rows_of(tmp_path / name, "eval_loss") for name in ("one", "two")]  # a mean over batches, which differ
    torch.testing.assert_close(*map(torch.tensor, evaluated), atol=0.05, rtol=0)
    images = [bool(images) for images in load_splits(str(mixed_data))["train"]["image_sizes"]]
    order = list(EpochOrder(len(images), seed=42))
    pairs = {(images[a], images[b]) for a, b in zip(order[::2], order[1::2], strict=False)}
    assert {(True, False), (False, False)} < pairs


@pytest.mark.parametrize("strategy", ["random", pytest.param("group_by_length", marks=pytest.mark.slow)])
def test_two_processes_with_half_the_batch_see_the_samples_of_one(train, tmp_path, strategy):
    settings = {"train_sampling_strategy": strategy, "logging_steps": 1}
    done(train(tmp_path / "one", {**settings, "per_device_train_batch_size": 4}))
    half = {**settings, "per_device_train_batch_size": 2}
    done(train(tmp_path / "two", half, half))
    assert_same_curves(tmp_path / "one", tmp_path / "two", steps=20)


def test_a_dummy_image_changes_no_loss_and_no_label(processor, demo_splits):
    example = {
        "id": "a",
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Melanoma."}],
    }
    plain, blank = (VisionSFTCollator(processor, dummy_image=dummy)([example]) for dummy in (False, True))
    assert "pixel_values" not in plain and len(blank["image_grid_thw"]) == 1
    width = plain["input_ids"].size(1)
    assert torch.equal(blank["labels"][:1, :width], plain["labels"]) and (blank["labels"][1:] == -100).all()
    packed = VisionSFTCollator(processor, dummy_image=True, packed=True)([example])
    assert packed["text_cu_seqlens"].tolist()[:2] == [0, width] and (packed["labels"][0, width:] == -100).all()
    with_image = VisionSFTCollator(processor, dummy_image=True)([demo_splits["train"][0], {**example, "images": []}])
    assert len(with_image["image_grid_thw"]) == 1


def test_a_process_with_other_data_is_named_before_training(train, mixed_data, tmp_path):
    splits = load_splits(str(mixed_data))
    splits["train"] = splits["train"].select(range(1, len(splits["train"])))
    splits.save_to_disk(str(tmp_path / "other"))
    codes, texts = train(tmp_path / "out", {}, {"dataset_path": tmp_path / "other"})
    assert codes == [1, 1]
    for text in texts:
        [line] = [line for line in text.splitlines() if line.startswith("error")]
        assert line.startswith("error: process 1: data.their order is '") and "in process 0; all machines need" in line
        assert "samples  " not in text


def test_processes_that_do_not_share_the_output_folder_are_refused(train, tmp_path):
    codes, texts = train(tmp_path / "here", {}, {"output_dir": tmp_path / "there"})
    assert codes == [1, 1]
    for text, folder in zip(texts, ("here", "there"), strict=True):
        expected = f"error: output_dir: process 1 does not see what process 0 writes there (here: {tmp_path / folder})"
        assert expected in text
    assert not list(tmp_path.glob("*/*"))


def test_a_checkpoint_of_two_processes_goes_on_with_one_and_with_three(train, tmp_path):
    settings = {**PACKED, "max_steps": 12, "save_steps": 6, "save_total_limit": 5}
    done(train(tmp_path / "two", settings, settings))
    for name in ("one", "three"):
        shutil.copytree(tmp_path / "two" / "checkpoint-6", tmp_path / name / "checkpoint-6")
    codes, [text] = train(tmp_path / "one", {**settings, "gradient_accumulation_steps": 2})
    assert (
        codes == [1]
        and "processes was 2 and is 1 now; settings.gradient_accumulation_steps was 1 and is 2 now; undo that" in text
    )
    settings["allow_config_change"] = "true"
    [text] = done(train(tmp_path / "one", {**settings, "gradient_accumulation_steps": 2}))
    assert "changed: processes was 2 and is 1 now" in text and "resuming   at step" not in text
    assert_same_curves(tmp_path / "two", tmp_path / "one", steps=12)
    text, *others = done(train(tmp_path / "three", *[settings] * 3))
    assert "resuming   at step 6 of 12 with batches of 3; before, of 12 with batches of 2" in text
    assert not any("changed" in other for other in others)
    rows = rows_of(tmp_path / "three", "loss", "learning_rate", "step")
    assert [row[2] for row in rows] == list(range(1, 13))
    assert [row[1] for row in rows] == [row[1] for row in rows_of(tmp_path / "two", "loss", "learning_rate")]
    assert read_manifest(tmp_path / "three" / "checkpoint-12")["run"]["processes"] == 3


def test_two_processes_that_go_on_in_a_later_epoch_see_the_samples_in_its_order(train, tmp_path):
    settings = {**PACKED, "max_steps": 24, "save_steps": 18, "save_total_limit": 5}
    done(train(tmp_path / "whole", settings, settings))
    shutil.copytree(tmp_path / "whole" / "checkpoint-18", tmp_path / "resumed" / "checkpoint-18")
    done(train(tmp_path / "resumed", settings, settings))
    assert (tmp_path / "whole" / ADAPTER).read_bytes() == (tmp_path / "resumed" / ADAPTER).read_bytes()


def test_a_run_that_more_processes_would_end_in_the_past_is_refused(train, tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 1, "save_steps": 20, "allow_config_change": "true"}
    done(train(tmp_path / "out", settings))
    codes, texts = train(tmp_path / "out", settings, settings)
    assert codes == [1, 1]
    assert (
        "it is at step 32, and the run has 16 steps now" in texts[0]
        and "lower gradient_accumulation_steps" in texts[0]
    )


def launcher(config, *options):
    """Return what `accelerate launch` makes of a configuration: its arguments, completed."""
    args = launch_command_parser().parse_args(["--config_file", str(config), *options, "train_sft.py"])
    return _validate_launch_command(args)[0]


WHOLE = {**PACKED, **TOWER, "load_in_4bit": "false"}
# what is quantised, how the batches are made, and what trains
SHARDED_FORMS = {
    "4 bit, packed": PACKED,
    "4 bit, packed, compiled": {**PACKED, "compile_layers": "true"},
    "4 bit, padded, tower trains": TOWER,
    "whole weights, packed, tower trains": WHOLE,
    "whole weights, packed, tower trains, compiled": {**WHOLE, "compile_layers": "true"},
    "simple scales, recomputed, embedding on the host": {
        "use_bnb_nested_quant": "false",
        "gradient_checkpointing": "true",
        "offload_embedding": "true",
    },
}
OFTEN = "simple scales, recomputed, embedding on the host"


@pytest.mark.parametrize(
    "form", [form if form == OFTEN else pytest.param(form, marks=pytest.mark.slow) for form in SHARDED_FORMS]
)
def test_a_sharded_model_learns_as_in_one_process_and_with_ddp(train, tmp_path, form):
    plain = {**SAVED, **SHARDED_FORMS[form], "eval_strategy": "steps", "eval_steps": 6}
    done(train(tmp_path / "one", {**plain, "gradient_accumulation_steps": 2}))
    done(train(tmp_path / "ddp", plain, plain))
    settings = {**plain, "shard_base": "true"}
    done(train(tmp_path / "sharded", settings, settings))
    assert_same_curves(tmp_path / "one", tmp_path / "sharded", steps=12)
    assert_same_curves(tmp_path / "ddp", tmp_path / "sharded", steps=12)
    assert_same_curves(tmp_path / "ddp", tmp_path / "sharded", steps=2, keys=("eval_loss",))
    ddp, sharded = (load_file(tmp_path / name / ADAPTER) for name in ("ddp", "sharded"))
    assert {name: (x.shape, x.dtype) for name, x in ddp.items()} == {n: (x.shape, x.dtype) for n, x in sharded.items()}
    for name in ddp:
        torch.testing.assert_close(ddp[name], sharded[name], atol=1e-4, rtol=0)
    shutil.copytree(tmp_path / "sharded" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    done(train(tmp_path / "resumed", settings, settings))
    assert (tmp_path / "sharded" / ADAPTER).read_bytes() == (tmp_path / "resumed" / ADAPTER).read_bytes()


def test_a_sharded_base_that_comes_in_4_bit_learns_as_with_ddp(train, tiny_base, tmp_path):
    stored = save_stored(tiny_base, tmp_path / "stored", ["lm_head", "layers.0.mlp"])  # the tower is in 4 bit too
    settings = {**SAVED, "model_name_or_path": stored}
    done(train(tmp_path / "ddp", settings, settings))
    settings["shard_base"] = "true"
    done(train(tmp_path / "sharded", settings, settings))
    assert_same_curves(tmp_path / "ddp", tmp_path / "sharded", steps=12)


def test_a_sharded_run_goes_on_without_sharding(train, tmp_path):
    done(train(tmp_path / "sharded", SHARDED, SHARDED))
    shutil.copytree(tmp_path / "sharded" / "checkpoint-6", tmp_path / "ddp" / "checkpoint-6")
    done(train(tmp_path / "ddp", SAVED, SAVED))
    assert_same_curves(tmp_path / "sharded", tmp_path / "ddp", steps=12)


def test_gradients_that_are_not_finite_end_all_processes_of_a_sharded_model(train, tmp_path):
    codes, texts = train(tmp_path / "out", SHARDED, SHARDED, spoil=8)
    assert codes == [1, 1]
    assert all("step 9: the gradients are not finite" in text for text in texts)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize(
    "settings, environment, expected",
    [
        (SHARDED, {}, "shard_base: needs several processes, found 1; see --num_processes"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "launch with accelerate_config.yaml and set shard_base: true"),
    ],
)
def test_sharding_that_would_go_wrong_is_refused(train, tmp_path, settings, environment, expected):
    codes, [text] = train(tmp_path / "out", settings, env=environment)
    assert codes == [1] and expected in text


@pytest.mark.parametrize("config", [ZERO2, NODES, ROOT / "accelerate_config.yaml"], ids=lambda path: path.stem)
def test_accelerate_reads_the_configuration(config):
    found = load_config_from_file(str(config))
    assert found.mixed_precision == "no" or config == ZERO2
    assert found.num_processes % found.num_machines == 0 and not found.use_cpu


def test_the_configuration_of_several_machines_reaches_the_launcher():
    args = launcher(NODES, "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    prepare_multi_gpu_env(args)
    found = args.nnodes, args.nproc_per_node, args.node_rank, args.rdzv_endpoint
    assert found == ("2", "4", 1, "10.0.0.1:29500")


@pytest.mark.slow
def test_two_machines_train_together(tiny_base, mixed_data, tmp_path):
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(NODES)]
    words = ["--num_processes", "2", "--main_process_port", "29641", "--machine_rank"]
    script = ["train_sft.py", *train_args(tiny_base, mixed_data, tmp_path / "out", eval_strategy="no")]
    machines = [subprocess.Popen([*command, *words, str(rank), *script], cwd=ROOT) for rank in range(2)]
    assert [machine.wait(timeout=180) for machine in machines] == [0, 0]
    assert read_manifest(tmp_path / "out" / "checkpoint-4")["run"]["processes"] == 2


def zero_environment(monkeypatch):
    """Return what `accelerate launch` tells the processes under DeepSpeed, on a CPU."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    args = launcher(ZERO2)
    args.deepspeed_fields_from_accelerate_config = "deepspeed_config_file,zero3_init_flag"  # as launch_command does
    _, environment = prepare_deepspeed_cmd_env(args)
    kept = {key: x for key, x in environment.items() if "DEEPSPEED" in key or key == "ACCELERATE_CONFIG_DS_FIELDS"}
    return {**kept, "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}


@needs_deepspeed
def test_the_trainer_fills_in_the_configuration_of_deepspeed(monkeypatch):
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
    from trl import SFTConfig

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = HfTrainerDeepSpeedConfig(str(ZERO2.with_suffix(".json")))
    config.trainer_config_process(SFTConfig(output_dir="out", use_cpu=True, max_grad_norm=0.5, bf16=True))
    assert (config.config["gradient_clipping"], config.config["bf16"]["enabled"]) == (0.5, True)


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_learns_as_one_process_and_stops_at_gradients_that_are_not_finite(train, tmp_path, monkeypatch):
    zero = {"env": zero_environment(monkeypatch), "pretend": "DEEPSPEED"}
    settings = {**PACKED, **TOWER, "max_steps": 12, "save_steps": 6, "save_total_limit": 5}
    done(train(tmp_path / "one", {**settings, "gradient_accumulation_steps": 2}))
    done(train(tmp_path / "two", settings, settings, **zero))
    assert_same_curves(tmp_path / "one", tmp_path / "two", steps=12)
    shutil.copytree(tmp_path / "two" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    done(train(tmp_path / "resumed", settings, settings, **zero))
    assert_same_curves(tmp_path / "two", tmp_path / "resumed", steps=12)
    codes, texts = train(tmp_path / "spoilt", settings, settings, spoil=8, **zero)
    assert codes == [1, 1] and all("step 9: the gradients are not finite" in text for text in texts)


SRUN = """#!/bin/bash
printf '%s\\n' "$@" > srun.args
trap '[ -n "$UNSAVED" ] && touch "$UNSAVED_MARKER"; exit "$ON_TERM"' TERM
touch started
[ -n "$WAITS" ] && for _ in $(seq 200); do sleep 0.05; done
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node-1\\nnode-2\\n'; else echo "$@" >> scontrol.args; fi
"""


def slurm(folder, *, code, asked=False, on_term=1, unsaved=False):
    """Run the Slurm script among commands that are not Slurm's; return its exit code and what it asked Slurm for."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "CODE": str(code), "ON_TERM": str(on_term), "WAITS": "yes" if asked else ""}
    own["UNSAVED"] = "yes" if unsaved else ""
    command = ["bash", ROOT / "configs" / "slurm.sh", "--output_dir", "/shared/a b"]
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, **job, **own})
    if asked:
        while not (folder / "started").exists():
            assert process.poll() is None
        process.terminate()
    found = process.wait(timeout=30)
    asked_for = folder / "scontrol.args"
    return found, asked_for.read_text().split() if asked_for.exists() else []


@pytest.mark.parametrize("code, requeues", [(75, True), (0, False), (1, False)])
def test_the_slurm_script_queues_again_what_was_stopped_and_nothing_else(tmp_path, code, requeues):
    assert slurm(tmp_path, code=code) == (code, ["requeue", "7"] if requeues else [])
    words = (tmp_path / "srun.args").read_text().splitlines()
    assert words[:3] == ["--kill-on-bad-exit=1", "bash", "-c"] and words[-2:] == ["--output_dir", "/shared/a b"]


@pytest.mark.parametrize("on_term, requeues", [(1, True), (75, True), (0, False)])
def test_the_slurm_script_passes_sigterm_on_and_queues_again_unless_the_run_was_done(tmp_path, on_term, requeues):
    expected = (on_term, ["requeue", "7"] if requeues else [])
    assert slurm(tmp_path, code=0, asked=True, on_term=on_term) == expected


def test_the_slurm_script_does_not_queue_again_what_could_not_save(tmp_path):
    assert slurm(tmp_path, code=0, asked=True, on_term=1, unsaved=True) == (1, [])
    assert not list(tmp_path.glob(".unsaved-*"))
