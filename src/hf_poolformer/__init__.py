"""
PoolFormer and the MetaFormer family as Hugging Face models.

Importing this package registers its classes with transformers' Auto classes; for `poolformer` they take the place of
the built-in ones.
"""

import transformers

from .configuration_poolformer import VARIANTS, MetaFormerConfig, PoolFormerConfig
from .image_processing_poolformer import PoolFormerImageProcessor, PoolFormerImageProcessorPil
from .modeling_poolformer import (
    AUTO_CLASSES,
    MetaFormerBackbone,
    MetaFormerForImageClassification,
    MetaFormerModel,
    PoolFormerBackbone,
    PoolFormerForImageClassification,
    PoolFormerModel,
)
from .token_mixers import TOKEN_MIXERS


__version__ = "0.1.0"


def register_auto_classes():
    """Make `AutoConfig`, `AutoModel`, ... return this package's classes for `poolformer` and `metaformer`."""
    processors = {"torchvision": PoolFormerImageProcessor, "pil": PoolFormerImageProcessorPil}
    for config_class in (MetaFormerConfig, PoolFormerConfig):
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        transformers.AutoImageProcessor.register(config_class, image_processor_classes=processors, exist_ok=True)
    for auto_class, model_classes in AUTO_CLASSES.items():
        for model_class in model_classes:
            getattr(transformers, auto_class).register(model_class.config_class, model_class, exist_ok=True)


register_auto_classes()

__all__ = [
    "TOKEN_MIXERS",
    "VARIANTS",
    "MetaFormerBackbone",
    "MetaFormerConfig",
    "MetaFormerForImageClassification",
    "MetaFormerModel",
    "PoolFormerBackbone",
    "PoolFormerConfig",
    "PoolFormerForImageClassification",
    "PoolFormerImageProcessor",
    "PoolFormerImageProcessorPil",
    "PoolFormerModel",
]
