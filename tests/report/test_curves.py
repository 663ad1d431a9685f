"""orpo/report/curves.py: which values are drawn, how runs are told apart, and the same numbers as CSV."""

import csv
import math
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from orpo.report.curves import COLOURS, curve, plot_curves, write_curves_csv

METRICS = ("logps/chosen", "logps/rejected", "log_odds_chosen", "log_odds_ratio", "nll_loss")


def history(offset: float = 0.0, evaluated: bool = True) -> list[dict]:
    entries = []
    for step in (5, 10, 15):
        entries.append({"loss": 1.0, "step": step, "epoch": 0.1, **{m: offset - 0.01 * step for m in METRICS}})
        if evaluated and step != 5:
            entries.append({"step": step, "epoch": 0.1, **{f"eval_{m}": offset - 0.02 * step for m in METRICS}})
    return [*entries, {"step": 15, "train_runtime": 3.0}]


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that were saved, to look at their lines."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1])
    return saved


def test_curve_takes_the_later_of_two_values_at_a_step():
    entries = [
        {"step": 10, "a": 1.0},
        {"a": 9.0},
        {"step": 20, "a": "text"},
        {"step": 10, "a": 2},
        {"step": 30, "a": 3},
    ]
    assert curve(entries, "a") == ([10, 30], [2.0, 3.0])
    assert curve(entries, "b") == ([], [])


def test_nan_is_kept_so_that_a_broken_run_shows():
    assert math.isnan(curve([{"step": 1, "a": math.nan}], "a")[1][0])


def test_the_picture_is_not_empty(tmp_path):
    path = plot_curves({"one": history()}, tmp_path / "curves.png")
    assert path == tmp_path / "curves.png"
    pixels = imread(path)
    assert pixels.shape[0] > 700 and pixels.shape[1] > 1000
    blue = np.array(to_rgb(COLOURS[0]))
    assert (np.abs(pixels[..., :3] - blue).max(-1) < 0.02).sum() > 200


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_the_suffix_chooses_the_format(suffix, tmp_path):
    start = plot_curves({"one": history()}, tmp_path / f"curves.{suffix}").read_bytes()[:200]
    assert (b"%PDF" if suffix == "pdf" else b"<?xml") in start


def test_each_panel_draws_its_metric(figures, tmp_path):
    plot_curves({"a": history(), "b": history(1.0)}, tmp_path / "curves.png", title="two runs")
    (figure,) = figures
    panels = figure.axes
    assert len(panels) == 4
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_title(loc="left") for axes in panels)
    assert [len(axes.lines) for axes in panels] == [8, 4, 4, 4]  # training and held-out of each metric and run
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert labels == ["a chosen", "a rejected", "b chosen", "b rejected"]
    # The log holds log sigmoid(r) <= 0; the loss term is its negative.
    held_out = [line for line in panels[3].lines if line.get_label() == "b"]
    np.testing.assert_allclose(held_out[0].get_ydata(), [-(1 - 0.2), -(1 - 0.3)])


def test_runs_differ_in_colour_and_answers_in_dashes(figures, tmp_path):
    third = {f"eval_{m}": 0.0 for m in METRICS} | {"step": 20}
    plot_curves({"a": [*history(), third], "b": [*history(), third]}, tmp_path / "curves.png")
    lines = {line.get_label(): line for line in figures[0].axes[0].lines}
    assert lines["a chosen"].get_color() == lines["a rejected"].get_color() != lines["b chosen"].get_color()
    assert lines["a chosen"].get_linestyle() != lines["a rejected"].get_linestyle()
    assert lines["a chosen"].get_marker() != lines["a rejected"].get_marker()


def test_orpo_has_one_colour_whatever_stands_before_it(figures, tmp_path):
    for runs in (["ORPO"], ["plain fine-tuning", "ORPO, beta 1"]):
        plot_curves({run: history() for run in runs}, tmp_path / "curves.png")
    alone, beside = ({line.get_label(): line.get_color() for line in figure.axes[1].lines} for figure in figures)
    assert alone["ORPO"] == beside["ORPO, beta 1"] == COLOURS[0] != beside["plain fine-tuning"]


def test_a_run_without_evaluation_shows_its_training_curve_strong(figures, tmp_path):
    plot_curves({"a": history(evaluated=False)}, tmp_path / "curves.png")
    assert [line.get_alpha() for line in figures[0].axes[1].lines] == [1.0]
    assert figures[0].get_suptitle() == "training batches"


def entries(values):
    return [{"step": i + 1, "nll_loss": value} for i, value in enumerate(values)]


def test_few_points_are_marked_and_two_are_no_trend(figures, tmp_path):
    for values in ([2.0, 2.001], [2.0, 2.001, 2.002], [2.0 + i / 1000 for i in range(31)]):
        plot_curves({"a": entries(values)}, tmp_path / "curves.png")
    two, three, many = (figure.axes[2] for figure in figures)
    styles = [(axes.lines[0].get_linestyle(), axes.lines[0].get_marker()) for axes in (two, three, many)]
    assert styles == [("None", "o"), ("-", "o"), ("-", "")]
    low, high = two.get_ylim()
    # A tenth of the value, around both: half a thousandth is no slope to be seen.
    assert 0.19 < high - low < 0.22 and low < 2.0 < 2.001 < high
    assert all(tick == round(tick) for tick in two.get_xticks())
    low, high = three.get_ylim()
    assert high - low < 0.01


def test_neighbouring_colours_differ_in_brightness_for_any_colour_vision():
    """The first two, which the demonstration uses, are apart in lightness as well as in hue."""
    brightness = [np.dot(to_rgb(c), (0.2126, 0.7152, 0.0722)) for c in COLOURS[:2]]
    assert abs(brightness[0] - brightness[1]) > 0.03
    assert all(a != b for a, b in combinations(COLOURS, 2))


@pytest.mark.parametrize("histories", [{}, {"a": []}, {"a": [{"step": 1, "loss": 2.0}]}])
def test_nothing_to_draw_is_said_in_words(histories, tmp_path):
    with pytest.raises(ValueError, match=rf"log_histories has {len(histories)} run\(s\) and no value"):
        plot_curves(histories, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_csv_holds_every_logged_number(tmp_path):
    path = write_curves_csv({"a": history(), "b": history(1.0)}, tmp_path / "curves.csv")
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 2 * (3 + 2)
    assert list(rows[0])[:3] == ["run", "step", "split"]
    row = next(r for r in rows if (r["run"], r["step"], r["split"]) == ("b", "15", "eval"))
    assert float(row["logps/chosen"]) == 1.0 - 0.02 * 15
    assert row["loss"] == ""
    training = next(r for r in rows if (r["run"], r["step"], r["split"]) == ("b", "15", "train"))
    assert float(training["logps/chosen"]) == 1.0 - 0.01 * 15
    assert float(training["train_runtime"]) == 3.0


def test_importing_does_not_import_matplotlib():
    code = "import sys, orpo.report.curves; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_drawing_needs_no_display_and_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys; from orpo.report.curves import plot_curves; "
        f"plot_curves({{'a': [{{'step': 1, 'nll_loss': 1.0}}]}}, {str(tmp_path / 'curves.png')!r}); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={"MPLBACKEND": "tkagg"}).returncode == 0
