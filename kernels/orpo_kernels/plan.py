"""Which way a call goes over rows and vocabulary, decided once, from sizes, dtypes and settings alone.

Operators, the shapes that they tell a compiler, and their FLOP counts ask the same `Plan`. Costs in units of N*V*D
FLOPs, a plain forward and backward being 6:

    no gradient wanted                                                           2     one strip alive
    STRIPS        forward keeps nothing, backward recomputes                     2+6   one strip alive (`strip_bytes`)
    EXPONENTIALS  Triton keeps those of the first C columns, of which
                  backward recomputes no logit (kept.py)                         2+4   `logits_budget`, one strip
    TILES         torch makes gradients while their tile is alive (bins.py)      6     `logits_budget`

A frozen head has no backward: dX is made in the forward, at 2 less. In torch no logit is looked at twice, since dX
follows the running maximum (RUNNING); Triton goes block of rows by block, each with its own exponentials (BLOCKS).
Where other ranks have other columns, V are this rank's, and there are neither TILES nor BLOCKS.

Letters: N kept rows, D hidden size, V vocabulary, C kept columns.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from orpo_kernels.cpu import logits as cpu_logits
from orpo_kernels.head import Needs
from orpo_kernels.kept import TILE

BACKENDS = ("torch", "triton")
_MODULES = {"torch": "cpu.stages", "triton": "gpu.stages"}

# Bytes kept between the logits and their gradient, by default.
CPU_LOGITS_BUDGET = 512 * 2**20
LOGITS_BUDGET = 2**30
# One strip of logits, the largest thing that STRIPS ever holds. A GPU fills its multiprocessors with wide strips; a
# CPU's matmuls are as fast on narrow ones, which its caches hold for longer.
CPU_STRIP_BYTES = 32 * 2**20
STRIP_BYTES = 128 * 2**20
# Kept columns end where a tile of stage 1 does, so that none is computed for a few columns.
_STEP = 256
# The least part of the exponentials that is worth to be kept: one in so many.
_SHARE = 8
# Rows that a budget has to hold for BLOCKS: each block reads the whole head.
_BLOCK_ROWS = 1024


class Way(enum.Enum):
    """The ways of the table above, in its order."""

    STRIPS = enum.auto()
    EXPONENTIALS = enum.auto()
    TILES = enum.auto()
    RUNNING = enum.auto()
    BLOCKS = enum.auto()


@dataclass(frozen=True)
class Plan:
    """One call's way, and its numbers.

    Attributes:
        backend: of `BACKENDS`.
        needs: the gradients that are wanted; without one the rows go the same way, and their loss has the same bits.
        rows, vocabulary: N and V.
        strip_bytes: bytes of one strip of logits.
        tile_rows: rows of which TILES may hold the logits.
        columns: C, of which EXPONENTIALS and BLOCKS keep exponentials.
        row_tiles: tiles of TILE columns of one row that their buffers have room for.
        block: rows of one of the BLOCKS.
    """

    way: Way
    backend: str
    needs: Needs
    rows: int
    vocabulary: int
    strip_bytes: int
    tile_rows: int = 0
    columns: int = 0
    row_tiles: int = 0
    block: int = 0

    @property
    def recomputes(self) -> bool:
        """Whether backward has gradients to compute: the head wants one, and no tiles were alive to make it of."""
        return self.needs.head and self.way != Way.TILES

    @property
    def stages(self) -> ModuleType:
        """The module with stages 1 to 3; triton is imported here at the earliest."""
        return importlib.import_module(f"orpo_kernels.{_MODULES[self.backend]}")

    def forward_flops(self, hidden_size: int) -> int:
        """FLOPs of the forward's matmuls."""
        needs, v = self.needs, self.vocabulary
        products = v
        if self.way == Way.TILES and needs.any:
            products = v * (1 + needs.hidden + needs.weight)
        elif needs.frozen and needs.hidden:
            products = 2 * v if self.way == Way.RUNNING else 3 * v - self.columns
        return 2 * self.rows * hidden_size * products

    def backward_flops(self, hidden_size: int) -> int:
        """FLOPs of the backward's matmuls, where it `recomputes`."""
        products = self.vocabulary * (1 + self.needs.hidden + self.needs.weight) - self.columns
        return 2 * self.rows * hidden_size * products if self.recomputes else 0


def make_plan(
    x: Tensor,
    weight_VD: Tensor,
    rows: int,
    needs: Needs,
    logits_budget: int | None,
    strip_bytes: int | None,
    backend: str,
    has_pairs: bool = True,
    is_shard: bool = False,
) -> Plan:
    """The plan for so many rows; of the tensors only the dtypes, the device and the vocabulary are read.

    Args:
        logits_budget, strip_bytes: as in `LossSettings`; None: the device's default.
        has_pairs: the rows are those of whole pairs, whose loss the forward computes; TILES need its gradients there,
            each tile before the next one, and no other rank's sums.
        is_shard: other ranks have other columns. Neither TILES nor BLOCKS then: how many there are depends on the
            columns that a rank has, and each would wait for the statistics of the others.
    """
    device, v = x.device.type, weight_VD.shape[0]
    if strip_bytes is None:
        strip_bytes = CPU_STRIP_BYTES if device == "cpu" else STRIP_BYTES

    def plan(way: Way, **numbers: int) -> Plan:
        return Plan(way, backend, needs, rows, v, strip_bytes, **numbers)

    if backend == "torch":
        if logits_budget is None:
            # TILES save the head's gradient a second computation of the logits. A frozen head has none.
            logits_budget = CPU_LOGITS_BUDGET if device == "cpu" and not needs.frozen else 0
        tile_rows = logits_budget // (v * cpu_logits.compute_dtype(x.dtype, weight_VD.dtype).itemsize)
        if has_pairs and tile_rows > 0 and not is_shard:
            return plan(Way.TILES, tile_rows=tile_rows)
        return plan(Way.RUNNING if needs.frozen else Way.STRIPS)

    budget = LOGITS_BUDGET if logits_budget is None else logits_budget
    element_bytes = torch.promote_types(x.dtype, weight_VD.dtype).itemsize
    if needs.frozen and budget and not is_shard and (block := block_rows(rows, v, element_bytes, budget)):
        return plan(Way.BLOCKS, columns=v, row_tiles=block * -(-v // TILE), block=block)
    # Without a look at the rows: a compiler may not know how many they are.
    row_tiles = row_tiles_within(rows, v, element_bytes, budget) if budget else 0
    if not row_tiles:
        return plan(Way.STRIPS)
    return plan(Way.EXPONENTIALS, columns=kept_columns(rows, v, row_tiles), row_tiles=row_tiles)


def row_tiles_within(rows: int, vocabulary: int, element_bytes: int, budget: int) -> int:
    """Tiles of one row each for which buffers are made: what `budget` bytes hold, at most all of the rows'.

    0 where they hold less than an eighth, which saves less than what it takes to store them, or no step of columns.
    """
    held, whole = budget // (TILE * element_bytes + 4), rows * -(-vocabulary // TILE)
    enough = _SHARE * held >= whole and kept_columns(rows, vocabulary, held) > 0
    return min(held, whole) if enough else 0


def kept_columns(rows: int, vocabulary: int, row_tiles: int) -> int:
    """Columns of which `rows` rows fit into so many row tiles: whole steps of 256, or the whole vocabulary."""
    columns = row_tiles // max(1, rows) * TILE
    return vocabulary if columns >= vocabulary else columns // _STEP * _STEP


def block_rows(rows: int, vocabulary: int, element_bytes: int, budget: int) -> int:
    """Rows of a block whose exponentials `budget` bytes hold over the whole vocabulary; blocks are about even.

    0 where there are no rows, or the budget holds less than 1024 and not all of them.
    """
    held = budget // (-(-vocabulary // TILE) * (TILE * element_bytes + 4))
    if rows == 0 or held < min(rows, _BLOCK_ROWS):
        return 0
    even = -(-rows // -(-rows // held))
    # Whole tiles of a matrix instruction, where that does not take more than there is room for.
    return min(held, rows, -(-even // 16) * 16)


# The choice depends on the machine and on what never changes between calls, so torch.compile may take it as a constant.
@torch.compiler.assume_constant_result
def choose_backend(name: str | None, device: str, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> str:
    """The backend to run on a device of type `device`: Triton on an accelerator, torch on a CPU, or what is asked for.

    Raises:
        ValueError: `name` is not a backend's, or Triton was asked for where it cannot run.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend has to be one of {', '.join(BACKENDS)} or None, got {name!r}")
    float64 = torch.float64 in (hidden_dtype, weight_dtype)
    if name is None:
        return "torch" if device == "cpu" or float64 or importlib.util.find_spec("triton") is None else "triton"
    if name != "torch" and float64:
        raise ValueError(f"backend={name!r} does not compute in torch.float64: use backend='torch'")
    if name != "torch" and device == "cpu" and not _triton_takes_cpu_tensors():
        raise ValueError(
            f"backend={name!r} cannot run on CPU tensors: move them to a GPU, set TRITON_INTERPRET=1 before the first "
            "import of triton to interpret the kernels (its interpreter gets bfloat16 wrong), or use backend='torch'"
        )
    return name


def _triton_takes_cpu_tensors() -> bool:
    if importlib.util.find_spec("triton") is None:
        raise ValueError("backend='triton' needs the package triton, which is not installed here")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    from triton.runtime import driver

    try:
        return driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:  # no driver is active on a machine without a GPU
        return False
