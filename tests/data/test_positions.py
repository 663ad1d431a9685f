"""orpo/data/positions.py, whole_batches.py: a pass that begins in the middle of a stream has a whole one's rows."""

import itertools
import json

import datasets
import pytest
from tiny import make_tokenizer

from orpo.data import prepare
from orpo.data.prepare import Limits, prepare_dataset
from orpo.data.whole_batches import WholeBatches

ROWS, SHARDS = 10, 4


def generated(shards, reads=None):
    """Ten rows a shard, of which one cannot train; the number of each that is read is added to `reads`."""
    for number in (ROWS * shard + i for shard in shards for i in range(ROWS)):
        if reads is not None:
            reads.append(number)
        chosen, rejected = f" fine{' well' * (number % 3)}", "" if number % ROWS == 5 else " go away"
        yield {"prompt": f"hello {number}", "chosen": chosen, "rejected": rejected}


class Reads(list):
    """Shared by the copies that ``datasets`` makes of what a generator is called with."""

    def __deepcopy__(self, memo):
        return self


@pytest.fixture
def reads(monkeypatch):
    monkeypatch.setattr(prepare, "ROWS_OF_A_STREAM", 4)
    return Reads()


def stream_of(reads):
    def rows(shards):
        yield from generated(shards, reads)

    return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [*range(SHARDS)]})


def from_files(folder):
    files = []
    for shard in range(SHARDS):
        files.append(folder / f"{shard}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in generated([shard])))
    return datasets.load_dataset(
        "json", data_files=[*map(str, files)], split="train", streaming=True, cache_dir=folder / "cache"
    )


EXACT = {
    "generator": lambda data: data,
    "filtered": lambda data: data.filter(lambda row: "7" not in row["prompt"]),
    "skipped": lambda data: data.skip(3),
    "taken": lambda data: data.take(33),
    "renamed": lambda data: data.rename_column("chosen", "x").rename_column("x", "chosen"),
    "selected": lambda data: data.select_columns(["prompt", "chosen", "rejected"]),
    "concatenated": lambda data: datasets.concatenate_datasets([data, data]),
}
OTHER = {
    "shuffled": lambda data: data.shuffle(seed=1, buffer_size=5),
    "interleaved": lambda data: datasets.interleave_datasets([data, data]),
    "repeated": lambda data: data.repeat(2),
}


def prepared(data):
    return prepare_dataset(data, make_tokenizer(), Limits(max_length=64), report=lambda _: None)


def batches_of(data, ranks=1, start=None):
    whole = WholeBatches(data, 2, ranks)
    whole.set_epoch(0)
    if start is not None:
        whole.go_on_after(*start)
    return whole


def place_after(data, batches, raw, ranks=1):
    """The place, as a checkpoint holds it; the same stream is read by others in between, and a batch is read ahead."""
    whole = batches_of(data, ranks)
    reading = iter(whole)
    for batch in range(batches + 1):
        assert [next(reading) for _ in range(2 * ranks)]
        if batch == 0:
            assert list(itertools.islice(data, 5)) and list(itertools.islice(raw, 5))
    return json.loads(json.dumps(whole.place(batches)))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", [*EXACT, "files", "rows"])
def test_a_pass_goes_on_with_the_rows_of_a_whole_one(kind, ranks, reads, tmp_path):
    if kind == "files":
        raw = from_files(tmp_path)
    elif kind == "rows":
        raw = datasets.Dataset.from_list([*generated(range(SHARDS))]).to_iterable_dataset(num_shards=SHARDS)
    else:
        raw = EXACT[kind](stream_of(reads))
    data = prepared(raw)
    rows = [example["pair_id"] for example in batches_of(data, ranks)]
    for batches in (1, 3, 7):
        start = batches, place_after(data, batches, raw, ranks)
        went_on = [example["pair_id"] for example in batches_of(data, ranks, start)]
        done = 2 * ranks * batches
        assert len(went_on) == len(rows) and went_on[done:] == rows[done:] and len(rows) > done


def test_rows_before_the_place_are_not_read_again(reads):
    data = prepared(stream_of(reads))
    start = 14, place_after(data, 14, stream_of(Reads()))
    reads.clear()
    went_on = [example["pair_id"] for example in batches_of(data, start=start)]
    # 28 pairs are done, of 32 rows; two batches of four are in the shard and the batch that are begun.
    assert went_on[28:] == [i for i in range(31, 40) if i != 35] and reads == [*range(20, 40)]
    # A second pass has all of it again.
    reads.clear()
    whole = batches_of(data, start=start)
    assert [len(list(whole)) for _ in range(2)] == [36, 36] and reads == [*range(20, 40), *range(40)]


@pytest.mark.parametrize("kind", OTHER)
def test_a_stream_whose_state_is_not_exact_has_no_place(kind, reads):
    whole = batches_of(prepared(OTHER[kind](stream_of(reads))))
    assert len(list(whole)) >= 36 and not any(whole.place(batches) for batches in range(40))


def test_the_place_of_another_epoch_is_not_used(reads):
    data = prepared(stream_of(reads))
    start = 14, place_after(data, 14, stream_of(Reads()))
    whole = WholeBatches(data, 2, 1)
    whole.go_on_after(*start)
    whole.set_epoch(1)
    reads.clear()
    assert [example["pair_id"] for example in whole] == [i for i in range(40) if i % ROWS != 5] and reads[0] == 0


def test_after_the_last_pair_the_stream_is_read_again(reads):
    data = prepared(stream_of(reads))
    whole = batches_of(data)
    rows = list(whole)
    went_on = list(batches_of(data, start=(18, whole.place(18))))
    assert went_on == rows and len(rows) == 36
