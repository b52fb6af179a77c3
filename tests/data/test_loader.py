"""The place of a loader: what comes after it is what would have come, in other processes and with other workers."""

import io
import subprocess
import tarfile
import textwrap
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from warm import warm_python

from hf_poolformer.data import sources
from hf_poolformer.data.datasets import open_datasets
from hf_poolformer.data.loader import make_loader
from hf_poolformer.foundation.errors import UserError


COUNT = 70


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """70 images in five Parquet files, 10 rows to a row group; the first pixel tells which it is."""
    folder = tmp_path_factory.mktemp("numbers")
    features = Features({"image": Image(), "label": ClassLabel(names=["even", "odd"])})
    for number, part in enumerate(np.array_split(np.arange(COUNT), 5)):
        encoded = []
        for value in part:
            buffer = io.BytesIO()
            PILImage.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(buffer, "PNG")
            encoded.append({"bytes": buffer.getvalue() if value != 33 else b"broken", "path": f"{value}.png"})
        rows = {"image": encoded, "label": [int(value) % 2 for value in part]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{number}.parquet", batch_size=10)
    return open_datasets(dataset_name=folder, train_val_split=0)["train"]


def augment(image):
    """Tells which image it is and what was drawn for it."""
    return torch.tensor([float(np.array(image)[0, 0, 0]), torch.rand(()).item(), np.random.rand()])


def loader_of(dataset, rank=0, count=1, **changes):
    arguments = {"batch_size": 4, "training": True, "shuffle_buffer_size": 10, "seed": 5, "max_skipped": 1.0}
    arguments |= changes
    loader = make_loader(dataset, augment, process_index=rank, num_processes=count, **arguments)
    loader.set_epoch(2)
    return loader


def taken(batches):
    return [(batch["pixel_values"].tolist(), batch["labels"].tolist(), batch["skipped"]) for batch in batches]


def numbers(batches):
    return Counter(int(image[0]) for images, _, _ in batches for image in images)


@pytest.mark.parametrize(("count", "num_workers"), [(1, 0), (2, 0), (1, 2), (1, 3)])
def test_the_same_from_any_place(dataset, count, num_workers):
    whole = [taken(loader_of(dataset, rank, count, num_workers=num_workers)) for rank in range(count)]
    everything = range(min(map(len, whole)) + 1)
    for stop in everything if not num_workers else (5, everything[-2]):
        states = []
        for rank in range(count):
            loader = loader_of(dataset, rank, count, num_workers=num_workers)
            batches = iter(loader)
            assert taken(next(batches) for _ in range(stop)) == whole[rank][:stop]
            states.append(loader.state_dict())
        for rank in range(count):
            loader = loader_of(dataset, rank, count, num_workers=num_workers)
            assert loader.load_state_dict(states) is None
            assert loader.state_dict() == states[rank]
            assert taken(loader) == whole[rank][stop:]
    if count == 1:
        assert loader.seen == COUNT and loader.skipped == 1
    # The epoch after is a fresh one.
    loader.set_epoch(3)
    other = loader_of(dataset, rank, count, num_workers=num_workers)
    other.set_epoch(3)
    assert taken(loader) == taken(other)


@pytest.mark.parametrize(("before", "after"), [((2, 0), (3, 0)), ((3, 0), (1, 2)), ((1, 2), (2, 0)), ((1, 2), (1, 0))])
def test_other_processes_and_workers_take_what_is_left(dataset, before, after):
    found, states = Counter(), []
    for rank in range(before[0]):
        loader = loader_of(dataset, rank, before[0], num_workers=before[1])
        batches = iter(loader)
        found += numbers(taken(next(batches) for _ in range(3)))
        states.append(loader.state_dict())
    for rank in range(after[0]):
        loader = loader_of(dataset, rank, after[0], num_workers=after[1], drop_last=False, batch_size=3)
        statement = loader.load_state_dict(states)
        assert "dealt anew, each once" in statement and "left out" not in statement
        found += numbers(taken(loader))
    assert found == Counter(set(range(COUNT)) - {33})


def test_another_dataset_starts_its_epoch_again(dataset, tmp_path):
    loader = loader_of(dataset)
    next(iter(loader))
    state = loader.state_dict()
    state["num_shards"] += 1
    other = loader_of(dataset)
    assert "5 shards" in other.load_state_dict(state) and "from its beginning" in other.load_state_dict(state)
    assert taken(other) == taken(loader_of(dataset))


def test_uneven_shards_end_early_and_repeat_nothing(tmp_path, dataset):
    """Shards of 63 and 7 rows over two processes."""
    rows = list(dataset.stream)
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["even", "odd"])})
    for name, part in {"a": rows[:63], "b": rows[63:]}.items():
        Dataset.from_list(part, features=features).to_parquet(tmp_path / f"{name}.parquet")
    uneven = open_datasets(dataset_name=tmp_path, train_val_split=0)["train"]
    shares = [taken(loader_of(uneven, rank, 2)) for rank in range(2)]
    assert sorted(map(len, shares)) == [1, 15]
    assert max(numbers(shares[0] + shares[1]).values()) == 1
    evaluation = [taken(loader_of(uneven, rank, 2, training=False)) for rank in range(2)]
    assert numbers(evaluation[0] + evaluation[1]) == Counter(set(range(COUNT)) - {33})


def test_workers_do_not_complain_of_a_main_process_that_has_gone():
    code = """
        import sys
        from hf_poolformer.foundation.workers import prepare_worker
        prepare_worker(0)
        for error in (ConnectionResetError("gone"), EOFError("gone"), BrokenPipeError("gone"), ValueError("a fault")):
            sys.excepthook(type(error), error, None)
    """
    done = subprocess.run([warm_python(), "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.stderr.strip() == "ValueError: a fault"


def write_few(kind, folder, monkeypatch):
    """Images in one Parquet file of one row group, in one tar of many ranges, or five in a folder."""
    pixels = []
    for value in range(5 if kind == "folder" else 40):
        buffer = io.BytesIO()
        PILImage.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(buffer, "PNG")
        pixels.append(buffer.getvalue())
    if kind == "parquet":
        features = Features({"image": Image(), "label": ClassLabel(names=["even", "odd"])})
        rows = {"image": [{"bytes": data, "path": None} for data in pixels], "label": [n % 2 for n in range(40)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / "all.parquet")
    elif kind == "tar":
        monkeypatch.setattr(sources, "_RANGE", 5000)
        with tarfile.open(folder / "all.tar", "w") as tar:
            for number, data in enumerate(pixels):
                # Two kinds of images, and names that need a header of their own.
                name = f"{'long/' * 30 * (number % 7 == 0)}{number:03d}."
                for suffix, content in (("png" if number % 3 else "jpg", data), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(name + suffix)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    else:
        for number, data in enumerate(pixels):
            (folder / f"class{number % 2}").mkdir(exist_ok=True)
            (folder / f"class{number % 2}" / f"{number}.png").write_bytes(data)
    return open_datasets(dataset_name=folder, train_val_split=0)["train"], len(pixels)


@pytest.mark.parametrize(("kind", "num_workers"), [("parquet", 3), ("tar", 3), ("folder", 8)])
def test_few_shards_keep_all_workers_busy_and_are_resumed(kind, num_workers, tmp_path, monkeypatch):
    data, count = write_few(kind, tmp_path, monkeypatch)
    if kind == "tar":
        assert data.stream.reshard().num_shards > 4
    how = {"num_workers": num_workers, "batch_size": 2, "drop_last": False}
    whole = taken(loader_of(data, **how))
    assert numbers(whole) == Counter(range(count))
    loader = loader_of(data, **how)
    assert loader.num_workers == num_workers
    batches = iter(loader)
    first = [next(batches) for _ in range(1 if kind == "folder" else 7)]
    assert taken(first) == whole[: len(first)]
    state = loader.state_dict()
    del batches, loader
    loader = loader_of(data, **how)
    assert loader.load_state_dict(state) is None
    assert taken(loader) == whole[len(first) :]
    if kind == "folder":  # its batches are put together from what single workers had left over
        assert "images of its end are left out" in loader_of(data).load_state_dict(state)
        return
    found = numbers(taken(first))
    for rank in range(2):  # other processes, without workers
        loader = loader_of(data, rank, 2, batch_size=3, drop_last=False)
        assert "dealt anew" in loader.load_state_dict(state)
        found += numbers(taken(loader))
    assert found == Counter(range(count))


def test_a_place_of_an_older_way_of_dealing_is_not_read(dataset):
    loader = loader_of(dataset)
    next(iter(loader))
    state = loader.state_dict()
    del state["format"]
    other = loader_of(dataset)
    assert "another way: epoch 3 starts from its beginning" in other.load_state_dict(state)
    assert taken(other) == taken(loader_of(dataset))


def test_workers_that_share_a_damaged_shard_count_it_once(tmp_path, monkeypatch):
    data, _ = write_few("parquet", tmp_path, monkeypatch)
    path = tmp_path / "all.parquet"
    content = bytearray(path.read_bytes())
    content[4:104] = bytes(100)  # the header of the first page
    path.write_bytes(content)
    loader = loader_of(data, num_workers=2, training=False, max_skipped_shards=1)
    with pytest.raises(UserError, match="is empty"):
        list(loader)
    assert len(loader.damaged) == 1 and "shard 0 ends after 0 rows" in loader.damaged[0]
    with pytest.raises(UserError, match=r"damaged: shard 0 ends .*--max_skipped_shards 1"):
        list(loader_of(data, num_workers=2, training=False))
