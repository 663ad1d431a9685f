"""ORPOTrainer(torch_compile=True): the same losses, and no new graph for the counts of each batch."""

import random

import torch
from trainers import logged, make_trainer

WORDS = "the quick brown fox jumps over a lazy dog".split()


def pairs(count):
    draw = random.Random(0)

    def text():
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 14)))

    return [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(count)]


def test_batches_of_other_sizes_are_no_new_graphs(tmp_path):
    losses = {}
    for compiles in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiles else {}
        trainer = make_trainer(tmp_path, train_dataset=pairs(32), max_steps=8, layout="padded", **options)
        trainer.train()
        losses[compiles] = torch.tensor(logged(trainer, "loss"))
    # The first batch, and all others with sizes and counts as symbols.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=1e-4)
