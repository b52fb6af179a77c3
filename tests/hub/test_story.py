"""From a folder of photographs to a model that others use by its name, in the commands that the README gives."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


SCRIPTS = Path(__file__).parents[2] / "scripts"
CLASSIFY = """
import json, sys
sys.modules["hf_poolformer"] = None
from transformers import pipeline
classify = pipeline("image-classification", sys.argv[1])
print(json.dumps([best["label"] for best, *_ in classify(sys.argv[2:])]))
"""


@pytest.fixture
def photos(tmp_path):
    """Bright above or bright below, with noise."""
    generator = np.random.default_rng(0)
    for name, sign in (("up", 1), ("down", -1)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(60):
            slope = sign * np.linspace(60, -60, 24)[:, None, None]
            pixels = 128 + slope + generator.normal(0, 20, (24, 24, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


@pytest.mark.slow
def test_five_commands(hub, run_with_hub, hub_token, photos, tmp_path):
    run = tmp_path / "run"
    train = ["--recipe", "demo", "--train_dir", photos, "--train_val_split", "0.2", "--output_dir", run]
    train += ["--num_train_epochs", "6", "--per_device_train_batch_size", "16", "--affine_degrees", "0"]
    train += ["--push_to_hub", "--hub_model_id", "me/slopes", "--emissions_country", "DEU"]
    done = run_with_hub([sys.executable, SCRIPTS / "train.py"], *train, token=hub_token)
    assert done.returncode == 0, done.stderr
    assert f"Published to {hub.url}/me/slopes" in done.stdout
    accuracy = json.loads((run / "all_results.json").read_text())["eval_accuracy"]
    assert accuracy >= 0.9
    card = hub.files("me/slopes")["README.md"].decode()
    assert 'model="me/slopes"' in card
    assert "### Emissions" in card
    assert "CO₂" in card
    assert str(tmp_path).encode() not in b"".join(hub.files("me/slopes").values())

    evaluation = ["--dataset_name", photos, "--output_dir", tmp_path / "again"]
    done = run_with_hub([sys.executable, SCRIPTS / "evaluate.py"], run, *evaluation)
    assert done.returncode == 0, done.stderr

    done = run_with_hub([sys.executable, SCRIPTS / "publish.py"], run, "--repo_id", "me/slopes", token=hub_token)
    assert done.returncode == 0, done.stderr
    assert len(hub.repos["models", "me/slopes"].branches["main"]) == 2, "it was there already"

    files = [photos / "up" / f"{index}.png" for index in range(8)]
    files += [photos / "down" / f"{index}.png" for index in range(8)]
    done = run_with_hub(CLASSIFY, "me/slopes", *files)
    assert done.returncode == 0, done.stderr
    labels = json.loads(done.stdout.splitlines()[-1])
    assert sum(label == path.parent.name for label, path in zip(labels, files, strict=True)) >= 14
