import copy

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV2

from hf_poolformer import PoolFormerForImageClassification
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training.optimisation import (
    WeightAverage,
    learning_rate_at,
    make_optimizer,
    make_schedule,
    parameter_groups,
    scaled_learning_rate,
)


@pytest.fixture
def model(poolformer_config):
    return PoolFormerForImageClassification(poolformer_config)


def settings_of(recipe, **changes):
    return TrainingSettings.from_recipe(recipe, train_dir="x", output_dir="y", **changes)


def test_only_matrices_and_kernels_decay(model):
    groups = parameter_groups(model, weight_decay=0.05)
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decaying) == (parameter.ndim > 1), name
        if "norm" in name or "layer_scale" in name or name.endswith("bias"):
            assert id(parameter) not in decaying


def test_learning_rate_falls_from_head_to_stem(model):
    scale_of = {
        id(p): group["lr_scale"] for group in parameter_groups(model, 0.05, layer_decay=0.5) for p in group["params"]
    }
    scales = {name: scale_of[id(p)] for name, p in model.named_parameters()}
    encoder = "poolformer.encoder"
    assert scales["classifier.weight"] == scales["norm.weight"] == 1.0
    # Depths 1, 1, 2, 1: blocks 1 to 5 of 6 levels, the stem below them.
    assert scales[f"{encoder}.block.3.0.layer_scale_1"] == 0.5
    assert scales[f"{encoder}.block.2.1.output.conv1.weight"] == 0.5**2
    assert scales[f"{encoder}.patch_embeddings.2.projection.weight"] == 0.5**3
    assert scales[f"{encoder}.block.0.0.before_norm.weight"] == 0.5**5
    assert scales[f"{encoder}.patch_embeddings.0.projection.weight"] == 0.5**6


def test_frozen_parameters_are_left_out(model):
    model.poolformer.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.05)) == 4


def test_papers_schedule():
    settings, per_epoch = settings_of("paper"), 100
    assert scaled_learning_rate(settings, 4096) == pytest.approx(4e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=4e-3)
    schedule = make_schedule(optimizer, settings, 4e-3, total_steps=310 * per_epoch, epochs=310)
    factor = schedule.lr_lambdas[0]
    reference = CosineLRScheduler(
        optimizer, t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6, warmup_prefix=False
    )
    for epoch in (0, 1, 4, 5, 6, 100, 150, 299, 300, 309):
        assert 4e-3 * factor(epoch * per_epoch) == pytest.approx(reference._get_lr(epoch)[0], rel=1e-6), epoch
    assert 4e-3 * factor(0) == pytest.approx(1e-6)
    assert 4e-3 * factor(250) == pytest.approx((1e-6 + 4e-3) / 2)
    assert 4e-3 * factor(150 * per_epoch) == pytest.approx((1e-5 + 4e-3) / 2)
    assert 4e-3 * factor(305 * per_epoch) == pytest.approx(1e-5)


def test_other_courses():
    course = {"peak": 1.0, "total_steps": 100, "warmup_steps": 10, "minimum": 0.1}
    assert learning_rate_at(5, **course, kind="linear") == 0.5
    assert learning_rate_at(50, **course, kind="linear") == pytest.approx(0.55)
    assert learning_rate_at(200, **course, kind="linear") == pytest.approx(0.1)
    assert learning_rate_at(99, **course, kind="constant") == 1.0
    assert learning_rate_at(50, **course) == pytest.approx(0.55)


def test_each_group_has_its_own_rate(model):
    optimizer = make_optimizer(model, settings_of("finetune", layer_decay=0.5), 1e-3)
    schedule = make_schedule(optimizer, settings_of("finetune", num_warmup_steps=0), 1e-3, 100, 10)
    assert max(schedule.get_last_lr()) == pytest.approx(1e-3)
    assert min(schedule.get_last_lr()) == pytest.approx(1e-3 * 0.5**6)


def test_average_follows_the_weights(model):
    ema = WeightAverage(model, decay=0.9)
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(model)  # first weight: 1 - 2/11
    name = "classifier.weight"
    torch.testing.assert_close(ema.module.state_dict()[name], start[name] + 9 / 11)
    for _ in range(200):
        ema.update(model)
    torch.testing.assert_close(ema.module.state_dict()[name], model.state_dict()[name])
    other = WeightAverage(PoolFormerForImageClassification(model.config), decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 201
    torch.testing.assert_close(other.module.state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize("warmup", [True, False])
def test_average_is_timms_but_for_its_warmup(model, warmup):
    """The second paper's average is timm's ModelEmaV2, which weighs the first step like all others."""
    ema, theirs = WeightAverage(model, 0.99, warmup), ModelEmaV2(model, 0.99)
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(model)
        theirs.decay = min(0.99, (1 + step) / (10 + step)) if warmup else 0.99
        theirs.update(model)
        for one, other in zip(ema.module.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(one, other)
