"""Which files are taken for images to predict, and what is said of the others."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_poolformer.foundation.errors import UserError
from hf_poolformer.prediction.inputs import Files, find_images


@pytest.fixture
def photos(tmp_path):
    """Three images among what else lies in folders of photographs."""
    root = tmp_path / "photos"
    for name in ("a.jpg", "sub/b.png", "@eaDir/a.jpg/thumb.jpg", "#recycle/c.jpg", "run/curves.png", "run/more/d.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)
    Image.new("RGB", (4, 4)).save(root / "sub" / "0001", "JPEG")
    (root / "run" / "training_settings.yaml").touch()
    (root / "sub" / "notes.txt").write_text("not an image")
    (root / "sub" / "Thumbs.db").write_bytes(b"thumbs")
    pq.write_table(pa.table({"path": ["a.jpg"], "label": ["cat"]}), root / "predictions.parquet")
    return root


def names(inputs, root):
    found = []
    for images in find_images(inputs):
        assert isinstance(images, Files)
        found += [os.path.relpath(file, root) for file in images.files]
    return found


def test_a_folder(photos, caplog):
    assert names([photos], photos) == ["a.jpg", "sub/0001", "sub/b.png"]
    assert "not read: 1 .parquet, 1 .txt" in caplog.text and "run holds results" in caplog.text


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("*", ["a.jpg", "sub/0001", "sub/b.png"]),
        ("**/*.*g", ["a.jpg", "sub/b.png"]),
        ("*/*", ["sub/0001", "sub/b.png"]),
        ("r*n/*", []),
    ],
)
def test_a_pattern_leaves_out_what_a_folder_does(photos, pattern, expected):
    (photos / "predictions.parquet").unlink()
    if not expected:
        with pytest.raises(UserError, match="no such file"):
            names([photos / pattern], photos)
    else:
        assert names([photos / pattern], photos) == expected


def test_what_is_named_itself_is_read(photos):
    assert names([photos / "run"], photos) == ["run/curves.png", "run/more/d.png"]
    assert names([photos / "#recycle", photos / "sub" / "notes.txt"], photos) == ["#recycle/c.jpg", "sub/notes.txt"]
    assert names([f"{photos}/run/*.png"], photos) == ["run/curves.png"]
