"""benchmarks.paper.ppo: its parts against values by hand and by autograd in float64, its loop on two-layer models."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import ROWS, make_model, make_tokenizer

from benchmarks.paper import ppo, reward

PROMPTS = [[1, *make_tokenizer()(row["prompt"])["input_ids"]] for row in ROWS]
# An answer of three tokens, and one of two behind which nothing counts.
MASK = torch.tensor([[True, True, True], [True, True, False]])
HERE = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]], dtype=torch.float64)


def test_rewards_are_the_kl_of_each_token_and_the_score_at_the_last():
    log_ratio = torch.tensor([[0.5, -1.0, 0.0], [2.0, 1.0, 9.0]])
    found = ppo.token_rewards(torch.tensor([3.0, -4.0]), log_ratio, MASK, 0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.05, 0.1, 3.0], [-0.2, -4.1, 0.0]]))


def test_advantages_and_returns_by_hand():
    """gamma 1/2 and lam 1/2; of the second answer the third token's reward and value are noise."""
    rewards = torch.tensor([[0.0, 0.0, 8.0], [2.0, 1.0, 100.0]], dtype=torch.float64)
    found = ppo.advantages(rewards, HERE, MASK, gamma=0.5, lam=0.5)
    # Backwards: 8 - 3 = 5; 0 + 1.5 - 2 = -0.5, and 5 / 4; 0 + 1 - 1 = 0, and 0.75 / 4. 1 - 5 = -4; 2 + 2.5 - 4, and -1.
    expected = [[0.1875, 0.75, 5.0], [-0.5, -4.0, 0.0]]
    assert found.tolist() == expected
    # lam 1: the discounted sum of what is to come, less the value; lam 0: one step ahead.
    whole = ppo.advantages(rewards, HERE, MASK, gamma=0.5, lam=1.0) + HERE
    assert whole[0].tolist() == [2.0, 4.0, 8.0] and whole[1, :2].tolist() == [2.5, 1.0]
    assert ppo.advantages(rewards, HERE, MASK, gamma=0.5, lam=0.0)[0].tolist() == [0.0, -0.5, 5.0]


def test_whitened_are_the_tokens_that_count_alone():
    found = ppo.whiten(torch.tensor([[1.0, 3.0, 1.0], [3.0, 2.0, 1e6]], dtype=torch.float64), MASK)
    scale = 1 / math.sqrt(0.8)
    expected = torch.tensor([[-scale, scale, -scale], [scale, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_the_clipped_policy_loss_and_its_gradient():
    """Ratios 2, 1/2, 2, 1/2 at advantages of both signs: the clip takes gain away, and never loss."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    old = torch.full((1, 4), -1.0, dtype=torch.float64)
    ratio = torch.tensor([[2.0, 0.5, 2.0, 0.5]], dtype=torch.float64)
    logp = (old + ratio.log()).requires_grad_()
    advantage = torch.tensor([[3.0, 3.0, -3.0, -3.0]], dtype=torch.float64)
    loss = ppo.policy_loss(logp, old, advantage, mask, clip=0.2)
    # 1.2 * 3 clipped, 0.5 * 3 not, -2 * 3 not, -0.8 * 3 clipped.
    assert loss.item() == pytest.approx(-(3.6 + 1.5 - 6.0 - 2.4) / 4)
    (grad,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(grad, torch.tensor([[0.0, -1.5 / 4, 6.0 / 4, 0.0]], dtype=torch.float64))
    # What stands behind an answer's end has no part in the mean.
    alone = ppo.policy_loss(logp, old, advantage, torch.tensor([[True, False, False, False]]), clip=0.2)
    assert alone.item() == pytest.approx(-3.6)


def test_the_clipped_value_loss_and_its_gradient():
    """Old value 0, clip 0.2: a value that ran ahead counts as 0.2 away, but only where that makes the error greater."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    values = torch.tensor([[0.1, 1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([[1.0, 1.0, -1.0]], dtype=torch.float64)
    loss = ppo.value_loss(values, torch.zeros_like(values), returns, mask, clip=0.2)
    assert loss.item() == pytest.approx((0.9**2 + 0.8**2 + 2.0**2) / 6)
    (grad,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(grad, torch.tensor([[-0.9, 0.0, 2.0]], dtype=torch.float64) / 3)


def test_the_controller_raises_the_coefficient_above_the_target_and_lowers_it_below():
    found = []
    for kl in (6.6, 60.0, 6.0, 3.0):
        controller = ppo.KLController(0.1, target=6.0, horizon=2000)
        controller.update(kl, 64)
        found.append(controller.coefficient)
    # An error of 0.1; one of 9, which counts as 0.2; none; one of -0.5, which counts as -0.2. 64 / 2000 is 0.032.
    assert found == pytest.approx([0.1 * 1.0032, 0.1 * 1.0064, 0.1, 0.1 * 0.9936])


def test_answers_are_samples_at_temperature_one_and_their_log_probabilities_the_models_own():
    model, tokenizer = make_model("llama"), make_tokenizer()
    torch.manual_seed(0)
    batch = ppo.rollout(model, tokenizer, [PROMPTS[0]] * 4000, 1)
    with torch.no_grad():
        p_V = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    counts_V = batch.answers_BT[:, 0].bincount(minlength=len(p_V))
    # Chi-squared of 399 degrees of freedom is above 520 once in 30,000 times.
    assert ((counts_V - 4000 * p_V).square() / (4000 * p_V)).sum() < 520
    batch = ppo.rollout(model, tokenizer, PROMPTS, 6)
    with torch.no_grad():
        found = ppo.answer_logprobs(model, ppo.answer_states(model, batch), batch)
    for i, prompt in enumerate(PROMPTS):
        answer = batch.answers_BT[i][batch.mask_BT[i]]
        ids = torch.cat([torch.tensor(prompt), answer])
        with torch.no_grad():
            logp = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(found[i, : len(answer)], logp.gather(1, answer[:, None])[:, 0], rtol=1e-4, atol=1e-5)
        assert not found[i, len(answer) :].any()


def test_an_answer_counts_up_to_its_first_end_token():
    model, tokenizer = make_model("llama"), make_tokenizer(pad_token="</s>")
    end = tokenizer.eos_token_id
    with torch.no_grad():
        # An end token about every third time.
        model.get_output_embeddings().weight[end] += 0.35 * model.get_output_embeddings().weight.sum(0)
    torch.manual_seed(2)
    batch = ppo.rollout(model, tokenizer, PROMPTS * 8, 12)
    lengths = batch.mask_BT.sum(1)
    assert lengths.min() < lengths.max()
    for answer, length in zip(batch.answers_BT.tolist(), lengths.tolist(), strict=True):
        assert end not in answer[: length - 1]
        assert answer[length - 1] == end or length == len(answer)
        assert set(answer[length:]) <= {end}


def test_without_clip_and_with_lambda_1_the_gradient_is_reinforces_with_a_baseline():
    """-1/N sum_t (R_t - V_t) grad log pi(t), from the model's own logits, and (V - R) grad V of the values."""
    torch.manual_seed(0)
    model, tokenizer = make_model("llama").double(), make_tokenizer()
    # In float64, eager attention gives NaN for the padding in front of a prompt.
    model.set_attn_implementation("sdpa")
    head = torch.nn.Linear(model.config.hidden_size, 1).double()
    settings = ppo.PPOSettings(clip=math.inf, value_clip=math.inf, value_weight=0.3, gamma=0.9, lam=1.0)
    batch = ppo.rollout(model, tokenizer, PROMPTS, 5)
    mask, weights = batch.mask_BT, [*model.parameters(), *head.parameters()]
    rewards = torch.randn(mask.shape, dtype=torch.float64) * mask
    with torch.no_grad():
        hidden = ppo.answer_states(model, batch)
        old, values = ppo.answer_logprobs(model, hidden, batch), head(hidden)[..., 0]
    advantage = ppo.advantages(rewards, values, mask, settings.gamma, settings.lam)
    target = advantage, advantage + values
    found = torch.autograd.grad(ppo.batch_loss(model, head, batch, (old, values), target, settings), weights)

    loss = 0.0
    for i, prompt in enumerate(PROMPTS):
        answer = batch.answers_BT[i][mask[i]]
        out = model(input_ids=torch.cat([torch.tensor(prompt), answer])[None], output_hidden_states=True)
        before = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logp = out.logits[0, before].log_softmax(-1).gather(1, answer[:, None])[:, 0]
        value = head(out.hidden_states[-1][0, before])[:, 0]
        for t in range(len(answer)):
            to_come = sum(0.9**k * rewards[i, t + k] for k in range(len(answer) - t))
            loss = loss - (to_come - value[t].detach()) * logp[t] + 0.3 * 0.5 * (value[t] - to_come).square()
    expected = torch.autograd.grad(loss / mask.sum(), weights)
    assert max(g.abs().max() for g in expected) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


SMALL = ppo.PPOSettings(batches=15, batch_size=32, learning_rate=3e-3, max_new_tokens=6, kl_coefficient=0.0)
WANTED = 20


def share_of(answers_BT):
    """(B,): which share of each answer's places holds the wanted token."""
    return (answers_BT == WANTED).float().mean(1)


def trained(seed=0, **changes):
    """(model, history) of PPO for the wanted token, one of 32."""
    model, prompts = make_model("llama", vocab_size=32), [[1, 4 + i % 24, 5] for i in range(32)]
    settings = replace(SMALL, **changes)
    return model, ppo.train(model, make_tokenizer(), prompts, lambda _, x: share_of(x), settings, seed)


@pytest.fixture(scope="module")
def free():
    """Trained without a KL penalty."""
    return trained()


def test_a_reward_for_one_token_makes_it_frequent(free):
    _, history = free
    assert history[0]["score"] < 0.1 and history[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert history[-1]["score"] > 0.6 and history[-1]["kl"] > 8
    assert all(line["kl_coefficient"] == 0 for line in history)


def test_a_huge_kl_coefficient_keeps_the_model_where_it_was(free):
    """The first batch knows of no KL, since nothing has moved: half a nat is what its steps are worth."""
    _, history = trained(kl_coefficient=1e4)
    assert history[-1]["kl"] < 0.1 * free[1][-1]["kl"] and all(line["kl"] < 1 for line in history)
    assert history[-1]["score"] < 0.1


def test_what_the_epochs_are_given():
    """Whitened advantages beside returns, which are advantages plus values, of a value head that says something."""
    model, reference, tokenizer = (
        make_model("llama", vocab_size=32),
        make_model("llama", vocab_size=32),
        make_tokenizer(),
    )
    reference.get_output_embeddings().weight.data *= 1.1
    value_head = ppo.value_head_of(model)
    torch.nn.init.constant_(value_head.weight, 0.3)
    settings = replace(SMALL, gamma=0.9, lam=0.8)
    found = ppo.experience((model, reference, value_head), tokenizer, [[1, 4, 5], [1, 6]], share_of, settings, 0.5)
    batch, mask = found.batch, found.batch.mask_BT
    old, ref = (ppo.answer_logprobs(m, ppo.answer_states(m, batch), batch) for m in (model, reference))
    values = value_head(ppo.answer_states(model, batch))[..., 0]
    assert values[mask].abs().min() > 0 and (found.kl_B - (old - ref).sum(1)).abs().max() < 1e-5
    rewards = ppo.token_rewards(share_of(batch.answers_BT), old - ref, mask, 0.5)
    advantage = ppo.advantages(rewards, values, mask, 0.9, 0.8)
    for ours, truth in zip(
        (*found.old, *found.target), (old, values, ppo.whiten(advantage, mask), advantage + values), strict=True
    ):
        torch.testing.assert_close(ours, truth)


def test_the_same_seed_is_the_same_run_and_the_random_state_stays():
    model = make_model("llama", vocab_size=32)
    before = torch.get_rng_state()
    few = replace(SMALL, batches=2, epochs=1)
    ppo.train(model, make_tokenizer(), [[1, 4, 5]] * 32, lambda _, x: share_of(x), few, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    first, second, other = (trained(seed, batches=2, epochs=1)[1] for seed in (3, 3, 4))
    assert first == second != other


def test_a_reward_model_scores_the_text_that_the_tokens_stand_for(tmp_path):
    tokenizer = make_tokenizer()
    make_model("llama").save_pretrained(tmp_path / "lm")
    judge = reward.load_reward(str(tmp_path / "lm"), tokenizer)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    hello = tokenizer(" hello")["input_ids"]
    answers = torch.tensor([[*hello, end, *[pad] * (len(hello) - 1)], [*hello, *hello]])
    score = ppo.judged_by(judge, tokenizer, [row["prompt"] for row in ROWS])
    texts = [ROWS[2]["prompt"] + " hello</s>", ROWS[0]["prompt"] + " hello hello</s>"]
    torch.testing.assert_close(score([2, 0], answers), reward.score(judge, tokenizer, texts))
