"""Copies within a dataset: what must be found, and above all what must not."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import skimage
from clouds import picture
from digits import make_checkpoint  # noqa: F401
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits

from hf_poolformer.data.datasets import open_every_split
from hf_poolformer.reports.near import near_pairs, thumbnail_of
from hf_poolformer.reports.scan import scan


FASHION = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def duplicates(data, out, near=True, **options):
    found = scan(out, open_every_split(dataset_name=data), progress=False, num_workers=0, **options)
    return found.duplicates(near=near)


def names(group):
    return sorted(os.path.basename(path) for path in group.paths)


@pytest.fixture
def data(tmp_path):
    """Eight pictures for training and four for validation, in two classes."""
    root = tmp_path / "data"
    for index in range(12):
        split = "train" if index < 8 else "validation"
        save(picture(index), root / split / ("ape" if index % 2 else "bear") / f"{index}.png")
    return root


def test_different_pictures_are_no_duplicates(data, tmp_path):
    assert duplicates(data, tmp_path / "out").groups == []


def test_leaks_copies_and_contradictions(data, tmp_path):
    train, validation = data / "train", data / "validation"
    save(picture(0), validation / "bear" / "leak.png")  # the same bytes
    save(picture(1), train / "ape" / "pixels.bmp")  # the same pixels
    save(picture(2), train / "ape" / "contradiction.jpg", quality=60)  # nearly, and of another class
    save(picture(8).transpose(Image.Transpose.FLIP_LEFT_RIGHT), train / "bear" / "mirrored.png")
    (train / "bear" / "broken.png").write_bytes(b"broken")
    (validation / "bear" / "broken too.png").write_bytes(b"broken")
    found = duplicates(data, tmp_path / "out")
    assert {tuple(names(group)): group.kind for group in found.groups} == {
        ("0.png", "leak.png"): "bytes",
        ("1.png", "pixels.bmp"): "pixels",
        ("2.png", "contradiction.jpg"): "near",
        ("8.png", "mirrored.png"): "near",
    }
    assert sorted(map(names, found.leaks)) == [["0.png", "leak.png"], ["8.png", "mirrored.png"]]
    assert [names(group) for group in found.contradictions] == [["2.png", "contradiction.jpg"]]
    assert sorted(map(names, found.within)) == [["1.png", "pixels.bmp"], ["2.png", "contradiction.jpg"]]
    assert [group.identical for group in found.groups if group.kind == "bytes"] == [1]
    assert [names(group) for group in found.groups if group.mirrored] == [["8.png", "mirrored.png"]]
    assert all((group.score == 1) is (group.kind != "near") for group in found.groups)
    assert len(duplicates(data, tmp_path / "out", near=False).groups) == 2


def test_copies_of_copies_are_one_group(data, tmp_path):
    whole = picture(0)
    for number, cut in enumerate((1, 2)):
        save(whole.crop((cut, cut, 48, 48)), data / "train" / "bear" / f"crop {number}.png")
    save(whole, data / "train" / "bear" / "same.png")
    (group,) = duplicates(data, tmp_path / "out").groups
    assert names(group) == ["0.png", "crop 0.png", "crop 1.png", "same.png"]
    assert group.kind == "near" and group.identical == 1 and not group.leaks


def test_pictures_that_show_nothing_are_the_same_or_they_are_not(data, tmp_path):
    for value in (0, 0, 0, 1, 255):
        number = len(list(data.rglob("*.png")))
        save(Image.new("L", (20 + number % 2, 20), value), data / "train" / "ape" / f"{number}.png")
    groups = duplicates(data, tmp_path / "out").groups
    assert [(len(group), group.kind, group.flat) for group in groups] == [(2, "bytes", True)]


def changed(image):
    """Copies as people make them."""
    width, height = image.size
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    yield Image.open(buffer)
    yield image.resize((width // 2, height // 2), Image.Resampling.LANCZOS)
    yield image.resize((width // 2, height // 3), Image.Resampling.BILINEAR)
    yield image.crop((round(0.04 * width), 0, width, height))
    yield image.crop(
        tuple(round(part * side) for part, side in zip((0.02, 0.02, 0.98, 0.98), 2 * (width, height), strict=True))
    )
    yield ImageEnhance.Brightness(image).enhance(0.7)
    yield ImageEnhance.Contrast(image).enhance(1.2)
    yield image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def test_copies_of_photographs_are_found():
    """Promised: 95 % of them, and no pair that is none."""
    folder = Path(skimage.__file__).parent / "data"
    files = [folder / f"{name}.png" for name in ("astronaut", "camera", "chelsea", "coffee", "coins", "moon", "page")]
    files += [
        folder / name for name in ("brick.png", "grass.png", "gravel.png", "rocket.jpg", "retina.jpg", "ihc.png")
    ]
    photographs = [Image.open(file).convert("RGB") for file in files if file.exists()]
    assert len(photographs) > 8
    found = []
    for copies in zip(*(changed(image) for image in photographs), strict=True):
        pairs = near_pairs(np.stack([thumbnail_of(image) for image in (*photographs, *copies)]))
        found += [bool(np.any((pairs.left == n) & (pairs.right == n + len(copies)))) for n in range(len(copies))]
        assert set(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True)) <= {
            (n, n + len(copies)) for n in range(len(copies))
        }
    assert np.mean(found) >= 0.95, np.reshape(found, (-1, len(photographs)))


def test_handwritten_digits_are_no_copies_of_each_other():
    thumbnails = [thumbnail_of(Image.fromarray((15 * image).astype(np.uint8))) for image in load_digits().images]
    assert len(near_pairs(np.stack(thumbnails)).left) == 0


@pytest.mark.skipif(not FASHION.exists(), reason="needs the Debian package dataset-fashion-mnist")
def test_clothes_that_look_alike_are_no_copies_of_each_other():
    """Promised: at most one pair for each 400 pictures."""
    import gzip

    clothes = np.frombuffer(gzip.decompress(FASHION.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
    chosen = np.random.default_rng(0).permutation(len(clothes))[:4000]
    thumbnails = np.stack([thumbnail_of(Image.fromarray(clothes[index])) for index in chosen])
    assert len(near_pairs(thumbnails).left) <= 10


def test_features_find_candidates_too(data, tmp_path, make_checkpoint):  # noqa: F811
    save(picture(8).resize((40, 40)), data / "train" / "bear" / "small.png")
    found = duplicates(data, tmp_path / "out", model=make_checkpoint(), device="cpu")
    assert [names(group) for group in found.groups] == [["8.png", "small.png"]]
    # Features that are alike are no proof.
    thumbnails = np.stack([thumbnail_of(picture(index)) for index in range(30)])
    assert len(near_pairs(thumbnails, np.ones((30, 4), np.float32)).left) == 0


def test_groups_can_be_had_as_data(data, tmp_path):
    save(picture(0), data / "validation" / "bear" / "leak.png")
    (group,) = duplicates(data, tmp_path / "out").groups
    told = json.loads(json.dumps(group.__dict__))
    assert told["splits"] == ["train", "validation"] and told["labels"] == ["bear", "bear"]
