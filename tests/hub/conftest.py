import json
import os
import subprocess
import sys

import pytest
from hub_server import TOKEN, HubServer


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def run_with_hub(hub, tmp_path):
    """Run Python source in a process that takes the loopback Hub for the Hub, with no token unless one is given.

    A process of its own, because huggingface_hub reads HF_ENDPOINT and its fellows once, when it is imported.
    """

    def run(source: str, *argv: str, token: str | None = None, **environment: str) -> subprocess.CompletedProcess:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
        hub_environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(tmp_path / "hf-home"),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        if token is not None:
            hub_environment["HF_TOKEN"] = token
        return subprocess.run(
            [sys.executable, "-c", source, *argv],
            env=kept | hub_environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def hub_token():
    return TOKEN


@pytest.fixture
def model_dir(tmp_path):
    """A folder that looks like the end of a run: a model, its card, and what must stay at home."""
    folder = tmp_path / "a run"
    files = {
        "config.json": json.dumps({"model_type": "poolformer"}).encode(),
        "README.md": b"---\nlicense: apache-2.0\n---\n\n# a model\n",
        "all_results.json": b"{}",
        "curves.png": b"\x89PNG not really",
        "model.safetensors": bytes(range(256)) * 4096,
        "checkpoints/step-10/optimizer.bin": b"0" * 1000,
        "logs/events.out.tfevents.1": b"events",
        ".cache/something": b"hidden",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder
