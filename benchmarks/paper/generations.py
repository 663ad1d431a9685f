"""Writes the figures of generations.md, and its picture, from the stored results.

    python -m benchmarks.paper.generations
    python -m benchmarks.paper.generations --answers own.jsonl --picture figure5.png    the picture of one's own answers

The page's words are written by hand, the blocks between its marks by this; a test compares them.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pictures import fingerprint
from orpo.plots import COLOURS

from . import diversity, winrates

PAGE = Path(__file__).parent / "generations.md"
PICTURE = winrates.RESULTS.with_suffix(".png")
# The slides' colours: SFT blue, DPO orange, ORPO red.
MODEL_COLOURS = {"sft": COLOURS[1], "dpo": COLOURS[4], "orpo": COLOURS[0]}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def _of(records: Sequence[dict], model: str) -> list[dict]:
    return [r for r in records if r["model"] == model]


def _range(values: Sequence[float], digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def blocks(records: Sequence[dict], similar: Sequence[dict], slow: Sequence[dict]) -> dict[str, str]:
    """The page's blocks by name, of the records of winrates.jsonl, diversity.jsonl and winrates_dpo_slow.jsonl."""
    seeds = sorted({r["seed"] for r in records})
    accuracies = [f"{r['reward_accuracy']:.3f} (seed {r['seed']})" for r in _of(records, "orpo")]
    pairs = records[0]["heldout_pairs"]
    rounds = [[f"ORPO vs {other.upper()}"] for other in ("sft", "dpo")]
    for row, other in zip(rounds, ("sft", "dpo"), strict=True):
        rates = winrates.win_rates(records, "orpo", other)
        row += [f"{rates[seed][0]:.1f} ({rates[seed][1]:.2f})" for seed in seeds]
        row.append(f"{statistics.fmean(mean for mean, _ in rates.values()):.1f}")
    models = list(dict.fromkeys(r["model"] for r in records))
    answers = []
    for model in models:
        own = _of(records, model)
        means = [statistics.fmean(x for answered in r["rewards"] for x in answered) for r in own]
        spreads = [statistics.pstdev(x for answered in r["rewards"] for x in answered) for r in own]
        manners = [r["manner"] for r in own if r["manner"] is not None]
        row = [_range(means, 2), _range(spreads, 2), _range(manners, 2) if manners else "none"]
        answers.append([model.upper(), *row, _range([100 * r["facts_right"] for r in own], 0)])
    alike = []
    for model in models:
        own = _of(similar, model)
        names = ("per_input", "across_inputs")
        alike.append([model.upper(), *(_range([r[name] for r in own], 4) for name in names)])
    header = ["win rate, % (deviation over rounds)", *(f"seed {seed}" for seed in seeds), "mean"]
    written = {
        "reward model": f"Right on these shares of {pairs} held-out pairs: {', '.join(accuracies)}.",
        "win rates": table(header, rounds),
        "rewards": table(
            ["", "mean reward", "its spread over answers", "manner, 0 rude to 5 warm", "fact right, %"], answers
        ),
        "diversity": table(["", "per input", "across inputs"], alike),
    }
    return {**written, "slow dpo": _slow(slow)} if slow else written


def _slow(records: Sequence[dict]) -> str:
    """A table of the seeds of which DPO was trained with the smaller learning rate too."""
    rows = []
    for seed in sorted({r["seed"] for r in records}):
        own = {r["model"]: r for r in records if r["seed"] == seed}
        facts = [f"{100 * own[model]['facts_right']:.0f}" for model in ("sft", "dpo", "orpo")]
        mean, spread = winrates.win_rates(records, "orpo", "dpo")[seed]
        rows.append([str(seed), f"{mean:.1f} ({spread:.2f})", " / ".join(facts)])
    return table(["seed", "ORPO vs DPO, %", "fact right, SFT / DPO / ORPO, %"], rows)


def with_blocks(page: str, written: dict[str, str]) -> str:
    """The page with its blocks replaced.

    Raises:
        ValueError: it lacks the marks of one.
    """
    for name, text in written.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in page or end not in page:
            raise ValueError(f"the page lacks {begin} or {end}")
        whole = f"{begin}\n{text}\n{end}"
        page = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, whole=whole: whole, page, flags=re.S)
    return page


def draw(records: Sequence[dict], path: Path) -> None:
    """Figure 5: histograms of the rewards of each model's answers, a panel a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    seeds = sorted({r["seed"] for r in records})
    others = (c for c in COLOURS if c not in MODEL_COLOURS.values())
    colours = {m: MODEL_COLOURS.get(m) or next(others) for m in dict.fromkeys(r["model"] for r in records)}
    figure, axes = plt.subplots(1, len(seeds), figsize=(4.2 * len(seeds), 3.6), sharey=True, squeeze=False)
    for axis, seed in zip(axes[0], seeds, strict=True):
        found = {r["model"]: np.concatenate(r["rewards"]) for r in records if r["seed"] == seed}
        every = np.concatenate(list(found.values()))
        edges = np.linspace(every.min(), every.max(), 31)
        for model, values in found.items():
            weights = np.full(len(values), 1 / len(values))
            axis.hist(values, edges, weights=weights, color=colours[model], alpha=0.35)
            axis.hist(values, edges, weights=weights, color=colours[model], histtype="step", linewidth=1.5)
            axis.axvline(values.mean(), color=colours[model], linestyle="--", label=f"{model.upper()}, mean")
        axis.set(title=f"seed {seed}", xlabel="reward")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("share of the answers")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Description": fingerprint(list(records))})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, help="what benchmarks.paper.winrates stored of models of one's own")
    parser.add_argument("--picture", type=Path, help="with --answers: where the picture goes")
    options = parser.parse_args(argv)
    if (options.answers is None) != (options.picture is None):
        parser.error("--answers and --picture belong together")
    if options.answers is not None:
        draw(winrates.read(options.answers), options.picture)
        return
    records, similar, slow = winrates.read(), diversity.read(), winrates.read(winrates.SLOW_RESULTS)
    PAGE.write_text(with_blocks(PAGE.read_text(), blocks(records, similar, slow)))
    draw(records, PICTURE)


if __name__ == "__main__":
    main()
