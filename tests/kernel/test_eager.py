"""A call at which nobody looks goes without the custom operator, and gives what the operator gives."""

import pytest
import torch
from orpo_kernels import eager, fused
from problems import make_problem
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from orpo import orpo_loss

backends = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("triton", marks=pytest.mark.kernels(modes=("interpret", "simt", "cuda")))]
)
# Recomputed strips; some exponentials; all of them, or one bin on a CPU.
budgets = pytest.mark.parametrize("budget", [0, 120_000, 2**20])


@pytest.fixture
def operators(monkeypatch):
    """The calls of the forward's operator."""
    called, original = [], fused.linear_orpo
    monkeypatch.setattr(fused, "linear_orpo", lambda *args, **kw: called.append(1) or original(*args, **kw))
    return called


class Looking(TorchDispatchMode):
    """Sees every operator and changes nothing."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return operator(*args, **kwargs or {})


def step(problem, backend, budget, **more):
    problem.requiring_grad()
    keywords = problem.keywords | dict(logits_budget=budget, strip_bytes=20_000, backend=backend) | more
    loss = orpo_loss(problem.hidden, problem.weight, problem.labels, **keywords).loss
    loss.backward()
    return loss.detach(), problem.hidden.grad, problem.weight.grad


@backends
@budgets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_gives_the_same(backend, budget, dtype, operators, kernel_device):
    problem = make_problem(V=600, dtype=dtype, device=kernel_device if backend == "triton" else "cpu")
    found = step(problem, backend, budget)
    assert not operators
    with Looking():
        expected = step(problem, backend, budget)
    assert operators and torch.equal(found[0], expected[0])
    # One product over all kept columns rounds otherwise than several that are added.
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_whoever_looks_at_operators_sees_one():
    problem = make_problem()

    class Marked(torch.Tensor):
        pass

    assert eager.is_unseen(problem.hidden, torch.nn.Parameter(problem.weight), None)
    assert not eager.is_unseen(problem.hidden.as_subclass(Marked), problem.weight)
    with Looking():
        assert not eager.is_unseen(problem.hidden)
    seen = []
    torch.func.grad(lambda hidden: seen.append(eager.is_unseen(hidden)) or hidden.sum())(problem.hidden)
    assert seen == [False]


def test_a_compiler_sees_the_operator(operators):
    problem = make_problem()
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda hidden: orpo_loss(hidden, problem.weight, problem.labels).loss, backend=backend)
    compiled(problem.hidden)
    assert any("linear_orpo" in name for name in seen)


@backends
@budgets
def test_saved_tensors_may_be_moved_and_used_twice(backend, budget, kernel_device):
    """What stage 3 has overwritten stays with what it has overwritten, wherever that was copied."""
    problem = make_problem(V=600, device=kernel_device if backend == "triton" else "cpu")
    expected = step(problem, backend, budget)
    problem.requiring_grad()
    keywords = problem.keywords | dict(logits_budget=budget, strip_bytes=20_000, backend=backend)
    inputs = problem.hidden, problem.weight
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        loss = orpo_loss(*inputs, problem.labels, **keywords).loss
    for _ in range(2):
        grads = torch.autograd.grad(loss, inputs, retain_graph=True)
        assert all(map(torch.equal, grads, expected[1:]))


@backends
@budgets
def test_a_checkpointed_loss(backend, budget, kernel_device):
    problem = make_problem(V=600, device=kernel_device if backend == "triton" else "cpu")
    expected = step(problem, backend, budget)
    problem.requiring_grad()
    keywords = problem.keywords | dict(logits_budget=budget, strip_bytes=20_000, backend=backend)

    def loss(hidden, weight):
        return orpo_loss(hidden, weight, problem.labels, **keywords).loss

    checkpoint(loss, problem.hidden, problem.weight, use_reentrant=False).backward()
    assert torch.equal(problem.hidden.grad, expected[1]) and torch.equal(problem.weight.grad, expected[2])
