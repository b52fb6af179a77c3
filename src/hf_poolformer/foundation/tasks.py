"""The table of tasks: what each reads, which head learns it, what an evaluation gives, what its card says.

Whoever does one thing for one task and another for the next asks the row. A further task is a row here, its head among
the models, and its mathematics in the class that `evaluation` names.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .errors import UserError
from .names import near_names


@dataclass(frozen=True)
class Figure:
    """A number that an evaluation gives.

    Attributes:
        key: in `all_results.json`, where it begins with `eval_`.
        metric: what the Hub calls the kind of number.
        name: in cards.
        short: in the lines and curves of a run; without, only cards show it.
        least_classes: with fewer it says nothing.
        better: whether more or less of it is better.
        share: whether it is a share of something, 0 to 1, which cards give in per cent.
    """

    key: str
    metric: str
    name: str
    short: str = ""
    least_classes: int = 0
    better: Literal["high", "low"] = "high"
    share: bool = True

    def text(self, value: float, interval: Sequence[float] | None = None, *, percent: bool = False) -> str:
        """Its value, and behind it in brackets the interval (low, high) in which it probably lies.

        Args:
            percent: of a share.
        """
        unit = " %" if percent and self.share else ""

        def digits(number: float) -> str:
            if isinstance(number, int):
                return str(number)
            if self.share:
                return f"{100 * number:.2f}" if unit else f"{number:.3f}"
            return f"{number:.4g}" if abs(number) < 1e4 else f"{number:.0f}"

        text = digits(value) + unit
        if interval:
            low, high = map(digits, interval)
            text += f" ({low} to {high}{unit})"
        return text


@dataclass(frozen=True)
class Task:
    """A row of `TASKS`.

    Attributes:
        name: the Hub's, and the value of `--task`.
        title: for people.
        noun: what a model for it is, in cards.
        auto_class: of transformers.
        pipeline_tag: the Hub's, and the name of transformers' pipeline.
        built_in: transformers has a PoolFormer with this head, which it loads without this package.
        problem_type: in the configuration of a model whose head more than one task shares; else None.
        reads: what stands beside an image in a dataset: a class, any number of classes, numbers, a map of classes,
            boxes, or boxes with masks; or nothing that is looked at.
        gives: what a model answers: scores of the classes, a map of classes, objects, or features.
        figures: those for people, the one that says which of two models is better first.
        kept_by: all figures that `--metric_for_best_model` can go by.
        per_class: the figures of single classes, or of single numbers: columns of a table.
        processor: constructor among those of PoolFormerImageProcessor; empty for the class itself.
        evaluation: `module:class` of a `Judge` of evaluation/processes.py.
        settings: `module:class` of what its training can be told.
        training: `module:class` of what its training does its own way, as `training.loop` asks it.
        exported_output: class of the answer of an exported model, of transformers.modeling_outputs or, of a detector,
            the model's own; empty for what cannot be exported.
        pipeline_code, model_code: Python for cards; `{source}` stands for the quoted name of the model and arguments
            of loading.
        exported_imports, exported_code: Python before and after `model = load(".")`, for cards of exports.
        outputs: what cards call the things that a model answers with, one and several.
        limits: paragraphs of cards; `{classes}` stands for the number of these, in words.
    """

    name: str
    title: str
    noun: str
    auto_class: str
    pipeline_tag: str
    reads: Literal["class", "classes", "numbers", "map", "boxes", "masks", "nothing"]
    gives: Literal["scores", "map", "objects", "features"]
    figures: tuple[Figure, ...]
    kept_by: tuple[str, ...]
    per_class: tuple[Figure, ...]
    pipeline_code: str
    model_code: str
    limits: tuple[str, ...]
    outputs: tuple[str, str] = ("class", "classes")
    processor: str = ""
    evaluation: str = ""
    settings: str = "hf_poolformer.settings.dense:DenseSettings"
    training: str = "hf_poolformer.training.dense.task:DenseTraining"
    exported_output: str = ""
    exported_imports: str = ""
    exported_code: str = ""
    built_in: bool = False
    problem_type: str | None = None

    @property
    def head(self) -> str:
        """The end of the names of its architectures: `ForImageClassification`, say."""
        return self.auto_class.removeprefix("Auto").removeprefix("Model") or "Model"

    @property
    def best(self) -> str:
        """Key of the figure that says which of two models is better."""
        return self.figures[0].key

    def is_error(self, key: str) -> bool:
        """Whether less of this figure of `kept_by` is better."""
        return any(figure.key == key and figure.better == "low" for figure in self.figures)

    def figures_of(self, num_labels: int, first: str | None = None) -> list[Figure]:
        """The figures that say something of a model with so many labels.

        Args:
            first: key, perhaps without `eval_`, of the one that matters most; unset, the row knows.
        """
        shown = [figure for figure in self.figures if num_labels >= figure.least_classes]
        return sorted(
            shown, key=lambda figure: figure.key.removeprefix("eval_") != (first or "").removeprefix("eval_")
        )

    @property
    def is_dense(self) -> bool:
        """Whether it says something about places of an image, as `train-dense` learns it."""
        return self.reads in ("map", "boxes", "masks")

    @property
    def shown(self) -> list[Figure]:
        """The figures in the lines and curves of a run."""
        return [figure for figure in self.figures if figure.short]

    def auto_model(self) -> Any:
        return getattr(importlib.import_module("transformers"), self.auto_class)

    def new_processor(self, **settings: Any) -> Any:
        """An image processor with these settings, and for the rest those that fit the task."""
        from ..image_processing_poolformer import PoolFormerImageProcessor

        make = getattr(PoolFormerImageProcessor, self.processor) if self.processor else PoolFormerImageProcessor
        return make(**settings)

    @property
    def judge(self) -> Any:
        return pkgutil.resolve_name(self.evaluation)

    def new_judge(self, num_labels: int, **options: Any) -> Any:
        """The object of `evaluation` that gathers what a model says."""
        return self.judge(num_labels, **options)


CLASSIFICATION = "image-classification"
MULTI_LABEL = "multi-label-classification"
REGRESSION = "image-regression"
FEATURE_DISTILLATION = "feature-distillation"

LOSS = Figure("eval_loss", "loss", "Loss", "loss", better="low", share=False)
CLASS_FIGURES = (
    Figure("eval_accuracy", "accuracy", "Top-1 accuracy", "top-1"),
    Figure("eval_balanced_accuracy", "balanced_accuracy", "Balanced accuracy"),
    Figure("eval_f1_macro", "f1", "Macro F1", "macro F1"),
    Figure("eval_precision_macro", "precision", "Macro precision"),
    Figure("eval_recall_macro", "recall", "Macro recall"),
    Figure("eval_f1_weighted", "f1", "Weighted F1"),
    Figure("eval_precision_weighted", "precision", "Weighted precision"),
    Figure("eval_mcc", "matthews_correlation", "Matthews correlation", share=False),
    Figure("eval_auroc", "roc_auc", "AUROC", share=False),
    Figure("eval_average_precision", "average_precision", "Average precision", share=False),
    Figure("eval_top5_accuracy", "accuracy", "Top-5 accuracy", "top-5", least_classes=6),
    Figure(
        "eval_calibration_error",
        "expected_calibration_error",
        "Calibration error (15 bins)",
        better="low",
        share=False,
    ),
    LOSS,
)
LABEL_FIGURES = (
    Figure("eval_average_precision", "mean_average_precision", "Mean average precision", "mAP", share=False),
    Figure("eval_f1_macro", "f1", "Macro F1", "macro F1"),
    Figure("eval_f1_micro", "f1", "Micro F1"),
    Figure("eval_precision_macro", "precision", "Macro precision"),
    Figure("eval_recall_macro", "recall", "Macro recall"),
    Figure("eval_auroc", "roc_auc", "AUROC", share=False),
    Figure("eval_exact_match", "accuracy", "Images with exactly the right labels", "exact match"),
    Figure("eval_hamming_accuracy", "accuracy", "Labels rightly there or not"),
    LOSS,
)
NUMBER_FIGURES = (
    Figure("eval_mae", "mae", "Mean absolute error", "MAE", better="low", share=False),
    Figure("eval_rmse", "rmse", "Root mean square error", "RMSE", better="low", share=False),
    Figure("eval_r2", "r_squared", "R²", "R²", share=False),
    replace(LOSS, name="Mean square error"),
)
OF_EACH_CLASS = (
    Figure("eval_per_class_precision", "precision", "precision"),
    Figure("eval_per_class_recall", "recall", "recall"),
    Figure("eval_per_class_f1", "f1", "F1"),
    Figure("eval_per_class_samples", "count", "images", share=False),
)
BOX_FIGURES = (
    Figure("eval_map", "mean_average_precision", "Box AP (IoU 0.50:0.95)", "mAP, IoU .50 to .95"),
    Figure("eval_map_50", "mean_average_precision", "Box AP (IoU 0.50)", "mAP, IoU .50"),
    Figure("eval_map_75", "mean_average_precision", "Box AP (IoU 0.75)"),
)
MASK_FIGURES = (
    Figure("eval_mask_map", "mean_average_precision", "Mask AP (IoU 0.50:0.95)", "mask mAP, IoU .50 to .95"),
    Figure("eval_mask_map_50", "mean_average_precision", "Mask AP (IoU 0.50)", "mask mAP, IoU .50"),
    Figure("eval_mask_map_75", "mean_average_precision", "Mask AP (IoU 0.75)"),
    # Beside masks, a run shows one figure of boxes, and says so.
    replace(BOX_FIGURES[0], short=""),
    replace(BOX_FIGURES[1], short="box mAP, IoU .50"),
    BOX_FIGURES[2],
)
AVERAGES = tuple(
    f"eval_{end}" for end in ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")
)


def keys_of(figures: Sequence[Figure]) -> tuple[str, ...]:
    return tuple(sorted(figure.key for figure in figures))


# The dense heads are this package's own, so that transformers alone has no class for them.
IMPORT = "import hf_poolformer  # where it is installed; elsewhere trust_remote_code=True below\n"
OTHER_DATA = (
    "It was measured on images like those it was trained on, if at all; photographs from another camera, country or "
    "population can fare worse. Nobody has examined this checkpoint for social bias."
)
SIZES = "target_sizes=[(image.height, image.width)]"


def dense_pipeline(code: str) -> str:
    """How a card uses a model by a pipeline."""
    return "from transformers import pipeline\n\n" + IMPORT + "\n" + code


def model_code(auto_class: str, code: str, start: str = "") -> str:
    """The same one step lower.

    Args:
        code: what becomes of `model`, `inputs` and `image`, from inside `with torch.inference_mode()` on.
        start: what comes behind the imports.
    """
    return (
        "import torch\n"
        "from PIL import Image\n"
        f"from transformers import {', '.join(sorted(['AutoImageProcessor', auto_class]))}\n\n{start}"
        "processor = AutoImageProcessor.from_pretrained({source})\n"
        f"model = {auto_class}.from_pretrained({{source}}).eval()\n"
        'image = Image.open("photo.jpg").convert("RGB")\n'
        'inputs = processor(image, return_tensors="pt")\n'
        "with torch.inference_mode():\n" + code
    )


def dense_model(auto_class: str, code: str) -> str:
    return model_code(auto_class, "    outputs = model(**inputs)\n" + code, IMPORT + "\n")


_CLASSIFICATION = Task(
    name=CLASSIFICATION,
    title="Image classification",
    noun="image classifier",
    auto_class="AutoModelForImageClassification",
    built_in=True,
    problem_type="single_label_classification",
    pipeline_tag="image-classification",
    reads="class",
    gives="scores",
    figures=CLASS_FIGURES,
    kept_by=keys_of(CLASS_FIGURES),
    # Of the images of a class, the share that is recognised is its recall and, as most people call it, its accuracy.
    per_class=(OF_EACH_CLASS[0], replace(OF_EACH_CLASS[1], key="eval_per_class_accuracy"), *OF_EACH_CLASS[2:]),
    evaluation="hf_poolformer.evaluation.metrics:ClassJudge",
    settings="hf_poolformer.settings.classification:ClassificationSettings",
    training="hf_poolformer.training.classification:ClassificationTraining",
    exported_output="ImageClassifierOutput",
    pipeline_code=(
        "from transformers import pipeline\n\n"
        'classify = pipeline("image-classification", model={source})\n'
        'print(classify("photo.jpg"))'
    ),
    model_code=model_code(
        "AutoModelForImageClassification",
        "    logits = model(**inputs).logits  # (1, number of classes)\n"
        "print(model.config.id2label[logits.argmax(-1).item()])",
    ),
    exported_imports="from transformers import pipeline",
    exported_code=(
        'classify = pipeline("image-classification", model=model, image_processor=model.image_processor)\n'
        'print(classify("photo.jpg"))'
    ),
    limits=(
        "The model knows only the {classes} it was trained on and gives one of them to every image, whatever the "
        "image shows.",
        "It was measured on images like those it was trained on, if at all; a photograph from another camera, "
        "country or population can fare worse. Nobody has examined this checkpoint for social bias.",
    ),
)
_MULTI_LABEL = replace(
    _CLASSIFICATION,
    name=MULTI_LABEL,
    title="Multi-label image classification",
    noun="multi-label image classifier",
    problem_type="multi_label_classification",
    reads="classes",
    outputs=("label", "labels"),
    pipeline_code=(
        "from transformers import pipeline\n\n"
        'classify = pipeline("image-classification", model={source})\n'
        'print(classify("photo.jpg", top_k=3))  # each label has a probability of its own\n'
        "# After `import hf_poolformer`, and without top_k: the labels that reach their thresholds."
    ),
    model_code=model_code(
        "AutoModelForImageClassification",
        "    probabilities = model(**inputs).logits[0].sigmoid().tolist()  # of each label\n"
        'thresholds = getattr(model.config, "label_thresholds", None) or [0.5] * len(probabilities)\n'
        "for index, probability in enumerate(probabilities):\n"
        "    if probability >= thresholds[index]:\n"
        "        print(model.config.id2label[index], round(probability, 3))",
    ),
    exported_code=(
        'classify = pipeline("image-classification", model=model, image_processor=model.image_processor)\n'
        'print(classify("photo.jpg"))  # the labels that reach their thresholds; there may be none'
    ),
    limits=(
        "The model knows only the {classes} it was trained on. It gives an image each of them whose probability "
        "reaches its threshold: `label_thresholds` in `config.json`, or 0.5 where there are none. So an image may get "
        "no label, and one that shows something else may get one.",
        OTHER_DATA,
    ),
    settings="hf_poolformer.settings.classification:MultiLabelSettings",
    training="hf_poolformer.training.multi_label:MultiLabelTraining",
    figures=LABEL_FIGURES,
    kept_by=keys_of(LABEL_FIGURES),
    per_class=(
        *OF_EACH_CLASS,
        Figure("eval_per_class_average_precision", "average_precision", "average precision", share=False),
    ),
    evaluation="hf_poolformer.evaluation.metrics:LabelsJudge",
)
_REGRESSION = replace(
    _CLASSIFICATION,
    name=REGRESSION,
    title="Image regression",
    noun="image regressor",
    problem_type="regression",
    reads="numbers",
    outputs=("number", "numbers"),
    pipeline_code=(
        "from transformers import pipeline\n\n"
        'measure = pipeline("image-classification", model={source}, function_to_apply="none")\n'
        'for found in measure("photo.jpg"):\n'
        '    print(found["label"], found["score"])  # a number, in the units that it was trained on'
    ),
    model_code=model_code(
        "AutoModelForImageClassification",
        "    values = model(**inputs).logits[0].tolist()\n"
        "for index, value in enumerate(values):\n"
        "    print(model.config.id2label[index], value)",
    ),
    exported_code=(
        'measure = pipeline("image-classification", model=model, image_processor=model.image_processor)\n'
        'for found in measure("photo.jpg"):\n'
        '    print(found["label"], found["score"])  # a number, in the units that it was trained on'
    ),
    limits=(
        "The model gives every image its {classes}, whatever the image shows, and does not say how sure it is. Far "
        "from the values that it was trained on, what it says means little.",
        OTHER_DATA,
    ),
    settings="hf_poolformer.settings.classification:RegressionSettings",
    training="hf_poolformer.training.regression:RegressionTraining",
    figures=NUMBER_FIGURES,
    kept_by=keys_of(NUMBER_FIGURES),
    per_class=tuple(
        replace(figure, key=figure.key.replace("eval_", "eval_per_target_")) for figure in NUMBER_FIGURES[:3]
    ),
    evaluation="hf_poolformer.evaluation.metrics:NumbersJudge",
)

_ROWS = (
    _CLASSIFICATION,
    _MULTI_LABEL,
    _REGRESSION,
    Task(
        name="semantic-segmentation",
        title="Semantic segmentation",
        noun="semantic segmenter (Semantic FPN)",
        auto_class="AutoModelForSemanticSegmentation",
        pipeline_tag="image-segmentation",
        reads="map",
        gives="map",
        figures=(
            Figure("eval_miou", "mean_iou", "Mean IoU", "mean IoU"),
            Figure("eval_pixel_accuracy", "accuracy", "Pixel accuracy", "pixel accuracy"),
            Figure("eval_mean_accuracy", "accuracy", "Mean accuracy of the classes"),
        ),
        kept_by=("eval_miou", "eval_mean_accuracy", "eval_pixel_accuracy"),
        per_class=(Figure("eval_per_class_iou", "mean_iou", "IoU"),),
        processor="for_segmentation",
        evaluation="hf_poolformer.evaluation.dense:MapJudge",
        exported_output="SemanticSegmenterOutput",
        pipeline_code=dense_pipeline(
            'segment = pipeline("image-segmentation", model={source})\n'
            'for part in segment("photo.jpg"):\n'
            '    print(part["label"], part["mask"].size)'
        ),
        model_code=dense_model(
            "AutoModelForSemanticSegmentation",
            f"(classes,) = processor.post_process_semantic_segmentation(outputs, {SIZES})\n"
            "print(classes)  # class of each pixel",
        ),
        exported_imports="from PIL import Image",
        exported_code=(
            'image = Image.open("photo.jpg")\n'
            'outputs = model(**model.image_processor(image, return_tensors="pt"))\n'
            "classes = model.image_processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])[0]"
        ),
        limits=("Every pixel gets one of the classes the model was trained on, whatever it shows.", OTHER_DATA),
    ),
    Task(
        name="object-detection",
        title="Object detection",
        noun="object detector (RetinaNet)",
        auto_class="AutoModelForObjectDetection",
        pipeline_tag="object-detection",
        reads="boxes",
        gives="objects",
        figures=BOX_FIGURES,
        kept_by=AVERAGES,
        per_class=(Figure("eval_per_class_map", "mean_average_precision", "box AP"),),
        processor="for_detection",
        evaluation="hf_poolformer.evaluation.dense:BoxJudge",
        exported_output="MetaFormerObjectDetectionOutput",
        exported_imports="from transformers import pipeline",
        exported_code=(
            'detect = pipeline("object-detection", model=model, image_processor=model.image_processor)\n'
            'print(detect("photo.jpg"))'
        ),
        pipeline_code=dense_pipeline(
            'detect = pipeline("object-detection", model={source})\nprint(detect("photo.jpg"))'
        ),
        model_code=dense_model(
            "AutoModelForObjectDetection",
            f"(found,) = processor.post_process_object_detection(outputs, threshold=0.5, {SIZES})\n"
            'for score, label, box in zip(found["scores"], found["labels"], found["boxes"]):\n'
            "    print(model.config.id2label[label.item()], round(score.item(), 3), box.tolist())",
        ),
        limits=("The model finds only objects of the classes it was trained on, and misses some.", OTHER_DATA),
    ),
    Task(
        name="instance-segmentation",
        title="Instance segmentation",
        noun="instance segmenter (Mask R-CNN)",
        auto_class="AutoModelForInstanceSegmentation",
        pipeline_tag="image-segmentation",
        reads="masks",
        gives="objects",
        figures=MASK_FIGURES,
        kept_by=(*AVERAGES, *(name.replace("eval_", "eval_mask_") for name in AVERAGES)),
        per_class=(Figure("eval_mask_per_class_map", "mean_average_precision", "mask AP"),),
        processor="for_detection",
        evaluation="hf_poolformer.evaluation.dense:MaskJudge",
        exported_output="MetaFormerInstanceSegmentationOutput",
        exported_imports="from transformers import pipeline",
        exported_code=(
            'segment = pipeline("image-segmentation", model=model, image_processor=model.image_processor)\n'
            'for part in segment("photo.jpg", threshold=0.5):\n'
            '    print(part["label"], part["score"], part["mask"].size)'
        ),
        pipeline_code=dense_pipeline(
            'segment = pipeline("image-segmentation", model={source})\n'
            'for part in segment("photo.jpg", threshold=0.5):\n'
            '    print(part["label"], part["score"], part["mask"].size)'
        ),
        model_code=dense_model(
            "AutoModelForInstanceSegmentation",
            f"(found,) = processor.post_process_instance_segmentation(outputs, threshold=0.5, {SIZES})\n"
            'for part in found["segments_info"]:  # found["segmentation"] has the id of each pixel\n'
            '    print(model.config.id2label[part["label_id"]], part["score"])',
        ),
        limits=("The model finds only objects of the classes it was trained on, and misses some.", OTHER_DATA),
    ),
)

# Models without a head; a card, and a checkpoint of somebody else, may be of one.
ENCODER = Task(
    name="encoder",
    title="Image feature extraction",
    noun="image encoder",
    auto_class="AutoModel",
    built_in=True,
    pipeline_tag="image-feature-extraction",
    reads="nothing",
    gives="features",
    figures=(),
    kept_by=(),
    per_class=(),
    pipeline_code=(
        "from transformers import pipeline\n\n"
        'extract = pipeline("image-feature-extraction", model={source})\n'
        'features = extract("photo.jpg")'
    ),
    model_code=model_code(
        "AutoModel", "    features = model(**inputs).last_hidden_state  # (1, channels, height, width)"
    ),
    limits=("It has no head: what it gives are features, which mean nothing by themselves.", OTHER_DATA),
)
BACKBONE = replace(
    ENCODER,
    name="backbone",
    noun="backbone",
    auto_class="AutoBackbone",
    built_in=False,
    pipeline_code="",
    model_code=model_code(
        "AutoBackbone", "    features = model(**inputs).feature_maps  # of each stage, largest first"
    ),
)
HEADLESS = (BACKBONE, ENCODER)

# How an encoder is learned. A run names it; of a model nobody can tell how it was learned.
_FEATURE_DISTILLATION = replace(
    ENCODER,
    name=FEATURE_DISTILLATION,
    figures=(
        Figure("eval_similarity", "cosine_similarity", "Similarity to the teacher", "similarity", share=False),
        LOSS,
    ),
    kept_by=("eval_loss", "eval_similarity"),
    evaluation="hf_poolformer.training.feature_distillation:SimilarityJudge",
    settings="hf_poolformer.settings.classification:FeatureDistillationSettings",
    training="hf_poolformer.training.feature_distillation:FeatureDistillationTraining",
)
TASKS: dict[str, Task] = {task.name: task for task in (*_ROWS, _FEATURE_DISTILLATION)}


def task_named(name: str) -> Task:
    """
    Raises:
        UserError: there is no such task; the message names those that were probably meant.
    """
    if name not in TASKS:
        near = near_names(str(name).replace("-", "_"), [known.replace("-", "_") for known in TASKS])
        near = [known.replace("_", "-") for known in near]
        hint = f" Did you mean {' or '.join(near)}?" if near else f" There are {', '.join(TASKS)}."
        raise UserError(f"unknown task {name!r}.{hint}")
    return TASKS[name]


def dense_tasks() -> list[str]:
    """Names of the tasks of `train-dense`."""
    return [name for name, task in TASKS.items() if task.is_dense]


def exportable_tasks() -> list[str]:
    """Names of the tasks whose models can be exported."""
    return [name for name, task in TASKS.items() if task.exported_output]


def tasks_of_pipeline(tag: str) -> list[Task]:
    """The tasks whose models a pipeline of transformers runs, by its name, which is the Hub's tag."""
    return [task for task in TASKS.values() if task.pipeline_tag == tag]


def task_of_problem(problem_type: str | None) -> Task:
    """The task among those of one head, by a configuration's `problem_type`; what says nothing is a classifier."""
    wanted = problem_type or _CLASSIFICATION.problem_type
    return next((task for task in TASKS.values() if task.problem_type == wanted), _CLASSIFICATION)


def task_of_config(config: Any, headless: bool = False) -> Task | None:
    """The task of a model by its configuration, an object or the content of a `config.json`.

    Args:
        headless: take `HEADLESS`, a backbone or an encoder, for tasks, too.

    Returns:
        None where the architecture has no head that is known.
    """
    named = config.get("architectures") if isinstance(config, Mapping) else getattr(config, "architectures", None)
    architecture = str((named or [""])[0])
    problem = config.get("problem_type") if isinstance(config, Mapping) else getattr(config, "problem_type", None)
    rows = [*(task for task in TASKS.values() if task.reads != "nothing"), *(HEADLESS if headless else ())]
    rows.sort(key=lambda task: task.problem_type != problem)  # among those of one head
    return next((task for task in rows if architecture.endswith(task.head)), None)
