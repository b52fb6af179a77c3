"""Bulk prediction under kill -9."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from harness import ENOUGH, Job, predict_with


IMAGES = 5000
PREDICT = Path(__file__).parents[2] / "scripts" / "predict.py"


@pytest.fixture(scope="module")
def images(digit_rows, write_parquet, tmp_path_factory):
    """5000 images in four Parquet files, one in a hundred broken."""
    folder = tmp_path_factory.mktemp("images")
    rows = [{"image": digit_rows[index % len(digit_rows)]["image"]} for index in range(IMAGES)]
    for index in range(0, IMAGES, 100):
        rows[index] = {"image": {"bytes": b"\x89PNG broken", "path": None}}
    for number in range(4):
        write_parquet(rows[number * 1250 : (number + 1) * 1250], folder / f"{number}.parquet", group=70)
    return folder


def rows_of(folder):
    return [row for path in sorted(folder.glob("part-*")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_ten_times_the_rows_are_those_of_the_uninterrupted_run(
    context, images, tiny_model, tmp_path, processes
):
    """Promised: whatever is killed when, the same command goes on, and in the end every image has exactly one row,
    with the same numbers as if nothing had happened."""
    arguments = {"model": str(tiny_model), "inputs": [str(images)], "embeddings": True, "progress": False}
    arguments |= {"part_size": 150, "batch_size": 25, "num_workers": 1}

    def start(name: str, run: str) -> Job:
        given = json.dumps({**arguments, "output": str(tmp_path / name)})
        return Job(context, predict_with, (given,), tmp_path / f"{name}-{run}.log", processes)

    clock = time.monotonic()
    whole = start("whole", "0")
    assert whole.wait(ENOUGH) == [0] * processes, whole.output()
    seconds = time.monotonic() - clock
    expected = rows_of(tmp_path / "whole")
    assert len(expected) == IMAGES and sum(row["error"] is not None for row in expected) == 50

    dice = random.Random(processes)
    kills, seen, total = 0, [0], len(list((tmp_path / "whole").glob("part-*")))

    def parts() -> int:
        return len(list((tmp_path / "killed").glob("part-*")))

    while kills < 10:
        job = start("killed", str(kills))
        # Ten kills must find something to kill: a few parts further, or just after the start, and then anywhere until
        # the next but one; also while one is written.
        further, deadline = dice.randint(0, 3), time.monotonic() + ENOUGH
        while further and parts() < seen[-1] + further and None in job.wait(0) and time.monotonic() < deadline:
            time.sleep(0.002)
        job.wait(dice.uniform(0, 2 if further else 10) * seconds / total)
        running = [code is None for code in job.wait(0)]
        job.kill(workers=dice.random() < 0.5)
        assert any(running), f"finished after {kills} kills; {job.output()}"
        kills += 1
        seen.append(parts())
    last = start("killed", "last")
    assert last.wait(ENOUGH) == [0] * processes, last.output()
    assert "4950 images predicted, 50 broken" in last.output()
    assert rows_of(tmp_path / "killed") == expected
    assert not list((tmp_path / "killed").glob(".*.partial"))
    assert seen == sorted(seen)  # no kill ever took a finished part away
    print(f"{processes} processes, {seconds:.1f} s uninterrupted; parts after each kill: {seen[1:]} of {total}")


def test_accelerate_launch_fills_one_folder_with_two_processes(images, tiny_model, tmp_path):
    """Promised: `accelerate launch` is all it takes; the summary is printed once, by the process that came last."""
    launch = [
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--cpu",
        "--num_processes",
        "2",
        str(PREDICT),
        str(tiny_model),
    ]
    command = [sys.executable, *launch, str(images / "0.parquet"), "--output", str(tmp_path / "out")]
    command += ["--part_size", "200", "--num_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ENOUGH)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1237 images predicted, 13 broken (see .broken.csv)") == 1, done.stdout
    assert "process 1 of 2" in done.stderr and len(rows_of(tmp_path / "out")) == 1250
    again = subprocess.run([*command, "--top_k", "2"], capture_output=True, text=True, timeout=ENOUGH)
    assert again.returncode != 0 and "error: " in again.stderr and "top_k 5 instead of 2" in again.stderr
