"""Who sees whom in a row that shares a prompt."""

import pytest
import torch
from tiny import make_model
from torch.nn.attention.flex_attention import create_mask

from orpo.layouts.prefix_mask import PROMPT, SharedPrefixMask, layer_windows

# Row 0: a pair of 3 + 2 + 3 tokens. Row 1: two pairs of 1 + 1 + 1, and two tokens of padding.
BRANCHES = [[0, 0, 0, 1, 1, 2, 2, 2], [3, 4, 5, 6, 7, 8, 9, 9]]
POSITIONS = [[0, 1, 2, 3, 4, 3, 4, 5], [0, 1, 1, 0, 1, 1, 0, 1]]


def make_mask():
    return SharedPrefixMask(torch.tensor(BRANCHES, dtype=torch.int32), torch.tensor(POSITIONS), longest=6, tokens=14)


def brute_force(window=None):
    """The definition, token by token."""
    seen = torch.zeros(2, 8, 8, dtype=torch.bool)
    for b in range(2):
        for q in range(8):
            for k in range(q + 1):
                (pair_q, branch_q), (pair_k, branch_k) = divmod(BRANCHES[b][q], 3), divmod(BRANCHES[b][k], 3)
                near = window is None or POSITIONS[b][q] - POSITIONS[b][k] < window
                seen[b, q, k] = pair_q == pair_k and branch_k in (PROMPT, branch_q) and near
    return seen


@pytest.mark.parametrize("window", [None, 1, 2, 4])
def test_visible(window):
    expected = brute_force(window)
    assert torch.equal(make_mask().visible(window), expected)
    assert expected.diagonal(dim1=1, dim2=2).all()
    assert not expected[0, 5:, 3:5].any(), "rejected sees chosen"
    if window is None:
        assert expected[0, 4, :5].all() and expected[0, 7, [0, 1, 2, 5, 6, 7]].all()


def test_more_answers_than_two_behind_a_prompt():
    """Prompt 0 has three answers, of which the last has two tokens; prompt 1 has one."""
    branch, position = torch.tensor([[0, 1, 2, 3, 3, 4, 5]]), torch.tensor([[0, 1, 1, 1, 2, 0, 1]])
    mask = SharedPrefixMask(branch.int(), position, longest=3, tokens=7, branches=4)
    assert mask.visible()[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    blocks = mask.block_mask()
    assert torch.equal(create_mask(blocks.mask_mod, 1, None, 7, 7, device="cpu")[0], mask.visible())


@pytest.mark.parametrize("window", [None, 2])
def test_flex_attention_gets_the_same_mask(window):
    mask = make_mask()
    block_mask = mask.block_mask(window)
    assert torch.equal(create_mask(block_mask.mask_mod, 2, None, 8, 8, device="cpu")[:, 0], mask.visible(window))


def test_additive_is_never_boolean():
    for dtype in (torch.float32, torch.bfloat16):
        additive = make_mask().additive(dtype)
        assert additive.shape == (2, 1, 8, 8) and additive.dtype == dtype
        assert torch.equal(additive == 0, brute_force()[:, None])
        assert (additive[additive != 0] == torch.finfo(dtype).min).all()


def test_each_model_gets_the_form_it_takes():
    plain = make_mask().for_model(make_model("llama"))
    assert torch.equal(plain == 0, brute_force()[:, None])
    sliding = make_mask().for_model(make_model("mistral", sliding_window=2))
    assert torch.equal(sliding == 0, brute_force(2)[:, None])
    barely = make_mask().for_model(make_model("mistral", sliding_window=5))
    assert torch.equal(barely == 0, brute_force(5)[:, None]) and not torch.equal(barely, plain)
    wide = make_mask().for_model(make_model("mistral", sliding_window=6))
    assert torch.equal(wide, plain)
    both = make_mask().for_model(make_model("gemma2", sliding_window=2, query_pre_attn_scalar=8))
    assert torch.equal(both["full_attention"], plain) and torch.equal(both["sliding_attention"], sliding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make_mask().for_model(make_model("llama")).dtype == torch.bfloat16


def test_windows_that_a_configuration_switches_off():
    config = make_model("qwen2", sliding_window=4).config
    assert config.use_sliding_window is False and layer_windows(config)[0] is None
