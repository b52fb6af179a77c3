import json
import platform
import socket
from importlib.metadata import version
from pathlib import Path

import torch

from hf_poolformer.commands.env import main
from hf_poolformer.foundation.redaction import redact


def facts(capsys, *words):
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_versions_devices_and_kernels(capsys, monkeypatch):
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "reference")
    found = json.loads(facts(capsys, "--json"))
    assert found["python"] == platform.python_version()
    for name in ("torch", "torchvision", "transformers", "huggingface-hub", "accelerate", "datasets"):
        assert found["packages"][name] == version(name)
    assert f"{torch.get_num_threads()} threads" in found["devices"]["cpu"]
    assert found["kernels"]["cpu float32"].startswith("reference in inference")
    assert found["variables"]["HF_POOLFORMER_KERNELS"] == "reference"
    assert found["extras"]["train"] == "installed" or found["extras"]["train"].startswith("lacks ")


def test_kernels_that_cannot_run_say_why(capsys, monkeypatch):
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "nonsense")
    assert "nonsense" in json.loads(facts(capsys, "--json"))["kernels"]["cpu float32"]


def test_text_can_be_pasted_anywhere(capsys, monkeypatch):
    secret = "hf_" + "z" * 34
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@hub.example.com/x")
    text = facts(capsys)
    assert text.startswith("hf-poolformer ")
    assert "https://hub.example.com/x" in text
    for private in (secret, "secret@", str(Path.home()), str(Path.cwd()), socket.gethostname() + "\n"):
        assert private not in text
    assert max(map(len, text.splitlines())) < 200


def test_passwords_in_addresses():
    assert redact("http://a:b@host:80/x") == "http://host:80/x"
    assert redact("http://host/a@b") == "http://host/a@b"
