"""The loss beside its peers: forward, forward and backward, evaluation, frozen head; in float32 and bfloat16.

    pytest benchmarks --quick                        tiny shapes, does it run and is it right
    pytest benchmarks -k 'SmolLM2 and step'          one head, forward and backward

Only what is selected is measured; all of it takes hours. A peer that is wrong or fails is reported as failed, without
a time.
"""

from __future__ import annotations

import pytest
import torch

from .cases import Case
from .gate import KINDS
from .measure import emulates_bfloat16, measure_case
from .peers import PEERS, available


@pytest.fixture(scope="module")
def measured() -> dict:
    """Filled by the first test of a case and dtype, read by the others: peers are timed together."""
    return {}


def selected(items: list[pytest.Item], case: Case, dtype: str) -> tuple[list[str], list[str]]:
    """Kinds and peers, in their order, that the tests left by `-k` ask of a case and dtype."""
    asked = [item.callspec.params for item in items if getattr(item, "originalname", "") == "test_loss"]
    asked = [p for p in asked if (p["case"], p["dtype"]) == (case, dtype)]
    kinds, peers = {p["kind"] for p in asked}, {p["peer"] for p in asked}
    return [k for k in KINDS if k in kinds], [p for p in PEERS if p in peers and available(p)]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"], scope="module")
def test_loss(case, dtype, kind, peer, measured, rounds, record, request, capsys):
    if not available(peer):
        pytest.skip(f"{peer} is not installed (pip install '.[bench]')")
    quick = request.config.getoption("--quick")
    if dtype == "bfloat16" and not quick and emulates_bfloat16():
        pytest.skip("this CPU emulates bfloat16, minutes a call: python -m benchmarks.run --group bfloat16 is short")
    if (case, dtype) not in measured:
        # One case at a time: the largest heads' weights and gradients are gigabytes.
        measured.clear()
        kinds, names = selected(request.session.items, case, dtype)
        if not quick:
            # Minutes pass before a case has its first result.
            with capsys.disabled():
                print(f"\n{case.name} {dtype}: {', '.join(kinds)} of {len(names)} peers, {rounds} rounds", flush=True)
        records = measure_case(case, getattr(torch, dtype), {name: PEERS[name] for name in names}, kinds, rounds)
        measured[case, dtype] = {(r["kind"], r["peer"]): r for r in records}
    result = measured[case, dtype][kind, peer]
    assert result["status"] == "measured", result["status"]
    record(f"{case.name} {dtype} {kind}", result.pop("seconds"), result)
