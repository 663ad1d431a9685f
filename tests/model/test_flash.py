"""The shared layout under FlashAttention: the same outputs and gradients as with the 4-D mask.

The package's kernels are replaced by plain torch; transformers' code around them is as it is.
"""

import pytest
import torch
from flash_stand_in import attention, install, with_flash
from test_probe import assert_same, choose, prepared, trained
from tiny import make_model
from torch import nn
from trainers import logged, make_trainer
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

from orpo.layouts.flash import attend, take_shared_prompts
from orpo.layouts.layout import PackedLayout, PaddedLayout, SharedLayout
from orpo.layouts.prefix_mask import SharedPrefixMask
from orpo.layouts.segments import segments_of
from orpo.model.attach import LossCall, attach_orpo_loss

# (tokens of the prompt, tokens of each answer) of each group in each row; what is left of a row is padding.
STRUCTURES = {
    "a pair": [[(4, [3, 5])]],
    "two pairs in a row": [[(4, [3, 5]), (2, [1, 6])]],
    "several answers": [[(5, [3, 1, 4, 2])]],
    "rows and padding": [[(6, [3, 2]), (1, [1, 1])], [(2, [7])], [(3, [2, 2, 2])]],
    "no prompt": [[(0, [3, 4]), (2, [3, 3]), (0, [2, 1])]],
    "empty answers": [[(3, [0, 4]), (3, [4, 0]), (2, [0, 0])]],
}


@pytest.fixture
def kernels(monkeypatch):
    return install(monkeypatch)


def mask_of(structure):
    rows = STRUCTURES[structure]
    branches = 1 + max(len(answers) for row in rows for _, answers in row)
    width = max(sum(prompt + sum(answers) for prompt, answers in row) for row in rows)
    branch, position, group = [], [], 0
    for row in rows:
        b, p = [], []
        for prompt, answers in row:
            for number, (start, length) in enumerate([(0, prompt), *((prompt, length) for length in answers)]):
                b += [branches * group + number] * length
                p += range(start, start + length)
            group += 1
        left = width - len(b)
        branch.append((b, left))
        position.append([*p, *range(left)])
    branch_BT = torch.tensor([b + [branches * group] * left for b, left in branch], dtype=torch.int32)
    segments = segments_of(branch_BT.numpy(), branches)
    return SharedPrefixMask(branch_BT, torch.tensor(position), width, 0, branches, segments)


class Layer(nn.Module):
    """What transformers asks of a layer."""

    is_causal = True

    def __init__(self):
        super().__init__()
        self.config = with_flash(make_model()).config
        self.projection = nn.Linear(1, 1)


def by_mask(query, key, value, seen, softcap):
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    scores = query @ key.mT * 0.4
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ value).transpose(1, 2)


def compare_with_the_mask(mask, heads, window, softcap, dtype, tolerance):
    """Outputs and the gradients of queries, keys and values, of `heads` heads of each."""
    rows, tokens = mask.branch_BT.shape
    device = mask.branch_BT.device
    torch.manual_seed(0)
    # As projections leave them: tokens before heads in memory. Rounded as the kernels take them.
    states = [torch.randn(rows, tokens, n, 8, device=device).to(dtype).transpose(1, 2) for n in heads]
    layer = Layer().to(device)
    arguments = mask.arguments_for(layer)
    assert arguments.pop("attention_mask") is None

    def flash(*states):
        attention = AttentionInterface()["flash_attention_2"]
        options = {"dropout": 0.0, "scaling": 0.4, "sliding_window": window, "softcap": softcap}
        return attention(layer, *states, None, **options, **arguments)[0]

    def reference(*states):
        return by_mask(*(state.float() for state in states), mask.visible(window), softcap)

    results = []
    weight = torch.randn(rows, tokens, heads[0], 8, generator=torch.Generator().manual_seed(1)).to(device)
    for function in (flash, reference):
        leaves = [state.clone().requires_grad_() for state in states]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 2, 2), (4, 1, 1)])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_outputs_and_gradients_are_those_of_the_mask(kernels, structure, heads, window, softcap):
    mask = mask_of(structure)
    compare_with_the_mask(mask, heads, window, softcap, torch.float32, 1e-5)
    # One call for all, which computes no query twice.
    ((queries, _, window_size, cap),) = kernels.calls
    assert sum(queries) == mask.branch_BT.numel() and cap == (softcap or 0.0)
    assert window_size == ((-1, -1) if window is None else (window - 1, window - 1))


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn and a GPU")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_packages_own_kernels_compute_the_same(structure, window):
    compare_with_the_mask(mask_of(structure).to("cuda"), (4, 2, 2), window, None, torch.bfloat16, 3e-2)


def test_a_prompt_serves_its_first_answer_as_it_stands_and_is_repeated_for_the_others():
    segments = mask_of("rows and padding").segments
    assert segments.query_bounds.diff().tolist() == [9, 2, 2, 1, 9, 5, 5, 2, 2, 5]
    assert segments.key_bounds.diff().tolist() == [9, 8, 2, 2, 9, 5, 5, 5, 5, 5]
    assert (segments.most_queries, segments.most_keys) == (9, 9)
    assert segments.key_M[9:19].tolist() == [0, 1, 2, 3, 4, 5, 9, 10, 11, 12]
    assert segments.query_bounds.dtype == segments.key_bounds.dtype == torch.int32


def test_segments_go_where_the_mask_goes():
    moved = mask_of("a pair").to("meta")
    assert {moved.branch_BT.device.type, moved.segments.key_M.device.type} == {"meta"}
    assert moved.segments.key_bounds.is_meta and moved.segments.query_bounds.is_meta


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_neox", "opt", "qwen2_moe", "deepseek_v3"])
def test_loss_and_gradients_are_those_of_the_padded_layout_with_eager_attention(kernels, model_type):
    model = prepared(model_type, **({"sliding_window": 4} if model_type in ("mistral", "gemma2") else {}))
    expected = trained(model, choose("padded", model)[0])
    layout, why = choose("auto", with_flash(model))
    assert (type(layout), layout.single_row) == (SharedLayout, True)
    assert why == "layout shared: a few pairs score as in the padded layout"
    kernels.calls.clear()
    loss, gradient = trained(model, layout)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert (gradient - expected[1]).norm() < 1e-5 * expected[1].norm()
    full, sliding = {(-1, -1)}, {(3, 3)}
    windows = {"mistral": sliding, "gemma2": full | sliding}.get(model_type, full)
    assert {call[2] for call in kernels.calls} == windows
    assert {call[3] for call in kernels.calls} == {50.0 if model_type == "gemma2" else 0.0}
    # Three pairs ask the same: their prompt is computed once.
    assert sum(kernels.calls[0][0]) < sum(kernels.calls[0][1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_hand_the_segments_on(kernels, reentrant):
    model = with_flash(prepared("opt")).train()
    model.enable_input_require_grads()
    padded, shared = choose("padded", model)[0], choose("shared", model)[0]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(model, shared, padded)


def test_the_trainer_takes_it_by_itself(kernels, tmp_path, capsys):
    losses = {}
    for layout, flash in {"padded": False, "auto": True, "shared": True}.items():
        model = make_model("gemma2", sliding_window=4, query_pre_attn_scalar=8)
        trainer = make_trainer(tmp_path / layout, with_flash(model) if flash else model, layout=layout, max_steps=3)
        trainer.train()
        losses[layout] = logged(trainer, "loss"), logged(trainer, "grad_norm")
        asked = "" if layout == "auto" else ", as asked for"
        assert (
            not flash or f"layout shared: a few pairs score as in the padded layout{asked}" in capsys.readouterr().out
        )
    for layout in ("auto", "shared"):
        for found, expected in zip(losses[layout], losses["padded"], strict=True):
            assert len(found) == 3 and found == pytest.approx(expected, rel=1e-4)


def test_float32_weights_train_in_mixed_precision(monkeypatch, tmp_path, capsys):
    kernels = install(monkeypatch, float32=False)
    trainer = make_trainer(tmp_path, with_flash(make_model()), bf16=True, max_steps=1)
    assert "layout shared: a few pairs score as in the padded layout" in capsys.readouterr().out
    kernels.calls.clear()
    trainer.train()
    assert kernels.calls


def test_a_kernel_that_counts_from_the_first_key_is_noticed(kernels, monkeypatch):
    """As FlashAttention before 2.1: right for sequences, wrong for an answer behind its prompt."""

    def top_left(q, k, v, *options):
        return attention(torch.cat([q, q[-1:].expand(len(k) - len(q), -1, -1)]), k, v, *options)[: len(q)]

    monkeypatch.setattr("flash_stand_in.attention", top_left)
    layout, why = choose("auto", with_flash(prepared("llama")))
    assert type(layout) is PackedLayout
    assert why.startswith("layout packed: a few pairs score as in the padded layout; not shared: log-probabilities")


@pytest.mark.parametrize("model_type", ["stablelm", "nemotron"])
def test_a_model_that_does_not_hand_its_arguments_on_trains_packed(kernels, model_type):
    model = with_flash(prepared(model_type))
    layout, why = choose("auto", model)
    assert (type(layout), layout.single_row) == (PackedLayout, True)
    assert "; not shared: log-probabilities differ" in why
    with pytest.raises(ValueError, match=r"layout is 'shared', which .* cannot be trained with: log-probabilities"):
        choose("shared", model)


def test_layers_of_other_kinds_are_refused_as_with_any_attention(kernels):
    layout, why = choose("auto", with_flash(prepared("mamba")))
    assert type(layout) is PaddedLayout
    assert why.startswith("layout padded, not shared: ") and "; not packed: " in why
    assert "the router's loss" in choose("auto", with_flash(prepared("mixtral")))[1]


def test_a_batch_that_was_made_for_a_mask_is_refused(kernels):
    model = with_flash(make_model())
    attach_orpo_loss(model)
    batch = SharedLayout(pad_token_id=0)(
        [{f"{s}_{n}": v for s in ("chosen", "rejected") for n, v in (("input_ids", [1, 2, 3]), ("prompt_length", 1))}]
    )
    with pytest.raises(ValueError, match=r"takes no mask, .* made without segments: .* single_row=True"):
        model(orpo=LossCall(batch.pop("orpo").rows), **batch)


def test_attention_that_transformers_does_not_know_is_refused():
    with pytest.raises(ValueError, match="no attention function 'flash_of_nobody'"):
        take_shared_prompts("flash_of_nobody")


def test_other_calls_reach_the_function_as_before():
    AttentionInterface.register("flash_of_ours", lambda *arguments, **options: (arguments, options))
    for _ in range(2):
        take_shared_prompts("flash_of_ours")
    function = AttentionInterface()["flash_of_ours"]
    assert function.func is attend and not hasattr(function.args[0], "func")
    assert function(1, 2, 3, 4, 5, scaling=6) == ((1, 2, 3, 4, 5), {"scaling": 6})


def test_pairs_of_one_prompt_stay_together_however_many_they_are():
    """A mask's rows are no longer than two sequences; segments have windows of their own."""
    pairs = [
        {
            "chosen_input_ids": [1, 10, 20 + n, 2],
            "rejected_input_ids": [1, 10, 40 + n, 2],
            "chosen_prompt_length": 2,
            "rejected_prompt_length": 2,
        }
        for n in range(5)
    ]
    batch = SharedLayout(pad_token_id=0, single_row=True)(pairs)
    assert batch["input_ids"].shape == (1, 2 + 5 * 4)
    assert SharedLayout(pad_token_id=0)(pairs)["input_ids"].shape[0] > 1
