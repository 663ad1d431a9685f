"""The pull of each term, measured without changing the run."""

import pytest
import torch
from test_trainer import logged, make_trainer
from tiny import make_model, reference_loss

from orpo import ORPOTrainer
from orpo.trainer.diagnose import pair_statistics


def reference_norm(loss, model):
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients]).norm().item()


def test_gradient_norms_are_those_of_the_two_terms(tmp_path):
    trainer = make_trainer(tmp_path, diagnose=True, beta=0.5, per_device_train_batch_size=7, max_steps=1)
    model, examples = make_model("llama"), list(trainer.train_dataset)
    nll = reference_norm(reference_loss(model, examples, beta=0.0), model)
    both = reference_loss(model, examples, beta=0.5)
    odds_ratio = reference_norm(both - reference_loss(model, examples, beta=0.0), model)
    trainer.train()
    assert logged(trainer, "diagnose/grad_norm_nll") == [pytest.approx(nll, rel=1e-4)]
    assert logged(trainer, "diagnose/grad_norm_odds_ratio") == [pytest.approx(odds_ratio, rel=1e-4)]
    assert 0 < logged(trainer, "diagnose/delta")[0] < 1


def test_the_run_is_the_same(tmp_path):
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 2, "disable_dropout": False}
    runs = []
    for diagnose in (False, True):
        model = make_model("gpt2", n_embd=32, n_layer=2, n_head=4)
        trainer = make_trainer(tmp_path, model=model, diagnose=diagnose, **settings)
        trainer.train()
        runs.append((logged(trainer, "loss"), logged(trainer, "diagnose/delta"), trainer.model.state_dict()))
    (loss, without, weights), (loss_2, with_it, weights_2) = runs
    assert loss == loss_2 and not without and len(with_it) == 2
    assert all(torch.equal(weights[name], weights_2[name]) for name in weights)


def test_pair_statistics():
    log_odds = torch.tensor([0.0, 4.0, -50.0, 9.0])
    found = pair_statistics(log_odds, torch.tensor([True, True, True, False]))
    assert found["diagnose/delta"].item() == pytest.approx((0.5 + 0.017986 + 1.0) / 3, rel=1e-4)
    assert found["diagnose/separated"].item() == pytest.approx(1 / 3)


def test_sharded_gradients_are_refused(tmp_path):
    with pytest.raises(ValueError, match="diagnose needs whole gradients"):
        make_trainer(tmp_path, diagnose=True, fsdp=True)


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_engines_of_accelerate_launch_are_seen(engine, tmp_path, monkeypatch):
    """They are in no argument."""
    original = ORPOTrainer.create_accelerator_and_postprocess

    def create(self):
        original(self)
        setattr(self, engine, True)

    monkeypatch.setattr(ORPOTrainer, "create_accelerator_and_postprocess", create)
    with pytest.raises(ValueError, match="diagnose needs whole gradients"):
        make_trainer(tmp_path, diagnose=True)
