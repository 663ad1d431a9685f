"""Deliberate faults of the kernels, each a small edit of one file: what the tests of the kernels have to notice.

Those on the way from rows to batches are in mutations_data.py, the rest in mutations_training.py.
"""

from dataclasses import dataclass

KERNELS = "kernels/orpo_kernels/"


@dataclass(frozen=True)
class Mutation:
    """Replace `old` by `new` in `file`; `old` must occur, and `which` says at which occurrence.

    `test` is the one that has to notice it; without, any of the kernels' checks may.
    """

    fault: str
    file: str
    old: str
    new: str
    which: int = 0
    test: str = ""

    def apply(self, text: str) -> str:
        """The mutated text. Raises `ValueError` where the kernel has changed and the mutation no longer applies."""
        pieces = text.split(self.old)
        if len(pieces) - 1 <= self.which:
            raise ValueError(
                f"{self.fault}: {self.file} holds {len(pieces) - 1} times {self.old!r}: update mutations.py"
            )
        before, after = pieces[: self.which + 1], pieces[self.which + 1 :]
        return self.old.join(before) + self.new + self.old.join(after)


def _in(file: str, *faults: tuple) -> list[Mutation]:
    return [Mutation(fault, KERNELS + file, *edit) for fault, *edit in faults]


def within(file: str, tests: str, *faults: tuple) -> list[Mutation]:
    """Faults of a file of ``orpo/``: (what, the code, the fault in its place, the test in the file `tests`)."""
    return [
        Mutation(fault, f"orpo/{file}", old, new, *which, test=f"tests/{tests}::{test}")
        for fault, old, new, test, *which in faults
    ]


_SHARDS = "tests/ranks/test_shards.py::test_two_ranks_equal_one"
_SHARDS_TRITON = "tests/ranks/test_shards.py::test_two_ranks_of_triton_equal_one"
_SLICES = "tests/ranks/test_sequence_parts.py::test_two_ranks_equal_one"
_SLICES_TRITON = "tests/ranks/test_sequence_parts.py::test_two_ranks_of_triton_equal_one"
_SLICES_WRONG = "tests/ranks/test_sequence_parts.py::test_wrong_calls_are_refused_on_all_ranks"
_PARTNER = "tests/kernel/test_kernel_numerics.py::test_an_answer_without_a_partner_has_no_odds"
_FLOOR = "tests/kernel/test_kernel_numerics.py::test_the_odds_of_a_certain_answer_stop_at_a_floor"
_EITHER = ("(length_w > 0.0) & (length_l > 0.0)", "(length_w > 0.0) | (length_l > 0.0)")

MUTATIONS = [
    *_in(
        "gpu/logit_stats.py",
        ("columns past the end count", "(offs_v >= end)[None, :]", "(offs_v > end)[None, :]"),
        ("target left in the sum", "is_target_NV | (offs_v >= end)", "(is_target_NV & False) | (offs_v >= end)"),
        ("missing rescale of the running sum", "sum_N = sum_N * tl.exp(max_N - shift_N)", "sum_N = sum_N"),
        (
            "no guard where no logit is finite",
            'tl.where(new_max_N == float("-inf"), 0.0, new_max_N)',
            "new_max_N + 0.0",
        ),
        (
            "last tile of the vocabulary dropped",
            "for first in range(start, end, BLOCK_V)",
            "for first in range(start, end - BLOCK_V, BLOCK_V)",
        ),
        (
            "last column of a split dropped",
            "end = tl.minimum(start + split_columns, V)",
            "end = tl.minimum(start + split_columns, V) - 1",
        ),
        ("target stored by every split", "mask=row_mask & (targets_N >= start) & (targets_N < end)", "mask=row_mask"),
        (
            "statistics stored past the end",
            "tl.store(sum_ptr + out, sum_N, mask=row_mask)",
            "tl.store(sum_ptr + out, sum_N)",
        ),
    ),
    *_in(
        "gpu/logit_grad.py",
        ("wrong sign of the softmax", "-tl.exp(z_NV - max_N", "tl.exp(z_NV - max_N"),
        ("softmax of the maximum alone", "max_N[:, None] - log_sum_N[:, None]", "max_N[:, None]"),
        ("softcap's derivative missing", "g_NV *= slope_NV", "g_NV *= 1.0"),
        ("softcap missing", "z_NV = softcap * t_NV", "z_NV = u_NV"),
        ("float16 rows unscaled", "if HAS_ROW_SCALE:", "if HAS_ROW_SCALE and not HAS_ROW_SCALE:"),
        ("int32 offset of the gradient", "g_ptrs = g_ptr + offs_n.to(tl.int64)", "g_ptrs = g_ptr + offs_n"),
        (
            "gradient stored past the strip's width",
            "mask=row_mask[:, None] & (offs_v < columns)[None, :])",
            "mask=row_mask[:, None] & (offs_v <= columns)[None, :])",
        ),
        (
            "gradient not stored for the last column",
            "mask=row_mask[:, None] & (offs_v < columns)[None, :])",
            "mask=row_mask[:, None] & (offs_v < columns - 1)[None, :])",
        ),
    ),
    *_in(
        "gpu/device_math.py",
        ("int32 offset of hidden states", "N - 1).to(tl.int64)", "N - 1)"),
        ("int32 offset of the weight", "V - 1).to(tl.int64)", "V - 1)"),
        (
            "rows read past the end",
            "tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1)",
            "(first_n + tl.arange(0, BLOCK_N))",
        ),
        (
            "weight read past the end",
            "tl.minimum(first_v + tl.arange(0, BLOCK_V), V - 1)",
            "(first_v + tl.arange(0, BLOCK_V))",
        ),
        (
            "swapped strides",
            "columns[None, :] * stride_wv + (offs_d * stride_wd)",
            "columns[None, :] * stride_wd + (offs_d * stride_wv)",
        ),
        (
            "last tile of the hidden size dropped",
            "for d in range(0, D, BLOCK_D)",
            "for d in range(0, D - BLOCK_D + 1, BLOCK_D)",
            1,
        ),
        ("no mask over the hidden size", "mask=(offs_d < D - d)[None, :]", "mask=(offs_d < D)[None, :]"),
        (
            "descriptors: last tile of the hidden size dropped",
            "for d in range(0, D, BLOCK_D)",
            "for d in range(0, D - BLOCK_D + 1, BLOCK_D)",
        ),
        ("descriptors: weight of the first columns", "weight_ptr.load([first_v, d])", "weight_ptr.load([0, d])"),
        ("descriptors: rows of the first block", "x_ptr.load([first_n, d])", "x_ptr.load([0, d])"),
    ),
    *_in(
        "gpu/kept_grad.py",
        (
            "kept: maximum of another tile",
            "maxima_ptr + tile.to(tl.int64) * N + offs_n, mask",
            "maxima_ptr + offs_n, mask",
        ),
        ("kept: softmax of the running maximum", "max_N - row_max_N - log_sum_N, 0.0", "0.0 - log_sum_N, 0.0"),
        (
            "kept: a tile without a maximum",
            "tl.minimum(max_N - row_max_N - log_sum_N, 0.0)",
            "max_N - row_max_N - log_sum_N",
        ),
        ("kept: wrong sign of the softmax", "g_NV = -e_NV", "g_NV = e_NV"),
        ("kept: target's entry missing", "target_grad_N[:, None], g_NV)", "0.0, g_NV)"),
        ("kept: float16 rows unscaled", "if HAS_ROW_SCALE:", "if HAS_ROW_SCALE and not HAS_ROW_SCALE:"),
        ("kept: strip begins with its tile", "(offs_v >= first) & (offs_v < last)", "offs_v < last"),
        ("kept: strip ends with its tile", "(offs_v >= first) & (offs_v < last)", "offs_v >= first"),
        ("kept: maxima past the last tile", "tl.where(tile * TILE < end, N, 0)", "N"),
        ("kept: int32 offset of the exponentials", "first_n.to(tl.int64) * stride", "first_n * stride"),
        ("kept: int32 offset of the gradient", "rows = offs_n.to(tl.int64)[:, None]", "rows = offs_n[:, None]"),
        (
            "kept: a second backward makes g of g",
            'infinite_N = tl.full([BLOCK_N], float("inf")',
            "infinite_N = tl.full([BLOCK_N], 0.0",
        ),
    ),
    *_in(
        "plan.py",
        ("kept: more columns than there is room for", "columns // _STEP * _STEP", "-(-columns // _STEP) * _STEP"),
    ),
    *_in(
        "strips.py",
        ("blocks: gradient of the first rows", "set_matmul)(u_ND[first:last],", "set_matmul)(u_ND[: last - first],"),
        ("blocks: targets of the first rows", "targets_N[first:last]", "targets_N[: last - first]"),
    ),
    *_in(
        "gpu/logit_stats.py",
        ("kept: targets of the first columns", "targets_N - first if first else targets_N", "targets_N"),
        (
            "kept: maximum before the tile",
            "return new_max_N, sum_N, target_N, shift_N, e_NV",
            "return new_max_N, sum_N, target_N, max_N, e_NV",
        ),
        ("kept: softcap's derivative missing", "e_NV *= tl.maximum(1.0 - t_NV * t_NV, 0.0)", "e_NV *= 1.0"),
    ),
    *_in(
        "gpu/stages.py",
        ("strip: targets of the first strip", "terms.row_scale_N, head, first)", "terms.row_scale_N, head)"),
    ),
    *_in(
        "gpu/row_terms.py",
        ("kept: target's slope missing", "tl.maximum(1.0 - t_N * t_N, 0.0)", "1.0"),
        (
            "row terms: the upstream gradient missing",
            "coef_N *= tl.load(upstream_ptr)",
            "coef_N *= 1.0 + 0.0 * tl.load(upstream_ptr)",
        ),
        ("row terms: float16 rows keep their power of two", "coef_N /= row_scale_N", "coef_N /= 1.0"),
        ("row terms: scale of the logits missing", "coef_N = scale * tl.load", "coef_N = tl.load"),
    ),
    *_in(
        "gpu/hidden_rows.py",
        ("hidden rows: one row alone is put back", "n = next_row(head, next_ptr, n)", "n = n * 0 - 1"),
        ("hidden rows: last columns dropped", "mask = offs_d < D", "mask = offs_d < D - 1"),
        ("hidden rows: coefficients left out", "(x_NB * coef_N[:, None])", "x_NB"),
        (
            "hidden rows: int32 offset of hidden states",
            "offs = offs_n.to(tl.int64)[:, None] * D",
            "offs = offs_n[:, None] * D",
        ),
        ("hidden rows: int32 offset of gradients", "n.to(tl.int64) * D + offs_d", "n * D + offs_d"),
    ),
    *_in(
        "gpu/label_rows.py",
        (
            "labels: no second row for a second token",
            "other = nll & response & (nll_token != token)",
            "other = nll & (offs_t < 0)",
        ),
        ("labels: the rejected half is scored", "chosen = read_t < tl.where(s < P, T, 0)", "chosen = read_t < T"),
        (
            "labels: second rows over the first ones",
            "other_place = place + tl.load(found_ptr + s * 4)",
            "other_place = place + 0 * s",
        ),
        ("labels: not shifted", "read_t = offs_t + SHIFT", "read_t = offs_t"),
        ("labels: rows of the second block over the first's", "place += tl.sum(counts.to(tl.int32), 0)", "place += 0"),
    ),
    *_in(
        "gpu/row_checks.py",
        ("checks: an order is never wrong", "(sequence >= before) & ", ""),
        ("checks: a hidden state that is not there", "(row >= 0) & (row < R)", "row >= 0"),
        ("checks: a token that is not there", "(target >= 0) & (target < V)", "target >= 0"),
    ),
    *_in(
        "gpu/mean_hidden.py",
        ("mean hidden: rows without a mask are in it", "counts = response | nll", "counts = mask"),
        ("mean hidden: chosen rows in both", "(sequence >= P)", "(sequence >= 0)"),
    ),
    *_in(
        "gpu/odds_ratio.py",
        ("missing rescale between splits", "sum_N * tl.exp(max_N - shift_N) + part_sum_N", "sum_N + part_sum_N"),
        ("last split dropped", "for _ in range(splits)", "for _ in range(splits - 1)"),
        ("target's logit without the maximum", "mask=mask, other=0.0) - max_N", "mask=mask, other=0.0)"),
        ("lse without the maximum", "tl.store(lse_ptr + offs_n, max_N,", "tl.store(lse_ptr + offs_n, 0.0 * max_N,"),
        (
            "first token of an answer dropped",
            "start = first_row(sequence_ptr, N, s)",
            "start = first_row(sequence_ptr, N, s) + 1",
        ),
        ("prompt counted as answer", "tl.where(response, logp, 0.0)", "logp"),
        ("mean length of the wrong answer", "tl.maximum(length_l, 1.0)", "tl.maximum(length_w, 1.0)"),
        (
            "gradients of the pair swapped",
            "grad = grad_w if side == 0 else grad_l",
            "grad = grad_l if side == 0 else grad_w",
        ),
        ("coefficients of the other answer", "offsets_ptr + side * P + p + 1", "offsets_ptr + p + 1"),
        ("odds without the rejected answer's", "tl.log(q_w) - tl.log(q_l)", "tl.log(q_w)"),
        ("beta twice", "beta / num_pairs * grad", "beta * beta / num_pairs * grad"),
        (
            "NLL of the first sequence only",
            "mask=offs_s < S",
            "mask=offs_s < 1",
        ),
    ),
    *_in(
        "gpu/odds_ratio.py",
        (
            "gradient of an answer without a partner",
            "tl.where(present, beta",
            "tl.where(present | True, beta",
            0,
            _PARTNER,
        ),
        (
            "loss of an answer without a partner",
            "tl.where(present_P, softplus",
            "tl.where(offs_p < P, softplus",
            0,
            _PARTNER,
        ),
        ("log odds of an answer without a partner", "tl.where(present, r, 0.0)", "r", 0, _PARTNER),
        ("one answer makes a pair", *_EITHER, 0, _PARTNER),
        ("one answer is counted as a pair", *_EITHER, 1, _PARTNER),
        ("no floor for a certain chosen answer", "tl.maximum(-expm1(a_w), Q_EPS)", "-expm1(a_w)", 0, _FLOOR),
        ("no floor for a certain rejected answer", "tl.maximum(-expm1(a_l), Q_EPS)", "-expm1(a_l)", 0, _FLOOR),
    ),
    *_in(
        "gpu/device_math.py",
        ("bias ignored", "if HAS_BIAS:", "if HAS_BIAS and not HAS_BIAS:"),
        ("softcap's argument not scaled", "softcap * tanh(z_NV / softcap)", "softcap * tanh(z_NV)"),
        ("last group of row blocks too large", "tl.minimum(rows - first, GROUP)", "GROUP"),
        ("expm1 by subtraction", "tl.where(a > -0.5, a * p, tl.exp(a) - 1.0)", "tl.exp(a) - 1.0"),
    ),
    *_in(
        "head.py",
        ("last strip dropped", "range(0, vocabulary, width)", "range(0, vocabulary - width, width)"),
        ("strip short by one column", "min(first + width, vocabulary)", "min(first + width, vocabulary - 1)"),
        ("bias of the first strip", "self.bias_V[first:last]", "self.bias_V[: last - first]"),
    ),
    *_in(
        "gpu/tuning.py",
        ("tuning: the slower one", "way = min(ways", "way = max(ways"),
        ("tuning: timed while a graph is captured", "ways[0] if capturing(device) else _find", "_find"),
        ("tuning: timed where results have to repeat", "torch.are_deterministic_algorithms_enabled() or ", ""),
        ("tuning: another class's file is believed", 'found["class"] == key and ', ""),
        ("tuning: one class for all vocabularies", 'f"V<={1 << (v - 1).bit_length()}",', '"V",'),
    ),
    *(
        Mutation(fault, KERNELS + file, old, new, test=test)
        for fault, file, old, new, test in (
            (
                "shard: sums of different maxima",
                "shard.py",
                "(sum_KN * torch.exp(max_KN - shift_N))",
                "sum_KN",
                _SHARDS,
            ),
            (
                "shard: the logit of a target elsewhere",
                "shard.py",
                "torch.where(targets_N >= 0, target_N, 0)",
                "target_N",
                _SHARDS_TRITON,
            ),
            ("shard: columns of the first rank", "shard.py", "[: group.rank()].sum()", "[:0].sum()", _SHARDS),
            (
                "shard: hidden states of own columns alone",
                "strips.py",
                "head.shard.sum_(dx_ND)",
                "dx_ND",
                _SHARDS,
            ),
            (
                "shard: a frozen head's own maximum",
                "cpu/stages.py",
                " * torch.exp(stats.max_N - lse_2N[0])[:, None]",
                "",
                _SHARDS,
            ),
            ("shard: own shift of bfloat16", "cpu/logits.py", "head.shard.sum_(c_N1", "(c_N1", _SHARDS),
            ("slices: sums of own rows", "cpu/stages.py", "slices.sum_(reference", "(reference", _SLICES),
            ("slices: the same with Triton", "gpu/odds_ratio.py", "slices.sum_(sums_4S)", "", _SLICES_TRITON),
            ("slices: tiles before the sums", "saved.py", "has_pairs=not sequence_group", "has_pairs=True", _SLICES),
            ("slices: mean hidden states of own rows", "slices.py", "both = self.sum_(", "both = (", _SLICES),
            ("slices: no row counts as one", "gpu/mean_hidden.py", "least=0 if slices.name else 1", "", _SLICES_TRITON),
            ("slices: a rank refuses alone", "slices.py", "(refused_G == 0).all()", "refused_G[0] == 0", _SLICES_WRONG),
            (
                "slices: other pairs",
                "slices.py",
                "(pairs_G == rows.pairs).all()",
                "pairs_G[0] == pairs_G[0]",
                _SLICES_WRONG,
            ),
            (
                "slices: both cut by the same ranks",
                "slices.py",
                "set(ranks) & set(others)) > 1",
                "ranks) < 0",
                _SLICES_WRONG,
            ),
        )
    ),
]
