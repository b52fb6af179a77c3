"""From a picture to the classes a model sees in it and the places that speak for them."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import PretrainedConfig

from ..data.transforms import prepare
from ..foundation.errors import UserError
from ..foundation.finite import check_finite
from ..foundation.names import numbered
from ..foundation.scores import REGRESSION, choose, class_scores
from ..prediction.inference import Predictor
from .geometry import lay_on_image, visible_region
from .gradcam import gradcam


# Limits of the longer side of what is drawn, in pixels: maps have no finer detail than the one, and look coarse below
# the other.
DRAWN_SIDE = 1024
LEAST_DRAWN_SIDE = 448


@dataclass(frozen=True)
class ClassEvidence:
    """One class of an image.

    Attributes:
        score: probability; of a multi-label model the class's own, of a regression the value itself.
        score_text: the same for a person, in per cent or as a number.
        heat: (height, width) of `Explanation.image`, float32 in 0..1, NaN outside what the model saw.
    """

    index: int
    label: str
    score: float
    score_text: str
    logit: float
    heat: np.ndarray

    @property
    def peak(self) -> tuple[float, float] | None:
        """Where the heat is largest, (x, y) as shares of width and height; None if nothing speaks for the class."""
        if not np.nanmax(self.heat) > 0:
            return None
        row, column = np.unravel_index(np.nanargmax(self.heat), self.heat.shape)
        return (column.item() + 0.5) / self.heat.shape[1], (row.item() + 0.5) / self.heat.shape[0]


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns.

    Attributes:
        image: RGB, upright, in a size that is fit for drawing; see `for_drawing`.
        size: (width, height) of the image before that.
        seen: (left, top, right, bottom) of what the model saw, in pixels of the image before that.
        scores: of every class by its name, in the model's order; see `class_names`.
        classes: those that were asked for, in that order.
        stage: whose output was looked at, counted from 0.
    """

    image: Image.Image
    size: tuple[int, int]
    seen: tuple[float, float, float, float]
    scores: dict[str, float]
    classes: list[ClassEvidence]
    stage: int


def explain(
    predictor: Predictor,
    image: Image.Image | torch.Tensor,
    classes: Sequence[str | int] | None = None,
    *,
    top_k: int = 1,
    method: str = "gradcam",
    stage: int | None = None,
) -> Explanation:
    """Classifies an image and finds which of its places speak for some of the classes.

    Of a regression, the places that make a number larger: the class's logit, whose gradient is taken, is the number.

    Args:
        predictor: has the model and its image processor.
        image: upright and in the channels of the model, as `data.decoding.decode_image` gives it.
        classes: names or numbers of classes, see `find_class`. If None the best `top_k`; of several labels first those
            that the image has; of a regression, whose numbers have no best, the first.
        top_k: how many, if `classes` is None.
        method, stage: of `gradcam`.

    Raises:
        UserError: the model has no such class, `gradcam` or the processor's geometry refuses, or its
            scores are not finite.
    """
    config = predictor.model.config
    wanted = None if classes is None else [find_class(config, name) for name in classes]
    names = class_names(config)
    pixel_values = prepare(predictor.processor, image)[None]
    image = image if isinstance(image, Image.Image) else picture_of(image)
    region = visible_region(predictor.processor, image.height, image.width)
    if wanted is None:
        with torch.inference_mode():
            logits = predictor.model(pixel_values.to(predictor.device, predictor.model.dtype)).logits
        check_finite(logits, predictor.name)
        given = class_scores(logits.float(), config)
        ((answer, _),), ((ranked, _),) = choose(given, config), choose(given, config, config.num_labels)
        wanted = list(dict.fromkeys([*answer, *ranked]))[:top_k]
    found = gradcam(predictor.model, pixel_values, wanted, method=method, stage=stage)
    check_finite(found.logits, predictor.name)
    scores = class_scores(found.logits, config)[0].tolist()
    drawn = for_drawing(image)
    place = region.scaled(drawn.width / image.width, drawn.height / image.height)
    maps = found.maps[0].cpu().numpy()
    return Explanation(
        image=drawn,
        size=image.size,
        seen=(region.left, region.top, region.right, region.bottom),
        scores=dict(zip(names, scores, strict=True)),
        classes=[
            ClassEvidence(
                index=index,
                label=names[index],
                score=scores[index],
                score_text=f"{scores[index]:.4g}" if config.problem_type == REGRESSION else f"{scores[index]:.1%}",
                logit=found.logits[0, index].item(),
                heat=lay_on_image(values, place, drawn.height, drawn.width),
            )
            for index, values in zip(wanted, maps, strict=True)
        ],
        stage=found.stage,
    )


def picture_of(planes: torch.Tensor) -> Image.Image:
    """(C, H, W) between 0 and 255 for the eye: the first three channels as RGB, or the first as grey.

    What is no 8 bits, satellites' reflectances say, may use little of that range, and is spread over all of it.
    """
    shown = planes[: 3 if len(planes) > 2 else 1].expand(3, -1, -1).float()
    if planes.dtype != torch.uint8:
        low, high = shown.amin(), shown.amax()
        shown = (shown - low) * (255 / (high - low).clamp(min=1e-6))
    return Image.fromarray(shown.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def for_drawing(image: Image.Image) -> Image.Image:
    """The image with at most `DRAWN_SIDE` pixels on its longer side; small ones grow, each pixel to a square."""
    longer = max(image.size)
    if longer > DRAWN_SIDE:
        width, height = (max(round(side * DRAWN_SIDE / longer), 1) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    times = math.ceil(LEAST_DRAWN_SIDE / longer)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def class_names(config: PretrainedConfig) -> list[str]:
    """The labels in order; of those that occur twice each with its number behind it: `crane (134)`, `crane (517)`."""
    return numbered([str(config.id2label[index]) for index in range(config.num_labels)])


def find_class(config: PretrainedConfig, name: str | int) -> int:
    """The number of a class, by its name, one of the synonyms in it (`tabby, tabby cat`), or its number.

    A number, 4, is always a number; a text, "4", is the class of that name if there is one, and else a number.

    Raises:
        UserError: there is no such class, or several.
    """
    labels = class_names(config)
    if hasattr(name, "__index__") and not isinstance(name, (bool, np.bool_)):
        index = operator.index(name)
        if not 0 <= index < len(labels):
            raise UserError(f"the model has no class {index}; it has {len(labels)}, numbered from 0")
        return index
    text = str(name).strip()
    if name in labels:
        return labels.index(name)
    labels = dict(enumerate(config.id2label[index] for index in range(len(labels))))
    plain = text.casefold()
    found = [index for index, label in labels.items() if label.casefold() == plain]
    found = found or [
        index for index, label in labels.items() if plain in (part.strip().casefold() for part in label.split(","))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"{index} ({labels[index]})" for index in found[:5])
        raise UserError(f"several classes are called {text!r}: {names}; give the number")
    if text.isdecimal() and int(text) in labels:
        return int(text)
    near = difflib.get_close_matches(text, labels.values(), n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"it has {len(labels)}: {shown(list(labels.values()))}"
    raise UserError(f"the model has no class {text!r}; {hint}")


def shown(labels: Sequence[str], most: int = 10) -> str:
    return ", ".join(labels[:most]) + (", ..." if len(labels) > most else "")
