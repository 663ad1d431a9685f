"""Whenever the signal comes, the run goes on later with the losses of one that had no signal."""

import pytest
from tiny import make_model
from trainers import logged, make_trainer
from transformers import TrainerCallback

from orpo.runs.find_checkpoint import complete_checkpoints, find_checkpoint


def manager_of(trainer):
    (manager,) = [c.jit_manager for c in trainer.callback_handler.callbacks if hasattr(c, "jit_manager")]
    return manager


class SignalAt(TrainerCallback):
    """What transformers' handler of SIGTERM does in the end, at an event of a step."""

    def __init__(self, trainer, event, step):
        def ask(args, state, control, **_):
            if state.global_step == step:
                manager_of(trainer).is_checkpoint_requested = True

        setattr(self, event, ask)


def make_run(folder, **settings):
    # Two steps an epoch. Dropout shows whether random states were resumed.
    model = make_model("llama", num_hidden_layers=1, attention_dropout=0.2)
    changed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, **settings}
    return make_trainer(folder, model, layout="padded", disable_dropout=False, gradient_checkpointing=False, **changed)


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    trainer = make_run(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return logged(trainer, "loss")


@pytest.mark.parametrize(
    ("event", "step", "left"),
    [
        ("on_train_begin", 0, 1),
        ("on_step_begin", 2, 3),
        ("on_substep_end", 2, 3),
        ("on_pre_optimizer_step", 1, 2),
        ("on_step_end", 1, 1),
        ("on_log", 2, 2),
    ],
)
def test_no_moment_of_the_signal_changes_the_losses(event, step, left, tmp_path, losses):
    trainer = make_run(tmp_path, enable_jit_checkpoint=True)
    trainer.callback_handler.callbacks.insert(0, SignalAt(trainer, event, step))
    trainer.train()
    assert trainer.interrupted and trainer.state.global_step == left
    assert [path.name for path in complete_checkpoints(tmp_path)] == [f"checkpoint-{left}"]
    resumed = make_run(tmp_path)
    resumed.train("auto")
    assert resumed._initial_global_step == left and logged(resumed, "loss") == losses


def test_a_run_that_is_killed_while_it_saves_keeps_the_checkpoint_of_that_very_step(tmp_path):
    trainer = make_run(tmp_path, enable_jit_checkpoint=True, save_strategy="steps", save_steps=2)
    # After the save of the epoch's last step.
    trainer.callback_handler.callbacks.insert(0, SignalAt(trainer, "on_save", 2))
    plain, seen = trainer._save_rng_state, []

    def save_rng_state(output_dir):
        seen.append([path.name for path in complete_checkpoints(tmp_path)])
        plain(output_dir)

    trainer._save_rng_state = save_rng_state
    trainer.train()
    assert seen == [[], ["checkpoint-2"]] and trainer.interrupted


def test_the_sign_of_an_interrupted_save_is_of_no_later_one(tmp_path):
    """Left by transformers' own callback: beside a checkpoint that had been whole, and alone."""
    make_run(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-3").mkdir()
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}/checkpoint-is-incomplete.txt").touch()
    assert find_checkpoint("auto", tmp_path) == tmp_path / "checkpoint-2"
    trainer = make_run(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train("auto")
    assert not trainer.interrupted
    assert [path.name for path in complete_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (2, 3, 4)]


def test_a_signal_that_one_rank_has_seen_ends_all_at_the_same_step(tmp_path, monkeypatch):
    trainer = make_run(tmp_path, enable_jit_checkpoint=True)
    (callback,) = [c for c in trainer.callback_handler.callbacks if hasattr(c, "jit_manager")]
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    for others, asked in ((0, False), (1, True)):
        monkeypatch.setattr(trainer.accelerator, "reduce", lambda flag, n=others: flag + n)
        control = trainer.control.__class__()
        callback.on_step_end(trainer.args, trainer.state, control)
        assert control.should_save == control.should_training_stop == trainer.interrupted == asked
