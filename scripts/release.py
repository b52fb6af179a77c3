"""Makes a release: packages that are built twice alike, looked into, installed and tested. It uploads nothing.

    python scripts/release.py                                   what `make release` runs, some minutes
    python scripts/release.py --python python3.10 python3.13    tests the wheel with these Pythons

The packages are made of the last commit, not of the working tree, which must be clean. The version is the one in
src/hf_poolformer/__init__.py; CHANGELOG.md must have a section on it, and CITATION.cff must name it. The wheel is
installed into an empty environment, and there the README's quick start is run and a part of the tests of the sdist.
Packages, hashes and release notes are put into dist/ when all that has gone well.

Needs the extra `release`, git, and the network for the empty environment.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
TOOLS = {"build": "build", "hatchling": "hatchling", "twine": "twine"}
# Of the sdist, against the installed wheel: what a user touches first. They need no more than the train extra.
TESTS = (
    "tests/test_auto_classes.py",
    "tests/test_hf_poolformer_cli.py",
    "tests/test_variants.py",
    "tests/conversion/test_conversion.py",
    "tests/hub/test_stock_client.py",
)
QUICK_START = "tests/hub/test_quick_start.py"
TEST_PACKAGES = ("pytest", "pytest-timeout", "timm")
NOTES, HASHES = "release-notes.md", "SHA256SUMS"


class Failure(Exception):
    """What a user reads as one line."""


# --- may it be released? ---------------------------------------------------------------------------------------------


def version_of(root: Path) -> str:
    """As hatchling reads it."""
    text = (root / "src/hf_poolformer/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if not found:
        raise Failure('src/hf_poolformer/__init__.py has no line like __version__ = "1.0.0"')
    return found[1]


def sections(changelog: str) -> dict[str, tuple[str, str]]:
    """Of CHANGELOG.md: version, or Unreleased -> date, or nothing, and text."""
    parts = re.split(r"^## \[([^\]]+)\](?: - (\S+))?\s*$", changelog, flags=re.MULTILINE)
    return {
        name: (date or "", text.strip()) for name, date, text in zip(*(parts[at::3] for at in (1, 2, 3)), strict=True)
    }


def notes_of(root: Path, version: str) -> tuple[str, str]:
    """Date and text of the version in CHANGELOG.md.

    Raises:
        Failure: it is not there, or there is more that belongs to it.
    """
    path = root / "CHANGELOG.md"
    known = sections(path.read_text(encoding="utf-8")) if path.is_file() else {}
    date, text = known.get(version, ("", ""))
    if not text:
        raise Failure(f"CHANGELOG.md has no section on {version}: write what is new under `## [{version}] - DATE`")
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
        raise Failure(f"CHANGELOG.md: the heading of {version} has no date, like `## [{version}] - 2026-01-31`")
    if known.get("Unreleased", ("", ""))[1]:
        raise Failure(f"CHANGELOG.md: what stands under Unreleased belongs to {version}, or to no commit of it")
    return date, text


def check_citation(root: Path, version: str, date: str) -> None:
    text = (root / "CITATION.cff").read_text(encoding="utf-8")
    for key, value in (("version", version), ("date-released", date)):
        found = re.search(rf"^{key}: *[\"']?([^\"'\s]+)", text, re.MULTILINE)
        if not found or found[1] != value:
            raise Failure(f"CITATION.cff says `{key}: {found[1] if found else ''}`, and CHANGELOG.md {value}")


def check_tree(root: Path, version: str) -> None:
    """
    Raises:
        Failure: there is something that the last commit lacks, or the version is another commit's.
    """
    changed = [line[3:] for line in git(root, "status", "--porcelain").splitlines()]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise Failure(f"no commit has {', '.join(changed[:3])}{more}; a release is made of a commit: commit or remove")
    tag = f"v{version}"
    here = [name for name in git(root, "tag", "--points-at", "HEAD").split() if re.match(r"v\d", name)]
    if here and tag not in here:
        raise Failure(f"this commit has the tag {here[0]}, and its version is {version}")
    if not here and git(root, "tag", "--list", tag):
        raise Failure(f"the tag {tag} is on another commit: that version is released, raise it")


def git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    except FileNotFoundError:
        raise Failure("git is not installed, and a release is made of a commit") from None
    if done.returncode:
        raise Failure(f"git {words[0]}: {done.stderr.strip()}")
    return done.stdout


# --- build -----------------------------------------------------------------------------------------------------------


def export(root: Path, target: Path) -> None:
    """The files of the last commit."""
    done = subprocess.run(["git", "-C", str(root), "archive", "--format=tar", "HEAD"], check=True, capture_output=True)
    target.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(target, **({"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}))


def build(tree: Path, target: Path, epoch: str) -> list[Path]:
    """sdist, and the wheel made of it. All times in them are `epoch`, seconds since 1970."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(tree)]
    run(command, environment={"SOURCE_DATE_EPOCH": epoch})
    return sorted(target.iterdir())


def build_twice(root: Path, scratch: Path) -> list[Path]:
    """In two folders; what depends on the place or the moment shows.

    Raises:
        Failure: the packages differ.
    """
    epoch = git(root, "log", "-1", "--format=%ct").strip()
    built = []
    for name in ("here", "elsewhere/and/deeper"):
        export(root, scratch / name / "tree")
        built.append(build(scratch / name / "tree", scratch / name / "dist", epoch))
    for one, other in zip(*built, strict=True):
        if sha256(one) != sha256(other):
            raise Failure(f"{one.name}: two builds of the same commit differ; compare {one} and {other}")
    return built[0]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(command: Sequence[str], *, folder: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """What it printed; a Failure with the last of it if it fails."""
    # PYTHONPATH could hide what is installed.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**variables, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise Failure(f"{shlex.join(map(str, command))} failed:\n{done.stdout.strip()[-3000:]}")
    return done.stdout


# --- what is in the packages -----------------------------------------------------------------------------------------


def files_of(folder: Path) -> set[str]:
    """Paths below a folder; links to folders are followed."""
    walked = os.walk(folder, followlinks=True)
    return {Path(place, name).relative_to(folder).as_posix() for place, _, names in walked for name in names}


def check_contents(tree: Path, sdist: Path, wheel: Path) -> None:
    """The sdist holds every file of the commit, the wheel every one in src, and neither holds anything else.

    Raises:
        Failure: with the first files that are too many or too few.
    """
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    compare(sdist.name, inside, {*files_of(tree), "PKG-INFO"})
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not re.match(r"[^/]+\.dist-info/", name)}
    compare(wheel.name, inside, files_of(tree / "src"))


def compare(package: str, inside: set[str], expected: set[str]) -> None:
    for what, names in (("holds", inside - expected), ("lacks", expected - inside)):
        if names:
            raise Failure(f"{package} {what} {', '.join(sorted(names)[:5])}")


# --- does it work? ---------------------------------------------------------------------------------------------------


def try_wheel(python: str, wheel: Path, sdist: Path, scratch: Path) -> str:
    """Installs the wheel into an empty environment and tests it there; a line that says with what it was.

    Raises:
        Failure: it cannot be installed, or a test fails.
    """
    from install import pip_install  # beside this file, where Python looks if it is run

    program = shutil.which(python)
    if program is None:
        raise Failure(f"there is no {python}")
    scratch.mkdir(parents=True)
    run([program, "-m", "venv", scratch / "environment"])
    inside = scratch / "environment/bin/python"
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    tests = scratch / sdist.name.removesuffix(".tar.gz")
    shutil.rmtree(tests / "src")  # nothing can be tested but what is installed
    what = ["--no-compile", f"{wheel}[train]", *TEST_PACKAGES]
    if pip_install(str(inside), what, str(tests / "constraints.txt")):
        raise Failure(f"{wheel.name} cannot be installed for {python}")
    return test_installed(inside, tests)


def test_installed(inside: Path, tests: Path) -> str:
    """The same of what is installed for a Python; `tests` is an unpacked sdist."""
    run([inside, "-m", "pip", "check"])
    ask = "import sys, torch, transformers, hf_poolformer as us; print(us.__file__); print(us.__version__, "
    ask += "*('{}.{}'.format(*sys.version_info), torch.__version__, transformers.__version__))"
    place, versions = run([inside, "-c", ask], folder=tests).splitlines()[-2:]
    if not Path(place).is_relative_to(inside.parents[1]):
        raise Failure(f"hf_poolformer was imported from {place}, not from the environment of {inside}")
    command = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", tests / "outputs"]
    said = [last_line(run([*command, *words], folder=tests)) for words in (["-m", "slow", QUICK_START], TESTS)]
    ours, python, torch, transformers = versions.split()
    with_what = f"Python {python}, torch {torch}, transformers {transformers}"
    return f"{ours} on {with_what}: quick start {said[0]}; tests {said[1]}"


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip("= ")


# --- command line ----------------------------------------------------------------------------------------------------


def release(root: Path, target: Path, pythons: Sequence[str]) -> None:
    lacking = [name for module, name in TOOLS.items() if find_spec(module) is None]
    if lacking:
        raise Failure(f"{', '.join(lacking)} missing: pip install '.[release]'")
    version = version_of(root)
    date, notes = notes_of(root, version)
    check_citation(root, version, date)
    check_tree(root, version)
    commit = git(root, "rev-parse", "--short", "HEAD").strip()
    print(f"[1/4] {version} of commit {commit}: builds it twice", flush=True)
    with tempfile.TemporaryDirectory(prefix="release-") as folder:
        scratch = Path(folder)
        packages = build_twice(root, scratch)
        sdist = next(path for path in packages if path.name.endswith(".tar.gz"))
        wheel = next(path for path in packages if path.suffix == ".whl")
        if f"-{version}" not in sdist.name:
            raise Failure(f"{sdist.name} is not of version {version}")
        print("[2/4] looks into the packages", flush=True)
        check_contents(scratch / "here/tree", sdist, wheel)
        run([sys.executable, "-m", "twine", "check", "--strict", *packages])
        for python in pythons:
            print(f"[3/4] installs the wheel for {python} and tests it, which takes minutes", flush=True)
            print(f"      {try_wheel(python, wheel, sdist, scratch / 'try' / Path(python).name)}", flush=True)
            shutil.rmtree(scratch / "try")  # gigabytes
        print(f"[4/4] writes into {target}", flush=True)
        target.mkdir(parents=True, exist_ok=True)
        lines = [f"{sha256(path)}  {path.name}" for path in packages]
        for path in packages:
            shutil.copyfile(path, target / path.name)
        (target / HASHES).write_text("\n".join([*lines, ""]))
        (target / NOTES).write_text(f"# hf-poolformer {version}\n\n{notes}\n", encoding="utf-8")
    print()
    for line in lines:
        print(line)
    print(f"Release notes: {target / NOTES}")
    print("Nothing was uploaded. To upload it by hand, and to say which commit it is:")
    print(f"    {shlex.join(['twine', 'upload', *(str(target / path.name) for path in packages)])}")
    print(f"    git tag v{version} {commit} && git push origin v{version}")


def parser() -> argparse.ArgumentParser:
    description, _, notes = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=notes, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="default: dist")
    parser.add_argument(
        "--python", nargs="+", default=[sys.executable], metavar="PROGRAM", help="default: the one that runs this"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    release(ROOT, arguments.output, arguments.python)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; dist is as it was", file=sys.stderr)
        sys.exit(130)
