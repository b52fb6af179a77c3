"""examples/slurm.sh on one machine, with stand-ins for Slurm's own commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_poolformer import PoolFormerForImageClassification


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "slurm.sh"


@pytest.mark.slow
def test_trains_what_the_flags_say(digits, tmp_path):
    tools, output = tmp_path / "bin", tmp_path / "out"
    tools.mkdir()
    # srun takes its own options away and runs the rest.
    (tools / "srun").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    (tools / "scontrol").write_text('#!/bin/bash\n[[ "$*" == "show hostnames machine" ]] && echo 127.0.0.1\n')
    (tools / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "machine", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "17"}
    environment = os.environ | slurm | {"PROCESSES_PER_NODE": "2", "PORT": "0", "ACCELERATE_USE_CPU": "1"}
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    flags = ["--recipe", "demo", "--dataset_name", str(digits), "--output_dir", str(output), "--num_workers", "0"]
    flags += ["--total_train_batch_size", "32", "--max_train_steps", "2", "--num_warmup_steps", "1"]
    done = subprocess.run(
        ["bash", str(SCRIPT), *flags], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((output / "all_results.json").read_text())
    assert (results["step"], results["num_processes"]) == (2, 2)
    assert PoolFormerForImageClassification.from_pretrained(output).config.num_labels == 10
