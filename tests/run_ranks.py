"""A short training run and an evaluation on as many ranks as torchrun starts; rank 0 writes what it saw.

torchrun --nproc_per_node 2 tests/run_ranks.py OUTPUT_DIR PAIRS_PER_STEP
"""

import json
import sys
from pathlib import Path

import torch
from tiny import SEVEN, make_model, make_tokenizer

from orpo import ORPOConfig, ORPOTrainer


def main(output_dir: str, pairs_per_step: int) -> None:
    args = ORPOConfig(
        output_dir=output_dir,
        max_steps=3,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    args.gradient_accumulation_steps = pairs_per_step // args.world_size
    trainer = ORPOTrainer(
        make_model("llama"),
        args,
        train_dataset={name: [*column, column[0]] for name, column in SEVEN.items()},
        eval_dataset=SEVEN,
        tokenizer=make_tokenizer(),
    )
    trainer.train()
    metrics = trainer.evaluate()
    wrapper = type(trainer.model_wrapped).__name__
    if trainer.is_world_process_zero():
        weights = {name: p.double().sum().item() for name, p in trainer.model.named_parameters()}
        seen = {"wrapper": wrapper, "log": trainer.state.log_history, "eval": metrics, "weights": weights}
        Path(output_dir, "seen.json").write_text(json.dumps(seen))
    if args.world_size > 1:
        # Threads of the process group that still run when Python exits abort the process.
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
