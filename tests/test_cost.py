"""The counters count what they say, ours costs what the formulas say, the fit recovers what it is made of (cost.py)."""

import pytest
import torch

pytestmark = pytest.mark.kernels(modes=("interpret",))


def test_a_kernel_and_torch_are_counted():
    from kernelcheck.samples import matmul_kernel

    from benchmarks.meter import Meter

    a, b, c = torch.randn(64, 96), torch.randn(96, 32), torch.empty(64, 32)
    with Meter() as meter:
        matmul_kernel[(2, 1)](a, b, c, 64, 32, 96, 96, 32, 32, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)
        d = torch.mm(a, b).exp()
        e = d + 1
        del d
        f = e * 2
    kernel = meter.counts["matmul_kernel"]
    assert kernel["flops"] == 2 * 64 * 32 * 96 == meter.counts["torch.mm"]["flops"]
    # Two programs load all of b each; together they touch every tensor once.
    assert kernel["loaded"] == 4 * (64 * 96 + 2 * 96 * 32) and kernel["stored"] == 4 * 64 * 32
    assert kernel["distinct"] == 4 * (64 * 96 + 96 * 32 + 64 * 32)
    assert meter.peak_bytes == 2 * 4 * 64 * 32 and f.shape == (64, 32)
    assert not [
        name
        for name in meter.counts
        if name.startswith("torch.") and name.removeprefix("torch.") not in ("mm", "exp", "add", "mul")
    ]


def test_atomics_and_exponentials_are_counted():
    from kernelcheck.samples import column_sum_kernel, logsumexp_kernel

    from benchmarks.meter import Meter

    x = torch.randn(5, 40)
    with Meter() as meter:
        column_sum_kernel[(5,)](x, torch.zeros(40), 40, ATOMIC=True, BLOCK_N=64)
        logsumexp_kernel[(5,)](x, torch.empty(5), 40, 40, BLOCK_N=64)
    assert meter.counts["column_sum_kernel"]["atomics"] == 5 * 40
    assert meter.counts["logsumexp_kernel"]["exponentials"] == 5 * (64 + 1 + 1)


def test_nothing_is_counted_after_the_block():
    from kernelcheck.samples import column_sum_kernel

    from benchmarks.meter import Meter

    with Meter() as meter:
        pass
    column_sum_kernel[(1,)](torch.randn(1, 8), torch.zeros(8), 8, ATOMIC=True, BLOCK_N=8)
    assert not meter.counts


@pytest.mark.slow
def test_ours_costs_what_the_formulas_say():
    from benchmarks import cost

    size = cost.SMALL[0]
    meter = cost.count(cost.ours, size)
    cost.check_ours(meter, size)
    product = size.N * size.V * size.D
    assert meter.total()["atomics"] == 0
    cost.check_kept(cost.count(cost.ours_kept, size), size)
    assert cost.count(cost.eager, size).total()["flops"] == 6 * product
    # No tensor of N x V: the largest things alive are the strip, and dX and dW.
    full_logits = size.N * size.V * cost.ITEM
    assert meter.peak_bytes < cost.count(cost.eager, size).peak_bytes - full_logits
    meter.counts["logit_stats_kernel"]["flops"] += 1
    with pytest.raises(AssertionError, match="FLOPs counted"):
        cost.check_ours(meter, size)


def test_the_fit_recovers_its_products():
    from collections import Counter
    from types import SimpleNamespace

    from benchmarks import cost, roofline

    def meter(size: "cost.Size", extra: float = 0.0) -> SimpleNamespace:
        distinct = 6 * size.N * size.V + 2 * size.V * size.D + 4 * size.N * size.D * size.strips + 100 + extra
        peak = 2 * (size.N * size.width + size.V * size.D + size.N * size.D) + 7
        counts = {"k": Counter(flops=8 * size.N * size.V * size.D, distinct=distinct)}
        return SimpleNamespace(counts=counts, total=lambda: counts["k"], peak_bytes=peak)

    fitted = cost.fit([meter(size) for size in cost.SMALL], cost.SMALL)
    real = cost.Size(8192, 128256, 4096)
    assert fitted.traffic["k"] @ roofline.traffic(real) == pytest.approx(meter(real).counts["k"]["distinct"], rel=1e-6)
    assert fitted.peak_bytes(real) == pytest.approx(meter(real).peak_bytes, rel=1e-6)
    # Never below the two gradients.
    assert roofline.Fit({}, {}, 0 * fitted.memory).peak_bytes(real) == 2 * (128256 + 8192) * 4096
    card = roofline.ACCELERATORS["H100"]
    assert fitted.seconds(real, card) == pytest.approx(8 * real.N * real.V * real.D / card.flops, rel=1e-6)
    odd = [meter(size, extra=1e6 * (i % 2)) for i, size in enumerate(cost.SMALL)]
    with pytest.raises(AssertionError, match="the fitted bytes are"):
        cost.fit(odd, cost.SMALL)


@pytest.mark.slow
def test_the_form_with_the_librarys_matmul_costs_what_the_formulas_say():
    from benchmarks import cost

    size = cost.sizes_of("ours, strips, library's matmul")[0]
    assert size.strips == cost.SMALL[0].strips > 1
    meter = cost.count(cost.ours_library, size)
    cost.check_library(meter, size)
    meter.counts["strip_grad_kernel"]["loaded"] += size.N * size.V
    with pytest.raises(AssertionError, match=r"strip_grad_kernel: .* bytes counted"):
        cost.check_library(meter, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours, strips, fused", "ours, strips, library's matmul", "ours, all kept"])
def test_the_stored_counts_are_those_of_the_code(name):
    from benchmarks import cost, results

    (stored,) = [r for r in results.load("cost") if r["peer"] == name]
    size = cost.sizes_of(name)[-1]
    meter = cost.count(cost.IMPLEMENTATIONS[name][0], size)
    # Tests of kernels get fresh memory filled with NaN (kernelcheck/memory.py).
    meter.counts.pop("torch.fill_", None)
    total, how = meter.total(), "counts have changed: python -m benchmarks.cost --store && python -m benchmarks.report"
    assert stored["flops"] == total["flops"] and stored["atomics"] == total["atomics"], how
    # torch's own operations around the kernels differ a little by its version.
    for key, found in (("distinct", total["distinct"]), ("loaded", total["loaded"]), ("peak_bytes", meter.peak_bytes)):
        assert found == pytest.approx(stored[key], rel=0.05), f"{key}: {how}"


def test_page_and_picture_say_that_they_are_a_model():
    from PIL import Image

    from benchmarks import cost_pages, results
    from benchmarks.pictures import fingerprint
    from benchmarks.roofline import ACCELERATORS, LABEL

    records = results.load("cost")
    assert {r["peer"] for r in records} == set(cost_pages.LINES)
    assert Image.open(results.FOLDER / "cost.png").info["Description"] == fingerprint(records)
    page = cost_pages.page(records)
    assert "not a measurement" in LABEL and f"**What follows is a {LABEL}.**" in page
    assert len(cost_pages.model_table(records)) == 1 + len(cost_pages.MODELS) * len(records)
    assert all(f"{card}, ms" in page for card in ACCELERATORS)


def test_a_plot_is_drawn_from_stored_fits(tmp_path):
    from benchmarks import cost_pages

    fitted = dict(fit_flops={"k": 8.0}, fit_traffic={"k": [1.0] * 5}, fit_memory=[1.0] * 5, element_bytes=2)
    cost_pages.plot([{"peer": "eager", **fitted}], tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10_000
