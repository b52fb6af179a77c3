"""From a saved model to a verified folder: every family, format and precision, and what is refused."""

import errno
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_poolformer import (
    VARIANTS,
    MetaFormerConfig,
    MetaFormerForImageClassification,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerForObjectDetection,
    PoolFormerForSemanticSegmentation,
    PoolFormerImageProcessor,
)
from hf_poolformer.commands.export import main
from hf_poolformer.export import export_model, load
from hf_poolformer.export.folder import REPORT, Manifest, new_folder
from hf_poolformer.export.format import TOLERANCES
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.hub.metadata import check_card


FAMILIES = sorted({variant.family for variant in VARIANTS.values()})


def logits_of(folder: str, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForImageClassification.from_pretrained(folder).eval()(x).logits


def error(got: torch.Tensor, right: torch.Tensor) -> float:
    return ((got - right).abs().max() / right.abs().max()).item()


# Made of mixers, norms and heads that the others have.
MIXED = {"convformer", "metaformer_id", "metaformer_ppff", "metaformer_pppa"}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in MIXED else name for name in FAMILIES]
)
def test_every_family_as_onnx(family, small_model, tmp_path):
    """Read by onnxruntime itself, against the model as it was saved; the tolerance is ten times what was seen."""
    folder = small_model(family)
    fixed = family in ("randformer", "metaformer_pppf", "metaformer_ppff")
    # Symbolic sizes make exporting twice as long: one family of each kind of norm and embedding is enough for them.
    free = fixed or family in ("poolformer", "metaformer_ppaa", "caformer")
    summary = export_model(folder, tmp_path / "out", dynamic_size=None if free else False)
    assert summary.report.passed
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    x = torch.randn(5, 3, 64, 64)
    (got,) = session.run(None, {"pixel_values": x.numpy()})
    assert error(torch.from_numpy(got), logits_of(folder, x)) < 2e-5
    assert summary.manifest.dynamic_size == (free and not fixed)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["openvino", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_other_formats(family, format, small_model, tmp_path):
    folder = small_model(family)
    assert export_model(folder, tmp_path / "out", format=format).report.passed
    x = torch.randn(5, 3, 64, 64)
    assert error(load(tmp_path / "out", trust_remote_code=format == "torch")(x).logits, logits_of(folder, x)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino", "torch"])
@pytest.mark.parametrize(
    "name", ["poolformer_s12", "poolformerv2_s12", "randformer_s12", "convformer_s18", "caformer_s18"]
)
def test_published_sizes(name, format, tmp_path):
    config = MetaFormerConfig.from_variant(name)
    is_v1 = isinstance(config, PoolFormerConfig)
    (PoolFormerForImageClassification if is_v1 else MetaFormerForImageClassification)(config).save_pretrained(
        tmp_path / "model"
    )
    PoolFormerImageProcessor().save_pretrained(tmp_path / "model")
    assert export_model(tmp_path / "model", tmp_path / "out", format=format).report.passed


def test_openvino(small_model, tmp_path):
    """Batches of any number, whole and in pieces on two streams; other sizes, too."""
    folder = small_model()
    export_model(folder, tmp_path / "out", format="openvino")
    for threads in (1, 2):
        model = load(tmp_path / "out", threads=threads)
        for shape in ((1, 64, 64), (7, 64, 64), (4, 96, 80)):
            x = torch.randn(shape[0], 3, *shape[1:])
            assert error(model(x).logits, logits_of(folder, x)) < 2e-5


@pytest.mark.parametrize(
    ("format", "precision", "tolerance"),
    [
        ("openvino", "bfloat16", 5e-2),
        pytest.param("torch", "bfloat16", 5e-2, marks=pytest.mark.slow),
        pytest.param("onnx", "float16", 1e-2, marks=pytest.mark.slow),
        pytest.param("openvino", "float16", 1e-2, marks=pytest.mark.slow),
        pytest.param("torch", "float16", 1e-2, marks=pytest.mark.slow),
    ],
)
def test_half_precision(format, precision, tolerance, small_model, tmp_path):
    folder = small_model()
    summary = export_model(folder, tmp_path / "out", format=format, precision=precision)
    x = torch.randn(3, 3, 64, 64)
    got = load(tmp_path / "out", trust_remote_code=format == "torch")(x).logits
    assert got.dtype == torch.float32 and error(got, logits_of(folder, x)) < tolerance
    graph = sum((tmp_path / "out" / name).stat().st_size for name in summary.manifest.files if name != "model.xml")
    if format != "torch":  # whose files hold the graph's text, too, most of so small a model
        assert graph < 0.75 * summary.report.size_before


def test_preprocessing_inside(small_model, tmp_path, photos):
    """Bytes in, probabilities out; called with normalised pixels, as predict does, it is the same model."""
    folder = small_model("caformer")
    summary = export_model(folder, tmp_path / "out", preprocessing=True, calibration_dataset=str(photos))
    assert summary.manifest.output == "probabilities"
    processor = PoolFormerImageProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    normalised = processor(list(pixels), return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"]
    right = logits_of(folder, normalised).softmax(-1)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (got,) = session.run(None, {"pixel_values": pixels})
    assert error(torch.from_numpy(got), right) < 1e-5
    model = load(tmp_path / "out")
    assert error(model(normalised).logits.softmax(-1), right) < 1e-5
    assert error(model(torch.from_numpy(pixels)).logits.softmax(-1), right) < 1e-5


def test_an_export_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "export.json").write_text("{}")
    rename = Path.rename

    def full(path, target):
        if path.name.startswith("new-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space"), new_folder(out, overwrite=True) as scratch:
        (scratch / "export.json").write_text("new")
    assert (out / "export.json").read_text() == "{}"
    assert list(tmp_path.iterdir()) == [out]


def test_segmenter(save_model, tmp_path):
    config = PoolFormerConfig(**{**{"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 32, 64)}, "num_labels": 4})
    config.fpn_feature_size, config.decoder_hidden_size = 16, 16
    model = PoolFormerForSemanticSegmentation(config)
    folder = save_model(model)
    summary = export_model(folder, tmp_path / "out")
    assert summary.manifest.task == "semantic-segmentation"
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        right = model(x).logits
    assert error(load(tmp_path / "out")(x).logits, right) < 2e-5
    with pytest.raises(UserError, match="another task"):
        from hf_poolformer.export.runtime import load_classifier

        load_classifier(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 23])
def test_opsets(opset, small_model, tmp_path):
    export_model(small_model(), tmp_path / "out", opset=opset)
    (found,) = (entry.version for entry in onnx.load(tmp_path / "out" / "model.onnx").opset_import if not entry.domain)
    assert found == opset


@pytest.mark.slow
def test_compiled(small_model, tmp_path):
    folder = small_model()
    export_model(folder, tmp_path / "out", format="torch", compile=True)
    x = torch.randn(3, 3, 64, 64)
    assert error(load(tmp_path / "out", trust_remote_code=True)(x).logits, logits_of(folder, x)) < 2e-5


def test_what_lies_beside(small_model, tmp_path):
    """Settings, versions, report and card, and nothing of this machine in any file."""
    folder = small_model()
    summary = export_model(folder, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md", "config.json", "export.json", "model.onnx", "preprocessor_config.json", "verification.json"
    }  # fmt: skip
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["passed"] and {check["shape"][0] for check in report["checks"]} >= {1, 2, 3, 8}
    assert len(Manifest.read(tmp_path / "out").source["sha256"]) == 64
    card = (tmp_path / "out" / "README.md").read_text()
    check_card(card)
    assert summary.manifest.versions["onnxruntime"] in card
    here = str(Path(__file__).parents[2]).encode()
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        assert here not in content and str(tmp_path).encode() not in content, path.name


def refused(capsys, tmp_path, *argv) -> str:
    """What the command says; it must leave nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    assert main([str(argument) for argument in argv]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before
    return said


def test_bad_requests(small_model, tmp_path, capsys, monkeypatch):
    model, out = small_model(), tmp_path / "deep" / "out"
    for wrong, message in (
        (("--opset", 17), "18 to 23"),
        (("--opset", 99), "18 to 23"),
        (("--opset", 21, "--format", "openvino"), "--opset belongs to --format onnx"),
        (("--precision", "bfloat16"), "onnxruntime has no bfloat16"),
        (
            ("--precision", "int8", "--format", "torch"),
            "torch has no --precision int8; --format onnx, openvino, executorch and web have it",
        ),
        (("--precision", "int8"), "--calibration_dataset"),
        (("--compile",), "--compile belongs to --format torch"),
        (("--calibration_size", 0), "positive"),
        (("--format", "tflite"), "invalid choice"),
    ):
        assert message in refused(capsys, tmp_path, model, out, *wrong)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'hf-poolformer[export]'" in refused(capsys, tmp_path, model, out)


def test_bad_models(small_model, save_model, tmp_path, capsys):
    out = tmp_path / "out"
    fixed = small_model("randformer")
    assert "one size only" in refused(capsys, tmp_path, fixed, out, "--dynamic_size", "true")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(capsys, tmp_path, tmp_path / "empty", out)
    assert "there is no folder" in refused(capsys, tmp_path, tmp_path / "nowhere" / "x", out)
    config = PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 32, 64), num_labels=2)
    detector = save_model(PoolFormerForObjectDetection(config))
    assert "is a detector" in refused(capsys, tmp_path, detector, out, "--format", "torch")
    headless = save_model(PoolFormerForImageClassification(config).base_model)
    assert "not a trained model" in refused(capsys, tmp_path, headless, out)


def test_bad_calibration(small_model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"no picture")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("nothing to see")
    for name in ("empty", "broken", "text", "missing"):
        arguments = ("--format", "openvino", "--precision", "int8", "--calibration_dataset", tmp_path / name)
        assert name in refused(capsys, tmp_path, small_model(), out, *arguments)


def test_what_exists_is_not_overwritten_unasked(small_model, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "--overwrite" in refused(capsys, tmp_path, small_model(), tmp_path / "mine")
    assert "not an exported model" in refused(capsys, tmp_path, small_model(), tmp_path / "mine", "--overwrite")


def test_failed_check_fails_the_command(small_model, photos, tmp_path, capsys, monkeypatch):
    """An export that is off, an export that stays: the old one is still there, and whole."""
    assert main([small_model(), str(tmp_path / "out"), "--format", "torch"]) == 0
    shown = capsys.readouterr().out
    assert "verified" in shown
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setitem(TOLERANCES, "float32", 1e-12)
    arguments = ("--format", "torch", "--overwrite", "--calibration_dataset", photos)
    assert "not what the model is" in refused(capsys, tmp_path, small_model(), tmp_path / "out", *arguments)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
