"""Runs in which nothing trains are refused, a loss that runs away is told once."""

import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from datasets import Dataset
from tiny import ROWS, SEVEN, make_model, make_tokenizer
from trainers import logged, make_args, make_trainer

from orpo import ORPOTrainer
from orpo.trainer.sanity import NothingTrainsError, RunawayLoss

ADAPTER = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def frozen(tmp_path, checkpointing):
    model = make_model().requires_grad_(False)
    return make_trainer(tmp_path, model, gradient_checkpointing=checkpointing)


def adapter_to_look_at(tmp_path, checkpointing):
    peft.get_peft_model(make_model(), ADAPTER).save_pretrained(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    return make_trainer(tmp_path, model, gradient_checkpointing=checkpointing)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("make", "remedy"), [(frozen, "give peft_config"), (adapter_to_look_at, "is_trainable=True")])
def test_a_model_of_which_nothing_is_trained_is_refused_before_the_first_step(make, remedy, checkpointing, tmp_path):
    trainer = make(tmp_path, checkpointing)
    with pytest.raises(NothingTrainsError, match=rf"requires_grad is False on all \d+ parameters.*{remedy}"):
        trainer.train()
    assert trainer.state.global_step == 0
    # To evaluate it is no mistake.
    assert trainer.evaluate(SEVEN)["eval_loss"] > 0


def test_an_optimizer_made_before_the_adapter_is_refused(tmp_path):
    model = make_model()
    data = {"train_dataset": SEVEN, "processing_class": make_tokenizer(), "peft_config": ADAPTER}
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = ORPOTrainer(model, make_args(tmp_path), optimizers=(optimizer, None), **data)
    with pytest.raises(NothingTrainsError, match="holds none of the model's 4 trained parameters"):
        trainer.train()


def test_an_own_optimizer_trains_again_and_again(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    data = {"train_dataset": SEVEN, "processing_class": make_tokenizer()}
    trainer = ORPOTrainer(model, make_args(tmp_path), optimizers=(optimizer, None), **data)
    for _ in range(2):
        trainer.train()
    assert len(logged(trainer, "loss")) == 2


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("settings", "cut", "said"),
    [({"beta": 0.0, "nll_weight": 0.0}, False, r"beta 0\.0, nll_weight 0\.0"), ({}, True, "a detach or no_grad")],
    ids=["no weights", "detached"],
)
def test_a_run_whose_every_gradient_is_0_is_refused(settings, cut, said, accumulation, tmp_path):
    model = make_model()
    if cut:
        # The head is frozen, and what reaches it has no history.
        model.lm_head.requires_grad_(False)
        model.model.norm.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    trainer = make_trainer(
        tmp_path, model, gradient_accumulation_steps=accumulation, per_device_train_batch_size=1, **settings
    )
    with pytest.raises(NothingTrainsError, match=f"every gradient of the first step is exactly 0.*{said}"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_first_step_in_which_nothing_counts_is_no_such_run(tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=1, max_steps=3)
    plain, calls = trainer.data_collator, []

    def emptied(examples):
        batch = plain(examples)
        calls.append(len(calls))
        return {**batch, "orpo": batch["orpo"].first(0)} if len(calls) == 1 else batch

    trainer.data_collator = emptied
    trainer.train()
    assert [norm == 0 for norm in logged(trainer, "grad_norm")] == [True, False, False]


def watch(losses):
    watcher = RunawayLoss(SimpleNamespace(learning_rate=50.0, beta=0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, loss in enumerate(losses, 1):
            # Two micro-batches.
            watcher.add(torch.tensor(loss / 2))
            watcher.add(torch.tensor(loss / 2))
            watcher.end_step(step)
        watcher.flush()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    "losses",
    [
        [7.0, 80.0, 300.0, 116_200.0],
        [7.0] * 30 + [100.0, 90.0, 110.0] * 9,
        # Slowly: a quarter more each step.
        [6.0 * 1.25**i for i in range(40)],
        [7.0] * 100 + [1e3] * 5 + [1e6] * 50,
    ],
    ids=["at once", "after a while", "slowly", "twice"],
)
def test_a_loss_that_multiplies_is_told_once(losses):
    (message,) = watch(losses)
    assert "Lower learning_rate (now 50.0) or beta (now 0.1)" in message


@pytest.mark.parametrize(
    "losses",
    [
        [7.0, 69.0, 69.0, 69.0, 60.0],
        [7.0] * 5 + [500.0] + [7.0] * 5 + [500.0, 500.0] + [7.0] * 5,
        [6.0, 1.0, 0.1, *[0.01] * 30, 0.2, 0.2, 0.2, 0.2],
        [6.0, 0.3, 4.0, 8.0, 0.2, 5.0, 6.0, 0.4, 7.0, 8.0, 3.0] * 3,
        [661_638.0, 663_853.0, 643_348.0, 877_940.0] * 5,
        [7.0, 100.0],
    ],
    ids=["less than 10 times", "single steps", "below the first", "small batches", "high all along", "two steps"],
)
def test_a_loss_that_does_not_run_away_is_not_told(losses):
    assert watch(losses) == []


def test_a_learning_rate_that_is_far_too_high_is_told_in_training(tmp_path):
    with pytest.warns(UserWarning, match=r"Lower learning_rate \(now 50\.0\)") as caught:
        make_trainer(tmp_path, learning_rate=50.0, max_steps=6).train()
    assert sum("diverges" in str(warning.message) for warning in caught) == 1


def test_a_stream_that_fills_no_step_is_refused(tmp_path):
    """Trainer only warns, and the untrained model would be saved as the result."""
    stream = Dataset.from_list(ROWS[:3]).to_iterable_dataset()
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2}
    with pytest.raises(NothingTrainsError, match="no optimizer step was taken"):
        make_trainer(tmp_path, train_dataset=stream, **settings).train()


def test_a_batch_that_did_not_fit_leaves_nothing_behind(tmp_path):
    """With auto_find_batch_size the loop begins anew, with a smaller batch."""

    def run(folder, **settings):
        trainer = make_trainer(folder, gradient_accumulation_steps=2, layout="padded", **settings)
        plain, calls = trainer.compute_loss, []

        def compute_loss(*args, **kwargs):
            loss = plain(*args, **kwargs)
            calls.append(loss)
            if trainer.args.auto_find_batch_size and len(calls) == 1:
                raise RuntimeError("CUDA out of memory.")
            return loss

        trainer.compute_loss = compute_loss
        trainer.train()
        return trainer

    found = run(tmp_path / "found", per_device_train_batch_size=2, auto_find_batch_size=True)
    told = run(tmp_path / "told", per_device_train_batch_size=found._train_batch_size)
    assert found._train_batch_size < 2 and len(logged(told, "nll_loss")) == 2
    for name in ("nll_loss", "log_odds_ratio", "logps/chosen", "loss"):
        assert logged(found, name) == pytest.approx(logged(told, name), rel=1e-6), name
    assert found._runaway.first == told._runaway.first
