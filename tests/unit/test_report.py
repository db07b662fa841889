"""Curves from a run's numbers."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import TrainerState

from common.plots import plot_training, smooth
from training import callbacks
from training.callbacks import CurvesCallback, write_metrics


def test_smooth_starts_at_the_first_value_and_keeps_a_constant():
    assert smooth([]) == []
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    # weight 1/2: 1/2 * 1/2 * 1 + 1/2 * 2 = 1.25, over 1 - 1/4
    assert smooth([1.0, 2.0]) == pytest.approx([1.0, 1.25 / 0.75])
    # 100 values: a window of 5, so the last step of a jump has moved by a fifth
    assert smooth([0.0] * 99 + [1.0])[-1] == pytest.approx(0.2, rel=1e-6)


def test_on_a_logarithmic_axis_the_smoothed_curve_keeps_near_a_loss_that_falls():
    # weight 1/2, of logarithms 0 and 2: 1/2 * 2 over 3/4
    assert smooth([1.0, 100.0], logarithmic=True) == pytest.approx([1.0, 10 ** (4 / 3)])
    falling = [10.0**-n for n in range(12)]
    assert all(mean < 10.001 * loss for mean, loss in zip(smooth(falling, logarithmic=True), falling, strict=True))
    assert smooth(falling)[-1] > 100 * falling[-1]


def test_plot_training_draws_each_curve(tmp_path):
    rows = [{"step": s, "loss": 1 / s, "learning_rate": s * 1e-5} for s in range(1, 20)]
    path = tmp_path / "training_metrics.png"
    plot_training(rows, path)
    without = Image.open(path).convert("RGB")
    plot_training([*rows, {"step": 10, "eval_loss": 0.3}], path)
    with_validation = Image.open(path).convert("RGB")
    orange = (0xD5, 0x5E, 0x00)

    def count(image):
        return sum(pixels for pixels, colour in image.getcolors(1 << 24) if colour == orange)

    assert count(without) == 0
    assert count(with_validation) > 10
    assert [file.name for file in tmp_path.iterdir()] == ["training_metrics.png"]


def test_plot_training_accepts_an_empty_log(tmp_path):
    plot_training([], tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (960, 840)


def test_write_metrics_replaces_the_file_atomically(tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0}]
    write_metrics(rows[:1], tmp_path / "metrics.jsonl")
    write_metrics(rows, tmp_path / "metrics.jsonl")
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows
    assert len(list(tmp_path.iterdir())) == 1


def test_curves_are_drawn_at_saves_ten_seconds_apart_and_at_the_end(tmp_path, monkeypatch):
    clock, drawn = [1.0], []
    monkeypatch.setattr(callbacks, "monotonic", lambda: clock[0])
    monkeypatch.setattr(callbacks, "plot_training", lambda log_history, path: drawn.append((clock[0], path.name)))
    curves, state = CurvesCallback(), TrainerState(is_world_process_zero=True)
    args = SimpleNamespace(output_dir=str(tmp_path))
    curves.on_train_begin(args, state, None)
    for clock[0] in (10.9, 11.0, 20.9, 21.5, 22.0):
        curves.on_save(args, state, None)
    curves.on_train_end(args, state, None)
    assert drawn == [(second, "training_metrics.png") for second in (11.0, 21.5, 22.0)]


def test_a_failed_write_of_the_curves_is_a_warning(tmp_path, capsys):
    state = TrainerState(log_history=[{"step": 1, "loss": 2.0}], is_world_process_zero=True)
    args = SimpleNamespace(output_dir=str(tmp_path / "gone"))
    CurvesCallback().on_log(args, state, None)
    CurvesCallback().on_train_end(args, state, None)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line] == [
        f"warning: {name} was not written: No such file or directory; training continues"
        for name in ("metrics.jsonl", "training_metrics.png")
    ]
