"""Flags of `train` that suit a dataset, each with its reason in figures of that dataset.

A rule looks at the traits of a dataset and says something, or nothing. Rules say only what changes something: what a
recipe does anyway is not repeated.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.contents import looks_divided
from ..data.loader import MIN_SEEN, skip_limit, too_many_broken
from ..evaluation.intervals import wilson
from ..foundation.names import first_few, printable
from ..foundation.tasks import CLASSIFICATION, FEATURE_DISTILLATION, MULTI_LABEL, REGRESSION
from ..settings.classification import RECIPES
from ..settings.data import ReadingSettings, SplitSettings
from ..settings.training import settings_of


# A size that the strides of all stages divide.
_STEP = 32
# What stands for a teacher where none was named.
_TEACHER = "timm/convnext_tiny.in12k_ft_in1k"


@dataclass(frozen=True)
class Traits:
    """What of a dataset decides how to train on it.

    Attributes:
        task: the name of what can be learned of its labels; None if there is nothing.
        images: training images that can be read, those included that are to be held out for validation.
        why_none: why nothing can be learned, in words.
        complete: all images were looked at, and not a sample.
        train_split, validation_split: names as stored; None where there is no such split.
        validation_images: those of that split that can be read.
        counts: training images of each class.
        labels_per_image: mean, of several labels.
        far: of each target, how many standard deviations the farthest value is from the mean.
        side: median of the shorter side of all images, in pixels.
        model_side: that of the square which the checkpoint takes.
        readable, grey: images of all splits that can be read, and how many of them are grey, however they are stored.
        grey_as_rgb: how many of these are stored with three channels.
        broken: split -> images that cannot be read or have no label, images, and how many of the first ones.
        leaks: images of validation or test that are in the training split, too, or nearly so.
        near: training images that have a near-duplicate there.
        contradictions: groups of the same picture with different labels.
        outliers: images that look like another class, to a model; None without one.
        recipe, model: as the user named them.
        data_flags: what says to `train` where the data is.
    """

    task: str | None
    images: int
    why_none: str = ""
    complete: bool = True
    train_split: str | None = "train"
    validation_split: str | None = None
    validation_images: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    labels_per_image: float = 1.0
    far: Mapping[str, float] = field(default_factory=dict)
    side: int = 224
    model_side: int = 224
    readable: int = 0
    grey: int = 0
    grey_as_rgb: int = 0
    broken: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    leaks: int = 0
    near: int = 0
    contradictions: int = 0
    outliers: int | None = None
    recipe: str | None = None
    model: str | None = None
    data_flags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suggestion:
    """Something to do about a dataset.

    Attributes:
        reason: in figures of this dataset.
        flags: of `train`, by name; none where it is something else that helps.
    """

    reason: str
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        return shlex.join(as_words(self.flags))


def suggest(traits: Traits) -> list[Suggestion]:
    """What to do about a dataset, first what decides most. Flags of one suggestion are in no other."""
    found: list[Suggestion] = []
    chosen: dict[str, Any] = {}
    for rule in RULES:
        suggestion = rule(traits, chosen)
        if suggestion is not None:
            found.append(suggestion)
            chosen |= suggestion.flags
    return found


def training_words(traits: Traits, suggestions: Sequence[Suggestion], output: str) -> list[str]:
    """The words behind `train` of a command line that does all that is suggested.

    Args:
        output: folder for the run.
    """
    flags: dict[str, Any] = dict(traits.data_flags)
    for suggestion in suggestions:
        flags |= suggestion.flags
    return as_words({**flags, "output_dir": output})


def as_words(flags: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in flags.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        # What begins with a dash would be taken for a flag.
        words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return words


def learns_classes(traits: Traits) -> bool:
    return traits.task in (CLASSIFICATION, MULTI_LABEL)


def by_task(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    if traits.task is None:
        what = f"Nothing can be learned from labels: {traits.why_none}" if traits.why_none else "There are no labels"
        return Suggestion(
            f"{what.rstrip('.')}. Without labels an encoder can learn what a teacher sees in these images.",
            {"task": FEATURE_DISTILLATION, "teacher": traits.model or _TEACHER},
        )
    if traits.task == MULTI_LABEL:
        return Suggestion(
            f"An image has {traits.labels_per_image:.3g} labels on average: each of the {len(traits.counts)} classes "
            "is there or not, whatever the others are.",
            {"task": MULTI_LABEL},
        )
    if traits.task == REGRESSION:
        names = first_few([printable(name, 40) for name in traits.far], 3)
        return Suggestion(f"The labels are numbers ({names}), not classes.", {"task": REGRESSION})
    return None


def by_divided_names(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    divided = looks_divided(list(traits.counts)) if traits.task == CLASSIFICATION else None
    if divided is None:
        return None
    separator, parts = divided
    return Suggestion(
        f"The names of the {len(traits.counts)} classes are made of {parts}, with {separator!r} between them. If an "
        f"image can have several of these, inspect it with --task {MULTI_LABEL}: as it is, every combination is "
        "learned as a class of its own."
    )


def by_recipe(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    start = {"model_name_or_path": traits.model} if traits.model and traits.task else {}
    if traits.recipe:
        return Suggestion("As you asked.", {"recipe": traits.recipe, **start})
    if traits.side <= 40 and traits.images >= 1000 and not start:
        return Suggestion(
            f"{traits.images} images of about {traits.side} pixels: a small model learns them from scratch in "
            "minutes. This recipe moves and turns images a little and never mirrors them, as suits letters and "
            "digits; --horizontal_flip 0.5 where a mirror image means the same.",
            {"recipe": "demo"},
        )
    flags = {"recipe": "finetune", **start}
    mirrored = (
        "The recipe mirrors, crops and recolours images at random; --horizontal_flip 0 where a mirror image "
        "means something else, as with letters"
    )
    if traits.images >= 1000:
        return Suggestion(f"{traits.images} training images are enough to adapt a trained model. {mirrored}.", flags)
    rounds = -(-9600 // max(traits.images, 1) // 5) * 5
    epochs = min(max(rounds, 10), 50)
    more = "" if epochs <= 10 else f" {epochs} passes instead of 10 give them enough steps."
    flags |= {} if epochs <= 10 else {"num_train_epochs": epochs}
    return Suggestion(
        f"{traits.images} training images are few: a model that was trained on other images needs no more. "
        f"{mirrored}.{more}",
        flags,
    )


def by_head(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    classes = sum(count > 0 for count in traits.counts.values())
    if not learns_classes(traits) or chosen.get("recipe") != "finetune" or not classes:
        return None
    each = sum(traits.counts.values()) / classes
    if each >= 10:
        return None
    return Suggestion(
        f"{each:.3g} images per class on average: all weights of a model would learn them by heart, so only its head "
        "is trained, at a higher learning rate.",
        {"freeze_backbone": True, "learning_rate": 5e-3},
    )


def by_batch(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    settings = settings_of(traits.task or FEATURE_DISTILLATION)
    usual = settings.__dataclass_fields__["per_device_train_batch_size"].default
    recipes = settings.recipes(traits.task or FEATURE_DISTILLATION)
    usual = recipes.get(chosen.get("recipe"), {}).get("per_device_train_batch_size", usual)
    # What is left behind the last whole batch of an epoch is not trained on.
    if traits.images >= 4 * usual:
        return None
    size = max(2 ** int(math.log2(max(traits.images / 4, 1))), 1)
    return Suggestion(
        f"An epoch of {traits.images} images has few batches of {usual}, and those that do not fill one are left out.",
        {"per_device_train_batch_size": size},
    )


def by_size(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    size = _STEP * math.ceil(traits.side / _STEP)
    if chosen.get("recipe") == "demo":
        usual = RECIPES["demo"]["image_size"]
        reason = f"Half of the images have more than {usual} pixels on their shorter side."
        return Suggestion(reason, {"image_size": size}) if size > usual else None
    usual, size = traits.model_side, max(size, 2 * _STEP)
    if chosen.get("recipe") != "finetune" or size > 0.75 * usual:
        return None
    return Suggestion(
        f"Half of the images have no more than {traits.side} pixels on their shorter side. At {usual} pixels they "
        f"would be blown up, and each step would take about {(usual / size) ** 2:.0f} times as long.",
        {"image_size": size},
    )


def by_channels(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    if not traits.readable or not traits.grey:
        return None
    if traits.grey < traits.readable:
        share = traits.grey / traits.readable
        if 0.02 <= share <= 0.98:
            return Suggestion(
                f"{traits.grey} of {traits.readable} images are grey, the others are in colour. If the grey ones come "
                "from another source than the others, a model may tell the sources apart and not the classes."
            )
        return None
    stored = f", though {traits.grey_as_rgb} are stored with three channels" if traits.grey_as_rgb else ""
    if traits.task is None:
        return Suggestion(f"All {traits.grey} images are grey{stored}. Teachers take RGB, so they are read as such.")
    return Suggestion(
        f"All {traits.grey} images are grey{stored}: one channel has all there is, and is read and trained faster.",
        {"num_channels": 1},
    )


def by_balance(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    counts = {name: count for name, count in traits.counts.items() if count}
    if traits.task != CLASSIFICATION or len(counts) < 2:
        return None
    rare, common = min(counts, key=counts.get), max(counts, key=counts.get)
    ratio = counts[common] / counts[rare]
    if ratio < 3:
        return None
    scored: dict[str, Any] = {"metric_for_best_model": "f1_macro", "load_best_model_at_end": True}
    how = f"{printable(common, 60)!r} has {counts[common]} training images and {printable(rare, 60)!r} {counts[rare]}"
    seldom = [name for name, count in counts.items() if count < counts[common] / 10]
    if ratio < 10:
        return Suggestion(
            f"{how}, a ratio of {ratio:.1f}: an image of a rare class counts more in the loss, and the best model is "
            "chosen by a figure in which all classes count alike.",
            {"class_weights": "auto", **scored},
        )
    flags: dict[str, Any] = {"sampling": "balanced"}
    half = ""
    if ratio > 100:
        flags["sampling_power"] = 0.5
        half = f" Half of the way only: the rarest would come {ratio:.0f} times as often as the commonest otherwise."
    few = f"; {len(seldom)} of {len(counts)} classes have less than a tenth of it" if len(seldom) > 1 else ""
    return Suggestion(
        f"{how}, a ratio of {ratio:.0f}{few}: images of rare classes come more often, augmented anew each time, and "
        f"the best model is chosen by a figure in which all classes count alike.{half}",
        {**flags, **scored},
    )


def by_rare_labels(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    if traits.task != MULTI_LABEL or not traits.images:
        return None
    shares = sorted(count / traits.images for count in traits.counts.values() if count)
    if not shares or (shares[0] >= 0.1 and shares[len(shares) // 2] >= 0.25):
        return None
    return Suggestion(
        f"The rarest class is on {shares[0]:.1%} of the training images, half of the classes are on at most "
        f"{shares[len(shares) // 2]:.1%}. To say no to these is nearly always right, so it has to cost more to miss a "
        "class than to find it where it is not.",
        {"pos_weight": "auto"},
    )


def by_far_numbers(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    if traits.task != REGRESSION or not traits.far:
        return None
    name = max(traits.far, key=traits.far.get)
    if traits.far[name] < 6:
        return None
    return Suggestion(
        f"A value of {printable(name, 60)!r} is {traits.far[name]:.0f} standard deviations from the mean: its square "
        "would outweigh many others.",
        {"loss": "huber"},
    )


def by_splits(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    names: dict[str, Any] = {}
    if traits.train_split not in (None, SplitSettings.__dataclass_fields__["train_split"].default):
        names["train_split"] = traits.train_split
    if traits.validation_split is None:
        if traits.images < 8:
            return Suggestion(
                f"{traits.images} images are too few to hold some out: nothing is measured.",
                {**names, "train_val_split": 0},
            )
        part = 0.25 if traits.images < 500 else 0.15 if traits.images < 50_000 else 0.05
        near = (
            f" Near-duplicates, which {traits.near} images have, may be divided between the two parts: see above."
            if traits.near
            else ""
        )
        return Suggestion(
            f"There is no validation split: {part:.0%} of the images, about {round(part * traits.images)}, are held "
            f"out by what is in them, the same ones each time.{near}",
            {**names, "train_val_split": part},
        )
    if traits.validation_split not in ("validation", "test"):
        names["validation_split"] = traits.validation_split
    said = []
    if not traits.validation_images:
        said.append(f"No image of {printable(traits.validation_split, 60)} can be used: mend it, or remove it.")
    elif traits.validation_split == "test":
        said.append(
            "There is no validation split, so a run measures on test, and a choice made by that flatters it. Divide "
            "the training images if you choose by the figures."
        )
    if traits.task == CLASSIFICATION and 0 < traits.validation_images < 300:
        low, high = wilson(0.9 * traits.validation_images, traits.validation_images)
        said.append(
            f"{traits.validation_images} validation images tell little: of an accuracy of 90 % they say that it is "
            f"between {low:.0%} and {high:.0%}."
        )
    if names and not said:
        said.append("These are the names of the splits.")
    return Suggestion(" ".join(said), names) if said else None


def by_broken(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    usual = skip_limit(ReadingSettings.__dataclass_fields__["max_skipped"].default)
    known = [figures for figures in traits.broken.values() if figures[0]]
    total = sum(broken for broken, _, _ in known)
    if not total:
        return None
    where = ", ".join(f"{broken} of {seen} in {name}" for name, (broken, seen, _) in traits.broken.items() if broken)
    told = f"Images that cannot be read, or have no label: {where}. "
    if not any(
        too_many_broken(broken, seen, usual) or (seen >= MIN_SEEN and too_many_broken(first, MIN_SEEN, usual))
        for broken, seen, first in known
    ):
        return Suggestion(f"{told}So few are left out without a flag.")
    # An image may come several times in an epoch; and of a sample the number says nothing.
    if chosen.get("sampling") == "balanced" or not traits.complete:
        share = max(broken / seen for broken, seen, _ in known)
        share = max(share, max(first / MIN_SEEN for _, _, first in known))
        limit: float = min(math.ceil(100 * (share + 3 * math.sqrt(share * (1 - share) / MIN_SEEN))), 99) / 100
    else:
        limit = max(broken for broken, _, _ in known)
    return Suggestion(
        f"{told}A run ends at more than {usual:.0%} unless it is told to leave them out. Better mend or remove them.",
        {"max_skipped": limit},
    )


def by_leaks(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    if not traits.leaks:
        return None
    return Suggestion(
        f"{traits.leaks} images of one split are in another, too, or nearly so: what is measured on them is memory. "
        "Remove them from one of the two before you train; the report lists both paths."
    )


def by_contradictions(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    if not traits.contradictions:
        return None
    return Suggestion(
        f"Pictures that are there several times, or nearly so, with different labels: {traits.contradictions}. Mend "
        "those that are wrong before you train; the report shows them side by side."
    )


def by_outliers(traits: Traits, chosen: Mapping[str, Any]) -> Suggestion | None:
    if not traits.outliers:
        return None
    return Suggestion(
        f"{traits.outliers} images look more like another class than like their own. Look at them: they may be "
        "labelled wrongly."
    )


Rule = Callable[[Traits, Mapping[str, Any]], Suggestion | None]
RULES: tuple[Rule, ...] = (
    by_leaks,
    by_contradictions,
    by_outliers,
    by_task,
    by_divided_names,
    by_recipe,
    by_head,
    by_size,
    by_channels,
    by_balance,
    by_rare_labels,
    by_far_numbers,
    by_splits,
    by_batch,
    by_broken,
)
