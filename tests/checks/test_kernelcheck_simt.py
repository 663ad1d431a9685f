"""Compiled kernels executed on the CPU give the right answer, and planted faults are found (kernelcheck/simt)."""

import ctypes
import math
import shutil
import sys

import pytest
import torch
import triton
import triton.language as tl
from kernelcheck.findings import MemoryFinding
from kernelcheck.memory import lazily_mapped

pytestmark = pytest.mark.kernels(modes=("simt",))


def _matmul(dtype: torch.dtype, m: int = 50, n: int = 40, k: int = 70, **options):
    """Launch the sample matmul; returns the compiled kernel, its result, and the result in float64."""
    from kernelcheck.samples import matmul_kernel

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=generator).to(dtype), torch.randn(k, n, generator=generator).to(dtype)
    c = torch.empty(m, n)
    grid = (triton.cdiv(m, 32), triton.cdiv(n, 32))
    blocks = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    compiled = matmul_kernel[grid](a, b, c, m, n, k, k, n, n, **blocks, **options)
    return compiled, c, a.double() @ b.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matmul(dtype):
    _, c, expected = _matmul(dtype)
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_warps", "num_stages"), [(1, 1), (2, 3), (8, 2)])
def test_warps_and_pipelining(num_warps, num_stages):
    _, c, expected = _matmul(torch.bfloat16, num_warps=num_warps, num_stages=num_stages)
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_elementwise_rounds_as_torch_does(dtype):
    from kernelcheck.samples import affine_kernel

    x, y = (torch.randn(300, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    out = torch.empty_like(x)
    affine_kernel[(3,)](x, y, out, 300, BLOCK=128)
    # float32: the compiler may fuse the product into the sum, which then rounds once instead of twice.
    torch.testing.assert_close(out, x * y + 1, rtol=0, atol=5e-7 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("num_warps", [1, 4])
def test_reductions_over_lanes_and_warps(num_warps):
    from kernelcheck.samples import column_sum_kernel, logsumexp_kernel

    x = torch.randn(5, 300)
    x[2, 7] = float("-inf")
    out = torch.empty(5)
    logsumexp_kernel[(5,)](x, out, 300, 300, BLOCK_N=128, num_warps=num_warps)
    torch.testing.assert_close(out, x.logsumexp(1))
    out = torch.zeros(300)
    column_sum_kernel[(5,)](x, out, 300, ATOMIC=True, BLOCK_N=512, num_warps=num_warps)
    torch.testing.assert_close(out, x.sum(0))


@triton.jit
def _every_feature_kernel(x_ptr, index_ptr, out_ptr, n, scale, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Gather by an int64 index, scan, transpose, argmax, two-dimensional reductions, a while loop."""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    index = tl.load(index_ptr + rows)
    x = tl.load(x_ptr + index * n + columns, mask=columns < n, other=0.0).to(tl.float32) * scale
    x = tl.cumsum(tl.trans(x), axis=1)
    best = tl.argmax(x, axis=1).to(tl.float32)
    x += best[:, None] * 0.2 + tl.max(x, axis=0)[None, :]
    count = 0
    while count < tl.num_programs(0):
        x += 1.0
        count += 1
    tl.store(out_ptr + tl.program_id(0) * BLOCK * BLOCK + rows * BLOCK + columns, x.to(DTYPE))


@pytest.mark.parametrize(("dtype", "triton_dtype"), [(torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)])
def test_many_features(dtype, triton_dtype):
    x = torch.randn(40, 30).to(dtype)
    index = torch.randint(0, 40, (32,))
    out = torch.empty(2, 32, 32, dtype=dtype)
    _every_feature_kernel[(2,)](x, index, out, 30, 0.5, DTYPE=triton_dtype, BLOCK=32)
    padded = torch.nn.functional.pad(x.float(), (0, 2))
    expected = torch.cumsum((padded[index] * 0.5).T, dim=1)
    expected = expected + expected.argmax(1).float()[:, None] * 0.2 + expected.max(0).values[None, :] + 2
    torch.testing.assert_close(out, expected.to(dtype).expand(2, -1, -1))


@triton.jit
def _descriptor_kernel(x_desc, out_ptr, m, n, BLOCK: tl.constexpr):
    out = tl.make_tensor_descriptor(out_ptr, [m, n], [n, 1], [BLOCK, BLOCK])
    row = tl.program_id(0) * BLOCK
    out.store([row, 0], x_desc.load([row, 0]) * 2)


def test_tensor_descriptors():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = torch.randn(20, 16)
    out = torch.empty_like(x)
    _descriptor_kernel[(2,)](TensorDescriptor.from_tensor(x, [16, 16]), out, 20, 16, BLOCK=16)
    assert torch.equal(out, 2 * x)


def test_offsets_beyond_int32():
    from kernelcheck.samples import int32_offset_kernel

    stride = 2**30
    x = lazily_mapped(3 * stride + 1, torch.uint8)
    x[3 * stride] = 42
    out = torch.zeros(1, dtype=torch.uint8)
    int32_offset_kernel[(1,)](x, out, stride, WIDE=True)
    assert out.item() == 42
    with pytest.raises(MemoryFinding, match="out-of-bounds load of 1 bytes in int32_offset_kernel"):
        int32_offset_kernel[(1,)](x, out, stride, WIDE=False)


def test_a_planted_wrong_result_is_seen():
    _, c, expected = _matmul(torch.bfloat16, DROP_LAST=True)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["load", "store"])
def test_a_planted_out_of_bounds_access_is_found(kind):
    from kernelcheck.samples import add_kernel

    # Apart from each other, so that the byte past the end of one is not the first of another.
    x, y, out = torch.randn(3, 1000).unbind()
    x, y = (x[:200], y[:200]) if kind == "load" else (x, y)
    expected = rf"out-of-bounds {kind} of 4 bytes in add_kernel, program \(3, 0, 0\), thread 8, at byte 800 of"
    with pytest.raises(MemoryFinding, match=expected + (" x_ptr" if kind == "load" else " out_ptr")):
        add_kernel[(4,)](x, y, out[:200], 200, BLOCK=64, BOUND=1)


def test_a_planted_race_between_programs_is_found():
    from kernelcheck.samples import column_sum_kernel, last_writer_kernel

    x, out = torch.ones(5, 40), torch.zeros(40)
    expected = (
        r"race: load of 4 bytes in column_sum_kernel, program \(1, 0, 0\).*out_ptr, which program \(0, 0, 0\) stores"
    )
    with pytest.raises(MemoryFinding, match=expected):
        column_sum_kernel[(5,)](x, out, 40, ATOMIC=False, BLOCK_N=64)
    with pytest.raises(MemoryFinding, match=r"race: store of 4 bytes in last_writer_kernel"):
        last_writer_kernel[(2,)](torch.zeros(1, dtype=torch.int32), SAME=False)
    last_writer_kernel[(1,)](torch.zeros(1, dtype=torch.int32), SAME=False)


def test_shared_memory_without_barriers_is_found():
    from kernelcheck.simt.executor import HostKernel

    compiled, _, expected = _matmul(torch.float32)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 70, generator=generator), torch.randn(70, 40, generator=generator)

    def run(ir: str) -> torch.Tensor:
        c = torch.empty(50, 40)
        arguments = [a, b, c, 50, 40, 70, 70, 40, 40, None, None]
        kernel = HostKernel(ir, "matmul_kernel", compiled.metadata.shared)
        kernel.launch((2, 2, 1), 32 * compiled.metadata.num_warps, arguments, [f"arg{i}" for i in range(11)])
        return c

    ir = compiled.asm["llir"]
    torch.testing.assert_close(run(ir).double(), expected, rtol=1e-5, atol=1e-5)
    without = "\n".join(line for line in ir.splitlines() if "call void @llvm.amdgcn.s.barrier()" not in line)
    assert without != ir
    with pytest.raises(MemoryFinding, match=r"of shared memory, which wave .* with no barrier in between"):
        run(without)


def test_missing_tools_are_named(monkeypatch):
    from kernelcheck.simt import executor

    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    with pytest.raises(executor.UnavailableExecutor, match="pip install 'llvmlite"):
        executor.runtime.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(executor.UnavailableExecutor, match="needs gcc"):
        executor.runtime.__wrapped__()


def test_float_is_rounded_to_bfloat16_as_torch_does():
    """By the function that stands in for the instruction, which this CPU may have."""
    from kernelcheck.simt.executor import runtime

    function = runtime().simt_round_to_bf16
    function.restype, function.argtypes = ctypes.c_float, (ctypes.c_float,)
    g = torch.Generator().manual_seed(0)
    ordinary = torch.randn(500, generator=g) * 2.0 ** torch.randint(-130, 120, (500,), generator=g)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000, 0x00018000], dtype=torch.int32).view(
        torch.float32
    )
    values = torch.cat([ordinary, -ordinary, ties, torch.tensor([0.0, -0.0, math.inf, -math.inf])])
    bits = torch.tensor([function(v) for v in values.tolist()]).view(torch.int32) & 0xFFFF
    assert torch.equal(bits, values.bfloat16().view(torch.int16).int() & 0xFFFF)
    (nan,) = torch.tensor([function(math.nan)]).view(torch.int32).tolist()
    assert nan & 0x7FFF > 0x7F80
