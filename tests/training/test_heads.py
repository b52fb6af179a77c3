"""Which head a run starts with, and the settings that only one kind of label has."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.tasks import CLASSIFICATION, MULTI_LABEL, REGRESSION, TASKS
from hf_poolformer.settings.classification import RECIPES
from hf_poolformer.settings.command_line import parse
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training.initialisation import initial_model


NAMES = ["cat", "dog", "owl"]
REQUIRED = ["--train_dir", "images", "--output_dir", "run"]
TASKS_OF_IMAGES = (CLASSIFICATION, MULTI_LABEL, REGRESSION)


def settings_of(task, checkpoint, **changes):
    return TrainingSettings.from_recipe(
        task=task, model_name_or_path=str(checkpoint), train_dir="images", output_dir="run", **changes
    )


@pytest.mark.parametrize("task", TASKS_OF_IMAGES)
@pytest.mark.parametrize("before", TASKS_OF_IMAGES)
def test_a_head_is_kept_for_the_same_task_and_labels(make_checkpoint, caplog, task, before):
    fields = {"label_thresholds": [0.1, 0.2, 0.3]} if before == MULTI_LABEL else {}
    checkpoint = make_checkpoint(labels=NAMES, problem_type=TASKS[before].problem_type, **fields)
    model, _, trained = initial_model(settings_of(task, checkpoint), NAMES)
    assert model.config.problem_type == TASKS[task].problem_type
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label_thresholds is None  # of the model that it was
    same = torch.equal(model.classifier.weight, load_file(f"{checkpoint}/model.safetensors")["classifier.weight"])
    assert trained == same == (task == before)
    assert (f"New head: the checkpoint is for {before}, this run for {task}." in caplog.text) == (task != before)


@pytest.mark.parametrize("task", TASKS_OF_IMAGES)
def test_other_labels_get_another_head(make_checkpoint, caplog, task):
    checkpoint = make_checkpoint(labels=NAMES, problem_type=TASKS[task].problem_type)
    for names in (["cat", "dog", "cow"], ["cat", "dog"]):
        model, _, trained = initial_model(settings_of(task, checkpoint), names)
        assert not trained and model.config.num_labels == len(names)
        assert "New head: the checkpoint knows 3 labels (cat, dog, owl)" in caplog.text
        caplog.clear()


def test_a_checkpoint_that_says_nothing_has_one_label_per_image(make_checkpoint, caplog):
    checkpoint = make_checkpoint(labels=NAMES, problem_type=None)
    assert initial_model(settings_of(CLASSIFICATION, checkpoint), NAMES)[2] and "New head" not in caplog.text
    assert not initial_model(settings_of(REGRESSION, checkpoint), NAMES)[2] and "New head" in caplog.text


@pytest.fixture
def make_vit(make_checkpoint):
    """Saves a very small ViT with these fields in its configuration, and returns its folder."""

    def make(**fields) -> str:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = ViTConfig(image_size=32, patch_size=16, id2label=dict(enumerate(NAMES)), **sizes, **fields)
        folder = make_checkpoint("vit")  # for its image processor
        ViTForImageClassification(config).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("foreign", [False, True])
def test_a_single_number_from_a_checkpoint_of_classes(make_checkpoint, make_vit, foreign):
    """transformers refuses one class, whatever comes next."""
    fields = {"problem_type": "single_label_classification"}
    checkpoint = make_vit(**fields) if foreign else make_checkpoint(labels=NAMES, **fields)
    model, _, _ = initial_model(settings_of(REGRESSION, checkpoint), ["age"])
    assert model.config.num_labels == 1 and model.config.id2label == {0: "age"}
    assert model.config.problem_type == "regression"
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 1)


def test_thresholds_of_another_architecture(tmp_path, make_vit):
    folder = make_vit(problem_type="multi_label_classification", label_thresholds=[0.1, 0.2, 0.3])
    assert AutoConfig.from_pretrained(folder).label_thresholds == [0.1, 0.2, 0.3]
    for task in (MULTI_LABEL, CLASSIFICATION):
        model, _, trained = initial_model(settings_of(task, folder), NAMES)
        assert trained == (task == MULTI_LABEL) and model.config.label_thresholds is None
    model.save_pretrained(tmp_path / "saved")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "saved").config.label_thresholds is None


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("task", TASKS_OF_IMAGES)
def test_every_recipe_suits_every_kind_of_label(make_checkpoint, task, recipe, tmp_path):
    complete = {"model_name_or_path", "config_name"} & RECIPES[recipe].keys()
    start = [] if complete else ["--model_name_or_path", make_checkpoint()]
    settings = parse(["--task", task, *REQUIRED, "--recipe", recipe, *start])
    assert settings.mixup_alpha == RECIPES[recipe].get("mixup_alpha", 0)
    assert settings.cutmix_alpha == (0 if task == REGRESSION else RECIPES[recipe].get("cutmix_alpha", 0))
    assert settings.label_smoothing == (0.1 if task == CLASSIFICATION else 0)
    # What a run writes down is read again.
    settings.save(tmp_path / "settings.yaml")
    assert parse(["--config_file", str(tmp_path / "settings.yaml")]).to_dict() == {
        **settings.to_dict(),
        "config_file": str(tmp_path / "settings.yaml"),
    }


@pytest.mark.parametrize(
    ("task", "argv", "message"),
    [
        (REGRESSION, ["--cutmix_alpha", "1"], "--cutmix_alpha is nothing for --task image-regression.*--mixup_alpha"),
        (REGRESSION, ["--label_smoothing", "0.1"], "--label_smoothing is nothing for --task image-regression"),
        (REGRESSION, ["--teacher", "x", "--distillation", "hard"], "no likely label"),
        (REGRESSION, ["--head_mapping", "names"], "--head_mapping is nothing for --task image-regression"),
        (REGRESSION, ["--loss", "bce"], "bce"),
        (MULTI_LABEL, ["--loss", "mse"], "mse"),
        (MULTI_LABEL, ["--pos_weight", "lots"], "neither none nor auto nor JSON"),
        (MULTI_LABEL, ["--pos_weight", "0"], "numbers above 0, not 0"),
        (MULTI_LABEL, ["--pos_weight", '{"cat": true}'], "numbers above 0, not True"),
        (MULTI_LABEL, ["--pos_weight", '{"cat": -1}'], "numbers above 0, not -1"),
        (MULTI_LABEL, ["--pos_weight", "[1, 2]"], "numbers above 0, not"),
        (MULTI_LABEL, ["--asymmetric_clip", "0.9"], "between 0 and 0.5"),
        (CLASSIFICATION, ["--pos_weight", "auto"], "unknown flag: --pos_weight"),
        (MULTI_LABEL, ["--config_overrides", '{"label_thresholds": [0.1]}'], "cannot set label_thresholds"),
    ],
)
def test_what_makes_no_sense_is_refused(make_checkpoint, task, argv, message):
    checkpoint = make_checkpoint(labels=NAMES)
    with pytest.raises(UserError, match=message):
        settings = parse(["--task", task, *REQUIRED, "--model_name_or_path", checkpoint, *argv])
        initial_model(settings, NAMES)


def test_weights_by_name_come_from_a_file_too(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"task": MULTI_LABEL, "pos_weight": {"cat": 5}, "label_thresholds": 0.5}))
    settings = parse([*REQUIRED, "--config_file", str(file)])
    assert json.loads(settings.pos_weight) == settings.given_pos_weight() == {"cat": 5}
    assert settings.label_thresholds == "0.5"
