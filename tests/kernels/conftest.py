"""Kernels run on a GPU if there is one, else in Triton's interpreter, which is slow: keep sizes tiny."""

import os

import pytest
import torch


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # tests/conftest.py sets it as well: it counts only if it comes before whoever imports Triton first.
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to test")


@triton.jit
def loop_kernel(count):
    for _ in range(count):
        pass


if DEVICE == "cpu":
    from triton.runtime import interpreter

    def with_mask_of_bools(name, place):
        """Conditions on scalars become numbers in Triton's interpreter, which 3.9 refuses to take for a mask."""
        original = getattr(interpreter.InterpreterBuilder, name)

        def run(self, *arguments):
            mask = arguments[place]
            mask = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
            return original(self, *arguments[:place], mask, *arguments[place + 1 :])

        setattr(interpreter.InterpreterBuilder, name, run)

    with_mask_of_bools("create_masked_load", 1)
    with_mask_of_bools("create_masked_store", 2)


@pytest.fixture(scope="session", autouse=True)
def kernels_run():
    from hf_poolformer import backends

    reason = backends.why_not_triton(torch.ones(1, 1, 1, 1, device=DEVICE))
    assert reason is None, f"{reason}: run pytest with TRITON_INTERPRET=1"
    if DEVICE == "cpu":
        try:
            loop_kernel[(1,)](2)
        except triton.runtime.errors.InterpreterError as error:
            # Triton 3.6 takes an array for a scalar there, which NumPy 2.4 no longer allows.
            pytest.skip(f"this Triton's interpreter cannot loop with this NumPy: {error}")


@pytest.fixture(autouse=True)
def real_sizes_need_a_gpu(request):
    if DEVICE == "cpu" and request.node.get_closest_marker("gpu"):
        pytest.skip("there is no GPU, and the interpreter would take hours")


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def poisoned(monkeypatch):
    """Every uninitialised tensor holds NaN: an entry that no kernel writes shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poison(*args, original=original, **kwargs):
            made = original(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, poison)


# Relative error ||a - b|| / ||b|| of a whole tensor, against float64. float32 sums a few hundred terms: 1e-7 times a
# small factor. float16 rounds inputs of products and results to 2^-11, so 5e-4 at the worst entry; z, r dz and act(z)
# are rounded on the way, which adds up to two or three times that. bfloat16 rounds to 2^-8, and the interpreter cuts
# bits off instead of rounding to nearest: twice the error, all of one sign, so that sums do not average it out.
@pytest.fixture
def tolerance(device):
    return {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2 if device == "cpu" else 1.5e-2}
