"""Image processors of PoolFormer and the MetaFormer family.

Both backends reproduce the official evaluation transform (sail-sg/poolformer, `validate.py` through timm's
`transforms_imagenet_eval`): resize the shortest edge to `floor(size / crop_pct)`, bicubic with antialiasing, crop the
centre, divide by 255, normalise. Before normalisation they differ from it, and from each other, by at most two of 255
levels (nearly always none: both resample rows first, then columns, rounding to 8 bits after each pass, as Pillow did
until release 13, which resamples tall images the other way round).
"""

import base64
import difflib
import io
import math
import numbers
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import image_utils
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    torch_pil_interpolation_mapping,
)
from transformers.processing_utils import Unpack
from transformers.utils import TensorType, logging
from transformers.utils.import_utils import is_torchvision_greater_or_equal

from .image_channels import pil_to_channels, read_array, to_channels
from .image_pixels import on_white, open_encoded, pil_to_rgb, pil_to_tensor, to_eight_bits
from .image_processing_dense import DenseImageProcessorKwargs, DensePrediction, rescaled_size


logger = logging.get_logger(__name__)

# How many times larger than its visible part a resized image may be before only that part is resampled: a strip of
# 1 x 20000 pixels would otherwise grow to more than a billion.
MAX_WASTE = 16

FILTERS = {resample.name.lower(): resample for resample in PILImageResampling}
# Those that torch has, too, everywhere and with gradients.
TORCH_FILTERS = (PILImageResampling.NEAREST, PILImageResampling.BILINEAR, PILImageResampling.BICUBIC)


class PoolFormerImageProcessorKwargs(DenseImageProcessorKwargs, total=False):
    r"""
    crop_pct (`float`, *optional*, defaults to `self.crop_pct`):
        Share of the resized image's edge that the centre crop keeps: the image is first resized to
        `floor(size / crop_pct)`. `None` resizes to `size` itself. Only has an effect if `do_resize` is `True`.
    num_channels (`int`, *optional*, defaults to `self.num_channels`):
        Channels of the images that the model takes, if it does not take RGB: 1 for grey, or those of multispectral
        images. `do_convert_rgb` then has no effect, and `image_mean` and `image_std` are ImageNet's average for each
        channel unless they are given.
    """

    crop_pct: float | int | None
    num_channels: int | None


class Geometry(NamedTuple):
    """Where the pixels of one image go; all pairs are (vertical, horizontal), in pixels."""

    resized: tuple[int, int]
    start: tuple[int, int]  # of the visible window, in the resized image
    window: tuple[int, int]
    offset: tuple[int, int]  # of the window in the output; not zero where the output is padded
    output: tuple[int, int]


def resized_size(height: int, width: int, size: SizeDict, crop_pct: float | None) -> tuple[int, int]:
    """(height, width) after resizing, with the rounding of timm's evaluation transform and torchvision's Resize."""

    def enlarge(edge: int) -> int:
        return edge if crop_pct is None else math.floor(edge / crop_pct)

    if size.shortest_edge and size.longest_edge and crop_pct is None:
        return rescaled_size(height, width, size.shortest_edge, size.longest_edge)
    if size.height and size.width and (crop_pct is None or size.height != size.width):
        resized = enlarge(size.height), enlarge(size.width)
    else:
        short = enlarge(size.shortest_edge or size.height)
        long = int(short * max(height, width) / min(height, width))
        resized = (short, long) if height <= width else (long, short)
    if 0 in resized:
        raise ValueError(f"size={dict(size)} with crop_pct={crop_pct} leaves nothing of an image {height}x{width}.")
    return resized


def centre_window(length: int, crop: int) -> tuple[int, int, int]:
    """(start, length, offset in the output) of a centre crop along one axis, with torchvision's rounding."""
    if crop > length:
        return 0, length, (crop - length) // 2
    return round((length - crop) / 2), crop, 0


def as_filter(resample: Any) -> PILImageResampling | None:
    """Pillow's filter for a member of Pillow's or torchvision's enumeration, an integer, or a name like "bicubic"."""
    if resample is None:
        return None
    if isinstance(resample, str):
        found = FILTERS.get(resample.lower())
    elif isinstance(resample, int) and not isinstance(resample, bool):
        found = next((known for known in PILImageResampling if known == resample), None)
    else:
        found = next((known for mode, known in torch_pil_interpolation_mapping.items() if mode == resample), None)
    if found is None:
        names = ", ".join(f"{name} ({known.value})" for name, known in FILTERS.items())
        hint = " Pillow's nearest is NEAREST_EXACT there." if getattr(resample, "name", None) == "NEAREST" else ""
        raise ValueError(f"resample must be one of Pillow's filters, {names}, got {resample!r}.{hint}")
    return found


def is_wasteful(geometry: Geometry) -> bool:
    return math.prod(geometry.resized) > MAX_WASTE * math.prod(geometry.window)


def nearest_pixels(shape: tuple[int, int], geometry: Geometry) -> list[np.ndarray]:
    """The rows and the columns that Pillow's NEAREST takes for the visible window; between two it has its own way."""
    indices = []
    for length, resized, start, window in zip(shape, geometry.resized, geometry.start, geometry.window, strict=True):
        line = Image.fromarray(np.arange(length, dtype=np.int32)[None])
        line = line.resize((resized, 1), PILImageResampling.NEAREST)
        indices.append(np.asarray(line)[0, start : start + window].astype(np.int64))
    return indices


def resample_plane(
    image: Image.Image, geometry: Geometry, resample: int, bounds: tuple[float, float] | None
) -> Image.Image:
    """Resizes with Pillow, rows first, computing only what lies in the window; clips floats to `bounds`."""
    (height, width), (top, left), (rows, columns) = geometry.resized, geometry.start, geometry.window
    if (height, width) == (image.height, image.width):
        return image.crop((left, top, left + columns, top + rows))
    step_y, step_x = image.height / height, image.width / width

    # The filters reach at most 3 source pixels (times the reduction) beyond the window, those of Pillow 13 nearly 5.
    margin = (3 if resample <= PILImageResampling.HAMMING else 5) * max(step_y, 1.0) + 1
    first = max(math.floor(top * step_y - margin), 0)
    last = min(math.ceil((top + rows) * step_y + margin), image.height)
    image = image.crop((0, first, image.width, last))

    right = min((left + columns) * step_x, image.width)
    image = clip_plane(
        image.resize((columns, image.height), resample, (left * step_x, 0, right, image.height)), bounds
    )
    bottom = min((top + rows) * step_y - first, image.height)
    return clip_plane(image.resize((columns, rows), resample, (0, top * step_y - first, columns, bottom)), bounds)


def clip_plane(image: Image.Image, bounds: tuple[float, float] | None) -> Image.Image:
    return image if bounds is None else Image.fromarray(np.asarray(image).clip(*bounds))


def resample_window(image: Image.Image | np.ndarray, geometry: Geometry, resample: int, white: float) -> np.ndarray:
    """The visible window of the resized image, (C, h, w); `image` is an RGB image or an array (C, H, W)."""
    if resample == PILImageResampling.NEAREST:
        pixels = np.asarray(image).transpose(2, 0, 1) if isinstance(image, Image.Image) else image
        rows, columns = nearest_pixels(pixels.shape[1:], geometry)
        return pixels[:, rows[:, None], columns]
    if resample not in TORCH_FILTERS and geometry.window != geometry.resized and not is_wasteful(geometry):
        # The edges of the window are rounded, which can cost a level; these filters are here to be Pillow's exactly.
        whole = Geometry(geometry.resized, (0, 0), geometry.resized, (0, 0), geometry.resized)
        (top, left), (rows, columns) = geometry.start, geometry.window
        return resample_window(image, whole, resample, white)[:, top : top + rows, left : left + columns]
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[0] == 3:
        image = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    if isinstance(image, Image.Image):
        return np.asarray(resample_plane(image, geometry, resample, None)).transpose(2, 0, 1)
    bounds = None if image.dtype == np.uint8 else (min(image.min(), 0.0), max(image.max(), white))
    planes = [resample_plane(Image.fromarray(plane), geometry, resample, bounds) for plane in image]
    return np.stack([np.asarray(plane) for plane in planes])


def takes_rgb(num_channels: int | None) -> bool:
    """Whether a processor with this setting makes RGB, or what `do_convert_rgb` says, of images."""
    return num_channels in (None, 3)


def open_image(
    source: str | os.PathLike, timeout: float | None = None, num_channels: int | None = None
) -> Image.Image | torch.Tensor:
    """An image file, URL or base64 text as an image that is upright and keeps its mode, so that 16 bits stay 16 bits
    and alpha is not lost; of a file that holds an array for a model that does not take RGB, its channels."""
    name = os.fsdecode(source)
    shown = name if len(name) <= 200 else f"{name[:200]}..."
    if os.path.isdir(name):
        raise ValueError(f"{shown} is a folder: give the images in it.")
    is_file = os.path.isfile(name)
    try:
        if is_file:
            file = open(name, "rb")  # noqa: SIM115
        elif name.startswith(("http://", "https://")):
            file = io.BytesIO(image_utils.httpx.get(name, timeout=timeout, follow_redirects=True).content)
        else:
            text = name.partition(",")[2] if name.startswith("data:image/") else name
            file = io.BytesIO(base64.decodebytes(text.encode()))
        with file:
            if not takes_rgb(num_channels):
                array = read_array(file, tiff=num_channels > 1)
                if array is not None:
                    return array.planes(num_channels)
            with open_encoded(file) as image:
                return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's formats and the network raise whatever they meet
        if is_file or name.startswith(("http://", "https://", "data:image/")):
            raise OSError(f"Cannot read the image {shown}: {error}") from error
        raise ValueError(f"There is no image file {shown!r}, and it is no URL or base64 text either.") from error


def array_to_tensor(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array
    if array.dtype.kind not in "buif":
        raise ValueError(f"An image array must be of a numeric type, got {array.dtype}.")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def needs_gradient(values: torch.Tensor) -> bool:
    return values.requires_grad and torch.is_grad_enabled()


def to_planes(
    image: torch.Tensor, input_data_format: str | ChannelDimension | None, convert_rgb: bool, white: float
) -> torch.Tensor:
    """Any (H, W), (C, H, W) or (H, W, C) tensor as (C, H, W), uint8 or float32, RGB on demand; `white` is floats'."""
    if image.ndim == 2:
        image = image[None]
    else:
        if input_data_format is None:
            outer = [axis for axis in (0, 2) if image.shape[axis] in (1, 3, 4)]
            if not outer:
                raise ValueError(
                    f"An image must have 1, 3 or 4 channels, first or last, got shape {tuple(image.shape)}."
                )
            first = max(outer, key=lambda axis: image.shape[axis] == 3) == 0
        else:
            first = ChannelDimension(input_data_format) == ChannelDimension.FIRST
        if not first:
            image = image.permute(2, 0, 1)
        # Gray with alpha, two channels, is nothing that could be guessed or made RGB.
        if image.shape[0] not in ((1, 3, 4) if convert_rgb else (1, 2, 3, 4)):
            raise ValueError(
                f"An image must have 1, 3 or 4 channels, got {image.shape[0]} (channels, height, width = "
                f"{tuple(image.shape)}, input_data_format={input_data_format})."
            )
    image = image.float() if image.is_floating_point() else to_eight_bits(image)
    if convert_rgb:
        image = image.expand(3, -1, -1) if image.shape[0] == 1 else image
        image = on_white(image, white) if image.shape[0] == 4 else image
    return image


def plain(value: Any) -> Any:
    """A setting in Python's own types, which JSON can hold; means and sizes are often numbers of numpy or torch."""
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    if isinstance(value, (dict, SizeDict)):
        return {name: plain(number) for name, number in dict(value).items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value


def is_positive(value: Any, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < math.inf


def check_size(name: str, size: Any) -> None:
    """ValueError unless `size` is one of the forms that transformers takes, and made of whole pixels."""
    if size is None:
        return
    edges = size.values() if isinstance(size, dict) else size
    edges = [size] if isinstance(size, int) else edges
    if (
        not isinstance(edges, Iterable)
        or isinstance(edges, str)
        or (isinstance(size, (list, tuple)) and len(size) != 2)
    ):
        raise ValueError(f"{name} must be a number of pixels, (height, width) or a dictionary, got {size!r}.")
    if not all(is_positive(edge, numbers.Integral) for edge in edges if edge is not None):
        raise ValueError(f"{name} must be made of whole, positive numbers of pixels, got {size!r}.")


def count_colours(name: str, values: Any) -> int:
    """How many channels `image_mean` or `image_std` has values for; ValueError for what are no such numbers."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.array(math.nan)
    if array.ndim > 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a number, or one for each channel, got {values!r}.")
    if name == "image_std" and not (array > 0).all():
        raise ValueError(f"image_std must not contain zeros or negative numbers, got {values!r}.")
    return array.size


def warn_of_misspelt(names: Iterable[str], known: Iterable[str], owner: str) -> None:
    """A setting that nobody knows has no effect, and a configuration may hold some; but a slip of the pen is named."""
    for name in set(names) - set(known):
        for meant in difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            logger.warning(f"{owner} has no setting {name!r}, so it has no effect: is {meant!r} meant?")


class EvaluationTransform:
    """What the two backends share: the defaults, the geometry, what a user may hand in and what is saved.

    The saved JSON is the one of transformers' own PoolFormerImageProcessor, and so are its defaults, but that
    images are converted to RGB. Configs of the old PoolFormerFeatureExtractor load, too.
    """

    valid_kwargs = PoolFormerImageProcessorKwargs

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 224}  # noqa: RUF012
    default_to_square = False
    crop_size = {"height": 224, "width": 224}  # noqa: RUF012
    crop_pct = 0.9
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    num_channels = None

    def __init__(self, **kwargs: Unpack[PoolFormerImageProcessorKwargs]):
        legacy = "feature_extractor_type" in kwargs or "do_resize_and_center_crop" in kwargs
        if legacy:
            if not kwargs.pop("do_resize_and_center_crop", True):
                kwargs = {"do_resize": False, "do_center_crop": False, **kwargs}
            # The feature extractor knew one size only and cropped to it.
            if kwargs.get("crop_size") is None and isinstance(kwargs.get("size"), (int, list, tuple)):
                kwargs["crop_size"] = kwargs["size"]
        warn_of_misspelt(kwargs, self.valid_kwargs.__annotations__, type(self).__name__)
        if not takes_rgb(number := kwargs.get("num_channels")) and is_positive(number, numbers.Integral):
            for name, values in (("image_mean", IMAGENET_DEFAULT_MEAN), ("image_std", IMAGENET_DEFAULT_STD)):
                if kwargs.get(name) is None:
                    kwargs[name] = [sum(values) / len(values)] * number
        super().__init__(**kwargs)
        self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        warn_of_misspelt(kwargs, cls.valid_kwargs.__annotations__, cls.__name__)
        return super().from_dict(image_processor_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        # The built-in processor reads null as its default 0.9; 1.0 says the same as None in both.
        if values.get("crop_pct", 0) is None and self.size.shortest_edge and not self.size.longest_edge:
            values["crop_pct"] = 1.0
        # transformers notes the class that is saved; both backends live in that file, and AutoImageProcessor picks
        # from a pair (PIL, torchvision).
        auto_map = values.get("auto_map") or {}
        name = type(self).__name__.removesuffix("Pil")
        if isinstance(auto_map.get("AutoImageProcessor"), str) and name == "PoolFormerImageProcessor":
            module = auto_map["AutoImageProcessor"].rsplit(".", 1)[0]
            values["auto_map"] = {**auto_map, "AutoImageProcessor": [f"{module}.{name}Pil", f"{module}.{name}"]}
        return values

    def preprocess(self, images: ImageInput, *args: Any, **kwargs: Any) -> BatchFeature:
        # transformers' own check of types knows few of them.
        kwargs = {name: plain(value) if name in self._valid_kwargs_names else value for name, value in kwargs.items()}
        if "resample" in kwargs:
            kwargs["resample"] = as_filter(kwargs["resample"])
        return super().preprocess(images, *args, **kwargs)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        kwargs = {name: plain(value) for name, value in kwargs.items()}
        for name in ("size", "crop_size", "pad_size"):
            check_size(name, kwargs.get(name))
        return super()._standardize_kwargs(**{**kwargs, "resample": as_filter(kwargs.get("resample"))})

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if name.startswith("do_") and value not in (True, False, None):
                raise ValueError(f"{name} must be true or false, got {value!r}.")
            if name in ("data_format", "input_data_format") and value not in (None, *ChannelDimension):
                raise ValueError(f"{name} must be 'channels_first' or 'channels_last', got {value!r}.")
            if name in ("crop_pct", "rescale_factor") and value is not None and not is_positive(value):
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
            if name == "num_channels" and value is not None and not is_positive(value, numbers.Integral):
                raise ValueError(f"num_channels must be a whole, positive number, got {value!r}.")
        super()._validate_preprocess_kwargs(**kwargs)
        size, crop_size = kwargs["size"], kwargs["crop_size"]
        if kwargs["do_resize"] and not (size.shortest_edge or (size.height and size.width)):
            raise ValueError(f"size must have 'shortest_edge', or 'height' and 'width', got {dict(size)}.")
        if kwargs["do_center_crop"] and not (crop_size.height and crop_size.width):
            raise ValueError(f"crop_size must have 'height' and 'width', got {dict(crop_size)}.")
        if kwargs["do_normalize"]:
            mean, std = (count_colours(name, kwargs[name]) for name in ("image_mean", "image_std"))
            for name, number in (("image_mean", mean), ("image_std", std)):
                channels = kwargs.get("num_channels")
                if not takes_rgb(channels):
                    if number not in (1, channels):
                        raise ValueError(f"{name} has {number} values, but num_channels is {channels}.")
                elif kwargs["do_convert_rgb"] and number not in (1, 3):
                    raise ValueError(f"{name} has {number} values, but an RGB image has 3 channels.")
            if 1 not in (mean, std) and mean != std:
                raise ValueError(f"image_mean has {mean} values, but image_std has {std}.")

    def fetch_images(self, images: ImageInput) -> ImageInput:
        """Opens whatever is a path or a URL."""
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, (Image.Image, np.ndarray, torch.Tensor)):
            return images
        if isinstance(images, (str, os.PathLike)):
            return open_image(images, num_channels=self.num_channels)
        raise TypeError(f"An image must be a PIL image, an array, a tensor, a path or a URL, got {type(images)}.")

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list[Any]:
        flat = list(self._flatten(self.fetch_images(images)))
        if not flat:
            raise ValueError("There is no image to process: the input is empty.")
        return flat

    def _flatten(self, images: ImageInput):
        if isinstance(images, Image.Image):
            shape, single = (images.height, images.width), True
        elif isinstance(images, list):
            for image in images:
                yield from self._flatten(image)
            return
        else:
            shape, single = tuple(images.shape), images.ndim < 4
            if images.ndim not in (2, 3, 4):
                raise ValueError(
                    "An image must be of rank 2 (height, width) or 3 (with channels), a batch of rank 4, got shape "
                    f"{shape}."
                )
        if 0 in shape:
            raise ValueError(f"An image must not be empty, got shape {shape}.")
        if single:
            yield images
        else:
            yield from images

    def _to_planes(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        do_convert_rgb: bool | None,
        do_rescale: bool | None,
        input_data_format: str | ChannelDimension | None,
        rescale_factor: float | None = None,
        num_channels: int | None = None,
    ) -> torch.Tensor:
        """(C, H, W), uint8 or float32, with a clear error or warning for pixels that cannot be meant so."""
        white = 1 / (rescale_factor or 1 / 255) if do_rescale else 1.0
        if not takes_rgb(num_channels):
            if isinstance(image, Image.Image):
                planes = pil_to_channels(image, num_channels)
            else:
                first = None if input_data_format is None else input_data_format == ChannelDimension.FIRST
                planes = to_channels(array_to_tensor(image), num_channels, first)
        else:
            if isinstance(image, Image.Image):
                image, input_data_format = pil_to_tensor(image), ChannelDimension.LAST
            planes = to_planes(array_to_tensor(image), input_data_format, bool(do_convert_rgb), white)
        if planes.dtype != torch.uint8:
            low, high = (bound.item() for bound in planes.detach().aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError("The image contains values that are not finite.")
            if do_rescale and low >= 0 and 0 < high <= 1:
                logger.warning_once(
                    "An image of floats between 0 and 1 is about to be rescaled once more: pass do_rescale=False."
                )
        return planes

    @staticmethod
    def _geometry(
        height: int,
        width: int,
        do_resize: bool,
        size: SizeDict,
        crop_pct: float | None,
        do_center_crop: bool,
        crop_size: SizeDict,
    ) -> Geometry:
        resized = resized_size(height, width, size, crop_pct) if do_resize else (height, width)
        if not do_center_crop:
            return Geometry(resized, (0, 0), resized, (0, 0), resized)
        output = crop_size.height, crop_size.width
        start, window, offset = zip(*map(centre_window, resized, output), strict=True)
        return Geometry(resized, start, window, offset, output)

    @staticmethod
    def _affine(
        channels: int,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Rescaling and normalisation in one: `scale * x + shift`, each (C, 1, 1), or None if there is neither."""
        scale, shift = np.full(channels, rescale_factor if do_rescale else 1.0), np.zeros(channels)
        if do_normalize:
            mean, std = np.asarray(image_mean, dtype=np.float64), np.asarray(image_std, dtype=np.float64)
            for name, values in (("image_mean", mean), ("image_std", std)):
                if values.size not in (1, channels):
                    raise ValueError(
                        f"{name} has {values.size} values, but the image has {channels} channels: "
                        "pass do_convert_rgb=True, or one value for each channel."
                    )
            scale, shift = scale / std, shift - mean / std
        elif not do_rescale:
            return None
        return scale.astype(np.float32)[:, None, None], shift.astype(np.float32)[:, None, None]

    def _batch_feature(
        self,
        pixel_values: Any,
        do_pad: bool | None,
        pad_size: SizeDict | None,
        data_format: str | ChannelDimension | None,
        return_tensors: str | TensorType | None,
    ) -> BatchFeature:
        if do_pad:
            pixel_values = self.pad(list(pixel_values), pad_size=pad_size)
        if data_format is not None and ChannelDimension(data_format) == ChannelDimension.LAST:
            pixel_values = [image.swapaxes(0, 1).swapaxes(1, 2) for image in pixel_values]
        elif return_tensors is None:
            pixel_values = list(pixel_values)
        if return_tensors is not None and isinstance(pixel_values, list):
            shapes = sorted({tuple(image.shape) for image in pixel_values})
            if len(shapes) > 1:
                raise ValueError(
                    f"Images of the shapes {', '.join(map(str, shapes))} do not fit into one tensor: make them alike "
                    "with do_convert_rgb, do_center_crop or do_pad, or pass return_tensors=None."
                )
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)


class PoolFormerImageProcessor(DensePrediction, EvaluationTransform, TorchvisionBackend):
    """PoolFormer's evaluation transform on tensors, on the CPU or (`device="cuda"`) on an accelerator.

    Takes PIL images of any mode, numpy arrays and tensors (H, W), (H, W, C), (C, H, W), batches of rank 4, paths, URLs
    and nested lists of those; sizes may differ. Pixels are 0..255 (uint8 or other integers, 16 bits are scaled) or
    floats, 0..255 or, with `do_rescale=False`, 0..1; alpha is composited on white, colours of an ICC profile become
    sRGB (image_pixels.py has all rules). Gives `pixel_values` of shape (B, 3, crop height, crop width), float32.

    With `num_channels` the images have so many channels instead, and image_channels.py has the rules: integers of 16
    bits become floats between 0 and 255, and paths may be those of NPY files and of TIFFs of several channels.

    Raises ValueError on images that are empty, of another rank or number of channels, OSError on files that hold no
    image.

    Tensors of floats keep their gradients. Filters that torch lacks (BOX, HAMMING, on accelerators LANCZOS) are
    Pillow's, without gradients, and NEAREST takes the pixels that Pillow takes.
    """

    def process_image(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        do_convert_rgb: bool | None = None,
        do_rescale: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        num_channels: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One image as (C, H, W), uint8 or float32, on `device`; uint8 with its channels last in memory."""
        if isinstance(image, Image.Image) and do_convert_rgb and takes_rgb(num_channels):
            planes = pil_to_tensor(pil_to_rgb(image)).permute(2, 0, 1)
        else:
            planes = self._to_planes(
                image, do_convert_rgb, do_rescale, input_data_format, kwargs.get("rescale_factor"), num_channels
            )
        return planes if device is None else planes.to(device)

    def _resize_planes(self, images: torch.Tensor, size: tuple[int, int], resample: int, white: float) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, *size) with Pillow's arithmetic."""
        if images.dtype == torch.uint8 and images.device.type == "cpu":
            # torch's 8-bit resampling has a fast path for channels last, worth the copy.
            images = images.contiguous(memory_format=torch.channels_last)
            return self.resize(images, SizeDict(height=size[0], width=size[1]), resample)
        # Elsewhere torch resamples in float, both axes at once; Pillow clips, and rounds 8 bits, after each axis. On
        # noise the difference is up to ten levels.
        values, eight_bits = images.float(), images.dtype == torch.uint8
        low = values.detach().amin((1, 2, 3), keepdim=True).clamp(max=0.0)
        high = values.detach().amax((1, 2, 3), keepdim=True).clamp(min=255.0 if eight_bits else white)
        for target in ((images.shape[-2], size[1]), size):
            values = self.resize(values, SizeDict(height=target[0], width=target[1]), resample).clamp(low, high)
            if eight_bits:
                values = values.round()
        return values

    def _window(self, images: torch.Tensor, geometry: Geometry, resample: int, white: float) -> torch.Tensor:
        """What the centre crop shows of the resized images, (B, C, *window)."""
        (top, left), (rows, columns) = geometry.start, geometry.window
        shape, device = tuple(images.shape[-2:]), images.device
        if geometry.resized != shape:
            if resample == PILImageResampling.NEAREST:
                vertical, horizontal = (torch.from_numpy(i).to(device) for i in nearest_pixels(shape, geometry))
                return images[..., vertical[:, None], horizontal]
            has_filter = resample in TORCH_FILTERS or (
                resample == PILImageResampling.LANCZOS
                and device.type == "cpu"
                and is_torchvision_greater_or_equal("0.27")
            )
            if needs_gradient(images):
                if not has_filter:
                    raise ValueError(
                        f"resample={resample!r} cannot be differentiated here: give images that need no gradients, or "
                        "another filter, such as bicubic."
                    )
            elif is_wasteful(geometry) or not has_filter:
                arrays = images.detach().cpu().numpy()
                windows = np.stack([resample_window(array, geometry, resample, white) for array in arrays])
                return torch.from_numpy(windows).to(device)
            images = self._resize_planes(images, geometry.resized, resample, white)
        return images[..., top : top + rows, left : left + columns]

    def _preprocess(
        self,
        images: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        do_pad: bool | None,
        pad_size: SizeDict | None,
        disable_grouping: bool | None,
        return_tensors: str | TensorType | None,
        crop_pct: float | None = None,
        data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        # Images of one shape share their kernel launches on an accelerator; on the CPU stacking them only costs.
        groups: dict[Any, list[int]] = {}
        for index, image in enumerate(images):
            alone = image.device.type == "cpu" if disable_grouping is None else disable_grouping
            groups.setdefault(index if alone else (image.shape, image.dtype, image.device), []).append(index)

        plans, kinds = [], set()
        for members in groups.values():
            first = images[members[0]]
            geometry = self._geometry(*first.shape[1:], do_resize, size, crop_pct, do_center_crop, crop_size)
            affine = self._affine(first.shape[0], do_rescale, rescale_factor, do_normalize, image_mean, image_std)
            dtype = first.dtype if affine is None else torch.float32
            plans.append((members, geometry, affine, dtype))
            kinds.add((first.shape[0], geometry.output, dtype, first.device))

        # One buffer for all when the outputs are alike, in the order of the groups: nothing is stacked afterwards.
        # Autograd does not follow every write into a part of it.
        outputs: list[torch.Tensor] = []
        buffer = None
        if len(kinds) == 1 and not any(map(needs_gradient, images)):
            channels, output, dtype, device = kinds.pop()
            buffer = torch.empty((len(images), channels, *output), dtype=dtype, device=device)
        white = 1 / rescale_factor if do_rescale else 1.0
        for members, geometry, affine, dtype in plans:
            stack = images[members[0]][None] if len(members) == 1 else torch.stack([images[i] for i in members])
            if buffer is None:
                target = stack.new_empty((*stack.shape[:2], *geometry.output), dtype=dtype)
            else:
                target = buffer[len(outputs) : len(outputs) + len(members)]
            if geometry.window != geometry.output:
                target.zero_()
            (top, left), (rows, columns) = geometry.offset, geometry.window
            target[..., top : top + rows, left : left + columns] = self._window(stack, geometry, resample, white)
            if affine is not None:
                scale, shift = (torch.from_numpy(values).to(target.device) for values in affine)
                target.mul_(scale).add_(shift)
            outputs.extend(target)

        order = [index for members in groups.values() for index in members]
        if order != sorted(order):
            places = np.argsort(order).tolist()
            outputs = [outputs[place] for place in places]
            buffer = None if buffer is None else buffer[places]
        return self._batch_feature(
            outputs if buffer is None else buffer, do_pad, pad_size, data_format, return_tensors
        )


class PoolFormerImageProcessorPil(DensePrediction, EvaluationTransform, PilBackend):
    """PoolFormer's evaluation transform with Pillow, without gradients; input, output and errors as in
    PoolFormerImageProcessor."""

    def process_image(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        do_convert_rgb: bool | None = None,
        do_rescale: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        num_channels: int | None = None,
        **kwargs: Any,
    ) -> Image.Image | np.ndarray:
        """One image as an RGB PIL image (no detour through an array) or an array (C, H, W), uint8 or float32."""
        if isinstance(image, Image.Image) and do_convert_rgb and takes_rgb(num_channels):
            return pil_to_rgb(image)
        planes = self._to_planes(
            image, do_convert_rgb, do_rescale, input_data_format, kwargs.get("rescale_factor"), num_channels
        )
        if needs_gradient(planes):
            raise ValueError(
                "Pillow computes no gradients: give the detached image, or use the torchvision backend, "
                "PoolFormerImageProcessor."
            )
        return planes.detach().cpu().numpy()

    def _preprocess(
        self,
        images: list[Image.Image | np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        do_pad: bool | None,
        pad_size: SizeDict | None,
        return_tensors: str | TensorType | None,
        crop_pct: float | None = None,
        data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        white = 1 / rescale_factor if do_rescale else 1.0
        outputs = []
        for image in images:
            shape = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[1:]
            geometry = self._geometry(*shape, do_resize, size, crop_pct, do_center_crop, crop_size)
            window = resample_window(image, geometry, resample, white)
            affine = self._affine(window.shape[0], do_rescale, rescale_factor, do_normalize, image_mean, image_std)
            target = np.zeros(
                (window.shape[0], *geometry.output), dtype=window.dtype if affine is None else np.float32
            )
            (top, left), (rows, columns) = geometry.offset, geometry.window
            target[:, top : top + rows, left : left + columns] = window
            if affine is not None:
                target *= affine[0]
                target += affine[1]
            outputs.append(target)
        return self._batch_feature(outputs, do_pad, pad_size, data_format, return_tensors)


PoolFormerImageProcessor.register_for_auto_class("AutoImageProcessor")
PoolFormerImageProcessorPil.register_for_auto_class("AutoImageProcessor")

__all__ = ["PoolFormerImageProcessor", "PoolFormerImageProcessorPil"]
