"""scripts/release.py: what it refuses, what it looks for in packages, and whole releases of a clone."""

import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml


ROOT = Path(__file__).resolve().parents[1]
GIT = {f"GIT_{who}_{what}": "nobody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@pytest.fixture(scope="module")
def release():
    spec = importlib.util.spec_from_file_location("scripts_release", ROOT / "scripts/release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def git(folder, *words):
    done = subprocess.run(
        ["git", "-C", str(folder), "-c", "commit.gpgsign=false", *words],
        env={**os.environ, **GIT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- one version, said once ------------------------------------------------------------------------------------------


def test_changelog_and_citation_agree_with_the_version(release):
    version = release.version_of(ROOT)
    known = release.sections((ROOT / "CHANGELOG.md").read_text())
    assert list(known)[:2] == ["Unreleased", version]
    date, text = known[version]
    assert text
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)
    release.check_citation(ROOT, version, date)
    assert isinstance(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"], str)


def test_the_version_is_in_no_other_file():
    """Of those that are not about one version. What says it beside the source is derived, or tested above."""
    from hf_poolformer import __version__

    files = [ROOT / "pyproject.toml", ROOT / "Makefile", ROOT / "README.md", *ROOT.glob("src/**/*.py")]
    pattern = re.compile(rf'(?:^|["\'\s=])v?{re.escape(__version__)}(?:["\'\s]|$)', re.MULTILINE)
    found = [path.relative_to(ROOT).as_posix() for path in files if pattern.search(path.read_text())]
    assert found == ["src/hf_poolformer/__init__.py"]


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path):
    """What a release looks at, committed."""
    root = tmp_path / "repository"
    (root / "src/hf_poolformer").mkdir(parents=True)
    (root / "src/hf_poolformer/__init__.py").write_text('"""A package."""\n\n__version__ = "1.2.3"\n')
    (root / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n\n### Fixed\n\n- It.\n\n"
        "## [1.2.2] - 2026-01-30\n\n- The first.\n"
    )
    (root / "CITATION.cff").write_text('cff-version: 1.2.0\nversion: 1.2.3\ndate-released: "2026-01-31"\n')
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-qm", "All")
    return root


def ready(release, root):
    version = release.version_of(root)
    date, notes = release.notes_of(root, version)
    release.check_citation(root, version, date)
    release.check_tree(root, version)
    return notes


def edit(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_the_notes_are_the_version_s_section(release, repository):
    assert ready(release, repository) == "### Fixed\n\n- It."


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("CHANGELOG.md", "[1.2.3]", "[1.2.1]", r"no section on 1\.2\.3"),
        ("CHANGELOG.md", "### Fixed\n\n- It.\n\n", "", r"no section on 1\.2\.3"),
        ("CHANGELOG.md", " - 2026-01-31", "", "has no date"),
        ("CHANGELOG.md", "[Unreleased]\n", "[Unreleased]\n\n- More.\n", "under Unreleased"),
        ("CITATION.cff", "version: 1.2.3", "version: 1.2.2", r"CITATION\.cff says `version: 1\.2\.2`.*1\.2\.3"),
        ("CITATION.cff", "2026-01-31", "2026-01-30", "date-released"),
        ("src/hf_poolformer/__init__.py", '"1.2.3"', "None", "no line like"),
    ],
)
def test_what_does_not_agree_is_refused(release, repository, file, before, after, said):
    edit(repository / file, before, after)
    with pytest.raises(release.Failure, match=said):
        ready(release, repository)


def test_what_no_commit_has_is_refused(release, repository):
    (repository / "new.py").write_text("")
    with pytest.raises(release.Failure, match=r"new\.py"):
        ready(release, repository)
    (repository / ".gitignore").write_text("new.py\n.gitignore\n")
    ready(release, repository)
    edit(repository / "CHANGELOG.md", "- It.", "- That.")
    with pytest.raises(release.Failure, match=r"CHANGELOG\.md"):
        ready(release, repository)


def test_a_version_is_one_commit_s(release, repository):
    git(repository, "tag", "v1.2.2")
    with pytest.raises(release.Failure, match=r"tag v1\.2\.2, and its version is 1\.2\.3"):
        ready(release, repository)
    git(repository, "tag", "v1.2.3")
    ready(release, repository)
    git(repository, "commit", "-q", "--allow-empty", "-m", "More")
    with pytest.raises(release.Failure, match=r"v1\.2\.3 is on another commit"):
        ready(release, repository)


def test_outside_of_git_it_says_so(release, tmp_path):
    with pytest.raises(release.Failure, match="git status: fatal"):
        release.check_tree(tmp_path, "1.0")


def test_from_the_command_line_a_refusal_is_one_line(repository):
    for name in ("release.py", "install.py"):
        (repository / "scripts").mkdir(exist_ok=True)
        shutil.copy(ROOT / "scripts" / name, repository / "scripts")
    done = subprocess.run([sys.executable, repository / "scripts/release.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*scripts/.*\n", done.stderr) or "missing" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (repository / "dist").exists()


# --- what it looks for in packages -----------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path):
    """A tree, and writes packages of it with these names too many or too few."""
    tree = tmp_path / "tree"
    for name in ("README.md", "src/hf_poolformer/__init__.py", "src/hf_poolformer_cli.py", "cards/a.yaml"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("")
    (tree / "src/hf_poolformer/cards").symlink_to("../../cards")
    files = ["README.md", "cards/a.yaml"]
    ours = ["hf_poolformer/__init__.py", "hf_poolformer/cards/a.yaml", "hf_poolformer_cli.py"]

    def write(sdist=(), wheel=(), without=()):
        with tarfile.open(tmp_path / "p-1.tar.gz", "w:gz") as archive:
            for name in {*files, *(f"src/{one}" for one in ours), "PKG-INFO", *sdist} - {*without}:
                archive.addfile(tarfile.TarInfo(f"p-1/{name}"), io.BytesIO())
        with zipfile.ZipFile(tmp_path / "p-1-py3-none-any.whl", "w") as archive:
            for name in {*ours, "p-1.dist-info/METADATA", *wheel} - {*without}:
                archive.writestr(name, "")
        return tree, tmp_path / "p-1.tar.gz", tmp_path / "p-1-py3-none-any.whl"

    return write


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"sdist": ["notes.txt"]}, r"p-1\.tar\.gz holds notes\.txt"),
        ({"wheel": ["tests/test_a.py"]}, r"whl holds tests/test_a\.py"),
        ({"wheel": ["hf_poolformer/__pycache__/a.pyc"]}, r"whl holds hf_poolformer/__pycache__/a\.pyc"),
        ({"without": ["README.md"]}, r"p-1\.tar\.gz lacks README\.md"),
        ({"without": ["hf_poolformer/cards/a.yaml"]}, r"whl lacks hf_poolformer/cards/a\.yaml"),
    ],
)
def test_packages_hold_the_commit_and_nothing_else(release, packages, changed, said):
    files = packages(**changed)
    if said is None:
        release.check_contents(*files)
        return
    with pytest.raises(release.Failure, match=said):
        release.check_contents(*files)


def test_builds_that_differ_are_refused(release, repository, tmp_path, monkeypatch):
    def build(tree, target, epoch):
        target.mkdir()
        (target / "p-1.tar.gz").write_text(str(tree) if differ else epoch)
        return [target / "p-1.tar.gz"]

    monkeypatch.setattr(release, "build", build)
    differ = False
    (path,) = release.build_twice(repository, tmp_path / "one")
    assert path.read_text() == git(repository, "log", "-1", "--format=%ct").strip()
    differ = True
    with pytest.raises(release.Failure, match=r"p-1\.tar\.gz: two builds of the same commit differ"):
        release.build_twice(repository, tmp_path / "two")


# --- whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_release_of_a_clone(release, tmp_path, monkeypatch, capsys):
    """Everything but the empty environment, which takes gigabytes: there, what is installed here is borrowed."""
    pytest.importorskip("twine", reason="needs pip install '.[release]'")
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git repository")
    git(tmp_path, "clone", "-q", str(ROOT), str(tmp_path / "clone"))
    borrowed = [path for path in sys.path if path.endswith("site-packages")]

    def install(python, what, constraints):
        assert Path(constraints).name == "constraints.txt"
        (site,) = Path(python).parents[1].glob("lib/*/site-packages")
        (site / "borrowed.pth").write_text("\n".join(borrowed))
        wheel = what[1].partition("[")[0]
        command = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--ignore-installed", wheel]
        return subprocess.run(command).returncode

    monkeypatch.setitem(sys.modules, "install", SimpleNamespace(pip_install=install))
    # pip check would judge all that is borrowed.
    usual = release.run
    monkeypatch.setattr(release, "run", lambda words, **rest: "" if "check" in words[-1:] else usual(words, **rest))
    monkeypatch.setattr(release, "TESTS", ("tests/test_hf_poolformer_cli.py",))
    target = tmp_path / "dist"
    release.release(tmp_path / "clone", target, [sys.executable])
    said = capsys.readouterr().out
    version = release.version_of(ROOT)
    names = [f"hf_poolformer-{version}-py3-none-any.whl", f"hf_poolformer-{version}.tar.gz"]
    assert sorted(path.name for path in target.iterdir()) == sorted([*names, "SHA256SUMS", "release-notes.md"])
    for line in (target / "SHA256SUMS").read_text().splitlines():
        sha, name = line.split("  ")
        assert sha == release.sha256(target / name)
    assert release.notes_of(ROOT, version)[1] in (target / "release-notes.md").read_text()
    assert "quick start 1 passed" in said
    assert "Nothing was uploaded" in said
    assert f"twine upload {target / names[0]} {target / names[1]}" in said
