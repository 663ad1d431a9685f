"""The interpreter computes bfloat16 as a GPU does (kernelcheck/interpreter.py)."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.kernels(modes=("interpret",))


def test_narrow_rounds_as_torch_does():
    from kernelcheck.interpreter import narrow, widen

    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    # Ties, the largest finite value (rounds to infinity), infinities, a NaN whose payload would carry into the sign.
    bits[:8] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0, 0x80000000]
    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).bfloat16()
    ours = torch.from_numpy(widen(narrow(values)))
    torch.testing.assert_close(ours, expected.float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _every_cast_kernel(x_ptr, half_ptr, single_ptr, int_ptr, back_ptr, flag_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(half_ptr + offsets, x.to(tl.float16))
    tl.store(single_ptr + offsets, x.to(tl.float32))
    tl.store(int_ptr + offsets, x.to(tl.int32))
    tl.store(back_ptr + offsets, (x.to(tl.int32) + 257).to(tl.bfloat16))
    tl.store(flag_ptr + offsets, (x < 0.5).to(tl.bfloat16) + tl.where(x > 2.0, -x, tl.full((BLOCK,), 3.0, tl.bfloat16)))


def test_casts_comparisons_and_constants():
    x = torch.linspace(-300, 300, 64).bfloat16()
    half, single, integer = (torch.empty(64, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.int32))
    back, flag = torch.empty_like(x), torch.empty_like(x)
    _every_cast_kernel[(1,)](x, half, single, integer, back, flag, BLOCK=64)
    assert torch.equal(half, x.half())
    assert torch.equal(single, x.float())
    assert torch.equal(integer, x.int())
    assert torch.equal(back, (x.int() + 257).bfloat16())
    assert torch.equal(flag, (x < 0.5).bfloat16() + torch.where(x > 2, -x, torch.full_like(x, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_arithmetic_rounds_once_per_operation(dtype):
    from kernelcheck.samples import affine_kernel

    x, y = (torch.randn(300, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    out = torch.empty_like(x)
    affine_kernel[(3,)](x, y, out, 300, BLOCK=128)
    torch.testing.assert_close(out, x * y + 1, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dot_of_half_precision_is_exact_to_float32(dtype):
    from kernelcheck.samples import matmul_kernel

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(33, 70, generator=generator).to(dtype), torch.randn(70, 20, generator=generator).to(dtype)
    c = torch.empty(33, 20)
    matmul_kernel[(2, 2)](a, b, c, 33, 20, 70, 70, 20, 20, BLOCK_M=32, BLOCK_N=16, BLOCK_K=32)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@triton.jit
def _bf16_sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))


def test_a_bf16_reduction_is_refused_in_words():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="cast to float32 first"):
        _bf16_sum_kernel[(1,)](x, torch.empty_like(x), BLOCK=16)


@triton.autotune(configs=[triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 64})], key=["n"])
@triton.jit
def _autotuned_copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)


def test_autotuned_kernels_run():
    x, out = torch.randn(100), torch.empty(100)
    _autotuned_copy_kernel[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, out, 100)
    assert torch.equal(out, x)
