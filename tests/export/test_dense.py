"""Segmenters that take photographs and give maps, and detectors: against processor, model and post-processing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

from hf_poolformer import (
    MetaFormerConfig,
    MetaFormerForSemanticSegmentation,
    PoolFormerConfig,
    PoolFormerForInstanceSegmentation,
    PoolFormerForObjectDetection,
    PoolFormerForSemanticSegmentation,
    PoolFormerImageProcessor,
)
from hf_poolformer.commands.evaluate import main as evaluate
from hf_poolformer.commands.export import main
from hf_poolformer.data.photographs import photographs
from hf_poolformer.export import export_model, load
from hf_poolformer.export.dense_verification import Inside, compare
from hf_poolformer.export.detection import DetectorDeployable
from hf_poolformer.export.graph import fold
from hf_poolformer.export.photographs import Photographs
from hf_poolformer.foundation.errors import UserError


EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_dense.py"
SMALL = {
    "depths": (1, 1, 1, 1),
    "hidden_sizes": (8, 16, 32, 64),
    "fpn_feature_size": 16,
    "decoder_hidden_size": 16,
    "box_head_hidden_size": 32,
    "rpn_anchor_scale": 2,
    "retinanet_anchor_scale": 1,
}
SIZES = ((97, 64), (61, 130), (33, 33), (150, 211), (20, 90))  # (width, height)
DETECTORS = {"retinanet": PoolFormerForObjectDetection, "mask-rcnn": PoolFormerForInstanceSegmentation}


def pictures() -> list[Image.Image]:
    return [image.resize(size) for image, size in zip(photographs(), SIZES, strict=False)]


def disturbed(model: torch.nn.Module, by: float) -> torch.nn.Module:
    """Every parameter far from its initial value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * by)
    return model.eval()


def segmenter(**settings) -> torch.nn.Module:
    torch.manual_seed(0)
    return disturbed(
        PoolFormerForSemanticSegmentation(PoolFormerConfig(**{**SMALL, "num_labels": 4, **settings})), 0.3
    )


def detector(kind: str, least: float = 0.05) -> torch.nn.Module:
    """One that finds as many objects as there may be, or none."""
    torch.manual_seed(0)
    model = DETECTORS[kind](PoolFormerConfig(**SMALL, num_labels=3, score_threshold=least, max_detections=40))
    return disturbed(model, 0.15)


def save(model: torch.nn.Module, processor: PoolFormerImageProcessor, folder: Path) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def for_maps(**settings) -> PoolFormerImageProcessor:
    return PoolFormerImageProcessor.for_segmentation(
        **{"size": {"shortest_edge": 64, "longest_edge": 160}, **settings}
    )


def for_objects() -> PoolFormerImageProcessor:
    return PoolFormerImageProcessor.for_detection(size={"shortest_edge": 96, "longest_edge": 160})


@pytest.fixture(scope="module")
def segmenter_folder(tmp_path_factory):
    return save(segmenter(), for_maps(), tmp_path_factory.mktemp("segmenter"))


@torch.no_grad()
def right_map(model: torch.nn.Module, processor: PoolFormerImageProcessor, image: Image.Image) -> torch.Tensor:
    outputs = model(**processor(image, return_tensors="pt"))
    return processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])[0]


@pytest.mark.parametrize("divisor", [None, 32])
@pytest.mark.parametrize("size", [{"shortest_edge": 64, "longest_edge": 160}, {"height": 48, "width": 80}])
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_resizing_is_the_processors(resample, size, divisor):
    """But for a level of few pixels, whose sum lies between two."""
    processor = for_maps(size=size, resample=resample, do_pad=divisor is not None, size_divisor=divisor)
    inside = Photographs(processor, 3)
    for image in pictures():
        right = processor(image, return_tensors="pt")
        got, edges = inside(torch.from_numpy(np.array(image))[None])
        assert got.shape == right["pixel_values"].shape
        if divisor:
            assert edges == (right["pixel_mask"][0, :, 0].sum(), right["pixel_mask"][0, 0].sum())
        off = (got - right["pixel_values"]).abs() * 255 * torch.tensor(processor.image_std)[:, None, None]
        assert off.max() < 1.01 and (off > 0.01).float().mean() < 0.01


@pytest.mark.parametrize("format", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_segmenter_takes_photographs(format, segmenter_folder, tmp_path):
    """`load` and the pipeline against PyTorch, on photographs of odd sizes; onnxruntime alone, and the example."""
    out = tmp_path / "out"
    summary = export_model(segmenter_folder, out, format=format, preprocessing=True)
    assert summary.manifest.resizes and summary.report.kind == "pixels" and summary.report.agreement > 0.999
    model, processor = segmenter(), for_maps()
    exported = load(out, trust_remote_code=format == "torch")
    segment = pipeline("image-segmentation", model=exported, image_processor=exported.image_processor)
    for image in pictures():
        right = right_map(model, processor, image)
        outputs = exported(**exported.image_processor(image, return_tensors="pt"))
        got = outputs.segmentation[0]
        # What differs are near ties next to a pixel that was rounded to another level.
        assert got.shape == right.shape and (got == right).float().mean() > 0.995
        for part in segment(image):
            mask = np.asarray(part["mask"]) > 0
            assert (mask == (got.numpy() == exported.config.label2id[part["label"]])).all()
    with pytest.raises(ValueError, match="by its own image_processor"):
        exported(**AutoImageProcessor.from_pretrained(out)(image, return_tensors="pt"))
    with pytest.raises(ValueError, match="the size of the images that it gets"):
        exported.image_processor.post_process_semantic_segmentation(outputs, [(5, 5)])
    if format == "onnx":
        session = onnxruntime.InferenceSession(out / "model.onnx")
        (alone,) = session.run(["classes"], {"pixel_values": np.array(image)[None]})
        assert alone.dtype == np.int32 and (alone[0] == got.numpy()).all()
        check_example(out, image, got.numpy(), tmp_path)


def check_example(out: Path, image: Image.Image, classes: np.ndarray, folder: Path) -> None:
    """Without torch."""
    image.save(folder / "photo.png")
    block = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
    arguments = ["x", str(out), str(folder / "photo.png"), str(folder / "map.png")]
    code = f"{block}import runpy; sys.argv = {arguments!r}; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (np.asarray(Image.open(folder / "map.png")) == classes).all()
    assert done.stdout.count("LABEL_") == done.stdout.count("%") == len(np.unique(classes))


@pytest.mark.parametrize("kind", DETECTORS)
def test_the_graph_of_a_detector_computes_what_the_model_does(kind):
    """Folded, before it is written: with padding, in a batch's padding, and of a photograph."""
    model, processor = detector(kind), for_objects()
    inside, outside = (DetectorDeployable(fold(model), torch.float32, with_).eval() for with_ in (processor, None))
    for image in pictures()[:3]:
        padded = [processor(image, return_tensors="pt", size_divisor=divisor) for divisor in (32, 128)]
        height, width = (padded[0]["pixel_mask"][0].amax(axis).sum().item() for axis in (1, 0))
        for inputs in padded:
            with torch.no_grad():
                outputs = model(**inputs)
                boxes, scores, labels, *masks = outside(**inputs)
            (right,) = processor.post_process_object_detection(outputs, 0.0, [(height, width)])
            assert len(boxes) == len(right["boxes"])
            found = {"boxes": boxes, "scores": scores, "labels": labels}
            if masks:  # over their boxes
                found["masks"], right["masks"] = masks[0] > 0.5, outputs.pred_masks[0] > 0
            alone, total, off = compare(found, right, model.config, "float32")
            assert total > 20 and not alone and off < 1e-4
    pixels = torch.from_numpy(np.array(image))[None]
    with torch.no_grad():
        boxes, scores, labels, *_ = inside(pixels)
        (right,) = processor.post_process_object_detection(
            model(**processor(image, return_tensors="pt")), 0.0, [image.size[::-1]]
        )
    found = {"boxes": boxes, "scores": scores, "labels": labels}
    alone, total, _ = compare(found, right, model.config, "float32")
    assert total > 20 and alone <= 0.1 * total  # a level of a pixel decides between two that overlap


def test_detections_without_a_partner_are_counted():
    """What is compared when an export is verified."""
    right = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [5, 5, 9, 9]]),
        "scores": torch.tensor([0.9, 0.8, 0.0505]),
        "labels": torch.tensor([1, 0, 1]),
    }
    config = PoolFormerConfig(score_threshold=0.05, max_detections=100)

    def alone(**changes):
        return compare({**right, **changes}, right, config, "float32")[:2]

    assert alone() == (0, 4)  # the third is too near to the threshold to be asked for
    assert alone(labels=torch.tensor([1, 1, 1]))[0] == 2
    assert alone(boxes=right["boxes"] + torch.tensor([[0.0], [0.3], [0.0]]))[0] == 2
    assert alone(scores=torch.tensor([0.9, 0.79, 0.0505]))[0] == 2
    assert alone(**{name: values[:2] for name, values in right.items()})[0] == 0
    assert alone(**{name: values[:1] for name, values in right.items()})[0] == 1
    nothing = {name: values[:0] for name, values in right.items()}
    assert compare(nothing, nothing, config, "float32") == (0, 0, 0.0)


def found_by(model, processor, image: Image.Image) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[image.size[::-1]])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("preprocessing", [False, True])
@pytest.mark.parametrize("kind", DETECTORS)
def test_detectors_as_onnx(kind, preprocessing, tmp_path, capsys):
    """onnxruntime alone, `load`, pipeline and post-processing against PyTorch; and where nothing is found."""
    model, processor = detector(kind), for_objects()
    folder, out = save(model, processor, tmp_path / "model"), tmp_path / "out"
    assert main([folder, str(out), *(["--preprocessing"] if preprocessing else [])]) == 0
    assert "detections with a partner: " in capsys.readouterr().out
    session, exported = onnxruntime.InferenceSession(out / "model.onnx"), load(out)
    for image in pictures():
        # A level of a pixel that is rounded otherwise decides between two that overlap: of the same pixels.
        right = found_by(model, Inside(processor, 3) if preprocessing else processor, image)
        if preprocessing:
            inputs = {"pixel_values": np.array(image)[None]}
        else:
            inputs = {name: value.numpy() for name, value in processor(image, return_tensors="pt").items()}
        boxes, scores, labels, *masks = session.run(None, inputs)
        assert 20 < len(boxes) == len(scores) == len(labels) <= 40
        assert [part.shape for part in masks] == ([(len(boxes), 28, 28)] if kind == "mask-rcnn" else [])
        got = found_by(exported, exported.image_processor, image)
        alone, total, off = compare(got, right, model.config, "float32")
        assert total > 20 and not alone and off < 1e-3
    images = pictures()
    if kind == "retinanet":
        detect = pipeline("object-detection", model=exported, image_processor=exported.image_processor)
        several = detect(images, batch_size=2, threshold=0.1)
        assert [len(found) for found in several] == [len(detect(image, threshold=0.1)) for image in images]
    else:
        segment = pipeline("image-segmentation", model=exported, image_processor=exported.image_processor)
        assert all(part["mask"].size == images[0].size for part in segment(images[0], threshold=0.05))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "precision"), [("onnx", "float16"), ("openvino", "float32"), ("openvino", "float16")]
)
@pytest.mark.parametrize("kind", DETECTORS)
def test_detectors_in_other_forms(kind, format, precision, tmp_path):
    model, processor = detector(kind), for_objects()
    folder = save(model, processor, tmp_path / "model")
    export_model(folder, tmp_path / "out", format=format, precision=precision)
    exported = load(tmp_path / "out")
    for image in pictures():
        got, right = (found_by(each, processor, image) for each in (exported, model))
        alone, total, _ = compare(got, right, model.config, precision)
        assert total > 10 and alone <= (0 if precision == "float32" else 0.1 * total)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DETECTORS)
def test_a_detector_that_finds_nothing(kind, tmp_path, capsys):
    """It is not declared verified; and a graph that finds nothing in a picture gives none, not an error."""
    folder = save(detector(kind, least=0.9999), for_objects(), tmp_path / "model")
    assert main([folder, str(tmp_path / "out")]) == 2
    assert "finds nothing in any of the photographs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    found = detector(kind)
    scores = [found_by(found, for_objects(), image)["scores"].max() for image in pictures()]
    # Between the surest of all pictures and of a grey one lies a threshold.
    grey = Image.new("RGB", (90, 70), (120, 120, 120))
    least = (max(scores) + found_by(found, for_objects(), grey)["scores"].max()) / 2
    assert least > found_by(found, for_objects(), grey)["scores"].max()
    folder = save(detector(kind, least=least.item()), for_objects(), tmp_path / "sure")
    export_model(folder, tmp_path / "out")
    exported = load(tmp_path / "out")
    nothing = found_by(exported, exported.image_processor, grey)
    assert nothing["boxes"].shape == (0, 4) and nothing["scores"].shape == (0,)
    if kind == "mask-rcnn":
        segment = pipeline("image-segmentation", model=exported, image_processor=exported.image_processor)
        assert segment(grey) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "precision", "least"),
    [
        ("onnx", "float16", 0.99),
        ("onnx", "int8", 0.8),
        ("openvino", "float32", 0.999),
        ("openvino", "float16", 0.99),
        ("openvino", "bfloat16", 0.95),
        ("openvino", "int8", 0.8),
        ("torch", "float32", 0.999),
        ("torch", "float16", 0.99),
        ("torch", "bfloat16", 0.95),
    ],
)
def test_segmenters_in_all_formats(format, precision, least, segmenter_folder, photos, tmp_path):
    calibration = {"calibration_dataset": str(photos), "calibration_size": 16} if precision == "int8" else {}
    summary = export_model(
        segmenter_folder, tmp_path / "out", format=format, precision=precision, preprocessing=True, **calibration
    )
    assert summary.report.passed and summary.report.agreement > least
    exported = load(tmp_path / "out", trust_remote_code=format == "torch")
    model, processor = AutoModelForSemanticSegmentation.from_pretrained(segmenter_folder).eval(), for_maps()
    for image in pictures():
        outputs = exported(**exported.image_processor(image, return_tensors="pt"))
        (got,) = exported.image_processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])
        assert (got == right_map(model, processor, image)).float().mean() > least - 0.05


@pytest.mark.slow
def test_a_segmenter_of_fixed_tokens(tmp_path):
    """Takes photographs of any size where its image processor makes one size of them."""
    config = MetaFormerConfig(
        **{key: value for key, value in SMALL.items() if key != "depths"},
        depths=(1, 1, 1, 1),
        token_mixers=["pooling", "pooling", "random", "random"],
        image_size=64,
        num_labels=4,
    )
    torch.manual_seed(0)
    model = disturbed(MetaFormerForSemanticSegmentation(config), 0.3)
    folder = save(model, for_maps(), tmp_path / "model")
    with pytest.raises(UserError, match="one height and width"):
        export_model(folder, tmp_path / "out", preprocessing=True)
    processor = for_maps(size={"height": 64, "width": 64})
    export_model(save(model, processor, tmp_path / "square"), tmp_path / "out", preprocessing=True)
    exported = load(tmp_path / "out")
    for image in pictures():
        outputs = exported(**exported.image_processor(image, return_tensors="pt"))
        right = right_map(model, processor, image)
        assert (outputs.segmentation[0] == right).float().mean() > 0.995


def test_requests_that_cannot_be_met(segmenter_folder, tmp_path, capsys):
    out = tmp_path / "out"
    found = save(detector("retinanet"), for_objects(), tmp_path / "detector")
    crops = save(segmenter(), for_maps(do_center_crop=True, crop_size={"height": 64, "width": 64}), tmp_path / "crops")
    box = save(segmenter(), for_maps(resample=Image.Resampling.BOX), tmp_path / "box")
    for arguments, message in (
        ((found, "--format", "openvino", "--precision", "bfloat16"), "in float32 and float16"),
        ((found, "--format", "torch"), "non-maximum suppression"),
        ((found, "--precision", "int8", "--calibration_dataset", str(tmp_path)), "a detector"),
        ((found, "--dynamic_size", "false"), "leave --dynamic_size out"),
        ((crops, "--preprocessing"), "crops"),
        ((box, "--preprocessing"), "bilinear and bicubic"),
    ):
        assert main([arguments[0], str(out), *arguments[1:]]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ") and message in said
        assert not out.exists()


@pytest.mark.slow
def test_exports_are_evaluated(segmenter_folder, tmp_path, capsys):
    """Maps with a truth that is the model's own answer: all right but for near ties."""
    data = tmp_path / "data" / "validation"
    model, processor = segmenter(), for_maps()
    for index, image in enumerate(pictures()):
        for folder, picture in (
            ("images", image),
            ("masks", Image.fromarray(right_map(model, processor, image).numpy().astype(np.uint8))),
        ):
            (data / folder).mkdir(parents=True, exist_ok=True)
            picture.save(data / folder / f"{index}.png")
    export_model(segmenter_folder, tmp_path / "out", preprocessing=True)
    arguments = ["--dataset_name", str(tmp_path / "data"), "--split", "validation", "--num_workers", "0", "--json"]
    assert evaluate([str(tmp_path / "out"), *arguments, "--report", str(tmp_path / "report")]) == 0
    text = capsys.readouterr().out
    found = json.loads(text[text.index("{") :])
    assert found["eval_pixel_accuracy"] > 0.999
    assert (tmp_path / "report" / "report.html").is_file()
