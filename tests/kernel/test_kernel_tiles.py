"""The tiles of the kernels: which fit a chip, what they compute, and how grids cover rows and vocabulary."""

import ast
import math
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from orpo_kernels.gpu import tiles
from orpo_kernels.gpu.device_math import grouped_block
from problems import make_problem, relative_error

from orpo import orpo_loss

pytestmark = pytest.mark.kernels

SM_90 = tiles.Limits(is_amd=False, major=9, max_shared=232448, max_registers=65536)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.parametrize("keeps", [False, True], ids=["", "keeps"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(("dtype", "precision"), [("bf16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")])
def test_what_a_chip_can_choose_fits_it(dtype, precision, aligned, keeps):
    from tools.chips import CHIPS

    for chip in CHIPS.values():
        if chip.is_amd and precision == "tf32":
            continue
        found = tiles.matmul_configs(DTYPES[dtype], precision, aligned, chip.limits, keeps)
        assert 1 <= len(found) <= 4 and len({str(config) for config in found}) == len(found)
        assert all(config.fits(chip.limits, DTYPES[dtype].itemsize, keeps) for config in found), chip.name


def test_pruning_by_shared_memory_registers_and_spills():
    from dataclasses import replace

    def blocks(chip, keeps=False, softcap=False):
        found = tiles.matmul_configs(torch.bfloat16, "ieee", True, chip, keeps, softcap)
        return [
            (config.block_n, config.block_v, config.num_stages, *["descriptors"][: config.descriptors])
            for config in found
        ]

    assert blocks(SM_90) == [(64, 256, 4), (128, 128, 4), (128, 128, 4, "descriptors"), (64, 128, 4, "descriptors")]
    # Exponentials beside the sums do not fit two of them.
    assert blocks(SM_90, keeps=True) == [(128, 128, 4), (64, 128, 4, "descriptors")]
    # A softcap's slope takes registers as well.
    assert blocks(SM_90, keeps=True, softcap=True) == [(64, 128, 4, "descriptors")]
    # An RTX 4090's 99 KB.
    assert blocks(replace(SM_90, major=8, max_shared=101376)) == [(128, 128, 3), (64, 128, 4)]
    # A square tile spills on sm_100.
    assert blocks(replace(SM_90, major=10)) == [(64, 256, 4), (64, 128, 4, "descriptors")]
    # An RTX 5090.
    found = blocks(replace(SM_90, major=12, max_shared=101376))
    assert found == [(128, 128, 3), (128, 128, 3, "descriptors"), (64, 128, 4)]
    # Half the registers: half the sums a thread.
    assert blocks(replace(SM_90, max_registers=32768)) == [(64, 128, 4, "descriptors")]
    # Where nothing fits, the smallest is left to say so.
    assert blocks(replace(SM_90, major=8, max_shared=16384)) == [(64, 128, 4)]
    # No descriptors before Hopper, whatever the list.
    assert not tiles._DEEP_TMA.fits(replace(SM_90, major=8), 2)


@pytest.mark.kernels(modes=("interpret", "cuda"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_operands_through_tensor_descriptors(dtype, monkeypatch, kernel_device):
    if kernel_device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs compute capability 9")
    if kernel_device.type == "cpu" and triton.__version__.startswith("3.4."):
        pytest.skip("the interpreter of triton 3.4 takes a descriptor's stride of 40 elements for one of 40 bytes")
    blocks = dict(block_n=16, block_v=32, block_d=16, num_warps=4, num_stages=2)

    def run(descriptors: bool):
        tile = tiles.MatmulConfig(**blocks, descriptors=descriptors)
        monkeypatch.setattr(tiles, "matmul_candidates", lambda *_, **__: (tile,))
        # Ragged in every direction, and a hidden size that ends inside a tile.
        problem = make_problem(P=2, T=13, V=101, D=40, bias=True, dtype=dtype, device=kernel_device).requiring_grad()
        out = orpo_loss(problem.hidden, problem.weight, problem.labels, lm_head_bias=problem.bias, logits_budget=0,
                        strip_bytes=6000, backend="triton")  # fmt: skip
        out.loss.backward()
        return out.loss, problem.hidden.grad, problem.weight.grad, problem.bias.grad

    for found, expected in zip(run(True), run(False), strict=True):
        # The same products, summed in the same order.
        assert torch.equal(found, expected)


# What fits the 64 KB of the chip that the compiled kernels are executed as.
SHIPPED = {"unaligned": (tiles._UNALIGNED[0], torch.bfloat16), "AMD": (tiles._AMD[2], torch.bfloat16),
           "fp32": (tiles._FLOAT32[0], torch.float32)}  # fmt: skip


@pytest.mark.kernels(modes=("simt", "cuda"))
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_tiles_give_the_gradients(name, monkeypatch, kernel_device):
    tile, dtype = SHIPPED[name]
    monkeypatch.setattr(tiles, "matmul_candidates", lambda *_, **__: (tile,))
    # More than one block of rows, several splits and strips, a hidden size that ends inside a tile.
    problem = make_problem(P=2, T=19, V=301, D=80, bias=True, dtype=dtype, device=kernel_device).requiring_grad()
    out = orpo_loss(problem.hidden, problem.weight, problem.labels, logits_budget=0, strip_bytes=20000,
                    backend="triton", **problem.keywords)  # fmt: skip
    out.loss.backward()
    objective, dx, dw, _ = problem.truth()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(out.loss.detach(), objective.loss) < tolerance
    assert relative_error(problem.hidden.grad, dx) < tolerance
    assert relative_error(problem.weight.grad, dw) < tolerance


def test_an_operand_inside_a_flat_buffer_is_not_aligned():
    flat = torch.zeros(1 + 64 * 32, dtype=torch.bfloat16)
    assert tiles.rows_aligned(flat[:-1].view(64, 32), flat[:-1].view(64, 32))
    assert not tiles.rows_aligned(flat[:-1].view(64, 32), flat[1:].view(64, 32))


def test_tf32_only_where_torch_allows_it(monkeypatch):
    assert tiles.input_precision() == "ieee"
    previous = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert tiles.input_precision() == "tf32"
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert tiles.input_precision() == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = previous


NEWER = pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="came with torch 2.9")


@NEWER
def test_tf32_allowed_by_torchs_newer_setting():
    """transformers' `tf32=True` uses this one; asked for allow_tf32, torch then raises."""
    previous = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            print(torch.backends.cuda.matmul.allow_tf32)
        assert tiles.input_precision() == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous


@pytest.mark.parametrize("cores", [4, 108, 132, 148])
@pytest.mark.parametrize("block_n", [64, 128])
def test_splits_of_the_vocabulary_fill_the_chip(block_n, cores):
    for rows in (1, 64, 100, 500, 1000, 4096, 8192, 50_000):
        for vocabulary, block_v in ((128256, 256), (50257, 128), (1000, 128), (40, 64)):
            blocks_n, steps = -(-rows // block_n), -(-vocabulary // block_v)
            splits, columns = tiles.vocabulary_splits(blocks_n, vocabulary, block_v, cores)
            assert columns % block_v == 0 and (splits - 1) * columns < vocabulary <= splits * columns
            programs = blocks_n * splits
            waves = -(-programs // cores)
            # Multiprocessors at work, averaged over the run: of each split's tiles, for as long as the waves take.
            busy = blocks_n * steps / (cores * waves * (columns // block_v))
            if blocks_n * steps >= 16 * cores:
                assert busy > 0.85, (rows, vocabulary, splits)
                assert programs >= 0.9 * cores
            elif vocabulary == 128256:
                # Whole tiles: no wave that could be spared.
                assert waves * (columns // block_v) <= math.ceil(blocks_n * steps / cores)


def test_small_batches_reach_every_multiprocessor():
    # One block of rows: without more than 64 splits half of an H100 would stand idle.
    splits, columns = tiles.vocabulary_splits(1, 128256, 256, 132)
    assert splits == 126 and columns == 4 * 256


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 3), (8, 5), (9, 5), (64, 18), (3, 501)])
def test_each_block_has_one_program_and_neighbours_share_operands(rows, columns, kernel_device):
    @triton.jit
    def blocks_kernel(out_ptr, rows, columns, programs, BLOCK: tl.constexpr):
        pid = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row, column = grouped_block(pid, rows, columns, 8)
        tl.store(out_ptr + pid, row, mask=pid < programs)
        tl.store(out_ptr + programs + pid, column, mask=pid < programs)

    programs = rows * columns
    out = torch.empty((2, programs), dtype=torch.int32, device=kernel_device)
    blocks_kernel[(triton.cdiv(programs, 64),)](out, rows, columns, programs, BLOCK=64)
    found = list(zip(*out.tolist(), strict=True))
    assert sorted(found) == [(row, column) for row in range(rows) for column in range(columns)]
    for first in range(0, programs - 131, 132):
        wave = found[first : first + 132]
        # 132 programs could read 132 + 132 blocks; the fewest is 12 + 11.
        assert len({row for row, _ in wave}) + len({column for _, column in wave}) <= 48 or rows < 8


def test_every_launch_says_whether_products_are_added_unrounded():
    """Triton 3.10 changes what it does where nobody says: other bits, and registers that no report has seen."""
    from orpo_kernels.gpu import label_rows

    labels = torch.zeros(2, 3, dtype=torch.int64)
    keywords = {
        "config.launch_options()": tiles._CPU[0].launch_options(),
        "arguments": label_rows._arguments(labels, None, -100, True),
    }
    launches = 0
    for file in Path(tiles.__file__).parent.glob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript)):
                continue
            launches += 1
            named = {keyword.arg for keyword in call.keywords}
            for keyword in call.keywords:
                if keyword.arg is None:
                    named |= set(keywords.get(ast.unparse(keyword.value), ()))
            assert "enable_fp_fusion" in named, f"{file.name}:{call.lineno}"
    assert launches >= 13
