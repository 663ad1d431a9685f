"""The accuracy benchmark: every peer against float64, on random hidden states and on those of a model."""

import pytest
import torch

from benchmarks import accuracy, results
from benchmarks.cases import TINY, make_batch
from benchmarks.gate import exact
from benchmarks.peers import PARTS, PEERS


def test_float32_is_near_float64_and_bfloat16_says_how_far():
    batch = make_batch(TINY, torch.float32)
    names = ["ours", "ours (strips)", "torch eager"]
    fine, coarse = (accuracy.errors(accuracy.in_dtype(batch, t), names) for t in (torch.float32, torch.bfloat16))
    for record in fine:
        assert all(record[k] < 1e-5 for k in ("error_loss", "error_logps", "error_dx", "error_dw")), record
    ours, _, eager = coarse
    # bfloat16 logits move a mean log-probability of plain torch; ours are rounded by their distance to the target.
    assert ours["error_logps"] < 1e-3 < eager["error_logps"] < 3e-2
    assert 0 < ours["error_dw"] < 1e-2


def test_a_wrong_gradient_is_seen(monkeypatch):
    def wrong(batch, beta):
        loss, logps = PARTS["torch eager"](batch, beta)
        return loss + 1e-2 * batch.weight.square().sum(), logps + 1e-3

    monkeypatch.setitem(PARTS, "wrong", wrong)
    (record,) = accuracy.errors(make_batch(TINY, torch.float32), ["wrong"])
    assert record["error_logps"] == pytest.approx(1e-3, rel=1e-2) and record["error_dw"] > 1e-5 > record["error_dx"]


def test_a_peer_that_cannot_run_is_reported(monkeypatch):
    monkeypatch.setitem(PARTS, "none", lambda batch, beta: (_ for _ in ()).throw(RuntimeError("no such dtype")))
    assert accuracy.errors(make_batch(TINY, torch.float32), ["none"]) == [
        {"peer": "none", "status": "failed: RuntimeError"}
    ]


def test_every_peer_returns_its_loss_and_mean_log_probabilities():
    batch = make_batch(TINY, torch.float32)
    truth = exact(batch)[0]
    for name in ("ours", "ours (strips)", "torch eager"):
        loss, logps = PARTS[name](batch, 0.1)
        assert PEERS[name](batch, 0.1).item() == loss.item() == pytest.approx(truth.loss.item(), rel=1e-5)
        assert logps.shape == (2 * TINY.pairs,)


def test_hidden_states_of_a_model_are_stored_with_their_source(tmp_path, monkeypatch):
    from orpo.demo.model import build_model, train_tokenizer

    tokenizer = train_tokenizer([f" {chr(97 + i)}{chr(97 + j)}" for i in range(8) for j in range(8)] * 3)
    folder = tmp_path / "tiny-model"
    build_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(accuracy, "RANDOM", ())
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(accuracy.results, "append", lambda group, records: stored.extend(records))
    stored: list[dict] = []
    accuracy.run(["ours", "torch eager"], str(folder))
    assert [(r["head"], r["data"], r["dtype"], r["peer"]) for r in stored] == [
        ("tiny-model", "hidden states of random words", dtype, peer)
        for dtype in ("bfloat16", "float32")
        for peer in ("ours", "torch eager")
    ]
    assert all(r["status"] == "measured" and r["error_loss"] < 1e-2 for r in stored)
