import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert, masks_to_boxes

from hf_poolformer import PoolFormerImageProcessor
from hf_poolformer.data.dense.annotations import Objects
from hf_poolformer.data.dense.batches import collate, collate_maps
from hf_poolformer.training.dense.augmentation import DenseTrainTransform


COLOURS = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250]], np.uint8)


def scene(height=120, width=160):
    """Discs, two of them overlapping, whose colours tell where the image went."""
    pixels = np.zeros((height, width, 3), np.uint8)
    y, x = np.mgrid[:height, :width]
    masks = []
    for (cy, cx, radius), colour in zip([(40, 40, 20), (50, 75, 25), (95, 130, 15)], COLOURS, strict=True):
        mask = np.hypot(y - cy, x - cx) <= radius
        pixels[mask] = colour
        masks = [known & ~mask for known in masks] + [mask]
    masks = np.array(masks)
    boxes = masks_to_boxes(torch.from_numpy(masks)).numpy() + np.array([0, 0, 1, 1])
    crowd = np.zeros(3, bool)
    objects = Objects(boxes.astype(np.float32), np.arange(3), masks, crowd, masks.sum((1, 2)).astype(float))
    return Image.fromarray(pixels), objects


@pytest.fixture
def transform(make_settings):
    def make(task="instance-segmentation", **changes):
        return DenseTrainTransform(make_settings(task, **changes), PoolFormerImageProcessor())

    return make


def pixel_boxes(pixel_values, labels):
    height, width = pixel_values.shape[-2:]
    return box_convert(labels["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])


@pytest.mark.parametrize("crop", [None, 96])
def test_boxes_stay_the_bounding_boxes_of_the_masks_and_masks_stay_on_their_colours(transform, crop):
    image, objects = scene()
    changes = {"image_size": 120, "longest_edge": 160, "scale_min": 0.5, "scale_max": 2.0, "crop_size": crop}
    augment = transform(**changes, horizontal_flip=0.5)
    sizes = set()
    for _ in range(40):
        pixel_values, labels = augment(image, objects)
        sizes.add(pixel_values.shape[-1])
        masks, boxes = labels["masks"], pixel_boxes(pixel_values, labels)
        assert masks.shape[1:] == pixel_values.shape[1:] and masks.dtype == torch.bool
        assert len(masks) == len(boxes) == len(labels["class_labels"])
        if len(masks):
            around = masks_to_boxes(masks)
            around[:, 2:] += 1
            # A crop gives new boxes; resized ones keep their fractions, and a disc may lose its outermost row.
            assert (boxes - around).abs().max() <= (1e-3 if crop else 1.5)
        shown = pixel_values.argmax(dim=0)  # of a disc's pixels, its class: the colours are nearly pure
        for mask, label in zip(masks, labels["class_labels"], strict=True):
            inside = mask & (pixel_values.amax(dim=0) > 1)
            if inside.sum() > 30:
                assert (shown[inside] == label).float().mean() > 0.9
    assert len(sizes) == 1 if crop else len(sizes) > 10


def test_flip_is_a_flip(transform):
    image, objects = scene()
    same = {"image_size": 120, "longest_edge": 160}
    plain, before = transform(horizontal_flip=0.0, **same)(image, objects)
    mirrored, after = transform(horizontal_flip=1.0, **same)(image, objects)
    assert torch.equal(mirrored, plain.flip(-1)) and torch.equal(after["masks"], before["masks"].flip(-1))
    expected = before["boxes"].clone()
    expected[:, 0] = 1 - expected[:, 0]
    torch.testing.assert_close(after["boxes"], expected)
    processor = PoolFormerImageProcessor.for_detection(size={"shortest_edge": 120, "longest_edge": 160}, do_pad=False)
    torch.testing.assert_close(plain, processor(image, return_tensors="pt")["pixel_values"][0])


def test_maps_go_with_their_image_and_padding_has_no_class(transform):
    image, objects = scene()
    classes = np.full((120, 160), 3, np.uint8)
    for index, mask in enumerate(objects.masks):
        classes[mask] = index
    changes = {"image_size": 120, "longest_edge": 160, "scale_min": 0.5, "scale_max": 1.5, "crop_size": 128}
    augment = transform("semantic-segmentation", **changes, horizontal_flip=0.5)
    padded = False
    for _ in range(20):
        pixel_values, labels = augment(image, classes)
        assert pixel_values.shape == (3, 128, 128) and labels.shape == (128, 128) and labels.dtype == torch.int64
        assert set(labels.unique().tolist()) <= {0, 1, 2, 3, 255}
        outside = labels == 255
        padded |= bool(outside.any())
        assert pixel_values[:, outside].abs().max() < 0.05 if outside.any() else True  # the mean colour
        known = (labels < 3) & (pixel_values.amax(dim=0) > 1)
        assert (pixel_values.argmax(dim=0)[known] == labels[known]).float().mean() > 0.9
    assert padded


def test_a_crop_that_shows_one_class_only_is_drawn_again(transform):
    pixels = np.zeros((200, 200, 3), np.uint8)
    classes = np.zeros((200, 200), np.uint8)
    classes[:, 180:] = 1
    changes = {"image_size": 200, "longest_edge": 200, "crop_size": 60}

    def varied(share):
        random.seed(0)
        torch.manual_seed(0)
        augment = transform("semantic-segmentation", max_class_share=share, **changes)
        shown = [augment(Image.fromarray(pixels), classes)[1] for _ in range(60)]
        return sum(len(labels.unique()) > 1 for labels in shown)

    assert varied(0.75) > 2 * varied(1.0)


def test_colours_change_and_geometry_does_not(transform):
    image, objects = scene()
    changes = {"image_size": 120, "longest_edge": 160, "horizontal_flip": 0.0}
    plain, before = transform(**changes)(image, objects)
    distort = transform(**changes, photometric_distortion=True)
    results = [distort(image, objects) for _ in range(8)]
    assert sum(not torch.equal(pixel_values, plain) for pixel_values, _ in results) >= 6
    assert all(torch.equal(labels["boxes"], before["boxes"]) for _, labels in results)


def test_crowds_slivers_and_images_without_objects(transform):
    image, objects = scene()
    augment = transform(image_size=60, longest_edge=80)
    objects.crowd[1] = True
    thin = Objects(*(np.concatenate([part, part[:1]]) for part in vars(objects).values()))
    thin.boxes[3] = [10, 10, 11, 60]  # half a pixel wide at half the size
    _, labels = augment(image, thin)
    assert labels["class_labels"].tolist() == [0, 2] and labels["masks"].shape == (2, 60, 80)
    nothing = objects.chosen(np.zeros(3, bool))
    for crop in (None, 48):
        pixel_values, labels = transform(image_size=60, longest_edge=80, crop_size=crop)(image, nothing)
        assert labels["boxes"].shape == (0, 4) and labels["masks"].shape == (0, *pixel_values.shape[1:])
    many = Objects(*(np.concatenate([part[:1]] * 300) for part in vars(objects).values()))
    assert len(transform(image_size=60, longest_edge=80, crop_size=64)(image, many)[1]["boxes"]) in (0, 300)


def test_batches_are_padded_at_the_bottom_and_on_the_right():
    images = [torch.ones(3, 40, 64), torch.ones(3, 33, 20)]
    batch, mask = collate(images, 32)
    assert batch.shape == (2, 3, 64, 64) and mask.shape == (2, 64, 64)
    assert mask[1].sum() == 33 * 20 and mask[1, :33, :20].all() and torch.equal(batch.sum(1) > 0, mask.bool())
    assert collate([torch.ones(3, 32, 64)] * 2, 32)[1] is None
    maps = collate_maps([torch.zeros(40, 64).long(), torch.zeros(33, 20).long()], (64, 64))
    assert (maps[1] == 0).sum() == 33 * 20 and (maps[0] == 255).sum() == 24 * 64
