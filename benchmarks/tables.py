"""Stored records as the tables of RESULTS.md: who took how long, how much memory, how far from float64."""

from __future__ import annotations

import itertools
import math
import statistics

import torch

from . import pictures
from .cases import HEADS
from .gate import LIMITS

KINDS = {
    "step": "forward and backward",
    "evaluation": "evaluation",
    "frozen": "frozen head, forward and backward",
    "forward": "forward, with a graph",
}

OURS = ("ours", "ours (strips)")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def caption(records: list[dict]) -> str:
    """What the figures were measured on; more than one machine, version or commit is said."""
    commits: dict[str, set[str]] = {}
    for r in records:
        where = (
            f"{r['device']}, {r['threads']} threads, torch {r['torch']}, TRL {r['trl']}, Liger {r['liger-kernel']}, "
            f"CCE {r['cut-cross-entropy']}"
        )
        commits.setdefault(where, set()).add(r["commit"])
    return "; ".join(f"{where}, commit {' and '.join(sorted(commits[where]))}" for where in sorted(commits))


def caption_by_dtype(records: list[dict]) -> str:
    """`caption`; where dtypes were measured on different machines, that of each."""
    if len({r["device"] for r in records}) == 1:
        return caption(records)
    dtypes = sorted({r["dtype"] for r in records}, reverse=True)
    return "; ".join(f"{d} on {caption([r for r in records if r['dtype'] == d])}" for d in dtypes)


def beyond_limits(records: list[dict]) -> str:
    """Who was off by more than the gate allows, by how much, and has no time."""
    said = []
    for r in in_order([r for r in records if r["status"] == "wrong"]):
        of_loss, of_gradients = LIMITS[getattr(torch, r["dtype"])]
        batch = f"{r['head']}, {r['pairs']} x {r['positions']}, {r['dtype']}"
        for name, limit in (("loss", of_loss), ("dX", of_gradients), ("dW", of_gradients)):
            # Not "above": NaN is neither above nor below.
            if not (error := r.get(f"error_{name.lower()}", 0)) < limit:
                said.append(f"{r['peer']} ({batch}: {name} off by {error:.1e}, limit {limit:.0e})")
    named = "; ".join(dict.fromkeys(said))
    return f" Wrong, and without a time: {named}." if named else ""


def in_order(records: list[dict]) -> list[dict]:
    """The records by head, dtype, batch and what was timed; as stored, they are in the order of measurement."""
    heads, kinds, dtypes = list(HEADS), list(KINDS), ["float32", "bfloat16"]

    def place(r: dict) -> tuple:
        head = heads.index(r["head"]) if r["head"] in heads else len(heads)
        sizes = (r["V"], r["pairs"], r["positions"], r["prompt"])
        return (head, dtypes.index(r["dtype"]), *sizes, kinds.index(r["kind"]))

    return sorted(records, key=place)


def peers_of(records: list[dict]) -> list[str]:
    """Who was measured, ours first, in the order of the pictures."""
    return [peer for peer in pictures.PEER_COLOURS if any(r["peer"] == peer for r in records)]


def shape_of(record: dict) -> tuple[str, str, str, str]:
    """Head, batch, dtype and what was timed, in words."""
    r = record
    # No head's: one of the sizes that growth is measured over.
    head = r["head"] if r["head"] in HEADS else f"V {r['V']:,}, D {r['D']}"
    batch = f"{r['pairs']} x {r['positions']}, " + ("padded" if r["padded"] else f"{r['prompt']} prompt")
    return head, batch, r["dtype"], KINDS[r["kind"]]


def wide_table(records: list[dict]) -> str:
    """One line a case, one column for each peer: seconds and MiB, the least of either in bold."""
    one_kind = len({r["kind"] for r in records}) == 1
    cases: dict[tuple, dict[str, dict]] = {}
    for r in in_order(records):
        cases.setdefault(shape_of(r)[: 3 if one_kind else 4], {})[r["peer"]] = r
    names = peers_of(records)

    def cell(r: dict | None, right: list[dict]) -> str:
        if r is None:
            return ""
        if r["status"] != "measured":
            return r["status"].split(":")[0]
        parts = [
            text if r[name] > min(other[name] for other in right) else f"**{text}**"
            for name, text in (("median", f"{r['median']:.3g}"), ("peak_bytes", f"{r['peak_bytes'] / 2**20:,.0f}"))
        ]
        return f"{parts[0]} s, {parts[1]} MiB"

    rows = []
    for case, by_peer in cases.items():
        right = [r for r in by_peer.values() if r["status"] == "measured"]
        rows.append([*case, *(cell(by_peer.get(name), right) for name in names)])
    return table(["head", "batch", "dtype", *([] if one_kind else ["what"]), *names], rows)


def error_table(records: list[dict]) -> str:
    """The largest error of each peer over all cases of a dtype."""
    rows = []
    for peer in peers_of(records):
        for dtype in ("float32", "bfloat16"):
            mine = [r for r in records if (r["peer"], r["dtype"]) == (peer, dtype) and "error_dx" in r]
            if mine:
                worst = [f"{max(r[name] for r in mine):.0e}" for name in ("error_loss", "error_dx", "error_dw")]
                rows.append([peer, dtype, *worst])
    return table(["who", "dtype", "loss", "dX", "dW"], rows)


def loss_table(records: list[dict]) -> str:
    """Every peer of every case: time, spread, ratio, memory, errors."""
    rows = []
    for r in records:
        if r["status"] != "measured":
            rows.append([*shape_of(r), r["peer"], r["status"], *[""] * 4])
            continue
        errors = " / ".join(f"{r[name]:.0e}" for name in ("error_loss", "error_dx", "error_dw"))
        spread = f"{r['median']:.3g} s ({r['q20']:.3g} to {r['q80']:.3g})"
        ratio = f"{r['ratio']:.2f}" if "ratio" in r else ""
        rows.append([*shape_of(r), r["peer"], spread, ratio, f"{r['peak_bytes'] / 2**20:,.0f}", errors])
    header = ["head", "batch", "dtype", "what", "who", "median (20 to 80 %)", "times as fast as TRL", "MiB", "error"]
    return table(header, [row[: len(header)] for row in rows])


FIGURES = {"median": lambda r: f"{r['median']:.3g} s", "peak_bytes": lambda r: f"{r['peak_bytes'] / 2**20:,.0f} MiB"}


def measured_cases(records: list[dict]) -> list[list[dict]]:
    """The peers that were timed on the same case, on the same machine; one list for each case."""
    cases: dict[tuple, list[dict]] = {}
    for r in records:
        if r["status"] == "measured":
            names = ("group", "head", "pairs", "positions", "prompt", "padded", "V", "dtype", "kind", "device")
            cases.setdefault(tuple(r.get(name) for name in names), []).append(r)
    return list(cases.values())


def summary_table(records: list[dict], margin: float = 1.05) -> str:
    """How often each form of ours is the fastest and the smallest, both within `margin`, and how it stands to TRL."""
    found: dict[tuple[str, str, str], list[tuple[float, float, float, float]]] = {}
    for rows in measured_cases(records):
        peers = {r["peer"]: r for r in rows}
        others = [r for r in rows if r["peer"] not in OURS]
        for form in OURS:
            if form not in peers or not others:
                continue
            mine, trl = peers[form], peers.get("trl")
            beside = [mine[name] / min(r[name] for r in others) for name in ("median", "peak_bytes")]
            # TRL may be wrong there, and have no time.
            ratios = (trl["median"] / mine["median"], mine["peak_bytes"] / trl["peak_bytes"]) if trl else (None, None)
            found.setdefault((mine["kind"], mine["dtype"], form), []).append((*beside, *ratios))

    def spread(values: list[float | None], digits: int, scale: float = 1) -> str:
        values = [scale * value for value in values if value is not None]
        if not values:
            return ""
        return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    rows = []
    for kind, dtype, form in itertools.product(KINDS, ("float32", "bfloat16"), OURS):
        if cases := found.get((kind, dtype, form)):
            times, sizes, faster, share = zip(*cases, strict=True)
            fastest, smallest = (sum(value <= margin for value in values) for values in (times, sizes))
            of = len(cases)
            against_trl = spread(faster, 1), spread(share, 0, 100)
            rows.append([KINDS[kind], dtype, form, f"{fastest} of {of}", f"{smallest} of {of}", *against_trl])
    header = ["what", "dtype", "who", "fastest", "smallest", "times as fast as TRL", "% of TRL's memory"]
    return table(header, rows)


def losses(
    records: list[dict], margin: float = 1.05, figure: str = "median", forms: tuple[str, ...] = OURS
) -> list[str]:
    """One line for each case in which a peer's `figure` is below that of all `forms` of ours by more than `margin`."""
    lines = []
    for rows in measured_cases(records):
        ours, others = [r for r in rows if r["peer"] in forms], [r for r in rows if r["peer"] not in OURS]
        if not ours or not others:
            continue
        best, least = (min(part, key=lambda r: r[figure]) for part in (ours, others))
        if best[figure] > margin * least[figure]:
            lines.append(
                f"* {', '.join(shape_of(least))}: {least['peer']} {FIGURES[figure](least)}, "
                f"ours {FIGURES[figure](best)} ({least['device']})"
            )
    return lines


def losses_of_the_default(records: list[dict], figure: str = "median") -> list[str]:
    """The lines of `losses` for `ours` alone, of cases in which `ours (strips)` does not lose."""
    cases = [rows for rows in measured_cases(records) if not losses(rows, figure=figure)]
    return [line for rows in cases for line in losses(rows, figure=figure, forms=("ours",))]


def exponent(points: list[tuple[float, float]]) -> float:
    """b of y = a x^b, by least squares of the logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(v) / len(logs) for v in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def accuracy_table(records: list[dict]) -> str:
    """Each one's errors against float64 on the same input."""
    rows = [
        [
            f"{r['head']}, {r['data']}",
            r["dtype"],
            r["peer"],
            *(
                [f"{r[name]:.1e}" for name in ("error_loss", "error_logps", "error_dx", "error_dw")]
                if r["status"] == "measured"
                else [r["status"], "", "", ""]
            ),
        ]
        for r in records
    ]
    text = (
        "On the same rounded hidden states and weight, against float64: relative error of the loss, largest error of a "
        "mean log-probability in nats, relative errors (Euclidean norm) of both gradients."
    )
    return text + "\n\n" + table(["input", "dtype", "who", "loss", "mean log-probability", "dX", "dW"], rows)


def growth_table(records: list[dict]) -> str:
    """Exponents of time and memory by positions and by vocabulary."""
    rows = []
    for label, letter, part in pictures.sweeps([r for r in records if r["status"] == "measured"]):
        for peer in dict.fromkeys(r["peer"] for r in part) if letter in "NV" else ():
            mine = [r for r in part if r["peer"] == peer]
            if len({pictures.axis_value(r, label) for r in mine}) > 2:
                fits = [
                    exponent([(pictures.axis_value(r, label), r[y]) for r in mine]) for y in ("median", "peak_bytes")
                ]
                rows.append([label, peer, *(f"{b:.2f}" for b in fits)])
    return table(["size", "who", "time grows with power", "memory grows with power"], rows)


def long_table(records: list[dict]) -> str:
    """The longest sequence that each peer finished, and how it ended."""
    rows = []
    for peer in dict.fromkeys(r["peer"] for r in records):
        done = [r for r in records if r["peer"] == peer and r["status"] == "measured"]
        ended = [r for r in records if r["peer"] == peer and r["status"] != "measured"]
        longest = max(done, key=lambda r: r["positions"]) if done else None
        rows.append(
            [
                peer,
                f"{longest['positions']:,} in {longest['median']:.1f} s" if longest else "none",
                ", ".join(f"{r['positions']:,}: {r['status']}" for r in ended) or "not reached",
            ]
        )
    return table(["who", "longest pair, tokens a sequence", "ended at"], rows)


def held(record: dict) -> str:
    """GiB that a training process held: allocated on its GPU, or resident."""
    held_bytes = record.get("peak_bytes") or record.get("peak_resident_bytes")
    return f"{held_bytes / 2**30:.1f}" if held_bytes else ""


def training_table(records: list[dict]) -> str:
    """Time, pairs per second and memory of each trainer."""
    header = ["model", "data", "batch", "dtype", "what", "who", "rounds", "median (20 to 80 %)", "times as fast as TRL"]
    return table(
        [*header, "pairs/s", "held, GiB"],
        [
            [
                *(str(r[name]) for name in ("head", "data", "pairs", "dtype", "kind", "peer", "rounds")),
                f"{r['median']:.3g} s ({r['q20']:.3g} to {r['q80']:.3g})",
                f"{r['ratio']:.2f}",
                f"{r['pairs_per_second']:.2f}",
                held(r),
            ]
            for r in records
        ],
    )
