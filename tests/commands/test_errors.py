"""What a person sees when it cannot work: one line that says why, and an exit status that is not 0."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_poolformer_cli


# Every command that takes a model, with the model in MODEL's place.
CALLS = {
    "train": ["--model_name_or_path", "MODEL", "--train_dir", "PHOTOS", "--output_dir", "OUT/run"],
    "evaluate": ["MODEL", "--dataset_name", "PHOTOS"],
    "inspect": ["PHOTOS", "--model", "MODEL", "--output", "OUT/inspection"],
    "predict": ["MODEL", "IMAGE", "--output", "OUT/table.csv"],
    "explain": ["MODEL", "IMAGE", "--output", "OUT/explained.png"],
    "convert": ["MODEL", "OUT/converted"],
    "export": ["MODEL", "OUT/exported"],
    "publish": ["MODEL", "--repo_id", "someone/something"],
    "app": ["MODEL"],
    "train-dense": [
        *("--task", "object-detection", "--model_name_or_path", "MODEL"),
        *("--dataset_name", "BOXES", "--output_dir", "OUT/detector"),
    ],
}
# The same where it is not the model that is missing.
OTHER_FILES = {
    "train": ["--recipe", "demo", "--train_dir", "MISSING", "--output_dir", "OUT/run"],
    "evaluate": ["MODEL", "--dataset_name", "MISSING"],
    "inspect": ["MISSING", "--output", "OUT/inspection"],
    "predict": ["MODEL", "MISSING", "--output", "OUT/table.csv"],
    "explain": ["MODEL", "MISSING", "--output", "OUT/explained.png"],
    "convert": ["MODEL", "OUT/converted", "--labels", "MISSING"],
    "ablate": ["--recipe", "demo", "--train_dir", "MISSING", "--output_dir", "OUT/ablation"],
    "train-dense": [
        "--task",
        "object-detection",
        "--recipe",
        "demo",
        "--dataset_name",
        "MISSING",
        "--output_dir",
        "OUT/x",
    ],
}
# What a command cannot do without, beyond what a plain installation brings; the others work then.
NEEDS = {
    "train": "train",
    "evaluate": "train",
    "inspect": "train",
    "explain": "train",
    "export": "export",
    "app": "app",
    "ablate": "train",
    "train-dense": "train",
}
OPTIONAL = (
    "accelerate codecarbon datasets evaluate gradio jinja2 matplotlib nncf onnx onnxruntime onnxscript openvino peft "
    "psutil pyarrow pycocotools ray skimage sklearn tensorboard timm trackio"
)

RUNNER = """
import contextlib, io, json, sys, time, traceback
calls, missing = json.loads(sys.argv[1]), sys.argv[2].split()
sys.modules.update(dict.fromkeys(missing))
time.sleep = lambda seconds: None  # before a request is repeated
import hf_poolformer_cli, hf_poolformer.hub.publishing
outcomes = {}
for name, words in calls.items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = hf_poolformer_cli.main([name, *words])
        except SystemExit as left:
            status = left.code
        except BaseException:
            traceback.print_exc()
            status = None
    outcomes[name] = [status, out.getvalue(), err.getvalue()]
print("\\n" + json.dumps(outcomes))
"""


def fill(words, things, out, model):
    places = {"MODEL": model, "PHOTOS": things.photos, "IMAGE": things.image, "BOXES": things.boxes, "OUT": out}
    places["MISSING"] = things.missing
    filled = []
    for word in words:
        head, slash, tail = word.partition("/")
        filled.append(f"{places[head]}{slash}{tail}" if head in places else word)
    return filled


def check(status, err, *needles):
    assert status not in (0, None), err
    # What a progress bar wrote is gone when it ends: a carriage return and what came before it.
    seen = [line.rpartition("\r")[2].strip() for line in err.split("\n")]
    lines = [line for line in seen if line and not line.startswith("To go on: ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ") and "Traceback" not in err
    assert 20 < len(lines[0]) < 600, lines[0]
    for needle in needles:
        assert needle in lines[0]


@pytest.mark.parametrize("wrong", ["missing", "no_config", "text", "corrupt"])
@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_model(name, wrong, things, tmp_path, capfd):
    if name == "app":
        pytest.importorskip("gradio.blocks")  # old versions need what new installations do not have
    if (name, wrong) == ("publish", "text"):
        pytest.skip("any model of transformers can be published")
    model = getattr(things, wrong)
    status = hf_poolformer_cli.main([name, *fill(CALLS[name], things, tmp_path, model)])
    # `convert` names the file in the folder, and may ask what is in it.
    check(status, capfd.readouterr().err, *([model.name] if name != "convert" else []))
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".yaml"]
    assert left == [], "half-written"


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_missing_file(name, things, tmp_path, capfd):
    status = hf_poolformer_cli.main([name, *fill(OTHER_FILES[name], things, tmp_path, things.model)])
    check(status, capfd.readouterr().err, "nowhere")


def outcomes(calls, environment=None, missing=""):
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(calls), missing],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def refused(things, tmp_path_factory):
    """Online, but nobody listens: port 9 of the loopback is closed."""
    out = tmp_path_factory.mktemp("refused")
    calls = {name: fill(words, things, out, "someone/something") for name, words in CALLS.items()}
    calls["publish"] = fill(CALLS["publish"], things, out, things.model)
    secret = "hf_" + "x" * 34
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(out), "HF_TOKEN": secret}
    found = outcomes(calls, environment)
    assert secret not in json.dumps(found)
    return found


@pytest.fixture(scope="module")
def bare(things, tmp_path_factory):
    """A plain installation: nothing of any extra."""
    out = tmp_path_factory.mktemp("bare")
    calls = {name: fill(words, things, out, things.model) for name, words in CALLS.items()}
    del calls["publish"]
    calls["ablate"] = fill(OTHER_FILES["ablate"], things, out, things.model)
    return outcomes({**calls, "env": []}, missing=OPTIONAL)


@pytest.mark.parametrize("name", CALLS)
def test_without_network(name, things, tmp_path, capfd):
    """HF_HUB_OFFLINE is set for all tests."""
    if name == "app":
        pytest.importorskip("gradio.blocks")
    publish = name == "publish"  # takes a folder to the Hub, where the others take a model from there
    words = fill(CALLS[name], things, tmp_path, things.model if publish else "someone/something")
    status = hf_poolformer_cli.main([name, *words])
    check(status, capfd.readouterr().err, "someone/something", *(["HF_HUB_OFFLINE"] if name != "convert" else []))


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_with_a_network_that_does_not_answer(name, refused):
    if name == "app":
        pytest.importorskip("gradio.blocks")
    status, _, err = refused[name]
    # huggingface_hub says, too, that it tries again.
    check(status, "\n".join(line for line in err.splitlines() if line.startswith("error: ")))
    assert "Traceback" not in err


@pytest.mark.parametrize("name", [*(name for name in CALLS if name != "publish"), "ablate", "env"])
def test_without_extras(name, bare):
    status, out, err = bare[name]
    if name in NEEDS:
        check(status, err, f"pip install 'hf-poolformer[{NEEDS[name]}]'")
    else:
        assert status == 0, err
        assert out


def test_a_token_on_the_command_line_is_not_repeated(things, tmp_path, capfd):
    for secret in ("hf_" + "y" * 34, "just-a-word"):
        for flags in (["--token", secret], [f"--token={secret}"]):
            status = hf_poolformer_cli.main(
                ["predict", f"{secret}/model", str(things.image), "--output", "x.csv", *flags]
            )
            captured = capfd.readouterr()
            check(status, captured.err, "<token>")
            assert secret not in captured.err + captured.out


def test_unknown_flags_are_recognised(things, capfd):
    status = hf_poolformer_cli.main(["predict", "x", "--output", "x.csv", "--topk", "3"])
    check(status, capfd.readouterr().err, "--topk", "did you mean --top_k?")
    status = hf_poolformer_cli.main(["train", "--train_dri", "x"])
    check(status, capfd.readouterr().err, "train_dri", "train_dir")
    status = hf_poolformer_cli.main(["predict", "x"])
    check(status, capfd.readouterr().err, "--output", "hf-poolformer predict --help")


def test_the_extras_that_errors_name_exist():
    from hf_poolformer.commands import EXTRAS

    try:
        import tomllib
    except ImportError:  # Python 3.10
        pytest.skip("needs tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    brings = project["optional-dependencies"]
    distributions = {
        "pillow_heif": "pillow-heif",
        "skimage": "scikit-image",
        "sklearn": "scikit-learn",
        "yaml": "pyyaml",
    }
    for library, extra in EXTRAS.items():
        everything = brings[extra] + [
            text for name in brings for text in brings[name] if f"[{name}]" in str(brings[extra])
        ]
        assert any(text.startswith(distributions.get(library, library)) for text in everything), (library, extra)
