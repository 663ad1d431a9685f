"""A short training run and an evaluation on as many ranks as torchrun starts; rank 0 writes what it saw.

torchrun --nproc_per_node 2 tests/run_ranks.py OUTPUT_DIR PAIRS_PER_STEP [tied|untied FULL_STATE_DICT|...]

With the last two arguments the ranks shard the model by FSDP2, its head tied to the embeddings or not.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from tiny import SEVEN, make_model, make_tokenizer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from orpo import ORPOConfig, ORPOTrainer


def let_accelerate_shard_on_cpu() -> None:
    """On several CPUs accelerate makes DDP where FSDP was asked for; it decides by the type that is changed here."""
    plain = AcceleratorState.__init__

    def init(self, *args, **settings):
        PartialState(cpu=True)
        state = PartialState._shared_state
        if state["distributed_type"] == DistributedType.MULTI_CPU:
            state["distributed_type"] = DistributedType.MULTI_GPU
        plain(self, *args, **settings)

    AcceleratorState.__init__ = init


def main(output_dir: str, pairs_per_step: int, head: str = "untied", state_dict: str | None = None) -> None:
    fsdp = {}
    if state_dict is not None:
        let_accelerate_shard_on_cpu()
        settings = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": state_dict}
        fsdp = {"fsdp": True, "fsdp_config": {**settings, "cpu_ram_efficient_loading": False}}
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
        **fsdp,
    )
    args.gradient_accumulation_steps = pairs_per_step // args.world_size
    trainer = ORPOTrainer(
        make_model("llama", tie_word_embeddings=head == "tied"),
        args,
        train_dataset={name: [*column, column[0]] for name, column in SEVEN.items()},
        eval_dataset=SEVEN,
        tokenizer=make_tokenizer(),
    )
    trainer.train()
    metrics = trainer.evaluate()
    wrapper = type(trainer.model_wrapped).__name__
    sharded = sum(isinstance(module, FSDPModule) for module in trainer.model.modules())
    # Every rank takes part in putting a tensor together.
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        weights = {name: p.double().sum().item() for name, p in whole.items()}
        seen = {
            "wrapper": wrapper,
            "sharded": sharded,
            "log": trainer.state.log_history,
            "eval": metrics,
            "weights": weights,
        }
        Path(output_dir, "seen.json").write_text(json.dumps(seen))
    if args.world_size > 1:
        # Threads of the process group that still run when Python exits abort the process.
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
