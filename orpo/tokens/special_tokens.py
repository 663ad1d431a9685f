"""Special tokens written out in the rows' own text: which rows hold them, and how they stay text where that is asked.

Where they stay text, two characters that the text does not hold (its marks) stand around each of them while the chat
template is rendered. What the marks enclose is then tokenized as ordinary text, and all else as ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

# Unicode leaves these characters without a meaning.
PRIVATE_USE = range(0xE000, 0xF900)
# What a message says of itself, and templates compare with names of their own.
NAMES = ("role", "type")
ALTERED = "it alters special tokens written out in the text, which escape_special_tokens would keep"


class WrittenOut:
    """Finds and marks the special tokens of `tokenizer` in text, as leftmost and longest as a tokenizer does."""

    def __init__(self, tokenizer: Any) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self.special_tokens = (*tokenizer.all_special_tokens, *(token.content for token in added if token.special))
        self.bos, self.eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        # In an order of their own: `datasets` looks up what was tokenized before by what tokenized it.
        names = sorted({token for token in self.special_tokens if token}, key=lambda token: (-len(token), token))
        self.pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def first(self, value: Any) -> str:
        """The first special token in the strings of `value`, messages or a string; "" where there is none."""
        found = (self.pattern.search(text) for text in _strings(value))
        return next((match[0] for match in found if match), "")

    def first_in_strings(self, prompt: str, answer: str) -> str:
        """:meth:`first` of a prompt and an answer that are joined, without the BOS and EOS that begin and end them."""
        return next((match[0] for match in self._between(prompt, answer)), "")

    def mark(self, value: Any, marks: str) -> Any:
        """`value`, messages or a string, with `marks` around each special token in its strings."""
        if isinstance(value, str):
            return self.pattern.sub(lambda match: f"{marks[0]}{match[0]}{marks[1]}", value)
        if isinstance(value, Mapping):
            return {name: part if name in NAMES else self.mark(part, marks) for name, part in value.items()}
        return [self.mark(part, marks) for part in value] if isinstance(value, (list, tuple)) else value

    def mark_strings(self, prompt: str, answer: str, marks: str) -> str:
        """``prompt + answer`` with `marks`, but for a BOS that begins the prompt and an EOS that ends the answer."""
        text, done, out = prompt + answer, 0, ""
        for match in self._between(prompt, answer):
            out += f"{text[done : match.start()]}{marks[0]}{match[0]}{marks[1]}"
            done = match.end()
        return out + text[done:]

    def _between(self, prompt: str, answer: str) -> Iterator[re.Match[str]]:
        text = prompt + answer
        start = len(self.bos) if self.bos and (prompt or answer).startswith(self.bos) else 0
        end = len(text) - (len(self.eos) if self.eos and answer.endswith(self.eos) else 0)
        return self.pattern.finditer(text, start, end)

    def check_escaping(self, tokenizer: Any) -> None:
        """Refuses a tokenizer whose pieces of text do not add up to the text.

        Raises:
            ValueError: a special token stays one, loses characters, or gets a space beside it.
        """
        special = set(tokenizer.convert_tokens_to_ids(list(self.special_tokens)))
        for name in dict.fromkeys(token for token in self.special_tokens if token):
            marks = spare_marks(name)
            ids = token_ids([f"a{marks[0]}{name}{marks[1]}b"], tokenizer, marks)[0]
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            if special & set(ids) or text != f"a{name}b":
                raise ValueError(
                    f"escape_special_tokens is true, and this tokenizer makes {text!r} of {f'a{name}b'!r} where "
                    f"{name!r} is to stay text: leave the option out, and take special tokens out of the data"
                )


def spare_marks(value: Any) -> str:
    """Two characters that no string in `value` holds."""
    held = set().union(*_strings(value))
    return "".join([c for c in map(chr, PRIVATE_USE) if c not in held][:2])


def describe_written(count: int, escaped: bool, first: str = "") -> str:
    """What has to be said of `count` rows that hold special tokens in their text, and of the `first` of them."""
    what = f"{count:,} rows hold special tokens written out in their text"
    if count == 1:
        what = "1 row holds special tokens written out in its text"
    where = f" ({'' if count == 1 else 'first: '}{first})" if first else ""
    if escaped:
        return f"{what}{where}, which stay text (--escape_special_tokens)"
    return f"{what}{where}, which become those tokens; --escape_special_tokens keeps them text"


def without_marks(text: str, marks: str) -> str:
    """`text` without its pairs of `marks`; a mark without the other stays."""
    return "".join(_stretches(text, marks))


def token_ids(texts: Sequence[str], tokenizer: Any, marks: str = "") -> list[list[int]]:
    """Tokens of each text, none added; what `marks` enclose as ordinary text."""
    stretches = [_stretches(text, marks) for text in texts]
    ordinary = [part for text in stretches for part in text[::2]]
    enclosed = [part for text in stretches for part in text[1::2]]
    ids = iter(tokenizer(ordinary, add_special_tokens=False)["input_ids"] if ordinary else [])
    # The flag is given only where it is needed: a tokenizer that does not know it tokenizes all else.
    options = {"add_special_tokens": False, "split_special_tokens": True}
    split = iter(tokenizer(enclosed, **options)["input_ids"] if enclosed else [])
    return [list(chain.from_iterable(next(split if i % 2 else ids) for i in range(len(text)))) for text in stretches]


def _stretches(text: str, marks: str) -> list[str]:
    """`text` cut at its `marks`: ordinary text and what they enclose in turn, beginning and ending with the former."""
    return re.split(f"{marks[0]}(.*?){marks[1]}", text, flags=re.DOTALL) if marks else [text]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if name not in NAMES:
                yield from _strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _strings(part)
