"""Single rows once more: the right ones, without reading what lies between where it is known where they lie."""

import dataclasses
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_poolformer.data.datasets import open_images
from hf_poolformer.data.pictures_again import first_positions, pictures_of


def encode(value, size=(64, 48), kind="PNG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 255 - value)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def parquet(tmp_path):
    """Three files of two row groups each: rows 0 to 17, of which 4 is no image."""
    images = [b"none" if value == 4 else encode(value) for value in range(18)]
    for part in range(3):
        table = pa.table({"image": images[6 * part : 6 * part + 6]})
        pq.write_table(table, tmp_path / f"{part}.parquet", row_group_size=3)
    return tmp_path


@pytest.mark.parametrize("shard_rows", [None, (6, 6, 6), (3,) * 6, (9, 9)])
def test_pictures_of_positions(parquet, shard_rows):
    """By files, by row groups, and where what is said of the rows is not about these shards."""
    dataset = dataclasses.replace(open_images(parquet), shard_rows=shard_rows)
    pictures = pictures_of(dataset, [17, 4, 0, 6, 5, 900, 6], 16)
    assert {position: picture.getpixel((0, 0))[0] for position, picture in pictures.items()} == {
        0: 0,
        5: 5,
        6: 6,
        17: 17,
    }
    assert all(picture.size == (16, 12) and picture.mode == "RGB" for picture in pictures.values())
    assert not pictures_of(dataset, [], 16)


def test_what_is_not_wanted_is_not_read(parquet):
    dataset = open_images(parquet)
    (parquet / "1.parquet").write_bytes(b"PAR1 and nothing else")
    known = dataclasses.replace(dataset, shard_rows=(6, 6, 6))
    assert list(pictures_of(known, [2, 7, 13], 16)) == [2, 13]


def test_turned_small_and_large_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    (tmp_path / "a.jpg").write_bytes(encode(200, (1200, 800), "JPEG", exif=exif))
    (tmp_path / "b.png").write_bytes(encode(10, (5, 3)))
    (tmp_path / "c.png").write_bytes(encode(90, (1, 2000)))  # beyond what is taken for an image
    dataset = open_images(tmp_path)
    pictures = pictures_of(dataset, range(3), 100)
    assert sorted(picture.size for picture in pictures.values()) == [(5, 3), (67, 100)]
    assert len(pictures) == 2


def test_first_positions_are_those_of_all_processes():
    assert first_positions(4, [{0: 5, 2: 3}, {0: 6, 3: 1}]) == [0, 6, 6, 9, 10]
    assert np.diff(first_positions(2, [{}])).tolist() == [0, 0]
