"""The loss in a training loop of your own: no trainer, plain torch around `orpo_loss`.

    python examples/own_loop.py                                           a tiny random model, some seconds
    python examples/own_loop.py --model HuggingFaceTB/SmolLM2-135M        a real one

The logits are never made: the loss takes the hidden states below the head, and the head's weight.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo import orpo_loss
from orpo.demo.data import make_pairs
from orpo.demo.model import build_model, tokenizer_of

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a folder or a name on the hub; default: a tiny random model")
parser.add_argument("--max_steps", type=int, default=40)
options = parser.parse_args()

pairs, _ = make_pairs(questions=100, held_out=10)
if options.model is None:
    tokenizer = tokenizer_of(pairs)
    model, learning_rate = build_model(tokenizer, seed=0), 1e-3
else:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model, learning_rate = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32), 2e-5
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
tokenizer.padding_side = "right"
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model.to(device).train()


def batch_of(rows):
    """ids and mask (2P, T), the P chosen sequences first; labels with -100 on prompt and padding."""
    rows = [(row["prompt"], row[side] + tokenizer.eos_token) for side in ("chosen", "rejected") for row in rows]
    batch = tokenizer([prompt + answer for prompt, answer in rows], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    for i, (prompt, _) in enumerate(rows):
        labels[i, : len(tokenizer(prompt)["input_ids"])] = -100
    return ids.to(device), mask.to(device), labels.to(device)


optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
size = 8
for step in range(1, options.max_steps + 1):
    first = (step - 1) * size % (len(pairs) - size + 1)
    ids, mask, labels = batch_of(pairs[first : first + size])
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    # The NLL scores the prompt as well, as in the paper's code and in TRL; without nll_labels, the answer alone.
    nll_labels = ids.masked_fill(mask == 0, -100)
    out = orpo_loss(hidden, model.lm_head.weight, labels, nll_labels=nll_labels, beta=0.1)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step == 1 or step % 10 == 0:
        figures = out.metrics()
        right, ratio = float(figures["rewards/accuracies"]), float(figures["log_odds_chosen"])
        print(f"step {step}: loss {out.loss.item():.3f}, ranked right {right:.2f}, log odds ratio {ratio:.3f}")
