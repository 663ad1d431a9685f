"""Figure 6 and Eq. 16: log odds ratio beside log probability ratio of sampled pairs of probabilities. No training.

python -m benchmarks.paper.ratios               writes results/ratios.json and results/figure6.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from orpo_kernels import reference

from .train import RESULTS

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def sample(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """log PR and log OR of the same `count` pairs of independent uniform probabilities, float64."""
    generator = torch.Generator().manual_seed(seed)
    a_w, a_l = torch.rand(2, count, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12).log()
    return {"log PR": a_w - a_l, "log OR": reference.log_odds_ratio(a_w, a_l)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="1,000 samples")
    options = parser.parse_args(arguments)
    values = sample(1_000 if options.quick else 100_000)
    options.output.mkdir(parents=True, exist_ok=True)
    figures = {
        name: {
            "samples": len(v),
            "standard deviation": round(v.std().item(), 3),
            "quantiles": [round(q, 3) for q in v.quantile(torch.tensor(QUANTILES, dtype=v.dtype)).tolist()],
        }
        for name, v in values.items()
    }
    (options.output / "ratios.json").write_text(json.dumps(figures, indent=1) + "\n")

    from .pictures import draw_ratios

    print(json.dumps(figures), draw_ratios(values, options.output / "figure6.png"))


if __name__ == "__main__":
    main()
