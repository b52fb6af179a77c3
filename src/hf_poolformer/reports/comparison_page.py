"""A comparison of two models as a page, and as a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    chosen = [comparison.better_on("A"), comparison.better_on("B"), comparison.apart]
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
    pairs = comparison.pairs
    if pairs.task.reads != "numbers":
        lines.append(f"Both give the same answer to {100 * comparison.agreement:.2f} % of the images.")
    lines += [f"Left out: {count:,} image{'s' * (count > 1)} {why}." for why, count in left_out(comparison)]
    if (ratio := speed_ratio(comparison.costs)) is not None:
        speeds = [f"{cost.images_per_second:.1f}" for cost in comparison.costs]
        lines.append(f"Speed: A {speeds[0]}, B {speeds[1]} images/s; B is {ratio:.2f} times as fast as A.")
    elif comparison.note:
        lines.append(f"Speed: {comparison.note}.")
    sizes = [size_text(cost.bytes) if cost and cost.bytes else None for cost in comparison.costs]
    if any(sizes):
        lines.append(f"On disk: A {sizes[0] or 'unknown'}, B {sizes[1] or 'unknown'}.")
    return lines


def left_out(comparison: Comparison) -> list[tuple[str, int]]:
    """Why images were left out, and how many."""
    counts = {
        "that cannot be read": len(comparison.broken),
        "that only B has answered": comparison.pairs.missing_a,
        "that only A has answered": comparison.pairs.missing_b,
    }
    return [(why, count) for why, count in counts.items() if count]


def verdict(comparison: Comparison) -> str:
    """Which model is better, by how much, and how sure that is, in a few sentences."""
    figure, main, ahead = comparison.main_figure, comparison.main, comparison.main.ahead(comparison.main_figure)
    count, name = f"{len(comparison.pairs):,} images", name_of(figure)
    if ahead is None:
        text = f"A and B have the same {name} on {count}"
    else:
        word = "higher" if figure.better == "high" else "lower"
        whose = f"{ahead} is better: its" if comparison.better else f"{ahead}'s"
        text = f"{whose} {name} is {gap_text(figure, abs(main.difference))} {word} on {count}"
    if main.interval is not None:
        ends = sorted(main.interval if main.difference >= 0 else [-end for end in main.interval])
        low, high = (gap_text(figure, end, unit=False) for end in ends)
        text += f" (95 % interval {low} to {high})"
    if ahead is not None and not comparison.better:
        text += ", which may be chance"
    return f"{text}. {test_text(comparison)}"


def test_text(comparison: Comparison) -> str:
    test, p = comparison.test, comparison.p
    if p is None:
        return ""
    if comparison.pairs.task.reads != "class":
        return f"By the paired bootstrap, {p_text(p)}."
    return (
        f"Only A gets {test.only_a:,} of them right, only B {test.only_b:,}: {p_text(p)} by McNemar's test "
        f"({test.method})."
    )


def p_text(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def name_of(figure: Figure) -> str:
    """Within a sentence."""
    return figure.name[0].lower() + figure.name[1:] if figure.name[1:2].islower() else figure.name


def gap_text(figure: Figure, value: float, *, sign: bool = False, unit: bool = True) -> str:
    """A difference between two models; of shares in percentage points."""
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.2f}{' points' * unit}" if figure.share else f"{value:{plus}.4g}"


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
    facts = [(side, name) for side, name in zip("AB", comparison.names, strict=True)]
    facts += [
        (f"{figure.name}, {side}", figure.text(value, percent=True)) for side, value in (("A", main.a), ("B", main.b))
    ]
    facts.append(("Difference, B less A", gap_text(figure, main.difference, sign=True)))
    if comparison.p is not None:
        facts.append(("Chance of such a difference between equal models", p_text(comparison.p)))
    if pairs.task.reads != "numbers":
        facts.append(("Images with the same answer", f"{100 * comparison.agreement:.2f} %"))
    facts += [(f"Left out: {why}", f"{count:,}") for why, count in left_out(comparison)]
    intervals = [
        f"{side} {figure.text(value, interval, percent=True)}"
        for side, value, interval in (("A", main.a, main.interval_a), ("B", main.b, main.interval_b))
        if interval
    ]
    alone = f"Each by itself, with its 95 % interval: {', '.join(intervals)}." if intervals else ""
    level = {"A": "bad", "B": "good", None: "plain"}[comparison.better]
    return Section("Which is better?", [Facts(facts), Text(f"{verdict(comparison)}\n\n{alone}")], level=level)


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
            "With the 95 % interval of the difference, and p of the bootstrap, 0.002 at least.",
            ["", ".4f", ".4f", "+.4f", "+.4f", "+.4f", ".3f"],
        )
    ]
    if table := comparison.table:
        low, high = newcombe(table.both, table.only_a, table.only_b, table.neither)
        parts += [
            Table(
                ["images", "B right", "B wrong"],
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
        axes.legend(loc="upper left" if pairs.task.reads != "class" else "lower right", markerscale=2)

    shown = f" {len(taken):,} of {len(pairs):,} images, evenly taken." if len(taken) < len(pairs) else ""
    return Chart(
        draw,
        f"The {what} of each image, by A across and by B upwards.",
        f"A dot is an image; on the line both say the same.{shown}",
        (4.6, 4.4),
    )


def gallery_sections(comparison: Comparison, pictures: Mapping[int, Image.Image]) -> list[Section]:
    titles = {
        "class": ("A right, B wrong", "B right, A wrong", "Right or wrong alike, and furthest apart"),
        "classes": ("A has more labels right", "B has more labels right", "As many labels right, and furthest apart"),
        "numbers": ("A nearer than B", "B nearer than A", "Equally near, and furthest apart"),
    }[comparison.pairs.task.reads]
    rows = (comparison.better_on("A"), comparison.better_on("B"), comparison.apart)
    return [gallery_section(comparison, pictures, *part) for part in zip(rows, titles, strict=True) if len(part[0])]


def gallery_section(
    comparison: Comparison, pictures: Mapping[int, Image.Image], rows: np.ndarray, title: str
) -> Section:
    shown = rows[:MOST_SHOWN]
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
    folder = f"{pairs.rows.about.get('dataset') or ''}".rstrip("/") + "/"
    return [*lines, printable(pairs.rows.table["path"][row].as_py().removeprefix(folder))]


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
    pairs, (first, *others) = comparison.pairs, comparison.label_figures
    second = [figure for figure in others if figure.metric in ("f1", "rmse")]
    what = pairs.task.outputs[0]
    headings = [what, "images"]
    for figure in (first, *second):
        headings += [f"{figure.name} A", f"{figure.name} B", "B less A", "from", "to"]
    rows = []
    for place, name in enumerate(pairs.label_names):
        cells: list[str | int | float | None] = [printable(name, LONGEST), comparison.samples[place]]
        for figure in (first, *second):
            cells += numbers(comparison.figures[figure.key][place])[:-1]
        rows.append(cells)
    rows.sort(key=lambda cells: -abs(np.nan_to_num(cells[4])))
    formats = ["", ",d", *([".3f", ".3f", "+.3f", "+.3f", "+.3f"] * (1 + len(second)))]
    intro = (
        "The largest differences first, with 95 % intervals. Where nothing differs, one interval of twenty leaves "
        "out zero by chance."
    )
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
    note = f"Speed: {comparison.note}." if comparison.note else ""
    known = [(side, cost) for side, cost in zip("AB", comparison.costs, strict=True) if cost]
    if not known:
        return Section("Speed and size", [Text(note)])
    rows = [
        ["runtime", *(cost.runtime for _, cost in known)],
        ["parameters", *(f"{cost.parameters:,}" if cost.parameters else None for _, cost in known)],
        ["weights on disk", *(size_text(cost.bytes) if cost.bytes else None for _, cost in known)],
    ]
    ratio = speed_ratio(comparison.costs)
    if ratio is not None:
        note = (
            f"B is {ratio:.2f} times as fast as A. The models were timed in turns, {known[0][1].batch_size} prepared "
            "images at once; the spread is that of the middle half of the turns. Other machines may say otherwise."
        )
        rows += [
            ["pixels of an image", *("x".join(map(str, cost.image_size)) for _, cost in known)],
            ["images per second", *(f"{cost.images_per_second:.1f}" for _, cost in known)],
            ["milliseconds per batch", *(f"{1000 * cost.seconds:.1f}" for _, cost in known)],
            ["spread", *(f"{100 * cost.spread:.1f} %" for _, cost in known)],
            ["device", *(cost.device for _, cost in known)],
        ]
    return Section("Speed and size", [Table(["what", *(side for side, _ in known)], rows), Text(note)])
