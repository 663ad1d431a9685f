"""Answers of a model to prompts.

    orpo-generate out --prompt "How do I boil an egg?"
    orpo-generate out --prompts prompts.jsonl --output answers.jsonl --temperature 0.7 --seed 1
    orpo-generate out --prompts alpaca_eval.json --format alpacaeval --output answers.json
    orpo-generate out --prompts question.jsonl --format mt-bench --output model_answer/my-model.jsonl

The model is a folder, an adapter's folder, or a name on the hub. Prompts are the lines of a text file, or the column
``prompt`` or ``messages`` of a data set in any form that orpo-train reads: strings or lists of messages. A column
``tools`` goes to the chat template. A list that ends with the assistant's message is continued. With ``--format`` the
prompts are a judge's own file of questions (:mod:`orpo.judges`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orpo import judges
from orpo.cli.errors import OneLineErrors, run_command
from orpo.data.files.sources import load_pairs
from orpo.data.forms.misread import refuse_dates, refuse_messages_as_text
from orpo.data.forms.tools import read_tools
from orpo.files import as_json, read_text, write_whole
from orpo.generation import Answer, Messages, check_temperature, generate, load


def read_prompts(name: str, split: str = "train") -> list[str | Messages]:
    """The prompts of a text file, a line each, or of a data set's column ``prompt`` or ``messages``.

    Raises:
        ValueError: there is no prompt or no such column, or reading has changed the prompts of the file.
    """
    return read_prompts_and_tools(name, split)[0]


def read_prompts_and_tools(name: str, split: str = "train") -> tuple[list[str | Messages], list[Any]]:
    """:func:`read_prompts`, and each row's ``tools``, None where it has none."""
    path = Path(name).expanduser()
    if path.suffix.lower() == ".txt" and path.is_file():
        prompts: list[Any] = [line for line in read_text(path).split("\n") if line.strip()]
        tools: list[Any] = [None] * len(prompts)
    else:
        data = load_pairs(name, split)
        columns = [column for column in ("prompt", "messages") if column in data.column_names]
        if not columns:
            raise ValueError(
                f"{name} has the columns {data.column_names}; prompts are read from one named 'prompt' or 'messages'"
            )
        prompts = list(data[columns[0]])
        tools = list(data["tools"]) if "tools" in data.column_names else [None] * len(prompts)
        for row, (prompt, schemas) in enumerate(zip(prompts, tools, strict=True)):
            try:
                refuse_dates([prompt, schemas])
                refuse_messages_as_text(prompt)
                read_tools(schemas)
            except ValueError as error:
                raise ValueError(f"{name}, row {row}, counted from 0: {error}") from error
    if not prompts:
        raise ValueError(f"{name} holds no prompt")
    return prompts, tools


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``orpo-generate``."""
    parser = OneLineErrors(
        prog="orpo-generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder, a folder of an adapter, or a model of the hub")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one prompt")
    what.add_argument("--prompts", help="a text file, a line each, or a data set with a column 'prompt' or 'messages'")
    parser.add_argument("--split", default="train", help='of the data set, for example "test[:20]"')
    parser.add_argument("--output", help="a JSONL file of prompt and answer; default: the screen")
    parser.add_argument("--format", choices=("alpacaeval", "mt-bench"), help="--output as this judge reads it")
    parser.add_argument("--model_id", help="with --format: the model's name; default: its folder's, or the file's")
    parser.add_argument("--max_new_tokens", type=int, help="default: 256; alpacaeval: 2048; mt-bench: 1024")
    parser.add_argument("--temperature", type=float, help="default: 0, the most likely token; mt-bench: by category")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--system", help="a system message before each prompt")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat_template", action="store_true", default=None, help="make a user's turn of prompts")
    form.add_argument(
        "--no_chat_template",
        dest="chat_template",
        action="store_false",
        default=None,
        help="give prompts to the model as they are; default: as it was trained, a turn where that is not known",
    )
    parser.add_argument("--dtype", default="auto", help="of the weights: auto, float32, bfloat16, float16")
    parser.add_argument("--device", help="cpu, cuda, ...; default: an accelerator if there is one")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    options = parser.parse_args(argv)
    if options.output is not None and not Path(options.output).absolute().parent.is_dir():
        # Refused now: later the answers would be there, and could not be written.
        parser.error(f"--output is {options.output}, in a folder that does not exist")
    if options.output is not None and Path(options.output).is_dir():
        parser.error(f"--output is {options.output}, which is a folder: name a file in it")
    if options.output is not None and options.prompts is not None and _is_one_file(options.output, options.prompts):
        parser.error(f"--output is {options.output}, which is the file of --prompts: name another one")
    if options.output is not None and options.prompts is not None and _lies_in(options.output, options.prompts):
        # All files of a folder are read: the next run would read the answers as prompts.
        parser.error(f"--output is {options.output}, in the folder of --prompts: name a file elsewhere")
    # Refused before the model is loaded.
    if options.temperature is not None:
        try:
            check_temperature(options.temperature, "--temperature")
        except ValueError as error:
            parser.error(str(error))
    if not 0 < options.top_p <= 1:
        parser.error(f"--top_p is {options.top_p}; it has to be above 0 and at most 1")
    if options.format is not None:
        _answer_judge(options, parser)
        return
    prompts, tools = [options.prompt], [None]
    if options.prompt is None:
        prompts, tools = read_prompts_and_tools(options.prompts, options.split)
    model, tokenizer = load(
        options.model, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
    )
    options.max_new_tokens = 256 if options.max_new_tokens is None else options.max_new_tokens
    options.temperature = 0.0 if options.temperature is None else options.temperature
    names = ("max_new_tokens", "temperature", "top_p", "batch_size", "seed", "system")
    settings = {name: getattr(options, name) for name in names}
    answers = generate(
        model,
        tokenizer,
        prompts,
        chat_template=options.chat_template,
        tools=tools,
        progress=options.output is not None,
        **settings,
    )
    _say_cut(answers, options.max_new_tokens)
    if options.output is None:
        for prompt, answer in zip(prompts, answers, strict=True):
            if len(prompts) > 1:
                print(f">>> {prompt if isinstance(prompt, str) else prompt[-1].get('content') or ''}")
            print(answer)
        return
    records = (
        {"prompt": prompt, **({"tools": own} if own else {}), "answer": answer, "model": options.model, **settings}
        for prompt, own, answer in zip(prompts, tools, answers, strict=True)
    )
    write_whole(options.output, "".join(as_json(record) + "\n" for record in records))
    print(f"{len(answers)} answers in {options.output}", file=sys.stderr)


def _is_one_file(one: str, other: str) -> bool:
    # As load_pairs does with ~ for the home folder.
    paths = Path(one), Path(other).expanduser()
    return all(path.is_file() for path in paths) and paths[0].samefile(paths[1])


def _lies_in(file: str, folder: str) -> bool:
    outer = Path(folder).expanduser()
    return outer.is_dir() and outer.resolve() in Path(file).resolve().parents


def _say_cut(answers: Sequence[Answer], limit: int) -> None:
    """Says on stderr how many answers did not end by themselves; nothing where all did."""
    cut = sum(answer.cut for answer in answers)
    if cut:
        print(
            f"{cut} of {len(answers)} answers reached --max_new_tokens ({limit}) or the model's last position",
            file=sys.stderr,
        )


def _answer_judge(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """The command with ``--format``."""
    form = options.format
    if options.prompts is None or options.output is None:
        parser.error(f"--format {form} needs --prompts, the judge's questions, and --output")
    if form == "mt-bench" and options.temperature is not None:
        # Refused before the model is loaded.
        parser.error(f"--temperature is {options.temperature}; MT-Bench has one for each category")
    questions = judges.read_questions(options.prompts, form)
    model, tokenizer = load(
        options.model, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
    )
    settings = {name: getattr(options, name) for name in ("top_p", "batch_size", "seed", "system")}
    length = options.max_new_tokens
    settings["max_new_tokens"] = judges.MAX_NEW_TOKENS[form] if length is None else length
    if options.chat_template is not None:
        settings["chat_template"] = options.chat_template
    if options.temperature is not None:
        settings["temperature"] = options.temperature
    if form == "mt-bench":
        name = options.model_id or Path(options.output).stem
        records = judges.mt_bench(model, tokenizer, questions, name, progress=True, **settings)
        answers = [turn for record in records for turn in record["choices"][0]["turns"]]
    else:
        name = options.model_id or Path(options.model).absolute().name
        records = judges.alpacaeval(model, tokenizer, questions, name, progress=True, **settings)
        answers = [record["output"] for record in records]
    _say_cut(answers, settings["max_new_tokens"])
    judges.write(records, options.output, form)
    print(f"{len(records)} answers of {name} in {options.output}", file=sys.stderr)


def command() -> None:
    """:func:`main` as the shell runs it."""
    run_command("orpo-generate", main)


if __name__ == "__main__":
    command()
