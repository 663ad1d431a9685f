"""Who is wrong, or fails, gets no time beside those that are right (benchmarks/gate.py)."""

import pytest
import torch

from benchmarks import gate
from benchmarks.cases import CASES, Case, make_batch
from benchmarks.measure import measure_case, peak_memory
from benchmarks.peers import PEERS


def test_a_wrong_peer_gets_no_time():
    eager = PEERS["torch eager"]

    def wrong(batch, beta):
        return 1.01 * eager(batch, beta)

    records = measure_case(CASES["tiny padded"], torch.float32, {"right": eager, "wrong": wrong}, ["step"], 1)
    status = {r["peer"]: r for r in records}
    assert status["right"]["status"] == "measured" and status["right"]["error_dw"] < 1e-5
    assert status["wrong"]["status"] == "wrong" and "median" not in status["wrong"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_without_its_odds_ratio_gets_no_time(dtype):
    peers = {"right": PEERS["ours"], "likelihood alone": lambda batch, beta: PEERS["ours"](batch, 0.0)}
    records = measure_case(Case("h", 4, 64, 32, 64, 5000), dtype, peers, ["step", "evaluation"], 1)
    status = {(r["peer"], r["kind"]): r["status"] for r in records}
    assert status == {
        ("right", "step"): "measured",
        ("right", "evaluation"): "measured",
        ("likelihood alone", "step"): "wrong",
        ("likelihood alone", "evaluation"): "wrong",
    }


def test_a_peer_that_is_wrong_in_one_kind_alone_gets_no_time_there():
    ours = PEERS["ours"]

    def wrong_without_grad(batch, beta):
        return ours(batch, beta) * (1.0 if torch.is_grad_enabled() else 1.01)

    def wrong_with_a_frozen_head(batch, beta):
        # The loss is right, its gradient is not.
        loss = ours(batch, beta)
        return loss if batch.weight.requires_grad else 2 * loss - loss.detach()

    def fails_without_grad(batch, beta):
        loss = ours(batch, beta)
        return loss if loss.requires_grad else loss.backward()

    peers = {f.__name__: f for f in (wrong_without_grad, wrong_with_a_frozen_head, fails_without_grad)}
    records = measure_case(CASES["tiny"], torch.float32, peers, ["step", "evaluation", "frozen"], 1)
    status = {(r["peer"], r["kind"]): r["status"].split(":")[0] for r in records}
    assert {key for key, value in status.items() if value != "measured"} == {
        ("wrong_without_grad", "evaluation"),
        ("wrong_with_a_frozen_head", "frozen"),
        ("fails_without_grad", "evaluation"),
    }
    assert status["fails_without_grad", "evaluation"] == "failed"
    assert status["wrong_without_grad", "evaluation"] == status["wrong_with_a_frozen_head", "frozen"] == "wrong"


def test_the_truth_is_the_same_by_blocks_of_rows(monkeypatch):
    """Whole, a long batch's float64 logits would exceed any memory, and end the run."""
    case = CASES["tiny padded"]
    batch = make_batch(case, torch.float32)
    whole, blocks = [], []
    for found, rows in ((whole, case.rows), (blocks, 7)):
        monkeypatch.setattr(gate, "BLOCK_LOGITS", rows * case.vocabulary)
        objective, dx, dw = gate.exact(batch)
        found += [objective.loss, objective.mean_logp_S, dx.double(), dw.double()]
    assert case.rows % 7
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-12) for a, b in zip(whole, blocks, strict=True))
    # autograd through plain log-probabilities is another way to the same numbers.
    hidden, weight = batch.hidden.double().requires_grad_(), batch.weight.double().requires_grad_()
    loss = PEERS["torch eager"](type(batch)(hidden, weight, batch.input_ids, batch.labels, batch.nll_labels), gate.BETA)
    loss.backward()
    assert loss.item() == pytest.approx(whole[0].item(), rel=1e-5)
    assert gate.relative_error(hidden.grad, whole[2]) < 1e-5 and gate.relative_error(weight.grad, whole[3]) < 1e-5


def test_the_truth_holds_a_block_of_logits(monkeypatch):
    batch = make_batch(Case("h", 4, 64, 0, 8, 4000), torch.float32)
    rows = 20
    monkeypatch.setattr(gate, "BLOCK_LOGITS", rows * 4000)
    # All rows are 25 times as many.
    assert peak_memory(lambda: gate.exact(batch)) < 8 * rows * 4000 * 8 + 6 * batch.weight.nbytes
