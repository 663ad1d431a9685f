"""The plugin, against a stand-in for axolotl's base class; `python -m tests.hosts axolotl` runs axolotl itself."""

import sys
from enum import StrEnum
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("trl", reason="needs TRL: pip install '.[paper]'")

import orpo.integrations.trl as fused


class RLType(StrEnum):
    ORPO, SIMPO, DPO = "orpo", "simpo", "dpo"


@pytest.fixture
def plugin(monkeypatch):
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations", base.__name__):
        monkeypatch.setitem(sys.modules, name, base)
    monkeypatch.delitem(sys.modules, "orpo.integrations.axolotl", raising=False)
    from orpo.integrations.axolotl import FusedORPO

    yield FusedORPO()
    fused.unpatch()
    sys.modules.pop("orpo.integrations.axolotl")


@pytest.mark.parametrize("rl", [RLType.ORPO, "orpo", RLType.SIMPO])
def test_trls_trainers_are_patched_before_the_model_is_loaded(plugin, rl):
    before = fused.trainers()[0].concatenated_forward
    plugin.pre_model_load(SimpleNamespace(rl=rl))
    assert fused.trainers()[0].concatenated_forward is not before


@pytest.mark.parametrize("rl", [RLType.DPO, None])
def test_another_method_is_refused(plugin, rl):
    with pytest.raises(ValueError, match=f"is for rl: orpo and rl: simpo, not rl: {getattr(rl, 'value', rl)}"):
        plugin.pre_model_load(SimpleNamespace(rl=rl))
    assert not fused._replaced.originals
