"""Labels of the images that an export is measured on: numbered as in training and evaluation."""

import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
from hf_poolformer.export import export_model
from hf_poolformer.export.images import read_samples


NAMES = ["cat", "dog", "eel"]


def write_rows(path, number: int, **columns) -> None:
    """Grey images of their own brightness each, by which they are told apart; columns are (feature, values)."""
    images = []
    for value in range(number):
        stream = io.BytesIO()
        PILImage.new("RGB", (32, 32), (240 * value // number,) * 3).save(stream, "PNG")
        images.append({"bytes": stream.getvalue(), "path": None})
    features = Features({"image": Image(), **{name: feature for name, (feature, _) in columns.items()}})
    rows = {"image": images, **{name: values for name, (_, values) in columns.items()}}
    Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.mark.parametrize(
    ("feature", "stored", "names", "expected"),
    [
        (Value("int64"), [1, 2, 3], ["1", "2", "3"], [0, 1, 2]),
        (Value("float32"), [0.0, 1.0, 2.0], NAMES, [0, 1, 2]),
        (Value("string"), ["eel", "cat ", "dog"], NAMES, [2, 0, 1]),
        (ClassLabel(names=["eel", "cat"]), [0, 1, 0], NAMES, [2, 0, 2]),
        (ClassLabel(names=["fox", "cat"]), [0, 1, 0], NAMES, None),
        (Value("int64"), [1, 2, 7], NAMES, None),
    ],
)
def test_labels_are_numbered_as_the_model_does(tmp_path, feature, stored, names, expected):
    write_rows(tmp_path / "data.parquet", 3, label=(feature, stored))
    config = PoolFormerConfig(
        id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)}
    )
    processor = PoolFormerImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    samples = read_samples(str(tmp_path / "data.parquet"), processor, config, (2, 1))
    found = {}
    for sample in samples:
        if sample.labels is not None:
            brightness = sample.pixel_values.mean((1, 2, 3))
            found |= {
                round(value.item(), 2): label for value, label in zip(brightness, sample.labels.tolist(), strict=True)
            }
    if expected is None:
        assert len(found) < 3
    else:
        assert [label for _, label in sorted(found.items())] == expected


SEVERAL = {"tags": (List(Value("string")), [["eel"], ["cat", "dog"], [], ["dog"]] * 6)}
NUMBERS = {"score": (Value("float32"), [float(value) / 10 for value in range(24)])}


@pytest.mark.parametrize(
    ("problem", "columns", "wanted"),
    [
        ("multi_label_classification", SEVERAL, [[0, 0, 1], [1, 1, 0], [0, 0, 0], [0, 1, 0]] * 6),
        ("regression", NUMBERS, [[value / 10] for value in range(24)]),
        ("multi_label_classification", {"tags": (List(Value("string")), [["fox"]] * 24)}, None),
        ("regression", {"remark": (Value("string"), ["none"] * 24)}, None),
    ],
)
def test_what_labels_say_of_an_export(problem, columns, wanted, tmp_path):
    """Several labels, and numbers: figures of export and model by the labels; labels of another kind are left out."""
    write_rows(tmp_path / "data.parquet", 24, **columns)
    names = NAMES if problem.startswith("multi") else ["score"]
    config = PoolFormerConfig(
        depths=(1, 1, 1, 1),
        hidden_sizes=(8, 16, 32, 64),
        problem_type=problem,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = PoolFormerForImageClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(30)
    processor = PoolFormerImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    data = str(tmp_path / "data.parquet")
    (_, sample) = read_samples(data, processor, config, (1, 200))
    if wanted is None:
        assert sample.labels is None
        return
    summary = export_model(
        tmp_path / "model", tmp_path / "out", format="torch", dynamic_size=False, calibration_dataset=data
    )
    report, text = summary.report, str(summary) + (tmp_path / "out" / "README.md").read_text()
    with torch.no_grad():
        logits = model(sample.pixel_values).logits
        brightness = sample.pixel_values.mean((1, 2, 3)).argsort()
    found = sorted(sample.labels.tolist())
    assert all(any(np.allclose(row, label) for row in wanted) for label in found) and len(found) == 23
    if problem == "regression":
        truth = sample.labels
        assert (truth[brightness].diff(dim=0) > 0).all()  # each with its image
        assert report.figures_before["mae"] == pytest.approx((logits - truth).abs().mean().item(), rel=1e-5)
        assert report.figures["mae"] == pytest.approx(report.figures_before["mae"], rel=1e-4)
        assert report.figures.keys() == {"mae", "rmse", "r2"} and "Mean absolute error" in text
    else:
        share = ((logits > 0) == (sample.labels > 0.5)).all(1).double().mean().item()
        assert report.figures_before["exact_match"] == pytest.approx(share)
        assert report.figures.keys() == {"average_precision", "f1_macro", "exact_match"}
        assert "Mean average precision" in text
    assert not report.accuracy
