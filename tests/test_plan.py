"""scripts/plan.py, as a user runs it: its arithmetic, its page, and its simulation at a small scale."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


def plan(*flags):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/plan.py"), *flags], capture_output=True, text=True, timeout=300
    )


def rows(text):
    return dict(re.findall(r"^\| (.+) \| (.+) \|$", text, re.MULTILINE))


def test_the_page_holds_what_the_script_computes():
    done = plan()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (ROOT / "docs/machines.md").read_text()


def test_the_slower_of_gpu_and_cores_decides():
    flags = ["--images", "864000", "--epochs", "10", "--gpus", "10", "--gpus_per_node", "5", "--core_rate", "50"]
    slow = rows(plan(*flags, "--gpu_rate", "1000", "--cores_per_gpu", "2").stdout)
    assert slow["what it trains"] == "100 images/s, the cores being slower"
    assert slow["cores that would keep it busy"] == "20"
    # 864 000 images at 10 x 100 images/s: 14.4 minutes.
    assert slow["one epoch"] == "14.4 minutes" and slow["10 epochs"] == "0.10 days"
    assert slow["bytes to one machine"] == "50 MB/s" and slow["bytes to all"] == "0.1 GB/s"
    fast = rows(plan(*flags, "--gpu_rate", "50", "--cores_per_gpu", "2").stdout)
    assert fast["what it trains"] == "50 images/s, the GPU being slower"


def test_what_makes_no_plan():
    done = plan("--gpus", "12")
    assert done.returncode == 2 and "not whole machines of 8" in done.stderr
    done = plan("--gpu_rate", "0")
    assert done.returncode == 2 and "--gpu_rate must be above zero" in done.stderr


@pytest.mark.slow
def test_the_simulation_deals_every_image_once(tmp_path):
    flags = ["--gpus", "2", "--gpus_per_node", "2", "--workers", "2", "--images", "4001", "--classes", "40"]
    flags += ["--buffer_size", "100", "--batch_size", "20", "--row_group", "100", "--folder", str(tmp_path / "shards")]
    done = plan("--simulate", *flags)
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert found["images dealt to all workers"] == "4,001 of 4,001"
    assert found["the smallest and the largest share"] == "1,000 and 1,001"
    assert len(list((tmp_path / "shards").iterdir())) == 16
    # Two lanes of shards sorted by class see fewer classes in 40 images than a draw at random would.
    assert 2 <= int(found["classes in a batch of all GPUs, shards sorted by class"]) < 25
