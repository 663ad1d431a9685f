"""Answers of several turns: which tokens each term scores, from the rows of a data set to loss and gradient."""

from functools import partial
from itertools import groupby

import datasets
import pytest
import torch
from chat_templates import family_tokenizer
from orpo_kernels.settings import LossSettings
from tiny import CHATML, NO_END, log_odds, make_model, make_tokenizer
from trainers import make_trainer

from orpo.data.forms.formats import pair_text
from orpo.data.forms.unusable import UnusableRow
from orpo.data.prepare import Limits, prepare_dataset
from orpo.data.preview import describe_example
from orpo.layouts.batch import NLLSpan
from orpo.layouts.layout import PackedLayout, PaddedLayout, SharedLayout
from orpo.model.attach import LossCall, attach_orpo_loss
from orpo.runs.record import describe_data


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


USER, MORE = turn("user", "hello"), turn("user", "and?")
GOOD, BETTER, BAD = (turn("assistant", text) for text in ("hi", "yes", "no"))
ROW = {"prompt": [USER], "chosen": [GOOD, MORE, BETTER], "rejected": [BAD, MORE, BAD]}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(chat_template=CHATML, eos_token="<|im_end|>", bos_token=None)


def prepare(rows, tokenizer, limits=None, **options):
    lines = []
    limits = Limits(max_length=None) if limits is None else limits
    return prepare_dataset(rows, tokenizer, limits, report=lines.append, **options), lines


def stretches(example, side, tokenizer):
    """The sequence as (what its tokens count for, their text)."""
    ids, mask = example[f"{side}_input_ids"], example[f"{side}_mask"]
    runs = groupby(range(len(ids)), lambda at: mask[at])
    return [(value, tokenizer.decode([ids[at] for at in run])) for value, run in runs]


OPENING = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
TURN = "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"


def test_the_assistants_turns_alone_are_scored(tokenizer):
    example = prepare([ROW], tokenizer)[0][0]
    first, last = "hi<|im_end|>\n", "yes<|im_end|>\n"
    assert stretches(example, "chosen", tokenizer) == [(0, OPENING), (1, first), (0, TURN), (1, last)]
    no = "no<|im_end|>\n"
    assert stretches(example, "rejected", tokenizer) == [(0, OPENING), (1, no), (0, TURN), (1, no)]
    assert example["chosen_prompt_length"] == len(tokenizer.encode(OPENING))


def test_the_last_turn_alone_where_that_is_asked(tokenizer):
    example = prepare([ROW], tokenizer, score_turns="last")[0][0]
    before = OPENING + "hi<|im_end|>\n" + TURN
    assert stretches(example, "chosen", tokenizer) == [(0, before), (1, "yes<|im_end|>\n")]


def test_the_setting_reaches_the_trainers_rows(tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, train_dataset=[ROW], tokenizer=tokenizer, score_turns="last")
    assert stretches(trainer.train_dataset[0], "chosen", tokenizer)[1:] == [(1, "yes<|im_end|>\n")]


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"train": False, "weight": 1}])
def test_a_turn_that_says_so_is_left_out(flag, tokenizer):
    """Of both terms: -1, where another's turn is 0. In the prompt, too."""
    row = {**ROW, "chosen": [{**GOOD, **flag}, MORE, {**BETTER, "weight": 1}]}
    example = prepare([row], tokenizer)[0][0]
    first = [(0, OPENING), (-1, "hi<|im_end|>\n"), (0, TURN)]
    assert stretches(example, "chosen", tokenizer) == [*first, (1, "yes<|im_end|>\n")]
    early = {"prompt": [USER, {**GOOD, **flag}, MORE], "chosen": [BETTER], "rejected": [BAD]}
    example = prepare([early], tokenizer)[0][0]
    assert stretches(example, "chosen", tokenizer) == [*first, (1, "yes<|im_end|>\n")]
    assert stretches(example, "rejected", tokenizer) == [*first, (1, "no<|im_end|>\n")]


@pytest.mark.parametrize("family", ["ChatML", "Qwen 3", "marked"])
def test_another_speakers_message_that_says_so_is_left_out(family, tokenizer):
    """What it says: the NLL would score it as well. Qwen 3's template alters a turn before it once it follows."""
    tokenizer = tokenizer if family == "ChatML" else family_tokenizer(family)
    row = {"prompt": [{**USER, "train": False}], "chosen": [GOOD, {**MORE, "weight": 0}, BETTER], "rejected": [BAD]}
    plain = prepare([{**row, "prompt": [USER], "chosen": [GOOD, MORE, BETTER]}], tokenizer)[0][0]
    example = prepare([row], tokenizer)[0][0]
    for side, said in (("chosen", ["hello", "and?"]), ("rejected", ["hello"])):
        spans = stretches(example, side, tokenizer)
        assert [text for value, text in spans if value == -1] == said
        # All else counts for what it did.
        mask = plain.get(f"{side}_mask") or [0] * plain["rejected_prompt_length"]
        mask += [1] * (len(plain[f"{side}_input_ids"]) - len(mask))
        assert [max(value, 0) for value in example[f"{side}_mask"]] == mask


def test_a_message_that_is_left_out_takes_none_of_its_frame_away(tokenizer):
    """Schemas stand in front of the first message; a message without text has nothing to leave out."""
    qwen = family_tokenizer("Qwen 3")
    row = {"tools": [{"name": "f"}], "prompt": [{**USER, "weight": 0}], "chosen": [GOOD], "rejected": [BAD]}
    spans = stretches(prepare([row], qwen)[0][0], "chosen", qwen)
    assert spans[0][0] == 0 and "<tools>" in spans[0][1] and spans[1] == (-1, "hello")
    empty = {**ROW, "prompt": [turn("system", "", weight=0), USER]}
    assert -1 not in prepare([empty], tokenizer)[0][0]["chosen_mask"]


@pytest.mark.parametrize("system", [[], [turn("system", "be kind")]])
@pytest.mark.parametrize("where", ["prompt", "answers"])
def test_a_prompt_that_the_answers_repeat_is_known_by_what_it_says(where, system, tokenizer):
    """Whichever of the two leaves a turn out; it would stand there twice."""
    plain, flagged = [USER, GOOD, MORE], [USER, {**GOOD, "weight": 0}, MORE]
    single = {"prompt": [*system, *flagged], "chosen": [BETTER], "rejected": [BAD]}
    prompt, repeated = (flagged, plain) if where == "prompt" else (plain, flagged)
    expected = list(prepare([single], tokenizer)[0])
    for row in (
        {"prompt": [*system, *prompt], "chosen": [*repeated, BETTER], "rejected": [*repeated, BAD]},
        {"prompt": prompt, "chosen": [*system, *repeated, BETTER], "rejected": [*system, *repeated, BAD]},
    ):
        assert list(prepare([row], tokenizer)[0]) == expected


def test_flags_are_hidden_from_the_template():
    template = CHATML.replace("{{ m['content'] }}", "{{ m | tojson }}")
    text = pair_text(
        {"prompt": [{**USER, "weight": 1}], "chosen": [{**GOOD, "train": True}], "rejected": [BAD]},
        make_tokenizer(chat_template=template),
    )
    assert text.chosen == '{"role": "assistant", "content": "hi"}<|im_end|>\n' and text.turns == (None, None)
    row = {"prompt": [USER], "chosen": [{**GOOD, "weight": 0}, MORE, BETTER], "rejected": [BAD]}
    assert "train" not in pair_text(row, make_tokenizer(chat_template=template)).chosen


@pytest.mark.parametrize("flag", [{"weight": 0.5}, {"weight": "0"}, {"train": "no"}, {"train": 0}])
def test_flags_of_other_values_are_refused(flag, tokenizer):
    with pytest.raises(ValueError, match=r"a weight has to be 0 \(left out\) or 1, train true or false"):
        pair_text({"prompt": [USER], "chosen": [{**GOOD, **flag}], "rejected": [BAD]}, tokenizer)


def test_an_answer_of_which_nothing_is_left_to_score_is_dropped(tokenizer):
    rows = [
        {"prompt": [USER], "chosen": [{**GOOD, "weight": 0}], "rejected": [{**BAD, "weight": 1}]},
        {**ROW, "chosen": [GOOD, MORE, {**BETTER, "weight": 0}]},
    ]
    lines = prepare([*rows, ROW], tokenizer, score_turns="last")[1]
    assert lines == ["train: kept 1 of 3: 2 answers of which no token is scored (first: row 0)"]
    assert prepare([*rows, ROW], tokenizer)[0]["pair_id"] == [1, 2]


def test_what_others_say_at_the_end_is_no_answer(tokenizer):
    row = {**ROW, "chosen": [GOOD, MORE]}
    with pytest.raises(UnusableRow, match="answer whose last turn is not the assistant's: role 'user'"):
        pair_text(row, tokenizer)


def test_generation_marks_are_read_where_a_template_has_them():
    """This one renders a turn otherwise once others follow, and its marks leave the line break out."""
    tokenizer = family_tokenizer("marked")
    example = prepare([ROW], tokenizer)[0][0]
    between = "\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant, last\n"
    assert stretches(example, "chosen", tokenizer) == [
        (0, OPENING),
        (1, "hi<|im_end|>"),
        (0, between),
        (1, "yes<|im_end|>"),
        (0, "\n"),
    ]
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    theirs = tokenizer.apply_chat_template([USER, *ROW["chosen"]], tokenize=True, **options)
    assert (example["chosen_input_ids"], example["chosen_mask"]) == (theirs["input_ids"], theirs["assistant_masks"])
    one = prepare([{**ROW, "chosen": [GOOD]}], tokenizer)[0][0]
    assert "chosen_mask" not in one
    left_out = prepare([{**ROW, "chosen": [{**GOOD, "weight": 0}, *ROW["chosen"][1:]]}], tokenizer)[0][0]
    assert stretches(left_out, "chosen", tokenizer)[1] == (-1, "hi<|im_end|>")


def test_marks_around_what_the_prompt_ends_with_score_nothing_of_the_prompt():
    """Templates for training may mark the thoughts that the generation prompt opens."""
    template = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m.role == 'user' %}b{% else %}{% generation %}<think>{{ m.content }}{% endgeneration %}{% endif %}",
    )
    template = template.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    tokenizer = make_tokenizer(chat_template=template, eos_token="<|im_end|>")
    row = {"prompt": [turn("assistant", "a"), turn("user", "b")], "chosen": [GOOD, BETTER], "rejected": [BAD]}
    example = prepare([row], tokenizer)[0][0]
    first = example["chosen_prompt_length"]
    text = tokenizer.decode(example["chosen_input_ids"][:first])
    assert text.endswith("assistant\n<think>") and 1 not in example["chosen_mask"][:first]
    scored = [text for value, text in stretches(example, "chosen", tokenizer) if value == 1]
    assert scored == ["hi", "<think>yes"]


def test_a_template_without_ends_of_turns_ends_the_last_one():
    """As with one turn: EOS is added where nothing else would teach the model to stop."""
    tokenizer = make_tokenizer(chat_template=NO_END)
    example = prepare([ROW], tokenizer)[0][0]
    assert stretches(example, "chosen", tokenizer) == [
        (0, "user: hello\n"),
        (1, "assistant: hi\n"),
        (0, "user: and?\n"),
        (1, "assistant: yes\n</s>"),
    ]


THINKS = {"reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("family", "row"),
    [
        # An end of its own for the last turn.
        ("gpt-oss", ROW),
        # Thoughts that are gone once the user asks again.
        ("Qwen 3", {**ROW, "chosen": [{**GOOD, **THINKS}, MORE, {**BETTER, **THINKS}]}),
        # Schemas that move to the last question.
        ("Mistral", {**ROW, "tools": [{"name": "f"}]}),
    ],
)
def test_turns_that_the_template_alters_once_others_follow_are_dropped(family, row):
    """A model would be trained on turns that it never writes. The last one is what it writes."""
    tokenizer = family_tokenizer(family)
    where = r"\(row 0, message 2 of 4, which score_turns last does not need\)"
    with pytest.raises(ValueError, match=f"1 answer whose turns the chat template alters once others follow {where}"):
        prepare([row], tokenizer)
    example = prepare([row], tokenizer, score_turns="last")[0][0]
    value, text = stretches(example, "chosen", tokenizer)[-1]
    ends = {"gpt-oss": "<|channel|>final<|message|>yes<|return|>", "Mistral": " yes</s>"}
    assert (value, text) == (1, ends.get(family, "<think>\nhm\n</think>\n\nyes<|im_end|>\n"))


def test_an_opening_that_the_turn_does_not_begin_with_takes_nothing_of_it():
    """DeepSeek-R1's opens thoughts, which a turn without any does not show: it may begin with the same character."""
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = make_tokenizer(chat_template=template, eos_token="<|im_end|>")
    row = {**ROW, "chosen": [turn("assistant", "<b>"), MORE, turn("assistant", "<thanks>")]}
    example = prepare([row], tokenizer)[0][0]
    assert stretches(example, "chosen", tokenizer) == [
        (0, OPENING),
        (1, "<b><|im_end|>\n"),
        (0, TURN),
        (1, "<thanks><|im_end|>\n"),
    ]
    assert pair_text({**row, "chosen": row["chosen"][2:]}, tokenizer).chosen == "<thanks><|im_end|>\n"


def test_empty_thoughts_in_front_of_a_last_turn_are_no_change():
    """Qwen 3's frame around the last turn alone; its earlier turns are scored as they stand."""
    tokenizer = family_tokenizer("Qwen 3")
    example = prepare([ROW], tokenizer)[0][0]
    last = "<think>\n\n</think>\n\nyes<|im_end|>\n"
    expected = [(0, OPENING), (1, "hi<|im_end|>\n"), (0, TURN), (1, last)]
    assert stretches(example, "chosen", tokenizer) == expected
    # Thoughts that stay, as those between calls do, are scored.
    result = turn("tool", "18 C")
    row = {"prompt": [USER], "chosen": [{**GOOD, **THINKS}, result, {**BETTER, **THINKS}], "rejected": [BAD]}
    example = prepare([row], tokenizer)[0][0]
    assert [text for value, text in stretches(example, "chosen", tokenizer) if value == 1] == [
        "<think>\nhm\n</think>\n\nhi<|im_end|>\n",
        "<think>\nhm\n</think>\n\nyes<|im_end|>\n",
    ]


def test_a_result_that_an_answer_begins_with_is_not_scored(tokenizer):
    """The prompt ends with the call, which is not open."""
    row = {"prompt": [USER, GOOD], "chosen": [turn("tool", "18"), BETTER], "rejected": [turn("tool", "19"), BAD]}
    example = prepare([row], tokenizer)[0][0]
    between = "<|im_start|>tool\n18<|im_end|>\n<|im_start|>assistant\n"
    before = f"{OPENING}hi<|im_end|>\n"
    assert stretches(example, "chosen", tokenizer) == [(0, before + between), (1, "yes<|im_end|>\n")]
    assert example["chosen_prompt_length"] == len(tokenizer.encode(before))


def test_masks_are_there_only_where_a_row_needs_one(tokenizer):
    """Of a row whose answer is all scored the mask is empty; a data set of such rows has none, a stream neither."""
    single = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    plain, both = prepare([single] * 2, tokenizer)[0], prepare([single, ROW], tokenizer)[0]
    assert not {"chosen_mask", "rejected_mask"} & set(plain.column_names)
    assert both[0]["chosen_mask"] == [] and {**plain[0], "chosen_mask": [], "rejected_mask": []} == both[0]
    one_side = prepare([{**single, "chosen": ROW["chosen"]}], tokenizer)[0]
    assert "rejected_mask" not in one_side.column_names
    streams = [
        prepare(datasets.Dataset.from_list(rows).to_iterable_dataset(), tokenizer)[0]
        for rows in ([single] * 2, [single, ROW])
    ]
    assert [list(stream) for stream in streams] == [list(plain), list(both)]


def test_prepared_sets_with_masks_and_without_are_joined(tokenizer):
    single = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    plain, masked = prepare([single], tokenizer)[0], prepare([ROW], tokenizer)[0]
    joined = prepare(datasets.concatenate_datasets([plain, masked]), tokenizer)[0]
    expected = prepare([single, ROW], tokenizer)[0]
    assert describe_data(joined) == describe_data(expected)
    for layout in (PaddedLayout(0), PackedLayout(0)):
        rows, truth = (layout(list(data))["orpo"].rows for data in (joined, expected))
        for name in ("rows_N", "targets_N", "sequence_N", "in_response_N", "in_nll_N"):
            assert torch.equal(getattr(rows, name), getattr(truth, name))


def test_prepared_rows_that_score_other_turns_are_told(tokenizer):
    rows = prepare([ROW], tokenizer)[0]
    again, lines = prepare(rows, tokenizer, score_turns="last")
    assert list(again) == list(rows)
    assert lines == [
        "train: the rows come as tokens, made with score_turns all, which is last now: what was scored then stays so; "
        "give the rows of text to change it"
    ]
    assert prepare(rows, tokenizer)[1] == []


def test_a_first_batch_without_masks_or_answers_does_not_set_their_type(tokenizer):
    """A thousand rows are written at a time, and an empty list has no type."""
    empty = {"prompt": [USER], "chosen": [], "rejected": [BAD]}
    rows = [empty] * 1000 + [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}] * 1000 + [ROW]
    data = prepare(rows, tokenizer)[0]
    assert len(data) == 1001 and data[0]["chosen_mask"] == [] and 1 in data[-1]["chosen_mask"]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("bos", ["<s>", None])
def test_masks_are_cut_along(mode, bos):
    """Whatever stays of a sequence counts for what it counted before."""
    template = "{{ bos_token or '' }}" + CHATML
    tokenizer = make_tokenizer(chat_template=template, bos_token=bos, eos_token="<|im_end|>")
    row = {**ROW, "prompt": [USER, {**GOOD, "weight": 0}, MORE]}
    whole = prepare([row], tokenizer)[0][0]
    first, length = whole["chosen_prompt_length"], len(whole["chosen_input_ids"])
    most = Limits(max_length=length - 4, max_prompt_length=first - 6, truncation_mode=mode)
    cut = prepare([row], tokenizer, most)[0][0]
    kept = [*range(first - 6)] if mode == "keep_start" else [*range(6, first)]
    kept = [0, *kept[1:]] if mode == "keep_end" and bos else kept
    kept += range(first, length)
    for name in ("chosen_input_ids", "chosen_mask"):
        assert cut[name] == [whole[name][at] for at in kept]
    assert -1 in cut["chosen_mask"]
    shorter = prepare([row], tokenizer, Limits(max_length=None, max_completion_length=4))[0][0]
    assert shorter["chosen_mask"] == whole["chosen_mask"][: first + 4]


def test_a_cut_that_leaves_nothing_to_score_drops_the_row(tokenizer):
    row = {**ROW, "prompt": [USER, GOOD], "chosen": [turn("tool", "18 " * 20), BETTER]}
    row["rejected"] = [turn("tool", "19 " * 20), BAD]
    limits = Limits(max_length=None, max_completion_length=20)
    with pytest.raises(ValueError, match=r"1 answer of which no token is scored \(row 0\)"):
        prepare([row], tokenizer, limits)


def test_special_tokens_that_stay_text_move_no_turn(tokenizer):
    row = {**ROW, "chosen": [turn("assistant", "h<|im_end|>i"), turn("user", "a<|im_end|>"), BETTER]}
    example = prepare([row], tokenizer, escape_special_tokens=True)[0][0]
    between = "<|im_start|>user\na<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert stretches(example, "chosen", tokenizer) == [
        (0, OPENING),
        (1, "h<|im_end|>i<|im_end|>\n"),
        (0, between),
        (1, "yes<|im_end|>\n"),
    ]
    assert example["chosen_input_ids"].count(tokenizer.eos_token_id) == 4


def test_the_first_pair_is_shown_as_it_is_scored(tokenizer):
    row = {**ROW, "chosen": [{**GOOD, "train": False}, MORE, GOOD, MORE, BETTER]}
    example = prepare([row], tokenizer)[0][0]
    lines = describe_example(example, PaddedLayout(pad_token_id=0), tokenizer).splitlines()
    assert lines[1].endswith(
        "'user\\nhello<|im_end|>\\n<|im_start|>assistant\\n' … "
        + repr(TURN + "hi<|im_end|>\n" + TURN + "yes<|im_end|>\n")
    )
    assert lines[2].endswith("'hi<|im_end|>\\n' … 'yes<|im_end|>\\n'")
    assert lines[3].endswith("'no<|im_end|>\\n' … 'no<|im_end|>\\n'")
    assert lines[4].split("tokens")[0].split() == [
        "not",
        "scored,",
        "chosen",
        str(example["chosen_mask"].count(-1) + 2 * len(tokenizer.encode(TURN))),
    ]
    assert lines[4].endswith(f"{'hi<|im_end|>' + chr(10) + TURN!r} … {TURN!r}")
    assert lines[5].endswith(repr(TURN))


LAYOUTS = [PaddedLayout, *(partial(of, single_row=one) for of in (PackedLayout, SharedLayout) for one in (False, True))]


def by_hand(model, examples, whole_nll, beta=0.1):
    """The loss in double precision, from log_softmax gathered at the tokens that each term scores, written as sums."""
    nll, tokens, terms = 0.0, 0, []
    for example in examples:
        odds = {}
        for side in ("chosen", "rejected"):
            ids, first = example[f"{side}_input_ids"], example[f"{side}_prompt_length"]
            mask = example.get(f"{side}_mask") or [0] * first + [1] * (len(ids) - first)
            logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            own = {at: logps[at - 1, ids[at]] for at in range(1, len(ids))}
            answer = [own[at] for at in own if mask[at] == 1]
            odds[side] = log_odds(sum(answer) / len(answer))
            if side == "chosen":
                scored = [own[at] for at in own if mask[at] >= 0] if whole_nll else answer
                nll, tokens = nll - sum(scored), tokens + len(scored)
        terms.append(-torch.nn.functional.logsigmoid(odds["chosen"] - odds["rejected"]))
    return nll / tokens + beta * sum(terms) / len(terms)


@pytest.mark.parametrize("whole_nll", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["padded", "packed", "packed row", "shared", "shared row"])
def test_loss_and_gradient_are_those_of_the_scored_tokens(layout, whole_nll, tokenizer):
    rows = [
        {**ROW, "chosen": [{**GOOD, "weight": 0}, MORE, GOOD, MORE, BETTER]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        ROW,
    ]
    examples = list(prepare(rows, tokenizer)[0])
    model, plain = make_model("llama"), make_model("llama")
    expected = by_hand(plain, examples, whole_nll)
    expected.backward()
    attach_orpo_loss(model)
    batch = layout(0, NLLSpan(prompt=whole_nll))(examples)
    orpo = batch.pop("orpo")
    call = LossCall(orpo.rows, LossSettings(num_nll_tokens=orpo.num_nll_tokens, num_pairs=orpo.num_pairs))
    loss = model(**batch, orpo=call).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, own), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(own.grad, other.grad, rtol=1e-4, atol=1e-6), name
    scored = {False: [1], True: [0, 1]}[whole_nll]
    masks = [e["chosen_mask"] or [0] * e["chosen_prompt_length"] + [1] * 9999 for e in examples]
    counted = [
        sum(v in scored for v in mask[1 : len(e["chosen_input_ids"])]) for e, mask in zip(examples, masks, strict=True)
    ]
    assert (orpo.num_nll_tokens, orpo.num_pairs) == (sum(counted), 3)


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_trains_what_the_masks_say(stream, tmp_path, capsys, tokenizer):
    """The logged loss, and the line on the first pair; tokens that come as columns train the same."""
    rows = [ROW, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}]
    data = datasets.Dataset.from_list(rows)
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1, "preset": "response_only"}
    run = {"tokenizer": tokenizer, **options}
    trainer = make_trainer(tmp_path / "a", train_dataset=data.to_iterable_dataset() if stream else data, **run)
    examples = list(trainer.train_dataset)
    expected = by_hand(make_model("llama"), examples, whole_nll=False).item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert "'hi<|im_end|>\\n' … 'yes<|im_end|>\\n'" in capsys.readouterr().out
    again = make_trainer(tmp_path / "b", train_dataset=examples, **run)
    again.train()
    assert again.state.log_history[0]["loss"] == trainer.state.log_history[0]["loss"]
    last = make_trainer(tmp_path / "c", train_dataset=data, score_turns="last", **run)
    last.train()
    expected = by_hand(make_model("llama"), list(last.train_dataset), whole_nll=False).item()
    assert last.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="score_turns is 'first'; it has to be one of all, last"):
        make_trainer(tmp_path / "d", train_dataset=data, score_turns="first", **run)


def test_a_run_goes_on_with_the_turns_that_it_scored(tmp_path, tokenizer):
    """Other flags in the data are other data, though their tokens are the same."""
    run = {"tokenizer": tokenizer, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, train_dataset=[ROW], **run).train()
    run["max_steps"] = 2
    with pytest.raises(ValueError, match="score_turns was all and is last"):
        make_trainer(tmp_path, train_dataset=[ROW], score_turns="last", **run).train(resume_from_checkpoint=True)
    flagged = {**ROW, "chosen": [{**GOOD, "weight": 0}, *ROW["chosen"][1:]]}
    with pytest.raises(ValueError, match="train_dataset was"):
        make_trainer(tmp_path, train_dataset=[flagged], **run).train(resume_from_checkpoint=True)


PREPARED = {
    "chosen_input_ids": [5, 6, 7, 8],
    "rejected_input_ids": [5, 6, 9],
    "chosen_prompt_length": 1,
    "rejected_prompt_length": 1,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([0, 1, 1], "chosen_mask holds 3 values for 4 tokens"),
        ([0, 1, 2, 1], "chosen_mask holds 2; it has to hold 1, 0 and -1"),
        ([1, 1, 0, 1], "chosen_mask scores token 0, which is among the 1 of the prompt"),
        ([0, 0, -1, 0], "chosen_mask scores no token that another precedes"),
    ],
)
def test_masks_that_come_with_tokens_are_checked(mask, said, stream, tokenizer):
    good = {**PREPARED, "chosen_mask": [0, 0, 1, -1]}
    for data in ([good, {**good, "chosen_mask": []}], [{**good, "chosen_mask": [False, True, False, True]}]):
        assert prepare(data, tokenizer)[0][0]["chosen_mask"] == data[0]["chosen_mask"]
    rows = datasets.Dataset.from_list([good, {**good, "chosen_mask": mask}])
    with pytest.raises(ValueError, match=f"train: row 1 cannot be trained on: {said}"):
        list(prepare(rows.to_iterable_dataset() if stream else rows, tokenizer)[0])
