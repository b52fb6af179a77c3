import json
import subprocess
from pathlib import Path

import pytest
from warm import warm_python


ROOT = Path(__file__).resolve().parents[1]
STAMPS = Path("/usr/share/tuxpaint/stamps")
TASKS = ("semantic-segmentation", "object-detection", "instance-segmentation")


def demo(folder, *flags):
    command = [warm_python(), str(ROOT / "scripts" / "demo_dense.py"), "--images", "16"]
    command += ["--data_dir", str(folder / "data"), "--output_dir", str(folder / "run"), *flags]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=850)


@pytest.mark.slow
@pytest.mark.skipif(not STAMPS.is_dir(), reason="needs Debian's tuxpaint-stamps-default")
def test_the_whole_way(tmp_path):
    """One step of each: that the parts fit together, and that a low result is told."""
    done = demo(tmp_path, "--max_train_steps", "1", "--per_device_train_batch_size", "4")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "stayed below what was wanted" in done.stderr
    for task in TASKS:
        folder = tmp_path / "run" / task
        assert json.loads((folder / "all_results.json").read_text())["step"] == 1
        for name in ("model.safetensors", "README.md", "predictions.png", "curves.png"):
            assert (folder / name).is_file(), name
        config = json.loads((folder / "config.json").read_text())
        assert config["hidden_sizes"] == [32, 64, 128, 192] and config["fpn_feature_size"] == 64


def test_without_the_stamps_it_says_what_to_install(tmp_path):
    done = demo(tmp_path, "--stamps", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "error: " in done.stderr and "apt install tuxpaint-stamps-default" in done.stderr
    assert "Traceback" not in done.stderr
