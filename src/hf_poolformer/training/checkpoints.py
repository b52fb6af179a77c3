"""Checkpoints that are either complete or not there, and the search for the newest one.

A checkpoint is a folder `step-N`:

    model.safetensors   weights of the bare model
    state.pt            optimiser, scheduler, gradient scaler, moving average
    rank-R.pt           random generators and data stream of process R
    progress.json       where the run stands
    complete.json       size and SHA-256 of each file; written last

It is written under another name and renamed when everything is on the disk, so a run that dies while it writes leaves
the previous checkpoint as it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from .errors import UserError


MARKER = "complete.json"
STEP = re.compile(r"step-(\d+)$")


@dataclass
class Progress:
    """Where a run stands; everything that is neither a tensor nor particular to one process."""

    step: int = 0  # optimiser steps taken
    epoch: int = 0  # epochs completed
    batches: int = 0  # micro-batches that each process has taken from the current epoch
    images: int = 0  # training images seen, over all processes
    skipped_images: int = 0  # broken images left out, over all processes
    train_seconds: float = 0.0
    wait_seconds: float = 0.0  # of these, spent waiting for data
    epoch_loss: float = 0.0  # sum over the optimiser steps of the current epoch
    epoch_steps: int = 0
    train_loss: float | None = None  # mean over the last epoch
    num_processes: int = 1
    label_names: list[str] = field(default_factory=list)


@dataclass
class TrainingState:
    """The objects of a run that a checkpoint holds.

    Attributes:
        model: bare model.
        stream: state of the data stream of this process, whatever the loader makes of it; None if it has none.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    scheduler: Any
    ema: Any | None
    progress: Progress
    stream: dict[str, Any] | None = None


def save(root: Path, state: TrainingState, keep: int = 0) -> Path:
    """Writes the checkpoint `root/step-N`; every process must call it.

    Args:
        root: folder of all checkpoints of a run.
        keep: how many checkpoints remain, 0 for all; only complete ones are deleted, and only oldest first.

    Raises:
        UserError: it cannot be written (a full disk, say); those already there are untouched.
    """
    accelerator = state.accelerator
    target = root / f"step-{state.progress.step}"
    temporary = root / f".writing-step-{state.progress.step}"
    if target.is_dir() and is_complete(target):
        return target
    if accelerator.is_main_process:
        for left_over in root.glob(".writing-step-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        make_folder(temporary)
    accelerator.wait_for_everyone()
    try:
        own = {"rng": random_states(), "stream": state.stream}
        torch.save(own, temporary / f"rank-{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            save_model(state.model, str(temporary / "model.safetensors"))
            shared = {
                "optimizer": state.optimizer.state_dict(),
                "scheduler": state.scheduler.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "ema": state.ema.state_dict() if state.ema is not None else None,
            }
            torch.save(shared, temporary / "state.pt")
            progress = dataclasses.asdict(state.progress)
            (temporary / "progress.json").write_text(json.dumps(progress, indent=2), encoding="utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot write a checkpoint to {root}: {error}. Those before it are as they were.") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        try:
            seal(temporary)
            if target.exists():
                # Not complete, or it would have been used above.
                target.rename(free_name(root / f"broken-{target.name}"))
            temporary.rename(target)
            sync(root)
        except OSError as error:
            raise UserError(
                f"cannot write a checkpoint to {root}: {error}. Those before it are as they were."
            ) from error
        prune(root, keep)
    accelerator.wait_for_everyone()
    return target


def load(path: Path, state: TrainingState) -> None:
    """Brings everything in `state` to where the checkpoint was; every process must call it.

    A process that the saved run did not have starts with its own random state.

    Raises:
        UserError: the checkpoint belongs to another architecture, other labels or other settings, or is damaged.
    """
    try:
        progress = Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))
        check_fits(path, state, progress)
        load_model(state.model, str(path / "model.safetensors"))
        shared = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        if (shared["ema"] is None) != (state.ema is None):
            there = "without" if shared["ema"] is None else "with"
            raise UserError(f"{path} was made {there} --ema_decay; go on with the same setting.")
        state.optimizer.load_state_dict(shared["optimizer"])
        state.scheduler.load_state_dict(shared["scheduler"])
        if state.accelerator.scaler is not None and shared["scaler"]:
            state.accelerator.scaler.load_state_dict(shared["scaler"])
        if state.ema is not None:
            state.ema.load_state_dict(shared["ema"])
        own = path / f"rank-{state.accelerator.process_index}.pt"
        if own.exists():
            mine = torch.load(own, map_location="cpu", weights_only=True)
            set_random_states(mine["rng"])
            state.stream = mine["stream"]
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint of this run: {error}") from error
    for name, value in dataclasses.asdict(progress).items():
        setattr(state.progress, name, value)
    state.progress.num_processes = state.accelerator.num_processes


def check_fits(path: Path, state: TrainingState, progress: Progress) -> None:
    if progress.label_names != state.progress.label_names:
        raise UserError(
            f"{path} was trained on other labels ({summary(progress.label_names)}) than the dataset has "
            f"({summary(state.progress.label_names)})."
        )
    expected = {name: tuple(tensor.shape) for name, tensor in state.model.state_dict().items()}
    with safe_open(path / "model.safetensors", framework="pt") as weights:
        found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise UserError(
            f"{path} holds another architecture than this run: {wrong[0]} is {found.get(wrong[0], 'missing')} there, "
            f"{expected.get(wrong[0], 'missing')} here ({len(wrong)} such tensors). Resume with the settings it was "
            "made with, or start from it with --model_name_or_path."
        )


def find(spec: str, root: Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means.

    Args:
        spec: `latest`, or a checkpoint's folder.
        root: where `latest` looks. Checkpoints that are incomplete or damaged are passed over with a warning.

    Returns:
        the folder, or None if `latest` finds none.

    Raises:
        UserError: the given folder is not a complete checkpoint.
    """
    if spec != "latest":
        path = Path(spec)
        if not path.is_dir():
            raise UserError(f"there is no checkpoint {spec}; --resume_from_checkpoint takes 'latest' or a folder.")
        fault = fault_of(path)
        if fault:
            raise UserError(f"{path} is not a complete checkpoint: {fault}. Try --resume_from_checkpoint latest.")
        return path
    for path in reversed(all_steps(root)):
        fault = fault_of(path)
        if not fault:
            return path
        warnings.warn(f"passing over the checkpoint {path}: {fault}.", stacklevel=2)
    return None


def all_steps(root: Path) -> list[Path]:
    """Folders `step-N`, complete or not, by rising N."""
    found = [path for path in root.glob("step-*") if STEP.search(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(STEP.search(path.name).group(1)))


def is_complete(path: Path) -> bool:
    return fault_of(path) is None


def fault_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is complete and unchanged since it was written."""
    try:
        files = json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]
        for name, facts in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != facts["size"] or digest(path / name) != facts["sha256"]:
                return f"{name} is damaged"
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MARKER} cannot be read ({error})"
    return None


def seal(folder: Path) -> None:
    """Forces every file to the disk and writes the marker, as the last of them."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": digest(path)}
    (folder / MARKER).write_text(json.dumps({"files": files}, indent=2), encoding="utf-8")
    sync(folder / MARKER)
    sync(folder)


def prune(root: Path, keep: int) -> None:
    """Deletes the oldest complete checkpoints beyond `keep`; 0 keeps all."""
    complete = [path for path in all_steps(root) if (path / MARKER).is_file()]
    for path in complete[: max(len(complete) - keep, 0)] if keep else []:
        # Unmarked first: a deletion that is cut short must not leave something that looks complete.
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def set_aside(root: Path) -> None:
    """Moves the checkpoints of an earlier run out of the way of a new one, into `root/previous-N`."""
    steps = all_steps(root)
    if steps:
        aside = free_name(root / "previous")
        aside.mkdir()
        for path in steps:
            path.rename(aside / path.name)


def free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror}.") from error


def sync(path: Path) -> None:
    """fsync of a file or folder; folders cannot be opened on Windows, whose renames need none."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def random_states() -> dict[str, Any]:
    """States of the generators of this process, in types that load with `weights_only=True`."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": (version, tuple(numbers), gauss),
        "numpy": (str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def summary(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... {len(names)} in all" if len(names) > 5 else "")
