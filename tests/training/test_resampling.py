"""Many images resized at once, as a GPU does it, against each alone."""

import pytest
import torch
from torch.nn.functional import interpolate
from torch.utils._python_dispatch import TorchDispatchMode

from hf_poolformer.training.resampling import Part, resize_parts


class Recorder(TorchDispatchMode):
    """What would be launched on a device, all but views, and the most bytes that one of them makes."""

    def __init__(self):
        super().__init__()
        self.launches = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "view" not in func.name():
            self.launches += 1
            made = [result] if isinstance(result, torch.Tensor) else [x for x in result if isinstance(x, torch.Tensor)]
            self.largest = max([self.largest, *(tensor.nbytes for tensor in made)])
        return result


def noise(height, width, seed=0):
    """Each pixel by itself, so that a wrong one shows, and brighter to the right, so that no mean is half a level."""
    pixels = torch.randint(0, 190, (3, height, width), generator=torch.Generator().manual_seed(seed))
    return (pixels + torch.linspace(0, 65, width)).to(torch.uint8)


def alone(image, part, height, width):
    """PyTorch's, in floats."""
    crop = image[:, part.top : part.top + part.height, part.left : part.left + part.width].float()
    mode = "bicubic" if part.bicubic else "bilinear"
    resized = interpolate(crop[None], part.resized, mode=mode, antialias=True)[0]
    top, left = part.start
    return resized[:, top : top + height, left : left + width].clamp(0, 255).round()


# Height and width of an image; top, left, height and width of the part.
SHAPES = [
    ((1, 1), (0, 0, 1, 1)),
    ((1, 700), (0, 0, 1, 700)),
    ((513, 1), (2, 0, 511, 1)),
    ((40, 40), (8, 8, 32, 32)),  # whole tiles, in the lower right corner
    ((33, 65), (0, 0, 33, 65)),
    ((2100, 1700), (3, 5, 2091, 1683)),  # made much smaller
    ((90, 120), (80, 110, 3, 2)),  # made much larger
    ((64, 48), (0, 0, 64, 48)),  # as it is
    ((500, 375), (100, 20, 301, 288)),
]


def mixed(bicubic):
    images = [noise(*shape, seed) for seed, (shape, _) in enumerate(SHAPES)]
    filters = [index % 2 == 0 for index in range(len(SHAPES))] if bicubic is None else [bicubic] * len(SHAPES)
    return images, filters


@pytest.mark.parametrize("bicubic", [True, False, None], ids=["bicubic", "bilinear", "both"])
@pytest.mark.parametrize("size", [(64, 48), (31, 97)])
def test_pixels_are_those_of_each_alone(size, bicubic):
    images, filters = mixed(bicubic)
    parts = [Part(*box, size, bicubic=filter) for (_, box), filter in zip(SHAPES, filters, strict=True)]
    result = resize_parts(images, parts, *size)
    assert result.dtype == torch.uint8 and result.shape == (len(SHAPES), 3, *size)
    assert result.is_contiguous(memory_format=torch.channels_last)
    differences = [(alone(*pair, *size) - one).abs() for *pair, one in zip(images, parts, result, strict=True)]
    # Sums are taken in another order, and what is half way between two levels may be rounded the other way.
    assert max(difference.max() for difference in differences) <= 1
    assert torch.stack(differences).mean() < 1e-3
    # Nobody's pixels depend on who else is there.
    for image, part, one in zip(images, parts, result, strict=True):
        assert torch.equal(resize_parts([image], [part], *size)[0], one)


def test_windows_of_what_is_resized():
    """The centre, as evaluation takes it, of images in all proportions; and a corner."""
    images, filters = mixed(None)
    parts = []
    for (_, box), filter in zip(SHAPES, filters, strict=True):
        short, long = 32, int(32 * max(box[2:]) / min(box[2:]))
        resized = (short, long) if box[2] <= box[3] else (long, short)
        parts.append(Part(*box, resized, (round((resized[0] - 32) / 2), resized[1] - 32), filter))
    result = resize_parts(images, parts, 32, 32)
    for image, part, one in zip(images, parts, result, strict=True):
        difference = (alone(image, part, 32, 32) - one).abs()
        assert difference.max() <= 1 and difference.mean() < 1e-3


def test_images_in_any_memory():
    """Turned ones, and those with their channels last."""
    image, part = noise(70, 90), Part(10, 20, 50, 60, (32, 32))
    turned, last = image.mT.contiguous().mT, image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    expected, *others = resize_parts([image, turned, last], [part] * 3, 32, 32)
    assert all(torch.equal(other, expected) for other in others)


@pytest.mark.parametrize("bicubic", [True, False])
def test_stepwise_is_rounded_after_each_axis(bicubic):
    images, _ = mixed(bicubic)
    parts = [Part(*box, (64, 48), bicubic=bicubic) for _, box in SHAPES]
    result = resize_parts(images, parts, 64, 48, stepwise=True)
    for image, part, one in zip(images, parts, result, strict=True):
        across = alone(image, part._replace(resized=(part.height, 48)), part.height, 48)
        expected = alone(across, Part(0, 0, part.height, 48, (64, 48), bicubic=bicubic), 64, 48)
        difference = (expected - one).abs()
        # Where an image becomes twice as large, bilinear weights are quarters, and many a sum is half way.
        assert difference.max() <= 1 and difference.mean() < 0.01


def test_launches_do_not_grow_with_the_batch():
    counts = []
    for number in (1, 8, 200):
        shapes = [(20 + 7 * index % 60, 20 + 11 * index % 50) for index in range(number)]
        images = [noise(*shape) for shape in shapes]
        parts = [Part(0, 0, *shape, (32, 32), bicubic=index % 2 == 0) for index, shape in enumerate(shapes)]
        with Recorder() as recorder:
            resize_parts(images, parts, 32, 32)
        counts.append(recorder.launches)
    assert counts[0] == counts[1] == counts[2] <= 61


@pytest.mark.gpu
@pytest.mark.parametrize("bicubic", [True, False, None], ids=["bicubic", "bilinear", "both"])
@pytest.mark.parametrize("stepwise", [False, True])
def test_a_gpu_gives_the_cpus_pixels(bicubic, stepwise):
    """More images than one launch copies, with the arithmetic of another processor: sums that are half way."""
    images, filters = mixed(bicubic)
    images, filters = images * 20, filters * 20
    parts = [Part(*box, (64, 48), bicubic=filter) for (_, box), filter in zip(SHAPES * 20, filters, strict=True)]
    expected = resize_parts(images, parts, 64, 48, stepwise)
    result = resize_parts([image.cuda() for image in images], parts, 64, 48, stepwise)
    assert result.is_cuda and result.is_contiguous(memory_format=torch.channels_last)
    difference = (result.cpu().int() - expected).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.01


@pytest.mark.parametrize("shape", [(1, 1), (20, 900), (900, 20), (700, 600), (40, 30)])
def test_nothing_is_larger_than_a_table(shape):
    """12 bytes for each pixel that a part is said to have, whether it grows or shrinks, along both axes or one."""
    images, part = [noise(*shape)] * 40, Part(0, 0, *shape, (64, 64))
    with Recorder() as recorder:
        resize_parts(images, [part] * 40, 64, 64)
    assert recorder.largest <= 12 * 40 * part.pixels(64, 64)
