"""What a format of exports is: how its files are written, opened and spoken of.

Another format is a class in a file of its own, as in `onnx.py`, and an entry in `formats.FORMATS`. Flags, folder,
runtime, verification, quantisation, card and benchmark ask it. Such files import torch and the format's libraries in
the methods that need them: `--help` lists the formats at once, and a library that is missing is one readable line.
"""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..foundation.errors import UserError


if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from .folder import Manifest

    Run = Callable[..., Any]  # of a tensor one; of a detector of its inputs, a tuple


# The largest error, see `verification.Check`, that is put down to rounding in that arithmetic. Small models of every
# family, and published sizes with fresh weights, showed up to 2e-5, 7e-3 and 6e-2 in the first three; that of int8 is
# a choice.
TOLERANCES = {"float32": 5e-4, "float16": 2e-2, "bfloat16": 0.1, "int8": 0.25}
PRECISIONS = tuple(TOLERANCES)
"""What `export_model` knows as `precision`; each format has some of them."""


@dataclass
class Layer:
    """A convolution or matrix product with weights; `spatial` if it looks at more than one position."""

    name: str
    spatial: bool


class ExportFormat(abc.ABC):
    """
    A format of exports. Of the methods a new one needs `write` and `open`, and for int8 those after `open_whole`.

    Attributes:
        name: for --format and `export.json`.
        runtime: what opens the file, as people call it.
        file: the file that the runtime opens; others of the graph have the same name with another ending.
        precisions: of PRECISIONS, those that the file can hold, and that its runtime here can run and so verify.
        missing_because: why it has not one of the others.
        libraries: that write and open it, by the names they are imported by; `extra` of this package installs them.
        options: those of `export_model` that only this format has, with their defaults.
        hub_library: `library_name` in the card's metadata.
        holds_code: loading a file may run code of whoever wrote it.
        has_providers: `open` takes some.
        detector_precisions: of `precisions`, those for detectors, whose graphs end in suppression.
        whole: the file starts at images of any size, which its graph resizes, and ends in probabilities, and other
            files lie beside it: such a format has the methods from `check_model` to `open_images`, too.
        most_images: that a graph takes at once; None for any number, decided when it is called.
        sizes: of images: "any", "limited" (of a classifier one, unless told otherwise; else there is a largest), or
            "one".
        by_way_of_onnx: it has `write_from_onnx`.
        quantiser: what makes it int8.
    """

    name: ClassVar[str]
    runtime: ClassVar[str]
    file: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    missing_because: ClassVar[dict[str, str]] = {}
    libraries: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = "export"
    options: ClassVar[dict[str, Any]] = {}
    hub_library: ClassVar[str | None] = None
    holds_code: ClassVar[bool] = False
    has_providers: ClassVar[bool] = False
    detector_precisions: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[bool] = False
    most_images: ClassVar[int | None] = None
    sizes: ClassVar[str] = "any"
    by_way_of_onnx: ClassVar[bool] = True
    quantiser: ClassVar[str] = "NNCF post-training quantisation"

    def check_options(self, **options: Any) -> None:  # noqa: B027, a format need not have any
        """
        Raises:
            UserError: a value of one of `options` that there is not.
        """

    def default_precision(self, calibrated: bool) -> str:
        """What is written if nobody says it; `calibrated` if there are images to calibrate on."""
        return "float32"

    def libraries_for(self, precision: str) -> tuple[str, ...]:
        return (*self.libraries, "nncf") if precision == "int8" else self.libraries

    def check_installed(self, precision: str) -> None:
        """
        Raises:
            UserError: a library is not installed.
        """
        missing = [name for name in self.libraries_for(precision) if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"{', '.join(missing)} not installed: {self.installation}")

    @property
    def installation(self) -> str:
        return f"pip install 'hf-poolformer[{self.extra}]'"

    def tolerance(self, precision: str) -> float:
        """The largest error that is put down to rounding; see `verification.Check`."""
        return TOLERANCES[precision]

    def arithmetic(self, precision: str) -> str:
        """What the runtime here computes in, and what else the same file may be computed in."""
        if precision == "int8":
            return "int8 products, float32 between them"
        return precision if precision == "float32" else f"{precision}; the classifier's head in float32"

    def arithmetic_elsewhere(self, precision: str) -> str | None:
        """The floating point that other machines compute the file in, where the runtime here takes float32."""
        return None

    def description(self, manifest: Manifest) -> str:
        """For the card."""
        return self.runtime

    def input_description(self, manifest: Manifest) -> str | None:
        """Of what the graph takes, for the card; None for what all formats take."""
        return None

    def dtype(self, precision: str) -> str:
        """What the graph that `write` gets computes in."""
        return "float32"

    def adapt(self, model: nn.Module, precision: str) -> None:  # noqa: B027, nor change anything
        """Changes a folded model, before it is written, to what suits the runtime."""

    @abc.abstractmethod
    def write(self, module: nn.Module, example: Any, path: Path, manifest: Manifest) -> None:
        """
        Writes the graph, in floating point.

        Args:
            module: takes `example`, uint8 (2, height, width, channels) or float32 (2, channels, height, width), and
                gives float32; see `DetectorDeployable` for what those take and give.
            example: to follow the graph with.
            path: of the file.
            manifest: which axes may vary (see `deployable.dynamic_shapes`), what input and output are called, and this
                format's options.
        """

    def write_from_onnx(self, source: Path, path: Path, precision: str) -> None:
        """Writes an ONNX graph in float32, for formats that are made by way of one."""
        raise NotImplementedError

    @abc.abstractmethod
    def open(self, path: Path, manifest: Manifest, threads: int, providers: Sequence[str] | None = None) -> Run:
        """
        The graph as a function of a tensor on the CPU, as `write` says, but of any number of images.

        Args:
            path: of the file.
            manifest: that `write` had.
            threads: of the CPU.
            providers: of onnxruntime, in the order of preference.

        Raises:
            Exception: whatever a runtime says to a damaged file.
        """

    def open_whole(self, path: Path, manifest: Manifest, threads: int) -> Run | None:
        """The same without cutting batches into pieces; None for a runtime that does not cut them."""
        return None

    # What `whole` asks for.

    def check_model(self, name: str, model: nn.Module, processor: Any, gives: str) -> None:  # noqa: B027
        """
        Args:
            name: of the model.
            gives: what its task gives, see `foundation.tasks.Task`.

        Raises:
            UserError: the format cannot hold it.
        """

    def takes_sizes(self, processor: Any, asked: bool | None) -> bool | None:
        """Whether the model's part takes images of several sizes, by what the user asked for; None: if it can."""
        return asked

    def gather(self, precision: str, **options: Any) -> Any:  # noqa: B027
        """
        What has to be fetched from elsewhere, before anything is computed; `finish` gets it.

        Raises:
            UserError: it cannot be had.
        """

    def finish(  # noqa: B027
        self,
        folder: Path,
        manifest: Manifest,
        processor: Any,
        config: Any,
        spread: Callable[[], torch.Tensor],
        gathered: Any,
    ) -> None:
        """
        Completes the graph, which is written and quantised, and writes what lies beside it.

        Args:
            spread: gives what each output of the model varies by over images, (outputs,).
        """

    def open_images(self, path: Path, threads: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """A function of uint8 (height, width, 3): pixels (1, rows, columns, channels), and answers (1, outputs)."""
        raise NotImplementedError

    def computed_by(self, path: Path) -> str | None:
        """Who computes the operations of a graph, where several may."""
        return None

    # What quantisation asks for.

    def read_graph(self, path: Path) -> Any:
        """A graph as `quantise` takes it."""
        raise NotImplementedError

    def save_graph(self, graph: Any, path: Path) -> None:
        """Writes what `quantise` gave."""
        raise NotImplementedError

    def quantise(self, graph: Any, chunks: list[np.ndarray], ignored: list[str], *, attention: bool) -> Any:
        """
        A graph with products in 8 bits.

        Args:
            graph: as `read_graph` gives it.
            chunks: images to calibrate on.
            ignored: names of the layers that stay in floating point.
            attention: whether there is any, which NNCF treats in a way of its own.
        """
        import nncf

        name = self.input_name(graph)
        return nncf.quantize(
            graph,
            nncf.Dataset(chunks, lambda chunk: {name: chunk}),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER if attention else None,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(chunks),
            ignored_scope=nncf.IgnoredScope(names=ignored) if ignored else None,
        )

    def input_name(self, graph: Any) -> str:
        raise NotImplementedError

    def layers(self, graph: Any) -> list[Layer]:
        """Convolutions and matrix products, in their order."""
        raise NotImplementedError
