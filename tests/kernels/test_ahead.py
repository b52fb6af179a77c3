"""Kernels that are compiled before the first step are those that it launches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
def test_the_first_step_finds_every_kernel_compiled(tmp_path):
    if torch.version.cuda is None:
        pytest.skip("this PyTorch has no CUDA, so its Triton may not compile for it")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("without_gpu.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["collected"] == len(found["compiled ahead"]) > 20
    assert found["launched ahead"] == [] and found["compiled later"] == []
    assert found["launched later"] > found["collected"]
    assert not found["random numbers"] and found["gradients"] == []
    assert found["compiled in two threads"] == found["collected in two threads"] > 0
    # The first block drops no path, so it has kernels of its own.
    assert "Compiling" in done.stderr and "on " in done.stderr


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("CUDA out of memory.\nTried"), TypeError("no copy")])
def test_a_failure_is_told_and_costs_nothing(fault, monkeypatch, caplog):
    """There may be no memory for a second model; the kernels are then compiled as they are launched."""
    from hf_poolformer.kernels import ahead

    monkeypatch.setattr(ahead, "INTERPRETED", False)
    encoder, before = torch.nn.Linear(2, 2), ahead.triton.knobs.runtime.jit_cache_hook

    def forward(encoder, pixel_values):
        raise fault

    assert ahead.compile_ahead(forward, encoder, torch.zeros(1, 2)) == 0
    assert "as they are needed" in caplog.text and str(fault).partition("\n")[0] in caplog.text
    assert "Tried" not in caplog.text
    assert ahead.triton.knobs.runtime.jit_cache_hook is before
    caplog.clear()
    # It is not tried again at every step.
    assert ahead.compile_ahead(forward, encoder, torch.zeros(1, 2)) == 0 and not caplog.text
