"""flash_attn's interface in plain torch, in any dtype and on a CPU, and a transformers that takes it for the package.

transformers' own code around the package runs as it is; only the kernels are others. Written from the package's
documentation of ``flash_attn_varlen_func``: causal and windows count from the last key ("bottom-right").
"""

import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torch.nn.functional as F

from orpo.layouts import prefix_mask


def attention(q, k, v, scale, causal, window, softcap):
    """(Q, H, D), (K, G, D), (K, G, D) -> (Q, H, D)."""
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    k, v = (states.repeat_interleave(len(q) // len(states), 0) for states in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    queries, keys = scores.shape[-2:]
    left, right = window[0], 0 if causal else window[1]
    ahead = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    seen &= ahead <= right if right >= 0 else seen
    seen &= -ahead <= left if left >= 0 else seen
    assert seen.any(-1).all(), "a query that sees nothing"
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


class StandIn:
    """The functions of the package, and the calls of the variable-length one."""

    def __init__(self, float32):
        self.float32 = float32
        self.calls = []

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
    ):
        assert q.dtype == k.dtype == v.dtype and (self.float32 or q.dtype in (torch.bfloat16, torch.float16))
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and cu_seqlens_q.shape == cu_seqlens_k.shape
        q_lengths, k_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert cu_seqlens_q[0] == cu_seqlens_k[0] == 0 and dropout_p == 0.0
        assert (sum(q_lengths), sum(k_lengths)) == (len(q), len(k)) and len(k) == len(v)
        # The kernel writes no further than these, and larger ones cost.
        assert (max(q_lengths), max(k_lengths)) == (int(max_seqlen_q), int(max_seqlen_k))
        self.calls.append((q_lengths, k_lengths, window_size, softcap))
        parts = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
        return torch.cat([attention(*part, softmax_scale, causal, window_size, softcap) for part in parts])

    @staticmethod
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
        rows = zip(q, k, v, strict=True)
        return torch.stack([attention(*row, softmax_scale, causal, window_size, softcap) for row in rows])

    @staticmethod
    def flash_attn_with_kvcache(*_, **__):
        raise NotImplementedError("training has no cache")


def unpad_input(states, mask):
    lengths = mask.sum(1, dtype=torch.int32)
    places = mask.flatten().nonzero().flatten()
    bounds = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return states.flatten(0, 1)[places], places, bounds, lengths.max().item(), lengths


def pad_input(states, places, rows, tokens):
    return states.new_zeros(rows * tokens, *states.shape[1:]).index_copy(0, places, states).unflatten(0, (rows, tokens))


def install(monkeypatch, float32=True):
    """Gives transformers the stand-in as flash_attn, on a CPU too, with `float32` in float32 too."""
    stand_in, package, padding = StandIn(float32), ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        setattr(package, name, getattr(stand_in, name))
    padding.pad_input, padding.unpad_input = pad_input, unpad_input
    # Models look for the package by its specification.
    package.__spec__ = ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    utils = "transformers.modeling_flash_attention_utils."
    monkeypatch.setattr(utils + "is_flash_attn_2_available", lambda *_, **__: True)
    # What a process has loaded stays loaded: the next test looks again.
    monkeypatch.setattr(utils + "_loaded_implementation", None)
    monkeypatch.setattr(prefix_mask, "_NO_FLASH", frozenset())
    if float32:
        for room in ("attach", "probe"):
            monkeypatch.setattr(f"orpo.model.{room}.flash_precision", lambda *_: nullcontext())
    return stand_in


def with_flash(model):
    """`model`, which calls FlashAttention 2 from now on. transformers would ask for a GPU."""
    model.config._attn_implementation = "flash_attention_2"
    return model
