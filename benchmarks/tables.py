"""Stored records as tables: who took how long, how much memory, how far from float64."""

from __future__ import annotations

import itertools
import math
import statistics

from .cases import HEADS
from .peers import BUDGET, PEERS

OURS = ("ours", "ours (strips)")
DTYPES = ("float32", "bfloat16")
KINDS = {
    "step": "forward and backward",
    "evaluation": "evaluation",
    "frozen": "frozen head, forward and backward",
    "forward": "forward, with a graph",
}
ERRORS = ("error_loss", "error_dx", "error_dw")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def caption(records: list[dict]) -> str:
    """Machine and versions; where dtypes were measured on different machines, those of each."""

    def where(part: list[dict]) -> str:
        triton = ", triton {triton}" * part[0]["group"].startswith("gpu")
        words = "{device}, {threads} threads, torch {torch}" + triton + ", TRL {trl}, Liger {liger-kernel}"
        return "; ".join(dict.fromkeys((words + ", CCE {cut-cross-entropy}").format(**r) for r in part))

    parts = {dtype: where([r for r in records if r["dtype"] == dtype]) for dtype in {r["dtype"]: 0 for r in records}}
    if len(set(parts.values())) == 1:
        return where(records)
    return "; ".join(f"{dtype} on {words}" for dtype, words in parts.items())


def in_order(records: list[dict]) -> list[dict]:
    """The records by head, dtype, batch and what was timed; as stored, they are in the order of measurement."""
    heads, kinds = list(HEADS), list(KINDS)

    def place(r: dict) -> tuple:
        head = heads.index(r["head"]) if r["head"] in heads else len(heads)
        sizes = (r["V"], r["pairs"], r["positions"], r["prompt"])
        return (head, DTYPES.index(r["dtype"]), *sizes, kinds.index(r["kind"]))

    return sorted(records, key=place)


def shape_of(record: dict) -> tuple[str, str, str, str]:
    """Head, batch, dtype and what was timed, in words."""
    r = record
    # No head's: one of the sizes that growth is measured over.
    head = r["head"] if r["head"] in HEADS else f"V {r['V']:,}, D {r['D']}"
    batch = f"{r['pairs']} x {r['positions']}, " + ("padded" if r["padded"] else f"{r['prompt']} prompt")
    return head, batch, r["dtype"], KINDS[r["kind"]]


def time_of(record: dict) -> str:
    gpu = record["group"].startswith("gpu")
    return f"{1e3 * record['median']:.2f} ms" if gpu else f"{record['median']:.3g} s"


def memory_of(record: dict) -> str:
    return f"{record['peak_bytes'] / 2**20:,.0f} MiB"


FIGURES = {"median": time_of, "peak_bytes": memory_of}


def peers_of(records: list[dict]) -> list[str]:
    """Who was measured, ours first, budgets of ours left out."""
    return [peer for peer in PEERS if any(r["peer"] == peer for r in records)]


def wide_table(records: list[dict]) -> str:
    """One line a case, one column for each peer: time and memory, the least of either in bold."""
    one_kind = len({r["kind"] for r in records}) == 1
    cases: dict[tuple, dict[str, dict]] = {}
    for r in in_order([r for r in records if not r["peer"].startswith(BUDGET)]):
        cases.setdefault(shape_of(r)[: 3 if one_kind else 4], {})[r["peer"]] = r
    names = peers_of(records)

    def cell(r: dict | None, right: list[dict]) -> str:
        if r is None:
            return ""
        if r["status"] != "measured":
            return r["status"].split(":")[0]
        parts = []
        for name, words in FIGURES.items():
            number, unit = words(r).split(" ")
            parts.append(f"{number} {unit}" if r[name] > min(o[name] for o in right) else f"**{number}** {unit}")
        return ", ".join(parts)

    rows = []
    for case, by_peer in cases.items():
        right = [r for r in by_peer.values() if r["status"] == "measured"]
        rows.append([*case, *(cell(by_peer.get(name), right) for name in names)])
    return table(["head", "batch", "dtype", *([] if one_kind else ["what"]), *names], rows)


def error_table(records: list[dict]) -> str:
    """The largest error of each peer over all cases of a dtype, wrong ones too: who has no time, and why."""
    rows = []
    for peer, dtype in itertools.product(peers_of(records), DTYPES):
        mine = [r for r in records if (r["peer"], r["dtype"]) == (peer, dtype) and "error_dx" in r]
        if mine:
            rows.append([peer, dtype, *(f"{max(r[name] for r in mine):.0e}" for name in ERRORS)])
    return table(["who", "dtype", "loss", "dX", "dW"], rows)


def measured_cases(records: list[dict]) -> list[dict[str, dict]]:
    """Peer -> record, of those that were timed on the same case, on the same machine; one for each case."""
    cases: dict[tuple, dict[str, dict]] = {}
    for r in in_order([r for r in records if r["status"] == "measured" and not r["peer"].startswith(BUDGET)]):
        names = ("group", "head", "pairs", "positions", "prompt", "padded", "V", "dtype", "kind", "device")
        cases.setdefault(tuple(r.get(name) for name in names), {})[r["peer"]] = r
    return list(cases.values())


def summary_table(records: list[dict], margin: float = 1.05) -> str:
    """How often each form of ours is the fastest and the smallest, both within `margin`, and how it stands to TRL."""
    found: dict[tuple[str, str, str], list[tuple[float | None, ...]]] = {}
    for peers in measured_cases(records):
        others = [r for name, r in peers.items() if name not in OURS]
        for form in OURS:
            if form not in peers or not others:
                continue
            mine, trl = peers[form], peers.get("trl")
            beside = [mine[name] / min(r[name] for r in others) for name in FIGURES]
            # TRL may be wrong there, and have no time.
            ratios = (trl["median"] / mine["median"], mine["peak_bytes"] / trl["peak_bytes"]) if trl else (None, None)
            found.setdefault((mine["kind"], mine["dtype"], form), []).append((*beside, *ratios))

    def spread(values: tuple[float | None, ...], digits: int, scale: float = 1) -> str:
        kept = [scale * value for value in values if value is not None]
        if not kept:
            return ""
        return f"{statistics.median(kept):.{digits}f} ({min(kept):.{digits}f} to {max(kept):.{digits}f})"

    rows = []
    for kind, dtype, form in itertools.product(KINDS, DTYPES, OURS):
        if cases := found.get((kind, dtype, form)):
            times, sizes, faster, share = zip(*cases, strict=True)
            won = [f"{sum(value <= margin for value in values)} of {len(cases)}" for values in (times, sizes)]
            rows.append([KINDS[kind], dtype, form, *won, spread(faster, 1), spread(share, 0, 100)])
    header = ["what", "dtype", "who", "fastest", "smallest", "times as fast as TRL", "% of TRL's memory"]
    return table(header, rows)


def losses(records: list[dict], figure: str, margin: float = 1.05) -> list[list[str]]:
    """A line for each case in which a peer's `figure` is below that of `ours` by more than `margin`.

    Each ends with the figures of the peer, of `ours` and of `ours (strips)`.
    """
    lines = []
    for peers in measured_cases(records):
        others = [r for name, r in peers.items() if name not in OURS]
        if "ours" not in peers or not others:
            continue
        least = min(others, key=lambda r: r[figure])
        if peers["ours"][figure] > margin * least[figure]:
            ours = (FIGURES[figure](peers[name]) if name in peers else "" for name in OURS)
            lines.append([*shape_of(least), least["device"], least["peer"], FIGURES[figure](least), *ours])
    return lines


def losses_table(records: list[dict], figure: str) -> str:
    header = ["head", "batch", "dtype", "what", "machine", "who", "theirs", "ours", "ours (strips)"]
    return table(header, losses(records, figure))


def exponent(points: list[tuple[float, float]]) -> float:
    """b of y = a x^b, by least squares of the logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(v) / len(logs) for v in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def growth_table(records: list[dict]) -> str:
    """With which power of positions and of vocabulary time and memory grow."""
    half = [r for r in records if r["status"] == "measured" and 2 * r["prompt"] == r["positions"]]
    sweeps = {
        "positions": [r for r in half if r["V"] == 32768],
        "V": [r for r in half if r["positions"] == 128],
    }
    rows = []
    for name, part in sweeps.items():
        for peer in peers_of(part):
            mine = [r for r in part if r["peer"] == peer]
            if len({r[name] for r in mine}) > 2:
                fits = (exponent([(r[name], r[figure]) for r in mine]) for figure in FIGURES)
                rows.append([name, peer, *(f"{b:.2f}" for b in fits)])
    return table(["size", "who", "time grows with power", "memory grows with power"], rows)


def accuracy_table(records: list[dict]) -> str:
    """Each one's errors against float64 on the same input; of a mean log-probability the largest, in nats."""
    names = ("error_loss", "error_logps", "error_dx", "error_dw")
    rows = [
        [f"{r['head']}, {r['data']}", r["dtype"], r["peer"], *(f"{r[n]:.1e}" if n in r else r["status"] for n in names)]
        for r in records
    ]
    return table(["input", "dtype", "who", "loss", "mean log-probability, nats", "dX", "dW"], rows)


def long_table(records: list[dict]) -> str:
    """The longest sequence that each peer finished, and how it ended."""
    rows = []
    for peer in peers_of(records):
        done = [r for r in records if r["peer"] == peer and r["status"] == "measured"]
        ended = [r for r in records if r["peer"] == peer and r["status"] != "measured"]
        longest = max(done, key=lambda r: r["positions"], default=None)
        reached = f"{longest['positions']:,} in {longest['median']:.1f} s" if longest else "none"
        rows.append([peer, reached, ", ".join(f"{r['positions']:,}: {r['status']}" for r in ended) or "not reached"])
    return table(["who", "longest pair, tokens a sequence", "ended at"], rows)


def held(record: dict) -> str:
    """GiB that a training process held: allocated on its GPU, or resident."""
    held_bytes = record.get("peak_bytes") or record.get("peak_resident_bytes")
    return f"{held_bytes / 2**30:.1f}" if held_bytes else ""


def training_table(records: list[dict]) -> str:
    """Time, pairs per second and memory of each trainer."""
    header = ["model", "data", "batch", "dtype", "what", "who", "rounds", "median (20 to 80 %)", "times as fast as TRL"]
    rows = [
        [
            *(str(r[name]) for name in ("head", "data", "pairs", "dtype", "kind", "peer", "rounds")),
            f"{r['median']:.3g} s ({r['q20']:.3g} to {r['q80']:.3g})",
            f"{r['ratio']:.2f}",
            f"{r['pairs_per_second']:.2f}",
            held(r),
        ]
        for r in records
    ]
    return table([*header, "pairs/s", "held, GiB"], rows)


def budget_table(records: list[dict]) -> str:
    """Forward and backward of ours on a GPU, by what is kept of the logits."""
    names = {"ours (strips)": 0, "ours": 1024}
    rows: dict[int, list[str]] = {}
    for r in records:
        if r["kind"] == "step" and (r["peer"] in names or r["peer"].startswith(BUDGET)):
            mib = names.get(r["peer"], r["peer"].removeprefix(BUDGET).removesuffix(" MiB"))
            rows.setdefault(int(mib), []).append(f"{time_of(r)}, {memory_of(r)}")
    heads = list(dict.fromkeys(r["head"] for r in records))
    return table(["budget, MiB", *heads], [[str(budget), *cells] for budget, cells in sorted(rows.items())])
