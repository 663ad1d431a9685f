"""Writes the figures of generations.md, and its picture, from the stored results.

    python -m benchmarks.paper.generations
    python -m benchmarks.paper.generations --answers own.jsonl --picture figure5.png    the picture of one's own answers

The page's words are written by hand, the blocks between its marks by this; a test compares them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pictures import fingerprint
from benchmarks.tables import table
from orpo.report.curves import COLOURS

from . import diversity, winrates
from .ppo import PPOSettings
from .report import spread, with_blocks

PAGE = Path(__file__).parent / "generations.md"
PICTURE = winrates.RESULTS.with_name("rewards.png")
# The slides' colours: SFT blue, DPO orange, ORPO red.
MODEL_COLOURS = {"sft": COLOURS[1], "dpo": COLOURS[4], "orpo": COLOURS[0], "ppo": COLOURS[2]}


def _of(records: Sequence[dict], model: str) -> list[dict]:
    return [r for r in records if r["model"] == model]


def _cut(record: dict) -> float:
    """Percentage of a record's answers that were cut off."""
    return 100 * statistics.fmean(mark for marks in record["cut"] for mark in marks)


def _mean_reward(record: dict) -> float:
    return statistics.fmean(x for answered in record["rewards"] for x in answered)


def blocks(
    records: Sequence[dict],
    similar: Sequence[dict],
    slow: Sequence[dict],
    slow_similar: Sequence[dict] = (),
) -> dict[str, str]:
    """The page's blocks by name.

    Args:
        records, similar: of winrates.jsonl and diversity.jsonl.
        slow, slow_similar: of the files of the same names with dpo_slow, or empty.
    """
    accuracies = [f"{r['reward_accuracy']:.3f} (seed {r['seed']})" for r in _of(records, "orpo")]
    pairs = records[0]["heldout_pairs"]
    written = {
        "reward model": f"Right on these shares of {pairs} held-out pairs: {', '.join(accuracies)}.",
        "win rates": _win_rates(records),
        "rewards": _answers(records),
        "diversity": _diversity(similar, slow_similar),
        "same answers": _same(records),
        "ppo settings": _ppo_settings(),
        "ppo": _ppo(records),
    }
    return {**written, "expected reward": _expected(records, slow), "slow dpo": _slow(slow)} if slow else written


def _win_rates(records: Sequence[dict]) -> str:
    rows, numbers = [], sorted({r["seed"] for r in records})
    for other, cut_loses in (("sft", False), ("dpo", False), ("dpo", True), ("ppo", False), ("ppo", True)):
        found = winrates.win_rates(records, "orpo", other, cut_loses)
        name = f"ORPO vs {other.upper()}" + ", a cut answer loses" * cut_loses
        cells = ["{:.1f} ({:.2f})".format(*found[seed]) for seed in numbers]
        rows.append([name, *cells, f"{statistics.fmean(mean for mean, _ in found.values()):.1f}"])
    return table(["win rate, % (deviation over rounds)", *(f"seed {seed}" for seed in numbers), "mean"], rows)


def _answers(records: Sequence[dict]) -> str:
    rows = []
    for model in dict.fromkeys(r["model"] for r in records):
        own = _of(records, model)
        spreads = [statistics.pstdev(x for answered in r["rewards"] for x in answered) for r in own]
        manners = [r["manner"] for r in own if r["manner"] is not None]
        count = sum(map(len, own[0]["answers"]))
        row = [spread([_mean_reward(r) for r in own], 2), spread(spreads, 2)]
        row += [spread(manners, 2) if manners else "none", spread([100 * r["without_manner"] / count for r in own], 0)]
        row += [spread([100 * r["facts_right"] for r in own], 0), spread([_cut(r) for r in own], 0)]
        rows.append([model.upper(), *row])
    header = ["", "mean reward", "its spread over answers", "manner, 0 rude to 5 warm", "without a phrase, %"]
    return table([*header, "fact right, %", f"cut off at {records[0]['max_new_tokens']} tokens, %"], rows)


def _diversity(similar: Sequence[dict], slow: Sequence[dict]) -> str:
    rows = [(model.upper(), _of(similar, model)) for model in dict.fromkeys(r["model"] for r in similar)]
    rows += [("DPO at 1e-4", _of(slow, "dpo"))] if slow else []
    names = ("per_input", "across_inputs")
    cells = [[name, *(" / ".join(f"{r[key]:.4f}" for r in own) for key in names)] for name, own in rows]
    return table(["", "per input, by seed", "across inputs, by seed"], cells)


def _ppo_settings() -> str:
    own = PPOSettings()
    rows = [
        ["epochs a batch", "4", own.epochs],
        ["first KL coefficient", "0.1", own.kl_coefficient],
        ["horizon, sequences", "2,000", f"{own.horizon:,}"],
        ["batch, answers", "64", own.batch_size],
        ["mini-batch, answers", "8", own.mini_batch_size],
        ["accumulation steps", "1", "1"],
        ["optimizer, learning rate", "AdamW, 1e-5", f"AdamW, {own.learning_rate:.0e}".replace("e-0", "e-")],
        ["gamma", "0.99", own.gamma],
        ["answer, tokens", "128 to 512", f"{own.max_new_tokens} at most"],
        ["batches", "not said", own.batches],
        ["lambda of GAE", "not said", own.lam],
        ["clip of ratio and of value", "not said", f"{own.clip}, {own.value_clip}"],
        ["weight of the value loss", "not said", own.value_weight],
        ["target KL, nats an answer", "not said", f"{own.kl_target:g}"],
    ]
    return table(["", "slides (Table 5)", "here"], [[name, slides, str(value)] for name, slides, value in rows])


def _ppo(records: Sequence[dict]) -> str:
    """Where PPO ended, by its last batch."""
    rows = []
    for record in _of(records, "ppo"):
        first, last = record["history"][0], record["history"][-1]
        peak = [f"{line[name]:.1f}" for line in (first, last) for name in ("score", "length")]
        rows.append([str(record["seed"]), *peak, f"{last['kl']:.1f}", f"{last['kl_coefficient']:.3f}"])
    parts = [f"{name}, {when} batch" for when in ("first", "last") for name in ("mean reward", "tokens an answer")]
    return table(["seed", *parts, "KL from SFT then, nats an answer", "its coefficient"], rows)


def _same(records: Sequence[dict]) -> str:
    """How many answers of ORPO's are SFT's to the letter."""
    counts = []
    for ours, theirs in zip(_of(records, "orpo"), _of(records, "sft"), strict=True):
        rounds = zip(ours["answers"], theirs["answers"], strict=True)
        counts.append(sum(a == b for x, y in rounds for a, b in zip(x, y, strict=True)))
    total = sum(map(len, records[0]["answers"]))
    return f"Of {total} answers, these are the same with ORPO and SFT, by seed: {', '.join(map(str, counts))}."


def _expected(records: Sequence[dict], slow: Sequence[dict]) -> str:
    """Mean rewards by seed, all by the one judge of each seed."""
    rows = [[model.upper(), *_of(records, model)] for model in dict.fromkeys(r["model"] for r in records)]
    rows.append(["DPO at 1e-4", *_of(slow, "dpo")])
    seeds = [f"seed {seed}" for seed in sorted({r["seed"] for r in records})]
    return table(["mean reward", *seeds], [[name, *(f"{_mean_reward(r):.2f}" for r in own)] for name, *own in rows])


def _slow(records: Sequence[dict]) -> str:
    """A table of the seeds of which DPO was trained with the smaller learning rate too."""
    rows, plain, strict = [], *(winrates.win_rates(records, "orpo", "dpo", loses) for loses in (False, True))
    for seed in sorted({r["seed"] for r in records}):
        own = {r["model"]: r for r in records if r["seed"] == seed}
        models = [own[name] for name in ("sft", "dpo", "orpo")]
        rates = [f"{mean:.1f} ({spread:.2f})" for mean, spread in (plain[seed], strict[seed])]
        facts = " / ".join(f"{100 * r['facts_right']:.0f}" for r in models)
        rows.append([str(seed), *rates, facts, " / ".join(f"{_cut(r):.0f}" for r in models)])
    models = "SFT / DPO / ORPO"
    header = ["seed", "ORPO vs DPO, %", "the same, a cut answer loses", f"fact right, {models}, %"]
    return table([*header, f"cut off at {records[0]['max_new_tokens']} tokens, {models}, %"], rows)


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
    slow, slow_similar = winrates.read(winrates.SLOW_RESULTS), winrates.read(diversity.SLOW_RESULTS)
    records, similar = winrates.read(), winrates.read(diversity.RESULTS)
    PAGE.write_text(with_blocks(PAGE.read_text(), blocks(records, similar, slow, slow_similar)))
    draw(records, PICTURE)


if __name__ == "__main__":
    main()
