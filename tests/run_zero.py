"""Three steps under DeepSpeed's own engine, on as many ranks as torchrun starts; rank 0 writes losses and weights.

torchrun --nproc_per_node 2 tests/run_zero.py OUTPUT_FILE STAGE      stage 0 is torch alone, in one process

Not through Trainer, whose integration of DeepSpeed takes bfloat16 alone on a CPU.
"""

import contextlib
import os
import sys

import torch
from orpo_kernels.settings import LossSettings
from tiny import SEVEN, make_model, make_tokenizer

from orpo.data.prepare import Limits, prepare_dataset
from orpo.layouts.layout import make_layout
from orpo.model.attach import LossCall, attach_orpo_loss
from orpo.train import end_process_group

STEPS, PAIRS, RATE = 3, 4, 1e-2


def step_of(model, layout, examples, tokens, pairs):
    """The loss of `examples` as their share of a step with so many NLL tokens and pairs."""
    batch = layout(examples)
    rows = batch.pop("orpo").rows
    return model(**batch, orpo=LossCall(rows, LossSettings(num_nll_tokens=tokens, num_pairs=pairs))).loss


def main(output: str, stage: int) -> None:
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    tokenizer, model = make_tokenizer(), make_model("llama", tie_word_embeddings=False)
    examples = prepare_dataset(SEVEN, tokenizer, Limits(max_length=64), name="train").to_list()
    layout = make_layout("padded", pad_token_id=tokenizer.pad_token_id)
    attach_orpo_loss(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    if stage:
        import deepspeed

        deepspeed.init_distributed("gloo")
        config = {
            "train_micro_batch_size_per_gpu": PAIRS // ranks,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for step in range(STEPS):
        window = [examples[(step * PAIRS + i) % len(examples)] for i in range(PAIRS)]
        whole = layout(window)["orpo"]
        mine = window[rank::ranks]
        counts = whole.num_nll_tokens, whole.num_pairs
        if stage:
            loss = step_of(engine, layout, mine, *counts)
            # The engine averages over ranks, where the parts of one mean have to be added.
            engine.backward(loss * ranks)
            engine.step()
            total = loss.detach().clone()
            torch.distributed.all_reduce(total)
        else:
            total = loss = step_of(model, layout, mine, *counts)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total.item())
    seen = {"losses": losses, "engine": "none", "cut": 0}
    weights = {}
    for name, parameter in model.named_parameters():
        seen["cut"] += parameter.numel() == 0
        with deepspeed.zero.GatheredParameters(parameter) if stage == 3 else contextlib.nullcontext():
            weights[name] = parameter.detach().clone()
    if stage:
        seen["engine"] = type(engine.optimizer).__name__
    if rank == 0:
        torch.save({**seen, "weights": weights}, output)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    end_process_group()
