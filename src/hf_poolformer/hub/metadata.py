"""The Hub's rules for what stands at the head of a card.

Its own validator is a web service; `check_metadata` applies its rules here, so that a card is known to be good before
anything is uploaded, and offline too.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..foundation.errors import UserError
from ..foundation.names import near_names


__all__ = [
    "HUB_TASKS",
    "LICENSES",
    "CardError",
    "check_card",
    "check_license",
    "check_metadata",
    "finite_number",
    "hub_id",
]

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
# The tasks of https://huggingface.co/tasks, by which the Hub sorts models.
HUB_TASKS = frozenset(
    {
        "any-to-any", "audio-classification", "audio-text-to-text", "audio-to-audio", "automatic-speech-recognition",
        "depth-estimation", "document-question-answering", "feature-extraction", "fill-mask", "graph-ml",
        "image-classification", "image-feature-extraction", "image-segmentation", "image-text-to-image",
        "image-text-to-text", "image-text-to-video", "image-to-3d", "image-to-image", "image-to-text",
        "image-to-video", "keypoint-detection", "mask-generation", "multiple-choice", "object-detection", "other",
        "question-answering", "reinforcement-learning", "robotics", "sentence-similarity", "summarization",
        "table-question-answering", "table-to-text", "tabular-classification", "tabular-regression",
        "tabular-to-text", "text-classification", "text-generation", "text-ranking", "text-retrieval", "text-to-3d",
        "text-to-audio", "text-to-image", "text-to-speech", "text-to-video", "time-series-forecasting",
        "token-classification", "translation", "unconditional-image-generation", "video-classification",
        "video-text-to-text", "video-to-video", "visual-document-retrieval", "visual-question-answering",
        "voice-activity-detection", "zero-shot-classification", "zero-shot-image-classification",
        "zero-shot-object-detection",
    }
)
# fmt: on


class CardError(UserError):
    """A model card whose metadata the Hub would refuse; the message lists every fault."""


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
        check_metadata(data, complete=False)
    elif "license" in data:
        check_license(data["license"])


def check_license(value: Any) -> None:
    """
    Args:
        value: an identifier, or a list of them.

    Raises:
        CardError: the Hub does not know it.
    """
    for item in value if isinstance(value, list) else [value]:
        if item not in LICENSES:
            raise CardError(f"license {value!r} is not an identifier the Hub knows, like 'apache-2.0' or 'cc-by-4.0'")


def check_metadata(data: Mapping[str, Any], *, complete: bool = True) -> None:
    """Apply the Hub's rules for model card metadata, without the network.

    Args:
        data: the YAML block of a card, parsed.
        complete: library, pipeline and licence have to be there.

    Raises:
        CardError: naming every field that is missing or wrong.
    """
    faults = []

    def text(field: str, value: Any) -> None:
        if not isinstance(value, str) or not value.strip():
            faults.append(f"{field} should be a text, not {value!r}")

    def task(field: str, value: Any) -> None:
        if isinstance(value, str) and value.strip() and value not in HUB_TASKS:
            near = near_names(value, sorted(known.replace("-", "_") for known in HUB_TASKS))
            meant = " or ".join(near).replace("_", "-")
            hint = f"did you mean {meant}?" if near else "https://huggingface.co/tasks has them all"
            faults.append(f"{field} {value!r} is no task of the Hub; {hint}")

    for field in ("library_name", "pipeline_tag", "license"):
        if complete or field in data:
            text(field, data.get(field))
    if isinstance(data.get("license"), str):
        try:
            check_license(data["license"])
        except CardError as error:
            faults.append(str(error))
    task("pipeline_tag", data.get("pipeline_tag"))
    for field in ("tags", "metrics", "datasets"):
        value = data.get(field, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            faults.append(f"{field} should be a list of texts, not {value!r}")
    for field in ("datasets", "base_model"):
        value = data.get(field) or []
        for item in [value] if isinstance(value, str) else value:
            if not isinstance(item, str) or hub_id(item, may_exist=True) is None:
                faults.append(f"{field}: {item!r} is not the id of a repository on the Hub")
    for entry in data.get("model-index") or []:
        text("model-index.name", entry.get("name"))
        for result in entry.get("results") or [{}]:
            text("model-index.results.task.type", result.get("task", {}).get("type"))
            task("model-index.results.task.type", result.get("task", {}).get("type"))
            text("model-index.results.dataset.name", result.get("dataset", {}).get("name"))
            dataset = result.get("dataset", {}).get("type")
            text("model-index.results.dataset.type", dataset)
            # Else it is the name of what reads a local dataset.
            if isinstance(dataset, str) and "/" in dataset and hub_id(dataset, may_exist=True) is None:
                faults.append(f"model-index: {dataset!r} is not the id of a dataset on the Hub")
            for metric in result.get("metrics") or [{}]:
                text("model-index.results.metrics.type", metric.get("type"))
                if finite_number(metric.get("value")) is None:
                    faults.append(
                        f"model-index: the value of {metric.get('type')} is {metric.get('value')!r}, no number"
                    )
                if metric.get("verified"):
                    faults.append("model-index: only the Hub itself may call a result verified")
    if faults:
        raise CardError("the model card's metadata are not valid: " + "; ".join(faults))


def hub_id(name: str | None, *, with_namespace: bool = False, may_exist: bool = False) -> str | None:
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


def finite_number(value: Any) -> float | None:
    """`value` as a finite Python number, else None: YAML's .nan and .inf are not JSON, which the Hub keeps."""
    if value is None or isinstance(value, (bool, str)):
        return None
    try:
        value = value.item() if hasattr(value, "item") else value
        return value if math.isfinite(value) else None
    except (TypeError, ValueError, RuntimeError):
        return None
