"""The loss with its sequences cut over ranks, in processes that run_forked starts; what every rank got."""

import os
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist
from orpo_kernels.cpu import logits as cpu_logits
from orpo_kernels.head import Needs
from orpo_kernels.rows import rows_from_labels
from orpo_kernels.settings import LossSettings
from problems import make_problem
from run_ranks import whole_weights
from run_shards import cut, message
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import pad

from orpo import orpo_loss, orpo_loss_from_rows

# Positions of each rank, from those of the whole sequences and the number of ranks.
CUTS = {
    "unequal": lambda t, ranks: [t[a:b] for a, b in zip(cut(len(t), ranks)[:-1], cut(len(t), ranks)[1:], strict=True)],
    # Two of 2 R chunks each, as ring attention has them for even work under a causal mask.
    "zigzag": lambda t, ranks: [torch.cat([t.chunk(2 * ranks)[r], t.chunk(2 * ranks)[-1 - r]]) for r in range(ranks)],
    "in any order": lambda t, ranks: list(t[torch.randperm(len(t), generator=_seeded())].chunk(ranks)),
    "nothing that counts on the last": lambda t, ranks: [*t[:-1].chunk(ranks - 1), t[-1:]],
    "nothing on the last": lambda t, ranks: [*t.chunk(ranks - 1), t[:0]],
    "nothing on the first": lambda t, ranks: [t[:0], *t.chunk(ranks - 1)],
}


def _seeded():
    return torch.Generator().manual_seed(1)


def positions(name, length, ranks):
    """The positions that each rank has."""
    return CUTS[name](torch.arange(length), ranks)


def of_positions(problem, mine):
    """The problem at some positions, its labels shifted before, with leaves of its own."""

    def shifted(labels):
        return None if labels is None else pad(labels, (0, 1), value=-100)[:, 1:][:, mine]

    bias = None if problem.bias is None else problem.bias.clone()
    return replace(
        problem,
        hidden=problem.hidden[:, mine].clone(),
        weight=problem.weight.clone(),
        bias=bias,
        labels=shifted(problem.labels),
        nll_labels=shifted(problem.nll_labels),
    )


def make(given):
    """`make_problem`, and with `lacks` the sequences that have no response."""
    problem = make_problem(**{name: value for name, value in given.items() if name != "lacks"})
    for s in given.get("lacks", ()):
        problem.labels[s] = -100
    return problem


def loss(problem, from_rows=False, **settings):
    """Of labels that are shifted already, or of the rows that they make."""
    if not from_rows:
        return orpo_loss(problem.hidden, problem.weight, problem.labels, shift=False, **problem.keywords, **settings)
    rows = rows_from_labels(problem.labels, problem.nll_labels, -100, shift=False)
    keywords = {name: value for name, value in problem.keywords.items() if name != "nll_labels"}
    return orpo_loss_from_rows(problem.hidden, problem.weight, rows, **keywords, **settings)


def results(problem, needs, settings):
    """Loss, parts, metrics and gradients of one problem, and its loss without a gradient.

    `multiplies` among the settings: whether the CPU has instructions for bfloat16, as in the fixture `bfloat16_cpu`.
    """
    multiplies, settings = settings.get("multiplies", True), {k: v for k, v in settings.items() if k != "multiplies"}
    with mock.patch.object(cpu_logits, "multiplies_bfloat16", lambda: multiplies):
        problem.requiring_grad(*needs)
        with torch.no_grad():
            evaluated = loss(problem, **settings).loss
        out = loss(problem, **settings)
        grads = None
        if any(needs):
            # Not 1, which is where finished gradients would be given out as they are.
            (0.5 * out.loss).backward()
            tensors = (problem.hidden, problem.weight, problem.bias)
            grads = [t.grad if t is not None and wanted else None for t, wanted in zip(tensors, needs, strict=True)]
    return {
        "evaluated": evaluated,
        "loss": out.loss.detach(),
        "nll_loss": out.nll_loss,
        "mean_logps": torch.cat([out.chosen_logps, out.rejected_logps]),
        "log_odds": out.log_odds,
        "pair_mask": out.pair_mask,
        "metrics": out.metrics(),
        "grads": grads,
    }


def run_cases(folder, cases):
    """`results` of each case, (arguments of `make`, name of the cut, needs, settings), on this rank's slices."""
    os.environ["TRITON_INTERPRET"] = "1"
    # What is made without values holds NaN then: what a stage leaves unwritten for another rank's rows is seen.
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    group, found = {"cp_group": dist.group.WORLD}, []
    for given, name, needs, settings in cases:
        problem = make(given)
        mine = positions(name, problem.labels.shape[1], dist.get_world_size())[dist.get_rank()]
        found.append(results(of_positions(problem, mine), needs, settings | group))
    return found


def run_grid(folder, cases):
    """`run_cases` on a mesh whose other dimension cuts the head; (place among the slices, in the head, results)."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    cp, tp = mesh["cp"], mesh["tp"]
    groups, found = {"cp_group": cp.get_group(), "tp_group": tp.get_group()}, []
    for given, name, needs, settings in cases:
        problem = make(given)
        ends, r = cut(len(problem.weight), 2), tp.get_local_rank()
        part = of_positions(problem, positions(name, problem.labels.shape[1], 2)[cp.get_local_rank()])
        part.weight = part.weight[ends[r] : ends[r + 1]].clone()
        part.bias = None if part.bias is None else part.bias[ends[r] : ends[r + 1]].clone()
        found.append(results(part, needs, settings | groups))
    return cp.get_local_rank(), tp.get_local_rank(), found


def refusals(folder, backend):
    """What is said of calls that cannot be right, on every rank, and the loss after them."""
    os.environ["TRITON_INTERPRET"] = "1"
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.group.WORLD
    whole = make_problem()
    problem = of_positions(whole, positions("unequal", 17, 2)[rank])
    beyond, fewer = replace(problem, labels=problem.labels.clone()), problem
    if rank:
        beyond.labels[0, 3] = 203
        keep = [0, 1, 3, 4]
        fewer = replace(problem, hidden=problem.hidden[keep], labels=problem.labels[keep], nll_labels=None)
    settings = {"cp_group": world, "backend": backend}
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    calls = {
        "shifted": lambda: orpo_loss(whole.hidden, whole.weight, whole.labels, **settings),
        "mesh": lambda: loss(problem, cp_group=mesh),
        "beyond": lambda: loss(beyond, **settings),
        "fewer": lambda: loss(fewer, **settings),
        "both": lambda: loss(problem, **settings, tp_group=mesh.get_group()),
    }
    said = {name: message(call) for name, call in calls.items()}
    # No rank waits for another: the group still works.
    return said, loss(problem, **settings).loss.item()


def compiled(folder, cuts):
    """(eager, compiled) loss and gradients for each cut."""
    dist.init_process_group("gloo")

    def one(function, name):
        whole = make_problem(bias=True, softcap=5.0)
        problem = of_positions(whole, positions(name, 17, 2)[dist.get_rank()]).requiring_grad()
        value = function(problem)
        value.backward()
        return [value.detach(), problem.hidden.grad, problem.weight.grad, problem.bias.grad]

    def value(problem):
        return loss(problem, cp_group=dist.group.WORLD).loss

    graph = torch.compile(value, backend="aot_eager", fullgraph=True)
    return [(one(value, name), one(graph, name)) for name in cuts]


def checked_operator(folder):
    """opcheck of the operator and of its backward in a group, all ranks at once; the loss, its sequences given."""
    dist.init_process_group("gloo")
    problem = of_positions(make_problem(bias=True), positions("unequal", 17, 2)[dist.get_rank()]).requiring_grad()
    rows = rows_from_labels(problem.labels, problem.nll_labels, -100, shift=False)
    from orpo_kernels import fused

    hidden = problem.hidden.detach().flatten(0, 1).requires_grad_()
    tensors, numbers = (hidden, problem.weight, problem.bias), LossSettings(beta=0.3).numbers()
    group = dist.group.WORLD.group_name
    settings = dict(
        logits_budget=None, strip_bytes=8192, backend="torch", needs=[*Needs(True, True, True).__dict__.values()]
    )
    settings |= dict(group="", sequence_group=group)
    given = dict(pairs=3, source="labels", all_count=True)
    out = fused.linear_orpo(*tensors, list(rows.arrays), numbers, **given, **settings)
    torch.library.opcheck(torch.ops.orpo.linear_orpo, (*tensors, list(rows.arrays), numbers), {**given, **settings})
    with torch.no_grad():
        saved = [t.detach() for t in out[7:]]
        inputs = *(t.detach() for t in tensors), rows.rows_N, rows.targets_N, numbers, saved
        torch.library.opcheck(torch.ops.orpo.linear_orpo_backward, (torch.tensor(0.5), *inputs), settings)
    return out[0].item()


V, D, PAIRS, LENGTH = 61, 16, 2, 12


class Model(nn.Module):
    """Tokens that do not look at one another, so that slices need no attention; the loss inside, where FSDP gathers."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(V, D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.head = nn.Linear(D, V)

    def forward(self, ids, labels, cp_group):
        x = self.embed(ids)
        x = x + self.down(torch.nn.functional.gelu(self.up(x)))
        return orpo_loss(
            x, self.head.weight, labels, lm_head_bias=self.head.bias, beta=0.3, shift=False, cp_group=cp_group
        ).loss


def train(folder, ranks):
    """(losses of three steps, weights after them) by one process, or FSDP over two data ranks x two slices."""
    torch.manual_seed(0)
    model, d, c, group, factor = Model(), slice(None), torch.arange(LENGTH), None, 1
    if ranks > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
        d, c = slice(mesh["dp"].get_local_rank(), mesh["dp"].get_local_rank() + 1), c[mesh["cp"].get_local_rank() :: 2]
        group = mesh["cp"].get_group()
        # FSDP averages over all four ranks, and the parts of two slices add up.
        factor = group.size()
        model = fully_shard(model, mesh=mesh["dp", "cp"]._flatten())
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False), []
    for step in range(3):
        # Sides, data ranks, pairs, positions.
        ids = torch.randint(0, V, (2, 2, PAIRS, LENGTH), generator=torch.Generator().manual_seed(step))
        shift_labels = pad(ids.masked_fill(torch.arange(LENGTH) < 3, -100), (0, 1), value=-100)[..., 1:]
        value = model(*(t[:, d].flatten(0, 2)[:, c] for t in (ids, shift_labels)), group)
        (factor * value).backward()
        optimizer.step()
        optimizer.zero_grad()
        value = value.detach().clone()
        if ranks > 1:
            dist.all_reduce(value, group=mesh["dp"].get_group())
            value /= 2
        seen.append(value.item())
    return seen, whole_weights(model)
