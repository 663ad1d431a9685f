"""Counted cost of the ORPO loss, ours and others', and a roofline MODEL of it at real sizes. No time is measured here.

    python -m benchmarks.cost                            count, check, print the tables
    python -m benchmarks.cost --csv cost.csv --plot cost.png
    python -m benchmarks.cost --store                    for benchmarks/results, from which report.py writes the page

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
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from orpo_kernels import configs, fused, matmul, schedule, triton_strip_backend

from orpo import odds_ratio_loss, orpo_loss
from tests.kernelcheck import interpreter

from . import cost_pages, results
from .measure import stamp
from .meter import Meter
from .roofline import BYTES, LABEL, Size, fit

DTYPE, ITEM = torch.bfloat16, BYTES
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
TILE = configs.MatmulConfig(128, 128, 64, num_warps=8, num_stages=3)


def ours(hidden, weight, labels, size: Size, budget: int = 0, backend: str = "triton-fused") -> torch.Tensor:
    """`orpo_loss` with the Triton kernels, logits kept on the chip."""
    options = dict(logits_budget=budget, strip_bytes=size.strip_bytes, backend=backend)
    return orpo_loss(hidden, weight, labels, shift=False, **options).loss


def ours_kept(hidden, weight, labels, size: Size) -> torch.Tensor:
    """`orpo_loss` with a budget that keeps all exponentials: nothing is computed twice."""
    return ours(hidden, weight, labels, size, budget=2**40)


def ours_library(hidden, weight, labels, size: Size) -> torch.Tensor:
    """`orpo_loss` with the library's matmul in front of the kernels."""
    return ours(hidden, weight, labels, size, backend="triton-strip")


def eager(hidden, weight, labels, size: Size) -> torch.Tensor:
    """Full logits, as TRL computes them."""
    logits = hidden @ weight.T
    pairs = hidden.shape[0] // 2
    logps = torch.gather(logits.log_softmax(-1), 2, labels[:, :, None])[:, :, 0].mean(1)
    nll = F.cross_entropy(logits[:pairs].flatten(0, 1), labels[:pairs].flatten())
    return nll - odds_ratio_loss(logps[:pairs], logps[pairs:])[0].mean()


def liger(hidden, weight, labels, size: Size) -> torch.Tensor:
    """LigerFusedLinearORPOLoss; `chunk_size=1` as it ships, but not compiled: what is compiled cannot be counted."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    return LigerFusedLinearORPOLoss(compiled=False)(weight, hidden, labels, nll_target=labels)[0]


def cce(hidden, weight, labels, size: Size) -> torch.Tensor:
    """Cut Cross Entropy for the log-probabilities, ORPO in torch on top."""
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(hidden, weight, labels, impl="cce", reduction="none").float()
    logps, pairs = -losses.mean(1), hidden.shape[0] // 2
    return -logps[:pairs].mean() - odds_ratio_loss(logps[:pairs], logps[pairs:])[0].mean()


IMPLEMENTATIONS: dict[str, tuple[Callable, str | None]] = {
    "ours, strips, fused": (ours, None),
    "ours, strips, library's matmul": (ours_library, None),
    "ours, all kept": (ours_kept, None),
    "CCE": (cce, "cut_cross_entropy"),
    "Liger": (liger, "liger_kernel"),
    "eager": (eager, None),
}


def sizes_of(name: str) -> list[Size]:
    """The small sizes, in strips of the same widths whatever a logit of them takes."""
    if name != "ours, strips, library's matmul":
        return SMALL
    item = triton_strip_backend.strip_element_bytes(DTYPE, DTYPE)
    return [replace(s, strip_bytes=s.strip_bytes // ITEM * item, element_bytes=item) for s in SMALL]


@torch.library.custom_op("cost::mm_wide", mutates_args=())
def mm_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32: what `torch.mm(..., out_dtype=torch.float32)` is on a GPU, one pass over narrow operands."""
    return torch.mm(a.float(), b.float())


@torch.library.custom_op("cost::addmm_wide_", mutates_args=("accumulator",))
def addmm_wide_(accumulator: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """accumulator += a @ b in float32: on a GPU the product's own kernel adds."""
    accumulator.addmm_(a.float(), b.float())


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
        mock.patch.object(configs, "matmul_candidates", lambda *_, **__: (TILE,)),
        # Without these, what is counted is the way round that a CPU needs to the same product.
        mock.patch.object(matmul, "matmul", _gpu_matmul),
        mock.patch.object(schedule, "add_matmul", addmm_wide_),
        # Of the metrics' two rows, whose 2 / V of a unit the formulas leave out: its bytes alone.
        mock.patch.object(fused, "widened_matmul", lambda a, b, dtype: (a.to(b.dtype) @ b).to(dtype)),
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


def record(name: str, meters: list[Meter], sizes: list[Size]) -> dict:
    """What is stored of one implementation: its counts at the last size, and its fit."""
    fitted, size, total = fit(meters, sizes), sizes[-1], meters[-1].total()
    return dict(
        kind="count",
        peer=name,
        dtype="bfloat16",
        N=size.N,
        V=size.V,
        D=size.D,
        strips=size.strips,
        **{key: int(total[key]) for key in ("flops", "loaded", "stored", "distinct", "atomics")},
        peak_bytes=int(meters[-1].peak_bytes),
        element_bytes=fitted.element_bytes,
        fit_flops=fitted.flops,
        fit_traffic={key: [float(f"{v:.9g}") for v in values] for key, values in fitted.traffic.items()},
        fit_memory=[float(f"{v:.9g}") for v in fitted.memory],
    )


def check_library(meter: Meter, size: Size) -> None:
    """As check_ours, for the form whose kernels sweep over strips: each logit is read twice, its gradient written."""
    product, logits = size.N * size.V * size.D, size.N * size.V
    flops = meter.total()["flops"]
    assert flops == 8 * product, f"{flops} FLOPs counted, 8 N V D = {8 * product} expected at {size}"
    for kernel, formula in (("strip_stats_kernel", 4 * logits), ("strip_grad_kernel", (4 + ITEM) * logits)):
        counted = meter.counts[kernel]["loaded"] + meter.counts[kernel]["stored"]
        assert abs(counted - formula) <= 0.1 * formula, (
            f"{kernel}: {counted} bytes counted, {formula} expected at {size}"
        )


def check_kept(meter: Meter, size: Size) -> None:
    """As check_ours, with nothing computed twice: exponentials are written once, and read once to write gradients."""
    product, logits = size.N * size.V * size.D, size.N * size.V
    flops = meter.total()["flops"]
    assert flops == 6 * product, f"{flops} FLOPs counted, 6 N V D = {6 * product} expected at {size}"
    tiles = size.N // TILE.block_n * (size.V // TILE.block_v)
    read = tiles * (TILE.block_n + TILE.block_v) * size.D * ITEM
    # A maximum is 4 bytes to 64 exponentials.
    kept = logits * ITEM + logits // 16
    for kernel, formula in (("logit_stats_kernel", read + kept), ("kept_grad_kernel", kept + logits * ITEM)):
        counted = meter.counts[kernel]["loaded"] + meter.counts[kernel]["stored"]
        assert abs(counted - formula) <= 0.1 * formula, (
            f"{kernel}: {counted} bytes counted, {formula} expected at {size}"
        )


CHECKED = {
    "ours, strips, fused": check_ours,
    "ours, strips, library's matmul": check_library,
    "ours, all kept": check_kept,
}


def _print(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=cost_pages.ROWS, help="N of the model table")
    parser.add_argument("--csv", help="write the model table there")
    parser.add_argument("--plot", help="write a plot there")
    parser.add_argument("--store", action="store_true", help="replace benchmarks/results/cost.jsonl")
    options = parser.parse_args(arguments)
    interpreter.install()
    interpreter.install_driver()
    interpreter.install_libdevice()

    records, stamped = [], stamp()
    for name, (implementation, package) in IMPLEMENTATIONS.items():
        if package and importlib.util.find_spec(package) is None:
            print(f"{name}: left out, {package} is not installed")
            continue
        sizes = sizes_of(name)
        meters = [count(implementation, size) for size in sizes]
        if name in CHECKED:
            for meter, size in zip(meters, sizes, strict=True):
                CHECKED[name](meter, size)
        records.append({**record(name, meters, sizes), **stamped})
    r = records[0]
    print(f"counted at N {r['N']}, V {r['V']}, D {r['D']}, {r['strips']} strips, bfloat16, forward and backward:")
    _print(cost_pages.counted_table(records))
    print(f"\n{options.rows} rows, forward and backward: {LABEL}")
    table = cost_pages.model_table(records, options.rows)
    _print(table)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            csv.writer(file).writerows([["# " + LABEL], *table])
    if options.plot:
        cost_pages.plot(records, options.plot)
    if options.store:
        (results.FOLDER / "cost.jsonl").unlink(missing_ok=True)
        results.append("cost", records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
