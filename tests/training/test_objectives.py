"""What answers cost, against formulas written down once more in float64, and targets that are mixed and smoothed."""

import numpy as np
import pytest
import torch

from hf_poolformer.training.augmentation import BatchMixer
from hf_poolformer.training.distillation import binary_distillation_loss
from hf_poolformer.training.objectives import AsymmetricLoss, BinaryCrossEntropy, NumericLoss


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


@pytest.fixture
def answers():
    """Logits, and targets of which some are there, some not, and some mixed; float64 (7, 5)."""
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 2, (7, 5)).astype(np.float64)
    targets[2:4] = generator.random((2, 5))
    return generator.normal(0, 3, (7, 5)), targets


def check(criterion, expected, logits, targets):
    """Value and gradient, the latter by differences of the formula."""
    own = torch.tensor(logits, requires_grad=True)
    loss = criterion(own, torch.tensor(targets))
    loss.backward()
    assert loss.item() == pytest.approx(expected(logits), rel=1e-12)
    step, gradient = 1e-6, np.empty_like(logits)
    for place in np.ndindex(*logits.shape):
        up, down = logits.copy(), logits.copy()
        up[place], down[place] = up[place] + step, down[place] - step
        gradient[place] = (expected(up) - expected(down)) / (2 * step)
    np.testing.assert_allclose(own.grad.numpy(), gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5, 20.0, 1.0]])
def test_binary_cross_entropy(answers, weights):
    logits, targets = answers
    weight = 1.0 if weights is None else np.array(weights)

    def expected(z):
        p = sigmoid(z)
        return -(weight * targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean()

    check(BinaryCrossEntropy(None if weights is None else torch.tensor(weights).double()), expected, logits, targets)


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5, 20.0, 1.0]])
@pytest.mark.parametrize(("negative", "positive", "clip"), [(4, 1, 0.05), (2, 0, 0), (0, 0, 0), (0.5, 0.5, 0.2)])
def test_asymmetric_loss(answers, negative, positive, clip, weights):
    logits, targets = answers
    weight = 1.0 if weights is None else np.array(weights)

    def expected(z):
        p = sigmoid(z)
        q = np.maximum(p - clip, 0)
        there = weight * targets * (1 - p) ** positive * np.log(p)
        return -(there + (1 - targets) * q**negative * np.log(1 - q)).mean()

    given = None if weights is None else torch.tensor(weights).double()
    check(AsymmetricLoss(negative, positive, clip, given), expected, logits, targets)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 4.0])
def test_the_asymmetric_loss_of_certain_answers_is_finite(gamma, clip):
    logits = torch.tensor([[-200.0, -20.0, 0.0, 20.0, 200.0]] * 2, requires_grad=True)
    loss = AsymmetricLoss(gamma, gamma, clip)(logits, torch.stack([torch.ones(5), torch.zeros(5)]))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize(("kind", "delta"), [("mse", 1.0), ("l1", 1.0), ("huber", 1.0), ("huber", 0.3)])
def test_losses_of_numbers(answers, kind, delta):
    numbers, targets = answers

    def expected(z):
        d = np.abs(z - targets)
        huber = np.where(d <= delta, d**2 / 2, delta * (d - delta / 2))
        return {"mse": d**2, "l1": d, "huber": huber}[kind].mean()

    check(NumericLoss(kind, delta), expected, numbers, targets)


@pytest.mark.parametrize(("kind", "temperature"), [("soft", 1.0), ("soft", 4.0), ("hard", 4.0)])
def test_a_teacher_of_several_labels(answers, kind, temperature):
    logits, teachers = answers[0], np.random.default_rng(1).normal(0, 3, (7, 5))

    def expected(z):
        p, q = sigmoid(teachers / temperature), sigmoid(z / temperature)
        if kind == "hard":
            p, q = teachers > 0, sigmoid(z)
            return -np.where(p, np.log(q), np.log(1 - q)).mean()
        return temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()

    check(lambda z, t: binary_distillation_loss(z, t, kind, temperature), expected, logits, teachers)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.0, 0.0)])
def test_several_labels_are_mixed_like_the_pixels(mixup, cutmix):
    # Image k shows k everywhere, and has the labels that are the binary digits of k.
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16).contiguous()
    labels = torch.tensor([[k >> 2 & 1, k >> 1 & 1, k & 1] for k in range(8)]).float()
    mixer = BatchMixer(3, mixup, cutmix, 0.5, label_smoothing=0.2)
    for _ in range(10):
        mixed, targets = mixer(images, labels)
        hard = (targets - 0.1) / 0.8
        assert hard.min() > -1e-6 and hard.max() < 1 + 1e-6
        torch.testing.assert_close(hard @ torch.tensor([4.0, 2.0, 1.0]), mixed.mean((1, 2, 3)), atol=1e-4, rtol=1e-4)
    if not mixup and not cutmix:
        assert torch.equal(mixed, images)
        # Towards one half, however many classes there are.
        torch.testing.assert_close(targets[6], torch.tensor([0.9, 0.9, 0.1]))


def test_numbers_are_mixed_like_the_pixels():
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16).contiguous()
    numbers = torch.stack([10 * torch.arange(8.0), -torch.arange(8.0)], dim=1)
    mixer = BatchMixer(2, 0.8)
    for _ in range(5):
        mixed, targets = mixer(images, numbers)
        torch.testing.assert_close(targets, mixed.mean((1, 2, 3))[:, None] * torch.tensor([10.0, -1.0]))
    # A single number stays a column.
    assert mixer.num_labels == 2 and BatchMixer(1, 0.8)(images, numbers[:, :1])[1].shape == (8, 1)
