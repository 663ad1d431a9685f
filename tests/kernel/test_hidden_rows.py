"""Rows of hidden states times their coefficients, gradients back at their places, means: each beside torch."""

import pytest
import torch
from orpo_kernels.rows import Rows

pytestmark = pytest.mark.kernels


def vectors(n: int, d: int, dtype=torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g).to(dtype), torch.randn(n, generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(37, 300), (8, 256), (1, 1), (0, 5)])
def test_rows_times_their_coefficients(n, d, dtype, kernel_device):
    from orpo_kernels.gpu.hidden_rows import weighted

    x, coef = vectors(n, d, dtype)
    found = weighted(x.to(kernel_device), coef.to(kernel_device), dtype)
    assert torch.equal(found.cpu(), (x.float() * coef[:, None]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [5, 1100])
def test_gradients_return_to_their_places(d, dtype, kernel_device):
    """A hidden state that two rows read gets both, and one that none reads gets zeros."""
    from orpo_kernels.gpu.hidden_rows import placed

    dx, coef = vectors(30, d)
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:30]
    rows[:4] = rows[-4:]
    hidden = torch.empty(40, d, dtype=dtype, device=kernel_device)
    found = placed(dx.to(kernel_device), coef.to(kernel_device), rows.to(kernel_device), hidden, dtype)
    expected = torch.zeros(40, d).index_add_(0, rows, dx * coef[:, None])
    assert found.dtype == dtype and torch.equal(found.cpu(), expected.to(dtype))


def test_rows_with_a_coefficient_of_zero_are_not_read(kernel_device):
    """Or a CUDA graph filled up with them would walk the square of their number; other hidden states lose nothing."""
    from orpo_kernels.gpu.hidden_rows import placed

    dx, coef = vectors(700, 3)
    rows = torch.arange(700)
    rows[20:] = 5
    coef[20:600], coef[600:-1] = 0.0, -0.0
    # Any of them would show.
    dx[20:-1] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    hidden = torch.empty(21, 3, device=kernel_device)
    found = placed(dx.to(kernel_device), coef.to(kernel_device), rows.to(kernel_device), hidden, torch.float32).cpu()
    expected = torch.zeros(21, 3)
    expected[:20] = dx[:20] * coef[:20, None]
    expected[5] += dx[-1] * coef[-1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_coefficient_that_is_no_number_arrives(number, kernel_device):
    from orpo_kernels.gpu.hidden_rows import placed

    dx, coef, rows = torch.ones(2, 1), torch.tensor([0.0, number]), torch.tensor([0, 1])
    hidden = torch.empty(2, 1, device=kernel_device)
    found = placed(dx.to(kernel_device), coef.to(kernel_device), rows.to(kernel_device), hidden, torch.float32)
    torch.testing.assert_close(found.cpu(), torch.tensor([[0.0], [number]]), equal_nan=True)


def test_without_rows_every_gradient_is_zero(kernel_device):
    from orpo_kernels.gpu.hidden_rows import placed

    nothing = torch.empty(0, 3, device=kernel_device)
    rows = torch.empty(0, dtype=torch.int64, device=kernel_device)
    found = placed(nothing, nothing[:, 0], rows, torch.empty(4, 3, device=kernel_device), torch.float32)
    assert found.tolist() == [[0, 0, 0]] * 4


@pytest.mark.kernels(modes=("interpret",))
@pytest.mark.parametrize("schedule", ["shuffled", "interleaved"])
def test_the_order_of_programs_changes_no_bit(schedule):
    from kernelcheck import schedules
    from orpo_kernels.gpu.hidden_rows import placed

    dx, coef = vectors(400, 3)
    # Each hidden state is read by four rows, two of each program.
    rows = torch.arange(100).repeat(4)
    hidden = torch.empty(100, 3)
    expected = placed(dx, coef, rows, hidden, torch.float32)
    with getattr(schedules, schedule)(seed=5):
        assert torch.equal(placed(dx, coef, rows, hidden, torch.float32), expected)


@pytest.mark.kernels(modes=("interpret",))
def test_rows_beyond_int32():
    from kernelcheck.memory import lazily_mapped
    from kernelcheck.races import checked
    from kernelcheck.schedules import only
    from orpo_kernels.gpu.hidden_rows import place_kernel, weighted

    n, d = 136, 2**24
    x = lazily_mapped(n * d, torch.float32).view(n, d)
    assert x.numel() > 2**31
    x[-1, -3:] = torch.tensor([1.0, 2.0, 3.0])
    with checked(), only(lambda size: size - 1):
        found = weighted(x, torch.full((n,), 2.0), torch.float32)
        assert found[-1, -3:].tolist() == [2, 4, 6]
        out = lazily_mapped(n * d, torch.float32).view(n, d)
        head, none = torch.full((n,), n - 1, dtype=torch.int32), torch.full((n,), -1, dtype=torch.int32)
        place_kernel[(n * d // 1024,)](x, torch.full((n,), 3.0), head, none, out, D=d, BLOCK_D=1024)
    assert out[-1, -3:].tolist() == [3, 6, 9]


@pytest.mark.parametrize("all_count", [True, False], ids=["all rows count", "some rows count"])
@pytest.mark.parametrize("n", [11, 5000])
def test_means_of_the_rows_that_count(n, all_count, kernel_device):
    from orpo_kernels.cpu import stages as in_torch
    from orpo_kernels.gpu.mean_hidden import mean_hidden

    g = torch.Generator().manual_seed(0)
    x, _ = vectors(n, 7)
    sequence = torch.randint(0, 4, (n,), generator=g).sort().values
    masks = (torch.rand(2, n, generator=g) < 0.4) | all_count
    rows = Rows(torch.arange(n), torch.zeros_like(sequence), sequence, *masks, pairs=2, all_count=all_count)
    found = mean_hidden(x.to(kernel_device), rows.to(kernel_device), torch.float32)
    torch.testing.assert_close(found.cpu(), in_torch.mean_hidden(x, rows, torch.float32))
