"""Checkpoints laid out as mmdetection's and mmsegmentation's, against their computation written out here."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torchvision.models._meta import _COCO_CATEGORIES
from torchvision.ops import batched_nms, roi_align
from transformers import (
    pipeline,
)

from hf_poolformer import PoolFormerBackbone, PoolFormerConfig, PoolFormerImageProcessor
from hf_poolformer.conversion.convert import ConversionError, build_model, convert, read_checkpoint
from hf_poolformer.conversion.key_maps import OFFICIAL_FIRST
from hf_poolformer.foundation.tasks import BACKBONE, TASKS
from hf_poolformer.hub.cards import folder_card


GOLDEN = Path(__file__).resolve().parents[1] / "fixtures" / "golden" / "poolformer_v1_feat.safetensors"
DIMS, WIDTH, LABELS = (8, 16, 32, 64), 12, 3


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


def convolution(name: str, dim_out: int, dim_in: int, kernel: int, bias: bool = True, spread: float = 1.0) -> dict:
    weight = torch.randn(dim_out, dim_in, kernel, kernel) * spread / (dim_in * kernel * kernel) ** 0.5
    return {f"{name}.weight": weight, **({f"{name}.bias": torch.randn(dim_out) * 0.3} if bias else {})}


def linear(name: str, dim_out: int, dim_in: int, spread: float = 1.0) -> dict:
    flat = convolution(name, dim_out, dim_in, 1, spread=spread)
    return {key: value.flatten(1) if value.ndim == 4 else value for key, value in flat.items()}


def pyramid(first: int, extra: bool) -> dict:
    """mmdetection's FPN."""
    tensors = {}
    for i, dim in enumerate(DIMS[first:]):
        tensors |= convolution(f"neck.lateral_convs.{i}.conv", WIDTH, dim, 1)
        tensors |= convolution(f"neck.fpn_convs.{i}.conv", WIDTH, WIDTH, 3)
    if extra:
        tensors |= convolution("neck.fpn_convs.3.conv", WIDTH, DIMS[-1], 3)
        tensors |= convolution("neck.fpn_convs.4.conv", WIDTH, WIDTH, 3)
    return tensors


def semantic_fpn() -> dict:
    tensors = pyramid(0, extra=False)
    for level in range(4):
        for k in range(max(level, 1)):
            name = f"decode_head.scale_heads.{level}.{2 * k}"
            tensors |= convolution(f"{name}.conv", 10, 10 if k else WIDTH, 3, bias=False)
            tensors |= {
                f"{name}.bn.weight": torch.rand(10) + 0.5,
                f"{name}.bn.bias": torch.randn(10),
                f"{name}.bn.running_mean": torch.randn(10),
                f"{name}.bn.running_var": torch.rand(10) + 0.5,
                f"{name}.bn.num_batches_tracked": torch.tensor(7),
            }
    return tensors | convolution("decode_head.conv_seg", LABELS, 10, 1)


def retinanet(labels: int = LABELS) -> dict:
    tensors = pyramid(1, extra=True)
    for tower in ("cls", "reg"):
        for i in range(4):
            tensors |= convolution(f"bbox_head.{tower}_convs.{i}.conv", WIDTH, WIDTH, 3, spread=1.5)
    # Not so wide that scores round to one: equal scores have no order.
    tensors |= convolution("bbox_head.retina_cls", 9 * labels, WIDTH, 3, spread=0.5)
    return tensors | convolution("bbox_head.retina_reg", 9 * 4, WIDTH, 3)


def mask_rcnn() -> dict:
    tensors = pyramid(0, extra=False)
    tensors |= convolution("rpn_head.rpn_conv", WIDTH, WIDTH, 3)
    tensors |= convolution("rpn_head.rpn_cls", 3, WIDTH, 1)
    tensors |= convolution("rpn_head.rpn_reg", 12, WIDTH, 1, spread=0.3)
    tensors |= linear("roi_head.bbox_head.shared_fcs.0", 20, WIDTH * 49, spread=1.5)
    tensors |= linear("roi_head.bbox_head.shared_fcs.1", 20, 20, spread=1.5)
    tensors |= linear("roi_head.bbox_head.fc_cls", LABELS + 1, 20, spread=2.0)
    tensors |= linear("roi_head.bbox_head.fc_reg", 4 * LABELS, 20)
    for i in range(4):
        tensors |= convolution(f"roi_head.mask_head.convs.{i}.conv", WIDTH, WIDTH, 3, spread=1.5)
    tensors |= convolution("roi_head.mask_head.upsample", WIDTH, WIDTH, 2)
    return tensors | convolution("roi_head.mask_head.conv_logits", LABELS, WIDTH, 1)


HEADS = {"semantic-segmentation": semantic_fpn, "object-detection": retinanet, "instance-segmentation": mask_rcnn}


def backbone_of(golden: dict, first: int = 0) -> dict:
    state_dict = {k.removeprefix("state_dict."): v for k, v in golden.items() if k.startswith("state_dict.")}
    return {
        f"backbone.{key}": value for key, value in state_dict.items() if first == 0 or not key.startswith("norm0.")
    }


@pytest.fixture
def checkpoint_file(golden, tmp_path):
    """A file as mmcv writes it, of the backbone of the golden data and a random head."""

    def write(task: str, head: dict | None = None, norm0: bool = False, **meta) -> tuple[Path, dict]:
        head = HEADS[task]() if head is None else head
        path = tmp_path / "epoch_12.pth"
        state_dict = {**backbone_of(golden, first=int(task == "object-detection" and not norm0)), **head}
        optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
        torch.save(
            {
                "meta": {"epoch": 12, "mmdet_version": "2.19.0", **meta},
                "state_dict": state_dict,
                "optimizer": optimizer,
            },
            path,
        )
        return path, head

    return write


# --- the publishers' computation, from their keys --------------------------------------------------------------------


def conv(tensors: dict, name: str, x: torch.Tensor, **options) -> torch.Tensor:
    return F.conv2d(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), **options)


def mm_pyramid(tensors: dict, maps: list[torch.Tensor]) -> list[torch.Tensor]:
    laterals = [conv(tensors, f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(maps)]
    for i in range(len(laterals) - 1, 0, -1):
        laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[2:], mode="nearest")
    return [conv(tensors, f"neck.fpn_convs.{i}.conv", x, padding=1) for i, x in enumerate(laterals)]


def mm_segmentation_logits(tensors: dict, maps: list[torch.Tensor]) -> torch.Tensor:
    total = 0
    for level, x in enumerate(mm_pyramid(tensors, maps)):
        for k in range(max(level, 1)):
            name = f"decode_head.scale_heads.{level}.{2 * k}"
            x = conv(tensors, f"{name}.conv", x, padding=1)
            mean, variance, gain, shift = (
                tensors[f"{name}.bn.{part}"][:, None, None]
                for part in ("running_mean", "running_var", "weight", "bias")
            )
            x = ((x - mean) / (variance + 1e-5).sqrt() * gain + shift).clamp(min=0)
            if level:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        if level == 0:
            size = x.shape[2:]
        total = total + F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return conv(tensors, "decode_head.conv_seg", total)


def mm_anchors(height: int, width: int, stride: int, scales: list[float]) -> torch.Tensor:
    anchors = []
    for row in range(height):
        for column in range(width):
            for ratio in (0.5, 1.0, 2.0):
                for scale in scales:
                    w, h = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
                    x, y = column * stride, row * stride
                    anchors.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return torch.tensor(anchors)


def mm_decode(anchors: torch.Tensor, deltas: torch.Tensor, size: tuple[int, int], stds=(1, 1, 1, 1)) -> torch.Tensor:
    dx, dy, dw, dh = (deltas * torch.tensor(stds)).unbind(-1)
    limit = abs(math.log(16 / 1000))
    w, h = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    x, y = (anchors[:, 0] + anchors[:, 2]) / 2 + w * dx, (anchors[:, 1] + anchors[:, 3]) / 2 + h * dy
    w, h = w * dw.clamp(-limit, limit).exp(), h * dh.clamp(-limit, limit).exp()
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)
    limits = torch.tensor([size[1], size[0]] * 2)
    return torch.minimum(boxes.clamp(min=0), limits)


def by_class(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> tuple:
    kept = batched_nms(boxes, scores, labels, 0.5)[:100]
    return boxes[kept], scores[kept], labels[kept]


def mm_retinanet(tensors: dict, maps: list[torch.Tensor], size: tuple[int, int]) -> tuple:
    """RetinaHead.get_bboxes of one image."""
    levels = mm_pyramid(tensors, maps[1:])
    levels.append(conv(tensors, "neck.fpn_convs.3.conv", maps[-1], stride=2, padding=1))
    levels.append(conv(tensors, "neck.fpn_convs.4.conv", levels[-1], stride=2, padding=1))
    found = []
    for level, x in enumerate(levels):
        scores = deltas = x
        for i in range(4):
            scores = conv(tensors, f"bbox_head.cls_convs.{i}.conv", scores, padding=1).relu()
            deltas = conv(tensors, f"bbox_head.reg_convs.{i}.conv", deltas, padding=1).relu()
        scores = conv(tensors, "bbox_head.retina_cls", scores, padding=1)[0].permute(1, 2, 0).reshape(-1, LABELS)
        deltas = conv(tensors, "bbox_head.retina_reg", deltas, padding=1)[0].permute(1, 2, 0).reshape(-1, 4)
        anchors = mm_anchors(*x.shape[2:], 8 * 2**level, [4 * 2 ** (k / 3) for k in range(3)])
        scores = scores.sigmoid()
        anchor, label = (scores > 0.05).nonzero().unbind(1)
        best = scores[anchor, label].sort(descending=True).indices[:1000]
        anchor, label = anchor[best], label[best]
        found.append((mm_decode(anchors[anchor], deltas[anchor], size), scores[anchor, label], label))
    return by_class(*(torch.cat(part) for part in zip(*found, strict=True)))


def mm_roi_features(levels: list[torch.Tensor], rois: torch.Tensor, resolution: int) -> torch.Tensor:
    """SingleRoIExtractor of one image, strides 4 to 32, finest scale 56."""
    scale = ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])).sqrt()
    level = (scale / 56 + 1e-6).log2().floor().clamp(0, 3).long()
    features = torch.zeros(len(rois), WIDTH, resolution, resolution)
    for i, x in enumerate(levels):
        mine = level == i
        features[mine] = roi_align(x, [rois[mine]], resolution, 1 / (4 * 2**i), 0, aligned=True)
    return features


def mm_mask_rcnn(tensors: dict, maps: list[torch.Tensor], size: tuple[int, int]) -> tuple:
    """Boxes, scores, labels and mask logits of one image: RPNHead, Shared2FCBBoxHead, FCNMaskHead."""
    levels = mm_pyramid(tensors, maps)
    boxes, scores, ids = [], [], []
    for level, x in enumerate([*levels, F.max_pool2d(levels[-1], 1, stride=2)]):
        anchors = mm_anchors(*x.shape[2:], 4 * 2**level, [8])
        x = conv(tensors, "rpn_head.rpn_conv", x, padding=1).relu()
        score = conv(tensors, "rpn_head.rpn_cls", x)[0].permute(1, 2, 0).flatten().sigmoid()
        deltas = conv(tensors, "rpn_head.rpn_reg", x)[0].permute(1, 2, 0).reshape(-1, 4)
        best = score.sort(descending=True).indices[:1000]
        boxes.append(mm_decode(anchors[best], deltas[best], size))
        scores.append(score[best])
        ids.append(torch.full_like(best, level))
    boxes, scores, ids = (torch.cat(part) for part in (boxes, scores, ids))
    valid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    boxes, scores, ids = boxes[valid], scores[valid], ids[valid]
    rois = boxes[batched_nms(boxes, scores, ids, 0.7)[:1000]]

    x = mm_roi_features(levels, rois, 7).flatten(1)
    for i in range(2):
        name = f"roi_head.bbox_head.shared_fcs.{i}"
        x = F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"]).relu()
    scores, deltas = (
        F.linear(x, tensors[f"roi_head.bbox_head.{name}.weight"], tensors[f"roi_head.bbox_head.{name}.bias"])
        for name in ("fc_cls", "fc_reg")
    )
    scores = scores.softmax(-1)[:, :-1]
    roi, label = (scores > 0.05).nonzero().unbind(1)
    deltas = deltas.view(-1, LABELS, 4)[roi, label]
    boxes = mm_decode(rois[roi], deltas, size, stds=(0.1, 0.1, 0.2, 0.2))
    boxes, scores, label = by_class(boxes, scores[roi, label], label)

    x = mm_roi_features(levels, boxes, 14)
    for i in range(4):
        x = conv(tensors, f"roi_head.mask_head.convs.{i}.conv", x, padding=1).relu()
    name = "roi_head.mask_head.upsample"
    x = F.conv_transpose2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], stride=2).relu()
    masks = conv(tensors, "roi_head.mask_head.conv_logits", x)
    return boxes, scores, label, masks[torch.arange(len(label)), label]


# --- conversion ------------------------------------------------------------------------------------------------------


def image_and_maps(golden: dict, index: int | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    The first image of an input of the golden data, and its official feature maps; for `None` a larger image, and the
    maps of a backbone that is tested against the former.
    """
    if index is not None:
        return golden[f"input.{index}"][:1], [golden[f"feature_maps.{index}.{stage}"][:1] for stage in range(4)]
    config = PoolFormerConfig(depths=(1, 1, 2, 1), hidden_sizes=DIMS, out_indices=[1, 2, 3, 4])
    backbone = PoolFormerBackbone(config).eval()
    tensors = {key.removeprefix("backbone."): value for key, value in backbone_of(golden).items()}
    backbone.load_state_dict({ours: tensors[theirs] for theirs, ours in OFFICIAL_FIRST.to_ours(tensors).items()})
    pixel_values = torch.randn(1, 3, 288, 416)
    with torch.no_grad():
        return pixel_values, list(backbone(pixel_values).feature_maps)


def converted(path: Path, task: str, out_dir: Path):
    checkpoint = convert(path, out_dir)
    assert checkpoint.task is TASKS[task]
    assert checkpoint.config.fpn_feature_size == WIDTH
    return TASKS[task].auto_model().from_pretrained(out_dir).eval()


@pytest.mark.parametrize("index", [0, 1, None])
def test_semantic_fpn_computes_what_mmsegmentation_computes(index, golden, checkpoint_file, tmp_path):
    path, head = checkpoint_file("semantic-segmentation")
    model = converted(path, "semantic-segmentation", tmp_path / "out")
    pixel_values, maps = image_and_maps(golden, index)
    with torch.no_grad():
        got = model(pixel_values).logits
    wanted = mm_segmentation_logits(head, maps)
    assert ((got - wanted).abs().max() / wanted.abs().max()).item() < 1e-4


def found_by(model, outputs) -> tuple:
    """Boxes in pixels, scores and labels of the first image."""
    logits, label = outputs.logits[0].max(dim=-1)
    kept = logits > torch.finfo(logits.dtype).min
    return outputs.pred_boxes[0][kept], logits[kept].sigmoid(), label[kept], kept


def assert_same_detections(got: tuple, wanted: tuple, size: tuple[int, int]):
    boxes, scores, labels = got[:3]
    centre, edges = boxes[:, :2], boxes[:, 2:]
    boxes = torch.cat([centre - edges / 2, centre + edges / 2], dim=1) * torch.tensor([size[1], size[0]] * 2)
    assert len(boxes) == len(wanted[0]) > 20
    torch.testing.assert_close(scores, wanted[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(boxes, wanted[0], rtol=1e-3, atol=1e-2)
    assert torch.equal(labels, wanted[2])


@pytest.mark.parametrize("index", [0, 1, None])
def test_retinanet_detects_what_mmdetection_detects(index, golden, checkpoint_file, tmp_path):
    path, head = checkpoint_file("object-detection")
    model = converted(path, "object-detection", tmp_path / "out")
    pixel_values, maps = image_and_maps(golden, index)
    with torch.no_grad():
        got = found_by(model, model(pixel_values))
        wanted = mm_retinanet(head, maps, pixel_values.shape[2:])
    assert_same_detections(got, wanted, pixel_values.shape[2:])


@pytest.mark.parametrize("index", [0, 1, None])
def test_mask_rcnn_detects_what_mmdetection_detects(index, golden, checkpoint_file, tmp_path):
    path, head = checkpoint_file("instance-segmentation")
    model = converted(path, "instance-segmentation", tmp_path / "out")
    assert model.config.box_head_hidden_size == 20
    pixel_values, maps = image_and_maps(golden, index)
    with torch.no_grad():
        outputs = model(pixel_values)
        got = found_by(model, outputs)
        *wanted, masks = mm_mask_rcnn(head, maps, pixel_values.shape[2:])
    assert_same_detections(got, wanted, pixel_values.shape[2:])
    torch.testing.assert_close(outputs.pred_masks[0][got[3]], masks, rtol=1e-3, atol=1e-3 * masks.abs().max().item())


@pytest.mark.parametrize("task", HEADS)
def test_there_and_back_is_bit_equal(task, checkpoint_file, tmp_path):
    path, _ = checkpoint_file(task, CLASSES=("cat", "dog", "owl"))
    convert(path, tmp_path / "ours")
    checkpoint = convert(tmp_path / "ours", tmp_path / "theirs", to="official")
    assert checkpoint.task is TASKS[task]
    (written,) = (tmp_path / "theirs").glob("*.pth")
    again, original = (torch.load(file, weights_only=True) for file in (written, path))
    assert again["meta"]["CLASSES"] == ["cat", "dog", "owl"]
    assert again["state_dict"].keys() == original["state_dict"].keys()
    assert all(torch.equal(again["state_dict"][key], value) for key, value in original["state_dict"].items())
    with pytest.raises(ConversionError, match="no names for"):
        convert(tmp_path / "ours", tmp_path / "timm", to="timm")


@pytest.mark.parametrize(
    ("task", "job", "size"),
    [
        ("semantic-segmentation", "image-segmentation", {"shortest_edge": 512, "longest_edge": 2048}),
        ("object-detection", "object-detection", {"shortest_edge": 800, "longest_edge": 1333}),
        ("instance-segmentation", "image-segmentation", {"shortest_edge": 800, "longest_edge": 1333}),
    ],
)
def test_the_folder_is_complete(task, job, size, checkpoint_file, tmp_path):
    path, _ = checkpoint_file(task, CLASSES=("cat", "dog", "owl"))
    convert(path, tmp_path / "out", card=folder_card)
    run = pipeline(job, str(tmp_path / "out"))
    assert type(run.model) is type(build_model(read_checkpoint(path)))
    assert run.model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert type(run.image_processor) is PoolFormerImageProcessor
    assert {key: value for key, value in dict(run.image_processor.size).items() if value} == size
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"pipeline_tag: {job}" in card
    assert "trust_remote_code=True" in card  # the built-in PoolFormer has no such head


def test_the_norm_that_retinanet_does_not_use_is_named(checkpoint_file, tmp_path):
    path, _ = checkpoint_file("object-detection", norm0=True)
    checkpoint = read_checkpoint(path)
    assert sorted(checkpoint.left_out) == ["backbone.norm0.bias", "backbone.norm0.weight"]
    assert any("norm0.weight" in note for note in checkpoint.notes)


def test_eighty_classes_without_names_are_those_of_coco(checkpoint_file):
    path, _ = checkpoint_file("object-detection", head=retinanet(labels=80))
    labels = read_checkpoint(path).config.id2label
    assert [labels[0], labels[79]] == ["person", "toothbrush"]
    assert set(labels.values()) == set(_COCO_CATEGORIES) - {"__background__", "N/A"}


def test_labels_can_be_given(checkpoint_file):
    path, _ = checkpoint_file("semantic-segmentation")
    assert read_checkpoint(path, labels=["a", "b", "c"]).config.id2label[2] == "c"
    with pytest.raises(ConversionError, match="2 labels were given"):
        read_checkpoint(path, labels=["a", "b"])


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (
            "semantic-segmentation",
            lambda head: head.pop("decode_head.conv_seg.weight"),
            "decode_head.classifier.weight",
        ),
        (
            "semantic-segmentation",
            lambda head: head.pop("neck.fpn_convs.3.conv.bias"),
            "missing: neck.fpn_convs.3.bias",
        ),
        (
            "semantic-segmentation",
            lambda head: head.update({"auxiliary_head.conv_seg.bias": torch.zeros(3)}),
            "auxiliary_head",
        ),
        ("object-detection", lambda head: head.pop("bbox_head.cls_convs.3.conv.weight"), "missing: bbox_head"),
        (
            "object-detection",
            lambda head: head.update({"bbox_head.cls_convs.0.gn.weight": torch.ones(12)}),
            "cls_convs.0.gn",
        ),
        (
            "instance-segmentation",
            lambda head: head.pop("roi_head.bbox_head.fc_cls.bias"),
            "box_predictor.cls_score.bias",
        ),
        (
            "instance-segmentation",
            lambda head: head.update(convolution("rpn_head.rpn_cls", 5, WIDTH, 1)),
            "another shape",
        ),
    ],
)
def test_every_key_is_used_exactly_once(task, change, message, checkpoint_file):
    head = HEADS[task]()
    change(head)
    path, _ = checkpoint_file(task, head=head)
    with pytest.raises(ConversionError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: {"state_dict": {f"model.module.{k}": v for k, v in sd.items()} | {"loss.weight": torch.ones(2)}},
        lambda sd: {"state_dict": {k.replace("backbone.", "backbone._orig_mod."): v for k, v in sd.items()}},
        lambda sd: {"state_dict": {k: v * 0 for k, v in sd.items()}, "ema_state_dict": sd},
        lambda sd: {"state_dict": sd | {"decode_head.loss_decode.class_weight": torch.ones(3)}},
    ],
)
def test_wrapped_dense_checkpoints(task, wrap, checkpoint_file):
    path, _ = checkpoint_file(task)
    expected = read_checkpoint(path).tensors
    torch.save(wrap(torch.load(path, weights_only=True)["state_dict"]), path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.task is TASKS[task]
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in checkpoint.tensors.items())


def test_other_heads_leave_the_backbone(golden, checkpoint_file, tmp_path):
    """Of a method that is none of the paper's, such as UPerNet, the backbone is converted and the rest is named."""
    head = {"decode_head.psp_modules.0.1.conv.weight": torch.zeros(1), "decode_head.conv_seg.bias": torch.zeros(1)}
    path, _ = checkpoint_file("semantic-segmentation", head=head)
    checkpoint = convert(path, tmp_path / "out")
    assert checkpoint.task is BACKBONE
    assert checkpoint.left_out == list(head)
    backbone = PoolFormerBackbone.from_pretrained(tmp_path / "out").eval()
    pixel_values, maps = image_and_maps(golden, 0)
    with torch.no_grad():
        feature_maps = backbone(pixel_values).feature_maps
    for got, wanted in zip(feature_maps, maps, strict=True):
        assert ((got - wanted).abs().max() / wanted.abs().max()).item() < 1e-5
