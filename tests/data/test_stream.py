"""The order of a stream and the places in it, against what is read without an interruption."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, Features, IterableDataset, Value

from hf_poolformer.data.stream import Lane, Order, Piece, Shards, deal, remaining
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
    rows = shards.rows
    monkeypatch.setattr(
        shards, "rows", lambda shard, group: (read.append(row[1]["value"]) or row for row in rows(shard, group))
    )
    again = Lane(shards, [Piece(0)], 100, (7,), lane.state())
    assert values(itertools.islice(again, 1)) == whole[1500:1501]
    assert min(read) >= 1500 - 100 - 50 and max(read) <= 1500 + 100


def test_shards_that_do_not_go_round_are_shared_row_by_row():
    order = [
        Order(
            make_stream([10, 20, 30]),
            shuffle=False,
            buffer_size=1,
            seed=0,
            process_index=rank,
            num_processes=2,
            num_workers=4,
            divided=False,
        )
        for rank in range(2)
    ]
    assert [one.num_workers for one in order] == [2, 2]
    found = [[values(one.lane(0, worker)[1]) for worker in range(2)] for one in order]
    assert found[0] == [list(range(10)), list(range(2000, 2030, 2))]
    assert found[1] == [list(range(1000, 1020)), list(range(2001, 2030, 2))]


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
