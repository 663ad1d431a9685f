"""A short run whose matmuls are cut over ranks, and what every rank saw. Run by run_forked."""

import os

import datasets
import torch
from accelerate import ParallelismConfig
from run_ranks import EIGHT, finish, let_accelerate_shard_on_cpu, make_trainer
from tiny import SEVEN
from torch.distributed.tensor import DTensor

from orpo.train import main


def start(folder, options):
    """As run_ranks.make_trainer. `options` also has ``tp``, and ``shards`` of FSDP2 where there are several."""
    options = dict(options)
    tp, shards = options.pop("tp", 1), options.pop("shards", 1)
    if tp > 1:
        let_accelerate_shard_on_cpu()
        # Where there is an accelerator, transformers would cut the model on that.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if shards == 1:
            # As accelerate's launcher asks for it.
            os.environ |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": str(tp)}
        else:
            options["parallelism_config"] = ParallelismConfig(tp_size=tp, dp_shard_size=shards)
    accumulation, world = options.pop("accumulation", 1), int(os.environ.get("WORLD_SIZE", "1"))
    batch = options.get("per_device_train_batch_size", 1)
    if options.pop("stream", False):
        options["train"] = datasets.Dataset.from_dict(EIGHT).to_iterable_dataset()
    # make_trainer takes all ranks for ranks with rows of their own.
    options["pairs_per_step"] = accumulation * world * batch
    trainer, seen = make_trainer(folder, **options)
    seen["pairs a step"] = trainer.get_total_train_batch_size(trainer.args)
    assert seen["pairs a step"] == accumulation * world // tp * batch
    return trainer, seen


def train(folder, options):
    """What the rank saw, and the shapes of its part of the head wherever one was read."""
    trainer, seen = start(folder, options)
    seen["layout"] = type(trainer.data_collator).__name__
    head = trainer.model.get_output_embeddings()
    seen["head"], plain = set(), head.forward

    def watched(*arguments, **named):
        weight = head.weight
        if "orpo" in named:
            seen["head"].add(tuple((weight.to_local() if isinstance(weight, DTensor) else weight).shape))
        return plain(*arguments, **named)

    head.forward = watched
    seen = finish(trainer, seen)
    head.forward = plain
    # Of plain parameters this rank's own, which are to be those of the other ranks.
    seen["predictions"] = torch.tensor(trainer.predict(options.get("evaluate", SEVEN)).predictions)
    trainer.save_model(str(folder / "export"))
    return seen


def resume(folder, options):
    """Goes on from the newest checkpoint."""
    start(folder, options)[0].train(resume_from_checkpoint="auto")


def command(folder, line):
    """``orpo-train`` on two ranks, of which a launcher asked for tensor parallel."""
    let_accelerate_shard_on_cpu()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    os.environ["PARALLELISM_CONFIG_TP_SIZE"] = "2"
    main([*line, "--output_dir", str(folder / "run"), "--use_cpu", "--report_to", "none", "--save_strategy", "no"])
