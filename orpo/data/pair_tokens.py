"""Text pairs to token pairs: where an answer begins, BOS and EOS, truncation, and what cannot train."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from orpo import __version__
from orpo.data import account, bad_rows, masks
from orpo.data.account import ACCOUNT, what_is_cut
from orpo.data.bad_rows import what_it_holds
from orpo.data.forms import columns as data_columns
from orpo.data.forms import conversations, formats, messages, misread, tools, turns, unusable
from orpo.data.forms.columns import each_pair, read_row, renamed
from orpo.data.forms.formats import PairText, pair_text
from orpo.data.forms.turns import shared
from orpo.data.forms.unusable import (
    BAD,
    EMPTY_ANSWER,
    EQUAL_ANSWERS,
    EQUAL_ONCE_CUT,
    MALFORMED,
    REFUSED,
    FileFault,
    UnusableRow,
)
from orpo.data.masks import cut_masks, texts_of, token_mask
from orpo.tokens import limits, special_tokens
from orpo.tokens.limits import Limits
from orpo.tokens.pretokenized import COLUMNS, MASKS
from orpo.tokens.special_tokens import ALTERED, WrittenOut, spare_marks, token_ids, without_marks

# The columns that hold a row's text.
TEXTS = ("prompt", "chosen", "rejected", "tools")


@functools.cache
def code_version() -> str:
    """A digest of the version and of the code that turns rows into tokens.

    ``datasets`` caches tokens by the attributes of the object that made them: without this attribute, a run would train
    on tokens that an older version of this package made.
    """
    text = (account, bad_rows, conversations, data_columns, formats, messages, misread, tools, turns, unusable)
    parts = (*text, limits, masks, special_tokens)
    files = (__file__, *(part.__file__ for part in parts))
    return hashlib.sha256(__version__.encode() + b"".join(Path(f).read_bytes() for f in files)).hexdigest()


class PairTokenizer:
    """Text pairs to token pairs, with the boundaries of TRL's trainer.

    An answer begins after the tokens that ``tokenize(prompt)`` and ``tokenize(prompt + answer)`` share at their start:
    a token over the boundary belongs to the answer. Plain strings get BOS in front and EOS at the end where they are
    missing. A chat template writes its own. Where a rendered turn does not end with a special token, EOS is added: the
    model would not learn to stop.

    Args:
        tokenizer: a Hugging Face tokenizer.
        limits: lengths in tokens.
        escape: whether special tokens written out in the rows' text stay text. Those of the template stay tokens, and
            so do a BOS that begins a string prompt and an EOS that ends a string answer.
        columns: our name -> the column's, of columns that have other names.
        score_turns: "all" or "last", which turns of the assistant count in an answer of several.

    Raises:
        ValueError: `escape` is True, and the tokenizer cannot keep special tokens as text.
    """

    # Whether prompt and answer are one sequence, with one limit.
    joined = True

    def __init__(
        self,
        tokenizer: Any,
        limits: Limits,
        *,
        escape: bool = False,
        columns: Mapping[str, str] | None = None,
        score_turns: str = "all",
    ) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.escape = escape
        self.columns = columns
        self.score_turns = score_turns
        self.code = code_version()
        self.written = WrittenOut(tokenizer)
        if escape:
            self.written.check_escaping(tokenizer)

    def __call__(self, rows: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """A batch of rows, as columns, to the prepared columns and those of :data:`orpo.data.account.ACCOUNT`.

        They have one entry for each pair.
        """
        given: list[Mapping[str, Any]] = []
        numbers: list[int] = []
        for i, number in enumerate(indices):
            pairs = each_pair(renamed({name: column[i] for name, column in rows.items()}, self.columns))
            given += pairs
            numbers += [number] * len(pairs)
        size = len(given)
        texts: list[PairText | None] = []
        dropped, details, found, cut = [""] * size, [""] * size, [""] * size, [0] * size
        escaped: dict[int, Iterator[list[int]]] = {}
        for i, row in enumerate(given):
            try:
                row = read_row(row, self.tokenizer)
                text = self._text(row)
                found[i] = self._first_written(row, text)
                if found[i] and self.escape:
                    text, escaped[i] = self._escaped(row, text)
                texts.append(text)
            except UnusableRow as unusable:
                texts.append(None)
                holds = what_it_holds(given[i]) if unusable.reason in BAD else ""
                dropped[i], details[i] = unusable.reason, "; ".join(filter(None, (unusable.detail, holds)))
            except FileFault as error:
                error.add_note(f"in row {numbers[i]}, counted from 0")
                raise
            except ValueError as error:
                texts.append(None)
                dropped[i], details[i] = MALFORMED, f"{error}; {what_it_holds(given[i])}"
        sides = [side for i, text in enumerate(texts) if text and i not in escaped for side in self._parts(text)]
        ids = iter(self._ids(sides) if sides else [])
        out: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, *MASKS)}
        for i, text in enumerate(texts):
            pair, counted = None, [[], []]
            if text is not None:
                own = escaped.get(i, ids)
                sides = []
                for side, (answer, spans) in enumerate(zip((text.chosen, text.rejected), text.turns, strict=True)):
                    prompt, whole, *cuts = (next(own) for _ in range(2 + 2 * len(spans or ())))
                    sides.append(self._side(prompt, whole, text.templated, answer))
                    counted[side] = token_mask(spans, cuts, whole, sides[-1])
                try:
                    pair = self._fit(sides)
                    cut[i] = what_is_cut(sides, pair)
                    counted = cut_masks(counted, sides, pair, self.limits, self.tokenizer.bos_token_id)
                except UnusableRow as unusable:
                    dropped[i], details[i] = unusable.reason, unusable.detail
            (chosen_prompt, chosen), (rejected_prompt, rejected) = pair or (([], []), ([], []))
            out["chosen_input_ids"].append(chosen_prompt + chosen)
            out["rejected_input_ids"].append(rejected_prompt + rejected)
            out["chosen_prompt_length"].append(len(chosen_prompt))
            out["rejected_prompt_length"].append(len(rejected_prompt))
            for name, mask in zip(MASKS, counted if pair else ([], []), strict=True):
                out[name].append(mask)
        # transformers groups batches by this column, where `train_sampling_strategy` asks for it.
        length = [len(c) + len(r) for c, r in zip(out["chosen_input_ids"], out["rejected_input_ids"], strict=True)]
        account = dict(zip(ACCOUNT, (dropped, details, found, cut), strict=True))
        return {**out, "pair_id": numbers, "length": length, **account}

    def _first_written(self, row: Mapping[str, Any], text: PairText) -> str:
        """The first special token in the row's own text, not the template's; or ""."""
        if text.templated:
            return self.written.first([row.get(name) for name in TEXTS])
        sides = ((text.chosen_prompt, text.chosen), (text.rejected_prompt, text.rejected))
        return next(filter(None, (self.written.first_in_strings(*side) for side in sides)), "")

    def _escaped(self, row: Mapping[str, Any], text: PairText) -> tuple[PairText, Iterator[list[int]]]:
        """(final texts, tokens of their parts) of a row whose special tokens stay text."""
        marks = spare_marks([row.get(name) for name in TEXTS])
        if text.templated:
            with_marks = {name: self.written.mark(row[name], marks) for name in TEXTS if name in row}
            marked = pair_text(row | with_marks, self.tokenizer, self.score_turns)
            sides = self._parts(marked)
            bare = [[without_marks(part, marks) for part in side] for side in sides]
            # The prompt may end elsewhere: the answer's special token may begin like the opening of its turn.
            wholes, starts = zip(*((whole, (prompt, *cuts)) for prompt, whole, *cuts in bare), strict=True)
            plain = tuple(side[1] for side in self._parts(text))
            if wholes != plain or not all(w.startswith(t) for w, own in zip(wholes, starts, strict=True) for t in own):
                raise UnusableRow(REFUSED, ALTERED)
            return marked, iter(token_ids([*chain(*sides)], self.tokenizer, marks))
        pieces = (
            *((text.chosen_prompt, ""), (text.chosen_prompt, text.chosen)),
            *((text.rejected_prompt, ""), (text.rejected_prompt, text.rejected)),
        )
        parts = [self.written.mark_strings(*piece, marks) for piece in pieces]
        return text, iter(token_ids(parts, self.tokenizer, marks))

    def _text(self, row: Mapping[str, Any]) -> PairText:
        return pair_text(row, self.tokenizer, self.score_turns)

    @staticmethod
    def _parts(text: PairText) -> list[list[str]]:
        """The parts of each side: its prompt, all its text, and the text up to where its turns begin and end."""
        return texts_of(text)

    def _ids(self, sides: list[list[str]]) -> list[list[int]]:
        """Tokens of each of the :meth:`_parts` of rows."""
        return self.tokenizer([*chain(*sides)], add_special_tokens=False)["input_ids"]

    def _side(self, prompt: list[int], whole: list[int], templated: bool, text: str) -> tuple[list[int], list[int]]:
        """(prompt tokens, answer tokens) of one side, whose answer is `text`, with BOS and EOS."""
        split = shared(prompt, whole)
        prompt, answer = whole[:split], whole[split:]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if templated:
            # Only at the very end: among the last tokens of a short answer is the tag of its role.
            ended = text.rstrip().endswith(self.written.special_tokens)
        else:
            ended = bool(answer) and answer[-1] == eos
            if bos is not None and whole[:1] != [bos]:
                prompt = [bos, *prompt]
            elif bos is not None and not prompt:
                prompt, answer = [bos], answer[1:]
        if eos is not None and not ended:
            answer = [*answer, eos]
        return prompt, answer

    def _fit(self, sides: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
        """Both sides within the limits, each with at least one answer token that another token precedes."""
        limits = self.limits
        if sides[0] == sides[1]:
            raise UnusableRow(EQUAL_ANSWERS)
        for reason in filter(None, (limits.longer_than_cut(len(p), len(a)) for p, a in sides)):
            raise UnusableRow(reason)
        sides = [(prompt, answer[: limits.max_completion_length]) for prompt, answer in sides]
        if limits.max_length is not None and max(len(p) + len(a) for p, a in sides) > limits.max_length:
            sides = [(limits.cut_prompt(p, self.tokenizer.bos_token_id), a) for p, a in sides]
            if max(len(p) for p, _ in sides) >= limits.max_length:
                raise UnusableRow(limits.too_long)
            sides = [(p, a[: limits.max_length - len(p)]) for p, a in sides]
        if min(len(p) + len(a) for p, a in sides) < 2:
            raise UnusableRow(EMPTY_ANSWER)
        if sides[0] == sides[1]:
            raise UnusableRow(EQUAL_ONCE_CUT)
        return sides
