"""What runs elsewhere agrees with what is here: workflows, forms, hooks and container files."""

import json
import re
import runpy
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from hf_poolformer.commands import env


try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib


ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = re.findall(r"Programming Language :: Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in FILES}
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def commands(workflow):
    return [line for step in steps(workflow) if "run" in step for line in step["run"].splitlines()]


# --- workflows -------------------------------------------------------------------------------------------------------


def test_there_are_those_that_the_pages_name():
    assert set(WORKFLOWS) == {"checks", "docs", "release", "versions"}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_calls_what_there_is(name):
    lines = commands(WORKFLOWS[name])
    targets = {word for line in lines if line.startswith("make ") for word in shlex.split(line)[1:] if "=" not in word}
    assert targets <= TARGETS
    scripts = {word for line in lines for word in shlex.split(line) if word.endswith(".py")}
    assert all((ROOT / script).is_file() for script in scripts)
    assert targets or scripts


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_do_as_little_as_it_needs(name):
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    allowed = {
        ("docs", "deploy"): {"pages": "write", "id-token": "write"},
        ("release", "publish"): {"id-token": "write"},
        ("release", "announce"): {"contents": "write"},
    }
    for job, content in workflow["jobs"].items():
        assert content.get("permissions") == allowed.get((name, job)), job
        assert content["timeout-minutes"] <= 120
        # Who may write runs no code of the checkout.
        if "permissions" in content:
            assert not any("checkout" in step.get("uses", "") for step in content["steps"])
    for step in steps(workflow):
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False
    text = (ROOT / f".github/workflows/{name}.yml").read_text()
    assert "secrets." not in text
    assert "pull_request_target" not in text
    # What others choose, a branch's name say, is no part of a command.
    assert not [line for line in commands(workflow) if re.search(r"\$\{\{\s*(?!\s|matrix\.)", line)]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_named_by_their_major_version(name):
    for step in steps(WORKFLOWS[name]):
        if "uses" in step:
            assert re.fullmatch(r"(?:actions|pypa)/[\w-]+@(?:v\d+|release/v\d+)", step["uses"])


def test_checks_run_on_every_python_that_is_claimed():
    assert WORKFLOWS["checks"]["jobs"]["test"]["strategy"]["matrix"]["python"] == PYTHONS
    assert commands(WORKFLOWS["checks"]) == ["make check test"]
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]}" in " ".join((ROOT / "CHANGELOG.md").read_text().split())


def test_floors_run_on_the_oldest_python_and_the_newest_on_the_newest():
    (job,) = WORKFLOWS["versions"]["jobs"].values()
    assert {one["environment"]: one["python"] for one in job["strategy"]["matrix"]["include"]} == {
        "floors": PYTHONS[0],
        "newest": PYTHONS[-1],
    }
    assert "schedule" in WORKFLOWS["versions"][True]  # YAML takes `on` for true


def test_other_workflows_take_a_python_that_is_claimed():
    options = [step.get("with", {}) for one in WORKFLOWS.values() for step in steps(one)]
    chosen = [one["python-version"] for one in options if "python-version" in one]
    assert len(chosen) == 4
    assert {one for one in chosen if "matrix" not in one} <= set(PYTHONS)


def test_what_is_uploaded_is_what_the_release_wrote():
    release = runpy.run_path(str(ROOT / "scripts/release.py"))
    jobs = WORKFLOWS["release"]["jobs"]
    uploads = {
        step["with"]["name"]: step["with"]["path"].split()
        for step in jobs["build"]["steps"]
        if "upload-artifact" in step.get("uses", "")
    }
    assert uploads == {
        "packages": ["dist/*.whl", "dist/*.tar.gz"],
        "notes": [f"dist/{release['NOTES']}", f"dist/{release['HASHES']}"],
    }
    assert jobs["publish"]["steps"][0]["with"] == {"name": "packages", "path": "dist"}
    assert jobs["publish"]["needs"] == "build"
    page = (ROOT / "docs/release.md").read_text()
    assert f"environment `{jobs['publish']['environment']}`" in page
    (pattern,) = WORKFLOWS["release"][True]["push"]["tags"]
    assert fnmatch("v1.0.0", pattern)


# --- forms, hooks ----------------------------------------------------------------------------------------------------


def test_a_report_of_a_fault_asks_for_the_environment():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/fault.yml").read_text())
    fields = {field["id"]: field for field in form["body"]}
    assert "hf-poolformer env" in fields["environment"]["attributes"]["label"]
    assert fields["environment"]["validations"]["required"]
    promised = fields["environment"]["attributes"]["description"]
    assert "no token, no path" in promised
    assert "no token, no path" in env.__doc__


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.stem
)
def test_forms_are_ones_that_github_shows(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) > 0
    for field in form["body"]:
        assert field["type"] in ("checkboxes", "dropdown", "input", "textarea")
        assert field["attributes"]["label"]


def test_hooks_run_the_ruff_of_the_environment():
    (pinned,) = re.findall(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    (wanted,) = (line for line in PROJECT["optional-dependencies"]["dev"] if line.startswith("ruff"))
    assert fnmatch(pinned, wanted.removeprefix("ruff=="))
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["additional_dependencies"] for hook in local["hooks"]] == [[f"ruff=={pinned}"]] * 2
    assert [hook["entry"].split()[:2] for hook in local["hooks"]] == [["ruff", "check"], ["ruff", "format"]]


def test_the_development_container_begins_with_a_target_of_make():
    content = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    first, *targets = content["postCreateCommand"].split()
    assert first == "make"
    assert set(targets) <= TARGETS
    assert content["image"].rpartition(":")[2] in PYTHONS


# --- containers ------------------------------------------------------------------------------------------------------


def instructions(path):
    """Of a Dockerfile: (word, rest), with continued lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_a_container_copies_what_there_is_and_does_not_run_as_root(path):
    found = instructions(path)
    words = [word for word, _ in found]
    known = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "USER", "WORKDIR"}
    assert set(words) <= known
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    for word, rest in found:
        if word == "COPY" and "--from" not in rest:
            for source in shlex.split(rest)[:-1]:
                assert (ROOT / source).exists()
                assert source.split("/")[0] not in ignored
        if word == "FROM":
            assert re.match(r"python:(3\.\d+)-slim", rest)[1] in PYTHONS
    last = len(words) - words[::-1].index("USER") - 1
    assert found[last][1] not in ("root", "0")
    assert not {"RUN", "COPY"} & set(words[last:])
    assert f"docker/{path.name}" in (ROOT / "docs/release.md").read_text()


def test_what_the_images_need_is_not_ignored():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    needed = ["README.md", "LICENSE", "pyproject.toml", "constraints.txt", "src", "model_cards", "examples"]
    assert [name for name in needed if any(fnmatch(name, pattern) for pattern in ignored)] == []


def test_extras_of_the_images_exist():
    extras = PROJECT["optional-dependencies"]
    for path in DOCKERFILES:
        text = path.read_text()
        named = re.findall(r"ARG EXTRAS=(\S+)", text) + re.findall(r"whl\)\[([\w,-]+)\]", text)
        assert named
        assert {name for one in named for name in one.split(",")} <= set(extras)


def test_the_server_s_container_starts_it_as_it_can_be_started():
    found = dict(instructions(ROOT / "docker/serve.Dockerfile"))
    words = json.loads(found["ENTRYPOINT"])[2:] + json.loads(found["CMD"])
    serve = runpy.run_path(str(ROOT / "examples/serve.py"))
    options = serve["parser"]().parse_args(words)
    assert (options.model, options.host) == ("/model", "0.0.0.0")
    assert str(options.port) == found["EXPOSE"]
    health = found["HEALTHCHECK"]
    assert f"http://127.0.0.1:{options.port}/health/ready" in health
    assert '@app.get("/health/ready")' in (ROOT / "examples/serve.py").read_text()
