"""RLHF with PPO, at a CPU's size: rollouts, a value head, KL against the frozen start, GAE, clipped losses.

The loop is that of Ziegler et al. (arXiv 1909.08593), whose settings the paper's Table 5 names as TRL's first PPO
trainer did. A batch of prompts is answered at temperature 1.0 and scored; then, for answer token t of one sequence,

    r_t  =  -kl_coefficient (log pi_old(t) - log pi_ref(t))  +  score at the last token
    d_t  =  r_t + gamma V_{t+1} - V_t,        A_t  =  d_t + gamma lam A_{t+1},        R_t  =  A_t + V_t
    loss =  policy_loss(whitened A) + value_weight value_loss(R),      a step of AdamW for each mini-batch

Letters: B sequences, L positions, T answer tokens (L = prompts' width + T), D hidden size, N answer tokens that count.
"""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig

from orpo import token_logprobs
from orpo.model.head import head_weight

from . import reward


@dataclass(frozen=True)
class PPOSettings:
    """Table 5's settings, but for those that a model of 1M parameters needs (the page has both).

    Attributes:
        batches: rollouts, each of `batch_size` prompts, and each trained on `epochs` times in steps of
            `mini_batch_size`; no gradients are accumulated.
        max_new_tokens: most tokens of an answer.
        kl_coefficient, kl_target, horizon: of :class:`KLController`; the target in nats a sequence.
        gamma, lam: of :func:`advantages`.
        clip, value_clip: of :func:`policy_loss` and :func:`value_loss`.
        value_weight: of the value loss.
    """

    batches: int = 30
    batch_size: int = 64
    mini_batch_size: int = 8
    epochs: int = 4
    learning_rate: float = 1e-5
    max_new_tokens: int = 64
    kl_coefficient: float = 0.1
    kl_target: float = 6.0
    horizon: int = 2000
    gamma: float = 0.99
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1


class KLController:
    """The coefficient of the KL penalty, held where the KL is `target` (Ziegler et al., section 2.2).

    coefficient <- coefficient (1 + clamp(KL / target - 1, -0.2, 0.2) sequences / horizon)
    """

    def __init__(self, coefficient: float, target: float, horizon: int) -> None:
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float, sequences: int) -> None:
        """After a batch of `sequences` answers with a mean KL of `kl` nats a sequence."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * sequences / self.horizon


class Rollout(NamedTuple):
    """Answers behind their prompts, which are padded on the left: all answers begin at one position.

    ``ids_BL``: tokens. ``seen_BL``: 1 but at padding. ``mask_BT``: an answer's tokens, its end token among them.
    """

    ids_BL: Tensor
    seen_BL: Tensor
    mask_BT: Tensor

    @property
    def answers_BT(self) -> Tensor:
        return self.ids_BL[:, -self.mask_BT.shape[1] :]

    def rows(self, places: Sequence[int]) -> Rollout:
        """Those of the sequences at `places`."""
        return Rollout(*(x[places] for x in self))


class Experience(NamedTuple):
    """A batch of answers, and what its epochs need of the models that made and judged it.

    ``old``: log-probabilities and values at the rollout; ``target``: whitened advantages, and returns; all (B, T).
    ``scores_B``: rewards; ``kl_B``: log pi - log pi_ref, summed over an answer.
    """

    batch: Rollout
    old: tuple[Tensor, Tensor]
    target: tuple[Tensor, Tensor]
    scores_B: Tensor
    kl_B: Tensor


@torch.no_grad()
def rollout(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> Rollout:
    """An answer to each prompt at temperature 1.0, of all of the vocabulary, by torch's global random state."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # Without a word on top_k it would be 50, and the ratios those of another distribution.
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    ends = {"max_new_tokens": max_new_tokens, "eos_token_id": end, "pad_token_id": pad}
    settings = GenerationConfig(**sampling, **ends)
    ids, seen = ids.to(model.device), seen.to(model.device)
    out = model.generate(input_ids=ids, attention_mask=seen, generation_config=settings)
    is_end = (out[:, width:] == end).long()
    # Up to the first end token: an end token that pads may be the same one.
    mask = is_end.cumsum(1) - is_end == 0
    return Rollout(out, torch.cat([seen, mask.long()], 1), mask)


def answer_states(model: nn.Module, batch: Rollout) -> Tensor:
    """(B, T, D): the states from which each answer token is predicted."""
    positions = (batch.seen_BL.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": batch.ids_BL, "attention_mask": batch.seen_BL, "position_ids": positions}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    return hidden[:, -batch.mask_BT.shape[1] - 1 : -1]


def answer_logprobs(model: nn.Module, hidden_BTD: Tensor, batch: Rollout) -> Tensor:
    """(B, T): log-probabilities of the answers' tokens through :func:`orpo.token_logprobs`, 0 where none counts."""
    weight, bias = head_weight(model.get_output_embeddings())
    mask = batch.mask_BT
    logp_N = token_logprobs(hidden_BTD[mask], weight, batch.answers_BT[mask], bias=bias)
    return logp_N.new_zeros(mask.shape).masked_scatter(mask, logp_N)


def token_rewards(score_B: Tensor, log_ratio_BT: Tensor, mask_BT: Tensor, kl_coefficient: float) -> Tensor:
    """(B, T): r above, of log-ratios log pi - log pi_ref."""
    rewards = -kl_coefficient * log_ratio_BT * mask_BT
    last_B = mask_BT.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last_B, score_B[:, None].to(rewards.dtype))


def advantages(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> Tensor:
    """(B, T): generalized advantages (Schulman et al., arXiv 1506.02438), A above; behind the answer's end all is 0."""
    rewards_BT, values_BT = rewards_BT * mask_BT, values_BT * mask_BT
    found, after = torch.zeros_like(rewards_BT), torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        following = values_BT[:, t + 1] if t + 1 < rewards_BT.shape[1] else torch.zeros_like(after)
        after = rewards_BT[:, t] + gamma * following - values_BT[:, t] + gamma * lam * after
        found[:, t] = after
    return found


def whiten(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(B, T) with mean 0 and variance 1 over the tokens that count, 0 elsewhere."""
    x_N = x_BT[mask_BT]
    return (x_BT - x_N.mean()) * (x_N.var(correction=0) + 1e-8).rsqrt() * mask_BT


def policy_loss(logp_BT: Tensor, old_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, clip: float) -> Tensor:
    """-mean min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A), Eq. 7 of arXiv 1707.06347, over tokens that count."""
    ratio = (logp_BT - old_BT).exp()
    gain = torch.minimum(ratio * advantage_BT, ratio.clamp(1 - clip, 1 + clip) * advantage_BT)
    return -gain[mask_BT].mean()


def value_loss(values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float) -> Tensor:
    """mean max((V - R)^2, (V' - R)^2) / 2, V' within `clip` of the old value, over tokens that count."""
    near = old_BT + (values_BT - old_BT).clamp(-clip, clip)
    error = torch.maximum((values_BT - returns_BT).square(), (near - returns_BT).square())
    return 0.5 * error[mask_BT].mean()


@torch.no_grad()
def experience(
    models: tuple[Any, nn.Module, nn.Module],
    tokenizer: Any,
    prompts: Sequence[list[int]],
    score: Callable[[Tensor], Tensor],
    settings: PPOSettings,
    kl_coefficient: float,
) -> Experience:
    """Answers to `prompts`, judged.

    Args:
        models: the policy, its reference, the value head.
        score: rewards (B,) of :attr:`Rollout.answers_BT`.
    """
    model, reference, value_head = models
    batch = rollout(model, tokenizer, prompts, settings.max_new_tokens)
    mask, hidden = batch.mask_BT, answer_states(model, batch)
    old, values = answer_logprobs(model, hidden, batch), value_head(hidden)[..., 0]
    log_ratio = old - answer_logprobs(reference, answer_states(reference, batch), batch)
    scores = score(batch.answers_BT).to(old)
    rewards = token_rewards(scores, log_ratio, mask, kl_coefficient)
    advantage = advantages(rewards, values, mask, settings.gamma, settings.lam)
    target = whiten(advantage, mask), advantage + values
    return Experience(batch, (old, values), target, scores, log_ratio.sum(1))


def batch_loss(
    model: nn.Module,
    value_head: nn.Module,
    batch: Rollout,
    old: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    settings: PPOSettings,
) -> Tensor:
    """The loss above, of :class:`Experience`'s parts."""
    hidden = answer_states(model, batch)
    policy = policy_loss(answer_logprobs(model, hidden, batch), old[0], target[0], batch.mask_BT, settings.clip)
    values = value_head(hidden)[..., 0]
    return policy + settings.value_weight * value_loss(values, old[1], target[1], batch.mask_BT, settings.value_clip)


def value_head_of(model: Any) -> nn.Module:
    """A head of one output over the states of `model`, all zeros."""
    # The states' width is the head's: OPT-350M projects them before it.
    width = head_weight(model.get_output_embeddings())[0].shape[1]
    head = nn.utils.skip_init(nn.Linear, width, 1, dtype=model.dtype, device=model.device)
    for parameter in head.parameters():
        # Noise would be taken for values at first, and drawing it would move the global random state.
        nn.init.zeros_(parameter)
    return head


def train(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    score: Callable[[list[int], Tensor], Tensor],
    settings: PPOSettings,
    seed: int,
) -> list[dict[str, float]]:
    """Trains `model` in place, with its state at the start as the reference; the global random state stays as it was.

    Args:
        prompts: tokens, of which a batch has `batch_size` at most.
        score: rewards (B,) of answers, from the places of their prompts and :attr:`Rollout.answers_BT`.

    Returns:
        For each batch: mean score, KL in nats a sequence, its coefficient, mean length in tokens.
    """
    # With dropout a ratio would not be 1 where nothing has changed.
    model.eval()
    reference = copy.deepcopy(model).requires_grad_(False)
    value_head = value_head_of(model)
    models = model, reference, value_head
    parameters = [*model.parameters(), *value_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=0.0)
    controller = KLController(settings.kl_coefficient, settings.kl_target, settings.horizon)
    shuffled, order, history = random.Random(seed), [], []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in (bar := tqdm(range(settings.batches), desc="ppo", unit="batch")):
            if len(order) < settings.batch_size:
                order = shuffled.sample(range(len(prompts)), len(prompts))
            places, order = order[: settings.batch_size], order[settings.batch_size :]
            chosen = [prompts[i] for i in places]
            coefficient = controller.coefficient
            found = experience(models, tokenizer, chosen, partial(score, places), settings, coefficient)
            for _ in range(settings.epochs):
                mixed = shuffled.sample(range(len(places)), len(places))
                for first in range(0, len(mixed), settings.mini_batch_size):
                    part = mixed[first : first + settings.mini_batch_size]
                    old, target = (tuple(x[part] for x in pair) for pair in (found.old, found.target))
                    loss = batch_loss(model, value_head, found.batch.rows(part), old, target, settings)
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
            kl, lengths = found.kl_B.mean().item(), found.batch.mask_BT.sum(1).tolist()
            line = {"score": found.scores_B.mean().item(), "kl": kl, "kl_coefficient": coefficient}
            history.append({**line, "length": statistics.fmean(lengths)})
            controller.update(kl, len(places))
            bar.set_postfix({name: f"{x:.3g}" for name, x in history[-1].items()})
    return history


def judged_by(
    judge: Any, tokenizer: Any, prompts: Sequence[str], answered_by: Any = None
) -> Callable[[list[int], Tensor], Tensor]:
    """`score` of :func:`train`: a reward model's, of whole texts with one end token (:func:`reward.ended`).

    Args:
        tokenizer: the reward model's.
        answered_by: the tokenizer of the answers, where it is another.
    """

    def score(places: list[int], answers_BT: Tensor) -> Tensor:
        answers = (answered_by or tokenizer).batch_decode(answers_BT, skip_special_tokens=True)
        texts = [reward.ended(prompts[i] + answer, tokenizer) for i, answer in zip(places, answers, strict=True)]
        return reward.score(judge, tokenizer, texts)

    return score
