import numpy as np
import pytest
import torch
from PIL import Image

from hf_poolformer import PoolFormerImageProcessor
from hf_poolformer.training.arguments import TrainingSettings
from hf_poolformer.training.augmentation import (
    OPERATIONS,
    BatchMixer,
    EvalTransform,
    RandAugment,
    TrainTransform,
    input_size,
)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))


@pytest.fixture
def processor():
    return PoolFormerImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, crop_pct=1.0)


def transform(recipe, processor, **changes):
    settings = TrainingSettings.from_recipe(recipe, train_dir="x", output_dir="y", **changes)
    return TrainTransform(settings, processor)


@pytest.mark.parametrize("index", range(len(OPERATIONS)))
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_operations_keep_size_and_mode(picture, index, strength):
    result = OPERATIONS[index](picture, strength, [128, 128, 128])
    assert result.size == picture.size and result.mode == "RGB"


def test_rand_augment_applies_about_one_of_two_operations(picture):
    augment = RandAugment(9.0, 0.5, 2)
    counts = [len(augment.make_params([picture])["operations"]) for _ in range(400)]
    strengths = [strength for _ in range(400) for _, strength in augment.make_params([picture])["operations"]]
    assert 0.85 < np.mean(counts) < 1.15 and set(counts) == {0, 1, 2}
    assert abs(np.mean(strengths) - 0.9) < 0.01 and 0.035 < np.std(strengths) < 0.06 and max(strengths) <= 1.0


def test_rand_augment_follows_torchs_seed(picture):
    augment = RandAugment()
    torch.manual_seed(3)
    first = [np.asarray(augment(picture)) for _ in range(5)]
    torch.manual_seed(3)
    again = [np.asarray(augment(picture)) for _ in range(5)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, np.asarray(picture)) for a in first)


@pytest.mark.parametrize("recipe", ["finetune", "paper", "demo"])
def test_training_examples_are_normalised_squares(picture, processor, recipe):
    result = torch.stack([transform(recipe, processor)(picture) for _ in range(20)])
    assert result.shape == (20, 3, 32, 32) and result.dtype == torch.float32
    assert result.std() > 0.3 and result.abs().max() < 6


def test_demo_moves_but_never_mirrors(processor):
    half = np.zeros((32, 32, 3), dtype=np.uint8)
    half[:, :16] = 255
    examples = torch.stack([transform("demo", processor)(Image.fromarray(half)) for _ in range(50)])
    assert (examples[..., 4:12].mean((1, 2, 3)) > examples[..., 20:28].mean((1, 2, 3))).all()
    assert not torch.equal(examples[0], examples[1])


def test_evaluation_is_the_processors_own(picture, processor):
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(EvalTransform(processor)(picture), expected)
    assert input_size(processor) == (32, 32)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.0, 0.0)])
def test_soft_targets_sum_to_one_and_name_both_sources(mixup, cutmix):
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16).contiguous()
    labels = torch.arange(8)
    mixer = BatchMixer(10, mixup, cutmix, 0.5, label_smoothing=0.1)
    for _ in range(10):
        mixed, targets = mixer(images, labels)
        assert mixed.shape == images.shape and targets.shape == (8, 10)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        # Image k is all k, so the mean pixel of a mixture is the mean label under its unsmoothed target.
        hard = (targets - 0.01) / 0.9
        torch.testing.assert_close((hard * torch.arange(10)).sum(1), mixed.mean((1, 2, 3)), atol=1e-4, rtol=1e-4)
    if not mixup and not cutmix:
        assert torch.equal(mixed, images)
        torch.testing.assert_close(targets[0], torch.tensor([0.91] + [0.01] * 9))


def test_switch_chooses_between_mixup_and_cutmix():
    images = torch.rand(4, 3, 8, 8).round()  # 0 or 1: only mixup makes anything between
    mixer = BatchMixer(4, 0.8, 1.0, switch_prob=0.5)
    between = [bool(((mixed := mixer(images, torch.arange(4))[0]) % 1).any()) for _ in range(60)]
    assert 15 < sum(between) < 45 and mixed.shape == images.shape
