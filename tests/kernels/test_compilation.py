"""What compilation for a Hopper GPU tells without one: it succeeds, uses the matrix units and fits the chip."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


SHARED_MEMORY = 227 * 1024  # bytes that a block may have on compute capability 9.0
PRODUCTS = {"expand_kernel", "contract_kernel", "expand_backward_kernel", "contract_backward_kernel", "mlp_kernel"}
PRODUCTS |= {"norm_product_kernel", "convolution_kernel"}


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_and_fits():
    if torch.version.cuda is None:
        pytest.skip("this PyTorch has no CUDA, so its Triton may not compile for it")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = json.loads(done.stdout)
    kernels = {report["kernel"] for report in reports}
    assert kernels >= PRODUCTS | {"fold_kernel", "normalise_kernel", "shortcut_kernel", "norm_backward_kernel"}
    assert kernels >= {"parameters_kernel", "chunk_kernel", "token_kernel", "combine_kernel", "combine_rows_kernel"}
    assert kernels >= {"forward_kernel", "reduction_kernel", "scales_kernel", "backward_kernel", "finish_kernel"}
    assert kernels >= {"bias_kernel", "window_first_kernel"}
    assert kernels >= {
        "token_norm_kernel",
        "depthwise_kernel",
        "depthwise_weight_kernel",
        "token_norm_backward_kernel",
        "merge_kernel",
        "merge_backward_kernel",
        "add_up_kernel",
    }
    for report in reports:
        assert report["shared"] <= SHARED_MEMORY, report
        # Some bytes of stack are noise; hundreds are tiles in local memory.
        assert report["stack"] <= 64, report
        if report["kernel"] in PRODUCTS and "PRECISION': 'ieee'" in report["launch"]:
            half = report["operands"][0] != "*fp32"
            assert report["wgmma"] == half, report
