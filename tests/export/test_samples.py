"""Labels of the images that an export is measured on: numbered as in training and evaluation."""

import io

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from hf_poolformer import PoolFormerConfig, PoolFormerImageProcessor
from hf_poolformer.export.images import read_samples


NAMES = ["cat", "dog", "eel"]


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
    images = []
    for value in range(3):  # told apart by their pixels, since they come in an order of their own
        stream = io.BytesIO()
        PILImage.new("RGB", (32, 32), (80 * value,) * 3).save(stream, "PNG")
        images.append({"bytes": stream.getvalue(), "path": None})
    features = Features({"image": Image(), "label": feature})
    Dataset.from_dict({"image": images, "label": stored}, features=features).to_parquet(tmp_path / "data.parquet")
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
