"""CUDA graphs: all kernels of a forward launched at once, as they were recorded.

For a few images a GPU computes a forward faster than a CPU can launch it. A CUDA graph records the launches of one
forward, for one shape of images, and repeats them with a single one, on the memory that it was recorded with.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..kernels import GRAPHING


logger = logging.getLogger(__name__)

# Of one model; each holds the memory of a forward.
MOST = 8
# Forwards before one is recorded, in which libraries choose their kernels and make their workspaces.
REHEARSALS = 2


def graphed(model: nn.Module) -> Graphed:
    """
    The model for inference, in which a GPU repeats recorded launches: several times as fast for single images.

    ```python
    model = graphed(AutoModelForImageClassification.from_pretrained("sail/poolformer_s12").cuda().eval())
    with torch.inference_mode():
        logits = model(pixel_values=images).logits
    ```

    A graph is recorded when a shape of images comes for the second time, for at most eight shapes. Everything else
    runs as it does without: on other devices, in training, with gradients, with other arguments than `pixel_values`,
    and models that cannot be recorded, because their forward waits for the GPU. Results are the caller's own.

    Weights may change in place; if one is replaced or moved, all is recorded anew. Of other changes to the model (a
    hook, its configuration), a graph knows nothing: call `graphed` again.

    Args:
        model: any whose forward takes `pixel_values`.
    """
    return Graphed(model)


class Graphed:
    """What `graphed` returns. `model` is the model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._recordings: dict[tuple, Recording | None] = {}  # None for what came once, or cannot be recorded
        self._refused: set[tuple] = set()
        self._weights: list[tuple[dict[str, Any], str, torch.Tensor, int]] = []
        self._lock = threading.Lock()  # one input and one output for all threads

    def __call__(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """As the model's forward."""
        if kwargs or not can_record(pixel_values, self.model):
            return self.model(pixel_values=pixel_values, **kwargs)
        device = pixel_values.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (pixel_values.shape, pixel_values.stride(), pixel_values.dtype, pixel_values.device, autocast)
        with self._lock:
            recording = self._recording(key, pixel_values)
            if recording is not None:
                return tree_map(_copied, recording(pixel_values))
        return self.model(pixel_values=pixel_values)

    def _recording(self, key: tuple, pixel_values: torch.Tensor) -> Recording | None:
        """The graph for images of this kind, recorded if they come for the second time."""
        if self._recordings and not all(map(_is_in_place, self._weights)):
            self._recordings.clear()
        if not self._recordings:
            self._weights = _places(self.model)
        if key not in self._recordings:
            if len(self._recordings) < MOST:
                self._recordings[key] = None
            return None
        if self._recordings[key] is None and key not in self._refused:
            others = (recording for recording in self._recordings.values() if recording is not None)
            pool = next((recording.pool for recording in others), None)
            try:
                self._recordings[key] = Recording(lambda x: self.model(pixel_values=x), pixel_values, pool)
            except RuntimeError as error:
                self._refused.add(key)
                logger.warning("This model runs without a CUDA graph: %s", str(error).partition("\n")[0])
        return self._recordings[key]


def can_record(pixel_values: torch.Tensor, model: nn.Module) -> bool:
    """Whether this is inference on a CUDA GPU that is not being recorded already."""
    return (
        pixel_values.is_cuda
        and not model.training
        and not torch.is_grad_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


class Recording:
    """
    A CUDA graph of `run(images)`, for images of the shape and memory format of these; no gradients.

    Calling it with others repeats it; the result is overwritten by the next call.

    Raises:
        RuntimeError: `run` waits for the GPU, or copies to or from it.
    """

    def __init__(self, run: Callable[[torch.Tensor], Any], images: torch.Tensor, pool: Any = None):
        # Tensors of inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._input = torch.empty_like(images).copy_(images)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            token = GRAPHING.set(True)
            try:
                with torch.cuda.stream(stream):
                    for _ in range(REHEARSALS):
                        run(self._input)
                torch.cuda.current_stream().wait_stream(stream)
                self._graph = torch.cuda.CUDAGraph()
                # Other threads may do as they please meanwhile: workers pin memory.
                with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                    self._output = run(self._input)
            finally:
                GRAPHING.reset(token)

    @property
    def pool(self) -> Any:
        """Of memory, which graphs that never run at once may share."""
        return self._graph.pool()

    def __call__(self, images: torch.Tensor) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            self._input.copy_(images)
            self._graph.replay()
        return self._output


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _places(model: nn.Module) -> list[tuple[dict[str, Any], str, torch.Tensor, int]]:
    """Where a model keeps its weights, the weights, and where these lie."""
    return [
        (owner, name, tensor, tensor.data_ptr())
        for module in model.modules()
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        if tensor is not None
    ]


def _is_in_place(place: tuple[dict[str, Any], str, torch.Tensor, int]) -> bool:
    owner, name, tensor, address = place
    return owner.get(name) is tensor and tensor.data_ptr() == address
