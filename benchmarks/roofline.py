"""From counts at small sizes to a MODEL of time and memory at real ones. Used by cost.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from orpo_kernels.head import STRIP_BYTES, strip_width

if TYPE_CHECKING:
    from .meter import Meter

# Of an element in the low-precision dtype that the counts are taken in.
BYTES = 2
LABEL = "model (roofline of counted FLOPs and bytes), not a measurement"


@dataclass(frozen=True)
class Accelerator:
    """Dense bfloat16 FLOP/s and memory bytes/s, from the vendor's data sheet."""

    flops: float
    bandwidth: float


ACCELERATORS = {
    "A100": Accelerator(312e12, 2.04e12),
    "H100": Accelerator(989e12, 3.35e12),
    "H200": Accelerator(989e12, 4.8e12),
    "B200": Accelerator(2250e12, 8.0e12),
    "MI300X": Accelerator(1307e12, 5.3e12),
}


@dataclass(frozen=True)
class Size:
    """N rows, vocabulary V, hidden size D, and the bytes of a strip where the implementation has strips."""

    N: int
    V: int
    D: int
    strip_bytes: int = STRIP_BYTES
    # What one logit of a strip takes.
    element_bytes: int = BYTES

    @property
    def width(self) -> int:
        return strip_width(self.N, self.V, self.element_bytes, self.strip_bytes)

    @property
    def strips(self) -> int:
        return math.ceil(self.V / self.width)


def traffic(size: Size) -> np.ndarray:
    """The products that bytes are made of; the hidden states, and dX, may be read once for each strip."""
    n, v, d = float(size.N), float(size.V), float(size.D)
    return np.array([n * v, v * d, n * d, n * d * size.strips, 1.0])


def memory(size: Size) -> np.ndarray:
    n, v, d = float(size.N), float(size.V), float(size.D)
    return np.array([n * size.width, n * v, v * d, n * d, 1.0])


@dataclass
class Fit:
    """An implementation's counts as functions of the size, for each of its operations, and its memory."""

    flops: dict[str, float]
    traffic: dict[str, np.ndarray]
    memory: np.ndarray
    element_bytes: int = BYTES

    def seconds(self, size: Size, card: Accelerator) -> float:
        """The roofline's bound."""
        size = replace(size, element_bytes=self.element_bytes)
        product, features = size.N * size.V * size.D, traffic(size)
        return sum(
            max(self.flops[name] * product / card.flops, features @ self.traffic[name] / card.bandwidth)
            for name in self.flops
        )

    def peak_bytes(self, size: Size) -> float:
        """Memory beyond the inputs."""
        size = replace(size, element_bytes=self.element_bytes)
        # The peak is the larger of several moments: at the counted sizes the one with the logits; with few rows the
        # last one, when both gradients are there.
        gradients = BYTES * (size.V * size.D + size.N * size.D)
        return max(float(memory(size) @ self.memory), gradients)


def _solve(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares with coefficients >= 0, each size weighing as much as the others."""
    weights = 1 / np.maximum(values, 1)
    scale = np.linalg.norm(features * weights[:, None], axis=0)
    matrix, target = features * weights[:, None] / scale, values * weights
    active = np.ones(features.shape[1], dtype=bool)
    while True:
        solution = np.zeros(features.shape[1])
        solution[active] = np.linalg.lstsq(matrix[:, active], target, rcond=1e-10)[0]
        if solution.min() >= -1e-9:
            return np.maximum(solution, 0) / scale
        # A product of sizes never saves bytes.
        active[np.argmin(solution)] = False


def _residual(features: np.ndarray, coefficients: np.ndarray, values: np.ndarray) -> float:
    return float(np.max(np.abs(features @ coefficients - values) / np.maximum(values, 1)))


def fit(meters: list[Meter], sizes: list[Size]) -> Fit:
    """Fit the counts of one implementation; `AssertionError` where they do not follow the products of the sizes."""
    features = np.array([traffic(size) for size in sizes])
    products = np.array([float(size.N * size.V * size.D) for size in sizes])
    names = sorted({name for meter in meters for name in meter.counts})
    flops, bytes_of, predicted = {}, {}, np.zeros(len(sizes))
    for name in names:
        per_product = np.array([meter.counts[name]["flops"] for meter in meters]) / products
        assert np.ptp(per_product) <= 0.02 * per_product.max(), (
            f"FLOPs of {name} are not those of matmuls: {per_product}"
        )
        flops[name] = float(per_product.mean())
        bytes_of[name] = _solve(features, np.array([float(meter.counts[name]["distinct"]) for meter in meters]))
        predicted += features @ bytes_of[name]
    counted = np.array([float(meter.total()["distinct"]) for meter in meters])
    peaks = np.array([float(meter.peak_bytes) for meter in meters])
    memory_features = np.array([memory(size) for size in sizes])
    memory_coefficients = _solve(memory_features, peaks)
    for what, worst in (
        ("bytes", float(np.max(np.abs(predicted - counted) / counted))),
        ("memory", _residual(memory_features, memory_coefficients, peaks)),
    ):
        assert worst <= 0.05, f"the fitted {what} are {worst:.1%} off at a counted size"
    return Fit(flops, bytes_of, memory_coefficients, sizes[0].element_bytes)
