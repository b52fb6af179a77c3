"""Exports for phones: ExecuTorch in its own runtime, Core ML as far as there is no Core ML."""

import csv
import importlib.util
import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from hf_poolformer import (
    MetaFormerForImageClassification,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerForSemanticSegmentation,
)
from hf_poolformer.commands.evaluate import main as evaluate
from hf_poolformer.commands.export import main
from hf_poolformer.commands.predict import main as predict
from hf_poolformer.export import FORMATS, export_model, load
from hf_poolformer.export.coreml import fits_float16
from hf_poolformer.export.deployable import Deployable, fix_positions
from hf_poolformer.export.folder import Manifest
from hf_poolformer.export.graph import Standardise, fold
from hf_poolformer.export.mil import OPERATIONS, avg_pool
from hf_poolformer.export.runtime import ExportedModel
from hf_poolformer.export.xnnpack import for_xnnpack
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.hub.metadata import check_card
from hf_poolformer.token_mixers import Attention

from .conftest import FAMILIES, SMALL, small_config


EXTRA = "not installed: pip install 'hf-poolformer[mobile]'"


def needs(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: it is of the extra `mobile`, which `dev` leaves out")


def model_of(folder: str) -> torch.nn.Module:
    kind = PoolFormerForImageClassification if "poolformer" in folder else MetaFormerForImageClassification
    return kind.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_xnnpack_gets_is_the_model(family):
    """Norms, pooling and attention in XNNPACK's operations: the same logits, and none of the others are left."""
    torch.manual_seed(0)
    config = small_config(family)
    kind = (
        PoolFormerForImageClassification if isinstance(config, PoolFormerConfig) else MetaFormerForImageClassification
    )
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter) * 0.6 - 0.3)
    x = torch.randn(1, 3, 64, 64)
    module = Deployable(fold(model), torch.float32).eval()
    fix_positions(module, x)
    for_xnnpack(module, x)
    called = []
    for part in module.modules():
        if isinstance(part, Standardise | torch.nn.LayerNorm | torch.nn.GroupNorm | Attention):
            part.register_forward_hook(lambda part, *_: called.append(type(part).__name__))
    with torch.no_grad():
        right, got = model(x).logits, module(x)
    assert not called
    # float32, sums in another order: ten times what was seen.
    assert (got - right).abs().max() <= 2e-5 * right.abs().max()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "executorch", "--precision", "float16"], "because XNNPACK"),
        (["--format", "coreml", "--precision", "int8"], "because what its products in 8 bits give"),
        (["--format", "coreml", "--precision", "bfloat16"], "because Core ML has no bfloat16"),
        (["--format", "executorch", "--precision", "int8"], "needs images to calibrate on"),
        (["--format", "executorch", "--opset", "21"], "--opset belongs to --format onnx, not to executorch"),
    ],
)
def test_what_there_is_not(arguments, said, small_model, tmp_path, capsys):
    assert main([small_model(), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "library"), [("executorch", "executorch"), ("coreml", "coremltools")])
def test_a_missing_library_is_one_line(format, library, small_model, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    assert main([small_model(), str(tmp_path / "out"), "--format", format]) == 2
    error = capsys.readouterr().err
    assert library in error and EXTRA in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_core_ml_takes_one_size(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(FORMATS["coreml"], "check_installed", lambda precision: None)
    with pytest.raises(UserError, match="--format coreml is written for images of one size: leave --dynamic_size out"):
        export_model(small_model(), tmp_path / "out", format="coreml", dynamic_size=True)
    assert not list(tmp_path.iterdir())


def test_a_largest_size():
    """What memory was not set aside for never reaches the runtime."""
    config = small_config("poolformer")
    facts = {"format": "executorch", "precision": "float32", "task": "image-classification", "file": "model.pte"}
    facts |= {"preprocessing": False, "input": "pixel_values", "output": "logits", "image_size": [64, 64]}
    manifest = Manifest(**facts, dynamic_size=True, most_size=128)
    exported = ExportedModel(lambda pixels: pixels.mean((2, 3)), manifest, config, None)
    assert exported(torch.zeros(1, 3, 128, 100)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="128x128 pixels at most, not of 129x64"):
        exported(torch.zeros(1, 3, 129, 64))


@pytest.mark.parametrize(
    "name", ["model.mlpackage/../../passwd", "/model.mlpackage/x", "model.mlpackage//x", "model.mlpackage\\x", "c:/x"]
)
def test_files_of_a_graph_lie_in_its_folder(name, tmp_path):
    facts = {"format": "coreml", "precision": "float32", "task": "image-classification", "file": "model.mlpackage"}
    facts |= {"preprocessing": False, "input": "pixel_values", "output": "logits", "image_size": [64, 64]}
    manifest = Manifest(**facts, dynamic_size=False, files={"model.mlpackage/Manifest.json": "0" * 64})
    manifest.check(tmp_path / "export.json")
    manifest.files[name] = "0" * 64
    with pytest.raises(UserError, match="does not list the files of the graph"):
        manifest.check(tmp_path / "export.json")


def test_operations_of_core_ml():
    """Those that say more than their names, against PyTorch's own."""
    x = torch.randn(1, 4, 7, 6)
    facts = {"kernel_sizes": [3, 3], "strides": [1, 1], "pad_type": "custom", "pad": [1, 1, 1, 1], "ceil_mode": False}
    for outside in (True, False):
        got = avg_pool(x, **facts, exclude_padding_from_average=outside)
        right = F.avg_pool2d(x, 3, 1, 1, count_include_pad=not outside)
        assert torch.allclose(got, right, atol=1e-6)
    weight, bias = torch.randn(8, 2, 3, 3), torch.randn(8)
    got = OPERATIONS["conv"](
        x=x, weight=weight, bias=bias, strides=[2, 1], pad_type="custom", pad=[0, 1, 2, 0], dilations=[1, 1], groups=2
    )
    right = F.conv2d(F.pad(x, (2, 0, 0, 1)), weight, bias, (2, 1), groups=2)
    assert torch.equal(got, right)
    with pytest.raises(ValueError, match="unknown pad_type same"):
        OPERATIONS["conv"](
            x=x, weight=weight, strides=[1, 1], pad_type="same", pad=[0] * 4, dilations=[1, 1], groups=2
        )
    assert OPERATIONS["expand_dims"](x=x, axes=[0, -1]).shape == (1, 1, 4, 7, 6, 1)
    first, second = OPERATIONS["split"](x=x, axis=1, num_splits=2)
    assert torch.equal(torch.cat([first, second], 1), x)
    got = OPERATIONS["upsample_bilinear"](x=x, scale_factor_height=2.0, scale_factor_width=2.0, align_corners=False)
    assert torch.equal(got, F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))


def test_what_float16_would_overflow_stays_wide():
    class Output:
        def __init__(self, *shape):
            self.shape = shape

    class Operation:
        def __init__(self, op_type, *shape):
            self.op_type, self.outputs = op_type, [Output(*shape)]

    assert fits_float16(Operation("conv", 1, 8, 4, 4)) and fits_float16(Operation("add", 1, 8, 4, 4))
    assert not fits_float16(Operation("square", 1, 8, 4, 4))
    assert not fits_float16(Operation("mul", 1, 1, 1, 1))  # of a variance
    assert not fits_float16(Operation("linear", 1, 1000))


# What follows writes whole files. ExecuTorch needs 20 seconds of a core for the smallest.


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_executorch(family, precision, small_model, photos, tmp_path):
    needs("executorch")
    folder = small_model(family)
    summary = export_model(
        folder,
        tmp_path / "out",
        format="executorch",
        precision=precision,
        calibration_dataset=str(photos),
        calibration_size=12,
        verification_size=12,
    )
    manifest = summary.manifest
    inside, _, all_, *_ = manifest.computed_by.removeprefix("XNNPACK computes ").split()
    assert manifest.most_images == 1 and not manifest.dynamic_size
    assert int(inside) >= 0.95 * int(all_)
    x = torch.randn(3, 3, 64, 64)
    got = load(tmp_path / "out")(x).logits
    assert got.shape == (3, 7)
    if precision == "float32":
        with torch.no_grad():
            right = model_of(folder)(x).logits
        assert (got - right).abs().max() <= 5e-5 * right.abs().max()
    else:
        graph = (tmp_path / "out" / "model.pte").stat().st_size
        assert graph < 0.6 * summary.report.size_before  # a quarter, and the graph itself
        assert "PT2E" in manifest.quantisation["method"] and manifest.quantisation["quantised_layers"] >= 12


@pytest.mark.slow
def test_executorch_of_other_sizes(small_model, tmp_path):
    needs("executorch")
    folder = small_model("caformer")
    summary = export_model(folder, tmp_path / "out", format="executorch", dynamic_size=True)
    exported, model = load(tmp_path / "out"), model_of(folder)
    most = summary.manifest.most_size
    for size in [(most, most), (33, 70), (summary.manifest.least_size,) * 2]:
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            right = model(x).logits
        assert (exported(x).logits - right).abs().max() <= 5e-5 * right.abs().max()
    with pytest.raises(ValueError, match="pixels at most"):
        exported(torch.zeros(1, 3, most + 1, 64))


@pytest.mark.slow
def test_executorch_segmenter(save_model, tmp_path):
    needs("executorch")
    config = PoolFormerConfig(**{**SMALL, "num_labels": 4}, fpn_feature_size=16, decoder_hidden_size=16)
    model = PoolFormerForSemanticSegmentation(config)
    export_model(save_model(model), tmp_path / "out", format="executorch")
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        right = model(x).logits
    assert (load(tmp_path / "out")(x).logits - right).abs().max() <= 5e-5 * right.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["executorch", "coreml"])
def test_commands_take_the_folder(format, small_model, photos, tmp_path, capsys):
    needs("executorch" if format == "executorch" else "coremltools")
    out = tmp_path / "out"
    assert main([small_model(), str(out), "--format", format, "--preprocessing"]) == 0
    said = capsys.readouterr().out
    report = json.loads((out / "verification.json").read_text())
    card = (out / "README.md").read_text()
    check_card(card)
    assert report["arithmetic"] in said and report["arithmetic"] in card
    assert "hf-poolformer[mobile]" in card
    table = tmp_path / "table.csv"
    assert predict([str(out), str(photos), "--output", str(table), "--num_workers", "0"]) == 0
    with table.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 24
    for path in photos.iterdir():
        copy = tmp_path / "classes" / f"LABEL_{int(path.stem) % 3}" / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    where = ["--validation_dir", str(tmp_path / "classes"), "--num_workers", "0", "--json"]
    assert evaluate([str(out), *where]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_core_ml(family, precision, small_model, tmp_path):
    """Computed from what lies on the disk: with other weights there, it gives other answers."""
    needs("coremltools")
    folder = small_model(family)
    summary = export_model(folder, tmp_path / "out", format="coreml", precision=precision)
    package = tmp_path / "out" / "model.mlpackage"
    assert {f"model.mlpackage/{path.relative_to(package).as_posix()}" for path in package.rglob("*.*")} <= set(
        summary.manifest.files
    ) | {"model.mlpackage/Data/com.apple.CoreML"}
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        right = model_of(folder)(x).logits
    got = load(tmp_path / "out")(x).logits
    assert (got - right).abs().max() <= {"float32": 5e-5, "float16": 3e-2}[precision] * right.abs().max()
    if "Core ML itself" not in summary.report.arithmetic:
        return  # on macOS
    weights = next(package.rglob("weight.bin"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"weight\.bin is damaged"):
        load(tmp_path / "out")
    manifest = summary.manifest
    run = FORMATS["coreml"].open(package, manifest, 1)
    assert not torch.allclose(run(x), right, atol=0.1 * right.abs().max().item())


@pytest.mark.slow
def test_core_ml_labels_and_input(small_model, tmp_path):
    needs("coremltools")
    import coremltools

    export_model(small_model(), tmp_path / "out", format="coreml", preprocessing=True)
    spec = coremltools.models.MLModel(str(tmp_path / "out" / "model.mlpackage"), skip_model_load=True).get_spec()
    (given,), (answer,) = spec.description.input, spec.description.output
    assert given.name == "pixel_values" and given.type.WhichOneof("Type") == "imageType"
    assert (given.type.imageType.height, given.type.imageType.width) == (64, 64)
    assert answer.name == "probabilities"
    assert json.loads(spec.description.metadata.userDefined["labels"]) == [f"LABEL_{index}" for index in range(7)]


@pytest.mark.slow
def test_core_ml_without_colours(save_model, tmp_path):
    """Core ML's images are grey or in colour; of more channels it says so, and leaves nothing."""
    needs("coremltools")
    module = Deployable(
        fold(model_of(save_model(PoolFormerForImageClassification(PoolFormerConfig(**SMALL))))), torch.float32
    )
    facts = {"format": "coreml", "precision": "float32", "task": "image-classification", "file": "model.mlpackage"}
    facts |= {"preprocessing": True, "input": "pixel_values", "output": "logits", "image_size": [64, 64]}
    manifest = Manifest(**facts, dynamic_size=False, num_channels=5)
    with pytest.raises(UserError, match="no images of 5 channels"):
        FORMATS["coreml"].write(module, torch.zeros(2, 3, 64, 64), tmp_path / "model.mlpackage", manifest)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_executorch_programs_share_the_pool(small_model, tmp_path):
    """With other numbers of threads in turn: whoever comes next loads again, and gives the same."""
    needs("executorch")
    export_model(small_model(), tmp_path / "out", format="executorch")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    x = torch.randn(2, 3, 64, 64)
    one, two = load(tmp_path / "out", threads=1), load(tmp_path / "copy", threads=2)
    right = one(x).logits
    for model in (two, one, two, one):
        assert torch.allclose(model(x).logits, right, rtol=1e-5, atol=1e-6)
