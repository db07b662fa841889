"""Plots of a run's metrics."""

import io
import math
from functools import cache
from pathlib import Path

from matplotlib import font_manager, rcParams
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter

from common.files import atomic_write

# After Okabe and Ito's palette, which stays apart in every common form of colour blindness; darker where on white
# its contrast is under 3.
BLUE, ORANGE, GREEN, PURPLE, BROWN = "#0072B2", "#D55E00", "#009E73", "#A3487F", "#7A5A00"
GREY, GRID = "#8C8C8C", "#EEEEEE"
FEW_DECADES = 300  # ratio of the largest to the smallest value
DPI = 160  # for screens with two pixels to a point, and for print


def fit_fonts(figure: Figure) -> dict[str, str]:
    """Give each text of a figure a font that has its characters; write a number where no installed font has them.

    Returns:
        the text that each number stands for, as "[1]" -> "痣".
    """
    numbers = {}
    for item in figure.findobj(Text):
        if (text := item.get_text()).isascii():
            continue
        if fonts := find_fonts(frozenset("".join(text.split()))):
            item.set_fontfamily(fonts)
        else:
            item.set_text(numbers.setdefault(text, f"[{len(numbers) + 1}]"))
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        labels = [item.get_text() for item in axis.get_ticklabels()]  # formatted anew: as they were
        if set(labels) & set(numbers):
            axis.set_ticklabels([numbers.get(label, label) for label in labels])
    return {number: text for text, number in numbers.items()}


@cache
def find_fonts(characters: frozenset[str]) -> list[str] | None:
    """Return names of installed fonts that together have these characters, the default font first; None: some lack."""
    default = font_manager.findfont(font_manager.FontProperties(family=rcParams["font.family"]))
    families, missing = [*rcParams["font.family"]], {c for c in characters if ord(c) not in _coverage(default)}
    while missing:
        best = max(_installed_fonts(), key=lambda font: (sum(ord(c) in _coverage(font[1]) for c in missing), font[0]))
        found = {character for character in missing if ord(character) in _coverage(best[1])}
        if not found:
            return None
        families.append(best[0])
        missing -= found
    return families


@cache
def _installed_fonts() -> list[tuple[str, str]]:
    """Return name and file of each upright font of ordinary weight, but not the one that draws boxes for all."""
    entries = [font for font in font_manager.fontManager.ttflist if font.style == "normal" and font.weight == 400]
    return sorted({(font.name, font.fname) for font in entries if not font.name.startswith("Last Resort")})


@cache
def _coverage(file: str) -> frozenset[int]:
    return frozenset(FT2Font(file).get_charmap())


def smooth(values: list[float], *, logarithmic: bool = False) -> list[float]:
    """Return the exponential moving average of `values` over a twentieth of their number, corrected for its start.

    Args:
        values: in their order.
        logarithmic: average the logarithms, for a logarithmic axis: where values fall by powers of ten, their own
            average stays far above them.
    """
    if logarithmic:
        return [math.exp(value) for value in smooth([math.log(value) for value in values])]
    weight = 1 - 1 / max(2, len(values) / 20)
    average, result = 0.0, []
    for step, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**step))
    return result


def plot_training(log_history: list[dict], path: Path) -> None:
    """Draw loss, smoothed loss and validation loss, the gradient norm, and the learning rate by optimizer step.

    Args:
        log_history: the trainer's rows; those with `loss`, `grad_norm`, `learning_rate` and `eval_loss` are drawn. The
            first is the mean over answer tokens, the last the trainer's mean over validation batches of their means.
        path: PNG to write; replaced atomically, so that it is complete even if the run is killed.
    """
    figure = Figure(figsize=(6.4, 5.6), dpi=150, layout="constrained")
    losses, norms, rates = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    _draw_losses(losses, log_history)
    _draw_line(norms, log_history, "grad_norm", BROWN)
    norms.set_ylabel("gradient norm")
    _set_scale(norms, _series(log_history, "grad_norm")[1])
    _draw_line(rates, log_history, "learning_rate", GREEN)
    rates.set(xlabel="optimizer step", ylabel="learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    for axes in (losses, norms, rates):
        axes.grid(color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    legend_below(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())


def _draw_losses(axes, log_history: list[dict]) -> None:
    steps, training = _series(log_history, "loss")
    axes.plot(steps, training, color=GREY, label="training loss", marker="." if len(steps) < 3 else None)
    validations, validation = _series(log_history, "eval_loss")
    smoothed = smooth(training, logarithmic=_is_steep(training + validation))
    axes.plot(steps, smoothed, color=BLUE, linewidth=2, label="training loss, smoothed")
    if validations:
        axes.plot(validations, validation, color=ORANGE, marker="o", markersize=4, label="validation loss")
    axes.set(ylabel="loss per answer token", title="Training")
    _set_scale(axes, training + validation)


def _draw_line(axes, log_history: list[dict], key: str, colour: str) -> None:
    steps, values = _series(log_history, key)
    axes.plot(steps, values, color=colour, marker="." if len(steps) < 3 else None)


def _set_scale(axes, values: list[float]) -> None:
    """Let the axis be logarithmic for values of very different size, else start at 0."""
    if not _is_steep(values):
        axes.set_ylim(bottom=0)
        return
    axes.set(yscale="log")
    axes.yaxis.set_minor_formatter(NullFormatter())  # labels between the powers of ten lie over each other
    if max(values) < FEW_DECADES * min(values):  # of which an axis may show one power, or two
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")


def _is_steep(values: list[float]) -> bool:
    return bool(values) and max(values) > 20 * min(values) > 0


def legend_below(figure: Figure) -> None:
    """Put the legend of all axes under them, where it lies over nothing; one line alone needs none."""
    entries = [entry for axes in figure.axes for entry in zip(*axes.get_legend_handles_labels(), strict=True)]
    if len(entries) > 1:
        handles, labels = zip(*entries, strict=True)
        figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=min(4, len(entries)))


def _series(log_history: list[dict], key: str) -> tuple[list[int], list[float]]:
    rows = [(row["step"], row[key]) for row in log_history if key in row]
    return [step for step, _ in rows], [value for _, value in rows]
