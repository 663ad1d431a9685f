"""The loss with its head cut over ranks, in processes that run_forked starts; what every rank got."""

import os
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist
from orpo_kernels.cpu import logits as cpu_logits
from orpo_kernels.rows import rows_from_labels
from peft.tuners import lora
from problems import make_problem
from run_ranks import EIGHT, let_accelerate_shard_on_cpu, make_args, whole_weights
from tiny import make_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from orpo import ORPOTrainer, orpo_loss, token_logprobs
from orpo.model.attach import LossCall, attach_orpo_loss
from orpo.model.head import head_operands


def cut(rows, ranks):
    """The first row of each rank's part, and the end: parts of unequal sizes that no strip or tile divides."""
    return [0, *(rows * r // ranks + 1 for r in range(1, ranks)), rows]


def my_part(problem):
    """The problem with this rank's rows of weight and bias, leaves of their own."""
    ends, r = cut(len(problem.weight), dist.get_world_size()), dist.get_rank()
    weight = problem.weight[ends[r] : ends[r + 1]].clone()
    bias = None if problem.bias is None else problem.bias[ends[r] : ends[r + 1]].clone()
    return replace(problem, weight=weight, bias=bias)


def loss(problem, **settings):
    return orpo_loss(problem.hidden, problem.weight, problem.labels, **problem.keywords, **settings)


def results(problem, needs, settings):
    """Loss, parts, metrics and gradients of one problem, its loss without a gradient, and of single tokens the same.

    `multiplies` among the settings: whether the CPU has instructions for bfloat16, as in the fixture `bfloat16_cpu`.
    """
    multiplies, settings = settings.get("multiplies", True), {k: v for k, v in settings.items() if k != "multiplies"}
    with mock.patch.object(cpu_logits, "multiplies_bfloat16", lambda: multiplies):
        return _results(problem, needs, settings)


def _results(problem, needs, settings):
    problem.requiring_grad(*needs)
    with torch.no_grad():
        evaluated = loss(problem, **settings).loss
    out = loss(problem, **settings)
    found = {
        "evaluated": evaluated,
        "loss": out.loss.detach(),
        "mean_logps": torch.cat([out.chosen_logps, out.rejected_logps]),
        "log_odds": out.log_odds,
        "metrics": out.metrics(),
    }

    def grads():
        tensors = (problem.hidden, problem.weight, problem.bias)
        return [t.grad if t is not None and wanted else None for t, wanted in zip(tensors, needs, strict=True)]

    if any(needs):
        # Not 1, which is where finished gradients would be given out as they are.
        (0.5 * out.loss).backward()
        found["grads"] = grads()
    problem.requiring_grad(*needs)
    targets = problem.labels[0].clamp(min=0)
    scale = {"logit_scale": problem.scale, "logit_softcap": problem.softcap, **settings}
    found["logps"] = token_logprobs(problem.hidden[0], problem.weight, targets, bias=problem.bias, **scale)
    if any(needs):
        (found["logps"] * torch.linspace(-1, 1, len(targets))).sum().backward()
        found["token_grads"] = grads()
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in found.items()}


def run_cases(folder, cases):
    """`results` of each case, (arguments of make_problem, needs, settings)."""
    os.environ["TRITON_INTERPRET"] = "1"
    # What is made without values holds NaN then: what a stage leaves unwritten for another rank's targets is seen.
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    group, found = {"tp_group": dist.group.WORLD}, []
    for given, needs, settings in cases:
        found.append(results(my_part(make_problem(**given)), needs, settings | group))
    return found


def odd_problems():
    """Columns without a finite logit: all of the last rank, all but the target; and one that is no number."""
    shut, alone, broken = (make_problem(bias=True, softcap=cap) for cap in (None, None, 5.0))
    shut.labels, shut.nll_labels = torch.where(shut.labels > 50, 50, shut.labels), None
    shut.bias[102:] = -torch.inf
    alone.labels, alone.nll_labels = torch.where(alone.labels >= 0, 7, -100), None
    alone.bias[:] = torch.where(torch.arange(203) == 7, 0.0, -torch.inf)
    broken.weight[200] = torch.nan
    return [shut, alone, broken]


def run_odd(folder, backend, needs, ranks):
    """`results` of `odd_problems`, on one rank too."""
    os.environ["TRITON_INTERPRET"] = "1"
    problems, settings = odd_problems(), {"backend": backend}
    if ranks > 1:
        dist.init_process_group("gloo")
        problems, settings = map(my_part, problems), {"backend": backend, "tp_group": dist.group.WORLD}
    return [results(problem, needs, settings) for problem in problems]


def message(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


def refusals(folder):
    """What is said of rows, labels and heads that do not fit the group, on every rank."""
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), {"tp_group": dist.group.WORLD}
    problem = my_part(make_problem())
    beyond = replace(problem, labels=torch.where(problem.labels == problem.labels.max(), 203, problem.labels))
    fewer = replace(problem, labels=problem.labels.clone(), nll_labels=None)
    other = replace(problem, labels=problem.labels.roll(rank, 1), nll_labels=None)
    if rank:
        fewer.labels[0, 3] = -100
    empty = replace(problem, weight=problem.weight[: 0 if rank else 5])
    said = [message(lambda p=p: loss(p, **group)) for p in (beyond, fewer, other, empty)]
    hidden, targets = problem.hidden[0], torch.full((17,), 203)
    said.append(message(lambda: token_logprobs(hidden, problem.weight, targets, **group)))
    # No rank waits for another: the group still works.
    return [*said, loss(problem, **group).loss.item()]


def dtensors(folder):
    """The loss of a head as DTensor, and what is said of placements that it does not follow."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    problem = make_problem(bias=True)

    def of(weight, bias=problem.bias, hidden=problem.hidden, **settings):
        return loss(replace(problem, weight=weight, bias=bias, hidden=hidden), **settings)

    whole = problem.weight
    weight, bias = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (whole, problem.bias))
    hidden = DTensor.from_local(problem.hidden, mesh, [Replicate()]).requires_grad_()
    with torch.no_grad():
        evaluated = of(weight, bias, hidden).loss
    out = of(weight, bias, hidden)
    out.loss.backward()
    named = of(weight, bias, hidden, tp_group=mesh.get_group()).loss
    grads = weight.grad, bias.grad, hidden.grad
    other = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    cases = {
        "replicated": lambda: of(DTensor.from_local(whole, mesh, [Replicate()])),
        "by columns": lambda: of(distribute_tensor(whole, mesh, [Shard(1)]), None),
        "two dimensions": lambda: of(distribute_tensor(whole, square, [Replicate(), Shard(0)]), None),
        "hidden cut": lambda: of(weight, bias, distribute_tensor(problem.hidden, mesh, [Shard(1)])),
        "hidden alone": lambda: of(whole, hidden=hidden),
        "other group": lambda: of(weight, bias, tp_group=other),
        "no group": lambda: of(weight, bias, tp_group=mesh),
    }
    return {
        "loss": out.loss.item(),
        "same": bool(out.loss == named) and bool(out.loss == evaluated),
        "metrics": out.metrics(),
        "placed": [(type(g) is DTensor, str(g.placements)) for g in grads],
        "grads": [g.full_tensor() for g in grads],
        "said": {name: message(function) for name, function in cases.items()},
    }


def compiled(folder):
    """(eager, compiled) loss and gradients, with a bias and unequal parts."""
    dist.init_process_group("gloo")

    def one(function):
        problem = my_part(make_problem(bias=True, softcap=5.0)).requiring_grad()
        value = function(problem)
        value.backward()
        return [value.detach(), problem.hidden.grad, problem.weight.grad, problem.bias.grad]

    def value(problem):
        return loss(problem, tp_group=dist.group.WORLD).loss

    return one(value), one(torch.compile(value, backend="aot_eager", fullgraph=True))


def batches():
    """Rows of three steps of four sequences each, and their ids."""
    for step in range(3):
        ids = torch.randint(5, 90, (4, 14), generator=torch.Generator().manual_seed(step))
        labels = ids.clone()
        labels[:, :4] = -100
        yield ids, labels


def train(model, parameters=None):
    """Losses of three steps through the attached loss, with a metric of the head's, and the weights after them."""
    attach_orpo_loss(model)
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=0.3, foreach=False)
    seen = []
    for ids, labels in batches():
        call = LossCall(rows_from_labels(labels, ids[:2], -100, True), logit_metrics=True)
        out = model(input_ids=ids, orpo=call)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append([out.loss.item(), out.metrics["logits/chosen"].item()])
    return seen, whole_weights(model)


def train_alone(folder, name):
    return train(AutoModelForCausalLM.from_pretrained(name))


def train_by_plan(folder, name):
    """`train` of a model that transformers' tp_plan has cut; what the trainer says of it, and the head of a LoRA."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = AutoModelForCausalLM.from_pretrained(name, tp_plan="auto", device_mesh=mesh)
    parts = [p.to_local().shape[0] for p in (model.lm_head.weight, model.model.embed_tokens.weight)]
    let_accelerate_shard_on_cpu()
    args = make_args(folder / "run")
    said = [message(lambda: ORPOTrainer(model, args, train_dataset=EIGHT, tokenizer=make_tokenizer()))]
    seen, weights = train(model)
    head = lora.Linear(model.lm_head, "default", lora.LoraConfig(r=2), r=2)
    said.append(message(lambda: head_operands(head, torch.zeros(1, 32))))
    return seen, weights, parts, said
