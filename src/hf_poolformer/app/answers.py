"""What the app answers to an image: classes, labels or numbers and a picture, or what is where and a picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.decoding import BrokenImage, decode_image
from ..evaluation.dense_pictures import SHOWN_SCORE, colours, draw_map, draw_objects
from ..explanation.explainer import class_names, explain, for_drawing
from ..explanation.pictures import overlay
from ..foundation.errors import UserError
from ..foundation.figures import add_legend, new_figure
from ..foundation.finite import check_finite
from ..foundation.scores import MULTI_LABEL, REGRESSION, choose, class_scores
from ..prediction.inference import Predictor
from .models import DenseModel


TOP_K = 5
# Classes below this share of a segmentation are not listed.
SMALL_SHARE = 0.001


@dataclass
class Answer:
    """
    Attributes:
        scores: class -> probability, of a classifier: the best `TOP_K`; of several labels those that reach their
            threshold, best first.
        columns, rows: a table of what was found, of the other models; of a regression, of its numbers.
        choices: classes whose places can be shown; the picture has those of the first, unless asked otherwise.
        picture: the heat map of the first class, or what was found, over the image.
        note: a sentence about the picture.
    """

    picture: Image.Image | None
    note: str
    scores: dict[str, float] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    rows: list[list[str]] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)


def open_image(path: str | Path, max_pixels: int) -> Image.Image:
    """The image, RGB and upright.

    Raises:
        UserError: with the reason why it cannot be read, for the visitor.
    """
    try:
        return decode_image(path, max_pixels=max_pixels)
    except BrokenImage as error:
        raise UserError(f"This file cannot be used: {error}.") from None


def answer(model: Predictor | DenseModel, image: Image.Image, shown_class: str | None = None) -> Answer:
    """What `model` says about an image.

    Args:
        shown_class: of a classifier, the class whose places are shown; None for the best.
    """
    if isinstance(model, Predictor):
        return classify(model, image, shown_class)
    return find_classes(model, image) if model.task.gives == "map" else find_objects(model, image)


def classify(predictor: Predictor, image: Image.Image, shown_class: str | None) -> Answer:
    config = predictor.model.config
    try:
        found = explain(predictor, image, None if shown_class is None else [shown_class])
    except UserError as error:
        if shown_class is not None:
            raise
        # Of another family: it classifies, and has no map.
        said = what_is_said(config, plain_scores(predictor, image))
        return Answer(picture=None, note=f"{no_label(config, said)}No heat map: {error}.", **said)
    said = what_is_said(config, found.scores)
    (shown,) = found.classes
    numbers = config.problem_type == REGRESSION
    note = f"{no_label(config, said)}Grad-CAM for “{shown.label}”, stage {found.stage + 1} of {len(config.depths)}"
    note += ": what makes this number larger." if numbers else "."
    if np.isnan(shown.heat).any():
        note += " What is dark lies outside of the centre crop that the model sees."
    if shown.peak is None:
        note += f" Nothing in the image {'makes it larger' if numbers else 'speaks for this class'}."
    return Answer(picture=overlay(found.image, shown.heat), note=note, **said)


def what_is_said(config: Any, scores: dict[str, float]) -> dict[str, Any]:
    """Of the scores of all classes, in the model's order, what is shown."""
    if config.problem_type == REGRESSION:
        rows = [[name, f"{value:.4g}"] for name, value in scores.items()]
        return {"columns": ("target", "value"), "rows": rows, "choices": list(scores)}
    best = dict(sorted(scores.items(), key=lambda item: -item[1])[:TOP_K])
    if config.problem_type != MULTI_LABEL:
        return {"scores": best, "choices": list(best)}
    (indices, found), *_ = choose(torch.tensor([list(scores.values())]), config)
    names = list(scores)
    reached = {names[index]: score for index, score in zip(indices, found, strict=True)}
    return {"scores": reached, "choices": list({**reached, **best})}


def no_label(config: Any, said: dict[str, Any]) -> str:
    """A sentence for an image that has none of several labels."""
    if config.problem_type != MULTI_LABEL or said["scores"]:
        return ""
    return "No label reaches its threshold. "


@torch.inference_mode()
def plain_scores(predictor: Predictor, image: Image.Image) -> dict[str, float]:
    """Of every class, in the model's order."""
    batch = predictor.preprocessing.load([("image", image)])
    if batch["errors"][0] is not None:
        raise UserError(batch["errors"][0])
    ((_, pixel_values),) = predictor.preprocessing.finish(batch)
    logits = predictor.model(pixel_values=pixel_values.to(predictor.device, predictor.model.dtype)).logits.float()
    check_finite(logits, predictor.name)
    config = predictor.model.config
    return dict(zip(class_names(config), class_scores(logits, config)[0].tolist(), strict=True))


@torch.inference_mode()
def forward(dense: DenseModel, image: Image.Image) -> Any:
    inputs = dense.processor(image, return_tensors="pt").to(dense.device)
    outputs = dense.model(**inputs)
    check_finite(outputs.logits, "the model")
    return outputs


def find_classes(dense: DenseModel, image: Image.Image) -> Answer:
    drawn = for_drawing(image)
    outputs = forward(dense, image)
    (found,) = dense.processor.post_process_semantic_segmentation(outputs, [(drawn.height, drawn.width)])
    classes = found.cpu().numpy()
    names = dense.model.config.id2label
    indices, counts = np.unique(classes, return_counts=True)
    shares = sorted(zip(counts / classes.size, indices.tolist(), strict=True), reverse=True)
    palette = colours(len(names))
    figure, axes = canvas(drawn)
    used = draw_map(axes, np.asarray(drawn), classes, palette)
    add_legend(figure, [(palette[index], names[index]) for index in sorted(used)], columns=5)
    return Answer(
        picture=render(figure),
        note="The class of each pixel.",
        columns=("class", "share of the image"),
        rows=[[names[index], f"{share:.1%}"] for share, index in shares if share >= SMALL_SHARE],
    )


def find_objects(dense: DenseModel, image: Image.Image) -> Answer:
    drawn = for_drawing(image)
    size = [(drawn.height, drawn.width)]
    outputs = forward(dense, image)
    (found,) = dense.processor.post_process_object_detection(outputs, SHOWN_SCORE, size)
    boxes, labels, scores = (found[name].float().cpu().numpy() for name in ("boxes", "labels", "scores"))
    labels = labels.astype(int)
    masks = None
    if dense.task.reads == "masks":
        (segments,) = dense.processor.post_process_instance_segmentation(
            outputs, SHOWN_SCORE, target_sizes=size, return_binary_maps=True
        )
        masks = segments["segmentation"].cpu().numpy()
    names = dense.model.config.id2label
    palette = colours(len(names))
    figure, axes = canvas(drawn)
    used = draw_objects(axes, np.asarray(drawn), boxes, labels, masks, scores, palette)
    add_legend(figure, [(palette[index], names[index]) for index in sorted(used)], columns=5)
    places = np.rint(boxes * (np.array(image.size * 2) / (drawn.size * 2))).astype(int)
    return Answer(
        picture=render(figure),
        note=f"{len(labels)} found with a score of at least {SHOWN_SCORE:.0%}."
        if len(labels)
        else f"Nothing found with a score of at least {SHOWN_SCORE:.0%}.",
        columns=("class", "score", "left, top, right, bottom"),
        rows=[
            [names[label], f"{score:.1%}", ", ".join(map(str, place))]
            for label, score, place in zip(labels.tolist(), scores.tolist(), places.tolist(), strict=True)
        ],
    )


def canvas(image: Image.Image) -> tuple[Any, Any]:
    """A figure with one picture in it, of the image's shape, large enough that writing on it can be read."""
    factor = 4.5 / max(image.size)
    figure, axes = new_figure((max(image.width * factor, 2.5), max(image.height * factor, 1.5)))
    axes.axis("off")
    return figure, axes


def render(figure: Any) -> Image.Image:
    """The figure as it would be saved, without the margins."""
    from io import BytesIO

    file = BytesIO()
    figure.savefig(file, format="png", dpi=220, bbox_inches="tight", pad_inches=0.05)
    with Image.open(file) as picture:
        return picture.convert("RGB")
