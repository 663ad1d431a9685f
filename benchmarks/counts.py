"""Counts what one step of the loss asks of a GPU, without one: launches, operations of torch, waits of the host.

    python -m benchmarks.counts

A step is labels to gradients, in bfloat16, of 4 pairs of 1,024 positions whose first half is prompt, which the NLL
scores too: 6,140 rows. Tensors are on torch's meta device and say that they are a GPU's, Triton's kernels are counted
instead of run, and tiles are those that an H200 begins with. Which way the step goes, and with it every launch, depends
on sizes and dtypes alone.

launches     kernels of Triton, and operations of torch that compute on the device, each counted as one launch; views
             and allocations launch nothing
operations   those of torch among them
waits        numbers that the host reads from the device: it stands still until the device has come that far
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from orpo_kernels.rows import Rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orpo import orpo_loss, orpo_loss_from_rows

from .cases import HEADS

MODELS = {"SmolLM2-135M": "SmolLM2-135M", "Mistral-7B": "Mistral-7B-v0.3", "Llama-3-8B": "Llama-3-8B"}
# Most launches of a step. A launch takes the host 5 to 10 microseconds: with these it is done with a step in a fraction
# of a millisecond, before the device is, and the next model's forward follows without a gap. Llama-3's exponentials
# do not fit the budget, and each recomputed strip takes three.
LIMITS = {"SmolLM2-135M": 30, "Mistral-7B": 30, "Llama-3-8B": 40}
# The host waits for the number of rows, which labels do not tell; with a collator's rows for nothing.
WAITS_FROM_LABELS, WAITS_FROM_ROWS = 1, 0
PAIRS, POSITIONS = 4, 1024
# A chosen sequence predicts all of its tokens but the first, a rejected one those of its answer.
SEQUENCE_ROWS = [POSITIONS - 1] * PAIRS + [POSITIONS // 2] * PAIRS
ROWS = sum(SEQUENCE_ROWS)

# Reserve memory without writing to it.
_ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


class Counts(TorchDispatchMode):
    """While it is on, `kernels` (Triton's), `operations` (torch's) and `waits` by name.

    `answers`: what the host reads from the device, one for each wait.
    """

    def __init__(self, answers: list[Tensor | float]) -> None:
        super().__init__()
        self.answers = answers
        self.kernels, self.operations, self.waits = Counter(), Counter(), Counter()

    @property
    def launches(self) -> int:
        return self.kernels.total() + self.operations.total()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, name = operator._schema.name.split("::")
        if namespace == "orpo":
            with self:
                return _body(operator)(*args, **kwargs)
        on_device = _on_device(args, kwargs)
        to_host = name == "_to_copy" and torch.device(kwargs.get("device") or "meta").type == "cpu"
        if on_device and (to_host or name in ("nonzero", "_local_scalar_dense")):
            self.waits[name] += 1
            return self.answers.pop(0)
        if name in ("mm", "addmm") and "out_dtype" in str(operator._schema):
            # On the meta device torch has no product with an accumulator of another dtype than its operands'.
            out = kwargs.get("out")
            result = args[-3].new_empty(args[-3].shape[0], args[-2].shape[1], dtype=args[-1]) if out is None else out
        else:
            result = operator(*args, **kwargs)
        if (on_device or _on_device(result)) and name not in _ALLOCATIONS and not _is_view(operator, args, result):
            self.operations[name] += 1
        return result


def _on_device(*values) -> bool:
    return any(t.device.type == "meta" for t in tree_leaves(values) if isinstance(t, Tensor))


def _is_view(operator, args: tuple, result) -> bool:
    """Whether the result is other memory than the arguments' only in its shape, or not at all."""

    def memory(values) -> set[int]:
        return {t.untyped_storage()._cdata for t in tree_leaves(values) if isinstance(t, Tensor)}

    return not operator._schema.is_mutable and bool(memory(result)) and memory(result) <= memory(args)


def _body(operator) -> Callable:
    """What an operator of the loss runs on a device."""
    from orpo_kernels import fused

    return {"linear_orpo": fused.linear_orpo, "linear_orpo_backward": fused.linear_orpo_backward}[
        operator._schema.name.split("::")[1]
    ]._init_fn


@contextlib.contextmanager
def pretended_gpu(counts: Counts) -> Iterator[None]:
    """Meta tensors are taken for an H200's, and Triton's launches are counted instead of run."""
    from orpo_kernels import eager
    from orpo_kernels.gpu import tiles
    from triton.runtime.jit import JITFunction

    h200 = tiles.Limits(False, 9, 232448 - 1024, 65536)

    def candidates(x_ND, weight_VD, keeps=False, softcap=False):
        aligned = tiles.rows_aligned(x_ND, weight_VD)
        return tiles.matmul_configs(x_ND.dtype, tiles.input_precision(), aligned, h200, keeps, softcap)

    def run(kernel, *args, grid, warmup, **kwargs):
        counts.kernels[kernel.__name__] += 1

    def nothing(*args, **kwargs):
        return contextlib.nullcontext()

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tiles, "matmul_candidates", candidates),
        mock.patch.object(tiles, "fastest", lambda kernel, candidates, x_ND, head, launch: candidates[0]),
        mock.patch.object(tiles, "multiprocessors", lambda device: 132),
        # The mode that counts would be looking at operators.
        mock.patch.object(eager, "is_unseen", lambda *tensors: True),
        mock.patch.object(torch.Tensor, "is_cuda", property(_on_device)),
        # Of tensors that stand for sizes alone nothing would be read.
        mock.patch.object(torch.Tensor, "is_meta", property(lambda tensor: False)),
        mock.patch.object(torch.cuda, "device_of", nothing),
        mock.patch.object(torch, "autocast", nothing),
        counts,
    ):
        yield


def _head(model: str) -> tuple[Tensor, Tensor]:
    """(hidden states, weight), both trained."""
    vocabulary, hidden_size = HEADS[MODELS[model]]
    hidden = torch.empty(2 * PAIRS, POSITIONS, hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    return hidden, torch.empty(vocabulary, hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)


def step_from_labels(model: str) -> Counts:
    """One step of `orpo_loss` and its backward."""
    # Of each sequence: its rows, second rows of a position, smallest and largest token.
    counts = Counts([torch.tensor([[rows, 0, 0, 0] for rows in SEQUENCE_ROWS])])
    hidden, weight = _head(model)
    labels = torch.empty(2 * PAIRS, POSITIONS, dtype=torch.int64, device="meta")
    with pretended_gpu(counts):
        orpo_loss(hidden, weight, labels, nll_labels=labels).loss.backward()
    return counts


def step_from_rows(model: str) -> Counts:
    """One step of `orpo_loss_from_rows` and its backward."""
    counts = Counts([])
    hidden, weight = _head(model)
    integers = (torch.empty(ROWS, dtype=torch.int64, device="meta") for _ in range(3))
    masks = (torch.empty(ROWS, dtype=torch.bool, device="meta") for _ in range(2))
    with pretended_gpu(counts):
        orpo_loss_from_rows(hidden, weight, Rows(*integers, *masks, PAIRS)).loss.backward()
    return counts


def line(name: str, counts: Counts) -> str:
    """One line of the report."""
    return (
        f"{name}: {counts.launches} launches, {counts.operations.total()} operations, "
        f"{counts.waits.total()} waits of the host"
    )


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 interprets kernels instead of launching them: unset it")
    for model in MODELS:
        print(line(model, step_from_labels(model)))
    for model in MODELS:
        print(line(f"{model} from rows", step_from_rows(model)))


if __name__ == "__main__":
    main()
