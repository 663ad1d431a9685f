"""Writes RESULTS.md, the picture and the README's figures from the stored results: python -m benchmarks.report

A test compares what is committed with what this writes.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import pictures, results, tables
from .run import LOSS_GROUPS
from .tables import caption, error_table, held, losses_table, wide_table

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
PICTURE = results.FOLDER / "heads.png"
MARKS = ("<!-- figures: written by python -m benchmarks.report -->", "<!-- end of figures -->")
README_PEERS = ("ours", "ours (strips)", "trl", "liger", "liger compiled", "cce")
GPU_GROUPS = ("gpu", "gpu_peers")


def load_all(folder: Path = results.FOLDER) -> dict[str, list[dict]]:
    return {group: results.load(group, folder) for group in (*LOSS_GROUPS, "accuracy", "long", "training", *GPU_GROUPS)}


def shown(stored: dict[str, list[dict]], group: str) -> list[dict]:
    """What a group's tables are made of: one machine a dtype, for training one for real data and one for words."""
    by_data = {"by": lambda r: (r["dtype"], r["data"].startswith("random"))}
    return results.one_machine(stored[group], **(by_data if group == "training" else {}))


def pages(stored: dict[str, list[dict]]) -> str:
    """RESULTS.md: tables, each under the machine that it was measured on."""
    loss = {group: shown(stored, group) for group in LOSS_GROUPS}
    cpu = [r for records in loss.values() for r in records]
    out = ["# Results", "Written by `python -m benchmarks.report`; what the words mean: [README.md](README.md)."]
    out += ["## Ours beside the others, on a CPU", tables.summary_table(cpu)]
    out += ["## Another is more than 5 % faster than ours", losses_table([*cpu, *stored["gpu"]], "median")]
    out += ["## Another is more than 5 % smaller than ours", losses_table([*cpu, *stored["gpu"]], "peak_bytes")]
    sections = {
        "On a GPU": ("gpu", wide_table, tables.budget_table, error_table),
        "On a GPU, all peers": ("gpu_peers", wide_table, error_table),
        "Eight heads": ("heads", wide_table),
        "Other shares of prompt": ("prompt_share", wide_table),
        "Frozen head": ("frozen", wide_table),
        "A short batch in bfloat16": ("bfloat16", wide_table),
        "Padded batches of real lengths": ("padding", wide_table),
        "Growth": ("growth", tables.growth_table, wide_table),
        "Accuracy": ("accuracy", tables.accuracy_table),
        "Until memory runs out": ("long", tables.long_table),
        "Training": ("training", tables.training_table),
    }
    for title, (group, *draw) in sections.items():
        records = shown(stored, group)
        out.append(f"## {title}")
        out += [caption(records), *(d(records) for d in draw)] if records else ["Not measured."]
    out += ["## Largest errors on a CPU", error_table(cpu)]
    return "\n\n".join(out) + "\n"


def readme_block(stored: dict[str, list[dict]]) -> str:
    """The README's picture and figures."""
    heads, gpu = shown(stored, "heads"), stored["gpu"]
    steps = [r for r in shown(stored, "training") if r["kind"] == "training step"]
    steps = [r for r in steps if not r["data"].startswith("random")]
    spread = "{median:.1f} ({q20:.1f} to {q80:.1f})"
    rows = [[r["dtype"], r["peer"], spread.format(**r), f"{r['ratio']:.2f}", held(r)] for r in steps]
    header = ["dtype", "trainer", "step, s", "times as fast as TRL's ORPOTrainer", "resident, GiB"]
    parts = [
        f"Loss and gradients (forward and backward) on a GPU: {caption(gpu)}.",
        wide_table([r for r in gpu if r["kind"] == "step"]),
        "![speed against TRL, by head](benchmarks/results/heads.png)",
        f"The same on a CPU: {caption(heads)}. `wrong` is further from float64 than its dtype explains.",
        wide_table([r for r in heads if r["kind"] == "step" and r["peer"] in README_PEERS]),
    ]
    if steps:
        parts += [
            f"Training steps of {steps[0]['head']} on `{steps[0]['data']}`: {caption(steps)}.",
            tables.table(header, rows),
        ]
    return "\n\n".join([MARKS[0], *parts, MARKS[1]])


def with_block(readme: str, block: str) -> str:
    """The README with its figures replaced.

    Raises:
        ValueError: the README does not hold both marks.
    """
    if not all(mark in readme for mark in MARKS):
        raise ValueError(f"README.md lacks {MARKS[0]!r} or {MARKS[1]!r}")
    return re.sub(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", lambda _: block, readme, flags=re.S)


def drawn(stored: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """What the picture shows: forward and backward in front of each head, a panel a dtype."""
    records = [r for r in tables.in_order(shown(stored, "heads")) if r["kind"] == "step"]
    panels = {dtype: [r for r in records if r["dtype"] == dtype] for dtype in tables.DTYPES}
    return {dtype: part for dtype, part in panels.items() if part}


def main() -> None:
    stored = load_all()
    (HERE / "RESULTS.md").write_text(pages(stored))
    panels = drawn(stored)
    pictures.bars(
        panels,
        PICTURE,
        lambda r: r.get("ratio"),
        "times as fast as TRL",
        caption([r for part in panels.values() for r in part]),
    )
    README.write_text(with_block(README.read_text(), readme_block(stored)))


if __name__ == "__main__":
    main()
