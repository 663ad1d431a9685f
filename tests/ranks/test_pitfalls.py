"""Mistakes on several ranks that raise no error: each, put back, shows in the result, and the trainer makes none."""

import pytest
import torch
from run_forked import returned
from run_pitfalls import train_in
from run_ranks import EIGHT

SHARDED = {"fsdp": True, "head_alone": True}
# More than 256 tokens a step, an odd number: bfloat16 has only even ones there.
LONG = {name: [f"{text} " * 5 for text in column] for name, column in EIGHT.items()}
LONG["chosen"][0] += "!"
IN_BF16 = {"fsdp": True, "bf16": True, "train": LONG, "pairs_per_step": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What rank 0 and rank 1 saw of a run, which is made once."""
    runs = {}

    def of(pitfall, ranks=2, **options):
        key = (pitfall, ranks, *options)
        if key not in runs:
            runs[key] = returned(train_in, ranks, tmp_path_factory.mktemp("run"), pitfall, options)
        return runs[key]

    return of


def losses(seen):
    return [entry["loss"] for entry in seen["log"] if "loss" in entry]


def distance(a, b):
    """Largest difference of weights."""
    return max((a["weights"][name] - weight).abs().max().item() for name, weight in b["weights"].items())


def test_the_weight_put_together_beside_the_heads_forward(run):
    (one,), right, wrong = run(None, 1), run(None, **SHARDED), run("full_tensor", **SHARDED)
    assert wrong[0]["whole"] and right[0]["sharded"] >= 3
    assert distance(right[0], one) < 1e-6 and losses(right[0]) == pytest.approx(losses(one), rel=1e-5)
    # The first loss is right, and so is nothing after it.
    assert losses(wrong[0])[0] == pytest.approx(losses(one)[0], rel=1e-5)
    assert distance(wrong[0], one) > 1e-4


def test_a_wrapper_whose_forward_is_bypassed(run):
    (one,), right, wrong = run(None, 1), run(None), run("bypassed_forward")
    assert distance(right[0], one) < 1e-6 and distance(right[0], right[1]) == 0
    assert distance(wrong[0], wrong[1]) > 1e-4 and distance(wrong[0], one) > 1e-4


def test_outputs_cast_to_bfloat16(run):
    right, wrong = run(None, **IN_BF16)[0], run("output_policy", **IN_BF16)[0]
    assert right["dtypes"] == {"torch.float32"} and wrong["dtypes"] == {"torch.bfloat16"}
    assert right["sharded"] >= 3 and wrong["sharded"] >= 3
    a, b = right["eval"]["eval_loss"], wrong["eval"]["eval_loss"]
    assert a != pytest.approx(b, rel=1e-5)


def test_counts_in_a_float_tensor(run):
    right, wrong = run(None, **IN_BF16)[0], run("float_counts", **IN_BF16)[0]
    exact = [counts for *_, counts in right["pair_ids"]]
    assert all(type(n) is int for counts in exact for n in counts) and min(exact)[0] > 256
    rounded = [tuple(torch.tensor(counts, dtype=torch.bfloat16).tolist()) for counts in exact]
    assert wrong["counts"][: len(rounded)] == rounded != exact
    # The loss is the same sum over a number of tokens that is not theirs.
    assert losses(wrong)[0] != pytest.approx(losses(right)[0], rel=1e-4)


def test_means_of_micro_batches(run):
    (one,), right, wrong = (
        run(None, 1, per_device_train_batch_size=4),
        run(None),
        run("micro_batch_means"),
    )
    assert distance(right[0], one) < 1e-6 and losses(right[0]) == pytest.approx(losses(one), rel=1e-5)
    assert distance(wrong[0], one) > 1e-4 and losses(wrong[0])[0] != pytest.approx(losses(one)[0], rel=1e-3)
