"""LAMB against timm's, which trained the paper's models, and against its formula."""

import copy

import pytest
import torch
from timm.optim.lamb import Lamb as TimmLamb
from torch import nn

from hf_poolformer import PoolFormerForImageClassification
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training.lamb import Lamb
from hf_poolformer.training.loop import train
from hf_poolformer.training.optimisation import make_optimizer, parameter_groups


def settings_of(**changes):
    return TrainingSettings.from_recipe("paper", train_dir="x", output_dir="y", optimizer="lamb", **changes)


def groups_of(model, layer_decay=1.0, lr=0.02):
    return [{**group, "lr": lr * group["lr_scale"]} for group in parameter_groups(model, 0.05, layer_decay)]


def gradients(model, seed):
    """Of very different lengths; those of one tensor are 0."""
    generator = torch.Generator().manual_seed(seed)
    for index, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (noise * 10.0 ** (index % 5 - 3) * (index != 3)).to(parameter.dtype)


@pytest.fixture
def model(poolformer_config):
    return PoolFormerForImageClassification(poolformer_config).double()


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_every_step_is_timms(model, layer_decay):
    theirs = copy.deepcopy(model)
    with torch.no_grad():
        for either in (model, theirs):
            either.classifier.weight.zero_()  # a tensor without length has a ratio of 1
    mine = Lamb(groups_of(model, layer_decay), eps=1e-6)
    # It clips by itself, as the loop does here.
    reference = TimmLamb(groups_of(theirs, layer_decay), eps=1e-6, max_grad_norm=1.0)
    for seed in range(6):
        gradients(model, seed)
        gradients(theirs, seed)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        for parameter in model.parameters():
            parameter.grad /= norm.clamp(min=1)
        mine.step()
        reference.step()
        for (name, one), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_every_step_is_the_formulas(weight_decay):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    w, m, v = weight.detach().clone(), torch.zeros(5, 4).double(), torch.zeros(5, 4).double()
    optimizer = Lamb([weight], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=weight_decay)
    for step in range(1, 8):
        g = torch.randn(5, 4, dtype=torch.float64)
        weight.grad = g.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        u = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-3) + weight_decay * w
        w = w - 0.1 * (w.norm() / u.norm() if weight_decay else 1) * u
        torch.testing.assert_close(weight.detach(), w, rtol=1e-12, atol=1e-14)


def test_without_weight_decay_it_is_adam():
    torch.manual_seed(0)
    one = nn.Parameter(torch.randn(7, dtype=torch.float64))
    other = nn.Parameter(one.detach().clone())
    mine, adam = Lamb([one], lr=0.1, eps=1e-8), torch.optim.Adam([other], lr=0.1)
    for _ in range(5):
        one.grad = torch.randn(7, dtype=torch.float64)
        other.grad = one.grad.clone()
        mine.step()
        adam.step()
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_the_settings_make_it(model):
    optimizer = make_optimizer(model, settings_of(adam_beta2=0.99, adam_epsilon=1e-6, layer_decay=0.5), 0.008)
    assert type(optimizer) is Lamb
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.99)}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}
    assert all(group["lr"] == 0.008 * group["lr_scale"] for group in optimizer.param_groups)
    assert len({group["lr"] for group in optimizer.param_groups}) > 2
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}


def test_its_state_goes_on_elsewhere(model):
    other = copy.deepcopy(model)
    mine = Lamb(groups_of(model))
    for seed in range(3):
        gradients(model, seed)
        mine.step()
    other.load_state_dict(model.state_dict())
    theirs = Lamb(groups_of(other))
    theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    for optimizer, either in ((mine, model), (theirs, other)):
        gradients(either, 9)
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_frozen_tensors_stay(model):
    first = next(model.parameters())
    optimizer = Lamb(model.parameters(), weight_decay=0.1)
    gradients(model, 0)
    first.grad, before = None, first.detach().clone()
    optimizer.step()
    assert torch.equal(first, before)


def test_a_run_goes_on_with_its_own_optimiser(make_settings):
    """The state of one would load into the other."""
    train(make_settings(optimizer="lamb", max_train_steps=1))
    with pytest.raises(UserError, match="was made with --optimizer lamb; go on with the same setting"):
        train(make_settings(optimizer="adamw", max_train_steps=1, resume_from_checkpoint="latest"))
