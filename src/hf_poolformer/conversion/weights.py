"""Weights as their publishers store them, read from a file, a folder or the Hub, without running code in them."""

import argparse
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

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..foundation.errors import UserError, one_line
from ..foundation.exported import is_exported, no_model
from ..foundation.files import digest
from .dense_key_maps import IN_BACKBONE
from .key_maps import FORMATS


__all__ = ["ConversionError", "FoundCheckpoint", "open_checkpoint"]

# Parts that wrappers put into keys, in any order and at any depth: data parallelism and averaging, torch.compile,
# FSDP, activation checkpointing, Lightning Fabric. No format has such parts of its own.
WRAPPED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# Names of averaged weights, which timm prefers where there are others, too; and of the others, the first first.
AVERAGED = re.compile(r"(?<![a-z])(?:ema|swa|avg|averaged?)(?![a-z])", re.IGNORECASE)
PLAIN = ("", "state_dict", "model_state_dict", "model_state", "model")
# What the wrappers of a state dict keep in it, beside the model: counters, losses, metrics and FLOP counts.
BESIDE = re.compile(r"(?:.+\.)?(?:\w*(?:criterion|loss|metric)\w*\..+|total_(?:ops|params))")
MARKERS = [re.compile(rf"(?:^|(?<=\.)){fmt.marker}") for fmt in FORMATS]
# Of a folder: names that say that the file is its model's, then the rest.
STANDARD = ("model*.safetensors", "pytorch_model*.bin")
OTHERS = ("*.safetensors", "*.pth", "*.pth.tar", "*.pt", "*.ckpt")
SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.\w+")
# What trainers keep beside the weights, and what can do no harm: parsed command lines, numbers of NumPy. Pickles name
# the latter as versions 1 and 2 of NumPy do.
HARMLESS = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
# Where trainers write down what they trained.
STATEMENTS = ("args", "hyper_parameters", "hparams", "config", "cfg", "model_args", "model_kwargs", "model_config")
NAMES = ("arch", "architecture", "model", "model_name", "variant", "backbone", "encoder")


class ConversionError(UserError):
    """A checkpoint that cannot be read or written; the message, one line, says why and what to do."""

    def __init__(self, message: str):
        # Keys come from the file, which may put anything into them.
        super().__init__("".join(character if character.isprintable() else " " for character in message))


@dataclass
class FoundCheckpoint:
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
        statements: what its trainer wrote down beside the weights, under one of `STATEMENTS`.
        left_out: what the weights file holds beside the model.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    sha256: str | None = None
    notes: list[str] = field(default_factory=list)
    labels: list[str] | None = None
    statements: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def model_names(self) -> dict[str, str]:
        """What calls the model by name: where it says so, and what it says; the surest first."""
        if isinstance(architecture := self.config.get("architecture"), str):
            return {"config.json": architecture}
        said = {key: value for key in NAMES if isinstance(value := self.statements.get(key), str)}
        return {**said, "its file name": self.name}


def open_checkpoint(source: str | os.PathLike, weights: str | None = None) -> FoundCheckpoint:
    """
    Reads a file, a folder or a repository of the Hub.

    Args:
        weights: which set to take where a file holds several, such as `state_dict`.
    """
    path = Path(source)
    if path.is_dir():
        return open_folder(path, path.resolve().name, weights)
    if path.is_file():
        shard = SHARD.fullmatch(path.name)
        if shard and int(shard[3]) > 1:
            raise ConversionError(f"{path.name} is one of {int(shard[3])} files of its weights; give their folder")
        found = load_weights(path, weights)
        add_config_beside(path, found)
        return found
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) and path.suffix not in (".pth", ".tar", ".bin"):
        return open_folder(download(str(source)), str(source), weights)
    raise ConversionError(f"{source}: no such file or folder, and not the id of a repository on the Hub")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder; empty if there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path} is no configuration: it holds no JSON object")
    return config


def add_config_beside(path: Path, found: FoundCheckpoint) -> None:
    """Takes what a `config.json` beside a weights file says, if it is the file's by its name or its content."""
    standard = any(path.match(glob) for glob in STANDARD)
    try:
        config = read_config(path.parent)
    except ConversionError:
        if standard:
            raise
        found.notes.append(f"config.json beside {path.name} cannot be read, and was not used")
        return
    if config and not is_model_config(config):
        found.statements |= statements_in({"config": config}) | found.statements
    elif config and (standard or config.get("model_type") in ("poolformer", "metaformer")):
        found.config, found.folder = config, path.parent
        found.statements |= statements_in(config) | found.statements
        found.notes.append(f"config.json beside {path.name} was taken for its own")
    elif config:
        found.notes.append(f"config.json beside {path.name} is of another model, and was not used")


def is_model_config(config: Mapping[str, Any]) -> bool:
    """Whether this is a configuration of transformers or timm, and not of a trainer, say."""
    return any(isinstance(config.get(key), str) for key in ("model_type", "architecture"))


def open_folder(folder: Path, name: str, weights: str | None) -> FoundCheckpoint:
    config = read_config(folder)
    standard = [found for glob in STANDARD if (found := sorted(folder.glob(glob)))]
    others = sorted({file for glob in OTHERS for file in folder.glob(glob)} - {file for fs in standard for file in fs})
    files = standard[0] if standard else others
    if not files and is_exported(folder):
        raise ConversionError(no_model(folder))
    if not files:
        raise ConversionError(f"{name}: no weights in this folder (looked for {', '.join(STANDARD + OTHERS)})")
    if len(files) > 1:
        check_shards(name, files)
    parts = [load_weights(file, weights) for file in files]
    found = parts[0]
    for part in parts[1:]:
        if twice := sorted(part.tensors.keys() & found.tensors.keys()):
            raise ConversionError(f"{name}: {files[0].name} and others both hold {listed(twice)}")
        found.tensors |= part.tensors
        found.notes += part.notes
        found.left_out += part.left_out
        found.sha256 = None
    if ignored := [file.name for files in standard[1:] for file in files]:
        found.notes.append(f"{files[0].name} was taken; {listed(ignored)} beside it was not read")
    found.folder = folder
    if is_model_config(config):
        found.name, found.config = name, config
        found.statements |= statements_in(config)
    elif config:
        # A trainer's: what it says about the model counts, as inside a checkpoint.
        found.statements |= statements_in({"config": config}) | found.statements
    return found


def check_shards(name: str, files: list[Path]) -> None:
    """Several files of weights are one model's only if they are all the shards of it."""
    shards = [SHARD.fullmatch(file.name) for file in files]
    if not all(shards):
        raise ConversionError(f"{name}: which file? {', '.join(file.name for file in files)}; give its path")
    if len({(shard[1], shard[3]) for shard in shards}) > 1:
        raise ConversionError(f"{name}: these are shards of different models: {listed(file.name for file in files)}")
    count = int(shards[0][3])
    if lacking := sorted(set(range(1, min(count, 10_000) + 1)) - {int(shard[2]) for shard in shards}):
        raise ConversionError(
            f"{name} is incomplete: of the {count} files of its weights these lack: {listed(map(str, lacking))}"
        )


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


@dataclass
class WeightSet:
    """One of the models in a file: the way to it, its tensors without prefix, and what lies beside them."""

    name: str
    tensors: dict[str, torch.Tensor]
    beside: list[str]


def load_weights(path: Path, wanted: str | None = None) -> FoundCheckpoint:
    """The model in a file, without wrappers and prefixes, and what else the file says."""
    content = load_safetensors(path) if path.suffix == ".safetensors" else load_pickle(path)
    found = FoundCheckpoint(
        path.name, {}, sha256=digest(path), labels=class_names(content), statements=statements_in(content)
    )
    sets = sets_of(content, path.name) if isinstance(content, Mapping) else []
    if not sets:
        if wanted is not None:
            raise ConversionError(f"{path.name} holds no weights {wanted!r}")
        found.tensors = only_tensors(path, content)
        return found
    chosen = choose(sets, content, wanted, found)
    found.tensors, found.left_out = chosen.tensors, chosen.beside
    return found


def sets_of(content: Mapping[Any, Any], file: str, way: tuple[str, ...] = ()) -> list[WeightSet]:
    """Every set of weights in `content`, told by keys that only a MetaFormer has, wherever it lies."""
    tensors: dict[str, torch.Tensor] = {}
    beside: dict[str, None] = {}
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, torch.Tensor)):
            beside[str(key)] = None
            continue
        bare = ".".join(part for part in key.split(".") if part not in WRAPPED)
        if bare in tensors:
            raise ConversionError(f"{file} holds two tensors for {bare}, one of them as {key}")
        tensors[bare] = value
    # What a model is called in its trainer, `model.` or `teacher.`; a shorter prefix has what no longer one has.
    prefixes = {prefix for key in tensors if (prefix := prefix_of(key)) is not None}
    prefixes = sorted(prefixes, key=lambda prefix: (-len(prefix), prefix))
    parts: dict[str, dict[str, torch.Tensor]] = {prefix: {} for prefix in prefixes}
    copies = {f"ema_{key.replace('.', '_')}" for key in tensors}  # mmcv's, of every weight
    for key, value in tensors.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        bare = key.removeprefix(prefix or "")
        counter = "." not in bare and value.numel() == 1
        if prefix is None or counter or BESIDE.fullmatch(bare) or key in copies:
            beside[key] = None
        else:
            parts[prefix][bare] = value
    found = [WeightSet(".".join([*way, *prefix.split(".")[:-1]]), part, [*beside]) for prefix, part in parts.items()]
    for key, value in content.items():
        if isinstance(value, Mapping) and len(way) < 4:
            found += sets_of(value, file, (*way, str(key)))
    return found


def prefix_of(key: str) -> str | None:
    """What comes before a key that only a MetaFormer has; `None` for all other keys."""
    match = next((match for marker in MARKERS if (match := marker.search(key))), None)
    # `backbone.` says where the weights belong in a detector, rather than who wrapped them.
    return key[: match.start()].removesuffix(IN_BACKBONE) if match else None


def choose(sets: list[WeightSet], content: Mapping[Any, Any], wanted: str | None, found: FoundCheckpoint) -> WeightSet:
    """The set to take, with a note if there were several: the wanted one, else averaged weights, else the plain."""
    names = [each.name for each in sets]
    shown = ", ".join(name or "(unnamed)" for name in names)
    if wanted is not None:
        chosen = [s for s in sets if s.name == wanted] or [s for s in sets if s.name.endswith(f".{wanted}")]
        if len(chosen) != 1:
            raise ConversionError(f"{found.name} holds no weights {wanted!r}, or several; it holds {shown}")
        found.notes.append(f"of the weights in {found.name} {chosen[0].name} was taken, as asked")
        return chosen[0]
    averaged = [each for each in sets if AVERAGED.search(each.name)]
    # mmengine swaps the two when it saves: its state_dict has the averaged weights, its ema_state_dict the others.
    meta = content.get("meta")
    if isinstance(meta, Mapping) and "mmengine_version" in meta and "state_dict" in names:
        averaged = [each for each in sets if each.name == "state_dict"]
    for key, value in content.items():
        taken = any(name.split(".")[0] == str(key) for name in names)
        if AVERAGED.search(str(key)) and (value is None or isinstance(value, Mapping)) and not taken:
            what = "holds no weights under names of a MetaFormer" if value else "is empty"
            found.notes.append(f"{key} in {found.name} {what}, and was not used")
    plain = ([each for each in sets if each.name == name or each.name.startswith(f"{name}.")] for name in PLAIN)
    candidates = averaged or next(filter(None, plain), sets)
    if len(candidates) > 1:
        raise ConversionError(
            f"{found.name} holds several sets of weights: {shown}; say which, for instance --weights {names[0]}"
        )
    if len(sets) > 1:
        other = next(name for name in names if name != candidates[0].name)
        found.notes.append(
            f"{found.name} holds several sets of weights ({shown}); {candidates[0].name or 'the unnamed'} was taken"
            + (", which is averaged" if averaged else "")
            + (f"; --weights {other} takes another" if other else "")
        )
    return candidates[0]


def only_tensors(path: Path, content: Any) -> dict[str, torch.Tensor]:
    """The state dict in a file that holds no model like ours, for a message about its keys."""
    wrapper = next((key for key in PLAIN[1:] if isinstance(content, Mapping) and key in content), None)
    if wrapper and isinstance(content[wrapper], Mapping):
        content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{path} holds no state dict but {type(content).__name__}")
    others = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if others:
        raise ConversionError(f"{path} is no state dict: no named tensors are {listed(map(str, others))}")
    return dict(content)


def statements_in(content: Any) -> dict[str, Any]:
    """What is written down under `STATEMENTS` and `NAMES`, without nesting; what is said first counts."""
    said: dict[str, Any] = {}
    if not isinstance(content, Mapping):
        return said

    def add(mapping: Mapping[Any, Any], depth: int = 0) -> None:
        for key, value in mapping.items():
            value = vars(value) if isinstance(value, argparse.Namespace) else value
            if isinstance(value, Mapping) and depth < 3:
                add(value, depth + 1)
            elif isinstance(key, str) and isinstance(value, (str, int, float, list, tuple)):
                said.setdefault(key, value)

    add({key: content[key] for key in (*NAMES, *STATEMENTS) if key in content and not is_weights(content[key])})
    # mmdetection and mmsegmentation: the text of the configuration file.
    meta = content.get("meta")
    for key in ("cfg", "config"):
        if isinstance(meta, Mapping) and isinstance(text := meta.get(key), str):
            if named := re.search(r"type\s*=\s*['\"](\w*former\w*)['\"]", text):
                said.setdefault("backbone", named[1])
            if size := re.search(r"\bpool_size\s*=\s*(\d+)", text):
                said.setdefault("pool_size", int(size[1]))
    return said


def is_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(each, torch.Tensor) for each in value.values())


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
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is raised
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise ConversionError(
                f"{path} was refused: besides tensors it holds {found[1]}, which could run code when loaded. "
                "Ask its publisher for a plain state dict (model.state_dict()) or safetensors"
            ) from error
        raise ConversionError(
            f"{path} is no PyTorch checkpoint, or none that can be loaded without running code in it"
        ) from error
    except Exception as error:  # an unpickler of damaged bytes raises anything at all: IndexError, RecursionError ...
        why = one_line(error) if str(error) else "end of file"
        raise ConversionError(f"{path} is truncated or no PyTorch file ({why}); download it again") from error


def listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    shown = names if len(names) <= most + 1 else [*names[:most], f"{len(names) - most} more"]
    return ", ".join(shown)
