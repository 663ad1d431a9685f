"""Every memory access of an interpreted launch, checked: inside its own tensor, and no cross-program race.

    with checked():
        kernel[grid](x, out, ...)          # raises MemoryFinding, naming kernel, tensor and programs

Bounds. The address of each active lane must be an element of the tensor whose pointer it was computed from: each
pointer block remembers its tensor, so that running off the end of one tensor into its neighbour is found, and so is a
hit in the gap between the rows of a strided view. Exact, with one limit: a pointer that was loaded from memory or
selected between two tensors has no origin, and is held against all tensors of the launch.

Races. The interpreter runs the programs of a grid one after another, so that a race gives the right answer. Here each
access is logged by address, and at the end of the launch a byte that one program stores plainly, and another program
loads, stores or updates atomically, is a race. Exact for the launch that ran: no sampling, no dependence on the order.
Storing equal values from two programs is reported too. Synchronisation through atomics (spin locks) is not modelled:
what it protects is reported.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.runtime.interpreter as triton_interpreter
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from .findings import MemoryFinding

Builder = triton_interpreter.InterpreterBuilder
LOAD, ATOMIC, STORE = 0, 1, 2
KINDS = ("load", "atomic", "store")
# Operations whose result points into the same tensor as their pointer operand.
POINTER_OPERATIONS = (
    "create_addptr",
    "create_splat",
    "create_broadcast",
    "create_expand_dims",
    "create_reshape",
    "create_trans",
    "create_bitcast",
)


@dataclass(frozen=True)
class TensorArgument:
    """A tensor passed to a launch: where its elements lie."""

    name: str
    start: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "TensorArgument":
        return cls(name, tensor.data_ptr(), tensor.element_size(), tuple(tensor.shape), tensor.stride())

    @property
    def end(self) -> int:
        if 0 in self.shape:
            return self.start
        span = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.start + (span + 1) * self.itemsize

    def contains(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Which accesses of `size` bytes at `addresses` (uint64, any shape) lie on elements of this tensor."""
        inside = (addresses >= self.start) & (addresses <= self.end - size)
        rest = np.where(inside, addresses - np.uint64(self.start), 0).astype(np.int64)
        dimensions = sorted(zip(self.strides, self.shape, strict=True), reverse=True)
        for stride, length in dimensions:
            if stride > 0 and length > 1:
                index = rest // (stride * self.itemsize)
                inside &= index < length
                rest -= index * (stride * self.itemsize)
        return inside & (rest + size <= self.itemsize)


@dataclass
class Launch:
    """One launch being checked: its tensors, and every access so far."""

    kernel: str
    check_races: bool
    tensors: list[TensorArgument] = field(default_factory=list)
    by_identity: dict[int, int] = field(default_factory=dict)
    addresses: list[np.ndarray] = field(default_factory=list)
    # One (program, kind, size) for each entry of `addresses`.
    labels: list[tuple[int, int, int]] = field(default_factory=list)

    def add_tensor(self, name: str, value: Any) -> None:
        tensor = triton_interpreter._unwrap_tensor(value.base if isinstance(value, TensorDescriptor) else value)
        if isinstance(tensor, torch.Tensor):
            self.by_identity[id(tensor)] = len(self.tensors)
            self.tensors.append(TensorArgument.of(name, tensor))

    def access(self, builder: Any, kind: int, pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        addresses = addresses.ravel()
        if addresses.size == 0:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self._check_bounds(builder.grid_idx, kind, addresses, size, pointers.attr.get("origin"))
        if self.check_races:
            self.addresses.append(np.unique(addresses))
            x, y, z = builder.grid_idx
            program = (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
            self.labels.append((program, kind, size))

    def _check_bounds(self, program: tuple, kind: int, addresses: np.ndarray, size: int, origin: int | None) -> None:
        candidates = self.tensors if origin is None else [self.tensors[origin]]
        inside = np.zeros(addresses.shape, dtype=bool)
        for tensor in candidates:
            inside |= tensor.contains(addresses, size)
        if inside.all():
            return
        first = int(addresses[inside.argmin()])
        tensor = min(candidates, key=lambda candidate: min(abs(first - candidate.start), abs(first - candidate.end)))
        raise MemoryFinding(
            f"out-of-bounds {KINDS[kind]} in {self.kernel}, program {program}: {int((~inside).sum())} lanes outside "
            f"{tensor.name} (shape {tensor.shape}, strides {tensor.strides}), the first at byte "
            f"{first - tensor.start} of it"
        )

    def check_for_races(self) -> None:
        """Raise `MemoryFinding` if two programs met at a byte that one of them stores plainly."""
        if STORE not in {kind for _, kind, _ in self.labels}:
            return
        # Accesses of different widths are compared in units of the narrowest.
        unit = min(size for _, _, size in self.labels)
        pieces, programs, kinds = [], [], []
        for addresses, (program, kind, size) in zip(self.addresses, self.labels, strict=True):
            piece = (addresses[:, None] + np.arange(0, size, unit, dtype=np.uint64)).ravel() // np.uint64(unit)
            pieces.append(piece)
            programs.append(np.full(piece.size, program))
            kinds.append(np.full(piece.size, kind, dtype=np.int8))
        address, program, kind = np.concatenate(pieces), np.concatenate(programs), np.concatenate(kinds)
        order = np.argsort(address, kind="stable")
        address, program, kind = address[order], program[order], kind[order]
        starts = np.r_[0, np.flatnonzero(np.diff(address)) + 1]
        several_programs = np.minimum.reduceat(program, starts) != np.maximum.reduceat(program, starts)
        stored = np.maximum.reduceat(kind, starts) == STORE
        races = np.flatnonzero(several_programs & stored)
        if races.size == 0:
            return
        group = slice(starts[races[0]], starts[races[0] + 1] if races[0] + 1 < starts.size else None)
        accesses = sorted(set(zip(program[group].tolist(), kind[group].tolist(), strict=True)))
        shown = ", ".join(f"program {who} {KINDS[what]}s" for who, what in accesses[:6])
        where = int(address[group.start]) * unit
        tensor = next((t for t in self.tensors if t.start <= where < t.end), None)
        place = f"byte {where - tensor.start} of {tensor.name}" if tensor else f"address {where:#x}"
        raise MemoryFinding(f"race in {self.kernel} at {races.size} places, the first {place}: {shown}")


@contextlib.contextmanager
def checked(races: bool = True) -> Iterator[None]:
    """Check every interpreted launch inside the block; `races=False` checks bounds only, in half the time."""
    current: list[Launch] = []
    originals = {
        name: getattr(Builder, name)
        for name in (
            "create_masked_load",
            "create_masked_store",
            "create_atomic_rmw",
            "create_atomic_cas",
            *POINTER_OPERATIONS,
        )
    }

    def recording(name: str, kind: int, mask_position: int | None):
        def operation(self, *args, **kwargs):
            # args holds the pointers at 0, or at 1 after the operation code of an atomic.
            pointers = args[1] if name == "create_atomic_rmw" else args[0]
            if current:
                current[-1].access(self, kind, pointers, None if mask_position is None else args[mask_position])
            return originals[name](self, *args, **kwargs)

        return operation

    def keeping_origin(name: str):
        def operation(self, *args, **kwargs):
            result = originals[name](self, *args, **kwargs)
            for argument in args:
                # Not by getattr, for which a tuple of triton 3.4 raises ValueError.
                if "origin" in getattr(argument, "__dict__", {}).get("attr", ()):
                    result.attr["origin"] = argument.attr["origin"]
            return result

        return operation

    original_pointers = triton_interpreter.TensorDescHandle.materialize_pointers
    original_convert = triton_interpreter._implicit_cvt
    original_arguments = triton_interpreter.GridExecutor._init_args_hst
    original_call = triton_interpreter.GridExecutor.__call__

    def materialize_pointers(self, offsets):
        pointers, mask = original_pointers(self, offsets)
        pointers.attr.update(self.base.attr)
        return pointers, mask

    def convert(argument):
        result = original_convert(argument)
        origin = current[-1].by_identity.get(id(triton_interpreter._unwrap_tensor(argument))) if current else None
        if origin is not None:
            result.handle.attr["origin"] = origin
        return result

    def init_args_hst(self, args, kwargs):
        host_args, host_kwargs = original_arguments(self, args, kwargs)
        for name, value in [*zip(self.arg_names, host_args, strict=False), *host_kwargs.items()]:
            current[-1].add_tensor(name, value)
        return host_args, host_kwargs

    def call(self, *args, **kwargs):
        current.append(Launch(self.fn.__name__, races))
        try:
            original_call(self, *args, **kwargs)
            current[-1].check_for_races()
        except InterpreterError as error:
            # The interpreter wraps what a program raises in the repr of it.
            if isinstance(error.__cause__, MemoryFinding):
                raise error.__cause__ from None
            raise
        finally:
            current.pop()

    recorded = {
        "create_masked_load": recording("create_masked_load", LOAD, 1),
        "create_masked_store": recording("create_masked_store", STORE, 2),
        "create_atomic_rmw": recording("create_atomic_rmw", ATOMIC, 3),
        "create_atomic_cas": recording("create_atomic_cas", ATOMIC, None),
    }
    with (
        mock.patch.multiple(Builder, **recorded, **{name: keeping_origin(name) for name in POINTER_OPERATIONS}),
        mock.patch.multiple(triton_interpreter.TensorDescHandle, materialize_pointers=materialize_pointers),
        mock.patch.multiple(triton_interpreter, _implicit_cvt=convert),
        mock.patch.multiple(triton_interpreter.GridExecutor, _init_args_hst=init_args_hst, __call__=call),
    ):
        yield
