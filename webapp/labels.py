"""How likely the adapter finds each label, and what the evaluation says about such a confidence."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import DatasetDict
from scipy.special import softmax

from common.files import EVALUATION_METRICS, read_json_lines
from data_prep.labels import LabelMap, build_label_map, named_labels
from evaluation.journal import PREDICTIONS_FILE
from evaluation.label_matching import LABEL_PLACEHOLDER
from evaluation.questions import (
    Questions,
    candidate_answers,
    make_label_map,
    mark_known_labels,
    read_questions,
    set_candidates,
)
from publishing.run_facts import read_metrics

NOT_EVALUATED = "no evaluation is in the adapter's folder (python eval_sft.py)"
NOT_ASKED = "the evaluation did not ask this question"
ONLY_ITS_PHOTOS = "That holds for photos like those: any other picture, even noise, can have such a confidence too."


@dataclass(frozen=True)
class LabelRanking:
    """Labels and their probabilities, the likeliest first.

    Attributes:
        rows: label and probability.
        answers: the answer that was scored, by label.
        uncalibrated: why the probabilities are not calibrated; empty when they are.
        verdict: what the evaluation says about this confidence; empty when it says nothing.
        abstain: whether the confidence is under the level at which the evaluation says to abstain.
    """

    rows: list[tuple[str, float]]
    answers: dict[str, str]
    uncalibrated: str
    verdict: str = ""
    abstain: bool = False


@dataclass(frozen=True)
class LabelReader:
    """Which answers stand for the labels, and how to read their likelihoods.

    Attributes:
        label_map: see `build_label_map`.
        wording: templates and forms, see `set_candidates`.
        asks: of each known question, whether it asks for the label.
        temperature: of the evaluation; None without one.
        level: see `abstention_level`; None without one.
        uncalibrated: why there is no temperature.
    """

    label_map: LabelMap
    wording: tuple[dict, dict]
    asks: dict[str, bool]
    temperature: float | None = None
    level: dict | None = None
    uncalibrated: str = NOT_EVALUATED

    def candidates(self, question: str, messages: list[dict]) -> tuple[dict[str, str], str]:
        """Return the answer to score for each label, or none and the reason.

        Args:
            question: as it was asked.
            messages: the prompt, the question included.
        """
        if not self.asks.get(question, True):
            return {}, "in the evaluation this question does not ask for the label"
        if any(self._gives_away(message) for message in messages):
            return {}, "the question, or a turn before it, names a label already"
        return candidate_answers(question, self.label_map, self.wording), ""

    def _gives_away(self, message: dict) -> bool:
        """Return whether a turn names a label; a question that names several is a choice, and gives nothing away."""
        named = named_labels(message["content"], self.label_map) if message["role"] != "system" else []
        return len(named) == 1 or (bool(named) and message["role"] == "assistant")

    def rank(self, question: str, answers: dict[str, str], scores: np.ndarray) -> LabelRanking:
        """Return the likeliest labels.

        Args:
            question: as it was asked.
            answers: the answer that was scored, by label.
            scores: their log-likelihoods, shape (K,).
        """
        uncalibrated = self.uncalibrated or ("" if self.asks.get(question) else NOT_ASKED)
        temperature = 1.0 if uncalibrated else self.temperature
        rows = rank_labels(list(answers), scores, temperature)
        verdict, abstain = ("", False) if uncalibrated else judge_confidence(rows[0][1], self.level)
        return LabelRanking(rows, answers, uncalibrated, verdict, abstain)


def rank_labels(labels: list[str], scores: np.ndarray, temperature: float) -> list[tuple[str, float]]:
    """Return labels and probabilities, the likeliest first: the softmax of log-likelihoods over a temperature."""
    probabilities = softmax(np.asarray(scores, dtype=float) / temperature)
    order = np.argsort(-probabilities, kind="stable")
    return [(labels[number], float(probabilities[number])) for number in order]


def judge_confidence(confidence: float, level: dict | None) -> tuple[str, bool]:
    """Return what the evaluation says about an answer of this confidence, and whether it says to abstain.

    Args:
        confidence: calibrated probability of the likeliest label.
        level: see `abstention_level`; None when the evaluation has none.
    """
    if level is None:
        return "", False
    if level["confidence"] is None:
        found = f"The evaluation found no confidence at which {level['target']:.0%} of the answers were right."
        return f"Abstain: do not take this as an answer. {found}", True
    if confidence < level["confidence"]:
        limit = f"its confidence of {confidence:.1%} is under {level['confidence']:.1%}"
        return f"Abstain: do not take this as an answer; {limit}, the level that the evaluation found.", True
    found = f"{level['accuracy']:.0%} of the evaluation's answers from {level['confidence']:.1%} on were right"
    size = f"({level['samples']:,} samples of the validation split)"
    return f"Confidence {confidence:.1%}: {found} {size}. {ONLY_ITS_PHOTOS}", False


def read_labels(adapter: str, splits: DatasetDict | None, split: str) -> LabelReader | None:
    """Return how to read the labels: from the adapter's evaluation, else from a data set; None without labels.

    Args:
        adapter: folder or Hub id.
        splits: data set that the page was given.
        split: the one of them whose questions are taken.
    """
    folder = Path(adapter)
    metrics = read_metrics(folder) if folder.is_dir() else None
    if metrics and len(metrics["labels"]) > 1:
        return read_evaluation(folder, metrics)
    if splits is None:
        return None
    label_map, questions = make_label_map(splits, None), read_questions(splits[split])
    if len(label_map) < 2:
        return None
    mark_known_labels(questions, label_map)
    return LabelReader(label_map, set_candidates(questions, label_map), _which_ask(questions))


def read_evaluation(folder: Path, metrics: dict) -> LabelReader:
    """Return how the evaluation in an adapter's folder has read the labels.

    Its temperature is valid for the answers that it scored. `predictions.jsonl` has a digest of these; without the
    file, or when the digests differ, as with a label map of the user's, the probabilities are not calibrated.
    """
    path = folder / Path(EVALUATION_METRICS).with_name(PREDICTIONS_FILE)
    rows = [row for row in read_json_lines(path) if row["run"] == "adapter"] if path.is_file() else []
    references = [(row["label"], (row["reference"],)) for row in rows if row["label"] is not None]
    label_map = build_label_map(metrics["labels"], references=references)
    if not rows:
        plain = ({"": LABEL_PLACEHOLDER}, {})
        return LabelReader(label_map, plain, {}, uncalibrated=f"the evaluation's {PREDICTIONS_FILE} is not here")
    digests = [row.pop("candidates", None) for row in rows]
    questions = Questions(rows, [], None, [], [])
    wording, asks = set_candidates(questions, label_map), _which_ask(questions)
    found = metrics["runs"]["adapter"].get("probabilities", {})
    if "temperature" not in found:
        reason = "the evaluation had no validation split to fit a temperature on"
    elif digests != [questions.columns(number).get("candidates") for number in range(len(rows))]:
        reason = "the evaluation scored other wordings of the labels"
    else:
        return LabelReader(label_map, wording, asks, found["temperature"], found.get("abstain"), uncalibrated="")
    return LabelReader(label_map, wording, asks, uncalibrated=reason)


def _which_ask(questions: Questions) -> dict[str, bool]:
    """Return of each question whether it asks for the label in any sample."""
    asks = {}
    for row, candidates in zip(questions.rows, questions.candidates, strict=True):
        asks[row["question"]] = asks.get(row["question"], False) or bool(candidates)
    return asks
