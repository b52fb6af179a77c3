"""Dense pipelines with batches of images of several sizes: what each image gives alone, in its own size."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import hf_poolformer
from hf_poolformer import PoolFormerConfig, PoolFormerImageProcessor, PoolFormerImageProcessorPil


SMALL = {
    "depths": (1, 1, 1, 1),
    "hidden_sizes": (8, 8, 16, 16),
    "num_labels": 4,
    "fpn_feature_size": 16,
    "decoder_hidden_size": 16,
    "box_head_hidden_size": 16,
    "mask_head_num_convs": 1,
    "rpn_num_proposals": 20,
    "score_threshold": 0.0,
    "max_detections": 5,
}
SIZES = [(64, 48), (48, 64), (64, 48), (90, 40), (64, 48)]
PROCESSORS = [PoolFormerImageProcessor, PoolFormerImageProcessorPil]
KINDS = {
    "SemanticSegmentation": ("image-segmentation", "for_segmentation"),
    "InstanceSegmentation": ("image-segmentation", "for_detection"),
    "ObjectDetection": ("object-detection", "for_detection"),
}


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def flat(answers):
    """Everything in the answers about one image that can be compared."""
    return [
        (answer["label"], np.array(answer["mask"]) if "mask" in answer else np.array(list(answer["box"].values())))
        for answer in answers
    ]


@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("processor_class", PROCESSORS)
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_mixed_sizes(kind, processor_class, batch_size, images, scramble):
    task, made_for = KINDS[kind]
    model = scramble(getattr(hf_poolformer, f"PoolFormerFor{kind}")(PoolFormerConfig(**SMALL)))
    processor = getattr(processor_class, made_for)()
    processor.size = {"shortest_edge": 48, "longest_edge": 96}
    pipe = pipeline(task, model=model, image_processor=processor)
    settings = {"subtask": "instance" if kind[0] == "I" else "semantic"} if task == "image-segmentation" else {}
    alone = [pipe(image, threshold=0.0, **settings) for image in images]
    together = pipe(images, batch_size=batch_size, threshold=0.0, **settings)
    assert any(alone)
    for image, one, other in zip(images, alone, together, strict=True):
        assert [label for label, _ in flat(one)] == [label for label, _ in flat(other)]
        for (_, expected), (_, got) in zip(flat(one), flat(other), strict=True):
            if task == "image-segmentation":
                assert got.shape == image.size[::-1]
                # Sums over a batch run in another order, which may move a pixel at a border.
                assert (expected == got).mean() > 0.999
            else:
                np.testing.assert_allclose(got, expected, atol=1)


def test_other_models_keep_their_pipeline(images):
    """Their processors make one size, and their batches one tensor."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    config = SegformerConfig(hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1] * 4, num_labels=3)
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(config).eval()
    pipe = pipeline(
        "image-segmentation", model=model, image_processor=SegformerImageProcessor(size={"height": 64, "width": 64})
    )
    assert [len(answer) > 0 for answer in pipe(images, batch_size=3)] == [True] * len(images)
