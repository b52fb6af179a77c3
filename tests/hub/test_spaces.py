"""`publish --space`: a Space beside the model, on the loopback Hub."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import RepoCard

from hf_poolformer.hub import PublishError, publish, publishing


# The command without the seconds that `import hf_poolformer` takes.
LIGHT = f"""
import sys, types
package = types.ModuleType("hf_poolformer")
package.__path__ = [{str(Path(publishing.__file__).parents[1])!r}]
sys.modules["hf_poolformer"] = package
from hf_poolformer.commands.publish import main
sys.exit(main())
"""


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
    assert sorted(files) == ["README.md", "app.py", "examples/cell.png", "requirements.txt"]
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
    assert re.fullmatch(r"hf-poolformer\[app\]>=\d+(\.\d+)*", files["requirements.txt"].decode().strip())


def test_the_space_runs_the_app(hub, send, monkeypatch, tmp_path):
    send()
    source = hub.files("me/solar-cells", kind="spaces")["app.py"].decode()
    ast.parse(source)
    calls = []

    class Page:
        def block_thread(self):
            calls.append("blocked")

    module = type(sys)("hf_poolformer.app.interface")
    module.serve = lambda models, **options: calls.append((models, options)) or Page()
    monkeypatch.setitem(sys.modules, "hf_poolformer.app.interface", module)
    path = tmp_path / "app.py"
    path.write_text(source)
    exec(compile(source, path, "exec"), {"__file__": str(path), "__name__": "__main__"})
    assert calls == [(["me/solar-cells"], {"examples": [], "host": None}), "blocked"]
    (tmp_path / "examples").mkdir()
    exec(compile(source, path, "exec"), {"__file__": str(path), "__name__": "__main__"})
    assert calls[2][1]["examples"] == [tmp_path / "examples"]


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


@pytest.mark.parametrize("options", [{"create_pr": True}, {"revision": "draft"}, {"space": "not a name"}])
def test_refused_before_anything_is_sent(hub, send, options):
    with pytest.raises(PublishError):
        send(**options)
    assert hub.requests == []


def test_a_space_that_fails_tells_how_to_go_on(hub, send):
    hub.fail("POST", "/api/spaces/me/solar-cells/commit/", 403)
    with pytest.raises(PublishError, match="--space") as caught:
        send()
    assert "published to" in str(caught.value)
    hub.faults.clear()
    assert send().space


def test_from_the_command_line(hub, run_with_hub, model_dir, hub_token):
    words = [LIGHT, model_dir, "--repo_id", "me/cells", "--no_verify", "--space"]
    listed = run_with_hub(*words, "--dry_run")
    assert "a Space would have README.md, app.py, requirements.txt" in listed.stdout
    assert hub.requests == []
    done = run_with_hub(*words, "--json", token=hub_token)
    assert json.loads(done.stdout)["space"] == f"{hub.url}/spaces/me/cells"
    done = run_with_hub(*words, token=hub_token)
    assert f"To try it: {hub.url}/spaces/me/cells" in done.stdout
