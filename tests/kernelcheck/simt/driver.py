"""The triton driver of the executor: after `install()`, `kernel[grid](cpu_tensors...)` runs the compiled kernel here.

It uses triton's own extension points only: a driver object, and the hook that edits a backend's compile stages. The
stages up to LLVM IR are Triton's; the two after it, which would make AMD machine code, hand the IR on, so that what
triton then loads as a "binary" is the IR that executor.py translates.
"""

import os
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import decompose_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..interpreter import InterpreterDriver
from .executor import MAX_THREADS, SHARED_BYTES, HostKernel, runtime

TARGET = GPUTarget("hip", "gfx1100", 32)
STAGES_KEY = "simt: LLVM IR instead of machine code"


def keep_llvm_ir(backend=None, stages=None, options=None, language=None, capability=None):
    """Triton calls this without arguments for a cache key, and with them to edit the compile stages."""
    if stages is None:
        return STAGES_KEY, STAGES_KEY
    if options.arch != TARGET.arch:
        return None

    def name_kernel(ir: str, metadata: dict[str, Any]) -> str:
        (metadata["name"],) = re.findall(r"define amdgpu_kernel void @(\w+)", ir)
        return ir

    stages["amdgcn"] = name_kernel
    stages["hsaco"] = lambda ir, metadata: ir.encode()
    return None


class SimtLauncher:
    """Triton makes one per compiled kernel and calls it for each launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds = list(source.signature.values())
        self.names = list(source.signature)
        self.threads = metadata.num_warps * TARGET.warp_size

    def __call__(self, x, y, z, stream, kernel, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        flat: list[Any] = []
        names: list[str] = []
        for name, kind, argument in zip(self.names, self.kinds, arguments, strict=True):
            if kind == "constexpr":
                continue
            if isinstance(argument, tuple):
                raise NotImplementedError(f"{kernel.name}: {name} is a tuple, which --kernels=simt does not pass on")
            values = decompose_descriptor(argument) if isinstance(argument, TensorDescriptor) else [argument]
            flat += values
            names += [name] * len(values)
        # Two pointers to scratch memory follow, which these kernels do not use.
        missing = kernel.argument_count - len(flat)
        kernel.launch((x, y, z), self.threads, flat + [None] * missing, names + ["scratch"] * missing)


class SimtUtils:
    """What triton's compiled kernels ask for when they load."""

    def load_binary(self, name: str, binary: bytes, shared_bytes: int, device: int) -> tuple:
        kernel = HostKernel(binary.decode(), name, shared_bytes)
        registers, spills = 0, 0
        return kernel, kernel, registers, spills, MAX_THREADS

    def unload_module(self, module: HostKernel) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_BYTES,
            "multiprocessor_count": 4,
            "max_num_regs": 65536,
            "warpSize": TARGET.warp_size,
        }


class SimtDriver(InterpreterDriver):
    """A gfx1100 whose memory is this machine's: autotuning keeps the first configuration that fits."""

    launcher_cls = SimtLauncher
    binary_ext = "hsaco"

    def __init__(self) -> None:
        self._utils = SimtUtils()
        super().__init__(TARGET, SHARED_BYTES, multiprocessor_count=4)

    @property
    def utils(self) -> SimtUtils:
        return self._utils


def install() -> None:
    """Make this process run Triton kernels on the CPU. Raises `UnavailableExecutor` in words if a tool is missing."""
    runtime()
    # Buffer instructions hide addresses in descriptors that only AMD hardware reads.
    os.environ["AMDGCN_USE_BUFFER_OPS"] = "0"
    # What triton does where nobody chooses; saying so keeps 3.9 from warning that it will change.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    triton.knobs.runtime.add_stages_inspection_hook = keep_llvm_ir
    triton.runtime.driver.set_active(SimtDriver())
