"""The counted costs as tables and a picture, from the stored counts and fits (cost.py): a MODEL of time on GPUs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .pictures import colour_of, fingerprint
from .roofline import ACCELERATORS, LABEL, Fit, Size

# Vocabulary, hidden size.
MODELS = {
    "Llama-3-8B": (128256, 4096),
    "Qwen2.5-0.5B": (151936, 896),
    "Qwen2.5-7B": (152064, 3584),
    "Gemma-2-2B": (256000, 2304),
    "Mistral-7B-v0.3": (32768, 4096),
    "Phi-2": (51200, 2560),
    "OPT-1.3B": (50272, 2048),
}
ROWS = 8192
# Colour and line of each implementation: two ways of telling them apart.
LINES = {
    "ours, strips, fused": ("ours", "-", "o"),
    "ours, strips, library's matmul": ("ours (strips)", "--", "s"),
    "ours, all kept": ("trl chunked", "-", "D"),
    "CCE": ("cce", "-.", "^"),
    "Liger": ("liger", ":", "v"),
    "eager": ("trl", "--", "x"),
}


def fits(records: list[dict]) -> dict[str, Fit]:
    """The fit of each implementation."""
    return {
        r["peer"]: Fit(
            r["fit_flops"],
            {name: np.array(values) for name, values in r["fit_traffic"].items()},
            np.array(r["fit_memory"]),
            r["element_bytes"],
        )
        for r in records
    }


def counted_table(records: list[dict]) -> list[list[str]]:
    """One line an implementation, at the size that was counted last."""
    lines = [["who", "FLOPs / NVD", "bytes loaded", "bytes stored", "distinct bytes", "atomics", "peak bytes"]]
    for r in records:
        flops = r["flops"] / (r["N"] * r["V"] * r["D"])
        numbers = [r[key] for key in ("loaded", "stored", "distinct", "atomics", "peak_bytes")]
        lines.append([r["peer"], f"{flops:.2f}", *(f"{n:,}" for n in numbers)])
    return lines


def model_table(records: list[dict], rows: int = ROWS) -> list[list[str]]:
    """Milliseconds on each accelerator and MiB for each model and implementation."""
    lines = [["model", "who", *(f"{card}, ms" for card in ACCELERATORS), "peak, MiB"]]
    for model, (v, d) in MODELS.items():
        for name, fitted in fits(records).items():
            size = Size(rows, v, d)
            times = [f"{1e3 * fitted.seconds(size, card):.2f}" for card in ACCELERATORS.values()]
            lines.append([model, name, *times, f"{fitted.peak_bytes(size) / 2**20:,.0f}"])
    return lines


def plot(records: list[dict], path: str | Path) -> None:
    """Time model on an H100 and memory, against the vocabulary and against the rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    vocabularies, rows = [2**k for k in range(14, 19)], [2**k for k in range(9, 16)]
    sweeps = {
        "vocabulary V (8192 rows, hidden size 4096)": (vocabularies, [Size(ROWS, v, 4096) for v in vocabularies]),
        "rows N (vocabulary 128256, hidden size 4096)": (rows, [Size(n, 128256, 4096) for n in rows]),
    }
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex="col")
    for column, (label, (x, sizes)) in enumerate(sweeps.items()):
        for name, fitted in fits(records).items():
            peer, line, marker = LINES[name]
            style = dict(color=colour_of(peer), linestyle=line, marker=marker, markersize=5, label=name)
            times = [1e3 * fitted.seconds(size, ACCELERATORS["H100"]) for size in sizes]
            axes[0, column].plot(x, times, **style)
            axes[1, column].plot(x, [fitted.peak_bytes(size) / 2**30 for size in sizes], **style)
        axes[1, column].set_xlabel(label)
        for axis in axes[:, column]:
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(x, [f"{n:,}" for n in x], fontsize=8)
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("forward and backward on H100, ms (model)")
    axes[1, 0].set_ylabel("peak memory beyond the inputs, GiB (model)")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"ORPO loss in bfloat16: {LABEL}")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Description": fingerprint(records)})
    plt.close(figure)


def _markdown(lines: list[list[str]]) -> str:
    header, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def page(records: list[dict]) -> str:
    """The section of RESULTS.md: what was counted, and the model, said to be one."""
    if not records:
        return "Not counted yet: `python -m benchmarks.cost --store`."
    r = records[0]
    intro = (
        f"Counted by `python -m benchmarks.cost` in Triton's interpreter (torch {r['torch']}, triton {r['triton']}, "
        f"commit {r['commit']}) on equal inputs: N {r['N']}, V {r['V']}, D {r['D']}, bfloat16, forward and backward, "
        "every position counting. Ours is checked against closed formulas: 8 N V D FLOPs by strips, 6 with all "
        "exponentials kept; bytes of the kernels within 10 %. CCE's kernels leave out tiles whose gradient is "
        "negligible; on these inputs none is. Liger is counted without torch.compile, which would join its passes over "
        "the logits into fewer."
    )
    model = (
        f"**What follows is a {LABEL}.** Counts fitted over several sizes, extrapolated to {ROWS} rows: the sum over "
        "operations of max(FLOPs / peak, bytes / bandwidth) with the vendors' peak figures. No kernel reaches them, "
        "and not all fall short by the same part, so that this shows what can be won at most, not who is faster. With "
        "the prompts that ours leaves out, its rows are fewer than the others'; here they are equal."
    )
    picture = "![time and memory against vocabulary and rows, a model](results/cost.png)"
    return "\n\n".join([intro, _markdown(counted_table(records)), model, picture, _markdown(model_table(records))])
