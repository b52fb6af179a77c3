"""Configurations of PoolFormer and the MetaFormer family, and the table of published variants.

Sources: *MetaFormer Is Actually What You Need for Vision* (arXiv 2111.11418) for PoolFormer v1 and its hybrids,
*MetaFormer Baselines for Vision* (arXiv 2210.13452) for the families with StarReLU and ResScale.
"""

import copy
import difflib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import logging


logger = logging.get_logger(__name__)

MAX_LABELS = 10_000_000
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
NORM_NAMES = ("group_norm", "layer_norm", "batch_norm", "none")

# What a number must be: in words, and as a test that NaN fails.
Rule = tuple[str, Callable[[Any], bool]]
COUNT: Rule = ("1 or more", lambda x: x >= 1)
COUNT_OR_NONE: Rule = ("0 or more", lambda x: x >= 0)
POSITIVE: Rule = ("more than 0 and finite", lambda x: 0 < x < math.inf)
NOT_NEGATIVE: Rule = ("0 or more, and finite", lambda x: 0 <= x < math.inf)
FINITE: Rule = ("finite", lambda x: x is None or math.isfinite(x))
SHARE: Rule = ("in [0, 1]", lambda x: 0 <= x <= 1)
RATE: Rule = ("in [0, 1)", lambda x: 0 <= x < 1)


def check_numbers(config: PreTrainedConfig, rules: dict[str, Rule]):
    """Raises ValueError for the first field that breaks its rule; of a list, every entry must keep it."""
    for name, (words, keeps) in rules.items():
        value = getattr(config, name)
        if not all(map(keeps, value if isinstance(value, list | tuple) else [value])):
            raise ValueError(f"{name} must be {words}, got {value!r}")


def check_name(field: str, name: str, known: Iterable[str]):
    """Raises ValueError for a name that is not among the known ones; the message begins with the nearest."""
    known = tuple(known)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown {field} {name!r}: not one of {', '.join(known)}.{guess}")


def write_json(self: PreTrainedConfig, json_file_path: str | os.PathLike, use_diff: bool = True):
    """
    As transformers', but `auto_map` names no code that is not there.

    A configuration keeps the `auto_map` of the folder it was read from, and where it is saved again nobody may have
    copied that code: transformers' own PoolFormer, or a configuration alone.
    """
    folder, written = Path(json_file_path).parent, self
    if getattr(self, "auto_map", None) is not None:
        written = copy.copy(self)
        written.auto_map = {
            name: place
            for name, place in self.auto_map.items()
            if not isinstance(place, str) or "--" in place or (folder / f"{place.split('.')[0]}.py").is_file()
        }
        if not written.auto_map:
            del written.auto_map
    PreTrainedConfig.to_json_file(written, json_file_path, use_diff=use_diff)


class DenseHeadConfig(PreTrainedConfig):
    r"""
    The part of a configuration that only the heads for segmentation and detection read; the classifier has none of it.

    Defaults are the first paper's (its configurations for mmdetection and mmsegmentation). A field is saved only where
    it differs from its default, so that the JSON of a classifier keeps exactly the keys of the built-in PoolFormer.

    Args:
        fpn_feature_size (`int`, *optional*, defaults to 256):
            Channels of the feature pyramid, and of the convolutions of the detection and mask heads.
        decoder_hidden_size (`int`, *optional*, defaults to 128):
            Channels of the Semantic FPN head.
        classifier_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout of whole channels before the last convolution of the Semantic FPN head.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels that the loss of semantic segmentation leaves out.
        anchor_ratios (`list[float]`, *optional*, defaults to `[0.5, 1.0, 2.0]`):
            Height over width of the anchors, of RetinaNet and the region proposal network.
        retinanet_anchor_scale (`float`, *optional*, defaults to 4.0):
            Side of RetinaNet's smallest square anchor of a level, in strides of that level.
        retinanet_scales_per_octave (`int`, *optional*, defaults to 3):
            Anchor sizes of a level, evenly spaced up to twice the smallest.
        retinanet_positive_iou, retinanet_negative_iou (`float`, *optional*, defaults to 0.5 and 0.4):
            Overlap from which an anchor is an object, and below which it is background.
        focal_alpha, focal_gamma (`float`, *optional*, defaults to 0.25 and 2.0):
            Of RetinaNet's focal loss.
        rpn_anchor_scale (`float`, *optional*, defaults to 8.0):
            Side of the square anchors of the region proposal network, in strides.
        rpn_positive_iou, rpn_negative_iou (`float`, *optional*, defaults to 0.7 and 0.3):
            Overlap from which its anchor is an object, and below which it is background.
        rpn_batch_size (`int`, *optional*, defaults to 256), rpn_positive_fraction (`float`, defaults to 0.5):
            Anchors per image that enter its loss, and the share of objects among them at most.
        rpn_nms_threshold (`float`, *optional*, defaults to 0.7), rpn_num_proposals (`int`, defaults to 1000):
            Overlap above which the weaker proposal goes, and how many stay per image.
        roi_positive_iou (`float`, *optional*, defaults to 0.5):
            Overlap from which a proposal is an object.
        roi_batch_size (`int`, *optional*, defaults to 512), roi_positive_fraction (`float`, defaults to 0.25):
            Proposals per image that enter the loss of the box head, and the share of objects among them at most.
        box_head_hidden_size (`int`, *optional*, defaults to 1024):
            Channels of the two linear layers of the box head.
        mask_head_num_convs (`int`, *optional*, defaults to 4):
            Convolutions of the mask head before it doubles the resolution.
        score_threshold, nms_threshold (`float`, *optional*, defaults to 0.05 and 0.5):
            Of detections: score from which they count, overlap above which the weaker of one class goes.
        max_detections (`int`, *optional*, defaults to 100):
            Detections per image.
    """

    fpn_feature_size: int = 256
    decoder_hidden_size: int = 128
    classifier_dropout_prob: float | int = 0.1
    semantic_loss_ignore_index: int = 255
    anchor_ratios: list[float] | tuple[float, ...] = (0.5, 1.0, 2.0)
    retinanet_anchor_scale: float | int = 4.0
    retinanet_scales_per_octave: int = 3
    retinanet_positive_iou: float = 0.5
    retinanet_negative_iou: float = 0.4
    focal_alpha: float = 0.25
    focal_gamma: float | int = 2.0
    rpn_anchor_scale: float | int = 8.0
    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3
    rpn_batch_size: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_nms_threshold: float = 0.7
    rpn_num_proposals: int = 1000
    roi_positive_iou: float = 0.5
    roi_batch_size: int = 512
    roi_positive_fraction: float = 0.25
    box_head_hidden_size: int = 1024
    mask_head_num_convs: int = 4
    score_threshold: float | int = 0.05
    nms_threshold: float | int = 0.5
    max_detections: int = 100

    def validate_dense_heads(self):
        check_numbers(self, DENSE_RULES)
        for kind in ("retinanet", "rpn"):
            negative, positive = (getattr(self, f"{kind}_{sign}_iou") for sign in ("negative", "positive"))
            if negative > positive:
                raise ValueError(
                    f"{kind}_negative_iou must be at most {kind}_positive_iou={positive}, got {negative}: an anchor "
                    "would be background and object"
                )
        if not self.anchor_ratios:
            raise ValueError("anchor_ratios must have one entry at least")

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for name in DenseHeadConfig.__annotations__:
            default = getattr(DenseHeadConfig, name)
            if output.get(name) == (list(default) if isinstance(default, tuple) else default):
                del output[name]
        return output


DENSE_RULES: dict[str, Rule] = {
    "fpn_feature_size": COUNT,
    "decoder_hidden_size": COUNT,
    "classifier_dropout_prob": RATE,
    "anchor_ratios": POSITIVE,
    "retinanet_anchor_scale": POSITIVE,
    "retinanet_scales_per_octave": COUNT,
    "retinanet_positive_iou": SHARE,
    "retinanet_negative_iou": SHARE,
    "focal_alpha": SHARE,
    "focal_gamma": NOT_NEGATIVE,
    "rpn_anchor_scale": POSITIVE,
    "rpn_positive_iou": SHARE,
    "rpn_negative_iou": SHARE,
    "rpn_batch_size": COUNT,
    "rpn_positive_fraction": SHARE,
    "rpn_nms_threshold": SHARE,
    "rpn_num_proposals": COUNT,
    "roi_positive_iou": SHARE,
    "roi_batch_size": COUNT,
    "roi_positive_fraction": SHARE,
    "box_head_hidden_size": COUNT,
    "mask_head_num_convs": COUNT_OR_NONE,
    "score_threshold": SHARE,
    "nms_threshold": SHARE,
    "max_detections": COUNT,
}
RULES: dict[str, Rule] = {
    "num_channels": COUNT,
    "num_encoder_blocks": COUNT,
    "depths": COUNT,
    "hidden_sizes": COUNT,
    "patch_sizes": COUNT,
    "strides": COUNT,
    "padding": COUNT_OR_NONE,
    "attention_head_dim": COUNT,
    "mlp_ratio": POSITIVE,
    "norm_eps": POSITIVE,
    "layer_scale_init_value": FINITE,
    "res_scale_init_values": FINITE,
    "drop_path_rate": RATE,
    "head_dropout": RATE,
    "initializer_range": NOT_NEGATIVE,
}


@strict
class MetaFormerConfig(BackboneConfigMixin, DenseHeadConfig):
    r"""
    Configuration of any MetaFormer: four stages of blocks `norm, token mixer, residual; norm, channel MLP, residual`.

    Args:
        num_channels (`int`, *optional*, defaults to 3):
            Channels of `pixel_values`.
        image_size (`int` or `list[int]`, *optional*, defaults to 224):
            Height and width in pixels the model is built for. Only mixers with a fixed number of tokens
            (`spatial_mlp`, `random`) and position embeddings depend on it; all else takes any resolution.
        depths, hidden_sizes (`list[int]`, *optional*):
            Blocks and channels per stage. Defaults to S12.
        patch_sizes, strides, padding (`list[int]`, *optional*):
            Kernel, stride and padding in pixels of the convolution that opens each stage.
        num_encoder_blocks (`int`, *optional*, defaults to 4):
            Number of stages.
        token_mixers (`list[str]`, *optional*):
            One key of `TOKEN_MIXERS` per stage.
        pool_size (`int`, *optional*, defaults to 3):
            Window of the pooling mixer in tokens; odd.
        attention_head_dim (`int`, *optional*, defaults to 32):
            Channels per head of the attention mixer.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Hidden channels of the MLP per channel of the stage.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            A key of transformers' `ACT2FN`, `"star_relu"` or `"squared_relu"`.
        norm_layer (`str`, *optional*, defaults to `"group_norm"`):
            Norm of the blocks: `"group_norm"` (one group), `"layer_norm"` (over channels), `"batch_norm"`, `"none"`.
        norm_bias (`bool`, *optional*, defaults to `True`), norm_eps (`float`, *optional*, defaults to 1e-5):
            Shift and epsilon of the norms.
        use_bias (`bool`, *optional*, defaults to `True`):
            Biases of the MLP and of the attention's output projection.
        embedding_norm (`str`, *optional*, defaults to `"none"`):
            Norm after the stem convolution and before each later one (`"layer_norm"` in the second paper).
        use_residual, use_mlp (`bool`, *optional*, defaults to `True`):
            Whether blocks have their shortcuts and their MLP (off only in ablations).
        use_layer_scale (`bool`, *optional*, defaults to `True`), layer_scale_init_value (`float`, defaults to 1e-5):
            Learned per-channel scale of each residual branch.
        res_scale_init_values (`list[float | None]`, *optional*):
            Per stage, initial value of the learned per-channel scale of the shortcuts; `None` for none.
        position_embeddings (`list[bool]`, *optional*):
            Per stage, whether a learned position embedding is added before its blocks.
        head_norm_first (`bool`, *optional*, defaults to `True`):
            Classifier order: block norm then global mean (first paper), or global mean then LayerNorm (second).
        head_type (`str`, *optional*, defaults to `"linear"`):
            `"linear"` or `"mlp"` (fc, squared ReLU, LayerNorm, fc).
        head_dropout (`float`, *optional*, defaults to 0.0):
            Dropout before the classifier's last layer; saved where it is not 0.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            DropPath of the last block; grows linearly with depth from 0.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal initialisation.
        kernels (`str`, *optional*):
            Who computes the blocks: `"auto"`, `"cpu"`, `"triton"` or `"reference"`, see `backends.py`. The environment
            variable `HF_POOLFORMER_KERNELS` overrides it. `None` is `"auto"`, and is not saved.
        label_thresholds (`list[float]`, *optional*):
            Of a model that gives an image any number of classes, per class the probability from which an image has
            it; nothing in the model reads them. `None` is 0.5 for each class, and is not saved.
        out_features (`list[str]`, *optional*), out_indices (`list[int]`, *optional*):
            Feature maps of the backbone, out of `"stem"`, `"stage1"`, ... `"stage4"`. Defaults to the last.

    Segmenters and detectors read the fields of [`DenseHeadConfig`] besides.

    Example:

    ```python
    >>> from hf_poolformer import MetaFormerConfig, MetaFormerModel

    >>> config = MetaFormerConfig(token_mixers=["pooling", "pooling", "attention", "attention"])
    >>> model = MetaFormerModel(config)
    ```"""

    model_type = "metaformer"
    # First word of the names of a checkpoint's tensors.
    state_prefix: ClassVar[str] = "metaformer"

    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] = 224
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 320, 512)
    patch_sizes: list[int] | tuple[int, ...] = (7, 3, 3, 3)
    strides: list[int] | tuple[int, ...] = (4, 2, 2, 2)
    padding: list[int] | tuple[int, ...] = (2, 1, 1, 1)
    num_encoder_blocks: int = 4
    token_mixers: list[str] | tuple[str, ...] = ("pooling", "pooling", "pooling", "pooling")
    pool_size: int = 3
    attention_head_dim: int = 32
    mlp_ratio: float | int = 4.0
    hidden_act: str = "gelu"
    norm_layer: str = "group_norm"
    norm_bias: bool = True
    norm_eps: float = 1e-5
    use_bias: bool = True
    embedding_norm: str = "none"
    use_residual: bool = True
    use_mlp: bool = True
    use_layer_scale: bool = True
    layer_scale_init_value: float = 1e-5
    res_scale_init_values: list[float | None] | tuple[float | None, ...] = (None, None, None, None)
    position_embeddings: list[bool] | tuple[bool, ...] = (False, False, False, False)
    head_norm_first: bool = True
    head_type: str = "linear"
    head_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    kernels: Literal["auto", "cpu", "triton", "reference"] | None = None
    label_thresholds: list[float | int] | tuple[float | int, ...] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Code of a subclass is saved if it was registered itself.
        cls._auto_class = None

    def __post_init__(self, **kwargs):
        # Derived from depths, so never read from JSON.
        kwargs.pop("stage_names", None)
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, len(self.depths) + 1))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        self.check_labels(kwargs.get("num_labels"))
        self.warn_of_misspellings(kwargs)
        super().__post_init__(**kwargs)
        if self.id2label is not None and self.label2id is None:
            self.label2id = {name: index for index, name in self.id2label.items()}

    def check_labels(self, num_labels: Any):
        """Raises ValueError unless `num_labels`, where given, is a number of classes and the one of `id2label`."""
        if self.id2label is not None:
            try:
                [int(index) for index in dict(self.id2label)]
            except (AttributeError, TypeError, ValueError):
                raise ValueError(f"id2label must map indices to names, got {str(self.id2label)[:100]}") from None
        if num_labels is None:
            return
        if not isinstance(num_labels, int) or isinstance(num_labels, bool) or num_labels < 0:
            raise ValueError(f"num_labels must be a whole number, 0 or more, got {num_labels!r}")
        if num_labels > MAX_LABELS:
            # transformers would write down a name for each.
            raise ValueError(f"num_labels={num_labels} is more than {MAX_LABELS}")
        if self.id2label is not None and len(self.id2label) != num_labels:
            raise ValueError(
                f"num_labels={num_labels}, but id2label names {len(self.id2label)} classes: give one of the two"
            )

    @classmethod
    def own_fields(cls) -> set[str]:
        """Names of the fields that transformers' configurations in general do not have."""
        return set(cls.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)

    @classmethod
    def warn_of_misspellings(cls, names: Iterable[str]):
        """Names that are no fields are kept, as checkpoints have such keys; but not in silence if nearly a field."""
        known = cls.own_fields() | {
            "num_labels",
            "id2label",
            "label2id",
            "problem_type",
            "out_features",
            "out_indices",
        }
        for name in names:
            # Old configurations have keys of their own (`layer_norm_eps`, `drop_rate`), which are no misspellings.
            alike = [field for field in known if field[0] == name[:1] and abs(len(field) - len(name)) <= 2]
            near = difflib.get_close_matches(name, alike, n=1, cutoff=0.72)
            if near and name not in known and not hasattr(cls, name):
                logger.warning(
                    f"{cls.__name__} has no field {name!r}, and nothing reads it. Did you mean {near[0]!r}?"
                )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        try:
            return cls.translate(config_dict), kwargs
        except ValueError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: {error}") from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "MetaFormerConfig":
        """
        As transformers', with overrides in `kwargs` that are checked like all values.

        Args:
            config_dict: as `to_dict` gives it, or `config.json` holds it.
            kwargs: fields to set otherwise.

        Raises:
            ValueError: for values that make no configuration, and for the configuration of another architecture.
        """
        config_dict = cls.translate(config_dict)
        try:
            if "id2label" in kwargs or kwargs.get("num_labels") not in (None, len(config_dict.get("id2label") or ())):
                # Of other classes.
                for name in ("id2label", "label2id", "label_thresholds"):
                    config_dict.pop(name, None)
            chosen = cls.own_fields() | {"id2label", "label2id", "problem_type"}
            config_dict |= {name: kwargs.pop(name) for name in chosen & kwargs.keys()}
            cls.warn_of_misspellings(kwargs)
            result = super().from_dict(config_dict, **kwargs)
            config = result[0] if isinstance(result, tuple) else result
            config.validate()
            return result
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"this is no configuration of a {cls.model_type}: {text}") from error

    @classmethod
    def translate(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """
        A copy of the values of a configuration, with those of the package's other model type as this class's.

        Every PoolFormer v1 is a MetaFormer; a MetaFormer may be a PoolFormer v1.

        Raises:
            ValueError: another architecture.
        """
        model_type, values = config_dict.get("model_type"), dict(config_dict)
        if model_type in (None, cls.model_type):
            return values
        if model_type == cls.state_prefix:  # of a subclass's parent
            return values | {"model_type": cls.model_type}
        if model_type in (MetaFormerConfig.model_type, PoolFormerConfig.model_type):
            # What the other class did not read must not begin to count, and its code is not this one's.
            unread = {*FIXED, "image_size", "patch_size", "stride", "architectures", "auto_map"}
            if cls.state_prefix == PoolFormerConfig.state_prefix:
                check_is_poolformer(values)
            return {name: value for name, value in values.items() if name not in unread} | {
                "model_type": cls.model_type
            }
        nested = any(isinstance(v, dict) and v.get("model_type") == cls.model_type for v in values.values())
        if model_type in CONFIG_MAPPING_NAMES and not nested:
            raise ValueError(f"this is the configuration of a {model_type}, not of a {cls.model_type}")
        return values

    to_json_file = write_json

    def validate_numbers(self):
        check_numbers(self, RULES)
        for dim, mixer in zip(self.hidden_sizes, self.token_mixers, strict=False):
            if mixer == "attention" and dim > self.attention_head_dim and dim % self.attention_head_dim:
                logger.warning_once(
                    f"attention_head_dim={self.attention_head_dim} does not divide hidden_sizes={self.hidden_sizes}: "
                    f"attention over {dim} channels has {dim // self.attention_head_dim} heads, and fewer channels."
                )
            if int(dim * self.mlp_ratio) < 1:
                raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves an MLP over {dim} channels without hidden ones")

    def validate_names(self):
        check_name("norm_layer", self.norm_layer, NORM_NAMES)
        check_name("embedding_norm", self.embedding_norm, NORM_NAMES)
        check_name("head_type", self.head_type, ("linear", "mlp"))
        if self.problem_type is not None:
            check_name("problem_type", self.problem_type, PROBLEM_TYPES)

    def validate_image_size(self):
        size = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"image_size must be a number of pixels, or height and width, got {self.image_size!r}")

    def validate_labels(self):
        """Names without a gap: class i of the logits has the i-th."""
        if self.id2label is not None and {str(key) for key in self.id2label} != set(map(str, range(self.num_labels))):
            raise ValueError(
                f"id2label must name the classes 0 to {self.num_labels - 1}, got {list(self.id2label)[:20]}"
            )

    def validate_label_thresholds(self):
        """One per class."""
        if self.label_thresholds is None:
            return
        check_numbers(self, {"label_thresholds": SHARE})
        if len(self.label_thresholds) != self.num_labels:
            raise ValueError(
                f"label_thresholds has {len(self.label_thresholds)} entries but num_labels={self.num_labels}"
            )

    def validate_stages(self):
        """Every per-stage list has one entry per stage; of kernels, strides and paddings more are left unused."""
        exact = ("depths", "hidden_sizes", "token_mixers", "res_scale_init_values", "position_embeddings")
        for name in (*exact, "patch_sizes", "strides", "padding"):
            value = getattr(self, name)
            if len(value) < self.num_encoder_blocks or (name in exact and len(value) > self.num_encoder_blocks):
                raise ValueError(
                    f"{name} has {len(value)} entries but num_encoder_blocks={self.num_encoder_blocks}: {value}"
                )

    def validate_pool_size(self):
        """An even window would change the number of tokens."""
        if self.pool_size < 1 or self.pool_size % 2 == 0:
            raise ValueError(f"pool_size must be odd and positive, got {self.pool_size}")

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        # The built-in PoolFormer has no such keys.
        for name in ("kernels", "label_thresholds"):
            if output.get(name) is None:
                output.pop(name, None)
        if not output.get("head_dropout"):
            output.pop("head_dropout", None)
        return output

    @property
    def drop_path_rates(self) -> list[list[float]]:
        """Per stage and block: `drop_path_rate * index / (L - 1)`, the official linear rule."""
        last = max(sum(self.depths) - 1, 1)
        rates = iter([self.drop_path_rate * index / last for index in range(sum(self.depths))])
        return [[next(rates) for _ in range(depth)] for depth in self.depths]

    def stage_resolution(self, stage: int) -> tuple[int, int]:
        """Height and width in tokens of `stage` (0-based) for an input of `image_size`."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        for i in range(stage + 1):
            kernel, stride, padding = self.patch_sizes[i], self.strides[i], self.padding[i]
            height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
        if min(height, width) < 1:
            raise ValueError(f"image_size={size} leaves nothing of an image in stage {stage + 1}")
        return height, width

    @staticmethod
    def from_variant(name: str, **overrides: Any) -> "MetaFormerConfig":
        """
        Configuration of a published variant, a row of `VARIANTS`.

        Args:
            name: for instance `"poolformer_s12"`.
            overrides: fields to set otherwise, for instance `num_labels=10`.

        Raises:
            ValueError: for an unknown name; the message lists the nearest ones.
        """
        if name not in VARIANTS:
            near = difflib.get_close_matches(name, VARIANTS, n=3) or list(VARIANTS)
            raise ValueError(f"Unknown variant {name!r}. Did you mean one of {', '.join(near)}?")
        variant = VARIANTS[name]
        config_class = PoolFormerConfig if variant.model_type == "poolformer" else MetaFormerConfig
        # Given labels come with their number.
        labels = {} if "id2label" in overrides else {"num_labels": variant.num_labels}
        return config_class(**{**labels, **variant.config, **overrides})


class Fixed:
    """
    A constant of an architecture where its parent has a field.

    Assignment keeps the value for serialisation but never changes what is read: checkpoints carry keys their model
    never used, and such a stray key must survive a round trip without changing the function.
    """

    def __init__(self, value: Any, per_stage: bool = False):
        self.value = value
        self.per_stage = per_stage

    def __set_name__(self, owner: type, name: str):
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return (self.value,) * (instance or owner).num_encoder_blocks if self.per_stage else self.value

    def __set__(self, instance: Any, value: Any):
        logger.warning_once(
            f"PoolFormer v1 has {self.name}={self.value!r}; {value!r} is kept in the configuration but not used. "
            "Other architectures are MetaFormerConfig's."
        )
        instance.__dict__[self.name] = value


@strict
class PoolFormerConfig(MetaFormerConfig):
    r"""
    Configuration of PoolFormer v1: a [`MetaFormerConfig`] with pooling in every stage and GroupNorm(1), eps 1e-5.

    Its JSON has exactly the keys of transformers' built-in `PoolFormerConfig`, so that a checkpoint saved by either
    loads in the other. `patch_size` and `stride` are such keys: nothing reads them. Published checkpoints, such as
    [sail/poolformer_s12](https://huggingface.co/sail/poolformer_s12), load as they are.

    Example:

    ```python
    >>> from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification

    >>> config = PoolFormerConfig.from_variant("poolformer_s12")
    >>> model = PoolFormerForImageClassification(config)
    ```"""

    model_type = "poolformer"
    state_prefix: ClassVar[str] = "poolformer"

    patch_size: int | list[int] | tuple[int, int] = 16
    stride: int = 16

    image_size: ClassVar[Any] = None
    token_mixers: ClassVar[Any] = Fixed("pooling", per_stage=True)
    attention_head_dim: ClassVar[Any] = Fixed(32)
    norm_layer: ClassVar[Any] = Fixed("group_norm")
    norm_bias: ClassVar[Any] = Fixed(True)
    norm_eps: ClassVar[Any] = Fixed(1e-5)
    use_bias: ClassVar[Any] = Fixed(True)
    embedding_norm: ClassVar[Any] = Fixed("none")
    use_residual: ClassVar[Any] = Fixed(True)
    use_mlp: ClassVar[Any] = Fixed(True)
    res_scale_init_values: ClassVar[Any] = Fixed(None, per_stage=True)
    position_embeddings: ClassVar[Any] = Fixed(False, per_stage=True)
    head_norm_first: ClassVar[Any] = Fixed(True)
    head_type: ClassVar[Any] = Fixed("linear")
    head_dropout: ClassVar[Any] = Fixed(0.0)

    def validate_image_size(self):
        """Nothing reads it."""

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output.pop("stage_names", None)
        if output.get("out_indices") == [self.num_encoder_blocks]:
            del output["out_features"], output["out_indices"]
        return output


FIXED = {name: value for name, value in vars(PoolFormerConfig).items() if isinstance(value, Fixed)}


def check_is_poolformer(config_dict: dict[str, Any]):
    """Raises ValueError unless the values of a MetaFormer's configuration are those of a PoolFormer v1."""
    config = MetaFormerConfig.from_dict(config_dict)
    # Heads of attention, of which there is none if all else agrees.
    for name in FIXED.keys() - {"attention_head_dim"}:
        value, wanted = getattr(config, name), FIXED[name].value
        if any(x != wanted for x in (value if FIXED[name].per_stage else [value])):
            raise ValueError(
                f"this metaformer is no PoolFormer v1: its {name} is {value!r}, which would have to be {wanted!r}. "
                "MetaFormerConfig and the MetaFormer classes load it, and so do the Auto classes."
            )


@dataclass(frozen=True)
class Family:
    """
    What the variants of one architecture have in common.

    Attributes:
        config: fields of the configuration that differ from the defaults; depths and widths are the variant's.
        sizes: size -> (depths, hidden sizes).
        source: address of the original checkpoints, with `{name}` for the variant's name.
        crop_pct: share of the resized short side that evaluation crops.
        in_timm: whether timm has the architecture under the same name.
    """

    config: dict[str, Any]
    sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    source: str
    crop_pct: float
    in_timm: bool = False


@dataclass(frozen=True)
class Variant:
    """
    Facts of one published checkpoint.

    Attributes:
        config: fields of its configuration that differ from the defaults of its class.
        family: a key of `FAMILIES`.
        model_type: `"poolformer"` or `"metaformer"`.
        crop_pct: share of the resized short side that evaluation crops.
        image_size: pixels of its evaluation crop.
        num_labels: classes of its head: 1000 of ImageNet-1K, 21841 of ImageNet-21K.
        drop_path_rate: stochastic depth it was trained with; `None` where its authors published none.
        head_dropout: dropout of its MLP head in training; `None` where its authors published none. 0 for linear heads.
        top1: published ImageNet-1K accuracy in percent; `None` for a head of ImageNet-21K.
        source: address of the original checkpoint.
        timm_name: `architecture.tag` of the same weights in timm; `None` where timm has none.
    """

    config: dict[str, Any]
    family: str
    model_type: str
    crop_pct: float
    image_size: int
    num_labels: int
    drop_path_rate: float | None
    head_dropout: float | None
    top1: float | None
    source: str
    timm_name: str | None


SMALL, MEDIUM = (64, 128, 320, 512), (96, 192, 384, 768)
SIZES = {
    "s12": ((2, 2, 6, 2), SMALL),
    "s24": ((4, 4, 12, 4), SMALL),
    "s36": ((6, 6, 18, 6), SMALL),
    "m36": ((6, 6, 18, 6), MEDIUM),
    "m48": ((8, 8, 24, 8), MEDIUM),
}
CONV_SIZES = {
    "s18": ((3, 3, 9, 3), SMALL),
    "s36": ((3, 12, 18, 3), SMALL),
    "m36": ((3, 12, 18, 3), (96, 192, 384, 576)),
    "b36": ((3, 12, 18, 3), (128, 256, 512, 768)),
}

FIRST_PAPER = "https://github.com/sail-sg/poolformer/releases/download/v1.0/"
SECOND_PAPER = "https://huggingface.co/sail/dl/resolve/main/"

# arXiv 2210.13452, section 3.
BASELINE = {
    "norm_bias": False,
    "norm_eps": 1e-6,
    "hidden_act": "star_relu",
    "use_bias": False,
    "embedding_norm": "layer_norm",
    "use_layer_scale": False,
    "res_scale_init_values": (None, None, 1.0, 1.0),
    "head_norm_first": False,
}
CONV_BASELINE = {**BASELINE, "norm_layer": "layer_norm", "head_type": "mlp"}

POOL, IDENTITY, ATTENTION, SPATIAL, RANDOM, CONV = (
    "pooling",
    "identity",
    "attention",
    "spatial_mlp",
    "random",
    "separable_conv",
)


def _hybrid(crop_pct: float, *token_mixers: str, position: int | None = None) -> Family:
    """A hybrid of the first paper; with attention, `position` is the stage that adds a position embedding."""
    config: dict[str, Any] = {"token_mixers": token_mixers}
    if position is not None:
        config["norm_layer"] = "layer_norm"
        config["position_embeddings"] = tuple(stage == position for stage in range(4))
    return Family(config, SIZES, FIRST_PAPER + "{name}_224.pth.tar", crop_pct)


def _baseline(family: str, *token_mixers: str, in_timm: bool = True) -> Family:
    """A family of the second paper."""
    conv = CONV in token_mixers
    config = {**(CONV_BASELINE if conv else BASELINE), "token_mixers": token_mixers}
    return Family(config, CONV_SIZES if conv else SIZES, f"{SECOND_PAPER}{family}/{{name}}.pth", 1.0, in_timm)


FAMILIES: dict[str, Family] = {
    "poolformer": Family({}, SIZES, FIRST_PAPER + "{name}.pth.tar", 0.9, in_timm=True),
    "metaformer_id": Family({"token_mixers": (IDENTITY,) * 4}, SIZES, FIRST_PAPER + "{name}.pth.tar", 0.9),
    "metaformer_pppa": _hybrid(0.95, POOL, POOL, POOL, ATTENTION, position=3),
    "metaformer_ppaa": _hybrid(0.95, POOL, POOL, ATTENTION, ATTENTION, position=2),
    "metaformer_pppf": _hybrid(0.9, POOL, POOL, POOL, SPATIAL),
    "metaformer_ppff": _hybrid(0.95, POOL, POOL, SPATIAL, SPATIAL),
    "identityformer": _baseline("identityformer", *[IDENTITY] * 4, in_timm=False),
    "randformer": _baseline("randformer", IDENTITY, IDENTITY, RANDOM, RANDOM, in_timm=False),
    "poolformerv2": _baseline("poolformerv2", *[POOL] * 4),
    "convformer": _baseline("convformer", *[CONV] * 4),
    "caformer": _baseline("caformer", CONV, CONV, ATTENTION, ATTENTION),
}
"""The architectures of the two papers, by name."""

# What a checkpoint was trained on, by the suffix of its name: pixels, classes, timm's tag. `_in21ft1k`: pretrained on
# ImageNet-21K, fine-tuned on ImageNet-1K.
TRAININGS = {
    "": (224, 1000, "sail_in1k"),
    "_384": (384, 1000, "sail_in1k_384"),
    "_in21ft1k": (224, 1000, "sail_in22k_ft_in1k"),
    "_384_in21ft1k": (384, 1000, "sail_in22k_ft_in1k_384"),
    "_in21k": (224, 21841, "sail_in22k"),
}

# Per checkpoint: top-1; DropPath in training; of MLP heads, their dropout in training. Top-1: README of
# sail-sg/poolformer and sail-sg/metaformer; of the metaformer_* hybrids, table 5 of arXiv 2111.11418. DropPath and
# dropout: README of the first, scripts/ of the second repository (randformer_m48 is 0.3 there), which say nothing
# about the hybrids and about training on ImageNet-21K.
# fmt: off
RESULTS: dict[str, dict[str, dict[str, tuple[float | None, ...]]]] = {
    "poolformer": {
        "s12": {"": (77.2, 0.1)}, "s24": {"": (80.3, 0.1)}, "s36": {"": (81.4, 0.2)},
        "m36": {"": (82.1, 0.3)}, "m48": {"": (82.5, 0.4)},
    },
    "metaformer_id": {"s12": {"": (74.3, None)}},
    "metaformer_pppa": {"s12": {"": (78.3, None)}},
    "metaformer_ppaa": {"s12": {"": (81.0, None)}},
    "metaformer_pppf": {"s12": {"": (77.5, None)}},
    "metaformer_ppff": {"s12": {"": (77.9, None)}},
    "identityformer": {
        "s12": {"": (74.6, 0.1)}, "s24": {"": (78.2, 0.1)}, "s36": {"": (79.3, 0.2)},
        "m36": {"": (80.0, 0.3)}, "m48": {"": (80.4, 0.4)},
    },
    "randformer": {
        "s12": {"": (76.6, 0.1)}, "s24": {"": (78.2, 0.1)}, "s36": {"": (79.5, 0.2)},
        "m36": {"": (81.2, 0.3)}, "m48": {"": (81.4, 0.3)},
    },
    "poolformerv2": {
        "s12": {"": (78.0, 0.1)}, "s24": {"": (80.7, 0.1)}, "s36": {"": (81.6, 0.2)},
        "m36": {"": (82.2, 0.3)}, "m48": {"": (82.6, 0.4)},
    },
    "convformer": {
        size: dict(zip(TRAININGS, results, strict=True)) for size, *results in (
            ("s18", (83.0, 0.2, 0.0), (84.4, 0.3, 0.4), (83.7, None, None), (85.0, None, None), (None, None, None)),
            ("s36", (84.1, 0.3, 0.0), (85.4, 0.5, 0.4), (85.4, None, None), (86.4, None, None), (None, None, None)),
            ("m36", (84.5, 0.4, 0.0), (85.6, 0.8, 0.5), (86.1, None, None), (86.9, None, None), (None, None, None)),
            ("b36", (84.8, 0.6, 0.0), (85.7, 0.8, 0.5), (87.0, None, None), (87.6, None, None), (None, None, None)),
        )
    },
    "caformer": {
        size: dict(zip(TRAININGS, results, strict=True)) for size, *results in (
            ("s18", (83.6, 0.15, 0.0), (85.0, 0.3, 0.4), (84.1, None, None), (85.4, None, None), (None, None, None)),
            ("s36", (84.5, 0.3, 0.4), (85.7, 0.5, 0.4), (85.8, None, None), (86.9, None, None), (None, None, None)),
            ("m36", (85.2, 0.4, 0.4), (86.2, 0.7, 0.4), (86.6, None, None), (87.5, None, None), (None, None, None)),
            ("b36", (85.5, 0.6, 0.5), (86.4, 0.8, 0.5), (87.4, None, None), (88.1, None, None), (None, None, None)),
        )
    },
}
# fmt: on


def _variant(
    family: str,
    size: str,
    suffix: str,
    top1: float | None,
    drop_path_rate: float | None,
    head_dropout: float | None = 0.0,
) -> Variant:
    common = FAMILIES[family]
    image_size, num_labels, tag = TRAININGS[suffix]
    depths, hidden_sizes = common.sizes[size]
    config = {**common.config, "depths": depths, "hidden_sizes": hidden_sizes}
    crop_pct = common.crop_pct
    if family == "poolformer":
        if size in ("s36", "m36", "m48"):
            config["layer_scale_init_value"] = 1e-6
        if size in ("m36", "m48"):
            crop_pct = 0.95
    else:
        config["image_size"] = image_size
    name = f"{family}_{size}"
    return Variant(
        config=config,
        family=family,
        model_type="poolformer" if family == "poolformer" else "metaformer",
        crop_pct=crop_pct,
        image_size=image_size,
        num_labels=num_labels,
        drop_path_rate=drop_path_rate,
        head_dropout=head_dropout,
        top1=top1,
        source=common.source.format(name=name + suffix),
        timm_name=f"{name}.{tag}" if common.in_timm else None,
    )


VARIANTS: dict[str, Variant] = {
    f"{family}_{size}{suffix}": _variant(family, size, suffix, *result)
    for family, sizes in RESULTS.items()
    for size, trainings in sizes.items()
    for suffix, result in trainings.items()
}
"""Every published checkpoint: its name, for instance `poolformer_s12` or `caformer_b36_384_in21ft1k`, to its facts."""


def family_of(config: PreTrainedConfig) -> str | None:
    """The family that agrees in every field in which families differ; None, too, for other architectures."""
    if not isinstance(config, MetaFormerConfig):
        return None
    fields = set().union(*(family.config for family in FAMILIES.values()))

    def same(family: str) -> bool:
        reference = FAMILIES[family].config
        return all(as_tuple(getattr(config, k)) == reference.get(k, getattr(MetaFormerConfig, k)) for k in fields)

    return next((family for family in FAMILIES if same(family)), None)


def variant_of(config: PreTrainedConfig) -> str | None:
    """The variant of this architecture that was trained at 224 pixels on ImageNet-1K, or None."""
    family = family_of(config)
    sizes = FAMILIES[family].sizes if family is not None else {}
    shape = (as_tuple(config.depths), as_tuple(config.hidden_sizes))
    names = [f"{family}_{size}" for size, its_shape in sizes.items() if its_shape == shape]
    return next((name for name in names if name in VARIANTS), None)


def as_tuple(value: Any) -> Any:
    """Lists of a configuration, which JSON makes of tuples, as tuples."""
    return tuple(value) if isinstance(value, list) else value


__all__ = ["FAMILIES", "VARIANTS", "Family", "MetaFormerConfig", "PoolFormerConfig", "Variant"]
