"""`make versions` and constraints.txt, without a network: a pip that answers from a table, and what the table says."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).resolve().parents[1]
CURRENT = "{}.{}".format(*sys.version_info)


def script(name):
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


versions, installer = script("versions"), script("install")
PROJECT = versions.tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INDEX = {
    "torch": ["2.9.1", "2.10.0", "2.11.0", "2.12.0", "2.12.1", "2.13.0", "3.0.0"],
    "safetensors": ["0.7.0", "0.8.2"],
}


@pytest.fixture
def index(monkeypatch):
    """What the index has; of what is not in the table, two releases at and after the floor."""
    floors = dict(map(versions.parts, versions.requirements(PROJECT)))
    monkeypatch.setattr(versions, "releases", lambda name, python: INDEX.get(name, [floors.get(name, "1"), "99.0"]))


# --- floors and releases -----------------------------------------------------------------------------------------


def test_every_dependency_has_a_floor_and_is_in_every_environment(index):
    wanted = {Requirement(line).name for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["train"]}
    for environment in versions.environments(PROJECT, [CURRENT]):
        names = [Requirement(line).name for line in environment.requirements]
        assert wanted | set(versions.TEST_PACKAGES) == set(names)
        assert len(names) == len(set(names))


def test_floors_that_pip_can_read_are_what_we_read():
    for line in versions.requirements(PROJECT):
        name, lowest = versions.parts(line)
        assert (name, f">={lowest}") == (Requirement(line).name, str(Requirement(line).specifier))


@pytest.mark.parametrize("line", ["torch", "torch==2.11", "torch<3", "torch~=2.11", "torch>=2.11,<3"])
def test_a_dependency_without_a_plain_floor_is_named(line):
    with pytest.raises(versions.Failure, match=re.escape(line)):
        versions.parts(line)


def test_environments_are_the_floors_each_minor_release_and_the_newest(index):
    found = list(versions.environments(PROJECT, ["3.8", CURRENT, "3.99"]))
    assert [(one.name, one.python, one.floors) for one in found] == [
        ("floors", "3.8", True),
        ("torch-2.12", CURRENT, False),
        ("torch-2.13", CURRENT, False),
        ("newest", "3.99", False),  # 3.0, which needs no environment of its own
    ]
    assert "torch==2.12.*" in found[1].requirements


def test_a_floor_is_the_first_release_that_it_allows(index):
    assert versions.floor("safetensors>=0.8", "3.10") == "safetensors==0.8.2"
    assert versions.floor("torch>=2.11", "3.10") == "torch==2.11.0"
    with pytest.raises(versions.Failure, match=r"torch>=3\.1 for Python 3\.10"):
        versions.floor("torch>=3.1", "3.10")


@pytest.mark.parametrize("texts", [["2.9", "2.9.1", "2.10", "2.14.1"], ["1.9", "1.9.1.post1", "2"], ["0.2", "0.10.1"]])
def test_versions_are_ordered_as_pip_orders_them(texts):
    assert sorted(texts[::-1], key=versions.version) == sorted(texts, key=Version)
    assert versions.version("2.0") == versions.version("2.0.0") == (2,)


def test_what_pip_lists_is_read_and_what_it_refuses_is_told(monkeypatch):
    def answer(command, **_):
        assert command[1:] == ["-m", "pip", "index", "versions", "torch", "--python-version", "3.10"]
        return subprocess.CompletedProcess(command, 0 if listed else 1, listed, "ERROR: no such place")

    monkeypatch.setattr(subprocess, "run", answer)
    listed = "torch (2.12.0)\nAvailable versions: 2.12.0, 2.2.1, 2.11.0\n  INSTALLED: 2.11.0\n"
    assert versions.releases("torch", "3.10") == ["2.2.1", "2.11.0", "2.12.0"]
    listed = ""
    with pytest.raises(versions.Failure, match="no such place"):
        versions.releases("torch", "3.10")


def test_an_interpreter_that_only_says_it_is_missing_is_none(monkeypatch):
    monkeypatch.setattr(versions.shutil, "which", lambda name: f"/shims/{name}")
    answers = {"/shims/python3.8": "3.8\n", "/shims/python3.99": "", "/shims/python3.98": "3.97\n"}
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, answers[command[0]], "")
    )
    assert versions.pythons(["3.8", CURRENT, "3.98", "3.99"]) == {"3.8": "/shims/python3.8", CURRENT: sys.executable}


def test_tests_of_the_rooms_exist_and_those_left_out_do():
    assert all((ROOT / path).exists() for path in versions.tests())
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in versions.OTHER_FILES)
    assert {"tests/test_modeling_poolformer.py", "tests/test_image_processing_poolformer.py"} <= set(versions.tests())


# --- results and the table -----------------------------------------------------------------------------------------


def test_counts_are_those_of_pytest(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', range(5))\n"
        "def test(x):\n    assert x\n"
        "def test_skipped():\n    pytest.skip('not here')\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", tmp_path, "--junitxml", tmp_path / "r.xml", tmp_path]
    subprocess.run([*map(str, command), "--continue-on-collection-errors"], cwd=tmp_path, capture_output=True)
    assert versions.counts((tmp_path / "r.xml").read_text()) == {"passed": 4, "failed": 2, "skipped": 1}


@pytest.fixture
def machine(index, monkeypatch):
    """No environment is built: what would run there passes, but for what the test says."""
    visited, outcome = [], {}

    def test(python, log):
        visited.append(log.stem)
        if isinstance(outcome.get(log.stem), BaseException):
            raise outcome[log.stem]
        return {"passed": 7, "failed": 0, "skipped": 1, "status": 0} | outcome.get(log.stem, {})

    def install(wanted, program, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "requirements.json").write_text("")
        return folder / "python"

    monkeypatch.setattr(versions, "install", install)
    monkeypatch.setattr(versions, "test", test)
    monkeypatch.setattr(versions, "installed", lambda python: dict.fromkeys(versions.SHOWN, "1.2"))
    monkeypatch.setattr(versions, "pythons", lambda wanted: {CURRENT: sys.executable})
    return visited, outcome


@pytest.fixture
def run(tmp_path, capsys):
    def run(*argv):
        try:
            status = versions.main(["--folder", str(tmp_path / "v"), "--page", str(tmp_path / "docs/page.md"), *argv])
        finally:
            run.out, run.err = capsys.readouterr()
        return status

    run.page = tmp_path / "docs/page.md"
    run.folder = tmp_path / "v"
    return run


NAMES = ["floors", "torch-2.12", "torch-2.13", "newest"]


def test_a_run_that_is_cut_off_goes_on_where_it_was(machine, run):
    visited, outcome = machine
    outcome["torch-2.12"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert visited == NAMES[:2]
    assert not run.page.exists()
    outcome.clear()
    visited.clear()
    assert run() == 0
    assert visited == NAMES[1:]
    rows = re.findall(r"^\| ([\w.\-]+) +\|", run.page.read_text().replace(" |", "  |"), re.MULTILINE)
    assert rows == ["environment", "---", *NAMES]
    visited.clear()
    assert run("--again", "--only", "newest") == 0
    assert visited == ["newest"]


def test_a_result_of_other_code_is_none(machine, run, monkeypatch):
    visited, _ = machine
    run("--only", "floors")
    monkeypatch.setattr(versions, "fingerprint", lambda: "changed")
    run("--only", "floors")
    assert visited == ["floors", "floors"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"failed": 3, "status": 1}, "7 passed, 3 failed"),
        ({"status": 2}, "see"),
        (versions.Failure("ERROR: no room"), "no room"),
    ],
)
def test_an_environment_that_fails_is_told_and_does_not_stop_the_others(machine, run, fault, said):
    visited, outcome = machine
    outcome["torch-2.12"] = fault
    assert run() == 1
    assert visited == NAMES
    assert said in run.err
    assert run.err.count("\n") == 1
    assert (run.folder / "torch-2.12").is_dir()  # stays, to look into; the others are gigabytes
    assert not (run.folder / "newest").exists()
    assert run.page.exists() == isinstance(fault, dict)
    run("--clean")
    assert not (run.folder / "torch-2.12").exists()
    assert (run.folder / "newest.json").is_file()


def test_the_table_says_what_ran_where(machine, run):
    run()
    header, _, *rows = [line.strip("| ").split(" | ") for line in run.page.read_text().splitlines() if "|" in line]
    row = dict(zip(header, rows[-1], strict=True))
    assert (row["environment"], row["python"], row["torch"]) == ("newest", CURRENT, "1.2")
    assert (row["passed"], row["failed"], row["skipped"]) == ("7", "0", "1")


def test_an_unknown_environment_is_refused_with_the_known_ones(machine, run):
    with pytest.raises(versions.Failure, match=r"no environment torch-1\.0; there are floors, torch-2\.12"):
        run("--only", "torch-1.0")


def test_the_script_needs_python_alone():
    script = ROOT / "scripts/versions.py"
    done = subprocess.run([sys.executable, "-S", str(script), "--help"], capture_output=True, text=True)
    if sys.version_info < (3, 11) and "pip" in done.stderr:
        pytest.skip("tomllib comes with Python 3.11; before, pip brings it, which lies where -S does not look")
    assert done.returncode == 0, done.stderr
    assert "--only" in done.stdout


# --- constraints.txt -----------------------------------------------------------------------------------------------


@pytest.fixture
def pip(monkeypatch):
    """A pip that refuses what it is told to, and remembers what it was asked."""
    asked, refused = [], {}

    def run(command, **options):
        constraints = command[command.index("-c") + 1] if "-c" in command else None
        asked.append(constraints)
        said = refused.get(constraints, "")
        # Whatever is not piped is seen by the user.
        print(said if "stderr" not in options else "", file=sys.stderr, end="")
        return subprocess.CompletedProcess(command, int(bool(said)), stderr=said)

    monkeypatch.setattr(subprocess, "run", run)
    return asked, refused


MISSING = "ERROR: Ignored the following versions: 1\nERROR: No matching distribution found for torch==99\n"
CONFLICT = "ERROR: Cannot install numpy==2 and torch.\nERROR: ResolutionImpossible: for help visit a page\n"
CRASH = "ERROR: Exception:\nTraceback (most recent call last):\nOSError: no space left\n\n"


def test_constraints_that_hold_are_used_without_a_word(pip, capsys):
    asked, _ = pip
    assert installer.install("demo", "constraints.txt") == 0
    assert asked == ["constraints.txt"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (MISSING, "No matching distribution found for torch==99"),
        (CONFLICT, "Cannot install numpy==2"),
        (CRASH, "no space"),
    ],
)
def test_constraints_that_do_not_hold_are_told_in_one_line(pip, capsys, said, why):
    asked, refused = pip
    refused["constraints.txt"] = said
    assert installer.install("demo", "constraints.txt") == 0
    assert asked == ["constraints.txt", None]
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert why in out
    assert "installing what the index gives" in out
    assert err == ""


def test_an_install_that_fails_either_way_shows_what_pip_says(pip, capsys):
    _, refused = pip
    refused |= {"constraints.txt": MISSING, None: "ERROR: no network\n"}
    assert installer.install("demo", "constraints.txt") == 1
    assert "ERROR: no network" in capsys.readouterr().err


def test_no_constraints_is_what_the_index_gives(pip):
    asked, _ = pip
    assert installer.install("demo") == 0
    assert asked == [None]


def test_constraints_hold_what_the_dev_extra_needs():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {}
    for line in lines:
        name, release = line.split("==")
        assert name == canonicalize_name(name)
        assert Version(release).local is None
        pinned[name] = release
    assert list(pinned) == sorted(pinned)
    extras = PROJECT["optional-dependencies"]
    ours = [Requirement(line) for lines in [PROJECT["dependencies"], *extras.values()] for line in lines]
    left_out = {"hf-poolformer", "ray", "coremltools", "executorch", "torchao"}  # extras beside dev
    for requirement in ours:
        name = canonicalize_name(requirement.name)
        assert name in left_out or requirement.specifier.contains(pinned[name]), name


def test_frozen_versions_are_those_of_any_system(monkeypatch):
    class Installed:
        def __init__(self, name, version):
            self.name, self.version = name, version

    found = [("torch", "2.13.0+cpu"), ("Jinja2", "3.1"), ("nvidia-cublas", "13"), ("pip", "1"), ("hf_poolformer", "0")]
    monkeypatch.setattr(
        installer, "distributions", lambda: [Installed(*one) for one in [*found, ("huggingface_hub", "2")]]
    )
    head, *lines = installer.freeze().splitlines()
    assert head.startswith("#")
    assert lines == ["huggingface-hub==2", "jinja2==3.1", "torch==2.13.0"]
