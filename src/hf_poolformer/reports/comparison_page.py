"""A comparison of two models as a page, and as a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..foundation.files import size_text
from ..foundation.names import printable
from ..foundation.tasks import Figure
from .charts import FAINT, SERIES
from .comparison import Comparison, speed_ratio
from .page import Chart, Facts, Gallery, Page, Part, Section, Table, Text, Tile
from .paired import Paired, newcombe


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Images of a gallery.
MOST_SHOWN = 24
SIDE = 112  # CSS pixels
# Dots of the chart, taken evenly from many images.
MOST_DOTS = 3000
MOST_LABELS = 6  # named below an image
LONGEST = 60  # of a label's name


def wanted_images(comparison: Comparison) -> list[int]:
    """Positions of the images that the page shows."""
    chosen = [comparison.better_on("A"), comparison.better_on("B"), comparison.most_changed]
    return comparison.places(np.unique(np.concatenate([rows[:MOST_SHOWN] for rows in chosen])))


def comparison_lines(comparison: Comparison) -> list[str]:
    """For the terminal: each model's main figure, the verdict, and speed and size."""
    figure, main = comparison.main_figure, comparison.main
    lines = [
        f"{side} {printable(name)}: {figure.short} {figure.text(value, interval)}"
        for side, name, value, interval in zip(
            "AB", comparison.names, (main.a, main.b), (main.interval_a, main.interval_b), strict=True
        )
    ]
    lines.append(verdict(comparison))
    if (ratio := speed_ratio(comparison.costs)) is not None:
        speeds = [f"{cost.images_per_second:.1f}" for cost in comparison.costs]
        lines.append(f"Speed: A {speeds[0]}, B {speeds[1]} images/s; B is {ratio:.2f} times as fast as A.")
    elif comparison.note:
        lines.append(f"Speed: {comparison.note}.")
    sizes = [size_text(cost.bytes) if cost and cost.bytes else None for cost in comparison.costs]
    if any(sizes):
        lines.append(f"On disk: A {sizes[0] or 'unknown'}, B {sizes[1] or 'unknown'}.")
    return lines


def verdict(comparison: Comparison) -> str:
    """Which model is better, by how much, and how sure that is, in a few sentences."""
    figure, main, pairs = comparison.main_figure, comparison.main, comparison.pairs
    ahead = main.ahead(figure)
    if ahead is None:
        text = f"A and B are equal in {name_of(figure)} on {len(pairs):,} images"
    else:
        gap = difference_text(figure, abs(main.difference))
        word = "higher" if figure.better == "high" else "lower"
        text = f"{ahead}'s {name_of(figure)} is {gap} {word} on {len(pairs):,} images"
    if main.interval is not None:
        low, high = (difference_text(figure, end, sign=True) for end in main.interval)
        text += f"; B less A: {difference_text(figure, main.difference, sign=True)}, 95 % interval {low} to {high}"
    text += f". {test_text(comparison)}"
    if comparison.better:
        text += f" {comparison.better} is better."
    elif ahead is not None:
        text += " So small a difference may be chance."
    return f"{text} They say the same of {comparison.agreement:.2%} of the images."


def test_text(comparison: Comparison) -> str:
    test, p = comparison.test, comparison.p
    if comparison.pairs.task.reads == "class":
        return (
            f"McNemar's test ({test.method}) of {test.only_a:,} images that only A gets right and {test.only_b:,} "
            f"that only B does: {p_text(p)}."
        )
    return f"By the paired bootstrap {p_text(p)}." if p is not None else "There is no test of it."


def p_text(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def name_of(figure: Figure) -> str:
    """Within a sentence."""
    return figure.name[0].lower() + figure.name[1:] if figure.name[1:2].islower() else figure.name


def difference_text(figure: Figure, value: float, sign: bool = False) -> str:
    """Shares in percentage points."""
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.2f} points" if figure.share else f"{value:{plus}.4g}"


def comparison_page(comparison: Comparison, pictures: Mapping[int, Image.Image]) -> Page:
    """
    Args:
        pictures: position -> picture, of `wanted_images` those that there are.
    """
    about = comparison.pairs.rows.about
    where = " ".join(
        filter(None, [str(about.get("dataset") or ""), f"({about['split']})" if about.get("split") else ""])
    )
    sections = [
        result_section(comparison),
        figures_section(comparison),
        *gallery_sections(comparison, pictures),
        labels_section(comparison),
        *mistakes_section(comparison),
        cost_section(comparison),
    ]
    a, b = (printable(name, LONGEST) for name in comparison.names)
    return Page(f"{a} and {b} compared", f"{len(comparison.pairs):,} images of {where}", sections)


def result_section(comparison: Comparison) -> Section:
    figure, main, pairs = comparison.main_figure, comparison.main, comparison.pairs
    percent = partial(figure.text, percent=True)
    facts = [
        ("A", comparison.names[0]),
        ("B", comparison.names[1]),
        (f"{figure.name} of A", percent(main.a, main.interval_a)),
        (f"{figure.name} of B", percent(main.b, main.interval_b)),
        ("Difference, B less A", difference_text(figure, main.difference, sign=True)),
        ("Same answer", f"{comparison.agreement:.2%}"),
    ]
    if comparison.p is not None:
        facts.append(("Chance of so large a difference between equal models", p_text(comparison.p)))
    facts += [
        (f"Images left out, not answered by {side}", f"{missing:,}")
        for side, missing in (("A", pairs.missing_a), ("B", pairs.missing_b))
        if missing
    ]
    level = {"A": "bad", "B": "good", None: "plain"}[comparison.better]
    return Section("Which is better?", [Facts(facts), Text(verdict(comparison))], level=level)


def figures_section(comparison: Comparison) -> Section:
    parts: list[Part] = [
        Table(
            ["figure", "A", "B", "B less A", "from", "to", "p"],
            [
                [
                    f"{figure.name}{'' if figure.better == 'high' else ' (less is better)'}",
                    *numbers(comparison.figures[figure.key]),
                ]
                for figure in comparison.shown_figures
            ],
            "From and to: the 95 % interval of the difference. p: of the bootstrap.",
            ["", ".4f", ".4f", "+.4f", "+.4f", "+.4f", ".3f"],
        )
    ]
    if table := comparison.table:
        low, high = newcombe(table.both, table.only_a, table.only_b, table.neither)
        parts += [
            Table(
                ["", "B right", "B wrong"],
                [["A right", table.both, table.only_a], ["A wrong", table.only_b, table.neither]],
                "Images that both models get right, one of them, and neither."
                + (" Right is an image of which every label is." if comparison.pairs.task.reads == "classes" else ""),
            ),
            Text(
                f"McNemar's test ({comparison.test.method}): {p_text(comparison.test.p)}. The share of right images "
                f"differs by {(table.only_b - table.only_a) / len(comparison.pairs):+.4f}, by Newcombe's method for "
                f"pairs {low:+.4f} to {high:+.4f}."
            ),
        ]
    intro = (
        "Intervals are of the difference on the same images, drawn anew a thousand times: both models are always "
        "measured on the same ones."
    )
    return Section("All figures", [*parts, change_chart(comparison)], intro)


def numbers(paired: Paired) -> list[float | None]:
    return [paired.a, paired.b, paired.difference, *(paired.interval or (None, None)), paired.p]


def change_chart(comparison: Comparison) -> Chart:
    pairs = comparison.pairs
    taken = np.linspace(0, len(pairs) - 1, min(len(pairs), MOST_DOTS)).astype(int)
    if pairs.task.reads == "class":
        what = "probability of the true class"
        x, y = (np.take_along_axis(part.values, pairs.labels[:, None], 1)[:, 0] for part in (pairs.a, pairs.b))
    elif pairs.task.reads == "classes":
        what, x, y = "loss", pairs.a.losses, pairs.b.losses
    else:
        what, x, y = "error", -pairs.merits(pairs.a), -pairs.merits(pairs.b)
    x, y, gains = x[taken], y[taken], pairs.gains[taken]
    kinds = [(gains == 0, FAINT, "alike"), (gains < 0, SERIES[0], "A better"), (gains > 0, SERIES[1], "B better")]

    def draw(axes: Axes) -> None:
        top = 1.0 if pairs.task.reads == "class" else float(max(x.max(), y.max(), 1e-12))
        axes.plot([0, top], [0, top], color=FAINT, linewidth=1)
        for chosen, colour, label in kinds:
            if chosen.any():
                axes.scatter(x[chosen], y[chosen], s=9, color=colour, alpha=0.6, linewidths=0, label=label)
        axes.set(xlabel=f"A: {what}", ylabel=f"B: {what}", aspect="equal")
        axes.grid()
        axes.legend(loc="upper left" if pairs.task.reads != "class" else "lower right")

    shown = f" {len(taken):,} of {len(pairs):,} images, evenly taken." if len(taken) < len(pairs) else ""
    return Chart(
        draw,
        f"The {what} of each image, by A across and by B upwards.",
        f"A dot is an image; on the line both say the same.{shown}",
        (4.6, 4.4),
    )


def gallery_sections(comparison: Comparison, pictures: Mapping[int, Image.Image]) -> list[Section]:
    numbers = comparison.pairs.task.reads == "numbers"
    titles = {
        side: f"{side} nearer, {other} farther off" if numbers else f"{side} right, {other} wrong"
        for side, other in ("AB", "BA")
    }
    if comparison.pairs.task.reads == "classes":
        titles = {side: f"{side} has more labels right" for side in "AB"}
    sections = [gallery_section(comparison, pictures, comparison.better_on(side), titles[side]) for side in "AB"]
    return [
        *sections,
        gallery_section(comparison, pictures, comparison.most_changed, "Answers that differ most"),
    ]


def gallery_section(
    comparison: Comparison, pictures: Mapping[int, Image.Image], rows: np.ndarray, title: str
) -> Section:
    shown = rows[:MOST_SHOWN]
    if not len(rows):
        return Section(title, [Text("No image.")])
    tiles = [
        Tile([pictures[place]] if place in pictures else [], describe(comparison, row))
        for row, place in zip(shown.tolist(), comparison.places(shown), strict=True)
    ]
    more = f", the first {len(shown)} of them; images.parquet has all" if len(shown) < len(rows) else ""
    return Section(title, [Gallery(tiles, side=SIDE)], f"{len(rows):,} images{more}.")


def describe(comparison: Comparison, row: int) -> list[str]:
    """What an image is, what both models say, and where it lies."""
    pairs, names = comparison.pairs, comparison.pairs.label_names
    sides = (("A", pairs.a), ("B", pairs.b))
    if pairs.task.reads == "class":
        label = int(pairs.labels[row])
        lines = [printable(names[label], LONGEST)]
        for side, answers in sides:
            said = int(answers.predicted[row])
            text = f"{side}: {printable(names[said], LONGEST)} {answers.values[row, said]:.1%}"
            lines.append(
                text
                if said == label
                else f"{text}, {printable(names[label], LONGEST)} {answers.values[row, label]:.1%}"
            )
    elif pairs.task.reads == "classes":
        lines = [few_labels(names, pairs.labels[row]) or "no label"]
        for side, answers in sides:
            said, true = answers.predicted[row] > 0, pairs.labels[row] > 0
            wrong = {"not": few_labels(names, true & ~said), "also": few_labels(names, said & ~true)}
            wrong = [f"{word} {labels}" for word, labels in wrong.items() if labels]
            lines.append(f"{side}: {'; '.join(wrong) or 'right'}")
    else:
        lines = [numbers_text(names, pairs.labels[row])]
        lines += [f"{side}: {numbers_text(names, answers.values[row])}" for side, answers in sides]
    return [*lines, printable(pairs.rows.table["path"][row].as_py())]


def few_labels(names: Sequence[str], chosen: np.ndarray) -> str:
    places = np.flatnonzero(chosen)
    text = ", ".join(printable(names[place], LONGEST) for place in places[:MOST_LABELS])
    return f"{text}, …" if len(places) > MOST_LABELS else text


def numbers_text(names: Sequence[str], values: np.ndarray) -> str:
    if len(names) == 1:
        return f"{values[0]:.4g}"
    shown = list(zip(names, values.tolist(), strict=True))[:MOST_LABELS]
    return ", ".join(f"{printable(name, LONGEST)} {value:.4g}" for name, value in shown)


def labels_section(comparison: Comparison) -> Section:
    pairs, figures = comparison.pairs, comparison.per_label()
    first, *others = figures
    what = pairs.task.outputs[0]
    headings = [what, "images", f"{first.name} A", f"{first.name} B", "B less A", "from", "to"]
    for figure in others:
        headings += [f"{figure.name} A", f"{figure.name} B", f"{figure.name} B less A"]
    rows = []
    for place, name in enumerate(pairs.label_names):
        cells: list[str | int | float | None] = [printable(name, LONGEST), comparison.samples[place]]
        cells += numbers(comparison.figures[first.key][place])[:5]
        for figure in others:
            paired = comparison.figures[figure.key][place]
            cells += [paired.a, paired.b, paired.difference]
        rows.append(cells)
    rows.sort(key=lambda cells: -abs(np.nan_to_num(cells[4])))
    formats = ["", ",d", ".3f", ".3f", "+.3f", "+.3f", "+.3f", *([".3f", ".3f", "+.3f"] * len(others))]
    intro = "The largest differences first. Of twenty that are none, one looks like one by chance."
    return Section(f"By {what}", [Table(headings, rows, formats=formats)], intro)


def mistakes_section(comparison: Comparison) -> list[Section]:
    if not comparison.mistakes:
        return []
    rows = [
        [printable(item.label, LONGEST), printable(item.prediction, LONGEST), item.a, item.b, item.b - item.a]
        for item in comparison.mistakes
    ]
    table = Table(["true class", "taken for", "A", "B", "B less A"], rows, formats=["", "", ",d", ",d", "+,d"])
    return [Section("Mistakes that came and went", [table], "Images of a class that a model takes for another.")]


def cost_section(comparison: Comparison) -> Section:
    if not any(comparison.costs):
        return Section("Speed and size", [Text(comparison.note or "Not measured.")])
    rows = []
    for side, cost in zip("AB", comparison.costs, strict=True):
        if cost is None:
            continue
        height_width = "x".join(map(str, cost.image_size)) if cost.image_size else None
        rows.append(
            [
                side,
                cost.runtime,
                cost.parameters,
                size_text(cost.bytes) if cost.bytes else None,
                height_width,
                cost.images_per_second,
                1000 * cost.seconds if cost.seconds else None,
                100 * cost.spread if cost.seconds else None,
                cost.device or None,
            ]
        )
    headings = [
        "",
        "runtime",
        "parameters",
        "weights on disk",
        "pixels",
        "images/s",
        "ms per batch",
        "spread, %",
        "device",
    ]
    parts: list[Part] = [Table(headings, rows, formats=["", "", ",d", "", "", ".1f", ".1f", ".1f", ""])]
    ratio = speed_ratio(comparison.costs)
    if ratio is not None:
        cost = comparison.costs[0]
        parts.append(
            Text(
                f"B is {ratio:.2f} times as fast as A. Measured in turns, {cost.batch_size} images at once, on this "
                "machine; other machines may say otherwise. The model alone is timed, with images that are prepared. "
                "The spread is that of the middle half of the turns."
            )
        )
    elif comparison.note:
        parts.append(Text(f"Speed: {comparison.note}."))
    return Section("Speed and size", parts)
