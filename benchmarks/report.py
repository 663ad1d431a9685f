"""Writes RESULTS.md, the pictures and the README's figures from the stored results.

    python -m benchmarks.report

Nothing is typed by hand but the explanations: a test compares what is committed with what this writes.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from . import cost_pages, pictures, results
from .lengths import QUANTILES

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
MARKS = ("<!-- figures: written by python -m benchmarks.report -->", "<!-- end of figures -->")
KINDS = {
    "step": "forward and backward",
    "evaluation": "evaluation",
    "frozen": "frozen head, forward and backward",
    "forward": "forward, with a graph",
}
TITLES = {
    "targets": "Sequences of 256 and 1024 tokens, 96 and 384 of them prompt",
    "heads": "Eight heads, half of each sequence prompt",
    "prompt_share": "Other shares of prompt",
    "frozen": "Frozen head",
    "padding": "Padded batches of real lengths",
    "growth": "Growth",
    "accuracy": "Accuracy",
    "long": "Until memory runs out",
    "training": "Training",
}
# Figures of their publishers, on their hardware and at their shapes: not measured here, not to be divided by ours.
PUBLISHED = [
    ("Liger, its own CSV", "ORPO loss, A100-80GB, D 4096, V 128256, bf16, T 1024, 2 / 4 / 8 / 16 sequences",
     "32.5 / 63.2 / 123.0 / 247.4 ms, 8161 to 8497 MB"),
    ("Liger, its own CSV", "the same with Hugging Face's eager loss", "39.3 / 77.9 / 151.6 / 304.5 ms, up to 33418 MB"),
    ("Liger, its own CSV", "ORPO loss, the same with T 4096", "116.6 / 232.4 / 464.6 / 926.3 ms, 14557 to 15901 MB"),
    ("quack", "linear cross-entropy, H200, 4096 x 4096 x 128256", "17.33 ms"),
    ("TRL issue 7244", "linear cross-entropy, H100, V 151936, 8192 tokens: Liger / eager / bare matmuls",
     "192 ms, 6.1 GiB / 59 ms, 19.9 GiB / 42 ms"),
    ("CCE's README", "linear cross-entropy, A100, Gemma-2-2B, 8192 tokens: CCE / torch.compile / eager",
     "134.8 ms, 1.16 GB / 144 ms, 16 GB / 208.8 ms, 28 GB"),
]  # fmt: skip


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


def by_device(records: list[dict]) -> list[list[dict]]:
    """The records of each machine, in the order in which machines were first measured."""
    return [[r for r in records if r["device"] == device] for device in dict.fromkeys(r["device"] for r in records)]


def is_ours(record: dict) -> bool:
    return record["peer"].startswith("ours")


def loss_table(records: list[dict]) -> str:
    """Every peer of every case: time, spread, ratio, memory, errors."""
    rows = []
    for r in records:
        shape = [r["head"], f"{r['pairs']} x {r['positions']}, {r['prompt']} prompt", r["dtype"], KINDS[r["kind"]]]
        if r["status"] != "measured":
            rows.append([*shape, r["peer"], r["status"], *[""] * 4])
            continue
        errors = " / ".join(f"{r[name]:.0e}" for name in ("error_loss", "error_dx", "error_dw"))
        spread = f"{r['median']:.3g} s ({r['q20']:.3g} to {r['q80']:.3g})"
        ratio = f"{r['ratio']:.2f}" if "ratio" in r else ""
        rows.append([*shape, r["peer"], spread, ratio, f"{r['peak_bytes'] / 2**20:,.0f}", errors])
    header = ["head", "batch", "dtype", "what", "who", "median (20 to 80 %)", "times as fast as TRL", "MiB", "error"]
    return table(header, [row[: len(header)] for row in rows])


def losses(records: list[dict], margin: float = 1.05) -> list[str]:
    """One line for each case in which a peer is faster than the faster form of ours by more than `margin`."""
    cases: dict[tuple, list[dict]] = {}
    for r in records:
        if r["status"] == "measured":
            names = ("group", "head", "pairs", "positions", "prompt", "padded", "V", "dtype", "kind", "device")
            cases.setdefault(tuple(r.get(name) for name in names), []).append(r)
    lines = []
    for rows in cases.values():
        ours, others = ([r for r in rows if is_ours(r) == mine] for mine in (True, False))
        if not ours or not others:
            continue
        best, fastest = (min(part, key=lambda r: r["median"]) for part in (ours, others))
        if best["median"] > margin * fastest["median"]:
            r = fastest
            lines.append(
                f"* {r['head']}, {r['dtype']}, {r['pairs']} x {r['positions']}, {r['prompt']} prompt, "
                f"{KINDS[r['kind']]}: {r['peer']} {r['median']:.3g} s, ours {best['median']:.3g} s ({r['device']})"
            )
    return lines


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


def training_table(records: list[dict]) -> str:
    """Time, pairs per second and memory of each trainer."""
    header = ["model", "data", "batch", "dtype", "what", "who", "median (20 to 80 %)", "times as fast as TRL"]
    return table(
        [*header, "pairs/s", "resident, GiB"],
        [
            [
                *(str(r[name]) for name in ("head", "data", "pairs", "dtype", "kind", "peer")),
                f"{r['median']:.3g} s ({r['q20']:.3g} to {r['q80']:.3g})",
                f"{r['ratio']:.2f}",
                f"{r['pairs_per_second']:.2f}",
                f"{r['peak_resident_bytes'] / 2**30:.1f}" if r.get("peak_resident_bytes") else "",
            ]
            for r in records
        ],
    )


def pages(stored: dict[str, list[dict]]) -> str:
    """RESULTS.md."""
    everything = [r for group in ("targets", "heads", "prompt_share", "frozen", "padding") for r in stored[group]]
    out = [
        "# Results",
        "Written by `python -m benchmarks.report` from `benchmarks/results/`. Every peer's loss and gradients are "
        "compared with float64 before it is timed; peers take turns in every round; memory is what a call allocates at "
        "most, its gradients included. Errors are relative, of loss, hidden-state gradient and weight gradient. "
        "Vocabulary and hidden size are those of the real heads, without Phi-2's bias and Gemma 2's softcap; batches "
        "are scaled down to what two CPU cores finish in seconds, as the tables say. No figure was measured on a GPU.",
        "## Where we lose",
        "\n".join(losses(everything)) or "In no case measured is another more than 5 % faster.",
    ]
    for group, title in TITLES.items():
        records = stored[group]
        if not records:
            out += [f"## {title}", f"Not measured yet: `python -m benchmarks.run --group {group}`."]
            continue
        out.append(f"## {title}")
        if group == "heads":
            out.append("![speed against TRL](results/heads.png)")
        if group == "growth":
            out += ["![growth](results/growth.png)", growth_table(records)]
        write = {"long": long_table, "training": training_table, "accuracy": accuracy_table}.get(group, loss_table)
        for part in by_device(records):
            out += [caption(part) + ".", write(part)]
    lengths = [[name, *(str(QUANTILES[name][i]) for i in (0, 2, 5, 10, 15, 18, 20))] for name in QUANTILES]
    out += [
        "## Counted cost, and a model of GPUs",
        cost_pages.page(stored["cost"]),
        "## Lengths",
        "Tokens of HH-RLHF (harmless-base), from which padded batches are drawn (`lengths.py`).",
        table(["part", "least", "10 %", "25 %", "median", "75 %", "90 %", "most"], lengths),
        "## What others publish about themselves",
        "Their figures, on their GPUs, at their shapes. Ours has not run on a GPU.",
        table(["source", "what", "figures"], [list(row) for row in PUBLISHED]),
    ]
    return "\n\n".join(out) + "\n"


def readme_block(stored: dict[str, list[dict]]) -> str:
    """The README's picture and figures."""
    records = stored["heads"]
    timed = [r for r in records if r["status"] == "measured"]
    rows = []
    for head in dict.fromkeys(r["head"] for r in timed):
        for dtype in dict.fromkeys(r["dtype"] for r in timed if r["head"] == head):
            here = [r for r in timed if (r["head"], r["dtype"]) == (head, dtype)]
            step, evaluation = ({r["peer"]: r for r in here if r["kind"] == kind} for kind in ("step", "evaluation"))
            for peer in [p for p in ("ours", "ours (strips)", "trl", "liger", "cce") if p in step]:
                other = f"{evaluation[peer]['median']:.2f}" if peer in evaluation else ""
                memory = f"{step[peer]['peak_bytes'] / 2**20:,.0f}"
                rows.append([head, dtype, peer, f"{step[peer]['median']:.2f}", other, memory])
    lost = len(losses(records))
    cases = len({(r["head"], r["dtype"], r["kind"]) for r in timed})
    text = (
        f"Loss and gradients, half of each sequence prompt, on {caption(records)}; medians of "
        "`python -m benchmarks.run --group heads`. `ours (strips)` is `logits_budget=0`. Another is more than 5 % "
        f"faster than both in {lost} of {cases} cases: "
        "[benchmarks/RESULTS.md](benchmarks/RESULTS.md) names them, with all figures."
    )
    header = ["head", "dtype", "who", "forward + backward, s", "evaluation, s", "memory, MiB"]
    picture = "![speed against TRL, by head](benchmarks/results/heads.png)"
    parts = [MARKS[0], picture, text, table(header, rows), *readme_training(stored["training"]), MARKS[1]]
    return "\n\n".join(parts)


def readme_training(records: list[dict]) -> list[str]:
    """Paragraph and table of training steps on real data; nothing where none was measured."""
    steps = [r for r in records if r["kind"] == "training step" and not r["data"].startswith("random words")]
    if not steps:
        return []
    # The machine that was measured last.
    steps = by_device(steps)[-1]
    text = (
        f"Training steps of {steps[0]['head']} on `{steps[0]['data']}`, {steps[0]['pairs']} pairs a batch, on "
        f"{caption(steps)}; medians of `python -m benchmarks.training --model FOLDER --data FILE`. `trl sft` is TRL's "
        "SFTTrainer on the chosen answers alone. Resident is what a whole process holds."
    )
    header = ["dtype", "trainer", "step, s", "times as fast as TRL's ORPOTrainer", "resident, GiB"]
    rows = [
        [
            r["dtype"],
            r["peer"],
            f"{r['median']:.1f}",
            f"{r['ratio']:.2f}",
            f"{r['peak_resident_bytes'] / 2**30:.1f}" if r.get("peak_resident_bytes") else "",
        ]
        for r in steps
    ]
    return [text, table(header, rows)]


def with_block(readme: str, block: str) -> str:
    """The README with its figures replaced.

    Raises:
        ValueError: the README does not hold both marks.
    """
    if not all(mark in readme for mark in MARKS):
        raise ValueError(f"README.md lacks {MARKS[0]!r} or {MARKS[1]!r}")
    return re.sub(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", lambda _: block, readme, flags=re.S)


def load_all(folder: Path = results.FOLDER) -> dict[str, list[dict]]:
    return {group: results.load(group, folder) for group in (*TITLES, "cost")}


def main() -> None:
    stored = load_all()
    (HERE / "RESULTS.md").write_text(pages(stored))
    for group, draw in (("heads", pictures.heads), ("growth", pictures.growth)):
        if stored[group]:
            draw(stored[group], results.FOLDER / f"{group}.png", caption(stored[group]))
    if stored["cost"]:
        cost_pages.plot(stored["cost"], results.FOLDER / "cost.png")
    if stored["heads"]:
        README.write_text(with_block(README.read_text(), readme_block(stored)))


if __name__ == "__main__":
    main()
