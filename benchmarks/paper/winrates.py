"""Tables 2 and 3, Figure 5: whose answers a reward model prefers, at temperature 1.0, in rounds.

    python -m benchmarks.paper.winrates                   the demonstration's models, seeds 0, 1 and 2
    python -m benchmarks.paper.winrates --models sft=FOLDER dpo=FOLDER orpo=FOLDER --reward FOLDER --data PAIRS

The first trains everything: SFT, DPO, ORPO and a reward model from one checkpoint each seed, PPO from SFT against that
reward model; it stores answers and rewards in results/winrates.jsonl, from which the page and Table 4
(benchmarks.paper.diversity) are made. The second compares models of one's own on the prompts of a data set.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from orpo.data.files.sources import load_pairs
from orpo.data.forms.formats import PairText, UnusableRow, pair_text
from orpo.demo.data import FRAMES
from orpo.demo.experiment import DemoSettings, load, one_thread, save
from orpo.generation import Answer, answer_tokens
from orpo.generation import load as load_policy
from orpo.model.load import load_tokenizer

from . import ppo, reward
from .policies import NAMES, DPOSettings, Policies, train_policies

RESULTS = Path(__file__).parent / "results" / "winrates.jsonl"
# The same with DPO at a learning rate of 1e-4.
SLOW_RESULTS = RESULTS.with_name("winrates_dpo_slow.jsonl")
# Tables 2 and 3 are of three rounds; Table 4 needs more answers to one prompt.
COMPARED_ROUNDS = 3
ROUNDS = 5
REWARD_LEARNING_RATE = 5e-4
MAX_NEW_TOKENS = 64  # of the demonstration's models, whose training answers have 11 to 30
QUICK = DemoSettings(warmup_steps=3, steps=3, batch_size=4, questions=24, held_out=4)
QUICK_PPO = ppo.PPOSettings(batches=2, batch_size=4, mini_batch_size=2, epochs=1, max_new_tokens=8)


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Percentage of prompts at which the first reward is the higher one; equal ones count half."""
    points = [(a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)]
    return 100 * statistics.fmean(points)


def win_rates(
    records: Sequence[dict], ours: str, theirs: str, cut_loses: bool = False
) -> dict[int, tuple[float, float]]:
    """By seed: mean win rate over the first rounds, and its standard deviation from round to round (n - 1).

    With `cut_loses`, an answer that was cut off loses whatever its reward; two of them draw.
    """
    found = {(r["seed"], r["model"]): _rewards(r, cut_loses) for r in records}
    rates = {}
    for seed in sorted({seed for seed, _ in found}):
        pairs = zip(found[seed, ours][:COMPARED_ROUNDS], found[seed, theirs][:COMPARED_ROUNDS], strict=True)
        rounds = [win_rate(a, b) for a, b in pairs]
        rates[seed] = statistics.fmean(rounds), statistics.stdev(rounds) if len(rounds) > 1 else 0.0
    return rates


def _rewards(record: dict, cut_loses: bool) -> list[list[float]]:
    if not cut_loses:
        return record["rewards"]
    rounds = zip(record["rewards"], record["cut"], strict=True)
    return [[-math.inf if c else x for x, c in zip(xs, cuts, strict=True)] for xs, cuts in rounds]


def manner(answer: str) -> float | None:
    """From 0 (rude) to 5 (warm): what the demonstration's own phrases say of an answer, without any reward model.

    The mean of its opening and its closing where they differ; None where neither is one of the shop's phrases.
    """
    text, levels = answer.strip(), []
    for level, (openings, closings) in enumerate(FRAMES.values()):
        levels += [level] * text.startswith(openings) + [level] * text.endswith(closings)
    return statistics.fmean(levels) if levels else None


def prompt_ids(pair: PairText, tokenizer: Any) -> list[int]:
    """The tokens of a prompt as in training: BOS in front of a plain one; a chat template brings its own, or none."""
    ids, bos = tokenizer(pair.chosen_prompt, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    return ids if pair.templated or bos is None or ids[:1] == [bos] else [bos, *ids]


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], rounds: int, **settings: Any
) -> list[list[Answer]]:
    """`rounds` lists of answers at temperature 1.0, each in the order of the prompts, which are tokens already."""
    return [answer_tokens(model, tokenizer, prompts, temperature=1.0, seed=i, **settings) for i in range(rounds)]


def judged_texts(tokenizer: Any, prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[str]]:
    """:func:`sample`'s answers behind their prompts, each with an end token, those too that were cut off."""
    return [
        [reward.ended(prompt + answer, tokenizer) for prompt, answer in zip(prompts, answered, strict=True)]
        for answered in answers
    ]


def judge(model: Any, tokenizer: Any, texts: list[list[str]], max_length: int = 1024) -> list[list[float]]:
    """The rewards of :func:`judged_texts`, to four decimals. Of longer texts the last `max_length` tokens are read."""
    scores = (reward.score(model, tokenizer, row, max_length=max_length) for row in texts)
    return [[round(x, 4) for x in row.tolist()] for row in scores]


def cut_marks(answers: Sequence[Sequence[Answer]], limit: int) -> dict[str, Any]:
    """What a record says of its answers' ends: 1 for each that reached `limit` tokens without an end token."""
    return {
        "max_new_tokens": limit,
        "cut": [[int(answer.cut) for answer in answered] for answered in answers],
        "cut_counted_by": "end token",
    }


def prompts_of(rows: Sequence[dict], tokenizer: Any) -> dict[str, list[int]]:
    """The different prompts of the demonstration's rows, and their tokens as in training."""
    return {row["prompt"]: prompt_ids(pair_text(row, tokenizer), tokenizer) for row in rows}


def train_ppo(policies: Policies, judge_model: Any, settings: ppo.PPOSettings, seed: int) -> list[dict]:
    """Saves in its folder what PPO makes of SFT on the training prompts. Returns the history (:func:`ppo.train`)."""
    model, prompts = load(policies.folders["sft"]), prompts_of(policies.train, policies.tokenizer)
    score = ppo.judged_by(judge_model, policies.tokenizer, [*prompts])
    history = ppo.train(model, policies.tokenizer, [*prompts.values()], score, settings, seed)
    save(model, policies.tokenizer, policies.folders["ppo"])
    return [{name: round(x, 4) for name, x in line.items()} for line in history]


def run_seed(
    seed: int, folder: Path, settings: DemoSettings, dpo: DPOSettings, rounds: int, rlhf: ppo.PPOSettings
) -> list[dict]:
    """Trains, samples and judges; one record a model."""
    policies = train_policies(folder / f"seed-{seed}", seed, settings, dpo)
    tokenizer = policies.tokenizer
    judge_model = reward.load_reward(str(policies.folders["before"]), tokenizer, seed)
    train, heldout = (reward.pair_texts(rows, tokenizer) for rows in (policies.train, policies.heldout))
    reward.fit(judge_model, tokenizer, train, learning_rate=REWARD_LEARNING_RATE, seed=seed)
    share = reward.accuracy(judge_model, tokenizer, heldout)
    history = train_ppo(policies, judge_model, rlhf, seed)
    facts = {row["prompt"]: row["fact"] for row in policies.heldout}
    prompts = prompts_of(policies.heldout, tokenizer)
    records = []
    for name in NAMES:
        model = load(policies.folders[name])
        answers = sample(model, tokenizer, [*prompts.values()], rounds, max_new_tokens=MAX_NEW_TOKENS, batch_size=64)
        manners = [m for answered in answers for m in map(manner, answered) if m is not None]
        right = [f in a for answered in answers for f, a in zip(facts.values(), answered, strict=True)]
        records.append(
            {
                "seed": seed,
                "model": name,
                "reward_accuracy": round(share, 4),
                "heldout_pairs": len(heldout),
                "manner": round(statistics.fmean(manners), 3) if manners else None,
                "without_manner": len(answers) * len(facts) - len(manners),
                "facts_right": round(statistics.fmean(right), 4),
                "torch": torch.__version__,
                **({"ppo": asdict(rlhf), "history": history} if name == "ppo" else {}),
                **cut_marks(answers, MAX_NEW_TOKENS),
                "rewards": judge(judge_model, tokenizer, judged_texts(tokenizer, [*facts], answers)),
                "answers": answers,
            }
        )
    return records


def read(path: Path = RESULTS) -> list[dict]:
    """The stored records; [] where nothing is stored."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []


def store(records: Sequence[dict], path: Path) -> None:
    """Adds `records`, which take the places of older ones of their seeds."""
    seeds = {record["seed"] for record in records}
    kept = [record for record in read(path) if record["seed"] not in seeds]
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(sorted([*kept, *records], key=lambda record: (record["seed"], NAMES.index(record["model"]))), path)


def _write(records: Sequence[dict], path: Path) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def show(records: Sequence[dict], ours: str = "orpo") -> str:
    """One line a comparison and seed."""
    lines = []
    for theirs in dict.fromkeys(r["model"] for r in records if r["model"] != ours):
        for seed, (mean, spread) in win_rates(records, ours, theirs).items():
            lines.append(f"seed {seed}: {ours} over {theirs} {mean:.1f} % ({spread:.2f})")
    return "\n".join(lines)


def usable_rows(rows: Iterable[dict], tokenizer: Any, most: int) -> list[tuple[dict, str]]:
    """The rows that can train and have a prompt of at most `most` tokens, each with that prompt's text.

    Raises:
        ValueError: there are none.
    """
    found = []
    for row in rows:
        try:
            prompt = pair_text(row, tokenizer).chosen_prompt
        except UnusableRow:
            continue
        if prompt and len(reward.token_ids(prompt, tokenizer)) <= most:
            found.append((row, prompt))
    if not found:
        raise ValueError(f"the data has no prompt of 1 to {most:,} tokens")
    return found


def compare_own(options: argparse.Namespace) -> list[dict]:
    """Records of models of the user's own, at the prompts of a data set.

    Each model reads a prompt in its own chat template, the reward model in the one it was trained with.
    """
    tokenizer = load_tokenizer(options.reward)
    judge_model = reward.load_reward(options.reward, tokenizer)
    asked = usable_rows(load_pairs(options.data, options.split), tokenizer, options.max_prompt_length)
    rows, judged = zip(*asked, strict=True)
    records = []
    for entry in options.models:
        name, _, folder = entry.partition("=")
        model, own = load_policy(folder)
        prompts = [prompt_ids(pair_text(row, own), own) for row in rows]
        settings = {name: getattr(options, name) for name in ("max_new_tokens", "batch_size")}
        answers = sample(model, own, prompts, options.rounds, **settings)
        texts = judged_texts(tokenizer, judged, answers)
        scores = judge(judge_model.to(model.device), tokenizer, texts, options.max_length)
        longer = reward.longer([text for row in texts for text in row], tokenizer, options.max_length)
        ends = {**cut_marks(answers, options.max_new_tokens), "max_length": options.max_length, "longer": longer}
        records.append({"seed": 0, "model": name, **ends, "rewards": scores, "answers": answers})
        count = len(rows) * options.rounds
        print(
            f"{name}: {sum(map(sum, ends['cut']))} of {count} answers reached --max_new_tokens "
            f"({options.max_new_tokens}); the judge read the last {options.max_length} tokens (--max_length) of "
            f"{longer} texts that are longer"
        )
        del model
    return records


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("out/paper"), help="for the trained models")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dpo_learning_rate", type=float, default=DPOSettings.learning_rate)
    parser.add_argument("--quick", action="store_true", help="a few steps and prompts: that everything runs")
    parser.add_argument("--models", nargs="+", metavar="NAME=FOLDER", help="models of one's own; one named orpo")
    parser.add_argument("--reward", help="with --models: the reward model's folder")
    parser.add_argument("--data", help="with --models: pairs whose prompts are answered")
    parser.add_argument("--split", default="test", help="of --data")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="with --models")
    parser.add_argument("--max_prompt_length", type=int, default=1024, help="with --models: longer ones are left out")
    parser.add_argument("--max_length", type=int, default=1024, help="with --models: most tokens that the judge reads")
    parser.add_argument("--batch_size", type=int, default=64, help="with --models: answers sampled at a time")
    options = parser.parse_args(argv)
    if options.models:
        if options.reward is None or options.data is None or options.output == RESULTS:
            parser.error("--models needs --reward, --data and an --output of its own")
        if any("=" not in entry for entry in options.models) or "orpo" not in [m.split("=")[0] for m in options.models]:
            parser.error(f"--models is {options.models}; it takes NAME=FOLDER each, and one NAME has to be orpo")
        records = compare_own(options)
        _write(records, options.output)
        print(show(records))
        return
    if options.quick and options.output == RESULTS:
        parser.error("--quick needs an --output of its own: what it measures is no result")
    settings, dpo, rlhf = DemoSettings(), DPOSettings(learning_rate=options.dpo_learning_rate), ppo.PPOSettings()
    if options.quick:
        settings, dpo, rlhf = QUICK, replace(dpo, steps=QUICK.steps, batch_size=QUICK.batch_size), QUICK_PPO
    with one_thread(torch.device("cpu")):
        for seed in options.seeds:
            records = run_seed(seed, options.folder, settings, dpo, options.rounds, rlhf)
            store(records, options.output)
            print(f"seed {seed}: reward model right on {records[0]['reward_accuracy']:.3f} of the held-out pairs")
            print(show(records), flush=True)


if __name__ == "__main__":
    main()
