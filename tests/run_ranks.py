"""A short training run and an evaluation on as many ranks as torchrun starts; rank 0 writes what it saw.

torchrun --nproc_per_node 2 tests/run_ranks.py OUTPUT_DIR PAIRS_PER_STEP [tied|untied [fsdp]]

The head is tied to the embeddings or not; with "fsdp" the ranks shard the model by FSDP2. The variable ORPO_TEST sets
what is changed: "bf16" trains in mixed precision, "exit" and "raise" make the last rank die after its first step, and
"head" gives the model a head that computes something else.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from tiny import SEVEN, make_model, make_tokenizer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from orpo import ORPOConfig, ORPOTrainer
from orpo.train import end_process_group

CHANGE = os.environ.get("ORPO_TEST")


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


class Death(TrainerCallback):
    """The last rank ends as a process that was killed, or with an error."""

    def on_step_end(self, args, state, control, **_):
        if args.process_index == args.world_size - 1:
            if CHANGE == "exit":
                os._exit(9)
            raise RuntimeError("the last rank has had enough")


def shift_logits(module, inputs, output):
    """The loss goes by the weight of the head, and cannot know of this."""
    return output + torch.arange(output.shape[-1]) if isinstance(output, torch.Tensor) else output


def main(output_dir: str, pairs_per_step: int, head: str = "untied", wrapper: str = "") -> None:
    fsdp = {}
    if wrapper == "fsdp":
        let_accelerate_shard_on_cpu()
        settings = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": False}
        fsdp = {"fsdp": True, "fsdp_config": settings}
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
        bf16=CHANGE == "bf16",
        disable_tqdm=True,
        **fsdp,
    )
    args.gradient_accumulation_steps = pairs_per_step // args.world_size
    model = make_model("llama", tie_word_embeddings=head == "tied")
    if CHANGE == "head":
        model.lm_head.register_forward_hook(shift_logits)
    trainer = ORPOTrainer(
        model,
        args,
        train_dataset={name: [*column, column[0]] for name, column in SEVEN.items()},
        eval_dataset=SEVEN,
        tokenizer=make_tokenizer(),
    )
    if CHANGE in ("exit", "raise"):
        trainer.add_callback(Death())
    dtypes, run = set(), trainer._run

    def watched(*arguments, **settings):
        outputs = run(*arguments, **settings)
        dtypes.update(str(value.dtype) for value in (outputs.loss, *outputs.metrics.values()))
        return outputs

    trainer._run = watched
    trainer.train()
    metrics = trainer.evaluate()
    sharded = sum(isinstance(module, FSDPModule) for module in trainer.model.modules())
    # Every rank takes part in putting a tensor together.
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        torch.save({name: p.detach().clone() for name, p in whole.items()}, Path(output_dir, "weights.pt"))
        seen = {
            "wrapper": type(trainer.model_wrapped).__name__,
            "sharded": sharded,
            "dtypes": sorted(dtypes),
            "log": trainer.state.log_history,
            "eval": metrics,
        }
        Path(output_dir, "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
    end_process_group()
