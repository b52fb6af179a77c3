"""Cards of the published checkpoints: `model_cards/NAME.yaml` holds the facts, `VARIANTS` the architecture.

What can be computed is not written down: parameters and multiply-accumulates are counted on the model itself. What is
written down twice, in the YAML file and in `VARIANTS`, must agree: `check_facts`.
"""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..configuration_poolformer import VARIANTS, MetaFormerConfig
from ..modeling_poolformer import AUTO_CLASSES
from .cards import FIRST_PAPER, LICENSES, PIPELINE_TAG, SECOND_PAPER, CardError, render_card


__all__ = ["check_facts", "published_card", "read_facts"]

PAPERS = {"2111.11418": FIRST_PAPER, "2210.13452": SECOND_PAPER}

# What the facts call a dataset -> its id on the Hub. ImageNet-21K has none of its own; other cards call it that.
DATASETS = {"ImageNet-1K": "ILSVRC/imagenet-1k", "ImageNet-21K": "imagenet-21k"}

# Pictures that the Hub's own ImageNet models are tried on.
SAMPLES = "https://huggingface.co/datasets/mishig/sample_images/resolve/main/"
WIDGET = [
    {"src": f"{SAMPLES}{name}.jpg", "example_title": name.capitalize()} for name in ("tiger", "teapot", "palace")
]

# Of a file of facts: field -> type. The question mark is for those that some checkpoints have not.
FIELDS = {
    "title": str,
    "paper": dict,
    "repository": str,
    "source": str,
    "license": str,
    "license_source": str,
    "training_data": list,
    "training": str,
    "evaluation": dict,
    "results?": list,
    "base_model?": str,
    "same_weights?": list,
    "intended_use": list,
    "limits": list,
}


def read_facts(path: str | os.PathLike) -> dict[str, Any]:
    """The facts of one checkpoint.

    Raises:
        CardError: the file is no YAML, or lacks a field, or has one of another type or name.
    """
    path = Path(path)
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CardError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(facts, dict):
        raise CardError(f"{path} is no mapping of fields to facts")
    known = {field.rstrip("?"): kind for field, kind in FIELDS.items()}
    faults = [f"{field} is no field of a card" for field in facts if field not in known]
    faults += [f"{field} is missing" for field in FIELDS if field[-1] != "?" and field not in facts]
    faults += [
        f"{field} should be a {kind.__name__}"
        for field, kind in known.items()
        if field in facts and not isinstance(facts[field], kind)
    ]
    if faults:
        raise CardError(f"{path}: {'; '.join(faults)}")
    return facts


def check_facts(name: str, facts: Mapping[str, Any]) -> None:
    """Compare the facts of `name` with its row of `VARIANTS`.

    Raises:
        CardError: naming every fact that disagrees.
    """
    row = VARIANTS.get(name)
    if row is None:
        raise CardError(f"{name} is no row of VARIANTS")
    found = {
        "source": facts["source"],
        "evaluation.image_size": facts["evaluation"].get("image_size"),
        "evaluation.crop_pct": facts["evaluation"].get("crop_pct"),
        "top-1": next((result["top1"] for result in facts.get("results", [])), None),
        "classes": {"ImageNet-1K": 1000, "ImageNet-21K": 21841}.get(facts["training_data"][-1]),
        "timm": next((place for place in facts.get("same_weights", []) if place.startswith("timm/")), None),
    }
    expected = {
        "source": row.source,
        "evaluation.image_size": row.image_size,
        "evaluation.crop_pct": row.crop_pct,
        "top-1": row.top1,
        "classes": row.num_labels,
        "timm": f"timm/{row.timm_name}" if row.timm_name else None,
    }
    faults = [
        f"{key} is {found[key]!r}, in VARIANTS {value!r}" for key, value in expected.items() if found[key] != value
    ]
    base = facts.get("base_model")
    if base is not None and (base not in VARIANTS or VARIANTS[base].config["depths"] != row.config["depths"]):
        faults.append(f"base_model {base!r} is no variant of the same architecture")
    if facts["license"] not in LICENSES:
        faults.append(f"license {facts['license']!r} is not an identifier the Hub knows")
    if facts["paper"].get("arxiv") not in PAPERS:
        faults.append(f"paper {facts['paper']!r} is none of {', '.join(PAPERS)}")
    faults += [f"unknown training data {data!r}" for data in facts["training_data"] if data not in DATASETS]
    if faults:
        raise CardError(f"{name}: {'; '.join(faults)}")


@cache
def figures(name: str) -> tuple[int, int, float]:
    """Parameters, those of them that are trained, and 1e9 multiply-accumulates of matrix products and convolutions
    for one image of the variant's size; counted on a model without storage."""
    config = MetaFormerConfig.from_variant(name)
    classes = AUTO_CLASSES["AutoModelForImageClassification"]
    (model_class,) = (model_class for model_class in classes if model_class.config_class is type(config))
    with torch.device("meta"):
        model = model_class(config).eval()
    size = VARIANTS[name].image_size
    # The counter knows no fused attention on the meta device; the plain one is two matrix products, which it counts.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.empty(1, 3, size, size, device="meta"))
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(count for count, requires_grad in counts if requires_grad)
    return sum(count for count, _ in counts), trained, counter.get_total_flops() / 2e9


def published_card(name: str, facts: Mapping[str, Any], *, repo_id: str | None = None) -> str:
    """The card of a published checkpoint.

    Args:
        name: a row of `VARIANTS`.
        facts: what `read_facts` gives.
        repo_id: where the converted checkpoint lies; without one the examples load the folder `name`.

    Raises:
        CardError: the facts disagree with `VARIANTS`, or the metadata would not pass the Hub's validation.
    """
    check_facts(name, facts)
    row = VARIANTS[name]
    family = "poolformer" if row.model_type == "poolformer" else "metaformer"
    base = facts.get("base_model")
    base_id = f"timm/{VARIANTS[base].timm_name}" if base else None
    results = facts.get("results", [])
    title = repo_id.rpartition("/")[2] if repo_id else name
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        license=facts["license"],
        tags=[PIPELINE_TAG, "vision", family, row.family.replace("_", "-"), "hf-poolformer"],
        datasets=[DATASETS[name] for name in facts["training_data"]],
        metrics=["accuracy"] if results else None,
        base_model=base_id,
        base_model_relation="finetune" if base_id else None,
        model_name=title if results else None,
        eval_results=[
            EvalResult(
                task_type=PIPELINE_TAG,
                task_name="Image classification",
                dataset_type=DATASETS[result["dataset"]],
                dataset_name=result["dataset"],
                dataset_split=result["split"],
                metric_type="accuracy",
                metric_name="Top-1 accuracy",
                metric_value=round(result["top1"] / 100, 4),
                verified=False,
                source_name=result["source_name"],
                source_url=result["source"],
            )
            for result in results
        ]
        or None,
        widget=WIDGET,
    )
    if not results:
        data.pop("model_name")
    paper = facts["paper"]
    return render_card(
        data,
        title=title,
        summary=(
            f"{facts['title']}, {facts['training']}: the weights its authors published, in the form "
            f"[transformers](https://huggingface.co/docs/transformers) reads. It comes from *{paper['title']}* "
            f"([arXiv {paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']}))."
        ),
        facts=[(text, value) for text, value in table(name, facts, base_id) if value],
        intended_use=facts["intended_use"],
        pipeline_snippet=pipeline_snippet(repo_id or name, row.model_type),
        model_snippet=model_snippet(repo_id or name, row.model_type),
        usage_note=usage_note(name, repo_id),
        results=[
            (f"Top-1 accuracy, {result['dataset']} {result['split']}", f"{result['top1']} %") for result in results
        ],
        results_intro=(
            "As the authors report it"
            + (f" ([{results[0]['source_name']}]({results[0]['source']}))" if results else "")
            + ". It was not measured again here, and nobody else verified it."
        ),
        training_intro=(
            f"By the authors, on {' and then '.join(facts['training_data'])}; how is told in the paper and in "
            f"[their repository]({facts['repository']}). The weights were converted, not trained again."
        ),
        limits=facts["limits"],
        citations=[PAPERS[paper["arxiv"]]],
    )


def table(name: str, facts: Mapping[str, Any], base_id: str | None) -> list[tuple[str, str]]:
    row = VARIANTS[name]
    parameters, trained, macs = figures(name)
    config = MetaFormerConfig.from_variant(name)
    evaluation = facts["evaluation"]
    return [
        ("architecture", f"depths {list(config.depths)}, widths {list(config.hidden_sizes)}"),
        ("token mixers", ", ".join(mixer.replace("_", " ") for mixer in config.token_mixers)),
        ("parameters", f"{parameters:,}" + (f", of which {trained:,} are trained" if trained < parameters else "")),
        ("multiply-accumulates", f"{macs:.2f} G for one image of {row.image_size} x {row.image_size} pixels"),
        (
            "input",
            f"{row.image_size} x {row.image_size} pixels: short side resized to {round(row.image_size / row.crop_pct)}"
            f" ({evaluation['interpolation']}), centre crop, ImageNet's mean and standard deviation",
        ),
        ("classes", f"{row.num_labels:,}"),
        ("training data", ", then ".join(facts["training_data"])),
        ("fine-tuned from", f"[{base_id}](https://huggingface.co/{base_id})" if base_id else ""),
        (
            "the same weights",
            ", ".join(f"[{place}](https://huggingface.co/{place})" for place in facts.get("same_weights", [])),
        ),
        ("original file", f"[{row.source.rpartition('/')[2]}]({row.source})"),
        ("licence", f"[{facts['license']}]({facts['license_source']})"),
    ]


def usage_note(name: str, repo_id: str | None) -> str:
    code = "" if VARIANTS[name].model_type == "poolformer" else (
        "`trust_remote_code=True` runs the model's code, which comes with the weights; without it, install "
        "hf-poolformer and `import hf_poolformer` first. "
    )  # fmt: skip
    if repo_id is not None:
        return code.strip()
    source = VARIANTS[name].source
    return (
        f"{code}The folder `{name}` is what this makes of the [original file]({source}): "
        f"`python scripts/convert.py {source.rpartition('/')[2]} {name}`."
    )


def arguments(model_type: str) -> str:
    # transformers has a PoolFormer of its own, which computes the same function; a MetaFormer needs its code.
    return "" if model_type == "poolformer" else ", trust_remote_code=True"


def pipeline_snippet(source: str, model_type: str) -> str:
    return (
        "from transformers import pipeline\n\n"
        f'classify = pipeline("{PIPELINE_TAG}", model="{source}"{arguments(model_type)})\n'
        'print(classify("photo.jpg"))'
    )


def model_snippet(source: str, model_type: str) -> str:
    place = f'"{source}"{arguments(model_type)}'
    return (
        "import torch\n"
        "from PIL import Image\n"
        "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
        f"processor = AutoImageProcessor.from_pretrained({place})\n"
        f"model = AutoModelForImageClassification.from_pretrained({place}).eval()\n"
        'inputs = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")\n'
        "with torch.inference_mode():\n"
        "    logits = model(**inputs).logits  # (1, number of classes)\n"
        "print(model.config.id2label[logits.argmax(-1).item()])"
    )
