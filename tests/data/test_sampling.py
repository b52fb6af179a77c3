"""How often images come: as planned over the epochs, wherever a run is interrupted and however it is divided."""

import io
import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from PIL import Image as PILImage

from hf_poolformer.data.classes import Classes
from hf_poolformer.data.columns import ImageDataset
from hf_poolformer.data.datasets import open_datasets
from hf_poolformer.data.labels import Lists, One
from hf_poolformer.data.loader import make_loader
from hf_poolformer.data.sampling import Repeats, repeat_factors
from hf_poolformer.data.stream import Lane, Order, Piece, Row, Shards, deal, remaining
from hf_poolformer.foundation.errors import UserError


NAMES = ("frequent", "seldom", "rare")


def label_of(value):
    return 2 if value % 50 == 7 else int(value % 5 == 0)


def rows_of(shards):
    for shard, size in shards:
        for row in range(size):
            yield {"value": 1000 * shard + row, "label": label_of(1000 * shard + row)}


def make_dataset(sizes):
    features = Features({"value": Value("int64"), "label": Value("int64")})
    stream = IterableDataset.from_generator(rows_of, features, gen_kwargs={"shards": list(enumerate(sizes))})
    return ImageDataset(stream, "value", ("label",), sum(sizes), storage=One(), classes=Classes.numbered(NAMES))


def plan(dataset, sizes, factors, seed, epoch):
    """What comes in an epoch, told row by row."""
    draws = Repeats(dataset, factors).draws(seed, epoch)
    rows = [
        Row(shard, row, {"label": label_of(1000 * shard + row)}) for shard, n in enumerate(sizes) for row in range(n)
    ]
    return Counter({1000 * row.shard + row.index: draws(row) for row in rows})


def values(rows):
    return [row.values["value"] for row in rows]


def test_factors_balance_the_classes_and_keep_the_length():
    counts = [900, 90, 10, 0]
    balanced = np.array(repeat_factors(counts))
    np.testing.assert_allclose(np.array(counts[:3]) * balanced[:3], 1000 / 3)  # N / C of each class that there is
    half = np.array(repeat_factors(counts, 0.5))
    assert (counts * half).sum() == pytest.approx(1000)
    np.testing.assert_allclose(half[1:3] / half[0], [10**0.5, 90**0.5])
    assert repeat_factors(counts, 0.0) == (1, 1, 1, 1)


def test_each_row_comes_as_often_as_planned():
    sizes, factors = [400, 350], (0.3, 1.7, 6.25)
    dataset, epochs = make_dataset(sizes), 40
    found = [plan(dataset, sizes, factors, 3, epoch) for epoch in range(epochs)]
    for value in found[0]:
        each, factor = [epoch[value] for epoch in found], factors[label_of(value)]
        assert {int(factor), int(factor) + 1} >= set(each)
        # What comes too seldom now comes later: never more than one off, in any epochs that follow each other.
        sums = np.cumsum([0, *each])
        for width in (1, 4, 10, epochs):
            assert np.abs(sums[width:] - sums[:-width] - width * factor).max() < 1
        assert factor > 1 or max(np.diff(np.flatnonzero(each))) <= 4  # at least one epoch in 1 / 0.3
    # In one epoch, rows are independent: the number of those that come is binomial.
    for epoch in (0, 1, 17):
        for label, factor in enumerate(factors):
            more = [found[epoch][value] > int(factor) for value in found[0] if label_of(value) == label]
            chance = factor % 1
            assert abs(sum(more) - len(more) * chance) < 4 * (len(more) * chance * (1 - chance)) ** 0.5
    assert found[0] != found[1] and plan(dataset, sizes, factors, 3, 5) == found[5]
    assert plan(dataset, sizes, factors, 4, 5) != found[5]


def test_a_lane_hands_out_the_plan_with_copies_far_apart():
    sizes, factors = [500, 500], (0.5, 2.0, 8.0)
    dataset = make_dataset(sizes)
    draws = Repeats(dataset, factors).draws(1, 0)
    rows = list(Lane(Shards(dataset.stream), [Piece(0), Piece(1)], 10000, (1, 0), copies=draws))
    assert Counter(values(rows)) == plan(dataset, sizes, factors, 1, 0)
    places = {}
    for place, row in enumerate(rows):
        places.setdefault(row.values["value"], []).append((place, row.copy))
    for found in places.values():
        assert sorted(copy for _, copy in found) == list(range(len(found)))
    # Eight copies are at least an eighth of the epoch over sqrt(5) apart: here 53 rows. Drawn at random, 24 rows would
    # come in a batch of 32 with a copy of theirs.
    gaps = [np.diff([place for place, _ in found]).min() for found in places.values() if len(found) > 1]
    assert len(gaps) > 100 and min(gaps) > 32


@pytest.mark.parametrize("seed", range(6))
def test_any_place_is_found_again_and_what_is_left_can_be_dealt_anew(seed):
    choose = random.Random(seed)
    sizes = [choose.choice([1, 3, 10, 40]) for _ in range(choose.randint(1, 6))] + [60]
    dataset, factors = make_dataset(sizes), (0.4, 1.5, choose.choice([3.0, 70.5]))
    repeats, shards, window = Repeats(dataset, factors), Shards(dataset.stream), choose.choice([2, 5, 30, 100])
    draws = repeats.draws(seed, 4)
    pieces = [Piece(shard) for shard in range(len(sizes))]
    choose.shuffle(pieces)
    shares, found = deal(pieces, choose.randint(1, 4)), Counter()
    for interruption in range(4):
        begun, untouched = [], []
        for number, share in enumerate(shares):
            key = (seed, number, interruption)
            whole = values(Lane(shards, share, window, key, copies=draws))
            stop = choose.randint(0, len(whole)) if interruption < 3 else len(whole)
            lane = Lane(shards, share, window, key, copies=draws)
            assert values(itertools.islice(lane, stop)) == whole[:stop]
            state = lane.state() if stop else None
            assert values(Lane(shards, share, window, key, state, draws)) == whole[stop:]
            found.update(whole[:stop])
            parts = remaining(share, state, window, key, repeats.most)
            begun, untouched = begun + parts[0], untouched + parts[1]
        hands = choose.randint(1, 4)
        shares = [a + b for a, b in zip(deal(begun, hands), deal(untouched, hands), strict=True)]
    assert found == plan(dataset, sizes, factors, seed, 4)


def test_processes_and_workers_share_one_plan():
    sizes, factors = [20, 30, 5, 40, 25, 9, 31, 12], (0.4, 1.5, 7.2)
    dataset = make_dataset(sizes)
    for processes, workers in ((1, 0), (2, 0), (2, 2), (3, 5)):
        found = Counter()
        for rank in range(processes):
            how = {"shuffle": True, "buffer_size": 20, "seed": 5, "process_index": rank, "num_processes": processes}
            repeats = Repeats(dataset, factors)
            order = Order(dataset.stream, **how, num_workers=workers, divided=False, repeats=repeats)
            for worker in range(max(workers, 1)):
                found.update(values(order.lane(2, worker)[1]))
        assert found == plan(dataset, sizes, factors, 5, 2)


def test_several_labels_draw_an_image_by_way_of_each():
    labels = [[0], [0], [0], [0, 1], [1, 2], [], None, [0]] * 50
    counts, images = (250, 100, 50), 300  # 50 rows have none, and of 50 nobody knows
    classes = Classes.numbered(NAMES)
    dataset = ImageDataset(None, "image", ("tags",), 400, Lists(), "multi_label_classification", classes)
    for power in (1.0, 0.5):
        factors = repeat_factors(counts, power, images)
        repeats, times = Repeats(dataset, factors), np.zeros(len(labels))
        for epoch in range(30):
            draws = repeats.draws(0, epoch)
            times += [draws(Row(0, index, {"tags": label})) for index, label in enumerate(labels)]
        expected = [sum(factors[c] for c in label) if label else 1 for label in labels]
        assert np.abs(times - 30 * np.array(expected)).max() < 1
        assert times.sum() / 30 == pytest.approx(400, abs=1)  # an epoch is as long as it was
        if power == 1:
            np.testing.assert_allclose(factors, [100 / n for n in counts])  # each class draws a third of the 300
    assert times[labels.index([])] == times[labels.index(None)] == 30


def test_a_class_that_is_too_rare_is_refused():
    with pytest.raises(UserError, match=r"the class rare would come 1001 times .*--sampling_power"):
        Repeats(make_dataset([3]), (0.5, 1.0, 1000.5))


def encoded(value):
    buffer = io.BytesIO()
    PILImage.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """120 images in four Parquet files, 100 of one class and 20 of the other; the first pixel tells which it is."""
    folder = tmp_path_factory.mktemp("few")
    features = Features({"image": Image(), "label": ClassLabel(names=["frequent", "rare"])})
    for number, part in enumerate(np.array_split(np.arange(120), 4)):
        rows = {
            "image": [
                {"bytes": encoded(value) if value != 36 else b"broken", "path": f"{value}.png"} for value in part
            ],
            "label": [int(value % 6 == 0) for value in part],
        }
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{number}.parquet", batch_size=10)
    return open_datasets(dataset_name=folder, train_val_split=0)["train"]


def augment(image):
    """Tells which image it is and what was drawn for it."""
    return torch.tensor([float(np.array(image)[0, 0, 0]), torch.rand(()).item(), np.random.rand()])


def loader_of(images, rank=0, count=1, epoch=2, **changes):
    arguments = {"batch_size": 8, "training": True, "shuffle_buffer_size": 60, "seed": 5, "max_skipped": 1.0}
    arguments |= {"repeats": repeat_factors(images.counts)} | changes
    loader = make_loader(images, augment, process_index=rank, num_processes=count, **arguments)
    loader.set_epoch(epoch)
    return loader


def taken(batches):
    return [(batch["pixel_values"].tolist(), batch["labels"].tolist(), batch["skipped"]) for batch in batches]


def numbers(batches):
    return Counter(int(image[0]) for pixels, _, _ in batches for image in pixels)


@pytest.mark.parametrize(("count", "num_workers"), [(1, 0), (2, 0), (1, 2)])
def test_a_loader_goes_on_from_any_place(images, count, num_workers):
    whole = [taken(loader_of(images, rank, count, num_workers=num_workers)) for rank in range(count)]
    everything = range(min(map(len, whole)) + 1)
    for stop in everything if not num_workers else (5, everything[-2]):
        states = []
        for rank in range(count):
            loader = loader_of(images, rank, count, num_workers=num_workers)
            batches = iter(loader)
            assert taken(next(batches) for _ in range(stop)) == whole[rank][:stop]
            states.append(loader.state_dict())
        for rank in range(count):
            loader = loader_of(images, rank, count, num_workers=num_workers)
            assert loader.load_state_dict(states) is None
            assert taken(loader) == whole[rank][stop:]
    # Rare images come several times, each time augmented otherwise, and one that is broken is counted once.
    pixels = [tuple(image) for batches in whole for found, _, _ in batches for image in found]
    assert len(set(pixels)) == len(pixels) and numbers(whole[0])[0] + numbers(whole[-1])[0] >= 3
    assert sum(len(skipped) for batches in whole for _, _, skipped in batches) == 1


@pytest.mark.parametrize(("before", "after"), [((2, 0), (3, 0)), ((1, 2), (2, 0)), ((2, 0), (1, 2))])
def test_other_processes_and_workers_take_what_is_left(images, before, after):
    expected = numbers(taken(loader_of(images, drop_last=False)))
    found, states = Counter(), []
    for rank in range(before[0]):
        loader = loader_of(images, rank, before[0], num_workers=before[1])
        batches = iter(loader)
        found += numbers(taken(next(batches) for _ in range(3)))
        states.append(loader.state_dict())
    for rank in range(after[0]):
        loader = loader_of(images, rank, after[0], num_workers=after[1], drop_last=False, batch_size=3)
        assert "dealt anew" in loader.load_state_dict(states)
        found += numbers(taken(loader))
    assert found == expected
    assert max(expected.values()) == 3 and 36 not in expected


def test_over_the_epochs_classes_are_balanced_and_nothing_is_forgotten(images):
    found, sizes = Counter(), []
    loader = loader_of(images, drop_last=False)
    for epoch in range(6):
        loader.set_epoch(epoch)
        epoch_found = numbers(taken(loader))
        found += epoch_found
        sizes.append(epoch_found.total())
    assert set(found) == set(range(120)) - {36}
    rare = sum(count for value, count in found.items() if value % 6 == 0)
    assert rare == pytest.approx(6 * 19 * 3, abs=19) and found.total() - rare == pytest.approx(6 * 60, abs=20)
    assert len(set(sizes)) > 1 and np.mean(sizes) == pytest.approx(117, rel=0.05)


def test_evaluation_is_never_resampled(images):
    found = numbers(taken(loader_of(images, training=False)))
    assert found == Counter(set(range(120)) - {36})
