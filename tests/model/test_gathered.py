"""Weights that ZeRO-3 has cut up are whole while a module is called before training, and only then."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import make_model

from orpo.model.attach import attach_orpo_loss, embeddings
from orpo.model.gathered import gathering, is_cut
from orpo.model.probe import check_fused_logps, choose_layout


@pytest.fixture
def zero(monkeypatch):
    """Stands in for DeepSpeed: `cut` empties a model as ``deepspeed.zero.Init`` does; `most` is what was whole at once.

    DeepSpeed too refuses a weight that is gathered twice at once.
    """
    zero = SimpleNamespace(whole={}, open=set(), most=0)

    def cut(model):
        for number, parameter in enumerate(model.parameters()):
            parameter.ds_id, parameter.ds_shape, zero.whole[number] = number, parameter.shape, parameter.data
            parameter.data = torch.empty(0)
        return model

    @contextlib.contextmanager
    def gathered(parameters):
        numbers = {parameter.ds_id for parameter in parameters}
        assert not numbers & zero.open
        zero.open |= numbers
        zero.most = max(zero.most, len(zero.open))
        for parameter in parameters:
            parameter.data = zero.whole[parameter.ds_id]
        try:
            yield
        finally:
            zero.open -= numbers
            for parameter in parameters:
                parameter.data = torch.empty(0)

    zero.cut = cut
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered)))
    return zero


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_attached_and_tried_one_module_at_a_time(tied, zero):
    model = zero.cut(make_model("llama", tie_word_embeddings=tied))
    attach_orpo_loss(model)
    assert check_fused_logps(model) < 1e-5
    assert "a few pairs score as in the padded layout" in choose_layout("auto", model, pad_token_id=0)[1]
    assert zero.most == 1 and all(map(is_cut, model.parameters()))
    assert embeddings(model) == 400
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_an_error_in_a_module_leaves_no_weight_whole(zero):
    model = zero.cut(make_model("llama"))
    hook = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: 1 / 0)
    with gathering(model), pytest.raises(ZeroDivisionError):
        model(input_ids=torch.tensor([[1, 2]]))
    hook.remove()
    assert not zero.open and all(map(is_cut, model.parameters()))
    with gathering(model):
        assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 400)


def test_a_whole_model_is_left_alone(zero):
    model = make_model("llama")
    with gathering(model):
        assert not any(module._forward_hooks for module in model.modules())
