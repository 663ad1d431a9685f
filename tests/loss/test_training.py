"""The loss inside training loops: loss scaling, accumulation into .grad, mixed graphs, and what it refuses there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import make_problem, relative_error

from orpo import FusedLinearORPOLoss, orpo_loss, sequence_logprobs


def loss_of(problem, **keywords):
    return orpo_loss(problem.hidden, problem.weight, problem.labels, **problem.keywords, **keywords).loss


@pytest.mark.parametrize("budget", [0, 2**20], ids=["strips", "bins"])
def test_float16_with_a_grad_scaler(budget):
    # Tokens of the whole batch in the denominator push gradients far below float16's smallest number.
    problem = make_problem(dtype=torch.float16).requiring_grad()
    problem.beta = 0.0
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    tokens = 2e6
    loss = loss_of(problem, logits_budget=budget, num_nll_tokens=tokens)
    scaler.scale(loss).backward()
    _, dh, dw, _ = problem.truth()
    own = (problem.rows.in_nll_N).sum() / tokens
    assert relative_error(problem.hidden.grad.double() / 2**24, dh * own) < 2e-3
    assert relative_error(problem.weight.grad.double() / 2**24, dw * own) < 2e-3


def test_gradients_accumulate_like_any_other():
    problem = make_problem().requiring_grad()
    loss_of(problem).backward()
    once = problem.weight.grad.clone()
    loss_of(problem).backward()
    torch.testing.assert_close(problem.weight.grad, 2 * once)


def test_loss_is_part_of_a_larger_graph():
    problem = make_problem().requiring_grad()
    before = torch.randn(24, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hidden = problem.hidden.detach() @ before
    problem.hidden = hidden
    (loss_of(problem) * 3 + before.square().sum()).backward()
    truth = make_problem()
    truth.hidden = hidden.detach()
    _, dh, dw, _ = truth.truth()
    exact = 3 * (make_problem().hidden.double().reshape(-1, 24).T @ dh.reshape(-1, 24)) + 2 * before.detach()
    assert relative_error(before.grad, exact) < 1e-5 and relative_error(problem.weight.grad, 3 * dw) < 1e-5


def test_tied_weights_get_both_gradients():
    problem = make_problem()
    weight = problem.weight.requires_grad_()
    tokens = torch.randint(0, 203, (6, 17), generator=torch.Generator().manual_seed(0))
    problem.hidden = torch.nn.functional.embedding(tokens, weight)
    loss_of(problem).backward()
    _, dh, dw, _ = problem.truth()
    exact = dw.index_add(0, tokens.flatten(), dh.reshape(-1, 24))
    assert relative_error(weight.grad, exact) < 1e-6


def test_dtensors_are_refused_with_what_to_do(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        problem, mesh = make_problem(), init_device_mesh("cpu", (1,))
        whole = problem.weight
        problem.weight = distribute_tensor(whole, mesh, [Replicate()])
        with pytest.raises(ValueError, match=r"lm_head_weight is a DTensor.*forward"):
            loss_of(problem)
        # Cut by rows it is what tensor parallel makes; Liger's call has no group for it.
        problem.weight = distribute_tensor(whole, mesh, [Shard(0)])
        assert loss_of(problem).isfinite()
        with pytest.raises(ValueError, match=r"lin_weight is a DTensor.*forward"):
            FusedLinearORPOLoss()(problem.weight, problem.hidden, problem.labels)
        hidden = distribute_tensor(problem.hidden, mesh, [Replicate()])
        with pytest.raises(ValueError, match=r"hidden is a DTensor.*to_local"):
            sequence_logprobs(hidden, problem.weight, problem.labels)
    finally:
        dist.destroy_process_group()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(3, 12), st.integers(1, 9), st.integers(1, 40)),
    seed=st.integers(0, 10**6),
    empty=st.sets(st.integers(0, 7)),
    span=st.booleans(),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    budget=st.sampled_from([0, 400, 2000, 2**20]),
    strip=st.sampled_from([1, 300, 10**5]),
    needs=st.tuples(st.booleans(), st.booleans()),
)
def test_any_batch_equals_the_reference(shape, seed, empty, span, bias, softcap, budget, strip, needs):
    P, T, D, V = shape
    problem = make_problem(
        P, T, D, V, dtype=torch.float64, seed=seed, prompt_in_nll=span, bias=bias, softcap=softcap
    ).requiring_grad(*needs)
    for s in empty:
        if s < 2 * P:
            problem.labels[s] = -100
    out = orpo_loss(
        problem.hidden,
        problem.weight,
        problem.labels,
        logits_budget=budget,
        strip_bytes=strip,
        **problem.keywords,
    )
    truth, dh, dw, db = problem.truth()
    torch.testing.assert_close(out.loss.detach(), truth.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.log_odds, truth.log_odds_P, rtol=1e-9, atol=1e-9)
    if not out.loss.requires_grad:
        return
    out.loss.backward()
    for tensor, exact in ((problem.hidden, dh), (problem.weight, dw), (problem.bias, db)):
        if tensor is not None and tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, exact, rtol=1e-9, atol=1e-11)
