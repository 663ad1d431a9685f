"""Bars for each peer in front of each head, and lines of memory that grows, in colours that all can tell apart."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

from orpo.report.curves import COLOURS

from .cases import HEADS

# Ours in one colour in every picture; greys tell apart what the palette is too short for.
PEER_COLOURS = {
    "ours": COLOURS[0],
    "ours (strips)": COLOURS[4],
    "trl": COLOURS[1],
    "trl chunked": COLOURS[5],
    "liger": COLOURS[2],
    "liger compiled": "#004D33",
    "cce": COLOURS[3],
    "torch linear_cross_entropy": "#666666",
    "torch linear_cross_entropy (chunked)": "#333333",
    "torch eager": "#999999",
    "torch compiled": "#CCCCCC",
}


# For readers who do not know the suite's own names.
LABELS = {
    "ours": "fused-orpo",
    "ours (strips)": "fused-orpo, logits_budget 0",
    "trl": "TRL",
    "liger compiled": "Liger, compiled",
    "cce": "CCE, compiled",
}


def fingerprint(records: list[dict]) -> str:
    """Of the figures that a picture shows: stands in the picture's file, so that a test sees whether it is current."""
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def bars(
    panels: dict[str, list[dict]],
    path: Path,
    value: Callable[[dict], float | None],
    ylabel: str,
    caption: str,
    yscale: str = "linear",
) -> bool:
    """One panel for each entry, with a bar for every peer that has a `value`. Returns whether anyone had one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    everything = [r for records in panels.values() for r in records]
    shown = [r for r in everything if value(r) is not None]
    if not shown:
        return False
    found = {r["head"] for r in shown}
    names = [*(h for h in HEADS if h in found), *sorted(found - set(HEADS))]
    peers = [p for p in PEER_COLOURS if any(r["peer"] == p for r in shown)]
    width = 0.84 / len(peers)
    figure, axes = plt.subplots(len(panels), 1, figsize=(10, 3.4 * len(panels)), squeeze=False)
    for axis, (title, records) in zip(axes[:, 0], panels.items(), strict=True):
        for i, peer in enumerate(peers):
            rows = [r for r in records if r["peer"] == peer and value(r) is not None]
            x = [names.index(r["head"]) + (i - (len(peers) - 1) / 2) * width for r in rows]
            axis.bar(x, [value(r) for r in rows], width, color=PEER_COLOURS[peer], label=peer)
        for x, name in enumerate(names):
            mine = [r for r in records if r["head"] == name]
            if all(value(r) is None for r in mine):
                # A gap would look like a measurement that is missing.
                why = {r["status"].split(":")[0] for r in mine if r["peer"] == "trl"} - {"measured"}
                axis.text(x, 0.1, f"TRL: {why.pop()}" if why else "not measured", rotation=90, ha="center", fontsize=8)
        axis.set(title=title, ylabel=ylabel, yscale=yscale, xticks=range(len(names)))
        axis.set_xticklabels(names, fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    handles = {label: h for a in axes[:, 0] for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), ncols=4, fontsize=8, loc="upper center", frameon=False)
    axes[-1, 0].set_xlabel(textwrap.fill(caption, 150), fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / figure.get_figheight()))
    figure.savefig(path, dpi=110, metadata={"Description": fingerprint(everything)})
    plt.close(figure)
    return True


def growth(panels: dict[str, tuple[str, list[dict]]], path: Path, caption: str) -> None:
    """Memory of each peer over one size, a panel each.

    Args:
        panels: title -> the size on the axis, a field of the records, and the records, one size changed in each.
        path: where the picture goes.
        caption: what is measured, and where.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, StrMethodFormatter

    everything = [r for _, records in panels.values() for r in records]
    peers = [p for p in PEER_COLOURS if any(r["peer"] == p for r in everything)]
    figure = Figure(figsize=(9, 3.9))
    FigureCanvasAgg(figure)
    for axis, (title, (size, records)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for peer in peers:
            points = sorted((r[size], r["peak_bytes"] / 2**20) for r in records if r["peer"] == peer)
            # Others dashed on top of ours: CCE's line is the same as ours where one block holds all rows.
            look = {"linewidth": 2.6} if peer.startswith("ours") else {"linewidth": 1.5, "linestyle": "--", "zorder": 3}
            axis.plot(
                *zip(*points, strict=True), color=PEER_COLOURS[peer], label=peer, marker="o", markersize=4, **look
            )
        sizes = sorted({r[size] for r in records})
        # Doubled each time, the second tick would stand on the first one's number.
        axis.xaxis.set_major_locator(FixedLocator(sizes[:1] + sizes[2:]))
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_ylabel("MiB")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    names = [LABELS.get(peer, peer) for peer in handles]
    figure.legend(handles.values(), names, ncols=len(peers), fontsize=9, loc="upper center", frameon=False)
    figure.supxlabel(textwrap.fill(caption, 150), fontsize=8)
    figure.tight_layout(rect=(0, 0.01, 1, 0.93))
    figure.savefig(path, dpi=110, metadata={"Description": fingerprint(everything)})
