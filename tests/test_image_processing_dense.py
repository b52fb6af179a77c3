"""Maps, boxes and masks follow their image, whatever its geometry, and results come back to it."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SegformerImageProcessor
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.models.detr.image_processing_detr import convert_segmentation_to_rle
from transformers.utils import ModelOutput

from hf_poolformer import PoolFormerImageProcessor, PoolFormerImageProcessorPil


BACKENDS = [PoolFormerImageProcessor, PoolFormerImageProcessorPil]
both = pytest.mark.parametrize("backend", BACKENDS)
SMALL = {"size": {"shortest_edge": 64, "longest_edge": 96}}


def picture(height, width):
    return Image.fromarray(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def box(left, top, width, height, category=0, **more):
    polygon = [left, top, left + width, top, left + width, top + height, left, top + height]
    return {"bbox": [left, top, width, height], "category_id": category, "segmentation": [polygon], **more}


@both
@pytest.mark.parametrize(
    ("size", "expected"),
    # mmcv's rescale_size for (1333, 800): int(edge * scale + 0.5)
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((426, 640), (800, 1202)), ((333, 1000), (444, 1333))],
    ids=str,
)
def test_detection_geometry_is_mmdetections(backend, size, expected):
    features = backend.for_detection()(picture(*size), return_tensors="pt")
    rows, columns = (
        features["pixel_mask"][0].any(dim=1).sum().item(),
        features["pixel_mask"][0].any(dim=0).sum().item(),
    )
    assert (rows, columns) == expected
    assert all(
        edge % 32 == 0 and 0 <= edge - real < 32
        for edge, real in zip(features.pixel_values.shape[2:], expected, strict=True)
    )


@both
def test_a_batch_is_padded_and_masked(backend):
    processor = backend.for_detection(**SMALL)
    images = [picture(40, 50), picture(60, 32)]
    features = processor(images, return_tensors="pt")
    assert features.pixel_values.shape == (2, 3, 96, 96) and features.pixel_mask.dtype == torch.int64
    for image, values, mask in zip(images, features.pixel_values, features.pixel_mask, strict=True):
        alone = processor(image, return_tensors="pt", do_pad=False).pixel_values[0]
        height, width = alone.shape[1:]
        assert torch.equal(values[:, :height, :width], alone)
        assert mask[:height, :width].all() and mask.sum() == height * width
        assert values.abs().sum().item() == pytest.approx(alone.abs().sum().item())


@both
def test_annotations_become_labels(backend):
    annotations = [
        {
            "image_id": 7,
            "annotations": [
                box(10, 5, 20, 30, 2, area=450),
                box(0, 0, 50, 40, 1, iscrowd=1),
                box(45, 30, 20, 20, 3),  # partly beyond the image
                box(60, 0, 5, 5, 1),  # wholly
                box(4, 4, 0, 6, 1),
            ],
        },
        {"image_id": 8, "annotations": []},
    ]
    annotations[0]["annotations"][-1]["segmentation"] = [[4, 4, 4, 10, 4, 7]]
    processor = backend.for_detection(**SMALL)
    features = processor(
        [picture(40, 50), picture(64, 64)],
        annotations=annotations,
        return_segmentation_masks=True,
        return_tensors="pt",
    )
    first, second = features["labels"]
    assert first["class_labels"].tolist() == [2, 3] and first["image_id"].tolist() == [7]
    assert first["size"].tolist() == [64, 80] and first["orig_size"].tolist() == [40, 50]
    wanted = [[20 / 50, 20 / 40, 20 / 50, 30 / 40], [47.5 / 50, 35 / 40, 5 / 50, 10 / 40]]
    torch.testing.assert_close(first["boxes"], torch.tensor(wanted))
    # 64 / 40 in both directions
    torch.testing.assert_close(first["area"], torch.tensor([450.0, 400.0]) * 1.6**2)
    assert first["masks"].shape == (2, 64, 96) and first["masks"].dtype == torch.bool
    for mask, (x, y, w, h) in zip(first["masks"], wanted, strict=True):
        rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
        got = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        edges = [(x - w / 2) * 80, (y - h / 2) * 64, (x + w / 2) * 80, (y + h / 2) * 64]
        assert all(abs(a - b) <= 1 for a, b in zip(got, edges, strict=True))
    assert second["boxes"].shape == (0, 4) and second["masks"].shape == (0, 64, 96)


@both
def test_annotations_follow_the_crop(backend):
    annotation = {"annotations": [box(0, 0, 40, 40), box(0, 10, 4, 4)]}
    processor = backend(size=40, crop_size=20, crop_pct=None)
    labels = processor(picture(40, 40), annotations=annotation, return_tensors="pt")["labels"][0]
    # Only the large box reaches into the crop, and fills it.
    torch.testing.assert_close(labels["boxes"], torch.tensor([[0.5, 0.5, 1.0, 1.0]]))


@pytest.mark.parametrize("kind", ["polygons", "run lengths", "compressed", "array", "picture"])
def test_segmentations_of_every_kind(kind):
    from pycocotools import mask as coco

    mask = np.zeros((40, 50), dtype=np.uint8)
    mask[5:35, 10:30] = 1
    compressed = coco.encode(np.asfortranarray(mask))
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    segmentation = {
        "polygons": [[10, 5, 30, 5, 30, 35, 10, 35]],
        "run lengths": {"size": [40, 50], "counts": runs},
        "compressed": compressed,
        "array": mask,
        "picture": Image.fromarray(mask * 255),
    }[kind]
    annotation = {"annotations": [{"bbox": [10, 5, 20, 30], "category_id": 0, "segmentation": segmentation}]}
    processor = PoolFormerImageProcessor.for_detection(do_resize=False)
    features = processor(picture(40, 50), annotations=annotation, return_segmentation_masks=True, return_tensors="np")
    assert np.array_equal(features["labels"][0]["masks"][0, :40, :50], mask.astype(bool))


@both
@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 64, "longest_edge": 96}},
        {"size": 64, "do_center_crop": True, "crop_size": 48},
        {"size": 32, "do_center_crop": True, "crop_size": 48},
        {"do_resize": False},
    ],
    ids=str,
)
def test_segmentation_maps_have_the_geometry_of_the_image(backend, settings):
    """An image that shows its own map: thick stripes, so that nearest and bilinear agree but at their edges."""
    stripes = (np.arange(60) // 15)[:, None] + 4 * (np.arange(90) // 30)[None]
    image = Image.fromarray(np.repeat((stripes * 20).astype(np.uint8)[..., None], 3, axis=2))
    processor = backend.for_segmentation(**settings, do_normalize=False, do_rescale=False)
    features = processor(image, segmentation_maps=stripes.astype(np.uint8), return_tensors="pt")
    labels, shown = features["labels"][0], features["pixel_values"][0, 0] / 20
    assert labels.shape == shown.shape and labels.dtype == torch.int64
    real = labels != 255
    assert ((shown[real] - labels[real]).abs() < 0.3).float().mean() > 0.75
    assert (shown[~real] == 0).all()
    # Only classes, nothing in between
    assert set(labels[real].tolist()) <= set(np.unique(stripes).tolist())


@both
@pytest.mark.parametrize("kind", ["str", "Path", "list", "one for each", "palette", "tensor"])
def test_maps_come_as_images_do(backend, kind, tmp_path):
    values = np.random.default_rng(0).integers(0, 7, (2, 30, 40), dtype=np.uint8)
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    for path, classes in zip(paths, values, strict=True):
        image = Image.fromarray(classes)
        if kind == "palette":  # whose colours are not the classes
            image = image.convert("P")
            image.putpalette(bytes(range(255, -1, -1)) * 3)
        image.save(path)
    images = [picture(30, 40), picture(40, 30).resize((40, 30))]
    if kind in ("str", "Path"):
        images, values = images[:1], values[:1]
    given = {
        "str": str(paths[0]),
        "Path": paths[0],
        "list": [str(path) for path in paths],
        "one for each": tuple(paths),
        "palette": paths,
        "tensor": torch.from_numpy(values),
    }[kind]
    processor = backend.for_segmentation(do_resize=False)
    labels = processor(images, segmentation_maps=given, return_tensors="pt")["labels"]
    assert labels.tolist() == values.tolist()


@both
def test_maps_of_several_sizes_go_with_their_images(backend):
    images = [picture(20, 30), picture(26, 18)]
    maps = [np.full((20, 30), 3), np.full((26, 18), 4)]
    features = backend.for_segmentation(do_resize=False, do_pad=True)(
        images, segmentation_maps=maps, return_tensors="pt"
    )
    assert features["pixel_values"].shape == (2, 3, 26, 30) and features["labels"].shape == (2, 26, 30)
    for label, classes in zip(features["labels"], maps, strict=True):
        height, width = classes.shape
        assert torch.equal(label[:height, :width], torch.from_numpy(classes))
        assert (label == 255).sum() == label.numel() - classes.size
    with pytest.raises(ValueError, match="its image, 26x18, but that of image 1 has shape \\(20, 30\\)"):
        backend.for_segmentation(do_resize=False)(images, segmentation_maps=[maps[0], maps[0]])
    with pytest.raises(ValueError, match="do not fit into one tensor"):
        backend.for_segmentation(do_resize=False)(images, segmentation_maps=maps, return_tensors="pt")


@both
def test_a_strip_keeps_a_pixel(backend):
    features = backend.for_segmentation(size={"shortest_edge": 20, "longest_edge": 40})(
        picture(1, 300), segmentation_maps=np.ones((1, 300), dtype=int), return_tensors="pt"
    )
    assert features["pixel_values"].shape == (1, 3, 1, 40) and features["labels"].tolist() == [[[1] * 40]]


@both
def test_nearest_pixel_and_reduced_labels(backend):
    values = np.array([[0, 1, 2], [3, 150, 255]], dtype=np.uint8)
    processor = backend.for_segmentation(size={"height": 4, "width": 6}, do_reduce_labels=True)
    labels = processor(picture(2, 3), segmentation_maps=Image.fromarray(values), return_tensors="pt")["labels"]
    wanted = np.array([[255, 0, 1], [2, 149, 255]]).repeat(2, axis=0).repeat(2, axis=1)
    assert labels[0].tolist() == wanted.tolist()
    assert processor.to_dict()["do_reduce_labels"] is True and "do_reduce_labels" not in backend().to_dict()


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segmentation_maps": np.zeros((3, 4), dtype=np.uint8)}, "class index for each pixel of its image, 8x9"),
        ({"segmentation_maps": np.zeros((8, 9))}, "type float64"),
        ({"segmentation_maps": [np.zeros((8, 9), dtype=int)] * 2}, "1 images but 2 segmentation maps"),
        ({"annotations": [{"annotations": []}] * 2}, "1 images but 2 annotations"),
        ({"annotations": {"objects": []}}, "COCO's format"),
        ({"annotations": {"image_id": 3, "annotations": [{"bbox": [1, 1, 2, 2]}]}}, "image 3 has no 'category_id'"),
        ({"size_divisor": 0}, "size_divisor must be"),
        ({"do_pad": True, "size_divisor": 2, "pad_size": {"height": 4, "width": 4}}, "smaller than an image"),
        ({"segmentation_maps": np.zeros((8, 9), dtype=int), "annotations": {"annotations": []}}, "not both"),
    ],
    ids=["map size", "map type", "maps", "annotations", "format", "category", "divisor", "pad size", "both"],
)
def test_what_does_not_fit_is_named(backend, arguments, message):
    with pytest.raises(ValueError, match=message):
        backend.for_segmentation(do_resize=False)(picture(8, 9), **arguments)


def test_semantic_maps_in_the_size_of_the_image():
    logits = torch.full((1, 3, 2, 2), -1.0)
    logits[0, 2, 0, 0] = logits[0, 1, 1, 1] = 1.0
    processor = PoolFormerImageProcessor()
    outputs = ModelOutput(logits=logits)
    (small,) = processor.post_process_semantic_segmentation(outputs)
    assert small[0, 0] == 2 and small[1, 1] == 1 and small.shape == (2, 2)
    (large,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(6, 8)])
    assert large.shape == (6, 8) and (large[:2, :2] == 2).all() and (large[4:, 6:] == 1).all()
    # The pipeline asks for instances first.
    (result,) = processor.post_process_instance_segmentation(outputs, target_sizes=torch.tensor([[6, 8]]))
    for segment in result["segments_info"]:
        assert torch.equal(result["segmentation"] == segment["id"], large == segment["label_id"])
    with pytest.raises(ValueError, match=r"one .* per image, 1"):
        processor.post_process_semantic_segmentation(outputs, target_sizes=[(6, 8)] * 2)


@pytest.mark.parametrize("sizes", [None, "list", "tensor", "numpy", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_peers(sizes, dtype):
    logits = torch.randn(2, 5, 7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    outputs, pairs = ModelOutput(logits=logits), [(20, 33), (5, 4)]
    given = {
        None: None,
        "list": pairs,
        "tensor": torch.tensor(pairs),
        "numpy": np.array(pairs),
        "tensors": list(torch.tensor(pairs)),
    }[sizes]
    processor = PoolFormerImageProcessor()
    results = processor.post_process_semantic_segmentation(outputs, given, return_segmentation_scores=True)
    maps = processor.post_process_semantic_segmentation(outputs, given)
    peer = SegformerImageProcessor().post_process_semantic_segmentation(
        ModelOutput(logits=logits.float()), sizes and pairs, return_segmentation_scores=True
    )
    for image, result, classes, expected in zip(logits.double(), results, maps, peer, strict=True):
        assert isinstance(result, SemanticSegmentationPostProcessorOutput)
        scores = result.segmentation_scores
        torch.testing.assert_close(scores.float(), expected.segmentation_scores)
        assert torch.equal(result.segmentation, classes) and torch.equal(classes, expected.segmentation)
        assert torch.equal(classes, scores.argmax(dim=0)) and classes.dtype == torch.int64
        # A pixel by hand: bilinear between the centres of the cells
        height, width = scores.shape[1:]
        y, x = (0.5 * 7 / height - 0.5, 0.5 * 9 / width - 0.5)
        y, x = max(y, 0.0), max(x, 0.0)
        top, left = int(y), int(x)
        corner = image[:, top : top + 2, left : left + 2]
        weights = torch.tensor([[1 - y + top], [y - top]]) * torch.tensor([[1 - x + left, x - left]])
        torch.testing.assert_close(scores[:, 0, 0].double(), (corner * weights).sum((1, 2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [[(6, 8)], [(6, 8), (6,)], (6, 8), [(6, 0), (6, 8)], [(6, 8), None]], ids=str)
@pytest.mark.parametrize("task", ["semantic_segmentation", "object_detection", "instance_segmentation"])
def test_sizes_that_are_none(sizes, task):
    outputs = detections() if task != "semantic_segmentation" else ModelOutput(logits=torch.zeros(1, 3, 2, 2))
    outputs = ModelOutput({name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in outputs.items()})
    with pytest.raises(ValueError, match="target_sizes must"):
        getattr(PoolFormerImageProcessor(), f"post_process_{task}")(outputs, target_sizes=sizes)


@pytest.mark.parametrize("task", ["semantic_segmentation", "object_detection", "instance_segmentation"])
def test_outputs_of_another_head(task):
    post_process = getattr(PoolFormerImageProcessor(), f"post_process_{task}")
    others = [ModelOutput(logits=torch.zeros(2, 10)), ModelOutput(last_hidden_state=torch.zeros(2, 4, 2, 2))]
    if task == "semantic_segmentation":
        others.append(detections())
    if task == "object_detection":
        others.append(ModelOutput(logits=torch.zeros(2, 3, 4, 4)))
    if task == "instance_segmentation":
        others.append(ModelOutput(logits=torch.zeros(2, 9, 3), pred_boxes=torch.zeros(2, 9, 4)))
    for outputs in others:
        name = next(iter(outputs))
        with pytest.raises(ValueError, match=rf"These are not the outputs of a model \.\.\.For.*: .*{name} \("):
            post_process(outputs, target_sizes=[(6, 8)] * 2)


def detections():
    """Two overlapping objects, a faint one, and a place that is left over."""
    lowest = torch.finfo(torch.float32).min
    logits = torch.full((1, 4, 2), lowest)
    logits[0, 0, 1], logits[0, 1, 0], logits[0, 2, 0] = 3.0, 2.0, -2.0
    boxes = torch.tensor([[[0.3, 0.5, 0.4, 0.6], [0.5, 0.5, 0.6, 0.4], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    return ModelOutput(logits=logits, pred_boxes=boxes, pred_masks=torch.full((1, 4, 28, 28), 8.0))


def test_objects_in_pixels_of_the_image():
    processor = PoolFormerImageProcessor()
    (found,) = processor.post_process_object_detection(detections(), 0.5, torch.tensor([[20, 40]]))
    assert found["labels"].tolist() == [1, 0]
    torch.testing.assert_close(found["scores"], torch.tensor([3.0, 2.0]).sigmoid())
    torch.testing.assert_close(found["boxes"], torch.tensor([[4.0, 4, 20, 16], [8.0, 6, 32, 14]]))
    (relative,) = processor.post_process_object_detection(detections(), 0.05)
    assert len(relative["scores"]) == 3
    torch.testing.assert_close(relative["boxes"][0], torch.tensor([0.1, 0.2, 0.5, 0.8]))


def test_instances_in_the_image():
    processor = PoolFormerImageProcessor()
    arguments = {"threshold": 0.5, "target_sizes": [(20, 40)]}
    (apart,) = processor.post_process_instance_segmentation(detections(), **arguments, return_binary_maps=True)
    wanted = torch.zeros(2, 20, 40, dtype=torch.bool)
    wanted[0, 4:16, 4:20], wanted[1, 6:14, 8:32] = True, True
    assert torch.equal(apart["segmentation"], wanted)
    assert [info["label_id"] for info in apart["segments_info"]] == [1, 0]
    # On one map the surer one is on top. Half of the other remains.
    (one,) = processor.post_process_instance_segmentation(detections(), **arguments, overlap_mask_area_threshold=0.4)
    assert torch.equal(one["segmentation"] == 0, wanted[0]) and torch.equal(
        one["segmentation"] == 1, wanted[1] & ~wanted[0]
    )
    (one,) = processor.post_process_instance_segmentation(detections(), **arguments, overlap_mask_area_threshold=0.8)
    assert [info["label_id"] for info in one["segments_info"]] == [1] and one["segmentation"].min() == -1
    (none,) = processor.post_process_instance_segmentation(detections(), 0.99, target_sizes=[(20, 40)])
    assert none["segments_info"] == [] and (none["segmentation"] == -1).all()
    with pytest.raises(ValueError, match="target_sizes is needed"):
        processor.post_process_instance_segmentation(detections())


def drawn(runs, size):
    """The mask of one list of starts and lengths."""
    mask = np.zeros(size, dtype=bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        mask.reshape(-1)[start - 1 : start - 1 + length] = True
    return mask


@pytest.mark.parametrize("threshold", [0.5, 0.01, 0.99])
def test_run_lengths_are_those_of_peers(threshold):
    processor = PoolFormerImageProcessor()
    arguments = {"threshold": threshold, "overlap_mask_area_threshold": 0.1, "target_sizes": [(21, 40)]}
    (plain,) = processor.post_process_instance_segmentation(detections(), **arguments)
    (encoded,) = processor.post_process_instance_segmentation(
        detections(), **arguments, return_coco_annotation=True, return_binary_maps=False
    )
    assert encoded["segments_info"] == plain["segments_info"]
    assert encoded["segmentation"] == convert_segmentation_to_rle(plain["segmentation"])
    values = plain["segmentation"].unique().tolist()
    for value, runs in zip(values, encoded["segmentation"], strict=True):
        assert np.array_equal(drawn(runs, (21, 40)), (plain["segmentation"] == value).numpy())
    classes = ModelOutput(logits=torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0)))
    (plain,) = processor.post_process_instance_segmentation(classes)
    (encoded,) = processor.post_process_instance_segmentation(classes, return_coco_annotation=True)
    assert encoded["segmentation"] == convert_segmentation_to_rle(plain["segmentation"])
    with pytest.raises(ValueError, match="exclude each other"):
        processor.post_process_instance_segmentation(
            detections(), **arguments, return_coco_annotation=True, return_binary_maps=True
        )


def test_masks_are_sampled_at_pixel_centres():
    """Each pixel on its own: bilinear between the 28 x 28 cells of the mask, nothing beyond them."""
    from hf_poolformer.image_processing_dense import paste_mask

    torch.manual_seed(0)
    mask, (left, top, right, bottom) = torch.rand(28, 28), (3.3, -2.5, 21.7, 14.2)
    pasted = paste_mask(mask, [left, top, right, bottom], (16, 24), 0.5)
    for row in range(16):
        for column in range(24):
            y = (row + 0.5 - top) / (bottom - top) * 28 - 0.5
            x = (column + 0.5 - left) / (right - left) * 28 - 0.5
            low_y, low_x = int(np.floor(y)), int(np.floor(x))
            value = 0.0
            for cell_y, weight_y in ((low_y, 1 - (y - low_y)), (low_y + 1, y - low_y)):
                for cell_x, weight_x in ((low_x, 1 - (x - low_x)), (low_x + 1, x - low_x)):
                    if 0 <= cell_y < 28 and 0 <= cell_x < 28:
                        value += weight_y * weight_x * mask[cell_y, cell_x].item()
            assert abs(value - 0.5) < 1e-5 or pasted[row, column].item() == (value >= 0.5)


@both
def test_settings_survive_saving(backend, tmp_path):
    for make in (backend.for_detection, backend.for_segmentation):
        processor = make(**SMALL)
        processor.save_pretrained(tmp_path)
        loaded = backend.from_pretrained(tmp_path)
        assert loaded.to_dict() == processor.to_dict()
        image = picture(50, 70)
        assert torch.equal(
            loaded(image, return_tensors="pt").pixel_values, processor(image, return_tensors="pt").pixel_values
        )
        assert (tmp_path / "image_processing_dense.py").exists()
