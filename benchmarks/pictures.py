"""Pictures of stored results, in colours that readers with any colour vision can tell apart."""

from __future__ import annotations

import hashlib
import json
import statistics
import textwrap
from pathlib import Path

from orpo.plots import COLOURS

from .cases import HEADS

# Ours in one colour in every picture; hatching tells apart what the palette is too short for.
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


def colour_of(peer: str) -> str:
    return PEER_COLOURS[peer]


def fingerprint(records: list[dict]) -> str:
    """Of the figures that a picture shows: stands in the picture's file, so that a test sees whether it is current."""
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def _figure():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: Path, records: list[dict]) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Description": fingerprint(records)})
    _figure().close(figure)


def _steps(records: list[dict]) -> list[dict]:
    """Forward and backward where TRL was timed beside it."""
    return [r for r in records if r["status"] == "measured" and r["kind"] == "step" and "ratio" in r]


def ratios_by_share(timed: list[dict]) -> dict[float, list[float]]:
    """Speeds relative to TRL, one for each head, at each share of prompt in percent."""
    ratios: dict[float, list[float]] = {}
    for r in sorted(timed, key=lambda r: r["prompt"] / r["positions"]):
        ratios.setdefault(100 * r["prompt"] / r["positions"], []).append(r["ratio"])
    return ratios


def at_every_share(timed: list[dict]) -> list[dict]:
    """The records of heads that have one at every share: a mean over others at each share would bend by the heads."""
    shares = {r["prompt"] / r["positions"] for r in timed}
    complete = {
        head
        for head in {r["head"] for r in timed}
        if {r["prompt"] / r["positions"] for r in timed if r["head"] == head} == shares
    }
    return [r for r in timed if r["head"] in complete]


def reason(records: list[dict], head: str, dtype: str) -> str:
    """Why nobody is compared with TRL in front of a head."""
    statuses = [
        r["status"]
        for r in records
        if (r["head"], r["dtype"], r["peer"], r["kind"]) == (head, dtype, "trl", "step") and r["status"] != "measured"
    ]
    return f"TRL: {statuses[0].split(':')[0]}" if statuses else "not measured"


def heads(records: list[dict], path: Path, caption: str) -> None:
    """Speed of every peer relative to TRL, forward and backward, in front of every head; one panel a dtype."""
    timed = _steps(records)
    names = [h for h in HEADS if any(r["head"] == h for r in timed)]
    dtypes = sorted({r["dtype"] for r in timed}, reverse=True)
    peers = [p for p in PEER_COLOURS if any(r["peer"] == p for r in timed)]
    figure, axes = _figure().subplots(len(dtypes), 1, figsize=(10, 3.4 * len(dtypes)), squeeze=False)
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        for i, peer in enumerate(peers):
            rows = [r for r in timed if r["dtype"] == dtype and r["peer"] == peer]
            x = [names.index(r["head"]) + (i - (len(peers) - 1) / 2) * 0.84 / len(peers) for r in rows]
            axis.bar(x, [r["ratio"] for r in rows], 0.84 / len(peers), color=colour_of(peer), label=peer)
        for x, name in enumerate(names):
            # A gap would look like a measurement that is missing.
            if not any(r["head"] == name and r["dtype"] == dtype for r in timed):
                axis.text(x, 0.1, reason(records, name, dtype), rotation=90, ha="center", va="bottom", fontsize=8)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=dtype, ylabel="times as fast as TRL", xticks=range(len(names)))
        axis.set_xticklabels(names, fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.32), frameon=False)
    axes[-1, 0].set_xlabel(textwrap.fill(caption, 150), fontsize=8)
    _save(figure, path, records)


def shares(records: list[dict], path: Path, caption: str) -> None:
    """Speed relative to TRL by the share of prompt: a dot for each head, a line through their geometric means.

    The line is of those heads that were measured at every share.
    """
    timed = _steps(records)
    dtypes = sorted({r["dtype"] for r in timed}, reverse=True)
    peers = [p for p in PEER_COLOURS if p != "trl" and any(r["peer"] == p for r in timed)]
    figure, axes = _figure().subplots(1, len(dtypes), figsize=(5.2 * len(dtypes), 4.2), squeeze=False, sharey=True)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for i, peer in enumerate(peers):
            mine = [r for r in timed if (r["dtype"], r["peer"]) == (dtype, peer)]
            if not mine:
                # Each dtype may be another machine's, with other peers.
                continue
            ratios = ratios_by_share(mine)
            # Side by side, or the dots of one peer would hide another's.
            aside = 1.2 * (i - (len(peers) - 1) / 2)
            means = [
                (share + aside, statistics.geometric_mean(values))
                for share, values in ratios_by_share(at_every_share(mine)).items()
            ]
            dots = [(share + aside, ratio) for share in ratios for ratio in ratios[share]]
            axis.plot(*zip(*means, strict=True), color=colour_of(peer), label=peer)
            axis.scatter(*zip(*dots, strict=True), 9, color=colour_of(peer))
        axis.axhline(1, color="black", linewidth=0.8)
        complete = {r["head"] for r in at_every_share([r for r in timed if r["dtype"] == dtype])}
        axis.set(
            title=f"{dtype}, lines over {len(complete)} heads",
            xlabel="prompt, % of a sequence",
            xticks=list(ratios_by_share(timed)),
        )
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("times as fast as TRL, forward and backward")
    axes[0, 0].legend(fontsize=8)
    # A single panel is narrower than the caption.
    figure.suptitle(textwrap.fill(caption, 80 * len(dtypes)), fontsize=8)
    _save(figure, path, records)


def growth(records: list[dict], path: Path, caption: str) -> None:
    """Time and memory against positions, vocabulary and prompt share; logarithmic but for the share."""
    timed = [r for r in records if r["status"] == "measured"]
    figure, axes = _figure().subplots(2, 3, figsize=(12, 7), sharex="col")
    for column, (label, _, rows) in enumerate(sweeps(timed)):
        for peer in [p for p in PEER_COLOURS if any(r["peer"] == p for r in rows)]:
            line = sorted((axis_value(r, label), r) for r in rows if r["peer"] == peer)
            for row, value in ((0, lambda r: r["median"]), (1, lambda r: r["peak_bytes"] / 2**20)):
                axes[row, column].plot(
                    [x for x, _ in line], [value(r) for _, r in line], marker="o", color=colour_of(peer), label=peer
                )
        for axis in axes[:, column]:
            axis.set(yscale="log", xscale="linear" if label == "prompt share" else "log")
            sizes = sorted({axis_value(r, label) for r in rows})
            # The labels of a logarithmic axis of its own would run into one another.
            axis.set_xticks(sizes, [f"{size:,g}" for size in sizes], minor=False)
            axis.xaxis.set_minor_locator(_figure().NullLocator())
            axis.grid(alpha=0.3, which="both")
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("forward and backward, s")
    axes[1, 0].set_ylabel("peak memory, MiB")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(caption, fontsize=8)
    _save(figure, path, records)


def axis_value(record: dict, label: str) -> float:
    """The size that a sweep changes."""
    share = record["prompt"] / record["positions"]
    return {"positions": record["positions"], "vocabulary": record["V"], "prompt share": share}[label]


def sweeps(records: list[dict]) -> list[tuple[str, str, list[dict]]]:
    """(what changes, its letter, the records in which nothing else does) of the group `growth`."""
    half = [r for r in records if 2 * r["prompt"] == r["positions"]]
    return [
        ("positions", "N", [r for r in half if r["V"] == 32768]),
        ("vocabulary", "V", [r for r in half if r["positions"] == 128]),
        ("prompt share", "share", [r for r in records if r["V"] == 32768 and r["positions"] == 128]),
    ]
