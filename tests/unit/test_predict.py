"""predict.py: files, folders, questions files and splits; one adapter, several, or the base model alone."""

import argparse
import json
import os
import shutil
from functools import partial
from pathlib import Path

from common.cli import run

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import TextStreamer

import predict
from collator import VisionSFTCollator, collate_prompts
from data_prep import load_splits
from data_prep.sizes import fit_options, fit_size
from evaluation.examples import decode, find_images, load_examples
from evaluation.prediction import check_out
from evaluation.questions import question_text
from models.adapters import load_answering_model
from models.loading import load_processor


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


def test_the_answers_of_a_split_are_in_order_and_carry_its_columns(adapter, demo_data, demo_splits, tmp_path, capsys):
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
        source = ["--dataset", demo_data, "--split", "train"]
        ask(capsys, "--adapter", adapter, *source, "--out", out, "--batch-size", size)
        answers.append(rows_of(out))
    assert answers[0] == answers[1] == answers[2]
    assert len({row["prediction"] for row in answers[0]}) > 1


def test_a_folder_is_answered_image_by_image(adapter, tmp_path, capsys):
    for name in ("b.png", "a.JPG"):
        Image.new("RGB", (60, 60), "red").save(tmp_path / name, "PNG")
    (tmp_path / "notes.txt").write_text("not an image")
    lines = ask(capsys, "--adapter", adapter, "--image", tmp_path, "--question", "What?").splitlines()
    assert [line.split(":")[0] for line in lines] == [str(tmp_path / "a.JPG"), str(tmp_path / "b.png")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--question", "\udcff?"], "--question: '\\udcff?' is not UTF-8"),
        (["--question", "?", "--system", "\udcff"], "--system: '\\udcff' is not UTF-8"),
        (["--question", "?", "--top-k", "1", "--labels", "a", "\udcff"], "--labels: '\\udcff' is not UTF-8"),
        (
            ["--question", "?", "--top-k", "1", "--labels", "a", "b", "a"],
            "--labels: expected different names, found 'a'",
        ),
        (["--question", "?", "--top-k", "1", "--labels", "a", " "], "--labels: expected different names, found ' '"),
        (["--question", "?", "--out", "Makefile/x/y"], "--out: Makefile is a file, and Makefile/x/y cannot be in it"),
    ],
)
def test_options_that_the_model_could_not_take_are_refused_at_once(capsys, options, message):
    assert run(lambda: predict.main(["--adapter", "x", "--image", "Makefile", *options])) == 1
    assert message in capsys.readouterr().err.replace(f"{Path.cwd()}/", "")


def test_cut_answers_are_counted(adapter, demo_raw, capsys):
    image = [str(demo_raw / "images" / name) for name in ("0001.jpg", "0002.jpg")]
    for count in (1, 2):
        options = ["--adapter", str(adapter), "--question", "What?", "--max-new-tokens", "1"]
        predict.main([*options, "--image", *image[:count]])
        assert f"\n{count} of {count} answers cut" in "\n" + capsys.readouterr().err


def test_links_in_a_circle_are_one_line(adapter, demo_raw, tmp_path, capsys):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    image = ["--image", str(demo_raw / "images" / "0001.jpg"), "--question", "What?"]
    assert run(lambda: predict.main(["--adapter", str(adapter), *image, "--out", str(tmp_path / "a")])) == 1
    assert f"--out: {tmp_path / 'a'} leads through links in a circle" in capsys.readouterr().err


def test_a_pipe_of_questions_is_called_none(tmp_path, capsys):
    os.mkfifo(tmp_path / "q.jsonl")
    assert run(lambda: predict.main(["--adapter", "x", "--questions", str(tmp_path / "q.jsonl")])) == 1
    assert f"no file {tmp_path / 'q.jsonl'}; it is a folder, a pipe or a device" in capsys.readouterr().err


def test_several_images_share_one_question(adapter, demo_raw, capsys):
    images = ["--together", "--image", *(demo_raw / "images" / f"000{n}.jpg" for n in (1, 2))]
    assert "\n" not in ask(capsys, "--adapter", adapter, *images, "--question", "First <image>, then <image>?")


def test_patterns_and_files_are_answered_one_by_one(adapter, demo_raw, capsys):
    pattern = demo_raw / "images" / "000[12].jpg"
    command = ["--adapter", adapter, "--question", "What?", "--image", pattern, demo_raw / "images" / "0005.jpg"]
    paths = [line.split(":")[0] for line in ask(capsys, *command).splitlines()]
    assert paths == [str(demo_raw / "images" / name) for name in ("0001.jpg", "0002.jpg", "0005.jpg")]


def test_a_bad_image_is_skipped_with_its_reason_and_the_exit_code_says_so(adapter, demo_raw, tmp_path, capsys):
    shutil.copy(demo_raw / "images" / "0001.jpg", tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_text("not an image")
    command = ["--adapter", str(adapter), "--image", str(tmp_path), "--question", "What?"]
    assert predict.main(command) == 3
    out, err = capsys.readouterr()
    good, bad = (str(tmp_path / name) for name in ("good.jpg", "bad.jpg"))
    assert out.startswith(f"{good}: ") and f"skipped {bad}: bad.jpg: not an image" in err
    assert predict.main([*command, "--out", str(tmp_path / "a.jsonl")]) == 3
    first, second = rows_of(tmp_path / "a.jsonl")
    assert first == {"id": bad, "image": bad, "error": "bad.jpg: not an image"}
    assert second["prediction"] and "error" not in second
    assert "1 answers in" in capsys.readouterr().out


def test_questions_come_from_a_file_and_bad_lines_are_skipped(adapter, demo_raw, tmp_path, capsys):
    lines = [
        {"id": "a", "image": "0001.jpg", "question": "What?"},
        {"images": ["0001.jpg", "0002.jpg"], "question": "Which?"},
        {"question": "Is the skin dark?"},
        {"image": "../annotations.json", "question": "What?"},
        {"image": "0001.jpg"},
        {"image": "gone.jpg", "question": "What?"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--adapter", adapter, "--questions", path, "--image-dir", demo_raw / "images", "--out", tmp_path / "a"]
    assert predict.main([str(word) for word in command]) == 3
    rows = rows_of(tmp_path / "a")
    assert [row["id"] for row in rows[:3]] == ["a", "line-2", "line-3"]
    assert all(row["prediction"] for row in rows[:3])
    assert [row.get("image") for row in rows[:3]] == ["0001.jpg", ["0001.jpg", "0002.jpg"], None]
    errors = [row["error"] for row in rows[3:]]
    assert errors[0].startswith("--questions, line 4: '../annotations.json' is outside the image folder")
    assert errors[1].startswith("--questions, line 5: expected")
    assert errors[2] == f"--questions, line 6: 'gone.jpg': no such file {demo_raw / 'images' / 'gone.jpg'}"


def test_mistyped_keys_and_blank_lines_of_a_questions_file(adapter, demo_raw, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    lines = [
        '\n{"image": "0001.jpg", "question": "What?", "age_years": 50}\n',
        ' \t\n\n{"imgae": "0001.jpg", "question": "What?"}\n',
        '{"image": "0001.jpg", "qustion": "What?"}\n',
        '{"image": "0001.jpg", "question": "What?", "sytem": "Be brief."}',
    ]
    path.write_text("".join(lines), encoding="utf-8-sig")
    command = ["--adapter", adapter, "--questions", path, "--image-dir", demo_raw / "images", "--out", tmp_path / "a"]
    assert predict.main([str(word) for word in command]) == 3
    first, *others = rows_of(tmp_path / "a")
    assert (first["id"], first["image"]) == ("line-2", "0001.jpg") and first["prediction"]
    assert [row["error"] for row in others] == [
        "--questions, line 5: unknown key 'imgae'; did you mean 'image'?",
        "--questions, line 6: unknown key 'qustion'; did you mean 'question'?",
        "--questions, line 7: unknown key 'sytem'; did you mean 'system'?",
    ]
    assert "not read in --questions: 'age_years', 'imgae', 'qustion', 'sytem'" in capsys.readouterr().err


def test_rows_of_an_array_are_records(tmp_path):
    (tmp_path / "q.json").write_text('\n[\n\n{"question": "What?"},\n{"question": 1}]')
    args = argparse.Namespace(dataset=None, questions=tmp_path / "q.json", image_dir=None, system=None, labels=None)
    assert [row.get("error", row["id"]) for row in load_examples(args)[0]] == [
        "record-0",
        '--questions, record 1: expected {"image": ..., "question": ...}',
    ]


def test_an_image_that_the_pixel_limits_leave_nothing_of_is_skipped(adapter, demo_raw, tmp_path, capsys):
    shutil.copy(demo_raw / "images" / "0001.jpg", tmp_path / "good.jpg")
    Image.new("RGB", (5, 900)).save(tmp_path / "narrow.png")
    command = ["--adapter", adapter, "--image", tmp_path, "--question", "What?", "--out", tmp_path / "a.jsonl"]
    assert predict.main([str(word) for word in command]) == 3
    good, narrow = rows_of(tmp_path / "a.jsonl")
    assert good["prediction"] and "narrow.png: too narrow: 5 x 900 px under max_pixels" in narrow["error"]


@pytest.mark.parametrize("size", [(133, 94), (5, 400), (120, 100), (300, 90)])
def test_the_model_gets_the_pixels_that_it_gets_in_training(adapter, tmp_path, size):
    """A second fit would make a picture smaller whose size was rounded up over max_pixels."""
    processor, path = load_processor(str(adapter)), tmp_path / "a.png"
    Image.effect_noise(size, 90).save(path)
    example = {"id": "a", "images": [str(path)], "messages": [{"role": "user", "content": "<image>"}]}
    fitted = decode(example, fit=partial(fit_size, **fit_options(processor.image_processor)))
    ours, trained = (collate_prompts(processor, [each]) for each in (fitted, example))
    assert torch.equal(ours["image_grid_thw"], trained["image_grid_thw"])
    assert torch.equal(ours["pixel_values"], trained["pixel_values"])


def test_a_file_name_that_is_not_utf_8_is_answered(adapter, demo_raw, tmp_path, capsys):
    name = os.fsdecode(b"\xff.jpg")
    shutil.copy(demo_raw / "images" / "0001.jpg", tmp_path / name)
    (tmp_path / os.fsdecode(b"\xfe.jpg")).write_text("not an image")
    command = ["--adapter", adapter, "--image", tmp_path, "--question", "What?", "--out", tmp_path / "a.jsonl"]
    assert predict.main([str(word) for word in command]) == 3
    bad, good = rows_of(tmp_path / "a.jsonl")
    assert good["id"] == good["image"] == f"{tmp_path}/\\udcff.jpg" and good["prediction"]
    assert bad["error"] == "\\udcfe.jpg: not an image"


def test_answers_go_through_a_pipe_and_a_link(adapter, demo_raw, tmp_path, capsys):
    image = ["--image", demo_raw / "images" / "0001.jpg", "--question", "What?"]
    command = [str(word) for word in ("--adapter", adapter, *image, "--out")]
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert predict.main([*command, str(tmp_path / "pipe")]) == 0
    row = json.loads(os.read(reader, 10_000))
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo() and capsys.readouterr().out == ""
    (tmp_path / "link").symlink_to(tmp_path / "far" / "answers.jsonl")
    assert predict.main([*command, str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink() and rows_of(tmp_path / "far" / "answers.jsonl") == [row]


def test_the_file_that_standard_output_goes_to_is_not_replaced(tmp_path):
    with (tmp_path / "log").open("w") as log:
        name = f"/proc/self/fd/{log.fileno()}"
        with pytest.raises(ValueError, match=f"--out: {name} stands for {tmp_path / 'log'}, which is open already"):
            check_out(Path(name), [])


def test_several_adapters_answer_over_one_base(adapter, demo_data, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    weights = load_file(other / "adapter_model.safetensors")
    save_file({name: abs(tensor) for name, tensor in weights.items()}, other / "adapter_model.safetensors")
    alone = []
    for path in (adapter, other):
        ask(capsys, "--adapter", path, "--dataset", demo_data, "--out", tmp_path / "one.jsonl")
        alone.append([row["prediction"] for row in rows_of(tmp_path / "one.jsonl")])
    ask(capsys, "--adapter", adapter, other, "--dataset", demo_data, "--out", tmp_path / "both.jsonl")
    rows = rows_of(tmp_path / "both.jsonl")
    both = [[row["prediction"] for row in rows if row["adapter"] == str(path)] for path in (adapter, other)]
    assert both == alone and alone[0] != alone[1]
    facts = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**facts, "quantization": None}))
    command = ["--adapter", adapter, other, "--dataset", demo_data]
    with pytest.raises(ValueError, match=r"--adapter: .*other has the base .* and .*adapter \{"):
        predict.main([str(word) for word in command])


def test_the_likeliest_labels_have_probabilities(adapter, demo_data, demo_raw, tmp_path, capsys):
    wording = ["--wording", "This is {label}."]
    options = ["--adapter", adapter, "--dataset", demo_data, "--top-k", 4, *wording, "--out", tmp_path / "a"]
    ask(capsys, *options)
    for row in rows_of(tmp_path / "a"):
        assert set(row["likeliest"]) == {"melanoma", "psoriasis", "urticaria", "vitiligo"}
        assert sum(row["likeliest"].values()) == pytest.approx(1, abs=1e-3)
        assert list(row["likeliest"].values()) == sorted(row["likeliest"].values(), reverse=True)
    image = ["--image", demo_raw / "images" / "0001.jpg", "--question", "What condition is shown?"]
    lines = ask(capsys, "--adapter", adapter, *image, "--top-k", 2, "--labels", "melanoma", "vitiligo", *wording)
    assert len(lines.splitlines()) == 3 and lines.splitlines()[1].split()[1] in ("melanoma", "vitiligo")


def test_a_single_answer_is_streamed(adapter, demo_raw, capsys, monkeypatch):
    question = ["--image", demo_raw / "images" / "0001.jpg", "--question", "What condition is shown?"]
    pieces = []
    monkeypatch.setattr(TextStreamer, "on_finalized_text", lambda self, text, stream_end=False: pieces.append(text))
    assert ask(capsys, "--adapter", adapter, *question) == ""
    assert len([piece for piece in pieces if piece]) > 1
    monkeypatch.undo()
    assert "".join(pieces).strip() == ask(capsys, "--adapter", adapter, *question)


def test_a_checkpoint_and_the_adapter_answer_alike_and_the_base_alone_does_not(adapter, tiny_base, demo_raw, capsys):
    question = ["--image", demo_raw / "images" / "0001.jpg", "--question", "What condition is shown?"]
    ours = ask(capsys, "--adapter", adapter, *question)
    assert ask(capsys, "--adapter", adapter / "checkpoint-30", *question) == ours
    assert ask(capsys, "--base", tiny_base, *question, "--max-new-tokens", 8) != ours


def test_the_base_model_is_loaded_as_in_training_by_default(adapter, capsys):
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
        ("", "(--adapter), or a base model"),
        ("--adapter x", "one of --image (with --question), --questions and --dataset; found none of them"),
        ("--adapter x --image Makefile --dataset x", "found --image and --dataset"),
        ("--adapter x --image Makefile", "--image: needs --question"),
        ("--adapter x --image /nowhere.jpg --question ?", "--image: /nowhere.jpg: no file there"),
        ("--adapter x --image tests/*.jpg --question ?", "--image: tests/*.jpg: no file there"),
        ("--adapter x --image configs --question ?", "--image: configs: no file that is an image"),
        ("--adapter x --image Makefile --question ?", "--image: Makefile: not an image"),
        ("--adapter x --dataset x --question ?", "--question: goes with --image, not with --dataset"),
        ("--adapter x --dataset x --system ?", "--system: a data set has its own"),
        (
            "--base x --image Makefile --question ? --out /dev/null",
            "--out: /dev/null is a device, expected a file or a pipe",
        ),
        ("--adapter x --dataset x --together", "--together: goes with --image, not with --dataset"),
        ("--base x --image Makefile --question ? --out tests", "--out: tests is a folder"),
        ("--base x --image Makefile --question ? --top-k 2", "--top-k: needs --labels"),
        (
            "--base x --image Makefile --question ? --top-k 1 --labels a --wording x",
            "--wording: expected {label} in place",
        ),
        ("--base x --image Makefile --question ? --labels a b", "--labels: would have no effect without --top-k"),
        ("--base x --dataset x --wording {label}!", "--wording: would have no effect without --top-k"),
        ("--base x --questions gone.jsonl", "--questions: no file gone.jsonl"),
    ],
)
def test_a_user_error_is_one_line(capsys, options, message):
    assert run(lambda: predict.main(options.split())) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


def test_markers_in_a_question_must_fit_the_images(adapter, demo_raw, capsys):
    image = str(demo_raw / "images" / "0001.jpg")
    question = ["--image", image, "--question", "a<image><image>"]
    assert run(lambda: predict.main(["--adapter", str(adapter), *question])) == 1
    assert "2 <image> marker(s) for 1 image(s)" in capsys.readouterr().err


def test_the_error_names_a_missing_or_broken_adapter(adapter, demo_raw, tmp_path, capsys):
    question = ["--image", str(demo_raw / "images" / "0001.jpg"), "--question", "What?"]
    assert run(lambda: predict.main(["--adapter", "/nowhere", *question])) == 1
    assert "--adapter: no adapter in '/nowhere'" in capsys.readouterr().err
    shutil.copytree(adapter, tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"")
    assert run(lambda: predict.main(["--adapter", str(tmp_path / "broken"), *question])) == 1
    assert "unreadable weights" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_is_replaced_only_when_all_answers_are_written(adapter, demo_data, tmp_path):
    out = tmp_path / "old.jsonl"
    before = '{"id": "x", "prediction": "kept"}\n'
    out.write_text(before)
    options = ["--adapter", str(adapter), "--dataset", str(demo_data), "--out", str(out)]
    assert run(lambda: predict.main([*options, "--split", "dev"])) == 1
    assert out.read_text() == before
    predict.main(options)
    assert len(rows_of(out)) == 4
    assert not (tmp_path / "old.jsonl.unfinished").exists()


def prompt_of(capsys, processor, *options):
    """Return the tokens of the one prompt that the options make."""
    args = predict.build_parser().parse_args([str(option) for option in ("--base", "x", *options)])
    examples, _, _ = load_examples(args)
    return collate_prompts(processor, [decode(example) for example in examples])["input_ids"][0].tolist()


RECORDS = {
    "llava": {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]},
    "blank": {"messages": [{"role": "user", "content": "<image> What?"}, {"role": "assistant", "content": "Red."}]},
    "flat": {"question": "What?", "answer": "Red."},
    "system": {"question": "\u3000<image>\r\n\r\nWhat?", "answer": "Red.", "system": "You see skin."},
    "after": {"question": "What?\n<image>", "answer": "Red."},
    "two": {"images": ["red.jpg", "blue.jpg"], "question": "Is <image>  like\n<image> ?", "answer": "Red."},
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(("llava", ["--question", text]) for text in ("What?", "<image>\nWhat?", "<image>What?", "<image>\t What?")),
        *((kind, ["--question", "What?"]) for kind in ("blank", "flat")),
        ("system", ["--question", "What?", "--system", " You see skin.\n"]),
        ("after", ["--question", "What? <image>"]),
        ("two", ["--together", "--question", "Is<image>like<image>?"]),
    ],
)
def test_a_prompt_has_the_tokens_of_the_training(processor, write_records, tmp_path, capsys, kind, options):
    record = {"image": "red.jpg", **RECORDS[kind]} if kind != "two" else RECORDS[kind]
    path, images = write_records([{**record, "split": "train"}])
    sample = load_splits(str(path), str(images), show_progress=False)["train"][0]
    batch = VisionSFTCollator(processor)([sample])
    start = (batch["labels"][0] != -100).int().argmax().item()
    expected = batch["input_ids"][0, :start].tolist()
    names = ["red.jpg", "blue.jpg"] if kind == "two" else ["red.jpg"]
    assert prompt_of(capsys, processor, "--image", *(images / name for name in names), *options) == expected
    row = {"images": names, "question": options[options.index("--question") + 1]}
    row |= {"system": record["system"]} if "system" in record else {}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    assert prompt_of(capsys, processor, "--questions", tmp_path / "q.jsonl", "--image-dir", images) == expected


def test_a_rows_own_system_turn_comes_before_that_of_the_option(processor, tmp_path, capsys):
    lines = [{"question": "What?"}, {"question": "What?", "system": "Own."}, {"question": "What?", "system": 3}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--base", "x", "--questions", str(tmp_path / "q.jsonl"), "--system", "General."]
    first, second, third = load_examples(predict.build_parser().parse_args(command))[0]
    assert [example["messages"][0]["content"] for example in (first, second)] == ["General.", "Own."]
    assert third["error"] == "--questions, line 3: field 'system': expected a text, found a number 3"


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        (["<image>\nWhat?"], "What?"),
        (["<image> <image>\nWhat? "], "What?"),
        (["First <image>, then <image>?"], "First [image 1], then [image 2]?"),
        (["<image>What?", "Red.", "And <image>, now?"], "And [image 2], now?"),
        (["<image>"], ""),
    ],
)
def test_images_within_a_question_are_named_by_their_number(turns, text):
    assert question_text([{"content": turn} for turn in turns]) == text


def test_images_of_one_name_are_told_apart(adapter, demo_raw, tmp_path, capsys):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        shutil.copy(demo_raw / "images" / "0001.jpg", tmp_path / folder / "img.jpg")
    images = [str(tmp_path / folder / "img.jpg") for folder in "ab"]
    out = tmp_path / "answers.jsonl"
    ask(capsys, "--adapter", adapter, "--image", *images, "--question", "What?", "--out", out)
    assert [row["id"] for row in rows_of(out)] == [row["image"] for row in rows_of(out)] == images


def test_answers_that_were_cut_are_counted(adapter, demo_data, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    command = ["--adapter", adapter, "--dataset", demo_data, "--out", out, "--max-new-tokens"]
    predict.main([str(word) for word in (*command, 2)])
    assert "4 of 4 answers cut at --max-new-tokens 2" in capsys.readouterr().err
    assert all(row["cut"] for row in rows_of(out))
    predict.main([str(word) for word in (*command, 64)])
    cut = sum("cut" in row for row in rows_of(out))
    assert cut < 4 and ("answers cut" in capsys.readouterr().err) == bool(cut)


@pytest.mark.parametrize("name", ["q.jsonl", "images/red.jpg", "notes.txt", "findings.jsonl", "predictions.jsonl"])
def test_no_other_file_is_overwritten(write_records, tmp_path, capsys, name):
    write_records("")
    (tmp_path / "q.jsonl").write_text('{"question": "What?", "prediction": "of an earlier call"}\n')
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "findings.jsonl").write_text('{"kind": "tiny"}\n')
    (tmp_path / "predictions.jsonl").write_text('{"run": "adapter", "index": 0, "prediction": "x"}\n')
    before = (tmp_path / name).read_bytes()
    command = ["--base", "x", "--questions", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / name)]
    assert run(lambda: predict.main(command)) == 1
    assert "; name another file" in capsys.readouterr().err and (tmp_path / name).read_bytes() == before


def test_a_batch_that_does_not_fit_the_memory_names_the_options(adapter, demo_raw, capsys, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("evaluation.engines.generate", fail)
    command = ["--adapter", str(adapter), "--image", str(demo_raw / "images"), "--question", "What?"]
    assert run(lambda: predict.main(command)) == 1
    assert "out of memory: lower --batch-size (now 8), then --max-pixels" in capsys.readouterr().err


def test_the_error_names_a_missing_split(adapter, demo_data, capsys):
    assert run(lambda: predict.main(["--adapter", str(adapter), "--dataset", str(demo_data), "--split", "dev"])) == 1
    assert "has no split 'dev', only ['test', 'train', 'validation']" in capsys.readouterr().err


def test_folders_in_a_folder_of_images_are_told(demo_raw, tmp_path, capsys):
    shutil.copy(demo_raw / "images" / "0001.jpg", tmp_path)
    (tmp_path / "sub").mkdir()
    shutil.copy(demo_raw / "images" / "0002.jpg", tmp_path / "sub")
    assert find_images([str(tmp_path)]) == [tmp_path / "0001.jpg"]
    assert capsys.readouterr().err == f"--image: 1 folders in {tmp_path} are not searched\n"
    assert find_images([str(tmp_path / "sub")]) == [tmp_path / "sub" / "0002.jpg"]
    assert capsys.readouterr().err == ""
