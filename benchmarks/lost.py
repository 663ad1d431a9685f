"""The sections of RESULTS.md on who is faster or smaller than ours, and why.

What was measured before each round had an order of its own has a section apart: most of it is from before much of what
the loss is now, too.
"""

from __future__ import annotations

from .tables import losses, losses_of_the_default

# Commits of stored rows, up to 6fe3f16, whose peers took turns in a fixed order.
FIXED_ORDER = (
    "0050adc", "0f06bd1", "1943266", "2f19ff3", "331b40d", "4b3fe3d", "6356325", "6fe3f16", "708b651", "732931b",
    "a892f86", "c6569da",
)  # fmt: skip

# A test asserts that every line of a list is of a kind that its reason names.
WHY = (
    "Why: all of these are CCE's. In bfloat16 it rounds logits where they lie; ours subtracts each row's target logit "
    "inside the matmul's accumulator first, which is one more write and read of the logits (`torch.addmm` takes 1 to "
    "3 % longer than `torch.mm`, AMD EPYC, AVX512-BF16, 2 threads, as all that follows in bfloat16), and that is what "
    "makes a log-probability 11 to 31 times as exact (see Accuracy). It multiplies all at once; the default at most "
    "256 rows (with AMX 1,024), and strips at most 32 MiB of logits: `torch.mm` takes 2 to 3 % longer for twice 191 "
    "rows of Phi-2's or Mistral's head than for 382, and needs half the room. Then, CCE's passes over the logits are "
    "one loop, made by the C++ compiler that it needs at run time; ours are torch's own operations, one after the "
    "other, over blocks of rows that stay in cache. In float32 little is left to win: torch's profiler gives 98 % of "
    "ours in front of Gemma-2's head (AMD EPYC, AVX2, 75 % prompt), and 89 % in front of OPT's (25 %), to the "
    "library's three matmuls, which CCE calls too. What was measured before 9d8e995 took exponentials from torch's "
    "`exp`, which takes 2.6 times as long as the `exp2` of today: 7 to 10 % of an evaluation in front of SmolLM2's "
    "head (bfloat16). Differences of a tenth have changed sign from one run to the next: in bfloat16 Llama-2's head "
    "without prompt took 1.29 s (CCE 1.12), and then 1.15 as CCE, Gemma-2's at 25 % prompt 2.51 (2.38), and then 2.41 "
    "(2.48)."
)
WHY_SLOWER_BY_DEFAULT = (
    "Why: `forward, with a graph` of the default makes the gradients too, which backward then has for nothing: what "
    "both take together is `forward and backward`. And its evaluation multiplies up to 1,024 rows with the whole "
    "vocabulary (256 where the CPU multiplies bfloat16, and has no AMX), as training does, so that both give the same "
    "loss bit for bit; strips, which have their own bits, stay in cache."
)
WHY_LARGER_BY_DEFAULT = (
    "Why: the default buys its time, a quarter of the FLOPs, with logits that wait for their gradient, and a forward "
    "with a graph holds the finished gradients. In front of a small head these logits, in float32 those of about 1,024 "
    "rows, are the largest thing there is."
)
WHY_LARGER = (
    "Why: where a CPU has no instructions for bfloat16, ours computes logits in float32, four bytes each; those that "
    'take less keep two. Their times are under "A short batch in bfloat16" below. And where it has them, and rows are '
    "few, one strip of 32 MiB holds all their logits, as CCE does: in front of a frozen head dX in float32 and a "
    "product to add to it stand beside them. With `strip_bytes=8 * 2**20` Llama-2's took 26 MiB, and no longer (AMD "
    "EPYC, AVX512-BF16); SmolLM2's, narrow, up to 14 % longer."
)
EARLIER = (
    "Measured at commits up to 6fe3f16: peers took turns in one order, in which CCE always came right after Liger, "
    "whose freed memory is warm. Llama-3's evaluation took it 1.80 s there and ours 2.17; in mixed orders 2.18 and "
    "2.25, 2.08 by strips (AMD EPYC, AVX2). Since then the default keeps fewer logits in float32 (a46467d), for which "
    "it was larger than Liger, and in bfloat16 it makes them 256 rows at a time (16fcef5)."
)
NONE = "None."


def current(records: list[dict]) -> list[dict]:
    """What was measured in rounds with an order of their own."""
    return [r for r in records if r["commit"] not in FIXED_ORDER]


def earlier(records: list[dict]) -> list[dict]:
    """What was measured before."""
    return [r for r in records if r["commit"] in FIXED_ORDER]


def sections(records: list[dict]) -> list[str]:
    """Each list of cases under its introduction, and the reason for them where there are any."""

    def named(words: str, lines: list[str], why: str = "") -> list[str]:
        return [words, "\n".join(lines) or NONE, *([why] if lines and why else [])]

    now, before = current(records), earlier(records)
    faster = "Cases in which another is more than 5 % faster than both of our forms:"
    faster_than_default = "Cases in which another is more than 5 % faster than `ours`, and not than `ours (strips)`:"
    smaller = "Cases in which another takes less memory than both, by more than 5 %:"
    smaller_than_default = (
        "Cases in which another takes less than the default form, which keeps logits on a CPU, at most 512 MiB, and "
        "not less than `ours (strips)`:"
    )
    return [
        "## Where we lose",
        *named(faster, losses(now), WHY),
        *named(faster_than_default, losses_of_the_default(now), WHY_SLOWER_BY_DEFAULT),
        "## Where another takes less memory",
        *named(smaller, losses(now, figure="peak_bytes"), WHY_LARGER),
        *named(smaller_than_default, losses_of_the_default(now, "peak_bytes"), WHY_LARGER_BY_DEFAULT),
        "## The same, of earlier measurements",
        EARLIER,
        *named(faster, losses(before)),
        *named(faster_than_default, losses_of_the_default(before)),
        *named(smaller, losses(before, figure="peak_bytes"), WHY_LARGER),
        *named(smaller_than_default, losses_of_the_default(before, "peak_bytes")),
    ]
