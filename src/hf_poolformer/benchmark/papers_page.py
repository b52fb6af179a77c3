"""What becomes of the papers' tables: a Markdown page, CSV files, charts."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..foundation.figures import new_figure, save_figure
from ..foundation.files import best_effort, make_folder, replace_text, write_json
from .papers import CLASSIFIERS, Row, Table, difference, facts, source_of, training_command
from .report import table


# Of the page: `write` keeps what a person put below it.
LAST_LINE = "<!-- hf-poolformer table writes what is above, and keeps what is below. -->"
FOLDER = "papers"
MEASUREMENT = "measurement.json"


def csv_columns(made: Table) -> list[str]:
    columns = ["model", "token_mixer", *(["data"] if made.has_data else []), *(["pixels"] if made.has_macs else [])]
    columns += ["built_from", "parameters_published_millions", "parameters"]
    columns += ["gmacs_published", "gmacs"] if made.has_macs else []
    columns += [*made.scores, "source", "train"]
    return columns + (["images_per_second", "spread", "working_memory", "note"] if made.is_measured else [])


def csv_rows(made: Table) -> list[dict[str, str]]:
    """The table as text, a dict for each row; figures that are not known are empty."""
    rows = []
    for row in made.rows:
        cells = {
            "model": row.model,
            "token_mixer": row.mixer,
            "data": row.data,
            "pixels": row.pixels,
            "built_from": row.build,
            "parameters_published_millions": row.published["parameters"],
            "parameters": row.parameters,
            "gmacs_published": row.published["macs"],
            "gmacs": None if row.macs is None else f"{row.macs:.4f}",
            **row.scores,
            "source": source_of(row)["url"],
            "train": training_command(row, made.name),
            "images_per_second": row.images_per_second,
            "spread": row.spread,
            "working_memory": row.working_memory,
            "note": row.note,
        }
        rows.append({column: "" if cells[column] is None else str(cells[column]) for column in csv_columns(made)})
    return rows


def keep_measurement(made: Table, path: Path) -> None:
    """Takes over what an earlier call measured of the same models, which this one does not measure again."""
    if not path.is_file() or made.is_measured:
        return
    with path.open(encoding="utf-8", newline="") as file:
        earlier = {(row["built_from"], row.get("pixels")): row for row in csv.DictReader(file)}
    for row in made.rows:
        found = earlier.get((row.build, str(row.pixels)), {})
        if found.get("images_per_second"):
            row.images_per_second, row.spread = float(found["images_per_second"]), float(found["spread"])
            row.working_memory = int(found["working_memory"]) if found["working_memory"] else None
        row.note = found.get("note", "")


def write(tables: Sequence[Table], output_dir: Path, measured: Mapping[str, Any]) -> list[Path]:
    """
    `papers.md` and, in a folder beside it, the tables as CSV, the charts, and what measurements depended on.

    Args:
        measured: `papers.conditions` of the tables that were measured now; what earlier calls measured is kept.

    Returns:
        the files, the page first.
    """
    page, folder = output_dir / f"{FOLDER}.md", output_dir / FOLDER
    make_folder(folder)
    record = folder / MEASUREMENT
    earlier = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    measured = {**earlier, **measured}
    if measured:
        write_json(record, measured)
    files, sections = [page], []
    for made in tables:
        path = folder / f"{made.name}.csv"
        keep_measurement(made, path)
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=csv_columns(made), lineterminator="\n")
        writer.writeheader()
        writer.writerows(csv_rows(made))
        replace_text(path, text.getvalue())
        files.append(path)
        if made.name in CLASSIFIERS:
            for what in CHARTS:
                path = folder / f"{made.name}-{what}.png"
                with best_effort(f"drawing {path.name}"):
                    draw(made, what, path)
                    files.append(path)
        sections.append(render_table(made, measured.get(made.name)))
    below = page.read_text(encoding="utf-8").partition(LAST_LINE)[2] if page.is_file() else "\n"
    replace_text(page, "\n".join([HEAD, *sections, LAST_LINE]) + below)
    return files


# The page


HEAD = """\
# The papers' tables, rebuilt

What the two papers compare, from models that run here: beside each published figure the one that is counted on the
model itself.

```bash
hf-poolformer table --output_dir outputs/papers                        # all tables; nothing is downloaded or trained
hf-poolformer table --tables segmentation --output_dir outputs/papers
hf-poolformer table --measure --output_dir outputs/papers              # speed and memory of the first table, too
```

It needs `pip install 'hf-poolformer[benchmark]'`. In the folder it leaves this page, the tables as CSV and the charts.

**Published** figures are facts from the sources that the rows link to. Nothing was trained for this page: scores are
the authors', those of the peers, too.

**Counted** parameters are those of the model that the column *built from* names. Multiply-accumulates (MACs) are those
of convolutions and matrix products for one image, in 1e9; the papers' counters differ in what else they count. A
difference of more than 1 % from the published figure stands behind the counted one, unless rounding explains it.
"""
MEASURED = (
    "**Measured** on {date}: {device}, {dtype}, batches of {batch_size}, torch {torch}, timm {timm}, transformers "
    "{transformers}. Forward only, eager, every model as its library gives it, in turns; medians, and the distance of "
    "the quartiles over the median as spread. Memory is what the first forward needs beyond weights and images."
)
IN21K = (
    "`outputs/*_in21k` are the authors' checkpoints of ImageNet-21K, converted. They published no recipe for training "
    "on ImageNet-21K, and none for fine-tuning at 224 pixels from there."
)
LIBRARIES = {"ours": "this package", "timm": "timm", "transformers": "transformers", "here": "this benchmark"}
COLUMNS = {"top1": "top-1", "mIoU": "mIoU"}


def render_table(made: Table, measured: Mapping[str, Any] | None = None) -> str:
    """The section of a table: what it is, charts, figures, and how ours would be trained.

    Args:
        measured: its `papers.conditions`, if it was measured.
    """
    header = ["model", "token mixer", *(["data"] if made.has_data else []), *(["px"] if made.has_macs else [])]
    header += ["built from", "params (M), published", "counted"]
    header += ["MACs (G), published", "counted"] if made.has_macs else []
    header += [f"{COLUMNS.get(score, score.replace('_', ' '))} (%)" for score in made.scores]
    header += ["images/s", "spread", "memory (MB)"] if made.is_measured else []
    header.append("source")
    rows = []
    for row in made.rows:
        library, _, name = row.build.partition(" ")
        cells = [f"**{row.model}**" if row.is_ours else row.model, row.mixer]
        cells += [row.data] if made.has_data else []
        cells += [str(row.pixels)] if made.has_macs else []
        cells.append(f"{LIBRARIES[library]}: `{name}`")
        cells += [text_of(row.published["parameters"]), marked(row.parameters / 1e6, row.published["parameters"])]
        cells += [text_of(row.published["macs"]), marked(row.macs, row.published["macs"])] if made.has_macs else []
        cells += [text_of(score) for score in row.scores.values()]
        if made.is_measured:
            cells += [row.note or text_of(row.images_per_second, ".1f"), text_of(row.spread, ".0%")]
            cells.append(text_of(row.working_memory and row.working_memory / 1e6, ".0f"))
        cells.append(f"[{source_of(row)['name']}][{row.source}]")
        rows.append(cells)
    parts = [f"## {made.title}", paragraph(made.about)]
    if made.name in CLASSIFIERS:
        parts += [f"![{CHARTS[what].alt}]({FOLDER}/{made.name}-{what}.png)" for what in CHARTS]
    if measured is not None:
        parts.append(paragraph(MEASURED.format(**{**measured, **measured["versions"]})))
    parts.append(table(header, rows))
    commands = [command for command in (training_command(row, made.name) for row in made.rows) if command]
    parts.append("What would train ours, with the recipe of the paper:\n\n```text\n" + "\n".join(commands) + "\n```")
    if any("in21" in row.build for row in made.rows):
        parts.append(paragraph(IN21K))
    used = dict.fromkeys(row.source for row in made.rows)
    parts.append("\n".join(f"[{name}]: {facts()['sources'][name]['url']}" for name in used))
    return "\n\n".join(parts) + "\n"


def paragraph(text: str) -> str:
    return textwrap.fill(text, 119, break_on_hyphens=False, break_long_words=False)


def text_of(value: float | None, form: str = "") -> str:
    return "" if value is None else format(value, form)


def marked(here: float, published: float | None) -> str:
    part = difference(here, published)
    return f"{here:.2f}" + ("" if part is None else f" ({part:+.1%})")


# Charts


@dataclass(frozen=True)
class Chart:
    label: str
    alt: str
    of: Callable[[Row], float]


CHARTS = {
    "macs": Chart("MACs (G), counted", "Top-1 accuracy over multiply-accumulates", lambda row: row.macs),
    "parameters": Chart("parameters (M), counted", "Top-1 accuracy over parameters", lambda row: row.parameters / 1e6),
}
# Marker and colours of each kind of token mixer; its families share the marker.
STYLES = {
    "pooling": ("o", ("#c2410c",)),
    "attention": ("^", ("#0f766e", "#4d7c0f", "#14b8a6", "#65a30d", "#134e4a")),
    "spatial MLP": (">", ("#6d28d9", "#a21caf", "#4f46e5", "#c026d3")),
    "convolution": ("v", ("#475569", "#0369a1", "#94a3b8", "#0c4a6e")),
    "convolution, attention": ("D", ("#b45309", "#9f1239")),
    "random": ("s", ("#ca8a04",)),
    "none": ("x", ("#78716c",)),
}
# Of ours, those with a neighbour above.
LABEL_BELOW = ("none", "convolution")


def draw(made: Table, what: str, path: Path) -> None:
    """Top-1 over what is counted, a line for each family; without models of 384 pixels and of ImageNet-21K."""
    chart = CHARTS[what]
    families: dict[str, list[Row]] = {}
    for row in made.rows:
        if row.pixels < 384 and row.data != "21K" and row.scores["top1"] is not None:
            families.setdefault(row.family, []).append(row)
    figure, axis = new_figure((7.2, 5))
    used: dict[str, int] = {}
    for family, rows in families.items():
        marker, colours = STYLES[rows[0].mixer]
        colour = colours[used.setdefault(rows[0].mixer, 0) % len(colours)]
        used[rows[0].mixer] += 1
        ours = rows[0].is_ours
        axis.plot(
            [chart.of(row) for row in rows],
            [row.scores["top1"] for row in rows],
            marker=marker,
            color=colour,
            linewidth=2.2 if ours else 1.2,
            markersize=7 if ours else 5,
            zorder=3 if ours else 2,
            label=family,
        )
        for row in rows if ours else []:
            place = (chart.of(row), row.scores["top1"])
            size = row.model.rpartition("-")[2]
            offset, align = ((4, -11), "left") if row.mixer in LABEL_BELOW else ((-3, 6), "right")
            axis.annotate(size, place, offset, textcoords="offset points", fontsize=7, color=colour, ha=align)
    axis.set_xscale("log")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500) if in_view(tick, axis.get_xlim())]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.set_xlabel(chart.label)
    axis.set_ylabel("ImageNet-1K top-1 (%), published")
    axis.legend(fontsize=8, ncols=2, loc="lower right", framealpha=0.9)
    save_figure(figure, path)


def in_view(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]
