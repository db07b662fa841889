"""What trackers are told of a run, and what they are not: real ones, their files read back."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

import train_sft
from data_prep import fingerprint, load_splits
from helpers.planted_secrets import FOLDER, SECRETS, TOKEN, USER
from helpers.runs import train_args
from training.trackers import code_commit

os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()  # it looks when it is imported, and never again
SETTINGS = {"project": "skin", "run_name": "small", "lora_dropout": 0.1}


@pytest.fixture
def secret_place(tmp_path, monkeypatch):
    """An output folder whose path, like the user and the token, must not get to a tracker."""
    for name, value in (("HF_TOKEN", TOKEN), ("WANDB_API_KEY", TOKEN), ("USER", USER), ("LOGNAME", USER)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # it keeps the environment of its first run
    return tmp_path / FOLDER / "run"


def train_twice(base, data, out, tracker):
    """Train to step 2, and on to step 4 by a second start; return the curve by step and the run's name."""
    for steps in (2, 4):
        changed = {"max_steps": steps, "allow_config_change": "true"}
        train_sft.main(train_args(base, data, out, report_to=tracker, **SETTINGS, **changed))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    facts = json.loads((out / "facts.json").read_text())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}, f"small-{facts['run_id']}"


def expected_config(data):
    return {
        "learning_rate": 1e-3, "lora_r": 4, "lora_dropout": 0.1, "max_steps": 4, "train_samples": 32,
        "data_fingerprint": fingerprint(load_splits(str(data))["train"]), "code_commit": code_commit(),
    }  # fmt: skip


def assert_nothing_secret(content, *more):
    assert [secret for secret in (*SECRETS, *more) if str(secret).encode() in content] == []


def test_tensorboard_gets_curves_and_settings_and_no_path(tiny_base, demo_data, secret_place):
    curve, name = train_twice(tiny_base, demo_data, secret_place, "tensorboard")
    folder = secret_place / "runs" / name
    events = EventAccumulator(str(folder)).Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx(curve) and list(found) == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("eval/loss")] == [2, 4]
    newest = max(folder.glob("*/hparams.yml"), key=lambda path: float(path.parent.name)).read_text()
    for key, value in expected_config(demo_data).items():
        assert f"{key}: {value}\n" in newest
    files = [path for path in (secret_place / "runs").rglob("*") if path.is_file()]
    assert_nothing_secret(b"".join(path.read_bytes() for path in files), secret_place, tiny_base, demo_data)


def read_wandb(path):
    """Yield the records of a run's file: LevelDB's log, in blocks of 32 KiB, after 7 bytes of wandb's own."""
    data, at, parts = path.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_wandb_gets_curves_and_settings_and_no_path(tiny_base, demo_data, secret_place):
    curve, name = train_twice(tiny_base, demo_data, secret_place, "wandb")
    sent = sorted((secret_place / "wandb").glob("offline-run-*/*.wandb"))
    records = [record for path in sent for record in read_wandb(path)]
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.project, run.display_name, run.run_id) for run in runs} == {("skin", name, name[-8:])}
    rows = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in records]
    assert {row["_step"]: row["train/loss"] for row in rows if "train/loss" in row} == pytest.approx(curve)
    updates = [u for r in records for u in (*r.config.update, *r.run.config.update)]
    told = {update.key: json.loads(update.value_json) for update in updates if update.key}
    expected = expected_config(demo_data)
    assert {key: told[key] for key in expected} == expected
    content = b"".join(path.read_bytes() for path in sent)
    for path in (secret_place / "wandb").glob("offline-run-*/files/*"):
        content += path.read_bytes()
    assert_nothing_secret(content, secret_place, tiny_base, demo_data)


def test_trackio_gets_curves_and_settings_and_no_path(tiny_base, demo_data, secret_place):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    curve, name = train_twice(tiny_base, demo_data, secret_place, "trackio")
    [run] = trackio.Api().runs("skin")
    assert run.name == name
    expected = expected_config(demo_data)
    assert {key: run.config[key] for key in expected} == expected
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("skin", name)
    assert {row["step"]: row["train/loss"] for row in rows if "train/loss" in row} == pytest.approx(curve)
    files = [path for path in Path(os.environ["TRACKIO_DIR"]).rglob("*") if path.is_file()]
    assert_nothing_secret(b"".join(path.read_bytes() for path in files), secret_place, tiny_base, demo_data)


def test_a_tracker_that_cannot_start_ends_the_run_before_it_loads_a_model(tiny_base, demo_data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    wandb.teardown()
    monkeypatch.setattr(train_sft, "build_model", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"^report_to: wandb cannot be started: ") as error:
        train_sft.main(train_args(tiny_base, demo_data, tmp_path, report_to="wandb"))
    assert "\n" not in str(error.value)


def test_the_commit_of_the_code_is_read_from_its_git_folder(tmp_path):
    assert code_commit(tmp_path) is None
    (tmp_path / ".git" / "refs" / "heads").mkdir(parents=True)
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (tmp_path / ".git" / "packed-refs").write_text("# pack-refs\n" + "a" * 40 + " refs/heads/main\n")
    assert code_commit(tmp_path) == "a" * 40
    (tmp_path / ".git" / "refs" / "heads" / "main").write_text("b" * 40 + "\n")
    assert code_commit(tmp_path) == "b" * 40
    (tmp_path / ".git" / "HEAD").write_text("c" * 40 + "\n")
    assert code_commit(tmp_path) == "c" * 40
