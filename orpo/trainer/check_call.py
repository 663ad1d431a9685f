"""Refuses mistakes in the call of ORPOTrainer before anything is read."""

from __future__ import annotations

from typing import Any

from orpo.runs.disk import check_writable
from orpo.trainer.config import ORPOConfig


def check_call(args: Any, train: Any, held_out: Any, processing_class: Any, tokenizer: Any) -> ORPOConfig:
    """The settings of a run on the data sets `train` and `held_out`; for None the defaults.

    Raises:
        ValueError: the settings are another trainer's, two tokenizers or no data are given, or ``output_dir`` cannot be
            written to.
    """
    args = ORPOConfig() if args is None else args
    if not isinstance(args, ORPOConfig):
        given = f"{type(args).__module__.partition('.')[0]}.{type(args).__name__}"
        raise ValueError(
            f"args has to be an orpo.ORPOConfig, not {given}: from orpo import ORPOConfig, which takes the same "
            "arguments"
        )
    if tokenizer is not None and processing_class is not None:
        raise ValueError("tokenizer is the older name of processing_class: give one of them, not both")
    if train is None and held_out is None:
        raise ValueError("neither train_dataset nor eval_dataset is given; there is nothing to train on")
    if train is not None and args.should_save:
        check_writable(args.output_dir)
    if args.n_gpu > 1:
        # More than 1 starts torch's DataParallel, which would cut the row arrays in pieces.
        args._n_gpu = 1
    return args
