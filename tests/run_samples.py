"""A run with samples at each evaluation, on the ranks of a launcher: torchrun tests/run_samples.py OUTPUT_DIR"""

import sys

from tiny import SEVEN
from trainers import make_trainer

from orpo.train import end_process_group

if __name__ == "__main__":
    trainer = make_trainer(
        sys.argv[1], eval_dataset=SEVEN, generate_during_eval=True, eval_samples=2, eval_max_new_tokens=4,
        eval_strategy="steps", eval_steps=1, max_steps=2,
    )  # fmt: skip
    trainer.train()
    print(type(trainer.model_wrapped).__name__)
    del trainer
    end_process_group()
