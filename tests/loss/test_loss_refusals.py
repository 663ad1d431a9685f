"""What a caller can get wrong is refused in words, with the argument and both numbers."""

import math
from dataclasses import replace

import pytest
import torch
from problems import make_problem

from orpo import FusedLinearORPOLoss, orpo_loss, token_logprobs
from orpo.loss import orpo_loss_from_rows


def refuse(match, **changes):
    problem = make_problem()
    arguments = dict(hidden=problem.hidden, lm_head_weight=problem.weight, labels=problem.labels) | changes
    with pytest.raises(ValueError, match=match):
        orpo_loss(**arguments)


def test_refusals_name_the_argument_and_both_numbers():
    labels, weight, hidden = (getattr(make_problem(), n) for n in ("labels", "weight", "hidden"))
    refuse(r"labels .* got \(5, 17\)", labels=labels[:5], hidden=hidden[:5])
    refuse(r"hidden of shape \(6, 17, 24\) .* labels of shape \(6, 16\)", labels=labels[:, 1:])
    refuse(r"labels .* torch.float32", labels=labels.float())
    refuse(r"nll_labels of shape \(2, 17\) .* \(6, 17\)", nll_labels=labels[:2])
    refuse(r"lm_head_weight of shape \(203, 23\) .* \(6, 17, 24\)", lm_head_weight=weight[:, 1:])
    refuse(r"lm_head_weight has to be float64.* got torch.int64", lm_head_weight=weight.long())
    refuse(r"lm_head_bias of shape \(202,\) .* 203", lm_head_bias=weight[1:, 0])
    refuse(r"labels holds the token 203, .* 203 rows", labels=labels.masked_fill(labels == labels.max(), 203))
    refuse(r"labels holds the token -1,", labels=labels.masked_fill(labels == labels.max(), -1))
    refuse(r"beta .* got -0.1", beta=-0.1)
    refuse(r"nll_weight .* got nan", nll_weight=math.nan)
    refuse(r"num_nll_tokens .* got 0", num_nll_tokens=0)
    refuse(r"num_pairs .* got -1", num_pairs=-1)
    refuse(r"logits_budget .* got -1", logits_budget=-1)
    refuse(r"strip_bytes .* got 0", strip_bytes=0)
    refuse(r"logit_softcap .* got 0", logit_softcap=0)
    refuse(r"logits_budget .* whole number .* got 0.5", logits_budget=0.5)
    refuse(r"strip_bytes .* got inf", strip_bytes=math.inf)
    refuse(r"logit_scale .* got nan", logit_scale=math.nan)
    refuse(r"backend .* got 'cuda'", backend="cuda")
    refuse(r"lm_head_weight is on meta, but hidden is on cpu", lm_head_weight=weight.to("meta"))


@pytest.mark.parametrize("name", ["beta", "nll_weight", "logit_scale", "logit_softcap", "num_nll_tokens", "num_pairs"])
def test_a_setting_gets_no_gradient(name):
    refuse(f"{name} needs a gradient", **{name: torch.tensor(1.0, requires_grad=True)})
    problem = make_problem()
    a, b = (
        orpo_loss(problem.hidden, problem.weight, problem.labels, **{name: value}).loss
        for value in (0.5, torch.tensor(0.5))
    )
    assert a == b


def test_bytes_may_be_written_as_a_power_of_ten():
    problem = make_problem()
    orpo_loss(problem.hidden, problem.weight, problem.labels, logits_budget=5e8, strip_bytes=1e6)


def test_labels_name_the_argument_that_holds_the_token():
    problem = make_problem()
    wrong = problem.labels.masked_fill(problem.labels == problem.labels[:3].max(), 300)
    refuse(r"^nll_labels holds the token 300, but lm_head_weight has 203 rows", nll_labels=wrong)
    liger = FusedLinearORPOLoss()
    target = torch.full((6, 17), 203)
    with pytest.raises(ValueError, match=r"^target holds the token 203, but lin_weight has 203 rows"):
        liger(problem.weight, problem.hidden, target)
    with pytest.raises(ValueError, match=r"^nll_target holds the token 203"):
        liger(problem.weight, problem.hidden, torch.zeros_like(target), nll_target=target)
    with pytest.raises(ValueError, match=r"^lin_weight of shape \(203, 23\) does not fit _input"):
        liger(problem.weight[:, 1:], problem.hidden, target)
    with pytest.raises(ValueError, match=r"^target is on meta, but _input is on cpu"):
        liger(problem.weight, problem.hidden, target.to("meta"))


def test_labels_that_are_spread_over_ranks():
    labels = torch.zeros(6, 17, dtype=torch.int64)
    labels.full_tensor = lambda: labels
    refuse(r"labels is a DTensor", labels=labels)


def test_triton_on_cpu_tensors_says_what_to_do():
    # In a process of its own: the tests' own process may well interpret kernels.
    import os
    import subprocess
    import sys

    code = (
        "import torch, orpo\n"
        "h, w, y = torch.randn(2, 3, 4), torch.randn(5, 4), torch.ones(2, 3, dtype=torch.long)\n"
        "try: orpo.orpo_loss(h, w, y, backend='triton')\n"
        "except ValueError as e: print(e)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "TRITON_INTERPRET=1" in done.stdout and "backend='torch'" in done.stdout


def test_rows_are_checked():
    problem = make_problem()
    rows = problem.rows
    with pytest.raises(ValueError, match="different shapes"):
        orpo_loss_from_rows(problem.hidden, problem.weight, replace(rows, rows_N=rows.rows_N[1:]))
    with pytest.raises(ValueError, match=r"rows.pairs .* got 0"):
        orpo_loss_from_rows(problem.hidden, problem.weight, replace(rows, pairs=0))
    with pytest.raises(ValueError, match=r"rows.sequence_N .* at most 3 for 2 pairs"):
        orpo_loss_from_rows(problem.hidden, problem.weight, replace(rows, pairs=2))
    with pytest.raises(ValueError, match=r"rows.sequence_N has to be sorted"):
        orpo_loss_from_rows(problem.hidden, problem.weight, replace(rows, sequence_N=rows.sequence_N.flip(0)))
    with pytest.raises(ValueError, match=r"rows.in_response_N has to be torch.bool, got torch.int64"):
        orpo_loss_from_rows(problem.hidden, problem.weight, replace(rows, in_response_N=rows.in_response_N.long()))
    for index in (-1, 102):
        moved = replace(rows, rows_N=rows.rows_N.index_fill(0, torch.tensor(0), index))
        with pytest.raises(ValueError, match=r"rows.rows_N has to be in \[0, 102\)"):
            orpo_loss_from_rows(problem.hidden, problem.weight, moved)
    with pytest.raises(ValueError, match=r"rows.targets_N holds the token 203, but lm_head_weight has 203 rows"):
        orpo_loss_from_rows(problem.hidden, problem.weight, replace(rows, targets_N=rows.targets_N.clamp(min=203)))


def test_token_logprobs_refuses():
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"hidden .* \(1, 3, 4\)"):
        token_logprobs(x[None], w, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"targets of shape \(2,\) .* \(3, 4\)"):
        token_logprobs(x, w, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^targets holds the token 5, but weight has 5 rows"):
        token_logprobs(x, w, torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match=r"logits_budget .* got -1"):
        token_logprobs(x, w, torch.tensor([0, 2, 1]), logits_budget=-1)
    with pytest.raises(ValueError, match=r"^weight of shape \(5, 3\)"):
        token_logprobs(x, w[:, 1:], torch.tensor([0, 2, 1]))
    with pytest.raises(ValueError, match=r"^bias of shape \(3,\)"):
        token_logprobs(x, w, torch.tensor([0, 2, 1]), bias=torch.zeros(3))
