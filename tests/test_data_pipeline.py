"""The order contract: which examples are in which batch, whatever the number of processes."""

import itertools
import json
import sys
import threading
import time

import numpy as np
import pytest

from jaxmodels.errors import UserError
from train.data.pipeline import Batches, check_fingerprint

PROCESSES = (1, 2, 3, 4, 8)


def source(count):
    return [{"x": np.full((3,), index, np.int32)} for index in range(count)]


def batches(count=50, **settings):
    settings = {"seed": 7, "global_batch": 24} | settings
    return Batches(source(count), **settings)


def take(iterator, count):
    return [batch["id"].tolist() for batch in itertools.islice(iterator, count)]


def stream(count, number, seed=7, shuffle=True):
    """The first `number` ids of the order, one at a time."""
    with_one = batches(count, global_batch=1, seed=seed, shuffle=shuffle)
    return [int(with_one.global_ids(i)[0]) for i in range(number)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [24, 25, 71])  # a batch of 24 divides an epoch, or crosses its end
def test_global_batches_are_those_of_any_number_of_processes(count, shuffle):
    number = 3 * count // 24 + 2  # more than three epochs
    order = stream(count, number * 24, shuffle=shuffle)
    expected = [sorted(order[i * 24 : (i + 1) * 24]) for i in range(number)]
    for n in PROCESSES:
        parts = [take(batches(count, shuffle=shuffle, process_index=p, process_count=n), number) for p in range(n)]
        assert all(len(ids) == 24 // n for part in parts for ids in part)
        assert [sorted(itertools.chain(*row)) for row in zip(*parts, strict=True)] == expected
    one = batches(count, shuffle=shuffle)
    assert [one.global_ids(i).tolist() for i in range(number)] == [order[i * 24 : (i + 1) * 24] for i in range(number)]
    for epoch in range(3):  # every example once an epoch
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))
    if shuffle:
        assert order[:count] != order[count : 2 * count] and order[:count] != list(range(count))
        assert order[:count] != stream(count, count, seed=8)
    else:
        assert order == [i % count for i in range(number * 24)]


def test_a_batch_is_the_records_of_its_ids():
    one = batches(transforms=[("double", 1, lambda r: {"x": 2 * r["x"]}), ("add", 1, lambda r: {"x": r["x"] + 1})])
    batch = next(one)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "x": ((24, 3), np.int32),
        "id": ((24,), np.int64),
    }
    np.testing.assert_array_equal(batch["x"], 2 * batch["id"][:, None] + 1 + np.zeros((1, 3)))
    np.testing.assert_array_equal(batch["id"], one.global_ids(0))


@pytest.mark.parametrize("count", [24, 47, 53])
@pytest.mark.parametrize("n", PROCESSES)
def test_a_finite_run_ends_for_all_processes_at_once(n, count):
    parts = [list(batches(count, epochs=3, process_index=p, process_count=n)) for p in range(n)]
    assert {len(part) for part in parts} == {3 * count // 24}
    ids = [i for part in parts for batch in part for i in batch["id"].tolist()]
    assert sorted(ids) == sorted(stream(count, 3 * count // 24 * 24))


def test_seek_equals_iterating():
    everything = take(batches(), 12)
    for position in (0, 1, 5, 11):
        one = batches()
        take(one, 3)
        one.seek(position * 24)
        assert one.state() == {"next_batch": position, "examples_seen": position * 24}
        assert take(one, 12 - position) == everything[position:]
        assert one.state() == {"next_batch": 12, "examples_seen": 12 * 24}


def test_a_state_goes_on_with_another_number_of_processes():
    expected = [sorted(ids) for ids in take(batches(), 9)]
    one = batches(process_index=1, process_count=2)
    take(one, 4)
    state = json.loads(json.dumps(one.state()))
    parts = [batches(process_index=p, process_count=8) for p in range(8)]
    for part in parts:
        part.seek(state["examples_seen"])
    rows = zip(*(take(part, 5) for part in parts), strict=True)
    assert [sorted(itertools.chain(*row)) for row in rows] == expected[4:]


@pytest.mark.parametrize("seen", [0, 36, 50, 61])
def test_another_batch_size_goes_on_at_the_same_example(seen):
    order = stream(50, 200)
    for n in (1, 2, 4):
        parts = [batches(global_batch=8, process_index=p, process_count=n) for p in range(n)]
        for part in parts:
            part.seek(seen)
        rows = [sorted(itertools.chain(*row)) for row in zip(*(take(part, 6) for part in parts), strict=True)]
        assert rows == [sorted(order[seen + 8 * i : seen + 8 * i + 8]) for i in range(6)]
        assert parts[0].state() == {"next_batch": seen // 8 + 6, "examples_seen": seen + 48}
        assert parts[0].global_ids(seen // 8).tolist() == order[seen : seen + 8]
        assert parts[0].examples_before(seen // 8 + 2) == seen + 16
        again = batches(global_batch=8)
        again.seek(parts[0].state()["examples_seen"])
        assert take(again, 2) == [order[seen + 48 : seen + 56], order[seen + 56 : seen + 64]]


def test_seeking_reads_nothing_that_lies_before():
    reads = []

    class Counted(list):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    one = Batches(Counted(source(50)), seed=7, global_batch=24)
    start = time.monotonic()
    one.seek(24 * 10**9)
    found = next(one)["id"].tolist()
    assert time.monotonic() - start < 5 and found == one.global_ids(10**9).tolist()
    one.close()
    assert len(reads) <= 24 * 6  # the batch and what is read ahead


def test_slow_reads_come_out_in_order():
    class Slow(list):
        def __getitem__(self, index):
            time.sleep(0.002 if index % 3 else 0.02)
            threads.add(threading.current_thread().name)
            return super().__getitem__(index)

    threads = set()
    one = Batches(Slow(source(50)), seed=7, global_batch=4)
    assert take(one, 20) == take(batches(global_batch=4), 20)
    assert len(threads) > 1


def test_a_failed_read_is_told_and_the_batch_is_not_lost():
    class Failing(list):
        broken = True

        def __getitem__(self, index):
            if self.broken and index == bad:
                raise UserError("data.array_record is damaged at record 5")
            return super().__getitem__(index)

    everything = take(batches(), 6)
    bad = everything[1][3]
    failing = Failing(source(50))
    one = Batches(failing, seed=7, global_batch=24)
    assert take(one, 1) == everything[:1]
    for _ in range(2):
        with pytest.raises(UserError, match="data.array_record is damaged at record 5"):
            next(one)
    failing.broken = False
    assert take(one, 5) == everything[1:]


def test_the_end_of_a_finite_run():
    one = batches(epochs=1)
    assert len(take(one, 5)) == 2 and one.state()["examples_seen"] == 48
    with pytest.raises(StopIteration):
        next(one)
    one.seek(50)
    with pytest.raises(StopIteration):
        next(one)
    for seen in (51, -1):
        with pytest.raises(UserError, match=f"examples_seen {seen} is not in 0 .. 50"):
            one.seek(seen)
    one.seek(0)
    with pytest.raises(IndexError, match="batch 2 is beyond the 50 examples"):
        one.global_ids(2)


FILES = [{"name": "a.array_record", "bytes": 100, "records": 50}]
LOOK = ("crop", 1, lambda record: record)


def described(**settings):
    settings = {"name": "python/train", "files": FILES, "transforms": [LOOK]} | settings
    return json.loads(json.dumps(batches(settings.pop("count", 50), **settings).fingerprint()))


def test_the_fingerprint():
    assert described() == {
        "name": "python/train",
        "records": 50,
        "files": FILES,
        "seed": 7,
        "global_batch": 24,
        "shuffle": True,
        "transforms": [["crop", 1]],
        "workers": 0,
        "first_ids": stream(50, 8),
    }
    # processes and epochs do not change the order
    assert described(process_index=1, process_count=2) == described(epochs=3) == described()
    unsaved = batches(name="python/train", files=FILES, transforms=[LOOK]).fingerprint()
    assert check_fingerprint(described(), unsaved) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 8}, "seed 7 -> 8"),
        ({"global_batch": 12}, "global_batch 24 -> 12"),
        ({"shuffle": False}, "shuffle True -> False"),
        ({"name": "path:x/train"}, "name python/train -> path:x/train"),
        ({"count": 51}, "records 50 -> 51"),
        ({"files": [{**FILES[0], "bytes": 99}]}, "files.0.bytes 100 -> 99"),
        ({"files": [*FILES, {"name": "b", "bytes": 1, "records": 0}]}, "files.1.name absent -> b"),
        ({"files": []}, "files.0.name a.array_record -> absent"),
        ({"transforms": [("crop", 2, LOOK[2])]}, "transforms.0.1 1 -> 2"),
        ({"transforms": []}, "transforms.0.0 crop -> absent"),
    ],
)
def test_a_change_is_named_with_the_way_out(change, told):
    saved, now = described(), described(**change)
    with pytest.raises(UserError) as error:
        check_fingerprint(saved, now, "raise")
    assert told in str(error.value) and "\n" not in str(error.value)
    assert "loop.on_change=restart" in str(error.value) and "loop.on_change=reseek" in str(error.value)
    assert check_fingerprint(saved, now, "restart") == 0
    assert check_fingerprint(saved, now, "reseek") is None
    for on_change in ("raise", "restart", "reseek"):
        assert check_fingerprint(saved, saved, on_change) is None
    with pytest.raises(UserError, match="set it to raise, restart or reseek"):
        check_fingerprint(saved, now, "ignore")


def test_another_shuffle_of_the_library_is_noticed():
    saved = described()
    saved["first_ids"] = saved["first_ids"][::-1]
    with pytest.raises(UserError, match=r"first_ids \[.*\] -> \["):
        check_fingerprint(saved, described())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"global_batch": 12, "process_count": 8}, "batch 12 is not divisible by 8 processes; set batch to 8 or 16"),
        ({"global_batch": 3, "process_count": 4}, "batch 3 is not divisible by 4 processes; set batch to 4"),
        ({"global_batch": 51}, "50 records are fewer than a batch of 51; set batch to 50 or add data"),
        ({"global_batch": 0}, "batch 0"),
        ({"seed": -1}, "seed -1"),
        ({"epochs": 0}, "epochs 0"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 is not below process_count 2"),
    ],
)
def test_sizes_that_do_not_fit(settings, told):
    with pytest.raises(UserError) as error:
        batches(**settings)
    assert told in str(error.value)


def test_small_sources_and_large_epochs():
    assert take(batches(1, global_batch=1), 3) == [[0]] * 3
    one = batches(3, global_batch=2)
    assert [sorted(one.global_ids(3 * 10**8 + i).tolist()) for i in range(3)] == [
        sorted(ids) for ids in (one.seek(6 * 10**8), take(one, 3))[1]
    ]


def test_no_tensorflow():
    assert "tensorflow" not in sys.modules
