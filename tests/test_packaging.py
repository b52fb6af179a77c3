"""What a user gets from `pip install`, and whether the repository's own commands are what they say."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from warm import warm_python

from hf_poolformer import __version__
from hf_poolformer.foundation.files import digest


ROOT = Path(__file__).resolve().parents[1]
API_DEPENDENCIES = {"torch", "torchvision", "transformers", "huggingface-hub", "safetensors", "numpy", "pillow"}


def run(*command, **options):
    return subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """sdist, and the wheel built from it, of a copy of what is in the repository."""
    return built(tmp_path_factory.mktemp("packaging") / "tree")


def built(tree):
    """The packages of a copy in the folder `tree`."""
    left_out = shutil.ignore_patterns(
        "__pycache__", "*.egg-info", "outputs", "dist", "build", ".git", ".venv", ".*_cache"
    )
    shutil.copytree(ROOT, tree, symlinks=True, ignore=left_out)
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1234567890"}
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "dist", tree, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / "dist"


@pytest.fixture(scope="session")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    source = ROOT / "src"
    walked = os.walk(source, followlinks=True)  # the texts of the cards are a link
    ours = {Path(folder, name).relative_to(source).as_posix() for folder, _, names in walked for name in names}
    ours = {name for name in ours if name.startswith(("hf_poolformer/", "hf_poolformer_cli")) and "__pyc" not in name}
    names = set(wheel.namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - info == ours
    cards = {"hf_poolformer/hub/card_template.md", "hf_poolformer/hub/model_cards/caformer.yaml"}
    assert {"hf_poolformer/py.typed", "hf_poolformer_cli.py", *cards} <= ours
    (entry_points,) = (wheel.read(name).decode() for name in info if name.endswith("entry_points.txt"))
    assert "hf-poolformer = hf_poolformer_cli:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_the_same_source_is_the_same_bytes_wherever_it_is_built(dist, tmp_path):
    again = built(tmp_path / "elsewhere" / "and" / "deeper")
    digests = [{path.name: digest(path) for path in folder.iterdir()} for folder in (dist, again)]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 2


def test_the_version_of_the_packages_is_the_one_that_the_code_says(dist, wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    assert Parser().parsestr(wheel.read(name).decode())["Version"] == __version__
    assert {path.name for path in dist.iterdir()} == {
        f"hf_poolformer-{__version__}-py3-none-any.whl",
        f"hf_poolformer-{__version__}.tar.gz",
    }


def test_the_sdist_builds_and_carries_the_licence_and_what_the_readme_links_to(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "src/hf_poolformer/hub/card_template.md"} <= names
    links = re.findall(r"\]\(([\w./]+)[)#]", (ROOT / "README.md").read_text())
    assert "docs/install.md" in links and set(links) <= names
    assert {
        "model_cards/caformer.yaml",
        "tests/fixtures/golden/index.json",
        "constraints.txt",
        "CHANGELOG.md",
        "scripts/install.py",
    } <= names
    assert not {name for name in names if "__pycache__" in name or name.startswith((".venv", ".git/"))}


def test_a_plain_install_pulls_what_the_api_needs(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    requirements = metadata.get_all("Requires-Dist")
    plain = [requirement for requirement in requirements if "extra ==" not in requirement]
    assert {re.split(r"[^\w.\-]", text)[0].replace("_", "-") for text in plain} == API_DEPENDENCIES
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"train", "demo", "dev"} <= set(metadata.get_all("Provides-Extra"))


def test_the_installed_package_writes_a_card(wheel, tmp_path):
    """From the unpacked wheel, away from the repository: the template must have come along."""
    wheel.extractall(tmp_path / "site")
    (tmp_path / "model").mkdir()
    source = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from hf_poolformer.hub import cards\n"
        "assert cards.__file__.startswith(sys.argv[1]), cards.__file__\n"
        "print(cards.folder_card(sys.argv[2]))\n"
    )
    done = run(warm_python(), "-c", source, tmp_path / "site", tmp_path / "model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("---\n")


@pytest.fixture(scope="session")
def installed(dist, tmp_path_factory):
    """pip for an environment with the wheel installed, and nothing beside it."""
    folder = tmp_path_factory.mktemp("installed")
    assert run(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    (path,) = dist.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin/python")
    done = run(*pip, "install", "--no-index", "--no-deps", path)
    assert done.returncode == 0, done.stderr
    return pip


def test_an_extra_is_added_to_what_is_installed_and_no_index_has_the_package(installed, wheel):
    """What error messages advise, `pip install 'hf-poolformer[serve]'`, looks for the extra's libraries only."""
    command = (*installed, "install", "--no-index", "--dry-run")
    for extra in ("serve", "train"):
        done = run(*command, f"hf-poolformer[{extra}]")
        assert f"Requirement already satisfied: hf-poolformer[{extra}]" in done.stdout, done.stdout
        missing = re.findall(r"No matching distribution found for ([\w-]+)", done.stderr)
        assert missing and missing != ["hf-poolformer"], "there is no library here"
    done = run(*command, "--ignore-installed", "hf-poolformer[serve]")
    assert "No matching distribution found for hf-poolformer[serve]" in done.stderr


@pytest.mark.slow  # tests/commands/test_errors.py runs every command without extras
def test_a_plain_import_needs_no_extra(tmp_path):
    """`import hf_poolformer` must not import what only the train and demo extras install."""
    extras = ["accelerate", "datasets", "evaluate", "matplotlib", "sklearn", "tensorboard", "timm", "peft"]
    source = (
        f"import sys; sys.modules.update(dict.fromkeys({extras}))\n"
        "import hf_poolformer, hf_poolformer.hub.publishing\n"
    )
    done = run(sys.executable, "-c", source, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_licence_and_citation():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    cited = yaml.safe_dump([citation["preferred-citation"], citation["references"]])
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "authors", "message"} <= citation.keys()
    assert "2111.11418" in cited
    assert "2210.13452" in cited


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_offers_its_targets():
    done = run("make", "help", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for target in re.findall(r"^make (\w+)", done.stdout, re.MULTILINE):
        assert run("make", "--dry-run", target, cwd=ROOT).returncode == 0
    check = run("make", "--dry-run", "check", cwd=ROOT).stdout
    assert "--fix" not in check
    assert "format --check" in check
