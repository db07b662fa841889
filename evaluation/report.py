"""The results of an evaluation: `metrics.json`, plots, a page with examples, and the lines on the screen."""

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from common.files import EVALUATION_PLOTS
from common.html import encode_figure, render_page, shorten
from common.plots import BLUE, DPI, GREEN, GREY, GRID, ORANGE, legend_below
from evaluation.calibration import MIN_CALIBRATION
from evaluation.metrics import MAIN_METRICS
from evaluation.page_examples import UNKNOWN, choose_examples, example_filters
from publishing import metric_notes
from publishing.model_card import METRIC_TITLES, RUN_TITLES

DARK_SHARE = 0.82  # of a row in the confusion matrix, from which on its blue wants white digits
MAX_LABELS = 30  # in the confusion matrix: the most frequent
CHART_NOTES = {
    "confusion": "Rows are the known labels, columns what was answered; right answers stand on the diagonal.",
    "subgroups": "Points are accuracies, bars their 95 % intervals; where bars overlap, groups may differ by chance.",
    "reliability": "On the grey line, answers are right as often as confidence says; under it they are too sure.",
    "abstention": "Accuracy if only so many of the most confident answers are kept; it should rise to the left.",
}


def write_report(
    folder: Path, summary: dict, runs: dict[str, list[dict]], label_map: dict, samples: Sequence[dict]
) -> None:
    """Write `metrics.json`, the plots and `report.html`.

    Args:
        folder: where to write.
        summary: content of `metrics.json`.
        runs: rows by run, see `Journal.finish`.
        label_map: see `build_label_map`.
        samples: `images` of each question, by its index.
    """
    content = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    (folder / "metrics.json").write_text(content, encoding="utf-8")
    for plot in EVALUATION_PLOTS:
        (folder / Path(plot).name).unlink(missing_ok=True)  # an earlier evaluation may have had more of them
    charts = {}
    for name, figure in draw_charts(summary).items():
        # with fonts that have the labels' characters
        charts[name] = encode_figure(figure, figure.axes[0].get_title(loc="left"), CHART_NOTES[name])
        (folder / f"{name}.png").write_bytes(base64.b64decode(charts[name]["png"]))  # drawing takes a quarter second
    examples = choose_examples(runs, label_map, samples)
    page = render_page(
        "evaluation.html",
        filters=FILTERS,
        summary=summary,
        run_titles=titles_of(summary),
        main_metrics=MAIN_METRICS,
        cards=make_cards(summary),
        notes=metric_notes,
        calibration_needs=MIN_CALIBRATION,
        charts=charts,
        examples=examples,
        filters_of_examples=example_filters(examples),
        unknown=UNKNOWN,
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def format_verdict(summary: dict, out: Path) -> str:
    """Return the lines on the screen: accuracy of each run, or chrF for data without labels, and what they rest on."""
    lines, titles = [""], titles_of(summary)
    for name, run in summary["runs"].items():
        accuracy = run.get("diagnosis", {}).get("accuracy")
        value = f"accuracy {format_number(accuracy['value'])}" if accuracy else f"chrF {run['text']['chrf']:.1f}"
        spread = accuracy and format_range(accuracy)
        lines.append(f"{titles[name]:<26}{value}" + (f"   95 % interval {spread}" if spread else ""))
    if "shuffled_same_label" in summary:
        lines.append(f"{'  shuffled image, same label':<35}{summary['shuffled_same_label']:.3f}")
    for name, run in summary["runs"].items():
        if run["cut"]:
            answers = f"{run['cut']} of {run['samples']} answers"
            lines.append(f"{answers} were cut at --max-new-tokens {summary['max_new_tokens']} ({titles[name]})")
    lines += _gain_lines(summary)
    clusters = f", of {summary['clusters']} {summary['cluster_unit']}" if metric_notes.has_clusters(summary) else ""
    lines.append(f"{summary['diagnosed']} of {summary['samples']} questions ask for the label{clusters}")
    if summary.get("shuffled_left_out"):
        lines += metric_notes.shuffled_notes(summary)[-1:]
    lines += metric_notes.interval_notes(summary)
    lines += [f"WARNING: {summary['unread']}"] if "unread" in summary else []
    lines.append(f"{'report':<26}{out / 'report.html'}")
    return "\n".join(lines)


def _gain_lines(summary: dict) -> list[str]:
    """Return how much of the difference to the base model is knowledge, and how much is form."""
    if (gain := summary.get("against_base", {}).get("gain")) is None:
        return []
    knowledge, form = gain["knowledge"]["value"], gain["form"]["value"]
    problem = metric_notes.form_problem(summary["runs"]["base"]["diagnosis"])
    return [f"{'difference to the base':<26}knowledge {knowledge:+.3f}, form {form:+.3f} (the base {problem})"]


def titles_of(summary: dict) -> dict[str, str]:
    """Return the title of each run; "adapter" is the model itself when a model was evaluated."""
    return {**RUN_TITLES, **({"adapter": "model", "shuffled": "images shuffled"} if "model" in summary else {})}


def format_number(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def format_percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f} %"


def format_range(metric: dict) -> str:
    """Return the interval of a metric, "" when it has none."""
    return "" if metric["low"] is None else f"{metric['low']:.3f} to {metric['high']:.3f}"


def make_cards(summary: dict) -> list[dict]:
    """Return the numbers at the top of the page, each with its interval and the size of the sample."""
    run = summary["runs"]["adapter"]
    size = metric_notes.describe_size(
        summary["diagnosed"] or run["samples"], summary["clusters"], summary["cluster_unit"]
    )
    if "diagnosis" not in run:
        texts = run["text"].items()
        return [make_card(key, f"{value:.2f}", size) for key, value in texts]
    metrics = {key: run["diagnosis"][key] for key in MAIN_METRICS}
    probabilities = run.get("probabilities", {})
    if "macro_auroc" in probabilities:
        metrics["macro_auroc"] = probabilities["macro_auroc"]
    if "calibration" in probabilities:
        error = probabilities["calibration"]["expected_calibration_error"]
        metrics["calibration"] = {"value": error, "low": None, "high": None}
    return [
        make_card(key, format_number(metric["value"]), size, format_range(metric)) for key, metric in metrics.items()
    ]


def make_card(key: str, value: str, size: str, interval: str = "") -> dict:
    card = {"name": METRIC_TITLES[key], "value": value, "range": interval, "size": size}
    return {**card, "note": metric_notes.MEANINGS.get(key, "")}


def draw_charts(summary: dict) -> dict[str, Figure]:
    """Return the plots that the summary has numbers for, by file name."""
    run, charts = summary["runs"]["adapter"], {}
    if "diagnosis" in run:
        charts["confusion"] = draw_confusion(run["diagnosis"]["confusion"])
    if summary.get("subgroups"):
        charts["subgroups"] = draw_subgroups(summary, run["diagnosis"]["accuracy"]["value"])
    if "probabilities" in run:
        if "calibration" in run["probabilities"]:
            charts["reliability"] = draw_reliability(run["probabilities"])
        charts["abstention"] = draw_abstention(run["probabilities"]["abstention"])
    return charts


def explain(keys: Iterable[str]) -> str:
    """Return the meanings of some metrics, as a sentence."""
    meanings = "; ".join(f"{METRIC_TITLES[key]}: {metric_notes.MEANINGS[key]}" for key in keys)
    return f"{meanings[:1].upper()}{meanings[1:]}."


FILTERS = {
    "explain": explain,
    "number": format_number,
    "percent": format_percent,
    "range": format_range,
    "title": METRIC_TITLES.get,
}


def make_axes(width: float, height: float, title: str):
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=12, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_confusion(matrix: dict) -> Figure:
    """Draw the confusion matrix, coloured by row share; empty columns are left out."""
    counts = matrix["counts"]
    frequent = sorted(range(len(counts)), key=lambda n: -sum(counts[n]))[:MAX_LABELS]
    rows = sorted(n for n in frequent if sum(counts[n]))
    columns = [n for n in range(len(matrix["columns"])) if n in rows or any(counts[row][n] for row in rows)]
    shares = [[counts[row][column] / sum(counts[row]) for column in columns] for row in rows]
    width, height = max(4.2, 0.42 * len(columns) + 2.4) + 0.6, max(3.6, 0.42 * len(rows) + 2.2)
    figure, axes = make_axes(width, height, "Answers by diagnosis")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if count := counts[row][column]:
                colour = "white" if shares[y][x] > DARK_SHARE else "black"
                axes.text(x, y, count, ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(columns)), [shorten(matrix["columns"][n], 22) for n in columns], rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), [shorten(matrix["rows"][n], 22) for n in rows])
    axes.set(xlabel="answer", ylabel="diagnosis")
    axes.spines[:].set_visible(False)
    return figure


def draw_subgroups(summary: dict, overall: float) -> Figure:
    """Draw the accuracy of each subgroup with its interval, and that of all samples as a line."""
    unit, lines = summary["cluster_unit"], []
    for column, metrics in summary["subgroups"].items():
        lines.append((f"{column.replace('_', ' ')}  ({'samples' if unit == 'samples' else f'of {unit}'})", None))
        groups = metrics["groups"].items()
        sizes = {name: group["samples"] if unit == "samples" else f"of {group['clusters']}" for name, group in groups}
        lines += [(f"{name}  ({sizes[name]})", group.get("accuracy")) for name, group in groups]
    figure, axes = make_axes(5.2, max(3.2, 0.3 * len(lines) + 1.2), "Accuracy by subgroup")
    for y, (_, accuracy) in enumerate(lines):
        if accuracy is not None:
            value = accuracy["value"]
            ends = [value if accuracy[end] is None else accuracy[end] for end in ("low", "high")]
            axes.plot(ends, [y, y], color=BLUE, linewidth=2, alpha=0.7)
            axes.plot(value, y, "o", color=BLUE)
    axes.axvline(overall, color=GREY, linewidth=1)
    axes.set_yticks(range(len(lines)), [shorten(name, 34) for name, _ in lines])
    axes.set(xlabel="accuracy, 95 % interval; vertical line: all samples", xlim=(0, 1.03))
    axes.invert_yaxis()
    return figure


def draw_reliability(probabilities: dict) -> Figure:
    """Draw accuracy against confidence, before and after temperature scaling; larger points hold more samples."""
    figure, axes = make_axes(5, 4.4, "Confidence and accuracy")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    series = {"calibration": ("unscaled", BLUE), "calibration_tempered": ("with temperature", ORANGE)}
    for key, (name, colour) in series.items():
        if key in probabilities:
            bins = probabilities[key]["bins"]
            sizes = [18 + 160 * row["samples"] / sum(row["samples"] for row in bins) for row in bins]
            points = [[row[axis] for row in bins] for axis in ("confidence", "accuracy")]
            axes.plot(*points, color=colour, linewidth=1, alpha=0.7)
            axes.scatter(*points, s=sizes, color=colour, label=name, clip_on=False)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    legend_below(figure)
    return figure


def draw_abstention(rows: list[dict]) -> Figure:
    figure, axes = make_axes(5, 4.4, "Accuracy of the most confident answers")
    points = [100 * row["coverage"] for row in rows], [row["accuracy"] for row in rows]
    axes.plot(*points, "o-", color=GREEN, clip_on=False)
    axes.set(xlabel="coverage: share of answers, most confident first, %", ylabel="accuracy", ylim=(0, 1.02))
    axes.grid(color=GRID)
    return figure
