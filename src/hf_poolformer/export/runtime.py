"""Using an exported folder: `load(folder)` behaves like the model it was made of, for inference."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, modeling_outputs
from transformers.models.auto import modeling_auto
from transformers.utils import ModelOutput

from ..data.transforms import channels_of
from ..foundation.errors import UserError, one_line
from ..foundation.exported import is_exported
from ..foundation.scores import activation_of
from ..foundation.tasks import TASKS
from .deployable import pixel_affine
from .folder import Manifest
from .formats import FORMATS, in_words


# In levels of 255: normalising and back again moves 8-bit pixels by less, those that have more by up to a half.
MOST_ROUNDED = 0.05


def load(
    folder: str | os.PathLike,
    *,
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> ExportedModel:
    """
    A model that `export_model` wrote, ready to be called like the one it was made of.

        model = load("outputs/pets-int8")
        pipeline("image-classification", model=model, image_processor=model.image_processor)

    Threads may share it. It can be copied, pickled and sent to other processes, which open the folder again: it has to
    be there still, and unchanged.

    Args:
        folder: that `export_model` wrote.
        threads: of the CPU; PyTorch's number if None.
        providers: of onnxruntime, in the order of preference, say `["CUDAExecutionProvider"]`; the CPU if None.
        trust_remote_code: load a format whose files can hold code: "torch", which PyTorch unpickles, or runs as
            machine code if they are compiled.

    Raises:
        UserError: not an exported model, incomplete, changed, damaged, not trusted, of a newer version, or its runtime
            is not installed.
    """
    folder = Path(folder).absolute()
    manifest = Manifest.read(folder)
    format = FORMATS[manifest.format]
    if format.holds_code and not trust_remote_code:
        harmless = in_words([other.runtime for other in FORMATS.values() if not other.holds_code])
        raise UserError(
            f"{folder} is made for {format.runtime} and may run any code while it is loaded: trust_remote_code "
            f"(--trust_remote_code) loads it, if you know where it is from. Files for {harmless} hold no code"
        )
    manifest.check_files(folder)
    if providers is not None and not format.has_providers:
        raise UserError(f"{folder} is made for {format.runtime}, which has no providers")
    try:
        config = AutoConfig.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{folder} cannot be loaded: {one_line(error)}") from error
    run = Graph(folder / manifest.file, manifest, threads, providers)
    return ExportedModel(run, manifest, config, image_processor_of(manifest, processor))


def image_processor_of(manifest: Manifest, processor: Any) -> Any:
    """What prepares images for the graph: the model's, or less of it where the graph resizes by itself."""
    if not manifest.resizes:
        return processor
    from .photographs import unprocessed

    return unprocessed(processor)


def load_classifier(folder: str | os.PathLike, trust_remote_code: bool = False) -> tuple[ExportedModel, Any]:
    """
    An exported image classifier, of one label, several or numbers, and its image processor.

    Raises:
        UserError: as `load`, and for a segmenter.
    """
    from ..foundation.loading import check_colours

    model = load(folder, trust_remote_code=trust_remote_code)
    if TASKS[model.manifest.task].gives != "scores":
        raise UserError(f"{folder} is an export of another task: {model.manifest.task}")
    check_colours(str(folder), model.config, model.image_processor)
    return model, model.image_processor


class ExportedModel(nn.Module):
    """
    An exported model in its runtime, with the call signature of the model it was made of.

    A module without parameters: `to`, `eval` and the like are there and change nothing; what it computes in was
    decided when it was exported. Inputs may be on any device, and so will be the logits.

    Attributes:
        config: the model's, with `id2label`.
        image_processor: the model's; of a graph that resizes, one that only decodes.
        manifest: what `export.json` says.
        dtype: of `pixel_values`.
    """

    main_input_name = "pixel_values"
    input_modalities = output_modalities = ("image",)

    def __init__(self, run: Callable[..., Any], manifest: Manifest, config: Any, processor: Any):
        super().__init__()
        self.run = run
        self.manifest, self.config, self.image_processor = manifest, config, processor
        self.dtype = torch.float32
        # Tells exports apart where somebody asks for the state dict to know whether predictions are of one model.
        identity = hashlib.sha256("".join(sorted(manifest.files.values())).encode()).digest()
        self.register_buffer("identity", torch.tensor(list(identity), dtype=torch.uint8))

    @property
    def device(self) -> torch.device:
        return self.identity.device

    def can_generate(self) -> bool:
        return False

    def forward(
        self,
        pixel_values: torch.Tensor | np.ndarray | None = None,
        pixel_mask: torch.Tensor | np.ndarray | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width) as the image processor makes them; of an export with
                preprocessing also uint8 (batch, height, width, channels).
            pixel_mask: (batch, height, width), of a detector: 1 on the images, 0 on their padding.
            kwargs: of the model's call; nothing reads them.

        Returns:
            `logits`, (batch, num_labels), of a segmenter (batch, num_labels, height / 4, width / 4). Of an export with
            preprocessing these are logarithms of the probabilities, which softmax and sigmoid turn into those again;
            of a segmenter then `segmentation`, see `ClassMaps`. A detector gives what the model gives.

        Raises:
            ValueError: another shape than the graph takes.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        pixel_values = torch.as_tensor(pixel_values)
        device = pixel_values.device
        if TASKS[self.manifest.task].gives == "objects":
            from .detection import answer_each

            mask = None if pixel_mask is None else torch.as_tensor(pixel_mask)
            found = answer_each(self, pixel_values.cpu(), mask)
            return type(found)(**{name: value.to(device) for name, value in found.items()})
        outputs = self.run(self.prepare(pixel_values.cpu()))
        if self.manifest.resizes:
            from .photographs import ClassMaps

            return ClassMaps(segmentation=outputs.long().to(device))
        if self.manifest.preprocessing:
            outputs = scores_to_logits(outputs, self.config)
        return getattr(modeling_outputs, TASKS[self.manifest.task].exported_output)(logits=outputs.to(device))

    def prepare(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the graph takes: float32 (B, C, H, W), or uint8 (B, H, W, C)."""
        manifest, channels = self.manifest, self.manifest.num_channels
        raw = pixel_values.dtype == torch.uint8
        axis = 3 if raw else 1
        if pixel_values.ndim != 4 or pixel_values.shape[axis] != channels or (raw and not manifest.preprocessing):
            wanted = f"(batch, {channels}, height, width) of floating point"
            if manifest.preprocessing:
                wanted += f" or (batch, height, width, {channels}) of uint8"
            raise ValueError(
                f"pixel_values must be {wanted}, but have shape {tuple(pixel_values.shape)} and are "
                f"{pixel_values.dtype}"
            )
        if not len(pixel_values):
            raise ValueError("pixel_values hold no image")
        size = tuple(pixel_values.shape[1:3] if raw else pixel_values.shape[2:])
        if not manifest.dynamic_size and size != tuple(manifest.image_size):
            height, width = manifest.image_size
            raise ValueError(f"this export takes images of {height}x{width} pixels, not of {size[0]}x{size[1]}")
        if min(size) < manifest.least_size:
            least = manifest.least_size
            raise ValueError(
                f"this export takes images of {least}x{least} pixels and more, not of {size[0]}x{size[1]}"
            )
        if manifest.most_size is not None and max(size) > manifest.most_size:
            most = manifest.most_size
            raise ValueError(f"this export takes images of {most}x{most} pixels at most, not of {size[0]}x{size[1]}")
        if manifest.preprocessing and not raw:
            # The image processor has normalised already; back to the pixels they were.
            scale, shift = (value.float()[:, None, None] for value in pixel_affine(self.image_processor, channels))
            levels = (pixel_values.float() - shift) / scale
            pixels = levels.round().clamp(0, 255)
            if manifest.resizes and (levels - pixels).abs().max() > MOST_ROUNDED:
                raise ValueError(
                    "this export takes images as they were stored, with pixels of 0 to 255: prepare them by its own "
                    "image_processor, or give uint8"
                )
            if channels_of(self.image_processor) != 3 and (levels - pixels).abs().max() > MOST_ROUNDED:
                raise UserError(
                    "this export takes pixels of 8 bits, and these images have more: export the model without "
                    "--preprocessing"
                )
            return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return pixel_values if raw else pixel_values.float().contiguous()


def scores_to_logits(scores: torch.Tensor, config: Any) -> torch.Tensor:
    """Logits whose softmax, sigmoid or identity (as the configuration's problem asks for) is `scores`."""
    kind = activation_of(config)
    if kind is None:
        return scores
    tiny = torch.finfo(torch.float32).tiny
    if kind == "sigmoid":
        return scores.clamp(min=tiny).log() - (1 - scores).clamp(min=tiny).log()
    return scores.clamp(min=tiny).log()


_of_parents: list[dict[str, Any]] = []


class Graph:
    """
    The graph of a file in its runtime: a function of what it takes, for any number of threads.

    Copies are the graph itself. A process that gets it by unpickling or by a fork opens the file for itself: sessions
    and threads of a runtime do not travel.

    Args:
        path: the graph's file in the folder of an export.
        threads: of the CPU; PyTorch's number if None.
        providers: of onnxruntime.

    Raises:
        UserError: the runtime is not installed, or cannot read the file.
    """

    def __init__(
        self, path: Path, manifest: Manifest, threads: int | None = None, providers: Sequence[str] | None = None
    ):
        self.path, self.manifest, self.asked = path, manifest, (threads, providers)
        self.start()

    def start(self) -> None:
        self.process = os.getpid()
        threads, providers = self.asked
        format = FORMATS[self.manifest.format]
        try:
            # PyTorch's number is one in the workers of a DataLoader.
            self.run = format.open(self.path, self.manifest, threads or torch.get_num_threads(), providers)
        except ImportError as error:
            raise UserError(f"{error.name} is not installed: {format.installation}") from error
        except UserError:
            raise
        except Exception as error:
            # Whatever a runtime says to a damaged file.
            raise UserError(f"{self.path.parent} cannot be loaded: {one_line(error)}") from error

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if self.process != os.getpid():
            # The parent's is not let go: it would wait for threads that a fork does not take along.
            _of_parents.append(self.__dict__.copy())
            check_unchanged(self.path.parent, self.manifest)
            self.start()
        return self.run(*inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return reopen, (self.path, self.manifest, *self.asked)

    def __copy__(self) -> Graph:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Graph:
        return self


def reopen(path: Path, manifest: Manifest, threads: int | None, providers: Sequence[str] | None) -> Graph:
    """
    What pickles of a graph hold.

    Raises:
        UserError: the folder is not there any more, or is not what it was.
    """
    check_unchanged(path.parent, manifest)
    return Graph(path, manifest, threads, providers)


def check_unchanged(folder: Path, manifest: Manifest) -> None:
    if not is_exported(folder):
        raise UserError(
            f"{folder} is gone, which this exported model runs from: every process needs the folder at the same place"
        )
    if Manifest.read(folder) != manifest:
        raise UserError(f"{folder} holds another export than the one this model was loaded from: load it again")
    manifest.check_files(folder)


# The pipelines call classes unsupported that their tables do not name. The key is no model type, so that nothing else
# reads it.
for table in (
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
):
    table["hf_poolformer export"] = ExportedModel.__name__
