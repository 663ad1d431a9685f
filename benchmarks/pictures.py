"""Bars for each peer in front of each head, in colours that readers with any colour vision can tell apart."""

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
