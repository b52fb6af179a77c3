"""`hf-poolformer inspect` on small datasets with planted faults: report.json, report.html, exit statuses."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from clouds import picture
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from digits import make_checkpoint  # noqa: F401
from PIL import Image

import hf_poolformer_cli
from hf_poolformer.reports import inspection
from hf_poolformer.settings.command_line import parse


def inspect(data, out, *words, expected=0):
    """The report's data; the status is as expected."""
    words = ["inspect", str(data), "--output", str(out), "--num_workers", "0", *map(str, words)]
    assert hf_poolformer_cli.main(words) == expected
    report = out / "report.json"
    return json.loads(report.read_text()) if report.exists() else None


def write(root, split, name, count, start):
    folder = root / split / name
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture(start + index, 64).save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean")
    for number, (split, name) in enumerate([(s, n) for s in ("train", "val") for n in ("cat", "dog")]):
        write(root, split, name, 9 if split == "train" else 4, 100 * number)
    return root


@pytest.fixture(scope="module")
def faulty(clean, tmp_path_factory):
    """Of each fault one or two; 9 cats and 3 dogs that can be read."""
    root = tmp_path_factory.mktemp("faulty") / "pets"
    shutil.copytree(clean, root)
    for index in range(3, 9):
        (root / f"train/dog/{index}.png").unlink()
    shutil.copy(root / "train/cat/0.png", root / "val/cat/leak.png")
    Image.open(root / "train/cat/1.png").resize((60, 60)).save(root / "val/cat/near.jpg", quality=80)
    shutil.copy(root / "train/cat/2.png", root / "train/cat/twice.png")
    shutil.copy(root / "train/cat/3.png", root / "val/dog/wrong.png")
    (root / "train/cat/text.png").write_text("no picture")
    (root / "train/dog/cut.png").write_bytes((root / "train/cat/4.png").read_bytes()[:500])
    Image.new("RGB", (64, 64), "red").save(root / "val/dog/red.png")
    return root


def files_of(group):
    paths = [Path(image["path"]) for image in group["images"]]
    return sorted(path.relative_to(path.parents[2]).as_posix() for path in paths)


def test_what_was_planted_is_found(faulty, tmp_path, capsys):
    data = inspect(faulty, tmp_path / "out")
    assert data["found"] == {"leaks": 3, "duplicates": 1, "broken": 2, "contradictions": 1}
    train = data["splits"]["train"]
    assert (train["images"], train["broken"], train["unlabelled"], train["counts"]) == (15, 2, 0, [10, 3])
    groups = [(files_of(group), group["leaks"], group["contradicts"]) for group in data["copies"]["groups"]]
    assert sorted(groups) == [
        (["train/cat/0.png", "val/cat/leak.png"], True, False),
        (["train/cat/1.png", "val/cat/near.jpg"], True, False),
        (["train/cat/2.png", "train/cat/twice.png"], False, False),
        (["train/cat/3.png", "val/dog/wrong.png"], True, True),
    ]
    assert data["copies"]["leaks"] == {"images": 3, "exact": 2}
    assert sum(entry["images"] for entry in data["broken"]) == 2
    assert data["blank"] == 1 and data["blanks"][0]["path"].endswith("red.png")
    assert data["formats"] == {"PNG": 24, "JPEG": 1} and data["sizes"]["common"][0] == [64, 64, 24]
    page = (tmp_path / "out/report.html").read_text()
    for words in ("Leaks between splits", "Contradictory labels", "Broken images", "What training sees", "near.jpg"):
        assert words in page
    assert (tmp_path / "out/images.parquet").exists()
    said = capsys.readouterr().out
    assert "Found: leaks 3, duplicates 1, broken 2, contradictions 1." in said
    assert str(tmp_path / "out/report.html") in said


@pytest.mark.parametrize(
    ("words", "status"),
    [("leaks", 4), ("broken, contradictions", 4), ("duplicates", 4), ("leeks", 2), ("", 0)],
)
def test_exit_statuses(faulty, tmp_path, capsys, words, status):
    shutil.copytree(faulty, data := tmp_path / "pets")
    inspect(data, tmp_path / "out", "--fail_on", words, "--json", expected=status)
    captured = capsys.readouterr()
    if status == 2:
        assert captured.err.startswith("error: ") and "leaks" in captured.err and captured.err.count("\n") == 1
        return
    assert json.loads(captured.out)["found"]["leaks"] == 3
    assert ("--fail_on: " in captured.err) == (status == 4)


def test_a_clean_dataset_and_a_folder_that_holds_a_report(clean, faulty, tmp_path, capsys):
    every = "leaks,duplicates,broken,contradictions"
    first = inspect(clean, tmp_path / "out", "--fail_on", every)
    page = (tmp_path / "out/report.html").read_bytes()
    assert inspect(clean, tmp_path / "out") == first and (tmp_path / "out/report.html").read_bytes() == page
    capsys.readouterr()
    inspect(faulty, tmp_path / "out", expected=2)
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out/report.html").read_bytes() == page
    assert inspect(faulty, tmp_path / "out", "--overwrite")["found"]["leaks"] == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other/report.html").write_text("another one")
    inspect(clean, tmp_path / "other", expected=2)
    assert (tmp_path / "other/report.html").read_text() == "another one"


@pytest.mark.parametrize("step", ["scan", "find_copies", "write_page"])
def test_stopped_and_continued(clean, tmp_path, capsys, monkeypatch, step):
    do = getattr(inspection, step)

    def terminated(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return do(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(inspection, step, terminated)
        inspect(clean, tmp_path / "out", expected=143)
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "out/report.html").exists()
    assert inspect(clean, tmp_path / "out")["images"] == 26


def parquet(path, labels, feature, side=24):
    rows = [{"image": picture(index, side), "label": label} for index, label in enumerate(labels)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, Features({"image": ImageFeature(), "label": feature})).to_parquet(path)


def test_several_labels(tmp_path):
    labels = [["sun", "sea"], ["sea"], [], ["sun", "sea", "man"]] * 4
    parquet(tmp_path / "data/train.parquet", labels, List(Value("string")))
    data = inspect(tmp_path / "data", tmp_path / "out")
    assert data["labels"] == "classes" and data["label_names"] == ["man", "sea", "sun"]
    assert data["splits"]["train"]["counts"] == [4, 12, 8]
    assert data["splits"]["train"]["labels_per_image"] == {"0": 4, "1": 4, "2": 4, "3": 4}
    assert data["together"] == {"classes": ["sea", "sun", "man"], "images": [[12, 8, 4], [8, 8, 4], [4, 4, 4]]}
    assert parse(data["command"]["words"]).task == "multi-label-classification"


def test_numbers(tmp_path):
    parquet(tmp_path / "data/train.parquet", [0.5, 1.5, None, *range(12, 0, -1), 2.25], Value("float32"))
    data = inspect(tmp_path / "data", tmp_path / "out")
    train = data["splits"]["train"]
    assert data["labels"] == "numbers" and train["unlabelled"] == 1
    assert train["mean"] == [pytest.approx((0.5 + 1.5 + 78 + 2.25) / 15, rel=1e-6)]
    assert (train["least"], train["most"], sum(train["histogram"][0])) == ([0.5], [12.0], 15)
    assert parse(data["command"]["words"]).task == "image-regression"


@pytest.mark.parametrize("kind", ["one image", "one class", "no labels", "all broken", "test broken"])
def test_what_training_refuses_is_shown(clean, tmp_path, kind):
    root = tmp_path / "data"
    shutil.copytree(clean / "train", root / "train")
    if kind == "test broken":
        shutil.copytree(clean / "val", root / "test")
    else:
        shutil.rmtree(root / "train/dog")
    for index in range(1, 9 if kind == "one image" else 0):
        (root / f"train/cat/{index}.png").unlink()
    if kind == "no labels":
        for file in (root / "train/cat").iterdir():
            file.rename(root / file.name)
        shutil.rmtree(root / "train")
    broken = {"all broken": "train/cat/*", "test broken": "test/*/*"}.get(kind)
    for file in root.glob(broken) if broken else ():
        file.write_text("broken")
    data = inspect(root, tmp_path / "out")
    assert data["labels"] == ("class" if kind == "test broken" else "nothing")
    assert bool(data["remarks"]) == (kind != "test broken")
    assert data["found"]["broken"] == {"all broken": 9, "test broken": 8}.get(kind, 0)
    if kind == "all broken":
        assert not data["command"]["words"]
    else:
        parse(data["command"]["words"])


def test_many_classes_and_hostile_names_leave_the_page_small(tmp_path):
    names = ["<script>alert(1)</script>", '"\n\u202e\0', "$x_{", *(f"class {index}" for index in range(400))]
    labels = [index % len(names) for index in range(2 * len(names))]
    parquet(tmp_path / "data/train.parquet", labels, ClassLabel(names=names), side=8)
    data = inspect(tmp_path / "data", tmp_path / "out")
    assert data["label_names"] == names and data["splits"]["train"]["counts"] == [2] * len(names)
    page = (tmp_path / "out/report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "\0" not in page
    assert len(page) < 2_000_000


def test_a_sample(clean, tmp_path):
    data = inspect(clean, tmp_path / "out", "--max_images", 5)
    assert data["images"] == 10 and not data["complete"]
    assert "Only a sample" in (tmp_path / "out/report.html").read_text()


def test_a_model_tells_which_folder_is_labelled_wrongly(tmp_path, make_checkpoint):  # noqa: F811
    """Of validation the two classes are exchanged; among the training images of one there is one of the other."""
    colours = {"red": (200, 40, 40), "blue": (40, 40, 200)}
    for split in ("train", "val"):
        for name, other in (("red", "blue"), ("blue", "red")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(8):
                colour = colours[other if split == "val" or (name, index) == ("red", 3) else name]
                noise = picture(100 * (split == "val") + 20 * (name == "red") + index, 32)
                Image.blend(Image.new("RGB", (32, 32), colour), noise, 0.3).save(folder / f"{index}.png")
    model = make_checkpoint()
    data = inspect(tmp_path / "data", tmp_path / "out", "--model", model)
    assert {tuple(row[:3]) for row in data["outliers"]["strangers"]} == {
        ("validation", "red", "blue"),
        ("validation", "blue", "red"),
    }
    train = [entry["path"] for entry in data["outliers"]["worst"] if entry["split"] == "train"]
    assert [Path(path).name for path in train] == ["3.png"] and "/red/" in train[0]
    assert data["outliers"]["images"] == 17
    assert parse(data["command"]["words"]).model_name_or_path == model


@pytest.mark.slow
def test_the_suggested_command_trains(faulty, tmp_path, monkeypatch, make_checkpoint):  # noqa: F811
    model = make_checkpoint()
    data = inspect(faulty, tmp_path / "out", "--model", model)
    monkeypatch.chdir(tmp_path)
    words = [*data["command"]["words"], "--num_train_epochs", "1", "--num_workers", "0"]
    assert hf_poolformer_cli.main(["train", *words]) == 0
    results = json.loads((tmp_path / "outputs/pets/all_results.json").read_text())
    assert results["eval_samples"] == 12
