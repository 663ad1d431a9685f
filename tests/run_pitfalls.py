"""Runs with one mistake put back: what a trainer on several ranks can get wrong without an error."""

from dataclasses import asdict, replace
from types import MethodType

import torch
from run_ranks import finish, make_trainer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import orpo.trainer.trainer
from orpo.layouts.prefix_mask import SharedPrefixMask
from orpo.loss import orpo_loss_from_rows
from orpo.model.attach import ORPOModelOutput


def full_tensor(trainer, seen):
    """The head's weight is put together beside its forward; gradients then stay those of one rank."""
    model, fused = trainer.model, trainer.model._orpo_head
    plain = model.forward

    def forward(self, *args, orpo=None, **kwargs):
        if orpo is None or isinstance(orpo, torch.Tensor):
            return plain(*args, orpo=orpo, **kwargs)
        if isinstance(kwargs["attention_mask"], SharedPrefixMask):
            kwargs["attention_mask"] = kwargs["attention_mask"].for_model(self)
        hidden, _ = fused.run_to_head(torch.zeros(1, 1, 1), args, {**kwargs, "use_cache": False})
        weight = self.lm_head.weight
        seen["whole"] = isinstance(weight, DTensor)
        out = orpo_loss_from_rows(
            hidden, weight.full_tensor() if seen["whole"] else weight, orpo.rows, **asdict(orpo.settings)
        )
        names = ("loss", "nll_loss", "odds_ratio_loss", "chosen_logps", "rejected_logps", "log_odds", "pair_mask")
        return ORPOModelOutput(**{n: getattr(out, n) for n in names}, metrics=out.metrics(logits=orpo.logit_metrics))

    model.forward = MethodType(forward, model)


def bypassed_forward(trainer, seen):
    """The model inside the wrapper is called, whose hooks reduce gradients and gather weights."""
    run = trainer._run
    trainer._run = lambda model, *args, **settings: run(trainer.accelerator.unwrap_model(model), *args, **settings)


def float_counts(trainer, seen):
    """The counts travel as a float tensor among the model's arguments."""
    model, plain, run = trainer.model, trainer.model.forward, trainer._run
    seen["counts"] = []

    def forward(self, *args, counts=None, orpo=None, **kwargs):
        if counts is not None:
            tokens, pairs, *rows = counts.tolist()
            seen["counts"].append((tokens, pairs, *rows))
            orpo = replace(orpo, settings=replace(orpo.settings, num_nll_tokens=tokens, num_pairs=pairs))
        return plain(*args, orpo=orpo, **kwargs)

    def with_tensor(wrapped, inputs, counts, *args, **settings):
        return run(wrapped, {**inputs, "counts": torch.tensor(counts, dtype=torch.float32)}, counts, *args, **settings)

    model.forward = MethodType(forward, model)
    trainer._run = with_tensor


def micro_batch_means(trainer, seen):
    """Every micro-batch takes its own mean, and the step the mean of these."""
    trainer._get_num_items_in_batch = lambda *_: None


PITFALLS = {f.__name__: f for f in (full_tensor, bypassed_forward, float_counts, micro_batch_means)}


def train_in(folder, pitfall, options):
    """`run_ranks.train` in `pitfall`, or none. `head_alone`: in an FSDP group by itself."""
    options = dict(options)
    head_alone = options.pop("head_alone", False)
    if pitfall == "output_policy":
        orpo.trainer.trainer.prepare_ranks = lambda *_: None
    trainer, seen = make_trainer(folder, **options)
    if head_alone:
        fully_shard(trainer.model.lm_head)
    if pitfall in PITFALLS:
        PITFALLS[pitfall](trainer, seen)
    return finish(trainer, seen)
