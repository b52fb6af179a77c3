import subprocess
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as run_lengths
from warm import warm_python


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "tuxpaint_stamps.py"


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    """Discs and boxes with alpha in two folders, and pictures that cannot serve."""
    folder = tmp_path_factory.mktemp("stamps")
    for number in range(6):
        image = Image.new("RGBA", (90, 60))
        draw = getattr(ImageDraw.Draw(image), "ellipse" if number % 2 else "rectangle")
        draw((8, 5, 70, 50), fill=(40 * number, 255 - 40 * number, 90, 255))
        path = folder / ("animals" if number % 2 else "vehicles") / "inside" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    Image.new("RGB", (50, 50)).save(folder / "animals" / "no_alpha.png")
    return folder


def build(stamps, target, *flags):
    command = [warm_python(), str(SCRIPT), str(target), "--stamps", str(stamps), "--side", "64", "--train", "9"]
    command += ["--validation", "4", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_masks_boxes_and_maps_belong_together_and_a_seed_gives_the_same(stamps, tmp_path):
    done = build(stamps, tmp_path / "a", "--categories", "all")
    assert done.returncode == 0, done.stderr
    assert "6 stamps of 2 categories (animals, vehicles)" in done.stdout
    rows = list(datasets.load_dataset(str(tmp_path / "a/detection"), split="train", streaming=True))
    assert len(rows) == 9 and sum(len(row["objects"]) for row in rows) >= 9
    for row in rows:
        assert row["image"].size == (row["width"], row["height"]) == (64, 64)
        covered = np.zeros((64, 64), int)
        for one in row["objects"]:
            runs = {**one["segmentation"], "counts": one["segmentation"]["counts"].encode()}
            mask = run_lengths.decode(runs)
            covered += mask
            assert one["area"] == mask.sum() > 0 and one["iscrowd"] == 0
            y, x = np.nonzero(mask)
            left, top = x.min(), y.min()
            assert one["bbox"] == [left, top, x.max() + 1 - left, y.max() + 1 - top]
        assert covered.max() <= 1  # a pixel belongs to one object only
    for row in datasets.load_dataset(str(tmp_path / "a/segmentation"), split="validation", streaming=True):
        classes = np.asarray(row["annotation"])
        assert classes.shape == (64, 64) and set(np.unique(classes)) == {0, 1}
    assert (tmp_path / "a/segmentation/id2label.json").is_file()

    assert build(stamps, tmp_path / "b", "--categories", "all").returncode == 0
    assert build(stamps, tmp_path / "c", "--categories", "all", "--seed", "1").returncode == 0
    first, same, other = (
        next(iter(datasets.load_dataset(str(tmp_path / name / "detection"), split="train", streaming=True)))
        for name in "abc"
    )
    assert first["image"].tobytes() == same["image"].tobytes() and first["objects"] == same["objects"]
    assert first["image"].tobytes() != other["image"].tobytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stamps", "/nowhere"], "apt install tuxpaint-stamps-default"),
        (["--categories", "dragons"], "no category 'dragons'"),
    ],
)
def test_mistakes(stamps, tmp_path, flags, message):
    done = build(stamps, tmp_path / "data", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr and "Traceback" not in done.stderr
