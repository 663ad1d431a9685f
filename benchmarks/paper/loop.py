"""AdamW over batches of pairs, with linear warm-up over a tenth of the steps and cosine decay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup


def fit(
    model: nn.Module,
    batches: Sequence[list[int]],
    loss_of: Callable[[list[int]], Tensor],
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    title: str,
) -> list[float]:
    """Trains `model` in place, one step for each of `batches`. Returns the loss of each step.

    Args:
        batches: places in the data, one list a step.
        loss_of: the loss of a batch, a scalar.
        title: of the progress bar.
    """
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=betas, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    losses = []
    model.train()
    for batch in tqdm(batches, desc=title, unit="step"):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses
