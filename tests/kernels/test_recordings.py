"""Recorded launches, repeated for other images: with a kernel that is a loop over floats in the CPU's memory."""

import ctypes
import gc
import random

import pytest
import torch


pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to launch")

from hf_poolformer.kernels.inference import Recorder, Recording


class MultiplyAdd:
    """Stands for what Triton compiled: out = factor * a + b, of so many floats at addresses."""

    def __getitem__(self, grid):
        def start(a, b, out, count, factor, *, stream):
            kind = ctypes.c_float * count
            left, right, result = (kind.from_address(address) for address in (a, b, out))
            result[:] = [factor * x + y for x, y in zip(left, right, strict=True)]

        return start


@pytest.fixture(autouse=True)
def no_stream(monkeypatch):
    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    class Runtime:
        class driver:
            active = Driver

    monkeypatch.setattr("hf_poolformer.kernels.inference.triton.runtime", Runtime)


def launch(recorder, a, b, factor):
    out = torch.empty(a.shape)
    arguments = a, b, out, a.numel()
    addresses = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
    MultiplyAdd()[(1,)](*addresses, factor, stream=0)
    recorder((MultiplyAdd(), (factor,)), (1,), arguments)
    return out


def program(seed, x, weights, recorder):
    """Random operations on what is still there; tensors come and go."""
    generator = random.Random(seed)
    alive = [x, *weights]
    for _ in range(generator.randrange(1, 25)):
        made = launch(recorder, *generator.choices(alive, k=2), generator.choice([-1.0, 0.5, 2.0]))
        if len(alive) > 5:
            alive.pop(generator.randrange(1 + len(weights), len(alive)))
        alive.append(made)
    return alive[-1]


def record(run, x, weights):
    recorder = Recorder([x, *weights])
    with recorder:
        y = run(x, weights, recorder)
    return recorder, Recording(recorder, y, [weight.data_ptr() for weight in weights], [], 1)


@pytest.mark.parametrize("seed", range(30))
def test_another_input_takes_the_same_launches(seed):
    x, weights = torch.randn(2, 3, 4, 5), [torch.randn(2, 3, 4, 5) for _ in range(3)]
    recorder, recording = record(lambda *arguments: program(seed, *arguments), x, weights)
    assert recorder.is_complete
    for _ in range(2):
        other = torch.randn(2, 3, 4, 5)
        weights[0].mul_(1.5)  # in place: read anew each time
        wanted = program(seed, other, weights, lambda *launched: None)
        junk = [torch.full((2, 3, 4, 5), float("nan")) for _ in range(8)]  # what memory held before
        del junk
        gc.collect()
        got = recording.repeat(other)
        # Results are channels_last; what the program made is not, and memory is what counts.
        assert torch.equal(got.permute(0, 2, 3, 1).flatten(), wanted.flatten())


@pytest.mark.parametrize(
    "other",
    [
        lambda add, x, weight: add(x + 1, weight),
        lambda add, x, weight: add(x, weight.double().float()),
        lambda add, x, weight: add(x, weight).mul_(2),
        lambda add, x, weight: add(x, UNKNOWN),
        lambda add, x, weight: add(x.flip(0), weight),
    ],
    ids=["another operation", "a conversion", "in place", "a tensor from elsewhere", "a copy"],
)
def test_what_is_no_launch_is_noticed(other):
    x, weight = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    recorder = Recorder([x, weight])
    with recorder:
        other(lambda a, b: launch(recorder, a, b, 1.0), x, weight)
    assert not recorder.is_complete


UNKNOWN = torch.randn(1, 2, 3, 4)


def test_views_and_kernels_that_are_not_compiled_yet():
    x, weight = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    recorder = Recorder([x, weight])
    with recorder:
        launch(recorder, x.flatten(), weight.view(24).detach(), 1.0)
    assert recorder.is_complete
    recorder(None, (1,), (x,))
    assert not recorder.is_complete


def test_memory_is_shared_by_what_lives_at_different_times():
    def chain(x, weights, recorder):
        for _ in range(20):
            x = launch(recorder, x, weights[0], 0.5)
        return x

    recorder, recording = record(chain, torch.randn(1, 1, 16, 16), [torch.randn(1, 1, 16, 16)])
    assert len(recorder.sizes) == 20
    assert recording.bytes <= 2 * 16 * 16 * 4
