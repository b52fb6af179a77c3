"""Exports on other devices than the CPU: on a GPU the same answers; without one, a line that says so."""

import json

import numpy as np
import pytest
import torch

from hf_poolformer.commands.export import main
from hf_poolformer.export import export_model, load
from hf_poolformer.foundation.errors import UserError


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
def test_a_program_for_a_gpu_needs_one(small_model, tmp_path, capsys):
    assert main([small_model(), str(tmp_path / "out"), "--format", "torch", "--device", "cuda"]) == 2
    assert "--device cuda needs an NVIDIA GPU, and PyTorch sees none here" in capsys.readouterr().err
    assert main([small_model(), str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert "--device belongs to --format torch, not to onnx" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    export_model(small_model(), tmp_path / "out", format="torch", dynamic_size=False)
    manifest = tmp_path / "out" / "export.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"device": "cuda"}))
    with pytest.raises(UserError, match="this export needs an NVIDIA GPU, and PyTorch sees none here"):
        load(tmp_path / "out", trust_remote_code=True)


def test_a_provider_that_does_not_start_is_not_passed_over(small_model, tmp_path, monkeypatch):
    """As onnxruntime-gpu does it on a machine without CUDA: it lists the provider, and takes the CPU."""
    import onnxruntime

    export_model(small_model(), tmp_path / "out", dynamic_size=False)
    every = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every)
    usable = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx").get_providers()
    for name in {"TensorrtExecutionProvider", "CUDAExecutionProvider"} - set(usable):
        with pytest.raises(UserError, match=f"onnxruntime cannot start {name}, only CPUExecutionProvider"):
            load(tmp_path / "out", providers=[name, "CPUExecutionProvider"])


def error(folder, x: torch.Tensor, right: torch.Tensor, **how) -> float:
    return ((load(folder, **how)(x).logits - right).abs().max() / right.abs().max()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_onnx_on_a_gpu(provider, precision, small_model, tmp_path):
    """Against the same file on the CPU; TF32, which onnxruntime takes unless told otherwise, keeps 10 bits."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime-gpu")
    pytest.importorskip("onnxscript", reason="needs onnxscript, which writes ONNX")
    if provider not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {provider}: onnxruntime-gpu brings it")
    export_model(small_model(), tmp_path / "out", precision=precision, dynamic_size=False)
    x = torch.randn(5, 3, 64, 64)
    right = load(tmp_path / "out")(x).logits
    assert error(tmp_path / "out", x, right, providers=[provider, "CPUExecutionProvider"]) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_program_of_torch_on_a_gpu(compile, precision, small_model, tmp_path):
    """Float32 is float32, in the convolutions, too. Other sizes are compared while it is exported."""
    out = tmp_path / "out"
    export_model(small_model(), out, format="torch", precision=precision, compile=compile, device="cuda")
    export_model(small_model(), tmp_path / "cpu", format="torch")
    x = torch.randn(5, 3, 64, 64)
    right = load(tmp_path / "cpu", trust_remote_code=True)(x).logits
    assert error(out, x, right, trust_remote_code=True) < {"float32": 1e-5, "bfloat16": 5e-2}[precision]
    on_gpu = load(out, trust_remote_code=True)(x.cuda()).logits
    assert on_gpu.device.type == "cuda" and np.isfinite(on_gpu.cpu()).all()
