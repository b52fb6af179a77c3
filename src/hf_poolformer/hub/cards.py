"""Model cards: the README.md of a trained model, with metadata the Hub accepts.

The card is rendered from `card_template.md`, which lies beside this file and ships in the wheel, through
`huggingface_hub.ModelCard`. The Hub's own validator is a web service; `check_metadata` applies its rules here, so
that a card is known to be good before anything is uploaded, and offline too.
"""

import json
import math
import os
import platform
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..foundation.names import undecodable_escaped
from ..settings.training import shown_settings
from .card_tasks import DenseTask, task_of


__all__ = [
    "CardError",
    "check_card",
    "check_metadata",
    "folder_card",
    "plain_markdown",
    "training_card",
    "with_repo_id",
    "write_training_card",
]

TEMPLATE = Path(__file__).with_name("card_template.md")

PIPELINE_TAG = "image-classification"

# More rows than this make a table nobody reads.
MAX_CLASSES_IN_TABLE = 50

# The licence identifiers of https://huggingface.co/docs/hub/repositories-licenses
# fmt: off
LICENSES = frozenset(
    {
        "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
        "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
        "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
        "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
        "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
        "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2",
        "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "h-research",
        "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3", "llama3.1",
        "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by",
        "ofl-1.1", "open-mdw", "openrail", "openrail++", "osl-3.0", "other", "pddl", "postgresql", "unknown",
        "unlicense", "wtfpl", "zlib",
    }
)
# fmt: on

# Keys of all_results.json -> what they are called in the card.
RUN_FIGURES = {
    "epoch": "epochs trained",
    "train_loss": "training loss",
    "train_runtime": "training time, s",
    "train_samples_per_second": "training images per second",
    "train_data_wait_share": "share of the time spent waiting for data",
    "skipped_images": "images skipped as broken",
    "trained_parameters": "parameters trained",
}

# What the run says about the machine it ran on -> what it is called in the card.
ENVIRONMENT = {"device": "device", "num_processes": "processes", "mixed_precision": "precision"}

FIRST_PAPER = """@inproceedings{yu2022metaformer,
  title     = {MetaFormer Is Actually What You Need for Vision},
  author    = {Yu, Weihao and Luo, Mi and Zhou, Pan and Si, Chenyang and Zhou, Yichen and Wang, Xinchao and Feng, Jiashi and Yan, Shuicheng},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  pages     = {10819--10829},
  year      = {2022}
}"""  # noqa: E501
SECOND_PAPER = """@article{yu2024metaformer,
  title   = {MetaFormer Baselines for Vision},
  author  = {Yu, Weihao and Si, Chenyang and Zhou, Pan and Luo, Mi and Zhou, Yichen and Feng, Jiashi and Yan, Shuicheng and Wang, Xinchao},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  volume  = {46},
  number  = {2},
  pages   = {896--912},
  year    = {2024},
  doi     = {10.1109/TPAMI.2023.3329173}
}"""  # noqa: E501

VERSIONED = ("hf-poolformer", "transformers", "torch", "torchvision", "accelerate", "datasets", "huggingface_hub")


class CardError(ValueError):
    """A model card whose metadata the Hub would refuse; the message lists every fault."""


def write_training_card(
    model_dir: str | os.PathLike,
    *,
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    dataset_name: str | None,
    base_model: str | None,
    label_names: Sequence[str],
    repo_id: str | None = None,
    license: str = "apache-2.0",
) -> Path:
    """Write `model_dir/README.md`, the model card of a training run, and return its path.

    Arguments and errors are those of `training_card`; nothing is written when it raises.
    """
    card = training_card(
        model_dir,
        results=results,
        settings=settings,
        dataset_name=dataset_name,
        base_model=base_model,
        label_names=label_names,
        repo_id=repo_id,
        license=license,
    )
    path = Path(model_dir) / "README.md"
    part = path.with_name(".README.md.part")
    part.write_text(card, encoding="utf-8", newline="\n")
    part.replace(path)
    return path


def training_card(
    model_dir: str | os.PathLike,
    *,
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    dataset_name: str | None,
    base_model: str | None,
    label_names: Sequence[str],
    repo_id: str | None = None,
    license: str = "apache-2.0",
    trained: bool = True,
) -> str:
    """The model card of a training run.

    Args:
        model_dir: folder of the trained model. `config.json`, `curves.png`, `confusion_matrix.png` and the pictures
            in `examples/` are made use of where present.
        results: the content of `all_results.json`; `eval_accuracy`, `eval_top5_accuracy` and `eval_loss` become the
            `model-index`, `eval_per_class_accuracy` (class name -> accuracy, or a list in label order) a table,
            `energy_kwh` and `co2_eq_g`, if they were measured, the emissions.
        settings: the settings of the run; those marked as `shown` are printed, all others ignored.
        dataset_name: Hub id of the dataset, or the path of a local one (None: the setting `train_dir`). Only an id
            becomes metadata; of a path, only the last component is printed.
        base_model: Hub id or path of the checkpoint the training started from; None when it started from scratch.
        label_names: class names in the order of the logits.
        repo_id: where the model will be published, if that is known.
        license: a licence identifier of the Hub.
        trained: False for a model of which nothing but the folder is known; the card then says so.

    Raises:
        CardError: the metadata would not pass the Hub's validation.
    """
    model_dir = Path(model_dir)
    config = _read_config(model_dir)
    dataset_name = dataset_name or settings.get("train_dir")
    family = "PoolFormer" if config.get("model_type", "poolformer") == "poolformer" else "MetaFormer"
    dataset_id = _hub_id(dataset_name)
    base_id = _hub_id(base_model, with_namespace=True)
    if repo_id is not None and _hub_id(repo_id, may_exist=True) is None:
        raise CardError(f"{repo_id!r} is not a repository id; it should look like user/name")

    name = repo_id.rpartition("/")[2] if repo_id else _one_line(model_dir.resolve().name)
    data_text = _data_text(dataset_name, dataset_id)
    classes = f"{len(label_names)} class" + ("" if len(label_names) == 1 else "es")
    emissions = _emissions(results, base_model)
    task = task_of(settings, config)  # None for a classifier
    tag = task.pipeline_tag if task else PIPELINE_TAG
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag=tag,
        license=license,
        tags=[tag, "vision", family.lower(), "hf-poolformer"],
        datasets=[dataset_id] if dataset_id else None,
        metrics=[task.figures[0][1] if task else "accuracy"],
        base_model=base_id,
        base_model_relation="finetune" if base_id else None,
        model_name=name,
        eval_results=_eval_results(results, settings, dataset_name, dataset_id, len(label_names), task) or None,
        co2_eq_emissions=emissions or None,
        widget=_widget(model_dir, repo_id) or None,
    )
    if card_data.eval_results is None:
        card_data.pop("model_name")

    origin = "trained from scratch"
    if base_model is not None:
        origin = f"fine-tuned from {_link(base_id) if base_id else plain_markdown(_last_component(base_model))}"
    count = _parameter_count(model_dir)
    size = f", {count / 1e6:.1f} M parameters" if count else ""
    eval_split = settings.get("validation_split")
    samples = _number(results.get("eval_samples"))
    evaluated = f"{int(samples)} images" if samples is not None else "images"
    where = f"of the split `{_one_line(str(eval_split))}`" if _is_plain(eval_split) else "held out from training"
    adaptation, distillation = _adaptation(settings), _distillation(settings)
    how = f", {origin} on {data_text}{adaptation}{distillation}" if trained else ""
    machine = {**settings, **results}
    return render_card(
        card_data,
        title=name,
        summary=f"A [{family}](https://arxiv.org/abs/2111.11418) {task.noun if task else 'image classifier'} with "
        f"{classes}{size}{how}.",
        pipeline_snippet=_pipeline_snippet(repo_id, model_dir, config, task),
        model_snippet=_model_snippet(repo_id, model_dir, config, task),
        results=_result_rows(results, len(label_names), task),
        results_intro=f"Measured on {evaluated} {where}, by the training script itself; nobody else verified it.",
        per_class=_per_class(results.get(task.per_class[0] if task else "eval_per_class_accuracy"), label_names),
        per_class_heading=task.per_class[1] if task else "accuracy",
        has_predictions=(model_dir / "predictions.png").is_file(),
        has_confusion_matrix=(model_dir / "confusion_matrix.png").is_file(),
        training_intro=(
            f"Data: {data_text}. Start: {origin}{adaptation}{distillation}."
            if trained
            else "How and on what it was trained is not recorded here."
        ),
        settings=[
            (key, _plain(settings[key]))
            for key in shown_settings(settings.get("task"))
            if settings.get(key) is not None and _in_force(key, settings)
        ],
        figures=[
            (text, _plain(results[key])) for key, text in RUN_FIGURES.items() if _number(results.get(key)) is not None
        ],
        has_curves=(model_dir / "curves.png").is_file(),
        environment=[
            (text, _plain(machine[key])) for key, text in ENVIRONMENT.items() if machine.get(key) is not None
        ],
        versions=_versions(),
        emissions=_emissions_text(results),
        limits=task.limits
        if task
        else [
            f"The model knows only the {classes} it was trained on and gives one of them to every image, whatever the "
            "image shows.",
            "It was measured on images like those it was trained on, if at all; a photograph from another camera, "
            "country or population can fare worse. Nobody has examined this checkpoint for social bias.",
        ],
        citations=[FIRST_PAPER] if family == "PoolFormer" else [FIRST_PAPER, SECOND_PAPER],
    )


def folder_card(model_dir: str | os.PathLike, *, repo_id: str | None = None, license: str | None = None) -> str:
    """A card for a model's folder that has none: from what a run left there, or else from the model alone.

    Raises:
        CardError: as for `training_card`.
    """
    model_dir = Path(model_dir)
    config = _read_config(model_dir)
    labels = config.get("id2label") or {}
    names = [str(labels[key]) for key in sorted(labels, key=int)]
    results, settings = {}, {}
    for path, values in ((model_dir / "all_results.json", results), (model_dir / "training_settings.yaml", settings)):
        if path.is_file():
            values.update(_read(path, yaml.safe_load))
    return training_card(
        model_dir,
        results=results,
        settings=settings,
        dataset_name=settings.get("dataset_name"),
        base_model=settings.get("model_name_or_path"),
        label_names=names,
        repo_id=repo_id,
        license=license or "apache-2.0",
        trained=bool(settings),
    )


def render_card(card_data: ModelCardData, **values: Any) -> str:
    """`card_template.md` with these values, and metadata that are known to be good.

    Raises:
        CardError: the metadata would not pass the Hub's validation, or do not survive being written.
    """
    card = ModelCard.from_template(
        card_data, template_str=TEMPLATE.read_text(encoding="utf-8"), md=plain_markdown, **values
    )
    text = re.sub(r"\n{3,}", "\n\n", str(card)).rstrip("\n") + "\n"
    check_metadata(_metadata_of(text))
    if ModelCard(text).data.to_dict() != card_data.to_dict():
        raise CardError("the card's metadata do not survive being written and read back")
    return text


def local_names(model_dir: str | os.PathLike, card: str) -> list[str]:
    """What the card may call its model while that is still a folder on somebody's machine.

    The folder may have got another name since the card was written; then the title of our own cards tells.
    """
    names = [Path(model_dir).resolve().name, "path/to/this/folder"]
    title = re.search(r"^# (.+)$", card, re.MULTILINE)
    if title and "\n- hf-poolformer\n" in card:
        names.append(re.sub(r"\\([\\`*_{}\[\]#|~$!])", r"\1", title[1]))
    return names


def with_repo_id(text: str, names: Sequence[str], repo_id: str) -> str:
    """The card with `repo_id` where its Python examples load one of `names`, and the repository's name as title.

    All else stays as it is, in the text as in the metadata.
    """
    title = repo_id.rpartition("/")[2]
    for name in names:
        quoted = re.escape(f'"{name}"')
        loads = re.compile(rf"((?:model=|from_pretrained\(|pipeline\([^\n]*, ?)){quoted}")
        text = re.sub(
            r"```python\n.*?```",
            lambda code, loads=loads: loads.sub(rf'\1"{repo_id}"', code[0]),
            text,
            flags=re.DOTALL,
        )
        text = re.sub(
            rf"^# {re.escape(plain_markdown(name))}$", f"# {plain_markdown(title)}", text, count=1, flags=re.MULTILINE
        )
        text = re.sub(
            rf"^(model-index:\n- name: ){re.escape(name)}$", rf"\g<1>{title}", text, count=1, flags=re.MULTILINE
        )
    return text


def check_card(text: str, repo_type: str = "model") -> None:
    """Apply the Hub's rules to a card that somebody may have written by hand: what it says must be right.

    Unlike `check_metadata`, which is for our own cards, nothing has to be there.

    Raises:
        CardError: the metadata are no YAML, or a field of them is wrong.
    """
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    try:
        data = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        raise CardError(f"its metadata are no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise CardError("its metadata are no mapping of names to values")
    if repo_type == "model":
        present = {"library_name": "transformers", "pipeline_tag": PIPELINE_TAG, "license": "apache-2.0"}
        check_metadata({**present, **data})
    elif "license" in data and not _known_licenses(data["license"]):
        raise CardError(f"license {data['license']!r} is not an identifier the Hub knows, like 'apache-2.0' or 'mit'")


def check_metadata(data: Mapping[str, Any]) -> None:
    """Apply the Hub's rules for model card metadata, without the network.

    Args:
        data: the YAML block of a card, parsed.

    Raises:
        CardError: naming every field that is missing or wrong.
    """
    faults = []

    def text(field: str, value: Any) -> None:
        if not isinstance(value, str) or not value.strip():
            faults.append(f"{field} should be a text, not {value!r}")

    for field in ("library_name", "pipeline_tag", "license"):
        text(field, data.get(field))
    if isinstance(data.get("license"), str) and not _known_licenses(data["license"]):
        faults.append(
            f"license {data.get('license')!r} is not an identifier the Hub knows, like 'apache-2.0' or 'mit'"
        )
    for field in ("tags", "metrics", "datasets"):
        value = data.get(field, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            faults.append(f"{field} should be a list of texts, not {value!r}")
    for field in ("datasets", "base_model"):
        value = data.get(field) or []
        for item in [value] if isinstance(value, str) else value:
            if not isinstance(item, str) or _hub_id(item, may_exist=True) is None:
                faults.append(f"{field}: {item!r} is not the id of a repository on the Hub")
    for entry in data.get("model-index") or []:
        text("model-index.name", entry.get("name"))
        for result in entry.get("results") or [{}]:
            text("model-index.results.task.type", result.get("task", {}).get("type"))
            text("model-index.results.dataset.name", result.get("dataset", {}).get("name"))
            text("model-index.results.dataset.type", result.get("dataset", {}).get("type"))
            for metric in result.get("metrics") or [{}]:
                text("model-index.results.metrics.type", metric.get("type"))
                if _number(metric.get("value")) is None:
                    faults.append(
                        f"model-index: the value of {metric.get('type')} is {metric.get('value')!r}, no number"
                    )
                if metric.get("verified"):
                    faults.append("model-index: only the Hub itself may call a result verified")
    if faults:
        raise CardError("the model card's metadata are not valid: " + "; ".join(faults))


def _known_licenses(value: Any) -> bool:
    return all(item in LICENSES for item in (value if isinstance(value, list) else [value]))


# Metadata ---------------------------------------------------------------------------------------------------


def _metadata_of(card: str) -> dict[str, Any]:
    """The YAML block as any other reader would parse it."""
    return yaml.safe_load(card.split("\n---\n", 1)[0].removeprefix("---\n"))


def _hub_id(name: str | None, *, with_namespace: bool = False, may_exist: bool = False) -> str | None:
    """`name` if it is the id of a Hub repository, None if it is a path on this machine (or neither)."""
    if not name or name.startswith(("/", ".", "~")) or (with_namespace and "/" not in name):
        return None
    if not may_exist and Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _last_component(name: str) -> str:
    return _one_line(re.split(r"[/\\]", name.rstrip("/\\"))[-1]) or "unnamed"


def _dataset_type(dataset_name: str | None, dataset_id: str | None) -> str:
    """The Hub id, or for local data the `datasets` builder that reads it, which is the custom of Trainer's cards."""
    if dataset_id:
        return dataset_id
    path = Path(dataset_name) if dataset_name else None
    if path is not None:
        for pattern, builder in (("*.parquet", "parquet"), ("*.tar", "webdataset")):
            if path.match(pattern) or (path.is_dir() and next(path.rglob(pattern), None) is not None):
                return builder
    return "imagefolder"


def _eval_results(
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    dataset_name: str | None,
    dataset_id: str | None,
    num_labels: int,
    task: DenseTask | None,
) -> list[EvalResult]:
    common = dict(
        task_type=task.pipeline_tag if task else PIPELINE_TAG,
        task_name=task.name if task else "Image classification",
        dataset_type=_dataset_type(dataset_name, dataset_id),
        dataset_name=dataset_id or (_last_component(dataset_name) if dataset_name else "a local dataset"),
        dataset_config=settings.get("dataset_config_name") if dataset_id else None,
        dataset_revision=settings.get("dataset_revision") if dataset_id else None,
        dataset_split=settings.get("validation_split"),
        verified=False,
    )
    return [
        EvalResult(metric_type=kind, metric_name=name, metric_value=value, **common)
        for key, kind, name in _metrics(num_labels, task)
        if (value := _number(results.get(key))) is not None
    ]


def _metrics(num_labels: int, task: DenseTask | None) -> Sequence[tuple[str, str, str]]:
    """(key in all_results.json, metric id, name). Top-5 of five classes or fewer says nothing, so it is left out."""
    if task:
        return task.figures
    rows = [("eval_accuracy", "accuracy", "Top-1 accuracy")]
    if num_labels > 5:
        rows.append(("eval_top5_accuracy", "accuracy", "Top-5 accuracy"))
    return [*rows, ("eval_loss", "loss", "Loss")]


def _number(value: Any) -> float | None:
    """`value` as a finite Python number, else None: YAML's .nan and .inf are not JSON, which the Hub keeps."""
    if value is None or isinstance(value, (bool, str)):
        return None
    try:
        value = value.item() if hasattr(value, "item") else value
        return value if math.isfinite(value) else None
    except (TypeError, ValueError, RuntimeError):
        return None


def _widget(model_dir: Path, repo_id: str | None) -> list[dict[str, str]]:
    """Pictures to try the model on, out of those that its folder offers in `examples/`."""
    if repo_id is None or not (model_dir / "examples").is_dir():
        return []
    paths = sorted(
        path for path in (model_dir / "examples").iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    return [
        {
            "src": f"https://huggingface.co/{repo_id}/resolve/main/examples/{quote(path.name)}",
            "example_title": _one_line(path.stem.replace("_", " ")) or "example",
        }
        for path in paths[:5]
    ]


def _emissions(results: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """The Hub's `co2_eq_emissions`, of a run that measured them."""
    grams = _number(results.get("co2_eq_g"))
    if grams is None:
        return {}
    return {
        "emissions": grams,
        "source": "CodeCarbon",
        "training_type": "fine-tuning" if base_model else "pre-training",
        **({"geographical_location": str(results["co2_country"])} if results.get("co2_country") else {}),
        **({"hardware_used": str(results["device"])} if results.get("device") else {}),
    }


def _adaptation(settings: Mapping[str, Any]) -> str:
    """Which part of the model was trained, if not all of it."""
    if settings.get("freeze_backbone"):
        return ", training nothing but the head (linear probe)"
    if settings.get("lora"):
        rank = plain_markdown(settings["lora"])
        return f", training the head and LoRA adapters of rank {rank}, merged into the weights"
    return ""


def _distillation(settings: Mapping[str, Any]) -> str:
    """The teacher: its id on the Hub, or the name of its folder."""
    teacher = settings.get("teacher")
    if not teacher:
        return ""
    teacher_id = _hub_id(teacher, with_namespace=True)
    name = _link(teacher_id) if teacher_id else plain_markdown(_last_component(teacher))
    return f", with {name} as the teacher ({plain_markdown(settings.get('distillation', 'soft'))} distillation)"


def _in_force(key: str, settings: Mapping[str, Any]) -> bool:
    """Whether a setting of distillation or adaptation did anything."""
    if key == "distillation_temperature" and settings.get("distillation") == "hard":
        return False
    needs = {"distillation": "teacher", "lora": "lora", "freeze": "freeze_backbone"}.get(key.split("_")[0])
    return needs is None or bool(settings.get(needs))


def _emissions_text(results: Mapping[str, Any]) -> str:
    energy, grams = _number(results.get("energy_kwh")), _number(results.get("co2_eq_g"))
    if energy is None or grams is None:
        return ""
    country = (
        f" with the electricity of {plain_markdown(results['co2_country'])}" if results.get("co2_country") else ""
    )
    return (
        f"The training took {energy:.3g} kWh, which is {grams:.3g} g of CO₂ equivalent{country}, as CodeCarbon "
        "estimates from the power of processors and memory during the run; cooling and the making of the machine are "
        "not in it."
    )


# Text -------------------------------------------------------------------------------------------------------


def _one_line(text: str) -> str:
    """One line, without control characters and without the marks that reverse the direction of writing."""
    text = undecodable_escaped(text)
    text = "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in text)
    text = "".join(char for char in text if unicodedata.category(char) not in ("Cf", "Cs", "Co", "Cn"))
    return " ".join(text.split())


def plain_markdown(value: Any) -> str:
    """Any text as plain text in a Markdown table: no markup, no HTML, no new row or column; 200 characters at most."""
    text = _one_line(str(value))
    text = text if len(text) <= 200 else text[:199] + "…"
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", text)


def _link(repo_id: str, kind: str = "") -> str:
    return f"[{plain_markdown(repo_id)}](https://huggingface.co/{kind}{repo_id})"


def _data_text(dataset_name: str | None, dataset_id: str | None) -> str:
    if dataset_id:
        return _link(dataset_id, "datasets/")
    return f"the local dataset {plain_markdown(_last_component(dataset_name))}" if dataset_name else "a local dataset"


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.\-]+", value) is not None


def _plain(value: Any) -> str:
    number = _number(value)
    if number is None or isinstance(number, int):
        return str(value)
    return f"{number:.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _result_rows(results: Mapping[str, Any], num_labels: int, task: DenseTask | None) -> list[tuple[str, str]]:
    rows = []
    for key, _, name in _metrics(num_labels, task):
        value = _number(results.get(key))
        if value is not None:
            rows.append((name, f"{value:.4f}" if key == "eval_loss" else _percent(value)))
    return rows


def _per_class(accuracies: Any, label_names: Sequence[str]) -> list[tuple[str, str]]:
    """Rows of the per-class table. A class that had no image (NaN or None) shows a dash."""
    if not accuracies or len(label_names) > MAX_CLASSES_IN_TABLE:
        return []
    if not isinstance(accuracies, Mapping):
        accuracies = dict(zip(label_names, accuracies, strict=True))
    rows = []
    for name in label_names:
        value = _number(accuracies.get(name))
        rows.append((name, "-" if value is None else _percent(value)))
    return rows


def _versions() -> list[tuple[str, str]]:
    found = [("Python", platform.python_version())]
    for name in VERSIONED:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found


# The model's folder -----------------------------------------------------------------------------------------


def _read_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    return _read(path, json.loads) if path.is_file() else {}


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """
    Raises:
        CardError: it is in another encoding, damaged, or no mapping.
    """
    try:
        values = parse(path.read_text(encoding="utf-8")) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise CardError(f"{path.name} cannot be read: {_one_line(str(error))}") from None
    if not isinstance(values, dict):
        raise CardError(f"{path.name} holds no mapping of names to values")
    return values


def _parameter_count(model_dir: Path) -> int:
    """Parameters of the safetensors files, from their headers: 8 bytes of length, then JSON."""
    count = 0
    for path in model_dir.glob("model*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        count += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return count


def _source(repo_id: str | None, model_dir: Path) -> str:
    """What to write between the quotes of the example: never more of a local path than its last component."""
    name = repo_id or model_dir.resolve().name
    return name if re.fullmatch(r"[\w./\- ]+", name) else "path/to/this/folder"


def _loading_arguments(config: Mapping[str, Any]) -> str:
    # transformers has a PoolFormer of its own, which computes the same function; a MetaFormer needs its code.
    return "" if config.get("model_type", "poolformer") == "poolformer" else ", trust_remote_code=True"


def _pipeline_snippet(
    repo_id: str | None, model_dir: Path, config: Mapping[str, Any], task: DenseTask | None = None
) -> str:
    if task:
        return task.pipeline_code.replace("{source}", f'"{_source(repo_id, model_dir)}"')
    return (
        "from transformers import pipeline\n\n"
        f'classify = pipeline("{PIPELINE_TAG}", model="{_source(repo_id, model_dir)}"{_loading_arguments(config)})\n'
        'print(classify("photo.jpg"))'
    )


def _model_snippet(
    repo_id: str | None, model_dir: Path, config: Mapping[str, Any], task: DenseTask | None = None
) -> str:
    if task:
        return task.model_code.replace("{source}", f'"{_source(repo_id, model_dir)}"')
    source = f'"{_source(repo_id, model_dir)}"{_loading_arguments(config)}'
    return (
        "import torch\n"
        "from PIL import Image\n"
        "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
        f"processor = AutoImageProcessor.from_pretrained({source})\n"
        f"model = AutoModelForImageClassification.from_pretrained({source}).eval()\n"
        'inputs = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")\n'
        "with torch.inference_mode():\n"
        "    logits = model(**inputs).logits  # (1, number of classes)\n"
        "print(model.config.id2label[logits.argmax(-1).item()])"
    )
