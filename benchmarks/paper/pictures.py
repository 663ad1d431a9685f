"""The pictures of the paper's figures, from stored results. Colours are Okabe and Ito's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo.report.curves import COLOURS

TITLES = {"sft": "plain fine-tuning", "dpo": "DPO, beta", "orpo": "ORPO, lambda", "probability_ratio": "probability ratio, lambda"}  # noqa: E501 # fmt: skip


def title_of(run: str) -> str:
    """'orpo:0.5' -> 'ORPO, lambda 0.5'."""
    method, _, beta = run.partition(":")
    return f"{TITLES[method]} {beta}".strip()


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Any, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_ratios(values: Mapping[str, Any], path: Path) -> Path:
    """Figure 6: both distributions over one axis."""
    figure = _figure(7, 3.6)
    axes = figure.subplots()
    # The odds ratio is ours, and ours has one colour in every picture.
    for i, (name, v) in zip((1, 0), values.items(), strict=True):
        axes.hist(
            v.numpy(), bins=120, range=(-10, 10), density=True, histtype="stepfilled", alpha=0.35, color=COLOURS[i]
        )
        axes.hist(v.numpy(), bins=120, range=(-10, 10), density=True, histtype="step", color=COLOURS[i], label=name)
    _tidy(axes, "nats, of two probabilities drawn uniformly from (0, 1)", "density")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    return path


def draw_curves(series: Mapping[str, list[dict]], runs: list[str], path: Path) -> Path | None:
    """Held-out log-probabilities of both answers over the steps: a row for each series, a panel for each run.

    Lines are means over seeds, bands their lowest and highest. None where no run is stored.
    """
    kept = {name: records for name, records in series.items() if any(r["run"] in runs for r in records)}
    if not kept:
        return None
    figure = _figure(3.2 * len(runs), 2.9 * len(kept))
    grid = figure.subplots(len(kept), len(runs), squeeze=False, sharey="row")
    for row, (name, records) in zip(grid, kept.items(), strict=True):
        for axes, run in zip(row, runs, strict=True):
            curves = [r["curve"] for r in records if r["run"] == run]
            for side, colour, style in (("chosen", COLOURS[1], "-"), ("rejected", COLOURS[0], "--")):
                if not curves:
                    axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")
                    break
                steps = [p["step"] for p in curves[0]]
                columns = list(zip(*([p[side] for p in c] for c in curves), strict=True))
                mean = [sum(c) / len(c) for c in columns]
                axes.plot(steps, mean, style, color=colour, marker="o", markersize=3, label=side)
                axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2)
            axes.set_title(f"{name}: {title_of(run)}", fontsize=9, loc="left")
            _tidy(axes, "step", "log-probability per token" if axes is row[0] else "")
    grid[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    return path
