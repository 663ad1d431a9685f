"""How a figure is taken (benchmarks/measure.py): memory does not depend on what was measured before."""

import itertools
import subprocess

import pytest
import torch

from benchmarks import limits, results, run
from benchmarks.cases import TINY, Case, make_batch
from benchmarks.gate import KINDS
from benchmarks.measure import interleaved, measure_case, peak_memory, stamp
from benchmarks.peers import PEERS
from benchmarks.training import make_trainer, peak_alone
from benchmarks.training_data import SHARED_TOTAL, load, synthetic_pairs


def test_peak_is_what_is_alive_at_once():
    def two_then_one():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(1 << 20, dtype=torch.uint8)
        del first, second
        return torch.empty(1 << 19, dtype=torch.uint8)

    assert peak_memory(two_then_one) == pytest.approx(1 << 21, rel=0.01)


def test_order_of_peers_does_not_change_their_memory():
    case = Case("tiny", pairs=2, positions=32, prompt=8, vocabulary=20_000, hidden_size=64)
    peers = {name: PEERS["torch eager"] for name in ("first", "second", "third")}
    records = measure_case(case, torch.float32, peers, ["step"], rounds=1, baseline="first")
    peaks = [r["peak_bytes"] for r in records]
    gradient = 4 * case.vocabulary * case.hidden_size
    assert max(peaks) - min(peaks) < gradient / 10


def test_nobody_always_follows_the_same_peer():
    """Who follows one that frees much memory finds it warm."""

    def calls(rounds):
        seen = []
        seconds = interleaved(
            {name: lambda name=name: seen.append(name) or len(seen) for name in "abcde"}, rounds, lambda f: f()
        )
        return seen, seconds

    seen, seconds = calls(5)
    assert all(sorted(seen[i : i + 5]) == list("abcde") for i in range(0, 25, 5))
    assert all(seen[at - 1] == name for name, times in seconds.items() for at in times)
    before = {name: {a for a, b in itertools.pairwise(seen) if b == name} for name in "abcde"}
    assert all(len(names) > 1 for names in before.values())
    assert calls(5) == (seen, seconds)


def test_pairs_of_a_given_share_of_prompt():
    _, tokenizer = load(None)
    for pair in synthetic_pairs(tokenizer, 2, longest=300, share=25):
        prompt, whole = (
            len(tokenizer(text)["input_ids"]) for text in (pair["prompt"], pair["prompt"] + pair["chosen"])
        )
        # One token more is the EOS, which the trainer writes.
        assert (prompt, whole + 1) == (SHARED_TOTAL // 4, SHARED_TOTAL)


def test_resident_memory_is_that_of_a_process_of_its_own():
    ballast = torch.ones(2**28)
    source = dict(folder=None, data=None, count=4, longest=200, share=None)
    peak = peak_alone("ours padded", source, batch=2, longest=200, dtype="float32")["peak_resident_bytes"]
    # More than torch alone, and not this process's gigabyte, which a fork would bring along.
    assert 2**27 < peak < 4 * ballast.numel()


def test_a_stamp_says_dirty_for_code_and_not_for_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("benchmarks/results/heads.jsonl", "benchmarks/RESULTS.md", "docs/memory.png", "code.py")
    files = [tmp_path / name for name in names]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("before")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], check=True)
    for file, dirty in zip(files, (False, False, False, True), strict=True):
        file.write_text("after")
        assert ("-dirty" in stamp.__wrapped__()["commit"]) == dirty
    # Those of this checkout are its commit's.
    assert stamp.__wrapped__()["commit"].endswith("-dirty with installed kernels")
    # Without git a figure still has its stamp.
    monkeypatch.setenv("PATH", "")
    assert stamp.__wrapped__()["commit"] == "unknown"


def test_a_kind_by_strips_keeps_no_logits(tmp_path):
    model, tokenizer = load(None)
    rows = synthetic_pairs(tokenizer, 2, 64)
    for kind, budget in (("ours shared (strips)", 0), ("ours shared", None)):
        trainer = make_trainer(kind, model, tokenizer, rows, str(tmp_path), 2, 64, "float32")
        assert (trainer.args.layout, trainer.args.logits_budget) == ("shared", budget)


def test_evaluation_has_hidden_states_from_no_grad_and_a_trained_head():
    """A peer that asks its input whether it wants a gradient would compute one that nobody uses."""
    batch, seen = make_batch(TINY, torch.float32), {}

    def peer(batch, beta):
        seen[kind] = batch.hidden.requires_grad, batch.weight.requires_grad, torch.is_grad_enabled()
        return (batch.hidden.sum() * batch.weight.sum()).clone()

    for kind in ("step", "evaluation", "frozen", "forward"):
        KINDS[kind](peer, batch)
    assert seen == {
        "step": (True, True, True),
        "evaluation": (False, True, False),
        "frozen": (True, False, True),
        "forward": (True, True, True),
    }


def test_a_piece_is_measured_when_every_kind_and_peer_is_stored_on_this_machine(monkeypatch):
    piece = run.Piece(TINY, "float32", ("step", "evaluation"), 1)
    row = dict(
        head="tiny", pairs=2, positions=16, prompt=6, padded=False, V=500, dtype="float32", device=stamp()["device"]
    )
    stored = [{**row, "kind": kind, "peer": peer} for kind in piece.kinds for peer in ("ours", "trl")]
    for rows, expected in ((stored, True), (stored[1:], False), ([{**r, "device": "x"} for r in stored], False)):
        monkeypatch.setattr(results, "load", lambda group, rows=rows: rows)
        assert run.is_measured("heads", piece, ["ours", "trl"]) is expected


def test_limits_of_memory_are_a_cpus(monkeypatch):
    monkeypatch.setattr(limits, "default_device", lambda: "cuda")
    with pytest.raises(SystemExit, match="hide the GPU with CUDA_VISIBLE_DEVICES="):
        limits.run()


def test_a_peer_that_asks_for_more_than_the_limit_is_out_of_memory():
    record = limits.in_a_process("ours (strips)", 64)
    assert record["status"] == "measured" and record["median"] > 0
    assert limits.in_a_process("torch eager", 4096, memory_gib=1.5)["status"] == "out of memory"
    assert limits.in_a_process("ours", 64, seconds=0.1)["status"] == "longer than 0.1 s"
