"""What this machine is said to have, in containers that get a part of it."""

import subprocess
import sys

import pytest

from hf_poolformer.foundation import machine


SEEN = 8


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """The folder in which Linux tells what a container may take, on a machine of eight cores."""
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(SEEN)), raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, SEEN),
        ({"cpu.max": "max 100000\n"}, SEEN),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "6400000 100000\n"}, SEEN),  # more than there are
        ({"cpu.max": "nonsense\n"}, SEEN),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, SEEN),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "0\n"}, SEEN),
    ],
)
def test_cores_are_the_share_of_a_container(groups, files, cores):
    for name, text in files.items():
        (groups / name).parent.mkdir(exist_ok=True)
        (groups / name).write_text(text)
    assert machine.cores() == cores


COMMAND = """
import pathlib, sys
import torch
from hf_poolformer.foundation import machine
machine.GROUPS = pathlib.Path(sys.argv[1])
machine.os.sched_getaffinity = lambda _: set(range(8))
torch.set_num_threads(8)
from hf_poolformer.commands.env import main
sys.exit(main([]))
"""


@pytest.mark.parametrize(("variable", "threads"), [(None, 2), ("8", 8)])
def test_commands_start_no_more_threads_than_a_container_has_cores(tmp_path, monkeypatch, variable, threads):
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    done = subprocess.run([sys.executable, "-c", COMMAND, tmp_path], capture_output=True, text=True, check=True)
    assert f"2 cores, {threads} threads" in done.stdout
