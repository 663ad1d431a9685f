"""The operator under autograd: every schedule and backend against float64 truth, bit for bit where that is promised."""

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from orpo_kernels import fused, logprobs
from orpo_kernels.head import strip_width, strips
from orpo_kernels.plan import STRIP_BYTES
from orpo_kernels.rows import Rows
from orpo_kernels.settings import LossSettings
from problems import make_problem, relative_error
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from orpo import orpo_loss, orpo_loss_from_rows, token_logprobs

# Forces several strips and, with the budgets below, several bins and an oversized pair at these sizes. Triton has no
# bins: of the last budget it keeps every exponential.
STRIP = 8192
BUDGETS = (
    pytest.param(0, id="strips"),
    pytest.param(30_000, id="oversized pairs"),
    pytest.param(80_000, id="bins"),
    pytest.param(2**20, id="one bin"),
)
TORCH = pytest.param("torch", id="torch")
TRITON = pytest.param("triton", id="triton", marks=pytest.mark.kernels)
backends = pytest.mark.parametrize("backend", [TORCH, TRITON])

# What torch itself is off by in the same dtype at these sizes (full logits, autograd), and a little.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 6e-4}


def run(problem, backend, budget=None, strip_bytes=STRIP, grad=True):
    out = orpo_loss(
        problem.hidden,
        problem.weight,
        problem.labels,
        logits_budget=budget,
        strip_bytes=strip_bytes,
        backend=backend,
        **problem.keywords,
    )
    if grad:
        out.loss.backward()
    return out


@backends
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    ("bias", "scale", "softcap", "prompt_in_nll"),
    [(False, 1.0, None, True), (True, 0.7, None, False), (True, 1.3, 5.0, True)],
    ids=["plain", "bias and scale", "softcap"],
)
def test_float32_is_exact(backend, budget, bias, scale, softcap, prompt_in_nll, kernel_device):
    device = kernel_device if backend == "triton" else "cpu"
    problem = make_problem(
        bias=bias, scale=scale, softcap=softcap, prompt_in_nll=prompt_in_nll, device=device
    ).requiring_grad()
    out = run(problem, backend, budget)
    truth, dh, dw, db = problem.truth()
    P = out.chosen_logps.shape[0]
    assert relative_error(out.loss, truth.loss) < 1e-6
    assert relative_error(torch.cat([out.chosen_logps, out.rejected_logps]), truth.mean_logp_S) < 1e-6
    assert relative_error(out.log_odds, truth.log_odds_P) < 1e-5 and P == truth.log_odds_P.shape[0]
    assert relative_error(problem.hidden.grad, dh) < 1e-6
    assert relative_error(problem.weight.grad, dw) < 1e-6
    if bias:
        assert relative_error(problem.bias.grad, db) < 1e-6


@backends
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(backend, budget, dtype, kernel_device):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("float64 runs on the torch backend alone")
    device = kernel_device if backend == "triton" else "cpu"
    problem = make_problem(dtype=dtype, bias=True, device=device).requiring_grad()
    out = run(problem, backend, budget)
    truth, dh, dw, db = problem.truth()
    # Logits are float32 inside whatever comes in, so the loss is exact to float32 even for 8-bit mantissas.
    assert relative_error(out.loss, truth.loss) < min(1e-5, TOLERANCE[dtype])
    for grad, exact in ((problem.hidden.grad, dh), (problem.weight.grad, dw), (problem.bias.grad, db)):
        assert grad.dtype == dtype and relative_error(grad, exact) < TOLERANCE[dtype]


@backends
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
def test_each_gradient_alone(backend, budget, needs, kernel_device):
    problem = make_problem(bias=True, softcap=4.0, device=kernel_device if backend == "triton" else "cpu")
    problem.requiring_grad(*map(bool, needs))
    run(problem, backend, budget)
    _, *exact = problem.truth()
    for tensor, wanted, truth in zip((problem.hidden, problem.weight, problem.bias), needs, exact, strict=True):
        assert (tensor.grad is not None) == bool(wanted)
        if wanted:
            assert relative_error(tensor.grad, truth) < 1e-6


@backends
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_repetition_and_no_grad_are_bitwise_the_same(backend, budget, frozen, kernel_device):
    problem = make_problem(device=kernel_device if backend == "triton" else "cpu")
    losses, grads = [], []
    for _ in range(2):
        problem.requiring_grad(weight=not frozen)
        losses.append(run(problem, backend, budget).loss.detach())
        grads.append([t.grad for t in (problem.hidden, problem.weight) if t.grad is not None])
    with torch.no_grad():
        losses.append(run(problem, backend, budget, grad=False).loss)
    assert losses[0] == losses[1] == losses[2]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@backends
@pytest.mark.parametrize("budget", BUDGETS)
def test_upstream_gradient_and_retained_graph(backend, budget, kernel_device):
    problem = make_problem(bias=True, device=kernel_device if backend == "triton" else "cpu").requiring_grad()
    inputs = (problem.hidden, problem.weight, problem.bias)
    loss = run(problem, backend, budget, grad=False).loss
    one = torch.autograd.grad(loss, inputs, retain_graph=True)
    half = torch.autograd.grad(0.5 * loss + 3.0, inputs, retain_graph=True)
    # Gradients that were handed out belong to the caller, who may overwrite them.
    for gradient in half:
        gradient.mul_(2)
    # The last call frees the graph, and may use up what the others had to keep.
    again = torch.autograd.grad(0.5 * loss, inputs)
    for a, b, c in zip(one, half, again, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9)
        assert torch.equal(0.5 * a, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


def test_second_derivatives_refuse():
    problem = make_problem().requiring_grad()
    for budget in (0, 2**20):
        loss = run(problem, "torch", budget, grad=False).loss
        (grad,) = torch.autograd.grad(loss, problem.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="linear_orpo_backward"):
            grad.sum().backward()


needs = pytest.mark.parametrize("needs", [(True, True), (True, False)], ids=["trained head", "frozen head"])


@backends
@pytest.mark.parametrize("budget", BUDGETS)
@needs
def test_opcheck(backend, budget, needs, kernel_device):
    problem = make_problem(P=2, T=9, D=8, V=131, device=kernel_device if backend == "triton" else "cpu")
    problem.requiring_grad(*needs)
    rows, numbers = problem.rows, LossSettings().numbers()
    settings = dict(logits_budget=budget, strip_bytes=STRIP, backend=backend, needs=[*needs, False, not needs[1]])
    tensors = problem.hidden.flatten(0, 1), problem.weight, None
    torch.library.opcheck(
        fused.linear_orpo,
        (*tensors, list(rows.arrays), numbers),
        dict(pairs=rows.pairs, source="labels", all_count=True, **settings),
    )
    targets = rows.targets_N[:18].clone()
    torch.library.opcheck(
        logprobs.linear_logprobs, (problem.hidden.flatten(0, 1)[:18], *tensors[1:], targets, numbers), settings
    )


@pytest.mark.parametrize("budget", BUDGETS)
@needs
def test_gradcheck(budget, needs):
    """With torch's defaults, an upstream gradient that is undefined among them."""
    problem = make_problem(P=2, T=5, D=3, V=11, dtype=torch.float64, softcap=3.0).requiring_grad(*needs)
    inputs = problem.hidden, problem.weight

    def loss(hidden, weight):
        keywords = problem.keywords | dict(logits_budget=budget // 100, strip_bytes=200)
        return orpo_loss(hidden, weight, problem.labels, **keywords).loss

    def logps(hidden, weight):
        return token_logprobs(hidden[0], weight, torch.arange(5), strip_bytes=200)

    assert torch.autograd.gradcheck(loss, inputs) and torch.autograd.gradcheck(logps, inputs)


@pytest.mark.kernels(modes=("interpret", "cuda"))
@pytest.mark.parametrize("budget", [0, 2**20], ids=["strips", "kept"])
@needs
def test_gradcheck_of_the_kernels(budget, needs, kernel_device):
    """In float32, whose differences need a wide step; few numbers, each of which takes two calls."""
    problem = make_problem(P=1, T=4, D=2, V=5, device=kernel_device).requiring_grad(*needs)

    def loss(hidden, weight):
        keywords = problem.keywords | dict(logits_budget=budget, strip_bytes=64, backend="triton")
        return orpo_loss(hidden, weight, problem.labels, **keywords).loss

    # The check warns of float32 inputs.
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(loss, (problem.hidden, problem.weight), eps=1e-2, atol=1e-3, rtol=1e-2)


class NoGrad(torch.autograd.Function):
    """Gives its input no gradient at all, which is not one of zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@backends
@pytest.mark.parametrize("budget", BUDGETS)
@needs
def test_an_undefined_upstream_gradient_gives_none(backend, budget, needs, kernel_device):
    problem = make_problem(device=kernel_device if backend == "triton" else "cpu").requiring_grad(*needs)
    x = problem.hidden.flatten(0, 1)
    logp = token_logprobs(x, problem.weight, torch.zeros(len(x), dtype=torch.int64, device=x.device), backend=backend)
    loss = run(problem, backend, budget, grad=False).loss
    (NoGrad.apply(loss) + NoGrad.apply(logp).sum() + problem.hidden.sum()).backward()
    assert (problem.hidden.grad == 1).all() and problem.weight.grad is None


@pytest.mark.parametrize("compiled", [None, "before", "with a tangent"])
def test_forward_mode_is_refused(compiled):
    problem = make_problem()
    functions = (
        lambda hidden: orpo_loss(hidden, problem.weight, problem.labels).loss,
        lambda hidden: token_logprobs(hidden[0], problem.weight, torch.zeros(17, dtype=torch.int64)).sum(),
    )
    for function in functions:
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(function, backend="aot_eager")
        if compiled == "before":
            function(problem.hidden)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="hidden carries a tangent"):
            function(forward_ad.make_dual(problem.hidden, torch.ones_like(problem.hidden)))
        with pytest.raises(NotImplementedError, match="hidden carries a tangent"):
            torch.func.jvp(function, (problem.hidden,), (torch.ones_like(problem.hidden),))


@backends
@pytest.mark.parametrize(
    ("budget", "needs", "units"),
    [(0, (True, True), 8), (2**20, (True, True), 6), (0, (True, False), None), (2**20, (True, False), 4)],
    ids=["strips", "budget", "frozen, strips", "frozen, budget"],
)
def test_flops_are_counted(backend, budget, needs, units, kernel_device):
    """In units of N V D, as kernels/README.md has them."""
    problem = make_problem(device=kernel_device if backend == "triton" else "cpu").requiring_grad(*needs)
    with FlopCounterMode(display=False) as counter:
        run(problem, backend, budget)
    if units is None:
        # A frozen head in torch follows the running maximum; Triton recomputes what it has not kept.
        units = 4 if backend == "torch" else 6
    assert counter.get_total_flops() == units * problem.rows.rows_N.numel() * problem.weight.numel()


def test_flops_of_log_probabilities():
    problem = make_problem().requiring_grad()
    x = problem.hidden[0]
    with FlopCounterMode(display=False) as counter:
        token_logprobs(x, problem.weight, torch.arange(17)).sum().backward()
    assert counter.get_total_flops() == 8 * 17 * problem.weight.numel()


def spread(tensor):
    """The same numbers as a column of a wider array: what lies beside each is another."""
    wide = torch.stack([tensor, torch.zeros_like(tensor), tensor], 1)
    return wide[:, 0]


@backends
@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_and_bias_may_be_columns(backend, budget, kernel_device):
    problem = make_problem(bias=True, device=kernel_device if backend == "triton" else "cpu").requiring_grad()
    rows = problem.rows
    arrays = (rows.rows_N, rows.targets_N, rows.sequence_N, rows.in_response_N, rows.in_nll_N)
    results = []
    for move in (torch.clone, spread):
        bias = move(problem.bias.detach()).requires_grad_()
        problem.requiring_grad()
        moved = Rows(*map(move, arrays), pairs=rows.pairs)
        keywords = dict(lm_head_bias=bias, logits_budget=budget, strip_bytes=STRIP, backend=backend)
        out = orpo_loss_from_rows(problem.hidden, problem.weight, moved, **keywords)
        out.loss.backward()
        results.append((out.loss.detach(), problem.hidden.grad, problem.weight.grad, bias.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@backends
def test_targets_of_log_probabilities_may_be_a_column(backend, frozen, kernel_device):
    problem = make_problem(bias=True, device="cpu" if backend == "torch" else kernel_device)
    results = []
    for move in (torch.clone, spread):
        x = problem.hidden[0].detach().requires_grad_()
        weight = problem.weight.detach().requires_grad_(not frozen)
        targets, bias = move(torch.arange(len(x), device=x.device)), move(problem.bias.detach())
        logp = token_logprobs(x, weight, targets, bias=bias, strip_bytes=2048, backend=backend)
        logp.sum().backward()
        results.append((logp.detach(), x.grad, x.grad if frozen else weight.grad))
    assert all(map(torch.equal, *results))


def test_operators_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which with a second GPU's tensors is another."""
    entered = []

    @contextmanager
    def device_of(tensor):
        entered.append(tuple(tensor.shape))
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    problem = make_problem(P=2, T=9, D=8, V=31).requiring_grad()
    hidden = problem.hidden.flatten(0, 1)
    run(problem, "torch", 0)
    token_logprobs(hidden, problem.weight, torch.zeros(len(hidden), dtype=torch.int64)).sum().backward()
    # Each operator and its backward, which begins with the upstream gradient.
    assert entered == [tuple(hidden.shape), (), tuple(hidden.shape), (len(hidden),)]


@pytest.mark.parametrize("rows", [1, 7, 1000, 10**7])
@pytest.mark.parametrize("vocabulary", [1, 31, 128, 49152, 151937])
@pytest.mark.parametrize("strip_bytes", [1, 4096, STRIP_BYTES])
def test_strips_cover_the_vocabulary_within_their_bytes(rows, vocabulary, strip_bytes):
    width = strip_width(rows, vocabulary, 4, strip_bytes)
    parts = list(strips(vocabulary, width))
    assert parts[0][0] == 0 and parts[-1][1] == vocabulary
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    assert width == 1 or rows * width * 4 <= strip_bytes
