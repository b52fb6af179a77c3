"""The backbone inside transformers' own dense models: forward, loss, gradients, save and load."""

import pytest
import torch
from transformers import (
    AutoBackbone,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DetrForSegmentation,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_poolformer import MetaFormerBackbone, MetaFormerConfig, PoolFormerBackbone, PoolFormerConfig


SIZES = {"depths": (1, 1, 2, 1), "hidden_sizes": (8, 16, 32, 64)}
ALL = ["stage1", "stage2", "stage3", "stage4"]
# Of the two images of a batch.
CLASSES = [torch.tensor([0, 1]), torch.tensor([2])]
BOXES = [torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.3, 0.2, 0.2]]), torch.tensor([[0.6, 0.4, 0.5, 0.3]])]


DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
    "num_labels": 3,
}


@pytest.fixture(params=["poolformer", "metaformer"])
def backbone_config(request) -> PoolFormerConfig | MetaFormerConfig:
    """PoolFormer v1, and one with convolution and attention as in CAFormer."""
    if request.param == "poolformer":
        return PoolFormerConfig(**SIZES, out_features=ALL)
    mixers = ("separable_conv", "separable_conv", "attention", "attention")
    return MetaFormerConfig(**SIZES, out_features=ALL, token_mixers=mixers, norm_layer="layer_norm")


def masks(count: int) -> torch.Tensor:
    return (torch.rand(count, 64, 96) > 0.5).float()


def upernet(config):
    model = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=config,
            hidden_size=16,
            auxiliary_in_channels=32,
            auxiliary_channels=8,
            pool_scales=(1, 2),
            num_labels=3,
        )
    )
    return model, {"labels": torch.randint(0, 3, (2, 64, 96))}


def maskformer(config):
    decoder = DetrConfig(backbone_config=config, **DETR)
    model = MaskFormerForInstanceSegmentation(
        MaskFormerConfig(
            backbone_config=config, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=3
        )
    )
    return model, {"mask_labels": [masks(2), masks(1)], "class_labels": CLASSES}


def mask2former(config):
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=config,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=16,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            dim_feedforward=16,
            num_queries=5,
            train_num_points=32,
            num_labels=3,
        )
    )
    return model, {"mask_labels": [masks(2), masks(1)], "class_labels": CLASSES}


def detr(config):
    config.out_features = ALL[-1:]
    labels = [{"class_labels": c, "boxes": b} for c, b in zip(CLASSES, BOXES, strict=True)]
    return DetrForObjectDetection(DetrConfig(backbone_config=config, **DETR)), {"labels": labels}


def detr_segmentation(config):
    labels = [{"class_labels": c, "boxes": b, "masks": masks(len(c))} for c, b in zip(CLASSES, BOXES, strict=True)]
    settings = {**DETR, "d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
    return DetrForSegmentation(DetrConfig(backbone_config=config, **settings)), {"labels": labels}


def deformable_detr(config):
    config.out_features = ALL[1:]
    labels = [{"class_labels": c, "boxes": b} for c, b in zip(CLASSES, BOXES, strict=True)]
    settings = {**DETR, "decoder_layers": 2, "num_feature_levels": 4, "encoder_n_points": 2, "decoder_n_points": 2}
    return DeformableDetrForObjectDetection(DeformableDetrConfig(backbone_config=config, **settings)), {
        "labels": labels
    }


def dpt(config):
    """DPT-hybrid, of square images: a transformer on the third stage; the first two go to its neck as they are."""
    config.out_features = ALL[:3]
    model = DPTForDepthEstimation(
        DPTConfig(
            backbone_config=config,
            is_hybrid=True,
            image_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            backbone_out_indices=(0, 0, 0, 1),
            backbone_featmap_shape=(1, 32, 4, 4),
            neck_hidden_sizes=(8, 16, 16, 16),
            fusion_hidden_size=16,
        )
    )
    return model, {}


MODELS = {
    build.__name__: build
    for build in (upernet, maskformer, mask2former, detr, detr_segmentation, deformable_detr, dpt)
}


def loss_of(outputs) -> torch.Tensor:
    # Depth estimation has no loss in transformers.
    return outputs.predicted_depth.square().mean() if "predicted_depth" in outputs else outputs.loss


@pytest.mark.parametrize("name", MODELS)
def test_dense_models_of_transformers_train_and_load(name, backbone_config, tmp_path):
    model, labels = MODELS[name](backbone_config)
    model.train()
    inside = [m for m in model.modules() if isinstance(m, MetaFormerBackbone)]
    (backbone,) = inside
    assert type(backbone) is (PoolFormerBackbone if backbone_config.model_type == "poolformer" else MetaFormerBackbone)
    pixel_values = torch.randn(2, 3, 64, 64 if name == "dpt" else 96)
    loss = loss_of(model(pixel_values, **labels))
    loss.backward()
    assert torch.isfinite(loss)
    used = max(int(stage[-1]) for stage in backbone.out_features)
    for key, parameter in backbone.named_parameters():
        stage = int(key.split(".")[2]) + 1 if key.startswith("encoder.") else 0
        if stage <= used:
            assert parameter.grad is not None, key
            # Pooling subtracts a shift again.
            assert parameter.grad.any() or key.endswith("before_norm.bias"), key

    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert_same_outputs(model, again, pixel_values)


def assert_same_outputs(model: PreTrainedModel, again: PreTrainedModel, pixel_values: torch.Tensor):
    with torch.no_grad():
        pairs = zip(model(pixel_values).to_tuple(), again(pixel_values).to_tuple(), strict=True)
        compared = [(x, y) for x, y in pairs if isinstance(x, torch.Tensor)]
    assert compared
    for x, y in compared:
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "choice", [{"out_features": ["stem", "stage3"]}, {"out_indices": [0, 3]}, {"out_indices": (0, -2)}]
)
def test_auto_backbone_takes_names_or_numbers(choice, backbone_config):
    config = type(backbone_config)(**{**SIZES, **choice})
    backbone = AutoBackbone.from_config(config)
    assert backbone.out_features == ["stem", "stage3"]
    assert backbone.channels == [8, 32]
    maps = backbone(torch.randn(1, 3, 64, 96)).feature_maps
    assert [tuple(x.shape) for x in maps] == [(1, 8, 16, 24), (1, 32, 4, 6)]


def test_hidden_states_of_the_model_around_it_are_its_own(backbone_config):
    model, _ = detr(backbone_config)
    with torch.no_grad():
        outputs = model.eval()(torch.randn(1, 3, 64, 96), output_hidden_states=True)
    # Of 2 x 3 positions, before and after the one layer.
    assert [tuple(x.shape) for x in outputs.encoder_hidden_states] == [(1, 6, 32)] * 2


def test_every_stage_has_a_norm_over_all_channels():
    """GroupNorm(1): a feature map at initialisation has mean 0 and variance 1 over C, H and W of each image."""
    backbone = AutoBackbone.from_config(PoolFormerConfig(**SIZES, out_features=ALL))
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, 64, 96)).feature_maps
    for x in maps:
        assert x.mean(dim=(1, 2, 3)).abs().max() < 1e-5
        torch.testing.assert_close(x.var(dim=(1, 2, 3), unbiased=False), torch.ones(2), rtol=1e-2, atol=0)


def test_out_features_may_change_from_call_to_call_of_from_pretrained(backbone_config, tmp_path):
    saved = AutoBackbone.from_config(backbone_config)
    saved.save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 64, 96)
    loaded = type(saved).from_pretrained(tmp_path, out_features=["stage2", "stage4"]).eval()
    with torch.no_grad():
        wanted, got = (model(pixel_values).feature_maps for model in (saved.eval(), loaded))
    torch.testing.assert_close(list(got), [wanted[1], wanted[3]], rtol=1e-5, atol=1e-6)
