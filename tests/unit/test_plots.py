"""Texts of a figure have a font that has their characters, or a number with a legend; labels of ticks lie apart."""

import warnings
from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from common import plots
from common.html import encode_figure
from common.plots import find_fonts
from evaluation.report import draw_confusion, draw_subgroups

SAMPLES = ["меланома", "ميلانوما", "ürtiker", "šupinka"]


def confusion(labels):
    counts = [[2, *[0] * (len(labels) - 1), 1, 0] for _ in labels]
    return draw_confusion({"rows": labels, "columns": [*labels, "(none)", "(several)"], "counts": counts})


@pytest.fixture
def only_the_default_font(monkeypatch):
    monkeypatch.setattr(
        plots, "_installed_fonts", lambda: [("DejaVu Sans", plots.font_manager.findfont("DejaVu Sans"))]
    )
    find_fonts.cache_clear()
    yield
    find_fonts.cache_clear()


@pytest.mark.parametrize("label", SAMPLES)
def test_a_script_of_an_installed_font_is_drawn(label):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Glyph ... missing from font(s)"
        assert encode_figure(confusion([label, "acne"]), "x")["legend"] == ""


@pytest.mark.parametrize("labels", [["黑色素瘤", "痣"], ["มะเร็ง", "ग्रंथि"], ["흑색종", "점"]])
def test_a_script_without_a_font_gets_numbers_and_a_legend(labels, only_the_default_font):
    figure = confusion([*labels, "acne"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        legend = encode_figure(figure, "x")["legend"]
    assert legend == f"[1] {labels[0]}; [2] {labels[1]}" or legend == f"[1] {labels[1]}; [2] {labels[0]}"
    [axes] = figure.axes
    numbered = dict(entry.split(" ") for entry in legend.split("; "))
    shown = [numbered.get(item.get_text(), item.get_text()) for item in axes.get_yticklabels()]
    assert shown == [*labels, "acne"]


def test_subgroups_get_numbers_too(only_the_default_font):
    groups = {"头皮": {"samples": 3, "suppressed": True}, "hand": {"samples": 3, "suppressed": True}}
    summary = {"cluster_unit": "samples", "subgroups": {"site": {"groups": groups}}}
    assert encode_figure(draw_subgroups(summary, 0.5), "x")["legend"] == "[1] 头皮  (3)"


@pytest.mark.parametrize("ratio", [21, 50, 150, 299, 301, 3e3, 1e6])
@pytest.mark.parametrize("least", [1e-3, 0.07, 0.4, 2, 30])
def test_labels_of_a_low_logarithmic_axis_are_two_or_more_and_lie_apart(least, ratio):
    figure = Figure(figsize=(6.4, 5.6), dpi=150, layout="constrained")
    axes = figure.subplots(3, 1, height_ratios=(3, 1, 1))[1]
    values = [least, least * ratio]
    axes.plot(values)
    plots._set_scale(axes, values)
    figure.draw_without_rendering()
    bottom, top = axes.get_ylim()
    labels = [*axes.yaxis.get_majorticklabels(), *axes.yaxis.get_minorticklabels()]
    shown = [label for label in labels if label.get_text() and bottom <= label.get_position()[1] <= top]
    boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.y0)
    assert len(boxes) > 1
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))
