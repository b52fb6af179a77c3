"""Checkpoints that are either complete or not there, and the search for the newest one.

A checkpoint is a folder `step-N`:

    model.safetensors   weights of the bare model
    state.pt            optimiser, scheduler, gradient scaler, moving average
    processes.pt        by rank: random generators and place in the data stream
    progress.json       where the run stands
    complete.json       size and SHA-256 of each file; written last

Everything is brought to the main process, which alone writes; the weights are whole, however they were distributed.
They are written under another name and renamed when everything is on the disk, so a run that dies while it writes, or
finds the disk full, leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pickle
import random
import re
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..data.columns import few
from ..foundation.errors import UserError
from ..foundation.files import digest, let_others_read, make_folder, sync
from ..foundation.processes import found_by_main
from ..foundation.strict_json import to_json


logger = logging.getLogger(__name__)

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
    damaged_shards: list[str] = field(default_factory=list)  # of all processes: where and why
    train_seconds: float = 0.0
    wait_seconds: float = 0.0  # of these, spent waiting for data
    epoch_loss: float = 0.0  # sum over the optimiser steps of the current epoch
    epoch_steps: int = 0
    train_loss: float | None = None  # mean over the last epoch
    evaluated_epochs: int = 0  # epochs completed at the last evaluation
    best: dict[str, Any] = field(default_factory=dict)  # evaluation: metric, value, step, epoch; its checkpoint stays
    evaluations_without_improvement: int = 0  # in a row, up to now
    num_processes: int = 1
    global_batch: int = 0  # images per optimiser step
    label_names: list[str] = field(default_factory=list)
    method: dict[str, Any] = field(default_factory=dict)  # settings with which a run must go on as it began
    choices: dict[str, Any] = field(default_factory=dict)  # what it chose for itself, and keeps to


@dataclass
class TrainingState:
    """The objects of a run that a checkpoint holds.

    Attributes:
        model: bare model.
        stream: place of this process in its data, whatever the loader makes of it; None between two epochs.
        streams: of all processes of the run that was loaded, by rank; None where a checkpoint lies between two epochs.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    scheduler: Any
    ema: Any | None
    progress: Progress
    stream: dict[str, Any] | None = None
    streams: list[dict[str, Any]] | None = None


@dataclass
class Snapshot:
    """What a checkpoint holds, in the memory of the main process."""

    step: int
    weights: dict[str, torch.Tensor]
    shared: dict[str, Any]
    processes: list[dict[str, Any]]
    progress: dict[str, Any]

    @property
    def best(self) -> int | None:
        """Step of the checkpoint that stays, whatever the limit."""
        return self.progress["best"].get("step")

    @property
    def size(self) -> int:
        """Bytes that it takes on the disk, more or less."""
        tensors: dict[int, int] = {}
        stack: list[Any] = [self.weights, self.shared, self.processes]
        while stack:
            value = stack.pop()
            if isinstance(value, torch.Tensor):
                tensors[id(value)] = value.numel() * value.element_size()
            elif isinstance(value, dict):
                stack += value.values()
            elif isinstance(value, (list, tuple)):
                stack += value
            elif isinstance(value, str):
                tensors[id(value)] = len(value)
        return sum(tensors.values()) + (1 << 20)


class Saver:
    """Writes the checkpoints of a run.

    Args:
        root: folder of all checkpoints of the run.
        keep: how many remain, 0 for all; only complete ones are deleted, oldest first, and not the best.
        background: training goes on while a copy of the state is written; at most one is under way.
        carry_on: a checkpoint that cannot be written is a warning; otherwise it ends the run.
    """

    def __init__(
        self, root: Path, accelerator: Accelerator, keep: int = 0, background: bool = False, carry_on: bool = False
    ):
        self.root, self.accelerator, self.keep = root, accelerator, keep
        self.background, self.carry_on = background, carry_on
        self.seconds = 0.0  # that training has waited for checkpoints, in this process
        self._writer: threading.Thread | None = None
        self._target: Path | None = None
        self._step: int | None = None  # of the last one, written or under way
        self._fault: str | None = None
        self._copy: Snapshot | None = None

    def save(self, state: TrainingState) -> None:
        """Saves, or begins to; every process must call it.

        Raises:
            UserError: in every process, unless told to carry on: this checkpoint or, in the background, the one before
                cannot be written. Those that were there already are untouched.
        """
        self.finish()
        if self._step == state.progress.step:
            return
        start = time.perf_counter()
        taken = snapshot(state, copy=self.background, into=self._copy)
        self._copy = taken if self.background else None
        self._step, self._target = state.progress.step, self.root / f"step-{state.progress.step}"
        if taken is not None and self.background:
            self._writer = threading.Thread(target=self._write, args=(taken,), name="checkpoint")
            self._writer.start()
        elif taken is not None:
            self._write(taken)
        self.seconds += time.perf_counter() - start
        if not self.background:
            self.finish()

    def finish(self) -> Path | None:
        """Waits for what is being written; every process must call it.

        Returns:
            the checkpoint that was saved last, None if there is none or it could not be written.

        Raises:
            UserError: as `save`.
        """
        if self._target is None:
            return None if self._step is None else self.root / f"step-{self._step}"
        start = time.perf_counter()
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        [fault, *_] = gather_object([self._fault])
        self.seconds += time.perf_counter() - start
        target, self._target, self._fault = self._target, None, None
        if fault is None:
            return target
        self._step = None
        if not self.carry_on:
            raise UserError(fault)
        if self.accelerator.is_main_process:
            logger.warning("%s Training goes on without it.", fault)
        return None

    def newest(self) -> Path | None:
        """The last checkpoint on the disk, of this process alone: for when the others may be gone."""
        if self._writer is not None:
            self._writer.join()
        return newest(self.root)

    def _write(self, taken: Snapshot) -> None:
        try:
            write(self.root, taken, self.keep)
        except UserError as error:
            self._fault = str(error)
        except Exception as error:
            if not self.background:
                raise
            # It would end the thread, and look like a checkpoint.
            self._fault = f"cannot write the checkpoint step-{taken.step} to {self.root}: {error!r}."


def snapshot(state: TrainingState, copy: bool, into: Snapshot | None) -> Snapshot | None:
    """The state brought to the main process, None in the others; every process must call it.

    Args:
        copy: of everything, so that training may go on. Otherwise it shares memory with the model and the optimiser
            where these are on the CPU.
        into: a former copy, which is overwritten: fresh memory costs several times as much as copying.
    """
    accelerator = state.accelerator
    main = accelerator.is_main_process
    processes = gather_object([{"rng": random_states(), "stream": state.stream}])
    tensors = {
        "weights": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "ema": state.ema.state_dict() if state.ema is not None else None,
    }
    former = None if into is None else {"weights": into.weights, **into.shared}
    tensors = to_host(tensors, copy, main, former)
    if not main:
        return None
    shared = {
        "optimizer": tensors["optimizer"],
        "scheduler": state.scheduler.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "ema": tensors["ema"],
    }
    progress = dataclasses.asdict(state.progress)
    return Snapshot(state.progress.step, tensors["weights"], shared, processes, progress)


def to_host(value: Any, copy: bool, keep: bool, into: Any = None) -> Any:
    """A nested structure with whole tensors on the CPU, those of FSDP brought together; None where `keep` is False."""
    if isinstance(value, dict):
        former = into if isinstance(into, dict) else {}
        result: Any = {name: to_host(item, copy, keep, former.get(name)) for name, item in value.items()}
    elif isinstance(value, (list, tuple)):
        result = type(value)(to_host(item, copy, keep) for item in value)
    elif not isinstance(value, torch.Tensor):
        result = value
    else:
        tensor = whole(value).detach()
        if not keep:
            return None
        alike = isinstance(into, torch.Tensor) and (into.shape, into.dtype) == (tensor.shape, tensor.dtype)
        result = into.copy_(tensor) if copy and alike else tensor.to("cpu", copy=copy)
    return result if keep else None


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP has distributed, brought together; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write(root: Path, taken: Snapshot, keep: int) -> None:
    """Writes a snapshot as `root/step-N`; the main process alone.

    Raises:
        UserError: it cannot be written; what was there is untouched.
    """
    target = root / f"step-{taken.step}"
    temporary = root / f".writing-step-{taken.step}"
    try:
        if is_complete(target):
            return
        for left_over in root.glob(".writing-step-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        make_folder(temporary)
        if shutil.disk_usage(root).free < taken.size and keep > 1:
            # Makes room with what would be deleted afterwards anyway, and never with the newest.
            prune(root, keep - 1, taken.best)
        if shutil.disk_usage(root).free < taken.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        weights = {name: tensor.contiguous() for name, tensor in taken.weights.items()}
        save_file(weights, str(temporary / "model.safetensors"), metadata={"format": "pt"})
        let_others_read(temporary)
        save_tensors(taken.shared, temporary / "state.pt")
        save_tensors(taken.processes, temporary / "processes.pt")
        progress = to_json(taken.progress, indent=2)
        (temporary / "progress.json").write_text(progress, encoding="utf-8")
        seal(temporary)
        if target.exists():
            # Not complete, or it would have been used above.
            target.rename(free_name(root / f"broken-{target.name}"))
        temporary.rename(target)
        sync(root)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = failure(error, root, taken.size)
        # Half a checkpoint on a full disk is in the way of everything else.
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint {target.name} to {root}: {reason}. Those before it are as they were."
        ) from error
    prune(root, keep, taken.best)


def save_tensors(value: Any, path: Path) -> None:
    # To a file of Python's: given a path, PyTorch says "unexpected pos" for whatever the system says.
    with path.open("wb") as file:
        torch.save(value, file)


def failure(error: BaseException, root: Path, needed: int) -> str:
    """What the system said, in words; `needed` and free bytes where it is about space."""
    current: BaseException | None = error
    number = None
    while current is not None and number is None:
        told = re.search(r"os error (\d+)", str(current))  # safetensors says it in its text
        number = current.errno if isinstance(current, OSError) else int(told.group(1)) if told else None
        current = current.__cause__ or current.__context__
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "a file of it would be larger than is allowed here",
    }
    if number not in reasons:
        return (os.strerror(number) if number else str(error)).rstrip(".")
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(root).free
        return f"{reasons[number]}: it needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
    return reasons[number]


def load(path: Path, state: TrainingState) -> Progress:
    """Brings everything in `state` to where the checkpoint was; every process must call it.

    A process that the saved run did not have keeps its own random state.

    Returns:
        the progress as it was saved, `num_processes` and `global_batch` included, which may be others now.

    Raises:
        UserError: the checkpoint belongs to another architecture, other labels or other settings, or is damaged.
    """
    with telling_of_damage(path):
        progress = Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))
        check_fits(path, state, progress)
        shared = load_models(path, state)
        parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
        optimizer = shared["optimizer"]
        optimizer["state"] = {
            index: like(values, dict.fromkeys(values, parameters[index]))
            for index, values in optimizer["state"].items()
        }
        state.optimizer.load_state_dict(optimizer)
        state.scheduler.load_state_dict(shared["scheduler"])
        if state.accelerator.scaler is not None and shared["scaler"]:
            state.accelerator.scaler.load_state_dict(shared["scaler"])
        processes = torch.load(path / "processes.pt", map_location="cpu", weights_only=True)
        if state.accelerator.process_index < len(processes):
            set_random_states(processes[state.accelerator.process_index]["rng"])
        streams = [process["stream"] for process in processes]
        state.streams = streams if all(streams) else None
    for name in set(vars(progress)) - {"num_processes", "global_batch", "label_names", "choices"}:
        setattr(state.progress, name, getattr(progress, name))
    return progress


def load_models(path: Path, state: TrainingState) -> dict[str, Any]:
    """Brings the model and its moving average to where the checkpoint was; every process must call it.

    Returns:
        the content of `state.pt`.
    """
    weights = load_file(str(path / "model.safetensors"))
    state.model.load_state_dict(like(weights, state.model.state_dict(keep_vars=True)))
    shared = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    if (shared["ema"] is None) != (state.ema is None):
        there = "without" if shared["ema"] is None else "with"
        raise UserError(f"{path} was made {there} --ema_decay; go on with the same setting.")
    if state.ema is not None:
        state.ema.load_state_dict(shared["ema"])
    return shared


def load_best(root: Path, state: TrainingState) -> None:
    """Brings the model and its moving average to where they were best; every process must call it.

    Raises:
        UserError: in every process: the checkpoint is gone or damaged.
    """
    path = root / f"step-{state.progress.best['step']}"
    fault = found_by_main(lambda: fault_of(path))
    if fault:
        raise UserError(f"the best checkpoint, {path}, cannot be used: {fault}.")
    with telling_of_damage(path):
        load_models(path, state)


@contextlib.contextmanager
def telling_of_damage(path: Path) -> Iterator[None]:
    """Turns what libraries say about a checkpoint that they cannot read into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise UserError(f"{path} cannot be read as a checkpoint of this run: {error}") from error


def choices_of(path: Path) -> dict[str, Any]:
    """`Progress.choices` of a checkpoint, before there is anything to load it into."""
    return json.loads((path / "progress.json").read_text(encoding="utf-8")).get("choices", {})


def like(values: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """Whole tensors distributed as those they belong to, where these are."""
    return {
        name: distribute_tensor(value.to(models[name].device), models[name].device_mesh, models[name].placements)
        if isinstance(models.get(name), DTensor) and value.shape == models[name].shape
        else value
        for name, value in values.items()
    }


def check_fits(path: Path, state: TrainingState, progress: Progress) -> None:
    if progress.label_names != state.progress.label_names:
        raise UserError(
            f"{path} was trained on other labels ({few(progress.label_names)}) than the dataset has "
            f"({few(state.progress.label_names)})."
        )
    check_method(path, progress.method, state.progress.method)
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


def check_method(path: Path, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    for name in {**theirs, **mine}:
        if name not in theirs or name not in mine:
            made = f"{'with' if name in theirs else 'without'} --{name}"
        elif theirs[name] != mine[name]:
            made = "with another --teacher" if name == "teacher" else f"with --{name} {theirs[name]}"
        else:
            continue
        raise UserError(f"{path} was made {made}; go on with the same setting.")


def find(spec: str | None, root: Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means.

    Args:
        spec: `latest`, or a checkpoint's folder; None to begin anew.
        root: where `latest` looks. Checkpoints that are incomplete or damaged are passed over with a warning.

    Returns:
        the folder, or None if there is none to go on from.

    Raises:
        UserError: the given folder is not a complete checkpoint.
    """
    if not spec:
        return None
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
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The N of a folder `step-N`; -1 if it has another name."""
    match = STEP.search(path.name)
    return int(match.group(1)) if match else -1


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
    (folder / MARKER).write_text(to_json({"files": files}, indent=2), encoding="utf-8")
    sync(folder / MARKER)
    sync(folder)


def prune(root: Path, keep: int, best: int | None = None) -> None:
    """Deletes the oldest complete checkpoints beyond `keep`, 0 keeps all, and never that of the step `best`."""
    complete = [path for path in all_steps(root) if (path / MARKER).is_file()]
    for path in complete[: max(len(complete) - keep, 0)] if keep else []:
        if step_of(path) == best:
            continue
        # Unmarked first: a deletion that is cut short must not leave something that looks complete.
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def newest(root: Path) -> Path | None:
    """The last checkpoint that was finished; whether it is damaged, `find` would look."""
    return next((path for path in reversed(all_steps(root)) if (path / MARKER).is_file()), None)


def set_aside(root: Path, after: int = -1) -> None:
    """Moves checkpoints of steps `after` some step out of the way of another run, into `root/previous-N`."""
    steps = [path for path in all_steps(root) if step_of(path) > after]
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
