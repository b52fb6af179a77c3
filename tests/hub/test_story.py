"""From a folder of photographs to a model that others use by its name, in the commands that the README gives."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from warm import warm_python


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


def hf_poolformer(command):
    return [warm_python(), "-m", "hf_poolformer", command]


def training(photos, run):
    return [
        *("--recipe", "demo", "--train_dir", photos, "--train_val_split", "0.2", "--output_dir", run),
        *("--num_train_epochs", "6", "--per_device_train_batch_size", "16", "--affine_degrees", "0"),
    ]


@pytest.mark.slow
def test_five_commands(hub, run_with_hub, hub_token, photos, tmp_path):
    run = tmp_path / "run"

    def call(command, *words, token=None):
        done = run_with_hub(hf_poolformer(command), *words, token=token)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call("train", *training(photos, run), "--emissions_country", "DEU")
    trained = json.loads((run / "all_results.json").read_text())
    assert trained["eval_accuracy"] >= 0.9

    measured = json.loads(call("evaluate", run, "--dataset_name", photos, "--json"))
    assert measured["eval_samples"] == trained["eval_samples"] < 60, "only what the run held out"
    assert measured["eval_accuracy"] == trained["eval_accuracy"]

    call("predict", run, photos / "up", "--output", tmp_path / "predictions.csv")
    with open(tmp_path / "predictions.csv", newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert len(labels) == 60 and labels.count("up") >= 54

    call("explain", run, photos / "up" / "0.png", "--output", tmp_path / "explained.png")
    assert Image.open(tmp_path / "explained.png").width > 200

    assert f"Published: {hub.url}/me/slopes" in call("publish", run, "--repo_id", "me/slopes", token=hub_token)
    card = hub.files("me/slopes")["README.md"].decode()
    assert 'model="me/slopes"' in card
    assert "### Emissions" in card
    assert "CO₂" in card
    assert str(tmp_path).encode() not in b"".join(hub.files("me/slopes").values())

    files = [photos / "up" / f"{index}.png" for index in range(8)]
    files += [photos / "down" / f"{index}.png" for index in range(8)]
    done = run_with_hub(CLASSIFY, "me/slopes", *files)
    assert done.returncode == 0, done.stderr
    labels = json.loads(done.stdout.splitlines()[-1])
    assert sum(label == path.parent.name for label, path in zip(labels, files, strict=True)) >= 14


@pytest.mark.slow
def test_training_publishes_by_itself(hub, run_with_hub, hub_token, photos, tmp_path):
    run = tmp_path / "run"
    words = [*training(photos, run), "--max_train_steps", "2", "--push_to_hub", "--hub_model_id", "me/slopes"]
    done = run_with_hub(hf_poolformer("train"), *words, token=hub_token)
    assert done.returncode == 0, done.stderr
    assert f"Published to {hub.url}/me/slopes" in done.stdout
    done = run_with_hub(hf_poolformer("publish"), run, "--repo_id", "me/slopes", token=hub_token)
    assert done.returncode == 0, done.stderr
    assert len(hub.repos["models", "me/slopes"].branches["main"]) == 2, "it was there already"
