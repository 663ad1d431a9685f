"""What is timed of a loss, and what has to hold first: that it is right, by the reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from orpo_kernels import reference
from orpo_kernels.rows import Rows

from .cases import Batch
from .peers import Peer

BETA = 0.1
# Logits of the reference to make at once: float64, half a GiB, of which four or five copies are alive.
BLOCK_LOGITS = 2**26
# Relative errors beyond which a result is wrong, not rounded: loss, and the larger of both gradients. Without its odds
# ratio, which weighs 0.1, a loss would be off by 9e-3 and a gradient by 7e-2.
LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 2e-2), torch.float16: (2e-3, 2e-2)}


def forward(peer: Peer, batch: Batch) -> torch.Tensor:
    """The loss, with a graph for backward."""
    return peer(batch.requiring_grad(), BETA).detach()


def step(peer: Peer, batch: Batch) -> torch.Tensor:
    """Forward and backward."""
    loss = peer(batch.requiring_grad(), BETA)
    loss.backward()
    return loss.detach()


def evaluation(peer: Peer, batch: Batch) -> torch.Tensor:
    """Forward under no_grad, of a head that requires grad and of hidden states that came out of such a forward."""
    batch.requiring_grad().hidden.requires_grad_(False)
    with torch.no_grad():
        return peer(batch, BETA)


def frozen_head(peer: Peer, batch: Batch) -> torch.Tensor:
    """Forward and backward to the hidden states alone, as with LoRA."""
    loss = peer(batch.requiring_grad(head=False), BETA)
    loss.backward()
    return loss.detach()


KINDS: dict[str, Callable[[Peer, Batch], torch.Tensor]] = {
    "forward": forward,
    "step": step,
    "evaluation": evaluation,
    "frozen": frozen_head,
}


def truth_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, dX and dW in float64 from the reference; the gradients are kept in float32, half the size."""
    result, dx, dw = exact(batch)
    return result.loss, dx, dw


def exact(batch: Batch) -> tuple[reference.Objective, torch.Tensor, torch.Tensor]:
    """The objective and its gradients by the hidden states and the head, as `truth_of`."""
    pairs, positions = batch.labels.shape[0] // 2, batch.labels.shape[1]
    at = (batch.scored[:, 1:] != -100).nonzero()
    sequence, position = at[:, 0], at[:, 1]
    rows = Rows(
        rows_N=sequence * positions + position,
        targets_N=batch.input_ids[sequence, position + 1],
        sequence_N=sequence,
        in_response_N=batch.labels[sequence, position + 1] != -100,
        in_nll_N=sequence < pairs,
        pairs=pairs,
    )
    x = batch.hidden.detach().flatten(0, 1)[rows.rows_N].double()
    result, dx, dw = by_blocks(x, batch.weight.detach().double(), rows, max(1, BLOCK_LOGITS // len(batch.weight)))
    whole = torch.zeros(batch.hidden.shape, dtype=torch.float32, device=x.device)
    whole.flatten(0, 1)[rows.rows_N] = dx.float()
    return result, whole, dw.float()


def by_blocks(
    x: torch.Tensor, weight: torch.Tensor, rows: Rows, size: int
) -> tuple[reference.Objective, torch.Tensor, torch.Tensor]:
    """The reference's objective, dX and dW, with the logits of `size` rows alive at a time, and computed twice."""
    blocks = [slice(first, first + size) for first in range(0, len(x), size)]

    def stats(block: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        z = reference.logits(x[block], weight)
        return z, *reference.token_stats(z, rows.targets_N[block])

    result = reference.objective(torch.cat([stats(block)[1] for block in blocks]), rows, beta=BETA)
    dx, dw = torch.empty_like(x), torch.zeros_like(weight)
    for block in blocks:
        z, logp, lse = stats(block)
        g = reference.logit_grad(z, logp, lse, rows.targets_N[block]).mul_(result.coef_N[block, None])
        dx[block] = g @ weight
        dw.addmm_(g.T, x[block])
        # Or they would be alive while the next block's are made.
        del z, g
    return result, dx, dw


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """|value - truth| / |truth| in the Euclidean norm, some rows at a time."""
    pieces = zip(value.detach().reshape(-1).split(2**24), truth.reshape(-1).split(2**24), strict=True)
    sums = [((a.double() - b.double()).square().sum().item(), b.double().square().sum().item()) for a, b in pieces]
    return (sum(d for d, _ in sums) / sum(t for _, t in sums)) ** 0.5


def errors_of(
    peer: Peer, batch: Batch, truth: tuple[torch.Tensor, ...], kind: str = "step"
) -> tuple[float | None, ...]:
    """Relative errors of loss, dX and dW; None for a gradient that this kind does not compute."""
    loss = KINDS[kind](peer, batch)
    errors = tuple(
        None if value is None else relative_error(value, exact)
        for value, exact in zip((loss, batch.hidden.grad, batch.weight.grad), truth, strict=True)
    )
    batch.requiring_grad()
    return errors


def is_right(errors: tuple[float | None, ...], dtype: torch.dtype) -> bool:
    """Whether a result is off by no more than its dtype explains; NaN is not."""
    loss_limit, gradient_limit = LIMITS[dtype]
    return errors[0] < loss_limit and all(e is None or e < gradient_limit for e in errors[1:])


def gate(
    peers: dict[str, Peer], batch: Batch, truth: tuple[torch.Tensor, ...], kind: str
) -> tuple[dict[str, dict], dict[str, dict]]:
    """(errors of those that are right in this kind, what the records of the others say)."""
    right, refused = {}, {}
    for name, peer in peers.items():
        try:
            errors = errors_of(peer, batch, truth, kind)
        except Exception as problem:
            # A peer may not run in this dtype, or on this machine: that is a result, and it is reported.
            words = str(problem).splitlines()[0][:120] if str(problem) else ""
            refused[name] = {"status": f"failed: {type(problem).__name__}: {words}"}
            continue
        found = zip(("error_loss", "error_dx", "error_dw"), errors, strict=True)
        named = {key: error for key, error in found if error is not None}
        if is_right(errors, batch.weight.dtype):
            right[name] = named
        else:
            refused[name] = {"status": "wrong", **named}
    return right, refused
