"""orpo.runs.non_finite in a run: nothing that is not finite is saved, or replaces what was."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import SEVEN
from torch.distributed.fsdp import StateDictType
from trainers import make_trainer
from transformers import TrainerCallback

from orpo.runs.checkpoints import complete_checkpoints
from orpo.runs.non_finite import NonFiniteError, NonFiniteGuard

SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}


class Spike(TrainerCallback):
    """A weight that only the loss of step 3 meets."""

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 2:
            model.lm_head.weight.data[3, 4] = float("nan")


@pytest.mark.parametrize("late", [True, False], ids=["checked late", "checked at once"])
def test_a_step_is_checked_before_it_replaces_the_last_good_checkpoint(late, tmp_path, monkeypatch):
    # As on an accelerator, where a step is read while the next one runs.
    monkeypatch.setattr(NonFiniteGuard, "_would_wait", staticmethod(lambda step: late))
    trainer = make_trainer(tmp_path, **SAVING, logging_strategy="no")
    trainer.add_callback(Spike())
    with pytest.raises(NonFiniteError, match=r"the loss of step 3 on rank 0 is not finite: rows \[") as caught:
        trainer.train()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert caught.value.__notes__ == [f"{tmp_path}/checkpoint-2 is whole, and the next start resumes from it"]
    assert not (tmp_path / "_incomplete").exists()


def test_a_note_names_the_checkpoint_further_back(tmp_path):
    trainer = make_trainer(tmp_path, **{**SAVING, "save_total_limit": 3})
    trainer.add_callback(Spike())
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    assert f"--resume_from_checkpoint {tmp_path}/checkpoint-1 goes further back" in caught.value.__notes__[0]


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_weights_that_the_last_step_has_spoilt_are_not_saved(save_strategy, tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=1e39, max_steps=1, save_strategy=save_strategy, save_steps=1)
    with pytest.raises(NonFiniteError, match=r"after step 1 the weights are not finite \(.*\), and the model is not"):
        trainer.train()
        trainer.save_model()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_evaluation_without_a_number_ends_the_run_before_its_checkpoint(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e39}
    trainer = make_trainer(tmp_path, eval_dataset=SEVEN, **{**SAVING, **settings})
    with pytest.raises(NonFiniteError, match=r"the evaluation after step 1 gave no number: .*eval_loss is nan"):
        trainer.train()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_finite_run_is_not_refused(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=SEVEN, **{**SAVING, "eval_strategy": "steps"}, eval_steps=3)
    # Frozen weights are the user's own.
    trainer.model.model.norm.weight.requires_grad_(False).fill_(1.0)
    trainer.model.register_parameter("unused", torch.nn.Parameter(torch.tensor(float("inf")), requires_grad=False))
    trainer.train()
    assert json.loads((tmp_path / "checkpoint-6/trainer_state.json").read_text())["global_step"] == 6


def test_no_rank_waits_in_the_last_save_for_one_that_has_found_a_nan(tmp_path, monkeypatch):
    """Under FSDP each has its own part of a weight."""
    trainer = make_trainer(tmp_path)
    plugin = SimpleNamespace(state_dict_type=StateDictType.FULL_STATE_DICT)
    monkeypatch.setattr("orpo.runs.checkpoints.fsdp_plugin", lambda accelerator: plugin)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    seen = []
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda flag: seen.append(float(flag)) or flag + 1)
    with pytest.raises(NonFiniteError, match="another rank than 0 says what is not finite"):
        trainer.save_model()
    trainer.model.lm_head.weight.data[3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match="the weights are not finite"):
        trainer.save_model()
    assert seen == [0, 1] and not list(tmp_path.rglob("*.safetensors"))
