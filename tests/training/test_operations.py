"""Operations on batches of tensors against Pillow's on single images."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from hf_poolformer.training.operations import OPERATIONS, Affine, DrawnOperation, RandAugment, change, move


def photograph(height, width, seed=0):
    """Soft shapes with some fine noise, like a photograph and unlike noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC), dtype=float)
    return Image.fromarray((0.9 * soft + generator.uniform(0, 25, soft.shape)).astype(np.uint8))


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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


@pytest.mark.parametrize("name", PILLOW)
def test_operations_equal_pillows(name):
    images = [photograph(40, 56, seed) for seed in range(7)]
    operation = OPERATIONS[name]
    strengths = [0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 1.0]
    amounts = [operation.draw(strength) if operation.draw else 0.0 for strength in strengths]
    expected = [as_tensor(PILLOW[name](*pair)) for pair in zip(images, amounts, strict=True)]
    result = operation.apply(
        torch.stack([as_tensor(image) for image in images]), torch.tensor(amounts).view(-1, 1, 1, 1).float()
    )
    assert result.dtype == torch.uint8
    assert (result.int() - torch.stack(expected).int()).abs().max() <= 1  # rounding


@pytest.mark.parametrize("bicubic", [False, True])
def test_movements_equal_pillows(bicubic):
    images = [photograph(40, 56, seed) for seed in range(6)]
    affines = [
        Affine(),
        Affine(angle=17.0, translate=(5.0, -3.0), scale=0.8),
        Affine(angle=-70.0, shear=(20.0, -10.0), scale=1.3),
        *(OPERATIONS[name].affine(12.0, 56, 40) for name in ("rotate", "shear_x", "shear_y")),
    ]
    before = torch.stack([as_tensor(image) for image in images])
    expected = [as_tensor(pillows(affine)(image, bicubic)) for affine, image in zip(affines, images, strict=True)]
    result = move(before, affines, bicubic, (10, 20, 30))
    difference = (result.int() - torch.stack(expected).int()).abs().float()
    assert torch.equal(result[0], before[0])
    # Pillow's bicubic kernel is sharper (a = -1) than torch's (-0.75).
    assert difference.mean() < (1.5 if bicubic else 0.2)
    assert (difference > 25).float().mean() < 0.002  # pixels of which one side says inside and the other outside


@pytest.mark.parametrize(("name", "shift"), [("shift_x", (0, 14)), ("shift_y", (-10, 0))])
def test_shifts_are_whole_pixels_of_the_side(name, shift):
    image = as_tensor(photograph(40, 56))[None]
    result = RandAugment(fill=(1, 2, 3)).apply(image, [[DrawnOperation(name, 0.25 if shift[1] else -0.25, True)]])
    rows, columns = shift
    uncovered = torch.tensor([1, 2, 3], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 40, 56).clone()
    if rows:
        uncovered[:, :, :rows] = image[:, :, -rows:]
    else:
        uncovered[..., columns:] = image[..., :-columns]
    assert torch.equal(result, uncovered)


def test_every_operation_is_tested_here():
    assert PILLOW.keys() | {"rotate", "shear_x", "shear_y", "shift_x", "shift_y"} == OPERATIONS.keys()


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (33, 17)])
def test_operations_keep_size_and_type(size):
    images = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8)
    for name, operation in OPERATIONS.items():
        amount = operation.draw(0.9) if operation.draw is not None else 0.0
        result = RandAugment().apply(images, [[], [DrawnOperation(name, amount, True)], []])
        assert result.shape == images.shape and result.dtype == torch.uint8, name
        assert torch.equal(result[::2], images[::2]), name


def test_about_one_of_two_operations_is_drawn():
    drawn = [RandAugment(9.0, 0.5, 2).draw() for _ in range(800)]
    counts = [len(operations) for operations in drawn]
    assert 0.9 < np.mean(counts) < 1.1 and set(counts) == {0, 1, 2}
    assert {name for operations in drawn for name, _, _ in operations} == set(OPERATIONS)
    # Rotation is by 30 degrees at full strength, to either side.
    angles = np.array([amount for operations in drawn for name, amount, _ in operations if name == "rotate"])
    assert abs(np.abs(angles).mean() / 30 - 0.9) < 0.03 and np.abs(angles).max() <= 30
    assert set(np.sign(angles)) == {-1, 1}


def test_drawing_follows_torchs_seed():
    augment = RandAugment()
    torch.manual_seed(3)
    first = [augment.draw() for _ in range(5)]
    torch.manual_seed(3)
    assert [augment.draw() for _ in range(5)] == first


def test_a_batch_equals_its_images_one_by_one():
    augment = RandAugment(num_ops=3)
    images = torch.stack([as_tensor(photograph(40, 40, seed)) for seed in range(30)])
    drawn = [augment.draw() for _ in range(30)]
    alone = [augment.apply(image[None], [one])[0] for image, one in zip(images, drawn, strict=True)]
    # Sums over a batch may be taken in another order, and a rounding go the other way.
    difference = (augment.apply(images, drawn).int() - torch.stack(alone).int()).abs()
    assert (difference > 0).float().mean() < 1e-3


def test_change_leaves_the_others():
    images = torch.arange(5).view(5, 1, 1, 1)
    assert change(images, [1, 3], lambda these: these * 10).flatten().tolist() == [0, 10, 2, 30, 4]
    assert change(images, [], lambda these: these * 10) is images
    assert change(images, range(5), lambda these: these + 1).flatten().tolist() == [1, 2, 3, 4, 5]
