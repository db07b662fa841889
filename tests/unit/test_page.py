"""Pages and plots: nothing runs but the page's own script, text is readable, legends lie beside what they explain."""

import base64
import hashlib
import io
import re
from itertools import pairwise

import pytest
from matplotlib import colormaps
from PIL import Image

from common import plots
from common.html import TEMPLATES, encode_figure, render_page
from data_prep.report import _histogram, _label_chart
from evaluation.page_examples import MAX_EXAMPLES, example_filters, spaced
from evaluation.report import CHART_NOTES, DARK_SHARE, draw_reliability

STYLE = (TEMPLATES / "page.css").read_text()
PRINT = STYLE[STYLE.index("@media print") :]


def luminance(colour):
    """Relative luminance of a colour, as WCAG 2 defines it; `colour` as "#rrggbb" or channels from 0 to 1."""
    if isinstance(colour, str):
        colour = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first, second):
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def palette(style):
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", style))


def test_contrast_is_that_of_the_standard():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("colours", [palette(STYLE), palette(STYLE) | palette(PRINT)], ids=["screen", "print"])
def test_text_has_the_contrast_of_level_aa(colours):
    papers = [colours[name] for name in ("page", "card", "user", "right", "wrong", "chosen")]
    for ink in ("ink", "soft"):
        assert min(contrast(colours[ink], paper) for paper in papers) >= 4.5
    for ink in ("bad", "look", "accent"):
        assert contrast(colours[ink], colours["card"]) >= 4.5
    for tag in ("soft", "bad", "look"):
        assert contrast("#ffffff", colours[tag]) >= 4.5


def test_paper_stays_white():
    printed = palette(STYLE) | palette(PRINT)
    assert {printed[name] for name in ("page", "card", "user", "right", "wrong", "chosen")} == {"#ffffff"}


@pytest.mark.parametrize("name", ["BLUE", "ORANGE", "GREEN", "PURPLE", "BROWN", "GREY"])
def test_lines_and_bars_stand_out_from_white(name):
    assert contrast(getattr(plots, name), "#ffffff") >= 3


def test_digits_of_the_confusion_matrix_are_readable_on_every_blue():
    for percent in range(101):
        share = percent / 100
        digits = "#ffffff" if share > DARK_SHARE else "#000000"
        assert contrast(colormaps["Blues"](share / 1.15), digits) >= 4.5


def overlaps(figure):
    """The axes that the figure's legend lies over."""
    figure.savefig(io.BytesIO(), format="png")
    [legend] = figure.legends
    return [axes for axes in figure.axes if axes.get_window_extent().overlaps(legend.get_window_extent())]


def test_legends_lie_over_nothing(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr("data_prep.report.encode_figure", lambda figure, *_: drawn.append(figure))
    counts = {"train": 80, "validation": 10, "test": 10}
    _label_chart({"samples": counts, "labels": {split: {"a": n // 2, "b": n // 2} for split, n in counts.items()}})
    bins = [{"samples": 5, "confidence": x, "accuracy": x} for x in (0.2, 0.9, 1.0)]
    drawn.append(draw_reliability({"calibration": {"bins": bins}, "calibration_tempered": {"bins": bins}}))
    monkeypatch.setattr(plots, "atomic_write", lambda *_: None)
    legend_below = plots.legend_below
    monkeypatch.setattr(plots, "legend_below", lambda figure: (legend_below(figure), drawn.append(figure)))
    plots.plot_training(
        [{"step": s, "loss": 1.0, "grad_norm": 2.0, "learning_rate": 1e-4} for s in range(9)], tmp_path
    )
    assert len(drawn) == 3
    assert [overlaps(figure) for figure in drawn] == [[], [], []]


def test_one_line_has_no_legend():
    figure = draw_reliability({"calibration": {"bins": [{"samples": 5, "confidence": 0.5, "accuracy": 0.5}]}})
    assert figure.legends == []


def test_the_training_curves_include_the_gradient_norm(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "legend_below", figures.append)
    rows = [{"step": s, "loss": 1.0, "grad_norm": 3.0 + s, "learning_rate": 1e-4} for s in range(4)]
    plots.plot_training(rows, tmp_path / "curves.png")
    axes = {axes.get_ylabel(): axes for axes in figures[0].axes}
    assert list(axes) == ["loss per answer token", "gradient norm", "learning rate"]
    assert axes["gradient norm"].lines[0].get_ydata().tolist() == [3.0, 4.0, 5.0, 6.0]


def test_a_histogram_of_one_value_is_a_sentence():
    chart = _histogram([112, 112, 112], "Image sizes", "images", "longer side, px", "Why.")
    assert chart == {"alt": "Image sizes", "note": "All 3 images have the same value: 112 (longer side, px). Why."}
    assert "png" in _histogram([112, 112, 113], "Image sizes", "images", "longer side, px", "Why.")


def render(tmp_path, monkeypatch, content, **values):
    (tmp_path / "x.html").write_text('{% extends "page.html" %}{% block content %}' + content + "{% endblock %}")
    for name in ("page.html", "parts.html", "page.css", "page.js"):
        (tmp_path / name).write_text((TEMPLATES / name).read_text())
    monkeypatch.setattr("common.html.TEMPLATES", tmp_path)
    return render_page("x.html", **values)


def test_the_policy_names_style_and_script_by_their_content(tmp_path, monkeypatch):
    page = render(tmp_path, monkeypatch, "<p>{{ label }}</p>", label="<script>alert(1)</script>")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page).group(1).replace("&#39;", "'")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for tag in ("style", "script"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert "<p>&lt;script&gt;" in page


def test_a_chart_has_its_explanation_beside_it(tmp_path, monkeypatch):
    figure = draw_reliability({"calibration": {"bins": [{"samples": 5, "confidence": 0.5, "accuracy": 0.5}]}})
    content = '{% from "parts.html" import figure %}{{ figure(chart) }}'
    page = render(tmp_path, monkeypatch, content, chart=encode_figure(figure, "Confidence", "Read it <so>."))
    [png] = re.findall(r'<img src="data:image/png;base64,([\w+/=]+)" alt="Confidence">', page)
    assert Image.open(io.BytesIO(base64.b64decode(png))).width == 5 * plots.DPI
    assert "<figcaption>Read it &lt;so&gt;.</figcaption>" in page


def test_every_chart_of_the_evaluation_has_an_explanation():
    assert set(CHART_NOTES) == {"confusion", "subgroups", "reliability", "abstention"}
    assert all(note.endswith(".") for note in CHART_NOTES.values())


def test_templates_have_no_inline_style_and_no_address():
    for path in TEMPLATES.glob("*.html"):
        text = path.read_text()
        assert " style=" not in text and "http:" not in text and "https:" not in text, path.name


def test_examples_are_spaced_evenly():
    assert spaced(list(range(8)), MAX_EXAMPLES) == list(range(8))
    chosen = spaced(list(range(50)), MAX_EXAMPLES)
    assert len(chosen) <= MAX_EXAMPLES and {b - a for a, b in pairwise(chosen)} == {7}


def test_examples_are_filtered_by_what_differs():
    rows = [{"label": label, "skin": "unknown"} for label in ("nevus", "acne", "unknown")]
    assert example_filters([{"rows": rows[:2]}, {"rows": rows[2:]}]) == [
        {"name": "label", "title": "label", "options": ["acne", "nevus", "unknown"]}
    ]
