"""The Triton interpreter (TRITON_INTERPRET=1), made honest about bfloat16.

The interpreter keeps a bfloat16 block as the uint16 numpy array of its bit patterns, and computes on those: without
`install()` a product of two bfloat16 tensors, or `tl.dot` of them, multiplies bit patterns and gives a plausible wrong
number. After `install()`

* casts round to nearest, ties to even, as the hardware's conversions do;
* arithmetic widens to float32, computes, and rounds once, which is what the compiler emits;
* `tl.dot` widens its operands (a product of two bfloat16 is exact in float32) and accumulates in float32;
* reductions, scans and clamps of bfloat16 raise: the GPU widens them in ways that the interpreter does not model.

Still different from a GPU, and why a kernel also needs compiling: the interpreter accepts what the compiler rejects,
does not round `tl.dot` operands to tf32, and runs the programs of a grid one after another (see races.py and
schedules.py).
"""

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from triton.backends.compiler import GPUTarget

Handle = triton_interpreter.TensorHandle
Builder = triton_interpreter.InterpreterBuilder


def widen(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bfloat16 -> the float32 of the same value, exactly; any shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bit patterns of the nearest bfloat16, ties to even; NaN stays (quiet) NaN; any shape."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    # Without this the rounding carry can turn a NaN whose payload is all ones into zero or infinity.
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Handle) -> bool:
    # A comparison of two bfloat16 blocks leaves a bool array under the operands' type.
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _float32_data(handle: Handle) -> np.ndarray:
    return widen(handle.data) if _is_bf16(handle) else handle.data


def install() -> None:
    """Patch the interpreter, once per process. Needs triton 3.8 or 3.9."""
    if getattr(Builder, "_bf16_is_honest", False):
        return
    Builder._bf16_is_honest = True
    original_cast, original_dot = Builder.cast_impl, Builder.create_dot
    original_unary, original_binary, original_ternary = Builder.unary_op, Builder.binary_op, Builder.ternary_op
    original_fma, original_fp_to_fp = Builder.create_fma, Builder.create_fp_to_fp

    def cast_impl(self, source, target_type):
        target = target_type.scalar
        if target == tl.bfloat16 and not _is_bf16(source):
            return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        if _is_bf16(source) and target != tl.bfloat16:
            source = Handle(widen(source.data), tl.float32)
            return source if target == tl.float32 else original_cast(self, source, target_type)
        return original_cast(self, source, target_type)

    def create_fp_to_fp(self, source, target_type, rounding_mode):
        if tl.bfloat16 not in (source.dtype.scalar, target_type.scalar):
            return original_fp_to_fp(self, source, target_type, rounding_mode)
        if rounding_mode == triton_interpreter._ir.ROUNDING_MODE.RTZ:
            raise NotImplementedError("interpreted bfloat16 cast towards zero: only round to nearest is modelled")
        return cast_impl(self, source, target_type)

    def create_dot(self, a, b, *rest):
        a, b = (Handle(widen(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b))
        return original_dot(self, a, b, *rest)

    def unary_op(self, x, op):
        if not _is_bf16(x):
            return original_unary(self, x, op)
        return Handle(narrow(op(widen(x.data))), tl.bfloat16)

    def binary_op(self, x, y, op):
        if not (_is_bf16(x) or _is_bf16(y)):
            return original_binary(self, x, y, op)
        result = op(_float32_data(x), _float32_data(y))
        if result.dtype == np.bool_:
            return Handle(result, tl.int1)
        return Handle(narrow(result), tl.bfloat16)

    def ternary_op(self, x, y, z, op):
        if op is np.clip and _is_bf16(z):
            raise NotImplementedError("interpreted tl.clamp of bfloat16: cast to float32 first")
        return original_ternary(self, x, y, z, op)

    def create_fma(self, x, y, z):
        if not _is_bf16(z):
            return original_fma(self, x, y, z)
        product = np.multiply(_float32_data(x), _float32_data(y), dtype=np.float64)
        return Handle(narrow((product + widen(z.data)).astype(np.float32)), tl.bfloat16)

    # The builder's other methods (create_fadd, create_fp_trunc, ...) call these by name, so replacing these is enough.
    for function in (cast_impl, create_fp_to_fp, create_dot, unary_op, binary_op, ternary_op, create_fma):
        setattr(Builder, function.__name__, function)
    Builder.get_bf16 = lambda self, value: Handle(narrow(np.array([value], dtype=np.float32)), tl.bfloat16)
    for operation in (triton_interpreter.ReduceOps, triton_interpreter.ScanOps):
        _refuse_bf16(operation)


def _refuse_bf16(operation: type) -> None:
    original_apply = operation.apply

    def apply(self, input):
        for tensor in input if isinstance(input, tuple) else (input,):
            if tensor.dtype == tl.bfloat16:
                raise NotImplementedError(f"interpreted {operation.__name__} of bfloat16: cast to float32 first")
        return original_apply(self, input)

    operation.apply = apply


class InterpreterDriver:
    """What launchers and `triton.autotune` ask of a driver, answered for interpreted kernels on CPU tensors.

    Autotuning runs every configuration once and, since no time means anything here, keeps the first.
    """

    def __init__(self, target: GPUTarget, max_shared_mem: int, multiprocessor_count: int) -> None:
        self.target = target
        self.properties = {
            "max_shared_mem": max_shared_mem,
            "multiprocessor_count": multiprocessor_count,
            "max_num_regs": 65536,
            "warpSize": target.warp_size,
        }

    @property
    def utils(self) -> "InterpreterDriver":
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        def run_once(function, quantiles=None, **_):
            function()
            return [1.0] * len(quantiles or (1,))

        return run_once

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


def install_driver() -> None:
    """Let launchers and autotuned kernels believe in a small H100."""
    triton.runtime.driver.set_active(InterpreterDriver(GPUTarget("cuda", 90, 32), 227 * 1024, multiprocessor_count=132))


def install_libdevice() -> None:
    """Give interpreted kernels of other packages the libdevice functions that numpy has; ours use none."""
    from triton.language.extra import libdevice

    def elementwise(function):
        return lambda x, _semantic=None: tl.tensor(Handle(function(x.handle.data), x.handle.dtype), x.type)

    for name in ("exp", "exp2", "expm1", "log", "log1p", "log2", "tanh"):
        setattr(libdevice, name, elementwise(getattr(np, name)))
    libdevice.rsqrt = elementwise(lambda data: 1 / np.sqrt(data))
