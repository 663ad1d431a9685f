"""Planted races and out-of-bounds accesses are found and named; correct kernels pass (kernelcheck/races.py)."""

import pytest
import torch
import triton
import triton.language as tl
from kernelcheck.memory import lazily_mapped

pytestmark = pytest.mark.kernels(modes=("interpret",))


def _add(n: int, bound: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    from kernelcheck.samples import add_kernel

    x, y, out = torch.randn(n), torch.randn(n), torch.empty(n)
    add_kernel[(triton.cdiv(n, 64),)](x, y, out_ptr=out, n=n, BLOCK=64, BOUND=bound)
    return out, x + y


def test_correct_kernels_pass():
    from kernelcheck.races import checked
    from kernelcheck.samples import column_sum_kernel, logsumexp_kernel, matmul_kernel

    x = torch.randn(5, 40)
    with checked():
        out, expected = _add(200)
        assert torch.equal(out, expected)
        out = torch.empty(5)
        logsumexp_kernel[(5,)](x, out, 40, 40, BLOCK_N=16)
        torch.testing.assert_close(out, x.logsumexp(1))
        out = torch.zeros(40)
        column_sum_kernel[(5,)](x, out, 40, ATOMIC=True, BLOCK_N=64)
        torch.testing.assert_close(out, x.sum(0))
        out = torch.empty(5, 5)
        matmul_kernel[(1, 1)](x, x.T.contiguous(), out, 5, 5, 40, 40, 5, 5, BLOCK_M=16, BLOCK_N=16, BLOCK_K=32)
        torch.testing.assert_close(out, x @ x.T)


def test_a_lane_past_the_end_is_found_and_named():
    from kernelcheck.races import MemoryFinding, checked

    with (
        checked(),
        pytest.raises(MemoryFinding, match=r"out-of-bounds load in add_kernel, program \(3, 0, 0\).* x_ptr"),
    ):
        _add(200, bound=1)


def test_running_into_a_neighbouring_tensor_is_found():
    from kernelcheck.races import MemoryFinding, checked
    from kernelcheck.samples import add_kernel

    # All three lie in one allocation: the address past the end of x is a valid address of y.
    x, y, out = torch.zeros(3, 64)
    with checked(), pytest.raises(MemoryFinding, match=r"1 lanes outside x_ptr .* at byte 256 of it"):
        add_kernel[(1,)](x, y, out, 63 + 1, BLOCK=128, BOUND=1)


def test_a_hit_between_the_rows_of_a_view_is_found():
    from kernelcheck.races import MemoryFinding, checked
    from kernelcheck.samples import logsumexp_kernel

    wide = torch.randn(4, 40)
    out = torch.empty(4)
    with checked():
        logsumexp_kernel[(4,)](wide[:, :32], out, 32, 40, BLOCK_N=32)
    with checked(), pytest.raises(MemoryFinding, match=r"1 lanes outside x_ptr .* at byte 128 of it"):
        logsumexp_kernel[(4,)](wide[:, :32], out, 33, 40, BLOCK_N=64)


def test_an_offset_that_wraps_around_is_found():
    from kernelcheck.races import MemoryFinding, checked
    from kernelcheck.samples import int32_offset_kernel

    stride = 2**30
    x = lazily_mapped(3 * stride + 1, torch.uint8)
    x[3 * stride] = 42
    out = torch.zeros(1, dtype=torch.uint8)
    with checked(), pytest.raises(MemoryFinding, match=r"out-of-bounds load in int32_offset_kernel.* x_ptr"):
        int32_offset_kernel[(1,)](x, out, stride, WIDE=False)
    with checked():
        int32_offset_kernel[(1,)](x, out, stride, WIDE=True)
    assert out.item() == 42


def test_load_add_store_from_several_programs_is_a_race():
    from kernelcheck.races import MemoryFinding, checked
    from kernelcheck.samples import column_sum_kernel

    x, out = torch.ones(5, 40), torch.zeros(40)
    expected = "race in column_sum_kernel at 40 places, the first byte 0 of out_ptr: program 0 loads, program 0 stores"
    with checked(), pytest.raises(MemoryFinding, match=expected):
        column_sum_kernel[(5,)](x, out, 40, ATOMIC=False, BLOCK_N=64)


@pytest.mark.parametrize("same", [False, True], ids=["different-values", "equal-values"])
def test_two_programs_storing_to_one_address_is_a_race(same):
    from kernelcheck.races import MemoryFinding, checked
    from kernelcheck.samples import last_writer_kernel

    out = torch.zeros(1, dtype=torch.int32)
    with checked(), pytest.raises(MemoryFinding, match="program 0 stores, program 1 stores"):
        last_writer_kernel[(2,)](out, SAME=same)
    with checked():
        last_writer_kernel[(1,)](out, SAME=same)


@triton.jit
def _mixed_width_kernel(wide_ptr, narrow_ptr):
    """Program 0 stores the 8 bytes whose upper half program 1 loads as 4."""
    if tl.program_id(0) == 0:
        tl.store(wide_ptr, tl.full((), 5, tl.int64))
    else:
        tl.store(narrow_ptr + 2, tl.load(narrow_ptr + 1))


def test_overlapping_accesses_of_different_width_race():
    from kernelcheck.races import MemoryFinding, checked

    memory = torch.zeros(2, dtype=torch.int64)
    with checked(), pytest.raises(MemoryFinding, match="race in _mixed_width_kernel at 1 places, the first byte 4"):
        _mixed_width_kernel[(2,)](memory, memory.view(torch.int32))


@triton.jit
def _descriptor_copy_kernel(x_ptr, out_ptr, m, n, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [m, n], [n, 1], [BLOCK, BLOCK])
    out = tl.make_tensor_descriptor(out_ptr, [m + SHIFT, n], [n, 1], [BLOCK, BLOCK])
    row = tl.program_id(0) * BLOCK
    out.store([row + SHIFT, 0], x.load([row, 0]))


def test_descriptors_are_checked():
    from kernelcheck.races import MemoryFinding, checked

    x = torch.randn(20, 16)
    out = torch.empty_like(x)
    with checked():
        _descriptor_copy_kernel[(2,)](x, out, 20, 16, BLOCK=16, SHIFT=0)
    assert torch.equal(out, x)
    with checked(), pytest.raises(MemoryFinding, match=r"out-of-bounds store in _descriptor_copy_kernel.* out_ptr"):
        _descriptor_copy_kernel[(2,)](x, out, 20, 16, BLOCK=16, SHIFT=4)


def test_after_the_block_nothing_is_checked():
    from kernelcheck.races import checked
    from kernelcheck.samples import column_sum_kernel

    with checked():
        pass
    x, out = torch.ones(5, 40), torch.zeros(40)
    column_sum_kernel[(5,)](x, out, 40, ATOMIC=False, BLOCK_N=64)
    assert (out == 5).all()
