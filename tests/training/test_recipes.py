"""The recipes of both papers: each for every task, and the second paper's facts against its repository's scripts."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hf_poolformer import VARIANTS, MetaFormerConfig, PoolFormerConfig
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.tasks import CLASSIFICATION, FEATURE_DISTILLATION, MULTI_LABEL, REGRESSION, TASKS
from hf_poolformer.settings.classification import RECIPES
from hf_poolformer.settings.command_line import parse
from hf_poolformer.settings.training import TrainingSettings, settings_of
from hf_poolformer.training.initialisation import initial_model
from hf_poolformer.training.loop import train
from hf_poolformer.training.optimisation import scaled_learning_rate


REQUIRED = ["--train_dir", "images", "--output_dir", "run"]
# From scratch, scripts/*/train_*.sh: optimiser, learning rate at 4096 images, epochs of warm-up, DropPath, dropout.
FROM_SCRATCH = {
    "identityformer_s12": ("adamw", 4e-3, 5, 0.1, 0.0),
    "identityformer_m48": ("adamw", 4e-3, 5, 0.4, 0.0),
    "randformer_s36": ("adamw", 4e-3, 5, 0.2, 0.0),
    "randformer_m48": ("adamw", 4e-3, 5, 0.3, 0.0),
    "poolformerv2_s24": ("adamw", 4e-3, 5, 0.1, 0.0),
    "poolformerv2_m36": ("adamw", 4e-3, 5, 0.3, 0.0),
    "convformer_s18": ("adamw", 4e-3, 20, 0.2, 0.0),
    "convformer_s36": ("adamw", 4e-3, 20, 0.3, 0.0),
    "convformer_m36": ("adamw", 4e-3, 20, 0.4, 0.0),
    "convformer_b36": ("adamw", 4e-3, 20, 0.6, 0.0),
    "caformer_s18": ("lamb", 8e-3, 20, 0.15, 0.0),
    "caformer_s36": ("lamb", 8e-3, 20, 0.3, 0.4),
    "caformer_m36": ("lamb", 8e-3, 20, 0.4, 0.4),
    "caformer_b36": ("lamb", 8e-3, 20, 0.6, 0.5),
}
# At 384 pixels, scripts/*/finetune_*_384.sh: optimiser, learning rate at 1024 images, DropPath, dropout.
FINE_TUNED = {
    "convformer_s18": ("adamw", 5e-5, 0.3, 0.4),
    "convformer_s36": ("adamw", 5e-5, 0.5, 0.4),
    "convformer_m36": ("adamw", 5e-5, 0.8, 0.5),
    "convformer_b36": ("adamw", 5e-5, 0.8, 0.5),
    "caformer_s18": ("lamb", 1e-4, 0.3, 0.4),
    "caformer_s36": ("lamb", 1e-4, 0.5, 0.4),
    "caformer_m36": ("lamb", 1e-4, 0.7, 0.4),
    "caformer_b36": ("lamb", 1e-4, 0.8, 0.5),
}


def saved(tmp_path, name):
    """The configuration of a variant in a folder, which is all of a checkpoint that settings look at."""
    MetaFormerConfig.from_variant(name).save_pretrained(tmp_path / name)
    return str(tmp_path / name)


@pytest.mark.parametrize(("task", "recipe"), [(task, r) for task in TASKS for r in settings_of(task).recipes(task)])
def test_every_recipe_is_one_for_its_task(task, recipe, tmp_path):
    data = ["--dataset_name", "x", "--output_dir", "run", "--task", task, "--recipe", recipe]
    if "model_name_or_path" not in settings_of(task).recipes(task)[recipe]:
        data += ["--model_name_or_path", saved(tmp_path, "convformer_s18")]
    if task == FEATURE_DISTILLATION:
        data += ["--teacher", "x"]
    settings = parse(data)
    assert (settings.task, settings.recipe) == (task, recipe)


@pytest.mark.parametrize("variant", FROM_SCRATCH)
def test_from_scratch(variant):
    optimizer, rate, warmup, drop_path, dropout = FROM_SCRATCH[variant]
    settings = parse([*REQUIRED, "--recipe", "metaformer-paper", "--config_name", variant])
    assert settings.optimizer == optimizer and settings.total_train_batch_size == 4096
    assert scaled_learning_rate(settings, 4096) == pytest.approx(rate)
    assert (settings.num_train_epochs, settings.num_warmup_epochs, settings.num_cooldown_epochs) == (300, warmup, 10)
    assert (settings.warmup_learning_rate, settings.min_learning_rate) == (1e-6, 1e-5)
    assert (settings.weight_decay, settings.label_smoothing, settings.random_erasing) == (0.05, 0.1, 0.25)
    assert (settings.mixup_alpha, settings.cutmix_alpha, settings.mixup_switch_prob) == (0.8, 1.0, 0.5)
    assert (settings.rand_augment_magnitude, settings.rand_augment_std, settings.rand_augment_ops) == (9, 0.5, 2)
    assert (settings.ema_decay, settings.crop_min_scale, settings.image_size) == (0, 0.08, 224)
    # timm's LAMB has an epsilon of its own and clips; its AdamW does not clip.
    lamb = optimizer == "lamb"
    assert (settings.adam_epsilon, settings.max_grad_norm) == ((1e-6, 1.0) if lamb else (1e-8, 0.0))
    model, _, _ = initial_model(
        TrainingSettings.from_recipe(
            "metaformer-paper",
            train_dir="x",
            output_dir="y",
            config_name=variant,
            config_overrides=json.dumps({"depths": [1] * 4, "hidden_sizes": [32] * 4}),
        ),
        ["a", "b"],
    )
    assert (model.config.drop_path_rate, model.config.head_dropout) == (drop_path, dropout)


@pytest.mark.parametrize("variant", FINE_TUNED)
def test_at_384_pixels(variant, tmp_path):
    optimizer, rate, drop_path, dropout = FINE_TUNED[variant]
    settings = parse([*REQUIRED, "--recipe", "metaformer-384", "--model_name_or_path", saved(tmp_path, variant)])
    assert settings.optimizer == optimizer and settings.total_train_batch_size == 1024
    assert scaled_learning_rate(settings, 1024) == pytest.approx(rate)
    assert (settings.drop_path_rate, settings.head_dropout) == (drop_path, dropout)
    assert (settings.num_train_epochs, settings.num_warmup_epochs, settings.num_cooldown_epochs) == (30, 0, 0)
    assert settings.lr_scheduler_type == "constant" and settings.image_size == 384
    assert (settings.ema_decay, settings.ema_warmup, settings.head_mapping) == (0.9999, False, "names")
    assert (settings.mixup_alpha, settings.cutmix_alpha) == (0, 0)
    assert (settings.weight_decay, settings.label_smoothing, settings.random_erasing) == (0.05, 0.1, 0.25)
    assert settings.rand_augment_magnitude == 9


@pytest.mark.parametrize("task", [CLASSIFICATION, MULTI_LABEL, REGRESSION])
def test_a_small_model_from_scratch_halves_the_sides_five_times(task):
    settings = parse([*REQUIRED, "--task", task, "--recipe", "scratch", "--num_channels", "1"])
    model, processor, _ = initial_model(settings, ["a", "b", "c"])
    images = [Image.fromarray(np.full((300, 200), 100, dtype=np.uint8))]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 1, 96, 96)
    outputs = model.eval()(pixel_values=pixels, output_hidden_states=True)
    maps = outputs.hidden_states[-5:]
    assert [tuple(one.shape[1:]) for one in maps] == [
        (16, 48, 48),
        (32, 24, 24),
        (64, 12, 12),
        (128, 6, 6),
        (192, 3, 3),
    ]
    assert outputs.logits.shape == (1, 3)
    # By hand: convolutions of 3x3, MLPs of twice the width, two norms per block, one more at the end, and the head.
    widths = [1, 16, 32, 64, 128, 192]
    stages = sum(9 * a * b + b + 2 * 2 * b + 2 * b * b + 2 * b + 2 * b * b + b for a, b in itertools.pairwise(widths))
    assert sum(p.numel() for p in model.parameters()) == stages + 2 * 192 + 3 * 193
    assert not [name for name, _ in model.named_parameters() if "layer_scale" in name]


def test_a_named_architecture_takes_the_place_of_the_small_model(tmp_path):
    named = parse([*REQUIRED, "--recipe", "scratch", "--config_name", "poolformer_s12"])
    assert (named.config_name, named.config_overrides, named.image_size) == ("poolformer_s12", None, 96)
    start = parse([*REQUIRED, "--recipe", "scratch", "--model_name_or_path", saved(tmp_path, "convformer_s18")])
    assert (start.config_name, start.config_overrides, start.image_size) == (None, None, None)


def test_every_variant_has_its_row():
    rows = {name for name, variant in VARIANTS.items() if variant.family in ("convformer", "caformer")}
    assert {name.split("_384")[0] for name in rows if name.endswith("_384")} == set(FINE_TUNED)


def test_what_is_given_wins(tmp_path):
    start = saved(tmp_path, "caformer_s36")
    file = tmp_path / "settings.yaml"
    file.write_text(f"recipe: metaformer-384\nmodel_name_or_path: {start}\nhead_dropout: null\ndrop_path_rate: 0.1\n")
    settings = parse([*REQUIRED, "--config_file", str(file), "--optimizer", "adamw"])
    assert (settings.optimizer, settings.head_dropout, settings.drop_path_rate) == ("adamw", None, 0.1)
    assert settings.learning_rate == 1e-4  # what nobody gave is CAFormer's
    from_python = TrainingSettings.from_recipe(
        "metaformer-384", train_dir="x", output_dir="y", model_name_or_path=start, learning_rate=3e-5
    )
    assert (from_python.optimizer, from_python.learning_rate, from_python.head_dropout) == ("lamb", 3e-5, 0.4)


def test_other_architectures_get_what_is_common(tmp_path):
    PoolFormerConfig().save_pretrained(tmp_path / "v1")
    MetaFormerConfig.from_variant("caformer_s18", depths=[1] * 4).save_pretrained(tmp_path / "small")
    v1, small = (
        parse([*REQUIRED, "--recipe", "metaformer-384", "--model_name_or_path", str(tmp_path / name)])
        for name in ("v1", "small")
    )
    assert (v1.optimizer, v1.learning_rate, v1.head_dropout, v1.drop_path_rate) == ("adamw", 5e-5, None, None)
    assert (small.optimizer, small.learning_rate, small.head_dropout, small.drop_path_rate) == (
        "lamb",
        1e-4,
        None,
        None,
    )


def test_a_checkpoint_is_needed_and_looked_for(tmp_path):
    with pytest.raises(UserError, match="give a checkpoint"):
        parse([*REQUIRED, "--recipe", "metaformer-384"])
    with pytest.raises(UserError, match="nowhere"):
        parse([*REQUIRED, "--recipe", "metaformer-384", "--model_name_or_path", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_shows_a_recipe_without_looking_for_its_model(recipe, capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--recipe", recipe, "--model_name_or_path", "nowhere", "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert "--optimizer {adamw,lamb}" in text and "--head_mapping {off,names}" in text and "--size_schedule" in text


def scratched(number: int, fine: bool) -> Image.Image:
    """A grey plate of 192 px with three bright lines across it, as all have, and with a fine dark one or without."""
    draws = np.random.default_rng(number)
    plate = np.full((192, 192), draws.uniform(120, 160)) + draws.normal(0, 8, (192, 192))
    plate[[40, 96, 150]] += 60
    picture = Image.fromarray(plate.clip(0, 255).astype(np.uint8))
    if fine:
        x, y, angle = draws.uniform(50, 140), draws.uniform(50, 140), draws.uniform(0, np.pi)
        dx, dy = 40 * np.cos(angle), 40 * np.sin(angle)
        ImageDraw.Draw(picture).line([x - dx, y - dy, x + dx, y + dy], fill=90, width=2)
    return picture


@pytest.mark.slow
def test_a_small_model_from_scratch_sees_fine_lines(tmp_path):
    """Which are a fifth of a pixel wide at the 32 px of recipe demo."""
    for number in range(480):
        split, kind = ("train" if number < 360 else "validation"), ("fine", "none")[number % 2]
        (tmp_path / "plates" / split / kind).mkdir(parents=True, exist_ok=True)
        scratched(number, kind == "fine").save(tmp_path / "plates" / split / kind / f"{number}.png")
    settings = TrainingSettings.from_recipe(
        "scratch",
        dataset_name=str(tmp_path / "plates"),
        output_dir=str(tmp_path / "run"),
        num_channels=1,
        vertical_flip=0.5,
        num_train_epochs=12,
        num_workers=0,
        eval_epochs=0,
    )
    results = train(settings)
    # 120 images; by chance 0.5 with a standard deviation of 0.05.
    assert results["eval_accuracy"] >= 0.8
