"""hyperparameter_search: transformers' own driver with each trial's model made by model_init."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from tiny import SEVEN, make_model, make_tokenizer
from trainers import make_args

from orpo import ORPOTrainer


class Trial:
    """Of optuna, what the driver asks of a trial."""

    def __init__(self, number, params):
        self.number, self.params = number, params


class Study:
    def optimize(self, objective, n_trials, **_):
        rates = (1e-3, 1e-2, 1e-1)
        self.trials = [Trial(i, {"learning_rate": rates[i]}) for i in range(n_trials)]
        for trial in self.trials:
            trial.value = objective(trial)
        self.best_trial = min(self.trials, key=lambda trial: trial.value)

    def _is_multi_objective(self):
        return False


@pytest.fixture
def optuna(monkeypatch):
    """A stand-in for the package, which chooses nothing: transformers' driver around it is the real one."""
    study = Study()
    stand_in = ModuleType("optuna")
    stand_in.__spec__ = ModuleSpec("optuna", None)
    stand_in.Trial, stand_in.trial = Trial, SimpleNamespace(BaseTrial=Trial)
    stand_in.create_study = lambda **_: study
    monkeypatch.setitem(sys.modules, "optuna", stand_in)
    return study


def test_a_search_trains_each_trial_with_its_own_settings_and_saves_it(optuna, tmp_path):
    made = []

    def model_init(trial):
        made.append(trial)
        return make_model("llama")

    args = make_args(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    data = {"train_dataset": SEVEN, "eval_dataset": SEVEN, "processing_class": make_tokenizer()}
    trainer = ORPOTrainer(model_init=model_init, args=args, **data)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: trial.params,
        compute_objective=lambda metrics: metrics["eval_loss"],
        backend="optuna",
        n_trials=2,
    )
    losses = [trial.value for trial in optuna.trials]
    assert losses[0] > losses[1] == best.objective and best.hyperparameters == {"learning_rate": 1e-2}
    assert made[-2:] == optuna.trials
    for i, rate in enumerate((1e-3, 1e-2)):
        record = json.loads((tmp_path / f"run-{i}/checkpoint-2/orpo_run.json").read_text())
        assert record["run"]["learning_rate"] == rate
    # The search leaves no model behind; the best settings are trained with as its documentation says.
    trainer.args.learning_rate = best.hyperparameters["learning_rate"]
    assert trainer.train().global_step == 2
