import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml

import hf_poolformer
from hf_poolformer import PoolFormerConfig
from hf_poolformer.data.datasets import open_datasets
from hf_poolformer.evaluation.settings import EvaluationSettings, parse_evaluation
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.settings import in_groups
from hf_poolformer.reports.comparison_settings import parse_comparison
from hf_poolformer.settings.classification import RECIPES, ClassificationSettings
from hf_poolformer.settings.command_line import parse
from hf_poolformer.settings.training import TrainingSettings, all_settings


REQUIRED = ["--train_dir", "images", "--output_dir", "run"]


def test_flag_wins_over_file_and_file_over_recipe(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(
        "recipe: paper\nlearning_rate: 1e-4\nweight_decay: 0.1\nstreaming: false\nmax_train_steps: 7\n"
        "random_erasing: 0\nconfig_overrides: {depths: [1, 1, 1, 1]}\n"
    )
    settings = parse([*REQUIRED, "--config_file", str(file), "--weight_decay", "0.2"])
    assert settings.weight_decay == 0.2
    assert settings.learning_rate == 1e-4
    assert settings.streaming is False
    assert settings.max_train_steps == 7
    assert settings.random_erasing == 0.0
    assert settings.overrides() == {"depths": [1, 1, 1, 1]}
    assert settings.mixup_alpha == RECIPES["paper"]["mixup_alpha"]
    assert settings.recipe == "paper"


def test_paper_recipe_is_the_papers():
    settings = parse([*REQUIRED, "--recipe", "paper"])
    assert (settings.num_train_epochs, settings.num_cooldown_epochs, settings.num_warmup_epochs) == (300, 10, 5)
    assert (settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (settings.weight_decay, settings.label_smoothing, settings.random_erasing) == (0.05, 0.1, 0.25)
    assert (settings.mixup_alpha, settings.cutmix_alpha, settings.mixup_switch_prob) == (0.8, 1.0, 0.5)
    assert (settings.rand_augment_magnitude, settings.rand_augment_std, settings.rand_augment_ops) == (9, 0.5, 2)
    assert (settings.warmup_learning_rate, settings.min_learning_rate) == (1e-6, 1e-5)
    assert settings.max_grad_norm == settings.ema_decay == 0
    assert settings.crop_min_scale == 0.08


def test_a_checkpoint_takes_the_place_of_the_recipes_architecture():
    settings = parse([*REQUIRED, "--recipe", "demo", "--model_name_or_path", "checkpoint"])
    assert settings.config_name is None and settings.config_overrides is None and settings.image_size is None
    assert parse(REQUIRED).model_name_or_path == "sail/poolformer_s12"
    assert parse([*REQUIRED, "--config_name", "poolformer_s24"]).model_name_or_path is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipe", "dmeo"], "unknown recipe: dmeo; did you mean demo?"),
        (["--recipe", "x"], "there are finetune, paper, demo"),
        (["--learnin_rate", "1"], "did you mean --learning_rate"),
        (["--learning_rate", "fast"], "takes a number or auto, not 'fast'"),
        (["--lr_scheduler_type", "square"], "invalid choice"),
        (["images"], "what is 'images' for?"),
        (["--train_dir", "images"], "--output_dir"),
        (["--output_dir", "run"], "--dataset_name or --train_dir"),
        ([*REQUIRED, "--dataset_name", "x"], "either --dataset_name or --train_dir"),
        ([*REQUIRED, "--model_name_or_path", "x", "--config_name", "y"], "exclude each other"),
        ([*REQUIRED, "--learning_rate", "-1"], "--learning_rate must be at least 0"),
        ([*REQUIRED, "--learning_rate", "nan"], "--learning_rate must be"),
        ([*REQUIRED, "--label_smoothing", "2"], "--label_smoothing must be between 0 and"),
        ([*REQUIRED, "--checkpointing_steps", "often"], "number of steps, 'epoch' or 'no'"),
        ([*REQUIRED, "--device_preprocessing", "gpu"], "invalid choice: 'gpu' (choose from"),
        ([*REQUIRED, "--reduced_decoding", "half"], "half"),
        ([*REQUIRED, "--config_overrides", "depths=1"], "not JSON"),
        ([*REQUIRED, "--size_schedule", "160,224"], "takes sides by epochs as JSON"),
        ([*REQUIRED, "--size_schedule", '{"soon": 160}'], "takes sides by epochs as JSON"),
        ([*REQUIRED, "--size_schedule", '{"-1": 160}'], "160 pixels from epoch -1 on is no size"),
        ([*REQUIRED, "--size_schedule", '{"0": 0.5}'], "0.5 pixels from epoch 0 on is no size"),
        ([*REQUIRED, "--head_dropout", "1"], "--head_dropout must be between 0 and"),
        ([*REQUIRED, "--head_mapping", "ids"], "invalid choice: 'ids'"),
        ([*REQUIRED, "--config_file", "nowhere.yaml"], "cannot read the settings"),
    ],
)
def test_mistakes_are_named(argv, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace("?", r"\?")):
        parse(argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "did you mean learning_rate"),
        ("- 1", "must hold a mapping"),
        ("a: [", "not valid YAML"),
        ("hub_token: hf_secret", "does not belong in a file"),
        ("seed: [1, 2]", "invalid int value"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        parse([*REQUIRED, "--config_file", str(file)])
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_settings_read_back_equal_and_without_the_token(tmp_path, recipe):
    PoolFormerConfig().save_pretrained(tmp_path / "start")
    start = {"model_name_or_path": str(tmp_path / "start")} if recipe == "metaformer-384" else {}  # it names none
    settings = TrainingSettings.from_recipe(
        recipe,
        train_dir="a b",
        output_dir="run",
        hub_token="hf_secret",
        seed=3,
        resume_from_checkpoint="latest",
        **start,
    )
    file = tmp_path / "settings.yaml"
    settings.save(file)
    assert "hf_secret" not in file.read_text() and "hub_token" not in yaml.safe_load(file.read_text())
    again = parse(["--config_file", str(file)])
    expected = dataclasses.replace(settings, hub_token=None, resume_from_checkpoint=None, config_file=str(file))
    assert again == expected


def test_help_is_grouped_and_shows_the_recipes_defaults(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--recipe", "paper", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for group in in_groups(ClassificationSettings):
        assert f"\n{group._argument_group_name}:\n" in text
    assert "(default: 300)" in text and "--learning-rate" not in text
    assert "--device_preprocessing {auto,no,augment,decode}" in text and "--reduced_decoding true|false" in text


def test_every_setting_is_used():
    package = Path(hf_poolformer.__file__).parent
    rooms = [package / name for name in ("data", "evaluation", "settings", "training")]
    code = "\n".join(path.read_text() for room in rooms for path in room.rglob("*.py"))
    named_alike = inspect.signature(open_datasets).parameters
    for kind in (*all_settings(), EvaluationSettings):
        for field in dataclasses.fields(kind):
            used = f"settings.{field.name}" in code or f"self.{field.name}" in code or field.name in named_alike
            assert used or field.name in ("config_file", "recipe", "json"), field.name  # what parsing and commands use


def test_evaluation_settings():
    settings = parse_evaluation(["checkpoint", "--dataset_name", "data", "--split", "test"])
    assert (settings.model, settings.dataset_name, settings.split) == ("checkpoint", "data", "test")
    with pytest.raises(UserError, match="--dataset_name or --validation_dir"):
        parse_evaluation(["checkpoint"])
    with pytest.raises(UserError, match="MODEL"):
        parse_evaluation(["--dataset_name", "data"])


def test_a_dataset_needs_no_flag_where_it_follows_the_models():
    settings = parse_evaluation(["checkpoint", "data", "--split", "test"])
    assert (settings.model, settings.dataset_name, settings.split) == ("checkpoint", "data", "test")
    settings = parse_comparison(["--split", "test", "one", "other", "data"])
    assert (settings.a, settings.b, settings.dataset_name) == ("one", "other", "data")
    assert parse_comparison(["one", "other", "--dataset_name", "data"]).dataset_name == "data"
    with pytest.raises(UserError, match="two datasets are named: data and, by --dataset_name, more"):
        parse_evaluation(["checkpoint", "data", "--dataset_name", "more"])
    with pytest.raises(UserError, match="either --dataset_name or --validation_dir"):
        parse_evaluation(["checkpoint", "data", "--validation_dir", "images"])
    with pytest.raises(UserError, match="what is 'more' for"):
        parse_evaluation(["checkpoint", "data", "more"])


@pytest.mark.parametrize(
    ("elsewhere", "here"),
    [
        ("dataloader_num_workers", "num_workers"),
        ("torch_compile", "dynamo_backend"),
        ("eval_strategy", "eval_epochs"),
        ("sched", "lr_scheduler_type"),
        ("reprob", "random_erasing"),
        ("warmup_ratio", "num_warmup_epochs"),
        ("freeze", "freeze_backbone"),
    ],
)
def test_names_of_other_tools_lead_to_ours(elsewhere, here):
    with pytest.raises(UserError, match=f"unknown flag: --{elsewhere}; did you mean --{here}"):
        parse([*REQUIRED, f"--{elsewhere}", "1"])
