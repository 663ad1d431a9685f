"""The options in a YAML file or a recipe, each of the kind that its setting has."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from transformers.hf_argparser import string_to_bool

from orpo.cli.other_names import advice
from orpo.files import read_text
from orpo.recipes import find_config

# Of the command itself: in a file they would do nothing.
LINE_ONLY = ("config", "help", "list_recipes", "print_config", "check_ranks")

# YAML reads a bare no or off as false, and true is what --resume_from_checkpoint takes.
WORDS = (
    "eval_strategy",
    "evaluation_strategy",
    "save_strategy",
    "logging_strategy",
    "report_to",
    "resume_from_checkpoint",
)

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does: to 1.1 0100 is 64, 1:30 is 90 and 2024-01-01 no text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in forms if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


# Digits after a leading 0 stay text: a name keeps them all, and a setting that is a number reads them as decimal.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"(?:[-+]?(?:0|[1-9]\d*)|0x[\da-fA-F]+)\Z", re.ASCII), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:\.\d+|(?:0|[1-9]\d*)(?:\.\d*)?)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
        re.ASCII,
    ),
    list("-+0123456789."),
)


def read_run_file(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options in the file `name`, or in the shipped recipe of that name.

    Args:
        name: what ``--config`` was given.
        settings: every setting and the type of its value, as ``typing.get_type_hints`` has it.

    Raises:
        ValueError: there is no such file or recipe, it is no YAML mapping, a name in it is no setting or stands twice,
            or a value is not of its setting's kind. The message names the file and the line.
    """
    path = find_config(name)
    text = read_text(path)
    try:
        root, options = yaml.compose(text, _Loader), yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        # A ValueError is of a date that is none, after !!timestamp.
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep to be a mapping of options") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ValueError(f"{path} has to hold a mapping of options, not a {type(options).__name__}")
    lines = _lines(path, root)
    written = {key.value: _written(node) for key, node in root.value}
    _refuse_unknown(path, options, lines, settings)
    read = {}
    for option, value in options.items():
        try:
            read[option] = _fitted(option, value, settings[option], written.get(option))
        except ValueError as error:
            raise ValueError(f"{_place(path, lines, option)}: {error}") from error.__cause__
    return read


def _place(path: Path, lines: Mapping[str, int], option: str) -> str:
    # One that a merge key (<<) brings in has no line of its own.
    return f"{path}, line {lines[option]}" if option in lines else str(path)


def _lines(path: Path, root: yaml.MappingNode) -> dict[str, int]:
    """option -> the line on which it stands; the last one, where a merged mapping gives it too."""
    lines: dict[str, int] = {}
    for key, _ in root.value:
        number = key.start_mark.line + 1
        if key.value in lines:
            raise ValueError(f"{path} sets {key.value} twice, in line {lines[key.value]} and in line {number}")
        if isinstance(key.value, str):
            lines[key.value] = number
    return lines


def _written(node: yaml.Node) -> Any:
    """A value as it stands in the file: 1.10 is no longer so as a number."""
    if isinstance(node, yaml.SequenceNode):
        return [part.value for part in node.value]
    return node.value if isinstance(node, yaml.ScalarNode) else None


def _refuse_unknown(path: Path, options: Mapping[Any, Any], lines: Mapping[str, int], known: Mapping[str, Any]) -> None:
    for option in options:
        if not isinstance(option, str):
            raise ValueError(f"{path} holds {option!r}, which is no name of an option; names are text")
        if option in LINE_ONLY:
            raise ValueError(
                f"{_place(path, lines, option)}: {option} does nothing in a file, it is an option of the command line"
            )
    if unknown := sorted(set(options) - set(known)):
        names = ", ".join(n + (f" ({said})" if (said := advice(n, known)) else "") for n in unknown)
        raise ValueError(f"{path} holds options that do not exist: {names}")


def _kinds(hint: Any) -> set[type]:
    """The kinds of values that a type hint allows."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return {kind for part in get_args(hint) for kind in _kinds(part)}
    if origin is Literal:
        return {type(value) for value in get_args(hint)}
    kind = origin or hint
    return {str} if isinstance(kind, type) and issubclass(kind, Enum) else {kind}


def _fitted(name: str, value: Any, hint: Any, written: Any) -> Any:
    """`value`, of the kind that the setting `name` has.

    Args:
        written: its text, or texts, in the file; None where they are not known.

    Raises:
        ValueError: it cannot be.
    """
    kinds = _kinds(hint)
    if isinstance(value, list) and list in kinds and not any(map(_is_no_scalar, value)):
        return [str(part) for part in written or value]
    if type(value) in kinds - {list} or (name in WORDS and (value is None or isinstance(value, bool))):
        return value
    if isinstance(value, str) and str not in kinds:
        for kind, read in ((bool, string_to_bool), (int, int), (float, float)):
            if kind in kinds:
                try:
                    return read(value)
                except Exception as error:
                    raise _refusal(name, value, kinds) from error
    scalar = not _is_no_scalar(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return value
    if isinstance(value, float) and int in kinds and value.is_integer():
        return int(value)
    if scalar and bool in kinds and value in (0, 1):
        return bool(value)
    if scalar and str in kinds:
        return str(value) if written is None else written
    if scalar and list in kinds:
        return [str(value) if written is None else written]
    raise _refusal(name, value, kinds)


def _is_no_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | list | dict)


def _refusal(name: str, value: Any, kinds: set[type]) -> ValueError:
    # As YAML has them, and once each: a whole number is a number.
    wanted = [text for kind, text in _KINDS.items() if kind in kinds and not (kind is int and float in kinds)]
    said = "empty" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return ValueError(f"{name} is {said[:80]}; it has to be {' or '.join(wanted)}")
