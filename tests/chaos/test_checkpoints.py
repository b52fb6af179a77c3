"""Checkpoints on full disks, with damaged bytes and under a mad clock; and a process that is left alone."""

import json
import os
import shutil
import time
import warnings

import pytest
from harness import ENOUGH, train_on_a_full_disk, train_with_a_mad_clock

from hf_poolformer.training import checkpoints


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def complete(folder):
    return [path.name for path in checkpoints.all_steps(folder / "checkpoints") if checkpoints.is_complete(path)]


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_full_disk_stops_the_run_as_set(runs, tmp_path, background):
    """Promised: one line says that the disk is full, the last good checkpoint is as it was, no half one is left, and
    with room again the same command ends at the weights of the uninterrupted run."""
    whole, _ = runs.whole()
    changes = {"async_checkpointing": background}
    job = runs.start(tmp_path / "run", 1, train_on_a_full_disk, (3,), **changes)
    assert job.wait(ENOUGH) == [2], job.output()
    assert "cannot write the checkpoint step-16" in job.output() and "would be larger than is allowed" in job.output()
    assert complete(tmp_path / "run") == ["step-8", "step-12"]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    again = runs.start(tmp_path / "run", **changes)
    assert again.wait(ENOUGH) == [0] and "step-12" in again.output(), again.output()
    assert weights(tmp_path / "run") == weights(whole)


def test_full_disk_goes_on_as_set(runs, tmp_path):
    """Promised: with --checkpoint_failure continue the run ends as ever, warns of each checkpoint it could not write,
    and keeps those it has."""
    whole, _ = runs.whole()
    job = runs.start(tmp_path / "run", 1, train_on_a_full_disk, (3,), checkpoint_failure="continue")
    assert job.wait(ENOUGH) == [0], job.output()
    assert job.output().count("Training goes on without it") == 60 // 4 - 3
    assert complete(tmp_path / "run") == ["step-8", "step-12"]
    assert weights(tmp_path / "run") == weights(whole)


DAMAGES = {
    "a bit": lambda path, data: path.write_bytes(
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
    "the end": lambda path, data: path.write_bytes(data[:-1]),
    "everything": lambda path, data: path.write_bytes(b""),
    "zeros": lambda path, data: path.write_bytes(b"\0" * len(data)),
    "gone": lambda path, data: path.unlink(),
}


def test_damaged_bytes_are_found_out_and_the_checkpoint_before_is_used(runs, tmp_path):
    """Promised: whatever happens to whichever file of the newest checkpoint, it is recognised, named in a warning,
    and the one before it is used; so the run still ends at the weights of the uninterrupted one."""
    whole, _ = runs.whole()
    root = whole / "checkpoints"
    newest, before = sorted(checkpoints.all_steps(root), key=checkpoints.step_of)[-1:-3:-1]
    tried = 0
    for file in sorted(newest.iterdir()):
        for damage in DAMAGES.values():
            shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
            shutil.copytree(root, tmp_path / "checkpoints")
            damage(tmp_path / "checkpoints" / newest.name / file.name, file.read_bytes())
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                found = checkpoints.find("latest", tmp_path / "checkpoints")
            assert found == tmp_path / "checkpoints" / before.name, (file.name, damage)
            assert len(heard) == 1 and f"passing over the checkpoint {tmp_path}" in str(heard[0].message)
            tried += 1
    assert tried == 5 * 5
    print(f"{tried} damages found out of {tried}")

    run = tmp_path / "run"
    job = runs.start(run, max_train_steps=22, num_train_epochs=2)
    assert job.wait(ENOUGH) == [0], job.output()
    for name in ("model.safetensors", "all_results.json", "config.json"):
        (run / name).unlink()
    expected = runs.whole(max_train_steps=22, num_train_epochs=2)[0]
    DAMAGES["a bit"](run / "checkpoints/step-20/state.pt", (run / "checkpoints/step-20/state.pt").read_bytes())
    again = runs.start(run, max_train_steps=22, num_train_epochs=2)
    assert again.wait(ENOUGH) == [0], again.output()
    assert "step-20: state.pt is damaged" in again.output() and "step-16" in again.output()
    assert weights(run) == weights(expected)


def test_the_clock_jumps(runs, tmp_path):
    """Promised: nothing is decided by the time of day. A clock that jumps by years, and checkpoints whose dates lie,
    change neither the result nor which checkpoint is the newest."""
    whole, _ = runs.whole()
    job = runs.start(tmp_path / "run", 1, train_with_a_mad_clock)
    job.wait(ENOUGH)
    assert job.wait(0) == [0], job.output()
    assert weights(tmp_path / "run") == weights(whole)
    results = json.loads((tmp_path / "run/all_results.json").read_text())
    assert 0 < results["train_runtime"] < ENOUGH and results["train_samples_per_second"] > 0
    steps = checkpoints.all_steps(tmp_path / "run/checkpoints")
    for age, path in enumerate(steps):
        os.utime(path, (10**9 - age * 10**6,) * 2)  # the newest looks oldest
    assert checkpoints.find("latest", tmp_path / "run/checkpoints") == steps[-1]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_is_killed(runs, tmp_path, rank):
    """Promised: the other neither hangs nor goes on alone; it says that it has lost its peer, and the same command
    goes on to the weights of the uninterrupted run."""
    whole, _ = runs.whole(2)
    job = runs.start(tmp_path / "run", 2)
    deadline = time.monotonic() + ENOUGH
    while not complete(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert job.wait(0) == [None, None], job.output()
    job.kill([rank])
    clock = time.monotonic()
    code = job.wait(ENOUGH)[1 - rank]
    assert code not in (0, None), job.output()
    print(f"rank {1 - rank} left {time.monotonic() - clock:.1f} s after rank {rank} was killed")
    said = job.logs[1 - rank].read_text()
    assert "another process of this run has died" in said and "Traceback" not in said, said
    again = runs.start(tmp_path / "run", 2)
    assert again.wait(ENOUGH) == [0, 0], again.output()
    assert weights(tmp_path / "run") == weights(whole)
