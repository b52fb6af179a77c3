import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from hf_poolformer import PoolFormerImageProcessor
from hf_poolformer.data.decoding import EncodedImage, decode_image
from hf_poolformer.data.transforms import EvalTransform, input_size
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training.augmentation import (
    NOISE,
    BatchMixer,
    Box,
    Draws,
    TrainTransform,
    draw_crop,
    draw_erased,
    noise_of,
    noise_starts,
    noisy_rectangles,
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


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 95, **options})
    return buffer.getvalue()


def natural(height, width):
    """Shapes of all sizes with soft edges: coarse noise, enlarged, upon finer and finer noise."""
    generator = np.random.default_rng(1)
    total = np.zeros((height, width, 3))
    for side in (4, 16, 64):
        coarse = generator.uniform(0, 255, (side, side, 3)).astype(np.uint8)
        total += np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC), dtype=float) / side
    total = (total - total.min()) / (total.max() - total.min())
    return Image.fromarray((255 * total).astype(np.uint8))


@pytest.mark.parametrize(("left_right", "top_bottom"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_flips(processor, left_right, top_bottom):
    image = natural(32, 32)
    still = dict.fromkeys(["affine_degrees", "affine_translate", "affine_scale"], 0.0)
    plain = transform("demo", processor, **still)(image)
    flipped = transform("demo", processor, **still, horizontal_flip=left_right, vertical_flip=top_bottom)(image)
    assert torch.equal(flipped, plain.flip([-1] * bool(left_right) + [-2] * bool(top_bottom)))


@pytest.mark.parametrize(
    ("crop", "expected"),
    [
        (Box(0, 0, 95, 400), 1),  # 95 / 32 is less than 2 x 1.5
        (Box(8, 6, 96, 200), 2),
        (Box(3, 5, 192, 192), 4),
        (Box(0, 0, 384, 390), 8),
        (None, 8),
    ],
)
def test_the_crop_decides_how_finely_a_jpeg_is_decoded(processor, crop, expected):
    image, draws = natural(400, 420), Draws(crop)
    exact, reduced = transform("paper", processor, reduced_decoding=False), transform("paper", processor)
    assert exact.reduction(draws, 400, 420) == 1 and reduced.reduction(draws, 400, 420) == expected
    data = jpeg(image)
    with EncodedImage(data) as first, EncodedImage(data) as second:
        whole, small = exact.decode_crop(first, draws), reduced.decode_crop(second, draws)
    assert whole.shape == small.shape == (3, 32, 32) and whole.dtype == small.dtype == torch.uint8
    # Half a pixel of the reduced image at most, which is a third of a pixel of the example, and rounding.
    difference = (whole.float() - small.float()).abs().mean()
    assert difference < 3 if expected > 1 else torch.equal(whole, small)


def test_reduced_decoding_in_every_orientation(processor):
    image, draws = natural(300, 420), Draws(Box(6, 12, 216, 192))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = jpeg(image, exif=exif)
        upright = decode_image(data)
        expected = transform("paper", processor).crop(upright, draws).float()
        with EncodedImage(data) as encoded:
            assert (encoded.height, encoded.width) == (upright.height, upright.width)
            result = transform("paper", processor).decode_crop(encoded, draws).float()
        assert (result - expected).abs().mean() < 3, orientation


def test_erased_rectangles_hold_noise_of_the_datas_scale(processor):
    random.seed(0)
    boxes = [draw_erased(32, 32) for _ in range(300)]
    areas = [box.height * box.width / 1024 for box in boxes]
    assert min(areas) + 0.01 >= 0.02 and max(areas) < 0.36 and 0.15 < np.mean(areas) < 0.2
    assert all(box.top + box.height <= 32 and box.left + box.width <= 32 for box in boxes)
    grey = Image.new("RGB", (32, 32), (124, 116, 104))  # ImageNet's mean: zero once normalised
    erase = transform("demo", processor, random_erasing=1.0, affine_degrees=0, affine_translate=0, affine_scale=0)
    values = torch.stack([erase(grey) for _ in range(100)])
    noise = values[values.abs() > 0.05]
    assert 0.1 < noise.numel() / values.numel() < 0.25
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.05


def test_crops_are_torchvisions():
    random.seed(0)
    torch.manual_seed(0)
    for height, width in ((300, 400), (50, 60)):
        crop = v2.RandomResizedCrop(224, scale=(0.08, 1.0))
        image = torch.empty(3, height, width)
        theirs = np.array([[crop.make_params([image])[key] for key in Box._fields] for _ in range(3000)])
        ours = np.array([draw_crop(height, width, 0.08) for _ in range(3000)])
        assert (ours >= 0).all() and (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
        # Two means of 3000 each: within five standard errors of their difference.
        errors = np.sqrt((ours.var(0) + theirs.var(0)) / 3000)
        assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * errors).all()
    # Where nothing fits, the centre, as torchvision has it.
    for height, width in ((10, 1000), (1000, 10), (1, 1)):
        expected = crop.make_params([torch.empty(3, height, width)])
        assert draw_crop(height, width, 1.0) == tuple(expected[key] for key in Box._fields)


def test_noise_is_normal_and_each_values_own():
    rectangles = np.array([[image, 2, 3, 60, 64, seed] for image, seed in enumerate([0, 1, 2, 2**31 - 1])])
    places, noise = noisy_rectangles(rectangles, 80, 80, torch.device("cpu"))
    assert len(places.unique()) == len(places) == 4 * 60 * 64
    values = noise.double().view(4, 60, 64, 3)
    number = values.numel()
    # Within five standard errors: of a mean, a variance, a kurtosis of 3, shares beyond one and three deviations.
    assert abs(values.mean()) < 5 / number**0.5
    assert abs(values.var() - 1) < 5 * (2 / number) ** 0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / number) ** 0.5
    for limit, share in ((1, 0.3173), (3, 0.0027)):
        assert abs((values.abs() > limit).double().mean() - share) < 5 * (share / number) ** 0.5
    for other in (values.roll(1, 0), values.roll(1, 1), values.roll(1, 2), values.roll(1, 3)):
        # Other seeds, rows, columns, channels; their squares, too, for Box and Muller's pairs share a radius.
        assert abs((values * other).mean()) < 5 / number**0.5
        assert abs(((values**2 - 1) * (other**2 - 1)).mean()) < 5 * 2 / number**0.5
    # The seed and the rectangle's size alone decide; one by one, as on the CPU, or all at once, as on a device.
    _, alone = noisy_rectangles(np.array([[0, 0, 0, 60, 64, 2]]), 80, 80, torch.device("cpu"))
    assert torch.equal(alone, noise.view(4, -1, 3)[2])
    assert torch.equal(noise_of(2, alone.numel()).view(-1, 3), alone)


def test_noise_beyond_the_end_of_its_table_begins_anew():
    seed = next(seed for seed in range(1000) if noise_starts(np.array([seed])) > NOISE - 3000)
    values = noise_of(seed, NOISE)
    assert values.unique().numel() > 0.9 * NOISE
    _, noise = noisy_rectangles(np.array([[0, 0, 0, 40, 50, seed]]), 80, 80, torch.device("cpu"))
    assert torch.equal(noise.flatten(), values[:6000])


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
