"""How mmdetection and mmsegmentation name the parameters of the heads of the first paper, beside `backbone.`.

A rule pairs their key with ours, as in `key_maps.py`. No tensor is turned, cut or scaled: the heads of
`modeling_segmentation.py` and `modeling_detection.py` order channels as theirs do (of a score, anchor then class; of a
box, anchor then x, y, width, height; background last; fully connected layers read channel, row, column).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .key_maps import STAGES, KeyMap, Rule


IN_BACKBONE = "backbone."

Shape = Callable[[str], torch.Size]


@dataclass(frozen=True)
class DenseHead(KeyMap):
    """
    A neck and head of mmdetection or mmsegmentation.

    Attributes:
        task: its name in `TASKS`.
        publisher: whose format it is.
        markers: (their key, our key); all checkpoints of this head have it, and those of no other.
        facts: the fields of a configuration that the shapes of our keys tell.
    """

    task: str
    publisher: str
    markers: Rule
    facts: Callable[[Shape], dict[str, int]]


def semantic_fpn_facts(shape: Shape) -> dict[str, int]:
    num_labels, dim = shape("decode_head.classifier.weight")[:2]
    return {
        "num_labels": num_labels,
        "decoder_hidden_size": dim,
        "fpn_feature_size": shape("neck.fpn_convs.0.weight")[0],
    }


def retinanet_facts(shape: Shape) -> dict[str, int]:
    anchors = shape("bbox_head.regression_head.bbox_reg.weight")[0] // 4
    scores = shape("bbox_head.classification_head.cls_logits.weight")[0]
    return {"num_labels": scores // max(anchors, 1), "fpn_feature_size": shape("neck.layer_blocks.0.0.weight")[0]}


def mask_rcnn_facts(shape: Shape) -> dict[str, int]:
    return {
        "num_labels": shape("mask_predictor.mask_fcn_logits.weight")[0],
        "box_head_hidden_size": shape("box_head.fc7.weight")[0],
        "fpn_feature_size": shape("neck.layer_blocks.0.0.weight")[0],
    }


# mmsegmentation 0.19: FPN and FPNHead, as in fpn_poolformer_*_ade20k_40k.py. Of the modules of a level every other one
# is an upsampling.
SEMANTIC_FPN = DenseHead(
    task="semantic-segmentation",
    name="Semantic FPN",
    publisher="mmsegmentation",
    markers=("decode_head.scale_heads.", "decode_head.scale_heads."),
    rules=(
        ("neck.lateral_convs.{i}.conv.{p}", "neck.lateral_convs.{i}.{p}"),
        ("neck.fpn_convs.{i}.conv.{p}", "neck.fpn_convs.{i}.{p}"),
        *(
            (f"decode_head.scale_heads.{i}.{2 * j}.{theirs}.{{p}}", f"decode_head.scale_heads.{i}.{j}.{ours}.{{p}}")
            for i in STAGES
            for j in range(max(i, 1))
            for theirs, ours in (("conv", "conv"), ("bn", "norm"))
        ),
        ("decode_head.conv_seg.{p}", "decode_head.classifier.{p}"),
    ),
    facts=semantic_fpn_facts,
)
# mmdetection 2.19: FPN from the second stage on, with two more levels, and RetinaHead, as in
# retinanet_poolformer_*_fpn_1x_coco.py.
RETINANET = DenseHead(
    task="object-detection",
    name="RetinaNet",
    publisher="mmdetection",
    markers=("bbox_head.retina_cls.", "bbox_head.classification_head."),
    rules=(
        ("neck.fpn_convs.3.conv.{p}", "neck.extra_blocks.p6.{p}"),
        ("neck.fpn_convs.4.conv.{p}", "neck.extra_blocks.p7.{p}"),
        ("neck.lateral_convs.{i}.conv.{p}", "neck.inner_blocks.{i}.0.{p}"),
        ("neck.fpn_convs.{i}.conv.{p}", "neck.layer_blocks.{i}.0.{p}"),
        ("bbox_head.cls_convs.{i}.conv.{p}", "bbox_head.classification_head.conv.{i}.0.{p}"),
        ("bbox_head.reg_convs.{i}.conv.{p}", "bbox_head.regression_head.conv.{i}.0.{p}"),
        ("bbox_head.retina_cls.{p}", "bbox_head.classification_head.cls_logits.{p}"),
        ("bbox_head.retina_reg.{p}", "bbox_head.regression_head.bbox_reg.{p}"),
    ),
    facts=retinanet_facts,
)
# mmdetection 2.19: FPN, RPNHead, Shared2FCBBoxHead and FCNMaskHead, as in mask_rcnn_poolformer_*_fpn_1x_coco.py.
MASK_RCNN = DenseHead(
    task="instance-segmentation",
    name="Mask R-CNN",
    publisher="mmdetection",
    markers=("roi_head.mask_head.", "mask_predictor."),
    rules=(
        ("neck.lateral_convs.{i}.conv.{p}", "neck.inner_blocks.{i}.0.{p}"),
        ("neck.fpn_convs.{i}.conv.{p}", "neck.layer_blocks.{i}.0.{p}"),
        ("rpn_head.rpn_conv.{p}", "rpn_head.conv.0.0.{p}"),
        ("rpn_head.rpn_cls.{p}", "rpn_head.cls_logits.{p}"),
        ("rpn_head.rpn_reg.{p}", "rpn_head.bbox_pred.{p}"),
        ("roi_head.bbox_head.shared_fcs.0.{p}", "box_head.fc6.{p}"),
        ("roi_head.bbox_head.shared_fcs.1.{p}", "box_head.fc7.{p}"),
        ("roi_head.bbox_head.fc_cls.{p}", "box_predictor.cls_score.{p}"),
        ("roi_head.bbox_head.fc_reg.{p}", "box_predictor.bbox_pred.{p}"),
        ("roi_head.mask_head.convs.{i}.conv.{p}", "mask_head.{i}.0.{p}"),
        ("roi_head.mask_head.upsample.{p}", "mask_predictor.conv5_mask.{p}"),
        ("roi_head.mask_head.conv_logits.{p}", "mask_predictor.mask_fcn_logits.{p}"),
    ),
    facts=mask_rcnn_facts,
)

DENSE_HEADS = (SEMANTIC_FPN, RETINANET, MASK_RCNN)


def head_of(keys: Iterable[str], ours: bool = False) -> DenseHead | None:
    """The head that `keys`, theirs or ours, belong to; `None` if it is no head of the paper."""
    keys = list(keys)
    return next((head for head in DENSE_HEADS if any(key.startswith(head.markers[ours]) for key in keys)), None)
