"""Launches that were recorded once, and are repeated for other tensors of the same kinds.

Getting to a launch takes Python longer than the launch: shapes, tiles, allocations, and what was compiled. A function
that does nothing but launch kernels on what it is given, and on memory that it allocates, does the same for tensors of
the same kinds. So its first call is recorded, and later ones are a loop over the launches. Memory that only the
function itself uses is one allocation, which tensors share that are needed at different times.
"""

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from .launch import INTERPRETED, RECORDER, on, whole_grid


# Recordings of one function.
MOST = 16
# Bytes that each tensor begins at a multiple of, as the allocator's do.
ALIGNMENT = 512
Tensors = Sequence[torch.Tensor | None]


class Recorded:
    """
    A function of tensors, recorded when it is called for the first time with such ones.

    Args:
        function: from (tensors or None, other arguments) to a list of tensors or None. The results are what it was
            given, or allocated and handed to kernels. It does nothing else with tensors but launching kernels and
            calling libraries (`by_library`); if it does, all calls are calls of the function.
    """

    def __init__(self, function: Callable[..., list[torch.Tensor | None]]):
        self._function = function
        self._recordings: dict[Hashable, Recording | None] = {}  # None where there can be none

    def __call__(self, given: Tensors, *others: Any, kind: Hashable = None) -> list[torch.Tensor | None]:
        """
        Args:
            given: all tensors that it works on.
            kind: what else decides about the launches.
        """
        first = next(each for each in given if each is not None)
        key = kind, first.device, _same(given), *map(_kind, given)
        if INTERPRETED or (key not in self._recordings and len(self._recordings) >= MOST):
            return self._function(given, *others)
        if key in self._recordings:
            recording = self._recordings[key]
            if recording is None:
                return self._function(given, *others)
            with on(first):
                return recording.repeat(given)
        recorder = Recorder(given)
        token = RECORDER.set(recorder)
        try:
            with recorder:
                results = self._function(given, *others)
        finally:
            RECORDER.reset(token)
        if recorder.is_compiled:
            recording = Recording(recorder, results)
            self._recordings[key] = recording if recorder.is_complete else None
        return results


def _same(given: Tensors) -> Hashable:
    """Which tensors lie where others do, as shared weights do: they need not always."""
    places = [index if each is None else each.data_ptr() for index, each in enumerate(given)]
    return None if len(set(places)) == len(places) else tuple(map(places.index, places))


def _kind(tensor: torch.Tensor | None) -> Hashable:
    """What launches are compiled for, and how they divide their work."""
    if tensor is None:
        return None
    layout = True if tensor.is_contiguous() else tensor.stride()
    return tensor.shape, tensor.dtype, layout, tensor.data_ptr() % 16


# ---------------------------------------------------------------------------------------------------------------------
# Recording


class Place(NamedTuple):
    """Where an argument lies: in what was given (owner 0 and on), or in memory allocated meanwhile (below 0)."""

    owner: int
    offset: int = 0  # bytes


class View(NamedTuple):
    """A tensor, for what is no kernel."""

    place: Place
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Launch(NamedTuple):
    """One launch of a kernel; arguments are places of tensors, or values."""

    start: Callable[..., None]
    arguments: tuple[Any, ...]


class Call(NamedTuple):
    """One call of a library, whose result is allocated by it."""

    function: Callable[..., torch.Tensor]
    operands: tuple[View | None, ...]
    result: Place


class Recorder(TorchDispatchMode):
    """
    Records launches and calls of libraries, and the allocations that they work on.

    Anything else that PyTorch computes meanwhile would be missing in a repetition, so the recording is not complete.
    """

    ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

    def __init__(self, given: Tensors):
        super().__init__()
        self.steps: list[Launch | Call] = []
        self.sizes: list[int] = []  # of allocations, bytes
        self.is_complete = True
        self.is_compiled = True
        self.given = given
        self.made: dict[int, tuple] = {}  # layouts of the results of calls
        self._calls = False
        self._places = {each.data_ptr(): Place(index) for index, each in enumerate(given) if each is not None}
        # Of the last allocation at an address: one that was freed before may have begun there, too.
        self._allocated: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self._calls:
            return result
        if function.overloadpacket.__name__ in self.ALLOCATIONS:
            self._allocate(result)
        elif not function.is_view:
            self.is_complete = False
        return result

    def __call__(self, found: tuple[Any, tuple] | None, grid: tuple[int, ...], arguments: tuple) -> None:
        """A launch; see `launch.RECORDER`."""
        if found is None:  # not launched: another thread compiles it
            self.is_complete = self.is_compiled = False
            return
        compiled, constants = found
        places = [self.place(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        self.steps.append(Launch(compiled[whole_grid(grid)], (*places, *constants)))

    def call(self, function: Callable[..., torch.Tensor], operands: Tensors) -> torch.Tensor:
        """See `launch.by_library`."""
        self._calls = True
        try:
            result = function(*operands)
        finally:
            self._calls = False
        views = tuple(None if each is None else self._view(each) for each in operands)
        self._allocate(result)
        self.is_complete &= result.is_contiguous() and result.storage_offset() == 0
        self.steps.append(Call(function, views, self.place(result)))
        self.made[-1 - self.steps[-1].result.owner] = layout_of(result)
        return result

    def _allocate(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._allocated[storage.data_ptr()] = len(self.sizes)
        self.sizes.append(storage.nbytes())

    def _view(self, tensor: torch.Tensor) -> View:
        return View(self.place(tensor), tensor.shape, tensor.stride(), tensor.dtype)

    def place(self, tensor: torch.Tensor) -> Place:
        start = tensor.untyped_storage().data_ptr()
        if start in self._allocated:
            return Place(-1 - self._allocated[start], tensor.data_ptr() - start)
        place = self._places.get(tensor.data_ptr())
        if place is None:
            self.is_complete = False
            return Place(0)
        return place


# ---------------------------------------------------------------------------------------------------------------------
# Repetition


class Recording:
    """What a complete recorder recorded, to be repeated for other tensors; and the results of then."""

    def __init__(self, recorder: Recorder, results: Tensors):
        steps, self._given = recorder.steps, len(recorder.given)
        places = [None if each is None else recorder.place(each) for each in results]
        recorder.is_complete &= all(place is None or place.offset == 0 for place in places)
        self._results = [None if place is None else place.owner for place in places]
        # What is a tensor, and not only an address, at some time.
        called = {
            -1 - place.owner
            for step in steps
            if isinstance(step, Call)
            for place in places_of(step)
            if place.owner < 0
        }
        given_out = {-1 - place.owner for place in places if place is not None and place.owner < 0}
        # Of results that are allocated before all else.
        self._made: dict[int, tuple] = {}
        for each, place in zip(results, places, strict=True):
            if place is not None and place.owner < 0:
                found = recorder.made if -1 - place.owner in recorder.made else self._made
                recorder.is_complete &= found.setdefault(-1 - place.owner, layout_of(each)) == layout_of(each)
        lives = lifetimes(steps)
        # Tensors of their own: results, and operands and results of calls.
        offsets, self.bytes = share(
            recorder.sizes, {key: live for key, live in lives.items() if key not in called | given_out}
        )
        # What arguments can be: what is given, allocations (by their slots), and values.
        self._slots: list[tuple[int, int]] = []  # slot, offset in the memory that is shared
        slots: dict[Place, int] = {}
        owned: dict[int, list[tuple[int, int]]] = {key: [] for key in called | given_out}
        self._constants: list[Any] = []
        arguments = [argument for step in steps if isinstance(step, Launch) for argument in step.arguments]
        for argument in arguments:
            if isinstance(argument, Place) and argument.owner < 0 and argument not in slots:
                slots[argument] = self._given + len(slots)
                key = -1 - argument.owner
                if key in offsets:
                    self._slots.append((slots[argument], offsets[key] + argument.offset))
                else:
                    owned[key].append((slots[argument], argument.offset))
        self._end = self._given + len(slots)
        self._owned = {key: owned[key] for key in self._made}
        self._steps: list[Callable[..., None] | tuple] = []
        for index, step in enumerate(steps):
            for key, (first, _) in lives.items():
                if first == index and key in called - given_out and key not in recorder.made:
                    self._steps.append((allocate(key, recorder.sizes[key], owned[key]), None))
            if isinstance(step, Launch):
                indices = []
                for argument in step.arguments:
                    if not isinstance(argument, Place):
                        indices.append(self._end + len(self._constants))
                        self._constants.append(argument)
                    else:
                        indices.append(argument.owner if argument.owner >= 0 else slots[argument])
                self._steps.append((step.start, operator.itemgetter(*indices)))
            else:
                self._steps.append((call(step, owned[-1 - step.result.owner]), None))
            ended = [key for key, (_, last) in lives.items() if last == index and key in called - given_out]
            if ended:
                self._steps.append((free(ended), None))

    def repeat(self, given: Tensors) -> list[torch.Tensor | None]:
        device = next(each.device for each in given if each is not None)
        memory = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        start = memory.data_ptr()
        arguments: list[Any] = [None if each is None else each.data_ptr() for each in given]
        arguments += [None] * (self._end - self._given)
        arguments += self._constants
        for slot, offset in self._slots:
            arguments[slot] = start + offset
        owned: dict[int, torch.Tensor] = {}
        for key, (shape, strides, dtype) in self._made.items():
            owned[key] = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for slot, offset in self._owned[key]:
                arguments[slot] = owned[key].data_ptr() + offset
        active = triton.runtime.driver.active
        stream = active.get_current_stream(active.get_current_device())
        for run, chosen in self._steps:
            if chosen is None:
                run(given, owned, arguments)
            else:
                run(*chosen(arguments), stream=stream)
        return [None if each is None else given[each] if each >= 0 else owned[-1 - each] for each in self._results]


def allocate(key: int, size: int, slots: list[tuple[int, int]]) -> Callable[..., None]:
    def run(given: Tensors, owned: dict[int, torch.Tensor], arguments: list[Any]) -> None:
        device = next(each.device for each in given if each is not None)
        tensor = owned[key] = torch.empty(size, dtype=torch.uint8, device=device)
        for slot, offset in slots:
            arguments[slot] = tensor.data_ptr() + offset

    return run


def free(keys: list[int]) -> Callable[..., None]:
    def run(given: Tensors, owned: dict[int, torch.Tensor], arguments: list[Any]) -> None:
        for key in keys:
            del owned[key]

    return run


def call(step: Call, slots: list[tuple[int, int]]) -> Callable[..., None]:
    function, operands, key = step.function, step.operands, -1 - step.result.owner

    def tensor(view: View | None, given: Tensors, owned: dict[int, torch.Tensor]) -> torch.Tensor | None:
        if view is None:
            return None
        (owner, offset), shape, strides, dtype = view
        base = given[owner] if owner >= 0 else owned[-1 - owner]
        if offset == 0 and base.shape == shape and base.stride() == strides and base.dtype == dtype:
            return base
        if base.dtype != dtype:
            base = base.view(dtype)
        return base.as_strided(shape, strides, base.storage_offset() + offset // base.itemsize)

    def run(given: Tensors, owned: dict[int, torch.Tensor], arguments: list[Any]) -> None:
        result = owned[key] = function(*[tensor(view, given, owned) for view in operands])
        for slot, offset in slots:
            arguments[slot] = result.data_ptr() + offset

    return run


def layout_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def places_of(step: Launch | Call) -> list[Place]:
    if isinstance(step, Call):
        return [*(view.place for view in step.operands if view is not None), step.result]
    return [argument for argument in step.arguments if isinstance(argument, Place)]


def lifetimes(steps: Sequence[Launch | Call]) -> dict[int, tuple[int, int]]:
    """Of each allocation that steps work on, the first and the last of them."""
    found: dict[int, tuple[int, int]] = {}
    for index, step in enumerate(steps):
        for place in places_of(step):
            if place.owner < 0:
                key = -1 - place.owner
                found[key] = found.get(key, (index, index))[0], index
    return found


def share(sizes: Sequence[int], lives: dict[int, tuple[int, int]]) -> tuple[dict[int, int], int]:
    """Offsets of allocations in memory that those share which live at different times, and its bytes."""
    offsets: dict[int, int] = {}
    for key in sorted(lives, key=lambda each: -sizes[each]):
        first, last = lives[key]
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if lives[other][0] <= last and first <= lives[other][1]
        )
        offset = 0
        for start, end in taken:
            if offset + sizes[key] <= start:
                break
            offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[key] = offset
    return offsets, max((offsets[each] + sizes[each] for each in offsets), default=0)
