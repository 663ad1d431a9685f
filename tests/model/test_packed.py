"""4-bit layers on a CPU have the same gradients before and after a forward without one."""

import pytest
import torch

from orpo.model.packed import keep_trainable

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs pip install bitsandbytes")


def make_layer():
    """A frozen 4-bit layer, as on a CPU that multiplies bfloat16."""
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight.requires_grad_(False)
    layer.to("cpu")
    assert layer.weight.quant_state is not None
    layer.support_avx512bf16_for_cpu = True
    return layer


def gradient(layer):
    hidden = torch.linspace(-1, 1, 3 * 64).reshape(3, 64).bfloat16().requires_grad_()
    layer.train()
    output = layer(hidden)
    (output * torch.arange(64)).sum().backward()
    return output.detach(), hidden.grad


def test_gradients_are_the_same_after_an_evaluation():
    layer = make_layer()
    keep_trainable(layer)
    before, weight = gradient(layer), layer.weight.data.clone()
    layer.eval()
    with torch.no_grad():
        layer(torch.ones(3, 64, dtype=torch.bfloat16))
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert torch.equal(layer.weight.data, weight)
    for mine, wanted in zip(gradient(layer), before, strict=True):
        assert torch.equal(mine, wanted)


def test_a_layer_that_is_packed_already_is_refused():
    layer = make_layer()
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"has its 4-bit weight packed .* load it anew for training"):
        keep_trainable(torch.nn.Sequential(layer))
