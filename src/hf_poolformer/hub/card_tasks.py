"""What the card of a segmenter or detector says otherwise than a classifier's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DenseTask:
    """
    Attributes:
        pipeline_tag: of the Hub, and the name of transformers' pipeline.
        noun: what the model is.
        figures: (key in all_results.json, metric id, name) of shares, best first.
        per_class: key in all_results.json, and the heading of the table.
        pipeline_code, model_code: Python; `{source}` stands for the quoted name of the model and loading arguments.
        limits: paragraphs.
    """

    pipeline_tag: str
    name: str
    noun: str
    figures: tuple[tuple[str, str, str], ...]
    per_class: tuple[str, str]
    pipeline_code: str
    model_code: str
    limits: tuple[str, ...]


BOX_FIGURES = (
    ("eval_map", "mean_average_precision", "Box AP (IoU 0.50:0.95)"),
    ("eval_map_50", "mean_average_precision", "Box AP (IoU 0.50)"),
    ("eval_map_75", "mean_average_precision", "Box AP (IoU 0.75)"),
)
MASK_FIGURES = (
    ("eval_mask_map", "mean_average_precision", "Mask AP (IoU 0.50:0.95)"),
    ("eval_mask_map_50", "mean_average_precision", "Mask AP (IoU 0.50)"),
    ("eval_mask_map_75", "mean_average_precision", "Mask AP (IoU 0.75)"),
)
OTHER_DATA = (
    "It was measured on images like those it was trained on, if at all; photographs from another camera, country or "
    "population can fare worse. Nobody has examined this checkpoint for social bias."
)
# The heads are this package's own, so that transformers alone has no class for them.
IMPORT = "import hf_poolformer  # pip install hf-poolformer; or trust_remote_code=True below, without it\n"
MODEL_CODE = (
    "import torch\n"
    "from PIL import Image\n"
    "from transformers import AutoImageProcessor, {auto_class}\n\n" + IMPORT + "\n"
    'image = Image.open("photo.jpg").convert("RGB")\n'
    "processor = AutoImageProcessor.from_pretrained({source})\n"
    "model = {auto_class}.from_pretrained({source}).eval()\n"
    "with torch.inference_mode():\n"
    '    outputs = model(**processor(image, return_tensors="pt"))\n'
)
SIZES = "target_sizes=[(image.height, image.width)]"

DENSE_TASKS = {
    "semantic-segmentation": DenseTask(
        pipeline_tag="image-segmentation",
        name="Semantic segmentation",
        noun="semantic segmenter (Semantic FPN)",
        figures=(
            ("eval_miou", "mean_iou", "Mean IoU"),
            ("eval_pixel_accuracy", "accuracy", "Pixel accuracy"),
            ("eval_mean_accuracy", "accuracy", "Mean accuracy of the classes"),
        ),
        per_class=("eval_per_class_iou", "IoU"),
        pipeline_code=(
            "from transformers import pipeline\n\n" + IMPORT + "\n"
            'segment = pipeline("image-segmentation", model={source})\n'
            'for part in segment("photo.jpg"):\n'
            '    print(part["label"], part["mask"].size)'
        ),
        model_code=(
            MODEL_CODE.replace("{auto_class}", "AutoModelForSemanticSegmentation")
            + f"(classes,) = processor.post_process_semantic_segmentation(outputs, {SIZES})\n"
            "print(classes)  # class of each pixel"
        ),
        limits=("Every pixel gets one of the classes the model was trained on, whatever it shows.", OTHER_DATA),
    ),
    "object-detection": DenseTask(
        pipeline_tag="object-detection",
        name="Object detection",
        noun="object detector (RetinaNet)",
        figures=BOX_FIGURES,
        per_class=("eval_per_class_map", "box AP"),
        pipeline_code=(
            "from transformers import pipeline\n\n" + IMPORT + "\n"
            'detect = pipeline("object-detection", model={source})\n'
            'print(detect("photo.jpg"))'
        ),
        model_code=(
            MODEL_CODE.replace("{auto_class}", "AutoModelForObjectDetection")
            + f"(found,) = processor.post_process_object_detection(outputs, threshold=0.5, {SIZES})\n"
            'for score, label, box in zip(found["scores"], found["labels"], found["boxes"]):\n'
            "    print(model.config.id2label[label.item()], round(score.item(), 3), box.tolist())"
        ),
        limits=("The model finds only objects of the classes it was trained on, and misses some.", OTHER_DATA),
    ),
    "instance-segmentation": DenseTask(
        pipeline_tag="image-segmentation",
        name="Instance segmentation",
        noun="instance segmenter (Mask R-CNN)",
        figures=MASK_FIGURES + BOX_FIGURES,
        per_class=("eval_mask_per_class_map", "mask AP"),
        pipeline_code=(
            "from transformers import pipeline\n\n" + IMPORT + "\n"
            'segment = pipeline("image-segmentation", model={source})\n'
            'for part in segment("photo.jpg", threshold=0.5):\n'
            '    print(part["label"], part["score"], part["mask"].size)'
        ),
        model_code=(
            MODEL_CODE.replace("{auto_class}", "AutoModelForInstanceSegmentation")
            + f"(found,) = processor.post_process_instance_segmentation(outputs, threshold=0.5, {SIZES})\n"
            'for part in found["segments_info"]:  # found["segmentation"] has the id of each pixel\n'
            '    print(model.config.id2label[part["label_id"]], part["score"])'
        ),
        limits=("The model finds only objects of the classes it was trained on, and misses some.", OTHER_DATA),
    ),
}


def task_of(settings: Mapping[str, Any], config: Mapping[str, Any]) -> DenseTask | None:
    """The task of a run or, where its settings are not known, of a model; None for a classifier."""
    name = settings.get("task")
    if name is None:
        heads = {
            "ForSemanticSegmentation": "semantic-segmentation",
            "ForObjectDetection": "object-detection",
            "ForInstanceSegmentation": "instance-segmentation",
        }
        architecture = str((config.get("architectures") or [""])[0])
        name = next((task for head, task in heads.items() if architecture.endswith(head)), None)
    return DENSE_TASKS.get(name)
