"""Whether an export that answers in the pixels of photographs finds in them what the model finds.

The other way is PyTorch's: image processor, model, and what the image processor makes of its outputs. Photographs are
of odd sizes, landscape, portrait, square, tiny, and a strip.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from ..data.decoding import BrokenImage, decode_image
from ..foundation.errors import UserError, one_line
from .images import draw, in_channels, made_up
from .photographs import Photographs, unprocessed
from .quantisation import Quality
from .runtime import ExportedModel
from .verification import AGREEMENT, LEAST_AGREEMENT, TIE, Check, Report


# (width, height) of photographs; a strip and a tiny one among them.
SIZES = ((320, 241), (211, 333), (257, 257), (481, 320), (37, 29), (400, 61), (163, 402), (640, 427))
# Further photographs, where a dataset is given.
MOST = 16
# Share of pixels that may get another class which is no near tie. A level of a pixel that is rounded to the other side
# is part of it.
OTHER_PIXELS = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 3e-2, "int8": 0.1}
# How far resized pixels may be off, in levels of 255, and how many.
LEVELS, OTHER_LEVELS = 2.01, 0.05
# Of detections: how far scores may be off, how well boxes have to cover each other, and the share without a partner,
# since of two that overlap by just the threshold either may stay.
SCORES = {"float32": 1e-3, "float16": 2e-2}
LEAST_IOU = {"float32": 0.99, "float16": 0.9}
PIXELS = 0.1  # by which edges may be off whatever the overlap
ALONE = {"float32": 0.01, "float16": 0.05}
PIXELS_RULE = (
    "The same photographs, of odd sizes, went through this graph and through image processor, model and "
    "post-processing in float32, {count} of them. Of their pixels a share of {allowed:g} may have another class which "
    "is no near tie."
)
OBJECTS_RULE = (
    "The same photographs, of odd sizes, went through this graph and through image processor, model and "
    "post-processing in float32, {count} of them. Of resized pixels few may be off, by one level of 255; in the same "
    "pixels the same has to be found. A detection counts as the same where class and box (IoU above "
    "{iou:g}) are, and scores differ by {score:g} at most; a share of {allowed:g} may have no partner."
)


@dataclass
class PixelCheck(Check):
    def __str__(self) -> str:
        return (
            f"{self.difference:.2%} of the pixels of an image have another class, {self.error:.2%} one that is no "
            f"near tie (allowed {self.allowed:.2%})"
        )


@dataclass
class ObjectCheck(Check):
    def __str__(self) -> str:
        return f"scores off by {self.difference:.1e}; {self.error:.2%} of the detections have no partner" + (
            "" if self.allowed is None else f" (allowed {self.allowed:.2%})"
        )


def odd_photographs(num_channels: int) -> list[Any]:
    """Photographs that scikit-learn and scikit-image bring, else pictures with the spectrum of such, in SIZES."""
    from ..data.photographs import photographs

    try:
        images = list(photographs())
    except UserError:
        images = [made_up(seed, 512, 512) for seed in range(4)]
    some = zip(itertools.cycle(images), SIZES, strict=False)
    return [in_channels(ImageOps.fit(image, size, Image.Resampling.BICUBIC), num_channels) for image, size in some]


def read_photographs(location: str, taken: int, num_channels: int, count: int, **how: Any) -> list[Any]:
    """
    Images of a dataset as they were stored, drawn at random, always the same ones.

    Args:
        taken: channels that the image processor takes.
        num_channels: those of the model.
        how: `split`, `config_name`, `image_column_name`, `token`, `cache_dir`.

    Raises:
        UserError: nothing there, or not one that can be read.
    """
    from ..data.datasets import open_images

    dataset = open_images(location, **how)
    images, problem = [], "it is empty"
    for row in draw(dataset.stream, count):
        try:
            image = decode_image(row[dataset.image_column], num_channels=taken)
            images.append(image if taken == num_channels else in_channels(image, num_channels))
        except (BrokenImage, ValueError) as error:
            problem = one_line(error)
    if not images:
        raise UserError(f"{dataset.name} has no image to compare on: {problem}")
    random.Random(0).shuffle(images)
    return images


def size_of(image: Any) -> tuple[int, int]:
    """(height, width)"""
    return tuple(image.shape[-2:]) if isinstance(image, torch.Tensor) else (image.height, image.width)


def prepared(processor: Any, image: Any) -> Mapping[str, torch.Tensor]:
    options = {"input_data_format": "channels_first"} if isinstance(image, torch.Tensor) else {}
    return processor(image, return_tensors="pt", **options)


def named(image: Any) -> str:
    height, width = size_of(image)
    return f"a photograph of {height}x{width} pixels"


def answers(model: Callable[..., Any], processor: Any, image: Any, what: str) -> Any:
    try:
        with torch.inference_mode():
            return model(**prepared(processor, image))
    except Exception as error:  # whatever a runtime says to a shape that its graph was not made for
        raise UserError(f"{what} fails on {named(image)}: {one_line(error)}") from error


def verify_maps(
    exported: ExportedModel,
    model: nn.Module,
    processor: Any,
    images: list[Any],
    *,
    arithmetic: str,
    emulated: ExportedModel | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """
    Compares maps of classes, pixel by pixel.

    Args:
        model: in inference mode, on the CPU.
        processor: the model's.
        images: photographs, as the processor takes them.
        arithmetic, emulated: as `verification.verify` has them.

    Raises:
        UserError: a check failed.
    """
    precision = exported.manifest.precision
    allowed = OTHER_PIXELS[precision]
    report = new_report(exported, model, "pixels", arithmetic, allowed)
    same = total = 0
    for index, image in enumerate(images):
        progress(f"comparing on photographs: {index} of {len(images)}")
        size = size_of(image)
        logits = answers(model, processor, image, "the model itself").logits.float()
        scores = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]
        (right,) = processor.post_process_semantic_segmentation({"logits": logits}, [size])
        for other, how in ((exported, ""), (emulated, f", in {precision} arithmetic")):
            if other is None:
                continue
            outputs = answers(other, other.image_processor, image, "the export")
            try:
                (got,) = other.image_processor.post_process_semantic_segmentation(outputs, [size])
            except ValueError as error:
                raise UserError(f"the export is not what the model is: on {named(image)}: {error}") from error
            agreed = got == right
            other_share, clear_share = other_pixels(got[None], scores[None])
            check = PixelCheck(
                images=named(image) + how,
                shape=list(got.shape),
                error=clear_share,
                difference=other_share,
                unit=1.0,
                output=int(got[~agreed][0]) if other_share else 0,
                agreement=1 - other_share,
                allowed=allowed,
                passed=clear_share <= allowed,
            )
            report.checks.append(check)
            same, total = same + agreed.sum().item(), total + agreed.numel()
    report.agreement = same / total
    report.rule = PIXELS_RULE.format(count=len(images), allowed=allowed)
    failed = next((check for check in report.checks if not check.passed), None)
    if failed is not None or report.agreement < (0 if precision == "int8" else LEAST_AGREEMENT):
        failed = failed or report.worst
        raise UserError(f"the export is not what the model is: on {failed.images} {failed}; {advice(precision)}")
    return report


def other_pixels(got: torch.Tensor, scores: torch.Tensor) -> tuple[float, float]:
    """
    Shares of pixels that have another class, and one that is no near tie.

    Args:
        got: classes (B, H, W).
        scores: the model's (B, classes, H, W).
    """
    agreed = got == scores.argmax(1)
    unit = scores.std(dim=(0, 2, 3)).square().mean().sqrt()
    behind = scores.amax(1) - scores.gather(1, got.clamp(min=0)[:, None])[:, 0]
    near = agreed | ((behind <= TIE * unit) & (got >= 0))
    return 1 - agreed.double().mean().item(), 1 - near.double().mean().item()


def map_quality(got: torch.Tensor, logits: torch.Tensor) -> Quality:
    """Of maps (B, H, W) that came out in 8 bits, by the model's logits (B, classes, h, w)."""
    scores = F.interpolate(logits.float(), size=got.shape[1:], mode="bilinear", align_corners=False)
    other, clear = other_pixels(got, scores)
    return Quality(1 - other, clear, clear <= OTHER_PIXELS["int8"])


def verify_objects(
    exported: ExportedModel,
    model: nn.Module,
    processor: Any,
    images: list[Any],
    *,
    arithmetic: str,
    emulated: ExportedModel | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """
    Compares what was found in photographs, and the masks; as `verify_maps`.

    Raises:
        UserError: a check failed, or the model finds nothing in any of the images, so that nothing was compared.
    """
    manifest = exported.manifest
    precision, with_masks = manifest.precision, "masks" in manifest.further_outputs
    allowed = ALONE[precision]
    report = new_report(exported, model, "objects", arithmetic, allowed)
    alone = total = 0
    inside = Inside(processor, manifest.num_channels) if manifest.resizes else processor
    for index, image in enumerate(images):
        progress(f"comparing on photographs: {index} of {len(images)}")
        right = found_in(model, inside, image, "the model itself", with_masks)
        for other, how in ((exported, ""), (emulated, f", in {precision} arithmetic")):
            if other is None:
                continue
            got = found_in(other, other.image_processor, image, "the export", with_masks)
            lone, count, off = compare(got, right, model.config, precision)
            check = ObjectCheck(
                images=named(image) + how,
                shape=list(got["boxes"].shape),
                error=lone / max(count, 1),
                difference=off,
                unit=1.0,
                output=0,
                agreement=1 - lone / count if count else None,
                # One of a few is a large share: what all images have together is judged below.
                allowed=None,
                passed=True,
            )
            report.checks.append(check)
            alone, total = alone + lone, total + count
    if not total:
        raise UserError(
            "the model finds nothing in any of the photographs it was to be compared on, so nothing can be said of "
            "the export: --calibration_dataset gives it images of your own"
        )
    whole = ObjectCheck(
        images="all of them",
        shape=[total, 4],
        error=alone / total,
        difference=max(check.difference for check in report.checks),
        unit=1.0,
        output=0,
        agreement=1 - alone / total,
        allowed=allowed,
        passed=alone / total <= allowed,
    )
    report.checks.append(whole)
    report.agreement = whole.agreement
    report.rule = OBJECTS_RULE.format(
        count=len(images), iou=LEAST_IOU[precision], score=SCORES[precision], allowed=allowed
    )
    if not whole.passed:
        raise UserError(
            f"the export is not what the model is: of {total} detections {alone} have no partner; {advice(precision)}"
        )
    return report


class Inside:
    """
    An image processor that resizes as the graph does.

    Whether two boxes that overlap by nearly the threshold both stay is decided by less than a level of a pixel. So the
    pixels are compared with the model's own processor's, and what is found with what the model finds in them.

    Args:
        processor: the model's own.
    """

    def __init__(self, processor: Any, num_channels: int):
        self.own, self.photographs = processor, Photographs(processor, num_channels)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def __call__(self, image: Any, **options: Any) -> dict[str, torch.Tensor]:
        own = self.own(image, **options)
        stored = unprocessed(self.own)(image, **options)["pixel_values"]
        pixels, (height, width) = self.photographs(stored.permute(0, 2, 3, 1).to(torch.uint8))
        levels = (pixels - own["pixel_values"]).abs() / self.photographs.scale
        if pixels.shape != own["pixel_values"].shape or not (
            levels.max() < LEVELS and (levels > 0.01).float().mean() < OTHER_LEVELS
        ):
            raise ValueError("its graph resizes otherwise than its image processor")
        mask = torch.zeros(1, *pixels.shape[2:], dtype=torch.int64)
        mask[:, :height, :width] = 1
        return {"pixel_values": pixels, "pixel_mask": mask}


def found_in(
    model: Callable[..., Any], processor: Any, image: Any, what: str, with_masks: bool
) -> dict[str, torch.Tensor]:
    """Boxes, scores, labels, and perhaps masks in the pixels of the image."""
    size = size_of(image)
    outputs = answers(model, processor, image, what)
    (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[size])
    if with_masks:
        (parts,) = processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=[size], return_binary_maps=True
        )
        found["masks"] = parts["segmentation"]
    return found


def compare(
    got: dict[str, torch.Tensor], right: dict[str, torch.Tensor], config: Any, precision: str
) -> tuple[int, int, float]:
    """
    Detections without a partner, all that should have one, and how far the scores of partners differ.

    One whose score is as near to the least that is told as scores may be off may be told by one side only.
    """
    slack = SCORES[precision]
    least = config.score_threshold + slack
    if max(len(part["scores"]) for part in (got, right)) == config.max_detections:
        # The last of so many as are told is the least, too.
        least = max(least, *(part["scores"].min().item() + slack for part in (got, right) if len(part["scores"])))
    alone = total = 0
    off = 0.0
    for mine, others in ((got, right), (right, got)):
        free = torch.ones(len(others["scores"]), dtype=torch.bool)
        boxes, partners = mine["boxes"].double(), others["boxes"].double()
        apart = (boxes[:, None] - partners).abs().amax(-1)
        # A box that the edge of the image has left nothing of overlaps none.
        alike = (box_iou(boxes, partners) > LEAST_IOU[precision]) | (apart < PIXELS)
        same = (mine["labels"][:, None] == others["labels"]) & alike
        distance = (mine["scores"][:, None] - others["scores"]).abs()
        same &= distance <= slack
        if "masks" in mine and len(mine["masks"]) and len(others["masks"]):
            same &= mask_iou(mine["masks"], others["masks"]) > LEAST_IOU[precision] - 0.04
        for index in range(len(mine["scores"])):
            partners = (same[index] & free).nonzero()[:, 0]
            if len(partners):
                best = partners[distance[index, partners].argmin()]
                free[best] = False
                off = max(off, distance[index, best].item())
            elif mine["scores"][index] > least:
                alone += 1
                total += 1
                continue
            total += int(mine["scores"][index] > least)
    return alone, total, off


def mask_iou(mine: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(N, M) of masks (N, H, W) and (M, H, W); 1 where both are empty."""
    mine, others = (masks.flatten(1).float() for masks in (mine, others))
    both = mine @ others.T
    either = mine.sum(1)[:, None] + others.sum(1) - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def new_report(exported: ExportedModel, model: nn.Module, kind: str, arithmetic: str, allowed: float) -> Report:
    report = Report(exported.manifest.precision, kind, arithmetic, allowed, AGREEMENT[kind])
    report.size_before = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    return report


def advice(precision: str) -> str:
    if precision == "int8":
        return "calibrate on more images of the kind the model is for, or take another --precision"
    if precision == "float32":
        return "export it without --preprocessing, and report this as a fault of this package"
    return "--precision float32 keeps such answers; --calibration_dataset compares on images of your own"
