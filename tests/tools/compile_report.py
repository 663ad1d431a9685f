"""Compile every shipped kernel configuration for every chip, without a GPU, and refuse what must not be shipped.

    python tests/tools/compile_report.py                          all chips
    python tests/tools/compile_report.py --chips sm_90 gfx942     some

The package's own launchers run on meta tensors of real shapes while a driver pretends to be the chip, so that the
report compiles exactly what a launch there could: specialisation, options and every tile that tuning may choose come
from the launchers, none is repeated here. It exits with status 1 where a configuration spills registers, does not fit
the chip, fails to compile, or has a `tl.dot` and no matrix instruction.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from chips import CHIPS, Chip
from disassembly import Resources, resources
from triton.runtime.jit import JITFunction

# Llama-3-8B with 8192 rows; 2880 + 8 is a hidden size that no tile divides, 50257 (GPT-2) such a vocabulary.
REAL_SHAPE = (8192, 4096, 128256)
RAGGED_SHAPE = (1000, 2888, 50257)


@dataclass(frozen=True)
class Row:
    """One line of the report; `resources` is None where the compiler refused."""

    chip: str
    case: str
    tile: str
    resources: Resources | None
    problems: tuple[str, ...]


class PretendedDriver:
    """A triton driver that knows its chip and nothing else: enough to compile for it."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip

    def get_current_target(self):
        return self.chip.target

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels by device.
        return self.chip.name

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def compiled_kernels(launch: Callable[[], Any], chip: Chip) -> list[tuple[str, Any]]:
    """(tile, compiled kernel) for all that `launch`, called on meta tensors, would launch on `chip`; none is run.

    Leaves this process with a driver that pretends to be the chip.
    """
    found: list[tuple[str, Any]] = []
    original_run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        tile = "x".join(str(kwargs[name]) for name in ("BLOCK_N", "BLOCK_V", "BLOCK_D") if name in kwargs)
        tile += " TMA" if kwargs.get("DESCRIPTORS") else ""
        tile += " keeps" if kwargs.get("KEEPS") else ""
        kernel = original_run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((tile or "-", kernel))
        return kernel

    with mock.patch.object(JITFunction, "run", compile_only):
        triton.runtime.driver.set_active(PretendedDriver(chip))
        launch()
    return found


def report(case: str, launch: Callable[[], Any], chip: Chip) -> list[Row]:
    """A row for each kernel of `launch` on `chip`."""
    try:
        compiled = compiled_kernels(launch, chip)
    except Exception as error:
        # Whatever the compiler raises is a finding about this configuration; the rest of the report still has to run.
        # A compilation error shows the source first and says what is wrong in its last line.
        reason = (str(error).strip().splitlines() or [""])[-1]
        return [Row(chip.name, case, "-", None, (f"does not compile: {type(error).__name__}: {reason}",))]
    found = [(tile, resources(kernel, chip)) for tile, kernel in compiled]
    return [Row(chip.name, case, tile, kernel, tuple(kernel.problems(chip))) for tile, kernel in found]


def shipped_launches(chip: Chip) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(case, launch) for every kernel of the package: dtypes, plain and full heads, even and ragged shapes.

    TF32 is a case of its own, where torch's setting can allow it; the kernels without a matmul do not know of it.
    """
    from orpo_kernels import kept
    from orpo_kernels.gpu import (
        hidden_rows,
        kept_grad,
        label_rows,
        logit_grad,
        logit_stats,
        mean_hidden,
        odds_ratio,
        row_checks,
        row_terms,
        tiles,
    )
    from orpo_kernels.head import Head
    from orpo_kernels.rows import Rows

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    heads = {"plain": False, "bias+softcap": True}
    shapes = {"even": REAL_SHAPE, "ragged": RAGGED_SHAPE}
    for (dtype_name, dtype), (head_name, full), (shape_name, (n, d, v)) in itertools.product(
        dtypes.items(), heads.items(), shapes.items()
    ):
        case = f"{dtype_name} {head_name} {shape_name}"
        head = Head(empty(v, d, dtype=dtype), empty(v, dtype=dtype) if full else None, 1.0, 30.0 if full else None)
        x, targets, vector = empty(n, d, dtype=dtype), empty(n, dtype=torch.int64), empty(n)
        row_scale = vector if dtype == torch.float16 else None
        grad_arguments = (targets, empty(2, n), vector, row_scale, head)
        held = kept.Kept(v, *kept.buffers(x, n * -(-v // kept.TILE), dtype))
        with_matmul = (
            lambda a=(x, targets, head): logit_stats.logit_stats(*a),
            lambda a=(x, targets, head, v, held): logit_stats.logit_stats(*a),
            lambda a=(x, *grad_arguments): logit_grad.logit_grad(*a),
        )
        for launch in with_matmul:
            yield case, launch
            if dtype == torch.float32 and not chip.is_amd:
                tf32 = mock.patch.object(tiles, "input_precision", lambda: "tf32")
                yield case.replace("fp32", "tf32"), tf32(launch)
        yield case, lambda a=(held, *grad_arguments[:-1], 0, 4096): kept_grad.kept_grad(*a)
        all_kept = replace(held, overwrite=True), *grad_arguments[:-1], 0, v
        yield case, lambda a=all_kept: kept_grad.kept_grad(*a)
        terms = vector, empty(2, n), head, dtype, vector, empty()
        yield case, lambda a=terms: row_terms.row_terms(*a)
        yield case, lambda a=(x, vector, dtype): hidden_rows.weighted(*a)
        places = empty(n, d), vector, targets, x, dtype
        yield case, lambda a=places: hidden_rows.placed(*a)
    n, pairs = REAL_SHAPE[0], 8
    flags = empty(n, dtype=torch.bool)
    rows = Rows(*(empty(n, dtype=torch.int64) for _ in range(3)), flags, flags, pairs)
    yield "rows", lambda: row_checks.flags(rows, n, REAL_SHAPE[2])
    for nll_labels in (None, empty(2 * pairs, 1024, dtype=torch.int64)):
        labels = empty(2 * pairs, 1024, dtype=torch.int64), nll_labels, -100, True
        yield "rows", lambda a=labels: label_rows.count(*a)
        yield "rows", lambda a=labels: label_rows.fill(*a, empty(2 * pairs, 4, dtype=torch.int32), n)
    yield "mean hidden state", lambda: mean_hidden.picks(empty(n, 8, dtype=torch.bfloat16), rows)
    yield "stage 2", lambda: odds_ratio.combine(empty(4, n), empty(4, n), empty(n))
    counts = {"num_nll_tokens": 5000.0, "num_pairs": float(pairs)}
    yield "stage 2", lambda: odds_ratio.objective(empty(n), rows, beta=0.1, nll_weight=1.0, **counts)


def chip_report(name: str, cases: str = "") -> list[Row]:
    """All shipped launches on one chip whose case contains `cases`."""
    from orpo_kernels.gpu import tiles

    chip = CHIPS[name]

    def matmul_candidates(
        x_ND: torch.Tensor, weight_VD: torch.Tensor, keeps: bool = False, softcap: bool = False
    ) -> Any:
        aligned = tiles.rows_aligned(x_ND, weight_VD)
        return tiles.matmul_configs(x_ND.dtype, tiles.input_precision(), aligned, chip.limits, keeps, softcap)

    def launch_all(kernel: str, candidates: tuple, x_ND: torch.Tensor, head: Any, launch: Callable) -> Any:
        for config in candidates[1:]:
            launch(config)
        return candidates[0]

    with (
        mock.patch.object(tiles, "matmul_candidates", matmul_candidates),
        mock.patch.object(tiles, "fastest", launch_all),
    ):
        return [row for case, launch in shipped_launches(chip) if cases in case for row in report(case, launch, chip)]


FIELDS = "chip kernel case tile warps stages registers spills shared blocks matrix copies".split()


def cells(row: Row) -> list[str]:
    """The row as text, in the order of FIELDS."""
    found = row.resources
    if found is None:
        return [row.chip, "-", row.case, row.tile, *["-"] * (len(FIELDS) - 4)]

    def counts(instructions: dict[str, int]) -> str:
        return " ".join(f"{name} {count}" for name, count in instructions.items()) or "-"

    numbers = (found.warps, found.stages, found.registers, found.spills, found.shared, found.blocks)
    return [row.chip, found.kernel, row.case, row.tile, *map(str, numbers), counts(found.matrix), counts(found.copies)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="default: all")
    parser.add_argument("--cases", default="", help="only those that contain this, such as ragged")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="chips compiled for at once")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it")

    with ProcessPoolExecutor(min(options.jobs, len(options.chips))) as pool:
        rows = [row for result in pool.map(partial(chip_report, cases=options.cases), options.chips) for row in result]
    print(f"triton {triton.__version__}; blocks: resident on one multiprocessor; shared: bytes a block")
    table = [FIELDS, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    failed = [row for row in rows if row.problems]
    for row in failed:
        kernel = row.resources.kernel if row.resources else "a kernel"
        print(f"FAILED {row.chip} {kernel} {row.tile} ({row.case}): {'; '.join(row.problems)}")
    print(f"{len(rows)} configurations on {len(options.chips)} chips, {len(failed)} must not be shipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
