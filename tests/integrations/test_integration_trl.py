"""TRL's own trainers with this project's log-probabilities: the same losses, metrics and gradients, no full logits."""

import pytest
import torch
from record_trl_trace import EVALUATED, SETTINGS, trace_model, trace_pairs, trace_tokenizer
from tiny import make_encoder_decoder, make_model
from torch.utils._python_dispatch import TorchDispatchMode

trl = pytest.importorskip("trl", reason="needs TRL: pip install '.[paper]'")

import datasets  # noqa: E402

import orpo.integrations.trl as fused  # noqa: E402
from orpo import orpo_loss  # noqa: E402


@pytest.fixture(autouse=True)
def unpatched():
    yield
    fused.unpatch()


def make_trainer(folder, kind="orpo", model=None, **settings):
    trainer = fused.trainers()[kind == "cpo"]
    config = getattr(__import__(trainer.__module__, fromlist=["_"]), f"{kind.upper()}Config")
    pairs = datasets.Dataset.from_list(trace_pairs())
    settings = {**SETTINGS, "max_steps": 3, "max_prompt_length": 30, **settings}
    # Older versions draw rows at random, and have a limit of prompts; both by the same seed in every run.
    known = {name: value for name, value in settings.items() if name in config.__dataclass_fields__}
    return trainer(
        model or trace_model(),
        config(output_dir=str(folder), **known),
        processing_class=trace_tokenizer(),
        train_dataset=pairs,
        eval_dataset=pairs.select(range(EVALUATED)),
    )


def what_it_logs(trainer):
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry] + [trainer.evaluate()]
    measured = ("runtime", "per_second", "total_flos")
    return [{name: value for name, value in entry.items() if not name.endswith(measured)} for entry in logs]


def gemma():
    return make_model("gemma2", vocab_size=264, final_logit_softcapping=5.0, query_pre_attn_scalar=8)


def mixtral():
    return make_model("mixtral", vocab_size=264, num_local_experts=4, output_router_logits=True)


RUNS = {
    "orpo": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "orpo, softcap": {"model": gemma},
    "orpo, experts": {"model": mixtral},
    "cpo": {"kind": "cpo", "beta": 0.5},
    "simpo": {"kind": "cpo", "loss_type": "simpo", "cpo_alpha": 0.5},
}


@pytest.mark.parametrize("name", RUNS)
def test_trls_trainer_logs_the_same(name, tmp_path):
    runs = []
    for patched in (False, True):
        settings = dict(RUNS[name])
        if "model" in settings:
            settings["model"] = settings["model"]()
        fused.patch() if patched else fused.unpatch()
        runs.append(what_it_logs(make_trainer(tmp_path, **settings)))
    assert len(runs[0]) == 4 and {"loss", "grad_norm", "rewards/margins", "logits/chosen", "nll_loss"} <= {*runs[0][0]}
    for theirs, ours in zip(*runs, strict=True):
        assert ours.keys() == theirs.keys()
        for metric, value in theirs.items():
            assert ours[metric] == pytest.approx(value, rel=1e-5, abs=1e-5), metric


def test_an_encoder_decoder_is_refused(tmp_path):
    """Its labels are not shifted: as a causal model's they would be the next position's."""
    fused.patch()
    with pytest.raises(ValueError, match=r"encoder-decoder.*unpatch"):
        make_trainer(tmp_path, model=make_encoder_decoder("t5"))


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operator returns."""

    bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.parametrize("kind", ["orpo", "cpo"])
def test_gradients_are_trls_and_full_logits_are_not_made(kind, tmp_path):
    # 8 sequences of up to 50 positions: logits of 8 * 50 * 60,000 * 4 bytes, 92 MiB, where a strip has 32.
    trainer = make_trainer(tmp_path, kind, make_model("llama", vocab_size=60_000))
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    results = []
    for patched in (False, True):
        fused.patch() if patched else fused.unpatch()
        trainer.model.zero_grad()
        with Largest() as largest:
            loss = trainer.compute_loss(trainer.model, dict(batch))
            loss.backward()
        gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
        results.append((loss.item(), largest.bytes, gradients))
    (their_loss, their_bytes, theirs), (our_loss, our_bytes, ours) = results
    assert our_loss == pytest.approx(their_loss, rel=1e-6)
    sequences, length = (
        len(batch["chosen_labels"]) * 2,
        max(batch[f"{s}_labels"].shape[1] for s in ("chosen", "rejected")),
    )
    assert their_bytes >= sequences * (length - 1) * 60_000 * 4 > 64 * 2**20 > 34 * 2**20 > our_bytes
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-7), name


def test_a_pair_with_an_empty_answer_is_left_out_where_trl_gives_nan(tmp_path):
    fused.patch()
    trainer = make_trainer(tmp_path)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch["rejected_labels"][1] = -100
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in trainer.model.parameters())
    both = trainer.concatenated_inputs(batch)
    ids, mask, labels = (both[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
    hidden = trainer.model.model(ids, attention_mask=mask).last_hidden_state
    whole = ids[:4].where(mask[:4] == 1, -100)
    expected = orpo_loss(hidden, trainer.model.lm_head.weight, labels, nll_labels=whole, beta=SETTINGS["beta"])
    assert expected.pair_mask.tolist() == [True, False, True, True]
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    fused.unpatch()
    assert trainer.compute_loss(trainer.model, dict(batch)).isnan()


def test_patching_twice_is_as_once_and_is_taken_back():
    names = "concatenated_forward", "__init__", "odds_ratio_loss"
    before = [vars(cls).get(name) for cls in fused.trainers() for name in names]
    fused.patch()
    fused.patch()
    changed = [vars(cls).get(name) is not old for (cls, name), old in fused._replaced.originals.items()]
    assert len(changed) == 5 and all(changed)
    fused.unpatch()
    assert [vars(cls).get(name) for cls in fused.trainers() for name in names] == before


@pytest.mark.parametrize("version", ["0.23.1", "1.17.0", "2.0.0.dev0"])
def test_another_version_of_trl_is_refused(version, monkeypatch):
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=f"trl {version} is not known .* trl >=0.24,<1.17"):
        fused.patch()
    assert not fused._replaced.originals


def test_several_gpus_in_one_process_are_refused(tmp_path):
    fused.patch()
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="accelerate launch"):
        trainer.concatenated_forward(torch.nn.DataParallel(trainer.model), {})
