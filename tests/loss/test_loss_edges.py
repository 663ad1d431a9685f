"""The public loss in every corner: certain and empty answers, masked vocabularies, odd shapes, mixed dtypes."""

import math

import pytest
import torch
from problems import Problem, make_problem, relative_error

from orpo import orpo_loss, token_logprobs

BUDGETS = pytest.mark.parametrize("budget", [0, 2**20], ids=["strips", "bins"])


@BUDGETS
@pytest.mark.parametrize("certain", ["chosen", "rejected", "both"])
@pytest.mark.parametrize("mean_logp", [0.0, -1e-12, -1e-9, -1e-6, -1e-3, -1.0, -50.0, -200.0])
def test_any_mean_log_probability_through_the_whole_loss(mean_logp, certain, budget):
    # A head with V = 2 and W = [[1], [0]]: logp of token 0 is -softplus(-x), so x chooses it freely.
    def state(logp):
        return 200.0 if logp == 0.0 else -math.log(math.expm1(-logp)) if logp > -30 else logp

    x_w = state(mean_logp) if certain != "rejected" else state(-0.7)
    x_l = state(mean_logp) if certain != "chosen" else state(-0.4)
    hidden = torch.tensor([[[x_w]], [[x_l]]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    labels = torch.zeros(2, 1, dtype=torch.int64)
    out = orpo_loss(hidden, weight, labels, shift=False, beta=0.5, logits_budget=budget)
    out.loss.backward()
    assert torch.isfinite(out.loss) and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    # In exact arithmetic a single token's log odds is its logit difference, here x itself: r = x_w - x_l.
    if mean_logp != 0.0:
        exact_x = hidden.detach().double().flatten()
        nll = torch.nn.functional.softplus(-exact_x[0], threshold=700)
        r = exact_x[0] - exact_x[1]
        assert out.log_odds.item() == pytest.approx(r.item(), rel=2e-5, abs=2e-4)
        loss = nll + 0.5 * torch.nn.functional.softplus(-r, threshold=700)
        assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
        slope = -0.5 * torch.sigmoid(-r)
        grad_w = slope - torch.sigmoid(-exact_x[0])
        torch.testing.assert_close(hidden.grad.flatten().double(), torch.stack([grad_w, -slope]), rtol=1e-4, atol=1e-6)


@BUDGETS
def test_empty_answers_leave_the_rest_alone(budget):
    problem = make_problem(P=3).requiring_grad()
    problem.labels[1] = -100
    problem.labels[5] = -100
    out = orpo_loss(problem.hidden, problem.weight, problem.labels, logits_budget=budget, **problem.keywords)
    out.loss.backward()
    truth, dh, dw, _ = problem.truth()
    assert out.pair_mask.tolist() == [True, False, False]
    assert relative_error(out.loss, truth.loss) < 1e-6
    assert relative_error(problem.hidden.grad, dh) < 1e-6 and relative_error(problem.weight.grad, dw) < 1e-6


@BUDGETS
def test_no_answer_at_all_leaves_the_nll(budget):
    problem = make_problem().requiring_grad()
    problem.labels[:] = -100
    out = orpo_loss(problem.hidden, problem.weight, problem.labels, logits_budget=budget, **problem.keywords)
    out.loss.backward()
    assert out.loss == out.nll_loss and out.odds_ratio_loss == 0 and not out.pair_mask.any()
    assert torch.isfinite(problem.hidden.grad).all()
    assert all(torch.isfinite(v) for v in out.metrics().values())


@BUDGETS
def test_nothing_counts(budget):
    problem = make_problem(prompt_in_nll=False, bias=True).requiring_grad()
    problem.labels[:] = -100
    out = orpo_loss(problem.hidden, problem.weight, problem.labels, logits_budget=budget, **problem.keywords)
    out.loss.backward()
    assert out.loss == 0
    for tensor in (problem.hidden, problem.weight, problem.bias):
        assert (tensor.grad == 0).all()


@BUDGETS
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_all_logits_far_from_zero(budget, shift):
    problem = make_problem(bias=True).requiring_grad()
    with torch.no_grad():
        problem.bias += shift
    out = orpo_loss(problem.hidden, problem.weight, problem.labels, logits_budget=budget, **problem.keywords)
    out.loss.backward()
    truth, dh, *_ = problem.truth()
    # Logits of 1e4 have an absolute rounding of 1e-3 in float32, whoever computes them.
    assert relative_error(out.loss, truth.loss) < 1e-3 and relative_error(problem.hidden.grad, dh) < 1e-2


@pytest.mark.parametrize(
    ("backend", "budget"),
    [
        ("torch", 0),
        ("torch", 2**20),
        pytest.param("triton", 0, marks=pytest.mark.kernels),
        pytest.param("triton", 2**20, marks=pytest.mark.kernels),
    ],
)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("offset", [2.0**14, 2.0**26])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_all_logits_have_in_common_costs_no_digits(dtype, offset, frozen, backend, budget, kernel_device):
    """Logits that are exact in float32, but of which a logarithm added to them would not be."""
    if (dtype == torch.float64 and backend != "torch") or (dtype == torch.float16 and offset > 65504):
        pytest.skip("not of this dtype")
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.zeros(2, 6, 2), torch.randn(50, 2, generator=g)
    # The second column tells gradients apart, in which the first, of nearly equal numbers, is lost.
    hidden[..., 0], weight[:, 0] = 1.0, offset + 8 * torch.arange(50).remainder(2)
    labels = torch.arange(12).view(2, 6)
    labels[:, :2] = -100
    problem = Problem(hidden.to(dtype), weight.to(dtype), None, labels, None, 1.0, None, 0.3)
    truth, dh, dw, _ = problem.truth()
    device = "cpu" if backend == "torch" else kernel_device
    problem.hidden, problem.weight, problem.labels = (
        t.to(device) for t in (problem.hidden, problem.weight, problem.labels)
    )
    problem.requiring_grad(weight=not frozen)
    keywords = dict(logits_budget=budget, strip_bytes=640, backend=backend) | problem.keywords
    out = orpo_loss(problem.hidden, problem.weight, problem.labels, **keywords)
    with torch.no_grad():
        assert torch.equal(orpo_loss(problem.hidden, problem.weight, problem.labels, **keywords).loss, out.loss)
    out.loss.backward()
    exact = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 6e-4}[dtype]
    assert relative_error(out.loss.cpu(), truth.loss) < min(exact, 1e-6)
    assert relative_error(problem.hidden.grad[..., 1].cpu(), dh[..., 1]) < 3 * exact
    if not frozen:
        assert relative_error(problem.weight.grad.cpu(), dw) < exact


@BUDGETS
@pytest.mark.parametrize("frozen", [False, True])
def test_vocabulary_masked_by_minus_infinity(budget, frozen):
    # Padded vocabularies carry -inf in the bias; whole strips of it must not become NaN.
    problem = make_problem(V=203, bias=True).requiring_grad(weight=not frozen, bias=False)
    with torch.no_grad():
        used = torch.unique(problem.nll_labels[problem.nll_labels >= 0])
        masked = torch.ones(203, dtype=torch.bool)
        masked[used] = False
        problem.bias[masked] = -torch.inf
    strip = 20 * 4 * 8
    out = orpo_loss(
        problem.hidden, problem.weight, problem.labels, logits_budget=budget, strip_bytes=strip, **problem.keywords
    )
    out.loss.backward()
    truth, dh, dw, _ = problem.truth()
    assert relative_error(out.loss, truth.loss) < 1e-6 and relative_error(problem.hidden.grad, dh) < 1e-6
    if not frozen:
        assert relative_error(problem.weight.grad, dw) < 1e-6


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_a_very_low_target_that_is_the_only_finite_logit(frozen):
    """It is certain, and nothing has a gradient; what all others share is infinite beside it."""
    x, weight = torch.tensor([[-100.0]], requires_grad=True), torch.tensor([[1.0], [0.0]], requires_grad=not frozen)
    bias = torch.tensor([0.0, -torch.inf])
    logp = token_logprobs(x, weight, torch.tensor([0]), bias=bias)
    logp.sum().backward()
    assert logp.item() == 0 and x.grad.item() == 0 and (frozen or not weight.grad.any())
    labels = torch.tensor([[-100, 0], [-100, 0]])
    for budget in (0, 2**20):
        hidden, head = torch.full((2, 2, 1), -100.0, requires_grad=True), weight.detach().requires_grad_(not frozen)
        out = orpo_loss(hidden, head, labels, lm_head_bias=bias, logits_budget=budget)
        out.loss.backward()
        assert not hidden.grad.any() and (frozen or not head.grad.any())


def test_a_masked_target_is_infinitely_unlikely():
    problem = make_problem(bias=True)
    problem.bias[problem.labels[0, -1]] = -torch.inf
    out = orpo_loss(problem.hidden, problem.weight, problem.labels, **problem.keywords)
    assert out.nll_loss == torch.inf


@pytest.mark.parametrize("shape", [(1, 2, 4, 1), (1, 2, 3, 2), (1, 1, 5, 7), (4, 65, 7, 251)], ids=str)
def test_smallest_and_odd_shapes(shape):
    P, T, D, V = shape
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * P, T, D, generator=g, requires_grad=True)
    weight = torch.randn(V, D, generator=g, requires_grad=True)
    labels = torch.randint(0, V, (2 * P, T), generator=g)
    for budget in (0, 2**20):
        out = orpo_loss(hidden, weight, labels, shift=False, logits_budget=budget, strip_bytes=64)
        out.loss.backward()
        assert torch.isfinite(out.loss) and torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@BUDGETS
def test_hidden_and_weight_of_different_dtypes(dtypes, budget):
    problem = make_problem()
    problem.hidden, problem.weight = problem.hidden.to(dtypes[0]), problem.weight.to(dtypes[1])
    problem.requiring_grad()
    out = orpo_loss(problem.hidden, problem.weight, problem.labels, logits_budget=budget, **problem.keywords)
    out.loss.backward()
    truth, dh, dw, _ = problem.truth()
    assert problem.hidden.grad.dtype == dtypes[0] and problem.weight.grad.dtype == dtypes[1]
    assert relative_error(out.loss, truth.loss) < 1e-6
    assert relative_error(problem.hidden.grad, dh) < 4e-3 and relative_error(problem.weight.grad, dw) < 4e-3


@BUDGETS
def test_layout_of_the_tensors_does_not_matter(budget):
    problem = make_problem().requiring_grad()
    plain = orpo_loss(problem.hidden, problem.weight, problem.labels, logits_budget=budget, **problem.keywords)
    plain.loss.backward()
    hidden = problem.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weight = problem.weight.detach().T.contiguous().T.requires_grad_()
    labels = problem.labels.T.contiguous().T.int()
    keywords = problem.keywords | {"nll_labels": problem.nll_labels.int()[:3]}
    out = orpo_loss(hidden, weight, labels, logits_budget=budget, **keywords)
    out.loss.backward()
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-6, atol=0)
    assert relative_error(hidden.grad, problem.hidden.grad) < 1e-6
    assert relative_error(weight.grad, problem.weight.grad) < 1e-6


@BUDGETS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-3), (torch.float16, 6e-4)], ids=str)
def test_autocast_computes_as_a_linear_would(dtype, tolerance, budget):
    problem = make_problem().requiring_grad()
    with torch.autocast("cpu", dtype=dtype):
        out = orpo_loss(problem.hidden, problem.weight, problem.labels, logits_budget=budget, **problem.keywords)
        # Backward too: autocast would narrow the float32 products inside.
        out.loss.backward()
    truth, dh, dw, _ = make_problem(dtype=dtype).truth()
    assert out.loss.dtype == torch.float32 and problem.weight.grad.dtype == torch.float32
    assert relative_error(out.loss, truth.loss) < 1e-6
    assert relative_error(problem.hidden.grad, dh) < tolerance
    assert relative_error(problem.weight.grad, dw) < tolerance


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("strip_bytes", [2**27, 2**12], ids=["one strip", "many"])
def test_bfloat16_keeps_the_distance_of_large_logits(strip_bytes, capped, bfloat16_cpu):
    """Logits near 60, where bfloat16 has steps of 0.25, at distances of about 1 from the target's."""
    g = torch.Generator().manual_seed(0)
    x = (1 + 0.1 * torch.randn(32, 64, generator=g)).bfloat16()
    weight = (60 / 64 + 0.1 * torch.randn(300, 64, generator=g)).bfloat16()
    targets = torch.randint(300, (32,), generator=g)
    bias, cap = (torch.randn(300, generator=g).bfloat16(), 50.0) if capped else (None, None)

    def logps(products):
        logits = products if bias is None else cap * torch.tanh(0.5 * (products + bias.double()) / cap)
        return logits.log_softmax(1)[torch.arange(32), targets]

    products = x.double() @ weight.double().T
    expected = logps(products)
    assert (logps(products.bfloat16().double()) - expected).abs().max() > 0.02
    settings = dict(bias=bias, logit_scale=0.5, logit_softcap=cap) if capped else {}
    found = token_logprobs(x, weight, targets, strip_bytes=strip_bytes, backend="torch", **settings)
    assert (found - expected).abs().max() < 0.005


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_evaluation_under_autocast_takes_trainings_way(trained, heads_taken_for_frozen):
    """Autocast's copy of a trained head requires no gradient under no_grad."""
    problem = make_problem(dtype=torch.float32).requiring_grad(True, trained)
    rows = problem.rows
    x = problem.hidden.detach().flatten(0, 1)[rows.rows_N]
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(enabled):
            orpo_loss(problem.hidden, problem.weight, problem.labels, logits_budget=0, **problem.keywords)
            token_logprobs(x, problem.weight, rows.targets_N)
    assert heads_taken_for_frozen == [not trained] * 4


def test_sequences_without_positions_cost_nothing():
    hidden, weight = torch.zeros(2, 0, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    out = orpo_loss(hidden, weight, torch.zeros(2, 0, dtype=torch.long))
    out.loss.backward()
    assert out.loss.item() == 0 and weight.grad.abs().sum() == 0 and hidden.grad.shape == hidden.shape
