import hashlib
import json

import pytest

from hf_poolformer.hub import publishing


# The module is loaded by itself: the package's own import (torch, transformers) would cost seconds in every test.
PUBLISH = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("publishing", {publishing.__file__!r})
publishing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(publishing)
try:
    print(publishing.publish(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3])))
except publishing.PublishError as error:
    sys.exit(f"error: {{error}}")
"""

PUBLISHED = ["README.md", "all_results.json", "config.json", "curves.png", "model.safetensors"]


def digests(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture
def publish(run_with_hub, model_dir, hub_token):
    """Publishes `model_dir`; whatever happens, the folder stays as it is and the token unseen."""

    def run(repo_id="me/x", token=hub_token, options=None, **environment):
        before = digests(model_dir)
        done = run_with_hub(PUBLISH, str(model_dir), repo_id, json.dumps(options or {}), token=token, **environment)
        assert digests(model_dir) == before
        assert hub_token not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def assert_refused(done, *words):
    assert done.returncode == 1, done.stdout + done.stderr
    line, retry = [line for line in done.stderr.splitlines() if line][-2:]
    assert line.startswith("error: ")
    assert retry.startswith("To go on: hf upload me/x ")
    for word in words:
        assert word in line


def test_upload_and_download_give_the_same_files(hub, publish, model_dir, run_with_hub, tmp_path):
    done = publish()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/me/x"
    branch = hub.repos["models", "me/x"].branches["main"]
    assert len(branch) == 2, "one commit after the initial one"
    assert sorted(branch[-1].files) == PUBLISHED

    download = (
        "import sys; from huggingface_hub import snapshot_download; snapshot_download('me/x', local_dir=sys.argv[1])"
    )
    done = run_with_hub(download, str(tmp_path / "copy"))
    assert done.returncode == 0, done.stderr
    for name in PUBLISHED:
        assert (tmp_path / "copy" / name).read_bytes() == (model_dir / name).read_bytes()


def test_publishing_again_adds_a_commit_and_keeps_foreign_files(hub, publish, model_dir):
    assert publish().returncode == 0
    hub.files("me/x")["NOTES.txt"] = b"somebody's"
    (model_dir / "all_results.json").write_text('{"eval_accuracy": 1.0}')
    assert publish().returncode == 0
    assert hub.files("me/x")["NOTES.txt"] == b"somebody's"
    assert json.loads(hub.files("me/x")["all_results.json"]) == {"eval_accuracy": 1.0}


def test_private_repository_and_branch(hub, publish):
    done = publish(options={"private": True, "revision": "trial", "commit_message": "A first try"})
    assert done.returncode == 0, done.stderr
    repo = hub.repos["models", "me/x"]
    assert repo.private
    assert repo.branches["main"][-1].files == {}
    assert repo.branches["trial"][-1].message == "A first try"
    assert sorted(repo.branches["trial"][-1].files) == PUBLISHED


def test_token_as_an_argument(hub, publish, hub_token):
    assert publish(token=None, options={"token": hub_token}).returncode == 0
    assert sorted(hub.files("me/x")) == PUBLISHED


def test_without_or_with_a_wrong_token(hub, publish):
    assert_refused(publish(token=None), "401", "hf auth login")
    assert_refused(publish(token="hf_" + "w" * 34), "401", "hf auth login")
    assert hub.repos == {}


def test_no_right_to_write(publish):
    done = publish("other/x")
    assert done.returncode == 1
    assert "403" in done.stderr
    assert "hf upload other/x" in done.stderr


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/api/repos/create", 500),
        ("POST", "/api/validate-yaml", 503),
        ("POST", "/preupload/", 404),
        ("POST", "/commit/", 412),
        ("POST", "/commit/", 503),
    ],
)
def test_a_fault_at_every_step_then_again(hub, publish, hub_token, method, path, status):
    # The body echoes the token, as a careless server might.
    hub.fail(method, path, status, body=json.dumps({"error": f"broken {hub_token}"}), times=20)
    assert_refused(publish())
    hub.faults.clear()
    assert publish().returncode == 0
    assert sorted(hub.files("me/x")) == PUBLISHED


def test_connection_breaks(hub, publish):
    hub.fail("POST", "/commit/", drop=True)
    assert_refused(publish())


def test_nobody_listens(publish):
    assert_refused(publish(HF_ENDPOINT="http://127.0.0.1:9"), "http://127.0.0.1:9 cannot be reached")


def test_offline_mode(hub, publish):
    assert_refused(publish(HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")
    assert hub.requests == []


def test_refused_card(hub, publish, model_dir):
    (model_dir / "README.md").write_text("---\nlicense: [1\n---\n")
    assert_refused(publish(), "model card")


def test_a_token_in_a_file_is_not_published(hub, publish, model_dir, hub_token):
    (model_dir / "training_settings.yaml").write_text(f"hub_token: {hub_token}\n")
    done = publish()
    assert done.returncode == 1
    assert "training_settings.yaml contains your Hub token" in done.stderr
    assert hub.requests == []


def test_not_a_model_or_not_a_repository(publish, tmp_path, run_with_hub):
    done = run_with_hub(PUBLISH, str(tmp_path / "nowhere"), "me/x", "{}")
    assert (done.returncode, done.stderr.strip()) == (1, f"error: {tmp_path / 'nowhere'} is not a folder")
    done = run_with_hub(PUBLISH, str(tmp_path), "me/x", "{}")
    assert done.returncode == 1
    assert "holds no model" in done.stderr
    assert "not a repository id" in publish("me/x/y").stderr


def test_the_retry_command_works(hub, publish, model_dir, run_with_hub, hub_token):
    """The command is run as it is printed, against a Hub that has recovered."""
    hub.fail("POST", "/commit/", 503)
    command = publish().stderr.splitlines()[-1].removeprefix("To go on: ")
    hub.faults.clear()
    source = "import shlex, sys; from huggingface_hub.cli.hf import main; sys.argv = shlex.split(sys.argv[1]); main()"
    done = run_with_hub(source, command, token=hub_token)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(hub.files("me/x")) == PUBLISHED
