"""The meter of allocations.py counts, and notices a library that copies bfloat16."""

import allocations
import pytest
import torch

CONVERTED = {
    "the result in float32, as by oneDNN without BF16": lambda a, b: torch.empty(len(a), b.shape[1]),
    "an operand in float32": lambda *operands: max(operands, key=torch.numel).float(),
    "an operand in a layout of its own": lambda *operands: max(operands, key=torch.numel).clone(),
}


@pytest.fixture
def ask():
    """`copies_bfloat16` as if for the first time."""
    allocations.copies_bfloat16.cache_clear()
    yield allocations.copies_bfloat16
    allocations.copies_bfloat16.cache_clear()


def test_what_is_alive_at_once_is_counted():
    a, b = torch.randn(64, 2048), torch.randn(2048, 256)

    def two_then_one():
        first, second = torch.mm(a, b), torch.mm(a, b)
        del first, second
        return torch.empty(100_000)

    assert allocations.measure(two_then_one) == (2 * 2 * 64 * 2048 * 256, 400_000, 400_000)


@pytest.mark.parametrize("name", ["mm", "addmm"])
@pytest.mark.parametrize("copied", CONVERTED.values(), ids=CONVERTED.keys())
def test_a_library_that_copies_is_noticed(copied, name, ask, monkeypatch):
    monkeypatch.setattr(allocations, "multiplies_bfloat16", lambda: False)
    product = getattr(torch, name)

    def copying(*operands):
        held = copied(*operands[-2:])
        return product(*operands) if held is not None else None

    monkeypatch.setattr(torch, name, copying)
    assert ask()
    with pytest.raises(pytest.skip.Exception, match="copies the bfloat16"):
        allocations.skip_where_copied(torch.bfloat16)
    allocations.skip_where_copied(torch.float32)


def test_buffers_of_a_matmul_are_no_copies(ask, monkeypatch):
    monkeypatch.setattr(allocations, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(torch, "mm", lambda a, b: torch.zeros(3 * 10**6, dtype=torch.int8)[:1] + 0)
    monkeypatch.setattr(torch, "addmm", lambda c, a, b: c + torch.zeros(3 * 10**6, dtype=torch.int8)[:1])
    assert not ask()


@pytest.mark.parametrize("name", [None, "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_an_x86_cpu_multiplies_has_to_hold_unless_it_is_lowered(machine, name, ask, monkeypatch):
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "AVX512_CORE")
    monkeypatch.setattr(allocations, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(allocations.platform, "machine", lambda: machine)
    monkeypatch.setattr(allocations, "_held", lambda n, d: 2**30)
    assert ask() == (machine == "aarch64" or name is not None)
