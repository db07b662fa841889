"""Asking a trained adapter: about files, a folder, a split; alone, in batches, without the adapter."""

import json
import shutil

from cli import run

import pytest
import torch
from conftest import train_args
from PIL import Image

import predict
import train_sft
from answering import load_answering_model


@pytest.fixture(scope="module")
def adapter(tiny_base, demo_data, tmp_path_factory):
    """A run of 30 steps that has learnt to say something."""
    out = tmp_path_factory.mktemp("run") / "adapter"
    settings = {"max_steps": 30, "save_steps": 30, "eval_strategy": "no", "learning_rate": 5e-3, "lora_r": 8}
    train_sft.main(train_args(tiny_base, demo_data, out, **settings, per_device_train_batch_size=8))
    return out


def ask(capsys, *options):
    predict.main([str(option) for option in options])
    return capsys.readouterr().out.strip()


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_image_gives_one_answer(adapter, demo_raw, capsys):
    image = demo_raw / "images" / "0001.jpg"
    command = ["--adapter", adapter, "--image", image, "--question", "What condition is shown?"]
    answer = ask(capsys, *command)
    assert answer and "\n" not in answer and "<|" not in answer
    assert ask(capsys, *command) == answer


def test_a_split_is_answered_in_order_with_what_is_known(adapter, demo_data, demo_splits, tmp_path, capsys):
    out = tmp_path / "deep" / "answers.jsonl"
    assert "4 answers in" in ask(capsys, "--adapter", adapter, "--dataset", demo_data, "--out", out)
    rows = rows_of(out)
    assert [row["id"] for row in rows] == demo_splits["test"]["id"]
    first = demo_splits["test"][0]
    assert rows[0]["reference"] == first["messages"][-1]["content"]
    assert rows[0]["question"] == first["messages"][-2]["content"].removeprefix("<image>\n")
    assert set(rows[0]) == {"id", "label", "group", "skin_type", "reference", "question", "prediction"}


def test_batches_change_no_answer(adapter, demo_data, tmp_path, capsys):
    """Left padding: a prompt's answer must not depend on its neighbours."""
    answers = []
    for size in (1, 3, 8):
        out = tmp_path / f"{size}.jsonl"
        ask(
            capsys,
            "--adapter",
            adapter,
            "--dataset",
            demo_data,
            "--split",
            "train",
            "--out",
            out,
            "--batch-size",
            size,
        )
        answers.append(rows_of(out))
    assert answers[0] == answers[1] == answers[2]
    assert len({row["prediction"] for row in answers[0]}) > 1


def test_a_folder_is_answered_image_by_image(adapter, tmp_path, capsys):
    for name in ("b.png", "a.JPG"):
        Image.new("RGB", (60, 60), "red").save(tmp_path / name, "PNG")
    (tmp_path / "notes.txt").write_text("not an image")
    lines = ask(capsys, "--adapter", adapter, "--image", tmp_path, "--question", "What?").splitlines()
    assert [line.split(":")[0] for line in lines] == ["a.JPG", "b.png"]


def test_several_images_share_one_question(adapter, demo_raw, capsys):
    images = [word for n in (1, 2) for word in ("--image", demo_raw / "images" / f"000{n}.jpg")]
    assert "\n" not in ask(capsys, "--adapter", adapter, *images, "--question", "First <image>, then <image>?")


def test_a_checkpoint_and_the_adapter_answer_alike_and_the_base_alone_does_not(adapter, tiny_base, demo_raw, capsys):
    question = ["--image", demo_raw / "images" / "0001.jpg", "--question", "What condition is shown?"]
    ours = ask(capsys, "--adapter", adapter, *question)
    assert ask(capsys, "--adapter", adapter / "checkpoint-30", *question) == ours
    assert ask(capsys, "--base", tiny_base, *question, "--max-new-tokens", 8) != ours


def test_the_base_model_is_loaded_as_in_training_unless_told_otherwise(adapter, capsys):
    facts = json.loads((adapter / "run.json").read_text())
    (adapter / "run.json").write_text(json.dumps({**facts, "double_quant": False}))

    def load(**options):
        model = load_answering_model(str(adapter), **options)
        return model.get_base_model().model.language_model.layers[0].mlp.up_proj.base_layer

    assert not load().weight.quant_state.nested
    (adapter / "run.json").write_text(json.dumps(facts))
    assert load().weight.quant_state.nested
    assert type(load(quantization="none")) is torch.nn.Linear
    (adapter / "run.json").rename(adapter / "elsewhere.json")
    assert type(load()) is torch.nn.Linear
    assert "does not say how its base was loaded" in capsys.readouterr().err
    (adapter / "elsewhere.json").rename(adapter / "run.json")


def test_decoding_is_greedy_whatever_the_base_models_defaults(adapter, tiny_base, demo_raw, capsys):
    question = ["--image", demo_raw / "images" / "0001.jpg", "--question", "What condition is shown?"]
    plain = ask(capsys, "--adapter", adapter, *question)
    path = tiny_base / "generation_config.json"
    own = path.read_text()
    path.write_text(json.dumps({**json.loads(own), "repetition_penalty": 50.0, "do_sample": True, "temperature": 9.0}))
    assert ask(capsys, "--adapter", adapter, *question) == plain
    path.write_text(own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name an adapter (--adapter), or a base model"),
        (["--adapter", "x"], "name either images (--image, with --question) or a prepared data set"),
        (["--adapter", "x", "--image", "Makefile"], "--question: what should be asked"),
        (["--adapter", "x", "--image", "/nowhere.jpg", "--question", "?"], "--image: no file or folder /nowhere.jpg"),
        (
            ["--adapter", "x", "--image", "configs", "--question", "?"],
            "--image: no file in configs is named like an image",
        ),
        (["--adapter", "x", "--image", "tests", "--image", "configs", "--question", "?"], "name one folder, or files"),
        (["--adapter", "x", "--image", "Makefile", "--question", "?"], "--image: Makefile: not an image"),
        (["--adapter", "x", "--dataset", "x", "--question", "?"], "--question: a prepared data set brings its own"),
        (["--base", "x", "--image", "Makefile", "--question", "?", "--out", "tests"], "--out: tests is a folder"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(capsys, options, message):
    assert run(lambda: predict.main(options)) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


def test_markers_in_a_question_must_fit_the_images(adapter, demo_raw, capsys):
    image = str(demo_raw / "images" / "0001.jpg")
    question = ["--image", image, "--question", "a<image><image>"]
    assert run(lambda: predict.main(["--adapter", str(adapter), *question])) == 1
    assert "2 <image> marker(s) for 1 image(s)" in capsys.readouterr().err


def test_a_missing_or_broken_adapter_is_named(adapter, demo_raw, tmp_path, capsys):
    question = ["--image", str(demo_raw / "images" / "0001.jpg"), "--question", "What?"]
    assert run(lambda: predict.main(["--adapter", "/nowhere", *question])) == 1
    assert "--adapter: no adapter in '/nowhere'" in capsys.readouterr().err
    shutil.copytree(adapter, tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"")
    assert run(lambda: predict.main(["--adapter", str(tmp_path / "broken"), *question])) == 1
    assert "unreadable weights" in capsys.readouterr().err.splitlines()[-1]


def test_answers_replace_a_file_only_when_all_are_there(adapter, demo_data, tmp_path):
    out = tmp_path / "old.jsonl"
    out.write_text("kept")
    options = ["--adapter", str(adapter), "--dataset", str(demo_data), "--out", str(out)]
    assert run(lambda: predict.main([*options, "--split", "dev"])) == 1
    assert out.read_text() == "kept"
    predict.main(options)
    assert len(rows_of(out)) == 4
    assert not (tmp_path / "old.jsonl.unfinished").exists()


def test_a_split_that_is_not_there_is_named(adapter, demo_data, capsys):
    assert run(lambda: predict.main(["--adapter", str(adapter), "--dataset", str(demo_data), "--split", "dev"])) == 1
    assert "has no split 'dev', only ['test', 'train', 'validation']" in capsys.readouterr().err
