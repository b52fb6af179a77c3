"""Whether an export computes what the model computes: the same images through both, before it is declared done.

A difference counts by what it is next to: the spread of that output over the images. An offset that all answers have
in common (a price of 300 and a bit) makes no error smaller, and of an output that stays the same for all images, where
the model's varies, the error is 1. Units have floors where the spread says nothing:

- LOGIT changes a probability by a few hundredths at most, and a part of it, or of SCORE, is seen by nobody;
- float32 itself leaves open RESOLUTION of a number's size: so much is no error, even of what does not vary at all;
- of one class of many, an output is held to at least a tenth of what the others vary by, against which it competes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ..data.transforms import prepare
from ..foundation.errors import UserError, one_line
from ..foundation.finite import check_finite
from ..foundation.scores import MULTI_LABEL, REGRESSION, activated, activation_of, thresholds_of
from ..foundation.tasks import TASKS, task_of_problem
from .deployable import pixel_affine
from .folder import Manifest
from .formats import FORMATS
from .images import Sample, in_channels
from .runtime import ExportedModel, scores_to_logits


# Of 8 bits, where what is chosen is asked for, too: the numbers behind it may be off by more. The worst of the 1000
# outputs of poolformer_s12 with fresh weights showed 0.6; one that no longer varies has 1.
TOLERANCE_OF_CHOICES = 0.75
# Share of images (labels, pixels) for which the choice stays the same.
LEAST_AGREEMENT = 0.95
# Choices as close as this, in units of the spread, are a tie, which rounding may turn.
TIE = 0.1
LOGIT, SCORE, RESOLUTION = 0.1, 0.02, 2e-6
# Fewer images than this do not show what an output varies by.
FEWEST = 8
# Images at a time; of segmenters, whose outputs are large; and as many as the slow arithmetic of `emulated` gets.
CHUNK, CHUNK_OF_MAPS, EMULATED = 16, 4, 16
# Levels of 255 by which pixels that the graph resizes may differ from the image processor's: its two backends differ
# by as many.
MOST_LEVELS = 2
# What the agreement is of, per kind of answer.
AGREEMENT = {
    "classes": "same best class",
    "labels": "same side of its threshold, over all labels",
    "numbers": "correlation, of the output where it is least",
    "pixels": "pixels of the same class",
    "objects": "detections with a partner",
}
RULE = (
    "The same images went through this graph and through the model in float32, in {count} batches; the root of the "
    "mean square of an output's differences, relative to how far that output spreads over the images, may be "
    "{tolerance:g}."
)


@dataclass
class Check:
    """
    One comparison of outputs of this `shape`.

    Attributes:
        error: root of the mean square of the differences over the images, of the worst output, in units of that
            output's spread over the images.
        difference, unit: the same difference, and the spread, in the model's own units.
        output: which one that is.
        agreement: as `Report.agreement`; None where the images are too few to tell.
        allowed: largest error; None where any finite answer passes.
    """

    images: str
    shape: list[int]
    error: float
    difference: float
    unit: float
    output: int
    agreement: float | None
    allowed: float | None
    passed: bool

    def __str__(self) -> str:
        return (
            f"{self.difference:.2g}, which is {self.error:.1e} of the output's spread over the images (allowed "
            f"{self.allowed:g})"
        )


@dataclass
class Report:
    """
    What `verification.json` says.

    Attributes:
        kind: of answers: "classes" (one of many), "labels", "numbers", "pixels" or "objects".
        arithmetic: what was checked, and where the file may be computed in another.
        tolerance: the largest error allowed, see `Check`.
        agreement: over all real images; `agreement_is` says of what.
        accuracy, accuracy_before: of the export and of the model, where the images have a class each.
        figures, figures_before: the same of several labels and of numbers, where the images have such: what an
            evaluation calls `eval_average_precision` or `eval_mae`, say, is `average_precision` and `mae` here.
        size, size_before: bytes of the graph and of the model's weights in float32.
        rule: how it was compared, for the card.
        resizing: of a graph that resizes images itself, on how many its pixels were compared with the image
            processor's, the largest difference in levels of 255, and the share of pixels in which there is one.
    """

    precision: str
    kind: str
    arithmetic: str
    tolerance: float
    agreement_is: str
    checks: list[Check] = field(default_factory=list)
    agreement: float | None = None
    accuracy: float | None = None
    accuracy_before: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    figures_before: dict[str, float] = field(default_factory=dict)
    size: int = 0
    size_before: int = 0
    rule: str = ""
    resizing: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def worst(self) -> Check:
        return max((check for check in self.checks if check.allowed is not None), key=lambda check: check.error)

    @property
    def agreed(self) -> str:
        """The agreement in words."""
        if self.agreement is None:
            return f"{self.agreement_is}: no output varies"
        return f"{self.agreement_is}: {format(self.agreement, '.4f' if self.kind == 'numbers' else '.2%')}"

    @property
    def measured(self) -> list[tuple[str, str]]:
        """What the labels of the images say of the export and of the model: names of figures, and both values."""
        if self.accuracy is not None:
            return [("accuracy", f"{self.accuracy:.2%}, of the model {self.accuracy_before:.2%}")]
        known = {figure.key.removeprefix("eval_"): figure for task in TASKS.values() for figure in task.shown}
        return [
            (known[key].name, f"{known[key].text(value)}, of the model {known[key].text(self.figures_before[key])}")
            for key, value in self.figures.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def figures_of(logits: torch.Tensor, labels: torch.Tensor, config: Any) -> dict[str, float]:
    """
    What an evaluation shows of such answers, but the loss.

    Args:
        logits, labels: (N, outputs), of several labels or of numbers.
    """
    task = task_of_problem(config.problem_type)
    judge = task.new_judge(config.num_labels, thresholds=getattr(config, "label_thresholds", None))
    judge.add(labels, logits)
    found = judge.compute([judge.state()])
    keys = [figure.key for figure in task.shown if figure.metric != "loss" and figure.key in found]
    # R2 of a number that is the same in all images is none.
    return {key.removeprefix("eval_"): float(found[key]) for key in keys if math.isfinite(found[key])}


def kind_of(config: Any, task: str) -> str:
    """What the answers of a model mean: one of AGREEMENT."""
    if TASKS[task].gives == "map":
        return "pixels"
    if config.problem_type == MULTI_LABEL:
        return "labels"
    # A single output without a problem is trained as a number; a feature is one, too.
    return "numbers" if config.problem_type == REGRESSION or config.num_labels < 2 else "classes"


def tolerance_of(kind: str, manifest: Manifest) -> float:
    if manifest.precision == "int8" and kind != "numbers":
        return TOLERANCE_OF_CHOICES
    return FORMATS[manifest.format].tolerance(manifest.precision)


class Spread:
    """
    What differences of an output are relative to, learned from the model's answers to real images.

    Args:
        right: (N, outputs, ...).
        least: of a spread.
    """

    def __init__(self, right: torch.Tensor, kind: str, least: float):
        self.kind, self.least = kind, least
        rows = self.rows(right)
        self.centre, self.deviation = rows.mean(0), rows.std(0, correction=0)

    def rows(self, outputs: torch.Tensor) -> torch.Tensor:
        """(images or pixels, outputs); of one class of many without what all have in common, which changes nothing."""
        rows = outputs.double().movedim(1, -1).flatten(0, -2)
        return rows - rows.mean(1, keepdim=True) if self.kind in ("classes", "pixels") else rows

    def units(self, right: torch.Tensor) -> torch.Tensor:
        """(outputs,): the spread, counted with how far these answers lie from those it was learned from."""
        unit = torch.maximum(self.deviation, (self.rows(right) - self.centre).square().mean(0).sqrt())
        unit = unit.clamp(min=self.least)
        if self.kind in ("classes", "pixels"):
            unit = torch.maximum(unit, 0.1 * unit.square().mean().sqrt())
        return torch.maximum(unit, self.resolution(right))

    @staticmethod
    def resolution(right: torch.Tensor) -> torch.Tensor:
        """(outputs,): what float32 leaves open, and is no error."""
        size = right.double().movedim(1, -1).flatten(0, -2).abs().amax(0)
        return (RESOLUTION * size).clamp(min=torch.finfo(torch.float32).tiny)


class Comparison:
    """
    Compares answers of an export with the model's.

    Args:
        exported: the export.
        right: the model's logits for real images, (N, outputs, ...).
    """

    def __init__(self, exported: ExportedModel, right: torch.Tensor):
        manifest, config = exported.manifest, exported.config
        self.kind = kind_of(config, manifest.task)
        # Where the graph ends in probabilities, those are compared.
        self.activation = activation_of(config) if manifest.preprocessing and config.num_labels else None
        self.allowed = tolerance_of(self.kind, manifest)
        least = 0.0 if self.kind == "numbers" else LOGIT if self.activation is None else SCORE
        if self.kind == "labels":
            thresholds = torch.tensor(thresholds_of(config))
            # A logit of infinity is reached by none, as a probability of one is by none but for rounding.
            self.thresholds = thresholds.logit() if self.activation is None else thresholds
        self.spread = Spread(activated(right, self.activation), self.kind, least)

    def __call__(
        self, got: torch.Tensor, right: torch.Tensor, images: str, *, demanding: bool = True
    ) -> tuple[Check, float]:
        """
        Args:
            got, right: logits (B, outputs, ...) of the export and of the model.
            demanding: ask for more than finite answers.

        Returns:
            the check, and the agreement where ties count as agreed.
        """
        if got.shape != right.shape:
            raise UserError(
                f"the export gives outputs of shape {tuple(got.shape)}, the model {tuple(right.shape)}, on {images}"
            )
        got, right = activated(got, self.activation), activated(right, self.activation)
        unit = self.spread.units(right)
        off = (self.spread.rows(got) - self.spread.rows(right)).square().mean(0).sqrt()
        errors = (off - self.spread.resolution(right)).clamp(min=0) / unit
        worst = int(errors.nan_to_num(torch.inf).argmax())
        error = errors[worst].item()
        agreement, lenient = self.agreement(got, right, unit)
        passed = error <= self.allowed if demanding else math.isfinite(error)  # which NaN is not
        check = Check(
            images=images,
            shape=list(right.shape),
            error=error,
            difference=off[worst].item(),
            unit=unit[worst].item(),
            output=worst,
            agreement=agreement,
            allowed=self.allowed if demanding else None,
            passed=passed,
        )
        return check, lenient

    def agreement(self, got: torch.Tensor, right: torch.Tensor, unit: torch.Tensor) -> tuple[float | None, float]:
        if self.kind == "numbers":
            return correlation(got.double(), right.double(), unit), 1.0
        if self.kind == "labels":
            same = (got >= self.thresholds) == (right >= self.thresholds)
            tie = (right - self.thresholds).abs() <= TIE * unit
        else:
            best = right.argmax(1, keepdim=True)
            chosen = got.argmax(1, keepdim=True)
            same = chosen == best
            tie = right.gather(1, best) - right.gather(1, chosen) <= TIE * unit.square().mean().sqrt()
        return same.double().mean().item(), (same | tie).double().mean().item()


def correlation(got: torch.Tensor, right: torch.Tensor, unit: torch.Tensor) -> float | None:
    """Of (N, outputs), over the images; the least of all outputs that vary. None where there is nothing to tell."""
    if len(right) < FEWEST:
        return None
    got, right = got - got.mean(0), right - right.mean(0)
    spread = right.square().mean(0).sqrt()
    varies = spread >= unit
    if not varies.any():
        return None
    both = (got * right).mean(0) / (got.square().mean(0).sqrt() * spread).clamp(min=1e-300)
    return both[varies].amin().item()


def verify(
    exported: ExportedModel,
    model: nn.Module,
    samples: list[Sample],
    *,
    arithmetic: str,
    emulated: ExportedModel | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """
    Compares an export with the model it was made of, which runs in float32.

    Real images first, all of them; then batches of other numbers and, where the export takes them, other sizes, from
    the smallest on; and noise, which no norm and no activation can hide from.

    Args:
        model: in inference mode, on the CPU.
        samples: real images; all of one size, in the first FEWEST at least, and at most one with labels.
        arithmetic: for the report.
        emulated: the same graph in the arithmetic that other machines compute it in, where this one's is another.

    Raises:
        UserError: a check failed; the message says which, by how much, and what to do.
    """
    precision, kind = exported.manifest.precision, kind_of(exported.config, exported.manifest.task)
    report = Report(precision, kind, arithmetic, tolerance_of(kind, exported.manifest), AGREEMENT[kind])
    report.size_before = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    agreements: list[tuple[float | None, float, int]] = []
    compare = None
    for sample in samples:
        pairs = []
        chunk = CHUNK if kind != "pixels" else CHUNK_OF_MAPS
        for start in range(0, len(sample.pixel_values), chunk):
            progress(f"comparing on images: {start} of {len(sample.pixel_values)}")
            pixel_values = sample.pixel_values[start : start + chunk]
            right = reference(model, pixel_values)
            got = answer(exported, pixel_values, sample.name)
            pairs.append((got, right))
        if kind != "pixels":  # whose maps are large, and have enough in a batch
            pairs = [tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))]
        for got, right in pairs:
            compare = compare or Comparison(exported, right)
            check, lenient = compare(got, right, sample.name)
            report.checks.append(check)
            agreements.append((check.agreement, lenient, len(right)))
        if sample.labels is not None and kind == "classes":
            ((got, right),) = pairs
            shares = ((part.argmax(1) == sample.labels).double().mean().item() for part in (got, right))
            report.accuracy, report.accuracy_before = shares
        elif sample.labels is not None:
            ((got, right),) = pairs
            report.figures = figures_of(got, sample.labels, exported.config)
            before = figures_of(right, sample.labels, exported.config)
            report.figures = {key: value for key, value in report.figures.items() if key in before}
            report.figures_before = {key: before[key] for key in report.figures}
    known = [(agreement, number) for agreement, _, number in agreements if agreement is not None]
    if kind == "numbers":
        report.agreement = min((agreement for agreement, _ in known), default=None)
    else:
        report.agreement = sum(agreement * number for agreement, number in known) / sum(n for _, n in known)
    pixel_values = samples[0].pixel_values
    if emulated is not None:
        progress(f"comparing in {precision} arithmetic")
        some = pixel_values[: EMULATED if kind != "pixels" else CHUNK_OF_MAPS]
        name = f"{samples[0].name}, in {precision} arithmetic"
        check, lenient = compare(answer(emulated, some, name), reference(model, some), name)
        report.checks.append(check)
        agreements.append((check.agreement, lenient, len(some)))
    for theirs, ours, name, demanding in further_batches(exported, pixel_values):
        progress(f"comparing on {name}")
        right = reference(model, ours, name)
        report.checks.append(compare(answer(exported, theirs, name), right, name, demanding=demanding)[0])
    report.rule = RULE.format(count=len(report.checks), tolerance=report.tolerance)
    judge(report, min(lenient for _, lenient, number in agreements if number >= FEWEST or kind == "pixels"))
    return report


def verify_images(
    report: Report, exported: ExportedModel, model: nn.Module, images: list[Image.Image], processor: Any
) -> None:
    """
    Compares a graph that takes images of any size with the image processor and the model, and adds to the report.

    Pixels have to be the processor's but for rounding. Then the model gets the graph's pixels, and its answers are
    compared as in `verify`: a level of 255 more or less is not taken for an error of the arithmetic.

    Raises:
        UserError: they differ.
    """
    manifest = exported.manifest
    run = FORMATS[manifest.format].open_images(exported.run.path, torch.get_num_threads())
    float_, largest, share, pairs = manifest.precision != "int8", 0, [], []
    for image in images:
        what = f"an image of {image.width}x{image.height} pixels"
        try:
            pixels, scores = (torch.from_numpy(values) for values in run(np.asarray(image)))
        except Exception as error:  # whatever the runtime says
            raise UserError(f"the export fails on {what}: {one_line(error)}") from error
        wanted = exported.prepare(prepare(processor, in_channels(image, manifest.num_channels))[None])
        if pixels.shape != wanted.shape:
            raise UserError(
                f"the export makes pixels of shape {tuple(pixels.shape)} of {what}, the image processor of shape "
                f"{tuple(wanted.shape)}: report it as a fault of this package"
            )
        off = (pixels.int() - wanted.int()).abs()
        largest, share = max(largest, int(off.max())), [*share, (off > 0).double().mean().item()]
        right = reference(model, normalised(exported, pixels))
        got = scores_to_logits(scores, exported.config)
        # The model's part has been compared; behind the resizing it has to be the same.
        again = exported(pixels).logits
        if not torch.allclose(
            *(activated(x, activation_of(exported.config)) for x in (got, again)), rtol=1e-3, atol=1e-4
        ):
            raise UserError(f"the export says another thing about {what} than about its pixels: report it as a fault")
        pairs.append((got, right))
    report.resizing = {"images": len(images), "largest_difference": largest, "share": sum(share) / len(share)}
    if largest > MOST_LEVELS:
        raise UserError(
            f"the export's pixels differ by {largest} of 255 levels from the image processor's, and {MOST_LEVELS} are "
            "allowed: report it as a fault of this package"
        )
    got, right = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    name = f"images of {len(images)} sizes, resized in the graph"
    report.checks.append(Comparison(exported, right)(got, right, name, demanding=float_)[0])
    judge(report, 1.0)


def judge(report: Report, agreement: float) -> None:
    """
    Raises:
        UserError: a check failed, or the `agreement`, ties counted as agreed, is too low.
    """
    failed = next((check for check in report.checks if not check.passed), None)
    if failed is None and agreement >= LEAST_AGREEMENT:
        return
    if report.precision == "int8":
        advice = "calibrate on more images of the kind the model is for, or take another --precision"
    elif report.precision == "float32":
        advice = "if it holds with --dynamic_size false, too, report it as a fault of this package"
    else:
        advice = "--precision float32 keeps such answers; --calibration_dataset compares on images of your own"
    if failed is None:
        share = "best class" if report.kind == "classes" else "choice"
        raise UserError(
            f"the export is not what the model is: it makes the same {share} in {agreement:.1%} only (near ties "
            f"counted as the same), {LEAST_AGREEMENT:.0%} are asked for; {advice}"
        )
    if failed.allowed is None or not math.isfinite(failed.error):
        raise UserError(
            f"the export is not what the model is: on {failed.images} its outputs are not finite; {advice}"
        )
    raise UserError(
        f"the export is not what the model is: on {failed.images} output {failed.output} is off by "
        f"{failed.difference:.2g} where the model's spreads by {failed.unit:.2g} over the images, which is "
        f"{failed.error:.2g} of it, and {report.precision} may be off by {failed.allowed:g}; {advice}"
    )


@torch.inference_mode()
def reference(model: nn.Module, pixel_values: torch.Tensor, images: str | None = None) -> torch.Tensor:
    """The model's own logits; with `images`, of a size that is not its own, it may refuse."""
    try:
        logits = model(pixel_values=pixel_values).logits
    except Exception as error:
        if images is None:
            raise
        raise UserError(
            f"the model itself takes no {images}: {one_line(error)}; --dynamic_size false exports it for its own size"
        ) from error
    check_finite(logits, "the model itself")
    return logits


def answer(exported: ExportedModel, pixel_values: torch.Tensor, images: str) -> torch.Tensor:
    try:
        return exported(pixel_values).logits
    except Exception as error:
        # Whatever a runtime says to a shape that its graph was not made for.
        raise UserError(
            f"the export fails on {images}, shape {tuple(pixel_values.shape)}: {one_line(error)}; --dynamic_size "
            "false exports it for its own size"
        ) from error


def further_batches(
    exported: ExportedModel, real: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, str, bool]]:
    """
    What the export takes, what the model takes, what it is, and whether more is asked of answers than to be finite.

    One image, three, noise, and other sizes if it takes any. 8 bits are calibrated for images of one size: of noise
    they promise nothing, and of other sizes little.
    """
    manifest = exported.manifest
    float_ = manifest.precision != "int8"
    height, width = manifest.image_size
    generator = torch.Generator().manual_seed(0)
    for number in (1, 3):
        if float_:
            name, pixels = f"noise of {height}x{width} pixels", None
            if manifest.preprocessing:
                shape = (number, height, width, manifest.num_channels)
                pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            else:
                pixels = torch.randn(number, manifest.num_channels, height, width, generator=generator)
        else:
            name, pixels = f"{number} of these images", exported.prepare(real[:number])
        yield pixels, normalised(exported, pixels), name, True
    if manifest.dynamic_size:
        for number, *size in sizes(manifest.image_size, manifest.least_size, math.prod(exported.config.strides)):
            if manifest.most_size is not None and max(size) > manifest.most_size:
                continue
            resized = F.interpolate(real[:number], size=size, mode="bilinear", antialias=True)
            pixels = exported.prepare(resized)
            yield pixels, normalised(exported, pixels), f"images of {size[0]}x{size[1]} pixels", float_


def sizes(image_size: list[int], least: int, stride: int) -> list[tuple[int, int, int]]:
    """Numbers, heights and widths: the smallest, odd ones, those that leave the last stage one token, larger ones."""
    height, width = image_size
    found = [
        (1, least, least),
        (2, stride // 2, stride // 2 + 1),
        (2, stride, stride),
        (1, stride - 1, stride + 1),
        (2, stride, 2 * stride + 3),
        (1, stride + 8, stride + 24),
        (2, height + stride, width),
        (1, height + 13, width + 45),
    ]
    fit = [shape for shape in found if min(shape[1:]) >= least and shape[1:] != (height, width)]
    return list(dict.fromkeys(fit))


def normalised(exported: ExportedModel, pixels: torch.Tensor) -> torch.Tensor:
    """What the model takes for what the graph takes."""
    if not exported.manifest.preprocessing:
        return pixels
    scale, shift = pixel_affine(exported.image_processor, exported.manifest.num_channels)
    return (pixels * scale + shift).float().permute(0, 3, 1, 2).contiguous()
