"""The page of an inspection: what was found, worst first, in plain parts of `reports.page`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..foundation.files import size_text
from ..foundation.names import first_few, printable
from .inspection_settings import FAULTS
from .measures import BINS, LONGEST_SIDE, Extremes, Measures, Place, Reasons, SplitMeasures, number_edges, quantile
from .outliers import Outliers
from .page import Bars, Chart, Commands, Facts, Gallery, Page, Part, Section, Table, Text, Tile
from .suggestions import Suggestion


# What a page shows at most; report.json and images.parquet have the rest.
BARS, ROWS = 40, 200
GROUPS, OF_A_GROUP = 24, 3
_NAME = 60


@dataclass(frozen=True)
class Member:
    """An image among others that show the same.

    Attributes:
        label: in words; empty without one.
    """

    place: Place
    label: str = ""


@dataclass(frozen=True)
class Group:
    """Images that show the same, or nearly so: a few of `count`; perhaps mirrored."""

    members: Sequence[Member]
    count: int
    exact: bool
    mirrored: bool = False


@dataclass
class Copies:
    """
    Attributes:
        leaks: images outside of the training split that are in it, or of test that are in validation, too;
            `exact_leaks` of them pixel by pixel.
        duplicates: images that one split has besides the first of their kind.
        contradictions: groups whose labels differ; of `exact_contradictions` those of the same pixels.
        near: split -> images that look like another one.
        data: all of it, for report.json.
    """

    leaks: int = 0
    exact_leaks: int = 0
    duplicates: int = 0
    exact_duplicates: int = 0
    contradictions: int = 0
    exact_contradictions: int = 0
    leak_groups: list[Group] = field(default_factory=list)
    duplicate_groups: list[Group] = field(default_factory=list)
    contradiction_groups: list[Group] = field(default_factory=list)
    near: Mapping[str, int] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Findings:
    """All that a page shows.

    Attributes:
        name: of the dataset.
        origins: split -> where it comes from, in words.
        remarks: what was odd about splits and labels.
        sample: images in all, where not every one was looked at.
        train, validation: names of the splits; None without one.
        sheets: class -> some of its images.
        previews: images and what augmentation makes of them.
        preview_note: by which settings.
        command: the words of a command line; empty where there is nothing to train.
        pictures: what could be read again.
    """

    name: str
    measures: Measures
    origins: Mapping[str, str]
    remarks: Sequence[str]
    sample: int | None
    train: str | None
    validation: str | None
    copies: Copies
    outliers: Outliers | None
    suggestions: Sequence[Suggestion]
    command: str
    sheets: Mapping[str, Sequence[Place]] = field(default_factory=dict)
    previews: Sequence[tuple[Place, Image.Image, Sequence[Image.Image]]] = ()
    preview_note: str = ""
    pictures: Mapping[tuple[str, int], Image.Image] = field(default_factory=dict)

    @property
    def found(self) -> dict[str, int]:
        """Fault -> how many images; of contradictions, pictures."""
        copies = self.copies
        counts = (copies.leaks, copies.duplicates, self.measures.broken, copies.contradictions)
        return dict(zip(FAULTS, counts, strict=True))

    def short(self, path: str) -> str:
        """A path without the folder that all of them have in common."""
        return path.removeprefix(f"{self.name.rstrip('/')}/")

    def picture(self, place: Place) -> list[Image.Image]:
        found = self.pictures.get((place.split, place.position))
        return [] if found is None else [found]


def build_page(findings: Findings) -> Page:
    measures = findings.measures
    sections = [
        glance(findings),
        advice(findings),
        splits(findings),
        *classes(findings),
        *numbers(findings),
        *leaks(findings),
        *contradictions(findings),
        *duplicates(findings),
        *broken(findings),
        *odd(findings),
        sizes(findings),
        colours(findings),
        *augmentation(findings),
        *sheets(findings),
    ]
    what = f"{measures.images:,} images"
    if findings.sample is not None:
        what += f" of {findings.sample:,}"
    return Page(f"Inspection of {printable(findings.name, 100)}", f"{what}, before training", sections)


def glance(findings: Findings) -> Section:
    measures, found = findings.measures, findings.found
    pairs = [("images", f"{measures.images:,}"), ("splits", str(len(measures.splits)))]
    if measures.kind in ("class", "classes"):
        pairs.append(("classes", f"{len(measures.label_names):,}"))
    elif measures.kind == "numbers":
        pairs.append(("targets", str(len(measures.label_names))))
    if measures.readable:
        side, other = quantile(measures.shorter, 0.5), quantile(measures.longer, 0.5)
        pairs.append(("median size", f"{side} x {other}"))
    if measures.bytes_known:
        pairs.append(("stored", size_text(measures.bytes)))
    words = dict(zip(FAULTS, ("leaks", "copies", "broken images", "contradictory labels"), strict=True))
    pairs += [(words[fault], f"{count:,}") for fault, count in found.items()]
    faults = [f"{count:,} {words[fault]} ({FAULTS[fault]})" for fault, count in found.items() if count]
    absent = [words[fault] for fault, count in found.items() if not count]
    bad = found["leaks"] or found["contradictions"] or found["broken"] == measures.images
    level = "bad" if bad else "warning" if faults else "good"
    intro = f"Found: {'; '.join(faults)}." if faults else ""
    intro += f" Looked for, and not there: {', '.join(absent)}." if absent else ""
    if findings.sample is not None:
        intro += " Only a sample was looked at: whole datasets have more of everything."
    return Section("At a glance", [Facts(pairs)], intro, level)


def advice(findings: Findings) -> Section:
    lines = [": ".join(filter(None, [one.words, one.reason])) for one in findings.suggestions]
    parts: list[Part] = [Text("\n\n".join(lines))]
    if findings.command:
        parts += [Text("All of it in one command:"), Commands([findings.command])]
    return Section("What to do", parts, "What these images suggest, each with its reason.")


def splits(findings: Findings) -> Section:
    roles = {findings.train: "training", findings.validation: "validation"}
    several = findings.measures.kind != "nothing"
    rows = []
    for name, split in findings.measures.splits.items():
        row = [printable(name, _NAME), roles.get(name, ""), split.images, split.broken]
        rows.append([*row, *([split.unlabelled] if several else []), printable(findings.origins.get(name, ""), 200)])
    headings = ["split", "used for", "images", "broken", *(["no label"] if several else []), "from"]
    parts: list[Part] = [Table(headings, rows)]
    parts += [Text("\n\n".join(findings.remarks))] if findings.remarks else []
    if findings.measures.label_errors.counts:
        parts.append(
            reasons_table(
                findings, findings.measures.label_errors, "Labels that cannot be understood; training stops:"
            )
        )
    return Section("Splits", parts, level="warning" if findings.remarks else "plain")


def in_training(measures: Measures, train: str | None) -> SplitMeasures:
    """The training split, or what there is."""
    splits = measures.splits
    return splits[train] if train in splits else next(iter(splits.values()))


def classes(findings: Findings) -> list[Section]:
    measures = findings.measures
    if measures.kind not in ("class", "classes"):
        return []
    training = in_training(measures, findings.train)
    names, counts = measures.label_names, training.counts
    order = np.argsort(-counts, kind="stable")
    positive = counts[counts > 0]
    level, intro = "plain", ""
    if len(positive) > 1:
        common, rare = order[0], order[len(positive) - 1]
        ratio = counts[common] / counts[rare]
        level = "warning" if ratio >= 3 else "good"
        intro = (
            f"The commonest class, {printable(names[common], _NAME)}, has {counts[common]:,} images in "
            f"{training.name}, the rarest, {printable(names[rare], _NAME)}, {counts[rare]:,}: "
            f"{ratio:.3g} to 1."
        )
        if ratio == 1:
            intro = f"Each class has {counts[common]:,} images in {training.name}."
    if empty := int((counts == 0).sum()):
        level = "warning"
        intro += f" {empty:,} of the classes have no image there."
    # The rarest are what one looks for; of many classes both ends are shown.
    half = BARS // 2
    shown = list(order) if len(order) <= BARS else [*order[:half], *order[-half:]]
    threshold = counts[order[0]] / 10 if len(order) else 0
    bars = [
        (
            printable(names[index], _NAME),
            float(counts[index]),
            f"{counts[index]:,}" + (", rare" if counts[index] < threshold else ""),
        )
        for index in shown
    ]
    left = len(order) - len(shown)
    caption = f"The {half} commonest and the {half} rarest; {left:,} between them are not shown." if left else ""
    parts: list[Part] = [Bars(bars, caption)]
    if len(measures.splits) > 1:
        rows = [
            [printable(names[index], _NAME), *(int(split.counts[index]) for split in measures.splits.values())]
            for index in (order if len(order) <= ROWS else [*order[: ROWS // 2], *order[-ROWS // 2 :]])
        ]
        more = f"{len(order) - ROWS:,} more are in report.json." if len(order) > ROWS else ""
        parts.append(Table(["class", *(printable(name, 30) for name in measures.splits)], rows, more))
    if measures.kind == "classes":
        parts += several_labels(measures)
    return [Section("Classes", parts, intro, level)]


def several_labels(measures: Measures) -> list[Part]:
    per_image = sum((split.per_image for split in measures.splits.values()), start=type(measures.formats)())
    parts: list[Part] = []
    if per_image:
        most = max(per_image)
        shown = range(min(most, 20) + 1)
        rows = [(f"{number} labels" if number != 1 else "1 label", float(per_image[number])) for number in shown]
        bars = [(name, count, f"{count:,.0f}") for name, count in rows]
        if most > 20:
            more = sum(count for number, count in per_image.items() if number > 20)
            bars.append(("more", float(more), f"{more:,}"))
        parts.append(Bars(bars, "Labels per image, all splits."))
    if len(measures.common) > 1:
        names = [printable(measures.label_names[index], 30) for index in measures.common]
        rows = []
        for row, name in enumerate(names):
            own = measures.together[row, row]
            rows.append([name, int(own), *(float(both / own) if own else None for both in measures.together[row])])
        formats = ["", ",", *[".0%"] * len(names)]
        caption = "Of the images with the label on the left, the share that has the one above, too."
        parts.append(Table(["label", "images", *names], rows, caption, formats))
    return parts


def numbers(findings: Findings) -> list[Section]:
    measures = findings.measures
    known = [split for split in measures.splits.values() if split.histogram is not None]
    if measures.kind != "numbers" or not known:
        return []
    rows = [
        [printable(name, _NAME), printable(split.name, 30), split.labelled]
        + [float(figures[index]) for figures in (split.mean, split.std, split.least, split.most)]
        for index, name in enumerate(measures.label_names[:ROWS])
        for split in known
    ]
    parts: list[Part] = [Table(["target", "split", "images", "mean", "std", "least", "most"], rows)]
    edges = number_edges(measures)
    for index, name in enumerate(measures.label_names[:6]):

        def draw(axes, index=index) -> None:
            for split in known:
                share = split.histogram[index] / max(split.histogram[index].sum(), 1)
                axes.stairs(share, edges[index], label=printable(split.name, 30), fill=False, linewidth=1.5)
            axes.set_ylabel("share of the split")
            if len(known) > 1:
                axes.legend()

        parts.append(Chart(draw, f"Histogram of {printable(name, _NAME)} by split.", printable(name, _NAME)))
    return [Section("Numbers", parts)]


def tiles_of(findings: Findings, members: Sequence[Member]) -> Tile | None:
    """Images side by side, with where each of them is; None where none can be shown."""
    pictures, lines = [], []
    for member in members:
        pictures += findings.picture(member.place)
        what = f" ({printable(member.label, _NAME)})" if member.label else ""
        lines.append(f"{member.place.split}: {findings.short(member.place.path)}{what}")
    return Tile(pictures, lines) if pictures else None


def gallery(findings: Findings, groups: Sequence[Group], side: int = 112) -> list[Part]:
    tiles = []
    for group in groups:
        tile = tiles_of(findings, group.members)
        if tile is None:
            continue
        more = group.count - len(group.members)
        how = "the same pixels" if group.exact else "mirrored" if group.mirrored else "nearly the same"
        tile.note = f"{how}, {more} more" if more else how
        tiles.append(tile)
    left = f"The first {len(groups)} groups; all are in report.json." if len(groups) == GROUPS else ""
    return [Gallery(tiles, left, side)] if tiles else []


def leaks(findings: Findings) -> list[Section]:
    copies = findings.copies
    if not copies.leaks:
        return []
    intro = (
        f"{copies.leaks:,} images of one split are in another, too: {copies.exact_leaks:,} pixel by pixel, the others "
        "nearly. What is measured on them says how well a model remembers."
    )
    return [Section("Leaks between splits", gallery(findings, copies.leak_groups), intro, "bad")]


def contradictions(findings: Findings) -> list[Section]:
    copies = findings.copies
    if not copies.contradictions:
        return []
    intro = (
        f"Pictures that are there several times with different labels: {copies.contradictions:,}, "
        f"{copies.exact_contradictions:,} of them pixel by pixel: of these one label is wrong."
    )
    parts = gallery(findings, copies.contradiction_groups)
    return [Section("Contradictory labels", parts, intro, "bad")]


def duplicates(findings: Findings) -> list[Section]:
    copies = findings.copies
    if not copies.duplicates:
        return []
    intro = (
        f"{copies.duplicates:,} images are in a split that has the same picture already: {copies.exact_duplicates:,} "
        "pixel by pixel, the others nearly. They count twice in training, and in what is measured."
    )
    parts = gallery(findings, copies.duplicate_groups)
    return [Section("Copies within a split", parts, intro, "warning")]


def reasons_table(findings: Findings, reasons: Reasons, caption: str = "") -> Table:
    rows = []
    for reason, count in reasons.counts.most_common(50):
        examples = [printable(findings.short(path), 120) for path, _ in reasons.examples[reason]]
        texts = {text for _, text in reasons.examples[reason]}
        reason = texts.pop() if len(texts) == 1 else reason
        rows.append([count, reason, first_few(examples, 3)])
    return Table(["images", "reason", "for example"], rows, caption)


def broken(findings: Findings) -> list[Section]:
    measures = findings.measures
    if not measures.broken:
        return []
    intro = f"{measures.broken:,} of {measures.images:,} images cannot be read."
    level = "bad" if measures.broken > 0.01 * measures.images else "warning"
    return [Section("Broken images", [reasons_table(findings, measures.reasons)], intro, level)]


def odd(findings: Findings) -> list[Section]:
    found = findings.outliers
    if found is None:
        return []
    parts: list[Part] = []
    if found.strangers:
        rows = [[*map(lambda text: printable(text, _NAME), row[:3]), row[3]] for row in found.strangers[:ROWS]]
        parts.append(
            Table(
                ["split", "class", "looks like the training images of", "images"],
                rows,
                "Whole classes of a split whose images look like another class of the training split.",
            )
        )
    if found.worst.found:
        parts.append(extremes(findings, found.worst, "The farthest, farthest first.", 96))
    if found.twins:
        rows = [[printable(first, _NAME), printable(second, _NAME), alike] for first, second, alike in found.twins]
        parts.append(Table(["class", "class", "cosine"], rows, "The classes that look most alike.", ["", "", ".3f"]))
    intro = (
        f"{found.count:,} images look, to the model, more like another class than like their own."
        if found.count
        else ("No image looks much more like another class than like its own.")
    )
    return [Section("Odd ones out", parts, intro, "bad" if found.strangers else "warning" if found.count else "good")]


def extremes(findings: Findings, found: Extremes, caption: str, side: int = 96) -> Gallery:
    tiles = [
        Tile(findings.picture(place), [f"{place.split}: {findings.short(place.path)}", what])
        for _, place, what in found.found
        if findings.picture(place)
    ]
    return Gallery(tiles, caption, side)


def sizes(findings: Findings) -> Section:
    measures = findings.measures
    if not measures.readable:
        return Section("Sizes and formats", [], "There is no image that could be read.", "bad")
    shares = (0, 0.05, 0.5, 0.95, 1)
    rows = [
        [name, *(max(quantile(counts, share), int(np.flatnonzero(counts)[0])) for share in shares)]
        for name, counts in (("shorter side", measures.shorter), ("longer side", measures.longer))
    ]
    parts: list[Part] = []
    if len(measures.sizes) == 1:
        (((width, height), _),) = measures.sizes.items()
        intro = f"All images have {width} x {height} pixels."
    else:
        intro = f"{measures.oblong:,} of {measures.readable:,} are at least twice as long as wide, or as wide as long."
        parts += [Table(["pixels", "least", "5 %", "median", "95 %", "most"], rows), Chart(*side_histogram(measures))]
        common = measures.sizes.most_common(8)
        if common[0][1] > 1:
            table = [[f"{width} x {height}", count, count / measures.readable] for (width, height), count in common]
            parts.append(Table(["size", "images", "share"], table, "The commonest sizes.", ["", ",", ".1%"]))
    stored = [
        [what, printable(name, 30), count, count / measures.readable]
        for what, counter in (("format", measures.formats), ("mode", measures.modes))
        for name, count in counter.most_common(20)
    ]
    parts.append(Table(["stored", "as", "images", "share"], stored, "", ["", "", ",", ".1%"]))
    if measures.bytes_known:
        intro += f" An image takes {size_text(round(measures.bytes / measures.bytes_known))} on average."
    areas = [abs(kind.found[0][0]) for kind in (measures.smallest, measures.largest)]
    if areas[1] >= 4 * areas[0]:
        parts.append(extremes(findings, measures.smallest, "The smallest."))
        parts.append(extremes(findings, measures.largest, "The largest."))
    if measures.longest.found:
        parts.append(extremes(findings, measures.longest, "The longest, of which a square crop sees a part."))
    return Section("Sizes and formats", [part for part in parts if not isinstance(part, Gallery) or part.tiles], intro)


def side_histogram(measures: Measures) -> tuple:
    """A chart of the sides, on a logarithmic axis."""
    there = np.flatnonzero(measures.shorter + measures.longer)
    low, high = max(there[0], 1), max(there[-1], 2)
    edges = np.unique(np.round(np.geomspace(low, high + 1, BINS)).astype(int))

    def draw(axes) -> None:
        for counts, name in ((measures.shorter, "shorter side"), (measures.longer, "longer side")):
            values = np.add.reduceat(np.append(counts, 0), np.minimum(edges, LONGEST_SIDE + 1))[:-1]
            axes.stairs(values, edges, label=name, linewidth=1.5)
        if high >= 10 * low:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("pixels")
        axes.set_ylabel("images")
        axes.legend()

    return draw, f"Histogram of the sides of the images, {low} to {high} pixels."


def colours(findings: Findings) -> Section:
    measures = findings.measures
    if not measures.measured:
        return Section("Colours", [], "There is no image whose pixels could be measured.")
    names = ["red", "green", "blue"] if measures.channels == 3 else [f"{index}" for index in range(measures.channels)]
    if measures.grey == measures.measured:
        names = ["grey"]
    rows = [[name, float(measures.channel_mean[i]), float(measures.channel_std[i])] for i, name in enumerate(names)]
    caption = "White is 1; each image counts as much as any other."
    parts: list[Part] = [Table(["channel", "mean", "std"], rows, caption, ["", ".4f", ".4f"])]
    intro = ""
    if measures.channels == 3 and measures.grey:
        all_ = "All" if measures.grey == measures.readable else f"{measures.grey:,} of {measures.readable:,}"
        intro = f"{all_} images are grey"
        intro += f", {measures.grey_as_rgb:,} of them stored with three channels." if measures.grey_as_rgb else "."
    if measures.blank:
        intro += f" {measures.blank:,} are all of one colour, and show nothing."
        parts.append(extremes(findings, measures.blanks, "Of one colour."))
    return Section("Colours", parts, intro, "warning" if measures.blank else "plain")


def augmentation(findings: Findings) -> list[Section]:
    if not findings.previews:
        return []
    tiles = [
        Tile([image, *made], [f"{place.split}: {findings.short(place.path)}"])
        for place, image, made in findings.previews
    ]
    return [
        Section(
            "What training sees",
            [Gallery(tiles, side=80)],
            f"An image as it is, and examples that a run would make of it. {findings.preview_note}",
        )
    ]


def sheets(findings: Findings) -> list[Section]:
    parts = []
    for name, places in findings.sheets.items():
        tiles = [
            Tile(findings.picture(place), [findings.short(place.path)]) for place in places if findings.picture(place)
        ]
        if tiles:
            parts.append(Gallery(tiles, printable(name, 100), 96))
    if not parts:
        return []
    total = len(findings.measures.label_names)
    kinds = findings.measures.kind in ("class", "classes")
    left = (
        f" {len(findings.sheets)} of {total:,} classes: the commonest and the rarest."
        if kinds and len(findings.sheets) < total
        else ""
    )
    return [Section("Contact sheet", parts, f"Some images{' of each class' if kinds else ''}, drawn at random.{left}")]
