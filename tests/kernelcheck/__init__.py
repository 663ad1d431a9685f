"""Verify Triton kernels on a machine without a GPU.

    interpreter.py   the Triton interpreter with bfloat16 as a GPU computes it, and a driver for it
    races.py         every memory access of an interpreted launch checked: inside its tensor, no cross-program race
    schedules.py     interpreted launches in shuffled and interleaved program orders
    simt/            the *compiled* kernel executed on the CPU, one fibre per GPU thread
    memory.py        poisoned `torch.empty`, and lazily mapped tensors too large for int32 offsets
    plugin.py        the pytest side: `--kernels=interpret|simt|cuda` and the `kernels` marker

Nothing is imported here: triton reads TRITON_INTERPRET when `@triton.jit` decorates, so `plugin.configure` has to run
first.
"""
