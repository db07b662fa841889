"""One page about a prepared data set: counts, charts, token costs, findings with thumbnails, samples."""

import json
import random
from collections import Counter
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path

from datasets import DatasetDict
from matplotlib.figure import Figure

from common.html import encode_figure, encode_image, render_page, shorten
from common.plots import BLUE, BROWN, DPI, GREEN, GREY, ORANGE, PURPLE, legend_below
from data_prep.boxes import MIN_PIXELS
from data_prep.check import ERRORS, KINDS, WARNINGS, Finding, read_findings
from data_prep.folders import FINDINGS
from data_prep.images import Fit, load_image
from data_prep.sizes import PATCH_CELL, count_image_tokens, fit_size
from data_prep.storage import load_folder

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, BROWN, GREY)  # of splits
TOKEN_LIMITS = (256, 384, 512, 768, 1024, 1280)  # most tokens of an image, for each row of the table
MAX_FINDINGS = 8  # of one kind on the page
NUM_SAMPLES = 10  # on the page
NO_LABEL = "(no label)"
SPLIT_NOTES = {
    "train": "samples to learn from",
    "validation": "samples to watch the training by",
    "test": "samples for the evaluation alone",
}


def write_report(folder: Path, *, min_pixels: int = MIN_PIXELS, max_pixels: int | None = None) -> Path:
    """Write `report.html` and `report.json` into a prepared data set's folder and return the page's path.

    Args:
        folder: what `python -m data_prep convert` wrote.
        min_pixels: smallest area of an image in training, px^2; smaller ones are enlarged to it.
        max_pixels: image limit to show samples and costs at, px^2; the suggested one when None.

    Raises:
        ValueError: min_pixels > max_pixels.
    """
    splits = load_folder(folder)
    findings = read_findings(folder / FINDINGS)
    statistics = summarise(splits, findings, min_pixels, max_pixels)
    (folder / "report.json").write_text(json.dumps(statistics, indent=2, ensure_ascii=False), encoding="utf-8")
    page = _render(folder.resolve().name, splits, findings, statistics)
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def summarise(splits: DatasetDict, findings: list[Finding], min_pixels: int, max_pixels: int | None) -> dict:
    """Return the report's numbers: samples, images, labels by split, skin types, token costs, findings by kind."""
    labels = {name: dict(Counter(label or NO_LABEL for label in split["label"])) for name, split in splits.items()}
    sizes = [tuple(size) for split in splits.values() for sizes in split["image_sizes"] for size in sizes]
    limits = [tokens * PATCH_CELL**2 for tokens in TOKEN_LIMITS if tokens * PATCH_CELL**2 >= min_pixels]
    budget = [_budget(splits, sizes, min_pixels, limit) for limit in limits] if sizes else []
    suggested = next((row["max_pixels"] for row in budget if row["shrunk"] <= 5), TOKEN_LIMITS[-1] * PATCH_CELL**2)
    kinds = Counter(finding.kind for finding in findings)
    return {
        "samples": {name: len(split) for name, split in splits.items()},
        "images": len(sizes),
        "labels": labels,
        "skin_types": dict(Counter(kind or "unknown" for split in splits.values() for kind in split["skin_type"])),
        "budget": budget,
        "suggested_max_pixels": suggested,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels or suggested,
        "findings": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
    }


def _budget(splits: DatasetDict, sizes: list[tuple[int, int]], min_pixels: int, max_pixels: int) -> dict:
    """Return the effect of a limit: mean tokens an image, share of images shrunk (%), longest sample (tokens)."""

    cost = {size: _tokens(splits, size, min_pixels, max_pixels) for size in set(sizes)}
    longest = 0
    for split in splits.values():
        for messages, image_sizes in zip(split["messages"], split["image_sizes"], strict=True):
            text = sum(len(message["content"]) // 3 + 8 for message in messages) + 16
            longest = max(longest, text + sum(cost[tuple(size)] + 2 for size in image_sizes))
    return {
        "max_pixels": max_pixels,
        "most": max_pixels // PATCH_CELL**2,
        "mean": sum(cost[size] for size in sizes) / len(sizes),
        "shrunk": 100 * sum(width * height > max_pixels for width, height in sizes) / len(sizes),
        "max_length": -(-longest // 64) * 64,
    }


def _tokens(splits: DatasetDict, size: tuple[int, int], min_pixels: int, max_pixels: int) -> int:
    """Return the tokens of an image; ValueError, with the first such sample, for one that is too narrow for limits."""
    width, height = size
    try:
        return count_image_tokens(height, width, min_pixels=min_pixels, max_pixels=max_pixels)
    except ValueError as error:
        rows = (row for split in splits.values() for row in split.select_columns(["id", "image_sizes"]))
        sample = next(row["id"] for row in rows if [width, height] in row["image_sizes"])
        raise ValueError(f"sample {sample!r}: {error}") from error


def _render(name: str, splits: DatasetDict, findings: list[Finding], statistics: dict) -> str:
    fit = partial(fit_size, min_pixels=statistics["min_pixels"], max_pixels=statistics["max_pixels"])
    positions = {sample_id: (split, row) for split in splits for row, sample_id in enumerate(splits[split]["id"])}
    return render_page(
        "data_report.html",
        name=name,
        cards=_cards(statistics),
        splits=list(splits),
        labels=_label_rows(statistics),
        charts=_charts(splits, statistics),
        budget=[{**row, "chosen": row["max_pixels"] == statistics["max_pixels"]} for row in statistics["budget"]],
        advice=_advice(statistics),
        findings=_finding_groups(findings, splits, positions, fit),
        samples=_samples(splits, positions, fit),
        max_pixels=statistics["max_pixels"],
    )


def _cards(statistics: dict) -> list[dict]:
    counts = statistics["findings"]
    errors = sum(count for kind, count in counts.items() if kind in ERRORS)
    warnings = sum(count for kind, count in counts.items() if kind in WARNINGS)
    labels = {label for split in statistics["labels"].values() for label in split} - {NO_LABEL}
    numbers = [(name, count, SPLIT_NOTES.get(name, "samples"), "") for name, count in statistics["samples"].items()]
    numbers += [("images", statistics["images"], "in all splits", "")]
    numbers += [("labels", len(labels), "different ones", "")]
    numbers += [("errors", errors, "records left out, each under Findings", "bad" if errors else "")]
    numbers += [("warnings", warnings, "samples to look at, under Findings", "look" if warnings else "")]
    return [{"name": name, "value": f"{value:,}", "note": note, "tone": tone} for name, value, note, tone in numbers]


def _label_rows(statistics: dict) -> list[dict]:
    splits = statistics["labels"].values()
    totals = sum(map(Counter, splits), Counter())
    total = max(1, totals.total())
    return [
        {"label": label, "counts": [split.get(label, 0) for split in splits], "share": 100 * count / total}
        for label, count in totals.most_common()
    ]


def _advice(statistics: dict) -> str:
    row = next((row for row in statistics["budget"] if row["max_pixels"] == statistics["suggested_max_pixels"]), None)
    if row is None:
        return ""
    settings = f"max_pixels: {row['max_pixels']} with max_length: {row['max_length']}"
    return f"Suggested: {settings}, which shrinks {row['shrunk']:.1f} % of the images."


def _charts(splits: DatasetDict, statistics: dict) -> list[dict]:
    charts = [_label_chart(statistics)]
    if set(statistics["skin_types"]) != {"unknown"}:
        note = "Samples of each Fitzpatrick type, all splits: results for rare ones are uncertain."
        charts.append(_bar_chart(statistics["skin_types"], "Skin types", "samples", note))
    sizes = [size for split in splits.values() for image_sizes in split["image_sizes"] for size in image_sizes]
    if sizes:
        limits = {name: statistics[name] for name in ("min_pixels", "max_pixels")}
        tokens = [_tokens(splits, size, **limits) for size in sizes]
        longer, title = [max(size) for size in sizes], f"Tokens an image, max_pixels {statistics['max_pixels']:,}"
        note = "Longer sides of the images as they are in the data; training shrinks those over max_pixels."
        charts.append(_histogram(longer, "Image sizes", "images", "longer side, px", note))
        note = "What an image costs in training: memory and time grow with it."
        charts.append(_histogram(tokens, title, "images", "tokens", note))
    answers = [
        len(message["content"])
        for split in splits.values()
        for messages in split["messages"]
        for message in messages
        if message["role"] == "assistant"
    ]
    note = "Lengths of the answers to learn: a few very long ones may be mistakes in the records."
    charts.append(_histogram(answers, "Answer lengths", "answers", "characters", note))
    return charts


def _figure(title: str, rows: int = 8):
    figure = Figure(figsize=(6, max(3.2, 0.3 * rows + 1)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=12, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _label_chart(statistics: dict) -> dict:
    """Draw each split's share of each label, the twenty most frequent ones."""
    rows = _label_rows(statistics)[:20][::-1]
    figure, axes = _figure("Label shares by split", len(rows) * 1.4)
    height = 0.8 / len(statistics["samples"])
    for number, (split, count) in enumerate(statistics["samples"].items()):
        shares = [100 * row["counts"][number] / max(1, count) for row in rows]
        places = [index + (len(statistics["samples"]) / 2 - number - 0.5) * height for index in range(len(rows))]
        axes.barh(places, shares, height=height * 0.92, color=COLOURS[number % len(COLOURS)], label=split)
    axes.set_yticks(range(len(rows)), [shorten(row["label"]) for row in rows])
    axes.set_xlabel("% of the split")
    legend_below(figure)
    note = "Share of each split's samples; bars of one label should be about equally long."
    return encode_figure(figure, "Label shares by split", note)


def _bar_chart(counts: dict, title: str, unit: str, note: str) -> dict:
    figure, axes = _figure(title)
    names = sorted(counts, key=lambda name: (name == "unknown", name))
    axes.bar(range(len(names)), [counts[name] for name in names], color=BLUE, width=0.7)
    axes.set_xticks(range(len(names)), [shorten(name, 10) for name in names])
    axes.set_ylabel(unit)
    return encode_figure(figure, title, note)


def _histogram(values: list[int], title: str, counted: str, unit: str, note: str) -> dict:
    """Draw how frequent each value is, for parts.html; one value alone is a sentence.

    Args:
        values: to count.
        title: of the chart.
        counted: what has the values, as "images".
        unit: of the values, as "longer side, px".
        note: how to read the chart.
    """
    different = set(values)
    if len(different) == 1:
        return {
            "alt": title,
            "note": f"All {len(values):,} {counted} have the same value: {values[0]:,} ({unit}). {note}",
        }
    figure, axes = _figure(title)
    axes.hist(values, bins=min(40, max(5, len(different))), color=BLUE, rwidth=0.92)
    axes.set(xlabel=unit, ylabel=counted)
    return encode_figure(figure, title, note)


def _finding_groups(findings: list[Finding], splits: DatasetDict, positions: dict, fit: Fit) -> list[dict]:
    @cache
    def thumbnail(sample_id: str | None, image: int) -> str | None:
        split, row = positions.get(sample_id, (None, None))
        images = splits[split][row]["images"] if split else []
        return _picture(sample_id, images[image], fit, 144) if images else None

    groups = []
    for kind, title in KINDS.items():
        matches = [finding for finding in findings if finding.kind == kind]
        if not matches:
            continue
        shown = [
            {"text": str(finding), "thumbs": [shown for place in _places(finding)[:3] if (shown := thumbnail(*place))]}
            for finding in matches[:MAX_FINDINGS]
        ]
        tone = "bad" if kind in ERRORS else "look" if kind in WARNINGS else ""
        more = len(matches) - len(shown)
        groups.append({"title": title, "count": len(matches), "shown": shown, "more": more, "tone": tone})
    return groups


def _picture(sample_id: str, image: dict, fit: Fit, size: int) -> str:
    """Return a sample's image for the page, at most `size` px a side; ValueError, with the sample, if damaged."""
    try:
        return encode_image(load_image(image, fit=fit), size)
    except (ValueError, OSError) as error:
        where = f", {image['path']}" if image.get("path") else ""
        raise ValueError(f"sample {sample_id!r}{where}: {error}; prepare the data set again") from error


def _places(finding: Finding) -> list[tuple[str | None, int]]:
    """Return the samples that a finding names, each with the position of the image concerned."""
    return list(zip_longest((finding.sample_id, *finding.others), finding.images, fillvalue=0))


def _samples(splits: DatasetDict, positions: dict, fit: Fit) -> list[dict]:
    """Return random samples, the same ones every time, with their images at the size of training."""
    chosen = random.Random(0).sample(sorted(positions), min(NUM_SAMPLES, len(positions)))
    samples = []
    for sample_id in chosen:
        split, row = positions[sample_id]
        sample = splits[split][row]
        images = [_picture(sample_id, image, fit, 520) for image in sample["images"]]
        samples.append({"id": f"{sample_id}, {split}", "images": images, "turns": sample["messages"]})
    return samples
