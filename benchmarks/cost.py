"""Counted cost of the ORPO loss, ours and others', and a roofline MODEL of it at real sizes. No time is measured here.

    python -m benchmarks.cost                            count, check, print the tables
    python -m benchmarks.cost --csv cost.csv --plot cost.png

1. Counted. Each implementation runs forward and backward on the same small inputs in the interpreter (meter.py):
   FLOPs, bytes of distinct addresses, atomics, peak memory. Every position of every sequence counts, so that what
   ours leaves out (padding, the rejected prompt) is no part of the comparison.
2. Checked. Ours against closed formulas: FLOPs exactly, bytes loaded and stored by the kernels within 10 %.
3. Extrapolated. Each kernel's and operation's FLOPs and bytes are fitted over several small sizes by the products of
   rows, vocabulary and hidden size that they are made of (roofline.py), evaluated at real sizes, and turned into time:
   sum over operations of max(FLOPs / peak, bytes / bandwidth). A bound, from the vendors' peak numbers: real kernels
   reach a part of it, and not all the same part.
"""

from __future__ import annotations

import os

# Both are read when the kernels are imported.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import argparse
import csv
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from orpo_kernels import bins, configs, matmul, triton_backend, triton_strip_backend

from orpo import odds_ratio_loss, orpo_loss
from tests.kernelcheck import interpreter

from .meter import Meter
from .roofline import ACCELERATORS, BYTES, LABEL, Fit, Size, fit

DTYPE, ITEM = torch.bfloat16, BYTES
# Vocabulary, hidden size.
MODELS = {
    "Llama-3-8B": (128256, 4096),
    "Qwen2.5-0.5B": (151936, 896),
    "Qwen2.5-7B": (152064, 3584),
    "Gemma-2-2B": (256000, 2304),
    "Mistral-7B-v0.3": (32768, 4096),
    "Phi-2": (51200, 2560),
    "OPT-1.3B": (50272, 2048),
}


# Whole tiles for every implementation, and enough different sizes and numbers of strips to tell the products apart.
SMALL = [
    Size(N, V, D, N * width * ITEM)
    for N, V, D, width in (
        (256, 512, 128, 256),
        (256, 1024, 128, 256),
        (512, 512, 128, 512),
        (256, 512, 256, 128),
        (512, 768, 256, 384),
        (256, 768, 256, 256),
        (256, 768, 128, 384),
    )
]
# The tile that an A100 gets: in the interpreter time goes with the number of tiles, not with their size.
TILE = configs.matmul_config_for(DTYPE, is_amd=False, major=8)


def ours(hidden, weight, labels, size: Size, budget: int = 0) -> torch.Tensor:
    """`orpo_loss` with the Triton kernels."""
    options = dict(logits_budget=budget, strip_bytes=size.strip_bytes, backend="triton")
    return orpo_loss(hidden, weight, labels, shift=False, **options).loss


def ours_bins(hidden, weight, labels, size: Size) -> torch.Tensor:
    """`orpo_loss` with a budget that holds all logits: nothing is computed twice."""
    return ours(hidden, weight, labels, size, budget=2**40)


def eager(hidden, weight, labels, size: Size) -> torch.Tensor:
    """Full logits, as TRL computes them."""
    logits = hidden @ weight.T
    pairs = hidden.shape[0] // 2
    logps = torch.gather(logits.log_softmax(-1), 2, labels[:, :, None])[:, :, 0].mean(1)
    nll = F.cross_entropy(logits[:pairs].flatten(0, 1), labels[:pairs].flatten())
    return nll - odds_ratio_loss(logps[:pairs], logps[pairs:])[0].mean()


def liger(hidden, weight, labels, size: Size) -> torch.Tensor:
    """LigerFusedLinearORPOLoss; `chunk_size=1` as it ships."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    return LigerFusedLinearORPOLoss(compiled=False)(weight, hidden, labels, nll_target=labels)[0]


def cce(hidden, weight, labels, size: Size) -> torch.Tensor:
    """Cut Cross Entropy for the log-probabilities, ORPO in torch on top."""
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(hidden, weight, labels, impl="cce", reduction="none").float()
    logps, pairs = -losses.mean(1), hidden.shape[0] // 2
    return -logps[:pairs].mean() - odds_ratio_loss(logps[:pairs], logps[pairs:])[0].mean()


IMPLEMENTATIONS: dict[str, tuple[Callable, str | None]] = {
    "ours, strips": (ours, None),
    "ours, bins": (ours_bins, None),
    "CCE": (cce, "cut_cross_entropy"),
    "Liger": (liger, "liger_kernel"),
    "eager": (eager, None),
}


@torch.library.custom_op("cost::mm_wide", mutates_args=())
def mm_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32: what `torch.mm(..., out_dtype=torch.float32)` is on a GPU, one pass over narrow operands."""
    return torch.mm(a.float(), b.float())


def _gpu_matmul(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.mm(a, b) if a.dtype == dtype else mm_wide(a, b)


def inputs(size: Size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden (2P, T, D), weight (V, D), labels (2P, T) with 2P T = N, all positions counting."""
    generator = torch.Generator().manual_seed(0)
    sequences = 4
    hidden = torch.randn(sequences, size.N // sequences, size.D, generator=generator).to(DTYPE)
    weight = (torch.randn(size.V, size.D, generator=generator) * size.D**-0.5).to(DTYPE)
    labels = torch.randint(0, size.V, hidden.shape[:2], generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def count(implementation: Callable, size: Size) -> Meter:
    """One forward and backward, counted."""
    hidden, weight, labels = inputs(size)
    with (
        mock.patch.object(configs, "matmul_config", lambda x_ND, weight_VD: TILE),
        # Without these, what is counted is the way round that a CPU needs to the same product.
        mock.patch.object(matmul, "matmul", _gpu_matmul),
        mock.patch.object(bins, "matmul", _gpu_matmul),
        mock.patch.object(triton_backend, "raw_logits", lambda x_ND, weight_VD: mm_wide(x_ND, weight_VD.T)),
        mock.patch.object(triton_strip_backend, "raw_logits", lambda x_ND, weight_VD: mm_wide(x_ND, weight_VD.T)),
        Meter() as meter,
    ):
        implementation(hidden, weight, labels, size).backward()
    return meter


def check_ours(meter: Meter, size: Size) -> None:
    """Raise `AssertionError` unless the strips' FLOPs are 8 N V D and the kernels' bytes are those of their tiles."""
    product = size.N * size.V * size.D
    flops = meter.total()["flops"]
    assert flops == 8 * product, f"{flops} FLOPs counted, 8 N V D = {8 * product} expected at {size}"
    # Each tile of logits reads its rows of x and of W once.
    tiles = size.N // TILE.block_n * (size.V // TILE.block_v)
    read = tiles * (TILE.block_n + TILE.block_v) * size.D * ITEM
    expected = {"logit_stats_kernel": read, "logit_grad_kernel": read + size.N * size.V * ITEM}
    for kernel, formula in expected.items():
        counted = meter.counts[kernel]["loaded"] + meter.counts[kernel]["stored"]
        assert abs(counted - formula) <= 0.1 * formula, (
            f"{kernel}: {counted} bytes counted, {formula} expected at {size}"
        )


def counted_table(meters: dict[str, list[Meter]]) -> list[list[str]]:
    """One line an implementation at the last small size."""
    size = SMALL[-1]
    lines = [
        ["implementation", "FLOPs / NVD", "bytes loaded", "bytes stored", "distinct bytes", "atomics", "peak bytes"]
    ]
    for name, (*_, meter) in meters.items():
        total: Counter = meter.total()
        numbers = [total[key] for key in ("loaded", "stored", "distinct", "atomics")] + [meter.peak_bytes]
        lines.append([name, f"{total['flops'] / (size.N * size.V * size.D):.2f}", *(f"{n:,}" for n in numbers)])
    return lines


def model_table(fits: dict[str, Fit], rows: int) -> list[list[str]]:
    """Milliseconds on each accelerator and MiB for each model and implementation."""
    lines = [["model", "implementation", *(f"{card} ms" for card in ACCELERATORS), "peak MiB"]]
    for model, (v, d) in MODELS.items():
        for name, fitted in fits.items():
            size = Size(rows, v, d)
            times = [f"{1e3 * fitted.seconds(size, card):.2f}" for card in ACCELERATORS.values()]
            lines.append([model, name, *times, f"{fitted.peak_bytes(size) / 2**20:,.0f}"])
    return lines


def plot(fits: dict[str, Fit], path: str) -> None:
    """Time model on an H100 and memory, against the vocabulary and against the rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    vocabularies, rows = [2**k for k in range(14, 19)], [2**k for k in range(9, 16)]
    sweeps = {
        "vocabulary (8192 rows, hidden size 4096)": (vocabularies, [Size(8192, v, 4096) for v in vocabularies]),
        "rows (vocabulary 128256, hidden size 4096)": (rows, [Size(n, 128256, 4096) for n in rows]),
    }
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex="col")
    for column, (label, (x, sizes)) in enumerate(sweeps.items()):
        for name, fitted in fits.items():
            times = [1e3 * fitted.seconds(size, ACCELERATORS["H100"]) for size in sizes]
            axes[0, column].plot(x, times, marker="o", label=name)
            axes[1, column].plot(x, [fitted.peak_bytes(size) / 2**30 for size in sizes], marker="o", label=name)
        axes[1, column].set_xlabel(label)
        for axis in axes[:, column]:
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("forward and backward on H100, ms (model)")
    axes[1, 0].set_ylabel("peak memory beyond the inputs, GiB (extrapolated)")
    axes[0, 0].legend()
    figure.suptitle(f"ORPO loss in bfloat16: {LABEL}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _print(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="N of the model table")
    parser.add_argument("--csv", help="write the model table there")
    parser.add_argument("--plot", help="write a plot there")
    options = parser.parse_args(arguments)
    interpreter.install()
    interpreter.install_driver()
    interpreter.install_libdevice()

    meters: dict[str, list[Meter]] = {}
    for name, (implementation, package) in IMPLEMENTATIONS.items():
        if package and importlib.util.find_spec(package) is None:
            print(f"{name}: left out, {package} is not installed")
            continue
        meters[name] = [count(implementation, size) for size in SMALL]
    for meter, size in zip(meters["ours, strips"], SMALL, strict=True):
        check_ours(meter, size)
    size = SMALL[-1]
    print(f"counted at N {size.N}, V {size.V}, D {size.D}, {size.strips} strips, bfloat16, forward and backward:")
    _print(counted_table(meters))
    fits = {name: fit(counted, SMALL) for name, counted in meters.items()}
    print(f"\n{options.rows} rows, forward and backward: {LABEL}")
    table = model_table(fits, options.rows)
    _print(table)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            csv.writer(file).writerows([["# " + LABEL], *table])
    if options.plot:
        plot(fits, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
