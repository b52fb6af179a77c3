"""Runs the tests in environments of their own, from the floors of pyproject.toml to the newest of everything.

    python scripts/versions.py                     what `make versions` runs, about ten minutes for each environment
    python scripts/versions.py --list              which environments there are
    python scripts/versions.py --only torch-2.12   one of them; --keep leaves it there to look into

Which releases there are is asked of pip, so that its configuration holds here as everywhere. A run that is cut off
goes on where it was: results are kept for a day, unless the code changes. When every environment has one, the table
is written. Needs nothing but Python and pip.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib


ROOT = Path(__file__).resolve().parents[1]
# What the tests import beside the package and its training; the rest of the dev extra is not installed.
TEST_PACKAGES = (
    "peft",
    "pycocotools",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "scikit-learn",
    "timm",
)
# Model and processor: every file that lies flat in tests, but these. Then kernels, conversion, data, what is streamed
# from the Hub, and training.
OTHER_FILES = (
    "demo",
    "demo_dense",
    "documentation",
    "fuzzing",
    "hf_poolformer_cli",
    "packaging",
    "prediction",
    "release",
    "versions",
    "workflows",
)
ROOMS = (
    "tests/kernels",
    "tests/conversion/test_conversion.py",
    "tests/conversion/test_dense_conversion.py",
    "tests/data",
    "tests/foundation",
    "tests/hub/test_hub_files.py",
    "tests/hub/test_streaming.py",
    "tests/training",
)
SHOWN = ("torch", "torchvision", "transformers", "datasets", "accelerate", "huggingface_hub", "numpy", "pillow")
KEPT_SECONDS = 24 * 3600


class Failure(Exception):
    """What a user reads as one line."""


@dataclass
class Environment:
    name: str
    python: str  # "3.10"
    requirements: list[str]
    floors: bool = False  # the first release that each requirement allows, not the newest


# --- what pyproject.toml and pip say ---------------------------------------------------------------------------------


def parts(requirement: str) -> tuple[str, str]:
    """`"numpy>=2.0"` -> ("numpy", "2.0"); every requirement of pyproject.toml has a floor."""
    match = re.fullmatch(r"([\w.\-]+)(?:\[[\w,\-]+\])?\s*>=\s*([\d.]+)", requirement)
    if not match:
        raise Failure(f"pyproject.toml: {requirement!r} has no floor, like numpy>=2.0")
    return match[1], match[2]


def requirements(project: dict) -> list[str]:
    """What the package and its training need, and what the tests beside them import."""
    extras = project["optional-dependencies"]
    tests = [line for line in extras["dev"] + extras["benchmark"] + extras["dense"] + extras["demo"] if ">=" in line]
    tests = {parts(line)[0]: line for line in tests}
    return [*project["dependencies"], *extras["train"], *(tests[name] for name in TEST_PACKAGES)]


def supported(project: dict) -> list[str]:
    """The Pythons of the classifiers, oldest first: ["3.10", "3.11", ...]."""
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in project["classifiers"])
    return sorted((match[1] for match in found if match), key=version)


def version(text: str) -> tuple[int, ...]:
    """`"2.14.1"` -> (2, 14, 1); 2.0 and 2.0.0 are the same one."""
    numbers = [int(number) for number in re.match(r"\d+(?:\.\d+)*", text)[0].split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def releases(name: str, python: str) -> list[str]:
    """The releases that pip would install for this Python, oldest first; no candidates."""
    command = [sys.executable, "-m", "pip", "index", "versions", name, "--python-version", python]
    done = subprocess.run(command, capture_output=True, text=True)
    listed = re.search(r"^Available versions: (.*)$", done.stdout, re.MULTILINE)
    if not listed:
        raise Failure(f"pip lists no release of {name} for Python {python}: {done.stderr.strip()[-300:]}")
    return sorted(listed[1].split(", "), key=version)


def floor(requirement: str, python: str) -> str:
    """The first release that the floor allows, as a requirement; a floor need not be a release itself."""
    name, lowest = parts(requirement)
    allowed = [release for release in releases(name, python) if version(release) >= version(lowest)]
    if not allowed:
        raise Failure(f"pip has no {requirement} for Python {python}")
    return f"{name}=={allowed[0]}"


def minors(found: Sequence[str], lowest: str) -> list[str]:
    """The minor releases from `lowest` on, oldest first: ["2.11", "2.12", ...]."""
    known = {version(release)[:2]: ".".join(release.split(".")[:2]) for release in found}
    return [known[key] for key in sorted(known) if key >= version(lowest)[:2]]


def pythons(wanted: Sequence[str]) -> dict[str, str]:
    """The interpreters at hand of the supported Pythons, oldest first, and the one that runs this."""
    found = {"{}.{}".format(*sys.version_info): sys.executable}
    for name in wanted:
        program = shutil.which(f"python{name}")
        if not program or name in found:
            continue
        # Some are only there to say that they are not.
        ask = "import ensurepip, sys, venv; print('{}.{}'.format(*sys.version_info))"
        done = subprocess.run([program, "-c", ask], capture_output=True, text=True)
        if done.stdout.strip() == name:
            found[name] = program
    return {name: found[name] for name in sorted(found, key=version)}


def environments(project: dict, at_hand: Sequence[str]) -> Iterator[Environment]:
    """The floors on the oldest Python, each minor release of torch between on this one, the newest on the newest."""
    wanted = requirements(project)
    (torch,) = (line for line in wanted if parts(line)[0] == "torch")
    current = "{}.{}".format(*sys.version_info)
    yield Environment("floors", at_hand[0], wanted, floors=True)
    # The oldest minor release is the first environment's, the newest the last one's.
    for minor in minors(releases("torch", current), parts(torch)[1])[1:-1]:
        others = [line for line in wanted if line != torch]
        yield Environment(f"torch-{minor}", current, [f"torch=={minor}.*", *others])
    yield Environment("newest", at_hand[-1], wanted)


# --- one environment -------------------------------------------------------------------------------------------------


def tests() -> list[str]:
    flat = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    others = {f"test_{name}.py" for name in OTHER_FILES}
    return [f"tests/{name}" for name in flat if name not in others] + list(ROOMS)


def fingerprint() -> str:
    """Of the code and its tests: a result of other code is none."""
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes())
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def install(wanted: list[str], program: str, folder: Path) -> Path:
    """The environment's Python. One of the same requirements is used again, and brought to what is newest now."""
    stamp = folder / "requirements.json"
    contents = json.dumps([program, *wanted])
    if not stamp.is_file() or stamp.read_text() != contents:
        shutil.rmtree(folder, ignore_errors=True)
        run([program, "-m", "venv", str(folder)])
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*command, "--upgrade", "--upgrade-strategy", "eager", *wanted])
    stamp.write_text(contents)
    return python


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failure("\n".join(line for line in done.stderr.splitlines() if "WARNING" not in line).strip())


def test(python: Path, log: Path) -> dict:
    """Runs the tests, shown and written to `log`: how many passed, failed and were skipped."""
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal", *tests()]
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
        except BaseException:  # Ctrl-C reaches pytest, too; a signal to this process alone does not
            process.terminate()
            raise
    if not report.is_file():
        raise Failure(f"pytest ended with status {process.returncode} and no report; see {log}")
    return counts(report.read_text(encoding="utf-8")) | {"status": process.returncode}


def counts(report: str) -> dict:
    """Of pytest's JUnit file; a file of tests that cannot be imported counts as failed."""
    suite = ElementTree.fromstring(report).find("testsuite")
    number = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    return {
        "passed": number["tests"] - failed - number["skipped"],
        "failed": failed,
        "skipped": number["skipped"],
    }


def installed(python: Path) -> dict:
    ask = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {SHOWN}}}))"
    return json.loads(subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True).stdout)


def kept(path: Path, code: str) -> dict | None:
    """The result of an earlier run, if it is of this code and not of yesterday's index."""
    if not path.is_file() or time.time() - path.stat().st_mtime > KEPT_SECONDS:
        return None
    result = json.loads(path.read_text())
    return result if result["code"] == code else None


# --- the table -------------------------------------------------------------------------------------------------------

PAGE = """\
# Versions

Written by `make versions`. The tests of model, processor, kernels, conversion, data, streams of the Hub and training,
each line in an environment of its own: `floors` has the first release of everything that `pyproject.toml` allows,
`torch-X` the last patch of a minor release of torch in between and otherwise what pip chooses, `newest` what pip
chooses. A test is skipped where what it needs is missing, a GPU for instance.

{table}
"""


def page(results: dict[str, dict]) -> str:
    columns = ["environment", "python", *SHOWN, "passed", "failed", "skipped", "date"]
    rows = [[name, *(str(result[column]) for column in columns[1:])] for name, result in results.items()]
    lines = [columns, ["---"] * len(columns), *rows]
    return PAGE.format(table="\n".join("| " + " | ".join(line) + " |" for line in lines))


# --- command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    description, _, notes = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=notes, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these environments")
    parser.add_argument("--list", action="store_true", help="print the environments and end")
    parser.add_argument("--again", action="store_true", help="do not use the results of an earlier run")
    parser.add_argument("--keep", action="store_true", help="leave environments in which all passed, gigabytes each")
    parser.add_argument("--clean", action="store_true", help="remove the environments and end; results stay")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/versions", help="default: outputs/versions")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/versions.md", help="default: docs/versions.md")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.clean:
        for path in arguments.folder.glob("*/requirements.json"):
            shutil.rmtree(path.parent)
        return 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    programs = pythons(supported(project))
    missing = [name for name in supported(project) if name not in programs]
    if missing:
        print(f"without Python {', '.join(missing)}, which are not here", flush=True)
    known = list(environments(project, list(programs)))
    chosen = [environment for environment in known if environment.name in (arguments.only or [environment.name])]
    strangers = set(arguments.only or []) - {environment.name for environment in known}
    if strangers:
        raise Failure(f"no environment {', '.join(sorted(strangers))}; there are {', '.join(e.name for e in known)}")
    if arguments.list:
        for environment in known:
            print(f"{environment.name:12} Python {environment.python}: {' '.join(environment.requirements)}")
        return 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    code = fingerprint()
    faults = []
    for index, environment in enumerate(chosen, 1):
        head = f"[{index}/{len(chosen)}] {environment.name}, Python {environment.python}"
        path = arguments.folder / f"{environment.name}.json"
        result = None if arguments.again else kept(path, code)
        if result:
            print(f"{head}: {summary(result)} at an earlier run; --again runs it anew", flush=True)
        else:
            try:
                result = visit(environment, programs[environment.python], arguments, head) | {"code": code}
            except Failure as failure:
                print(f"{head}: {failure}", flush=True)
                faults.append(f"{environment.name}: {str(failure).splitlines()[-1]}")
                continue
            path.write_text(json.dumps(result, indent=2) + "\n")
        if result["status"]:
            faults.append(f"{environment.name}: {summary(result)}; see {path.with_suffix('.log')}")
    results = {environment.name: kept(arguments.folder / f"{environment.name}.json", code) for environment in known}
    print()
    for name, result in results.items():
        print(f"{name:12} {summary(result) if result else 'no result'}")
    if all(results.values()):
        arguments.page.parent.mkdir(parents=True, exist_ok=True)
        arguments.page.write_text(page(results), encoding="utf-8", newline="\n")
        print(f"{arguments.page} is written")
    else:
        print(f"{arguments.page} is written when every environment has a result")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


def visit(environment: Environment, program: str, arguments: argparse.Namespace, head: str) -> dict:
    """Installs, tests, and removes the environment if all passed."""
    folder = arguments.folder / environment.name
    print(f"{head}: installs into {folder}", flush=True)
    started = time.time()
    wanted = environment.requirements
    if environment.floors:
        wanted = [floor(line, environment.python) for line in wanted]
    python = install(wanted, program, folder)
    ready = time.time()
    print(f"{head}: {ready - started:.0f} s; tests", flush=True)
    result = {"python": environment.python, **installed(python)}
    result |= test(python, arguments.folder / f"{environment.name}.log")
    result |= {"date": f"{datetime.now():%Y-%m-%d}"}
    result |= {"install_seconds": round(ready - started), "test_seconds": round(time.time() - ready)}
    print(f"{head}: {summary(result)}", flush=True)
    if not result["status"] and not arguments.keep:
        shutil.rmtree(folder)
    return result


def summary(result: dict) -> str:
    return f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
