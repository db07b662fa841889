"""Examples on the evaluation's page: which answers are shown, and what they can be filtered by."""

from collections.abc import Sequence

from common.html import encode_image
from data_prep.images import load_image
from data_prep.labels import read_label, strip_thinking
from evaluation.label_matching import asks_for_label

MAX_EXAMPLES = 8  # of each kind, but
MAX_WRONG = 48  # of the wrong answers
IMAGE_SIDE = 480  # px
UNKNOWN = "unknown"  # label or skin type


def choose_examples(runs: dict[str, list[dict]], label_map: dict, samples: Sequence[dict]) -> list[dict]:
    """Return examples for the page: wrong answers, differences to the base model, and correct answers.

    An answer whose reference names no label cannot be judged: its words are the reference's, or others.
    """
    rows, base = runs["adapter"], runs.get("base")

    def correct(row: dict) -> bool | None:
        if asks_for_label(row, label_map):
            return read_label(row["prediction"], label_map) == row["label"]
        answer, reference = (strip_thinking(row[side]).strip() for side in ("prediction", "reference"))
        return answer == reference or None

    kinds = {
        "Wrong": [row for row in rows if correct(row) is False],
        "In other words than the reference": [row for row in rows if correct(row) is None],
    }
    if base is not None:
        pairs = list(zip(rows, base, strict=True))
        kinds["Wrong, base model correct"] = [row for row, other in pairs if correct(row) is False and correct(other)]
        kinds["Correct, base model wrong"] = [row for row, other in pairs if correct(row) and correct(other) is False]
        kinds["Correct"] = [row for row, other in pairs if correct(row) and correct(other) is not False]
    else:
        kinds["Correct"] = [row for row in rows if correct(row)]
    base_answers = {row["index"]: row["prediction"] for row in base or []}
    return [
        {
            "title": title,
            "count": len(chosen),
            "rows": [
                _make_example(row, correct(row), base_answers.get(row["index"]), samples[row["index"]]["images"])
                for row in spaced(chosen, MAX_WRONG if title == "Wrong" else MAX_EXAMPLES)
            ],
        }
        for title, chosen in kinds.items()
    ]


def spaced(rows: list, count: int) -> list:
    """Return at most `count` of the rows, evenly spaced, to cover all labels."""
    return rows[:: max(1, -(-len(rows) // count))]


def example_filters(examples: list[dict]) -> list[dict]:
    """Return what the page's examples can be filtered by: labels and skin types, where there are several."""
    found = []
    for name, title in {"label": "label", "skin": "skin type"}.items():
        options = sorted(
            {row[name] for kind in examples for row in kind["rows"]}, key=lambda value: (value == UNKNOWN, value)
        )
        if len(options) > 1:
            found.append({"name": name, "title": title, "options": options})
    return found


def _make_example(row: dict, correct: bool | None, base_answer: str | None, images: list) -> dict:
    scores = row.get("scores", {})
    return {
        **{key: row[key] for key in ("question", "reference", "prediction", "id")},
        "label": row["label"] or UNKNOWN,
        "skin": row.get("skin_type") or UNKNOWN,
        "correct": correct,
        "base": base_answer,
        "images": [encode_image(load_image(image), IMAGE_SIDE) for image in images],
        "likeliest": max(scores, key=scores.get) if scores else None,
    }
