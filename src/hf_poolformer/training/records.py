"""What decides the result of a run, so that a finished one is known again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..data.fingerprints import state_of_dataset, state_of_path
from ..foundation.settings import names_marked
from ..foundation.strict_json import to_json
from ..settings.training import TrainingSettings


def content_of(base: TrainingSettings) -> dict[str, str]:
    """The state of the data and, if there is one, of the teacher; see `fingerprints`."""
    content = {}
    for name in ("dataset_name", "train_dir", "validation_dir"):
        if getattr(base, name, None):
            content[name] = state_of_dataset(getattr(base, name), base.dataset_revision, base.hub_token)
    if teacher := getattr(base, "teacher", None):
        content["teacher"] = state_of_path(teacher) or teacher
    return content


def key_of(settings: TrainingSettings, content: Mapping[str, str]) -> dict[str, Any]:
    """All that decides the result of a run, fit for JSON. A result belongs to the run that has the same key."""
    chosen = {name: getattr(settings, name) for name in names_marked([type(settings)], "decides")}
    chosen["config_overrides"] = settings.overrides()
    if hasattr(settings, "rare_class_choices"):
        chosen |= settings.rare_class_choices()  # weights in a file by what stands in it
    if settings.best_by:
        chosen["eval_epochs"] = settings.eval_epochs
    if settings.mixed_precision is None:
        chosen["mixed_precision"] = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    processes = int(os.environ.get("WORLD_SIZE", 1))  # of which each brings its own batch
    key = {"settings": chosen, "content": dict(content), "processes": processes, "version": __version__}
    return json.loads(to_json(key))


def differences(theirs: Any, mine: Mapping[str, Any]) -> str:
    """In what a record's key differs, in words."""
    if theirs is None:
        return "an older version wrote it, which did not note its settings"
    told, yours = theirs["settings"], mine["settings"]
    changed = [name for name in {**told, **yours} if told.get(name) != yours.get(name)]
    words = [f"{name} {told.get(name)} instead of {yours.get(name)}" for name in changed[:4]]
    words += ["and more"] if len(changed) > 4 else []
    words += [f"another {name}" for name in ("content", "processes", "version") if theirs.get(name) != mine[name]]
    return ", ".join(words).replace("another content", "other data")
