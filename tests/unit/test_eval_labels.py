"""Labels of an evaluation: a label map that comes later keeps the answers, and nothing unreadable is called wrong."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

from common.cli import run

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

import eval_sft
from common.files import read_json_lines

TRUE = {"red": "melanoma", "green": "nevus", "blue": "melanoma"}


def of_test(label):
    return {"label": label, "split": "test"}


@pytest.fixture
def asked(monkeypatch):
    """Replace the engine: it answers "Yes", or what `answer` says; counts what it answers and keeps what it scores."""
    counts = SimpleNamespace(answered=0, scored=[], answer="Yes\u2028indeed\x85")

    def scores(examples, candidates, **options):
        counts.scored += candidates
        return torch.tensor([[-float(len(text)) for text in texts] for texts in candidates])

    def answer_and_score(examples, max_new_tokens, candidates, **options):
        counts.answered += len(examples)
        found = [scores(examples, [texts]).tolist()[0] if texts else [] for texts in candidates]
        return [counts.answer for _ in examples], [False for _ in examples], found

    engine = SimpleNamespace(
        adapters={"default": ""}, processors={None: None}, answer_and_score=answer_and_score, scores=scores
    )
    monkeypatch.setattr("evaluation.runner.open_engine", lambda *args, **options: nullcontext(engine))
    monkeypatch.setattr("evaluation.runner.load_processor", lambda *args, **options: None)
    for check in ("check_image_sizes", "warn_of_long_references"):  # these need the processor
        monkeypatch.setattr(f"evaluation.runner.{check}", lambda *args: None)
    monkeypatch.setattr("evaluation.runner.load_ahead", lambda batches, processor: batches)
    monkeypatch.setattr("evaluation.batching.prompt_lengths", lambda questions, processor: [9] * len(questions.rows))
    monkeypatch.setattr("evaluation.runner.choose_budget", lambda args: 10**6)
    return counts


@pytest.fixture
def evaluate(write_records, tmp_path):
    """Return a function that evaluates on three samples with the given answers and gives the folder."""
    adapter, out = tmp_path / "adapter", tmp_path / "eval"
    LoraConfig(base_model_name_or_path="none", target_modules=["q_proj"]).save_pretrained(adapter)
    save_file({}, adapter / "adapter_model.safetensors")

    def call(answers, *options, labels=TRUE):
        files = {"red": "red.jpg", "green": "green.png", "blue": "blue.jpg"}
        path, images = write_records(
            [
                {
                    "id": name,
                    "image": files[name],
                    "question": f"Is\u2028{name}?",
                    "answer": answer,
                    **of_test(labels[name]),
                }
                for name, answer in answers.items()
            ]
        )
        common = ["--adapter", adapter, "--dataset", path, "--image-dir", images, "--out", out]
        words = [str(word) for word in (*common, "--quantization", "none", *options)]
        assert run(lambda: eval_sft.main(words)) == 0
        return out

    return call


YES_NO = {"red": "Yes", "green": "No", "blue": "Yes."}


def test_a_label_map_that_comes_later_keeps_the_answers(asked, evaluate, tmp_path, capsys):
    out = evaluate(YES_NO)
    before = [row["prediction"] for row in read_json_lines(out / "predictions.jsonl")]
    assert (asked.answered, asked.scored, len(before)) == (3, [], 3)
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        [warning] = [line for line in text.split("\n") if line.startswith("WARNING")]
        assert "only 0 of 3 labelled samples" in warning and "--labels" in warning
    labels = tmp_path / "labels.yaml"
    labels.write_text("melanoma: [yes]\nnevus: ['no']\n")
    evaluate(YES_NO, "--labels", labels)
    assert asked.answered == 3 and sorted(asked.scored) == [["Yes", "No"], ["Yes", "No"], ["Yes.", "No."]]
    assert "WARNING" not in capsys.readouterr().out
    rows = read_json_lines(out / "predictions.jsonl")
    assert [row["prediction"] for row in rows] == before
    assert all(set(row["scores"]) == {"melanoma", "nevus"} for row in rows)
    summary = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    diagnosis = summary["runs"]["adapter"]["diagnosis"]
    assert (summary["diagnosed"], diagnosis["accuracy"]["value"]) == (3, pytest.approx(2 / 3, abs=1e-6))
    evaluate(YES_NO, "--labels", labels)  # complete: neither asked nor scored
    assert (asked.answered, len(asked.scored)) == (3, 3)
    evaluate(YES_NO)  # without it again: its scores go, the answers stay
    rows = read_json_lines(out / "predictions.jsonl")
    assert asked.answered == 3 and not any("scores" in row for row in rows)


def test_corrected_labels_and_references_are_used_with_the_answers_that_are_there(asked, evaluate):
    asked.answer = "A nevus."
    evaluate({name: f"A {label}." for name, label in TRUE.items()})
    corrected = dict.fromkeys(TRUE, "nevus") | {"blue": "melanoma"}
    out = evaluate({name: f"A {label}." for name, label in corrected.items()}, labels=corrected)
    summary = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert summary["runs"]["adapter"]["diagnosis"]["accuracy"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert asked.answered == 3


def test_the_page_calls_no_answer_wrong_that_cannot_be_read(asked, evaluate):
    page = (evaluate(YES_NO) / "report.html").read_text(encoding="utf-8")
    assert "In other words than the reference" in page and "<h2>Wrong" not in page and 'class="turn wrong"' not in page
    assert "only 0 of 3 labelled samples" in page


def test_sensitivity_is_shown_for_melanoma_in_any_spelling(asked, evaluate):
    spelled = {name: {"melanoma": "MELANOMA"}.get(label, label) for name, label in TRUE.items()}
    out = evaluate({name: f"A {label}." for name, label in spelled.items()}, labels=spelled)
    summary = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert list(summary["runs"]["adapter"]["probabilities"]["sensitivity"]) == ["MELANOMA"]


def test_the_page_calls_wrong_what_names_another_label(asked, evaluate):
    asked.answer = "A nevus."
    out = evaluate({name: f"A {label}." for name, label in TRUE.items()})
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('class="turn wrong"') == 2 and "In other words" not in page
