"""Small chat templates in the forms of well-known families, written from what is documented of their formats.

Each knows tools, calls and results as far as its family does, and no more than the tests need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tiny import make_tokenizer

_SCHEMAS = "{% for t in tools %}\n{{ t | tojson }}{% endfor %}"
_CALLS = (
    "{% for c in m.tool_calls %}{% set f = c.function or c %}\n<tool_call>\n"
    '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>{% endfor %}'
)

# ChatML with tags of XML around schemas, calls and results; results are a user's turn.
QWEN_2_5 = (
    "<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}Be kind.{% endif %}"
    "{% if tools %}\n<tools>" + _SCHEMAS + "\n</tools>{% endif %}<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant"
    "{% if m.content %}\n{{ m.content }}{% endif %}{% if m.tool_calls %}" + _CALLS + "{% endif %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% elif m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The same, with thoughts: kept after the last question, empty ones in front of the last turn, none before.
QWEN_3 = (
    "{% if tools %}<|im_start|>system\n<tools>" + _SCHEMAS + "\n</tools><|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}{% if m.content or not loop.first %}\n{% endif %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {% if c.function.arguments is string %}{{ c.function.arguments }}'
    "{% else %}{{ c.function.arguments | tojson }}{% endif %}}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Schemas in the first question, one call a turn, and results of ipython.
LLAMA_3_1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}"
    "<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% elif 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one at once') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot_id|>'
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if tools and m.role == 'user' and loop.first %}Answer by a call where one helps." + _SCHEMAS + "\n\n{% endif %}"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# ChatML whose results have a role of their own.
HERMES = (
    "{{ bos_token }}{% if tools %}<|im_start|>system\nYou may call functions. <tools>"
    + _SCHEMAS
    + " </tools><|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.role == 'tool' %}\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% elif m.tool_calls %}" + _CALLS + "{% else %}\n{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Schemas in front of the last question, no generation prompt, identifiers of calls.
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]{% elif m.role == 'tool' %}"
    '[TOOL_RESULTS] {"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% elif m.tool_calls is defined %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id is undefined or c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{{ ', ' if not loop.last }}{% endfor %}]{{ eos_token }}{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)

# Channels, a recipient for calls, and an end of its own for the last turn.
HARMONY = (
    "{% if tools %}<|start|>developer<|message|># Tools"
    "{% for t in tools %} type {{ t.function.name }} = (_: any) => any;{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|start|>functions.{{ m.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>"
    "{% elif m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>{{ f.arguments | tojson }}"
    "<|call|>"
    "{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

# Arguments as text, put together by +, and nothing between results and the answer to them.
DEEPSEEK = (
    "{{ bos_token }}{% set ns = namespace(result=false) %}"
    "{% for t in tools or [] %}{{ '## ' + t.function.name + '\n' }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.result = false %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'tool' %}{% set ns.result = true %}<|outputs|>{{ m.content }}<|/outputs|>"
    "{% elif m.tool_calls is defined %}<|Assistant|><|calls|>{% for c in m.tool_calls %}"
    "{{ 'function<|sep|>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}"
    "{% endfor %}<|/calls|>{{ eos_token }}"
    "{% else %}{{ '' if ns.result else '<|Assistant|>' }}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not ns.result %}<|Assistant|>{% endif %}"
)

# Two roles that alternate, text trimmed; schemas, calls and results are text in their turns.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'assistant') != (loop.index0 % 2 == 1) %}{{ raise_exception('roles alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{% if loop.first and tools %}{{ tools | tojson }}\n\n{% endif %}"
    "{% if m.role == 'tool' %}```tool_output\n{{ m.content | trim }}\n```"
    "{% elif m.tool_calls %}```tool_code\n{% set f = m.tool_calls[0].function %}{{ f.name }}("
    "{% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson }}{{ ', ' if not loop.last }}{% endfor %})\n```"
    "{% else %}{{ m.content | trim }}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# ChatML that marks what the assistant generates, and opens an earlier turn otherwise than the last one.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ', last' if loop.last and m.role == 'assistant' }}\n"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>"
    "{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant, last\n{% endif %}"
)


class Family(NamedTuple):
    """A template, and its tokens: BOS or None, EOS, the other special ones."""

    template: str
    bos: str | None
    eos: str
    special: tuple[str, ...]


_CHATML = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "Qwen 2.5": Family(QWEN_2_5, None, "<|im_end|>", _CHATML),
    "Qwen 3": Family(QWEN_3, None, "<|im_end|>", _CHATML),
    "Llama 3.1": Family(
        LLAMA_3_1, "<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    ),
    "Hermes": Family(HERMES, "<s>", "<|im_end|>", _CHATML),
    "Mistral": Family(MISTRAL, "<s>", "</s>", ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]")),
    "gpt-oss": Family(
        HARMONY, None, "<|return|>", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>")
    ),
    "DeepSeek": Family(
        DEEPSEEK, "<s>", "</s>", ("<|User|>", "<|Assistant|>", "<|outputs|>", "<|calls|>", "<|/calls|>", "<|sep|>")
    ),
    "Gemma": Family(GEMMA, "<s>", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
    "marked": Family(MARKED, None, "<|im_end|>", _CHATML),
}


def family_tokenizer(name: str) -> Any:
    """The tests' tokenizer with the template and the special tokens of a family."""
    family = FAMILIES[name]
    return make_tokenizer(
        # As files of templates are read, a line break behind a tag is none.
        chat_template=family.template.replace("%}\n", "%}{{ '\n' }}"),
        bos_token=family.bos,
        eos_token=family.eos,
        extra_special_tokens=list(family.special),
    )
