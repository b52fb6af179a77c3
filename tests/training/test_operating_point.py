"""`--operating_point`: rare classes favoured by the biases of the last layer."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, Image, load_dataset
from digits import digit_rows
from shards import write_shards
from sklearn.metrics import balanced_accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_poolformer.evaluation.metrics import ClassJudge
from hf_poolformer.evaluation.thresholds import STRENGTHS, choose_shift, shift_for_recall
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training.classification import shifted
from hf_poolformer.training.loop import train


SCORES = {
    "f1_macro": lambda labels, predicted: f1_score(labels, predicted, average="macro"),
    "balanced_accuracy": balanced_accuracy_score,
    "mcc": matthews_corrcoef,
}


def made_up(images, seed=0, frequencies=(0.7, 0.2, 0.1)):
    """Logits of a model that learnt these frequencies, and the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(frequencies), images, p=frequencies)
    signs = rng.normal(size=(images, len(frequencies))) + 1.5 * np.eye(len(frequencies))[labels]
    return 1.5 * signs + np.log(frequencies), labels


@pytest.mark.parametrize("name", SCORES)
def test_the_figure_is_better_on_these_images_and_on_others(name):
    logits, labels = made_up(2000)
    shift, strength = choose_shift(logits, labels, lambda predicted: SCORES[name](labels, predicted))
    others, truth = made_up(20000, seed=1)
    before, after = (SCORES[name](truth, (others + moved).argmax(1)) for moved in (0, shift))
    # What Bayes' rule gives: of balanced accuracy exactly the share 1; the others lie between.
    assert strength == pytest.approx(1, abs=0.15) if name == "balanced_accuracy" else 0 < strength < 1
    assert after > before + {"balanced_accuracy": 0.05, "f1_macro": 0.002, "mcc": 0}[name]
    counts = np.bincount(labels)
    assert shift == pytest.approx(strength * (np.log(counts).mean() - np.log(counts)))


@pytest.mark.parametrize("recall", [0.01, 0.5, 0.8, 0.99])
def test_a_share_of_a_class_is_found(recall):
    logits, labels = made_up(500)
    shift = shift_for_recall(logits, labels, 2, recall)
    assert (shift[:2] == 0).all()
    images = (labels == 2).sum()
    found = ((logits + shift).argmax(1) == 2)[labels == 2].sum()
    assert found == max(np.ceil(recall * images), 1)
    # Of other images of the same kind about as many.
    others, truth = made_up(20000, seed=1)
    assert ((others + shift).argmax(1) == 2)[truth == 2].mean() == pytest.approx(recall, abs=0.1)
    assert (shift_for_recall(logits[labels != 2], labels[labels != 2], 2, recall) == 0).all()


def test_nothing_to_choose():
    logits = np.random.default_rng(0).normal(size=(8, 3))
    shift, strength = choose_shift(logits, np.array([0, 1] * 4), lambda predicted: predicted.mean())
    assert (shift == 0).all() and strength == 0  # two classes alike, and a third that no image has
    # All strengths are as good: the one that changes nothing.
    shift, strength = choose_shift(logits, np.array([0] * 6 + [1, 1]), lambda predicted: 0.5)
    assert (shift == 0).all() and strength == 0
    assert STRENGTHS[20] == pytest.approx(0, abs=1e-12)


def test_processes_choose_together_what_one_would():
    logits, labels = made_up(300)
    logits, labels = torch.from_numpy(logits).float(), torch.from_numpy(labels)
    states = []
    for share in (slice(0, 300), slice(0, 37), slice(37, 300)):
        judge = ClassJudge(3, operating_point="f1_macro", intervals=True)
        judge.add(labels[share], logits[share])
        states.append(judge.state())
    alone, together = (
        ClassJudge(3, operating_point="f1_macro", intervals=True).compute(s) for s in (states[:1], states[1:])
    )
    assert alone["class_shifts"] == pytest.approx(together["class_shifts"]) and alone["shift_strength"] > 0
    moved = logits.double() + torch.tensor(alone["class_shifts"])
    # All figures are of the moved answers.
    expected = f1_score(labels, moved.argmax(1), average="macro")
    assert alone["eval_f1_macro"] == together["eval_f1_macro"] == pytest.approx(expected)
    assert alone["eval_loss"] == pytest.approx(torch.nn.functional.cross_entropy(moved, labels).item(), rel=1e-5)
    low, high = alone["eval_confidence_intervals"]["eval_f1_macro"]
    assert low < expected < high


def test_impossible_answers_stay_impossible():
    judge = ClassJudge(2, operating_point="balanced_accuracy")
    judge.add(torch.tensor([0, 0, 0, 1]), torch.tensor([[300.0, -300.0]] * 3 + [[-300.0, 300.0]]))
    results = judge.compute([judge.state()])
    assert results["eval_accuracy"] == 1 and np.isfinite(results["eval_loss"]) and results["shift_strength"] == 0


@pytest.fixture(scope="module")
def ones(tmp_path_factory):
    """Digits, of which one in ten is a one."""
    folder = tmp_path_factory.mktemp("ones")
    features = Features({"image": Image(), "label": ClassLabel(names=["other", "one"])})
    rows = [{**row, "label": int(row["label"] == 1)} for row in digit_rows()[:500]]
    write_shards(folder, "train", rows[:300], features, 2)
    write_shards(folder, "test", rows[300:], features, 1)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema_decay": 0.5, "load_best_model_at_end": True, "metric_for_best_model": "f1_macro", "eval_epochs": 1},
    ],
    ids=["last", "best of a moving average"],
)
def test_the_saved_model_has_it_in_its_biases(make_settings, ones, tmp_path, capsys, changes):
    settings = make_settings(
        dataset_name=str(ones), num_train_epochs=3, operating_point="balanced_accuracy", **changes
    )
    results = train(settings)
    run = tmp_path / "run"
    strength = results["shift_strength"]
    assert set(results["class_shifts"]) == {"other", "one"}
    assert strength != 0 and f", moved by {strength:.2f} log n" in capsys.readouterr().out
    assert "see `operating_point`" in (run / "README.md").read_text()
    # By the saved model and transformers alone.
    rows = load_dataset("parquet", data_files=str(ones / "test*.parquet"), split="train")
    model, processor = AutoModelForImageClassification.from_pretrained(run), AutoImageProcessor.from_pretrained(run)
    images = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")
    with torch.no_grad():
        logits = model(**images).logits.double().numpy()
    labels = np.array(rows["label"])
    assert results["eval_balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    # It is moved already, once: moving it back by what was chosen, it is chosen again.
    learnt = logits - [results["class_shifts"][name] for name in ("other", "one")]
    score = lambda predicted: balanced_accuracy_score(labels, predicted)  # noqa: E731
    _, again = choose_shift(learnt, labels, score)
    assert again == pytest.approx(strength) and score(logits.argmax(1)) >= score(learnt.argmax(1))
    # A run that goes on trains what it learnt, and chooses anew.
    if not changes:
        more = {**vars(settings), "resume_from_checkpoint": "latest", "num_train_epochs": 3}
        assert train(type(settings)(**more))["class_shifts"] == results["class_shifts"]


def test_a_run_finds_as_many_of_a_class_as_it_is_told(make_settings, ones, capsys):
    results = train(make_settings(dataset_name=str(ones), num_train_epochs=2, operating_point="one=0.9"))
    ones_there = results["eval_per_class_samples"]["one"]
    assert results["eval_per_class_recall"]["one"] == pytest.approx(np.ceil(0.9 * ones_there) / ones_there)
    shift = results["class_shifts"]
    assert shift["other"] == 0 and f", moved by {shift['one']:.2f} towards one" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown class in --operating_point: two; there are other, one"):
        train(make_settings(dataset_name=str(ones), operating_point="two=0.9", overwrite_output_dir=True))


def test_any_head_has_biases():
    from hf_poolformer import MetaFormerConfig, MetaFormerForImageClassification

    config = MetaFormerConfig.from_variant(
        "caformer_s18", num_labels=3, depths=[1] * 4, hidden_sizes=[16] * 4, image_size=32
    )
    model = MetaFormerForImageClassification(config).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before, after = model(images).logits, shifted(model, [1.0, 0.0, -2.0])(images).logits
    torch.testing.assert_close(after - before, torch.tensor([[1.0, 0.0, -2.0]] * 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operating_point": "f1"}, "--operating_point is one of none, f1_macro, .* like defective=0.8; not 'f1'"),
        ({"operating_point": "one=80"}, "not 'one=80'"),
        ({"operating_point": "=0.8"}, "not '=0.8'"),
        ({"task": "image-regression", "operating_point": "mcc"}, "--operating_point mcc: numbers have no classes"),
        ({"task": "multi-label-classification", "operating_point": "mcc"}, "--label_thresholds f1"),
    ],
)
def test_refused(changes, message):
    given = {"task": "image-classification", "dataset_name": "x", "output_dir": "y"} | changes
    with pytest.raises(UserError, match=message):
        TrainingSettings.from_recipe("demo", **given)


def test_without_validation_images_there_is_nothing_to_choose_on(make_settings, ones, tmp_path):
    only = tmp_path / "only"
    only.mkdir()
    for shard in ones.glob("train*"):
        (only / shard.name).symlink_to(shard)
    with pytest.raises(UserError, match=r"chosen on validation images, and there are none: give --train_val_split"):
        train(make_settings(dataset_name=str(only), operating_point="mcc", train_val_split=0))
    assert not list((tmp_path / "run").glob("*.safetensors"))
    log = tmp_path / "run" / "training_log.jsonl"
    assert not log.exists() or not any("loss" in json.loads(line) for line in log.read_text().splitlines())
