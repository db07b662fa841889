"""Which questions an evaluation asks, with which images, and which of them count for the label."""

import argparse
import json

import pytest
from PIL import Image

from data_prep import fingerprint, join_folds, load_splits
from data_prep.__main__ import main as data_prep
from evaluation.label_matching import asks_for_label
from evaluation.questions import load_runs, load_split
from evaluation.summary import summarise


def chat(sample_id, *turns, images=("red.jpg",), **more):
    messages = [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(turns)]
    return {"id": sample_id, "images": list(images), "messages": messages, "split": "test", **more}


def flat(sample_id, *images, label="nevus"):
    record = {"id": sample_id, "question": "What?", "answer": f"This is {label}.", "label": label, "split": "test"}
    return {**record, "images": list(images)}


@pytest.fixture
def args_of(write_records):
    """Write records and return the options that evaluate them."""

    def make(records, **more):
        path, images = write_records(records)
        Image.effect_noise((60, 60), 90).save(images / "other.png")
        options = {"dataset": str(path), "image_dir": str(images), "split": "test", "labels": None}
        options |= {"no_probabilities": False, "adapter": "x", "model": None}
        return argparse.Namespace(**options | more)

    return make


def test_each_turn_is_asked_after_the_reference_answers_with_the_images_so_far(args_of):
    turns = ["<image>What colour?", "Red.", "And <image>?", "Green.", "Which is it?", "The first is a nevus."]
    runs, _, counts = load_runs(args_of([chat("a", *turns, images=("red.jpg", "green.png"), label="nevus")]))
    questions = runs["adapter"]
    assert [(row["turn"], row["question"], row["reference"]) for row in questions.rows] == [
        (1, "What colour?", "Red."),
        (2, "And [image 2]?", "Green."),
        (3, "Which is it?", "The first is a nevus."),
    ]
    assert [len(questions[n]["images"]) for n in range(3)] == [1, 2, 2]
    assert [[m["content"] for m in questions[n]["messages"]] for n in range(3)] == [turns[:1], turns[:3], turns[:5]]
    assert counts == {"samples": 1, "of": 1, "questions": 3}


@pytest.mark.parametrize(
    ("turns", "counted"),
    [
        (["What?", "A nevus.", "Sure?", "Yes, a nevus."], [True, False]),
        (["Dark?", "Yes.", "What?", "A nevus."], [False, True]),
        (["It is a nevus. Dark?", "Yes.", "What?", "A nevus."], [False, False]),
        (["Nevus or melanoma?", "Hard to say.", "What?", "A nevus."], [False, True]),
        (["Which?", "Nevus or melanoma.", "And?", "A nevus."], [False, False]),
        (["Is it nevus?", "A nevus."], [False]),
    ],
)
def test_a_label_that_the_prompt_names_does_not_count(args_of, turns, counted):
    records = [chat("a", *turns, label="nevus"), flat("b", "blue.jpg", label="melanoma")]
    runs, label_map, _ = load_runs(args_of(records))
    rows = [row for row in runs["adapter"].rows if row["id"] == "a"]
    assert [asks_for_label(row, label_map) for row in rows] == counted
    assert [bool(answers) for answers in runs["adapter"].candidates][: len(rows)] == counted


@pytest.mark.parametrize(
    ("images", "shuffled"),
    [
        ([["red.jpg"], ["green.png"], ["blue.jpg", "red.jpg"]], 2),
        ([["red.jpg"], ["green.png", "blue.jpg", "red.jpg"]], 0),
        ([["red.jpg"], ["green.png"], []], 2),
        ([["red.jpg"], []], 0),
        ([[], []], 0),
    ],
)
def test_any_numbers_of_images_are_shuffled_and_summarised(args_of, images, shuffled):
    records = [flat(f"r{n}", *names) for n, names in enumerate(images)]
    runs, label_map, _ = load_runs(args_of([*records, {**flat("m", "other.png", label="melanoma"), "split": "train"}]))
    assert ("shuffled" in runs) == bool(shuffled)
    assert {"adapter", "base"} <= set(runs)
    answered = {}
    for name in {"adapter", "base", "shuffled"} & set(runs):
        questions = runs[name]
        examples = [questions[n] for n in range(len(records))]
        assert [len(example["images"]) for example in examples] == [len(names) for names in images]
        changed = {example["id"]: example["image_of"] for example in examples if example["image_of"] != example["id"]}
        assert len(changed) == (shuffled if name == "shuffled" else 0)
        answered[name] = [
            {**row, "index": n, "prediction": "A nevus."}
            | ({"image_of": changed[row["id"]]} if row["id"] in changed else {})
            for n, row in enumerate(questions.rows)
        ]
    summary = summarise(answered, label_map, columns=[], sensitivity_of=[], min_group=1)
    assert summary["runs"]["base"]["diagnosis"]["accuracy"]["value"] == 1
    assert summary.get("shuffled_same_label", 1) == 1  # all are nevi


def test_all_splits_are_evaluated_as_one(args_of):
    files = {"train": "red.jpg", "test": "green.png", "validation": "blue.jpg"}
    records = [{**flat(f"r{n}", file), "split": split} for n, (split, file) in enumerate(files.items())]
    args = args_of(records, split="all")
    assert sorted(load_split(args)[1]["id"]) == ["r0", "r1", "r2"]
    runs, _, counts = load_runs(args)
    assert counts == {"samples": 3, "of": 3, "questions": 3} and "validation" not in runs
    args.split = "dev"
    with pytest.raises(ValueError, match=r"no split 'dev', only \['test', 'train', 'validation'\] \(or 'all'\)"):
        load_split(args)


def test_a_model_alone_has_no_base_to_compare_with(args_of):
    runs, _, _ = load_runs(args_of([flat("a", "red.jpg"), flat("b", "blue.jpg")], adapter=None, model="x"))
    assert set(runs) == {"adapter", "shuffled"}


@pytest.mark.parametrize("shares", [(0, 0, 1), (0, 0.5, 0.5), (1, 0, 0)])
def test_a_data_set_may_have_no_training_split(write_records, tmp_path, shares):
    names = ("red.jpg", "green.png", "blue.jpg")
    path, images = write_records([{k: v for k, v in flat(n, n).items() if k != "split"} for n in names])
    out = tmp_path / "data"
    command = ["convert", "--annotations", path, "--images", images, "--out", out, "--workers", 1, "--split", *shares]
    data_prep([str(word) for word in command])
    expected = {name for name, share in zip(("train", "validation", "test"), shares, strict=True) if share}
    assert set(load_splits(str(out))) == expected
    data_prep(["inspect", str(out)])
    data_prep(["check", "--annotations", str(path), "--images", str(images), "--split", *map(str, shares)])


def apart(number):
    """Return a record that may be in another split than the others."""
    return {**flat(str(number), *(() if number else ("red.jpg",))), "question": f"What is number {number}?"}


@pytest.mark.parametrize(("split", "found"), [("train", 3), ("all", 3), ("test", None)])
@pytest.mark.parametrize("place", ["", "checkpoint-2"])
def test_samples_that_the_adapter_was_trained_on_are_counted(args_of, tmp_path, split, found, place):
    records = [{**apart(n), "split": "train" if n < 3 else "test"} for n in range(5)]
    args = args_of(records, split=split, adapter=str(tmp_path / place))
    (tmp_path / "checkpoint-2").mkdir()
    assert "trained" not in load_runs(args)[2]  # nobody knows
    facts = {"data": {"fingerprint": fingerprint(load_splits(args.dataset, args.image_dir)["train"])}}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    assert load_runs(args)[2].get("trained") == found
    facts["data"] = {"fingerprint": "without what was too long", "prepared_fingerprint": facts["data"]["fingerprint"]}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    assert load_runs(args)[2].get("trained") == found
    (tmp_path / "facts.json").write_text(json.dumps({"data": {"fingerprint": "of other data"}}))
    assert "trained" not in load_runs(args)[2]


def test_of_a_data_set_in_folds_all_folds_but_one_were_trained_on(args_of, tmp_path):
    args = args_of([{**apart(n), "split": "train"} for n in range(6)])
    words = ["convert", "--annotations", args.dataset, "--images", args.image_dir, "--out", str(tmp_path / "data")]
    data_prep([*words, "--folds", "3", "--split", "1", "0", "0"])
    folds = load_splits(str(tmp_path / "data"))
    facts = {"data": {"fingerprint": fingerprint(join_folds(folds, 1)["train"])}}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    options = {"dataset": str(tmp_path / "data"), "image_dir": None, "adapter": str(tmp_path)}
    for fold, trained in ((0, len(folds["fold_0"])), (1, None), (2, len(folds["fold_2"]))):
        counts = load_runs(argparse.Namespace(**vars(args) | options | {"split": f"fold_{fold}"}))[2]
        assert counts.get("trained") == trained


def test_edited_pictures_of_the_same_size_have_another_digest(args_of):
    args = args_of([flat("a", "red.jpg"), flat("b", "other.png")])
    questions = load_runs(args)[0]["adapter"]
    content, images = questions.content_digest(), questions.image_digest()
    assert load_runs(args)[0]["adapter"].image_digest() == images
    Image.effect_noise((60, 60), 50).save(f"{args.image_dir}/other.png")
    edited = load_runs(args)[0]["adapter"]
    assert edited.content_digest() == content and edited.image_digest() != images
