"""What was found of a module, for as long as nothing of it has changed."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .backends import Decision
from .plain_modules import has_global_hooks, is_as_defined


def remembered(find: Callable[..., Any], module: nn.Module, x: torch.Tensor, decision: Decision) -> Any:
    """find(module, x, decision), which looks at a hundred things for each block, only if something has changed."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    asked = decision, x.dtype, x.device, x.shape[1:], autocast
    # On the module, with which it goes: a table of all modules would keep those alive that refer to themselves.
    known = vars(module).setdefault("_found_for_kernels", Found()).by_function
    last = known.get(find)
    # Replicas and shallow copies share what lies on the module that they are of.
    if last is None or last[1] != asked or last[0].module is not module or not last[0].holds():
        last = known[find] = Snapshot(module), asked, find(module, x, decision)
    return last[2]


class Found:
    """What was found of a module, when, and for what, by the function that found it. Copies start anew."""

    def __init__(self):
        self.by_function: dict[Callable[..., Any], tuple[Snapshot, tuple, Any]] = {}

    def __reduce__(self):
        return Found, ()


class Snapshot:
    """All attributes of a module and of those within, as they are now."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._modules = list(module.modules())
        self._classes = list(map(type, self._modules))
        parts = list(map(vars, self._modules))
        # What may change in place: parameters, hooks and the like.
        containers = [value for own in parts for value in own.values() if isinstance(value, dict | list | set)]
        self._empty = [each for each in containers if not each]
        self._now = parts + [each for each in containers if each]
        self._then = [copy.copy(each) for each in self._now]
        self._parameters = [own["_parameters"] for own in parts]
        self._tensors = self._find_tensors()
        self._layouts = [(each.shape, each.dtype, each.device) for each in self._tensors]

    def _find_tensors(self) -> list[torch.Tensor]:
        return [tensor for own in self._parameters for tensor in own.values() if tensor is not None]

    def holds(self) -> bool:
        """Whether nothing has changed; neither has a class that was replaced a method, nor is there a global hook."""
        try:
            same = not any(self._empty) and all(map(operator.eq, self._now, self._then))
        except RuntimeError:  # of two tensors, one of which stands in the place of the other
            return False
        return (
            same
            # Two of one number may be equal, and yet be two.
            and all(map(operator.is_, self._find_tensors(), self._tensors))
            and all(
                tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
                for tensor, (shape, dtype, device) in zip(self._tensors, self._layouts, strict=True)
            )
            and self._classes == list(map(type, self._modules))
            and all(map(is_as_defined, set(self._classes)))
            and not has_global_hooks()
        )
