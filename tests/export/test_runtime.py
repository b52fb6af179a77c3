"""Exported folders in the place of models: pipeline, predict, evaluate; and the example without torch."""

import csv
import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from hf_poolformer import PoolFormerConfig, PoolFormerForSemanticSegmentation
from hf_poolformer.commands.evaluate import main as evaluate
from hf_poolformer.commands.predict import main as predict
from hf_poolformer.export import export_model, load
from hf_poolformer.foundation.errors import UserError


EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_predict.py"


@pytest.fixture(scope="module")
def exported(small_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    export_model(small_model(), folder, preprocessing=True)
    return folder


@pytest.fixture
def classes(tmp_path):
    """Photographs in folders named as the model's classes."""
    from hf_poolformer.data.photographs import jpegs

    for index, content in enumerate(jpegs((120, 90), 8, seed=1)):
        path = tmp_path / "data" / f"LABEL_{index % 3}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "data"


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_pipeline(exported, small_model, photos, caplog):
    model = load(exported)
    image = Image.open(photos / "00.jpg")
    got = pipeline("image-classification", model=model, image_processor=model.image_processor)(image)
    right = pipeline("image-classification", model=small_model())(image)
    assert [entry["label"] for entry in got] == [entry["label"] for entry in right]
    assert [entry["score"] for entry in got] == pytest.approx([entry["score"] for entry in right], rel=1e-3)
    assert "not supported" not in caplog.text


@pytest.mark.parametrize("task", ["image-classification", "image-segmentation"])
def test_pipeline_of_batches(task, exported, save_model, photos, tmp_path, caplog):
    """Images of mixed sizes, several at a time: of each what it gives alone, and maps of its own size."""
    model = load(exported)
    if task == "image-segmentation":
        small = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 32, 64), "num_labels": 4}
        config = PoolFormerConfig(**small, fpn_feature_size=16, decoder_hidden_size=16)
        segmenter = save_model(PoolFormerForSemanticSegmentation(config))
        export_model(segmenter, tmp_path / "out", dynamic_size=False)
        model = load(tmp_path / "out")
    run = pipeline(task, model=model, image_processor=model.image_processor)
    image = Image.open(photos / "00.jpg")
    images = [image.resize(size) for size in ((90, 120), (120, 90), (200, 100), (64, 64), (75, 80))]
    for one, several in zip([run(image) for image in images], run(images, batch_size=2), strict=True):
        assert [entry["label"] for entry in one] == [entry["label"] for entry in several]
        if task == "image-classification":
            scores = [[entry["score"] for entry in found] for found in (one, several)]
            assert scores[0] == pytest.approx(scores[1], rel=1e-4)  # float32, another order of summation
            continue
        for alone, beside in zip(one, several, strict=True):
            assert alone["mask"].size == beside["mask"].size
            assert (np.asarray(alone["mask"]) != np.asarray(beside["mask"])).mean() < 1e-3  # near ties of two classes
    if task == "image-segmentation":
        sizes = [found[0]["mask"].size for found in run(images, batch_size=5)]
        assert sizes == [image.size for image in images]
    assert "not supported" not in caplog.text


def test_predict(exported, small_model, photos, tmp_path, capsys):
    for name, model in (("got", exported), ("right", small_model())):
        assert predict([str(model), str(photos), "--output", str(tmp_path / f"{name}.csv"), "--num_workers", "0"]) == 0
    got, right = rows(tmp_path / "got.csv"), rows(tmp_path / "right.csv")
    assert [row["labels"] for row in got] == [row["labels"] for row in right] and len(got) == 24
    scores = [[json.loads(row["scores"]) for row in table] for table in (got, right)]
    assert torch.allclose(*map(torch.tensor, scores), rtol=1e-3)  # rounding of bytes that were normalised
    output = ["--output", str(tmp_path / "more.csv")]
    assert predict([str(exported), str(photos), *output, "--embeddings"]) == 2
    assert "gives no features" in capsys.readouterr().err


def test_evaluate(exported, small_model, classes, capsys):
    results = []
    for model in (exported, small_model()):
        assert evaluate([str(model), "--validation_dir", str(classes), "--num_workers", "0", "--json"]) == 0
        text = capsys.readouterr().out
        results.append(json.loads(text[text.index("{") :]))
    for name in ("eval_accuracy", "eval_samples"):
        assert results[0][name] == results[1][name]
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], rel=1e-3)


def test_wrong_inputs(exported, small_model, tmp_path):
    model = load(exported)
    for wrong in (None, torch.zeros(3, 64, 64), torch.zeros(1, 4, 64, 64), torch.zeros(0, 3, 64, 64)):
        with pytest.raises(ValueError, match="pixel_values"):
            model(wrong)
    with pytest.raises(UserError, match="no exported model"):
        load(small_model())
    with pytest.raises(UserError, match="no NoExecutionProvider"):
        load(exported, providers=["NoExecutionProvider"])


def test_programs_of_torch_export_are_not_run_unasked(small_model, tmp_path, classes, capsys):
    """PyTorch unpickles them, and the compiled ones are machine code."""
    out = tmp_path / "out"
    export_model(small_model(), out, format="torch")
    with pytest.raises(UserError, match="trust_remote_code"):
        load(out)
    photos = [str(path) for path in sorted(classes.rglob("*.jpg"))]
    command = [str(out), *photos, "--output", str(tmp_path / "table.csv"), "--num_workers", "0"]
    assert predict(command) == 2
    assert "--trust_remote_code" in capsys.readouterr().err
    assert not (tmp_path / "table.csv").exists()
    assert predict([*command, "--trust_remote_code"]) == 0
    assert len(rows(tmp_path / "table.csv")) == len(photos)


def test_incomplete_folder(exported, tmp_path):
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:100] if path.suffix == ".onnx" else path.read_bytes())
    with pytest.raises(UserError, match="cannot be loaded"):
        load(tmp_path)
    flipped = bytearray((exported / "model.onnx").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "model.onnx").write_bytes(flipped)
    with pytest.raises(UserError, match=r"model\.onnx is damaged"):
        load(tmp_path)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(UserError, match="incomplete"):
        load(tmp_path)
    manifest = json.loads((exported / "export.json").read_text())
    for files in (None, {}, ["model.onnx"], 5):
        (tmp_path / "export.json").write_text(json.dumps({**manifest, "files": files}))
        with pytest.raises(UserError, match="damaged"):
            load(tmp_path)
    (tmp_path / "export.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)


def best_of(model: str, photo: Path) -> list[str]:
    classify = pipeline("image-classification", model=AutoModelForImageClassification.from_pretrained(model),
                        image_processor=load_processor(model))  # fmt: skip
    return [entry["label"] for entry in classify(str(photo))]


def load_processor(model: str):
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(model)


def printed(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [line.split("  ")[-1] for line in done.stdout.splitlines()]


def test_example_without_torch(exported, small_model, photos):
    """The same five classes, in a process where torch, transformers and this package cannot be imported."""
    block = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'hf_poolformer')))\n"
    photo = photos / "05.jpg"
    code = f"{block}import runpy; sys.argv = ['x', {str(exported)!r}, {str(photo)!r}]\n"
    code += f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed(done) == best_of(small_model(), photo)


@pytest.mark.slow
def test_example_in_an_environment_without_torch(exported, small_model, photos, tmp_path):
    """Needs a package index."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "onnxruntime", "numpy", "pillow"], check=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode != 0
    done = subprocess.run([python, EXAMPLE, exported, photos / "05.jpg"], capture_output=True, text=True)
    assert printed(done) == best_of(small_model(), photos / "05.jpg")
