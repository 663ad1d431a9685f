"""Sets without pairs, several sets, and metrics that no evaluation has."""

import datasets
import pytest
from tiny import ROWS, SEVEN, make_tokenizer
from trainers import make_trainer

from orpo.data.prepare import Limits, prepare_dataset
from orpo.tokens.pretokenized import COLUMNS
from orpo.trainer.means import EVALUATED

DROPPED = [{"prompt": "a", "chosen": "", "rejected": "b"}] * 3


def stream(rows):
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


@pytest.fixture
def trainer(tmp_path):
    return make_trainer(tmp_path, eval_dataset=SEVEN, layout="padded")


def test_the_names_of_the_metrics_are_those_of_an_evaluation(trainer):
    found = {name.removeprefix("eval_") for name in trainer.evaluate()}
    assert found - {"epoch", "model_preparation_time"} == EVALUATED


@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_a_stream_without_a_pair_is_refused_with_what_was_dropped(call, trainer, tmp_path):
    with pytest.raises(ValueError, match=r"no row of the stream can train: .*kept 0 of 3: 3 empty answers"):
        getattr(trainer, call)(stream(DROPPED))
    with pytest.raises(ValueError, match=r"no row of the stream can train: eval \(b\)"):
        make_trainer(tmp_path, eval_dataset={"a": SEVEN, "b": stream(DROPPED)})


def test_a_stream_is_counted_once(trainer, capsys):
    trainer.evaluate(stream(ROWS + DROPPED))
    assert "kept 7 of 10: 3 empty answers" in capsys.readouterr().out


def test_a_batch_that_is_never_full_is_no_evaluation(tmp_path):
    trainer = make_trainer(
        tmp_path, eval_dataset=SEVEN, dataloader_drop_last=True, per_device_eval_batch_size=8, layout="padded"
    )
    with pytest.raises(ValueError, match=r"the eval set gave no batch .* than per_device_eval_batch_size \(8\)"):
        trainer.evaluate()


def test_no_set_and_several_are_told_apart(trainer, tmp_path):
    with pytest.raises(ValueError, match="the eval set is an empty dict"):
        trainer.evaluate({})
    with pytest.raises(ValueError, match="the eval set is an empty dict"):
        make_trainer(tmp_path, eval_dataset={})
    with pytest.raises(ValueError, match="predict takes one data set, not a dict with a, b: call it for each"):
        trainer.predict({"a": ROWS, "b": ROWS})
    with pytest.raises(ValueError, match="predict takes one data set, not None"):
        trainer.predict(None)


@pytest.mark.parametrize(
    ("data", "metric", "message"),
    [
        (SEVEN, "rewards/margin", "metric_for_best_model is 'rewards/margin'; it has to be one of .*rewards/margins"),
        ({"a": SEVEN, "b": SEVEN}, None, "metric_for_best_model is 'loss'; it has to be one of .*a_loss, .*b_loss"),
    ],
    ids=["misspelt", "of no set"],
)
def test_a_metric_that_no_evaluation_has_is_refused_before_training(data, metric, message, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric}
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, eval_dataset=data, **every, **best)


@pytest.mark.parametrize(
    ("data", "metric"),
    [(SEVEN, "eval_rewards/margins"), ({"a": SEVEN, "b": SEVEN}, "b_loss"), (SEVEN, "own")],
    ids=["one set", "several", "of compute_metrics"],
)
def test_a_metric_that_an_evaluation_has_chooses_the_best(data, metric, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric}
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    own = (lambda seen: {"own": float(seen.predictions.mean())}) if metric == "own" else None
    trainer = make_trainer(tmp_path, eval_dataset=data, compute_metrics=own, layout="padded", **every, **best)
    trainer.train()
    assert trainer.state.best_metric is not None


def forms(rows):
    """The same rows in every form that an evaluation takes, prepared ones too."""
    prepared = prepare_dataset(rows, make_tokenizer(), Limits(), report=lambda _: None)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    tokens = {name: prepared[name] for name in COLUMNS}
    return {
        "list": rows,
        "dict of lists": columns,
        "Dataset": datasets.Dataset.from_list(rows),
        "stream": stream(rows),
        "prepared": prepared,
        "dict of tokens": {name: list(column) for name, column in tokens.items()},
    }


@pytest.mark.parametrize("form", forms(ROWS))
def test_evaluate_and_predict_take_every_form(form, trainer):
    expected = trainer.evaluate()
    data = forms(ROWS)[form]
    found = trainer.evaluate(data, metric_key_prefix="held")
    assert {f"held_{name}" for name in EVALUATED} <= found.keys()
    assert found["held_loss"] == expected["eval_loss"]
    several = trainer.evaluate({"a": data, "b": ROWS[:2]}, metric_key_prefix="held")
    assert several["held_a_loss"] == expected["eval_loss"] != several["held_b_loss"]
    output = trainer.predict(data, metric_key_prefix="held")
    assert output.predictions.shape == (7, 2) and output.metrics["held_loss"] == expected["eval_loss"]


def test_rows_of_an_evaluation_are_named_as_those_of_training_are(trainer):
    with pytest.raises(ValueError, match=r"eval: 1 of 8 rows cannot be read .*\n  row 7: row with null"):
        trainer.evaluate([*ROWS, {**ROWS[0], "chosen": None}])
    with pytest.raises(ValueError, match=r"eval \(b\), the first rows: 1 of 1 rows cannot be read"):
        trainer.evaluate({"a": ROWS, "b": [{**ROWS[0], "chosen": None}]})
    with pytest.raises(ValueError, match="a data set needs the columns"):
        trainer.predict([{"text": "a"}])


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("batches", [False, True])
def test_metrics_are_given_the_losses_and_inputs_that_they_ask_for(layout, batches, tmp_path):
    seen = []

    def own(given, compute_result=True):
        inputs = given.inputs["input_ids"] if isinstance(given.inputs, dict) else given.inputs
        seen.append((given.predictions, given.losses, inputs))
        return {"own": len(given.predictions)}

    trainer = make_trainer(
        tmp_path,
        eval_dataset=ROWS,
        layout=layout,
        compute_metrics=own,
        include_for_metrics=["loss", "inputs"],
        batch_eval_metrics=batches,
        per_device_eval_batch_size=4,
    )
    plain = make_trainer(tmp_path, eval_dataset=ROWS, layout=layout, per_device_eval_batch_size=4)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert [len(predictions) for predictions, _, _ in seen] == ([4, 3] if batches else [7])
    rows = [row for _, _, inputs in seen for row in inputs.tolist()]
    expected = [
        pair["chosen_input_ids"] + pair["rejected_input_ids"][pair["rejected_prompt_length"] :]
        for pair in trainer.eval_dataset
    ]
    assert [[token for token in row if token != -100] for row in rows] == expected
    if not batches:
        assert seen[0][1].shape == (7,)
        assert len({*seen[0][1][:4].tolist()}) == len({*seen[0][1][4:].tolist()}) == 1
    # Training knows nothing of them.
    trainer.train()


def test_a_name_of_no_evaluation_set_is_answered_with_those_there_are(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset={"a": SEVEN, "b": SEVEN}, layout="padded")
    with pytest.raises(ValueError, match="'c' names no evaluation set of this trainer; it has 'a', 'b'"):
        trainer.evaluate("c")
    assert any("loss" in name for name in trainer.evaluate("b"))
    with pytest.raises(ValueError, match="'a' names no evaluation set of this trainer; it has no named ones: give a d"):
        make_trainer(tmp_path, eval_dataset=SEVEN, layout="padded").evaluate("a")
