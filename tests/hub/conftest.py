import json
import logging
import mmap
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from huggingface_hub.utils import _http
from warm import warm_python


# What every test of the session printed, logged and failed with; filled by the hook, read when the session ends.
SEEN: list[str] = []


def pytest_runtest_logreport(report):
    SEEN.append("\n".join([str(report.longrepr or ""), *(text for _, text in report.sections)]))


def files_with(root: Path, needle: str) -> list[Path]:
    """Every file under `root` that holds `needle`, in its name or its bytes; links are not followed."""
    found = []
    for folder, _, names in os.walk(root):
        for path in (Path(folder, name) for name in names):
            if needle in path.name:
                found.append(path)
            elif path.is_file() and not path.is_symlink() and path.stat().st_size:
                with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    if data.find(needle.encode()) >= 0:
                        found.append(path)
    return found


@pytest.fixture(scope="session", autouse=True)
def nobody_sees_the_token(tmp_path_factory):
    """When all tests have run: the Hub's token is in none of their files, outputs, logs and errors."""
    yield
    assert files_with(tmp_path_factory.getbasetemp(), TOKEN) == []
    assert [text for text in SEEN if TOKEN in text] == []


@pytest.fixture(name="files_with")
def fixture_files_with():
    return files_with


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def hub_environment(hub, tmp_path):
    """The environment of a process that takes the loopback Hub for the Hub, with no token.

    A process of its own, because huggingface_hub reads HF_ENDPOINT and its fellows once, when it is imported.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(tmp_path / "hf-home"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def run_with_hub(hub_environment):
    """Run a command, or Python source, with the loopback Hub; with no token unless one is given."""

    def run(source, *argv: str, token: str | None = None, **environment: str) -> subprocess.CompletedProcess:
        command = [warm_python(), "-c", source] if isinstance(source, str) else [str(word) for word in source]
        done = subprocess.run(
            [*command, *map(str, argv)],
            env=hub_environment | ({"HF_TOKEN": token} if token is not None else {}) | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert TOKEN not in done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """This process, too, takes the loopback Hub for the Hub and has its token; retries do not wait."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf-home" / "token"))
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    logging.getLogger("huggingface_hub").setLevel(logging.DEBUG)
    yield hub
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)


@pytest.fixture
def hub_token():
    return TOKEN


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """A saved PoolFormer and a saved MetaFormer, with processors, as training leaves them."""
    from hf_poolformer import (
        MetaFormerConfig,
        MetaFormerForImageClassification,
        PoolFormerConfig,
        PoolFormerForImageClassification,
        PoolFormerImageProcessor,
    )

    root = tmp_path_factory.mktemp("models")
    tiny = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 32], "id2label": {0: "intact", 1: "cracked", 2: "dark"}}
    mixers = ["pooling", "separable_conv", "identity", "attention"]
    torch.manual_seed(0)
    for name, model in {
        "poolformer": PoolFormerForImageClassification(PoolFormerConfig(**tiny)),
        "metaformer": MetaFormerForImageClassification(MetaFormerConfig(token_mixers=mixers, **tiny)),
    }.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
        model.save_pretrained(root / name)
        PoolFormerImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(
            root / name
        )
    return root


@pytest.fixture
def model_dir(tmp_path, tiny_models):
    """The end of a run: a model, its card, and what must stay at home."""
    folder = tmp_path / "a run"
    shutil.copytree(tiny_models / "poolformer", folder)
    files = {
        "README.md": b"---\nlicense: apache-2.0\n---\n\n# a run\n",
        "all_results.json": b'{"eval_accuracy": 0.5}',
        "training_log.jsonl": b'{"step": 1, "loss": 1.0}\n',
        "curves.png": b"\x89PNG not really",
        "checkpoints/step-10/optimizer.bin": b"0" * 1000,
        "checkpoints/step-10/model.safetensors": b"0" * 1000,
        "logs/events.out.tfevents.1": b"events",
        "optimizer.bin": b"0" * 10,
        "pytorch_model.bin": b"pickle",
        ".cache/something": b"hidden",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    settings = {"dataset_name": str(tmp_path / "data" / "cells"), "output_dir": str(folder), "seed": 42}
    (folder / "training_settings.yaml").write_text(json.dumps(settings))
    return folder
