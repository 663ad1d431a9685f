"""Rows dropped from a stream are counted where they are read, dataloader workers included."""

import datasets
import pytest
from tiny import SEVEN, make_model, make_tokenizer

from orpo import ORPOConfig, ORPOTrainer


def rows():
    good = [dict(zip(SEVEN, values, strict=True)) for values in zip(*SEVEN.values(), strict=True)]
    empty = [{"prompt": "a", "chosen": "", "rejected": "b"}] * 3
    long = [{"prompt": "hello " * 80, "chosen": "x", "rejected": "y"}] * 2
    return good + empty + long


@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_says_what_was_dropped(workers, tmp_path, capsys):
    # Three shards for two workers: each reads its own.
    stream = datasets.Dataset.from_list(rows()).to_iterable_dataset(num_shards=3)
    evaluation = datasets.Dataset.from_list(rows()[-6:]).to_iterable_dataset()
    args = ORPOConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        max_length=64,
        dataloader_num_workers=workers,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = ORPOTrainer(
        make_model(), args, train_dataset=stream, eval_dataset=evaluation, processing_class=make_tokenizer()
    )
    trainer.train()
    trainer.evaluate()
    lines = [line for line in capsys.readouterr().out.splitlines() if "so far as it was read" in line]
    drops = "3 empty answers, 2 prompts of 64 tokens or more"
    assert lines[0].startswith("train, ") and lines[0].endswith(f"kept 7 of 12: {drops}")
    assert lines[1] == lines[0], "the second epoch counts for itself"
    assert lines[-1].startswith("eval, ") and lines[-1].endswith(f"kept 1 of 6: {drops}")
