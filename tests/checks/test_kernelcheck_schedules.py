"""Shuffled and interleaved grids run every program once, and make a lost update lose (kernelcheck/schedules.py)."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.kernels(modes=("interpret",))


def _column_sum(atomic: bool) -> torch.Tensor:
    from kernelcheck.samples import column_sum_kernel

    out = torch.zeros(40)
    column_sum_kernel[(12,)](torch.ones(12, 40), out, 40, ATOMIC=atomic, BLOCK_N=64)
    return out


def test_a_lost_update_shows_only_when_interleaved():
    from kernelcheck.schedules import interleaved

    assert (_column_sum(atomic=False) == 12).all()
    with interleaved(seed=0):
        assert (_column_sum(atomic=False) < 12).all()
        assert (_column_sum(atomic=True) == 12).all()
    assert (_column_sum(atomic=False) == 12).all()


def test_the_last_writer_changes_when_shuffled():
    from kernelcheck.samples import last_writer_kernel
    from kernelcheck.schedules import shuffled

    winners = set()
    for seed in range(6):
        out = torch.empty(1, dtype=torch.int32)
        with shuffled(seed):
            last_writer_kernel[(8,)](out, SAME=False)
        winners.add(out.item())
    assert len(winners) > 1


@triton.jit
def _program_number_kernel(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(out_ptr + place, tl.load(out_ptr + place) + 1 + place)


@pytest.mark.parametrize("schedule", ["shuffled", "interleaved"])
def test_every_program_runs_once(schedule):
    from kernelcheck import schedules

    out = torch.zeros(24, dtype=torch.int64)
    with getattr(schedules, schedule)(seed=3):
        _program_number_kernel[(2, 3, 4)](out)
    assert torch.equal(out, torch.arange(24) + 1)


def test_the_same_seed_gives_the_same_schedule():
    from kernelcheck.samples import last_writer_kernel
    from kernelcheck.schedules import interleaved

    def winner(seed: int) -> int:
        out = torch.empty(1, dtype=torch.int32)
        with interleaved(seed):
            last_writer_kernel[(8,)](out, SAME=False)
        return out.item()

    assert [winner(seed) for seed in range(5)] == [winner(seed) for seed in range(5)]


def test_one_program_of_a_large_grid_runs():
    from kernelcheck.samples import add_kernel
    from kernelcheck.schedules import only

    x, y, out = torch.randn(3, 1000)
    before = out.clone()
    with only(lambda size: size - 1):
        add_kernel[(16,)](x, y, out, 1000, BLOCK=64)
    assert torch.equal(out[:960], before[:960])
    assert torch.equal(out[960:], (x + y)[960:])


def test_findings_come_through_an_interleaved_grid():
    from kernelcheck.races import MemoryFinding, checked
    from kernelcheck.samples import add_kernel
    from kernelcheck.schedules import interleaved

    x, y, out = torch.randn(3, 200)
    with checked(), interleaved(seed=0), pytest.raises(MemoryFinding, match="out-of-bounds"):
        add_kernel[(4,)](x, y, out, 200, BLOCK=64, BOUND=2)
    with checked(), interleaved(seed=0), pytest.raises(MemoryFinding, match="race in column_sum_kernel"):
        _column_sum(atomic=False)
