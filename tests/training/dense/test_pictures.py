import numpy as np
import pytest
import torch
from PIL import Image

from hf_poolformer import PoolFormerImageProcessor
from hf_poolformer.data.dense.annotations import Objects
from hf_poolformer.data.dense.datasets import Truth
from hf_poolformer.evaluation.dense import BoxJudge, EvaluatedImage, predict
from hf_poolformer.evaluation.dense_pictures import write_predictions
from hf_poolformer.modeling_detection import MetaFormerObjectDetectionOutput
from hf_poolformer.training.reports import write_curves


pytestmark = pytest.mark.usefixtures("drawn")


MEAN, STD = [0.5] * 3, [0.5] * 3


def example(labels, scores, size=(40, 50)):
    """One true object of class 0, and found ones."""
    mask = np.zeros((1, *size), bool)
    mask[0, 5:20, 5:25] = True
    boxes = np.array([[5, 5, 25, 20]], np.float32)
    objects = Objects(boxes, np.zeros(1, np.int64), mask, np.zeros(1, bool), np.array([300.0]))
    count = len(labels)
    found = {
        "boxes": boxes.repeat(count, axis=0),
        "scores": np.array(scores, np.float32),
        "labels": np.array(labels, np.int64),
        "masks": mask.repeat(count, axis=0),
    }
    return EvaluatedImage(torch.zeros(3, 32, 40), Truth(b"", size, objects=objects), found)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_objects_are_drawn_in_the_colour_of_their_class_if_they_are_sure(tmp_path, number):
    def coloured(*found):
        write_predictions(tmp_path / "picture.png", [example(*found)] * number, ["a", "b"], MEAN, STD)
        pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")).astype(int)
        blue, orange = pixels[..., 2] - pixels[..., 0] > 40, pixels[..., 0] - pixels[..., 2] > 40
        return blue.sum(), orange.sum()

    truth_only, none = coloured([1], [0.1])
    assert truth_only > 500 and none == 0
    both, orange = coloured([1], [0.9])
    assert orange > 500 * number and both == pytest.approx(truth_only, rel=0.2)
    assert coloured([], [])[1] == 0


def test_maps(tmp_path):
    classes = np.zeros((40, 50), np.int64)
    classes[:20], classes[:5] = 1, 255
    one = EvaluatedImage(torch.zeros(3, 40, 50), Truth(b"", (40, 50), map=classes), np.zeros_like(classes))
    write_predictions(tmp_path / "picture.png", [one], ["a", "b"], MEAN, STD)
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")).astype(int)
    assert (pixels[..., 0] - pixels[..., 2] > 40).sum() > 1000


def test_labels_of_detections_are_whole_numbers():
    class Accelerator:
        device = torch.device("cpu")

        @staticmethod
        def autocast():
            return torch.no_grad()

    processor = PoolFormerImageProcessor.for_detection()
    logits = torch.tensor([[[-9.0, 3.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]])
    outputs = MetaFormerObjectDetectionOutput(logits=logits, pred_boxes=boxes)
    truth = example([], []).truth
    images = [torch.zeros(3, 64, 64)]
    (found,) = predict(lambda **_: outputs, images, [truth], BoxJudge(2), processor, Accelerator)
    assert found["labels"].dtype == np.int64 and found["labels"].tolist() == [1]
    np.testing.assert_allclose(found["boxes"], [[20, 16, 30, 24]], rtol=1e-5)


@pytest.mark.parametrize("task", ["semantic-segmentation", "object-detection", "instance-segmentation"])
def test_curves_of_runs_with_and_without_evaluations(tmp_path, task):
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 5)]
    write_curves(tmp_path / "curves.png", rows, task)
    names = ("eval_miou", "eval_pixel_accuracy", "eval_map", "eval_map_50", "eval_mask_map", "eval_mask_map_50")
    write_curves(tmp_path / "curves.png", [*rows, {"step": 4, **dict.fromkeys(names, 0.5), "eval_map": None}], task)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
