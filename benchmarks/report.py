"""Writes RESULTS.md, the pictures and the README's figures from the stored results.

    python -m benchmarks.report

Nothing is typed by hand but the explanations: a test compares what is committed with what this writes.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import cost_pages, gpu_page, limits, lost, pictures, results, tables
from .lengths import QUANTILES
from .results import by_device, most_measured, shown_in
from .run import LOSS_GROUPS
from .tables import caption, held, losses, table

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
MARKS = ("<!-- figures: written by python -m benchmarks.report -->", "<!-- end of figures -->")
README_PEERS = ("ours", "ours (strips)", "trl", "liger", "liger compiled", "cce")
TITLES = {
    "targets": "Sequences of 256 and 1024 tokens, 96 and 384 of them prompt",
    "heads": "Eight heads, half of each sequence prompt",
    "prompt_share": "Other shares of prompt",
    "frozen": "Frozen head",
    "bfloat16": "A short batch in bfloat16, emulated or not",
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


def wide(records: list[dict]) -> list[str]:
    """Time and memory of every case, and how wrong anyone was at most."""
    return [
        tables.wide_table(records),
        "Relative errors against float64, the largest of these cases:",
        tables.error_table(records),
    ]


# Names the machines, so that a reader need not know which commit came first; a test asserts that there are such rows.
LIGER_EVALUATION = (
    " On the machines named AMD EPYC and Intel(R) Xeon(R) Processor, without a word in brackets, Liger was asked for "
    "the hidden states' gradient in evaluation too, a third of its matmuls; elsewhere it computes only the head's."
)

TABLES = {
    "targets": lambda records: [tables.loss_table(records)],
    "growth": lambda records: [tables.growth_table(records), *wide(records)],
    "accuracy": lambda records: [tables.accuracy_table(records)],
    "frozen": lambda records: [
        *wide(records),
        "A frozen head has one default, strips: both columns of ours are the same form. `forward, with a graph` is of "
        "a trained head; `ours`, as Liger, makes the gradients in it, which backward then has for nothing.",
    ],
    "long": lambda records: [
        f"One pair, half of it prompt, in front of {limits.HEAD}'s head in float32, forward and backward. Each in a "
        f"process of its own that may use {limits.MEMORY_GIB} GiB and {limits.SECONDS} seconds.",
        tables.long_table(records),
    ],
    "training": lambda records: [tables.training_table(records)],
}


def pages(stored: dict[str, list[dict]]) -> str:
    """RESULTS.md."""
    everything = [r for group in LOSS_GROUPS for r in stored[group]]
    out = [
        "# Results",
        "Written by `python -m benchmarks.report` from `benchmarks/results/`. The loss itself (all but the sections on "
        "length and training) is timed once loss and gradients agree with float64, peers taking turns in 3 or 5 "
        "rounds: times are medians, and ratios are of these; the files have the spread. From 9d8e995 to 68f7803 a case "
        "whose rounds lay apart, the default's or the fastest other's from 20 to 80 % by more than a tenth of their "
        "median, was measured once more, which the tables show (some others too, after a change of memory). Memory is "
        "what a call allocates at most, its gradients included; `ours (strips)` measured before 903de87 held up to two "
        "strips, and takes less today. "
        "Errors are relative, of loss, hidden-state gradient and weight gradient. `cce` is its `torch_compile` form, "
        "its only one on a CPU, which holds the logits of all rows that count; `trl` in bfloat16 is a model of "
        f"bfloat16 weights.{tables.beyond_limits(everything)}{LIGER_EVALUATION} "
        "Vocabulary and hidden size are those of the real heads, without Phi-2's bias and Gemma 2's softcap; batches "
        "are scaled down to what two CPU cores finish in seconds, as the tables say. What was measured on a GPU has a "
        "section of its own; all other figures are a CPU's.",
        "## In one table",
        "In how many cases, over all heads, batches and machines, a form of ours is the fastest of all peers measured "
        "there, and in how many the smallest, both within 5 %; then the median, and the least and the most, of all "
        "cases in which TRL has a time. `ours` is the default, `ours (strips)` is `logits_budget=0`. Only what was "
        "measured in mixed orders counts; what is older is in a list of its own below, and in the tables.",
        tables.summary_table(lost.current(everything)),
        *lost.sections(everything),
    ]
    for group, title in TITLES.items():
        records = stored[group]
        if not records:
            out += [f"## {title}", f"Not measured yet: `python -m benchmarks.run --group {group}`."]
            continue
        out.append(f"## {title}")
        if group == "heads":
            out.append("![speed against TRL](results/heads.png)")
        if group == "prompt_share":
            out.append("![speed against TRL by share of prompt](results/prompt_share.png)")
        if group == "growth":
            out.append("![growth](results/growth.png)")
        for part in by_device(records):
            out += [caption(part) + ".", *TABLES.get(group, wide)(part)]
        if missing := not_measured(group, records):
            out.append(f"Not measured on any machine: {'; '.join(missing)}.")
    lengths = [[name, *(str(QUANTILES[name][i]) for i in (0, 2, 5, 10, 15, 18, 20))] for name in QUANTILES]
    out += [
        *gpu_page.page(stored),
        "## Counted cost, and a model of GPUs",
        cost_pages.page(stored["cost"]),
        "## Lengths",
        "Tokens of HH-RLHF (harmless-base), from which padded batches are drawn (`lengths.py`).",
        table(["part", "least", "10 %", "25 %", "median", "75 %", "90 %", "most"], lengths),
        "## What others publish about themselves",
        "Their figures, on their GPUs, at their shapes: not to be divided by ours.",
        table(["source", "what", "figures"], [list(row) for row in PUBLISHED]),
    ]
    return "\n\n".join(out) + "\n"


def not_measured(group: str, records: list[dict]) -> list[str]:
    """The cases of a group without a record, a line for each head and dtype."""
    names = ("head", "pairs", "positions", "prompt", "padded", "V", "dtype")
    stored = {tuple(r.get(name) for name in names) for r in records}
    batches: dict[str, list[str]] = {}
    for piece in LOSS_GROUPS.get(group, ()):
        c = piece.case
        padded = c.lengths is not None
        if (c.name, c.pairs, c.positions, c.prompt, padded, c.vocabulary, piece.dtype) not in stored:
            batch = f"{c.pairs} x {c.positions}" + (" padded" if padded else f" with {c.prompt} prompt")
            batches.setdefault(f"{c.name} in {piece.dtype}", []).append(batch)
    return [f"{name} ({', '.join(of)})" for name, of in batches.items()]


def readme_block(stored: dict[str, list[dict]]) -> str:
    """The README's picture and figures."""
    records = shown_in("heads", stored)
    timed = [r for r in records if r["status"] == "measured"]
    # Who is wrong stands there as such, without a time.
    shown = [r for r in records if r["kind"] == "step" and r["peer"] in README_PEERS]
    losing = len(losses(records))
    cases = len({(r["head"], r["dtype"], r["kind"]) for r in timed})
    early = sorted({r["dtype"] for r in timed if r["commit"] in lost.FIXED_ORDER})
    text = (
        "Loss and gradients (forward and backward), half of each sequence prompt; "
        f"{tables.caption_by_dtype(records)}. Medians of, after `pip install '.[bench]'`, "
        f'`python -m benchmarks.run --group heads --peers "{",".join(tables.peers_of(records))}"`. `ours (strips)` is '
        "`logits_budget=0`; `cce` is its torch.compile form, its only one on a CPU. Of these, another is more than 5 % "
        f"faster than both of ours in {losing} of {cases} cases, evaluation included: "
        "[benchmarks/RESULTS.md](benchmarks/RESULTS.md) names them, with all figures. Where a CPU emulates bfloat16, "
        "add `--only float32`, or peers take minutes a step."
    )
    if any(r["status"] == "wrong" for r in shown):
        text += (
            " `wrong` is further from float64 than its dtype explains, by how much RESULTS.md says, and gets no time."
        )
    if early:
        text += (
            f" Rows of {' and '.join(early)} are in part from before rounds had an order of their own: there CCE "
            "always came after Liger, and found its freed memory warm."
        )
    picture = "![speed against TRL, by head](benchmarks/results/heads.png)"
    parts = [picture, text, tables.wide_table(shown), *readme_training(stored["training"])]
    return "\n\n".join([MARKS[0], *gpu_page.readme(stored["gpu"]), *parts, MARKS[1]])


def readme_training(records: list[dict]) -> list[str]:
    """Paragraph and table of training steps on real data; nothing where none was measured."""
    steps = [r for r in records if r["kind"] == "training step" and not r["data"].startswith("random words")]
    if not steps:
        return []
    steps = most_measured(steps)
    kinds = ",".join(dict.fromkeys(r["peer"] for r in steps))
    rounds = max(r["rounds"] for r in steps)
    text = (
        f"Training steps of {steps[0]['head']} on `{steps[0]['data']}`, {steps[0]['pairs']} pairs a batch, on "
        f"{caption(steps)}; medians (20 to 80 %) of {rounds} rounds, each the mean of the second and third step, "
        f"batches already made, `python -m benchmarks.training --model FOLDER --data FILE --rounds {rounds} "
        f'--kinds "{kinds}"`. '
        "`trl sft` is TRL's SFTTrainer on the chosen answers alone. Resident is what a whole process holds."
    )
    header = ["dtype", "trainer", "step, s", "times as fast as TRL's ORPOTrainer", "resident, GiB"]
    rows = [
        [
            r["dtype"],
            r["peer"],
            f"{r['median']:.1f} ({r['q20']:.1f} to {r['q80']:.1f})",
            f"{r['ratio']:.2f}",
            held(r),
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
    return {group: results.load(group, folder) for group in (*TITLES, *gpu_page.GROUPS, "cost")}


PICTURES = {"heads": pictures.heads, "prompt_share": pictures.shares, "growth": pictures.growth}


def main() -> None:
    stored = load_all()
    (HERE / "RESULTS.md").write_text(pages(stored))
    for group, draw in PICTURES.items():
        if any("ratio" in r for r in stored[group]):
            records = shown_in(group, stored)
            draw(records, results.FOLDER / f"{group}.png", tables.caption_by_dtype(records))
    if stored["cost"]:
        cost_pages.plot(stored["cost"], results.FOLDER / "cost.png")
    if stored["heads"]:
        README.write_text(with_block(README.read_text(), readme_block(stored)))


if __name__ == "__main__":
    main()
