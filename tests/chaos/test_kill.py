"""Training under kill -9: fifty runs, each started again until it is done."""

import json
import random
import time
from pathlib import Path

import pytest
import torch
from harness import ENOUGH, Job
from safetensors.torch import load_file

from hf_poolformer.training.checkpoints import all_steps, step_of


KILLS = 3  # of each run

# What differs from a run in one process without workers, and how many of the fifty runs.
SETUPS = {
    "alone": ({"checkpointing_steps": "4", "ema_decay": 0.9}, 1, 12),
    "workers": ({"checkpointing_steps": "4", "num_workers": 2, "drop_path_rate": 0.2}, 1, 14),
    "accumulation": ({"checkpointing_steps": "2", "gradient_accumulation_steps": 3, "random_erasing": 0.3}, 1, 6),
    "processes": ({"checkpointing_steps": "2", "ema_decay": 0.9}, 2, 10),
    "both": (
        {"checkpointing_steps": "1", "gradient_accumulation_steps": 2, "num_workers": 2, "mixup_alpha": 0.8},
        2,
        8,
    ),
}


@pytest.mark.parametrize(
    ("setup", "number"), [(setup, number) for setup, (_, _, count) in SETUPS.items() for number in range(count)]
)
def test_killed_and_resumed_the_weights_are_those_of_the_uninterrupted_run(runs, setup, number, tmp_path):
    """Promised: a run that is killed at any moment, started again with the same command until it is done, ends with
    the very weights of the run that nothing has interrupted; it is neither lost nor hangs."""
    changes, processes, _ = SETUPS[setup]
    whole, seconds = runs.whole(processes, **changes)
    steps, every = newest(whole), int(changes["checkpointing_steps"])
    dice = random.Random(f"{setup} {number}")
    output, kills = tmp_path / "run", []
    while len(kills) < KILLS:
        job = runs.start(output, processes, **changes)
        # Some checkpoints further, or just after the start, and then anywhere until the next but one: also in the
        # middle of writing it.
        further = dice.randint(0, steps // every // KILLS - 1)
        if further:
            wait_for(job, output, newest(output) + every * further)
        job.wait(dice.uniform(0, 2 if further else 5) * seconds * every / steps)
        codes = job.wait(0)
        if set(codes) == {0} and kills:
            break
        assert None in codes, f"ended with {codes}: {job.output()}"
        # All at once, as when the machine dies; or the main processes only, whose workers must notice.
        job.kill(workers=dice.random() < 0.5)
        kills.append(newest(output))
    else:
        job = runs.start(output, processes, **changes)
    codes = job.wait(ENOUGH)
    assert set(codes) == {0}, f"ended with {codes}, hangs if None: {job.output()}"
    expected, found = load_file(whole / "model.safetensors"), load_file(output / "model.safetensors")
    assert expected.keys() == found.keys()
    wrong = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not wrong, (wrong, kills)
    results, same = (json.loads((folder / "all_results.json").read_text()) for folder in (whole, output))
    for name in ("eval_accuracy", "eval_loss", "eval_samples", "train_loss", "step", "epoch"):
        assert results[name] == same[name], name
    print(f"{setup} {number}: newest checkpoint at each kill: {kills}, of {steps} steps")


def newest(output: Path) -> int:
    return max((step_of(path) for path in all_steps(output / "checkpoints")), default=0)


def wait_for(job: Job, output: Path, step: int) -> None:
    deadline = time.monotonic() + ENOUGH
    while newest(output) < step and None in job.wait(0) and time.monotonic() < deadline:
        time.sleep(0.005)
