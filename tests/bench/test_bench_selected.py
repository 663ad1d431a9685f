"""pytest benchmarks: only what `-k` left is measured (benchmarks/test_bench_loss.py)."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from benchmarks import measure
from benchmarks import test_bench_loss as suite
from benchmarks.cases import TINY, Case

OTHER = Case("other", pairs=2, positions=16, prompt=6, vocabulary=500, hidden_size=64)


def item(case, dtype, kind, peer):
    params = {"case": case, "dtype": dtype, "kind": kind, "peer": peer}
    return SimpleNamespace(originalname="test_loss", callspec=SimpleNamespace(params=params))


class Request(SimpleNamespace):
    """What the test asks of pytest."""

    def __init__(self, items, quick):
        super().__init__(session=SimpleNamespace(items=items), config=SimpleNamespace(getoption=lambda name: quick))


@pytest.fixture
def measured_calls(monkeypatch):
    calls = []

    def measure_case(case, dtype, peers, kinds, rounds):
        calls.append((case.name, str(dtype), list(kinds), list(peers)))
        return [{"kind": k, "peer": p, "status": "measured", "seconds": [1.0]} for k in kinds for p in peers]

    monkeypatch.setattr(suite, "measure_case", measure_case)
    return calls


def run(items, quick=False):
    measured, recorded = {}, []
    for params in (i.callspec.params for i in items if i.originalname == "test_loss"):
        suite.test_loss(
            **params,
            measured=measured,
            rounds=1,
            record=lambda group, seconds, figures: recorded.append((group, figures["peer"])),
            request=Request(items, quick),
            capsys=SimpleNamespace(disabled=nullcontext),
        )
    return recorded


def test_kinds_and_peers_that_nobody_selected_are_not_measured(measured_calls, capsys):
    items = [item(TINY, "float32", "step", peer) for peer in ("ours", "torch eager")]
    items += [item(OTHER, "float32", kind, "ours") for kind in ("step", "evaluation")]
    items += [SimpleNamespace(originalname="test_training")]
    assert run(items) == [
        (f"{TINY.name} float32 step", "ours"),
        (f"{TINY.name} float32 step", "torch eager"),
        ("other float32 step", "ours"),
        ("other float32 evaluation", "ours"),
    ]
    # Each case once, its peers together.
    assert measured_calls == [
        (TINY.name, "torch.float32", ["step"], ["ours", "torch eager"]),
        ("other", "torch.float32", ["step", "evaluation"], ["ours"]),
    ]
    assert "other float32: step, evaluation of 1 peers, 1 rounds" in capsys.readouterr().out


@pytest.mark.parametrize("emulates,quick,skips", [(True, False, True), (True, True, False), (False, False, False)])
def test_bfloat16_is_skipped_with_a_reason_where_a_cpu_emulates_it(measured_calls, monkeypatch, emulates, quick, skips):
    monkeypatch.setattr(suite, "emulates_bfloat16", lambda: emulates)
    items = [item(TINY, "bfloat16", "step", "ours")]
    if skips:
        with pytest.raises(pytest.skip.Exception, match="emulates bfloat16"):
            run(items, quick)
    else:
        assert len(run(items, quick)) == 1
    assert len(measured_calls) == (not skips)
    # float32 is measured everywhere.
    assert len(run([item(TINY, "float32", "step", "ours")], quick)) == 1


@pytest.mark.parametrize(
    "device,multiplies,emulates", [("cpu", False, True), ("cpu", True, False), ("cuda", False, False)]
)
def test_a_gpu_emulates_nothing_whatever_its_host_does(monkeypatch, device, multiplies, emulates):
    monkeypatch.setattr(measure, "default_device", lambda: device)
    monkeypatch.setattr(measure, "multiplies_bfloat16", lambda: multiplies)
    assert measure.emulates_bfloat16() is emulates
