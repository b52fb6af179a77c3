"""Weights, focal loss and sampling for rare classes: against formulas in float64, and in a run."""

import json
import math

import pytest
import torch
from datasets import ClassLabel, Features, Image
from digits import digit_rows
from shards import write_shards
from torchvision.ops import sigmoid_focal_loss

from hf_poolformer.data.datasets import open_datasets
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training.augmentation import BatchMixer
from hf_poolformer.training.loop import train
from hf_poolformer.training.objectives import AsymmetricLoss, BinaryCrossEntropy, cross_entropy
from hf_poolformer.training.rare_classes import RareClassLoss, class_weights, rare_classes


NAMES = ["plenty", "some", "few", "none"]
COUNTS = [900, 90, 10, 0]


def settings_with(task="image-classification", **changes):
    return TrainingSettings.from_recipe("demo", task=task, dataset_name="x", output_dir="y", **changes)


def mean_over_images(weights, counts=COUNTS):
    return sum(weight * count for weight, count in zip(weights, counts, strict=True)) / sum(counts)


def test_weights_by_rule():
    auto = class_weights(settings_with(class_weights="auto"), NAMES, COUNTS)
    assert auto == pytest.approx([1000 / (3 * 900), 1000 / (3 * 90), 1000 / (3 * 10), 1])  # N / (C n)
    for beta in (None, 0.9, 0.0, 1 - 1e-12):
        settings = settings_with(class_weights="effective", class_weights_beta=beta)
        weights = class_weights(settings, NAMES, COUNTS)
        b = 0.999 if beta is None else beta
        raw = [(1 - b) / (1 - b**n) for n in COUNTS[:3]]
        expected = [weight / mean_over_images(raw, COUNTS[:3]) for weight in raw]
        # 1 - 1e-12 itself has but four digits of 1e-12 in float64.
        assert weights[:3] == pytest.approx(expected, rel=1e-3 if b > 0.9999 else 1e-10)
        assert mean_over_images(weights) == pytest.approx(1) and weights[3] == 1
    assert weights[:3] == pytest.approx(auto[:3])  # beta -> 1


def test_weights_by_name(tmp_path):
    given = {"few": 5, "some": 2.5}
    (tmp_path / "weights.json").write_text(json.dumps(given))
    for spelled in (json.dumps(given), str(tmp_path / "weights.json"), given):
        weights = class_weights(settings_with(class_weights=spelled), NAMES, COUNTS)
        assert [weight / weights[0] for weight in weights[:3]] == pytest.approx([1, 2.5, 5])
        assert mean_over_images(weights) == pytest.approx(1)
    # Where each class is learnt for itself, classes are averaged, not images.
    weights = class_weights(settings_with(class_weights=given), NAMES, COUNTS, several=True)
    assert weights[:3] == pytest.approx([3 / 8.5, 7.5 / 8.5, 15 / 8.5])
    with pytest.raises(UserError, match=r"unknown class in --class_weights: fwe; there are plenty, some"):
        class_weights(settings_with(class_weights={"fwe": 5}), NAMES, COUNTS)
    with pytest.raises(UserError, match="no image would count"):
        class_weights(settings_with(class_weights={"plenty": 0}), NAMES, [7, 0, 0, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_weights": "autp"}, "neither none, auto or effective, nor JSON, nor a file"),
        ({"class_weights": "{'a': 1}"}, "not JSON"),
        ({"class_weights": '{"a": -1}'}, "the weight of a is -1"),
        ({"class_weights": '{"a": true}'}, "the weight of a is True"),
        ({"class_weights_beta": 1.0}, "--class_weights_beta must be between 0"),
        ({"task": "image-regression", "class_weights": "auto"}, "--class_weights auto: numbers have no classes"),
        ({"task": "image-regression", "sampling": "balanced"}, "--sampling balanced: numbers have no classes"),
        ({"task": "image-regression", "focal_gamma": 2.0}, "--focal_gamma 2.0: numbers have no classes"),
        ({"task": "multi-label-classification", "focal_gamma": 2.0, "loss": "asymmetric"}, "gammas of its own"),
        (
            {"task": "multi-label-classification", "sampling": "balanced", "class_weights": "auto"},
            "exclude each other for --task multi-label-classification",
        ),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UserError, match=message):
        settings_with(**changes)


def soft_targets(smoothing):
    """Labels, mixtures of two, and the same smoothed, as a run makes them."""
    labels = torch.tensor([0, 0, 0, 1, 2, 1, 0, 2])
    torch.manual_seed(0)
    _, plain = BatchMixer(4, mixup_alpha=0.8)(torch.rand(8, 3, 4, 4), labels)
    plain[:3] = torch.nn.functional.one_hot(labels[:3], 4).float()
    return plain, plain * (1 - smoothing) + smoothing / 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_loss_and_its_gradient_are_those_of_the_formula(gamma, smoothing):
    plain, targets = soft_targets(smoothing)
    weights = torch.tensor(class_weights(settings_with(class_weights="auto"), NAMES, COUNTS))
    logits = 3 * torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    logits[0] = torch.tensor([80.0, 0.0, -40.0, 3.0])  # as sure as float32 can be, and right
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    p = exact.exp() / exact.exp().sum(1, keepdim=True)
    expected = 0.0
    for image in range(8):
        weight = sum(float(weights[c]) * float(plain[image, c]) for c in range(4))
        for c in range(4):
            expected -= (
                weight * targets[image, c].double() * (1 - p[image, c]).clamp(min=1e-8) ** gamma * p[image, c].log()
            )
    loss = RareClassLoss(weights, gamma, smoothing)(logits, targets)
    (loss, expected / 8)[0].backward()
    (expected / 8).backward()
    torch.testing.assert_close(loss.double(), expected / 8, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_what_the_loss_comes_down_to():
    _, targets = soft_targets(0.1)
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(RareClassLoss()(logits, targets), cross_entropy(logits, targets))
    weights, labels = torch.tensor([0.5, 2.0, 9.0, 1.0]), torch.tensor([0, 1, 2, 0, 0, 1, 3, 2])
    hard = torch.nn.functional.one_hot(labels, 4).float()
    summed = torch.nn.functional.cross_entropy(logits, labels, weights, reduction="sum")
    loss = RareClassLoss(weights)
    torch.testing.assert_close(loss(logits, hard), summed / 8)
    # The mean over images: two processes, or micro-batches, of four are one batch of eight.
    halves = [loss(logits[half], hard[half]) for half in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(sum(halves) / 2, loss(logits, hard))


def test_several_labels():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 4, generator=generator), (torch.rand(6, 4, generator=generator) > 0.7).float()
    for gamma in (1.0, 2.0):  # torchvision has the formula of the paper
        expected = sigmoid_focal_loss(logits.double(), targets.double(), alpha=-1, gamma=gamma, reduction="none")
        for weight in (None, torch.tensor([0.5, 2.0, 1.0, 0.5])):
            loss = AsymmetricLoss(gamma, gamma, 0.0, weight=weight)(logits, targets)
            weighted = expected if weight is None else expected * weight
            torch.testing.assert_close(loss.double(), weighted.mean(), rtol=1e-6, atol=0)
    weight = torch.tensor([0.5, 2.0, 1.0, 0.5])
    p = logits.double().sigmoid()
    expected = -(weight * (targets * p.log() + (1 - targets) * (1 - p).log())).mean()
    torch.testing.assert_close(
        BinaryCrossEntropy(weight=weight)(logits, targets).double(), expected, rtol=1e-6, atol=0
    )


@pytest.fixture(scope="module")
def ones(tmp_path_factory):
    """Folder with 300 digits, of which 30 are ones, in 3 shards."""
    folder = tmp_path_factory.mktemp("ones")
    features = Features({"image": Image(), "label": ClassLabel(names=["other", "one"])})
    rows = [{**row, "label": int(row["label"] == 1)} for row in digit_rows()[:300]]
    write_shards(folder, "train", rows, features, 3)
    write_shards(folder, "test", rows[:40], features, 1)
    return folder


def test_weights_know_of_the_sampling(ones):
    dataset = open_datasets(dataset_name=ones)["train"]
    few = dataset.counts[1]
    half = rare_classes(
        settings_with(sampling="balanced", sampling_power=0.5, class_weights="auto"), dataset, ["one", "other"]
    )
    assert half.counts == (few, 300 - few)  # in the model's order
    for repeats, weight, count in zip(half.repeats, half.weights, half.counts, strict=True):
        assert repeats * weight * count == pytest.approx(150)  # one does what the other leaves
    whole = rare_classes(settings_with(sampling="balanced", class_weights="auto"), dataset, ["one", "other"])
    assert whole.weights == pytest.approx([1, 1])
    given = rare_classes(settings_with(sampling="balanced", class_weights={"one": 3}), dataset, ["one", "other"])
    assert given.weights == pytest.approx([1.5, 0.5])


def test_a_run_says_what_it_does_and_is_as_long_as_planned(make_settings, ones, tmp_path, capsys):
    settings = make_settings(
        dataset_name=str(ones),
        num_train_epochs=3,
        per_device_train_batch_size=16,
        class_weights="effective",
        focal_gamma=1.0,
        sampling="balanced",
        sampling_power=0.5,
    )
    results = train(settings)
    told = capsys.readouterr().out
    assert "  per epoch   one 2.5 x, other 0.833 x" in told and "  weights     one 1.77, other 0.743" in told
    # By chance an epoch has fewer images than 18 batches, or more; the schedule has its 54 steps.
    assert results["step"] == 54 and math.isfinite(results["train_loss"])
    card = (tmp_path / "run" / "README.md").read_text()
    for name, value in (
        ("class_weights", "effective"),
        ("focal_gamma", "1"),
        ("sampling", "balanced"),
        ("sampling_power", "0.5"),
    ):
        assert f"| `{name}` | {value} |" in card
    with pytest.raises(UserError, match=r"was made with --sampling_power 0\.5"):
        changes = {**vars(settings), "sampling_power": 1.0, "resume_from_checkpoint": "latest", "num_train_epochs": 4}
        train(type(settings)(**changes))
