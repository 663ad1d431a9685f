"""Who attends to whom when several answers stand behind one prompt in the same row.

A token sees the tokens before it that are of its own prompt or of its own answer. In a layer with a sliding window it
sees no further back than the window, counted in positions: those of each answer restart at the end of the prompt.
Letters: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from orpo.layouts.flash import flash_arguments
from orpo.layouts.segments import PROMPT, Segments

# Types of devices that FlashAttention has no operators for.
_NO_FLASH = frozenset({"cpu"})


@dataclass(frozen=True)
class SharedPrefixMask:
    """The mask of a batch in O(B T) memory; the (B, 1, T, T) form is made where the model is, when it is called.

    Attributes:
        branch_BT: int32, ``branches * prompt + (PROMPT, or 1, 2, ... for its answers)``. Padding has a prompt number
            of its own: a token that saw nothing would be NaN.
        position_BT: int64, position within the sequence.
        longest: tokens of the longest sequence, a Python number: reading it off a device would stall it.
        tokens: those that are no padding, a Python number too.
        branches: one more than the most answers behind a prompt.
        segments: the same for FlashAttention, where the layout was made for it.
    """

    branch_BT: Tensor
    position_BT: Tensor
    longest: int
    tokens: int
    branches: int = 3
    segments: Segments | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SharedPrefixMask:
        """The same mask on `device`."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SharedPrefixMask:
        """The same mask in page-locked memory. torch's DataLoader calls this by name."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> SharedPrefixMask:
        parts = {name: getattr(self, name) for name in ("branch_BT", "position_BT", "segments")}
        return replace(self, **{name: change(part) for name, part in parts.items() if part is not None})

    def sum(self) -> int:
        """`tokens`. Trainer calls this by name for ``include_num_input_tokens_seen="non_padding"``."""
        return self.tokens

    def _related(self, q_branch: Tensor, k_branch: Tensor) -> Tensor:
        """Whether the key's token is of the query's own branch, or of the prompt before it."""
        of_prompt = (k_branch % self.branches == PROMPT) & (q_branch // self.branches == k_branch // self.branches)
        return (q_branch == k_branch) | of_prompt

    def visible(self, window: int | None = None) -> Tensor:
        """bool (B, T, T), [b, q, k]: token q sees token k."""
        seen = self._related(self.branch_BT[:, :, None], self.branch_BT[:, None, :])
        if window is not None:
            seen &= self.position_BT[:, :, None] - self.position_BT[:, None, :] < window
        return seen.tril_()

    def additive(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """(B, 1, T, T): 0 where visible, the dtype's lowest number elsewhere.

        Never boolean: eager attention adds the mask, and a 1 for "visible" would be a silently wrong logit.
        """
        hidden = ~self.visible(window)[:, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)

    def block_mask(self, window: int | None = None) -> Any:
        """The mask as flex_attention takes it: blocks that nobody sees are skipped."""
        from torch.nn.attention.flex_attention import create_block_mask

        branch, position = self.branch_BT, self.position_BT

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (q >= k) & self._related(branch[b, q], branch[b, k])
            return seen if window is None else seen & (position[b, q] - position[b, k] < window)

        rows, tokens = branch.shape
        return create_block_mask(sees, rows, None, tokens, tokens, device=branch.device)

    def arguments_for(self, model: nn.Module) -> dict[str, Any]:
        """What `model` takes in place of the mask, by the names of its arguments.

        With FlashAttention these are the segments, within which the layers' own windows are right.

        Raises:
            ValueError: the model calls FlashAttention, and there are no `segments`.
        """
        config = model.config.get_text_config()
        if not uses_flash(config):
            return {"attention_mask": self.for_model(model)}
        if self.segments is None:
            raise ValueError(
                f"the model's attention is {config._attn_implementation}, which takes no mask, and the batch was made "
                "without segments: make it with SharedLayout(..., single_row=True)"
            )
        return flash_arguments(self.segments, config._attn_implementation)

    def for_model(self, model: nn.Module) -> Any:
        """What `model` takes as ``attention_mask``: a 4-D tensor or BlockMask, or one for each type of layer."""
        config = model.config.get_text_config()
        window, layer_types = layer_windows(config)
        # Where no sequence is longer than the window, every layer sees the same.
        window = window if window is not None and window < self.longest else None
        if getattr(config, "_attn_implementation", None) == "flex_attention":
            make = self.block_mask
        else:
            device = self.branch_BT.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype

            def make(window: int | None) -> Tensor:
                return self.additive(dtype, window)

        if window is None or layer_types <= {"sliding_attention"}:
            return make(window)
        return {"full_attention": make(None), "sliding_attention": make(window)}


def layer_windows(config: Any) -> tuple[int | None, set[str]]:
    """(tokens that a sliding layer sees or None, the types of layer) of a model's text configuration."""
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False or layer_types == {"full_attention"}:
        window = None
    return window, layer_types


def uses_flash(config: Any) -> bool:
    """Whether the model of `config` calls FlashAttention, whichever version or kernel of it."""
    return "flash" in (getattr(config, "_attn_implementation", None) or "")


def flash_cannot_run(base: Any) -> bool:
    """Whether the model calls FlashAttention and has its weights where that does not run.

    So it is before Trainer moves the model, and until training begins under FSDP and DeepSpeed.
    """
    return uses_flash(base.config) and base.device.type in _NO_FLASH


@contextmanager
def eager_where_flash_cannot_run(base: Any) -> Iterator[None]:
    """Eager attention for as long as :func:`flash_cannot_run`: for calls that try the head, not the body.

    Not by set_attn_implementation: on the way back it would check, on a CPU, whether FlashAttention can be used.
    """
    if not flash_cannot_run(base):
        yield
        return
    kept = [(config, config._attn_implementation) for config in _with_sub_configs(base.config)]
    base.config._attn_implementation = "eager"
    try:
        yield
    finally:
        # A configuration hands what it is set to down to those inside it, which therefore come after it.
        for config, implementation in kept:
            config._attn_implementation = implementation


def _with_sub_configs(config: Any) -> list[Any]:
    inner = [getattr(config, name, None) for name in config.sub_configs]
    return [config, *(found for sub in inner if sub is not None for found in _with_sub_configs(sub))]


def flash_precision(base: Any, otherwise: torch.dtype | None = None) -> AbstractContextManager:
    """Autocast, as training has it, where FlashAttention would meet float32 weights, which it does not take.

    For calls before training, of a model that accelerate has not wrapped in its autocast yet. Where training has none,
    or nobody knows yet, autocast in `otherwise`.

    Raises:
        ValueError: training has no autocast, and `otherwise` is None.
    """
    if not uses_flash(base.config) or base.dtype != torch.float32 or torch.is_autocast_enabled(base.device.type):
        return nullcontext()
    mixed = AcceleratorState().mixed_precision if AcceleratorState._shared_state else "no"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed, otherwise)
    if dtype is None:
        raise ValueError(
            f"attn_implementation is {base.config._attn_implementation} and the weights are float32, in which "
            "FlashAttention does not compute: set bf16 true (float32 weights, computed in bfloat16), dtype bfloat16, "
            "or attn_implementation sdpa"
        )
    return torch.autocast(base.device.type, dtype)
