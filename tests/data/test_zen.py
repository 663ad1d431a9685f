"""The forms of TRL's own test data, made of the Zen of Python: tokens and masks are those of TRL's trainer."""

import codecs
import contextlib
import io

import datasets
import pytest
import torch
from tiny import CHATML, make_model, make_tokenizer

from orpo.data.prepare import Limits, prepare_dataset
from orpo.layouts.layout import PaddedLayout

with contextlib.redirect_stdout(io.StringIO()):
    import this

LINES = [
    line for line in codecs.decode(this.s, "rot13").splitlines() if line.endswith(".") and " is better than " in line
]
# A template that writes both itself, so that TRL, which adds them where they are missing, adds none.
BOTH_ENDS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def standard():
    """The end of a line is better than that of the next one."""
    parts = [line.partition(" than") for line in LINES]
    return [
        {"prompt": head + than, "chosen": end, "rejected": other}
        for (head, than, end), (_, _, other) in zip(parts, [*parts[1:], parts[0]], strict=True)
    ]


def conversational():
    rows = []
    for line, other in zip(LINES, [*LINES[1:], LINES[0]], strict=True):
        better, _, worse = line.partition(" is better than ")
        question = [{"role": "user", "content": f"What is better than {worse.removesuffix('.')}?"}]
        answers = (better, other.partition(" is better")[0])
        sides = (
            {side: [{"role": "assistant", "content": f"{a}."}]}
            for side, a in zip(("chosen", "rejected"), answers, strict=True)
        )
        rows.append({"prompt": question} | next(sides) | next(sides))
    return rows


def implicit(rows):
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]


FORMS = {
    "standard_preference": standard(),
    "standard_implicit_prompt_preference": implicit(standard()),
    "conversational_preference": conversational(),
    "conversational_implicit_prompt_preference": implicit(conversational()),
}


def test_the_lines_are_those_of_the_zen():
    assert len(LINES) == 7
    assert FORMS["standard_preference"][0] == {
        "prompt": "Beautiful is better than",
        "chosen": " ugly.",
        "rejected": " implicit.",
    }
    assert FORMS["conversational_implicit_prompt_preference"][0]["chosen"] == [
        {"role": "user", "content": "What is better than ugly?"},
        {"role": "assistant", "content": "Beautiful."},
    ]


def of_trl(rows, tokenizer, tmp_path):
    """TRL's trainer on `rows`."""
    trl = pytest.importorskip("trl.experimental.orpo", reason="compares with TRL, which is not installed")
    args = trl.ORPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    data = datasets.Dataset.from_list(rows)
    return trl.ORPOTrainer(make_model(), args, processing_class=tokenizer, train_dataset=data)


@pytest.mark.parametrize("name", FORMS)
def test_tokens_and_masks_are_trls(name, tmp_path):
    tokenizer = make_tokenizer(chat_template=BOTH_ENDS)
    theirs = of_trl(FORMS[name], tokenizer, tmp_path)
    ours = prepare_dataset(FORMS[name], tokenizer, Limits(max_length=1024), report=lambda _: None)
    assert len(ours) == len(theirs.train_dataset) == len(LINES)
    for own, row in zip(ours, theirs.train_dataset, strict=True):
        for side in ("chosen", "rejected"):
            assert own[f"{side}_input_ids"] == row[f"{side}_input_ids"]
            assert own[f"{side}_prompt_length"] == row[f"{side}_labels"].count(-100)
    # As batches: what is attended to, and which tokens count as the answer.
    batch = theirs.data_collator(list(theirs.train_dataset))
    own = PaddedLayout(pad_token_id=tokenizer.pad_token_id)(list(ours))
    rows, width = own["orpo"].rows, own["input_ids"].shape[1]
    labels = torch.full_like(own["input_ids"], -100)
    answer = rows.in_response_N
    labels.view(-1)[rows.rows_N[answer] + 1] = rows.targets_N[answer]
    for half, side in enumerate(("chosen", "rejected")):
        for column, made, fill in (
            ("input_ids", own["input_ids"], tokenizer.pad_token_id),
            ("attention_mask", own["attention_mask"], 0),
            ("labels", labels, -100),
        ):
            given = batch[f"{side}_{column}"]
            given = torch.nn.functional.pad(given, (0, width - given.shape[1]), value=fill)
            assert torch.equal(made[len(LINES) * half : len(LINES) * (half + 1)], given), (side, column)


def test_a_template_that_ends_its_turns_gets_no_second_end(tmp_path):
    """Where a template knows neither BOS nor EOS, TRL puts one more of each around its turns."""
    tokenizer = make_tokenizer(chat_template=CHATML)
    rows = FORMS["conversational_preference"]
    ours = prepare_dataset(rows, tokenizer, Limits(max_length=1024), report=lambda _: None)
    for own, row in zip(ours, of_trl(rows, tokenizer, tmp_path).train_dataset, strict=True):
        for side in ("chosen", "rejected"):
            assert [1, *own[f"{side}_input_ids"], 2] == row[f"{side}_input_ids"]
            assert own[f"{side}_prompt_length"] + 1 == row[f"{side}_labels"].count(-100)
