"""`hf-poolformer explain`, as somebody at a terminal meets it."""

import json

import pytest
from PIL import Image

from hf_poolformer.commands.explain import main


def test_a_picture_and_a_table(saved_classifier, photo, tmp_path, capsys):
    output = tmp_path / "pictures" / "photo.png"
    assert main([str(saved_classifier), str(photo), "--output", str(output), "--top_k", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert printed[-1] == f"Grad-CAM, stage 4 of 4: {output}"
    with Image.open(output) as picture:
        assert picture.format == "PNG"
        assert picture.width > 2 * picture.height, "three panels of 200 x 120"
    assert [path.name for path in output.parent.iterdir()] == ["photo.png"], "no temporary file"


@pytest.mark.parametrize("suffix", ["jpg", "pdf", "svg"])
def test_other_formats(saved_classifier, photo, tmp_path, suffix):
    output = tmp_path / f"x.{suffix}"
    assert main([str(saved_classifier), str(photo), "--output", str(output), "--classes", "1", "--method", "cam"]) == 0
    start = output.read_bytes()[:8]
    assert start.startswith({"jpg": b"\xff\xd8", "pdf": b"%PDF", "svg": b"<?xml"}[suffix])


def test_json(saved_classifier, photo, tmp_path, capsys):
    arguments = [
        str(saved_classifier),
        str(photo),
        "--output",
        str(tmp_path / "x.png"),
        "--classes",
        "tiger",
        "--json",
    ]
    assert main(arguments) == 2
    assert "several classes" in capsys.readouterr().err
    arguments[-2:-1] = ["3", "Egyptian cat", "--stage", "2"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["label"] for entry in found["classes"]] == ["tiger (3)", "Egyptian cat"]
    assert found["stage"] == 2
    assert found["size"] == [200, 120]
    left, top, right, bottom = found["seen"]
    for entry in found["classes"]:
        x, y = entry["peak"]
        assert left <= x <= right
        assert top <= y <= bottom


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "missing.png"}, "missing.png: no such file"),
        ({"image": "broken.png"}, "broken.png: not an image"),
        ({"model": "missing"}, "missing"),
        ({"--output": "x.txt"}, "x.txt is no picture"),
        ({"--output": "photo.png"}, "is the image itself"),
        ({"--top_k": "0"}, "--top_k must be at least 1"),
        ({"--stage": "0"}, "--stage counts from 1"),
        ({"--stage": "5"}, "no stage"),
        ({"--method": "cam", "--stage": "1"}, "last stage only"),
        ({"--classes": "dog"}, "no class 'dog'"),
        ({"--method": "magic"}, "--method"),
    ],
)
def test_mistakes_are_one_line(saved_classifier, photo, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    given = {"model": str(saved_classifier), "image": "photo.png", "--output": "x.png"} | change
    words = [given.pop("model"), given.pop("image"), *(word for pair in given.items() for word in pair)]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "x.png").exists()
