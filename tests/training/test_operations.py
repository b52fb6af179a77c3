"""Operations against Pillow's: on single images, and on batches, which a device does and the CPU can."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from hf_poolformer.training.movements import Affine, Movement
from hf_poolformer.training.operations import OPERATIONS, DrawnOperation, RandAugment, apply_each, apply_together


def photograph(height, width, seed=0):
    """Soft shapes with some fine noise, like a photograph and unlike noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC), dtype=float)
    return Image.fromarray((0.9 * soft + generator.uniform(0, 25, soft.shape)).astype(np.uint8))


def one_by_one(images, steps):
    return np.stack([apply_each(np.array(image), these) for image, these in zip(images, steps, strict=True)])


def together(images, steps):
    return apply_together(torch.from_numpy(np.stack(images)), steps).numpy()


def difference(first, second):
    return np.abs(first.astype(int) - second)


def pillows(affine):
    def run(image, bicubic=False):
        return F.affine(
            image,
            angle=affine.angle,
            translate=list(affine.translate),
            scale=affine.scale,
            shear=list(affine.shear),
            interpolation=InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR,
            fill=[10, 20, 30],
            center=affine.center and list(affine.center),
        )

    return run


PILLOW = {
    "autocontrast": lambda image, amount: ImageOps.autocontrast(image),
    "equalize": lambda image, amount: ImageOps.equalize(image),
    "invert": lambda image, amount: ImageOps.invert(image),
    "posterize": lambda image, amount: ImageOps.posterize(image, amount),
    "solarize": ImageOps.solarize,
    "solarize_add": lambda image, amount: image.point([v + amount if v < 128 else v for v in range(256)] * 3),
    "saturation": lambda image, amount: ImageEnhance.Color(image).enhance(amount),
    "contrast": lambda image, amount: ImageEnhance.Contrast(image).enhance(amount),
    "brightness": lambda image, amount: ImageEnhance.Brightness(image).enhance(amount),
    "sharpness": lambda image, amount: ImageEnhance.Sharpness(image).enhance(amount),
}


@pytest.mark.parametrize("apply", [one_by_one, together])
@pytest.mark.parametrize("name", PILLOW)
def test_operations_equal_pillows(name, apply):
    images = [photograph(40, 56, seed) for seed in range(7)]
    operation = OPERATIONS[name]
    strengths = [0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 1.0]
    amounts = [operation.draw(strength) if operation.draw else 0.0 for strength in strengths]
    expected = np.stack([PILLOW[name](*pair) for pair in zip(images, amounts, strict=True)])
    result = apply(images, [[(name, amount)] for amount in amounts])
    assert result.dtype == np.uint8
    assert difference(result, expected).max() <= 1  # rounding


@pytest.mark.parametrize("apply", [one_by_one, together])
@pytest.mark.parametrize("bicubic", [False, True])
def test_movements_equal_pillows(bicubic, apply):
    images = [photograph(40, 56, seed) for seed in range(9)]
    affines = [
        Affine(),
        Affine(angle=17.0, translate=(5.0, -3.0), scale=0.8),
        Affine(angle=-70.0, shear=(20.0, -10.0), scale=1.3),
        *(OPERATIONS[name].affine(12.0, 56, 40) for name in ("rotate", "shear_x", "shear_y")),
        *(OPERATIONS[name].affine(-17.0, 56, 40) for name in ("shear_x", "shear_y")),
        Affine(translate=(-80.0, 0.0)),  # nothing is left of it
    ]
    expected = np.stack([pillows(affine)(image, bicubic) for affine, image in zip(affines, images, strict=True)])
    result = apply(images, [[Movement(affine, bicubic, (10, 20, 30))] for affine in affines])
    assert np.array_equal(result[0], images[0])
    # Pillow's bicubic kernel is sharper (a = -1) than torch's (-0.75).
    assert difference(result, expected).mean() < (1.5 if bicubic else 0.2)
    # Pixels of which one side says inside and the other outside.
    assert (difference(result, expected) > 25).mean() < 0.002


@pytest.mark.parametrize("apply", [one_by_one, together])
@pytest.mark.parametrize(("name", "shift"), [("shift_x", (0, 14)), ("shift_y", (-10, 0))])
def test_shifts_are_whole_pixels_of_the_side(name, shift, apply):
    image = np.array(photograph(40, 56))
    drawn = [DrawnOperation(name, 0.25 if shift[1] else -0.25, True)]
    result = apply([image], [RandAugment(fill=(1, 2, 3)).steps(drawn, 40, 56)])[0]
    rows, columns = shift
    uncovered = np.tile(np.array([1, 2, 3], dtype=np.uint8), (40, 56, 1))
    if rows:
        uncovered[:rows] = image[-rows:]
    else:
        uncovered[:, columns:] = image[:, :-columns]
    assert np.array_equal(result, uncovered)


@pytest.mark.parametrize("apply", [one_by_one, together])
def test_shifts_in_both_directions_and_out_of_the_image(apply):
    image = np.array(photograph(40, 56))
    padded = np.tile(np.array([1, 2, 3], dtype=np.uint8), (3 * 40, 3 * 56, 1))
    padded[40:80, 56:112] = image
    for x, y in ((5, -7), (-56, 0), (-55, 39), (0, 40), (56, -40)):
        step = Movement(Affine(translate=(float(x), float(y))), False, (1, 2, 3))
        expected = padded[40 - y : 80 - y, 56 - x : 112 - x]
        assert np.array_equal(apply([image], [[step]])[0], expected), (x, y)


def test_every_operation_is_tested_here():
    assert PILLOW.keys() | {"rotate", "shear_x", "shear_y", "shift_x", "shift_y"} == OPERATIONS.keys()


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 500), (33, 17)])
def test_operations_keep_size_and_type(size):
    images = np.random.default_rng(0).integers(0, 256, (4, *size, 3), dtype=np.uint8)
    images[2] = 77  # no contrast to stretch
    for name, operation in OPERATIONS.items():
        for strength in (0.0, 0.9, 1.0):
            amount = operation.draw(strength) if operation.draw is not None else 0.0
            steps = RandAugment().steps([DrawnOperation(name, amount, True)], *size)
            given = [[], steps, steps, []]
            first, second = one_by_one(images, given), together(images, given)
            for result in (first, second):
                assert result.shape == images.shape and result.dtype == np.uint8, name
                assert np.array_equal(result[::3], images[::3]), name
            # On noise a place that differs by float32's rounding is a level here and there.
            assert difference(first, second).max() <= 1, name


def test_nothing_to_do():
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    assert np.array_equal(together(images, [[], []]), images) and np.array_equal(one_by_one(images, [[], []]), images)


def test_about_one_of_two_operations_is_drawn():
    drawn = [RandAugment(9.0, 0.5, 2).draw() for _ in range(800)]
    counts = [len(operations) for operations in drawn]
    assert 0.9 < np.mean(counts) < 1.1 and set(counts) == {0, 1, 2}
    assert {name for operations in drawn for name, _, _ in operations} == set(OPERATIONS)
    # Rotation is by 30 degrees at full strength, to either side.
    angles = np.array([amount for operations in drawn for name, amount, _ in operations if name == "rotate"])
    assert abs(np.abs(angles).mean() / 30 - 0.9) < 0.03 and np.abs(angles).max() <= 30
    assert set(np.sign(angles)) == {-1, 1}


def test_drawing_follows_pythons_seed():
    augment = RandAugment()
    random.seed(3)
    first = [augment.draw() for _ in range(5)]
    random.seed(3)
    assert [augment.draw() for _ in range(5)] == first


def drawn_batch(number, num_ops=2, side=40):
    """Images and steps, every operation of both interpolations among them at each turn."""
    augment = RandAugment(num_ops=num_ops)
    steps = [augment.steps(augment.draw(), side, side) for _ in range(number)]
    return torch.stack([torch.from_numpy(np.array(photograph(side, side, seed))) for seed in range(number)]), steps


@pytest.mark.parametrize("num_ops", [1, 3])
def test_a_batch_equals_its_images_one_by_one(num_ops):
    random.seed(0)
    images, steps = drawn_batch(30, num_ops)
    flipped = [bool(index % 2) for index in range(30)]
    upside_down = [bool(index % 3) for index in range(30)]
    axes = [[1] * flip + [0] * turned for flip, turned in zip(flipped, upside_down, strict=True)]
    mirrored = [image.flip(these) for image, these in zip(images, axes, strict=True)]
    alone = one_by_one([image.numpy() for image in mirrored], steps)
    # Places in the original are computed otherwise, and a rounding may go the other way.
    assert (difference(apply_together(images, steps, flipped, upside_down).numpy(), alone) > 0).mean() < 1e-3


class Launches(TorchDispatchMode):
    """Counts what would be kernels on a device: all but views."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and "view" not in func.name()
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.count = 0
        return super().__enter__()


def test_launches_do_not_grow_with_the_batch():
    """Two turns of every kind there is, of few and of many images."""
    kinds = ["invert", "contrast", "equalize", "saturation", "sharpness", "rotate", "rotate", "autocontrast"]
    few = [[DrawnOperation(name, 1.2, index == 5) for name in (kind, kind)] for index, kind in enumerate(kinds)]
    pairs = zip(list(OPERATIONS) * 4, [*OPERATIONS, *reversed(OPERATIONS)] * 2, strict=True)
    many = [[DrawnOperation(name, 1, index % 3 > 0) for name in pair] for index, pair in enumerate(pairs)]
    counts = []
    for drawn in (few, many):
        images = torch.stack([torch.from_numpy(np.array(photograph(24, 24, seed))) for seed in range(len(drawn))])
        steps = [RandAugment().steps(one, 24, 24) for one in drawn]
        apply_together(images, steps)  # what a device is told once
        with Launches() as launches:
            apply_together(images, steps, [True] * len(drawn))
        counts.append(launches.count)
    assert len(few) == 8 and len(many) == 60 and counts[0] == counts[1] < 150
