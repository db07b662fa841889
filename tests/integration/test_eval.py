"""eval_sft.py: the metrics are those of the predictions, also after a kill and with two processes."""

import json
import os
import re
import shutil
import signal

from common.cli import run

import pytest
from datasets import load_from_disk
from PIL import Image
from safetensors.torch import load_file, save_file

import eval_sft
import merge_adapter
import train_sft
from common.files import locked
from evaluation.journal import Journal
from helpers.runs import train_args


@pytest.fixture(scope="module")
def adapter(tiny_base, demo_data, tmp_path_factory):
    """A run of 60 steps, after which answers name some condition."""
    out = tmp_path_factory.mktemp("run") / "adapter"
    settings = {"max_steps": 60, "save_steps": 60, "eval_strategy": "no", "learning_rate": 5e-3, "lora_r": 8}
    train_sft.main(train_args(tiny_base, demo_data, out, **settings, per_device_train_batch_size=8))
    return out


def options(adapter, data, out, *more):
    common = ["--adapter", adapter, "--dataset", data, "--split", "train", "--out", out, "--max-new-tokens", 12]
    return [str(word) for word in (*common, *more)]


@pytest.fixture(scope="module")
def evaluated(adapter, demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    eval_sft.main(options(adapter, demo_data, out, "--baseline", "--min-group", 4))
    return out


def read(folder):
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return json.loads((folder / "metrics.json").read_text()), rows


def test_the_metrics_are_those_of_the_predictions(evaluated, demo_data):
    summary, rows = read(evaluated)
    ours = [row for row in rows if row["run"] == "adapter"]
    split = load_from_disk(str(demo_data))["train"]
    asked = [
        (sample["id"], message["content"])
        for sample in split
        for message in sample["messages"]
        if message["role"] == "assistant"
    ]
    assert [(row["id"], row["reference"]) for row in ours] == asked and len(asked) > 32
    assert (summary["samples"], summary["diagnosed"], summary["split"]) == (len(asked), 32, "train")
    assert summary["evaluated"] == {"samples": 32, "of": 40, "questions": len(asked), "trained": 32}
    diagnosed = [row for row in rows if row["label"] in row["reference"]]
    for name in ("adapter", "base", "shuffled"):
        right = [row["label"] in row["prediction"] for row in diagnosed if row["run"] == name]
        assert summary["runs"][name]["diagnosis"]["accuracy"]["value"] == pytest.approx(sum(right) / 32)
        assert summary["runs"][name]["cut"] == sum("cut" in row for row in rows if row["run"] == name)
    scored = [row["scores"] for row in diagnosed if row["run"] == "adapter"]
    likeliest = [max(scores, key=scores.get) == row["label"] for scores, row in zip(scored, diagnosed, strict=False)]
    probabilities = summary["runs"]["adapter"]["probabilities"]
    assert probabilities["choice_accuracy"]["value"] == pytest.approx(sum(likeliest) / 32)
    assert {row["run"] for row in rows if "scores" in row} == {"adapter", "base", "validation"}
    assert probabilities["temperature"] > 0 and "temperature" not in summary["runs"]["base"]["probabilities"]
    exact = [row["prediction"] == row["reference"] for row in ours]
    assert summary["runs"]["adapter"]["text"]["exact_match"] == pytest.approx(sum(exact) / len(ours), abs=1e-6)
    sizes = {name: group["samples"] for name, group in summary["subgroups"]["skin_type"]["groups"].items()}
    assert sizes == {kind: split["skin_type"].count(kind) for kind in sorted(set(split["skin_type"]))}


def test_shuffled_samples_have_the_images_of_other_samples(evaluated):
    summary, rows = read(evaluated)
    label_of = {row["id"]: row["label"] for row in rows if row["run"] == "adapter"}
    shuffled = [row for row in rows if row["run"] == "shuffled"]
    assert all(row["image_of"] != row["id"] for row in shuffled)
    image_of = {row["id"]: row["image_of"] for row in shuffled}  # the same for all questions of a sample
    assert sorted(image_of.values()) == sorted(label_of)
    diagnosed = [row for row in shuffled if row["label"] in row["reference"]]
    same = sum(label_of[row["image_of"]] == row["label"] for row in diagnosed) / len(diagnosed)
    assert summary["shuffled_same_label"] == pytest.approx(same, abs=1e-6)


def test_the_base_run_equals_predict_with_the_base_alone(evaluated, tiny_base, demo_data, adapter, tmp_path):
    import predict

    out = tmp_path / "base.jsonl"
    alone = ["--base", tiny_base, "--quantization", "nf4", "--dtype", "float32", "--max-new-tokens", 12]
    pixels = ["--min-pixels", 12544, "--max-pixels", 12544]
    command = [*alone, *pixels, "--dataset", demo_data, "--split", "train", "--out", out]
    predict.main([str(word) for word in command])
    expected = [json.loads(line)["prediction"] for line in out.read_text().splitlines()]
    last = {row["id"]: row["prediction"] for row in read(evaluated)[1] if row["run"] == "base"}
    assert list(last.values()) == expected  # which asks the last question of each sample


def test_a_killed_evaluation_resumes_and_ends_the_same(evaluated, adapter, demo_data, fork_server, tmp_path):
    out = tmp_path / "eval"
    command = options(adapter, demo_data, out, "--baseline", "--min-group", 4)
    process, lines = fork_server.start("eval_sft", command), out / "predictions.jsonl"
    process.wait_until(lambda: lines.is_file() and lines.read_text().count("\n") >= 24)
    process.signal_group(signal.SIGKILL)
    process.wait()
    assert not (out / "metrics.json").exists()
    with lines.open("a") as file:
        file.write('{"run": "adapter", "ind')  # an incomplete line, as a crash may leave
    eval_sft.main(command)
    for name in ("metrics.json", "predictions.jsonl"):
        assert (out / name).read_bytes() == (evaluated / name).read_bytes()


def test_a_finished_evaluation_loads_no_model(evaluated, adapter, demo_data, monkeypatch):
    monkeypatch.setattr("evaluation.engines.load_adapters", None)
    before = (evaluated / "metrics.json").read_bytes()
    eval_sft.main(options(adapter, demo_data, evaluated, "--baseline", "--min-group", 4))
    assert (evaluated / "metrics.json").read_bytes() == before


def test_two_processes_give_the_same_metrics_as_one(evaluated, adapter, demo_data, fork_server, tmp_path):
    out = tmp_path / "eval"
    command = options(adapter, demo_data, out, "--baseline", "--min-group", 4)
    codes, texts = fork_server.run("eval_sft", command, command)
    assert codes == [0, 0], texts
    assert (out / "metrics.json").read_bytes() == (evaluated / "metrics.json").read_bytes()
    assert {path.name for path in out.glob("*.jsonl")} == {"predictions.jsonl"}


def test_a_process_that_ends_early_waits_for_one_that_is_ten_times_slower(adapter, demo_data, fork_server, tmp_path):
    command = ["--adapter", adapter, "--dataset", demo_data, "--max-new-tokens", 8, "--batch-size", 1]
    words = [[str(word) for word in (*command, "--out", tmp_path / name)] for name in ("one", "two")]
    eval_sft.main(words[0])
    codes, texts = fork_server.run("eval_sft", words[1], words[1], slow=True)
    assert codes == [0, 0], texts
    assert (tmp_path / "two" / "metrics.json").read_bytes() == (tmp_path / "one" / "metrics.json").read_bytes()
    assert {row["run"] for row in read(tmp_path / "two")[1]} == {"adapter", "validation"}
    assert not any("process group" in text for text in texts)  # PyTorch warns of one that is left


def test_answers_made_with_other_settings_are_not_mixed(evaluated, adapter, demo_data, tmp_path, capsys):
    for name in ("settings.json", "predictions.jsonl"):
        shutil.copy(evaluated / name, tmp_path)
    (tmp_path / "kept.txt").write_text("mine")
    changed = options(adapter, demo_data, tmp_path, "--batch-size", 4)
    assert run(lambda: eval_sft.main(changed)) == 1
    error = capsys.readouterr().err
    assert "holds answers made with other settings, batch_size was 'auto' and is 4; add --overwrite" in error
    assert run(lambda: eval_sft.main([*changed, "--overwrite"])) == 0
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_a_sample_that_the_pixel_limits_leave_nothing_of_is_named_before_the_model_is_loaded(
    adapter, write_records, tmp_path, capsys, monkeypatch
):
    records = [
        {"id": name, "image": f"{name}.png", "question": "What?", "answer": "A nevus.", "split": "test"}
        for name in ("green", "narrow", "thin")
    ]
    path, images = write_records(records)
    Image.new("RGB", (28, 5000)).save(images / "narrow.png")
    Image.new("RGB", (28, 5500)).save(images / "thin.png")
    monkeypatch.setattr("evaluation.runner.open_engine", None)
    words = ["--adapter", adapter, "--image-dir", images, "--dataset", path, "--out", tmp_path / "e"]
    assert run(lambda: eval_sft.main([str(word) for word in words])) == 1
    error = capsys.readouterr().err
    assert "--dataset: 2 samples have an unusable image, the first is 'narrow': too narrow: 28 x 5000 px" in error


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_second_evaluation_into_the_same_folder_is_refused_and_changes_nothing(
    evaluated, adapter, demo_data, tmp_path, capsys, more
):
    out = tmp_path / "eval"
    shutil.copytree(evaluated, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with locked(out / "evaluation.lock", "x"):
        assert run(lambda: eval_sft.main(options(adapter, demo_data, out, *more))) == 1
        after = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "evaluation.lock"}
    [line] = capsys.readouterr().err.splitlines()
    holder = rf"process {os.getpid()} on \S+, started 2\S+"
    assert re.fullmatch(rf"error: --out: {out} is in use by {holder}; wait for it .*, or choose another --out", line)
    assert after == before and not (out / "evaluation.lock").exists()


@pytest.mark.parametrize("name", ["e\udcff", "e\udcff/f"])
def test_an_output_folder_whose_name_is_not_text_is_refused_before_anything_is_written(
    adapter, demo_data, tmp_path, capsys, name
):
    assert run(lambda: eval_sft.main(options(adapter, demo_data, tmp_path / name))) == 1
    assert "error: --out: '" in (said := capsys.readouterr().err) and "is not UTF-8; choose another name" in said
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_batch_is_repeated(tmp_path):
    journal = Journal(tmp_path, {"a": 1}, 0)
    journal.add([{"run": "adapter", "index": n, "prediction": "x"} for n in range(4)])
    again = Journal(tmp_path, {"a": 1}, 0)
    assert again.has("adapter", range(4)) and not again.has("adapter", range(2, 6)) and not again.has("base", range(2))


def test_data_without_labels_get_text_metrics(adapter, write_records, tmp_path, capsys):
    records = [
        {"id": f"r{n}", "image": "red.jpg", "question": f"Is it {n}?", "answer": "It is red.", "split": "test"}
        for n in range(3)
    ]
    path, images = write_records(records)
    common = ["--adapter", adapter, "--image-dir", images, "--dataset", path, "--out", tmp_path / "e"]
    eval_sft.main([str(word) for word in (*common, "--max-new-tokens", 4)])
    summary, _ = read(tmp_path / "e")
    assert (summary["diagnosed"], summary["labels"]) == (0, [])
    assert set(summary["runs"]["adapter"]) == {"samples", "clusters", "cut", "text"}
    assert summary["runs"]["adapter"]["cut"] == 3
    out, page = capsys.readouterr().out, (tmp_path / "e" / "report.html").read_text()
    assert "chrF" in out and "3 of 3 answers were cut at --max-new-tokens 4 (adapter)" in out
    assert "warning: 3 of 3 reference answers are longer than --max-new-tokens 4, the longest has 9 tokens" in out
    assert "evaluating                3 of 3 samples, split test: 3 questions" in out
    assert "balanced accuracy" not in page and "adapter: 3 of 3 answers were cut at 4 tokens." in page
    assert "3 of the data's 3 samples: split <b>test</b>, 3 questions" in page


def test_the_only_pair_of_images_is_left_out_of_the_shuffled_control(adapter, write_records, tmp_path, capsys):
    common = {"answer": "This is melanoma.", "label": "melanoma", "split": "test"}
    records = [{"id": f"r{n}", "image": name, "question": "What?", **common} for n, name in enumerate(("red", "blue"))]
    records = [{**record, "image": f"{record['image']}.jpg"} for record in records]
    pair = {"id": "pair", "images": ["red.jpg", "blue.jpg"], "question": "<image><image>What?", **common}
    path, images = write_records([*records, pair])
    options = ["--adapter", adapter, "--image-dir", images, "--dataset", path, "--out", tmp_path / "e", "--baseline"]
    eval_sft.main([str(word) for word in (*options, "--max-new-tokens", 4)])
    summary, rows = read(tmp_path / "e")
    assert {row["id"]: row.get("image_of") for row in rows if row["run"] == "shuffled"} == {
        **{"r0": "r1", "r1": "r0", "pair": None}
    }
    assert (summary["shuffled_left_out"], summary["against_shuffled"]["samples"]) == (1, 2)
    assert (summary["clusters"], summary["cluster_unit"]) == (1, "independent groups")  # the pair shows both images
    printed = capsys.readouterr().out
    assert "Left out of the shuffled control: 1 of 3 samples" in printed and "No intervals" in printed


def test_the_command_line_overrides_the_configuration_file(adapter, demo_data, tmp_path):
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"adapter: {adapter}\ndataset: {demo_data}\nbatch_size: 4\nbaseline: true\nsubgroups: [sex, age]\n"
    )
    args = eval_sft.parse_args(["--config", str(config), "--batch-size", "2"])
    assert (args.batch_size, args.baseline, args.subgroups, args.split) == (2, True, ["sex", "age"], "test")
    config.write_text("adaptor: x\n")
    with pytest.raises(SystemExit):
        eval_sft.parse_args(["--config", str(config)])
    config.write_text("config: other.yaml\n")
    with pytest.raises(ValueError, match=f"{config}: config: a file of options may not name another"):
        eval_sft.parse_args(["--config", str(config)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("baseline: no", "argument --baseline: ignored explicit argument 'no'"),  # a text in YAML 1.2
        ("max_new_tokens: 4.5", "argument --max-new-tokens: expected a whole number above 0, found '4.5'"),
        ("out: true", "argument --out: expected one argument"),
        ("out: ''", "argument --out: expected a value, found ''"),
    ],
)
def test_a_wrong_value_in_the_configuration_file_is_told_with_its_key(tmp_path, capsys, line, message):
    config = tmp_path / "eval.yaml"
    config.write_text(f"dataset: x\n{line}\n")
    with pytest.raises(SystemExit, match="2"):
        eval_sft.parse_args(["--config", str(config)])
    assert f"eval_sft.py: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split", "dev"], "has no split 'dev', only ['test', 'train', 'validation']"),
        (["--sensitivity-of", "acne"], "--sensitivity-of: 'acne' is not a label; there are melanoma, psoriasis"),
        (["--labels", "Makefile"], "column 1: not YAML"),
        (["--labels", "gone.yaml"], "--labels: no file gone.yaml"),
        (["--config", "gone.yaml"], "--config: no file gone.yaml"),
        (["--out", "Makefile/x"], "Makefile is a file"),
    ],
)
def test_a_user_error_is_one_line(adapter, demo_data, tmp_path, capsys, more, message):
    assert run(lambda: eval_sft.main(options(adapter, demo_data, tmp_path / "e", *more))) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_an_evaluation_without_baseline_keeps_the_runs_of_one_that_had_it(
    evaluated, adapter, demo_data, tmp_path, capsys, monkeypatch
):
    for name in ("predictions.jsonl", "settings.json"):
        shutil.copy(evaluated / name, tmp_path)
    monkeypatch.setattr("evaluation.engines.load_adapters", None)
    eval_sft.main(options(adapter, demo_data, tmp_path, "--min-group", 4))
    assert "kept of earlier answers   base model alone, adapter, images shuffled" in capsys.readouterr().out
    assert (tmp_path / "metrics.json").read_bytes() == (evaluated / "metrics.json").read_bytes()


def test_a_merged_model_is_evaluated_on_all_samples_without_an_adapter(adapter, demo_data, tmp_path, capsys):
    merged = tmp_path / "skin-merged"
    merge_adapter.main(["--adapter", str(adapter), "--out", str(merged)])
    before = sorted(path.name for path in merged.iterdir())
    common = ["--model", str(merged), "--dataset", str(demo_data), "--out", str(tmp_path / "e"), "--baseline"]
    eval_sft.main([*common, "--split", "all", "--max-new-tokens", "12", "--no-probabilities"])
    summary, rows = read(tmp_path / "e")
    assert summary["evaluated"]["samples"] == summary["evaluated"]["of"] == summary["diagnosed"] == 40
    assert summary["model"] == "skin-merged" and set(summary["runs"]) == {"adapter", "shuffled"}
    diagnosed = [row for row in rows if row["run"] == "adapter" and row["label"] in row["reference"]]
    right = sum(row["label"] in row["prediction"] for row in diagnosed)
    assert summary["runs"]["adapter"]["diagnosis"]["accuracy"]["value"] == pytest.approx(right / 40)
    assert "Evaluation of skin-merged</h1>" in (tmp_path / "e" / "report.html").read_text()
    assert "\nmodel                     accuracy" in capsys.readouterr().out
    assert sorted(path.name for path in merged.iterdir()) == before
    (merged / "model.safetensors").touch()  # merged again
    with pytest.raises(ValueError, match="holds answers of other weights; add --overwrite"):
        eval_sft.main([*common, "--split", "all", "--max-new-tokens", "12", "--no-probabilities"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "name what to evaluate: an adapter (--adapter), or a model without one (--model)"),
        ("--adapter x --model y", "name what to evaluate"),
        ("--model x --base y", "--base: goes with --adapter, not with --model"),
        ("--model x --push you/skin", "--push: goes with --adapter"),
        ("--model /nowhere", "no model in '/nowhere'"),
    ],
)
def test_one_adapter_or_model_is_named(capsys, words, message):
    assert run(lambda: eval_sft.main([*words.split(), "--dataset", "x"])) == 1
    assert message in capsys.readouterr().err


def test_answers_with_another_base_of_the_same_name_are_refused(adapter, demo_data, tiny_base, tmp_path):
    bases = [tmp_path / version / "base" for version in ("v1", "v2")]
    for base in bases:
        shutil.copytree(tiny_base, base)
    weights = load_file(bases[1] / "model.safetensors")
    save_file(
        {name: 1.01 * tensor for name, tensor in weights.items()}, bases[1] / "model.safetensors", {"format": "pt"}
    )
    words = [options(adapter, demo_data, tmp_path / "e", "--base", str(base), "--split", "test") for base in bases]
    eval_sft.main(words[0])
    (tmp_path / "v3").mkdir()
    bases[0].rename(tmp_path / "v3" / "base")  # the same one, elsewhere
    eval_sft.main(
        options(adapter, demo_data, tmp_path / "e", "--base", str(tmp_path / "v3" / "base"), "--split", "test")
    )
    with pytest.raises(ValueError, match="holds answers of other weights of the base model; add --overwrite"):
        eval_sft.main(words[1])


def test_no_answer_is_in_the_metrics_that_are_pushed(adapter, write_records, tmp_path, capsys):
    answers = [f"Mrs Doe-{number}, seen in May." for number in range(4)]
    path, images = write_records(
        [
            {"image": "red.jpg", "question": f"What is {n}?", "answer": a, "label": "nevus"}
            for n, a in enumerate(answers)
        ]
    )
    words = ["--adapter", adapter, "--dataset", path, "--image-dir", images, "--split", "all", "--out", tmp_path / "e"]
    eval_sft.main([*map(str, words), "--max-new-tokens", "4", "--no-probabilities"])
    text = (tmp_path / "e" / "metrics.json").read_text()
    assert "only 0 of 4 labelled samples have a reference answer that names their label" in text
    assert "Doe" not in text and "Doe" in capsys.readouterr().err  # on the screen
