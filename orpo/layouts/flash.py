"""FlashAttention over rows that share prompts: transformers' own call of it, with keys and values laid out by segments.

FlashAttention takes no mask. The model gets the segments as the arguments by which transformers tells packed sequences
apart, which it hands on to its attention, and one more: where the keys stand. The attention function that transformers
has registered for the model's FlashAttention is called with those keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from orpo.layouts.segments import Segments

# The name under which a model hands the places of the keys on to its attention.
_KEYS = "shared_prompt_keys"


def flash_arguments(segments: Segments, implementation: str) -> dict[str, Any]:
    """What a model takes beside ids and positions, whose FlashAttention transformers calls `implementation`.

    Raises:
        ValueError: transformers has no attention function of that name.
    """
    take_shared_prompts(implementation)
    return {
        "attention_mask": None,
        "cu_seq_lens_q": segments.query_bounds,
        "cu_seq_lens_k": segments.key_bounds,
        "max_length_q": segments.most_queries,
        "max_length_k": segments.most_keys,
        _KEYS: segments.key_M,
    }


def take_shared_prompts(implementation: str) -> None:
    """Lets the attention function of that name take shared prompts too. A second call is harmless.

    All other calls, also by other models, reach the function as before.

    Raises:
        ValueError: transformers has no attention function of that name.
    """
    # By its own name: transformers loads the kernels by the name that the model's configuration has.
    registered = AttentionInterface().get(implementation)
    if registered is None:
        raise ValueError(f"transformers has no attention function {implementation!r} that could take shared prompts")
    if not (isinstance(registered, partial) and registered.func is attend):
        AttentionInterface.register(implementation, partial(attend, registered))


def attend(
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *arguments: Any,
    shared_prompt_keys: Tensor | None = None,
    **options: Any,
) -> Any:
    """Calls `function`, transformers' FlashAttention, with the keys and values that the segments see.

    Letters: B rows, T tokens, M keys of all segments, H heads, G heads of keys and values, D numbers of a head.

    Args:
        function: as transformers' AttentionInterface has it.
        module: the layer.
        query: (B, H, T, D).
        key, value: (B, G, T, D).
        shared_prompt_keys: int64 (M), places in the flattened batch; None: the keys as they stand.
        arguments, options: of `function`: mask, scale, window, softcap, sinks, and how long the segments are.

    Returns:
        What `function` returns: (output (B, T, H, D), None).
    """
    if shared_prompt_keys is not None:
        key, value = (_by_segment(states, shared_prompt_keys) for states in (key, value))
    return function(module, query, key, value, *arguments, **options)


def _by_segment(states: Tensor, key_M: Tensor) -> Tensor:
    """(B, G, T, D) -> (1, G, M, D). Backward adds up the gradients of a prompt that several answers see."""
    return states.transpose(1, 2).flatten(0, 1).index_select(0, key_M)[None].transpose(1, 2)
