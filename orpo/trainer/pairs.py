"""The pairs of a run: their form read, tokenized, and looked at, all before the model's weights are loaded."""

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
    """Leaves in `tokenizer` in which form the pairs of `train` come, and prints where their prompts really end.

    The prompt of an encoder-decoder ends where it seems to: nothing of it goes to the answer.
    """
    first = [read_first(train, tokenizer, args.columns)]
    remember_form(tokenizer, first, escape=args.escape_special_tokens)
    if args.should_log and not encoder_decoder and (note := boundary_note(first, tokenizer)):
        print(note)


def preparation(args: ORPOConfig, tokenizer: Any, encoder_decoder: bool) -> Callable[[Any, str], Any]:
    """``prepare(data, name)``: :func:`orpo.data.prepare.prepare_dataset` by `args`, one process after the first."""

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
    """Both data sets as `prepare` makes them, after what can be refused of them; pairs that they share are told.

    Args:
        held_out: a data set, a dict of several, or None.
        has_own_metrics: whether ``compute_metrics`` adds to those that an evaluation has.

    Raises:
        ValueError: no row of one can train, or ``metric_for_best_model`` names what no evaluation has.
    """
    train = prepare(train, "train")
    held_out = each_set(held_out, "eval", prepare, args.columns)
    each_set(held_out, "eval", lambda part, _: check_stream(part), args.columns)
    check_best_metric(args, held_out, has_own=has_own_metrics)
    if args.should_log and train is not None:
        report_overlap(train, held_out)
    return train, held_out
