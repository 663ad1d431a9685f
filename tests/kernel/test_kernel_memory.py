"""Every kernel of the package, its memory accesses watched: inside their tensors, no races, any order, beyond int32."""

import weakref

import pytest
import torch
from kernelcheck.memory import lazily_mapped
from orpo_kernels import eager
from orpo_kernels.head import Head
from orpo_kernels.kept import Kept
from problems import make_problem, relative_error

from orpo import orpo_loss

pytestmark = pytest.mark.kernels(modes=("interpret",))

# A vocabulary of more than one step of kept columns, and budgets that keep none, the first step, all.
V = 600
BUDGETS = pytest.param(0, id="none kept"), pytest.param(120_000, id="some kept"), pytest.param(2**20, id="all kept")


def _loss_and_gradients(problem, budget: int) -> list[torch.Tensor]:
    problem.requiring_grad()
    out = orpo_loss(
        problem.hidden,
        problem.weight,
        problem.labels,
        logits_budget=budget,
        strip_bytes=8192,
        backend="triton",
        **problem.keywords,
    )
    out.loss.backward()
    gradients = [t.grad for t in (problem.hidden, problem.weight, problem.bias) if t is not None and t.grad is not None]
    return [out.loss.detach(), out.chosen_logps, out.rejected_logps, *gradients]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("dtype", "D"), [(torch.float32, 24), (torch.float16, 40)], ids=["float32", "float16"])
def test_no_access_leaves_its_tensor_and_no_two_programs_meet(budget, dtype, D):
    from kernelcheck.races import checked

    # The hidden size ends inside a tile: inside the first one, inside the second one.
    problem = make_problem(D=D, V=V, dtype=dtype, bias=True, softcap=20.0, scale=0.8)
    with checked():
        loss, *_ = _loss_and_gradients(problem, budget)
    truth, dh, dw, _ = problem.truth()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    assert relative_error(loss, truth.loss) < tolerance
    assert relative_error(problem.hidden.grad, dh) < tolerance
    assert relative_error(problem.weight.grad, dw) < tolerance


@pytest.mark.parametrize("budget", BUDGETS)
def test_one_program_sweeps_many_tiles(budget, monkeypatch):
    """As on a real vocabulary: its maximum rises from tile to tile, and kept exponentials are of different maxima."""
    from orpo_kernels.gpu import tiles

    def one_split(blocks_n: int, vocabulary: int, block_v: int, multiprocessors: int) -> tuple[int, int]:
        return 1, -(-vocabulary // block_v) * block_v

    monkeypatch.setattr(tiles, "vocabulary_splits", one_split)
    problem = make_problem(V=V)
    loss, *_ = _loss_and_gradients(problem, budget)
    truth, dh, dw, _ = problem.truth()
    assert relative_error(loss, truth.loss) < 1e-6
    assert relative_error(problem.hidden.grad, dh) < 1e-6
    assert relative_error(problem.weight.grad, dw) < 1e-6


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_frozen_head_is_watched_too(budget):
    from kernelcheck.races import checked

    problem = make_problem(V=V).requiring_grad(weight=False)
    with checked():
        keywords = dict(logits_budget=budget, strip_bytes=8192, backend="triton")
        orpo_loss(problem.hidden, problem.weight, problem.labels, **keywords, **problem.keywords).loss.backward()
    assert relative_error(problem.hidden.grad, problem.truth()[1]) < 1e-6


@pytest.mark.parametrize("by_operator", [False, True], ids=["eager", "operator"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_strip_of_gradients_is_alive(dtype, budget, frozen, by_operator, monkeypatch):
    """What one strip was made into is gone before the next one is made, whether from logits or from exponentials.

    That of kept exponentials is in their place where nobody looks at operators: once, and no strip at all.
    """
    from orpo_kernels.gpu import stages as gpu_stages

    made, alive, in_place = [], [], []

    def watched(function):
        def call(*arguments):
            alive.append(sum(ref() is not None for ref in made))
            strip = function(*arguments)
            g_NW = strip[0] if isinstance(strip, tuple) else strip
            if isinstance(arguments[0], Kept) and arguments[0].overwrite:
                in_place.append(g_NW.untyped_storage().data_ptr() == arguments[0].exps.untyped_storage().data_ptr())
            else:
                made.append(weakref.ref(g_NW))
            return strip

        return call

    for name in ("logit_grad", "kept_grad"):
        monkeypatch.setattr(gpu_stages, name, watched(getattr(gpu_stages, name)))
    if by_operator:
        monkeypatch.setattr(eager, "is_unseen", lambda *tensors: False)
    problem = make_problem(V=V, dtype=dtype).requiring_grad(weight=not frozen)
    keywords = dict(logits_budget=budget, strip_bytes=16384, backend="triton")
    orpo_loss(problem.hidden, problem.weight, problem.labels, **keywords, **problem.keywords).loss.backward()
    assert not any(alive) and all(in_place)
    # A frozen head has no backward, so its exponentials are used up whoever looks.
    if budget and (frozen or not by_operator):
        assert in_place
    else:
        assert len(alive) > 2 and not in_place


@pytest.mark.parametrize("schedule", ["shuffled", "interleaved"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_order_of_programs_changes_no_bit(schedule, budget):
    from kernelcheck import schedules

    expected = _loss_and_gradients(make_problem(V=V, bias=True), budget)
    with getattr(schedules, schedule)(seed=5):
        found = _loss_and_gradients(make_problem(V=V, bias=True), budget)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Beyond int32: tensors of more than 2^31 elements, lazily mapped, of which only the last rows are touched.
# The last block of rows, of 4 or more, holds at least LAST of them.
ROWS, WIDE = 2**21 + 7, 1040
LAST = 3


def _last_program(size: int) -> int:
    return size - 1


def _statistics(z_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log sum_{v != y} exp z, z_y) in float64."""
    targets = targets_N[:, None]
    z_NV = z_NV.double()
    return z_NV.scatter(1, targets, -torch.inf).logsumexp(1), z_NV.gather(1, targets)[:, 0]


def _lse(lse_N: torch.Tensor) -> torch.Tensor:
    """lse in two parts that are both needed."""
    return torch.stack([lse_N - 2, torch.full_like(lse_N, 2.0)])


def test_weight_rows_beyond_int32():
    from kernelcheck.races import checked
    from orpo_kernels.gpu.logit_grad import logit_grad
    from orpo_kernels.gpu.logit_stats import logit_stats

    v, d, stride = 140, 32, 2**24
    weight = lazily_mapped((v - 1) * stride + d, torch.float16).as_strided((v, d), (stride, 1))
    weight.copy_(torch.randn(v, d, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(5, d, generator=torch.Generator().manual_seed(1)).half()
    targets = torch.tensor([0, 60, 127, 130, 139])
    z = x.double() @ weight.double().T
    others, target = _statistics(z, targets)
    with checked():
        max_KN, sum_KN, target_N = logit_stats(x, targets, Head(weight))
        g = logit_grad(x, targets, _lse(z.logsumexp(1).float()), torch.zeros(5), None, Head(weight))
    torch.testing.assert_close((max_KN.double() + sum_KN.double().log()).logsumexp(0), others, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target_N.double(), target, rtol=1e-5, atol=1e-5)
    expected = -z.softmax(1).scatter(1, targets[:, None], 0)
    torch.testing.assert_close(g.double(), expected, rtol=1e-3, atol=1e-5)


def test_rows_of_hidden_states_beyond_int32():
    from kernelcheck.races import checked
    from kernelcheck.schedules import only
    from orpo_kernels.gpu.logit_grad import logit_grad
    from orpo_kernels.gpu.logit_stats import logit_stats

    d, v = 1024, 40
    x = lazily_mapped(ROWS * d, torch.float16).view(ROWS, d)
    x[-LAST:] = torch.randn(LAST, d, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(v, d, generator=torch.Generator().manual_seed(1)).half() * d**-0.5
    targets, zeros = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS)
    z = x[-LAST:].double() @ weight.double().T
    others, target = _statistics(z, targets[-LAST:])
    with checked(), only(_last_program):
        max_KN, sum_KN, target_N = logit_stats(x, targets, Head(weight))
        g = logit_grad(x, targets, _lse(zeros + 5), zeros, None, Head(weight))
    torch.testing.assert_close((max_KN + sum_KN.log())[-1, -LAST:].double(), others, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target_N[-LAST:].double(), target, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(g[-LAST:, 1:].double(), -torch.exp(z - 5)[:, 1:], rtol=1e-2, atol=1e-5)


def test_a_gradient_of_more_than_2_to_the_31_elements():
    from kernelcheck.races import checked
    from kernelcheck.schedules import only
    from orpo_kernels.gpu.logit_grad import logit_grad

    x, weight = torch.zeros(ROWS, 16).half(), torch.zeros(WIDE, 16).half()
    targets, ones = torch.full((ROWS,), WIDE - 1), torch.ones(ROWS)
    with checked(), only(_last_program):
        g = logit_grad(x, targets, _lse(ones), ones * 0.25, None, Head(weight))
    assert g.numel() > 2**31
    assert (g[-LAST:, -1] == 0.25).all()
    torch.testing.assert_close(g[-LAST:, -9:-1].float(), torch.full((LAST, 8), -0.36788), rtol=1e-3, atol=0)


def test_kept_exponentials_beyond_int32():
    from kernelcheck.races import checked
    from kernelcheck.schedules import only
    from orpo_kernels.gpu.kept_grad import kept_grad
    from orpo_kernels.gpu.logit_stats import logit_stats
    from orpo_kernels.kept import Kept

    kept = Kept(WIDE, lazily_mapped(ROWS * 1088, torch.float16), lazily_mapped(ROWS * 17, torch.float32))
    assert kept.stride == 1088 and ROWS * kept.stride > 2**31
    x = lazily_mapped(ROWS * 16, torch.float16).view(ROWS, 16)
    x[-LAST:] = torch.randn(LAST, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(WIDE, 16, generator=torch.Generator().manual_seed(1)).half() / 8
    targets, zeros = torch.full((ROWS,), WIDE - 1), torch.zeros(ROWS)
    z = x[-LAST:].double() @ weight.double().T
    with checked(), only(_last_program):
        logit_stats(x, targets, Head(weight), WIDE, kept)
        g = kept_grad(kept, targets, _lse(zeros + 5), zeros + 0.25, None, 0, WIDE)
    # Of the last tile, that of the last program.
    assert (g[-LAST:, -1] == 0.25).all()
    torch.testing.assert_close(g[-LAST:, 1024:-1].double(), -torch.exp(z - 5)[:, 1024:-1], rtol=1e-2, atol=1e-5)
