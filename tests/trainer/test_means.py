"""Weighted means without reading the device, and the stop at the first NaN."""

import pytest
import torch

from orpo.runs.non_finite import NonFiniteError, NonFiniteGuard
from orpo.trainer.means import WeightedMeans

CPU = torch.device("cpu")


def scalar(value):
    return torch.tensor(float(value))


def test_means_weigh_each_micro_batch():
    means = WeightedMeans()
    means.add({"a": scalar(1), "b": scalar(10)}, 1)
    means.add({"a": scalar(4)}, 3)
    assert means.reduce(lambda t: t, CPU) == {"a": pytest.approx(13 / 4), "b": 10.0}
    assert means.reduce(lambda t: t, CPU) == {}
    means.add({"a": scalar(7)}, 2)
    assert means.reduce(lambda t: t, CPU) == {"a": 7.0}


def test_parts_are_added_as_they_are():
    means = WeightedMeans()
    for part, weight in ((0.5, 0.25), (1.5, 0.75)):
        means.add_part("nll", scalar(part), weight)
    assert means.reduce(lambda t: t, CPU) == {"nll": 2.0}


def test_a_mean_over_nothing_does_not_count():
    means = WeightedMeans()
    means.add({"a": scalar("nan")}, 0)
    means.add({"a": scalar(2)}, 1)
    means.add({"never": scalar("nan")}, 0)
    assert means.reduce(lambda t: t, CPU) == {"a": 2.0}


def test_one_reduction_adds_the_ranks():
    means, calls = WeightedMeans(), []
    means.add({"a": scalar(1), "b": scalar(2)}, 1)

    def all_sum(tensor):
        calls.append(tensor.shape)
        return tensor + torch.tensor([[3.0, 6.0], [1.0, 1.0]])

    assert means.reduce(all_sum, CPU) == {"a": 2.0, "b": 4.0}
    assert calls == [(2, 2)]


def micro_batch(guard, loss=1.0, bad=(), ids=(4, 9)):
    logps = torch.tensor([float("nan") if i in bad else -1.0 for i in ids])
    guard.watch(scalar(loss), logps, -torch.ones(len(ids)), torch.tensor(ids))


def test_finite_steps_pass():
    guard = NonFiniteGuard(rank=0)
    for step in (1, 2):
        micro_batch(guard)
        guard.end_step(step, scalar(3))


def test_the_rows_of_a_bad_loss_are_named():
    guard = NonFiniteGuard(rank=3)
    micro_batch(guard)
    micro_batch(guard, loss=float("nan"), bad={9})
    with pytest.raises(NonFiniteError, match=r"loss of step 7 on rank 3 is not finite: rows \[9\] of the data set"):
        guard.end_step(7, scalar("nan"))


@pytest.mark.parametrize("bad", [("nan", -1.0), (-1.0, "nan")], ids=["chosen", "rejected"])
def test_a_pair_is_named_for_either_of_its_answers(bad):
    guard = NonFiniteGuard(rank=0)
    chosen, rejected = (torch.tensor([-1.0, float(value)]) for value in bad)
    guard.watch(scalar("nan"), chosen, rejected, torch.tensor([4, 9]))
    with pytest.raises(NonFiniteError, match=r"rows \[9\] of the data set"):
        guard.end_step(1, scalar(1))


def test_a_bad_loss_of_finite_pairs_names_the_micro_batch():
    guard = NonFiniteGuard(rank=0)
    micro_batch(guard, loss=float("inf"))
    with pytest.raises(NonFiniteError, match=r"none of its pairs alone; the micro-batch held rows \[4, 9\]"):
        guard.end_step(1, None)


def test_a_bad_gradient_of_finite_losses():
    guard = NonFiniteGuard(rank=0)
    micro_batch(guard)
    with pytest.raises(NonFiniteError, match=r"gradient of step 2 is not finite.* held rows \[4, 9\]"):
        guard.end_step(2, float("inf"))


def test_a_scaled_gradient_may_overflow():
    guard = NonFiniteGuard(rank=0)
    micro_batch(guard)
    guard.end_step(1, None)
