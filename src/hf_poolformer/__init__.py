"""
PoolFormer and the MetaFormer family as Hugging Face models.

Importing this package registers its classes with transformers' Auto classes; for `poolformer` they take the place of
the built-in ones.
"""

import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any


try:
    import torchvision  # noqa: F401
except (RuntimeError, OSError) as error:
    # transformers would say that it cannot import a module of its own.
    raise ImportError(
        f"torchvision {version('torchvision')} was not built for torch {version('torch')}: install the two together, "
        f"pip install --upgrade torch torchvision ({' '.join(str(error).split())})",
        name="torchvision",
    ) from error

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.poolformer.configuration_poolformer import PoolFormerConfig as BuiltInConfig

from .configuration_poolformer import VARIANTS, MetaFormerConfig, PoolFormerConfig, write_json
from .foundation.tasks import TASKS, dense_tasks, tasks_of_pipeline
from .image_processing_poolformer import PoolFormerImageProcessor, PoolFormerImageProcessorPil
from .modeling_detection import (
    MetaFormerForInstanceSegmentation,
    MetaFormerForObjectDetection,
    PoolFormerForInstanceSegmentation,
    PoolFormerForObjectDetection,
)
from .modeling_poolformer import (
    AUTO_CLASSES,
    MetaFormerBackbone,
    MetaFormerForImageClassification,
    MetaFormerModel,
    PoolFormerBackbone,
    PoolFormerForImageClassification,
    PoolFormerModel,
)
from .modeling_segmentation import MetaFormerForSemanticSegmentation, PoolFormerForSemanticSegmentation
from .pipelines import register_pipelines
from .token_mixers import TOKEN_MIXERS


if TYPE_CHECKING:
    from .explanation.gradcam import gradcam
    from .foundation.graphs import graphed

__version__ = "1.0.0"


def register_auto_classes():
    """Make `AutoConfig`, `AutoModel`, ... return this package's classes for `poolformer` and `metaformer`."""
    processors = {"torchvision": PoolFormerImageProcessor, "pil": PoolFormerImageProcessorPil}
    for config_class in (MetaFormerConfig, PoolFormerConfig):
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        transformers.AutoImageProcessor.register(config_class, image_processor_classes=processors, exist_ok=True)
    for auto_class, model_classes in AUTO_CLASSES.items():
        for model_class in model_classes:
            getattr(transformers, auto_class).register(model_class.config_class, model_class, exist_ok=True)
    # The image-segmentation pipeline tries this one first: the architecture in the saved configuration decides.
    kinds = [AUTO_CLASSES[task.auto_class] for task in tasks_of_pipeline("image-segmentation")]
    for model_classes in zip(*kinds, strict=True):
        config_class = model_classes[0].config_class
        transformers.AutoModelForImageSegmentation.register(config_class, model_classes, exist_ok=True)
    # The pipelines of dense tasks merge tables of class names, and call other classes unsupported. The keys are no
    # model types, so that nothing else reads them.
    for task in (TASKS[name] for name in dense_tasks()):
        table = "_".join(["MODEL", *re.findall("[A-Z][a-z]+", task.head), "MAPPING_NAMES"]).upper()
        names = tuple(model_class.__name__ for model_class in AUTO_CLASSES[task.auto_class])
        getattr(modeling_auto, table, {})[f"hf_poolformer {task.name}"] = names
    # The built-in model reads our folders, and saves no code that an `auto_map` from there could name.
    BuiltInConfig.to_json_file = write_json


register_auto_classes()
register_pipelines()


def __getattr__(name: str) -> Any:
    """What nobody needs to use a model is imported when it is first asked for."""
    if name == "gradcam":
        from .explanation.gradcam import gradcam

        return gradcam
    if name == "graphed":
        from .foundation.graphs import graphed

        return graphed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "TOKEN_MIXERS",
    "VARIANTS",
    "MetaFormerBackbone",
    "MetaFormerConfig",
    "MetaFormerForImageClassification",
    "MetaFormerForInstanceSegmentation",
    "MetaFormerForObjectDetection",
    "MetaFormerForSemanticSegmentation",
    "MetaFormerModel",
    "PoolFormerBackbone",
    "PoolFormerConfig",
    "PoolFormerForImageClassification",
    "PoolFormerForInstanceSegmentation",
    "PoolFormerForObjectDetection",
    "PoolFormerForSemanticSegmentation",
    "PoolFormerImageProcessor",
    "PoolFormerImageProcessorPil",
    "PoolFormerModel",
    "gradcam",
    "graphed",
]
