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

from .launch import INTERPRETED, RECORDER, on, product_of_transposed, whole_grid


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
            `transposed_product`; if it does, all calls are calls of the function.
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


class Product(NamedTuple):
    """One `transposed_product`, whose result is allocated by it."""

    left: View
    right: View
    result: Place


class Recorder(TorchDispatchMode):
    """
    Records launches and products, and the allocations that they work on.

    Anything else that PyTorch computes meanwhile would be missing in a repetition, so the recording is not complete.
    """

    ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

    def __init__(self, given: Tensors):
        super().__init__()
        self.steps: list[Launch | Product] = []
        self.sizes: list[int] = []  # of allocations, bytes
        self.is_complete = True
        self.is_compiled = True
        self.given = given
        self._multiplies = False
        self._places = {each.data_ptr(): Place(index) for index, each in enumerate(given) if each is not None}
        # Of the last allocation at an address: one that was freed before may have begun there, too.
        self._allocated: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self.ALLOCATIONS:
            self._allocate(result)
        elif not (function.is_view or self._multiplies):
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

    def multiply(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`product_of_transposed`, recorded."""
        self._multiplies = True
        result = product_of_transposed(left, right)
        self._multiplies = False
        self._allocate(result)
        self.steps.append(Product(self._view(left), self._view(right), self.place(result)))
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
        multiplied = {
            -1 - place.owner
            for step in steps
            if isinstance(step, Product)
            for place in places_of(step)
            if place.owner < 0
        }
        given_out = {-1 - place.owner for place in places if place is not None and place.owner < 0}
        products = {-1 - step.result.owner for step in steps if isinstance(step, Product)}
        # Of results that are allocated before all else.
        self._made: dict[int, tuple] = {}
        for each, place in zip(results, places, strict=True):
            if place is not None and place.owner < 0 and -1 - place.owner not in products:
                layout = each.shape, each.stride(), each.dtype
                recorder.is_complete &= self._made.setdefault(-1 - place.owner, layout) == layout
        lives = lifetimes(steps)
        # Tensors of their own: results, and operands and results of products.
        offsets, self.bytes = share(
            recorder.sizes, {key: live for key, live in lives.items() if key not in multiplied | given_out}
        )
        # What arguments can be: what is given, allocations (by their slots), and values.
        self._slots: list[tuple[int, int]] = []  # slot, offset in the memory that is shared
        slots: dict[Place, int] = {}
        owned: dict[int, list[tuple[int, int]]] = {key: [] for key in multiplied | given_out}
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
                if first == index and key in multiplied - given_out - products:
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
                self._steps.append((multiply(step, owned[-1 - step.result.owner]), None))
            ended = [key for key, (_, last) in lives.items() if last == index and key in multiplied - given_out]
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


def multiply(step: Product, slots: list[tuple[int, int]]) -> Callable[..., None]:
    def tensor(view: View, given: Tensors, owned: dict[int, torch.Tensor]) -> torch.Tensor:
        base = given[view.place.owner] if view.place.owner >= 0 else owned[-1 - view.place.owner]
        if base.dtype != view.dtype:
            base = base.view(view.dtype)
        return base.as_strided(view.shape, view.strides, base.storage_offset() + view.place.offset // base.itemsize)

    def run(given: Tensors, owned: dict[int, torch.Tensor], arguments: list[Any]) -> None:
        result = product_of_transposed(tensor(step.left, given, owned), tensor(step.right, given, owned))
        owned[-1 - step.result.owner] = result
        for slot, offset in slots:
            arguments[slot] = result.data_ptr() + offset

    return run


def places_of(step: Launch | Product) -> list[Place]:
    if isinstance(step, Product):
        return [step.left.place, step.right.place, step.result]
    return [argument for argument in step.arguments if isinstance(argument, Place)]


def lifetimes(steps: Sequence[Launch | Product]) -> dict[int, tuple[int, int]]:
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
