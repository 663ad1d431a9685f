"""Train on plain strings: a prompt, the answer people prefer, and the other one.

    python examples/strings.py                                            a tiny random model, some seconds
    python examples/strings.py --model HuggingFaceTB/SmolLM2-135M         a real one

Strings are trained as they stand: what separates prompt and answer, here a space, belongs to one of them.
"""

import argparse

from orpo import ORPOConfig, ORPOTrainer
from orpo.demo.data import make_pairs
from orpo.demo.model import build_model, tokenizer_of

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a folder or a name on the hub; default: a tiny random model")
parser.add_argument("--output_dir", default="strings-out")
parser.add_argument("--max_steps", type=int, default=40)
options = parser.parse_args()

# Of a shop's help desk: {"prompt": "Customer: Where is ...?\nDesk:", "chosen": " With pleasure. ...", "rejected": ...}
train, held_out = make_pairs(questions=100, held_out=10)
if options.model is None:
    tokenizer = tokenizer_of(train)
    model, learning_rate = build_model(tokenizer, seed=0), 1e-3
else:
    # The trainer loads both by name.
    tokenizer, model, learning_rate = None, options.model, 2e-5

args = ORPOConfig(
    output_dir=options.output_dir,
    max_steps=options.max_steps,
    learning_rate=learning_rate,
    per_device_train_batch_size=8,
    eval_strategy="epoch",
    logging_steps=10,
    save_strategy="no",
    report_to="none",
)
trainer = ORPOTrainer(model, args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer)
trainer.train()
metrics = trainer.evaluate()
trainer.save_model()
right, ratio = metrics["eval_rewards/accuracies"], metrics["eval_log_odds_chosen"]
print(f"held-out pairs: {right:.2f} ranked right, log odds ratio {ratio:.3f}")
