"""Writes RESULTS.md and its picture from the stored results: python -m benchmarks.report

A test compares what is committed with what this writes.
"""

from __future__ import annotations

from pathlib import Path

from . import pictures, results, tables
from .run import LOSS_GROUPS
from .tables import caption, error_table, losses_table, wide_table

HERE = Path(__file__).parent
PICTURE = results.FOLDER / "heads.png"
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
    out += ["![speed against TRL, by head](results/heads.png)"]
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


if __name__ == "__main__":
    main()
