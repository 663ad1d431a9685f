"""Sets without pairs, several sets, and metrics that no evaluation has."""

import datasets
import pytest
from tiny import ROWS, SEVEN
from trainers import make_trainer

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
