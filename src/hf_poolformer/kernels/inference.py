"""Branches in sequence without gradients, by Triton's kernels, and what they launched repeated for the next images.

A GPU computes an operation on a few images in a fraction of the time that it takes to get there: the dispatcher,
custom operations in Python, shapes, tiles and allocations. So a stage runs its branches as plain functions, and what
one knows of the statistics of its result, the next one need not read the result for. Which kernels were launched, and
where their arguments lay, is recorded; images of the same shape then take a loop over the launches. Weights are read
anew each time, from where they lie, so they may change; a weight that has moved makes a new recording.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .channel_mlp import mlp
from .launch import INTERPRETED, RECORDER, on, whole_grid
from .pool_mixer import mix
from .separable_conv import separate
from .statistics import sample_statistics, token_statistics


# Of a branch: the name of its operation, and that operation's arguments beside x, as in `backends.py`.
Branch = tuple[str, dict[str, Any]]
# Stage -> what is the same for images of one kind -> their recording, None where there can be none.
_recordings: WeakKeyDictionary[nn.Module, dict[tuple, "Recording | None"]] = WeakKeyDictionary()
# Of one stage.
MOST = 8
# Bytes that each tensor of a recording begins at a multiple of, as the allocator's do.
ALIGNMENT = 512


def infer(
    stage: nn.Module,
    x: torch.Tensor,
    branches: list[Branch],
    dtype: torch.dtype,
    statistics: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    x (B, C, H, W) in channels_last memory, through "pool_mixer", "channel_mlp" and "separable_conv".

    Args:
        stage: whose branches they are.
        dtype: of products.
        statistics: (B, 2) of x, where they are known.
    """
    values = [value for _, arguments in branches for value in arguments.values()]
    weights = [value for value in values if isinstance(value, torch.Tensor)]
    inputs = [x] if statistics is None else [x, statistics]
    # What the launches were compiled for, and what they read again.
    layouts = [*(each.data_ptr() % 16 for each in inputs), *((each.dtype, each.is_contiguous()) for each in weights)]
    places = [weight.data_ptr() for weight in weights]
    rest = [None if isinstance(value, torch.Tensor) else value for value in values]
    kind = (x.shape, x.dtype, x.device, dtype, len(inputs), *(name for name, _ in branches), *rest)
    with on(x):
        known = _recordings.setdefault(stage, {})
        recording = known.get(kind)
        if recording is not None and recording.places == places and recording.layouts == layouts:
            return recording.repeat(*inputs)
        if INTERPRETED or (recording is None and (kind in known or len(known) >= MOST)):
            return run(x, branches, dtype, statistics)
        made = 0 if recording is None else recording.made
        recorder = Recorder([*inputs, *weights])
        token = RECORDER.set(recorder)
        try:
            with recorder:
                y = run(x, branches, dtype, statistics)
        finally:
            RECORDER.reset(token)
        # Weights that move all the time are not worth it.
        worth = recorder.is_complete and made < MOST
        known[kind] = Recording(recorder, y, places, layouts, made + 1) if worth else None
        return y


def run(x: torch.Tensor, branches: list[Branch], dtype: torch.dtype, statistics: torch.Tensor | None) -> torch.Tensor:
    for place, (name, arguments) in enumerate(branches):
        following = branches[place + 1] if place + 1 < len(branches) else None
        x, statistics = BRANCHES[name](x, statistics, takes_samples(following), dtype, **arguments)
    return x


def takes_samples(branch: Branch | None) -> bool:
    """Whether a branch begins with the statistics of samples."""
    return branch is not None and (branch[0] == "pool_mixer" or branch[1].get("norm") == "group")


def _pool_mixer(x, statistics, with_statistics, dtype, *, pool_size, eps, weight, layer_scale, res_scale):
    if statistics is None:
        statistics = sample_statistics(x)
    scales = _contiguous(weight, layer_scale, res_scale)
    y, statistics = mix(x, statistics, *scales, None, pool_size, eps, with_statistics)
    return y, statistics if with_statistics else None


def _channel_mlp(
    x,
    statistics,
    with_statistics,
    dtype,
    *,
    norm,
    activation,
    eps,
    norm_weight,
    norm_bias,
    weight1,
    bias1,
    weight2,
    bias2,
    act_scale,
    act_bias,
    layer_scale,
    res_scale,
):
    if norm == "channel":
        statistics, with_statistics = token_statistics(x), False
    elif statistics is None:
        statistics = sample_statistics(x)
    tensors = (norm_weight, norm_bias, weight1.flatten(1), bias1, weight2.flatten(1), bias2, act_scale, act_bias)
    tensors = _contiguous(*tensors, layer_scale, res_scale)
    y, statistics, _, _ = mlp(x, statistics, *tensors, None, activation, eps, dtype, False, with_statistics)
    return y, statistics if with_statistics else None


def _separable_conv(
    x,
    statistics,
    with_statistics,
    dtype,
    *,
    eps,
    norm_weight,
    weight1,
    act_scale,
    act_bias,
    depthwise_weight,
    weight2,
    layer_scale,
    res_scale,
):
    tensors = (norm_weight, weight1.flatten(1), act_scale, act_bias, depthwise_weight, weight2.flatten(1))
    y, _ = separate(x, *_contiguous(*tensors, layer_scale, res_scale), None, eps, dtype, False)
    return y, None


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


# Each takes x, its statistics of samples if they are known, whether those of the result are wanted, the dtype of
# products, and the branch's arguments; it returns the result and its statistics, or None.
BRANCHES = {"pool_mixer": _pool_mixer, "channel_mlp": _channel_mlp, "separable_conv": _separable_conv}


# ---------------------------------------------------------------------------------------------------------------------
# Recordings


class Place(NamedTuple):
    """Where an argument lies: in what was given (owner 0 and on), or in memory allocated meanwhile (below 0)."""

    owner: int
    offset: int = 0  # bytes


class Launch(NamedTuple):
    """One launch of a kernel; arguments are places of tensors, or values."""

    start: Callable[..., None]
    arguments: tuple[Any, ...]


class Recorder(TorchDispatchMode):
    """
    Records launches, and the allocations that they work on.

    Anything else that PyTorch computes meanwhile would be missing in a repetition, so the recording is not complete.
    """

    ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

    def __init__(self, given: list[torch.Tensor]):
        super().__init__()
        self.launches: list[Launch] = []
        self.sizes: list[int] = []  # of allocations, bytes
        self.is_complete = True
        self.given = len(given)
        self._given = {tensor.data_ptr(): Place(index) for index, tensor in enumerate(given)}
        # Of the last allocation at an address: one that was freed before may have begun there, too.
        self._allocated: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self.ALLOCATIONS:
            storage = result.untyped_storage()
            self._allocated[storage.data_ptr()] = len(self.sizes)
            self.sizes.append(storage.nbytes())
        elif not function.is_view:
            self.is_complete = False
        return result

    def __call__(self, found: tuple[Any, tuple] | None, grid: tuple[int, ...], arguments: tuple) -> None:
        if found is None:  # not launched: another thread compiles it
            self.is_complete = False
            return
        compiled, constants = found
        places = [self.place(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        self.launches.append(Launch(compiled[whole_grid(grid)], (*places, *constants)))

    def place(self, tensor: torch.Tensor) -> Place:
        start = tensor.untyped_storage().data_ptr()
        if start in self._allocated:
            return Place(-1 - self._allocated[start], tensor.data_ptr() - start)
        place = self._given.get(tensor.data_ptr())
        if place is None:
            self.is_complete = False
            return Place(0)
        return place


class Recording:
    """
    Launches that can be repeated for another input.

    Args:
        recorder: which was given the inputs, then the weights.
        y: the result.
        places: addresses of the weights.
        layouts: what else must be the same: see `infer`.
        made: how often this stage was recorded for such images.
    """

    def __init__(self, recorder: Recorder, y: torch.Tensor, places: list[int], layouts: list, made: int):
        self.places, self.layouts, self.made = places, layouts, made
        self._shape, self._dtype = y.shape, y.dtype
        launches, result, given = recorder.launches, recorder.place(y), recorder.given
        offsets, self.bytes = share(recorder.sizes, lifetimes(launches), -1 - result.owner)
        # All that arguments can be: what is given, allocations by their offsets, the result, and values.
        constants: list[Any] = []
        slots: dict[Place, int] = {}
        self._offsets: list[int] = []
        for launch in launches:
            for argument in launch.arguments:
                allocated = isinstance(argument, Place) and argument.owner < 0 and argument.owner != result.owner
                if allocated and argument not in slots:
                    slots[argument] = given + len(self._offsets)
                    self._offsets.append(offsets[-1 - argument.owner] + argument.offset)
        end = given + len(self._offsets)
        self._steps = []
        for launch in launches:
            indices = []
            for argument in launch.arguments:
                if not isinstance(argument, Place):
                    indices.append(end + 1 + len(constants))
                    constants.append(argument)
                elif argument.owner >= 0:
                    indices.append(argument.owner)
                else:
                    indices.append(slots.get(argument, end))
            self._steps.append((launch.start, operator.itemgetter(*indices)))
        self._constants = constants

    def repeat(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The same for other inputs, whose shapes, dtypes and devices are those that were recorded."""
        device = inputs[0].device
        y = torch.empty(self._shape, dtype=self._dtype, device=device, memory_format=torch.channels_last)
        memory = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        start = memory.data_ptr()
        arguments = [each.data_ptr() for each in inputs]
        arguments += self.places
        arguments += [start + offset for offset in self._offsets]
        arguments.append(y.data_ptr())
        arguments += self._constants
        active = triton.runtime.driver.active
        stream = active.get_current_stream(active.get_current_device())
        for launch, chosen in self._steps:
            launch(*chosen(arguments), stream=stream)
        return y


def lifetimes(launches: list[Launch]) -> dict[int, tuple[int, int]]:
    """Of each allocation that launches work on, the first and the last of them."""
    found: dict[int, tuple[int, int]] = {}
    for index, launch in enumerate(launches):
        for argument in launch.arguments:
            if isinstance(argument, Place) and argument.owner < 0:
                allocation = -1 - argument.owner
                found[allocation] = found.get(allocation, (index, index))[0], index
    return found


def share(sizes: list[int], lives: dict[int, tuple[int, int]], apart: int) -> tuple[dict[int, int], int]:
    """
    Offsets of allocations in memory that those share which live at different times, and its bytes; none for the one
    that is `apart`.
    """
    offsets: dict[int, int] = {}
    for allocation in sorted(lives, key=lambda each: -sizes[each]):
        if allocation == apart:
            continue
        first, last = lives[allocation]
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if lives[other][0] <= last and first <= lives[other][1]
        )
        offset = 0
        for start, end in taken:
            if offset + sizes[allocation] <= start:
                break
            offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[allocation] = offset
    return offsets, max((offsets[each] + sizes[each] for each in offsets), default=0)
