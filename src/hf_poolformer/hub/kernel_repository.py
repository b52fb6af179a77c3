"""Our kernels as a repository for the `kernels` library of Hugging Face, from the sources of this very package.

A model that carries its code runs in plain PyTorch where this package is missing, unless somebody loads the kernels
from such a repository (backends.py finds them then). They are Python, for Triton and oneDNN, so a build is a copy: one
variant for each kind of device, with a `metadata.json` that names it and holds the digest of each of its files.

https://huggingface.co/docs/kernels/kernel-requirements
"""

import base64
import json
from hashlib import sha256
from pathlib import Path

from ..backends import LOADED_KERNELS
from ..foundation.files import make_folder, replace_text
from ..foundation.strict_json import to_json
from ..kernels import INTERFACE
from .contents import Contents, PublishError


__all__ = ["VERSION", "build_kernels", "kernel_contents"]

NAME = "hf-poolformer-kernels"
# Of the repository: who expects operations of this interface loads this version, which is a branch `vN`.
VERSION = INTERFACE
# Kind of device -> what `metadata.json` says of it. Without `archs`, Triton compiles for whatever is there.
BACKENDS = {"cpu": {"type": "cpu"}, "cuda": {"type": "cuda"}, "rocm": {"type": "rocm"}}
SOURCES = Path(__file__).resolve().parents[1] / "kernels"

CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
- poolformer
- hf-poolformer
---

# {title}

Kernels for PoolFormer and the MetaFormer family, for the [kernels](https://github.com/huggingface/kernels) library.
They are those of the package hf-poolformer. Models that were published with it carry their code; where the package is
not installed they run in plain PyTorch, or, once these kernels are loaded, with them.

```python
from kernels import get_kernel
from transformers import AutoModelForImageClassification

get_kernel("{repo_id}", version={version}, trust_remote_code=["{repo_id}"])
model = AutoModelForImageClassification.from_pretrained("USER/MODEL", trust_remote_code=True)
```

or by transformers' own flag, on a GPU:

```python
from transformers import AutoModelForImageClassification, KernelConfig

source = ("{repo_id}:MetaFormerEncoder", {{"version": {version}, "trust_remote_code": True}})
model = AutoModelForImageClassification.from_pretrained(
    "USER/MODEL",
    trust_remote_code=True,
    device_map="cuda",
    use_kernels=True,
    kernel_config=KernelConfig({{"MetaFormerEncoder": {{"cuda": source}}}}),
)
```

Give `revision=` and the hash of a commit in place of `version={version}` to get nothing else, ever. Models of another
version of the package may need another version of the kernels; those of a wrong one are not used, and the model runs
in plain PyTorch.

| where | what computes |
|---|---|
| NVIDIA GPU of compute capability 8.0 or newer, bfloat16 or float16 | Triton, where it was measured to be faster |
| other GPUs | Triton, where the environment variable `HF_POOLFORMER_KERNELS` is `triton` |
| CPU, without gradients | oneDNN |
| everything else | plain PyTorch, which gives the same results |
"""


def build_kernels(folder: Path, repo_id: str) -> list[str]:
    """
    Writes the repository into `folder`, in the place of one that was written there before.

    Args:
        repo_id: how its card calls it.

    Returns:
        names of its files, relative to `folder`.

    Raises:
        PublishError: something else is in the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise PublishError(f"{folder} is a file; name a folder for the kernels")
    files = {"README.md": CARD.format(title=repo_id.rpartition("/")[2], repo_id=repo_id, version=VERSION)}
    for backend in BACKENDS:
        files |= {f"build/torch-{backend}/{name}": text for name, text in variant(backend).items()}
    there = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    if there and not is_ours(folder):
        raise PublishError(f"{folder} holds something else; name a new folder for the kernels")
    for path in there - {folder / name for name in files}:
        if path.is_relative_to(folder / "build"):
            path.unlink()  # of an earlier version
    for name, text in files.items():
        make_folder((folder / name).parent)
        replace_text(folder / name, text)
    return list(files)


def is_ours(folder: Path) -> bool:
    """Whether a folder holds what `build_kernels` writes."""
    for path in folder.glob("build/*/metadata.json"):
        try:
            if json.loads(path.read_text(encoding="utf-8"))["name"] == NAME:
                return True
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return False


def variant(backend: str) -> dict[str, str]:
    """The files for one kind of device, by name: the package `hf_poolformer.kernels`, which imports but its own
    modules, with the layers that the library looks for."""
    files = {path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.py"))}
    files["__init__.py"] += "\nfrom . import layers as layers  # noqa: E402 for the kernels library\n"
    digests = {name: sha256(text.encode()).digest() for name, text in files.items()}
    # Several versions may be loaded at once, each under a name of its own.
    identity = sha256(b"".join(digests.values())).hexdigest()[:10]
    metadata = {
        "id": f"{LOADED_KERNELS}_{backend}_{identity}",
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": BACKENDS[backend],
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }
    return {**files, "metadata.json": to_json(metadata, indent=2) + "\n"}


def kernel_contents(folder: Path, repo_id: str) -> Contents:
    """The repository, built into `folder`, as what is to be published.

    Raises:
        PublishError: something else is in the folder.
    """
    names = build_kernels(folder, repo_id)
    return Contents(
        "kernel",
        files={name: folder / name for name in names},
        notes=[f"built from the sources of this package: version {VERSION}, for {', '.join(BACKENDS)}"],
        replaces=("build/*",),
    )
