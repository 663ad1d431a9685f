"""From text pairs to token pairs: boundaries, BOS and EOS, truncation, and what was dropped and why.

A prepared data set has six columns: ``chosen_input_ids`` and ``rejected_input_ids`` (prompt and answer in one list),
``chosen_prompt_length`` and ``rejected_prompt_length`` (tokens before the answer), ``length`` (of both sequences
together), and ``pair_id`` (the row of the data set as it was given).
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo import __version__, formats
from orpo.formats import AS_THEY_ARE, EMPTY_ANSWER, PROMPTS_DIFFER, PairText, UnusableRow, pair_text, skips_template
from orpo.streams import ATTRIBUTE, DropCounter, summarize

# Where a prepared data set keeps the report on it.
SUMMARY = "orpo_summary"

COLUMNS = ("chosen_input_ids", "rejected_input_ids", "chosen_prompt_length", "rejected_prompt_length")


@dataclass(frozen=True)
class Limits:
    """How long a sequence may be, in tokens; None is no limit.

    A pair is cut only where one of its sequences is longer than `max_length`: first its prompt to `max_prompt_length`,
    if that is set, then its answers to what is left. A row whose prompt leaves no room for an answer is dropped.

    Attributes:
        max_length: prompt and answer together.
        max_prompt_length: the prompt, of a pair that is too long.
        max_completion_length: every answer.
        truncation_mode: "keep_end" or "keep_start", the part of a cut prompt that stays. A leading BOS always stays.
    """

    max_length: int | None = 1024
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_end"

    def __post_init__(self) -> None:
        for name in ("max_length", "max_prompt_length", "max_completion_length"):
            value, least = getattr(self, name), 2 if name == "max_length" else 1
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it has to be at least {least}")
        if self.max_length and self.max_prompt_length and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length is {self.max_prompt_length} and max_length {self.max_length}: "
                "the prompt may not fill the sequence; lower --max_prompt_length too, or leave it out"
            )
        if self.truncation_mode not in ("keep_end", "keep_start"):
            raise ValueError(f"truncation_mode is {self.truncation_mode!r}; it has to be 'keep_end' or 'keep_start'")

    @property
    def too_long(self) -> str:
        """Why a row is dropped whose prompt leaves no room for an answer."""
        return f"prompt of {self.max_length:,} tokens or more"

    def cut_prompt(self, ids: list[int], bos_token_id: int | None) -> list[int]:
        """`ids` cut to `max_prompt_length`."""
        most = self.max_prompt_length
        if most is None or len(ids) <= most:
            return ids
        if self.truncation_mode == "keep_start":
            return ids[:most]
        if ids[0] == bos_token_id:
            return ids[:1] + ids[len(ids) - most + 1 :]
        return ids[-most:]


@functools.cache
def code_version() -> str:
    """A digest of the version and of the code that turns rows into tokens.

    ``datasets`` looks up tokens that it has made before by the attributes of what made them: without this among them, a
    run would train on those that an older version of this package made.
    """
    files = (__file__, formats.__file__)
    return hashlib.sha256(__version__.encode() + b"".join(Path(f).read_bytes() for f in files)).hexdigest()


class PairTokenizer:
    """Text pairs to token pairs, with the boundaries of TRL's trainer.

    The answer begins after the common token prefix of ``tokenize(prompt)`` and ``tokenize(prompt + answer)``, for each
    answer by itself: a merge over the boundary belongs to the answer. Plain strings get BOS in front and EOS at the end
    where they are missing. A chat template writes its own; EOS is added only if the rendered turn has no special token
    near its end, for then nothing would teach the model to stop.
    """

    def __init__(self, tokenizer: Any, limits: Limits) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.code = code_version()
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special_ids = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    def __call__(self, rows: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """A batch of rows as columns -> the prepared columns and ``dropped`` (the reason, or "")."""
        size = len(indices)
        texts: list[PairText | None] = []
        dropped = [""] * size
        for i in range(size):
            try:
                texts.append(pair_text({name: column[i] for name, column in rows.items()}, self.tokenizer))
            except UnusableRow as reason:
                texts.append(None)
                dropped[i] = str(reason)
        flat = [t for text in texts if text for t in self._parts(text)]
        ids = iter(self.tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
        out: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for i, text in enumerate(texts):
            pair = None
            if text is not None:
                sides = [self._side(next(ids), next(ids), text.templated) for _ in range(2)]
                try:
                    pair = self._fit(sides)
                except UnusableRow as reason:
                    dropped[i] = str(reason)
            (chosen_prompt, chosen), (rejected_prompt, rejected) = pair or (([], []), ([], []))
            out["chosen_input_ids"].append(chosen_prompt + chosen)
            out["rejected_input_ids"].append(rejected_prompt + rejected)
            out["chosen_prompt_length"].append(len(chosen_prompt))
            out["rejected_prompt_length"].append(len(rejected_prompt))
        # transformers groups batches by this column, where `train_sampling_strategy` asks for it.
        length = [len(c) + len(r) for c, r in zip(out["chosen_input_ids"], out["rejected_input_ids"], strict=True)]
        return {**out, "pair_id": list(indices), "length": length, "dropped": dropped}

    @staticmethod
    def _parts(text: PairText) -> tuple[str, str, str, str]:
        return (
            text.chosen_prompt,
            text.chosen_prompt + text.chosen,
            text.rejected_prompt,
            text.rejected_prompt + text.rejected,
        )

    def _side(self, prompt: list[int], whole: list[int], templated: bool) -> tuple[list[int], list[int]]:
        """(prompt tokens, answer tokens) of one side, with BOS and EOS."""
        split = 0
        while split < min(len(prompt), len(whole)) and prompt[split] == whole[split]:
            split += 1
        prompt, answer = whole[:split], whole[split:]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if templated:
            ended = any(token in self.special_ids for token in answer[-3:])
        else:
            ended = bool(answer) and answer[-1] == eos
            if bos is not None and prompt[:1] != [bos]:
                prompt = [bos, *prompt]
        if eos is not None and not ended:
            answer = [*answer, eos]
        return prompt, answer

    def _fit(self, sides: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
        """Both sides within the limits, each with at least one answer token that another token precedes."""
        limits = self.limits
        sides = [(prompt, answer[: limits.max_completion_length]) for prompt, answer in sides]
        if limits.max_length is not None and max(len(p) + len(a) for p, a in sides) > limits.max_length:
            sides = [(limits.cut_prompt(p, self.tokenizer.bos_token_id), a) for p, a in sides]
            if max(len(p) for p, _ in sides) >= limits.max_length:
                raise UnusableRow(limits.too_long)
            sides = [(p, a[: limits.max_length - len(p)]) for p, a in sides]
        if min(len(p) + len(a) for p, a in sides) < 2:
            raise UnusableRow(EMPTY_ANSWER)
        return sides


def as_dataset(data: Any) -> Any:
    """`data` as a ``datasets.Dataset`` (or as the ``IterableDataset`` it is).

    Args:
        data: a Dataset, an IterableDataset, a dict of equally long lists, or a list of dicts.
    """
    import datasets

    if isinstance(data, (datasets.Dataset, datasets.IterableDataset)):
        return data
    if isinstance(data, Mapping):
        return datasets.Dataset.from_dict(dict(data))
    if isinstance(data, (list, tuple)):
        return datasets.Dataset.from_list(list(data))
    raise ValueError(
        "a data set has to be a datasets.Dataset or IterableDataset, a dict of lists or a list of dicts, "
        f"not {type(data).__name__}"
    )


def prepare_dataset(
    data: Any,
    tokenizer: Any,
    limits: Limits,
    *,
    name: str = "train",
    num_proc: int | None = None,
    report: Callable[[str], None] = print,
) -> Any:
    """Tokenizes `data` and drops the rows that cannot train, saying how many and why.

    Args:
        data: anything that :func:`as_dataset` takes, in any form of :mod:`orpo.formats`, or prepared already.
        tokenizer: a Hugging Face tokenizer.
        limits: lengths in tokens.
        name: what the report calls this data set.
        num_proc: processes that tokenize. The result is cached by ``datasets`` where the data set lies on disk.
        report: called with the report. A stream is counted as it is read: :class:`orpo.streams.StreamReport` says when.

    Raises:
        ValueError: `data` has no form that we know, or no row is left.
    """
    import datasets

    data = as_dataset(data)
    if set(COLUMNS) <= set(data.column_names or ()):
        return data
    tokenize = PairTokenizer(tokenizer, limits)
    if isinstance(data, datasets.IterableDataset):
        columns = data.column_names or list(next(iter(data)))
        tokenized = data.map(tokenize, batched=True, with_indices=True, remove_columns=columns)
        report(f"{name}: a stream; rows that cannot train are left out as they come, and counted after each epoch")
        reasons = (EMPTY_ANSWER, PROMPTS_DIFFER, *([] if limits.max_length is None else [limits.too_long]))
        if skips_template(next(iter(data)), tokenizer):
            report(f"{name}: {AS_THEY_ARE}")
        counter = DropCounter(name, reasons)
        prepared = tokenized.filter(counter).remove_columns("dropped")
        setattr(prepared, ATTRIBUTE, counter)
        return prepared
    tokenized = data.map(
        tokenize,
        batched=True,
        with_indices=True,
        remove_columns=data.column_names,
        num_proc=num_proc,
        desc=f"Tokenizing the {name} set",
    )
    reasons = Counter(reason for reason in tokenized["dropped"] if reason)
    summary = summarize(name, len(data), reasons)
    if reasons.total() == len(data):
        raise ValueError(f"no row of the {name} set can train: {summary}")
    report(summary)
    if skips_template(data[0], tokenizer):
        report(f"{name}: {AS_THEY_ARE}")
    kept = tokenized.filter(_is_kept, num_proc=num_proc, desc=f"Filtering the {name} set") if reasons else tokenized
    prepared = kept.remove_columns("dropped")
    setattr(prepared, SUMMARY, summary)
    return prepared


def _is_kept(example: Mapping[str, Any]) -> bool:
    return not example["dropped"]


def check_token_ids(data: Any, vocabulary: int) -> None:
    """Refuses a prepared data set with tokens that the model has no embedding for. A stream is not looked at.

    Raises:
        ValueError: with the largest id and the number of embeddings.
    """
    import pyarrow.compute as pc

    if not hasattr(data, "data"):
        return
    for side in ("chosen", "rejected"):
        largest = pc.max(pc.list_flatten(data.data.column(f"{side}_input_ids"))).as_py()
        if largest is not None and largest >= vocabulary:
            raise ValueError(
                f"the data set holds token id {largest}, and the model has {vocabulary} embeddings: it needs its own "
                "tokenizer, or model.resize_token_embeddings(len(tokenizer))"
            )


def describe_example(example: Mapping[str, Any], layout: Callable[..., dict[str, Any]], tokenizer: Any) -> str:
    """One pair, decoded, as each term of the loss scores it: read off the rows that `layout` makes of it."""
    rows = layout([example])["orpo"].rows
    chosen = rows.sequence_N == 0
    spans = {
        "NLL": rows.in_nll_N,
        "odds ratio, chosen": rows.in_response_N & chosen,
        "odds ratio, rejected": rows.in_response_N & ~chosen,
    }
    lines = (
        f"  {label:<20} {int(kept.sum()):>5} tokens  {tokenizer.decode(rows.targets_N[kept].tolist())!r}"
        for label, kept in spans.items()
    )
    return "what each term scores, in the first pair:\n" + "\n".join(lines)
