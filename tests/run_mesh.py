"""A training loop of one's own, as torchtitan has them: FSDP2 over a dimension of a mesh, tensor parallel over another.

Run by run_forked in four processes, and in one without a mesh.
"""

import torch
import torch.distributed as dist
from run_ranks import whole_weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from orpo import orpo_loss

V, D, PAIRS, T = 61, 16, 4, 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        # What has come so far, so that a token depends on those before it.
        x = x + x.cumsum(1) / T
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """The loss is part of its forward: there FSDP has gathered the head, of which tensor parallel leaves a part."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(V, D), nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V)

    def forward(self, ids, labels, **counts):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        out = orpo_loss(self.norm(x), self.head.weight, labels, lm_head_bias=self.head.bias, beta=0.3, **counts)
        return out.loss, out.metrics()


def cut(model, mesh):
    plan = {f"blocks.{i}.up": ColwiseParallel() for i in range(2)}
    plan |= {f"blocks.{i}.down": RowwiseParallel() for i in range(2)}
    parallelize_module(model, mesh["tp"], {**plan, "head": ColwiseParallel()})
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def train(folder, cuts):
    """(losses and a metric of each step, weights after the last, the rows of the head on this rank)"""
    torch.manual_seed(0)
    model, rank, ranks, mesh = Model(), 0, 1, None
    if cuts:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model, rank, ranks = cut(model, mesh), mesh["dp"].get_local_rank(), 2
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False), []
    for step in range(3):
        ids = torch.randint(0, V, (2, PAIRS, T), generator=torch.Generator().manual_seed(step))
        labels = ids.masked_fill(torch.arange(T) < 3, -100)
        # Both ranks of a "tp" group have the same pairs, of which the chosen answers come first.
        own_ids, own_labels = (t.chunk(ranks, 1)[rank].flatten(0, 1) for t in (ids, labels))
        # The means of all pairs; FSDP averages gradients over the ranks that are to add up here.
        loss, metrics = model(own_ids, own_labels, num_pairs=PAIRS, num_nll_tokens=PAIRS * (T - 3))
        (loss * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        values = torch.stack([loss.detach(), metrics["logits/chosen"] / ranks])
        if cuts:
            dist.all_reduce(values, group=mesh["dp"].get_group())
        seen.append(values.tolist())
    assert isinstance(model, FSDPModule) == bool(cuts)
    return seen, whole_weights(model), getattr(model.head.weight, "to_local", lambda: model.head.weight)().shape[0]
