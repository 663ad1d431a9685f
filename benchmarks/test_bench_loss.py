"""The loss beside its peers: forward, forward and backward, evaluation, frozen head; in float32 and bfloat16.

    pytest benchmarks --quick                        tiny shapes, does it run and is it right
    pytest benchmarks -k 'SmolLM2 and step'          one head, forward and backward

A peer that is wrong or fails is reported as failed, without a time.
"""

from __future__ import annotations

import pytest
import torch

from .gate import KINDS
from .measure import measure_case
from .peers import PEERS, available


@pytest.fixture(scope="module")
def measured() -> dict:
    """Filled by the first test of a case and dtype, read by the others: peers are timed together."""
    return {}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"], scope="module")
def test_loss(case, dtype, kind, peer, measured, rounds, record):
    if not available(peer):
        pytest.skip(f"{peer} is not installed (pip install '.[bench]')")
    if (case, dtype) not in measured:
        # One case at a time: the largest heads' weights and gradients are gigabytes.
        measured.clear()
        peers = {name: function for name, function in PEERS.items() if available(name)}
        records = measure_case(case, getattr(torch, dtype), peers, KINDS, rounds)
        measured[case, dtype] = {(r["kind"], r["peer"]): r for r in records}
    result = measured[case, dtype][kind, peer]
    assert result["status"] == "measured", result["status"]
    record(f"{case.name} {dtype} {kind}", result.pop("seconds"), result)
