"""Conversations with tools: schemas, calls and results as chat templates of well-known forms render and train them."""

import json
from itertools import groupby

import datasets
import pytest
from chat_templates import FAMILIES, family_tokenizer
from tiny import CHATML, make_tokenizer

from orpo.data.forms.formats import pair_text
from orpo.data.forms.tools import read_tools
from orpo.data.forms.unusable import UnusableRow
from orpo.data.prepare import Limits, prepare_dataset

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SCHEMA = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}'
USER = {"role": "user", "content": "Paris?"}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "18 C"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("It is 18 C.", "No idea."))


def call(arguments, **message):
    function = {"name": "weather", "arguments": arguments}
    calls = [{"id": "abcdefghi", "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls, **message}


CALL = call({"city": "Paris"})


def prepare(rows, tokenizer, **options):
    lines = []
    data = rows if isinstance(rows, datasets.Dataset | datasets.IterableDataset) else [*rows]
    return list(prepare_dataset(data, tokenizer, Limits(max_length=None), report=lines.append, **options)), lines


def parts(example, side, tokenizer):
    """(prompt, the answer's stretches in turn: scored or not, and their text)."""
    ids, first = example[f"{side}_input_ids"], example[f"{side}_prompt_length"]
    mask = example.get(f"{side}_mask") or [0] * first + [1] * (len(ids) - first)
    stretches = groupby(range(first, len(ids)), lambda at: mask[at])
    decoded = [(value, tokenizer.decode([ids[at] for at in run])) for value, run in stretches]
    return tokenizer.decode(ids[:first]), decoded


# Family: what its template makes of the schema and the question, of the call, of its result, and of the answer to it.
GOLDEN = {
    "Qwen 2.5": (
        f"<|im_start|>system\nBe kind.\n<tools>\n{SCHEMA}\n</tools><|im_end|>\n"
        "<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n',
        "<|im_start|>user\n<tool_response>\n18 C\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        "It is 18 C.<|im_end|>\n",
    ),
    "Qwen 3": (
        f"<|im_start|>system\n<tools>\n{SCHEMA}\n</tools><|im_end|>\n"
        "<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n',
        "<|im_start|>user\n<tool_response>\n18 C\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nIt is 18 C.<|im_end|>\n",
    ),
    "Llama 3.1": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nAnswer by a call where one helps.\n"
        f"{SCHEMA}\n\nParis?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
        '<|start_header_id|>ipython<|end_header_id|>\n\n"18 C"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "It is 18 C.<|eot_id|>",
    ),
    "Hermes": (
        f"<s><|im_start|>system\nYou may call functions. <tools>\n{SCHEMA} </tools><|im_end|>\n"
        "<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n',
        "<|im_start|>tool\n<tool_response>\n18 C\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        "It is 18 C.<|im_end|>\n",
    ),
    "Mistral": (
        f"<s>[AVAILABLE_TOOLS] [{SCHEMA}][/AVAILABLE_TOOLS][INST] Paris?[/INST]",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]</s>',
        '[TOOL_RESULTS] {"content": "18 C", "call_id": "abcdefghi"}[/TOOL_RESULTS]',
        " It is 18 C.</s>",
    ),
    "gpt-oss": (
        "<|start|>developer<|message|># Tools type weather = (_: any) => any;<|end|>"
        "<|start|>user<|message|>Paris?<|end|><|start|>assistant",
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
        '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"18 C"<|end|><|start|>assistant',
        "<|channel|>final<|message|>It is 18 C.<|return|>",
    ),
    "DeepSeek": (
        "<s>## weather\n<|User|>Paris?<|Assistant|>",
        '<|calls|>function<|sep|>weather\n```json\n{"city": "Paris"}\n```<|/calls|></s>',
        "<|outputs|>18 C<|/outputs|>",
        "It is 18 C.</s>",
    ),
    "Gemma": (
        f"<s><start_of_turn>user\n[{SCHEMA}]\n\nParis?<end_of_turn>\n<start_of_turn>model\n",
        '```tool_code\nweather(city="Paris")\n```<end_of_turn>\n',
        "<start_of_turn>user\n```tool_output\n18 C\n```<end_of_turn>\n<start_of_turn>model\n",
        "It is 18 C.<end_of_turn>\n",
    ),
}


@pytest.mark.parametrize("family", GOLDEN)
def test_exactly_the_assistants_tokens_are_scored(family):
    """Of an answer with a call, its result and a text; of one that is a call; of one behind a call in the prompt."""
    tokenizer, (prompt, called, result, text) = family_tokenizer(family), GOLDEN[family]
    bad, other = (line.replace("It is 18 C.", "No idea.").replace("Paris", "Rome") for line in (text, called))
    rows = [
        {"prompt": [USER], "chosen": [CALL, RESULT, GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [CALL], "rejected": [call({"city": "Rome"})]},
        {"prompt": [USER, CALL, RESULT], "chosen": [GOOD], "rejected": [BAD]},
    ]
    trajectory, one_call, answer = prepare([{**row, "tools": [TOOL]} for row in rows], tokenizer)[0]
    assert parts(trajectory, "chosen", tokenizer) == (prompt, [(1, called), (0, result), (1, text)])
    assert parts(trajectory, "rejected", tokenizer) == (prompt, [(1, bad)])
    # As the last turn Qwen 3's call stands behind empty thoughts.
    thoughts = "<think>\n\n</think>\n\n" if family == "Qwen 3" else ""
    for side, line in (("chosen", called), ("rejected", other)):
        assert parts(one_call, side, tokenizer) == (prompt, [(1, thoughts + line)])
    for side, line in (("chosen", text), ("rejected", bad)):
        assert parts(answer, side, tokenizer) == (prompt + called + result, [(1, line)])


def test_every_family_is_tested():
    assert FAMILIES.keys() - GOLDEN.keys() == {"marked"}


@pytest.mark.parametrize("content", ["", None, "absent"])
@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}', '{"city":"Paris"}'])
@pytest.mark.parametrize("family", GOLDEN)
def test_arguments_are_given_as_the_template_takes_them(family, arguments, content):
    """OpenAI's JSON text as a dictionary where a template writes JSON, a dictionary as text where it takes that."""
    tokenizer = family_tokenizer(family)
    turn = call(arguments, content=content)
    if content == "absent":
        del turn["content"]
    row = {"prompt": [USER], "chosen": [turn, RESULT, GOOD], "rejected": [BAD], "tools": [TOOL]}
    # A template that takes text is given the text that there is.
    given = arguments if family == "DeepSeek" and isinstance(arguments, str) else '{"city": "Paris"}'
    expected = GOLDEN[family][1].replace('{"city": "Paris"}', given)
    assert pair_text(row, tokenizer).chosen.startswith(expected + GOLDEN[family][2])


def test_a_template_that_writes_a_dictionary_as_python_does_is_given_text():
    template = CHATML.replace(
        "{{ m['content'] }}",
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}:{{ c.function.arguments }}{% endfor %}",
    )
    row = {"prompt": [USER], "chosen": [CALL], "rejected": [BAD]}
    assert pair_text(row, make_tokenizer(chat_template=template)).chosen == 'weather:{"city": "Paris"}<|im_end|>\n'


def test_a_call_that_is_no_json_is_trained_as_it_is():
    """Where it is the rejected answer, that is what is wrong with it."""
    row = {"prompt": [USER], "chosen": [CALL], "rejected": [call("{'city'")], "tools": [TOOL]}
    text = pair_text(row, family_tokenizer("Qwen 3"))
    assert '"arguments": {"city": "Paris"}}' in text.chosen and "\"arguments\": {'city'}" in text.rejected


def test_a_call_without_content_that_the_template_demands_is_dropped_in_its_words():
    """And a call that a template does not know is not trained as an empty turn, content beside it or not."""
    no_tools = make_tokenizer(chat_template=CHATML)
    for content in ("", "I look."):
        row = {"prompt": [USER], "chosen": [call({"city": "Paris"}, content=content)], "rejected": [BAD]}
        with pytest.raises(UnusableRow, match="answer that the chat template leaves out: role 'assistant'"):
            pair_text(row, no_tools)
    two = {**CALL, "tool_calls": CALL["tool_calls"] * 2}
    with pytest.raises(UnusableRow, match="refuses: one at once"):
        pair_text({"prompt": [USER], "chosen": [two], "rejected": [BAD]}, family_tokenizer("Llama 3.1"))


def test_a_result_that_the_template_leaves_out_is_told():
    template = "{% for m in messages if m.role != 'tool' %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    row = {"prompt": [USER], "chosen": [BAD, RESULT, GOOD], "rejected": [BAD]}
    with pytest.raises(UnusableRow, match="answer that the chat template leaves out: role 'tool'"):
        pair_text(row, make_tokenizer(chat_template=template))


@pytest.mark.parametrize("stream", [False, True])
def test_what_arrow_adds_is_taken_out_at_every_depth(stream):
    """Other rows' arguments and properties, in lists of dictionaries too; null among a list's values stays."""
    first = {"city": "Paris", "days": [1, None], "at": [{"h": 1}]}
    # In Arrow's order of names, which is that in which they came.
    other = {"at": [{"m": 2, "deep": {"x": 1}}], "name": "Rome"}
    schemas = [{**TOOL, "function": {"name": n, "parameters": {n: {"enum": ["a", None]}}}} for n in ("one", "two")]
    rows = [
        {"prompt": [USER], "chosen": [call(arguments)], "rejected": [BAD], "tools": [schema]}
        for arguments, schema in zip((first, other), schemas, strict=True)
    ]
    data = datasets.Dataset.from_list(rows)
    held = data[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"]
    assert held["name"] is None and held["at"][0]["deep"] is None
    tokenizer = family_tokenizer("Qwen 2.5")
    examples, _ = prepare(data.to_iterable_dataset() if stream else data, tokenizer)
    for example, arguments, schema in zip(examples, (first, other), schemas, strict=True):
        prompt, ((_, answer),) = parts(example, "chosen", tokenizer)
        assert f"<tools>\n{json.dumps(schema)}\n</tools>" in prompt
        assert f'"arguments": {json.dumps(arguments)}}}' in answer


@pytest.mark.parametrize(
    "given", [[TOOL], TOOL, SCHEMA, f"[{SCHEMA}]", [SCHEMA], [{**TOOL, "function": {**TOOL["function"], "x": None}}]]
)
def test_tools_come_as_schemas_or_as_json(given):
    assert read_tools(given) == [TOOL]
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": given}
    text = pair_text(row, family_tokenizer("Qwen 3"))
    assert f"<tools>\n{SCHEMA}\n</tools>" in text.chosen_prompt == text.rejected_prompt


def test_what_is_written_as_json_keeps_its_nulls():
    assert read_tools('[{"name": "f", "default": null}]') == [{"name": "f", "default": None}]
    row = {"prompt": [USER], "chosen": [call('{"city": null}')], "rejected": [BAD]}
    assert '"arguments": {"city": null}' in pair_text(row, family_tokenizer("Qwen 3")).chosen


@pytest.mark.parametrize("given", [None, [], "", "[]", " "])
def test_no_tools_are_none(given):
    """Of an empty list Qwen's template would make a list of no tools, where TRL's gives it none."""
    plain = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    tokenizer = make_tokenizer(chat_template="{{ 'TOOLS' if tools is not none }}" + CHATML)
    assert pair_text({**plain, "tools": given}, tokenizer) == pair_text(plain, tokenizer)
    assert "TOOLS" not in pair_text(plain, tokenizer).chosen_prompt
    in_keywords = {**plain, "chat_template_kwargs": {"tools": [{**TOOL, "x": None}]}}
    assert pair_text(in_keywords, tokenizer) == pair_text({**plain, "tools": [TOOL]}, tokenizer)


CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
STRINGS = {"prompt": "Paris?", "chosen": "18 C", "rejected": "no"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**STRINGS, "tools": [TOOL]}, "'tools' is given beside strings, and a chat template alone has a place"),
        ({**CHAT, "tools": "[{"}, r"'tools' holds '\[\{', which is no JSON"),
        ({**CHAT, "tools": "3"}, "'tools' holds '3'; it has to be a list of schemas, or JSON text of one"),
        ({**CHAT, "tools": [3]}, r"'tools' holds \[3\]; it has to be a list of schemas"),
        ({**CHAT, "tools": 3}, "'tools' holds 3; it has to be a list of schemas"),
        ({**CHAT, "tools": [TOOL], "chat_template_kwargs": {"tools": [TOOL]}}, "leave one out"),
    ],
)
def test_tools_that_cannot_be_shown_are_refused(row, said):
    with pytest.raises(ValueError, match=said):
        pair_text(row, make_tokenizer(chat_template=CHATML))
    # Without a chat template strings are refused in the same words, and messages before their tools are read.
    with pytest.raises(ValueError, match=said if row["prompt"] == "Paris?" else "no chat template"):
        pair_text(row, make_tokenizer())


def test_a_template_that_shows_no_tools_is_told():
    lines = prepare([{**CHAT, "tools": [TOOL]}], make_tokenizer(chat_template=CHATML))[1]
    assert "train: the chat template does not show the column 'tools': the prompts hold no tool" in lines
    assert len(prepare([{**CHAT, "tools": [TOOL]}], family_tokenizer("Hermes"))[1]) == 1


def test_a_column_of_another_name_holds_tools():
    tokenizer = family_tokenizer("Hermes")
    ours, theirs = ({**CHAT, name: [TOOL]} for name in ("tools", "functions"))
    assert prepare([theirs], tokenizer, columns={"tools": "functions"})[0] == prepare([ours], tokenizer)[0]


def test_special_tokens_in_tools_and_calls_stay_text_where_that_is_asked():
    tokenizer = family_tokenizer("Qwen 2.5")
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"about": "<|im_end|>"}}}
    row = {"prompt": [USER], "chosen": [call('{"city": "<|im_end|>"}'), RESULT, GOOD], "rejected": [BAD]}
    ((kept,), _), ((today,), _) = (
        prepare([{**row, "tools": [tool]}], tokenizer, escape_special_tokens=flag) for flag in (True, False)
    )
    end = tokenizer.eos_token_id
    assert [e["chosen_input_ids"].count(end) for e in (kept, today)] == [5, 7]
    assert parts(kept, "chosen", tokenizer) == parts(today, "chosen", tokenizer)
