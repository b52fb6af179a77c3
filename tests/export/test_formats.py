"""A format from outside: one class and one entry in the table, and everything takes it."""

import csv
import json

import pytest
import torch

from hf_poolformer.commands.evaluate import main as evaluate
from hf_poolformer.commands.export import main, parser
from hf_poolformer.commands.predict import main as predict
from hf_poolformer.export import FORMATS, ExportFormat, export_model, load
from hf_poolformer.export.folder import Manifest
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.hub.metadata import check_card


class Pickled(ExportFormat):
    """The module itself, as Python writes it."""

    name = "pickle"
    runtime = "PyTorch's unpickler"
    file = "model.pickle"
    precisions = ("float32", "bfloat16")
    missing_because = {"int8": "nobody quantises a pickle"}  # noqa: RUF012
    libraries = ("pickle",)
    holds_code = True

    def dtype(self, precision):
        return precision

    def write(self, module, example, path, manifest):
        assert module(example).dtype == torch.float32
        torch.save(module, path)

    def open(self, path, manifest, threads, providers=None):
        return torch.load(path, weights_only=False)


@pytest.fixture
def pickled(monkeypatch):
    monkeypatch.setitem(FORMATS, Pickled.name, Pickled())


@pytest.mark.parametrize("precision", Pickled.precisions)
def test_a_format_from_outside(precision, pickled, small_model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [small_model(), str(out), "--format", "pickle", "--precision", precision, "--preprocessing"]
    assert main([*arguments, "--calibration_dataset", str(photos)]) == 0
    assert f"{out}: pickle, {precision}" in capsys.readouterr().out
    assert {"model.pickle", "export.json", "verification.json"} <= {path.name for path in out.iterdir()}
    assert Manifest.read(out).files.keys() == {"model.pickle", "config.json", "preprocessor_config.json"}
    assert json.loads((out / "verification.json").read_text())["arithmetic"].startswith(precision)
    card = (out / "README.md").read_text()
    check_card(card)
    assert "PyTorch's unpickler" in card and "- pickle\n" in card and "trust_remote_code=True" in card

    table = tmp_path / "table.csv"
    command = [str(out), str(photos), "--output", str(table), "--num_workers", "0"]
    assert predict(command) == 2
    said = capsys.readouterr().err
    assert (
        "made for PyTorch's unpickler" in said
        and "ONNX Runtime, OpenVINO, ExecuTorch (XNNPACK), Core ML and ONNX Runtime Web hold no code" in said
    )
    assert predict([*command, "--trust_remote_code"]) == 0
    with table.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 24
    for path in photos.iterdir():
        copy = tmp_path / "classes" / f"LABEL_{int(path.stem) % 3}" / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    where = ["--validation_dir", str(tmp_path / "classes"), "--num_workers", "0", "--trust_remote_code", "--json"]
    assert evaluate([str(out), *where]) == 0


def test_its_digest_is_kept(pickled, small_model, tmp_path):
    out = tmp_path / "out"
    export_model(small_model(), out, format="pickle")
    (out / "model.pickle").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"model\.pickle is damaged"):
        load(out, trust_remote_code=True)


def test_its_own_tolerance_judges_it(pickled, small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(Pickled, "tolerance", lambda self, precision: 1e-12)
    with pytest.raises(UserError, match="may be off by 1e-12"):
        export_model(small_model(), tmp_path / "out", format="pickle")
    assert not list(tmp_path.iterdir())


def test_what_it_lacks(pickled, small_model, tmp_path, monkeypatch):
    def refused(**request) -> str:
        with pytest.raises(UserError) as caught:
            export_model(small_model(), tmp_path / "out", format="pickle", **request)
        return str(caught.value)

    assert "because nobody quantises a pickle; --format onnx, openvino, executorch and web have it" in refused(
        precision="int8"
    )
    assert refused(opset=21) == "--opset belongs to --format onnx, not to pickle"
    assert refused(compile=True) == "--compile belongs to --format torch, not to pickle"
    monkeypatch.setattr(Pickled, "libraries", ("pickle", "no_such_library"))
    monkeypatch.setattr(Pickled, "extra", "outside")
    assert refused() == "no_such_library not installed: pip install 'hf-poolformer[outside]'"


def test_the_help_names_it(pickled):
    text = " ".join(parser().format_help().split())
    assert "pickle for PyTorch's unpickler" in text and "{onnx,openvino,torch,executorch,coreml,web,pickle}" in text
    assert "bfloat16 is for openvino, torch and pickle" in text


def test_without_its_class_the_folder_is_of_another_version(small_model, tmp_path):
    FORMATS[Pickled.name] = Pickled()
    try:
        export_model(small_model(), tmp_path / "out", format="pickle")
    finally:
        del FORMATS[Pickled.name]
    with pytest.raises(UserError, match="names the format 'pickle'; update"):
        load(tmp_path / "out", trust_remote_code=True)
