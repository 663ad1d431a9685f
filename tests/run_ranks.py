"""A short training run and an evaluation on one or several ranks, and what every rank saw.

`train` runs in the processes that run_forked starts. Under a launcher:

torchrun --nproc_per_node 2 tests/run_ranks.py OUTPUT_DIR DEATH [fsdp]      DEATH: none; exit or raise, of the last rank
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from tiny import (
    ENCODER_DECODERS,
    SEVEN,
    make_encoder_decoder,
    make_encoder_tokenizer,
    make_model,
    make_tokenizer,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from orpo import ORPOConfig, ORPOTrainer
from orpo.train import end_process_group

EIGHT = {name: [*column, column[0]] for name, column in SEVEN.items()}


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

    def __init__(self, way):
        self.way = way

    def on_step_end(self, args, state, control, **_):
        if args.process_index == args.world_size - 1:
            if self.way == "exit":
                os._exit(9)
            raise RuntimeError("the last rank has had enough")


def shift_logits(module, inputs, output):
    """The loss goes by the weight of the head, and cannot know of this."""
    return output + torch.arange(output.shape[-1]) if isinstance(output, torch.Tensor) else output


class Emptied:
    """The trainer's collator, but nothing of the pairs `ids` counts, as if all their labels were masked."""

    def __init__(self, collator, ids):
        self.collator, self.ids = collator, set(ids)

    def __call__(self, examples):
        batch = self.collator(examples)
        pairs = batch["orpo"]
        empty = [int(i) in self.ids for i in pairs.pair_ids]
        assert all(empty) or not any(empty)
        return {**batch, "orpo": pairs.first(0)} if empty[0] else batch


def sharding(**changes):
    """Settings of FSDP2 for the arguments of a run."""
    settings = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": False}
    return {"fsdp": True, "fsdp_config": {**settings, **changes}}


def make_args(folder, pairs_per_step=4, **settings):
    defaults = {
        "output_dir": str(folder / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = ORPOConfig(**{**defaults, **settings})
    args.gradient_accumulation_steps = pairs_per_step // (args.world_size * args.per_device_train_batch_size)
    return args


def make_trainer(folder, *, model=None, lora=None, train=EIGHT, evaluate=SEVEN, empty=(), forget=False, **settings):
    """(trainer, what it will have seen). Ask for FSDP2 with ``fsdp=True``, or with the changes of its settings.

    Args:
        model: changes of the tiny model's configuration, or a folder to load one from.
        lora: arguments of peft.LoraConfig.
        empty: pairs of which nothing counts.
        forget: whether ranks other than the first lose their weights before the model is cut.
        settings: of ORPOConfig.
    """
    fsdp = settings.pop("fsdp", None)
    if fsdp:
        let_accelerate_shard_on_cpu()
        settings |= sharding(**({} if fsdp is True else fsdp))
        # As accelerate's launcher sets it; without it every rank loads the weights.
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    args = make_args(folder, **settings)
    tokenizer = make_tokenizer()
    if not isinstance(model, str):
        model = {"model_type": "llama", "tie_word_embeddings": False, **(model or {})}
        if model["model_type"] in ENCODER_DECODERS:
            tokenizer, model = make_encoder_tokenizer(), make_encoder_decoder(**model)
        else:
            model = make_model(**model)
    adapter = None
    if lora:
        import peft

        adapter = peft.LoraConfig(**{"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **lora})
    data = {"train_dataset": train, "eval_dataset": evaluate, "tokenizer": tokenizer}
    trainer = ORPOTrainer(model, args, peft_config=adapter, **data)
    if empty:
        trainer.data_collator = Emptied(trainer.data_collator, empty)
    if forget and args.process_index:
        for parameter in trainer.model.parameters():
            parameter.data.zero_()
    seen = {"pair_ids": [], "dtypes": set()}
    run = trainer._run

    def watched(model, inputs, counts, *arguments, **options):
        if model.training:
            seen["pair_ids"].append((trainer.state.global_step, inputs["orpo"].pair_ids.tolist(), counts))
        outputs = run(model, inputs, counts, *arguments, **options)
        seen["dtypes"].update(str(value.dtype) for value in (outputs.loss, *outputs.metrics.values()))
        return outputs

    trainer._run = watched
    return trainer, seen


def whole_weights(model):
    """The parameters, those of FSDP put together, for which every rank has to ask."""
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {name: p.detach().clone() for name, p in whole.items()}


def train(folder, options):
    trainer, seen = make_trainer(folder, **options)
    return finish(trainer, seen)


def finish(trainer, seen):
    """Trains and evaluates; what the rank saw, and its weights."""
    trainer.train()
    metrics = trainer.evaluate()
    return {
        **seen,
        "wrapper": type(trainer.model_wrapped).__name__,
        "sharded": sum(isinstance(module, FSDPModule) for module in trainer.model.modules()),
        "log": trainer.state.log_history,
        "eval": metrics,
        "weights": whole_weights(trainer.model),
    }


def train_to_the_best(folder, options):
    """`train`, and the model as exported; the last rank sees no folder that another rank has made."""
    trainer, seen = make_trainer(folder, **options)
    if trainer.args.process_index:
        exists = os.path.exists
        os.path.exists = lambda path: "_incomplete" not in str(path) and exists(path)
    seen = finish(trainer, seen)
    trainer.save_model(str(folder / "export"))
    return {**seen, "best": trainer.state.best_model_checkpoint}


def warnings_on_own_disks(folder, options):
    """What a run says whose ranks have an ``output_dir`` each."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer, _ = make_trainer(folder / os.environ["RANK"], save_strategy="steps", **options)
        trainer.train()
    return [str(warning.message) for warning in said]


def train_with_another_head(folder):
    let_accelerate_shard_on_cpu()
    model = make_model("llama", tie_word_embeddings=False)
    model.lm_head.register_forward_hook(shift_logits)
    ORPOTrainer(model, make_args(folder, **sharding()), train_dataset=EIGHT, tokenizer=make_tokenizer())


def main(folder: str, death: str, wrapper: str = "") -> None:
    trainer, seen = make_trainer(Path(folder), fsdp=wrapper == "fsdp", model={"tie_word_embeddings": bool(wrapper)})
    if death != "none":
        trainer.add_callback(Death(death))
    seen = finish(trainer, seen)
    if trainer.is_world_process_zero():
        torch.save(seen.pop("weights"), Path(folder, "weights.pt"))
        Path(folder, "seen.json").write_text(json.dumps({**seen, "dtypes": sorted(seen["dtypes"])}))


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process_group()
