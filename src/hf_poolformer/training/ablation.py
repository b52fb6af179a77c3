"""The ablation table of the first paper (arXiv 2111.11418, table 5), rerun with this package's training code."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arguments import TrainingSettings
from .errors import Diverged, UserError
from .loop import train
from .strict_json import to_json


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


def settings_of(row: Row, base: TrainingSettings, output_dir: Path, seed: int) -> TrainingSettings:
    """The base settings with the row's architecture. MetaFormerConfig can say all of them, the baseline included."""
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
    return TrainingSettings(**values)


def measure(name: str, base: TrainingSettings, output_dir: Path, seed: int) -> dict[str, Any]:
    """
    Trains one row with one seed, or reads its result if it is there already.

    A loss that is no longer finite is a result of an ablation, not an error: its accuracy is that of guessing.
    """
    result_file = output_dir / "ablation.json"
    if result_file.is_file():
        return json.loads(result_file.read_text())
    settings = settings_of(ROWS[name], base, output_dir, seed)
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
    result_file.parent.mkdir(parents=True, exist_ok=True)
    result_file.write_text(to_json(result, indent=2) + "\n")
    return result


def choose_rows(names: Sequence[str]) -> list[str]:
    """Row names from what a user typed: names, groups or `all`, in the order of the table."""
    groups = {row.group for row in ROWS.values()}
    unknown = [name for name in names if name not in {"all", *ROWS, *groups}]
    if unknown:
        raise UserError(f"unknown rows {', '.join(unknown)}; there are: all, {', '.join([*groups, *ROWS])}")
    return [name for name, row in ROWS.items() if {"all", name, row.group} & set(names)]


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per row, over its seeds: mean and spread of the accuracy in percent, beside the paper's figure."""
    lines = []
    for name, row in ROWS.items():
        runs = [result for result in results if result["row"] == name]
        if not runs:
            continue
        accuracies = [100 * run["accuracy"] for run in runs if run["accuracy"] is not None]
        lines.append(
            {
                "row": name,
                "group": row.group,
                "variant": row.label,
                "seeds": len(runs),
                "diverged": sum(run["diverged"] for run in runs),
                "accuracy": statistics.mean(accuracies) if accuracies else None,
                "spread": max(accuracies) - min(accuracies) if accuracies else None,
                "paper_imagenet": row.paper,
            }
        )
    return lines


def write_table(lines: Sequence[dict[str, Any]], folder: Path, about: str) -> None:
    """`ablation.csv` and `ablation.md`."""
    with open(folder / "ablation.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    text = [f"# Ablation of PoolFormer\n\n{about}\n"]
    text += ["| group | variant | ours, top-1 (%) | spread | seeds | paper, ImageNet-1K top-1 (%) |"]
    text += ["|---|---|---:|---:|---:|---:|"]
    for line in lines:
        if line["accuracy"] is None:
            ours, spread = "diverged", ""
        else:
            ours, spread = f"{line['accuracy']:.2f}", f"{line['spread']:.2f}"
            ours += f" ({line['diverged']} diverged)" if line["diverged"] else ""
        text.append(
            f"| {line['group']} | {line['variant']} | {ours} | {spread} | {line['seeds']} | {line['paper_imagenet']} |"
        )
    (folder / "ablation.md").write_text("\n".join(text) + "\n")


def draw_table(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Bars: ours and the paper's, row by row. The data sets differ, so the orders compare and the heights do not."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    inches = 0.42 * len(lines) + 1.6
    figure, axis = plt.subplots(figsize=(9, inches))
    places = range(len(lines))
    axis.barh([p - 0.2 for p in places], [line["accuracy"] or 0 for line in lines], 0.38, label="ours, this data set")
    axis.barh([p + 0.2 for p in places], [line["paper_imagenet"] for line in lines], 0.38, label="paper, ImageNet-1K")
    for place, line in zip(places, lines, strict=True):
        ours = "diverged" if line["accuracy"] is None else f"{line['accuracy']:.1f}"
        axis.text((line["accuracy"] or 0) + 0.5, place - 0.2, ours, va="center", fontsize=8)
        axis.text(line["paper_imagenet"] + 0.5, place + 0.2, f"{line['paper_imagenet']:.1f}", va="center", fontsize=8)
    axis.set_yticks(list(places), [f"{line['group']}: {line['variant']}" for line in lines])
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.set_xlim(0, 112)
    axis.set_xlabel("top-1 accuracy (%)")
    axis.set_title(title)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.6 / inches), ncols=2, frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
