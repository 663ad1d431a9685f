"""Answers in the files that two public judges read: AlpacaEval and MT-Bench.

    orpo-generate out --prompts alpaca_eval.json --format alpacaeval --output answers.json
    orpo-generate out --prompts question.jsonl --format mt-bench --output model_answer/my-model.jsonl

The question files are the judges' own and not part of this project. Nothing is judged here: the files go to
``alpaca_eval --model_outputs answers.json``, and to FastChat's ``gen_judgment.py`` from its folder
``data/mt_bench/model_answer``.

AlpacaEval (https://github.com/tatsu-lab/alpaca_eval, "Evaluating a model"): questions and answers are one JSON list of
objects. A question has ``instruction``, in older files ``input`` too, and mostly ``dataset``; an answer is the question
with ``output`` and ``generator``, the model's name. Whatever else a question holds is kept.

MT-Bench (https://github.com/lm-sys/FastChat, fastchat/llm_judge/gen_model_answer.py and common.py): JSON objects, a
line each. A question has ``question_id``, ``category`` and ``turns``, two strings; the second is asked with the first
answer in the conversation. An answer is ::

    {"question_id": 81, "answer_id": "...", "model_id": "my-model",
     "choices": [{"index": 0, "turns": ["first answer", "second answer"]}], "tstamp": 1686000000.0}

in the order of ``question_id``. The judge takes the file's name for the model's, so that is ``model_id`` by default.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orpo.files import as_json, read_text, write_whole
from orpo.generation import Messages, generate

# Most tokens of an answer: FastChat's default; for AlpacaEval our choice, so long that answers end by themselves.
MAX_NEW_TOKENS = {"alpacaeval": 2048, "mt-bench": 1024}

# FastChat's temperature_config. Other categories, of which MT-Bench has none, are sampled at 0.7 as there.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7


def read_questions(name: str | Path, form: str) -> list[dict[str, Any]]:
    """The questions of a judge's file, a JSON list or a JSON object a line.

    Raises:
        ValueError: there is no such file, or a row is no question of `form`; the message names the row.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"{name} is no file; --format {form} reads the judge's own file of questions")
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            # Not splitlines, which also ends a line at characters that questions hold.
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is neither a JSON list nor a JSON object a line: {error}") from error
    if not rows:
        raise ValueError(f"{name} holds no question")
    seen = set()
    for number, row in enumerate(rows, start=1):
        problem = _problem(row, form)
        if problem is None and form == "mt-bench":
            problem = f"question_id {row['question_id']} stands twice" if row["question_id"] in seen else None
            seen.add(row["question_id"])
        if problem is not None:
            raise ValueError(f"row {number} of {name} is no question of {form}: {problem}")
    return rows


def _problem(row: Any, form: str) -> str | None:
    if not isinstance(row, dict):
        return f"it is no object but {type(row).__name__}"
    if form == "alpacaeval":
        if not isinstance(row.get("instruction"), str):
            return f"'instruction' is no text; its keys are {[*row]}"
        given = row.get("input")
        return None if given is None or isinstance(given, str) else f"'input' is {given!r:.80}, no text"
    missing = [key for key in ("question_id", "category", "turns") if key not in row]
    if missing:
        return f"it has no {', '.join(missing)}; its keys are {[*row]}"
    if type(row["question_id"]) is not int:
        return f"question_id is {row['question_id']!r}, no integer"
    if not isinstance(row["category"], str):
        return f"category is {row['category']!r}, no text"
    turns = row["turns"]
    if not (isinstance(turns, list) and len(turns) == 2 and all(isinstance(turn, str) for turn in turns)):
        return f"turns are {turns!r}, not two texts"
    return None


def alpacaeval(
    model: Any, tokenizer: Any, questions: Sequence[dict[str, Any]], generator: str, **settings: Any
) -> list[dict[str, Any]]:
    """Answers as AlpacaEval reads them, in the order of the questions.

    Args:
        questions: dicts with ``instruction``. A non-empty ``input`` follows it after an empty line.
        generator: the model's name on the leaderboard.
        settings: those of :func:`orpo.generation.generate`.

    Returns:
        a record a question; ``output`` is an :class:`orpo.generation.Answer`.
    """
    prompts = ["\n\n".join(filter(None, (row["instruction"], row.get("input")))) for row in questions]
    answers = generate(model, tokenizer, prompts, **settings)
    return [
        {**row, "output": answer.strip(), "generator": generator}
        for row, answer in zip(questions, answers, strict=True)
    ]


def mt_bench(
    model: Any, tokenizer: Any, questions: Sequence[dict[str, Any]], model_id: str, **settings: Any
) -> list[dict[str, Any]]:
    """Answers as FastChat's judge reads them, by ``question_id``.

    Args:
        questions: dicts with ``question_id``, ``category`` and ``turns``.
        model_id: the model's name, which is to be the name of the file too.
        settings: those of :func:`orpo.generation.generate` but ``temperature``, which the category gives. The second
            turns are sampled with ``seed`` + 1.

    Returns:
        a record a question; the turns are :class:`orpo.generation.Answer`.

    Raises:
        ValueError: the tokenizer has no chat template, or `settings` hold a temperature.
    """
    if "temperature" in settings:
        raise ValueError(f"temperature is {settings['temperature']}; MT-Bench has one for each category")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "MT-Bench asks twice in one conversation, and the tokenizer has no chat template to render it: "
            "set tokenizer.chat_template, or train with --chat_template"
        )
    questions = sorted(questions, key=lambda row: row["question_id"])
    seed = settings.pop("seed", 0)
    conversations: list[Messages] = [[] for _ in questions]
    for turn in range(2):
        groups: dict[float, list[int]] = {}
        for i, row in enumerate(questions):
            conversations[i].append({"role": "user", "content": row["turns"][turn]})
            groups.setdefault(TEMPERATURES.get(row["category"], OTHER_TEMPERATURE), []).append(i)
        for temperature, group in groups.items():
            asked = [conversations[i] for i in group]
            answers = generate(model, tokenizer, asked, temperature=temperature, seed=seed + turn, **settings)
            for i, answer in zip(group, answers, strict=True):
                conversations[i].append({"role": "assistant", "content": answer.strip()})
    return [
        {
            "question_id": row["question_id"],
            "answer_id": uuid.uuid4().hex,
            "model_id": model_id,
            "choices": [{"index": 0, "turns": [talk[1]["content"], talk[3]["content"]]}],
            "tstamp": time.time(),
        }
        for row, talk in zip(questions, conversations, strict=True)
    ]


def write(records: Sequence[dict[str, Any]], path: str | Path, form: str) -> None:
    """`records` as the judge of `form` reads them: one JSON list, or an object a line."""
    if form == "alpacaeval":
        write_whole(path, as_json(list(records), indent=2) + "\n")
    else:
        write_whole(path, "".join(as_json(record) + "\n" for record in records))
