"""Special tokens in the rows' own text are counted, and stay text where that is asked."""

import datasets
import pytest
from tiny import CHATML, NO_END, ROWS, make_model, make_tokenizer
from tokenizers import Tokenizer, pre_tokenizers
from trainers import make_trainer

from orpo.data.prepare import Limits, prepare_dataset
from orpo.generation import generate

BECOME = "which become those tokens; --escape_special_tokens keeps them text"


def prepare(rows, tokenizer=None, **options):
    lines = []
    data = prepare_dataset(rows, tokenizer or make_tokenizer(), Limits(max_length=None), report=lines.append, **options)
    return data, lines


def ids(tokenizer, *tokens):
    found = tokenizer.convert_tokens_to_ids(list(tokens))
    assert None not in found
    return found


def turns(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def chat_row(prompt, chosen, rejected):
    return {"chosen": turns(prompt, chosen), "rejected": turns(prompt, rejected)}


def string_row(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_rows_with_special_tokens_in_their_text_are_counted():
    rows = [
        string_row("a", "b", "c"),
        string_row("<s>a", "b</s>", "c</s>"),
        string_row("a", "", "c</s>d"),
        string_row("a", "b", "c</s>d"),
        string_row("a</s>", "b", "c"),
        {
            "prompt": None,
            "chosen": "\n\nHuman: a<pad>\n\nAssistant: b",
            "rejected": "\n\nHuman: a<pad>\n\nAssistant: c",
        },
    ]
    assert prepare(rows[:2])[1] == ["train: kept 2 of 2"]
    assert prepare(rows)[1][1:] == [
        f"train: 3 rows hold special tokens written out in their text (first: row 3, '</s>'), {BECOME}"
    ]
    tokenizer = make_tokenizer(chat_template=CHATML)
    chats = [chat_row("a", "b", "c"), chat_row("a", "b", "<|im_end|>")]
    assert prepare(chats, tokenizer)[1][1:] == [
        f"train: 1 row holds special tokens written out in its text (row 1, '<|im_end|>'), {BECOME}"
    ]
    lines = prepare(chats, tokenizer, escape_special_tokens=True)[1]
    assert lines[1].endswith("(row 1, '<|im_end|>'), which stay text (--escape_special_tokens)")


def test_strings_keep_them_text_but_for_the_bos_and_eos_around_them():
    tokenizer = make_tokenizer()
    row = string_row("<s>a</s>", "b</s>c</s>", "<s>")
    ((pair,), _), ((today,), _) = (prepare([row], tokenizer, escape_special_tokens=flag) for flag in (True, False))
    prompt = ids(tokenizer, "<s>", "a", "<", "/", "s", ">")
    assert pair["chosen_input_ids"] == [*prompt, *ids(tokenizer, "b", "<", "/", "s", ">", "c", "</s>")]
    assert pair["rejected_input_ids"] == [*prompt, *ids(tokenizer, "<", "s", ">", "</s>")]
    assert pair["chosen_prompt_length"] == pair["rejected_prompt_length"] == 6
    assert today["chosen_input_ids"] == ids(tokenizer, "<s>", "a", "</s>", "b", "</s>", "c", "</s>")


def test_a_special_token_over_the_boundary_stays_text():
    tokenizer = make_tokenizer()
    ((pair,), _) = prepare([string_row("a</", "s>b", "c")], tokenizer, escape_special_tokens=True)
    assert pair["chosen_input_ids"] == ids(tokenizer, "<s>", "a", "<", "/", "s", ">", "b", "</s>")
    assert pair["chosen_prompt_length"] == 4


def test_conversations_keep_the_tokens_of_the_template():
    tokenizer = make_tokenizer(chat_template=CHATML)
    ((pair,), _) = prepare([chat_row("a</s>", "</s>b", "c")], tokenizer, escape_special_tokens=True)
    plain = prepare([chat_row("a", "b", "c")], tokenizer)[0][0]
    written, b, a = (ids(tokenizer, *text) for text in (("<", "/", "s", ">"), "b", "a"))
    before, after = plain["chosen_input_ids"][: plain["chosen_prompt_length"]], plain["chosen_input_ids"]
    at = before.index(*a, before.index(*ids(tokenizer, "Ċ")))
    prompt = [*before[: at + 1], *written, *before[at + 1 :]]
    assert pair["chosen_input_ids"] == [*prompt, *written, *b, *after[len(before) + 1 :]]
    assert pair["rejected_input_ids"][: len(prompt)] == prompt
    assert pair["chosen_prompt_length"] == pair["rejected_prompt_length"] == len(prompt)
    assert 2 not in pair["chosen_input_ids"] and after[-2:] == ids(tokenizer, "<|im_end|>", "Ċ")


def test_an_answer_that_ends_in_written_text_still_gets_its_end():
    tokenizer = make_tokenizer(chat_template=NO_END.replace("\n", ""))
    row = chat_row("a", "b</s>", "c")
    assert prepare([row], tokenizer)[0][0]["chosen_input_ids"][-2:] == ids(tokenizer, "b", "</s>")
    ((pair,), _) = prepare([row], tokenizer, escape_special_tokens=True)
    assert pair["chosen_input_ids"][-6:] == ids(tokenizer, "b", "<", "/", "s", ">", "</s>")


def test_messages_are_text_in_their_parts_and_calls_too():
    template = (
        "{% for m in messages %}<|im_start|>{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a<|im_end|>"}]}]
    row = {
        "prompt": parts,
        "chosen": [{"role": "assistant", "content": "", "tool_calls": call}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    ((pair,), lines) = prepare([row], tokenizer, escape_special_tokens=True)
    assert (
        pair["chosen_input_ids"].count(4) == 2 and tokenizer.decode(pair["chosen_input_ids"]).count("<|im_end|>") == 4
    )
    assert "(row 0, '<|im_end|>')" in lines[1]


@pytest.mark.parametrize("content", ["a", "hello <b> & \ue000"])
def test_other_rows_have_the_tokens_they_had(content):
    strings = [*ROWS, string_row(content, "b", "c")]
    chats = [chat_row(*row.values()) for row in strings]
    for rows, tokenizer in ((strings, make_tokenizer()), (chats, make_tokenizer(chat_template=CHATML))):
        # Beside a row with such a text, which must not move them.
        mixed = [{**rows[0]}, rows[0] if rows is strings else chat_row("</s>", "b", "c"), *rows[1:]]
        mixed[1] = string_row("</s>", "b", "c") if rows is strings else mixed[1]
        kept = prepare(mixed, tokenizer, escape_special_tokens=True)[0].to_list()
        for pair in (expected := prepare(rows, tokenizer)[0].to_list()):
            pair["pair_id"] += pair["pair_id"] > 0
        assert [pair for pair in kept if pair["pair_id"] != 1] == expected


@pytest.mark.parametrize(
    "change", ["m.content | replace('b</s>', 'b')", "m.content[:12]", "m.content | tojson(ensure_ascii=true)"]
)
def test_a_row_whose_text_the_template_alters_is_dropped(change):
    template = CHATML.replace("m['content']", change)
    rows = [chat_row("a", "b", "c"), chat_row("hello ab</s>", "b", "c")]
    tokenizer = make_tokenizer(chat_template=template)
    data, lines = prepare(rows, tokenizer, escape_special_tokens=True, max_bad_rows=0.5)
    assert data["pair_id"] == [0]
    assert lines == [
        "train: kept 1 of 2: 1 row that the chat template refuses (row 1, it alters special tokens written out in the "
        "text, which escape_special_tokens would keep; it holds chosen: messages, rejected: messages)"
    ]
    assert prepare(rows, make_tokenizer(chat_template=template))[0]["pair_id"] == [0, 1]


def test_a_tokenizer_that_cannot_is_refused():
    spaced = make_tokenizer()
    model = Tokenizer.from_str(spaced.backend_tokenizer.to_str())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    spaced = type(spaced)(tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    with pytest.raises(
        ValueError, match=r"escape_special_tokens is true, and this tokenizer makes .* leave the option"
    ):
        prepare(ROWS, spaced, escape_special_tokens=True)
    assert len(prepare(ROWS, spaced)[0]) == len(ROWS)


@pytest.mark.parametrize("escape", [False, True])
def test_streams_are_counted_as_they_are_read(escape, tmp_path, capsys):
    rows = [string_row("a", "b", "c</s>d"), string_row("a", "b", "c")]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    trainer = make_trainer(
        tmp_path, train_dataset=stream, max_steps=1, escape_special_tokens=escape, per_device_train_batch_size=2
    )
    trainer.train()
    said = "which stay text (--escape_special_tokens)" if escape else BECOME
    wanted = f"train, a stream: 1 row holds special tokens written out in its text, {said}\n"
    assert wanted in capsys.readouterr().out


@pytest.mark.parametrize("turn", [False, True])
def test_generation_keeps_them_text_where_training_did(turn, tmp_path):
    asked, row = [], (chat_row if turn else string_row)("a</s>", "b", "c")
    for escape in (False, True):
        tokenizer = make_tokenizer(chat_template=CHATML)
        folder = tmp_path / str(escape)
        trainer = make_trainer(folder, tokenizer=tokenizer, train_dataset=[row], escape_special_tokens=escape)
        trainer.save_model()
        tokenizer = type(tokenizer).from_pretrained(folder)
        pair = prepare([row], tokenizer, escape_special_tokens=escape)[0][0]

        class Model:
            """Notes what it is asked."""

            def __init__(self):
                self.plain = make_model("llama")

            def generate(self, input_ids, attention_mask):
                asked.append(input_ids[0].tolist())
                return input_ids.new_tensor([[*input_ids[0].tolist(), 2]])

            def __getattr__(self, name):
                return getattr(self.plain, name)

        generate(Model(), tokenizer, ["a</s>"])
        assert asked[-1] == pair["chosen_input_ids"][: pair["chosen_prompt_length"]]
    # "</s>" is a token, or four.
    assert len(asked[1]) == len(asked[0]) + 3 and asked[1].count(2) == asked[0].count(2) - 1


def test_a_run_goes_on_with_the_text_it_had(tmp_path):
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="escape_special_tokens was False and is True"):
        make_trainer(tmp_path, max_steps=2, escape_special_tokens=True).train(resume_from_checkpoint=True)
