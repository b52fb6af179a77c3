"""transformers' pipelines, which see images as training does, and batch those that keep their proportions.

Theirs drop alpha before the image processor has seen it, name a class for scores that are NaN, and put the pixels of a
batch into one tensor, which for images of several sizes raises an error. Padding would change the statistics of
GroupNorm. So images of one size are computed together, and every image as it would be alone. Nor do they know the
thresholds of a model that gives several labels.
"""

from typing import Any

import torch
from PIL import Image, ImageOps
from transformers.pipelines import (
    PIPELINE_REGISTRY,
    ImageClassificationPipeline,
    ImageFeatureExtractionPipeline,
    ImageSegmentationPipeline,
    ObjectDetectionPipeline,
)
from transformers.pipelines.image_classification import ClassificationFunction

from .foundation.scores import MULTI_LABEL, REGRESSION, check_choice, choose, class_scores
from .image_pixels import pil_to_rgb
from .image_processing_poolformer import (
    PoolFormerImageProcessor,
    PoolFormerImageProcessorPil,
    open_image,
    takes_rgb,
)


# What an image processor makes that is as large as the image.
MAPS = ("pixel_values", "pixel_mask")


class OwnPixels:
    """Mixed into a pipeline, before it. With image processors of other models it does nothing."""

    def preprocess(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.image_processor, PoolFormerImageProcessor | PoolFormerImageProcessorPil):
            number = self.image_processor.num_channels
            if isinstance(image, str):
                image = open_image(image, kwargs.get("timeout"), number)
            if not takes_rgb(number):
                # transformers' own way leads through RGB.
                return self.image_processor(image, return_tensors="pt").to(self.dtype)
            if isinstance(image, Image.Image):
                image = pil_to_rgb(ImageOps.exif_transpose(image))
        return super().preprocess(image, *args, **kwargs)


class BatchesBySize(OwnPixels):
    """Mixed into a pipeline, before it. With image processors of other models it does nothing."""

    def preprocess(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = super().preprocess(image, *args, **kwargs)
        if isinstance(self.image_processor, PoolFormerImageProcessor | PoolFormerImageProcessorPil):
            # In lists, of which the collation of batches makes lists of lists instead of a tensor.
            inputs.update({name: [inputs[name]] for name in MAPS if name in inputs})
        return inputs

    def forward(self, model_inputs: Any, **params: Any) -> Any:
        if isinstance(model_inputs["pixel_values"], torch.Tensor):
            return super().forward(model_inputs, **params)
        maps = {
            name: [part[0] if isinstance(part, list) else part for part in model_inputs[name]]  # each (1, ..., H, W)
            for name in MAPS
            if name in model_inputs
        }
        groups: dict[torch.Size, list[int]] = {}
        for index, image in enumerate(maps["pixel_values"]):
            groups.setdefault(image.shape, []).append(index)
        pieces: list[Any] = [None] * len(maps["pixel_values"])
        for indices in groups.values():
            inputs = {name: pick(value, indices) for name, value in model_inputs.items() if name not in MAPS}
            inputs |= {name: torch.cat(pick(parts, indices)) for name, parts in maps.items()}
            outputs = super().forward(inputs, **params)
            if len(groups) == 1:
                return outputs
            for place, index in enumerate(indices):
                pieces[index] = {
                    name: value[place] for name, value in outputs.items() if isinstance(value, torch.Tensor | list)
                }
        return type(outputs)({name: [piece[name] for piece in pieces] for name in pieces[0]})


def pick(values: Any, indices: list[int]) -> Any:
    """Of a batch, those of some images."""
    return values[indices] if isinstance(values, torch.Tensor) else [values[index] for index in indices]


class SegmentationBySize(BatchesBySize, ImageSegmentationPipeline):
    pass


class DetectionBySize(BatchesBySize, ObjectDetectionPipeline):
    pass


class Classification(OwnPixels, ImageClassificationPipeline):
    """Of several labels it gives those whose probability reaches their threshold, best first; there may be none.

    The thresholds are the model's own, `label_thresholds` of its configuration, or `threshold` for all labels. `top_k`
    asks for the best so many, whatever their thresholds; with `threshold`, at most so many. Of a regression it gives
    all numbers, in the model's order and as they are. For models of others, whose configuration has no thresholds, and
    with `function_to_apply`, it does what transformers does.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_choice(self.model.config)

    def _sanitize_parameters(self, threshold: float | None = None, **kwargs: Any) -> Any:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if threshold is not None:
            check_choice(self.model.config, threshold=threshold)
            if postprocess.get("function_to_apply") is not None:
                raise ValueError("a threshold is one of probabilities: leave function_to_apply out")
            postprocess["threshold"] = threshold
        return preprocess, forward, postprocess

    def postprocess(self, model_outputs: Any, threshold: float | None = None, **asked: Any) -> Any:
        config, logits = self.model.config, model_outputs["logits"]
        if not logits.isfinite().all():
            raise ValueError("The model gives no finite scores (but NaN or infinity) for this image.")
        ours = isinstance(self.image_processor, PoolFormerImageProcessor | PoolFormerImageProcessorPil)
        ours = ours or hasattr(config, "label_thresholds")
        own = {MULTI_LABEL: (None,), REGRESSION: (None, ClassificationFunction.NONE)}.get(config.problem_type, ())
        if threshold is None and not (ours and asked.get("function_to_apply") in own):
            return super().postprocess(model_outputs, **asked)
        ((indices, scores),) = choose(class_scores(logits.float(), config), config, asked.get("top_k"), threshold)
        return [
            {"label": config.id2label[index], "score": score} for index, score in zip(indices, scores, strict=True)
        ]


class FeatureExtraction(OwnPixels, ImageFeatureExtractionPipeline):
    pass


PIPELINES = {
    "image-classification": Classification,
    "image-feature-extraction": FeatureExtraction,
    "image-segmentation": SegmentationBySize,
    "object-detection": DetectionBySize,
}


def register_pipelines():
    for task, pipeline in PIPELINES.items():
        PIPELINE_REGISTRY.supported_tasks[task]["impl"] = pipeline
