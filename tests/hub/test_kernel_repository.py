"""Our kernels as a repository of the `kernels` library: what is in it, and models without this package that use it."""

import ast
import base64
import hashlib
import json
from pathlib import Path

import pytest
import torch

from hf_poolformer import backends
from hf_poolformer.commands import publish as command
from hf_poolformer.hub import PublishError, publish
from hf_poolformer.hub.kernel_repository import VERSION, build_kernels


VARIANTS = ["torch-cpu", "torch-cuda", "torch-rocm"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels") / "repository"
    build_kernels(folder, "me/poolformer-kernels")
    return folder


def test_each_variant_is_the_package_and_says_what_it_is(repository):
    assert sorted(path.name for path in (repository / "build").iterdir()) == VARIANTS
    sources = Path(backends.__file__).parent / "kernels"
    identities = set()
    for variant in VARIANTS:
        folder = repository / "build" / variant
        metadata = json.loads((folder / "metadata.json").read_text())
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "metadata.json"}
        assert set(files) == {path.name for path in sources.glob("*.py")}
        for name, content in files.items():
            assert content.startswith((sources / name).read_bytes())
            digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
            assert metadata["digest"]["files"][name] == digest
        assert metadata["version"] == VERSION == backends.INTERFACE
        assert metadata["backend"]["type"] == variant.removeprefix("torch-")
        assert metadata["id"].isidentifier() and metadata["id"].startswith(backends.LOADED_KERNELS)
        identities.add(metadata["id"])
    assert len(identities) == 3


def test_nothing_in_it_imports_our_package_or_what_lies_around_it(repository):
    for path in (repository / "build" / "torch-cuda").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1 and (node.level or node.module.partition(".")[0] != "hf_poolformer"), path
            elif isinstance(node, ast.Import):
                assert all(alias.name.partition(".")[0] != "hf_poolformer" for alias in node.names), path


def test_built_again_it_replaces_itself_and_nothing_else(repository, tmp_path):
    folder = tmp_path / "kernels"
    build_kernels(folder, "me/a")
    (folder / "build" / "torch-cuda" / "of_an_earlier_version.py").write_text("")
    build_kernels(folder, "me/b")
    assert not (folder / "build" / "torch-cuda" / "of_an_earlier_version.py").exists()
    assert 'get_kernel("me/b"' in (folder / "README.md").read_text()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.txt").write_text("mine")
    with pytest.raises(PublishError, match="holds something else"):
        build_kernels(tmp_path / "photos", "me/a")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["1.txt"]


def test_published_on_the_branch_of_its_version(online, tmp_path):
    folder = tmp_path / "kernels"
    done = publish(folder, "me/kernels", repo_type="kernel", endpoint=online.url)
    assert done.url == f"{online.url}/kernels/me/kernels"
    built = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for branch in ("main", f"v{VERSION}"):
        assert online.files("me/kernels", branch, "kernels") == built
    commits = len(online.repos["kernels", "me/kernels"].branches["main"])
    publish(folder, "me/kernels", repo_type="kernel", endpoint=online.url)
    assert len(online.repos["kernels", "me/kernels"].branches["main"]) == commits, "nothing had to change"
    with pytest.raises(PublishError, match="leave out --gated"):
        publish(folder, "me/kernels", repo_type="kernel", gated="auto", endpoint=online.url)


def test_the_command_builds_and_lists(tmp_path, capsys):
    words = [str(tmp_path / "kernels"), "--repo_type", "kernel", "--repo_id", "me/kernels", "--dry_run"]
    assert command.main(words) == 0
    said = capsys.readouterr().out
    assert "kernel me/kernels" in said and "build/torch-cuda/metadata.json" in said
    assert (tmp_path / "kernels" / "build" / "torch-cpu" / "cpu.py").is_file()


# Loaded by the library ----------------------------------------------------------------------------------------

# In a process without this package, as somebody has it who loads a model that carries its code.
STRANGER = """
import json, sys
from pathlib import Path
sys.modules["hf_poolformer"] = None
import torch
from transformers import AutoModelForImageClassification

folder, repository, how, version = sys.argv[1:]
torch.manual_seed(0)
x = torch.rand(2, 3, 32, 32)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
backends = sys.modules[type(model).__module__.rpartition(".")[0] + ".backends"]

def answer():
    with torch.inference_mode():
        return model(pixel_values=x).logits

def step():
    model.zero_grad()
    loss = model(pixel_values=x, labels=torch.tensor([0, 2])).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

def who():
    with torch.inference_mode():
        return backends.decide(x).backend

found = {"before": who()}
expected, gradients = answer(), step()
if how == "get_local_kernel":
    from kernels import get_local_kernel
    package = get_local_kernel(Path(repository), backend="cpu")
elif how == "get_kernel":
    from kernels import get_kernel
    package = get_kernel(repository, version=int(version), backend="cpu", trust_remote_code=[repository])
else:
    from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
    source = LocalLayerRepository(repo_path=Path(repository), layer_name="MetaFormerEncoder")
    with use_kernel_mapping({"MetaFormerEncoder": {"cpu": source}}):
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
    from kernels import get_loaded_kernels
    (package,) = (each.module for each in get_loaded_kernels())
found["after"], found["name"] = who(), package.__name__
found["logits"] = ((answer() - expected).abs().max() / expected.abs().max()).item()
largest = max(old.abs().max() for old in gradients)
found["steps"] = max(((new - old).abs().max() / largest).item() for new, old in zip(step(), gradients))
namespaces = {name.split("::")[0] for name in torch._C._dispatch_get_all_op_names()}
found["namespaces"] = sorted(name for name in namespaces if "hf_poolformer" in name)
found["modules"] = sorted(name for name in sys.modules if name.startswith(package.__name__))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("kernels")


def ask(run_with_hub, model, repository, how, **environment):
    # kernels 0.17 sends a header that is none where telemetry is off.
    environment = {"HF_HUB_DISABLE_TELEMETRY": "0", **environment}
    done = run_with_hub(STRANGER, str(model), str(repository), how, str(VERSION), **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("model", "how"), [("poolformer", "get_kernel"), ("metaformer", "kernelize")])
def test_a_model_without_this_package_computes_the_same_with_them(
    library, run_with_hub, tiny_models, repository, online, tmp_path, model, how
):
    if how == "get_kernel":
        publish(tmp_path / "kernels", "me/kernels", repo_type="kernel", endpoint=online.url, verify=False)
        repository = "me/kernels"
    found = ask(run_with_hub, tiny_models / model, repository, how)
    assert found["before"] == "reference", "nothing is looked for that nobody has loaded"
    assert found["after"] == ("cpu" if backends.why_not_cpu(torch.zeros(1, 3, 8, 8)) is None else "reference")
    assert 0 <= found["logits"] < 1e-5
    assert 0 <= found["steps"] < 1e-5
    assert found["namespaces"] == [found["name"]]


@pytest.mark.slow
def test_triton_s_kernels_compute_the_same_in_its_interpreter(library, run_with_hub, tiny_models, repository):
    triton = {"TRITON_INTERPRET": "1", "HF_POOLFORMER_KERNELS": "triton"}
    code = STRANGER.replace(
        'found = {"before": who()}',
        'import os\nwanted = os.environ.pop("HF_POOLFORMER_KERNELS")\nfound = {"before": who()}',
    )
    code = code.replace('found["after"]', 'os.environ["HF_POOLFORMER_KERNELS"] = wanted\nfound["after"]', 1)
    done = run_with_hub(code, str(tiny_models / "poolformer"), str(repository), "get_local_kernel", "0", **triton)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["after"] == "triton"
    assert 0 < found["logits"] < 1e-4 and 0 < found["steps"] < 1e-3
    assert f"{found['name']}.channel_mlp" in found["modules"]
