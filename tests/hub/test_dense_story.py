"""A segmenter trained and published by one command, and used by its name where this package is not installed."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from warm import warm_python


SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 16], "fpn_feature_size": 16, "decoder_hidden_size": 8}
SEGMENT = """
import json, sys
sys.modules["hf_poolformer"] = None
from PIL import Image
from transformers import pipeline
segment = pipeline("image-segmentation", sys.argv[1], trust_remote_code=True)
print(json.dumps({part["label"]: part["mask"].size for part in segment(Image.open(sys.argv[2]))}))
"""


@pytest.fixture
def squares(tmp_path):
    """Squares on noise, with maps of two classes; the first picture as a file beside."""
    rng = np.random.default_rng(0)

    def encoded(pixels):
        buffer = io.BytesIO()
        PILImage.fromarray(pixels).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    folder = tmp_path / "squares"
    folder.mkdir()
    for split, count in (("train", 16), ("validation", 4)):
        rows = []
        for _ in range(count):
            pixels, classes = rng.integers(0, 90, (64, 72, 3), dtype=np.uint8), np.zeros((64, 72), np.uint8)
            y, x = rng.integers(0, 36, 2)
            pixels[y : y + 28, x : x + 28], classes[y : y + 28, x : x + 28] = (230, 60, 60), 1
            rows.append({"image": encoded(pixels), "annotation": encoded(classes)})
        features = Features({"image": Image(), "annotation": Image()})
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    (folder / "id2label.json").write_text(json.dumps({"0": "ground", "1": "square"}))
    (tmp_path / "square.png").write_bytes(rows[0]["image"]["bytes"])
    return folder


@pytest.mark.slow
def test_train_publish_and_use(hub, run_with_hub, hub_token, squares, tmp_path):
    run = tmp_path / "run"
    train = ["--task", "semantic-segmentation", "--recipe", "demo", "--dataset_name", squares, "--output_dir", run]
    train += ["--config_overrides", json.dumps(TINY), "--num_train_epochs", "2", "--num_workers", "0"]
    train += ["--per_device_train_batch_size", "4", "--push_to_hub", "--hub_model_id", "me/squares"]
    done = run_with_hub([warm_python(), SCRIPTS / "train_dense.py"], *train, token=hub_token)
    assert done.returncode == 0, done.stderr
    assert f"Published to {hub.url}/me/squares" in done.stdout
    files = hub.files("me/squares")
    assert {"README.md", "config.json", "model.safetensors", "modeling_segmentation.py", "curves.png"} <= set(files)
    assert "pipeline_tag: image-segmentation" in files["README.md"].decode()
    assert str(tmp_path).encode() not in b"".join(files.values())

    done = run_with_hub(SEGMENT, "me/squares", tmp_path / "square.png")
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes and set(sizes) <= {"ground", "square"} and all(size == [72, 64] for size in sizes.values())
