"""Count what a computation does: FLOPs, bytes, atomics, exponentials, memory; Triton kernels and torch around them.

    with Meter() as meter:
        loss = f(hidden, weight); loss.backward()
    meter.total()["flops"], meter.peak_bytes

Deterministic: nothing is timed. Needs TRITON_INTERPRET=1 and CPU tensors. Per kernel and per torch operation:

    flops            2 m n k for each tl.dot (with the padding of its tiles) and each torch matmul
    loaded, stored   bytes of the lanes that are not masked off; torch: sizes of inputs and outputs
    distinct         bytes of different addresses touched in a launch: the least traffic with memory; torch: as above
    atomics          elements updated atomically
    exponentials     elements of exp, exp2, log, log2
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter, defaultdict
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.runtime.interpreter as triton_interpreter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Builder = triton_interpreter.InterpreterBuilder
EXPONENTIALS = (np.exp, np.exp2, np.log, np.log2)
# They allocate or rename, and move nothing.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "set_", "_unsafe_view"}
MATMULS = {"mm", "mm_wide", "bmm", "addmm", "addmm_", "addmm_wide_", "baddbmm"}


class Meter(TorchDispatchMode):
    """Counts while its `with` block runs. `counts[name]` is a Counter for each kernel and torch operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counter] = defaultdict(Counter)
        self.live_bytes = self.peak_bytes = 0
        self._kernel: str | None = None
        self._touched: dict[int, list[np.ndarray]] = {}
        self._storages: set[int] = set()
        self._patches: list[Any] = []

    def total(self) -> Counter:
        """The sum over kernels and operations."""
        return sum(self.counts.values(), Counter())

    # Torch operations.

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._kernel is not None:
            return function(*args, **kwargs)
        name = function._schema.name.split("::")[1]
        if name not in MATMULS and (original := _original_of_custom_op(function)):
            # A custom operator hides what it does from dispatch modes: run its Python function under this one.
            with self:
                return original(*args, **kwargs)
        # What `out` holds before is not read.
        read = {key: value for key, value in kwargs.items() if key != "out"}
        inputs = [t for t in tree_leaves((args, read)) if isinstance(t, torch.Tensor)]
        for tensor in inputs:
            self._hold(tensor, 0)
        result = function(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if name == "addmm_wide_":
            outputs = inputs[:1]
        for tensor in outputs:
            self._hold(tensor, tensor.untyped_storage().nbytes())
        if not function.is_view and name not in FREE:
            count = self.counts[f"torch.{name}"]
            loaded, stored = (sum(t.numel() * t.element_size() for t in ts) for ts in (inputs, outputs))
            count.update(calls=1, loaded=loaded, stored=stored, distinct=loaded + stored)
            if name in MATMULS:
                a, b = [t for t in inputs if t.dim() >= 2][-2:]
                count["flops"] += 2 * a.numel() * b.shape[-1]
        return result

    def _hold(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        if self.live_bytes + size > self.peak_bytes:
            # Wrappers of custom operators are in cycles with storages that nothing uses any more.
            gc.collect()
        self._storages.add(key)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live_bytes -= size

    # Triton kernels.

    def __enter__(self):
        if not self._patches:
            self._patch()
        return super().__enter__()

    def __exit__(self, *error):
        # The mode enters itself again for custom operators; the outermost leaves last.
        result = super().__exit__(*error)
        if not any(mode is self for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack()):
            while self._patches:
                self._patches.pop().stop()
        return result

    def _patch(self) -> None:
        def counted(name: str, before: Any) -> None:
            original = getattr(Builder, name)

            def operation(builder, *args, **kwargs):
                before(*args)
                return original(builder, *args, **kwargs)

            self._replace(Builder, name, operation)

        counted("create_masked_load", lambda pointers, mask, *_: self._access("loaded", pointers, mask))
        counted("create_masked_store", lambda pointers, value, mask, *_: self._access("stored", pointers, mask))
        counted("create_atomic_rmw", lambda op, pointers, value, mask, *_: self._access("atomics", pointers, mask))
        counted("create_atomic_cas", lambda pointers, *_: self._access("atomics", pointers, None))
        counted("create_dot", lambda a, b, c, *_: self._add(flops=2 * c.data.size * a.data.shape[-1]))
        counted("unary_op", lambda x, op: self._add(exponentials=x.data.size) if op in EXPONENTIALS else None)
        original_call = triton_interpreter.GridExecutor.__call__

        def call(executor, *args, **kwargs):
            self._kernel, self._touched = executor.fn.__name__, defaultdict(list)
            try:
                original_call(executor, *args, **kwargs)
                distinct = sum(np.unique(np.concatenate(a)).size * size for size, a in self._touched.items())
                self._add(calls=1, distinct=distinct)
            finally:
                self._kernel = None

        self._replace(triton_interpreter.GridExecutor, "__call__", call)

    def _replace(self, owner: Any, name: str, member: Any) -> None:
        patch = mock.patch.object(owner, name, member)
        patch.start()
        self._patches.append(patch)

    def _add(self, **amounts: int) -> None:
        self.counts[self._kernel].update(amounts)

    def _access(self, kind: str, pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self._add(**{kind: addresses.size * (1 if kind == "atomics" else size)})
        self._touched[size].append(np.unique(addresses))


def _original_of_custom_op(function: Any) -> Any:
    """The Python function of a `torch.library.custom_op`, None for any other operator."""
    definition = torch._library.custom_ops.OPDEFS.get(function._schema.name)
    return None if definition is None else definition._init_fn
