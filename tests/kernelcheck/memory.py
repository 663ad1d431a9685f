"""Memory that makes mistakes visible: poisoned allocations, and tensors too large for int32 offsets."""

import contextlib
import functools
import mmap
from collections.abc import Iterator
from unittest import mock

import torch


def lazily_mapped(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor of `numel` zeros that takes up memory only where it is touched.

    For offsets beyond 2^31: a tensor of 8 GiB of which a kernel touches a few rows costs a few pages. Do not call
    anything on it that reads or copies the whole.
    """
    # Python 3.13 is the first to name the Linux flag that asks for no reservation of swap space.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what torch.empty, empty_like, empty_strided and Tensor.new_empty return with NaN or the largest integer."""

    def poisoned(function):
        @functools.wraps(function)
        def allocate(*args, **kwargs):
            tensor = function(*args, **kwargs)
            # Meta and fake tensors have no storage to fill; filling a huge one would make all of it resident.
            fillable = type(tensor) is torch.Tensor and tensor.device.type != "meta" and tensor.nbytes < 2**30
            if not fillable or tensor.dtype == torch.bool:
                return tensor
            if tensor.is_floating_point():
                return tensor.detach().fill_(float("nan")).requires_grad_(tensor.requires_grad)
            return tensor if tensor.is_complex() else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return allocate

    # torch notes its constructors when `with torch.device(...)` is first used. Used in here first, it would note the
    # poisoned ones, and for the rest of the process not know the real ones.
    with torch.device("cpu"):
        torch.empty(0)
    names = ("empty", "empty_like", "empty_strided")
    with (
        mock.patch.multiple(torch, **{name: poisoned(getattr(torch, name)) for name in names}),
        mock.patch.multiple(torch.Tensor, new_empty=poisoned(torch.Tensor.new_empty)),
    ):
        yield
