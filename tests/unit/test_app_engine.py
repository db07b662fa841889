"""The page's model: streamed answers, the base beside the adapter, several users, the evaluation's temperature."""

import json
import shutil
import threading
from argparse import Namespace

import numpy as np
import pytest
import torch
from scipy.special import softmax

import eval_sft
from evaluation.generation import generate, score_answers
from models.adapters import load_answering_model
from models.loading import load_processor
from webapp import actions
from webapp.conversation import ADAPTER, BASE, Conversation
from webapp.engine import Engine
from webapp.labels import read_labels
from webapp.occlusion import GRID
from webapp.sessions import Session
from webapp.start import describe_adapter, load_data, read_reader, suggest_questions


@pytest.fixture(scope="module")
def engine(adapter):
    model = load_answering_model(str(adapter))
    return Engine(model, load_processor(str(adapter)), max_new_tokens=12, batch_size=16)


@pytest.fixture(scope="module")
def evaluated(adapter, demo_data, tmp_path_factory):
    """A copy of the adapter, with an evaluation in its folder."""
    folder = tmp_path_factory.mktemp("evaluated") / "adapter"
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("checkpoint-*", "eval"))
    options = ["--adapter", folder, "--dataset", demo_data, "--min-group", 2, "--max-new-tokens", 4]
    eval_sft.main([str(word) for word in options])
    return folder


@pytest.fixture
def example(demo_splits):
    sample = demo_splits["test"][0]
    return {"id": 0, "images": sample["images"], "messages": sample["messages"][:1]}


def start(engine, demo_splits, number=0):
    session = Session(Conversation())
    question = actions.take_example(session, demo_splits["test"][number], engine)
    return session, question


def test_a_streamed_answer_grows_to_the_answer_of_predict(engine, example):
    pieces = list(engine.stream(example, threading.Event()))
    texts = [text for text, _ in pieces]
    assert texts[-1] == generate(engine.model, engine.processor, [example], 12)[0][0]
    assert len(texts) > 2 and all(texts[-1].startswith(text) for text in texts)


def test_a_thought_is_known_as_one_while_it_grows_and_when_it_is_stopped(engine, example, monkeypatch):
    monkeypatch.setattr("webapp.engine.opens_thought", lambda processor: "<think>\n")
    monkeypatch.setattr("evaluation.generation.opens_thought", lambda processor: "<think>\n")
    texts = [text for text, _ in engine.stream(example, threading.Event())]
    assert len(texts) > 2 and all(text.startswith("<think>") for text in texts)


def test_the_base_answers_without_the_adapter_which_then_is_back(engine, example):
    *_, (base, note) = engine.stream(example, threading.Event(), adapter=False)
    with engine.model.disable_adapter():
        assert base == generate(engine.model, engine.processor, [example], 12)[0][0]
    assert note == "cut at 12 tokens"
    *_, (again, _) = engine.stream(example, threading.Event())
    assert again == generate(engine.model, engine.processor, [example], 12)[0][0] != base


def test_an_answer_is_stopped_and_a_reader_who_leaves_frees_the_model(engine, example):
    stop = threading.Event()
    pieces = engine.stream(example, stop)
    next(pieces)
    stop.set()
    assert list(pieces)[-1][1] in ("stopped", "")  # it may have ended just before
    left = engine.stream(example, threading.Event())
    next(left)
    left.close()
    assert not engine.busy


def test_two_users_at_once_get_their_own_answers(engine, demo_splits):
    rows = [{"id": 0, "images": row["images"], "messages": row["messages"][:1]} for row in demo_splits["train"]][:6]
    alone = [[list(engine.stream(row, threading.Event(), adapter=on))[-1] for on in (True, False)] for row in rows]
    together = {}

    def ask(number):
        for on in (True, False):
            *_, together[number, on] = engine.stream(rows[number], threading.Event(), adapter=on)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[together[number, on] for on in (True, False)] for number in range(6)] == alone


def test_a_question_is_answered_ranked_and_followed_up(engine, evaluated, demo_splits):
    reader = read_labels(str(evaluated), None, "test")
    number = next(n for n, row in enumerate(demo_splits["test"]) if len(row["messages"]) == 2)
    session, question = start(engine, demo_splits, number)
    assert question in reader.asks
    for _ in actions.ask(session, question, engine, reader, base=True):
        assert session.is_working
    turn = session.conversation.turns[0]
    assert turn.answers[ADAPTER].text and turn.answers[BASE].text
    assert turn.reference == demo_splits["test"][number]["messages"][-1]["content"]
    scores = score_answers(
        engine.model, engine.processor, [session.conversation.example(ADAPTER)], [list(turn.labels.answers.values())]
    )
    expected = softmax(scores[0].numpy() / reader.temperature).max()
    assert turn.labels.rows[0][1] == pytest.approx(expected, abs=1e-5) and not turn.labels.uncalibrated
    list(actions.ask(session, "Is the skin light or dark?", engine, reader, base=True))
    assert len(session.conversation.turns) == 2 and session.messages == []
    assert session.conversation.turns[1].labels is None and session.conversation.turns[1].labels_note


def test_the_page_scores_the_answers_that_the_evaluation_scored(evaluated):
    reader = read_labels(str(evaluated), None, "test")
    metrics = json.loads((evaluated / "eval" / "metrics.json").read_text())
    assert reader.uncalibrated == ""
    assert reader.temperature == metrics["runs"]["adapter"]["probabilities"]["temperature"]


@pytest.mark.parametrize("case", ["other wordings", "no answers", "no temperature", "another adapter"])
def test_where_the_temperature_does_not_apply_the_page_says_so(evaluated, tmp_path, case):
    folder = tmp_path / "adapter"
    shutil.copytree(evaluated, folder)
    answers, metrics = folder / "eval" / "predictions.jsonl", folder / "eval" / "metrics.json"
    if case == "other wordings":
        answers.write_text(answers.read_text().replace('"reference": "This is', '"reference": "It is'))
    elif case == "no answers":
        answers.unlink()
    elif case == "no temperature":
        content = json.loads(metrics.read_text())
        del content["runs"]["adapter"]["probabilities"]["temperature"]
        metrics.write_text(json.dumps(content))
    else:
        (folder / "adapter_model.safetensors").write_bytes(b"other")
        assert read_labels(str(folder), None, "test") is None
        return
    words = {"other wordings": "other wordings", "no answers": "predictions.jsonl", "no temperature": "no validation"}
    reader = read_labels(str(folder), None, "test")
    assert words[case] in reader.uncalibrated and reader.temperature is None
    assert reader.rank("?", {"a": "a", "b": "b"}, np.array([0.0, -1.0])).verdict == ""


def test_maps_are_those_of_single_photos_in_grey(engine, evaluated, demo_splits):
    reader = read_labels(str(evaluated), None, "test")
    number = next(n for n, row in enumerate(demo_splits["test"]) if len(row["messages"]) == 2)
    session, question = start(engine, demo_splits, number)
    list(actions.draw_maps(session, 0, ["melanoma", "vitiligo"], engine))
    assert session.messages == ["ask a question first whose answer names a label"]
    list(actions.ask(session, question, engine, reader, base=False))
    progress = [session.progress for _ in actions.draw_maps(session, 0, ["melanoma", "vitiligo"], engine)]
    assert [step[:2] for step in progress] == [(done, GRID**2 + 1) for done in (0, 16, 32, 48, 64, 65)]
    assert [found.label for found in session.maps] == ["melanoma", "vitiligo"] and session.progress is None
    list(actions.draw_maps(session, 1, ["melanoma", "vitiligo"], engine))
    assert session.messages == ["choose a photo of the conversation and two of its labels"]
    assert session.place == "maps"
    steps = actions.draw_maps(session, 0, ["melanoma", "vitiligo"], engine)
    next(steps)
    session.stop.set()
    assert list(steps) == [] and session.messages == ["stopped"] and not session.is_working


def test_batches_change_no_score(engine, example):
    answers = ["This is melanoma.", "This is vitiligo."]
    one = np.concatenate([engine.score([example], answers) for _ in range(3)])
    three = np.concatenate(list(engine.score_all([example] * 3, answers)))
    assert three == pytest.approx(one, abs=1e-4)
    assert three.shape == (3, 2)


def test_out_of_memory_is_words_and_the_question_can_be_asked_again(engine, demo_splits, monkeypatch):
    session, question = start(engine, demo_splits)

    def fail(**inputs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(engine.model, "forward", fail)
    list(actions.ask(session, question, engine, None, base=False))
    assert session.messages[0].startswith("out of memory: lower --max-pixels or --max-new-tokens")
    assert session.conversation.turns == [] and len(session.conversation.pending) == 1
    assert not engine.busy and not session.is_working


def test_a_new_case_forgets_photos_and_turns(engine, demo_splits):
    session, question = start(engine, demo_splits)
    list(actions.ask(session, question, engine, None, base=False))
    actions.start_again(session, "system")
    assert session.conversation.photos() == [] and session.conversation.turns == []
    assert session.conversation.system == "system"


def test_uploads_are_deleted_once_they_are_read(engine, demo_raw, tmp_path):
    files = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    shutil.copy(demo_raw / "images" / "0001.jpg", files[0])
    files[1].write_text("not an image")
    session = Session(Conversation())
    actions.add_photos(session, [str(file) for file in files], engine)
    assert [found.name for found in session.conversation.pending] == ["a.jpg"]
    assert session.messages == ["b.jpg: not an image"]
    assert list(tmp_path.iterdir()) == []
    actions.remove_photo(session, 0)
    assert session.conversation.photos() == [] and session.messages == []


def test_the_start_of_the_page(evaluated, demo_data, tiny_base):
    args = Namespace(
        adapter=str(evaluated), dataset=str(demo_data), split="test", image_dir=None, max_pixels=None,
        base=None, quantization="auto", dtype=None,
    )  # fmt: skip
    splits, examples = load_data(args)
    assert [sample["id"] for sample in examples] == splits["test"]["id"] and examples[0]["image"].size == (112, 112)
    reader = read_reader(args, splits)
    questions = suggest_questions(reader, examples)
    assert 0 < len(questions) <= 4 and reader.asks[questions[0]]
    facts = describe_adapter(args)
    assert facts["adapter"] == "adapter" and facts["base"] == tiny_base.name
    assert facts["loading"] == "nf4, float32" and facts["measured"].startswith("Evaluated on split test: accuracy ")
    args.max_pixels = 12544
    assert read_reader(args, splits).uncalibrated == "--max-pixels may differ from the evaluation's"
    args.dataset, args.image_dir = None, "x"
    with pytest.raises(ValueError, match="--image-dir: goes with --dataset"):
        load_data(args)
