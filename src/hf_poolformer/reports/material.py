"""What the parts of an evaluation's report are made of: rows, figures, pictures of some images and where the model
looks."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..data.columns import ImageDataset
from ..data.pictures_again import pictures_of
from ..data.transforms import channels_of, input_size, prepare
from ..evaluation.rows import Rows
from ..explanation.geometry import lay_on_image, visible_region
from ..explanation.gradcam import find_classifier, gradcam
from ..explanation.pictures import overlay
from ..foundation.errors import UserError, one_line
from ..foundation.files import best_effort
from ..foundation.names import numbered, printable
from ..foundation.strict_json import to_json
from ..foundation.tasks import CLASSIFICATION
from .page import Tile


# Of names of classes and files in a report: characters.
LONGEST_NAME, LONGEST_PATH = 40, 34
# Pixels of an image that is read again: the model's input, but between these.
LEAST_SIDE, MOST_SIDE = 192, 384


class Material:
    """
    Attributes:
        names: of the classes, labels or targets, for people: printable, short, no two alike.
        results: what `evaluate_checkpoint` returned.
        pictures: by number of the row; those that were fetched and could be decoded.
        heats: by number of the row, pictures with Grad-CAM over them.
        unexplained: why there is no Grad-CAM, a sentence; empty where there is.
    """

    def __init__(self, rows: Rows, results: Mapping[str, Any]):
        self.rows, self.results = rows, results
        self.names = numbered([printable(name, LONGEST_NAME) or "(no name)" for name in rows.label_names])
        self.intervals = results.get("eval_confidence_intervals") or {}
        self.pictures: dict[int, Image.Image] = {}
        self.heats: dict[int, list[Image.Image]] = {}
        self.unexplained = ""

    def of_each(self, key: str) -> list[Any]:
        """A figure of each class, in their order; None where there is none."""
        return in_order(self.results.get(key), self.rows.label_names)

    def intervals_of_each(self, key: str) -> list[Any]:
        return in_order(self.intervals.get(key), self.rows.label_names)

    def fetch(
        self, dataset: ImageDataset, model: Any, processor: Any, shown: Sequence[int], explained: Mapping[int, Any]
    ) -> None:
        """Reads the images of some rows again, and computes Grad-CAM of some of them.

        Args:
            shown: numbers of rows.
            explained: row -> the classes whose evidence is to be seen.
        """
        positions = self.rows.table["position"].to_pylist()
        wanted = {row: positions[row] for row in dict.fromkeys([*shown, *explained])}
        with best_effort("reading some images again for the report"):
            found = pictures_of(dataset, set(wanted.values()), side_of(processor))
            self.pictures = {row: found[position] for row, position in wanted.items() if position in found}
        if not explained:
            return
        self.unexplained = "Grad-CAM failed."
        with best_effort("Grad-CAM"):
            try:
                self.heats = {
                    row: heats(model, processor, self.pictures[row], list(classes))
                    for row, classes in explained.items()
                    if row in self.pictures
                }
                self.unexplained = ""
            except UserError as reason:
                self.unexplained = f"Without Grad-CAM: {printable(one_line(reason)).rstrip('.')}."

    def tile(self, row: int, lines: Sequence[str], note: str = "", heats: bool = False) -> Tile:
        """One image with its name below the lines."""
        pictures = [self.pictures[row]] if row in self.pictures else []
        if not pictures:
            note = f"{note}; not decoded again".lstrip("; ")
        path = printable(self.rows.table["path"][row].as_py()).rpartition("/")[2]
        short = path if len(path) <= LONGEST_PATH else "…" + path[1 - LONGEST_PATH :]
        return Tile([*pictures, *(self.heats.get(row, ()) if heats else ())], [*lines, short], note)

    def group(self, rows: Sequence[int], lines: Sequence[str]) -> Tile:
        """Several images that belong together."""
        return Tile([self.pictures[row] for row in rows if row in self.pictures], lines)

    def place(self, row: int) -> dict[str, Any]:
        """Where an image lies, for data."""
        return {name: self.rows.table[name][row].as_py() for name in ("path", "split", "position")}


class Told:
    """Commands for the model and the data of an evaluation, ready to be run again."""

    def __init__(self, model: str, data: Sequence[str], folder: Path, task: str):
        """
        Args:
            data: the flags that name the images, first where they are.
            folder: of the report.
            task: key of `TASKS`.
        """
        self.model, self.data, self.folder, self.task = model, data, folder, task

    def show(self, table: str) -> str:
        """The first rows of a table, one a line."""
        path = to_json(printable(str(self.folder / table)), ensure_ascii=False)
        code = f"import pyarrow.parquet as p; [print(row) for row in p.read_table({path}).to_pylist()[:50]]"
        return shlex.join(["python", "-c", code])

    def evaluate(self, *flags: str) -> str:
        return self.line("evaluate", self.model, *self.data, "--report", f"{self.folder}-2", *flags)

    def inspect(self) -> str:
        return self.line("inspect", self.data[1], "--model", self.model)

    def train(self, *flags: str) -> str:
        output = f"{self.model.rstrip('/').rpartition('/')[2]}-2"
        words = ["--model_name_or_path", self.model, *self.training_data(), "--output_dir", output]
        return self.line("train", *([] if self.task == CLASSIFICATION else ["--task", self.task]), *words, *flags)

    def training_data(self) -> list[str]:
        """A validation folder is not what to train on; a data set has its own splits."""
        return (
            ["--dataset_name", self.data[1]]
            if self.data[0] == "--dataset_name"
            else ["--train_dir", "TRAINING_FOLDER"]
        )

    def line(self, *words: str) -> str:
        return shlex.join(["hf-poolformer", *map(printable, words)])


def in_order(values: Any, names: Sequence[str]) -> list[Any]:
    """Figures by the names of the classes, as `named_results` has them, in their order; of names that occur twice it
    has but one figure, and these are looked up."""
    values = values or {}
    if len(values) == len(names):
        return list(values.values())
    return [values.get(name) for name in names]


def side_of(processor: Any) -> int:
    """How large images are wanted again: as the model sees them, within bounds."""
    with contextlib.suppress(Exception):  # processors of exports and other libraries say it in other ways, or not
        return min(max(LEAST_SIDE, *input_size(processor)), MOST_SIDE)
    return LEAST_SIDE


def heats(model: Any, processor: Any, picture: Image.Image, classes: list[int]) -> list[Image.Image]:
    """The picture under the evidence for each of the classes.

    Raises:
        UserError: Grad-CAM of this model is not known.
    """
    if not isinstance(model, nn.Module):
        raise UserError("an exported model has no gradients")
    find_classifier(model)
    channels = channels_of(processor)
    if channels not in (1, 3):
        raise UserError(f"the report's pictures have not the {channels} channels of the model")
    image = picture if channels == 3 else torch.from_numpy(np.array(picture.convert("L")))[None]
    pixel_values = prepare(processor, image)[None]
    maps = gradcam(model.eval(), pixel_values, classes).maps[0].cpu().numpy()
    times = -(-LEAST_SIDE // max(picture.size))
    drawn = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    place = visible_region(processor, picture.height, picture.width).scaled(times, times)
    return [overlay(drawn, lay_on_image(values, place, drawn.height, drawn.width)) for values in maps]


def percent(share: float) -> str:
    """For people; of what is nearly everything or nothing, more digits."""
    if not np.isfinite(share):
        return "—"
    return f"{share:.1%}" if 0.001 <= share < 0.9995 or share in (0, 1) else f"{share:.2g}"


def plural(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def bounds_text(interval: Sequence[float] | None) -> str | None:
    return None if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
