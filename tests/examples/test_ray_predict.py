"""The Ray example on this machine: two cores, a small object store."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
from hf_poolformer.prediction import predict


EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_predict.py"

# Ray's own defaults would take a third of the memory and every core.
RUN = """
import runpy, sys, ray
ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    classifier = PoolFormerForImageClassification(
        PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 32, 64), num_labels=6)
    )
    with torch.no_grad():
        classifier.classifier.weight.normal_(std=0.5)
    classifier.save_pretrained(tmp_path / "model")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    PoolFormerImageProcessor(**size).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(40):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed:02d}.png")
    (folder / "broken.jpg").write_bytes(b"junk")
    return folder


def run(*arguments):
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(EXAMPLE), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ray"), reason="needs pip install 'hf-poolformer[ray]'")
@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_the_rows_are_those_of_predict(model, photos, tmp_path, kind):
    inputs, arguments = photos, []
    if kind == "parquet":
        files = sorted(photos.iterdir())
        rows = {"image": [{"bytes": file.read_bytes(), "path": str(file)} for file in files]}
        Dataset.from_dict(rows, features=Features({"image": ImageFeature()})).to_parquet(tmp_path / "photos.parquet")
        inputs, arguments = tmp_path / "photos.parquet", ["--format", "parquet"]
    done = run(model, inputs, "--output", tmp_path / "out", "--embeddings", "--num_actors", 1, *arguments)
    assert f"Written to {tmp_path / 'out'}" in done.stdout
    predict(model, [photos], tmp_path / "expected.parquet", embeddings=True, progress=False)
    expected = {row["path"]: row for row in pq.read_table(tmp_path / "expected.parquet").to_pylist()}
    found = {row["path"]: row for row in pq.read_table(tmp_path / "out").to_pylist()}
    assert found.keys() == expected.keys() and len(found) == 41
    for path, row in found.items():
        same = expected[path]
        assert (row["labels"], row["error"]) == (same["labels"], same["error"])
        if row["error"] is None:
            # Other batches, hence other last digits.
            assert row["scores"] == pytest.approx(same["scores"], rel=1e-4)
            assert row["embedding"] == pytest.approx(same["embedding"], rel=1e-3, abs=1e-5)
    assert sum(row["error"] is not None for row in found.values()) == 1
