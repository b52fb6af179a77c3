"""Which models a visitor may use, and loading them."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, PreTrainedModel

from ..data.transforms import channels_of
from ..foundation.errors import UserError, one_line
from ..foundation.loading import HERE, load_trained, task_of_checkpoint
from ..foundation.origin import Origin
from ..foundation.tasks import Task
from ..prediction.inference import Predictor, find_device


logger = logging.getLogger(__name__)

OUR_TYPES = ("poolformer", "metaformer")

# In memory at a time, and the largest that a visitor may have downloaded: M48 has 294 MB of float32.
KEPT_MODELS = 2
MAX_DOWNLOAD = 2 * 2**30
WEIGHTS = "model*.safetensors"
DOWNLOADED = ("config.json", "preprocessor_config.json", WEIGHTS, "model.safetensors.index.json")


@dataclass(frozen=True)
class DenseModel:
    """A segmenter or detector on its device, and its image processor."""

    task: Task
    model: PreTrainedModel
    processor: Any
    device: torch.device


class Models:
    """The models of an app, by the names that its visitors see; loaded when first used, the latest ones kept.

    A visitor names a model by one of `names`, which say nothing of the folders on this machine. With
    `allow_any_model` also by a Hub id. Such a model is downloaded without the operator's token, never taken from a
    folder, has to be of this package's families, and neither code nor pickles of it are run.

    Args:
        sources: folders or Hub ids, the first being shown first.
        origin: of `sources`; of what visitors name, only its cache.

    Raises:
        UserError: there is no such model among `sources`; the first is loaded at once, of the others the
            configuration.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        allow_any_model: bool = False,
        device: str = "auto",
        origin: Origin = HERE,
    ):
        if not sources:
            raise UserError("there is no model to show: name a folder or a Hub id")
        self.allow_any_model = allow_any_model
        self.device = find_device(device)
        self._origin = origin
        self._sources = dict(zip(shown_names(sources), sources, strict=True))
        self._loaded: OrderedDict[str, Predictor | DenseModel] = OrderedDict()
        self._lock = threading.Lock()
        self.tasks = {name: task_of_checkpoint(source, origin) for name, source in self._sources.items()}
        first = self.names[0]
        self._loaded[first] = self._load(self._sources[first], origin)

    @property
    def names(self) -> list[str]:
        return list(self._sources)

    def get(self, name: str | None) -> Predictor | DenseModel:
        """A model that a visitor named; None is the first.

        Raises:
            UserError: with a message fit for the visitor.
        """
        name = self.names[0] if name is None else str(name).strip()
        with self._lock:  # one download and one load at a time
            if name not in self._loaded:
                self._loaded[name] = self._fetch(name)
                while len(self._loaded) > KEPT_MODELS:
                    self._loaded.popitem(last=False)
            self._loaded.move_to_end(name)
            return self._loaded[name]

    def _fetch(self, name: str) -> Predictor | DenseModel:
        if name in self._sources:
            try:
                return self._load(self._sources[name], self._origin)
            except UserError as error:
                logger.error("%s", error)  # which may name a folder of this machine
                raise UserError(f"The model {name} cannot be loaded; whoever runs this page sees why.") from None
        if not self.allow_any_model:
            raise UserError(f"This page has no model {name!r}, but: {', '.join(self.names)}.")
        folder = self._download(name)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if config.model_type not in OUR_TYPES:
                raise UserError(f"it is a {config.model_type}, not a PoolFormer or MetaFormer")
            return self._load(str(folder), HERE)
        except Exception as error:  # whatever a foreign repository provokes
            said = one_line(error).replace(str(folder), name)
            raise UserError(f"The model {name} cannot be loaded: {said}") from None

    def _download(self, repo_id: str) -> Path:
        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            raise UserError(f"{repo_id!r} is not a Hub id, which looks like user/name.") from None
        try:
            # Without the operator's token: it may open models that visitors must not see.
            api = HfApi(token=False)
            commit = api.model_info(repo_id).sha
            files = {
                entry.path: entry.size
                for entry in api.list_repo_tree(repo_id, revision=commit)
                if isinstance(entry, RepoFile)
            }
            size = sum(size for file, size in files.items() if fnmatch(file, WEIGHTS))
            if not size or "config.json" not in files:
                raise UserError(f"{repo_id} has no config.json and safetensors weights.")
            if size > MAX_DOWNLOAD:
                raise UserError(f"{repo_id} has {size / 1e9:.1f} GB of weights, more than this page downloads.")
            return Path(
                snapshot_download(
                    repo_id,
                    revision=commit,
                    token=False,
                    cache_dir=self._origin.cache_dir,
                    allow_patterns=list(DOWNLOADED),
                )
            )
        except UserError:
            raise
        except Exception as error:  # no such repository, no network, no space left
            logger.error("%s: %s", repo_id, one_line(error))
            raise UserError(f"The Hub does not give {repo_id}: {type(error).__name__}.") from None

    def _load(self, source: str, origin: Origin) -> Predictor | DenseModel:
        task = task_of_checkpoint(source, origin)
        if task.gives == "scores":
            predictor = Predictor(source, device=self.device, origin=origin)
            if (number := channels_of(predictor.processor)) != 3:
                raise UserError(f"{source} takes images of {number} channels, and this page shows pictures in colour")
            return predictor
        model, processor = load_trained(source, origin, task)
        model.to(self.device, memory_format=torch.channels_last).eval()
        return DenseModel(task, model, processor, self.device)


def shown_names(sources: Sequence[str]) -> list[str]:
    """What visitors call the models: Hub ids as they are, of folders the last part, numbered if that is not enough."""
    names: list[str] = []
    for source in sources:
        path = Path(source)
        plain = path.resolve().name or "model" if path.is_dir() else str(source)
        taken = sum(name == plain or name.startswith(f"{plain} (") for name in names)
        names.append(f"{plain} ({taken + 1})" if taken else plain)
    return names
