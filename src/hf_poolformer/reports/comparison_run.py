"""`compare`: two models evaluated on the same images, or evaluations of them read, and the report on both."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from ..data.columns import ImageDataset
from ..data.decoding import BrokenImage, EncodedImage
from ..data.opening import open_splits
from ..data.pictures_again import pictures_of, sources_of
from ..data.transforms import EvalTransform
from ..evaluation.classification import accelerator_on_device, evaluate_checkpoint, held_out_fraction
from ..evaluation.rows import Rows, read_rows
from ..foundation.errors import UserError, one_line
from ..foundation.files import best_effort, write_json
from ..foundation.processes import found_by_main
from ..foundation.report_folder import FIGURES, PAGE, ROWS, report_folder
from .comparison import Comparison
from .comparison_page import SIDE, comparison_page, wanted_images
from .comparison_settings import ComparisonSettings, is_evaluation
from .page import write_page
from .pairing import Pairs
from .speed import Contestant, Cost, cost_of, time_in_turns


Side = Literal["A", "B"]


@dataclass
class Measured:
    """What is known of A or of B.

    Attributes:
        model, processor, dataset: of a model that was evaluated just now; the dataset has its labels.
        broken: images that could not be read: `path`, `split`, `position` and `error` of each.
    """

    rows: Rows
    cost: Cost | None = None
    model: nn.Module | None = None
    processor: Any = None
    dataset: ImageDataset | None = None
    broken: Sequence[Mapping[str, Any]] = ()


def compare(settings: ComparisonSettings) -> Comparison:
    """Compares two models, and writes the report into `settings.folder`, which holds all of it or none.

    Every process must call it, and gets what was found.

    Raises:
        UserError: one of them is no model or no evaluation, they know other labels or were shown other images, there
            are no images, the folder holds another report.
    """
    accelerator = accelerator_on_device(settings)
    with contextlib.ExitStack() as stack:
        claimed = report_folder(settings.folder, settings.overwrite)
        folder = found_by_main(lambda: stack.enter_context(claimed))
        fraction = common_fraction(settings)
        a, b = (measure(settings, side, fraction, folder, accelerator) for side in ("A", "B"))
        comparison = found_by_main(lambda: write(settings, a, b, folder, accelerator))
    accelerator.end_training()
    return comparison


def common_fraction(settings: ComparisonSettings) -> float | None:
    """Which part of the images both models are measured on, as `held_out_fraction` says it.

    Raises:
        UserError: their runs held out other parts.
    """
    if settings.train_val_split is not None:
        return settings.train_val_split
    models = [side for side in ("A", "B") if not is_evaluation(settings.name_of(side))]
    fractions = {side: held_out_fraction(settings.of_model(side)) for side in models}
    known = {fraction for fraction in fractions.values() if fraction}
    if len(known) > 1:
        raise UserError(
            f"A was trained on all images but {fractions['A']:g} of them, B on all but {fractions['B']:g}: say with "
            "--train_val_split which part to measure on, or give other images."
        )
    return next(iter(known), 0.0) if models else None


def measure(
    settings: ComparisonSettings, side: Side, fraction: float | None, folder: Path, accelerator: Accelerator
) -> Measured | None:
    """Evaluates a model, or reads what an evaluation of it has found; None on all processes but the main one.

    Args:
        folder: for what is needed meanwhile.
    """
    name = settings.name_of(side)
    if is_evaluation(name):
        return Measured(read_rows(name)) if accelerator.is_main_process else None
    found: list[Measured] = []

    def keep(
        scratch: Path, given: Any, model: nn.Module, processor: Any, dataset: ImageDataset, results: dict[str, Any]
    ) -> None:
        cost = cost_of(name, model, given.origin(), accelerator.mixed_precision)
        found.append(Measured(read_rows(scratch), cost, model, processor, dataset, results["broken"]))

    own = settings.of_model(side)
    own.train_val_split, own.report = fraction, str(folder / f".{side}")
    evaluate_checkpoint(own, keep, accelerator)
    return found[0] if accelerator.is_main_process else None


def write(
    settings: ComparisonSettings, a: Measured, b: Measured, folder: Path, accelerator: Accelerator
) -> Comparison:
    broken = {one["position"]: one for one in (*a.broken, *b.broken)}
    comparison = Comparison(a.rows, b.rows, (settings.a, settings.b), broken=list(broken.values()))
    comparison.costs, comparison.note = costs(settings, comparison, (a, b), accelerator)
    pq.write_table(comparison.images(), folder / ROWS)
    write_json(folder / FIGURES, comparison.data())
    shown: dict[int, Image.Image] = {}
    with best_effort("finding the images again"):
        if (dataset := a.dataset or b.dataset or opened_again(settings, a.rows)) is not None:
            shown = pictures_of(dataset, wanted_images(comparison), 2 * SIDE)
    write_page(folder / PAGE, comparison_page(comparison, shown))
    return comparison


def opened_again(settings: ComparisonSettings, rows: Rows) -> ImageDataset | None:
    """The split that two evaluations are of, where the settings name it."""
    if not settings.has_images:
        return None
    divided = rows.about["train_val_split"]
    return open_splits(
        settings,
        train_dir=settings.validation_dir if divided else None,
        validation_dir=None if divided else settings.validation_dir,
        train_split=None,
        validation_split=settings.split,
        train_val_split=divided,
        labelled=False,
    )["validation"]


def costs(
    settings: ComparisonSettings, comparison: Comparison, sides: tuple[Measured, Measured], accelerator: Accelerator
) -> tuple[tuple[Cost | None, Cost | None], str]:
    """What both models cost, and why there is no speed."""
    known = sides[0].cost, sides[1].cost
    if None in known:
        return known, "evaluations were read, and no model was run"
    if not settings.speed:
        return known, "not measured (--speed)"
    if accelerator.num_processes > 1:
        return known, "measured by one process only, not under accelerate launch"
    gc.collect()
    try:
        contestants = [*contestants_of(settings, comparison.pairs, sides)]
        return tuple(time_in_turns(contestants, accelerator, settings.speed_seconds)), ""
    except (UserError, BrokenImage, KeyError) as error:  # storage that gives other images the second time
        return known, f"not measured: {one_line(error)}"


def contestants_of(
    settings: ComparisonSettings, pairs: Pairs, sides: tuple[Measured, Measured]
) -> Iterator[Contestant]:
    """Both models, with a batch of the images that both have answered."""
    size = settings.per_device_eval_batch_size
    positions = np.sort(pairs.rows.table["position"].to_numpy())[:size].tolist()
    for side in sides:
        transform, dataset = EvalTransform(side.processor), side.dataset
        pixels = {}
        for position, source in sources_of(dataset, positions):
            with EncodedImage(source, num_channels=transform.num_channels, token=dataset.token) as image:
                pixels[position] = transform.load_example(image)
        # Both have just been shown this dataset, so that their positions are the same.
        known = {position: row for row, position in enumerate(side.rows.table["position"].to_pylist())}
        chosen = (positions * size)[:size]  # of few images, some come several times
        yield Contestant(
            side.model,
            side.cost,
            torch.stack([pixels[position] for position in chosen]),
            torch.from_numpy(side.rows.answers[[known[position] for position in chosen]]),
        )
