"""Execute the compiled kernel on the CPU.

    lowering.py    LLVM IR of Triton's AMD gfx1100 backend -> LLVM IR for this machine
    intrinsics.py  what stands for each AMD intrinsic
    runtime.h, *.c what the hardware does between instructions: lanes as fibres (scheduler.c), shuffles and matrix
                   instructions (collectives.c), checks of every memory access (accesses.c)
    executor.py    builds both, and runs one launch
    driver.py      the triton driver that makes `kernel[grid](cpu_tensors...)` do so

What runs is the product of Triton's own compiler: frontend, TTIR, TTGIR, layouts, pipelining, shared memory allocation
and barriers, the AMD lowering to LLVM IR. Why gfx1100: its wave has 32 lanes as a CUDA warp, its IR has no inline
assembly, and it uses a dozen intrinsics. Not covered: the NVIDIA lowering, tf32, timing, kernels that need more than
64 KiB of shared memory, `tl.device_print`, inline assembly.

Checked while it runs, at every access: that it lies in one of the launch's tensors (running from one tensor into
another of the same launch is not seen here; races.py sees it), that no byte is stored plainly by one program and
touched by another, and that two waves do not use a byte of shared memory without a barrier in between.
"""
