"""Recorded launches, repeated for other tensors: with a kernel that is a loop over floats in the CPU's memory."""

import ctypes
import gc
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to launch")

from hf_poolformer.kernels import launch as launches
from hf_poolformer.kernels import recordings
from hf_poolformer.kernels.recordings import Recorded, Recorder, Recording


SIDE = 12


class MultiplyAdd:
    """Stands for what Triton compiled: out = factor * a + b, of so many floats at addresses."""

    def __getitem__(self, grid):
        def start(a, b, out, count, factor, *, stream):
            kind = ctypes.c_float * count
            left, right, result = (kind.from_address(address) for address in (a, b, out))
            result[:] = [factor * x + y for x, y in zip(left, right, strict=True)]

        return start


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    class Runtime:
        class driver:
            active = Driver

    monkeypatch.setattr("hf_poolformer.kernels.recordings.triton.runtime", Runtime)
    monkeypatch.setattr(recordings, "INTERPRETED", False)


@pytest.fixture
def repeated(monkeypatch):
    """How often a recording was repeated."""
    found = []
    repeat = Recording.repeat
    monkeypatch.setattr(Recording, "repeat", lambda self, given: found.append(1) or repeat(self, given))
    return found


def add(a, b, factor=1.0):
    out = torch.empty(a.shape)
    arguments = a, b, out, a.numel()
    addresses = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
    MultiplyAdd()[(1,)](*addresses, factor, stream=0)
    recorder = launches.RECORDER.get()
    if recorder is not None:
        recorder((MultiplyAdd(), (factor,)), (1,), arguments)
    return out


def make(*shape):
    return torch.randn(*(shape or (SIDE, SIDE)))


def program(given, seed):
    """Random operations on what is still there; tensors come and go."""
    generator = random.Random(seed)
    alive = list(given)
    for _ in range(generator.randrange(1, 25)):
        left, right = generator.choices(alive, k=2)
        if generator.random() < 0.3:
            made = launches.transposed_product(left, right[:, :])
        else:
            made = add(left, right, generator.choice([-0.5, 0.25, 0.5]))
        if len(alive) > 5:
            alive.pop(generator.randrange(len(given), len(alive)))
        alive.append(made)
    return [alive[-1], None, generator.choice(alive), alive[-1]]


@pytest.mark.parametrize("seed", range(30))
def test_other_tensors_take_the_same_steps(seed, repeated):
    run, weights = Recorded(program), [make() for _ in range(2)]
    run([make(), *weights], seed)
    for count in (1, 2):
        given = [make(), *weights]
        weights[0].mul_(0.9)  # in place: read anew each time
        wanted = program(given, seed)
        junk = [torch.full((SIDE, SIDE), float("nan")) for _ in range(8)]  # what memory held before
        del junk
        gc.collect()
        got = run(given, seed)
        assert len(repeated) == count
        for mine, theirs in zip(got, wanted, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
        assert got[0] is got[3]


@pytest.mark.parametrize(
    "change",
    [
        lambda given: [make(4, 36), *given[1:]],
        lambda given: [given[0].t(), *given[1:]],
        lambda given: [None, *given[1:]],
        lambda given: [torch.cat([make(1, 1).flatten(), make().flatten()])[1:].view(SIDE, SIDE), *given[1:]],
    ],
    ids=["shape", "strides", "none", "alignment"],
)
def test_tensors_of_another_kind_are_recorded_again(change, repeated):
    run = Recorded(lambda given: [add(given[1], given[2])])
    given = [make() for _ in range(3)]
    run(given)
    run(change(given))
    assert not repeated
    run(change(given))
    assert len(repeated) == 1


def test_tensors_that_were_one_may_become_two(repeated):
    run, x, shared = Recorded(lambda given: [add(add(given[0], given[1]), given[2], 0.5)]), make(), make()
    for given in ([x, shared, shared], [x, shared, make()], [x, shared, shared], [x, shared, make()]):
        assert torch.equal(run(given)[0], 0.5 * (given[0] + given[1]) + given[2])
    assert len(repeated) == 2


def test_other_numbers_are_recorded_again(repeated):
    run = Recorded(lambda given, factor: [add(*given, factor)])
    given = [make(), make()]
    for factor in (0.5, 0.25, 0.5, 0.25):
        assert torch.equal(run(given, factor, kind=factor)[0], factor * given[0] + given[1])
    assert len(repeated) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda x, weight: add(x + 1, weight),
        lambda x, weight: add(x, weight.double().float()),
        lambda x, weight: add(x, weight).mul_(2),
        lambda x, weight: add(x, UNKNOWN),
        lambda x, weight: add(x.flip(0), weight),
        lambda x, weight: launches.transposed_product(x, weight + 1),
        lambda x, weight: add(x, weight)[1:],
    ],
    ids=["operation", "conversion", "in place", "tensor from elsewhere", "copy", "operand", "part of a result"],
)
def test_what_is_no_launch_is_noticed(other, repeated):
    run, given = Recorded(lambda given: [other(*given)]), [make(), make()]
    for _ in range(3):
        assert torch.equal(run(given)[0], other(*given))
    assert not repeated


UNKNOWN = make()


def test_kernels_that_another_thread_compiles_are_recorded_later(repeated):
    compiled = [False, True, True]

    def run(given):
        if compiled.pop(0):
            return [add(*given)]
        launches.RECORDER.get()(None, (1,), tuple(given))  # nothing is launched
        return [torch.empty_like(given[0])]

    recorded, given = Recorded(run), [make(), make()]
    for _ in range(3):
        recorded(given)
    assert len(repeated) == 1


def test_memory_is_shared_by_what_lives_at_different_times():
    def chain(given):
        x, weight = given
        for _ in range(20):
            x = add(x, weight, 0.5)
        return [x]

    given = [make(), make()]
    recorder = Recorder(given)
    token = launches.RECORDER.set(recorder)
    with recorder:
        results = chain(given)
    launches.RECORDER.reset(token)
    assert len(recorder.sizes) == 20
    assert Recording(recorder, results).bytes <= 3 * recordings.ALIGNMENT * -(-SIDE * SIDE * 4 // recordings.ALIGNMENT)


@pytest.mark.slow
def test_stages_repeat_what_their_operations_launch():
    """Inference and training, to the bit, by Triton's IR; see recorded_training.py."""
    if torch.version.cuda is None:
        pytest.skip("this PyTorch has no CUDA, so its Triton may not compile for it")
    script = Path(__file__).with_name("recorded_training.py")
    paths = os.pathsep.join([str(script.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("steps repeated") == 66
