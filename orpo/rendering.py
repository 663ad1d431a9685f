"""The text that a model continues, and its tokens: a string, or a conversation through the chat template."""

from __future__ import annotations

from typing import Any

from orpo.data.forms.messages import is_conversation, read_messages, render_messages
from orpo.data.forms.tools import calls_as_taken, read_tools
from orpo.data.forms.unusable import UnusableRow
from orpo.tokens.prompts import prompt_tokens, trained_plain
from orpo.tokens.special_tokens import ALTERED, WrittenOut, without_marks

Messages = list[dict[str, Any]]


def render(
    prompt: str | Messages,
    tokenizer: Any,
    chat_template: bool | None = None,
    system: str | None = None,
    tools: Any = None,
) -> str:
    """The text that the model continues.

    Args:
        prompt: a string, or messages, read as in training. If the last is the assistant's, it is continued.
        chat_template: whether a string becomes a user's turn. Default: yes if the tokenizer has a template and does not
            come from a run that trained on strings.
        system: a system message before the turn.
        tools: schemas for the template, a list of dictionaries or JSON text of one.

    Raises:
        ValueError: there is no chat template for messages, a system message or tools; messages hold no text, or the
            template refuses them.
    """
    if not isinstance(prompt, str) and not (prompt and is_conversation(prompt)):
        raise ValueError(f"a prompt has to be a string or a list of messages, not {prompt!r:.80}")
    schemas = read_tools(tools)
    if not _is_turn(prompt, tokenizer, chat_template):
        for name, given in (("system", system), ("tools", schemas)):
            if given is not None:
                raise ValueError(f"{name} is given, but a prompt without a chat template has no place for it")
        return prompt
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: give prompts as strings, without a chat template")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    messages = read_messages(messages, tokenizer)
    keywords = {"tools": schemas} if schemas else {}
    messages = calls_as_taken(messages, tokenizer, keywords)(messages)
    turn_open = messages[-1]["role"] == "assistant"
    try:
        return render_messages(
            messages, tokenizer, add_generation_prompt=not turn_open, continue_final_message=turn_open, **keywords
        )
    except UnusableRow as error:
        raise ValueError(f"the chat template refuses a prompt: {error.detail}") from error


def _is_turn(prompt: str | Messages, tokenizer: Any, chat_template: bool | None) -> bool:
    """Whether the chat template renders `prompt`, and writes the special tokens."""
    default = bool(getattr(tokenizer, "chat_template", None)) and not trained_plain(tokenizer)
    return not isinstance(prompt, str) or (default if chat_template is None else chat_template)


def render_marked(
    prompt: str | Messages, tokenizer: Any, chat_template: bool | None, system: str | None, tools: Any, marks: str
) -> str:
    """:func:`render`, with `marks` around the special tokens that `prompt`, `system` and `tools` themselves hold."""
    text = render(prompt, tokenizer, chat_template, system, tools)
    if not marks:
        return text
    written = WrittenOut(tokenizer)
    if not written.first([prompt, system, tools]):
        return text
    if not _is_turn(prompt, tokenizer, chat_template):
        return written.mark_strings(prompt, "", marks)
    own = (written.mark(part, marks) for part in (prompt, system, tools))
    marked = render(next(own), tokenizer, chat_template, *own)
    if without_marks(marked, marks) != text:
        raise ValueError(f"prompt {prompt!r} cannot be rendered as in training, by the chat template: {ALTERED}")
    return marked


def text_tokens(text: str, prompt: str | Messages, tokenizer: Any, chat_template: bool | None, marks: str) -> list[int]:
    """Tokens of `text`, made of `prompt` by :func:`render_marked`; a plain string gets a BOS in front."""
    ids, bos = prompt_tokens(text, tokenizer, marks), tokenizer.bos_token_id
    if not _is_turn(prompt, tokenizer, chat_template) and bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    return ids
