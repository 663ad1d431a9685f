"""Reads, tokenizes and checks the pairs of a run, before the model's weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orpo.data.encoder_decoder import EncoderDecoderTokenizer
from orpo.data.first_rows import read_first
from orpo.data.overlap import report_overlap
from orpo.data.pair_tokens import PairTokenizer
from orpo.data.prepare import prepare_dataset
from orpo.data.preview import check_stream
from orpo.tokens.prompts import boundary_note, remember_form
from orpo.trainer.config import ORPOConfig
from orpo.trainer.evaluation import check_best_metric, each_set


def read_forms(train: Any, tokenizer: Any, args: ORPOConfig, encoder_decoder: bool) -> None:
    """Notes the form of the pairs in `tokenizer`, and prints where prompts end if it is not where it seems.

    The prompt of an encoder-decoder always ends where it seems to.
    """
    first = [read_first(train, tokenizer, args.columns)]
    remember_form(tokenizer, first, escape=args.escape_special_tokens)
    if args.should_log and not encoder_decoder and (note := boundary_note(first, tokenizer)):
        print(note)


def preparation(args: ORPOConfig, tokenizer: Any, encoder_decoder: bool) -> Callable[[Any, str], Any]:
    """``prepare(data, name)``: :func:`orpo.data.prepare.prepare_dataset` with `args`, on the first process first."""

    def prepare(data: Any, name: str) -> Any:
        if data is None:
            return None
        report = print if args.should_log else lambda _: None
        with args.main_process_first(desc=f"tokenizing the {name} set"):
            return prepare_dataset(
                data,
                tokenizer,
                args.limits,
                name=name,
                num_proc=args.dataset_num_proc,
                escape_special_tokens=args.escape_special_tokens,
                columns=args.columns,
                score_turns=args.score_turns,
                max_bad_rows=args.max_bad_rows,
                pair_answers=args.pair_by_prompt,
                pair_tokenizer=EncoderDecoderTokenizer if encoder_decoder else PairTokenizer,
                report=report,
            )

    return prepare


def prepare_sets(
    train: Any, held_out: Any, args: ORPOConfig, prepare: Callable[[Any, str], Any], *, has_own_metrics: bool
) -> tuple[Any, Any]:
    """Both data sets, checked and prepared by `prepare`; reports pairs that they share.

    Args:
        held_out: a data set, a dict of several, or None.
        has_own_metrics: whether ``compute_metrics`` adds metrics to an evaluation.

    Raises:
        ValueError: no row of a set can train, or no evaluation has the ``metric_for_best_model``.
    """
    train = prepare(train, "train")
    held_out = each_set(held_out, "eval", prepare, args.columns)
    each_set(held_out, "eval", lambda part, _: check_stream(part), args.columns)
    check_best_metric(args, held_out, has_own=has_own_metrics)
    if args.should_log and train is not None:
        report_overlap(train, held_out)
    return train, held_out
