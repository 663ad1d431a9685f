"""The loss as a part of the model: a language model whose forward also takes ``orpo=``.

``model(input_ids, ..., orpo=LossCall(rows, ...))`` runs the model's own forward up to its head, and gives the hidden
states to ``head(hidden, orpo=...)``, which computes the loss in place of the logits (`LossCall.of_head`; another call
may ask the head for something else). The loss is a call of the head inside a call of the model, so that hooks on these
calls (FSDP's and ZeRO's gathering, DDP's reduction, autocast) work as for logits. A model spread over devices
(``device_map``) is refused, since it replaces modules' forwards. Only instances are patched; without ``orpo=`` both
forwards do what they did, so generation and saving do not change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from accelerate import PartialState
from orpo_kernels.rows import Rows
from orpo_kernels.settings import LossSettings
from torch import Tensor, nn
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.utils import ModelOutput

from orpo.layouts.prefix_mask import SharedPrefixMask, eager_where_flash_cannot_run, flash_precision
from orpo.loss.call import Names, check_row_arrays, run_orpo
from orpo.loss.own_part import own_part
from orpo.model.encoder_decoder import (
    added_bias,
    check_encoder_decoder,
    encode_once,
    is_encoder_decoder,
    without_bias,
)
from orpo.model.gathered import gathering, whole_shape
from orpo.model.head import head_operands, head_weight, trained_copy
from orpo.ranks import from_rank_0


@dataclass(frozen=True)
class LossCall:
    """The argument of ``model(..., orpo=)``: the rows to score, and how.

    Attributes:
        rows: row n reads ``hidden.reshape(-1, D)[rows.rows_N[n]]``.
        settings: of the loss. Scale and softcap come from the head.
        logit_metrics: whether ``metrics`` holds TRL's logits/*.
        bias: (V,), what the model itself adds to its head's output; set by the model's forward.
    """

    rows: Rows
    settings: LossSettings = field(default_factory=LossSettings)
    logit_metrics: bool = False
    bias: Tensor | None = None

    def of_head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> dict[str, Any]:
        """What the head returns for these hidden states."""
        settings = replace(self.settings, logit_scale=transform.scale, logit_softcap=transform.softcap)
        check_row_arrays(self.rows, hidden)
        # A head that transformers' tp_plan has cut over ranks.
        hidden, weight, bias, group = own_part(hidden, weight, bias, None, Names())
        out = run_orpo(hidden, weight, bias, self.rows, settings, "rows", group=group)
        names = ("loss", "nll_loss", "odds_ratio_loss", "chosen_logps", "rejected_logps", "log_odds", "pair_mask")
        return {name: getattr(out, name) for name in names} | {"metrics": out.metrics(logits=self.logit_metrics)}

    @staticmethod
    def output(**values: Any) -> ORPOModelOutput:
        """What the model returns, made of the head's values."""
        return ORPOModelOutput(**values)


@dataclass
class ORPOModelOutput(ModelOutput):
    """What ``model(..., orpo=)`` returns; all but `loss` and `aux_loss` are detached.

    Attributes:
        loss: scalar, Eq. 5 without the router's loss.
        nll_loss, odds_ratio_loss: scalars, its two terms without their weights.
        chosen_logps, rejected_logps, log_odds: (P,), mean log-probability of each answer, and the log odds ratio.
        pair_mask: bool (P,), the pair has response tokens on both sides.
        metrics: TRL's metrics of this batch, scalars by name.
        aux_loss: scalar, the router's load-balancing loss where the model computes one, without its coefficient.
    """

    loss: Tensor | None = None
    nll_loss: Tensor | None = None
    odds_ratio_loss: Tensor | None = None
    chosen_logps: Tensor | None = None
    rejected_logps: Tensor | None = None
    log_odds: Tensor | None = None
    pair_mask: Tensor | None = None
    metrics: dict[str, Tensor] | None = None
    aux_loss: Tensor | None = None


@dataclass(frozen=True)
class LogitTransform:
    """The logits are ``softcap * tanh(scale * head(hidden) / softcap)``, or ``scale * head(hidden)`` without a cap."""

    scale: float = 1.0
    softcap: float | None = None


class _StandIn:
    """Takes a head's place, with its attributes; notes its argument and returns a constant."""

    def __init__(self, head: nn.Module, output: Tensor) -> None:
        self.head, self.output = head, output
        self.seen: list[Tensor] = []

    def __call__(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self.seen.append(hidden)
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)


@dataclass
class FusedHead:
    """The head of a patched model, and where it is.

    Attributes:
        name: its dotted name.
        owner, attribute: ``getattr(owner, attribute)`` is what the model's forward calls.
        model_forward: the model's own forward, bound.
        transform: what the model does to the head's output.
    """

    name: str
    owner: nn.Module
    attribute: str
    model_forward: Callable[..., Any]
    transform: LogitTransform = LogitTransform()

    def run_to_head(self, stand_in: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Runs the model's forward with `stand_in` as its head: (the head's input, the forward's output)."""
        stand_in_head = _StandIn(getattr(self.owner, self.attribute), stand_in)
        # Python finds the instance's __dict__ before the registered modules, which need no change then.
        self.owner.__dict__[self.attribute] = stand_in_head
        try:
            outputs = self.model_forward(*args, **{**kwargs, "return_dict": True})
        finally:
            del self.owner.__dict__[self.attribute]
        if len(stand_in_head.seen) != 1:
            raise ValueError(
                f"the model calls its output embeddings ({self.name}) {len(stand_in_head.seen)} times in one forward; "
                "the fused loss needs exactly one call"
            )
        return stand_in_head.seen[0], outputs


def attach_orpo_loss(model: nn.Module) -> FusedHead:
    """Lets ``model(..., orpo=LossCall)`` compute the loss. A second call, also around a new adapter, is harmless.

    Args:
        model: a language model of transformers, causal or with an encoder, or a PEFT model around one.

    Raises:
        ValueError: the model is spread over devices, or has a head or an encoder that the fused loss does not work
            with.
    """
    base = base_model(model)
    check_encoder_decoder(base)
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values()):
        raise ValueError("prompt-learning adapters put tokens of their own before the batch's; use LoRA or the like")
    devices = {str(device) for device in (getattr(base, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise ValueError(
            f"device_map has spread the model over {', '.join(sorted(devices))}; the fused loss needs its head where "
            "the hidden states are: load it on one device (device_map={'': 0}), or shard it with FSDP"
        )
    head = base.get_output_embeddings()
    names = [name for name, module in base.named_modules() if module is head]
    if head is None or not names:
        raise ValueError(f"{type(base).__name__} has no output embeddings (get_output_embeddings() gives none)")
    head_weight(trained_copy(head))
    if "_orpo_head" not in base.__dict__:
        owner, _, attribute = names[0].rpartition(".")
        fused = FusedHead(names[0], base.get_submodule(owner), attribute, base.forward)
        _patch_model(base, fused)
        try:
            fused.transform = _transform_of_all_ranks(base, fused)
        except BaseException:
            _unpatch_model(base, fused)
            raise
    _patch_head(trained_copy(head), base._orpo_head.transform)
    return base._orpo_head


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def embeddings(model: nn.Module) -> int:
    """How many tokens the model, or the one inside a PEFT model, has embeddings for."""
    return whole_shape(base_model(model).get_input_embeddings().weight)[0]


# The patched forwards reach their state through self: with a closure, a deep copy of the model would run the original.
def _patch_model(model: nn.Module, fused: FusedHead) -> None:
    signature = inspect.signature(type(model).forward)

    def forward(self: nn.Module, *args: Any, orpo: LossCall | Tensor | None = None, **kwargs: Any) -> Any:
        fused = self._orpo_head
        if isinstance(kwargs.get("attention_mask"), SharedPrefixMask):
            kwargs |= kwargs["attention_mask"].arguments_for(self)
        if orpo is None:
            return fused.model_forward(*args, **kwargs)
        if isinstance(orpo, Tensor):
            return fused.run_to_head(orpo, args, kwargs)[1]
        if "use_cache" in signature.parameters:
            # A key-value cache is of no use here, and would hide from transformers that sequences are packed.
            kwargs.setdefault("use_cache", False)
        if is_encoder_decoder(self):
            kwargs = encode_once(self, kwargs)
        hidden, outputs = fused.run_to_head(torch.zeros(1, 1, 1, device=self.device), args, kwargs)
        result = getattr(fused.owner, fused.attribute)(hidden, orpo=replace(orpo, bias=added_bias(self)))
        return orpo.output(**result, aux_loss=outputs.get("aux_loss"))

    # Generation reads the model's arguments off the signature. functools.wraps would also set __wrapped__, by which
    # accelerate's unwrapping would remove this patch.
    forward.__signature__ = signature
    model._orpo_head = fused
    model.forward = MethodType(forward, model)


def _unpatch_model(model: nn.Module, fused: FusedHead) -> None:
    """Removes the patch: a model that is refused goes back as it came."""
    del model.forward, model._orpo_head
    if model.forward != fused.model_forward:
        model.forward = fused.model_forward


def _patch_head(head: nn.Module, transform: LogitTransform) -> None:
    if "_orpo_transform" in head.__dict__:
        return

    def forward(self: nn.Module, hidden: Tensor, *args: Any, orpo: LossCall | None = None, **kwargs: Any) -> Any:
        if orpo is None:
            return self._orpo_plain_forward(hidden, *args, **kwargs)
        hidden, weight, bias = head_operands(self, hidden, orpo.bias)
        return orpo.of_head(hidden, weight, bias, self._orpo_transform)

    head._orpo_transform = transform
    head._orpo_plain_forward = head.forward
    head.forward = MethodType(forward, head)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode, and afterwards back in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def tiny_inputs(model: nn.Module, sequences: int, length: int) -> dict[str, Tensor]:
    """A few token ids, the same on every rank and in every run."""
    vocabulary = embeddings(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (sequences, length), generator=generator).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | {"decoder_input_ids": ids} if is_encoder_decoder(model) else inputs


def _transform_of_all_ranks(model: nn.Module, fused: FusedHead) -> LogitTransform:
    if is_fsdp_enabled():
        # With cpu_ram_efficient_loading only rank 0 has weights yet, so that only its model can run.
        return from_rank_0(PartialState(), lambda: _read_transform(model, fused))
    return _read_transform(model, fused)


@torch.no_grad()
def _read_transform(model: nn.Module, fused: FusedHead) -> LogitTransform:
    """What the model's forward does to the output of its head.

    The head returns known numbers, and the forward's output shows it: the slope at 0 is the scale, a finite limit the
    softcap. Configurations have a dozen names for these.
    """
    grid = torch.tensor([2.0**-20, 1.0, 3.0, 17.0, 2.0**40], device=model.device).reshape(1, -1, 1)
    # A call of the model, not of its forward: sharded weights are gathered by hooks around the call.
    # The grid replaces what the body computes, so that attention and precision do not matter here.
    attention = eager_where_flash_cannot_run(model), flash_precision(model, torch.bfloat16)
    with evaluating(model), attention[0], attention[1], without_bias(model), gathering(model):
        outputs = model(**tiny_inputs(model, 1, grid.shape[1]), orpo=grid)
    logits = outputs["logits"].float().flatten()
    if logits.shape != grid.flatten().shape:
        raise ValueError(
            f"{type(model).__name__} changes the shape of its logits after {fused.name}; the fused loss cannot follow"
        )
    small, *middle, large = logits.tolist()
    scale = small / grid.flatten()[0].item()
    softcap = None if abs(large) > 2.0**30 * abs(scale) else large
    scaled = scale * grid.flatten()[1:4]
    expected = scaled if softcap is None else softcap * torch.tanh(scaled / softcap)
    if not torch.allclose(expected.cpu(), torch.tensor(middle), rtol=2e-2, atol=1e-3):
        raise ValueError(
            f"{type(model).__name__} turns {fused.name} outputs of 1, 3, 17 into {middle}, which is neither a factor "
            "nor a tanh softcap; the fused loss cannot follow"
        )
    return LogitTransform(scale, softcap)
