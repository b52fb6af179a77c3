"""The report of an evaluation: which images a model gets wrong, and whether it is the model or the labels.

report.html           the page: one file that needs nothing else
report.json           every figure in it
images.parquet        a row for each image (evaluation/rows.py); here it is read
label_errors.parquet  the images whose labels are doubted, the likeliest errors first
ambiguous.parquet     of one label per image: those between two classes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.columns import ImageDataset
from ..evaluation.rows import read_rows
from ..evaluation.settings import EvaluationSettings
from ..foundation.files import put_in_place, write_json
from ..foundation.names import first_few, printable
from ..foundation.report_folder import FIGURES, PAGE, ROWS
from ..foundation.tasks import TASKS
from .material import Material, Told, bounds_text
from .numbers import Numbers
from .one_label import OneLabel
from .page import Commands, Facts, Page, Section, Table, Text, write_page
from .several_labels import SeveralLabels
from .slices import LEVEL, MOST_VALUES, Slice, slices_of


PARTS = {"class": OneLabel, "classes": SeveralLabels, "numbers": Numbers}
# How many slices and broken images are on the page.
LISTED_SLICES, LISTED_BROKEN = 40, 100


def write_evaluation_report(
    folder: Path,
    settings: EvaluationSettings,
    model: Any,
    processor: Any,
    dataset: ImageDataset,
    results: Mapping[str, Any],
) -> Path:
    """Writes the report beside `images.parquet`, which is in the folder; the page last.

    What it costs has bounds, whatever the number of images and classes: some dozens of images are read again, Grad-CAM
    is computed of some of them, and few charts are drawn.

    Args:
        model, processor: for Grad-CAM; of models of other kinds the images are shown alone.
        dataset: of which the images were.
        results: of `evaluate_checkpoint`.

    Returns:
        the page.

    Raises:
        UserError: there are no rows in the folder; a file cannot be written.
    """
    folder = Path(folder)
    rows = read_rows(folder)
    material = Material(rows, results)
    parts = PARTS[rows.reads](material)
    columns = {name: rows.table[name].to_pylist() for name in rows.about.get("slice_by") or ()}
    slices, left_out = slices_of(columns, parts.slice_figures, parts.faults)
    material.fetch(dataset, model, processor, parts.shown, parts.explained)
    told = Told(settings.model, data_flags(settings), Path(settings.report or folder))
    findings = [*slice_findings(slices), *parts.findings()]
    commands = [*parts.commands(told), *commands_for_all(told, columns, dataset)]
    for name, table in parts.tables.items():
        write_table(folder / name, table)
    data = {
        "report": "evaluation",
        **{name: rows.about.get(name) for name in ("model", "dataset", "split", "task", "thresholds")},
        "labels": rows.label_names,
        "names": material.names,
        "images": len(rows),
        "figures": {name: value for name, value in results.items() if name.startswith("eval_")},
        "broken": results.get("broken", []),
        "findings": findings,
        **parts.data(),
        "slices": [slice_data(part) for part in slices],
        "slice_values_left_out": left_out,
        "next": commands,
        "rows": ROWS,
    }
    write_json(folder / FIGURES, data)
    sections = [
        figure_section(material, parts),
        Section("What stands out", [Text("\n\n".join(findings) or "Nothing.")]),
        Section("What to do next", [Commands(commands)]),
        *parts.sections(),
    ]
    if columns:
        sections.insert(-1, slice_section(slices, left_out, parts))
    if results.get("broken"):
        sections.append(broken_section(results["broken"]))
    sections.append(data_section(parts))
    name = printable(Path(settings.model).name or settings.model, 60)
    about = f"{rows.about.get('dataset')}, {rows.about.get('split')}: {len(rows):,} images"
    write_page(folder / PAGE, Page(f"Evaluation of {name}", about, sections))
    return folder / PAGE


def data_flags(settings: EvaluationSettings) -> list[str]:
    """The flags that name the images again; the first two are what and where."""
    named = ("dataset_name", "validation_dir", "dataset_config_name", "split")
    given = [(name, getattr(settings, name, None)) for name in named]
    return [word for name, value in given if value for word in (f"--{name}", str(value))]


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """A Parquet file, whole or not there."""
    partial = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.table(dict(columns)), partial)
    put_in_place(partial, path)


def commands_for_all(told: Told, columns: Mapping[str, Any], dataset: ImageDataset) -> list[str]:
    found = []
    if not columns and dataset.unread_columns:
        found += [
            f"# does it do worse on some images? other columns: {printable(first_few(dataset.unread_columns))}",
            told.evaluate("--slice_by", dataset.unread_columns[0]),
        ]
    return [
        *found,
        "# whether another model is better, image by image",
        told.line("compare", told.model, "OTHER_MODEL", *told.data),
    ]


def figure_section(material: Material, parts: Any) -> Section:
    """The figures, that which matters most first."""
    rows, results = material.rows, material.results
    figures = TASKS[rows.task].figures_of(len(rows.label_names), parts.first_figure)
    pairs = [
        (figure.name, figure.text(results[figure.key], material.intervals.get(figure.key), percent=True))
        for figure in figures
        if results.get(figure.key) is not None
    ]
    skipped = results.get("eval_skipped_images")
    pairs.append(("Images", f"{len(rows):,}" + (f", and {skipped} broken ones left out" if skipped else "")))
    intro = (
        "In brackets 95 % confidence intervals: how much of a figure may be the chance of which images are measured."
        if material.intervals
        else ""
    )
    if parts.first_figure:
        intro += " The classes are uneven, so the macro F1, which counts every class alike, comes first."
    return Section("Figures", [Facts(pairs)], intro)


def slice_findings(slices: Sequence[Slice]) -> list[str]:
    return [
        f"Worse than on the other images, beyond chance: {printable(part.column, 40)} = {printable(part.value, 40)} "
        f"({part.images:,} images)."
        for part in slices
        if part.verdict == "worse"
    ][:3]


def slice_data(part: Slice) -> dict[str, Any]:
    figures = {}
    for name, value in part.figures.items():
        if isinstance(value, tuple):
            figures |= {name: value[0], f"{name}_interval": list(value[1:])}
        else:
            figures[name] = value
    return {
        "column": part.column,
        "value": part.value,
        "images": part.images,
        **figures,
        "p": part.p,
        "verdict": part.verdict,
    }


def slice_section(slices: Sequence[Slice], left_out: Mapping[str, int], parts: Any) -> Section:
    figures = list(slices[0].figures) if slices else []
    headings = ["column", "value", "images"]
    for name in figures:
        headings += (
            [name.replace("_", " "), "95 % interval"]
            if isinstance(slices[0].figures[name], tuple)
            else [name.replace("_", " ")]
        )
    shown = []
    for part in slices[:LISTED_SLICES]:
        row: list[Any] = [part.column, part.value, part.images]
        for value in part.figures.values():
            row += [value[0], bounds_text(value[1:])] if isinstance(value, tuple) else [value]
        shown.append([*row, part.p, part.verdict])
    worse = sum(part.verdict == "worse" for part in slices)
    caption = (
        f"The worst {LISTED_SLICES} of {len(slices)}; all are in report.json." if len(slices) > LISTED_SLICES else ""
    )
    missing = "".join(
        f" Of {printable(column, 40)} only the {MOST_VALUES} most frequent values, without {count:,} others."
        for column, count in left_out.items()
    )
    return Section(
        "Slices",
        [Table([*headings, "p", "verdict"], shown, caption)],
        f"The images by the columns that were asked for, the worst first. {parts.slice_intro} A slice is tested "
        f"against all other images, and p is corrected (Holm) for the {len(slices)} slices: worse or better is said "
        f"below {LEVEL}, and what is above is within chance, however bad it looks.{missing}",
        "warning" if worse else "plain",
    )


def broken_section(broken: Sequence[Mapping[str, Any]]) -> Section:
    shown = [[image["path"], image["error"]] for image in broken[:LISTED_BROKEN]]
    caption = f"The first {len(shown)} of {len(broken):,}; all are in report.json." if len(broken) > len(shown) else ""
    return Section(
        "Images that could not be used", [Table(["image", "why"], shown, caption)], "No figure counts them.", "warning"
    )


def data_section(parts: Any) -> Section:
    beside = " and ".join(parts.tables)
    return Section(
        "The same as data",
        [
            Text(
                "report.json has every figure of this page. images.parquet has a row for each image: its path, split "
                "and position, what it is, what the model said, every probability, and the loss."
                + (f" {beside}: all images of which the page shows the first." if beside else "")
            )
        ],
    )
