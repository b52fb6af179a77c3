import json
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.training import checkpoints
from hf_poolformer.training.checkpoints import MARKER, Progress, TrainingState
from hf_poolformer.training.optimisation import WeightAverage


def make_state(labels=("a", "b"), ema=False, **config):
    sizes = {"depths": (1, 1, 1, 1), "hidden_sizes": (4, 4, 8, 8), "num_labels": len(labels)}
    model = PoolFormerForImageClassification(PoolFormerConfig(**{**sizes, **config}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    progress = Progress(label_names=list(labels))
    average = WeightAverage(model, 0.9) if ema else None
    return TrainingState(Accelerator(), model, optimizer, scheduler, average, progress)


def step(state):
    state.model(pixel_values=torch.randn(2, 3, 32, 32)).logits.square().sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.scheduler.step()
    if state.ema is not None:
        state.ema.update(state.model)
    state.progress.step += 1


def save(root, state, keep=0):
    checkpoints.Saver(root, state.accelerator, keep).save(state)
    return root / f"step-{state.progress.step}"


def weights(state):
    return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])


def test_a_loaded_run_goes_on_as_the_saved_one(tmp_path):
    state = make_state(ema=True)
    step(state)
    state.stream = {"position": 17}
    path = save(tmp_path, state)
    after = [random.random(), np.random.rand()]
    step(state)

    other = make_state(ema=True)
    checkpoints.load(path, other)
    assert other.progress.step == 1 and other.streams == [{"position": 17}]
    assert [random.random(), np.random.rand()] == after
    step(other)
    assert torch.equal(weights(other), weights(state))
    assert other.scheduler.get_last_lr() == state.scheduler.get_last_lr()
    for mine, theirs in zip(other.ema.module.parameters(), state.ema.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("where", ["seal", "sync", "save_file", "save_tensors"])
def test_a_crash_while_writing_leaves_the_last_checkpoint(tmp_path, monkeypatch, where):
    state = make_state()
    step(state)
    first = save(tmp_path, state)
    step(state)

    class Crash(BaseException):
        pass

    def crash(*_, **__):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, where, crash)
        with pytest.raises(Crash):
            save(tmp_path, state)
    assert checkpoints.find("latest", tmp_path) == first
    second = save(tmp_path, state)
    assert checkpoints.find("latest", tmp_path) == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


@pytest.mark.parametrize("which", ["model.safetensors", "state.pt"])
def test_no_room_for_a_file_is_reported(tmp_path, which):
    resource = pytest.importorskip("resource")
    state = make_state()
    first = save(tmp_path, state)
    step(state)
    limit = (save(tmp_path, state) / which).stat().st_size - 100
    step(state)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=r"larger than is allowed here: it needs [\d.]+ MB, [\d,.]+ MB are free"):
            save(tmp_path, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0", "step-1"]
    assert checkpoints.is_complete(first) and checkpoints.find("latest", tmp_path).name == "step-1"


def test_a_full_disk(tmp_path, monkeypatch, caplog):
    state = make_state()
    for _ in range(3):
        save(tmp_path, state)
        step(state)
    usage = checkpoints.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"the disk is full: it needs 1.\d MB, 0.0 MB are free. Those before"):
        save(tmp_path, state)
    saver = checkpoints.Saver(tmp_path, state.accelerator, keep=3, carry_on=True)
    saver.save(state)
    assert "the disk is full" in caplog.text and "goes on without it" in caplog.text
    # What would have gone in the end went first; the newest stay.
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()].count("step-0") == 0
    assert checkpoints.find("latest", tmp_path).name == "step-2"
    monkeypatch.undo()
    saver.save(state)
    assert checkpoints.find("latest", tmp_path).name == "step-3"


def test_in_the_background_the_state_is_that_of_the_call(tmp_path):
    state = make_state(ema=True)
    step(state)
    saver = checkpoints.Saver(tmp_path, state.accelerator, background=True)
    before = weights(state).clone()
    saver.save(state)
    step(state)
    assert saver.finish() == tmp_path / "step-1" and not torch.equal(weights(state), before)
    checkpoints.load(tmp_path / "step-1", state)
    assert torch.equal(weights(state), before) and state.progress.step == 1


def test_a_failure_in_the_background_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    state = make_state()
    saver = checkpoints.Saver(tmp_path, state.accelerator, background=True)
    monkeypatch.setattr(checkpoints.torch, "save", full)
    saver.save(state)
    with pytest.raises(UserError, match="the disk is full"):
        saver.finish()
    assert list(tmp_path.iterdir()) == []


def test_the_best_stays(tmp_path):
    state = make_state()
    for number in range(5):
        state.progress.step = number
        if number == 1:
            state.progress.best = {"step": 1}
        save(tmp_path, state, keep=2)
    assert [path.name for path in checkpoints.all_steps(tmp_path)] == ["step-1", "step-3", "step-4"]


@pytest.mark.parametrize("damage", ["marker", "bytes", "short", "missing", "garbage"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    state = make_state()
    first = save(tmp_path, state)
    step(state)
    second = save(tmp_path, state)
    file = second / "model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "marker":
        (second / MARKER).unlink()
    elif damage == "garbage":
        (second / MARKER).write_text("{]")
    elif damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(content[:-1])
    else:
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.warns(UserWarning, match="passing over the checkpoint .*step-1"):
        assert checkpoints.find("latest", tmp_path) == first
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoints.find(str(second), tmp_path)
    # The run that goes on reaches that step again and keeps the damaged one for inspection.
    assert save(tmp_path, state) == second and checkpoints.is_complete(second)
    assert (tmp_path / "broken-step-1-1").is_dir()


def test_newest_is_by_number_and_old_ones_go(tmp_path):
    state = make_state()
    for number in (8, 9, 10, 100):
        state.progress.step = number
        save(tmp_path, state, keep=2)
    assert [path.name for path in checkpoints.all_steps(tmp_path)] == ["step-10", "step-100"]
    assert checkpoints.find("latest", tmp_path).name == "step-100"
    assert checkpoints.find("latest", tmp_path / "nowhere") is None
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoints.find("nowhere", tmp_path)
    checkpoints.set_aside(tmp_path)
    assert checkpoints.find("latest", tmp_path) is None
    assert (tmp_path / "previous-1" / "step-100").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_sizes": (4, 4, 8, 16)}, "another architecture"),
        ({"labels": ("a", "c")}, "other labels"),
        ({"ema": True}, "without --ema_decay"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changes, message):
    path = save(tmp_path, make_state())
    with pytest.raises(UserError, match=message):
        checkpoints.load(path, make_state(**changes))


def test_unreadable_contents_are_reported(tmp_path):
    path = save(tmp_path, make_state())
    (path / "progress.json").write_text(json.dumps({"steps": 3}))
    with pytest.raises(UserError, match="cannot be read"):
        checkpoints.load(path, make_state())


def test_a_step_that_is_saved_is_not_saved_again_and_still_told(tmp_path):
    state = make_state()
    saver = checkpoints.Saver(tmp_path, state.accelerator)
    assert saver.finish() is None
    saver.save(state)
    written = (tmp_path / "step-0" / MARKER).stat().st_mtime_ns
    saver.save(state)
    assert saver.finish() == tmp_path / "step-0"
    assert (tmp_path / "step-0" / MARKER).stat().st_mtime_ns == written
