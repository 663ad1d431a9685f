"""Streams on several ranks: every row once an epoch, whatever the files hold, as on one rank."""

from itertools import chain

import pytest
import torch
from run_forked import launch, returned
from run_streams import train, train_counted, write_files


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path, (5, 8))


def rows_of(ranks):
    """The pairs of each step of all ranks together, in their order in the stream; those that fill a batch left out."""
    steps = {}
    for parts in zip(*(seen["pair_ids"] for seen in ranks), strict=True):
        assert len({step for step, *_ in parts}) == 1, "the ranks are not at the same step"
        steps.setdefault(parts[0][0], []).extend(i for _, ids, _ in parts for i in ids if i != -2)
    return [*steps.values()]


@pytest.mark.parametrize("wrapper", [{}, {"fsdp": True}], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("ranks", "batch", "pairs_per_step", "steps"),
    [(2, 1, 2, 10), (2, 1, 4, 6), (3, 2, 6, 4)],
    ids=["two files", "a window that is not full", "more ranks than files"],
)
def test_several_ranks_read_each_row_once(ranks, batch, pairs_per_step, steps, wrapper, files, tmp_path):
    """13 rows: the last batch of a pass is not full, or with accumulation the last window."""
    settings = {"pairs_per_step": pairs_per_step, "max_steps": steps}
    one = returned(train, 1, tmp_path / "one", files, "", {"per_device_train_batch_size": batch * ranks, **settings})[0]
    several = returned(
        train, ranks, tmp_path / "several", files, "", {"per_device_train_batch_size": batch, **settings, **wrapper}
    )
    expected = rows_of([one])
    assert rows_of(several) == expected
    if pairs_per_step == batch * ranks:
        # No accumulation: nothing is dropped.
        passes = -(-13 // pairs_per_step)
        assert sorted(chain(*expected[:passes])) == [*range(13)]
    for seen in several:
        for a, b in zip(one["log"], seen["log"], strict=True):
            if "loss" in a:
                assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["rewards/margins"] == pytest.approx(
                    a["rewards/margins"], rel=1e-4, abs=1e-6
                )
        for name in ("eval_loss", "eval_nll_loss", "eval_rewards/accuracies", "eval_logps/chosen"):
            assert seen["eval"][name] == pytest.approx(one["eval"][name], rel=1e-5), name
        torch.testing.assert_close(
            torch.from_numpy(seen["predictions"]), torch.from_numpy(one["predictions"]), rtol=1e-5, atol=1e-5
        )
        for name, weight in one["weights"].items():
            torch.testing.assert_close(seen["weights"][name], weight, rtol=1e-5, atol=1e-6)
    assert len(one["predictions"]) == 13


@pytest.mark.parametrize("workers", [1, 2])
def test_dataloader_workers_share_the_files(workers, files, tmp_path):
    options = {"max_steps": 8, "pairs_per_step": 2, "dataloader_num_workers": workers, "eval_strategy": "no"}
    ends = launch(train, 2, tmp_path / "out", files, "", options)
    if workers == 2:
        # Each worker's last batch is not full, and accelerate cuts predictions off the last one alone.
        assert all("set dataloader_num_workers to 0 or 1" in error for *_, error in ends), ends[0][-1]
        return
    ids = rows_of([value for _, value, *_ in ends])
    assert sorted(chain(*ids[:7])) == [*range(13)]


@pytest.mark.parametrize("how", ["split", "shuffled"])
def test_ranks_that_read_other_rows_are_refused(how, files, tmp_path):
    ends = launch(train, 2, tmp_path / "out", files, how, {})
    assert all("ValueError: the ranks read the stream in different orders" in error for *_, error in ends), ends[0][-1]


@pytest.mark.parametrize("wrapper", [{}, {"fsdp": True}], ids=["ddp", "fsdp2"])
def test_each_row_is_tokenized_by_one_rank(wrapper, files, tmp_path):
    """13 rows, four at a time; the last one is alone, and one rank's."""
    options = {"max_steps": 7, "pairs_per_step": 2, **wrapper}
    seen = returned(train_counted, 2, tmp_path / "out", files, options)
    parts = [rank["tokenized"] for rank in seen]
    assert parts == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11, 12]]
    assert sorted(chain(*rows_of(seen))) == [*range(13)]


def test_workers_of_a_dataloader_tokenize_alone(files, tmp_path):
    """They are in no process group."""
    options = {"max_steps": 7, "pairs_per_step": 2, "dataloader_num_workers": 1}
    assert sorted(chain(*rows_of(returned(train_counted, 2, tmp_path / "out", files, options)))) == [*range(13)]


def test_a_row_that_fails_on_one_rank_fails_on_all(files, tmp_path):
    ends = launch(train_counted, 2, tmp_path / "out", files, {"max_steps": 7, "pairs_per_step": 2}, None, 3)
    assert all("RuntimeError: row 3 cannot be read" in error for *_, error in ends), ends


@pytest.mark.parametrize("wrapper", [{}, {"fsdp": True}], ids=["ddp", "fsdp2"])
def test_two_ranks_go_on_where_the_checkpoint_was(wrapper, tmp_path):
    files = write_files(tmp_path, (8, 8, 8))
    # torch cannot load the empty state of SGD under FSDP.
    options = {"max_steps": 12, "pairs_per_step": 2, "optim": "adamw_torch", **wrapper}
    options |= {"save_strategy": "steps", "save_steps": 10}
    whole = returned(train_counted, 2, tmp_path / "whole", files, options)
    checkpoint = tmp_path / "whole/out/checkpoint-10"
    assert (checkpoint / "stream_place.json").exists()
    resumed = returned(train_counted, 2, tmp_path / "resumed", files, options, str(checkpoint))
    assert [r["losses"] for r in resumed] == [r["losses"] for r in whole] and len(whole[0]["losses"]) == 12
    assert rows_of(resumed) == rows_of(whole)[10:] == [[20, 21], [22, 23]]
    # Twenty rows are done, five times four.
    assert sorted(chain(*(r["tokenized"] for r in resumed))) == [*range(16, 24)]
