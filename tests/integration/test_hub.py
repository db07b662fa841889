"""Pushing with the real client to a Hub on loopback: the uploaded files, refusals, retries and failures."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

import predict
from helpers.hub_server import TOKEN, HubServer
from helpers.runs import train_args
from publishing import hub
from publishing.hub import collect_files
from push_adapter import main

REPO = "tester/skin"
PUSH = {"push_to_hub": "true", "hub_model_id": REPO, "eval_strategy": "no"}
UPLOADED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "facts.json",
    "processor_config.json",
    "run.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_metrics.png",
}


@pytest.fixture(scope="module")
def server():
    server = HubServer().start()
    yield server
    server.stop()


@pytest.fixture
def own_server():
    server = HubServer().start()
    yield server
    server.stop()


def call(server, home, *command, **environment):
    """Run one of this project's commands in a process that knows the loopback Hub and nothing else."""
    # one thread: on a busy machine two that wait for each other take many times as long
    env = {**os.environ, "OMP_NUM_THREADS": "1", **server.environment(home), **environment}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def fork(fork_server):
    """Run a command in a forked process that knows the loopback Hub; return its exit code and output."""

    def run(server, home, command, *words, **environment):
        [code], [output] = fork_server.run(command, words, env=server.environment(home, **environment))
        return SimpleNamespace(returncode=code, output=output)

    return run


@pytest.fixture
def push(fork, tmp_path):
    def run(server, *words, **environment):
        return fork(server, tmp_path / "home", "push_adapter", *words, **environment)

    return run


@pytest.fixture(scope="module")
def trained(server, fork, tiny_base, demo_data, tmp_path_factory):
    """A run that pushed, in a process of its own."""
    folder = tmp_path_factory.mktemp("hub")
    settings = {"max_steps": 30, "save_steps": 10, "learning_rate": 5e-3, "per_device_train_batch_size": 8}
    args = train_args(tiny_base, demo_data, folder / "run", **settings, **PUSH)
    done = fork(server, folder / "home", "train_sft", *args)
    assert done.returncode == 0, done.output
    arrived, commits = dict(server.files(REPO)), list(server.repos[REPO]["commits"])
    return SimpleNamespace(out=folder / "run", done=done, arrived=arrived, commits=commits)


def test_a_run_pushes_the_listed_files_to_a_private_repository(server, trained):
    assert server.repos[REPO]["private"] is True
    assert set(trained.arrived) == UPLOADED
    assert trained.arrived["adapter_model.safetensors"] == (trained.out / "adapter_model.safetensors").read_bytes()
    assert trained.arrived["README.md"] == (trained.out / "README.md").read_bytes()
    assert f"pushed to {server.url}/{REPO}/commit/" in trained.done.output
    assert server.unknown == []


def test_checkpoints_are_pushed_during_training(trained):
    assert trained.commits[0] == "Upload checkpoint-10"
    assert trained.commits[-1] == "Upload adapter, processor and model card"
    assert set(trained.commits[1:-1]) <= {"Upload checkpoint-20"}  # skipped during an upload


def test_no_token_path_or_optimizer_state_is_sent(server, trained, tiny_base, demo_data):
    sent = b"\n".join([*server.bodies, *trained.arrived.values()])
    for secret in (TOKEN, tiny_base, tiny_base.parent, demo_data, trained.out.parent, "optimizer.pt"):
        assert str(secret).encode() not in sent
    config = json.loads(trained.arrived["adapter_config.json"])
    assert config["base_model_name_or_path"] == tiny_base.name
    own = json.loads((trained.out / "adapter_config.json").read_text())
    assert own["base_model_name_or_path"] == str(tiny_base)


def test_a_run_that_pushes_leaves_no_token_in_its_folder(trained):
    left = {path: path.read_bytes() for path in trained.out.rglob("*") if path.is_file()}
    assert not any(path.name == "training_args.bin" for path in left)
    assert not any(TOKEN.encode() in content for content in left.values())
    assert TOKEN not in trained.done.output


def test_the_adapter_from_the_hub_answers_like_the_one_from_the_folder(
    server, trained, tiny_base, demo_raw, tmp_path, capsys
):
    (tmp_path / "images").mkdir()
    for number in range(1, 13):
        shutil.copy(demo_raw / "images" / f"{number:04}.jpg", tmp_path / "images")
    images = ["--image", str(tmp_path / "images"), "--question", "What condition is shown?", "--max-new-tokens", "12"]
    predict.main(["--adapter", str(trained.out), "--out", str(tmp_path / "local.jsonl"), *images])
    options = ["--adapter", REPO, "--base", tiny_base, "--out", tmp_path / "hub.jsonl", *images]
    asked = call(server, tmp_path / "home", "predict.py", *options)
    assert asked.returncode == 0, asked.stderr
    local, remote = ((tmp_path / name).read_text() for name in ("local.jsonl", "hub.jsonl"))
    assert remote == local
    assert len({json.loads(line)["prediction"] for line in local.splitlines()}) > 1
    assert server.unknown == []


def test_pushing_again_sends_nothing_twice(server, push, trained):
    sent, commits = server.count("PUT", "/lfs/"), len(server.repos[REPO]["commits"])
    done = push(server, trained.out, REPO)
    assert done.returncode == 0, done.output
    assert (server.count("PUT", "/lfs/"), len(server.repos[REPO]["commits"])) == (sent, commits)


def test_a_push_after_evaluation_sends_metrics_and_plots_but_no_images(server, push, trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained.out, out)
    (out / "eval" / "images").mkdir(parents=True)
    figure = {"value": 0.9, "low": 0.8, "high": 0.95}
    runs = {"adapter": {"diagnosis": {"accuracy": figure}}}
    metrics = {"split": "test", "samples": 4, "diagnosed": 4, "runs": runs}
    (out / "eval" / "metrics.json").write_text(json.dumps(metrics))
    for name in ("confusion.png", "patient.png", "report.html", "predictions.jsonl", "images/patient.png"):
        (out / "eval" / name).write_bytes(b"...")
    done = push(server, out, "tester/evaluated", "--revision", "v2")
    assert done.returncode == 0, done.output
    assert server.files("tester/evaluated") == {}
    arrived = server.files("tester/evaluated", "v2")
    assert set(arrived) == UPLOADED | {"eval/metrics.json", "eval/confusion.png"}
    assert b"| accuracy | 0.90 (0.80 to 0.95) |" in arrived["README.md"]
    again = push(server, out, "tester/evaluated", "--revision", "v2")
    assert again.returncode == 0, again.output


def test_the_card_of_a_checkpoint_names_its_step(trained):
    files = collect_files(trained.out, trained.out / "checkpoint-20")
    assert set(files) == UPLOADED
    assert files["adapter_model.safetensors"] != trained.arrived["adapter_model.safetensors"]
    assert b"**Training is not finished**: this is the adapter after step 20 of 30." in files["README.md"]
    assert json.loads(files["facts.json"])["training"]["step"] == 20


def test_after_a_network_failure_the_printed_command_pushes(own_server, fork, tiny_base, demo_data, tmp_path):
    own_server.stop_after = f"/api/models/{REPO}"  # the last question before training
    out = tmp_path / "my run"
    command = train_args(tiny_base, demo_data, out, **PUSH)
    done = fork(own_server, tmp_path / "home", "train_sft", *command)
    assert done.returncode == 1
    lines = done.output.splitlines()
    [warning] = [line for line in lines if line.startswith("warning: checkpoint-2 not pushed to tester/skin: ")]
    assert warning.endswith("; training continues") and f": ConnectError at {own_server.url}: " in warning
    pattern = r"error: not pushed to (.+?): .+; the adapter is in (.+); to push it later: (.+)"
    match = re.fullmatch(pattern, lines[-1])
    assert match and (match[1], match[2]) == (REPO, str(out))
    assert (out / "adapter_model.safetensors").is_file() and (out / "README.md").is_file()
    assert own_server.files(REPO) == {}
    own_server.stop_after = None
    own_server.start()
    python, *command = shlex.split(match[3])
    assert (python, command) == ("python", ["push_adapter.py", str(out), REPO])
    later = call(own_server, tmp_path / "home", *command)
    assert later.returncode == 0, later.stderr
    assert set(own_server.files(REPO)) == UPLOADED


REFUSED = [
    (None, {"HF_TOKEN": ""}, "no token to push to tester/other with: log in with `hf auth login`, or set HF_TOKEN"),
    (None, {"HF_TOKEN": "hf_old"}, "cannot push to tester/other: the Hub says 401 (Invalid credentials in Auth"),
    ("/create", {}, "cannot push to tester/other: the Hub says 403 (You have no right to do this); the token may"),
    ("/auth-check/write", {}, "cannot push to tester/other: the Hub says 403"),
    ("/commit/", {}, "not pushed to tester/other: the Hub says 403"),
    ("/objects/batch", {}, "not pushed to tester/other: the Hub says 403"),
    (None, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot push to tester/other: ConnectError at http://127.0.0.1:9: "),
    (None, {"HF_HUB_OFFLINE": "1"}, "offline mode is enabled"),
]


@pytest.mark.parametrize(("wrong", "environment", "message"), REFUSED)
def test_a_refused_push_ends_with_one_line(own_server, push, trained, wrong, environment, message):
    own_server.refuse = wrong
    done = push(own_server, trained.out, "tester/other", **environment)
    assert done.returncode == 1
    *progress, line = done.output.splitlines()
    assert not any("Traceback" in bar for bar in progress)  # bars of the upload before it was refused
    assert line.startswith("error: ") and message in line
    assert ("the adapter is in" in line) == line.startswith("error: not pushed")


@pytest.mark.parametrize("word", ["/create", "/commit/"])
def test_requests_to_a_busy_hub_are_retried_and_make_one_commit(own_server, push, trained, word):
    own_server.busy = (word, 3)
    done = push(own_server, trained.out, REPO)
    assert done.returncode == 0, done.output
    assert done.output.count("the Hub says 503 (Come back later); trying again in 0.01 s\n") == 3
    assert own_server.repos[REPO]["commits"] == ["Upload adapter, processor and model card"]
    assert own_server.repos[REPO]["private"] and set(own_server.files(REPO)) == UPLOADED


def test_a_commit_whose_response_was_lost_is_not_repeated(own_server, push, trained):
    own_server.lost = 1
    done = push(own_server, trained.out, REPO)
    assert done.returncode == 0, done.output
    assert "the Hub says 504 (No answer in time); trying again in 0.01 s\n" in done.output
    assert own_server.repos[REPO]["commits"] == ["Upload adapter, processor and model card"]


def test_a_push_gives_up_when_the_hub_stays_busy(own_server, push, trained):
    before = (trained.out / "adapter_model.safetensors").read_bytes()
    own_server.busy = ("/commit/", 99)
    done = push(own_server, trained.out, REPO)
    assert done.returncode == 1
    line = done.output.splitlines()[-1]
    assert line.startswith("error: not pushed to tester/skin: the Hub says 503 (Come back later); the adapter is in")
    assert own_server.count("POST", "/commit/") == 5 and own_server.repos[REPO]["commits"] == []
    assert (trained.out / "adapter_model.safetensors").read_bytes() == before


def test_uploads_never_overlap_and_a_failed_one_is_only_a_warning(monkeypatch, capsys, tmp_path):
    gate, sent = threading.Event(), []

    def upload(files, repo_id, *, revision, message):
        assert gate.wait(10)
        sent.append((files, repo_id, revision, message))
        if message == "Upload checkpoint-3":
            raise RuntimeError("the line is\ndown")

    monkeypatch.setattr(hub, "collect_files", lambda output_dir, checkpoint: {"name": checkpoint.name})
    monkeypatch.setattr(hub, "commit_files", upload)
    background = hub.BackgroundPush(REPO, revision="v2")
    background.wait()
    background.start(tmp_path / "checkpoint-1", tmp_path)
    background.start(tmp_path / "checkpoint-2", tmp_path)  # skipped during the first upload
    gate.set()
    background.wait()
    background.start(tmp_path / "checkpoint-3", tmp_path)
    background.wait()
    assert [message for *_, message in sent] == ["Upload checkpoint-1", "Upload checkpoint-3"]
    assert sent[0][:3] == ({"name": "checkpoint-1"}, REPO, "v2")
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("warning: checkpoint-3 not pushed to tester/skin: RuntimeError at ")
    assert line.endswith(": the line is down; training continues")


def test_a_public_repository_is_refused_for_a_private_push(own_server, push, trained):
    assert push(own_server, trained.out, REPO, "--public").returncode == 0
    assert own_server.repos[REPO]["private"] is False
    own_server.refuse = "/preupload/"
    done = push(own_server, trained.out, REPO, "--public", "--revision", "v 2")
    assert done.output.endswith(
        f"to push it later: python push_adapter.py {trained.out} {REPO} --revision 'v 2' --public\n"
    )
    done = push(own_server, trained.out, REPO)
    assert done.returncode == 1
    assert done.output == (
        "error: tester/skin is public on the Hub and should be private; "
        "change the option (hub_private_repo, --public) or the repository\n"
    )


def test_a_public_data_set_is_refused_for_a_private_push(own_server, tmp_path):
    own_server.repos["tester/set"] = {"private": False, "branches": {"main": {}}, "commits": []}
    claim = "from common.hub_client import open_repository; open_repository('tester/set', repo_type='dataset')"
    done = call(own_server, tmp_path / "home", "-c", claim)
    assert "ValueError: tester/set is public on the Hub and should be private; " in done.stderr
    assert own_server.count("GET", "/api/datasets/tester/set") == 2 and own_server.unknown == []


def test_the_error_names_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"no adapter in {tmp_path}: adapter_model.safetensors is missing")):
        main([str(tmp_path), REPO])


def test_an_evaluation_pushes_its_metrics_and_the_card(own_server, fork, trained, demo_data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained.out, out)
    command = ["--adapter", out, "--dataset", demo_data, "--push", REPO, "--max-new-tokens", 4, "--no-probabilities"]
    done = fork(own_server, tmp_path / "home", "eval_sft", *command)
    assert done.returncode == 0, done.output
    files = own_server.files(REPO)
    added = {"eval/metrics.json", "eval/confusion.png", "eval/subgroups.png"}
    assert set(files) == (UPLOADED | added) and own_server.repos[REPO]["private"]
    assert b"| accuracy |" in files["README.md"] and files["README.md"] == (out / "README.md").read_bytes()
    assert not any(str(tmp_path).encode() in content for content in files.values())
    refused = fork(own_server, tmp_path / "home", "eval_sft", *command, "--out", tmp_path / "elsewhere")
    assert (refused.returncode, refused.output.count("\n")) == (
        1,
        1,
    ) and "--push: needs the adapter's folder" in refused.output
