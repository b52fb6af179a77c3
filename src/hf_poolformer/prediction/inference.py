"""Undecoded images to rows of a table: decoding in worker processes, the model, what it answers and its features."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from ..data.transforms import blank_image, prepare
from ..foundation.errors import UserError, one_line
from ..foundation.exported import is_exported
from ..foundation.finite import finite_answers, refuse_not_finite
from ..foundation.graphs import graphed
from ..foundation.loading import HERE, belongs_to_head, load_checkpoint
from ..foundation.machine import cores
from ..foundation.names import numbered, undecodable_escaped
from ..foundation.origin import Origin
from ..foundation.scores import MULTI_LABEL, REGRESSION, TOP_K, check_choice, choose, class_scores
from ..foundation.workers import arguments_for
from .pixels import Preprocessing


LABEL_COLUMNS = ("label", "score", "labels", "scores")
# A target of the same name is called otherwise: see `value_columns`.
OTHER_COLUMNS = ("path", "embedding", "error")
# What an image is asked for: `top_k` and `threshold` of `foundation.scores.choose`.
Choice = tuple[int | None, float | None]
NOT_FINITE = "the model gives no finite scores (but NaN or infinity) for this image"


class Predictor:
    """A classifier on its device, and its image processor.

    Attributes:
        name: for messages, which strangers may read: of a folder the last part.
        preprocessing: from undecoded images to its input.
        columns: what a row holds besides `path` and `error`: `LABEL_COLUMNS`, or of a regression one for each of its
            targets; and, if asked for, `embedding`.
        top_k, threshold: what every image is asked for.
        embedding_size: length of an embedding, None if there are none.
    """

    def __init__(
        self,
        name: str,
        *,
        top_k: int | None = None,
        threshold: float | None = None,
        embeddings: bool = False,
        device: str | torch.device = "auto",
        dtype: str = "float32",
        device_preprocessing: str = "no",
        origin: Origin = HERE,
    ):
        """
        Args:
            name: folder or Hub id of an image classifier, or folder of an export; with `embeddings` also of a model
                without a head.
            top_k, threshold: as `foundation.scores.choose` says; None for what the model's kind of answers asks for.
            embeddings: also give the features that the head classifies: what its first layer takes, after the final
                norm and the mean over the positions. Of a model without a head, only these, without that norm.
            device_preprocessing: "no" or "decode", as `prediction/pixels.py` explains.

        Raises:
            UserError: no such model, no trained head, no such device; or a choice that this model does not give.
        """
        if is_exported(name):
            from ..export.runtime import load_classifier

            self.model, self.processor, fresh = *load_classifier(name, origin.trust_remote_code), []
            if dtype != "float32" or (embeddings and self.model.config.num_labels):
                raise UserError(f"{name} is an export, which gives no features and has the precision it was given")
        else:
            self.model, self.processor, fresh = load_checkpoint(name, origin)
        head_only = all(belongs_to_head(weight, self.model) or weight.startswith("norm.") for weight in fresh)
        headless = bool(embeddings and fresh and head_only)
        if fresh and not headless:
            hint = "" if embeddings else "; --embeddings writes the features of a model without a head"
            raise UserError(f"{name} is not a trained classifier: it has no weights for {', '.join(fresh[:3])}{hint}")
        if not self.model.config.num_labels and not embeddings:
            raise UserError(
                f"{name} has no classes: it is a feature extractor (num_labels is 0), whose features "
                "`hf-poolformer predict --embeddings` writes"
            )
        self.name = Path(name).resolve().name if Path(name).is_dir() else name
        self.dtype = dtype
        self._answered = False  # with a finite number, yet
        self._headless = headless
        self._head = None if headless else _head(self.model)
        if embeddings and self._head is None and not headless and self.model.config.num_labels:
            raise UserError(
                f"{name} has no head of a known name ({', '.join(_HEADS)}), so its features cannot be told"
            )
        self._labels = bool(self.model.config.num_labels) and not headless
        self._embeddings = embeddings
        config = self.model.config
        self._values: tuple[str, ...] = ()
        self.top_k, self.threshold = top_k, threshold
        if self._labels:
            check_choice(config, top_k, threshold)
            if config.problem_type == REGRESSION:
                self._values = value_columns(config)
            elif config.problem_type != MULTI_LABEL:
                self.top_k = top_k or TOP_K
        self.device = find_device(device)
        try:
            self.model.to(self.device, getattr(torch, dtype), memory_format=torch.channels_last).eval()
        except (RuntimeError, AttributeError, TypeError) as error:
            raise UserError(f"the model cannot be put on {self.device} as {dtype}: {one_line(error)}") from error
        self.preprocessing = Preprocessing(self.processor, self.device, device_preprocessing)
        answers: nn.Module = self.model.base_model if headless else self.model
        if embeddings and self._labels:
            answers = _WithFeatures(self.model, self._head).eval()
        self._graphed = graphed(answers)
        self.embedding_size = self._measure() if embeddings else None
        answered = self._values or LABEL_COLUMNS if self._labels else ()
        self.columns = (*answered, *(("embedding",) if embeddings else ()))

    def preprocess(self, where: str) -> None:
        """Another way for the pixels, of those of `Preprocessing`, and its errors."""
        if where != self.preprocessing.where:
            self.preprocessing = Preprocessing(self.processor, self.device, where)

    def digest(self) -> str:
        """Hash of everything in the model and the processor that decides what is predicted."""
        sha = hashlib.sha256()
        # A head that was not in the checkpoint is another at each start, and unused.
        used = self.model.base_model if self._headless else self.model
        for name, tensor in sorted(used.state_dict().items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        for facts in (self.model.config.to_dict(), self.processor.to_dict()):
            decisive = {name: value for name, value in facts.items() if name not in _INDECISIVE}
            sha.update(json.dumps(decisive, sort_keys=True, default=str).encode())
        return sha.hexdigest()

    @torch.inference_mode()
    def rows(self, batch: dict[str, Any], choices: Sequence[Choice] | None = None) -> list[dict[str, Any]]:
        """Predictions for what `preprocessing.load` or `decode` gave, in order.

        Of a broken image all but `path` and `error` is None. An image for which the model gives NaN or infinity is a
        row with an error. An image that has none of several labels has empty lists, and None for `label` and `score`.

        Args:
            batch: undecoded or decoded, as above.
            choices: what each image is asked for; if None, this predictor's `top_k` and `threshold`.

        Raises:
            UserError: so are all images of a size, and there has been no other answer yet; or too little memory.
        """
        with _enough_memory(len(batch["names"])):
            groups = self.preprocessing.finish(batch)
        rows = [
            {"path": name, **dict.fromkeys(self.columns), "error": error}
            for name, error in zip(batch["names"], batch["errors"], strict=True)
        ]
        for indices, pixel_values in groups:
            with _enough_memory(len(pixel_values)):
                outputs, features = self._forward(pixel_values)
            finite = finite_answers(outputs.logits.float()) if self._labels else finite_answers(features.float())
            if features is not None:
                finite &= finite_answers(features.float())
            finite = finite.tolist()
            self._answered |= any(finite)
            if not self._answered:
                refuse_not_finite(len(finite), len(finite), self.name)
            if self._labels:
                mine = None if choices is None else [choices[index] for index in indices]
                self._answer([rows[index] for index in indices], outputs.logits.float(), mine)
            if features is not None:
                for index, embedding in zip(indices, features.float().cpu().numpy(), strict=True):
                    rows[index]["embedding"] = embedding
            for index in (index for index, usable in zip(indices, finite, strict=True) if not usable):
                rows[index] |= {**dict.fromkeys(self.columns), "error": NOT_FINITE}
        return rows

    def _forward(self, pixel_values: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        pixel_values = pixel_values.to(
            self.device, self.model.dtype, memory_format=torch.channels_last, non_blocking=True
        )
        outputs = self._graphed(pixel_values=pixel_values)
        if not self._embeddings:
            return outputs, None
        if self._headless:
            return outputs, outputs.pooler_output.flatten(1)
        if not self._labels:
            return outputs, outputs.logits  # of a model without classes, the features
        return outputs

    def _answer(self, rows: list[dict[str, Any]], logits: torch.Tensor, choices: Sequence[Choice] | None) -> None:
        """Fills in what the model says about the images of these rows."""
        config = self.model.config
        scores = class_scores(logits, config)
        if self._values:
            for row, values in zip(rows, scores.tolist(), strict=True):
                row.update(zip(self._values, values, strict=True))
            return
        choices = choices or [(self.top_k, self.threshold)] * len(rows)
        for choice in set(choices):
            places = [place for place, other in enumerate(choices) if other == choice]
            mine = scores if len(places) == len(rows) else scores[places]
            for place, (indices, found) in zip(places, choose(mine, config, *choice), strict=True):
                labels = [config.id2label[index] for index in indices]
                best = {"label": labels[0], "score": found[0]} if labels else {}
                rows[place].update(best, labels=labels, scores=found)

    def _measure(self) -> int:
        pixels = prepare(self.processor, blank_image(self.processor))[None]
        with torch.inference_mode():
            _, features = self._forward(pixels)
        return features.shape[1]


class _WithFeatures(nn.Module):
    """A classifier that also returns what its head takes, (B, features)."""

    def __init__(self, model: nn.Module, head: nn.Module):
        super().__init__()
        self.model, self.head = model, head

    def forward(self, pixel_values: torch.Tensor) -> tuple[Any, torch.Tensor]:
        taken: list[torch.Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
        try:
            outputs = self.model(pixel_values=pixel_values)
        finally:
            handle.remove()
        return outputs, taken[0].flatten(1)


@contextmanager
def _enough_memory(count: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{count} images at once need too much memory: lower --batch_size") from error


def value_columns(config: Any) -> tuple[str, ...]:
    """Of a regression: what the columns of its targets are called, as the targets are.

    One that is called like another target or column, or not at all, has its number behind it.
    """
    names = [undecodable_escaped(str(config.id2label[index])) for index in range(config.num_labels)]
    return tuple(numbered(names, taken=(*LABEL_COLUMNS, *OTHER_COLUMNS, "")))


class Decoder(Dataset):
    """Runs in the workers of a DataLoader: names and sources to pixels.

    The loader's sampler hands out the sources themselves, not indices: they are read once, in order, by the main
    process, undecoded, and everything costly is done here. A batch is (items, anything): the latter is passed on.
    """

    def __init__(self, load: Callable[[list[Any]], Any]):
        self._load = load

    def __getitems__(self, batch: tuple[list[Any], Any]) -> tuple[Any, Any]:
        items, tag = batch
        return self._load(items), tag


def make_loader(
    load: Callable[[list[Any]], Any],
    batches: Iterator[tuple[list[Any], Any]],
    batch_size: int,
    total: int | None,
    num_workers: int | None,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader that yields `(load(items), tag)` for each `(items, tag)`, in order.

    Args:
        load: runs in the workers.
        num_workers: chosen by the number of images and cores if None.
    """
    return DataLoader(
        Decoder(load),
        batch_sampler=batches,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        **arguments_for(workers_for(batch_size, total, num_workers)),
    )


def workers_for(batch_size: int, total: int | None, wanted: int | None) -> int:
    """Processes that decode: as wanted, else by the number of images and cores."""
    if wanted is not None:
        return wanted
    mine = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0 if total is not None and total <= batch_size else min(16, max(1, mine - 1))


def _as_is(batch: Any) -> Any:
    return batch


_HEADS = ("classifier", "head", "fc")
_INDECISIVE = frozenset(["_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "auto_map"])


def _head(model: PreTrainedModel) -> torch.nn.Module | None:
    return next((head for name in _HEADS if isinstance(head := getattr(model, name, None), torch.nn.Module)), None)


def find_device(wanted: str | torch.device) -> torch.device:
    """The device meant; `auto` is the accelerator if there is one, of several processes' each its own."""
    if str(wanted) == "auto":
        best = torch.accelerator.current_accelerator(check_available=True)
        if best is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            return torch.device("cpu")
        number = int(os.environ.get("LOCAL_RANK", 0)) % max(torch.accelerator.device_count(), 1)
        return torch.device(best.type, number) if "LOCAL_RANK" in os.environ else best
    try:
        return torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"there is no device {str(wanted)!r}") from error
