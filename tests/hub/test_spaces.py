"""`publish --space`: a Space beside the model, on the loopback Hub."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from huggingface_hub import RepoCard
from packaging.requirements import Requirement

from hf_poolformer.hub import PublishError, publish, publishing, space_package
from hf_poolformer.hub.space_package import own_wheel, package_for_space


# The command without the seconds that `import hf_poolformer` takes.
LIGHT = f"""
import sys, types
package = types.ModuleType("hf_poolformer")
package.__path__ = [{str(Path(publishing.__file__).parents[1])!r}]
sys.modules["hf_poolformer"] = package
from hf_poolformer.commands.publish import main
sys.exit(main())
"""


VERSION = metadata.version("hf-poolformer")
WHEEL = f"hf_poolformer-{VERSION}-py3-none-any.whl"


@pytest.fixture
def send(online, model_dir):
    return lambda **options: publish(
        model_dir, "me/solar-cells", endpoint=online.url, **{"verify": False, "space": True, **options}
    )


def test_a_space_beside_the_model(hub, send, model_dir, monkeypatch):
    monkeypatch.setattr(publishing, "compare_answers", lambda *arguments: "the model, in test_publishing.py")
    (model_dir / "examples").mkdir()
    (model_dir / "examples" / "cell.png").write_bytes(b"\x89PNG not really")
    published = send(verify=True)
    assert published.space == f"{hub.url}/spaces/me/solar-cells"
    files = hub.files("me/solar-cells", kind="spaces")
    assert sorted(files) == ["README.md", "app.py", "examples/cell.png", WHEEL, "requirements.txt"]
    assert files["examples/cell.png"] == (model_dir / "examples" / "cell.png").read_bytes()
    assert "model.safetensors" in hub.files("me/solar-cells"), "the model as ever"
    card = RepoCard(files["README.md"].decode()).data.to_dict()
    assert card["title"] == "Solar cells"
    assert card["sdk"] == "gradio"
    assert re.fullmatch(r"\d+\.\d+\.\d+", card["sdk_version"])
    assert card["models"] == ["me/solar-cells"]
    assert card["license"] == "apache-2.0", "the model's"
    assert card["app_file"] in files
    assert len(card["short_description"]) <= 60


def space_folder(hub, folder, repo="me/solar-cells"):
    """A copy of the Space."""
    for name, content in hub.files(repo, kind="spaces").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# What the Space's process has: the libraries, and no hf_poolformer but the one that it carries.
ON_THE_HUB = """
import runpy, sys
sys.path[:] = [path for path in sys.path if path != {source!r}]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
import gradio
gradio.Blocks.block_thread = lambda page: print("blocked", page.title)
gradio.Blocks.launch = lambda page, **options: print("launched", options.get("server_name"))
runpy.run_path({app!r}, run_name="__main__")
import hf_poolformer
print(hf_poolformer.__file__)
"""


@pytest.mark.slow  # gradio's import takes seconds
def test_the_space_runs_the_app(hub, send, run_with_hub, tmp_path):
    """From the wheel that it carries, in a process that has no other hf_poolformer."""
    pytest.importorskip("gradio", minversion="6.20", reason="needs gradio: pip install 'hf-poolformer[app]'")
    send()
    folder = space_folder(hub, tmp_path / "space")
    source = str(Path(publishing.__file__).parents[2])
    done = run_with_hub(ON_THE_HUB.format(source=source, app=str(folder / "app.py")), PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    *said, place = done.stdout.splitlines()
    assert [line.split()[0] for line in said[-2:]] == ["launched", "blocked"]
    assert "hf-poolformer-" in place and source not in place


@pytest.mark.parametrize("choice", ["wheel", "index"])
def test_what_the_app_is_called_with(hub, send, monkeypatch, tmp_path, choice):
    send(space_package=choice)
    path = space_folder(hub, tmp_path / "space") / "app.py"
    calls = []

    class Page:
        def block_thread(self):
            calls.append("blocked")

    module = type(sys)("hf_poolformer.app.interface")
    module.serve = lambda models, **options: calls.append((models, options)) or Page()
    monkeypatch.setitem(sys.modules, "hf_poolformer.app.interface", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    usual = list(sys.path)
    runpy.run_path(str(path), run_name="__main__")
    assert calls == [(["me/solar-cells"], {"examples": [], "host": None}), "blocked"]
    if choice == "wheel":
        unpacked = Path(sys.path[0])
        assert (unpacked / "hf_poolformer/app/interface.py").is_file()
        (found,) = metadata.distributions(path=[str(unpacked)])
        assert (found.name, found.version) == ("hf-poolformer", VERSION)
        shutil.rmtree(unpacked)
    else:
        assert sys.path == usual
    (path.parent / "examples").mkdir()
    runpy.run_path(str(path), run_name="__main__")
    assert calls[2][1]["examples"] == [path.parent / "examples"]


# --- how the Space gets this package -------------------------------------------------------------------------------


def test_the_wheel_installs_from_a_copy_of_the_space(hub, send, tmp_path):
    send()
    folder = space_folder(hub, tmp_path / "space")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "empty/bin/python"]
    subprocess.run([*pip, "install", "-q", "--no-index", "--no-deps", f"./{WHEEL}"], cwd=folder, check=True)
    done = subprocess.run([tmp_path / "empty/bin/hf-poolformer", "--version"], capture_output=True, text=True)
    assert done.stdout == f"hf-poolformer {VERSION}\n"
    # pip's own check of the hashes in RECORD, and of what the package needs.
    shown = subprocess.run([*pip, "check"], capture_output=True, text=True)
    assert "requires torch, which is not installed" in shown.stdout
    package = Path(publishing.__file__).parents[1]
    (site,) = (tmp_path / "empty").glob("lib/*/site-packages/hf_poolformer")
    source = {path.relative_to(package): path.read_bytes() for path in package.rglob("*.py")}
    source[Path("hub/model_cards/caformer.yaml")] = (package / "hub/model_cards/caformer.yaml").read_bytes()
    assert {name: (site / name).read_bytes() for name in source} == source


def test_requirements_are_what_the_wheel_needs_and_not_the_package(hub, send):
    send()
    lines = hub.files("me/solar-cells", kind="spaces")["requirements.txt"].decode().splitlines()
    found = {Requirement(line).name: Requirement(line) for line in lines}
    assert {"torch", "transformers", "gradio"} <= set(found)
    assert not {"hf-poolformer", "accelerate", "timm"} & set(found)
    assert str(found["torch"]) in {line.split(";")[0] for line in metadata.requires("hf-poolformer")}
    assert all(one.marker is None for one in found.values())


def test_a_space_that_carries_another_version_loses_it(hub, send, tmp_path):
    send()
    newer = "hf_poolformer-99.0-py3-none-any.whl"
    (tmp_path / newer).write_bytes(own_wheel()[1])
    send(space_package=str(tmp_path / newer))
    assert [name for name in hub.files("me/solar-cells", kind="spaces") if name.endswith(".whl")] == [newer]
    assert newer in hub.files("me/solar-cells", kind="spaces")["app.py"].decode()
    send(space_package="index")
    files = hub.files("me/solar-cells", kind="spaces")
    assert not [name for name in files if name.endswith(".whl")]
    assert files["requirements.txt"].decode() == f"hf-poolformer[app]>={VERSION}\n"


@pytest.mark.parametrize(
    "address",
    [
        "git+https://example.org/them/hf-poolformer",
        "git+ssh://git@example.org/them/hf-poolformer@v1.0.0",
        "https://example.org/hf_poolformer-1.0.0-py3-none-any.whl",
    ],
)
def test_an_address_is_named(hub, send, address):
    send(space_package=address)
    files = hub.files("me/solar-cells", kind="spaces")
    assert Requirement(files["requirements.txt"].decode().strip()).url == address
    assert "zipfile" not in files["app.py"].decode()


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("whell", "neither wheel, index, a wheel's path nor an address"),
        ("missing.whl", "neither wheel, index"),
        ("https://example.org/them/hf-poolformer", r"named as git\+https"),
        ("https://me:secret@example.org/a.whl", "everybody could read"),
        ("git+https://token@example.org/a", "everybody could read"),
        ("six-1.0-py3-none-any.whl", "is no wheel of hf-poolformer"),
        ("hf_poolformer.whl", "is no wheel of hf-poolformer"),
        ("hf_poolformer-1.0-py3-none-any.whl", "cannot be read"),
    ],
)
def test_a_package_that_is_not_to_be_had_is_refused_before_anything_is_sent(
    hub, send, tmp_path, monkeypatch, choice, said
):
    monkeypatch.chdir(tmp_path)
    if choice.endswith(".whl") and choice != "missing.whl" and "/" not in choice:
        Path(choice).write_bytes(b"no zip")
    with pytest.raises(PublishError, match=said) as caught:
        send(space_package=choice)
    assert "secret" not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    "written", [b"\xff\xfe", b"Requires-Dist: !!\n", None], ids=["bytes", "requirement", "deflated"]
)
def test_a_damaged_wheel_is_refused(tmp_path, written):
    wheel = tmp_path / "hf_poolformer-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("hf_poolformer-1.0.dist-info/METADATA", b"Name: x\n" * 99 if written is None else written)
    if written is None:
        content = bytearray(wheel.read_bytes())
        content[66:72] = b"\xff" * 6  # behind the header and the name
        wheel.write_bytes(content)
    with pytest.raises(PublishError, match=r"1\.0-py3-none-any\.whl cannot be read: "):
        package_for_space(str(wheel))


def test_what_is_run_from_its_source_and_not_installed_has_no_wheel(monkeypatch):
    def nowhere(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(space_package.metadata, "distribution", nowhere)
    for choice in ("wheel", "index"):
        with pytest.raises(PublishError, match=r"not installed.*pip install \.` there"):
            package_for_space(choice)


def test_again_changes_nothing(hub, send):
    send()
    commits = len(hub.repos["spaces", "me/solar-cells"].branches["main"])
    send()
    assert len(hub.repos["spaces", "me/solar-cells"].branches["main"]) == commits


def test_a_name_of_its_own_and_privacy(hub, send):
    published = send(space="me/try-it", private=True)
    assert hub.repos["spaces", "me/try-it"].private
    assert any("secret HF_TOKEN" in note for note in published.notes)
    assert yaml.safe_load(hub.files("me/try-it", kind="spaces")["README.md"].decode().split("---")[1])["models"] == [
        "me/solar-cells"
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"create_pr": True},
        {"revision": "draft"},
        {"space": "not a name"},
        {"space": False, "space_package": "index"},
    ],
)
def test_refused_before_anything_is_sent(hub, send, options):
    with pytest.raises(PublishError):
        send(**options)
    assert hub.requests == []


def test_a_space_that_fails_tells_how_to_go_on(hub, send):
    hub.fail("POST", "/api/spaces/me/solar-cells/commit/", 403)
    with pytest.raises(PublishError, match="--space") as caught:
        send()
    assert "published to" in str(caught.value)
    assert "--space_package" not in str(caught.value)
    with pytest.raises(PublishError, match="--space_package index"):
        send(space_package="index")
    hub.faults.clear()
    assert send().space


def test_from_the_command_line(hub, run_with_hub, model_dir, hub_token):
    words = [LIGHT, model_dir, "--repo_id", "me/cells", "--no_verify", "--space"]
    listed = run_with_hub(*words, "--dry_run")
    assert f"a Space would have README.md, app.py, {WHEEL}, requirements.txt" in listed.stdout
    listed = run_with_hub(*words, "--dry_run", "--space_package", "index")
    assert "a Space would have README.md, app.py, requirements.txt" in listed.stdout
    assert hub.requests == []
    done = run_with_hub(*words, "--json", token=hub_token)
    assert json.loads(done.stdout)["space"] == f"{hub.url}/spaces/me/cells"
    done = run_with_hub(*words, token=hub_token)
    assert f"To try it: {hub.url}/spaces/me/cells" in done.stdout
