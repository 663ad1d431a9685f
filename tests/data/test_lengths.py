"""What is cut is counted, or left out where that is asked; no sequence goes beyond a model's positions or limits."""

import datasets
import pytest
from record_trl_trace import trace_tokenizer
from tiny import ROWS, make_encoder_decoder, make_encoder_tokenizer, make_model
from trainers import make_args
from trainers import make_trainer as make_any_trainer

from orpo.data.prepare import Limits, prepare_dataset
from orpo.data.streams import counters
from orpo.trainer.positions import position_table

# Each letter is a token, and BOS and EOS come to them.
WORDS = "abcdefgh"
PAIRS = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "a", "chosen": WORDS, "rejected": "c"},
    {"prompt": "a", "chosen": "b", "rejected": WORDS},
    {"prompt": "a", "chosen": f"{WORDS}x", "rejected": f"b{WORDS}"},
    {"prompt": WORDS * 2, "chosen": "b", "rejected": "c"},
]


def make_trainer(*args, **settings):
    return make_any_trainer(*args, tokenizer=trace_tokenizer(), **settings)


def prepare(rows, limits, **options):
    lines = []
    return prepare_dataset(rows, trace_tokenizer(), limits, report=lines.append, **options), lines


def as_stream(rows):
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


def test_cut_answers_are_counted_and_stand_in_the_card(tmp_path, capsys):
    line = (
        "train: kept 4 of 5: 1 prompt of 8 tokens or more (row 4); of the kept, 2 chosen and 2 rejected answers are "
        "cut, without their end"
    )
    trainer = make_trainer(tmp_path, train_dataset=PAIRS, max_length=8, layout="padded")
    assert line in capsys.readouterr().out.splitlines()
    trainer.create_model_card()
    assert "2 chosen and 2 rejected answers are cut" in (tmp_path / "README.md").read_text()


def test_the_side_that_is_cut_is_named():
    _, lines = prepare(PAIRS[1:2], Limits(max_length=8))
    assert lines[:1] == ["train: kept 1 of 1; of the kept, 1 chosen and 0 rejected answers are cut, without their end"]


def test_cut_prompts_are_counted():
    _, lines = prepare(PAIRS[3:], Limits(max_length=12, max_prompt_length=4))
    assert lines == ["train: kept 2 of 2; of the kept, 1 prompt is cut"]
    _, lines = prepare(PAIRS[3:], Limits(max_length=8, max_prompt_length=6))
    assert lines[0].endswith("1 prompt is cut, and 1 chosen and 1 rejected answers are cut, without their end")


@pytest.mark.parametrize("stream", [False, True])
def test_drop_leaves_out_what_would_be_cut(stream):
    kept, lines = prepare(as_stream(PAIRS) if stream else PAIRS, Limits(max_length=8, truncation="drop"))
    assert [pair["pair_id"] for pair in kept] == [0]
    if stream:
        assert counters(kept)[0].take()[:2] == (5, {"pair of more than 8 tokens": 4})
    else:
        assert lines == ["train: kept 1 of 5: 4 pairs of more than 8 tokens (first: row 1)"]
    # At the limit nothing would be cut: BOS, "a", eight letters and EOS.
    assert len(prepare(PAIRS[:3], Limits(max_length=11, truncation="drop"))[0]) == 3
    assert len(prepare(PAIRS[:3], Limits(max_length=10, truncation="drop"))[0]) == 1


def test_drop_leaves_out_answers_that_are_too_long_by_themselves():
    kept, lines = prepare(PAIRS, Limits(max_length=None, max_completion_length=8, truncation="drop"))
    assert [pair["pair_id"] for pair in kept] == [0, 4]
    assert lines == ["train: kept 2 of 5: 3 pairs with an answer of more than 8 tokens (first: row 1)"]


def test_a_stream_says_what_it_cut(tmp_path, capsys):
    trainer = make_trainer(tmp_path, train_dataset=as_stream(PAIRS[:4]), max_length=8, layout="padded", max_steps=1)
    trainer.train()
    assert "of the kept, 2 chosen and 2 rejected answers are cut, without their end" in capsys.readouterr().out


def test_the_setting_is_cut_or_drop(tmp_path):
    with pytest.raises(ValueError, match="truncation is 'keep'; it has to be 'cut' or 'drop'"):
        make_args(tmp_path, truncation="keep")
    assert make_args(tmp_path, truncation="drop").limits.truncation == "drop"


POSITIONS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 12, "max_position_embeddings": None},
    "opt": {"max_position_embeddings": 12, "word_embed_proj_dim": 32, "ffn_dim": 32},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 12, "max_position_embeddings": None},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 12, "max_position_embeddings": None, "dff": 32},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 12},
    "roberta": {"max_position_embeddings": 13, "is_decoder": True},
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_a_table_of_positions_is_known_and_ends_where_the_model_fails(kind):
    import torch

    changes = {"rotary_dim": 8} if kind == "gptj" else {}
    model = make_model(kind, **POSITIONS[kind], **changes)
    assert position_table(model) == 12
    with torch.no_grad():
        model(torch.full((1, 12), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 13), 5))


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_positions_that_are_computed_are_no_table(kind):
    assert position_table(make_model(kind, max_position_embeddings=12)) is None


LONG = [{"prompt": "a", "chosen": WORDS * 2, "rejected": "c"}]


@pytest.mark.parametrize("where", ["train", "eval", "evaluate", "stream"])
def test_sequences_beyond_a_table_of_positions_are_refused_before_training(where, tmp_path):
    model = make_model("gpt2", **POSITIONS["gpt2"])
    message = r"max_length is 1024, and there is a s.*; GPT2LMHeadModel has a table of 12 positions.*--max_length 12\)"
    given = {"train": {"train_dataset": LONG}, "eval": {"eval_dataset": LONG, "train_dataset": PAIRS[:1]}}
    if where == "evaluate":
        trainer = make_trainer(tmp_path, model, PAIRS[:1], layout="padded")
        with pytest.raises(ValueError, match=message):
            trainer.evaluate(LONG)
        return
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model, layout="padded", **given.get(where, {"train_dataset": as_stream(PAIRS[:1])}))
    # The default, 1,024, harms nothing where no sequence is as long; a limit lets a stream pass.
    make_trainer(tmp_path, model, PAIRS[:1], layout="padded")
    make_trainer(tmp_path, model, as_stream(LONG), layout="padded", max_length=12)


BART = {"max_length": 1024, "max_prompt_length": 12, "max_completion_length": 12}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_length": 12, "max_prompt_length": None, "max_completion_length": 13}, "max_completion_length is 13,"),
        ({"max_prompt_length": 13}, "max_prompt_length is 13,"),
        ({"max_prompt_length": None}, "max_length is 1024,"),
        (
            {"max_prompt_length": 13, "max_completion_length": 14},
            "max_prompt_length is 13 and max_completion_length is",
        ),
    ],
)
def test_either_part_of_an_encoder_decoders_pairs_has_to_fit(changes, said, tmp_path):
    """Of a stream the limits alone are known, and each part may have its own: the first long answer would fail."""
    model = make_encoder_decoder("bart", max_position_embeddings=12)
    given = {"model": model, "tokenizer": make_encoder_tokenizer("<s> $A </s>"), "train_dataset": as_stream(LONG)}
    setting = said.split()[0]
    with pytest.raises(ValueError, match=rf"^{said}.* a table of 12 positions.* set {setting} to 12.*--{setting} 12"):
        make_any_trainer(tmp_path, **given, **{**BART, **changes})
    make_any_trainer(tmp_path, max_steps=1, **given, **BART).train()


def test_computed_positions_go_on_and_a_line_says_so(tmp_path, capsys):
    model = make_model("llama", max_position_embeddings=12)
    make_trainer(tmp_path, model, LONG, layout="padded")
    said = "there is a sequence of 19 tokens, and LlamaForCausalLM was made for 12 positions"
    assert capsys.readouterr().out.count(said) == 1
    make_trainer(tmp_path, model, PAIRS[:1], layout="padded")
    assert "positions" not in capsys.readouterr().out


def test_prepared_rows_longer_than_the_limit_are_refused():
    prepared, _ = prepare(LONG * 2, Limits(max_length=64))
    message = r"2 of 2 rows of the train set come as more than max_length \(8\) tokens, the first is row 0 with 19: "
    for data in (prepared, prepared.to_iterable_dataset(), datasets.Dataset.from_list(prepared.to_list())):
        with pytest.raises(ValueError, match=message):
            list(prepare(data, Limits(max_length=8))[0])
        assert len(list(prepare(data, Limits(max_length=19))[0])) == 2


def test_prepared_rows_keep_what_they_were_prepared_with(tmp_path):
    prepared, _ = prepare(ROWS, Limits(max_length=24))
    prepared.select(range(2)).save_to_disk(tmp_path / "rows")
    for data in (prepared, prepared.filter(lambda row: True), datasets.load_from_disk(tmp_path / "rows")):
        assert prepare(data, Limits(max_length=24))[1] == []
        assert prepare(data, Limits(max_length=64))[1] == [
            "train: the rows come as tokens, made with max_length 24, which is 64 now: what was cut or left out then "
            "stays so"
        ]
        other = trace_tokenizer()
        other.eos_token = "<|im_end|>"
        with pytest.raises(ValueError, match="come as tokens, which another tokenizer made"):
            prepare_dataset(data, other, Limits(max_length=24))


def of_encoder_decoder(tmp_path, rows, kind="bart", **settings):
    tokenizer = make_encoder_tokenizer("<s> $A </s>" if kind == "bart" else "$A </s>")
    model = make_encoder_decoder(kind, **settings.pop("changes", {}))
    return make_any_trainer(tmp_path, model, rows, tokenizer=tokenizer, **settings)


def test_an_encoder_decoder_counts_prompt_and_answer_each_by_itself(tmp_path, capsys):
    rows = [
        {"prompt": "hello", "chosen": "how", "rejected": "you"},
        {"prompt": "hello", "chosen": WORDS, "rejected": "x"},
    ]
    whole = of_encoder_decoder(tmp_path, rows).train_dataset
    prompt, answer = (whole[1][f"chosen_{part}"] for part in ("prompt_length", "input_ids"))
    most = len(answer) - prompt
    assert prompt < most < len(answer)
    # Together they are longer than max_length, which either part may have.
    trainer = of_encoder_decoder(tmp_path, rows, max_length=most, truncation="drop")
    assert len(trainer.train_dataset) == 2 and trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0
    for most_of, what in (({"max_length": most - 1}, "an answer"), ({"max_prompt_length": prompt - 1}, "a prompt")):
        capsys.readouterr()
        if what == "a prompt":
            with pytest.raises(ValueError, match=f"2 pairs with a prompt of more than {prompt - 1} tokens"):
                of_encoder_decoder(tmp_path, rows, truncation="drop", **most_of)
        else:
            of_encoder_decoder(tmp_path, rows, truncation="drop", **most_of)
            assert f"1 pair with an answer of more than {most - 1} tokens (row 1)" in capsys.readouterr().out
    of_encoder_decoder(tmp_path, rows, max_length=most - 1)
    assert "of the kept, 1 chosen and 0 rejected answers are cut" in capsys.readouterr().out
    # A table of positions is for each part too.
    of_encoder_decoder(tmp_path, rows, changes={"max_position_embeddings": most})
    with pytest.raises(
        ValueError, match=rf"there is a sequence of {most} tokens; .* has a table of {most - 1} positions"
    ):
        of_encoder_decoder(tmp_path, rows, changes={"max_position_embeddings": most - 1})
