"""Training step and whole run beside TRL's trainers; without a model's folder in ORPO_BENCH_MODEL, of a tiny model."""

from __future__ import annotations

import os

import pytest

from .peers import available
from .training import KINDS, measure

TRAINERS = KINDS


def selected(items: list[pytest.Item]) -> tuple[str, ...]:
    """The trainers that the tests left by `-k` ask for, and TRL's, which the others are held against."""
    asked = {item.callspec.params["trainer"] for item in items if getattr(item, "originalname", "") == "test_training"}
    return tuple(trainer for trainer in TRAINERS if trainer in asked | {"trl orpo"})


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> dict:
    """Every trainer that `-k` left, taking turns."""
    if not available("trl"):
        pytest.skip("trl is not installed (pip install '.[bench]')")
    kinds = selected(request.session.items)
    if request.config.getoption("--quick"):
        records = measure(None, None, batch=2, steps=2, rounds=2, longest=200, kinds=kinds)
    else:
        records = measure(os.environ.get("ORPO_BENCH_MODEL"), os.environ.get("ORPO_BENCH_DATA"), kinds=kinds)
    return {(r["kind"], r["peer"]): r for r in records}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("kind", ["training step", "whole run"])
def test_training(kind, trainer, measured, record):
    result = measured[kind, trainer]
    assert result["median"] > 0
    record(kind, result.pop("seconds"), result)
