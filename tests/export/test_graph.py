"""The folded graph computes the same function, for everything a configuration can say."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_poolformer import (
    TOKEN_MIXERS,
    MetaFormerConfig,
    MetaFormerForImageClassification,
    MetaFormerForSemanticSegmentation,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerModel,
)
from hf_poolformer.export.graph import PoolingBranch, fold, variance
from hf_poolformer.foundation.errors import UserError


TINY = {"depths": (1, 1, 2, 1), "hidden_sizes": (8, 16, 32, 64), "num_labels": 10, "image_size": 64}
# Folding changes the order of float32 sums; the reference is float64. Without norms the values grow, and so do errors.
TOLERANCE = 5e-6


def assert_same(model: nn.Module, size: int = 64, tolerance: float = TOLERANCE):
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2.0)
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():
        got = fold(model)(x).logits
        right = model.double()(x.double()).logits
    assert ((got - right).abs().max() / right.abs().max()).item() < tolerance


def test_every_family(config, scramble):
    kind = (
        PoolFormerForImageClassification if isinstance(config, PoolFormerConfig) else MetaFormerForImageClassification
    )
    assert_same(scramble(kind(config)))


@pytest.mark.parametrize("norm", ["group_norm", "layer_norm", "batch_norm", "none"])
@pytest.mark.parametrize("mixer", TOKEN_MIXERS)
def test_every_mixer_behind_every_norm(mixer, norm, scramble):
    config = MetaFormerConfig(**TINY, token_mixers=(mixer,) * 4, norm_layer=norm)
    assert_same(scramble(MetaFormerForImageClassification(config)))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_residual": False},
        {"use_mlp": False},
        {"use_layer_scale": False, "res_scale_init_values": (1.0, None, 0.5, None)},
        {"norm_bias": False, "use_bias": False},
        {"hidden_act": "star_relu", "head_type": "mlp", "head_norm_first": False, "embedding_norm": "layer_norm"},
        {"num_labels": 0},
        {"num_labels": 1, "head_type": "mlp"},
    ],
)
def test_every_other_choice(changes, scramble):
    assert_same(scramble(MetaFormerForImageClassification(MetaFormerConfig(**{**TINY, **changes}))))


@pytest.mark.parametrize("norm", ["group_norm", "batch_norm"])
def test_segmenter(norm, scramble):
    model = scramble(MetaFormerForSemanticSegmentation(MetaFormerConfig(**TINY, norm_layer=norm)))
    assert_same(model, size=96)


def test_the_mixer_is_one_scale_per_image(poolformer_config):
    """Of 5 blocks the first norm leaves no standardisation: 5 of the MLPs and one of the head are all there are."""
    folded = fold(PoolFormerForImageClassification(poolformer_config))
    assert sum(isinstance(module, PoolingBranch) for module in folded.modules()) == 5
    exported = torch.export.export(folded, (torch.zeros(2, 3, 64, 64),))
    assert sum("group_norm" in str(node.target) for node in exported.graph.nodes) == 6


def test_constant_images_are_no_trouble():
    x = torch.full((2, 5, 7, 9), 1000.0)
    x[1] += torch.randn(5, 7, 9)
    right = x.double().var((1, 2, 3), correction=0)
    got = variance(x).flatten()
    assert got[0] >= 0 and (got[1] - right[1]).abs() < 0.5  # 1e6 of squares in float32


def test_what_is_not_known_is_kept(poolformer_config, scramble):
    """Adapters, hooks and mixers of one's own take part in the result."""
    model = PoolFormerForImageClassification(poolformer_config)
    adapted = get_peft_model(model, LoraConfig(target_modules=["conv1"], init_lora_weights=False)).base_model.model
    assert_same(scramble(adapted))

    hooked = scramble(PoolFormerForImageClassification(poolformer_config))
    hooked.base_model.encoder.block[0][0].token_mixer.register_forward_hook(lambda module, args, output: output * 2)
    hooked.base_model.encoder.block[1][0].register_forward_hook(lambda module, args, output: output + 1)
    assert_same(hooked)


def test_mixer_of_ones_own(monkeypatch, scramble):
    class Flip(nn.Module):
        def __init__(self, config, stage):
            super().__init__()

        def forward(self, x):
            return x.flip(-1)

    monkeypatch.setitem(TOKEN_MIXERS, "flip", Flip)
    assert_same(scramble(MetaFormerForImageClassification(MetaFormerConfig(**TINY, token_mixers=("flip",) * 4))))


def test_the_model_is_left_as_it_is(poolformer_config, scramble):
    model = scramble(PoolFormerForImageClassification(poolformer_config))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fold(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_models_without_a_task_are_refused(poolformer_config):
    with pytest.raises(UserError, match="image classifiers, semantic segmenters and detectors can"):
        fold(PoolFormerModel(poolformer_config))
