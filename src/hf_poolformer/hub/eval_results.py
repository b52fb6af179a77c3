"""`.eval_results/`: what a card says of results, in the form from which the Hub fills the leaderboards of benchmarks.

Everything is taken from the card's model-index, so that the two agree. What belongs there is the first figure of each
split that was measured whole. A figure of a folder, of images held out from training, or of a dataset that others
cannot see stays in the model-index alone. Nothing is ever called verified here: that is for the Hub to say.

https://huggingface.co/docs/hub/eval-results
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    eval_result_entries_to_yaml,
    parse_eval_result_entries,
)
from huggingface_hub.errors import RepositoryNotFoundError

from ..foundation.files import make_folder, replace_text
from .metadata import CardError, finite_number, hub_id


__all__ = ["RESULTS", "choose_tasks", "leave_results", "read_results", "results_of_card", "text_of"]

# Always the same file: what is published again replaces what was there.
RESULTS = ".eval_results/hf-poolformer.yaml"
# The task of a dataset that names none, and the configuration of one that has no other.
DEFAULT = "default"


@dataclass(frozen=True)
class Measured:
    """A result, and the part of its dataset that it was measured on."""

    entry: EvalResultEntry
    config: str
    split: str


def results_of_card(card: str) -> tuple[list[Measured], list[str]]:
    """The results of a card that can be told to the Hub's leaderboards, and which cannot and why, a sentence each.

    Raises:
        CardError: the model-index is damaged.
    """
    try:
        results = ModelCard(card).data.eval_results or []
    except (KeyError, TypeError, ValueError) as error:
        raise CardError(f"README.md, the card: its model-index cannot be read: {error}") from None
    found: dict[tuple, Measured] = {}
    left_out: dict[str, None] = {}  # a set that keeps its order
    for result in results:
        value = finite_number(result.metric_value)
        reason = why_not(result)
        if reason is not None:
            left_out[f"the results on {result.dataset_name} are in the card only: {reason}"] = None
        elif value is not None:
            config = result.dataset_config or DEFAULT
            # The first figure of each is the one by which a model is judged.
            found.setdefault(
                (result.dataset_type, config, result.dataset_split),
                Measured(entry_of(result, value, config), config, result.dataset_split),
            )
    return list(found.values()), list(left_out)


def why_not(result: EvalResult) -> str | None:
    """Why a result of a card is none of a dataset on the Hub; None if it is one."""
    if hub_id(result.dataset_type, with_namespace=True, may_exist=True) is None:
        return "that is no dataset on the Hub"
    if not result.dataset_split:
        return "they are not of one of its splits"
    return None


def entry_of(result: EvalResult, value: float, config: str) -> EvalResultEntry:
    revision = result.dataset_revision or ""
    return EvalResultEntry(
        dataset_id=result.dataset_type,
        task_id=config,
        value=value,
        dataset_revision=revision if re.fullmatch(r"[0-9a-f]{40}", revision) else None,
        source_url=result.source_url,
        source_name=result.source_name if result.source_url else None,
        notes=f"{result.metric_name or result.metric_type}, split {result.dataset_split}",
    )


def text_of(entries: Iterable[EvalResultEntry]) -> str:
    """The file that says this."""
    return yaml.safe_dump(eval_result_entries_to_yaml(list(entries)), sort_keys=False, allow_unicode=True)


def read_results(text: str, name: str) -> list[EvalResultEntry]:
    """The entries of a file of `.eval_results/`.

    Args:
        name: of the file, for messages.

    Raises:
        CardError: the Hub could not read it, or an id in it is none.
    """
    try:
        entries = parse_eval_result_entries(yaml.safe_load(text) or [])
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise CardError(f"{name} is no list of results as the Hub reads it: {said}") from None
    for entry in entries:
        if not isinstance(entry.dataset_id, str) or hub_id(entry.dataset_id, may_exist=True) is None:
            raise CardError(f"{name}: {entry.dataset_id!r} is not the id of a dataset on the Hub")
        if not isinstance(entry.task_id, str) or not re.fullmatch(r"[\w.\-]+", entry.task_id):
            raise CardError(f"{name}: {entry.task_id!r} is not the id of a task")
    return entries


def leave_results(folder: Path, card: str) -> None:
    """Writes the results of a card beside it, where the next run overwrites them."""
    path = folder / RESULTS
    measured, _ = results_of_card(card)
    if measured:
        make_folder(path.parent)
        replace_text(path, text_of(each.entry for each in measured))
    else:
        path.unlink(missing_ok=True)


# What the Hub knows of the datasets --------------------------------------------------------------------------


def choose_tasks(measured: Sequence[Measured], api: HfApi, *, public: bool) -> tuple[list[EvalResultEntry], list[str]]:
    """
    The results with the ids that their benchmarks have for these tasks, but for those of datasets that the Hub does
    not know, or that others must not hear of; and what is to be said of them, a sentence each.

    Args:
        public: whether everybody can see the repository that the results go to.

    Raises:
        huggingface_hub's errors: the Hub cannot be asked.
    """
    entries: dict[tuple[str, str], EvalResultEntry] = {}
    notes = []
    for each in measured:
        name, (task, remark) = each.entry.dataset_id, task_of(each, api, public)
        if task is not None and (name, task) in entries:
            task, remark = None, f"there is a result of its task {task} already, of another split"
        if task is not None:
            entries[name, task] = replace(each.entry, task_id=task)
        if remark:
            kept = "are published, but" if task is not None else "are in the card only:"
            notes.append(f"the results on {name} ({each.split}) {kept} {remark}")
    return list(entries.values()), notes


def task_of(measured: Measured, api: HfApi, public: bool) -> tuple[str | None, str]:
    """The id of a task in its dataset, None if the Hub has no place for the result; and what is to be said of it."""
    name = measured.entry.dataset_id
    try:
        info = api.dataset_info(name)
    except RepositoryNotFoundError:
        return None, "the Hub has no such dataset, or the token may not see it"
    if info.private and public:
        return None, "the dataset is private and the model is not; its card names it, too"
    if not any(sibling.rfilename == "eval.yaml" for sibling in info.siblings or []):
        return measured.entry.task_id, "the dataset is no benchmark (it has no eval.yaml), so no leaderboard has them"
    try:
        path = api.hf_hub_download(name, "eval.yaml", repo_type="dataset", revision=info.sha)
        tasks = tasks_of_benchmark(Path(path).read_text(encoding="utf-8"))
    except (RepositoryNotFoundError, ValueError, yaml.YAMLError):  # gated, or nothing that we understand
        return None, "the dataset's eval.yaml cannot be read"
    fitting = [
        str(task["id"])
        for task in tasks
        if (task.get("config") or DEFAULT) == measured.config and task.get("split") in (None, measured.split)
    ]
    if len(fitting) == 1:
        return fitting[0], ""
    which = f"several tasks ({', '.join(fitting)})" if fitting else "no task"
    return None, f"the dataset's eval.yaml has {which} for the configuration {measured.config} and this split"


def tasks_of_benchmark(text: str) -> list[Mapping[str, Any]]:
    """The tasks of an `eval.yaml`, each of which has an id.

    Raises:
        ValueError: there is no list of such.
    """
    content = yaml.safe_load(text)
    tasks = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, list) or not all(isinstance(task, dict) and "id" in task for task in tasks):
        raise ValueError("no list of tasks")
    return tasks
