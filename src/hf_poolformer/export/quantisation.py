"""Eight bits after training: the folded graph, calibrated on images, with the layers that hurt left alone.

Weights are symmetric per output channel, activations asymmetric (GELU's are), convolutions and matrix products become
integer products. What is left of the norms, and the mixer, stay in floating point. Where too many answers change, the
layers that tend to suffer most are left in floating point, too, one group more at each attempt, and the attempt that
agrees best is kept.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..foundation.errors import UserError, one_line
from .deployable import quiet_loggers
from .format import ExportFormat, Layer


# Agreement with the model, on the calibration images, at which no more layers are left out.
ENOUGH = 0.99
# Images of a calibration step.
CHUNK = 4


@dataclass
class Quality:
    """
    Of an attempt on the calibration images: agreement and error as `verification` has them, and if they pass.

    Of numbers the agreement is the share of their variance that is left, of the output where it is least.
    """

    agreement: float
    error: float
    passed: bool


@dataclass
class Attempt:
    """One quantisation: what stayed in floating point, in how many layers, and what came of it."""

    left_out: str
    layers: int
    quality: Quality

    @property
    def rank(self) -> tuple[bool, float, float]:
        return self.quality.passed, self.quality.agreement, -self.quality.error


def quantise(
    format: ExportFormat,
    path: Path,
    inputs: np.ndarray,
    evaluate: Callable[[Path], Quality],
    *,
    attention: bool,
    keep_last: bool = False,
    leave: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """
    Replaces a graph in float32, which lies at `path` as `ExportFormat.read_graph` takes it, by its quantised form.

    Args:
        inputs: images to calibrate on, as the graph takes them, (N, ...).
        evaluate: compares a graph that lies in a file with the model.
        attention: whether there is any.
        keep_last: leave the last layer in floating point in any case.
        leave: the same of so many of the first, which are no layers of the model.

    Returns:
        what the manifest says about it.

    Raises:
        UserError: this graph cannot be quantised.
    """
    with quiet(), tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        attempts: list[Attempt] = []
        layers = format.layers(format.read_graph(path))
        always, layers = [layer.name for layer in layers[:leave]], layers[leave:]
        for left_out, ignored in groups(layers, keep_last).items():
            progress(f"quantising, in floating point: {left_out}")
            model = format.read_graph(path)
            chunks = [inputs[start : start + CHUNK] for start in range(0, len(inputs), CHUNK)]
            try:
                quantised = format.quantise(model, chunks, always + ignored, attention=attention)
            except Exception as error:
                raise UserError(f"the model cannot be quantised: {one_line(error)}") from error
            folder = Path(scratch, str(len(attempts)))
            folder.mkdir()
            format.save_graph(quantised, folder / path.name)
            try:
                quality = evaluate(folder / path.name)
            except UserError:
                raise
            except Exception as error:  # whatever a runtime says to a graph that it cannot run
                raise UserError(
                    f"{format.runtime} cannot run the quantised model: {one_line(error)}; take --precision float32"
                ) from error
            attempts.append(Attempt(left_out, len(ignored), quality))
            if attempts[-1].quality.passed and attempts[-1].quality.agreement >= ENOUGH:
                break
        best = max(range(len(attempts)), key=lambda index: attempts[index].rank)
        for file in Path(scratch, str(best)).iterdir():
            file.replace(path.parent / file.name)
    return {
        "method": format.quantiser,
        "images": len(inputs),
        "quantised_layers": len(layers) - attempts[best].layers,
        "left_in_floating_point": attempts[best].left_out,
        "attempts": [asdict(attempt) for attempt in attempts],
    }


def groups(layers: list[Layer], keep_last: bool = False) -> dict[str, list[str]]:
    """What may be left in floating point, from nothing or the last layer on, and the names of those layers."""
    ends = [layers[0].name, layers[-1].name]
    between = [layer.name for layer in layers if layer.spatial]
    return {
        **({"the last layer": ends[1:]} if keep_last else {"nothing": []}),
        "the first and the last layer": list(dict.fromkeys(ends)),
        "those and all convolutions wider than 1x1": list(dict.fromkeys([*ends, *between])),
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """NNCF shows bars and remarks of its own, and reports its use to its makers unless told not to when imported."""
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"

    try:
        with (
            quiet_loggers("nncf", "torch.utils.cpp_extension"),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            yield
    finally:
        if before is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = before
