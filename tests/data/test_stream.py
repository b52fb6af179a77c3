"""The order of a stream and the places in it, against what is read without an interruption."""

import itertools
import random
import threading
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, Features, IterableDataset, Value

from hf_poolformer.data.stream import Ahead, Lane, Order, Piece, Shards, deal, remaining
from hf_poolformer.foundation import faults


def rows_of(shards):
    for shard, size in shards:
        for row in range(size):
            yield {"value": 1000 * shard + row}


def make_stream(sizes):
    features = Features({"value": Value("int64")})
    return IterableDataset.from_generator(rows_of, features, gen_kwargs={"shards": list(enumerate(sizes))})


def values(lane):
    return [row.values["value"] for row in lane]


def test_a_lane_shuffles_within_its_window_and_differs_by_seed():
    shards = Shards(make_stream([500, 500]))
    pieces = [Piece(0), Piece(1)]
    order = values(Lane(shards, pieces, 100, (1, 2)))
    stored = values(Lane(shards, pieces, 0, (1, 2)))
    assert stored == [1000 * shard + row for shard in range(2) for row in range(500)]
    assert sorted(order) == stored and order != stored
    assert order == values(Lane(shards, pieces, 100, (1, 2))) != values(Lane(shards, pieces, 100, (1, 3)))
    places = {value: place for place, value in enumerate(stored)}
    moved = [place - places[value] for place, value in enumerate(order)]
    assert max(map(abs, moved)) <= 100
    # Uniform over the window: 100 / sqrt(12) either way.
    assert np.std(moved[100:-100]) == pytest.approx(28.9, rel=0.15)


def test_a_small_dataset_is_shuffled_as_a_whole():
    shards = Shards(make_stream([50]))
    first = [values(Lane(shards, [Piece(0)], 1000, (seed,)))[0] for seed in range(300)]
    assert len(set(first)) > 40 and 15 < np.mean(first) < 33


@pytest.mark.parametrize("seed", range(8))
def test_any_place_is_found_again_and_what_is_left_can_be_dealt_anew(seed):
    choose = random.Random(seed)
    sizes = [choose.choice([0, 1, 3, 10, 40]) for _ in range(choose.randint(1, 9))] + [5]
    shards, window = Shards(make_stream(sizes)), choose.choice([0, 1, 5, 30, 100])
    pieces = [Piece(shard) for shard in range(len(sizes))]
    choose.shuffle(pieces)
    shares, found = deal(pieces, choose.randint(1, 4)), Counter()
    for interruption in range(4):
        begun, untouched = [], []
        for number, share in enumerate(shares):
            key = (seed, number, interruption)
            whole = values(Lane(shards, share, window, key))
            stop = choose.randint(0, len(whole)) if interruption < 3 else len(whole)
            lane = Lane(shards, share, window, key)
            assert values(itertools.islice(lane, stop)) == whole[:stop]
            state = lane.state() if stop else None
            assert values(Lane(shards, share, window, key, state)) == whole[stop:]
            found.update(whole[:stop])
            parts = remaining(share, state, window, key)
            begun, untouched = begun + parts[0], untouched + parts[1]
        hands = choose.randint(1, 4)
        shares = [a + b for a, b in zip(deal(begun, hands), deal(untouched, hands), strict=True)]
    assert found == Counter(1000 * shard + row for shard, size in enumerate(sizes) for row in range(size))


def test_going_on_reads_the_window_and_a_row_group_but_not_what_lies_before(tmp_path, monkeypatch):
    table = Dataset.from_dict({"value": list(range(2000))})
    table.to_parquet(tmp_path / "data.parquet", batch_size=50)
    parquet = IterableDataset.from_parquet(str(tmp_path / "data.parquet"))
    shards = Shards(parquet)
    lane = Lane(shards, [Piece(0)], 100, (7,))
    whole = values(Lane(shards, [Piece(0)], 100, (7,)))
    values(itertools.islice(lane, 1500))
    read = []

    def shards_that_note():
        noting = Shards(parquet)
        rows = noting.rows
        noting.rows = lambda *place: (read.append(row.index) or row for row in rows(*place))
        return noting

    again = Lane(shards_that_note(), [Piece(0)], 100, (7,), lane.state())
    rest = iter(again)
    assert values(itertools.islice(rest, 1)) == whole[1500:1501]
    rest.close()
    # Besides the window, a group before it and what is read ahead after it.
    assert min(read) >= 1500 - 100 - 50 and max(read) <= 1500 + 100 + 2 * 64


def test_few_shards_are_shared_row_by_row_among_workers():
    order = [
        Order(
            make_stream([10, 20, 30]),
            shuffle=False,
            buffer_size=1,
            seed=0,
            process_index=rank,
            num_processes=2,
            num_workers=4,
        )
        for rank in range(2)
    ]
    found = [[values(one.lane(0, worker)[1]) for worker in range(4)] for one in order]
    # One shard alone and half of a third for each process; two workers for each of these.
    assert found[0] == [[0, 2, 4, 6, 8], list(range(2000, 2030, 4)), [1, 3, 5, 7, 9], list(range(2002, 2030, 4))]
    assert sorted(value for lane in found[1] for value in lane) == sorted([*range(1000, 1020), *range(2001, 2030, 2)])
    assert str(order[0]) == "3 shards for 4 data workers of each of 2 processes, which read 1 row in 2 of 1"


@pytest.mark.parametrize("seed", range(6))
def test_any_number_of_hands_takes_each_row_once(seed):
    choose = random.Random(seed)
    sizes = [choose.choice([0, 1, 3, 10, 40]) for _ in range(choose.choice([1, 2, 3, 5, 8]))] + [5]
    stream, processes, workers = make_stream(sizes), choose.randint(1, 4), choose.choice([1, 2, 3, 6, 16])
    found, pieces = Counter(), set()
    for rank in range(processes):
        how = {"shuffle": True, "buffer_size": 7, "seed": seed, "process_index": rank, "num_processes": processes}
        order = Order(stream, **how, num_workers=workers)
        assert order.num_workers == workers
        pieces.update(map(len, order.pieces(3)))
        for worker in range(workers):
            found.update(values(order.lane(3, worker)[1]))
    assert found == Counter(1000 * shard + row for shard, size in enumerate(sizes) for row in range(size))
    assert len(pieces) == 1  # shares are even


def test_shards_are_divided_among_no_more_hands_than_needed():
    hands = deal([Piece(shard) for shard in range(4)], 16)
    assert all(len(share) == 1 and share[0].strides[0][1] == 4 for share in hands)
    assert [len(share) for share in deal([Piece(shard) for shard in range(6)], 4)] == [2] * 4
    (alone, shared), *_ = deal([Piece(shard) for shard in range(6)], 4)
    assert not alone.strides and shared.strides == ((0, 2),)


def test_remote_shards_are_not_divided_among_workers():
    how = {"shuffle": False, "buffer_size": 1, "seed": 0, "process_index": 0, "num_processes": 1, "num_workers": 8}
    order = Order(make_stream([10, 20, 30]), **how, local=False)
    assert order.num_workers == 3
    assert [values(order.lane(0, worker)[1])[:2] for worker in range(3)] == [[0, 1], [1000, 1001], [2000, 2001]]


def test_rows_are_read_ahead_and_errors_come_where_they_belong():
    """In the order of events, so that no clock is asked."""
    read, enough, third = [], threading.Event(), threading.Event()

    def rows():
        for number in range(5):
            read.append(number)
            if number == 2:
                enough.set()
            if number == 3:
                third.wait(20)
                raise ConnectionResetError("gone")
            yield number

    items = Ahead(rows(), lambda item: 1)
    assert next(items) == 0
    assert enough.wait(20)  # the next rows are read although nobody has asked for them
    third.set()
    assert [next(items), next(items)] == [1, 2]
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            next(items)
    assert read == [0, 1, 2, 3]


def test_what_is_read_ahead_is_bounded_by_number_and_by_bytes_and_ends_when_nobody_wants_it():
    def numbers(seen, ended):
        try:
            for number in itertools.count():
                seen.append(number)
                yield number
        finally:
            ended.set()

    for size, limit in ((1, 8), (400, 2)):
        seen, ended = [], threading.Event()
        items = Ahead(numbers(seen, ended), lambda item, size=size: size, max_items=8, max_bytes=1000)
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        assert not ended.wait(0.2)
        assert len(seen) <= 3 + limit + 1
        del items
        assert ended.wait(20)


def test_reading_goes_on_where_the_network_broke(monkeypatch):
    monkeypatch.setattr(faults, "DELAYS", (0, 0, 0))

    def rows(shards):
        fail = next(failures, None)
        for row in range(10):
            if row == fail:
                raise ConnectionResetError("gone")
            yield {"value": row}

    stream = IterableDataset.from_generator(rows, Features({"value": Value("int64")}), gen_kwargs={"shards": [0]})
    failures = iter([3, 3, 7])
    shards = Shards(stream)
    assert values(Lane(shards, [Piece(0)], 0, ())) == list(range(10))
    failures = iter([3, 3, 3, 3, 3])
    with pytest.raises(ConnectionResetError):
        values(Lane(shards, [Piece(0)], 0, ()))
