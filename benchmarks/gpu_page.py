"""What was measured on a GPU, as tables: kept apart from the CPUs' figures, which other commits and batches gave.

`gpu.jsonl` holds ours under several budgets beside the fastest peers, `gpu_peers.jsonl` every peer on one head, at an
earlier commit, by `python -m benchmarks.gpu`. The first is of a time when that command had no `--budgets`: there each
peer was timed alone, one after the other.
"""

from __future__ import annotations

from .peers import BUDGET
from .tables import KINDS, losses, table

GROUPS = ("gpu", "gpu_peers")
# True of the lines of that list, as a test asserts: evaluation, or one of the two heads with the least work.
WHY = (
    "Why: the host. The time starts with an idle GPU, and ours launches some 130 kernels a step from Python: by "
    "torch's profiler the GPU worked 2.6 of SmolLM2's 6.5 ms and 7.9 of Mistral's 11.3, but 34.6 of Llama-3's 36.9. In "
    "evaluation, which is one matmul, the library's ran at 760 TFLOP/s and the kernel that keeps logits on the chip at "
    "560 to 630. On Mistral's head, half an hour earlier, peers took 1 to 16 % less time (below)."
)


def _ms(r: dict | None, best: dict) -> str:
    if r is None:
        return ""
    texts = (("median", f"{1e3 * r['median']:.2f}"), ("peak_bytes", f"{r['peak_bytes'] / 2**20:,.0f}"))
    time, memory = (f"**{text}**" if r[name] == best[name] else text for name, text in texts)
    return f"{time} ms, {memory} MiB"


def wide(records: list[dict], kinds: tuple[str, ...]) -> str:
    """One line a head and kind, one column a peer: milliseconds and MiB, the least of either in bold."""
    peers = list(dict.fromkeys(r["peer"] for r in records if not r["peer"].startswith(BUDGET)))
    cases: dict[tuple[str, str], dict[str, dict]] = {}
    for r in records:
        if r["peer"] in peers and r["kind"] in kinds:
            cases.setdefault((r["head"], r["kind"]), {})[r["peer"]] = r
    rows = []
    for (head, kind), by_peer in cases.items():
        best = {name: min(r[name] for r in by_peer.values()) for name in ("median", "peak_bytes")}
        rows.append([head, KINDS[kind], *(_ms(by_peer.get(peer), best) for peer in peers)])
    return table(["head", "what", *peers], rows)


def budgets(records: list[dict]) -> str:
    """Forward and backward of ours by what is kept."""
    names = {"ours (strips)": "0", "ours": "1024 (default)"}
    rows: dict[str, list[str]] = {}
    for r in records:
        if r["kind"] == "step" and (r["peer"] in names or r["peer"].startswith(BUDGET)):
            budget = names.get(r["peer"]) or r["peer"].removeprefix(BUDGET).removesuffix(" MiB")
            rows.setdefault(budget, []).append(f"{1e3 * r['median']:.2f} ms, {r['peak_bytes'] / 2**20:,.0f} MiB")
    heads = list(dict.fromkeys(r["head"] for r in records))
    ordered = sorted(rows.items(), key=lambda item: int(item[0].split()[0]))
    return table(["budget, MiB", *heads], [[budget, *cells] for budget, cells in ordered])


def errors(records: list[dict]) -> str:
    """The largest error of each peer against float64."""
    names = ("error_loss", "error_dx", "error_dw")
    steps = [r for r in records if r["kind"] == "step" and not r["peer"].startswith(BUDGET)]
    worst = {
        peer: [f"{max(r[name] for r in steps if r['peer'] == peer):.0e}" for name in names]
        for peer in dict.fromkeys(r["peer"] for r in steps)
    }
    return table(["who", "loss", "dX", "dW"], [[peer, *found] for peer, found in worst.items()])


def caption(records: list[dict]) -> str:
    """Machine, versions, commit and batch."""
    r = records[0]
    return (
        f"{r['device']}, torch {r['torch']}, triton {r['triton']}, TRL {r['trl']}, Liger {r['liger-kernel']}, CCE "
        f"{r['cut-cross-entropy']}, kernels of commit {r['commit']}; bfloat16, {r['pairs']} pairs x {r['positions']}, "
        f"{r['prompt']} of them prompt; medians of {r['rounds']}, on CUDA events, host included"
    )


def page(stored: dict[str, list[dict]]) -> list[str]:
    """The section of RESULTS.md."""
    ours, peers = (stored[group] for group in GROUPS)
    lost = losses([r for r in ours if not r["peer"].startswith(BUDGET)])
    return [
        "## On a GPU",
        f"{caption(ours)}; each peer alone, one after the other. An older torch and triton than this project asks for "
        "were what the machine had. `python -m benchmarks.gpu --heads SmolLM2-135M,Llama-3-8B,Mistral-7B-v0.3 "
        "--budgets 256,512,2048,8192 --rounds 7` measures the same, peers taking turns.",
        wide(ours, tuple(KINDS)),
        "`ours` keeps up to 1 GiB of exponentials, `ours (strips)` none. By budget, forward and backward:",
        budgets(ours),
        "Cases in which another is more than 5 % faster than both of ours:",
        "\n".join(lost) or "None.",
        *([WHY] if lost else []),
        "Relative errors against float64, the largest of the three heads:",
        errors(ours),
        f"All peers on one head before exponentials were kept, when every logit was computed twice: {caption(peers)}, "
        "peers taking turns, `python -m benchmarks.gpu --heads Mistral-7B-v0.3 --rounds 5`.",
        wide(peers, tuple(KINDS)),
    ]


def readme(records: list[dict]) -> list[str]:
    """Paragraph and table of the README."""
    text = (
        f"On a GPU, forward and backward ({caption(records)}; each peer alone, one after the other). "
        "`ours` keeps up to 1 GiB of exponentials for backward, "
        "`ours (strips)` is `logits_budget=0`. Small heads wait for the host, and there a compiled loss is faster: "
        "[RESULTS.md](benchmarks/RESULTS.md) has evaluation, frozen heads and the other peers."
    )
    return [text, wide(records, ("step",))]
