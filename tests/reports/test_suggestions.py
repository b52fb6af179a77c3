"""What is suggested for a dataset, and that training takes it."""

import pytest

from hf_poolformer.foundation.tasks import CLASSIFICATION, FEATURE_DISTILLATION, MULTI_LABEL, REGRESSION
from hf_poolformer.reports.suggestions import Traits, suggest, training_words
from hf_poolformer.settings.command_line import parse


PLAIN = {
    "task": CLASSIFICATION,
    "images": 2000,
    "validation_split": "validation",
    "validation_images": 1000,
    "counts": {"cat": 1000, "dog": 1000},
    "side": 300,
    "readable": 3000,
    "data_flags": {"dataset_name": "photos"},
}
BALANCED = {"metric_for_best_model": "f1_macro", "load_best_model_at_end": True}


def flags_of(**changes):
    """All flags that are suggested; of these settings training makes sense."""
    traits = Traits(**{**PLAIN, **changes})
    found = suggest(traits)
    settings = parse(training_words(traits, found, "outputs/run"))
    flags = {name: value for one in found for name, value in one.flags.items()}
    assert all(getattr(settings, name) == value for name, value in {**traits.data_flags, **flags}.items())
    assert sum(len(one.flags) for one in found) == len(flags), "a flag twice"
    assert all(one.reason.endswith(".") for one in found)
    return flags


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"recipe": "finetune"}),
        ({"model": "outputs/before"}, {"recipe": "finetune", "model_name_or_path": "outputs/before"}),
        ({"recipe": "paper"}, {"recipe": "paper"}),
        ({"side": 28, "counts": {}}, {"recipe": "demo"}),
        ({"side": 40}, {"recipe": "demo", "image_size": 64}),
        ({"side": 90}, {"recipe": "finetune", "image_size": 96}),
        ({"side": 28, "model": "m", "model_side": 64}, {"recipe": "finetune", "model_name_or_path": "m"}),
        ({"grey": 3000, "grey_as_rgb": 3000}, {"recipe": "finetune", "num_channels": 1}),
        ({"grey": 1000}, {"recipe": "finetune"}),
        ({"counts": {"cat": 1500, "dog": 500}}, {"recipe": "finetune", "class_weights": "auto", **BALANCED}),
        ({"counts": {"cat": 1900, "dog": 100}}, {"recipe": "finetune", "sampling": "balanced", **BALANCED}),
        (
            {"counts": {"cat": 1996, "dog": 4}},
            {"recipe": "finetune", "sampling": "balanced", "sampling_power": 0.5, **BALANCED},
        ),
        ({"images": 300}, {"recipe": "finetune", "num_train_epochs": 35}),
        (
            {"images": 12, "counts": {"cat": 6, "dog": 6}},
            {
                "recipe": "finetune",
                "num_train_epochs": 50,
                "freeze_backbone": True,
                "learning_rate": 5e-3,
                "per_device_train_batch_size": 2,
            },
        ),
        ({"validation_split": None, "images": 400}, {"train_val_split": 0.25}),
        ({"validation_split": None}, {"train_val_split": 0.15}),
        ({"validation_split": None, "images": 5}, {"train_val_split": 0}),
        ({"train_split": "a", "validation_split": "b"}, {"train_split": "a", "validation_split": "b"}),
        ({"task": MULTI_LABEL, "counts": {"sun": 50, "sea": 900}}, {"task": MULTI_LABEL, "pos_weight": "auto"}),
        ({"task": MULTI_LABEL, "counts": {"sun": 1000, "sea": 900}}, {"task": MULTI_LABEL}),
        ({"task": REGRESSION, "counts": {}, "far": {"age": 2.0}}, {"task": REGRESSION}),
        ({"task": REGRESSION, "counts": {}, "far": {"age": 20.0}}, {"task": REGRESSION, "loss": "huber"}),
        ({"task": None, "counts": {}, "grey": 3000}, {"task": FEATURE_DISTILLATION}),
        ({"broken": {"train": (1, 2000, 0)}}, {"recipe": "finetune"}),
        ({"broken": {"train": (90, 2000, 0)}}, {"max_skipped": 90}),
        ({"broken": {"train": (9, 2000, 9)}}, {"max_skipped": 9}),
        ({"broken": {"train": (90, 2000, 3)}, "complete": False}, {"max_skipped": 0.13}),
        ({"data_flags": {"dataset_name": "-x", "label_column_name": "a b"}}, {"recipe": "finetune"}),
    ],
)
def test_flags(changes, expected):
    found = flags_of(**changes)
    assert expected.items() <= found.items()
    if expected.get("recipe") == "finetune":
        assert found == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"leaks": 7}, "7 images of one split are in another"),
        ({"contradictions": 3}, "with different labels: 3. Mend those"),
        ({"outliers": 5}, "5 images look more like another class"),
        ({"grey": 1000}, "1000 of 3000 images are grey"),
        ({"counts": {"cat": 1500, "dog": 500}}, "'cat' has 1500 training images and 'dog' 500, a ratio of 3.0"),
        ({"validation_split": "test"}, "a run measures on test"),
        ({"validation_images": 50}, "between 79% and 96%"),
        ({"validation_images": 0}, "No image of validation"),
        ({"validation_split": None, "near": 8}, "which 8 images have"),
        ({"task": None, "why_none": "photos has a single class"}, "a single class"),
        ({"broken": {"train": (90, 2000, 0)}}, "90 of 2000 in train"),
        ({"counts": {name: 9 for name in ("a", "b", "a;b", "b;c", "a;c")}}, "5 classes are made of 3, with ';'"),
    ],
)
def test_reasons_have_figures_of_the_data(changes, words):
    assert any(words in one.reason for one in suggest(Traits(**{**PLAIN, **changes})))
