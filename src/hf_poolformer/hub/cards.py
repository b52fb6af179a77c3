"""Model cards: the README.md of a model's folder, whichever way it came about, with metadata the Hub accepts.

`folder_card` looks at what lies there: the settings and results of a run, the note of a conversion, or a model alone.
`published_cards.py` knows the checkpoints of the authors; `rendering.py` makes the text.
"""

import json
import math
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

from ..configuration_poolformer import VARIANTS, MetaFormerConfig, PoolFormerConfig
from ..conversion.note import ConversionNote
from ..foundation.machine import versions_of
from ..foundation.tasks import CLASSIFICATION, TASKS, Figure, Task, task_of_config
from ..settings.training import shown_settings
from .metadata import CardError, finite_number, hub_id
from .published_cards import architecture_rows, original_names, published_card
from .rendering import (
    citations_of,
    clean_line,
    code_examples,
    last_component,
    link,
    plain_markdown,
    render_card,
)


__all__ = ["folder_card"]

# More rows than this make a table nobody reads.
MAX_CLASSES_IN_TABLE = 50


# Keys of all_results.json -> what they are called in the card.
RUN_FIGURES = {
    "epoch": "epochs trained",
    "best_epoch": "epoch of the best evaluation",
    "train_loss": "training loss",
    "train_runtime": "training time, s",
    "train_samples_per_second": "training images per second",
    "train_data_wait_share": "share of the time spent waiting for data",
    "skipped_images": "images skipped as broken",
    "trained_parameters": "parameters trained",
}

# Settings that do something only where another one has this value.
ONLY_WITH = {
    "distillation_temperature": ("distillation", "soft"),
    "class_weights_beta": ("class_weights", "effective"),
    "sampling_power": ("sampling", "balanced"),
    "asymmetric_gamma_negative": ("loss", "asymmetric"),
    "asymmetric_gamma_positive": ("loss", "asymmetric"),
    "asymmetric_clip": ("loss", "asymmetric"),
    "huber_delta": ("loss", "huber"),
}

# Pictures of results -> what they show.
RESULT_PICTURES = {
    "confusion_matrix.png": "Confusion matrix",
    "label_figures.png": "Precision, recall and F1 of each label",
    "scatter.png": "Predicted against true",
    "predictions.png": "Truth and predictions",
}

# What the run says about the machine it ran on -> what it is called in the card.
ENVIRONMENT = {"device": "device", "num_processes": "processes", "mixed_precision": "precision"}

VERSIONED = ("hf-poolformer", "transformers", "torch", "torchvision", "accelerate", "datasets", "huggingface_hub")


def folder_card(
    model_dir: str | os.PathLike, *, repo_id: str | None = None, license: str | None = None, name: str | None = None
) -> str:
    """The card of a model's folder, from what a run or a conversion left there, or else from the model alone.

    Of a run these are `all_results.json`, `training_settings.yaml`, `curves.png`, the pictures of RESULT_PICTURES and
    those in `examples/`; each is made use of where it is present.

    Args:
        repo_id: where the model will be published, if that is known.
        license: a licence identifier of the Hub.
        name: what the model is called while it is in no repository, if not as its folder.

    Raises:
        CardError: a file there is damaged, or the metadata would not pass the Hub's validation.
    """
    model_dir = Path(model_dir)
    settings = _read_mapping(model_dir / "training_settings.yaml", yaml.safe_load)
    conversion = None if settings else ConversionNote.read(model_dir)
    if conversion and conversion.variant in VARIANTS and conversion.source in original_names(conversion.variant):
        folder = _place(None, name or model_dir.resolve().name)
        section = _conversion_section(conversion, official=True)
        return published_card(conversion.variant, repo_id=repo_id, folder=folder, license=license, sections=section)
    return model_card(model_dir, settings, conversion, repo_id, license or "apache-2.0", name)


def model_card(
    model_dir: Path,
    settings: Mapping[str, Any],
    conversion: ConversionNote | None,
    repo_id: str | None,
    license: str,
    name: str | None,
) -> str:
    """As `folder_card`, of a model that is not the authors'.

    Args:
        settings: of the run that trained it, empty if that is not known: the card then says so. Those marked as
            `shown` are printed. `dataset_name` and `model_name_or_path` may be ids on the Hub, which become metadata,
            or paths, of which only the last component is printed.
        conversion: where it was converted from.
    """
    config = _read_mapping(model_dir / "config.json", json.loads)
    results = _read_mapping(model_dir / "all_results.json", json.loads)
    labels = config.get("id2label") or {}
    label_names = [str(labels[key]) for key in sorted(labels, key=int)]
    trained = bool(settings)
    dataset_name = settings.get("dataset_name") or settings.get("train_dir")
    base_model = settings.get("model_name_or_path")
    family = "PoolFormer" if config.get("model_type", "poolformer") == "poolformer" else "MetaFormer"
    dataset_id = hub_id(dataset_name)
    base_id = hub_id(base_model, with_namespace=True)
    if repo_id is not None and hub_id(repo_id, may_exist=True) is None:
        raise CardError(f"{repo_id!r} is not a repository id; it should look like user/name")

    called = name or model_dir.resolve().name
    name = repo_id.rpartition("/")[2] if repo_id else clean_line(called)
    data_text = _data_text(dataset_name, dataset_id)
    emissions = _emissions(results, base_model)
    task = TASKS.get(settings.get("task")) or task_of_config(config, headless=True) or TASKS[CLASSIFICATION]
    classes = f"{len(label_names)} {task.outputs[len(label_names) != 1]}"
    tag = task.pipeline_tag
    shown = task.figures_of(len(label_names), settings.get("metric_for_best_model"))
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag=tag,
        license=license,
        tags=[tag, "vision", family.lower(), "hf-poolformer"],
        datasets=[dataset_id] if dataset_id else None,
        metrics=[shown[0].metric] if shown else None,
        base_model=base_id,
        base_model_relation="finetune" if base_id else None,
        model_name=name,
        eval_results=_eval_results(results, shown, settings, dataset_name, dataset_id, task) or None,
        co2_eq_emissions=emissions or None,
        widget=_widget(model_dir, repo_id) or None,
    )
    if card_data.eval_results is None:
        card_data.pop("model_name")

    origin = "trained from scratch"
    if base_model is not None:
        origin = f"fine-tuned from {link(base_id) if base_id else plain_markdown(last_component(base_model))}"
    count = _parameter_count(model_dir)
    size = f", {count / 1e6:.1f} M parameters" if count else ""
    eval_split = _eval_split(settings, results)
    samples = finite_number(results.get("eval_samples"))
    evaluated = f"{int(samples)} images" if samples is not None else "images"
    sure = " Behind a figure, in brackets: its 95 % confidence interval." if _intervals(results) else ""
    if results.get("label_thresholds"):
        sure += " The thresholds of the labels were chosen on these very images: on others it does somewhat less well."
    if results.get("class_shifts"):
        sure += " How much rare classes are favoured was chosen on these very images: see `operating_point`."
    where = f"of the split `{clean_line(str(eval_split))}`" if _is_plain(eval_split) else "held out from training"
    adaptation, distillation = _adaptation(settings), _distillation(settings)
    how = f", {origin} on {data_text}{adaptation}{distillation}" if trained else ""
    machine = {**settings, **results}
    return render_card(
        card_data,
        title=name,
        summary=f"A [{family}](https://arxiv.org/abs/2111.11418) {task.noun}"
        f"{f' with {classes}' if task.reads != 'nothing' else ''}{size}{how}.",
        facts=_converted_facts(config, conversion) if conversion else [],
        **code_examples(
            task, _place(repo_id, called), config.get("model_type", "poolformer"), config.get("num_channels", 3)
        ),
        results=_result_rows(results, shown),
        results_intro=f"Measured on {evaluated} {where}, by the training script itself; nobody else verified it."
        + sure,
        per_class=_per_class(results, task, label_names),
        pictures=[(text, name) for name, text in RESULT_PICTURES.items() if (model_dir / name).is_file()],
        sections=_conversion_section(conversion, official=False) if conversion else [],
        training_intro=(
            f"Data: {data_text}. Start: {origin}{adaptation}{distillation}."
            if trained
            else "How and on what it was trained is not recorded here."
        ),
        settings=[
            (key, _plain(settings[key]) + (f": {_plain(results[key])}" if _was_chosen(key, settings, results) else ""))
            for key in shown_settings(settings.get("task"))
            if settings.get(key) is not None and _in_force(key, settings)
        ],
        figures=[
            (text, _plain(results[key]))
            for key, text in RUN_FIGURES.items()
            if finite_number(results.get(key)) is not None
        ],
        has_curves=(model_dir / "curves.png").is_file(),
        environment=[
            (text, _plain(machine[key])) for key, text in ENVIRONMENT.items() if machine.get(key) is not None
        ],
        # Those that trained it, of which a folder alone tells nothing.
        versions=[("Python", platform.python_version()), *versions_of(VERSIONED).items()] if trained else [],
        emissions=_emissions_text(results),
        limits=[paragraph.replace("{classes}", classes) for paragraph in task.limits],
        citations=citations_of(config.get("model_type", "poolformer")),
    )


def _was_chosen(key: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> bool:
    """Whether the run found out itself what it takes for a setting, and says so in its results."""
    return settings[key] == "auto" and key in results


# A converted model ------------------------------------------------------------------------------------------


def _converted_facts(config: Mapping[str, Any], conversion: ConversionNote) -> list[tuple[str, str]]:
    config_class = PoolFormerConfig if config.get("model_type") == "poolformer" else MetaFormerConfig
    rows = architecture_rows(config_class.from_dict(dict(config)))
    row = VARIANTS.get(conversion.variant)
    if row:
        rows.append(("the authors' checkpoint of this architecture", row.source))
    if row and row.top1:
        rows.append(
            ("ImageNet-1K top-1 that they report for theirs", f"{row.top1} % (whether this is it, is not known)")
        )
    return rows


def _conversion_section(conversion: ConversionNote, official: bool) -> list[tuple[str, str]]:
    source = "`" + clean_line(conversion.source).replace("`", "") + "`"
    sha256 = f" (SHA-256 `{conversion.sha256}`)" if conversion.sha256 else ""
    form = plain_markdown(conversion.format)
    text = f"Converted without change from {source}, a checkpoint in the {form} format{sha256}."
    if official:
        text += (
            " By its name and its architecture that is the authors' file; its content was not compared with theirs."
        )
    notes = [f"- {plain_markdown(note, longest=1000)}" for note in conversion.notes]
    return [("Conversion", "\n".join([text, *([""] if notes else []), *notes]))]


# Metadata ---------------------------------------------------------------------------------------------------


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
    shown: Sequence[Figure],
    settings: Mapping[str, Any],
    dataset_name: str | None,
    dataset_id: str | None,
    task: Task,
) -> list[EvalResult]:
    common = dict(
        task_type=task.pipeline_tag,
        task_name=task.title,
        dataset_type=_dataset_type(dataset_name, dataset_id),
        dataset_name=dataset_id or (last_component(dataset_name) if dataset_name else "a local dataset"),
        dataset_config=settings.get("dataset_config_name") if dataset_id else None,
        dataset_revision=settings.get("dataset_revision") if dataset_id else None,
        dataset_split=_eval_split(settings, results),
        verified=False,
    )
    return [
        EvalResult(metric_type=figure.metric, metric_name=figure.name, metric_value=value, **common)
        for figure in shown
        if (value := finite_number(results.get(figure.key))) is not None
    ]


def _eval_split(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str | None:
    """The split that was evaluated, which was asked for or found; None if it was part of another one."""
    return settings.get("validation_split") or results.get("evaluated_split")


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
            "example_title": clean_line(path.stem.replace("_", " ")) or "example",
        }
        for path in paths[:5]
    ]


def _emissions(results: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """The Hub's `co2_eq_emissions`, of a run that measured them."""
    grams = finite_number(results.get("co2_eq_g"))
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
    teacher_id = hub_id(teacher, with_namespace=True)
    name = link(teacher_id) if teacher_id else plain_markdown(last_component(teacher))
    kind = str(settings.get("distillation", "soft")).removesuffix("s")  # of features
    return f", with {name} as the teacher ({plain_markdown(kind)} distillation)"


def _in_force(key: str, settings: Mapping[str, Any]) -> bool:
    """Whether a setting that belongs to another one did anything."""
    if key in ONLY_WITH:
        name, value = ONLY_WITH[key]
        if settings.get(name) != value:
            return False
    needs = {"distillation": "teacher", "lora": "lora", "freeze": "freeze_backbone"}.get(key.split("_")[0])
    return needs is None or bool(settings.get(needs))


def _emissions_text(results: Mapping[str, Any]) -> str:
    energy, grams = finite_number(results.get("energy_kwh")), finite_number(results.get("co2_eq_g"))
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


def _data_text(dataset_name: str | None, dataset_id: str | None) -> str:
    if dataset_id:
        return link(dataset_id, "datasets/")
    return f"the local dataset {plain_markdown(last_component(dataset_name))}" if dataset_name else "a local dataset"


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.\-]+", value) is not None


def _plain(value: Any) -> str:
    number = finite_number(value)
    if number is None or isinstance(number, int):
        return str(value)
    return f"{number:.4g}"


def _intervals(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The confidence intervals of figures, by their keys."""
    found = results.get("eval_confidence_intervals")
    return found if isinstance(found, Mapping) else {}


def _figure_text(figure: Figure, value: Any, interval: Any = None) -> str:
    """What a table says of a figure; a dash where it is no number, of a class without images say."""
    number = finite_number(value)
    bounds = [finite_number(bound) for bound in interval] if isinstance(interval, list) else []
    known = len(bounds) == 2 and None not in bounds
    return "-" if number is None else figure.text(number, bounds if known else None, percent=True)


def _result_rows(results: Mapping[str, Any], shown: Sequence[Figure]) -> list[tuple[str, str]]:
    intervals = _intervals(results)
    return [
        (figure.name, _figure_text(figure, results[figure.key], intervals.get(figure.key)))
        for figure in shown
        if finite_number(results.get(figure.key)) is not None
    ]


def _per_class(results: Mapping[str, Any], task: Task, label_names: Sequence[str]) -> list[list[str]]:
    """A table of the figures of single classes, or targets, from its heading on; none for many classes."""
    intervals = _intervals(results)
    columns = [figure for figure in task.per_class if isinstance(results.get(figure.key), Mapping)]
    if not columns or len(label_names) > MAX_CLASSES_IN_TABLE:
        return []
    rows = [[task.outputs[0], *(figure.name for figure in columns)]]
    for name in label_names:
        bounds = ((intervals.get(figure.key) or {}).get(name) for figure in columns)
        cells = (
            _figure_text(figure, results[figure.key].get(name), of) for figure, of in zip(columns, bounds, strict=True)
        )
        rows.append([name, *cells])
    return rows


# The model's folder -----------------------------------------------------------------------------------------


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Empty if there is no such file.

    Raises:
        CardError: it is in another encoding, damaged, or no mapping.
    """
    if not path.is_file():
        return {}
    try:
        values = parse(path.read_text(encoding="utf-8")) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise CardError(f"{path.name} cannot be read: {clean_line(str(error))}") from None
    if not isinstance(values, dict):
        raise CardError(f"{path.name} holds no mapping of names to values")
    return values


def _parameter_count(model_dir: Path) -> int:
    """Numbers in the safetensors files, by their headers."""
    count = 0
    for path in model_dir.glob("model*.safetensors"):
        with safe_open(path, framework="np") as file:
            count += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return count


def _place(repo_id: str | None, folder: str) -> str:
    """What to write between the quotes of the example: never more of a local path than its last component."""
    place = repo_id or folder
    return place if re.fullmatch(r"[\w./\- ]+", place) else "path/to/this/folder"
