"""The ablation table of the first paper (arXiv 2111.11418, table 5), rerun with this package's training code."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..evaluation.intervals import LEVEL
from ..foundation.errors import Diverged, UserError, one_line
from ..foundation.figures import new_figure, save_figure
from ..foundation.files import replace_text, write_json
from ..foundation.processes import found_by_main, processes
from ..hub.rendering import plain_markdown
from ..settings.classification import SMALL_MODEL, ClassificationSettings
from .checkpoints import free_name
from .loop import train
from .records import content_of, differences, key_of


@dataclass(frozen=True)
class Row:
    """One row: what it changes in the baseline's `MetaFormerConfig`, and the paper's ImageNet-1K top-1 in percent."""

    group: str
    label: str
    paper: float
    overrides: dict[str, Any] = field(default_factory=dict)


def mixers(*names: str) -> dict[str, Any]:
    return {"token_mixers": list(names)}


POOL, ATTENTION, MLP = "pooling", "attention", "spatial_mlp"
LAYER_NORM = {"norm_layer": "layer_norm"}

ROWS: dict[str, Row] = {
    "baseline": Row("baseline", "pooling 3x3, GroupNorm, GELU", 77.2),
    "identity": Row("token mixer", "identity", 74.3, mixers(*["identity"] * 4)),
    "random": Row("token mixer", "global random matrix", 75.8, mixers(*["random"] * 4)),
    "depthwise_conv": Row("token mixer", "depthwise conv 3x3", 78.1, mixers(*["depthwise_conv"] * 4)),
    "pool5": Row("token mixer", "pooling 5x5", 77.2, {"pool_size": 5}),
    "pool7": Row("token mixer", "pooling 7x7", 77.1, {"pool_size": 7}),
    "pool9": Row("token mixer", "pooling 9x9", 76.8, {"pool_size": 9}),
    "layer_norm": Row("norm", "LayerNorm", 76.5, LAYER_NORM),
    "batch_norm": Row("norm", "BatchNorm", 76.4, {"norm_layer": "batch_norm"}),
    "no_norm": Row("norm", "none", 46.1, {"norm_layer": "none"}),
    "relu": Row("activation", "ReLU", 76.4, {"hidden_act": "relu"}),
    "silu": Row("activation", "SiLU", 77.2, {"hidden_act": "silu"}),
    "no_residual": Row("other", "no residual", 0.1, {"use_residual": False}),
    "no_mlp": Row("other", "no channel MLP", 5.7, {"use_mlp": False}),
    "pppa": Row(
        "hybrid",
        "pool, pool, pool, attention",
        78.3,
        {**mixers(POOL, POOL, POOL, ATTENTION), **LAYER_NORM, "position_embeddings": [False, False, False, True]},
    ),
    "ppaa": Row(
        "hybrid",
        "pool, pool, attention, attention",
        81.0,
        {
            **mixers(POOL, POOL, ATTENTION, ATTENTION),
            **LAYER_NORM,
            "position_embeddings": [False, False, True, False],
        },
    ),
    "pppf": Row("hybrid", "pool, pool, pool, spatial FC", 77.5, mixers(POOL, POOL, POOL, MLP)),
    "ppff": Row("hybrid", "pool, pool, spatial FC, spatial FC", 77.9, mixers(POOL, POOL, MLP, MLP)),
}


def settings_of_row(row: Row, base: ClassificationSettings, output_dir: Path, seed: int) -> ClassificationSettings:
    """The base settings with the row's architecture. MetaFormerConfig can say all of them, the baseline included.

    Raises:
        UserError: the base has the small model of a recipe, in five stages, of which the rows say nothing.
    """
    if base.overrides() == SMALL_MODEL:
        raise UserError(
            f"the rows are changes to PoolFormer, and --recipe {base.recipe} trains another model: give --config_name "
            "poolformer_s12, with --config_overrides if it is to be smaller, or --recipe demo."
        )
    values = {**base.to_dict(), "hub_token": base.hub_token, "config_file": None}
    overrides = {
        **mixers(*[POOL] * 4),
        **({"image_size": base.image_size} if base.image_size else {}),
        **base.overrides(),
        **row.overrides,
    }
    # A MetaFormer of v1's dimensions; its mixer is always overridden.
    values |= {"config_name": "metaformer_id_s12", "model_name_or_path": None, "config_overrides": overrides}
    values |= {"output_dir": str(output_dir), "seed": seed, "checkpointing_steps": "no"}
    return ClassificationSettings(**values)


RECORD = "ablation.json"


def measure(
    name: str, base: ClassificationSettings, output_dir: Path, seed: int, content: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """
    Trains one row with one seed, or reads its result if it is there already; every process must call it.

    A loss that is no longer finite is a result of an ablation, not an error: its accuracy is that of guessing.

    Args:
        content: as `content_of` gives it, which is asked if it is None.
    """
    settings = settings_of_row(ROWS[name], base, output_dir, seed)
    key = key_of(settings, content_of(base) if content is None else content)
    found = found_by_main(lambda: find_record(output_dir, key, tell=True))
    if found is not None:
        return found
    settings.overwrite_output_dir = True  # what an interrupted attempt left there
    try:
        results, diverged = train(settings), False
    except Diverged:
        results, diverged = {}, True
    result = {
        "row": name,
        "seed": seed,
        "accuracy": results.get("eval_accuracy"),
        "train_loss": results.get("train_loss"),
        "seconds": results.get("train_runtime"),
        "diverged": diverged,
    }
    if processes().is_main_process:
        record = output_dir / RECORD
        if record.is_file():  # of other settings, with which somebody may come back
            record.rename(free_name(record))
        write_json(record, {**result, "key": key})
    return result


def find_record(folder: Path, key: Mapping[str, Any], tell: bool = False) -> dict[str, Any] | None:
    """The result with this key among the records of a row and seed.

    Args:
        tell: why there is none, if there are others.
    """
    reasons = []
    for path in sorted(folder.glob(f"{RECORD}*")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            theirs, result = record.pop("key", None), record
            if theirs == key:
                return {
                    name: result[name] for name in ("row", "seed", "accuracy", "train_loss", "seconds", "diverged")
                }
            reasons.append(differences(theirs, key))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reasons.append(f"{path.name} cannot be read ({one_line(error)})")
    if reasons and tell:
        print(f"{folder} holds another result: {reasons[0]}. This one is measured anew, that one is kept.", flush=True)
    return None


def all_results(base: ClassificationSettings, folder: Path, content: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every finished result of these settings and data, whichever call of the command measured it."""
    results = []
    for name, row in ROWS.items():
        for path in (folder / "rows" / name).glob("seed-*"):
            seed = path.name.removeprefix("seed-")
            if seed.isdecimal():
                result = find_record(path, key_of(settings_of_row(row, base, path, int(seed)), content))
                results += [result] if result is not None else []
    return results


def choose_rows(names: Sequence[str]) -> list[str]:
    """Row names from what a user typed: names, groups or `all`, in the order of the table."""
    groups = {row.group for row in ROWS.values()}
    unknown = [name for name in names if name not in {"all", *ROWS, *groups}]
    if unknown:
        near = difflib.get_close_matches(unknown[0], ["all", *groups, *ROWS], n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: all, {', '.join([*groups, *ROWS])}"
        raise UserError(f"unknown rows {', '.join(unknown)}; {hint}")
    return [name for name, row in ROWS.items() if {"all", name, row.group} & set(names)]


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    One line per row, over its seeds: the mean accuracy in percent and how sure it is, beside the paper's figure.

    `low` and `high` are the 95 % interval of the mean by Student's t, None for a single run.
    """
    lines = []
    for name, row in ROWS.items():
        runs = [result for result in results if result["row"] == name]
        if not runs:
            continue
        accuracies = [100 * run["accuracy"] for run in runs if run["accuracy"] is not None]
        mean = statistics.mean(accuracies) if accuracies else None
        half = None
        if len(accuracies) > 1:
            half = student_t(len(accuracies) - 1) * statistics.stdev(accuracies) / math.sqrt(len(accuracies))
        lines.append(
            {
                "row": name,
                "group": row.group,
                "variant": row.label,
                "seeds": len(runs),
                "diverged": sum(run["diverged"] for run in runs),
                "accuracy": mean,
                "low": None if half is None else mean - half,
                "high": None if half is None else mean + half,
                "paper_imagenet": row.paper,
            }
        )
    return lines


def student_t(freedom: int, level: float = LEVEL) -> float:
    """Between plus and minus which value the middle `level` of Student's t lies (Abramowitz and Stegun, 26.7.3-4)."""

    def middle_within(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        odd, term, total = freedom % 2, 1.0, 0.0
        if odd:
            term = math.cos(angle)
        for k in range(odd, freedom - 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
        share = math.sin(angle) * total
        return (angle + share) * 2 / math.pi if odd else share

    low, high = 0.0, 1e6
    for _ in range(100):
        between = (low + high) / 2
        low, high = (between, high) if middle_within(between) < level else (low, between)
    return high


def rank_correlation(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Spearman's, of our accuracies and the paper's; None for fewer than three rows that have one."""
    both = [(line["accuracy"], line["paper_imagenet"]) for line in lines if line["accuracy"] is not None]
    if len(both) < 3:
        return None
    from torchmetrics.functional import spearman_corrcoef

    ours, paper = torch.tensor(both, dtype=torch.float64).T
    return spearman_corrcoef(ours, paper).item()


def write_table(lines: Sequence[dict[str, Any]], folder: Path, about: str) -> None:
    """`ablation.csv` and `ablation.md`."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    replace_text(folder / "ablation.csv", table.getvalue())
    text = [f"# Ablation of PoolFormer\n\n{plain_markdown(about)}\n"]
    text += ["| group | variant | ours, top-1 (%) | 95 % interval | seeds | paper, ImageNet-1K top-1 (%) |"]
    text += ["|---|---|---:|---:|---:|---:|"]
    for line in lines:
        ours = "diverged" if line["accuracy"] is None else f"{line['accuracy']:.2f}"
        if line["accuracy"] is not None and line["diverged"]:
            ours += f" ({line['diverged']} diverged)"
        interval = "" if line["low"] is None else f"{line['low']:.2f} to {line['high']:.2f}"
        text.append(
            f"| {line['group']} | {line['variant']} | {ours} | {interval} | {line['seeds']} "
            f"| {line['paper_imagenet']} |"
        )
    correlation = rank_correlation(lines)
    if correlation is not None:
        text += [f"\nRank correlation of the two columns (Spearman): {correlation:.2f}."]
    replace_text(folder / "ablation.md", "\n".join(text) + "\n")


def draw_table(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """
    Ours, with intervals, beside the paper's, row by row.

    The data sets differ, so the orders compare and the values do not: each has an axis of its own, that of the paper
    without the rows that fail there, which would squeeze all others together.
    """
    figure, axes = new_figure((11, 0.34 * len(lines) + 1.3), columns=2)
    ours = [(line["accuracy"], line["low"], line["high"]) for line in lines]
    paper = [(line["paper_imagenet"], None, None) for line in lines]
    for axis, values, name in zip(axes, (ours, paper), ("ours, this data set", "paper, ImageNet-1K"), strict=True):
        known = [value for value, _, _ in values if value is not None]
        # Far below half of the others is a failure, told in words.
        least = min((value for value in known if value > statistics.median(known) * 0.75), default=0.0)
        for place, (value, low, high) in enumerate(values):
            if value is None or value < least:
                words = "diverged" if value is None else f"{value:.1f}"
                axis.annotate(
                    f"\N{LEFTWARDS ARROW} {words}",
                    (0, place),
                    (4, 0),
                    ("axes fraction", "data"),
                    "offset points",
                    va="center",
                )
                continue
            around = None if low is None else [[value - low], [high - value]]
            axis.errorbar(value, place, xerr=around, fmt="o", color="C0" if axis is axes[0] else "C1", capsize=3)
        axis.set_ylim(len(lines) - 0.5, -0.5)
        axis.set_xlabel(f"top-1 accuracy (%): {name}")
        axis.grid(axis="x", alpha=0.3)
    labels = [f"{line['group']}: {line['variant']}" for line in lines]
    axes[0].set_yticks(range(len(lines)), labels, parse_math=False)
    axes[1].set_yticks(range(len(lines)), [""] * len(lines))
    figure.suptitle(title, parse_math=False)
    save_figure(figure, path)
