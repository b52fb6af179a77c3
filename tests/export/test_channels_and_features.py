"""Models of one and four channels, and models without classes: exported right, used right, or refused in one line."""

import csv
import json

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
from hf_poolformer.commands.evaluate import main as evaluate
from hf_poolformer.commands.explain import main as explain
from hf_poolformer.commands.predict import main as predict
from hf_poolformer.export import export_model, load
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.prediction.inference import Predictor


SMALL = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 32, 64)}
SQUARE = {"height": 64, "width": 64}
MEANS = {1: [0.4], 3: [0.4, 0.5, 0.6], 4: [0.2, 0.3, 0.4, 0.5]}


@pytest.fixture(scope="module")
def model_of(save_model):
    """Saves a model of so many channels, with an image processor of these settings."""

    def make(channels: int = 3, num_labels: int = 7, **settings) -> str:
        torch.manual_seed(0)
        config = PoolFormerConfig(**SMALL, num_labels=num_labels, num_channels=channels)
        folder = save_model(PoolFormerForImageClassification(config))
        PoolFormerImageProcessor(
            size={"shortest_edge": 64}, crop_size=SQUARE, crop_pct=0.9, **settings
        ).save_pretrained(folder)
        return folder

    return make


def plain(number: int) -> dict:
    return {"do_convert_rgb": False, "image_mean": MEANS[number], "image_std": MEANS[number]}


def model_answers(folder: str, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pixels, and the model's logits of them."""
    processor = AutoImageProcessor.from_pretrained(folder)
    options = {
        "do_resize": False,
        "do_center_crop": False,
        "return_tensors": "pt",
        "input_data_format": "channels_last",
    }
    normalised = processor(list(pixels), **options)["pixel_values"]
    with torch.no_grad():
        return normalised, AutoModelForImageClassification.from_pretrained(folder).eval()(normalised).logits


@pytest.mark.parametrize("preprocessing", [False, True])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    "format", ["onnx", pytest.param("openvino", marks=pytest.mark.slow), pytest.param("torch", marks=pytest.mark.slow)]
)
def test_channels(format, channels, preprocessing, model_of, tmp_path):
    folder = model_of(channels, **plain(channels))
    summary = export_model(folder, tmp_path / "out", format=format, preprocessing=preprocessing, dynamic_size=False)
    assert summary.report.passed and summary.manifest.num_channels == channels
    assert str(channels) in (tmp_path / "out" / "README.md").read_text()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, channels), dtype=np.uint8)
    normalised, right = model_answers(folder, pixels)
    model = load(tmp_path / "out", trust_remote_code=True)
    inputs = [normalised, torch.from_numpy(pixels)] if preprocessing else [normalised]
    for given in inputs:
        got = model(given).logits
        assert (got.softmax(1) - right.softmax(1)).abs().max() < 1e-5  # of probabilities, float32
    with pytest.raises(ValueError, match=f"{channels}, height"):
        model(torch.zeros(1, 3, 64, 64))


@pytest.mark.slow
def test_grey_images_calibrate(model_of, photos, tmp_path):
    summary = export_model(
        model_of(1, **plain(1)), tmp_path / "out", format="openvino", precision="int8", calibration_dataset=str(photos)
    )
    assert summary.report.passed


@pytest.mark.parametrize(
    ("channels", "settings", "message"),
    [
        (1, {}, "makes 3 of them"),
        (4, {}, "makes 3 of them"),
        (1, {"do_convert_rgb": False}, "cannot prepare an image of 1 channels: image_mean has 3 values"),
        (4, {"do_convert_rgb": False}, "cannot prepare an image of 4 channels: image_mean has 3 values"),
        (2, plain(1), "2 channels, which its image processor does not make: .* num_channels 2"),
        (5, plain(1), "5 channels, which its image processor does not make: .* num_channels 5"),
        (5, {"num_channels": 4}, "5 channels"),
    ],
)
@pytest.mark.parametrize("preprocessing", [False, True])
def test_channels_that_the_processor_does_not_make(channels, settings, message, preprocessing, model_of, tmp_path):
    with pytest.raises(UserError, match=message):
        export_model(model_of(channels, **settings), tmp_path / "out", preprocessing=preprocessing)
    assert not list(tmp_path.iterdir())


def test_a_dataset_has_no_fourth_channel(model_of, photos, tmp_path):
    with pytest.raises(UserError, match="4 channels: export it without --calibration_dataset"):
        export_model(model_of(4, **plain(4)), tmp_path / "out", calibration_dataset=str(photos))


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_elsewhere(channels, model_of):
    """Images are read in colour unless the processor says num_channels; that is said before the first image."""
    with pytest.raises(UserError, match=f"{channels} channels"):
        Predictor(model_of(channels, **plain(channels)), device="cpu")


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_processor_of_so_many_channels(channels, model_of, tmp_path):
    """With preprocessing in the graph, pixels of 8 bits answer as without it; those of 16 are refused."""
    folder = model_of(channels, num_channels=channels)
    for preprocessing in (False, True):
        out = tmp_path / f"out-{preprocessing}"
        summary = export_model(folder, out, preprocessing=preprocessing, dynamic_size=False)
        assert summary.report.passed and summary.manifest.num_channels == channels
    pixels = np.random.default_rng(0).integers(0, 256, (80, 70, channels), dtype=np.uint8)
    for suffix, values in (("8", pixels), ("16", pixels.astype(np.uint16) * 25)):
        np.save(tmp_path / f"{suffix}.npy", values)
    answers = []
    for name in (folder, tmp_path / "out-False", tmp_path / "out-True"):
        predictor = Predictor(str(name), device="cpu", top_k=7)
        (row,) = predictor.rows(predictor.preprocessing.load([("8", tmp_path / "8.npy")]))
        answers.append(dict(zip(row["labels"], row["scores"], strict=True)))
    for answer in answers[1:]:
        assert answer == pytest.approx(answers[0], abs=1e-5)  # of probabilities, float32
    with pytest.raises(UserError, match="these images have more"):
        predictor.rows(predictor.preprocessing.load([("16", tmp_path / "16.npy")]))


# Without classes ------------------------------------------------------------------------------------------------


def embeddings(path) -> list:
    with path.open(newline="") as file:
        return [json.loads(row["embedding"]) for row in csv.DictReader(file)]


def test_features(model_of, photos, tmp_path, capsys):
    """predict gives the features that the model gives, and those of an export, too; nothing calls them classes."""
    folder = model_of(num_labels=0)
    for preprocessing in (False, True):
        out = tmp_path / f"out-{preprocessing}"
        manifest = export_model(folder, out, preprocessing=preprocessing, dynamic_size=False).manifest
        assert manifest.output == "features"
        for model, name in ((out, "export"), (folder, "model")):
            arguments = [str(model), str(photos), "--num_workers", "0", "--output", str(tmp_path / f"{name}.csv")]
            assert predict([*arguments, "--overwrite"]) == 2
            assert "--embeddings" in capsys.readouterr().err
            assert predict([*arguments, "--overwrite", "--embeddings"]) == 0
        got, right = (np.array(embeddings(tmp_path / f"{name}.csv")) for name in ("export", "model"))
        assert right.shape == (24, 64)
        assert np.abs(got - right).max() < 1e-4 * np.abs(right).max()  # float32, another order of summation
        header = (tmp_path / "model.csv").read_text().splitlines()[0]
        assert header == "path,embedding,error"
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    normalised, features = model_answers(folder, pixels)
    assert np.allclose(load(out)(normalised).logits, features, atol=1e-4 * features.abs().max())


def test_nothing_to_evaluate_or_explain(model_of, photos, tmp_path, capsys):
    folder = model_of(num_labels=0)
    for run, arguments in (
        (evaluate, ["--validation_dir", photos, "--num_workers", "0"]),
        (explain, [photos / "00.jpg", "--output", tmp_path / "x.png"]),
    ):
        assert run([str(argument) for argument in (folder, *arguments)]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ") and "has no classes: it is a feature extractor" in said
    assert not list(tmp_path.iterdir())
