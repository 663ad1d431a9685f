"""Writes RESULTS.md and the pictures from the stored results.

    python -m benchmarks.report             what decides between one and another
    python -m benchmarks.report --all       prints the tables of every case that is stored

A test compares what is committed with what this writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import pictures, results, tables
from .run import BASE, LOSS_GROUPS
from .tables import caption, error_table, losses_table, wide_table

HERE = Path(__file__).parent
PICTURE = results.FOLDER / "heads.png"
# In front of the reader, where the pages and the site find it.
MEMORY = HERE.parent / "docs/memory.png"
GPU_GROUPS = ("gpu", "gpu_peers")


def load_all(folder: Path = results.FOLDER) -> dict[str, list[dict]]:
    return {group: results.load(group, folder) for group in (*LOSS_GROUPS, "accuracy", "long", "training", *GPU_GROUPS)}


def shown(stored: dict[str, list[dict]], group: str) -> list[dict]:
    """What a group's tables are made of: one machine a dtype, for training one for real data and one for words."""
    by_data = {"by": lambda r: (r["dtype"], r["data"].startswith("random"))}
    return results.one_machine(stored[group], **(by_data if group == "training" else {}))


def pages(stored: dict[str, list[dict]], every: bool = False) -> str:
    """RESULTS.md: tables, each under the machine that it was measured on.

    Args:
        every: with those of each single case, which are for whoever wants to know of one.
    """
    loss = {group: shown(stored, group) for group in LOSS_GROUPS}
    cpu = [r for records in loss.values() for r in records]
    gpu, training = shown(stored, "gpu"), shown(stored, "training")
    if not every:
        training = [r for r in training if r["kind"] == "training step" and not r["data"].startswith("random")]
    out = [
        "# Results",
        "Written by `python -m benchmarks.report`; with `--all` it prints every single case. What the words mean: "
        "[README.md](README.md).",
        "![memory of head and loss as the vocabulary and the sequences grow](../docs/memory.png)",
        "![speed against TRL, by head](results/heads.png)",
        "## Ours beside the others, on a CPU",
        tables.summary_table(cpu),
    ]
    sections = {
        "On a GPU": (gpu, wide_table, tables.budget_table, error_table),
        "On a GPU, all peers": (shown(stored, "gpu_peers"), wide_table, error_table),
        "Growth": (loss["growth"], tables.growth_table),
        "Until memory runs out": (shown(stored, "long"), tables.long_table),
        "Training": (training, tables.training_table),
    }
    if every:
        both = [*cpu, *gpu]
        out += ["## Another is more than 5 % faster than ours", losses_table(both, "median")]
        out += ["## Another is more than 5 % smaller than ours", losses_table(both, "peak_bytes")]
        sections |= {
            "Eight heads": (loss["heads"], wide_table),
            "Other shares of prompt": (loss["prompt_share"], wide_table),
            "Frozen head": (loss["frozen"], wide_table),
            "A short batch in bfloat16": (loss["bfloat16"], wide_table),
            "Padded batches of real lengths": (loss["padding"], wide_table),
            "Growth, every size": (loss["growth"], wide_table),
            "Accuracy": (shown(stored, "accuracy"), tables.accuracy_table),
        }
    for title, (records, *draw) in sections.items():
        out.append(f"## {title}")
        out += [caption(records), *(d(records) for d in draw)] if records else ["Not measured."]
    out += ["## Largest errors on a CPU", error_table(cpu)]
    return "\n\n".join(out) + "\n"


def drawn(stored: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """What the picture shows: forward and backward in front of each head, a panel a dtype."""
    records = [r for r in tables.in_order(shown(stored, "heads")) if r["kind"] == "step"]
    panels = {dtype: [r for r in records if r["dtype"] == dtype] for dtype in tables.DTYPES}
    return {dtype: part for dtype, part in panels.items() if part}


def growing(stored: dict[str, list[dict]]) -> dict[str, tuple[str, list[dict]]]:
    """What the picture of memory shows: the vocabulary grows, or the sequences, of which half is prompt."""
    records = [r for r in shown(stored, "growth") if r["status"] == "measured" and 2 * r["prompt"] == r["positions"]]
    base = {"V": BASE.vocabulary, "positions": BASE.positions}
    titles = {
        f"vocabulary, sequences of {BASE.positions} tokens": ("V", "positions"),
        f"tokens a sequence, vocabulary {BASE.vocabulary:,}": ("positions", "V"),
    }
    return {title: (size, [r for r in records if r[other] == base[other]]) for title, (size, other) in titles.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="print the tables of every case, and write nothing")
    stored = load_all()
    if parser.parse_args(arguments).all:
        print(pages(stored, every=True), end="")
        return
    (HERE / "RESULTS.md").write_text(pages(stored))
    panels = drawn(stored)
    pictures.bars(
        panels,
        PICTURE,
        lambda r: r.get("ratio"),
        "times as fast as TRL",
        caption([r for part in panels.values() for r in part]),
    )
    memory = growing(stored)
    where = caption([r for _, part in memory.values() for r in part])
    what = (
        f"most bytes alive in forward and backward of head and loss, {BASE.pairs} pairs, hidden size {BASE.hidden_size}"
    )
    pictures.growth(memory, MEMORY, f"{what}, float32; {where}")


if __name__ == "__main__":
    main()
