"""What a user gets from `pip install`, and whether the repository's own commands are what they say."""

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
from PIL import Image

from hf_poolformer import PoolFormerForImageClassification, PoolFormerImageProcessor


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
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "Makefile"):
        shutil.copy(ROOT / name, tree)
    for name in ("src", "scripts", "tests", "examples"):
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "outputs")
        )
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "dist", tree)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / "dist"


@pytest.fixture(scope="session")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    source = ROOT / "src"
    ours = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    ours = {name for name in ours if name.startswith(("hf_poolformer/", "hf_poolformer_cli")) and "__pyc" not in name}
    names = set(wheel.namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - info == ours
    assert {"hf_poolformer/py.typed", "hf_poolformer/hub/card_template.md", "hf_poolformer_cli.py"} <= ours
    (entry_points,) = (wheel.read(name).decode() for name in info if name.endswith("entry_points.txt"))
    assert "hf-poolformer = hf_poolformer_cli:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_the_sdist_builds_and_carries_the_licence(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "src/hf_poolformer/hub/card_template.md"} <= names


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
        "cards.write_training_card(sys.argv[2], results={}, settings={}, dataset_name=None, base_model=None,"
        " label_names=['a', 'b'])\n"
    )
    done = run(sys.executable, "-c", source, tmp_path / "site", tmp_path / "model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "README.md").read_text().startswith("---\n")


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


README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```(?:bash|sh|console)\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")


def test_the_readme_names_only_files_that_exist():
    named = set(re.findall(r"\b((?:scripts|examples|tests|src)/[\w./\-]*\w)", README))
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()
    tree = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1]
    folder = []
    for line in tree.splitlines():
        match = re.match(r"( *)(\S+)", line)
        depth = len(match[1]) // 2
        folder = [*folder[:depth], match[2].rstrip("/")]
        assert ROOT.joinpath(*folder).exists(), line


PROGRAMS = r"(?:(?:scripts|examples)/\w+\.py|hf[-_]poolformer (?!COMMAND)[a-z][\w-]*)(?= )"


@pytest.mark.parametrize("program", sorted(set(re.findall(PROGRAMS, SHELL))))
def test_the_readme_uses_only_flags_that_exist(program):
    lines = [line.split("#")[0].split(f"{program} ", 1)[1] for line in SHELL.splitlines() if f"{program} " in line]
    flags = {flag for line in lines for flag in re.findall(r"(?<!\S)(--\w[\w\-]*)", line)}
    if not flags:
        return
    words = [ROOT / program] if "/" in program else ["-m", "hf_poolformer", program.split()[1]]
    done = run(sys.executable, *words, "--help")
    assert done.returncode == 0, done.stderr
    assert {flag for flag in flags if not re.search(rf"{flag}\b", done.stdout)} == set()


SNIPPETS = re.findall(r"```python\n(.*?)```", README.split("## The Python API")[1], re.DOTALL)


def test_the_readme_s_python_runs(tmp_path, poolformer_config):
    PoolFormerForImageClassification(poolformer_config).save_pretrained(tmp_path / "outputs" / "demo")
    PoolFormerImageProcessor().save_pretrained(tmp_path / "outputs" / "demo")
    Image.new("L", (8, 8), 200).save(tmp_path / "digit.png")
    check = "assert [shape[1] for shape in shapes] == list(model.config.hidden_sizes)\n"
    done = run(sys.executable, "-c", SNIPPETS[0] + check, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("LABEL_")


def test_the_readme_s_mixer_works(tmp_path):
    check = "assert model(torch.randn(2, 3, 64, 64)).logits.shape == (2, 10)\n"
    done = run(sys.executable, "-c", SNIPPETS[1] + check, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_readme_s_mixer_learns_the_digits(tmp_path):
    write = f"import sys; sys.path.append({str(ROOT / 'scripts')!r})\nimport demo, pathlib\n"
    write += "demo.write_digits(pathlib.Path('outputs/demo-data'))\n"
    code = write + SNIPPETS[1] + SNIPPETS[2] + "\nassert results['eval_accuracy'] >= 0.97, results\n"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
