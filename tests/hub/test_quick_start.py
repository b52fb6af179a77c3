"""The README's quick start, word for word, by what is installed beside this Python: `make release` runs it, too."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import Commit, Repo
from PIL import Image


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def block(heading: str, language: str) -> str:
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.search(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[1]


COMMANDS = [
    line for line in block("From a folder of photographs to a published model", "bash").splitlines() if line[0] != "#"
]
# What a person has who reads it: an older model to compare with, and for the Python API what `make demo` leaves.
BEFORE = {
    "hf-poolformer compare": ("outputs/pets", "outputs/older"),
    "python -c": ("outputs/pets", "outputs/demo"),
}


@pytest.fixture
def photos(tmp_path):
    """Cats are bright above, dogs bright below."""
    generator = np.random.default_rng(0)
    for name, suffix, sign in (("cat", "jpg", 1), ("dog", "png", -1)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(1, 41):
            pixels = 128 + sign * np.linspace(60, -60, 48)[:, None, None] + generator.normal(0, 20, (48, 64, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(tmp_path / "photos" / name / f"{index:03d}.{suffix}")


@pytest.fixture
def published(hub, tiny_models):
    """The model that `train` starts from, as the authors' repositories are: without code. A small one."""
    folder = tiny_models / "poolformer"
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".py"}
    config = {key: value for key, value in json.loads(files["config.json"]).items() if key != "auto_map"}
    files["config.json"] = json.dumps(config).encode()
    hub.repos["models", "sail/poolformer_s12"] = Repo(branches={"main": [Commit("1" * 40, "weights", files)]})


def test_the_readme_counts_its_commands():
    assert len(COMMANDS) == 7
    assert "Seven commands:" in README


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_word_for_word(hub, hub_environment, hub_token, photos, published, tmp_path):
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = hub_environment | {"HF_TOKEN": hub_token, "PATH": programs}

    def run(*command):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    said = []
    for line in COMMANDS:
        for start, (source, target) in BEFORE.items():
            if line.startswith(start):
                shutil.copytree(tmp_path / source, tmp_path / target)
        said.append(run("bash", "-c", line))
    assert (tmp_path / "outputs/photos/report.html").is_file()
    assert json.loads((tmp_path / "outputs/pets/all_results.json").read_text())["eval_accuracy"] >= 0.9
    assert (tmp_path / "outputs/errors/report.html").is_file()
    assert (tmp_path / "outputs/comparison/report.html").is_file()
    assert Image.open(tmp_path / "explained.png").width > 200
    assert f"Published: {hub.url}/me/pets" in said[5]
    assert "'label': 'cat'" in said[6].split("}")[0]

    shutil.copy(tmp_path / "photos/dog/002.png", tmp_path / "digit.png")
    assert run("python", "-c", block("The Python API", "python")).strip() == "dog"
