"""On which images a model is measured, and what a program gets to read."""

import json

import pytest

import hf_poolformer_cli


@pytest.fixture(scope="module")
def trained(things, tmp_path_factory):
    """A run on two folders of photographs, a quarter of which it held out."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ["--recipe", "demo", "--train_dir", things.photos, "--train_val_split", 0.25, "--output_dir", folder]
    words += ["--model_name_or_path", things.model, "--max_train_steps", 1, "--num_workers", 0]
    assert hf_poolformer_cli.main(["train", *map(str, words)]) == 0
    return folder


def evaluate(capfd, *words):
    capfd.readouterr()
    assert hf_poolformer_cli.main(["evaluate", *map(str, words), "--num_workers", "0", "--json"]) == 0
    return json.loads(capfd.readouterr().out)


@pytest.mark.parametrize("flag", ["--dataset_name", "--validation_dir"])
def test_images_of_the_training_are_left_out(trained, things, capfd, caplog, flag):
    held_out = json.loads((trained / "all_results.json").read_text())
    assert 0 < held_out["eval_samples"] < 24
    results = evaluate(capfd, trained, flag, things.photos)
    assert results["model"] == str(trained)
    assert results["eval_samples"] == held_out["eval_samples"]
    assert results["eval_accuracy"] == held_out["eval_accuracy"]
    assert results["eval_loss"] == pytest.approx(held_out["eval_loss"], rel=1e-5)  # sums in another order
    assert "was trained on the other images" in caplog.text
    caplog.clear()
    everything = evaluate(capfd, trained, flag, things.photos, "--train_val_split", 0)
    assert everything["eval_samples"] == 24 and not caplog.text


def test_a_model_that_tells_nothing_is_measured_on_all(trained, things, capfd):
    results = evaluate(capfd, things.model, "--dataset_name", things.photos, "--batch_size", 5)
    assert results["eval_samples"] == 24
    part = evaluate(capfd, things.model, "--dataset_name", things.photos, "--train_val_split", 0.25)
    assert part["eval_samples"] == json.loads((trained / "all_results.json").read_text())["eval_samples"]


def test_devices(things, capfd):
    results = evaluate(capfd, things.model, "--dataset_name", things.photos, "--device", "cpu")
    assert results["eval_samples"] == 24
    assert hf_poolformer_cli.main(["evaluate", str(things.model), "--dataset_name", "x", "--device", "gpu7"]) == 2
    assert "error: --device gpu7 cannot be used" in capfd.readouterr().err
