"""What dense tasks need of an image processor: the geometry of maps, boxes and masks, and results in their form.

`DensePrediction` extends the image processors of `image_processing_poolformer.py`, both backends, and adds nothing to
classification. `for_segmentation` and `for_detection` make a processor with the settings of the official test
pipelines (mmsegmentation's and mmdetection's configurations of *MetaFormer Is Actually What You Need for Vision*).
"""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput, PILImageResampling
from transformers.processing_utils import ImagesKwargs
from transformers.utils import ModelOutput


# In segmentation maps: pixels that belong to no class, padding among them.
IGNORE_INDEX = 255

SEGMENTATION = {
    "size": {"shortest_edge": 512, "longest_edge": 2048},
    "crop_pct": None,
    "do_center_crop": False,
    "resample": PILImageResampling.BILINEAR,
}
DETECTION = {
    **SEGMENTATION,
    "size": {"shortest_edge": 800, "longest_edge": 1333},
    "do_pad": True,
    "size_divisor": 32,
}


class DenseImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    size_divisor (`int`, *optional*, defaults to `self.size_divisor`):
        With `do_pad`, the images of a batch are padded at the bottom and on the right to a multiple of it, and
        `pixel_mask` tells the images (1) from the padding (0).
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether segmentation maps count their classes from 1 (ADE20K): 0 becomes 255, which is ignored, and all else is
        reduced by 1.
    """

    size_divisor: int | None
    do_reduce_labels: bool


def rescaled_size(height: int, width: int, shortest_edge: int, longest_edge: int) -> tuple[int, int]:
    """(height, width) with the aspect ratio kept and neither limit exceeded, rounded as in mmdetection; a strip keeps
    one pixel."""
    scale = min(longest_edge / max(height, width), shortest_edge / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def image_shape(image: Image.Image | np.ndarray | torch.Tensor) -> tuple[int, int]:
    """(height, width) of an image as the backends hold it, channels first."""
    return (image.height, image.width) if isinstance(image, Image.Image) else tuple(image.shape[-2:])


def to_array(values: Image.Image | np.ndarray | torch.Tensor) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def warp(values: np.ndarray, geometry: Any, fill: int) -> np.ndarray:
    """`values` (H, W) where the image's pixels go, from the nearest pixel; `geometry` as of the image."""
    indices = []
    for length, resized, start, window in zip(
        values.shape, geometry.resized, geometry.start, geometry.window, strict=True
    ):
        centres = np.arange(start, start + window) + 0.5
        indices.append(np.minimum((centres * (length / resized)).astype(np.int64), length - 1))
    (top, left), (rows, columns) = geometry.offset, geometry.window
    output = np.full(geometry.output, fill, dtype=values.dtype)
    output[top : top + rows, left : left + columns] = values[np.ix_(*indices)]
    return output


def pad_to(values: np.ndarray | torch.Tensor, size: tuple[int, int], fill: int = 0) -> np.ndarray | torch.Tensor:
    """`values` (..., H, W) with `fill` at the bottom and on the right."""
    height, width = values.shape[-2:]
    if (height, width) == size:
        return values
    if height > size[0] or width > size[1]:
        raise ValueError(f"pad_size {size[0]}x{size[1]} is smaller than an image of {height}x{width}.")
    shape = (*values.shape[:-2], *size)
    if isinstance(values, torch.Tensor):
        output = values.new_full(shape, fill)
    else:
        output = np.full(shape, fill, dtype=values.dtype)
    output[..., :height, :width] = values
    return output


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask (height, width), bool, of a COCO `segmentation`: polygons or run lengths, or a picture of the mask."""
    if isinstance(segmentation, (Image.Image, np.ndarray, torch.Tensor)):
        mask = to_array(segmentation) != 0
    else:
        try:
            from pycocotools import mask as coco_mask
        except ImportError as error:
            raise ImportError("Polygons and run lengths need pycocotools: pip install pycocotools") from error
        if isinstance(segmentation, dict):
            compressed = isinstance(segmentation["counts"], (str, bytes))
            runs = segmentation if compressed else coco_mask.frPyObjects(segmentation, height, width)
        else:
            runs = coco_mask.merge(coco_mask.frPyObjects([list(polygon) for polygon in segmentation], height, width))
        mask = coco_mask.decode(runs) != 0
    if mask.shape != (height, width):
        raise ValueError(f"A mask must have the size of its image, {height}x{width}, but has shape {mask.shape}.")
    return mask


def paste_mask(mask: torch.Tensor, box: list[float], size: tuple[int, int], threshold: float) -> torch.Tensor:
    """`mask` (h, w) of probabilities over `box` (left, top, right, bottom) as a mask of the image, (height, width),
    bool; bilinear between the centres of its cells, zero beyond them, as in mmdetection."""
    height, width = size
    pasted = torch.zeros(size, dtype=torch.bool, device=mask.device)
    left, top, right, bottom = box
    if not (right > left and bottom > top):
        return pasted
    columns = slice(max(math.floor(left) - 1, 0), min(math.ceil(right) + 1, width))
    rows = slice(max(math.floor(top) - 1, 0), min(math.ceil(bottom) + 1, height))
    if columns.start >= columns.stop or rows.start >= rows.stop:
        return pasted
    x, y = (
        (torch.arange(part.start, part.stop, device=mask.device) + 0.5 - low) / (high - low) * 2 - 1
        for part, low, high in ((columns, left, right), (rows, top, bottom))
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    pasted[rows, columns] = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0] >= threshold
    return pasted


class DensePrediction:
    """Segmentation maps, annotations, padding with `pixel_mask`, and `post_process_*`."""

    size_divisor = None
    do_reduce_labels = False

    @classmethod
    def for_segmentation(cls, **kwargs: Any) -> "DensePrediction":
        """For semantic segmentation: shortest edge 512, longest at most 2048, no crop. `kwargs` override that."""
        return cls(**{**SEGMENTATION, **kwargs})

    @classmethod
    def for_detection(cls, **kwargs: Any) -> "DensePrediction":
        """For object detection and instance segmentation: shortest edge 800, longest at most 1333, no crop, padded to
        a multiple of 32, with `pixel_mask`. `kwargs` override that."""
        return cls(**{**DETECTION, **kwargs})

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        # The files of classifiers stay those of the built-in processor.
        if not values.get("do_reduce_labels"):
            values.pop("do_reduce_labels", None)
        return values

    def __call__(self, images: ImageInput, *args: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, *args, **kwargs)

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: Any = None,
        annotations: dict[str, Any] | list[dict[str, Any]] | None = None,
        return_segmentation_masks: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Prepares images, and what is known about them, for a model.

        Args:
            images: images of any kind, or lists of them.
            segmentation_maps: for each image its map (height, width) of class indices: a PIL image, array, tensor or
                path. Given as `labels` (batch, height, width), int64, with the geometry of the image, from the nearest
                pixel; padding is 255.
            annotations: for each image its objects in COCO's format, `{"image_id": 1, "annotations": [...]}`, each
                with `bbox` (left, top, width, height in pixels), `category_id`, optionally `area`, `iscrowd` and
                `segmentation` (polygons, run lengths, or a picture of the mask). Given as `labels`, one dictionary
                per image: `class_labels` (objects,), `boxes` (objects, 4), (centre x, centre y, width, height) in 0..1
                of the image *without* its padding, `area`, `iscrowd`, `size` and `orig_size` (2,), `image_id` (1,).
                Crowds and boxes that are empty within the image are left out.
            return_segmentation_masks: adds `masks` (objects, height, width), bool, of the padded image to those.
            kwargs: settings that override those of the processor.

        Returns:
            `pixel_values` (batch, channels, height, width); `pixel_mask` (batch, height, width) with `do_pad` and
            `size_divisor`; `labels` if there is something to make them of.

        Raises:
            ValueError: where numbers, sizes or types of these do not fit.
        """
        return super().preprocess(images, segmentation_maps, annotations, return_segmentation_masks, **kwargs)

    def _validate_preprocess_kwargs(self, size_divisor: int | None = None, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        if size_divisor is not None and size_divisor < 1:
            raise ValueError(f"size_divisor must be a positive number of pixels or None, got {size_divisor}.")

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: Any = None,
        annotations: Any = None,
        return_segmentation_masks: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        masked = bool(kwargs["do_pad"] and kwargs["size_divisor"])
        if segmentation_maps is None and annotations is None and not masked:
            return super()._preprocess_image_like_inputs(images, **kwargs)
        if segmentation_maps is not None and annotations is not None:
            raise ValueError("Give segmentation_maps or annotations, not both: each of them becomes labels.")
        images = self._prepare_image_like_inputs(images, **kwargs)
        shapes = [image_shape(image) for image in images]
        settings = [kwargs[name] for name in ("do_resize", "size", "crop_pct", "do_center_crop", "crop_size")]
        geometries = [self._geometry(*shape, *settings) for shape in shapes]

        plain = {**kwargs, "do_pad": False, "data_format": None, "return_tensors": None}
        pixel_values = self._preprocess(images, **plain)["pixel_values"]
        sizes = [geometry.output for geometry in geometries]
        padded = sizes
        if kwargs["do_pad"]:
            padded = [self._padded_size(sizes, kwargs["pad_size"], kwargs["size_divisor"])] * len(sizes)
            pixel_values = [pad_to(image, size) for image, size in zip(pixel_values, padded, strict=True)]
        return_tensors = kwargs["return_tensors"]
        features = self._batch_feature(pixel_values, False, None, kwargs["data_format"], return_tensors)

        data: dict[str, Any] = {}
        if masked:
            data["pixel_mask"] = [
                pad_to(np.ones(size, dtype=np.int64), whole) for size, whole in zip(sizes, padded, strict=True)
            ]
        if segmentation_maps is not None:
            maps = self._prepare_maps(segmentation_maps, shapes, bool(kwargs["do_reduce_labels"]))
            data["labels"] = [
                pad_to(warp(values, geometry, IGNORE_INDEX), size, IGNORE_INDEX)
                for values, geometry, size in zip(maps, geometries, padded, strict=True)
            ]
        features.update(BatchFeature(data, tensor_type=return_tensors))
        if annotations is not None:
            annotations = [annotations] if isinstance(annotations, dict) else list(annotations)
            if len(annotations) != len(shapes):
                raise ValueError(f"There are {len(shapes)} images but {len(annotations)} annotations.")
            labels = [
                self._label(annotation, shape, geometry, size, return_segmentation_masks)
                for annotation, shape, geometry, size in zip(annotations, shapes, geometries, padded, strict=True)
            ]
            features["labels"] = [BatchFeature(label, tensor_type=return_tensors) for label in labels]
        return features

    @staticmethod
    def _padded_size(sizes: list[tuple[int, int]], pad_size: Any, divisor: int | None) -> tuple[int, int]:
        if pad_size is not None:
            return pad_size.height, pad_size.width
        divisor = divisor or 1
        height, width = (math.ceil(max(edges) / divisor) * divisor for edges in zip(*sizes, strict=True))
        return height, width

    def _prepare_maps(self, maps: Any, shapes: list[tuple[int, int]], reduce: bool) -> list[np.ndarray]:
        """Each map (height, width) as int64, of the size of its image."""
        maps = self.fetch_images(maps)
        if isinstance(maps, Image.Image) or (not isinstance(maps, (list, tuple)) and maps.ndim == 2):
            maps = [maps]
        if len(maps) != len(shapes):
            raise ValueError(f"There are {len(shapes)} images but {len(maps)} segmentation maps.")
        prepared = []
        for index, (values, shape) in enumerate(zip(map(to_array, maps), shapes, strict=True)):
            if values.ndim == 3 and values.shape[0] == 1:
                values = values[0]
            if values.shape != shape or values.dtype.kind not in "bui":
                raise ValueError(
                    f"A segmentation map must hold a class index for each pixel of its image, {shape[0]}x{shape[1]}, "
                    f"but that of image {index} has shape {values.shape} and type {values.dtype}."
                )
            values = values.astype(np.int64)
            if reduce:
                values = np.where((values == 0) | (values == IGNORE_INDEX), IGNORE_INDEX, values - 1)
            prepared.append(values)
        return prepared

    @staticmethod
    def _label(
        annotation: dict[str, Any], shape: tuple[int, int], geometry: Any, padded: tuple[int, int], with_masks: bool
    ) -> dict[str, Any]:
        """An image's annotations as `labels`."""
        if not isinstance(annotation, dict) or "annotations" not in annotation:
            raise ValueError(
                'Each of annotations must be a dictionary in COCO\'s format, {"image_id": ..., "annotations": '
                '[{"bbox": [left, top, width, height], "category_id": ...}, ...]}.'
            )
        objects = [entry for entry in annotation["annotations"] if not entry.get("iscrowd")]
        for key in ("bbox", "category_id", "segmentation") if with_masks else ("bbox", "category_id"):
            if any(key not in entry for entry in objects):
                raise ValueError(f"An annotation of image {annotation.get('image_id', '?')} has no {key!r}.")
        boxes = np.array([entry["bbox"] for entry in objects], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        # x comes first in boxes, last in sizes.
        shape_xy, resized, start, window, offset, output = (
            np.array(pair[::-1], dtype=np.float64)
            for pair in (shape, geometry.resized, geometry.start, geometry.window, geometry.offset, geometry.output)
        )
        corners = boxes.reshape(-1, 2, 2).clip(0, shape_xy)
        corners = (corners * (resized / shape_xy) - start).clip(0, window) + offset
        edges = corners[:, 1] - corners[:, 0]
        kept = (edges > 0).all(axis=1)
        objects = [entry for entry, keep in zip(objects, kept, strict=True) if keep]
        area = [entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in objects]
        label = {
            "class_labels": np.array([entry["category_id"] for entry in objects], dtype=np.int64),
            "boxes": np.hstack([corners.mean(axis=1) / output, edges / output])[kept].astype(np.float32),
            "area": np.array(area, dtype=np.float32) * np.float32((resized / shape_xy).prod()),
            "iscrowd": np.zeros(len(objects), dtype=np.int64),
            "size": np.array(geometry.output, dtype=np.int64),
            "orig_size": np.array(shape, dtype=np.int64),
        }
        if "image_id" in annotation:
            label["image_id"] = np.array([annotation["image_id"]])
        if with_masks:
            label["masks"] = np.zeros((len(objects), *padded), dtype=bool)
            for mask, entry in zip(label["masks"], objects, strict=True):
                values = warp(decode_segmentation(entry["segmentation"], *shape), geometry, 0)
                mask[: values.shape[0], : values.shape[1]] = values
        return label

    def post_process_semantic_segmentation(
        self,
        outputs: ModelOutput,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """
        The most likely class of each pixel.

        Args:
            outputs: of `...ForSemanticSegmentation`, with `logits` (batch, num_labels, height, width); or of an export
                that ends in maps, with `segmentation` (batch, height, width), which are of the images' size already.
            target_sizes: (height, width) of each map, usually of the original image, to which the logits are
                interpolated first; theirs if absent.
            return_segmentation_scores: gives the interpolated logits, too.

        Returns:
            For each image a map (height, width), int64; with `return_segmentation_scores` its `segmentation`, that
            map, and `segmentation_scores` (num_labels, height, width).
        """
        if outputs.get("segmentation") is not None:
            return finished_maps(outputs["segmentation"], target_sizes, return_segmentation_scores)
        logits = need_output(outputs, "logits", 4, "ForSemanticSegmentation")
        scores = list(logits)
        if target_sizes is not None:
            scores = [
                F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False)[0]
                for image, size in zip(logits, check_sizes(target_sizes, len(logits)), strict=True)
            ]
        maps = [image.argmax(dim=0) for image in scores]
        if not return_segmentation_scores:
            return maps
        return [
            SemanticSegmentationPostProcessorOutput({"segmentation": classes, "segmentation_scores": image})
            for classes, image in zip(maps, scores, strict=True)
        ]

    def post_process_object_detection(
        self,
        outputs: ModelOutput,
        threshold: float = 0.5,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """
        The objects of each image, the surest first.

        Args:
            outputs: of `...ForObjectDetection` or `...ForInstanceSegmentation`.
            threshold: only objects with a larger score are given. The model itself gives none below
                `config.score_threshold`.
            target_sizes: (height, width) of each image, usually of the original; without them boxes are in 0..1.

        Returns:
            For each image `scores` (objects,), `labels` (objects,) and `boxes` (objects, 4), (left, top, right,
            bottom).
        """
        boxes = need_output(outputs, "pred_boxes", 3, "ForObjectDetection or ...ForInstanceSegmentation")
        scores, labels = outputs["logits"].sigmoid().max(dim=-1)
        centres, edges = boxes.split(2, dim=-1)
        boxes = torch.cat([centres - edges / 2, centres + edges / 2], dim=-1)
        if target_sizes is not None:
            scale = boxes.new_tensor([[w, h, w, h] for h, w in check_sizes(target_sizes, len(boxes))])
            boxes = boxes * scale[:, None]
        kept = scores > threshold
        return [
            {"scores": scores[index, keep], "labels": labels[index, keep], "boxes": boxes[index, keep]}
            for index, keep in enumerate(kept)
        ]

    def post_process_instance_segmentation(
        self,
        outputs: ModelOutput,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
    ) -> list[dict[str, Any]]:
        """
        The objects of each image with their masks, the surest first.

        Where objects overlap, the surer one is on top. From a semantic segmenter's outputs, which know no objects,
        each class is one segment without a score, so that the `image-segmentation` pipeline works, which asks for
        instances first.

        Args:
            outputs: of `...ForInstanceSegmentation`.
            threshold: only objects with a larger score are given.
            mask_threshold: probability from which a pixel belongs to the mask.
            overlap_mask_area_threshold: objects of which no larger share remains visible are left out.
            target_sizes: (height, width) of each image, usually of the original. Only a semantic segmenter's outputs
                do without.
            return_coco_annotation: gives the map as run lengths, as transformers' other models do: for each value of
                the map in ascending order, -1 among them, a list of starts (from 1, rows first) and lengths.
            return_binary_maps: gives the masks as they are, with their overlaps, (objects, height, width), bool, none
                left out, in place of the map.

        Returns:
            For each image `segmentation`, a map (height, width), int32, of segment ids, -1 where there is none, and
            `segments_info`, for each segment its `id`, `label_id`, `was_fused` (never) and `score`.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("return_coco_annotation and return_binary_maps exclude each other.")
        if outputs.get("pred_masks") is None:
            maps = self.post_process_semantic_segmentation(outputs, target_sizes)
            results = [segments_of_classes(values, return_binary_maps) for values in maps]
            return [run_lengths(result) for result in results] if return_coco_annotation else results
        if target_sizes is None:
            raise ValueError("target_sizes is needed: the masks of the model are relative to their boxes.")
        target_sizes = check_sizes(target_sizes, len(outputs["logits"]))
        results = []
        for index, found in enumerate(self.post_process_object_detection(outputs, threshold, target_sizes)):
            size = target_sizes[index]
            # Detections are sorted, so those above the threshold are the first.
            masks = outputs["pred_masks"][index, : len(found["scores"])].float().sigmoid()
            masks = [
                paste_mask(mask, box, size, mask_threshold)
                for mask, box in zip(masks, found["boxes"].tolist(), strict=True)
            ]
            objects = [
                {"label_id": label, "was_fused": False, "score": round(score, 6)}
                for label, score in zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
            ]
            device = found["boxes"].device
            if return_binary_maps:
                stack = torch.stack(masks) if masks else torch.zeros((0, *size), dtype=torch.bool, device=device)
                info = [{"id": number, **entry} for number, entry in enumerate(objects)]
                results.append({"segmentation": stack, "segments_info": info})
                continue
            segmentation = torch.full(size, -1, dtype=torch.int32, device=device)
            info = []
            for mask, entry in zip(masks, objects, strict=True):
                visible = mask & (segmentation < 0)
                area = visible.sum().item()
                if area > overlap_mask_area_threshold * mask.sum().item():
                    segmentation[visible] = len(info)
                    info.append({"id": len(info), **entry})
            results.append({"segmentation": segmentation, "segments_info": info})
        return [run_lengths(result) for result in results] if return_coco_annotation else results


def finished_maps(
    maps: torch.Tensor, target_sizes: list[tuple[int, int]] | torch.Tensor | None, with_scores: bool
) -> list[torch.Tensor]:
    """The maps (height, width) of a batch; ValueError where another size, or scores, are asked for."""
    if with_scores:
        raise ValueError("This export gives the class of each pixel, and no scores.")
    if (maps < 0).any():
        raise ValueError("The model gives no finite scores (but NaN or infinity) for one of these images.")
    for size in [] if target_sizes is None else check_sizes(target_sizes, len(maps)):
        if size != tuple(maps.shape[1:]):
            raise ValueError(
                f"This export gives maps of the size of the images that it gets, {maps.shape[1]}x{maps.shape[2]}, not "
                f"of {size[0]}x{size[1]}: give it the images as they are."
            )
    return list(maps)


def segments_of_classes(classes: torch.Tensor, return_binary_maps: bool) -> dict[str, Any]:
    """One segment for each class of a map (height, width)."""
    labels, segmentation = classes.unique(return_inverse=True)
    info = [
        {"id": index, "label_id": label, "was_fused": False, "score": None}
        for index, label in enumerate(labels.tolist())
    ]
    if return_binary_maps:
        return {"segmentation": classes == labels[:, None, None], "segments_info": info}
    return {"segmentation": segmentation.to(torch.int32), "segments_info": info}


def run_lengths(result: dict[str, Any]) -> dict[str, Any]:
    """`result` with its map as run lengths, in transformers' order and form."""
    values = result["segmentation"].cpu().numpy().ravel()
    encoded = []
    for value in np.unique(values):
        edges = np.flatnonzero(np.diff(values == value, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        encoded.append(np.stack([starts + 1, ends - starts], axis=1).ravel().tolist())
    return {**result, "segmentation": encoded}


def need_output(outputs: ModelOutput, name: str, rank: int, head: str) -> torch.Tensor:
    """`outputs[name]`; ValueError if those are of a model with another head."""
    values = outputs.get(name)
    if values is None or values.ndim != rank:
        found = ", ".join(f"{key} {tuple(value.shape)}" for key, value in outputs.items() if hasattr(value, "shape"))
        raise ValueError(f"These are not the outputs of a model ...{head}: {found or 'no tensors'}.")
    return values


def check_sizes(target_sizes: list[tuple[int, int]] | torch.Tensor, number: int) -> list[tuple[int, int]]:
    """`target_sizes` as pairs of integers, one per image; ValueError if they are none, or more, or fewer."""
    sizes = target_sizes.tolist() if isinstance(target_sizes, torch.Tensor) else target_sizes
    if len(sizes) != number:
        raise ValueError(f"target_sizes must have one (height, width) per image, {number}, but has {len(sizes)}.")
    try:
        pairs = [(int(height), int(width)) for height, width in sizes]
    except (TypeError, ValueError) as error:
        raise ValueError(f"target_sizes must have one (height, width) per image, got {target_sizes}.") from error
    if any(edge < 1 for pair in pairs for edge in pair):
        raise ValueError(f"target_sizes must be positive numbers of pixels, got {pairs}.")
    return pairs
