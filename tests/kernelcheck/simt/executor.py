"""Build the C runtime and the translated kernels, and run one launch.

Needs llvmlite (code generation for this machine) and gcc (the runtime); without either, `UnavailableExecutor` says so.
"""

import ctypes
import enum
import functools
import hashlib
import platform
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..findings import MemoryFinding
from . import intrinsics, lowering

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
SHARED_BYTES = 64 * 1024
MAX_THREADS = 1024
KINDS = ("load", "atomic", "store")
TOUCHED = ("loads or atomically updates", "atomically updates", "stores")
SEVERAL = 0xFFFFFFFF


class UnavailableExecutor(RuntimeError):
    """A tool that the executor needs is missing."""


class Outcome(enum.IntEnum):
    """`Outcome` of runtime.h."""

    COMPLETED = 0
    DEADLOCK = 1
    DIVERGENT_COLLECTIVE = 2
    UNKNOWN_DPP = 3
    OUT_OF_BOUNDS = 4
    GLOBAL_RACE = 5
    SHARED_OUT_OF_BOUNDS = 6
    SHARED_RACE = 7


class Finding(ctypes.Structure):
    """`Finding` of runtime.h."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("program", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32),
        ("other", ctypes.c_uint32),
        ("other_kind", ctypes.c_uint32),
    )


class Region(ctypes.Structure):
    """`Region` of runtime.h."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("unit", ctypes.c_uint64),
        ("writer", ctypes.c_void_p),
        ("toucher", ctypes.c_void_p),
    )


@functools.cache
def runtime() -> ctypes.CDLL:
    """The C runtime, compiled on first use into triton's cache folder, its functions known to the code generator."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        raise UnavailableExecutor(
            f"--kernels=simt runs on x86-64 Linux, not on {platform.system()} {platform.machine()}"
        )
    try:
        import llvmlite.binding as llvm
    except ImportError as error:
        raise UnavailableExecutor("--kernels=simt needs llvmlite: pip install 'llvmlite>=0.50'") from error
    library = ctypes.CDLL(str(_build()))
    library.simt_shared_memory.restype = ctypes.c_void_p
    library.simt_shadow.restype = ctypes.c_void_p
    library.simt_shadow.argtypes = (ctypes.c_uint64,)
    library.simt_free_shadow.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
    if not library.simt_shared_memory():
        raise UnavailableExecutor("--kernels=simt: the system grants no memory below 4 GiB for shared memory")
    callable_from_kernels = [*intrinsics.RENAMED.values(), *(entry[0] for entry in intrinsics.SHUFFLES.values())]
    for name in [*callable_from_kernels, *lowering.CHECKS.values(), "simt_wmma"]:
        if name.startswith("simt_"):
            llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    # A CPU without AVX512-BF16 rounds by a function of compiler-rt, which is not here.
    llvm.add_symbol("__truncsfbf2", ctypes.cast(library.simt_round_to_bf16, ctypes.c_void_p).value)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return library


def _build() -> Path:
    from triton.runtime.cache import get_cache_manager

    compiler = shutil.which("gcc")
    if compiler is None:
        raise UnavailableExecutor("--kernels=simt needs gcc to build its runtime, and there is none in PATH")
    # _FORTIFY_SOURCE takes the longjmp between fibre stacks for an attack.
    command = [compiler, "-O2", "-march=native", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", *map(str, SOURCES)]
    sources = b"".join(path.read_bytes() for path in [*SOURCES, Path(__file__).with_name("runtime.h")])
    key = hashlib.sha256(sources + " ".join(command).encode() + platform.node().encode()).hexdigest()
    cache = get_cache_manager(key)
    if cached := cache.get_file("simt_runtime.so"):
        return Path(cached)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "simt_runtime.so"
        built = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
        if built.returncode:
            raise UnavailableExecutor(f"--kernels=simt: gcc could not build its runtime:\n{built.stderr}")
        return Path(cache.put(output.read_bytes(), "simt_runtime.so", binary=True))


class HostKernel:
    """A compiled Triton kernel as a function of this machine."""

    def __init__(self, device_ir: str, name: str, shared_bytes: int) -> None:
        library = runtime()
        import llvmlite.binding as llvm

        if shared_bytes > SHARED_BYTES:
            raise lowering.UnsupportedKernel(
                f"{name} needs {shared_bytes} bytes of shared memory, more than {SHARED_BYTES}"
            )
        self.name = name
        self.shared_bytes = shared_bytes
        self.shared_memory = library.simt_shared_memory()
        host = lowering.lower(device_ir, name, self.shared_memory)
        self.argument_count = host.argument_count
        module = llvm.parse_assembly(host.ir)
        module.verify()
        target = llvm.Target.from_default_triple()
        machine = target.create_target_machine(opt=2, cpu=llvm.get_host_cpu_name(), jit=True)
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        self._entry = self._engine.get_function_address("simt_entry")

    def launch(self, grid: tuple[int, int, int], threads: int, arguments: list[Any], names: list[str]) -> None:
        """Run every program of `grid`; `arguments` (CPU tensors, numbers, None) in the kernel's order.

        Raises `MemoryFinding` for an access outside all of the tensors and for races, `RuntimeError` for a deadlock.
        """
        slots = (ctypes.c_uint64 * max(1, self.argument_count))(*map(_slot, arguments))
        tensors = [(name, a) for name, a in zip(names, arguments, strict=True) if isinstance(a, torch.Tensor)]
        for name, tensor in tensors:
            if tensor.device.type != "cpu":
                raise ValueError(f"{self.name}: {name} is on {tensor.device}, --kernels=simt takes CPU tensors")
        regions, labels = _regions(tensors)
        finding = Finding()
        try:
            outcome = runtime().simt_launch(
                ctypes.c_void_p(self._entry),
                slots,
                (ctypes.c_uint32 * 3)(*grid),
                threads,
                self.shared_bytes,
                regions,
                len(regions),
                ctypes.byref(finding),
            )
        finally:
            for region in regions:
                _free_shadow(region)
        if outcome:
            self._raise(outcome, finding, grid, regions, labels)

    def _raise(self, outcome: int, finding: Finding, grid: tuple, regions: Any, labels: list[str]) -> None:
        program = tuple(finding.program)
        lane = f"{self.name}, program {program}, thread {finding.thread}"
        access = f"{KINDS[finding.kind]} of {finding.size} bytes"
        if outcome == Outcome.DEADLOCK:
            raise RuntimeError(f"{self.name}, program {program}: deadlock, some lanes wait where others never come")
        if outcome == Outcome.DIVERGENT_COLLECTIVE:
            raise RuntimeError(f"{self.name}: lanes of one wave met at different collectives")
        if outcome == Outcome.UNKNOWN_DPP:
            raise RuntimeError(f"{self.name}: unknown DPP control word")
        if outcome == Outcome.OUT_OF_BOUNDS:
            distance = [min(abs(finding.address - r.start), abs(finding.address - r.end)) for r in regions]
            near = ""
            if distance:
                nearest = distance.index(min(distance))
                near = f", at byte {finding.address - regions[nearest].start} of {labels[nearest]}"
            raise MemoryFinding(f"out-of-bounds {access} in {lane}{near}")
        if outcome == Outcome.GLOBAL_RACE:
            other = "several programs" if finding.other == SEVERAL else f"program {_program(finding.other, grid)}"
            where, label = next(
                (r, n) for r, n in zip(regions, labels, strict=True) if r.start <= finding.address < r.end
            )
            raise MemoryFinding(
                f"race: {access} in {lane}, at byte {finding.address - where.start} of {label}, "
                f"which {other} {TOUCHED[finding.other_kind]}"
            )
        if outcome == Outcome.SHARED_OUT_OF_BOUNDS:
            raise MemoryFinding(f"out-of-bounds {access} in {lane}: byte {finding.address} of shared memory")
        if outcome == Outcome.SHARED_RACE:
            raise MemoryFinding(
                f"race: {access} in {lane}: byte {finding.address} of shared memory, which wave {finding.other} "
                f"{TOUCHED[finding.other_kind]}, with no barrier in between"
            )
        raise RuntimeError(f"{self.name}: the runtime refused the launch (outcome {outcome})")


def _slot(value: Any) -> int:
    """A kernel argument as the 8 bytes from which the entry point loads it."""
    if value is None:
        return 0
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return int(value) & 0xFFFFFFFFFFFFFFFF


def _regions(tensors: list[tuple[str, torch.Tensor]]) -> tuple[Any, list[str]]:
    """The memory of the tensors as disjoint regions in order, overlapping tensors merged, with the names in each."""
    spans = []
    for name, tensor in tensors:
        if tensor.numel():
            elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            start, size = tensor.data_ptr(), tensor.element_size()
            spans.append((start, start + elements * size, size, name))
    merged: list[list[Any]] = []
    for start, end, unit, name in sorted(spans):
        if merged and start < merged[-1][1]:
            last = merged[-1]
            merged[-1] = [last[0], max(last[1], end), min(last[2], unit), f"{last[3]}/{name}"]
        else:
            merged.append([start, end, unit, name])
    regions = (Region * len(merged))()
    for region, (start, end, unit, _) in zip(regions, merged, strict=True):
        region.start, region.end, region.unit = start, end, unit
        region.writer = runtime().simt_shadow(_shadow_bytes(region))
        region.toucher = runtime().simt_shadow(_shadow_bytes(region))
        if not region.writer or not region.toucher:
            raise MemoryError(f"no address space to watch {end - start} bytes of tensors")
    return regions, [label for *_, label in merged]


def _shadow_bytes(region: Region) -> int:
    return 4 * ((region.end - region.start) // region.unit + 1)


def _free_shadow(region: Region) -> None:
    runtime().simt_free_shadow(region.writer, _shadow_bytes(region))
    runtime().simt_free_shadow(region.toucher, _shadow_bytes(region))


def _program(number: int, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    return number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1])
