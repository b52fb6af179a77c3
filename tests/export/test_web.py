"""`export --format web`: the folder, and its graph against the image processor and the model."""

import base64
import hashlib
import itertools
import json
import subprocess
import tarfile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from transformers import AutoImageProcessor

from hf_poolformer import (
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerForSemanticSegmentation,
    PoolFormerImageProcessor,
    PoolFormerImageProcessorPil,
)
from hf_poolformer.commands.evaluate import main as evaluate
from hf_poolformer.commands.export import main
from hf_poolformer.data.photographs import photographs
from hf_poolformer.export import export_model, load, onnxruntime_web, resizing, web
from hf_poolformer.export.images import made_up
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.hub.metadata import check_card
from hf_poolformer.image_pixels import pil_to_rgb


SMALL = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 32, 64)}
HOSTILE = ["<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "a\u2028b \U0001f431", "d", "e", "f"]


def small(**settings):
    torch.manual_seed(0)
    return PoolFormerForImageClassification(PoolFormerConfig(**SMALL, **settings))


def hash_of(content):
    return base64.b64encode(hashlib.sha384(content).digest()).decode()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Stands for the unpacked package: the real one has 41 MB. Its hashes are the known ones meanwhile."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "dist").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in onnxruntime_web.SHA384:
            (folder / "dist" / name).write_text(f"// {name}")
            patch.setitem(onnxruntime_web.SHA384, name, hash_of(f"// {name}".encode()))
        yield folder


@pytest.fixture(scope="module")
def model_dir(save_model):
    return save_model(small(id2label=dict(enumerate(HOSTILE)), label2id={name: i for i, name in enumerate(HOSTILE)}))


@pytest.fixture(scope="module")
def page(model_dir, package, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "out"
    assert main([model_dir, str(out), "--format", "web", "--vendor", str(package)]) == 0
    return out


def answers_of(folder, image):
    """Of the file as it lies there, on an image of any size."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"image": np.asarray(image)})[0][0]


def test_the_folder_is_a_page(page, package):
    files = {path.relative_to(page).as_posix() for path in page.rglob("*") if path.is_file()}
    small_files = {"index.html", "page.css", "page.js", "classify.js", "runtime.js", "web.json"}
    vendored = {f"vendor/{name}" for name in onnxruntime_web.SHA384}
    described = {"config.json", "preprocessor_config.json", "export.json", "verification.json", "README.md"}
    assert files == small_files | vendored | described | {"sw.js", "model.onnx", "vendor/LICENSE"}
    for name in vendored:
        assert (page / name).read_bytes() == (package / "dist" / name.partition("/")[2]).read_bytes()
    assert "Copyright (c) Microsoft Corporation" in (page / "vendor" / "LICENSE").read_text()

    settings = json.loads((page / "web.json").read_text())
    assert settings["labels"] == HOSTILE and settings["kind"] == "classes"
    assert settings["precision"] == "float16", "what is written unless somebody says it"
    assert settings["graph"]["integrity"] == f"sha384-{hash_of((page / 'model.onnx').read_bytes())}"
    assert settings["runtime"]["folder"] == "vendor/"
    for name, integrity in settings["runtime"]["integrity"].items():
        assert integrity == f"sha384-{hash_of((page / 'vendor' / name).read_bytes())}"
    check = settings["check"]
    right = answers_of(page, web.check_image(check["height"], check["width"]))
    assert np.allclose(check["scores"], right, atol=1e-5)
    assert "onerror" not in "".join(path.read_text() for path in page.glob("*.html")), "names are no part of the HTML"

    worker = (page / "sw.js").read_text()
    kept = json.loads(worker.partition(";\n")[0].removeprefix("const EXPORT = "))
    assert set(kept["small"]) == small_files
    assert set(kept["large"]) == vendored | {"model.onnx"}
    report = json.loads((page / "verification.json").read_text())
    assert report["passed"] and report["resizing"]["images"] == 13 and report["resizing"]["largest_difference"] <= 2
    assert any("resized in the graph" in entry["images"] for entry in report["checks"])
    card = (page / "README.md").read_text()
    check_card(card)
    assert "of any size; resized in the graph" in card and "- web\n" in card


def test_weights_are_stored_in_half_the_bytes(page):
    tensors = onnx.load(page / "model.onnx").graph.initializer
    large = [tensor for tensor in tensors if len(tensor.dims) > 1 and np.prod(tensor.dims) >= web.LARGE]
    assert large and {tensor.data_type for tensor in large} == {TensorProto.FLOAT16}


def test_the_graph_is_processor_and_model(page, model_dir):
    """Of every mode and of odd sizes. Float16 weights alone make up to 2e-4 of these small probabilities."""
    model = PoolFormerForImageClassification.from_pretrained(model_dir).eval()
    processor = AutoImageProcessor.from_pretrained(model_dir)
    photo = made_up(0)
    faded = photo.resize((91, 37)).convert("RGBA")
    faded.putalpha(Image.linear_gradient("L").resize(faded.size))
    images = [photo, photo.resize((1, 500)), photo.resize((500, 1)), photo.convert("L"), photo.convert("P"), faded]
    spread = []
    for image in [*images, photo.convert("CMYK"), photo.resize((64, 65)), photo.resize((1999, 1000))]:
        with torch.inference_mode():
            right = model(**processor(image, return_tensors="pt")).logits.softmax(1)[0]
        assert answers_of(page, pil_to_rgb(image)) == pytest.approx(right.numpy(), abs=1e-3)
        spread.append(right)
    assert torch.stack(spread).std(0).max() > 5e-3, "else all images would have the same answer"


def test_it_is_used_like_other_exports(page, model_dir):
    exported = load(page)
    assert exported.manifest.preprocessing and exported.manifest.input == "image"
    model = PoolFormerForImageClassification.from_pretrained(model_dir).eval()
    pixel_values = exported.image_processor([made_up(1), made_up(2)], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        right = model(pixel_values).logits.softmax(1)
    assert torch.allclose(exported(pixel_values).logits.softmax(1), right, atol=1e-3)


PROCESSORS = {
    "usual": {},
    "bilinear": {"resample": 2},
    "both edges": {"size": {"height": 100, "width": 120}, "crop_pct": None, "do_center_crop": False},
    "smaller than its crop": {"size": {"height": 64, "width": 64}, "crop_size": {"height": 100, "width": 91}},
    "cropped only": {"do_resize": False},
    "no crop": {"size": {"shortest_edge": 65}, "do_center_crop": False},
    "grey": {"num_channels": 1},
}
SIZES = [(320, 256), (37, 91), (249, 248), (224, 225), (1000, 20), (20, 1000), (1, 700), (700, 1), (1, 1), (1301, 901)]


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_the_processors(name):
    options = {**PROCESSORS[name], "do_rescale": False, "do_normalize": False}
    processors = [kind(**options) for kind in (PoolFormerImageProcessor, PoolFormerImageProcessorPil)]
    channels = options.get("num_channels", 3)
    resizing.check_processor("model", processors[0], channels)
    value = helper.make_tensor_value_info("pixel_values", TensorProto.UINT8, ["batch", "rows", "columns", channels])
    out = helper.make_tensor_value_info("out", TensorProto.UINT8, ["batch", "rows", "columns", channels])
    graph = helper.make_graph([helper.make_node("Identity", ["pixel_values"], ["out"])], "graph", [value], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    resizing.append_front(model, processors[0], channels)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    for index, size in enumerate(SIZES):
        if name == "no crop" and max(size) > 50 * min(size):
            continue  # which would become an image of thousands of pixels
        image = photographs()[index % 4].resize(size)
        if size == (249, 248):
            image = Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        (got,) = session.run(None, {"image": np.asarray(image)})
        for processor in processors:
            right = processor(image, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
            assert got.shape == right.shape
            off = np.abs(got.astype(int) - right.astype(int))
            # The two processors differ from each other by as much; a filter or a crop one pixel off, by tens.
            assert off.max() <= 2 and (off > 0).mean() < 0.05, size


def refused(capsys, out, model, *options):
    """What the command says; nothing may be left."""
    before = sorted(out.parent.rglob("*"))
    assert main([model, str(out), "--format", "web", *map(str, options)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "Traceback" not in said
    assert sorted(out.parent.rglob("*")) == before
    return said


def test_what_cannot_be_a_page(model_dir, save_model, tmp_path, capsys):
    out = tmp_path / "out"
    assert "--dynamic_size is not for --format web" in refused(capsys, out, model_dir, "--dynamic_size", "true")
    assert "onnxruntime-web has no bfloat16" in refused(capsys, out, model_dir, "--precision", "bfloat16")
    segmenter = save_model(PoolFormerForSemanticSegmentation(PoolFormerConfig(**SMALL, num_labels=3)))
    assert "for image classifiers" in refused(capsys, out, segmenter)
    lanczos = save_model(small(num_labels=3))
    PoolFormerImageProcessor(resample=1).save_pretrained(lanczos)
    assert "resizes with lanczos" in refused(capsys, out, lanczos)
    with pytest.raises(UserError, match="belongs to --format web"):
        export_model(model_dir, out, vendor=True)


def test_the_runtimes_files_are_known_ones_or_none(model_dir, package, tmp_path, capsys, monkeypatch):
    out = tmp_path / "work" / "out"
    out.parent.mkdir()
    assert "no such folder" in refused(capsys, out, model_dir, "--vendor", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no ort.webgpu.min.mjs" in refused(capsys, out, model_dir, "--vendor", tmp_path / "empty")
    (tmp_path / "changed").mkdir()
    for file in (package / "dist").iterdir():
        (tmp_path / "changed" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "changed" / "ort-wasm-simd-threaded.wasm").write_bytes(b"something else")
    assert "its hash is another" in refused(capsys, out, model_dir, "--vendor", tmp_path / "changed")
    packed = tmp_path / "package.tgz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(package, "package")
    assert "its SHA-512 is another" in refused(capsys, out, model_dir, "--vendor", packed)
    sha512 = base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode()
    monkeypatch.setattr(onnxruntime_web, "SHA512", sha512)
    assert onnxruntime_web.gather(packed, ("wasm",)).keys() == set(onnxruntime_web.WAYS["wasm"])


def test_npm_that_is_not_there_or_fails(model_dir, tmp_path, capsys, monkeypatch):
    out = tmp_path / "work" / "out"
    out.parent.mkdir()
    monkeypatch.setattr(onnxruntime_web.shutil, "which", lambda name: None)
    assert "npm, which is not installed" in refused(capsys, out, model_dir, "--vendor")
    monkeypatch.setattr(onnxruntime_web.shutil, "which", lambda name: name)

    def run(command, **options):
        assert command[:3] == ["npm", "pack", f"onnxruntime-web@{onnxruntime_web.VERSION}"]
        return subprocess.CompletedProcess(command, 1, "", "npm error code ENOTFOUND\nnpm error network\n")

    monkeypatch.setattr(onnxruntime_web.subprocess, "run", run)
    said = refused(capsys, out, model_dir, "--vendor")
    assert "npm error code ENOTFOUND" in said and "--vendor FOLDER takes the unpacked npm package" in said


@pytest.mark.slow
@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression", None])
@pytest.mark.parametrize("num_channels", [3, 1])
def test_other_answers_and_channels(problem_type, num_channels, save_model, tmp_path):
    model = small(num_labels=3, problem_type=problem_type, num_channels=num_channels)
    folder = save_model(model)
    if num_channels == 1:
        square = {"height": 64, "width": 64}
        PoolFormerImageProcessor(num_channels=1, size=square, crop_size=square, crop_pct=0.9).save_pretrained(folder)
    export_model(folder, tmp_path / "out", format="web", precision="float32")
    settings = json.loads((tmp_path / "out" / "web.json").read_text())
    kind = {"multi_label_classification": "labels", "regression": "numbers", None: "classes"}[problem_type]
    assert settings["kind"] == kind
    assert settings["thresholds"] == ([0.5] * 3 if kind == "labels" else None)
    assert (
        settings["runtime"]["folder"]
        == f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{onnxruntime_web.VERSION}/dist/"
    )
    assert not (tmp_path / "out" / "vendor").exists()
    processor = AutoImageProcessor.from_pretrained(folder)
    image = photographs()[0].resize((123, 77))
    with torch.inference_mode():
        right = model(**processor(image, return_tensors="pt")).logits[0]
    right = {"labels": right.sigmoid(), "numbers": right, "classes": right.softmax(0)}[kind]
    assert answers_of(tmp_path / "out", image) == pytest.approx(right.numpy(), abs=1e-3, rel=1e-3)


@pytest.mark.slow
def test_int8_where_there_are_images_to_calibrate_on(model_dir, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([model_dir, str(out), "--format", "web", "--calibration_dataset", str(photos)]) == 0
    assert f"{out}: web, int8" in capsys.readouterr().out
    settings = json.loads((out / "web.json").read_text())
    assert not settings["webgpu"] and settings["runtime"]["ways"].keys() == {"wasm"}
    kinds = {tensor.data_type for tensor in onnx.load(out / "model.onnx").graph.initializer if len(tensor.dims) == 4}
    assert TensorProto.INT8 in kinds
    for index, photo in enumerate(itertools.islice(photos.iterdir(), 6)):
        target = tmp_path / "classes" / HOSTILE[3 + index % 3] / photo.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(photo.read_bytes())
    assert evaluate([str(out), "--validation_dir", str(tmp_path / "classes"), "--num_workers", "0", "--json"]) == 0
