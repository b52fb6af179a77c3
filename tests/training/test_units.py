"""A regressor is trained on standardised numbers; what is saved gives them in their units."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.poolformer import configuration_poolformer, modeling_poolformer

from hf_poolformer import VARIANTS, MetaFormerConfig, MetaFormerForImageClassification
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.training.regression import layer_of_numbers, rescale


# As far from standardised as years, thousandths, and a temperature.
MEAN, STD = torch.tensor([1990.0, -0.003, 36.6]).double(), torch.tensor([12.5, 0.001, 0.4]).double()
THREE = {"num_labels": 3, "problem_type": "regression"}
SMALL = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 32, 64), "attention_head_dim": 8, "image_size": 64, **THREE}


def assert_gives_units(model):
    """The folded model against the formula, and folded back against itself."""
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        standardised = model(images).logits.double()
        folded = copy.deepcopy(model)
        rescale(layer_of_numbers(folded), STD, MEAN)
        numbers = folded(images).logits
        expected = standardised * STD + MEAN
        # Of float32: two of its steps from the number, and of its spread what the products before round off.
        assert ((numbers - expected).abs() / (2.4e-7 * expected.abs() + 1e-5 * STD)).max() < 1
        rescale(layer_of_numbers(folded), 1 / STD, -MEAN / STD)
        torch.testing.assert_close(folded(images).logits.double(), standardised, rtol=1e-4, atol=1e-4)
    changed = {
        name
        for (name, mine), theirs in zip(folded.named_parameters(), model.parameters(), strict=True)
        if not torch.equal(mine, theirs)
    }
    assert len(changed) <= 2  # weight and bias of one layer
    return folded


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_every_head(head_type, scramble):
    config = MetaFormerConfig(**SMALL, head_type=head_type)
    assert_gives_units(scramble(MetaFormerForImageClassification(config)))


@pytest.mark.parametrize(
    "name",
    [
        "poolformer_s12",
        "metaformer_ppff_s12",
        "metaformer_ppaa_s12",
        "randformer_s12",
        "convformer_s18",
        "caformer_s18",
    ],
)
def test_every_family(name, scramble):
    config = MetaFormerConfig.from_variant(name, **SMALL)
    assert_gives_units(scramble(AutoModelForImageClassification.from_config(config)))
    assert VARIANTS[name].model_type == config.model_type


@pytest.mark.parametrize(
    "model",
    [
        lambda: ViTForImageClassification(
            ViTConfig(image_size=64, patch_size=16, hidden_size=32, num_hidden_layers=1, intermediate_size=64, **THREE)
        ),
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **THREE)
        ),
        lambda: modeling_poolformer.PoolFormerForImageClassification(
            configuration_poolformer.PoolFormerConfig(
                **{**SMALL, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
            )
        ),
    ],
    ids=["ViT", "ResNet", "built-in PoolFormer"],
)
def test_heads_of_others(model, scramble):
    assert_gives_units(scramble(model()))


def test_a_head_that_is_not_known_is_refused():
    two_heads = DeiTForImageClassificationWithTeacher(
        DeiTConfig(image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **THREE)
    )
    with pytest.raises(UserError, match=r"--task image-regression must know which part of a DeiT.* is its head"):
        layer_of_numbers(two_heads)
    model = ViTForImageClassification(
        ViTConfig(image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **THREE)
    )
    for head in (torch.nn.Linear(16, 3, bias=False), torch.nn.Linear(16, 4), torch.nn.Sequential(torch.nn.ReLU())):
        model.classifier = head
        with pytest.raises(UserError, match=r"ends with a linear layer with a bias|which part"):
            layer_of_numbers(model)
