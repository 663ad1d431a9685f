"""ORPOTrainer(torch_compile=True): the same losses, and no new graph for the counts of each batch."""

import random

import torch
from run_forked import returned
from trainers import logged, make_trainer

WORDS = "the quick brown fox jumps over a lazy dog".split()


def pairs(count):
    draw = random.Random(0)

    def text():
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 14)))

    return [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(count)]


def train(folder, compiles):
    """(losses, graphs) of eight steps."""
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiles else {}
    trainer = make_trainer(folder, train_dataset=pairs(32), max_steps=8, layout="padded", **options)
    trainer.train()
    return torch.tensor(logged(trainer, "loss")), torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_batches_of_other_sizes_are_no_new_graphs(tmp_path):
    # In processes of their own: accelerate compiles as the process's first trainer said.
    (plain, none), (compiled, graphs) = (returned(train, 1, tmp_path, compiles)[0] for compiles in (False, True))
    # The first batch, and all others with sizes and counts as symbols.
    assert (none, graphs) == (0, 2)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
