"""Whether an export computes what the model computes: the same images through both, before it is declared done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..training.errors import UserError
from .formats import activation_of, pixel_affine, scores
from .images import Sample
from .runtime import ExportedModel


# Largest difference of a logit, relative to the largest logit of its batch: what rounding explains in that arithmetic,
# with room for another order of summation and the depth of the largest models. Of int8 the root of the mean squares is
# held against that of the logits instead: a single one may be far off where the classes that count agree.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 0.25}
# Share of images whose best class stays the same; asked of int8, where rounding is no longer small.
AGREEMENT = {"int8": 0.95}
# Images at a time.
CHUNK = 16


@dataclass
class Check:
    """One comparison of outputs of this `shape`. `error` is as TOLERANCES says, `agreement` the share of images (of a
    segmenter, pixels) with the same best class."""

    images: str
    shape: list[int]
    error: float
    agreement: float
    passed: bool


@dataclass
class Report:
    """
    What `verification.json` says.

    Attributes:
        agreement: over all real images.
        accuracy, accuracy_before: of the export and of the model, where the images have labels.
        size, size_before: bytes of the graph and of the model's weights in float32.
        seconds, seconds_before: of one image in a batch, on this machine, as it was while verifying: a rough figure.
    """

    precision: str
    tolerance: float
    least_agreement: float | None
    checks: list[Check] = field(default_factory=list)
    agreement: float | None = None
    accuracy: float | None = None
    accuracy_before: float | None = None
    size: int = 0
    size_before: int = 0
    seconds: float | None = None
    seconds_before: float | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def verify(
    exported: ExportedModel,
    model: nn.Module,
    samples: list[Sample],
    *,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """
    Compares an export with the model it was made of, which runs in float32.

    Real images first, all of them; then batches of other numbers and, where the export takes them, other sizes: noise,
    which no norm and no activation can hide from.

    Args:
        model: in inference mode, on the CPU.
        samples: real images.

    Raises:
        UserError: a check failed; the message says which.
    """
    precision = exported.manifest.precision
    report = Report(precision, TOLERANCES[precision], AGREEMENT.get(precision))
    report.size_before = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    same = correct = correct_before = labelled = total = 0
    spent = spent_before = 0.0
    for sample in samples:
        for start in range(0, len(sample.pixel_values), CHUNK):
            progress(f"comparing on images: {start} of {len(sample.pixel_values)}")
            pixel_values = sample.pixel_values[start : start + CHUNK]
            began = time.perf_counter()
            right = reference(model, pixel_values)
            middle = time.perf_counter()
            got = exported(pixel_values).logits
            if start:  # the first batch compiles
                spent_before += middle - began
                spent += time.perf_counter() - middle
            report.checks.append(compare(exported, got, right, sample.name, report))
            total += len(pixel_values)
            same += report.checks[-1].agreement * len(pixel_values)
            if sample.labels is not None and right.ndim == 2:
                labels = sample.labels[start : start + CHUNK]
                labelled += len(labels)
                correct += int((got.argmax(1) == labels).sum())
                correct_before += int((right.argmax(1) == labels).sum())
    report.agreement = same / total
    if labelled:
        report.accuracy, report.accuracy_before = correct / labelled, correct_before / labelled
    timed = total - sum(min(len(sample.pixel_values), CHUNK) for sample in samples)
    if timed:
        report.seconds, report.seconds_before = spent / timed, spent_before / timed
    for theirs, pixel_values in random_batches(exported):
        progress("comparing on noise")
        size = "x".join(map(str, pixel_values.shape[2:]))
        right = reference(model, pixel_values)
        report.checks.append(compare(exported, exported(theirs).logits, right, f"noise of {size} pixels", report))
    if report.least_agreement is not None and report.agreement < report.least_agreement:
        raise UserError(
            f"the export chooses the same class as the model for {report.agreement:.1%} of the images only, "
            f"{report.least_agreement:.0%} are asked for; calibrate on more images of the kind the model is for"
        )
    failed = next((check for check in report.checks if not check.passed), None)
    if failed is not None:
        raise UserError(
            f"the export is not what the model is: on {failed.images} the outputs, {tuple(failed.shape)}, are off by "
            f"{failed.error:.1e}, allowed are {report.tolerance:g} in {precision}"
        )
    return report


@torch.inference_mode()
def reference(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=pixel_values).logits


def random_batches(exported: ExportedModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Noise, as the export takes it and as the model takes it: one image, three, and other sizes if it takes any."""
    manifest = exported.manifest
    if manifest.precision == "int8":
        return  # calibrated for images; of noise it promises nothing
    generator = torch.Generator().manual_seed(0)
    height, width = manifest.image_size
    sizes = [(1, height, width), (3, height, width)]
    if manifest.dynamic_size:
        sizes += [(2, height + 32, width), (1, height + 13, width + 45)]
    for number, *size in sizes:
        if manifest.preprocessing:
            shape = (number, *size, manifest.num_channels)
            raw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            scale, shift = pixel_affine(exported.image_processor, manifest.num_channels)
            yield raw, (raw * scale + shift).float().permute(0, 3, 1, 2).contiguous()
        else:
            noise = torch.randn(number, manifest.num_channels, *size, generator=generator)
            yield noise, noise


def compare(exported: ExportedModel, got: torch.Tensor, right: torch.Tensor, images: str, report: Report) -> Check:
    """Of logits (B, classes, ...); where the graph ends in probabilities, of those."""
    if got.shape != right.shape:
        raise UserError(f"the export gives logits of shape {tuple(got.shape)}, the model {tuple(right.shape)}")
    agreement = (got.argmax(1) == right.argmax(1)).double().mean().item()
    if exported.manifest.preprocessing:
        kind = activation_of(exported.config)
        got, right = scores(got, kind), scores(right, kind)
    difference = (got - right).double()
    if report.precision == "int8":
        error = difference.square().mean().sqrt() / right.double().square().mean().sqrt().clamp(min=1e-12)
    else:
        error = difference.abs().max() / right.abs().max().clamp(min=1e-12)
    passed = bool(error <= report.tolerance)  # which NaN does not
    return Check(images, list(right.shape), error.item(), agreement, passed)
