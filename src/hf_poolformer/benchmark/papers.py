"""The papers' comparison tables from running models: what was published beside what is counted and measured here.

`published_figures.yaml` holds the published facts with their sources. Parameters and multiply-accumulates are counted
on the models themselves, without storage; speed and memory are measured when asked for, everybody in turns.
`papers_page.py` writes what came out.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from tqdm import tqdm

from hf_poolformer import (
    VARIANTS,
    MetaFormerConfig,
    PoolFormerForInstanceSegmentation,
    PoolFormerForObjectDetection,
    PoolFormerForSemanticSegmentation,
)

from ..foundation.memory import is_out_of_memory
from ..foundation.settings import check_names
from ..foundation.timing import WorkingMemory, take_turns
from ..hub.published_cards import count, figures, parts_of
from ..modeling_poolformer import AUTO_CLASSES
from .case import DTYPES
from .peer_models import build_peer, with_peer_backbone
from .report import environment


DATA = Path(__file__).with_name("published_figures.yaml")
# Of dense tables: the model, and the classes of its data set.
DENSE: dict[str, tuple[type[nn.Module], int]] = {
    "object-detection": (PoolFormerForObjectDetection, 80),
    "instance-segmentation": (PoolFormerForInstanceSegmentation, 80),
    "segmentation": (PoolFormerForSemanticSegmentation, 150),
}
# Tables of classifiers, whose speed can be measured and which have charts.
CLASSIFIERS = ("classification", "metaformer")
# Beyond this a counted figure is marked, unless it is the published one when it is rounded likewise.
MARKED = 0.01


@dataclass
class Row:
    """
    One model of a table.

    Attributes:
        build: library and name, as in `published_figures.yaml`.
        pixels: side of its images; None of dense tasks.
        data: what it was trained on, "1K" or "21K", where the table has both.
        published: parameters in millions, and 1e9 multiply-accumulates where the paper has them.
        scores: published, in percent.
        parameters, macs: counted; `macs` in units of 1e9, None of dense tasks.
        images_per_second, spread, working_memory: measured, of a batch; bytes beyond weights and images.
        note: why it was not measured.
    """

    model: str
    build: str
    family: str
    mixer: str
    source: str
    pixels: int | None
    data: str
    published: dict[str, float | None]
    scores: dict[str, float | None]
    parameters: int = 0
    macs: float | None = None
    images_per_second: float | None = None
    spread: float | None = None
    working_memory: int | None = None
    note: str = ""

    @property
    def is_ours(self) -> bool:
        return self.build.startswith("ours ")

    @property
    def name(self) -> str:
        return self.build.partition(" ")[2]


@dataclass
class Table:
    name: str
    title: str
    about: str
    scores: list[str]
    rows: list[Row] = field(default_factory=list)

    @property
    def has_macs(self) -> bool:
        return self.name in CLASSIFIERS

    @property
    def has_data(self) -> bool:
        return any(row.data for row in self.rows)

    @property
    def is_measured(self) -> bool:
        return any(row.images_per_second or row.note for row in self.rows)


# The published facts


@cache
def facts() -> dict[str, Any]:
    return yaml.safe_load(DATA.read_text(encoding="utf-8"))


def table_names() -> list[str]:
    return list(facts()["tables"])


def choose_tables(names: Sequence[str]) -> list[str]:
    """Names of tables, or `all`, in the order of the papers.

    Raises:
        UserError: there is no such table; with what was probably meant.
    """
    check_names(names, [*table_names(), "all"], "table")
    return [name for name in table_names() if {"all", name} & set(names)]


def published_table(name: str) -> Table:
    """A table with its published figures; nothing is counted yet."""
    content = facts()["tables"][name]
    known = ("model", "build", "pixels", "parameters", "macs")
    scores = [column for column in content["columns"] if column not in known]
    made = Table(name, content["title"], content["about"], scores)
    for group in content["groups"]:
        for values in group["rows"]:
            cells = dict(zip(content["columns"], values, strict=False))
            row = Row(
                **{column: cells.get(column) for column in ("model", "build", "pixels")},
                **{key: group[key] for key in ("family", "mixer", "source")},
                data=group.get("data", ""),
                published={column: cells.get(column) for column in ("parameters", "macs")},
                scores={column: cells.get(column) for column in scores},
            )
            if row.is_ours and name in CLASSIFIERS:
                row.scores["top1"] = VARIANTS[row.name].top1
            made.rows.append(row)
    return made


def source_of(row: Row) -> dict[str, str]:
    return facts()["sources"][row.source]


# Counting


def count_table(name: str) -> Table:
    """A table with published and counted figures.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    made = published_table(name)
    for row in tqdm(made.rows, desc=f"counting: {made.title}", leave=False):
        # What was trained on ImageNet-21K before is the same model.
        build = row.build.removesuffix("_in21ft1k")
        row.parameters, row.macs = counted(build, row.pixels, name if name in DENSE else None)
    return made


@cache
def counted(build: str, pixels: int | None, task: str | None) -> tuple[int, float | None]:
    """Parameters of a model, and its 1e9 multiply-accumulates if it is a classifier."""
    library, _, name = build.partition(" ")
    if task is None and library == "ours":
        parameters, _, macs = figures(name)
        return parameters, macs
    with torch.device("meta"):
        model = build_dense(library, name, task) if task else build_peer(library, name)
    if task:
        return sum(parameter.numel() for parameter in model.parameters()), None
    parameters, _, macs = count(model, pixels)
    return parameters, macs


def build_dense(library: str, name: str, task: str) -> nn.Module:
    model_class, num_labels = DENSE[task]
    if library == "ours":
        return model_class(MetaFormerConfig.from_variant(name, num_labels=num_labels))
    return with_peer_backbone(model_class, library, name, num_labels)


def build_classifier(build: str) -> nn.Module:
    library, _, name = build.partition(" ")
    if library != "ours":
        return build_peer(library, name)
    config = MetaFormerConfig.from_variant(name)
    classes = AUTO_CLASSES["AutoModelForImageClassification"]
    return next(made for made in classes if made.config_class is type(config))(config)


def difference(here: float, published: float | None) -> float | None:
    """By which part the counted figure differs from the published one; None unless that is to be marked."""
    if published is None:
        return None
    part = here / published - 1
    digits = len(str(published).partition(".")[2]) if isinstance(published, float) else 0
    return part if abs(part) > MARKED and round(here, digits) != published else None


def is_marked(row: Row) -> bool:
    found = [difference(row.parameters / 1e6, row.published["parameters"])]
    if row.macs is not None:
        found.append(difference(row.macs, row.published["macs"]))
    return any(part is not None for part in found)


# Measuring


def measure(tables: Iterable[Table], *, device: str, dtype: str, batch_size: int, rounds: int) -> None:
    """
    Adds images per second and working memory: a forward of a batch, eager, every model as its library gives it.

    All models are held at once, because they take turns; one that does not fit gets a note. Two rows with the same
    model and image size are measured once.

    Args:
        device: "cpu" or "cuda".
        dtype: a key of `DTYPES`, of weights and images.
        rounds: turns of each.
    """
    rows: dict[str, list[Row]] = {}
    for row in (row for made in tables for row in made.rows):
        rows.setdefault(f"{architecture(row.build)}, {row.pixels} px", []).append(row)
    steps: dict[str, Callable[[], torch.Tensor]] = {}
    batches: dict[int, torch.Tensor] = {}
    for title, same in tqdm(rows.items(), desc="building", leave=False):
        try:
            model = build_classifier(same[0].build).to(device, DTYPES[dtype]).eval()
            images = batches.setdefault(
                same[0].pixels, random_images(batch_size, same[0].pixels).to(device, DTYPES[dtype])
            )
            step = make_step(model, images)
            with WorkingMemory(device) as memory:
                logits = step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            note = "out of memory"
        else:
            # Nobody is timed who does not answer.
            answers = logits.shape == (batch_size, 1000) and bool(logits.isfinite().all())
            note = "" if answers else "no finite logits"
            steps |= {title: step} if answers else {}
        for row in same:
            row.note = note
            row.working_memory = None if note else memory.bytes
    timings = take_turns(
        steps,
        device=device,
        rounds=rounds,
        turn=0.0 if device == "cpu" else 0.2,
        together=device != "cpu",
        label="timing",
    )
    for title, timing in timings.items():
        for row in rows[title]:  # with the digits of the CSV file, from which a later call takes them over
            row.images_per_second, row.spread = round(batch_size / timing.median, 3), round(timing.spread, 4)


def architecture(build: str) -> str:
    """Variants differ in what they were trained on, and not in what they compute."""
    library, _, name = build.partition(" ")
    return build if library != "ours" else f"ours {'_'.join(parts_of(name)[:2])}"


def random_images(batch_size: int, pixels: int) -> torch.Tensor:
    return torch.randn(batch_size, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


def make_step(model: nn.Module, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        with torch.inference_mode():
            output = model(images)
        return output if isinstance(output, torch.Tensor) else output.logits

    return step


def conditions(device: str, dtype: str, batch_size: int, started: float) -> dict[str, Any]:
    """What measured figures depend on."""
    return {**environment(device, "system", started), "dtype": dtype, "batch_size": batch_size}


# Training


IMAGENET = ["--dataset_name", "ILSVRC/imagenet-1k"]
DENSE_FLAGS = {
    "object-detection": ("object-detection", "USER/COCO", "retinanet"),
    "instance-segmentation": ("instance-segmentation", "USER/COCO", "mask_rcnn"),
    "segmentation": ("semantic-segmentation", "USER/ADE20K", "semantic_fpn"),
}


def training_command(row: Row, table_name: str) -> str:
    """What would train a row of ours as the paper did; empty for peers, and where the authors published no recipe."""
    if not row.is_ours:
        return ""
    if table_name in DENSE_FLAGS:
        task, data, method = DENSE_FLAGS[table_name]
        words = ["scripts/train_dense.py", "--task", task, "--model_name_or_path", f"sail/{row.name}"]
        words += ["--dataset_name", data, "--output_dir", f"outputs/{method}_{row.name}"]
        return shlex.join(["accelerate", "launch", *words])
    family, size, training = parts_of(row.name)
    output = ["--output_dir", f"outputs/{row.name}"]
    if training == "":
        recipe = "paper" if family == "poolformer" else "metaformer-paper"
        words = ["--recipe", recipe, "--config_name", row.name]
    elif training.startswith("384"):
        start = f"{family}_{size}" + ("_in21k" if "in21" in training else "")
        words = ["--recipe", "metaformer-384", "--model_name_or_path", f"outputs/{start}"]
    else:
        return ""
    return shlex.join(["accelerate", "launch", "scripts/train.py", *words, *IMAGENET, *output])
