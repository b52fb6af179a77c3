"""Weights as their publishers store them, read from a file, a folder or the Hub, without running code in them."""

import argparse
import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..export.folder import is_exported, no_model


__all__ = ["ConversionError", "Source", "open_source"]

# What a trainer may have wrapped the weights in. As timm does, averaged weights are preferred where there are both.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors", "*.pth", "*.pth.tar")


class ConversionError(ValueError):
    """A checkpoint that cannot be read or written; the message, one line, says why and what to do."""

    def __init__(self, message: str):
        # Keys come from the file, which may put anything into them.
        super().__init__("".join(character if character.isprintable() else " " for character in message))


@dataclass
class Source:
    """
    A checkpoint as found.

    Attributes:
        name: what to call it.
        tensors: its weights, under its publisher's keys.
        config: what `config.json` holds; empty if there is none.
        folder: where it lies, if it is a folder.
        sha256: of the weights file; `None` if there were several.
        notes: what a reader should know, one line each.
        labels: class names that the weights file holds, as those of mmdetection and mmsegmentation do.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    sha256: str | None = None
    notes: list[str] = field(default_factory=list)
    labels: list[str] | None = None


def open_source(source: str | os.PathLike) -> Source:
    path = Path(source)
    if path.is_dir():
        return open_folder(path, path.resolve().name)
    if path.is_file():
        tensors, notes, labels = load_weights(path)
        return Source(path.name, tensors, sha256=sha256_of(path), notes=notes, labels=labels)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) and path.suffix not in (".pth", ".tar", ".bin"):
        return open_folder(download(str(source)), str(source))
    raise ConversionError(f"{source}: no such file or folder, and not the id of a repository on the Hub")


def open_folder(folder: Path, name: str) -> Source:
    config = {}
    if (folder / "config.json").is_file():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConversionError(f"{folder / 'config.json'} is not JSON: {one_line(error)}") from error
        if not isinstance(config, dict):
            raise ConversionError(f"{folder / 'config.json'} is no configuration: it holds no JSON object")
    files = next((found for glob in WEIGHTS if (found := sorted(folder.glob(glob)))), [])
    if not files and is_exported(folder):
        raise ConversionError(no_model(folder))
    if not files:
        raise ConversionError(f"{name}: no weights in this folder (looked for {', '.join(WEIGHTS)})")
    if len(files) > 1 and not all(re.search(r"-\d+-of-\d+\.", file.name) for file in files):
        raise ConversionError(f"{name}: which file? {', '.join(file.name for file in files)}; give its path")
    tensors, notes, labels = {}, [], None
    for file in files:
        shard, more, labels = load_weights(file)
        tensors.update(shard)
        notes += more
    if not config:
        name = files[0].name
    return Source(name, tensors, config, folder, sha256_of(files[0]) if len(files) == 1 else None, notes, labels)


def download(repo_id: str) -> Path:
    """The folder of the Hub's cache with the configuration and the weights of a repository."""

    def fetch(*files: str) -> Path:
        for file in files:
            try:
                return Path(hf_hub_download(repo_id, file))
            except EntryNotFoundError as error:
                missing = error
        raise missing

    try:
        folder = fetch("config.json").parent
        fetch("model.safetensors", "pytorch_model.bin")
        with suppress(EntryNotFoundError):
            fetch("preprocessor_config.json")
    except Exception as error:  # of the network, the Hub or the disk: many kinds, none of them ours
        raise ConversionError(
            f"{repo_id} is neither a file or folder here nor could it be fetched from the Hub: {one_line(error)}"
        ) from error
    return folder


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], list[str], list[str] | None]:
    """The state dict in a file, without wrappers and prefixes, notes on what was chosen, and class names if any."""
    content = load_safetensors(path) if path.suffix == ".safetensors" else load_pickle(path)
    notes, labels = [], class_names(content)
    wrapper = next((key for key in WRAPPERS if isinstance(content, Mapping) and key in content), None)
    if wrapper and isinstance(content[wrapper], Mapping):
        if sum(key in content for key in WRAPPERS) > 1:
            notes.append(f"{path.name} holds several sets of weights; {wrapper} was taken")
        content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{path} holds no state dict but {type(content).__name__}")
    others = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if others:
        raise ConversionError(f"{path} is no state dict: no named tensors are {listed(map(str, others))}")
    state_dict = dict(content)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict, notes, labels


def class_names(content: Any) -> list[str] | None:
    """What mmdetection and mmsegmentation note beside the weights, in `meta`; later versions in lower case."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    if not isinstance(meta, Mapping):
        return None
    dataset = meta.get("dataset_meta")
    names = meta.get("CLASSES") or (dataset.get("classes") if isinstance(dataset, Mapping) else None)
    return [str(name) for name in names] if isinstance(names, (list, tuple)) and names else None


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(
            f"{path} is truncated or no safetensors file ({one_line(error)}); download it again"
        ) from error


def load_pickle(path: Path) -> Any:
    """Unpickles tensors and plain containers only, so that no code in the file can run."""
    try:
        # timm keeps its parsed command line, which is harmless, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is raised
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise ConversionError(
                f"{path} was refused: besides tensors it holds {found[1]}, which could run code when loaded. "
                "Ask its publisher for a plain state dict or safetensors"
            ) from error
        raise ConversionError(
            f"{path} is no PyTorch checkpoint, or none that can be loaded without running code in it"
        ) from error
    except Exception as error:  # an unpickler of damaged bytes raises anything at all: IndexError, RecursionError ...
        raise ConversionError(
            f"{path} is truncated or no PyTorch file ({one_line(error) or 'end of file'}); download it again"
        ) from error


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:297] + "..."
