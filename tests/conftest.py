"""Shared by all rooms: nothing leaves this machine, every test starts from one seed, small models are small."""

import gc
import os
import shutil
import subprocess
import tempfile
import time


# Before anything imports huggingface_hub, which reads it once. Copies of datasets and the code of models are kept in
# a folder of this process: what another run keeps at the same time is none of its business.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from warm import warm_python


# Before anything imports Triton, which reads it once: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hf_poolformer import TOKEN_MIXERS, MetaFormerConfig, PoolFormerConfig


# A camera that shows moving circles, and whose use nobody has to allow.
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
HF_HOME = os.environ["HF_HOME"]
STARTED = pytest.StashKey[float]()

TINY = {"depths": (1, 1, 2, 1), "hidden_sizes": (8, 16, 32, 64), "num_labels": 10}
BASELINES = {
    "norm_bias": False,
    "norm_eps": 1e-6,
    "use_bias": False,
    "use_layer_scale": False,
    "hidden_act": "star_relu",
    "embedding_norm": "layer_norm",
    "res_scale_init_values": (None, None, 1.0, 1.0),
    "head_norm_first": False,
    "head_type": "mlp",
}


def pytest_addoption(parser):
    parser.addoption("--most-seconds", type=float, help="skip the tests that have not begun after so many seconds")


def pytest_configure(config):
    config.stash[STARTED] = time.monotonic()


def pytest_unconfigure():
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """Libraries and tests stay until the end: a collection that looks at them all takes a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skips in place of an interrupt: with pytest-xdist, that would lose the names of the tests that failed."""
    most = item.config.getoption("--most-seconds")
    if most is not None and time.monotonic() > item.config.stash[STARTED] + most:
        pytest.skip(f"not run, there was no time left after {most:g} seconds")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, driven by playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", *CAMERA])
        yield browser
        browser.close()


@pytest.fixture
def poolformer_config() -> PoolFormerConfig:
    """A PoolFormer v1 of 80 thousand parameters."""
    return PoolFormerConfig(**TINY)


@pytest.fixture(params=["poolformer", *TOKEN_MIXERS, "baseline"])
def config(request) -> MetaFormerConfig:
    """PoolFormer v1, a MetaFormer of each mixer with position embeddings, and one of the second paper."""
    if request.param == "poolformer":
        return PoolFormerConfig(**TINY)
    if request.param == "baseline":
        mixers = ("separable_conv", "identity", "attention", "random")
        return MetaFormerConfig(**TINY, **BASELINES, token_mixers=mixers, image_size=64)
    return MetaFormerConfig(
        **TINY, token_mixers=(request.param,) * 4, position_embeddings=(False, True, False, True), image_size=64
    )


@pytest.fixture
def scramble():
    """Moves every parameter far from its initial value, so that no scale, shift or bias can hide."""

    def run(model: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
        return model.eval()

    return run


@pytest.fixture
def relative_error():
    def run(result: torch.Tensor, expected: torch.Tensor) -> float:
        result, expected = result.detach().double().cpu(), expected.detach().double().cpu()
        assert result.shape == expected.shape
        error = (result - expected).norm() / expected.norm().clamp_min(1e-30)
        return float("inf") if error.isnan() else error.item()

    return run


@pytest.fixture
def run_python():
    """Runs Python code in a process of its own; `without_package` makes `import hf_poolformer` fail there."""

    def run(code: str, *args, without_package: bool = False, check: bool = True) -> subprocess.CompletedProcess:
        if without_package:
            code = "import sys; sys.modules['hf_poolformer'] = None\n" + code
        done = subprocess.run([warm_python(), "-c", code, *map(str, args)], capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run
