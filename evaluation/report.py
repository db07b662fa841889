"""The page about an evaluation: does it help, which diagnoses, for whom, and can its confidence be trusted."""

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from common.html import TEMPLATES, encode_figure, encode_image, shorten
from common.plots import BLUE, GREEN, GREY, ORANGE
from data_prep.images import load_image
from evaluation.label_matching import read_label
from publishing.model_card import RUNS

FIGURES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1"}
SHARES = {"no_label": "names no label", "several_labels": "names several"}
TEXTS = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
    "length_ratio": "length ratio",
}
ABSENT = "n/a"
SHOWN = 8  # examples of a kind
MOST_LABELS = 30  # in the confusion matrix: the most frequent ones


def write_evaluation(
    folder: Path, summary: dict, runs: dict[str, list[dict]], label_map: dict, image_of: Callable[[int], list]
) -> None:
    """Write the plots and `report.html` into an evaluation's folder.

    Args:
        folder: where `metrics.json` is.
        summary: its content.
        runs: rows by run, as `evaluation.Journal.finish` returns them.
        label_map: see `labels.build_label_map`.
        image_of: the images of a sample by its index, undecoded.
    """
    charts = {}
    for name, figure in draw_charts(summary).items():
        figure.savefig(folder / f"{name}.png")
        charts[name] = encode_figure(figure, name)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    environment.filters |= {"figure": figure_text, "percent": percent, "range": range_text}
    page = environment.get_template("evaluation.html").render(
        summary=summary,
        runs=RUNS, figures=FIGURES, shares=SHARES, texts=TEXTS,
        cards=cards(summary),
        charts=charts,
        examples=examples(runs, label_map, image_of),
    )  # fmt: skip
    (folder / "report.html").write_text(page, encoding="utf-8")


def figure_text(value: float | None, digits: int = 3) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f} %"


def range_text(figure: dict) -> str:
    """Return the interval of a figure, "" when there is none."""
    return "" if figure["low"] is None else f"{figure['low']:.3f} to {figure['high']:.3f}"


def cards(summary: dict) -> list[dict]:
    found = summary["runs"]["adapter"]
    numbers = []
    if "diagnosis" in found:
        numbers += [(name, found["diagnosis"][key]) for key, name in FIGURES.items()]
    if "probabilities" in found:
        numbers += [("mean AUROC", found["probabilities"]["macro_auroc"])]
        numbers += [("calibration error", found["probabilities"]["calibration"]["expected_calibration_error"])]
    told = [
        {"name": name, "value": figure_text(figure["value"]), "range": range_text(figure)} for name, figure in numbers
    ]
    return told or [{"name": TEXTS[key], "value": f"{value:.2f}", "range": ""} for key, value in found["text"].items()]


def draw_charts(summary: dict) -> dict[str, Figure]:
    """Return the figures that the numbers allow, by file name."""
    found, charts = summary["runs"]["adapter"], {}
    if "diagnosis" in found:
        charts["confusion"] = draw_confusion(found["diagnosis"]["confusion"])
    if told := [(column, told) for column, told in summary.get("subgroups", {}).items()]:
        charts["subgroups"] = draw_subgroups(told, found["diagnosis"]["accuracy"]["value"])
    if "probabilities" in found:
        charts["reliability"] = draw_reliability(found["probabilities"])
        charts["abstention"] = draw_abstention(found["probabilities"]["abstention"])
    return charts


def _axes(width: float, height: float, title: str):
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=12, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_confusion(matrix: dict) -> Figure:
    """Draw what each label was answered by, as shares of its samples; columns that nothing fell into are left out."""
    counts = matrix["counts"]
    rows = sorted(range(len(counts)), key=lambda n: -sum(counts[n]))[:MOST_LABELS]
    rows = sorted(n for n in rows if sum(counts[n]))
    columns = [n for n in range(len(matrix["columns"])) if n in rows or any(counts[row][n] for row in rows)]
    shares = [[counts[row][column] / sum(counts[row]) for column in columns] for row in rows]
    side = max(4.2, 0.42 * len(columns) + 2.4)
    figure, axes = _axes(side + 0.6, max(3.6, 0.42 * len(rows) + 2.2), "Answers by diagnosis")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if count := counts[row][column]:
                axes.text(
                    x, y, count, ha="center", va="center", fontsize=9, color="white" if shares[y][x] > 0.6 else "black"
                )
    axes.set_xticks(range(len(columns)), [shorten(matrix["columns"][n], 22) for n in columns], rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), [shorten(matrix["rows"][n], 22) for n in rows])
    axes.set(xlabel="answered", ylabel="diagnosis")
    axes.spines[:].set_visible(False)
    return figure


def draw_subgroups(told: list[tuple[str, dict]], overall: float) -> Figure:
    """Draw the accuracy of each subgroup with its interval, beside that of all."""
    lines = [
        (f"{name}  ({group['samples']})", group.get("accuracy"))
        for column, found in told
        for name, group in [(column.replace("_", " "), None), *found["groups"].items()]
        for group in [group or {"samples": "samples"}]
    ]
    figure, axes = _axes(5.2, max(3.2, 0.3 * len(lines) + 1.2), "Accuracy by subgroup")
    for y, (_, figure_of) in enumerate(lines):
        if figure_of is not None:
            low, high = (
                figure_of[end] if figure_of[end] is not None else figure_of["value"] for end in ("low", "high")
            )
            axes.plot([low, high], [y, y], color=BLUE, linewidth=2, alpha=0.45)
            axes.plot(figure_of["value"], y, "o", color=BLUE)
    axes.axvline(overall, color=GREY, linewidth=1)
    axes.set_yticks(range(len(lines)), [shorten(name, 34) for name, _ in lines])
    axes.set(xlabel="accuracy, 95 % interval; the line is all samples", xlim=(0, 1.03))
    axes.invert_yaxis()
    return figure


def draw_reliability(probabilities: dict) -> Figure:
    """Draw accuracy against confidence, before and after the temperature."""
    figure, axes = _axes(5, 4.4, "Confidence and accuracy")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    shown = {"calibration": ("as it is", BLUE), "calibration_tempered": ("with temperature", ORANGE)}
    for key, (name, colour) in shown.items():
        if key in probabilities:
            bins = probabilities[key]["bins"]
            sizes = [18 + 160 * row["samples"] / sum(row["samples"] for row in bins) for row in bins]
            points = [[row[axis] for row in bins] for axis in ("confidence", "accuracy")]
            axes.plot(*points, color=colour, linewidth=1, alpha=0.6)
            axes.scatter(*points, s=sizes, color=colour, label=name, clip_on=False)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower right")
    return figure


def draw_abstention(rows: list[dict]) -> Figure:
    figure, axes = _axes(5, 4.4, "Answering only when sure")
    axes.plot(
        [100 * row["coverage"] for row in rows], [row["accuracy"] for row in rows], "o-", color=GREEN, clip_on=False
    )
    axes.set(xlabel="share answered, the surest first, %", ylabel="accuracy", ylim=(0, 1.02))
    axes.grid(color="#EEEEEE")
    return figure


def examples(runs: dict[str, list[dict]], label_map: dict, image_of: Callable[[int], list]) -> list[dict]:
    """Return samples to look at: wrong ones, what the adapter mended or broke beside the base, and right ones."""
    rows, base = runs["adapter"], runs.get("base")

    def right(row: dict) -> bool:
        if row["label"] is not None:
            return read_label(row["prediction"], label_map) == row["label"]
        return row["prediction"].strip() == row["reference"].strip()

    kinds = {"Wrong": [row for row in rows if not right(row)], "Right": [row for row in rows if right(row)]}
    if base is not None:
        pairs = list(zip(rows, base, strict=True))
        kinds["Right, where the base model is wrong"] = [row for row, other in pairs if right(row) > right(other)]
        kinds["Wrong, where the base model is right"] = [row for row, other in pairs if right(row) < right(other)]
        kinds["Right"] = [row for row, other in pairs if right(row) and right(other)]
    others = {row["index"]: row["prediction"] for row in base or []}
    return [
        {
            "title": title,
            "count": len(found),
            "shown": [_example(row, right(row), others, image_of) for row in _spread(found)],
        }
        for title, found in sorted(kinds.items(), key=lambda kind: kind[0].startswith("Right"))
    ]


def _spread(rows: list[dict]) -> list[dict]:
    """Return a few rows, evenly spread, so that all labels have a chance."""
    step = max(1, -(-len(rows) // SHOWN))
    return rows[::step]


def _example(row: dict, right: bool, others: dict[int, str], image_of: Callable[[int], list]) -> dict:
    scores = row.get("scores", {})
    return {
        **{key: row[key] for key in ("question", "reference", "prediction", "id")},
        "right": right,
        "base": others.get(row["index"]),
        "images": [encode_image(load_image(image), 300) for image in image_of(row["index"])],
        "likeliest": max(scores, key=scores.get) if scores else None,
    }
