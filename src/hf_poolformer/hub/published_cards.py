"""Cards of the published checkpoints.

`VARIANTS` holds the facts, and the folder `model_cards` the few words that differ from family to family. Parameters
and multiply-accumulates are not written down but counted, on the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..configuration_poolformer import VARIANTS, MetaFormerConfig
from ..foundation.tasks import CLASSIFICATION, TASKS
from ..modeling_poolformer import AUTO_CLASSES
from .metadata import CardError
from .rendering import FIRST_CITATION, SECOND_CITATION, code_examples, render_card


__all__ = ["architecture_rows", "count", "figures", "original_names", "published_card"]


@dataclass(frozen=True)
class Paper:
    """
    Attributes:
        repository: of its authors' code.
        license_source: where they say so.
        results: where they tell the accuracy of the checkpoints, and its address.
    """

    title: str
    arxiv: str
    citation: str
    repository: str
    license_source: str
    results: tuple[str, str]


FIRST = Paper(
    title="MetaFormer Is Actually What You Need for Vision",
    arxiv="2111.11418",
    citation=FIRST_CITATION,
    repository="https://github.com/sail-sg/poolformer",
    license_source="https://github.com/sail-sg/poolformer/blob/main/LICENSE",
    results=("README of sail-sg/poolformer", "https://github.com/sail-sg/poolformer#2-poolformer-models"),
)
SECOND = Paper(
    title="MetaFormer Baselines for Vision",
    arxiv="2210.13452",
    citation=SECOND_CITATION,
    repository="https://github.com/sail-sg/metaformer",
    license_source="https://github.com/sail-sg/metaformer/blob/main/metaformer_baselines.py",
    results=("README of sail-sg/metaformer", "https://github.com/sail-sg/metaformer#metaformer-baselines"),
)
TABLE_5 = ("table 5 of arXiv 2111.11418", "https://arxiv.org/abs/2111.11418")
LICENSE = "apache-2.0"


@dataclass(frozen=True)
class FamilyTexts:
    """What the cards of a family say otherwise than those of the others.

    Attributes:
        title: with `{size}`.
        mixing: how its blocks mix tokens, and what it is for.
        sizes: why it takes images of one size, if so.
        ablation: of the ablation table, which gives its accuracy; nobody uses it as a backbone.
        sail: the authors' own repository on the Hub has the weights, too.
    """

    title: str
    paper: Paper
    mixing: str
    sizes: str = ""
    ablation: bool = False
    sail: bool = False


@cache
def texts_of(family: str) -> FamilyTexts:
    """What `model_cards` says of a family."""
    path = Path(__file__).with_name("model_cards") / f"{family}.yaml"
    texts = yaml.safe_load(path.read_text(encoding="utf-8"))
    return FamilyTexts(**{**texts, "paper": {"first": FIRST, "second": SECOND}[texts["paper"]]})


# Suffix of a variant's name -> the data it was trained on in turn, how, and the suffix of what it was fine-tuned from.
SMALL, LARGE = "ImageNet-1K", "ImageNet-21K"
TRAININGS: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    "": ((SMALL,), f"trained on {SMALL} at {{pixels}} pixels", None),
    "384": ((SMALL,), f"trained on {SMALL} at 224 pixels and fine-tuned there at {{pixels}}", ""),
    "in21ft1k": ((LARGE, SMALL), f"trained on {LARGE} and fine-tuned on {SMALL} at {{pixels}} pixels", "_in21k"),
    "384_in21ft1k": ((LARGE, SMALL), f"trained on {LARGE} and fine-tuned on {SMALL} at {{pixels}} pixels", "_in21k"),
    "in21k": ((LARGE,), f"trained on {LARGE} at {{pixels}} pixels", None),
}
# Their ids on the Hub. ImageNet-21K has none of its own; other cards call it that.
DATASETS = {SMALL: "ILSVRC/imagenet-1k", LARGE: "imagenet-21k"}

# Pictures that the Hub's own ImageNet models are tried on.
SAMPLES = "https://huggingface.co/datasets/mishig/sample_images/resolve/main/"
WIDGET = [
    {"src": f"{SAMPLES}{name}.jpg", "example_title": name.capitalize()} for name in ("tiger", "teapot", "palace")
]

NO_OTHER_CLASS = (
    "It gives one of 1000 classes to every image, whatever the image shows; there is no class for anything else, and "
    "its scores are not calibrated probabilities."
)
FAULTY_LABELS = (
    "ImageNet's labels are not without fault, so that small differences in accuracy mean little: at least 6 % of "
    "those of the validation set are wrong by the estimate of [Northcutt et al.](https://arxiv.org/abs/2103.14749)."
)
NO_ACCURACY = (
    "There is no published accuracy for this head; the authors report what the checkpoints fine-tuned from it reach."
)
IMAGENET = (
    "ImageNet's photographs come from the web and show North America and Europe more than the rest of the world; "
    "classifiers trained on them do worse on images from elsewhere "
    "([Shankar et al.](https://arxiv.org/abs/1711.08536)). Do not use it to judge people.",
    "ImageNet itself is [licensed](https://www.image-net.org/download.php) for non-commercial research and education; "
    "the licence above is that of the weights.",
)


@cache
def figures(name: str) -> tuple[int, int, float]:
    """`count` of a variant, at its own image size."""
    config = MetaFormerConfig.from_variant(name)
    classes = AUTO_CLASSES[TASKS[CLASSIFICATION].auto_class]
    (model_class,) = (model_class for model_class in classes if model_class.config_class is type(config))
    with torch.device("meta"):
        model = model_class(config)
    return count(model, VARIANTS[name].image_size)


def count(model: nn.Module, size: int) -> tuple[int, int, float]:
    """Parameters, those of them that are trained, and 1e9 multiply-accumulates of matrix products and convolutions
    for one image of `size` x `size` pixels.

    Args:
        model: on the meta device, without storage.
    """
    # The counter knows no fused attention on the meta device; the plain one is two matrix products, which it counts.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(number for number, requires_grad in counts if requires_grad)
    return sum(number for number, _ in counts), trained, counter.get_total_flops() / 2e9


def parts_of(name: str) -> tuple[str, str, str]:
    """Family, size and training of a variant, as its name has them: caformer, s18, 384_in21ft1k."""
    family = VARIANTS[name].family
    size, _, training = name.removeprefix(f"{family}_").partition("_")
    return family, size, training


def same_weights(name: str) -> list[str]:
    """Where else on the Hub they are."""
    row = VARIANTS[name]
    return [
        *([f"sail/{name}"] if texts_of(row.family).sail else []),
        *([f"timm/{row.timm_name}"] if row.timm_name else []),
    ]


def original_names(name: str) -> set[str]:
    """What a checkpoint is called where the authors, or others for them, published it: a file, or an id on the Hub."""
    return {VARIANTS[name].source.rpartition("/")[2], *same_weights(name)}


def published_card(
    name: str,
    *,
    repo_id: str | None = None,
    folder: str | None = None,
    license: str | None = None,
    sections: Sequence[tuple[str, str]] = (),
) -> str:
    """The card of a published checkpoint.

    Args:
        name: a row of `VARIANTS`.
        repo_id: where the converted checkpoint lies on the Hub.
        folder: or the name of the folder; without either the examples load the folder `name`.
        sections: as of `render_card`.

    Raises:
        CardError: there is no such row, or the metadata would not pass the Hub's validation.
    """
    if name not in VARIANTS:
        raise CardError(f"{name} is no row of VARIANTS")
    row, task = VARIANTS[name], TASKS[CLASSIFICATION]
    family, size, training = parts_of(name)
    texts = texts_of(family)
    data_names, how, base_suffix = TRAININGS[training]
    base = None if base_suffix is None else f"timm/{VARIANTS[f'{family}_{size}{base_suffix}'].timm_name}"
    paper = texts.paper
    source_name, source_url = TABLE_5 if texts.ablation else paper.results
    place = repo_id or folder or name
    title = place.rpartition("/")[2]
    license = license or LICENSE
    best = task.figures[0]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task.pipeline_tag,
        license=license,
        tags=[task.pipeline_tag, "vision", row.model_type, family.replace("_", "-"), "hf-poolformer"],
        datasets=[DATASETS[data] for data in data_names],
        metrics=None if row.top1 is None else [best.metric],
        base_model=base,
        base_model_relation="finetune" if base else None,
        model_name=title,
        eval_results=None
        if row.top1 is None
        else [
            EvalResult(
                task_type=task.pipeline_tag,
                task_name=task.title,
                dataset_type=DATASETS[SMALL],
                dataset_name=SMALL,
                dataset_split="validation",
                metric_type=best.metric,
                metric_name=best.name,
                metric_value=round(row.top1 / 100, 4),
                verified=False,
                source_name=source_name,
                source_url=source_url,
            )
        ],
        widget=WIDGET,
    )
    if row.top1 is None:
        card_data.pop("model_name")
    return render_card(
        card_data,
        title=title,
        summary=(
            f"{texts.title.format(size=size.upper())}, {how.format(pixels=row.image_size)}: the weights its authors "
            "published, in the form [transformers](https://huggingface.co/docs/transformers) reads. It comes from "
            f"*{paper.title}* ([arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}))."
        ),
        facts=facts(name, data_names, base, license),
        intended_use=intended_use(name),
        **code_examples(task, place, row.model_type),
        usage_note=usage_note(name, converted=bool(repo_id or folder)),
        results=[] if row.top1 is None else [(f"{best.name}, {SMALL} validation", f"{row.top1} %")],
        results_intro=(
            f"As the authors report it ([{source_name}]({source_url})). It was not measured again here, and nobody "
            "else verified it."
        ),
        sections=sections,
        training_intro=(
            f"By the authors, on {' and then '.join(data_names)}; how is told in the paper and in "
            f"[their repository]({paper.repository}). The weights were converted, not trained again."
        ),
        limits=[
            *([NO_ACCURACY] if row.top1 is None else [NO_OTHER_CLASS, FAULTY_LABELS]),
            *IMAGENET,
            *([texts.sizes.format(pixels=row.image_size)] if texts.sizes else []),
        ],
        citations=[paper.citation],
    )


def intended_use(name: str) -> list[str]:
    row = VARIANTS[name]
    texts = texts_of(row.family)
    told = (
        "A starting point for training on images of your own, with a new head."
        if row.top1 is None
        else f"Telling what a photograph shows, out of the {row.num_labels} classes of {SMALL}, and a starting point "
        "for training on images of your own."
    )
    paragraphs = [f"{told} {texts.mixing}"]
    if row.top1 is None:
        paragraphs.append(
            f"As it stands it tells {row.num_labels:,} classes of {LARGE} apart, but the file carries no names for "
            "them: the configuration calls them LABEL_0, LABEL_1, ..."
        )
    backbone = "As a backbone it gives feature maps of four scales"
    if row.family == "poolformer":
        small = parts_of(name)[1].startswith("s")
        detection = "detection and instance segmentation on COCO (RetinaNet, Mask R-CNN) and for " if small else ""
        paragraphs.append(
            f"{backbone}. The authors use it for {detection}semantic segmentation on ADE20K (Semantic FPN)."
        )
    elif not texts.ablation:
        paragraphs.append(f"{backbone} for detection and segmentation.")
    return paragraphs


def architecture_rows(config: Any) -> list[tuple[str, str]]:
    """Of the table of a card: what a configuration says of the four stages."""
    return [
        ("architecture", f"depths {list(config.depths)}, widths {list(config.hidden_sizes)}"),
        ("token mixers", ", ".join(mixer.replace("_", " ") for mixer in config.token_mixers)),
    ]


def facts(name: str, data_names: Sequence[str], base: str | None, license: str) -> list[tuple[str, str]]:
    row = VARIANTS[name]
    parameters, trained, macs = figures(name)
    rows = [
        *architecture_rows(MetaFormerConfig.from_variant(name)),
        ("parameters", f"{parameters:,}" + (f", of which {trained:,} are trained" if trained < parameters else "")),
        ("multiply-accumulates", f"{macs:.2f} G for one image of {row.image_size} x {row.image_size} pixels"),
        (
            "input",
            f"{row.image_size} x {row.image_size} pixels: short side resized to {round(row.image_size / row.crop_pct)}"
            " (bicubic), centre crop, ImageNet's mean and standard deviation",
        ),
        ("classes", f"{row.num_labels:,}"),
        ("training data", ", then ".join(data_names)),
        ("fine-tuned from", f"[{base}](https://huggingface.co/{base})" if base else ""),
        (
            "the same weights",
            ", ".join(f"[{place}](https://huggingface.co/{place})" for place in same_weights(name)),
        ),
        ("original file", f"[{row.source.rpartition('/')[2]}]({row.source})"),
        ("licence", f"[{license}]({texts_of(row.family).paper.license_source})"),
    ]
    return [(text, value) for text, value in rows if value]


def usage_note(name: str, converted: bool) -> str:
    code = "" if VARIANTS[name].model_type == "poolformer" else (
        "`trust_remote_code=True` runs the model's code, which comes with the weights; without it, install "
        "hf-poolformer and `import hf_poolformer` first. "
    )  # fmt: skip
    if converted:
        return code.strip()
    source = VARIANTS[name].source
    return (
        f"{code}The folder `{name}` is what this makes of the [original file]({source}): "
        f"`python scripts/convert.py {source.rpartition('/')[2]} {name}`."
    )
