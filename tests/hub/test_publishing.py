"""Publishing, from this process and from the script, to a Hub on the loopback interface."""

import hashlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import hub_server
import pytest
import yaml
from hub_server import Repo
from safetensors import safe_open
from warm import warm_python

from hf_poolformer.foundation.redaction import redact
from hf_poolformer.hub import PublishError, publish, publishing


RUN_FILES = ["README.md", "all_results.json", "curves.png", "training_log.jsonl", "training_settings.yaml"]
MODEL_FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]

# The script without the seconds that `import hf_poolformer` takes; an upload as such needs neither torch nor models.
SCRIPT = Path(__file__).parents[2] / "scripts" / "publish.py"
LIGHT = f"""
import sys, types
package = types.ModuleType("hf_poolformer")
package.__path__ = [{str(Path(publishing.__file__).parents[1])!r}]
sys.modules["hf_poolformer"] = package
from hf_poolformer.commands.publish import main
sys.argv[0] = {str(SCRIPT)!r}
sys.exit(main())
"""


@pytest.fixture
def everything(model_dir):
    """What of `model_dir` ends in the repository."""
    return sorted([*RUN_FILES, *MODEL_FILES, *(path.name for path in model_dir.glob("*.py"))])


def digests(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture
def send(online, model_dir, hub_token, capfd, caplog):
    """Publishes `model_dir`; whatever happens, the folder stays as it is and the token unseen."""

    def run(repo_id="me/x", folder=model_dir, **options):
        before = digests(folder)
        try:
            return publish(folder, repo_id, endpoint=online.url, **{"verify": False, **options})
        except PublishError as error:
            chain, link = [], error
            while link is not None:  # suppressed contexts too, which some loggers print
                chain.append(f"{link!r} {link.args} {vars(link)}")
                link = link.__cause__ or link.__context__
            assert hub_token not in "".join([*chain, *traceback.format_exception(error)])
            raise
        finally:
            assert digests(folder) == before
            output = capfd.readouterr()
            assert hub_token not in output.out + output.err + caplog.text

    return run


def refusal(send, *words, repo_id="me/x", **options):
    with pytest.raises(PublishError) as caught:
        send(repo_id, **options)
    reason, command = str(caught.value).splitlines()
    for word in words:
        assert word in reason
    assert command.startswith("To go on: ")
    assert f"--repo_id {repo_id}" in command
    return command.removeprefix("To go on: ")


def names(hub, repo_id="me/x", revision="main", kind="models"):
    return sorted(hub.files(repo_id, revision, kind))


# What goes up -----------------------------------------------------------------------------------------------


def test_one_commit_with_the_model_its_code_and_its_run(hub, send, model_dir, everything):
    published = send()
    assert str(published) == f"{hub.url}/me/x"
    branch = hub.repos["models", "me/x"].branches["main"]
    assert len(branch) == 2, "one commit after the initial one"
    assert branch[-1].oid == published.commit
    assert names(hub) == everything
    for name in [*MODEL_FILES, "modeling_poolformer.py", "curves.png", "all_results.json"]:
        assert hub.files("me/x")[name] == (model_dir / name).read_bytes()


def test_no_paths_of_this_machine(hub, send, model_dir, tmp_path):
    (model_dir / "evaluation").mkdir()
    (model_dir / "evaluation" / "all_results.json").write_text(json.dumps({"model": str(model_dir), "classes": ["/"]}))
    send()
    settings = yaml.safe_load(hub.files("me/x")["training_settings.yaml"])
    assert settings == {"dataset_name": "cells", "output_dir": "a run", "seed": 42}
    nested = json.loads(hub.files("me/x")["evaluation/all_results.json"])
    assert nested == {"model": "a run", "classes": ["/"]}
    assert [name for name, data in hub.files("me/x").items() if str(tmp_path).encode() in data] == []


def test_paths_in_prose_are_refused(send, model_dir):
    (model_dir / "predictions.csv").write_text(f"file,label\n{model_dir}/photos/1.jpg,intact\n")
    with pytest.raises(PublishError, match=r"predictions\.csv, line 2, holds a path .* --exclude predictions\.csv"):
        send()
    assert "predictions.csv" not in send(exclude=["predictions*"]).files


def test_the_card_names_the_repository(hub, send, model_dir):
    card = "---\nlicense: mit\nmodel-index:\n- name: a run\n  results:\n  - task: {type: image-classification}\n"
    card += "    dataset: {name: cells, type: imagefolder}\n    metrics: [{type: accuracy, value: 0.5}]\n---\n\n"
    card += '# a run\n\n"a run" it was.\n\n```python\n'
    card += 'classify = pipeline("image-classification", model="a run")\nx = A.from_pretrained("a run").eval()\n```\n'
    (model_dir / "README.md").write_text(card)
    send()
    text = hub.files("me/x")["README.md"].decode()
    assert 'pipeline("image-classification", model="me/x")' in text
    assert 'from_pretrained("me/x").eval()' in text
    assert "\n# x\n" in text
    assert "- name: x\n" in text
    assert '"a run" it was.' in text, "prose is the user's own"


def test_a_folder_without_a_card_gets_one(hub, send, model_dir):
    (model_dir / "README.md").unlink()
    (model_dir / "all_results.json").write_text('{"eval_accuracy": 0.875, "eval_samples": 16}')
    published = send(license="mit")
    text = hub.files("me/x")["README.md"].decode()
    assert "license: mit" in text
    assert "87.50 %" in text
    assert 'model="me/x"' in text
    assert any("README.md is written" in note for note in published.notes)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\nlicense: [1\n---\n", "no YAML"),
        ("---\nlicense: mine\n---\n", "license 'mine'"),
        ("---\nmodel-index:\n- name: x\n  results:\n  - task: {}\n---\n", "task.type"),
    ],
)
def test_a_wrong_card_is_refused_before_anything_is_sent(hub, send, model_dir, card, message):
    (model_dir / "README.md").write_text(card)
    with pytest.raises(PublishError, match=re.escape(message)):
        send()
    assert hub.requests == []


def test_large_weights_go_up_in_shards(hub, send, model_dir):
    send()
    send(max_shard_size="20KB")
    shards = [name for name in names(hub) if name.startswith("model-")]
    assert len(shards) > 2
    assert "model.safetensors" not in names(hub), "the whole file would be taken for the new weights"
    index = json.loads(hub.files("me/x")["model.safetensors.index.json"])
    with safe_open(model_dir / "model.safetensors", "pt") as whole:
        assert set(index["weight_map"]) == set(whole.keys())
    send()
    assert "model.safetensors" in names(hub)
    assert [name for name in names(hub) if name.startswith("model-") or name.endswith("index.json")] == []


def test_a_token_in_a_file_is_not_published(hub, send, model_dir, monkeypatch):
    mine, other = "hf_" + "m" * 20, "hf_" + "o" * 34
    monkeypatch.setenv("HF_TOKEN", mine)
    with (model_dir / "model.safetensors").open("ab") as file:
        file.write(mine.encode())  # anywhere
    with pytest.raises(PublishError, match=r"model\.safetensors"):
        send()
    shutil.copy(model_dir / ".cache" / "something", model_dir / "model.safetensors")
    with pytest.raises(PublishError, match="damaged"):
        send()
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(PublishError, match="holds no model"):
        send()
    assert mine not in "".join(map(str, hub.requests))
    assert other not in str(hub.requests)


@pytest.mark.parametrize("token", ["hf_" + "m" * 20, "hf_" + "o" * 34])
def test_a_token_in_a_text_is_not_published(hub, send, model_dir, monkeypatch, token):
    """One's own of whatever form, and anybody's that looks like one."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "m" * 20)
    (model_dir / "notes.txt").write_text(f"export HF_TOKEN={token}\n")
    with pytest.raises(PublishError, match=r"notes\.txt contains .* Hub token"):
        send()
    assert hub.requests == []


def test_not_a_model_or_not_a_repository(send, model_dir, tmp_path):
    with pytest.raises(PublishError, match="is not a folder"):
        publish(tmp_path / "nowhere", "me/x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PublishError, match="holds no model"):
        publish(tmp_path / "empty", "me/x")
    with pytest.raises(PublishError, match="not a repository id"):
        send("me/x/y")
    (model_dir / "ops.py").unlink()
    (model_dir / "modeling_poolformer.py").unlink()
    with pytest.raises(PublishError, match=r"lacks modeling_poolformer\.py"):
        send()
    with pytest.raises(PublishError, match="either --create_pr or --revision"):
        send(create_pr=True, revision="trial")


# Where it goes ----------------------------------------------------------------------------------------------


def test_publishing_again_keeps_foreign_files(hub, send, model_dir):
    send()
    hub.files("me/x")["NOTES.txt"] = b"somebody's"
    hub.files("me/x")["onnx/model.onnx"] = b"somebody's"
    (model_dir / "all_results.json").write_text('{"eval_accuracy": 1.0}')
    send()
    assert hub.files("me/x")["NOTES.txt"] == b"somebody's"
    assert hub.files("me/x")["onnx/model.onnx"] == b"somebody's"
    assert json.loads(hub.files("me/x")["all_results.json"]) == {"eval_accuracy": 1.0}


def test_publishing_the_same_again_changes_nothing(hub, send):
    first, second = send(), send()
    assert first.commit == second.commit
    assert len(hub.repos["models", "me/x"].branches["main"]) == 2


def test_private_repository_and_branch(hub, send, everything):
    send(private=True, revision="trial", commit_message="A first try")
    repo = hub.repos["models", "me/x"]
    assert repo.private
    assert repo.branches["main"][-1].files == {}
    assert repo.branches["trial"][-1].message == "A first try"
    assert names(hub, revision="trial") == everything


def test_private_before_anything_is_sent(hub, send):
    """A repository that was public becomes private first; False never publishes what is private."""
    send()
    hub.requests.clear()
    send(private=True, revision="b")
    assert hub.repos["models", "me/x"].private
    methods = [f"{method} {path}" for method, path in hub.requests]
    assert methods.index("PUT /api/models/me/x/settings") < min(
        place for place, text in enumerate(methods) if "preupload" in text
    )
    send(private=False)
    assert hub.repos["models", "me/x"].private


def test_gated(hub, send):
    send(gated="manual")
    assert hub.repos["models", "me/x"].gated == "manual"
    hub.requests.clear()
    send(gated="manual")
    assert ("PUT", "/api/models/me/x/settings") not in hub.requests


def test_pull_request(hub, send):
    send()
    (publishing_twice,) = [send(create_pr=True)]
    assert publishing_twice.pull_request is None
    assert any("no pull request" in note for note in publishing_twice.notes)
    hub.repos["models", "me/x"].branches["main"][-1].files["config.json"] = b"{}"
    first = send(create_pr=True, commit_message="Mend it")
    assert first.pull_request == f"{hub.url}/me/x/discussions/1"
    assert hub.files("me/x")["config.json"] == b"{}", "main is as it was"
    assert len(hub.files("me/x", "refs/pr/1")["config.json"]) > 2
    again = send(create_pr=True, commit_message="Mend it")
    assert (again.pull_request, again.commit) == (first.pull_request, first.commit)
    assert [name for name in hub.repos["models", "me/x"].branches if name.startswith("refs/pr")] == ["refs/pr/1"]


def test_pull_request_to_somebody_else(hub, send, model_dir):
    hub.repos["models", "them/x"] = Repo()
    refusal(send, "403", repo_id="them/x")
    assert send("them/x", create_pr=True).pull_request == f"{hub.url}/them/x/discussions/1"
    assert names(hub, "them/x") == []


def test_somebody_commits_meanwhile(hub, send, model_dir):
    """412 once: the commit is begun anew on top of theirs."""
    send()
    (model_dir / "all_results.json").write_text("{}")
    hub.fail("POST", "/commit/", 412, times=1, body=json.dumps({"error": "A commit has happened since"}))
    send()
    assert hub.files("me/x")["all_results.json"] == b"{}"
    hub.fail("POST", "/commit/", 412)
    (model_dir / "all_results.json").write_text("{ }")
    refusal(send, "412", "the repository changed meanwhile")


# What goes wrong --------------------------------------------------------------------------------------------


def test_without_or_with_a_wrong_token(hub, send, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refusal(send, "401", "hf auth login")
    refusal(send, "401", "hf auth login", token="hf_" + "w" * 34)
    assert hub.repos == {}


def test_token_as_an_argument(hub, send, hub_token, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    send(token=hub_token)
    assert "model.safetensors" in names(hub)


def test_no_right_to_write(send):
    refusal(send, "403", repo_id="other/x")


STEPS = [
    "/api/repos/create",
    "/api/models/me/x$",
    "/api/validate-yaml",
    "/preupload/",
    "lfs/objects/batch",
    "/commit/",
]


# A 409 to the creation of a repository means that there is one.
@pytest.mark.parametrize(
    ("path", "status"),
    [(p, s) for p in STEPS for s in (401, 403, 409, 412, 429, 503) if (p, s) != ("/api/repos/create", 409)],
)
def test_a_fault_at_every_step_then_again(hub, send, hub_token, path, status, everything):
    # The body echoes the token, as a careless server might.
    hub.fail("GET|POST", path, status, body=json.dumps({"error": f"broken {hub_token}"}))
    command = refusal(send, str(status))
    assert hub_token not in command
    hub.faults.clear()
    send()
    assert names(hub) == everything


def test_the_storage_fails_and_its_signature_is_not_printed(hub, send):
    hub.fail("PUT", "/lfs/", 403, body="Signature expired")
    refusal(send, "403")


def test_redacted():
    text = "PUT https://store/bucket/ab?X-Amz-Signature=12&y=2 failed at http://user:word@host/ with hf_" + "a" * 34
    assert redact(text, ["12"]) == "PUT https://store/bucket/ab failed at http://host/ with <token>"


def test_nobody_listens(send, model_dir):
    with pytest.raises(PublishError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        publish(model_dir, "me/x", endpoint="http://127.0.0.1:9")


def test_offline_mode(hub, send, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refusal(send, "HF_HUB_OFFLINE")
    assert hub.requests == []


def test_the_storage_never_gets_the_token(hub, send):
    send()
    assert [path for method, path in hub.requests if method == "PUT" and path.startswith("/lfs/")]
    assert [path for _, path in hub.authorised if path.startswith("/lfs/")] == []


# Interruptions ----------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "branch": {"revision": "trial", "private": True},
    "gated": {"gated": "auto", "max_shard_size": "20KB"},
    "request": {"create_pr": True, "commit_message": "Mend it"},
}


def state(hub):
    """Everything that is in the repositories, commits by their messages."""
    return {
        key: (
            repo.private,
            repo.gated,
            {branch: [(c.message, c.files) for c in commits] for branch, commits in repo.branches.items()},
        )
        for key, repo in hub.repos.items()
    }


@pytest.mark.parametrize("answered", [True, False], ids=["cut before a request", "answer lost"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_interrupted_at_every_step_and_repeated(online, send, monkeypatch, options, answered):
    """The line dies after n requests, for every n there is; the repeated command ends in the same repository."""
    send(verify=False, **options)
    wanted, steps = state(online), len(online.requests)
    assert steps >= 8
    for step in range(steps if answered else steps + 1):
        if step == 0 and not answered:
            continue
        online.repos.clear()
        online.blobs.clear()
        online.interrupt(step, answered=answered)
        try:
            send(**options)
        except PublishError as error:
            assert "cannot be reached or broke off" in str(error)
        online.restore()
        send(**options)
        assert state(online) == wanted, f"interrupted after {step} of {steps} requests"


@pytest.mark.parametrize(
    "step",
    [6, *(pytest.param(step, marks=pytest.mark.slow) for step in (0, 1, 2, 3, 4, 5, 7, 8, 9, 10))],
)
def test_killed_at_a_step_and_repeated(hub, hub_environment, hub_token, model_dir, tmp_path, step, everything):
    """As above, but it is the process that dies, with kill -9, in the middle of a request."""
    command = [sys.executable, "-c", LIGHT, str(model_dir), "--repo_id", "me/x", "--no_verify"]
    before = digests(model_dir)
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(
            command, env=hub_environment | {"HF_TOKEN": hub_token}, stdout=output, stderr=output
        )
        hub.on_interruption = lambda: process.send_signal(signal.SIGKILL)
        hub.interrupt(step)
        process.wait(timeout=300)
        assert process.returncode in (-signal.SIGKILL, 0)  # 0: it was done before
        hub.restore()
        done = subprocess.run(command, env=hub_environment | {"HF_TOKEN": hub_token}, stdout=output, stderr=output)
        output.seek(0)
        assert done.returncode == 0, output.read()
    assert digests(model_dir) == before
    assert names(hub) == everything
    assert len(hub.repos["models", "me/x"].branches["main"]) == 2


# The script -------------------------------------------------------------------------------------------------


def test_dry_run_sends_nothing(hub, run_with_hub, model_dir, hub_token, everything):
    done = run_with_hub(LIGHT, model_dir, "--repo_id", "me/x", "--dry_run", token=hub_token)
    assert done.returncode == 0, done.stderr
    for name in everything:
        assert re.search(rf"^ +[\d,]+  {re.escape(name)}$", done.stdout, re.MULTILINE), name
    assert re.search(r"stays +optimizer\.bin \(optimiser\)", done.stdout)
    assert "checkpoints/step-10/optimizer.bin (training checkpoint" in done.stdout
    assert "Nothing was sent" in done.stdout
    assert hub.requests == []


def test_the_script_publishes_verifies_and_says_where(hub, run_with_hub, model_dir, hub_token):
    done = run_with_hub([warm_python(), SCRIPT], model_dir, "--repo_id", "x", "--json", token=hub_token)
    assert done.returncode == 0, done.stderr
    published = json.loads(done.stdout)
    assert published["repo_id"] == "me/x"
    assert published["files"] == names(hub)
    assert any("every SHA-256 the same" in note for note in published["notes"])
    assert any("with trust_remote_code and by transformers alone" in note for note in published["notes"])


def test_the_command_that_goes_on_works(hub, run_with_hub, model_dir, hub_token):
    """It is run as it is printed, against a Hub that has recovered."""
    hub.fail("POST", "/commit/", 503)
    flags = ["--private", "--revision", "my branch", "--exclude", "all_*", "--no_verify"]
    failed = run_with_hub(LIGHT, model_dir, "--repo_id", "me/x", *flags, token=hub_token)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    command = shlex.split(failed.stderr.splitlines()[-1].removeprefix("To go on: "))
    assert command[0] == "python"
    hub.faults.clear()
    assert command[1] == str(SCRIPT)
    done = run_with_hub(LIGHT, *command[2:], token=hub_token)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.repos["models", "me/x"].private
    assert "all_results.json" not in names(hub, revision="my branch")
    assert "model.safetensors" in names(hub, revision="my branch")


def test_errors_are_one_line(run_with_hub, tmp_path):
    done = run_with_hub(LIGHT, tmp_path / "nowhere", "--repo_id", "me/x")
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'nowhere'} is not a folder\n")


# Verification -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_metaformer_is_verified_with_its_code(online, tiny_models):
    published = publish(tiny_models / "metaformer", "me/x", endpoint=online.url)
    (note,) = [note for note in published.notes if "logits" in note]
    assert "with trust_remote_code (largest" in note


def test_other_bytes_than_were_sent(online, send, monkeypatch):
    resolve = hub_server.Handler.resolve

    def corrupt(self, repo, rev, file, kind="models"):
        commit = self._commit(kind, repo, rev)
        kept = commit.files
        commit.files = kept | {"model.safetensors": kept["model.safetensors"][:-1] + b"?"}
        try:
            resolve(self, repo, rev, file, kind)
        finally:
            commit.files = kept

    routes = [(m, p, corrupt if action is resolve else action) for m, p, action in hub_server.ROUTES]
    monkeypatch.setattr(hub_server, "ROUTES", routes)
    command = refusal(send, "published to", "other files than were sent: model.safetensors", verify=True)
    assert "no_verify" not in command


@pytest.mark.slow
def test_code_that_does_not_travel(online, send, model_dir):
    """A model that loads here only, as its code imports what others lack: published, and said so."""
    code = model_dir / "modeling_poolformer.py"
    code.write_text("from hf_poolformer.ops import pool_mix\n" + code.read_text())
    refusal(send, "published to", "where this package is missing the model cannot be loaded", verify=True)


def test_the_search_for_the_token_finds(files_with, tmp_path):
    """The one that all files of the session are searched with at the end, tried on another word."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "weights.bin").write_bytes(b"\0" * 5000 + b"needle" + b"\0")
    (tmp_path / "needle.txt").write_text("")
    (tmp_path / "clean").write_text("nothing")
    assert sorted(path.name for path in files_with(tmp_path, "needle")) == ["needle.txt", "weights.bin"]
