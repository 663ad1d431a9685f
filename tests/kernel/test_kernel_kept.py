"""Exponentials kept from stage 1 for stage 3: of no, some and all columns, against the truth and within the budget."""

from dataclasses import replace

import pytest
import torch
from orpo_kernels import fused
from orpo_kernels.gpu import stages as gpu_stages
from orpo_kernels.head import Head, Needs
from orpo_kernels.kept import TILE, Kept
from orpo_kernels.plan import Way, kept_columns, make_plan, row_tiles_within
from orpo_kernels.settings import LossSettings
from problems import make_problem, relative_error

from orpo import orpo_loss, token_logprobs

V = 600
BUDGETS = {"none": 0, "too little": 20_000, "some": 120_000, "all": 2**20}
budgets = pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
HEADS = {"plain": dict(), "full": dict(bias=True, softcap=6.0, scale=0.8)}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def _run(problem, budget, backend="triton", **more):
    keywords = dict(logits_budget=budget, strip_bytes=20_000, backend=backend) | problem.keywords | more
    return orpo_loss(problem.hidden, problem.weight, problem.labels, **keywords)


def _gradients(problem):
    return [t.grad for t in (problem.hidden, problem.weight, problem.bias) if t is not None and t.grad is not None]


@pytest.mark.kernels
@pytest.mark.parametrize("budget", list(BUDGETS.values())[1:], ids=list(BUDGETS)[1:])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients(dtype, head, frozen, budget, kernel_device):
    problem = make_problem(V=V, dtype=dtype, device=kernel_device, **HEADS[head])
    problem.requiring_grad(weight=not frozen, bias=not frozen)
    out = _run(problem, budget)
    out.loss.backward()
    truth, *exact = problem.truth()
    assert relative_error(out.loss, truth.loss) < 2e-6
    for tensor, expected in zip((problem.hidden, problem.weight, problem.bias), exact, strict=True):
        if tensor is not None and tensor.grad is not None:
            assert relative_error(tensor.grad, expected) < TOLERANCE[dtype]
    with torch.no_grad():
        assert torch.equal(_run(problem, budget).loss, out.loss.detach())


@pytest.mark.kernels
@pytest.mark.parametrize("budget", [BUDGETS["some"], BUDGETS["all"]], ids=["some", "all"])
@pytest.mark.parametrize("softcap", [None, 300.0], ids=["", "softcap"])
def test_logits_far_apart(budget, softcap, kernel_device):
    """Maxima that rise by hundreds from tile to tile, and exponentials that vanish beside them."""
    problem = make_problem(V=V, softcap=softcap, device=kernel_device)
    with torch.no_grad():
        problem.hidden.mul_(60)
    problem.requiring_grad()
    _run(problem, budget).loss.backward()
    _, dh, dw, _ = problem.truth()
    assert relative_error(problem.hidden.grad, dh) < 1e-5
    assert relative_error(problem.weight.grad, dw) < 1e-5


# float16's dW lies among its subnormal numbers.
SATURATED = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-3}


@pytest.mark.parametrize(
    ("backend", "budget"),
    [
        ("torch", 0),
        ("torch", 2**20),
        *(pytest.param("triton", b, marks=pytest.mark.kernels) for b in (0, 25_000, 2**20)),
    ],
)
@pytest.mark.parametrize("dtype", SATURATED, ids=str)
def test_logits_far_above_their_softcap(dtype, backend, budget, kernel_device):
    """Five times the cap, where a logit keeps 2e-4 of its gradient."""
    problem = make_problem(P=1, T=9, V=300, softcap=30.0, device="cpu" if backend == "torch" else kernel_device)
    problem.hidden, problem.weight = (1 + problem.hidden / 10).to(dtype), (6.25 + problem.weight / 3).to(dtype)
    problem.requiring_grad()
    _run(problem, budget, backend).loss.backward()
    _, _, dw, _ = problem.truth()
    # Kept exponentials have the slope from the logit, as eager torch has: in float32 that is off by 2e-4.
    tolerance = max(SATURATED[dtype], 1e-3 if backend == "triton" and budget else 0)
    assert relative_error(problem.weight.grad, dw) < tolerance
    x, targets = problem.hidden.detach().flatten(0, 1)[problem.rows.rows_N], problem.rows.targets_N

    def frozen_head_gradient(x, weight, **keywords):
        x.requires_grad_()
        token_logprobs(x, weight, targets, logit_softcap=30.0, strip_bytes=20_000, **keywords).sum().backward()
        return x.grad

    weight = problem.weight.detach()
    exact = frozen_head_gradient(x.double(), weight.double(), backend="torch")
    found = frozen_head_gradient(x, weight, backend=backend, logits_budget=budget)
    # The rows of the head are nearly the same, and their weighted sum what is left of them.
    assert relative_error(found, exact) < 50 * tolerance


@pytest.mark.kernels
def test_a_target_that_rounds_beyond_its_softcap_keeps_its_sign(kernel_device):
    """logp + lse is the target's logit but for rounding, and 1 - (z / c)^2 of one above c is negative."""
    kept = Kept(TILE, *(torch.zeros(n, device=kernel_device) for n in (TILE, 1)))
    head = Head(torch.zeros(TILE, 2, device=kernel_device), softcap=30.0)
    logp_N, lse_2N = (torch.tensor(v, device=kernel_device) for v in ([-1.0], [[30.0], [1.00001]]))
    targets_N = torch.tensor([5], device=kernel_device)
    terms, _ = gpu_stages.row_terms(logp_N, lse_2N, head, torch.float32)
    g_NW = gpu_stages.kept_grad(kept, targets_N, terms, lse_2N, 0, TILE)
    assert g_NW[0, 5] == 0 and not g_NW.any()


@pytest.mark.kernels
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_a_masked_tile_before_very_small_logits(frozen, kernel_device):
    """A tile without a finite logit has no maximum; what is kept of it must not meet the others' exponent."""
    problem = make_problem(V=V, bias=True, device=kernel_device)
    with torch.no_grad():
        problem.bias.sub_(200)
        problem.bias[:128] = -torch.inf
        problem.labels[problem.labels.ge(0) & problem.labels.lt(128)] = 130
    keywords = problem.keywords | dict(nll_labels=None, logits_budget=2**20, backend="triton")
    problem.requiring_grad(weight=not frozen, bias=False)
    orpo_loss(problem.hidden, problem.weight, problem.labels, **keywords).loss.backward()
    kept = _gradients(problem)
    problem.requiring_grad(weight=not frozen, bias=False)
    orpo_loss(problem.hidden, problem.weight, problem.labels, **keywords | dict(logits_budget=0)).loss.backward()
    for found, expected in zip(kept, _gradients(problem), strict=True):
        assert found.isfinite().all() and relative_error(found, expected.double()) < 1e-6


@pytest.mark.kernels
@budgets
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_compiler_is_told_the_sizes(budget, weight_dtype, kernel_device):
    """The outputs have the shapes of the fake operator."""
    from torch._subclasses import FakeTensorMode

    problem = make_problem(V=V, dtype=torch.bfloat16, device=kernel_device)
    rows = problem.rows
    tensors = problem.hidden.detach().flatten(0, 1), problem.weight.detach().to(weight_dtype)
    settings = dict(
        pairs=rows.pairs, source="labels", all_count=True, logits_budget=budget, strip_bytes=20_000,
        backend="triton", needs=[True, True, False, False],
    )  # fmt: skip
    real = fused.Output(*fused.linear_orpo(*tensors, None, list(rows.arrays), LossSettings().numbers(), **settings))
    with FakeTensorMode() as mode:
        arrays = [mode.from_tensor(t) for t in rows.arrays]
        fake = fused.linear_orpo(
            *map(mode.from_tensor, tensors), None, arrays, mode.from_tensor(LossSettings().numbers()), **settings
        )
    assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in fake]
    assert (real.exps.numel() > 0) == (budget > BUDGETS["too little"])


@pytest.mark.kernels
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("budget", [BUDGETS["some"], BUDGETS["all"]], ids=["some", "all"])
def test_a_weight_stored_by_columns(budget, frozen, kernel_device):
    """Entries one after the other along the vocabulary, as of a transposed parameter."""
    problem = make_problem(V=V, device=kernel_device)
    problem.weight = problem.weight.detach().T.contiguous().T
    assert problem.weight.stride() == (1, V)
    problem.requiring_grad(weight=not frozen)
    out = _run(problem, budget)
    out.loss.backward()
    truth, dh, dw, _ = problem.truth()
    assert relative_error(out.loss, truth.loss) < 2e-6
    assert relative_error(problem.hidden.grad, dh) < 1e-6
    assert frozen or relative_error(problem.weight.grad, dw) < 1e-6


@pytest.mark.kernels
@budgets
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_no_row_counts(frozen, budget, kernel_device):
    problem = make_problem(V=V, device=kernel_device)
    problem.labels.fill_(-100)
    problem.nll_labels = None
    problem.requiring_grad(weight=not frozen)
    out = _run(problem, budget)
    out.loss.backward()
    assert out.loss == 0
    assert not any(gradient.any() for gradient in _gradients(problem)) and len(_gradients(problem)) == 2 - frozen


@pytest.mark.kernels
def test_backward_twice_gives_the_same_gradients(kernel_device):
    problem = make_problem(V=V, device=kernel_device).requiring_grad()
    loss = _run(problem, BUDGETS["some"]).loss
    loss.backward(retain_graph=True)
    first = [gradient.clone() for gradient in _gradients(problem)]
    loss.backward()
    for once, twice in zip(first, _gradients(problem), strict=True):
        assert torch.equal(2 * once, twice)


@pytest.mark.kernels
def test_a_strip_may_begin_and_end_anywhere(kernel_device):
    from orpo_kernels.gpu.kept_grad import kept_grad

    n, columns = 37, 200
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, columns, generator=g)
    padded = torch.nn.functional.pad(z, (0, -columns % TILE), value=-torch.inf).view(n, -1, TILE)
    maxima = padded.amax(2)
    exps = (padded - maxima[:, :, None]).exp().flatten(1)
    targets = torch.randint(0, 2 * columns, (n,), generator=g)
    inside = targets < columns
    held = Kept(columns, exps.to(kernel_device).flatten(), maxima.T.contiguous().to(kernel_device).flatten())
    lse = torch.cat([z, torch.randn(n, 3, generator=g)], 1).logsumexp(1)
    parts = torch.stack([lse - 1, torch.ones(n)])
    expected = -(z - lse[:, None]).exp()
    expected[inside, targets[inside]] = 0.25
    for first, last in ((0, 200), (1, 3), (63, 65), (64, 128), (100, 199)):
        found = kept_grad(
            held, *(t.to(kernel_device) for t in (targets, parts, torch.full((n,), 0.25))), None, first, last
        )
        torch.testing.assert_close(found.cpu(), expected[:, first:last], rtol=1e-5, atol=1e-7)


def test_columns_that_fit():
    # 64 float32 exponentials and their maximum: 260 bytes of one row.
    assert row_tiles_within(10, 600, 4, 260 * 39) == 0 and row_tiles_within(10, 600, 4, 260 * 40) == 40
    assert row_tiles_within(10, 600, 4, 260 * 100) == 100 and row_tiles_within(10, 600, 4, 2**30) == 10 * 10
    # Less than an eighth of 10 x 100 tiles.
    assert row_tiles_within(10, 6400, 4, 260 * 124) == 0 and row_tiles_within(10, 6400, 4, 260 * 125) == 125
    assert kept_columns(10, 600, 100) == 600 and kept_columns(10, 600, 99) == 512
    assert kept_columns(10, 600, 39) == 0 and kept_columns(10, 600, 40) == 256
    # Fewer rows leave room for more columns, never for more than there are.
    assert kept_columns(5, 600, 40) == 512 and kept_columns(0, 600, 40) == 600
    assert Kept(600, torch.empty(0), torch.empty(0)).stride == 640


@pytest.mark.kernels(modes=("interpret",))
@budgets
def test_no_more_is_kept_than_the_budget(budget, monkeypatch):
    made, original = [], fused.buffers
    monkeypatch.setattr(fused, "buffers", lambda *arguments: made.append(original(*arguments)) or made[-1])
    problem = make_problem(V=V).requiring_grad()
    with torch.no_grad():
        _run(problem, budget)
    assert sum(t.nbytes for pair in made for t in pair) == 0
    _run(problem, budget)
    held = sum(t.nbytes for pair in made for t in pair)
    assert held <= budget and (held == 0) == (budget in (BUDGETS["none"], BUDGETS["too little"]))


@pytest.mark.kernels(modes=("interpret",))
def test_a_padded_batch_keeps_no_more_than_its_rows_that_count(monkeypatch):
    made, original = [], fused.buffers
    monkeypatch.setattr(fused, "buffers", lambda *arguments: made.append(original(*arguments)) or made[-1])
    problem = make_problem(V=V).requiring_grad()
    _run(problem, 2**30)
    counted = problem.rows.rows_N.numel()
    assert [t.numel() for t in made[0]] == [counted * 640, counted * 10] and counted < problem.labels.numel()


def test_the_way_of_a_call():
    x, weight, trained, nothing = torch.empty(4, 8), torch.empty(600, 8), Needs(True, True, False), Needs(*[False] * 3)

    def plan(backend, budget, needs=trained, frozen=False, **more):
        return make_plan(x, weight, 4, replace(needs, frozen=frozen), budget, None, backend, **more)

    assert plan("triton", 2**20).way == Way.EXPONENTIALS and plan("triton", 2**20).row_tiles == 40
    assert plan("triton", 2**20, nothing) == replace(plan("triton", 2**20), needs=nothing)
    assert plan("triton", 0).way == Way.STRIPS and plan("triton", 2**20, frozen=True).way == Way.BLOCKS
    assert plan("torch", 2400).way == Way.TILES and plan("torch", 2399).way == Way.STRIPS
    assert plan("torch", None).way == Way.TILES and plan("torch", None, frozen=True).way == Way.RUNNING
    assert plan("torch", 2400, frozen=True).way == Way.TILES
    assert plan("torch", None, has_pairs=False).way == Way.STRIPS
    assert plan("torch", 0).recomputes and not plan("torch", 2400).recomputes
    assert not plan("torch", 0, Needs(True, False, False), frozen=True).recomputes
