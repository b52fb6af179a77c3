"""Which part of an image a classifier sees, and how a map of what it saw lies on the image."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..foundation.errors import UserError
from ..image_processing_poolformer import centre_window, resized_size


class Region(NamedTuple):
    """What the centre crop leaves of an image.

    Attributes:
        left, top, right, bottom: in pixels of the image, not rounded.
        rows, columns: where it lies in the processor's output; not all of it where the image was padded.
    """

    left: float
    top: float
    right: float
    bottom: float
    rows: slice
    columns: slice

    def scaled(self, factor_x: float, factor_y: float) -> Region:
        """The same region of the image at another size."""
        return self._replace(
            left=self.left * factor_x,
            right=self.right * factor_x,
            top=self.top * factor_y,
            bottom=self.bottom * factor_y,
        )


def visible_region(processor: Any, height: int, width: int) -> Region:
    """The part of an image of `height` x `width` pixels that `processor` shows the model.

    Raises:
        UserError: the processor is of another kind than this package's, so that its geometry is not known.
    """
    if not all(hasattr(processor, name) for name in ("crop_pct", "do_center_crop", "do_resize", "size")):
        raise UserError(
            f"what {type(processor).__name__} shows of an image is not known; save the model with a "
            "PoolFormerImageProcessor"
        )
    resized = (height, width)
    if processor.do_resize:
        resized = resized_size(height, width, processor.size, processor.crop_pct)
    if not processor.do_center_crop:
        return Region(0.0, 0.0, float(width), float(height), slice(0, resized[0]), slice(0, resized[1]))
    crop = processor.crop_size.height, processor.crop_size.width
    (top, rows, above), (left, columns, before) = map(centre_window, resized, crop)
    return Region(
        left=left * width / resized[1],
        top=top * height / resized[0],
        right=(left + columns) * width / resized[1],
        bottom=(top + rows) * height / resized[0],
        rows=slice(above, above + rows),
        columns=slice(before, before + columns),
    )


def lay_on_image(values: np.ndarray, region: Region, height: int, width: int) -> np.ndarray:
    """A map of the processor's output as one of the image, (height, width) float32, NaN where nothing was seen.

    Args:
        values: (H, W), of the size of `pixel_values`.
        region: in pixels of an image of `height` x `width`.
    """
    top, bottom = round(region.top), max(round(region.bottom), round(region.top) + 1)
    left, right = round(region.left), max(round(region.right), round(region.left) + 1)
    seen = Image.fromarray(np.ascontiguousarray(values[region.rows, region.columns], dtype=np.float32))
    laid = np.full((height, width), np.nan, dtype=np.float32)
    resized = np.asarray(seen.resize((right - left, bottom - top), Image.Resampling.BILINEAR))
    laid[top:bottom, left:right] = resized[: height - top, : width - left]
    return laid
