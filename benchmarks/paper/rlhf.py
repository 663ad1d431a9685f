"""RLHF of a model of one's own: PPO on the prompts of a data set, against a reward model of benchmarks.paper.reward.

    python -m benchmarks.paper.rlhf SFT --reward REWARD --data Anthropic/hh-rlhf --output FOLDER

Defaults are the paper's Table 5. One device, in float32: AdamW's states and gradients of the policy, and the weights of
the reference and of the reward model. Prompts of more than ``--max_prompt_length`` tokens are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from orpo.data.files.sources import load_pairs
from orpo.data.forms.formats import pair_text
from orpo.model.load import load_tokenizer

from . import ppo, reward
from .winrates import prompt_ids, usable_rows


@torch.no_grad()
def refuse_other_logits(model: Any, tokenizer: Any, prompt: list[int]) -> None:
    """Refuses a model whose own logits say something else than its states times the head's weight.

    Raises:
        ValueError: with the difference in nats.
    """
    batch = ppo.rollout(model.eval(), tokenizer, [prompt], 4)
    hidden = ppo.answer_states(model, batch)
    logits = model(input_ids=batch.ids_BL, attention_mask=batch.seen_BL).logits[:, -hidden.shape[1] - 1 : -1].float()
    own = logits.log_softmax(-1).gather(-1, batch.answers_BT[..., None])[..., 0] * batch.mask_BT
    difference = (own - ppo.answer_logprobs(model, hidden, batch)).abs().max().item()
    if not difference < 1e-2:
        raise ValueError(f"the fused log-probabilities are {difference:.2g} nats off the model's own; limit 0.01")


def main(argv: Sequence[str] | None = None) -> None:
    settings = ppo.PPOSettings(max_new_tokens=512)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the fine-tuned model that PPO starts from and is held to")
    parser.add_argument("--reward", required=True, help="the reward model's folder")
    parser.add_argument("--data", required=True, help="pairs, whose prompts are answered")
    parser.add_argument("--split", default="train", help="of --data")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its history")
    parser.add_argument("--max_prompt_length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    for name, value in asdict(settings).items():
        default = None if name == "batches" else value
        said = "default: as many as go through the prompts once" if default is None else f"default: {default}"
        parser.add_argument(f"--{name}", type=type(value), default=default, help=said)
    options = parser.parse_args(argv)
    tokenizer, judging = load_tokenizer(options.model), load_tokenizer(options.reward)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    asked = usable_rows(load_pairs(options.data, options.split), judging, options.max_prompt_length)
    prompts = [prompt_ids(pair_text(row, tokenizer), tokenizer) for row, _ in asked]
    if options.batches is None:
        options.batches = max(1, len(prompts) // options.batch_size)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    refuse_other_logits(model, tokenizer, prompts[0])
    judge = reward.load_reward(options.reward, judging).to(device)
    score = ppo.judged_by(judge, judging, [text for _, text in asked], answered_by=tokenizer)
    own = ppo.PPOSettings(**{name: getattr(options, name) for name in asdict(settings)})
    history = ppo.train(model, tokenizer, prompts, score, own, options.seed)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    lines = "".join(json.dumps(line) + "\n" for line in history)
    (options.output / "history.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(prompts):,} prompts, {len(history):,} batches; the last: {history[-1]}")


if __name__ == "__main__":
    main()
