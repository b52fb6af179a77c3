"""Grad-CAM and CAM, held against pytorch-grad-cam, against finite sums, and against what a caller may rely on."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import hf_poolformer
from hf_poolformer import (
    MetaFormerConfig,
    MetaFormerForImageClassification,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerForSemanticSegmentation,
    gradcam,
)
from hf_poolformer.foundation.errors import UserError


FAMILIES = [
    "poolformer_s12",
    "metaformer_id_s12",
    "metaformer_pppa_s12",
    "metaformer_ppff_s12",
    "identityformer_s12",
    "randformer_s12",
    "poolformerv2_s12",
    "convformer_s18",
    "caformer_s18",
]
SMALL = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 24, 32), "num_labels": 10, "attention_head_dim": 8}


def classifier(config):
    kind = (
        PoolFormerForImageClassification if isinstance(config, PoolFormerConfig) else MetaFormerForImageClassification
    )
    return kind(config)


@pytest.fixture
def model(poolformer_config, scramble):
    return scramble(PoolFormerForImageClassification(poolformer_config))


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 96)


class Logits(torch.nn.Module):
    """What pytorch-grad-cam expects of a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_as_pytorch_grad_cam(config, scramble, stage):
    library = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, pixel_values, targets = scramble(classifier(config)), torch.randn(3, 3, 64, 64), [1, 7, 3]
    found = gradcam(model, pixel_values, [[target] for target in targets], stage=stage)
    with library.GradCAM(Logits(model), [model.base_model.encoder.block[stage]]) as reference:
        expected = reference(pixel_values, [ClassifierOutputTarget(target) for target in targets])
        activations, gradients = (
            getattr(reference.activations_and_grads, name)[0] for name in ("activations", "gradients")
        )
        raw = reference.get_cam_image(pixel_values, None, None, activations.numpy(), gradients.numpy())
    # Sums over channels and positions of float32 products, in another order.
    np.testing.assert_allclose(found.raw[:, 0], raw, rtol=1e-3, atol=1e-4 * np.abs(raw).max())
    # That library stretches each map from its smallest value; here 0 stays 0. It adds 1e-7 to the divisor, and where a
    # map is nearly flat, stretching makes rounding visible.
    maps = found.maps[:, 0].numpy()
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    steep = (high - low)[:, 0, 0] > 0.1
    stretched = (maps - low) / np.maximum(high - low, 1e-6)
    np.testing.assert_allclose(stretched[steep], expected[steep], atol=1e-3)


@pytest.mark.parametrize("variant", FAMILIES)
def test_every_family(variant, scramble):
    model = scramble(classifier(MetaFormerConfig.from_variant(variant, image_size=64, **SMALL)))
    pixel_values = torch.randn(2, 3, 64, 64)
    for stage in (None, 0, 1, 2, 3):
        found = gradcam(model, pixel_values, [4, 2], stage=stage)
        assert found.maps.shape == (2, 2, 64, 64)
        assert found.maps.isfinite().all()
        assert found.maps.min() >= 0
        assert found.maps.max() <= 1
    if model.config.head_type == "linear":
        assert gradcam(model, pixel_values, [4, 2], method="cam").raw.shape == (2, 2, 2, 2)
    else:
        with pytest.raises(UserError, match=r"linear head.*MLP.*'gradcam' works"):
            gradcam(model, pixel_values, method="cam")


@pytest.mark.parametrize("variant", ["poolformer_s12", "metaformer_ppaa_s12", "poolformerv2_s12", "randformer_s12"])
def test_class_activation_maps_add_up_to_the_logit(variant, scramble):
    """Every class of every image: less the bias, and for the second paper's head also what the norm's bias brings."""
    model = scramble(classifier(MetaFormerConfig.from_variant(variant, image_size=64, **SMALL))).double()
    pixel_values = torch.randn(2, 3, 64, 64).double()
    found = gradcam(model, pixel_values, list(range(10)), method="cam")
    constant = model.classifier.bias
    if not model.config.head_norm_first:
        constant = constant + model.classifier.weight @ model.norm.bias
    with torch.no_grad():
        expected = model(pixel_values).logits - constant
    # The maps are float32.
    torch.testing.assert_close(found.raw.sum((-2, -1)), expected.float(), rtol=1e-5, atol=1e-6)


def test_class_activation_maps_of_v1_are_what_the_head_says_of_each_position(model, images):
    found = gradcam(model, images, [5], method="cam")
    with torch.no_grad():
        features = model.norm(model.base_model(images).last_hidden_state)
        expected = torch.einsum("bchw,c->bhw", features, model.classifier.weight[5]) / features[0, 0].numel()
    torch.testing.assert_close(found.raw[:, 0], expected, rtol=1e-4, atol=1e-6)


def test_maps_are_the_positive_part_scaled_and_enlarged(model, images):
    found = gradcam(model, images, list(range(10)), method="cam")
    positive = found.raw.clamp(min=0)
    largest = positive.amax((-2, -1), keepdim=True).clamp(min=1e-12)
    expected = F.interpolate(positive / largest, size=(64, 96), mode="bilinear")
    torch.testing.assert_close(found.maps, expected)
    silent = (found.raw <= 0).flatten(2).all(-1)
    assert not found.maps[silent].any()


def test_each_image_its_own_classes(model, images):
    together = gradcam(model, images, [[1, 2], [9, 0], [4, 4]])
    assert together.targets.tolist() == [[1, 2], [9, 0], [4, 4]]
    for row, targets in enumerate(together.targets.tolist()):
        for column, target in enumerate(targets):
            alone = gradcam(model, images[row : row + 1], target)
            torch.testing.assert_close(together.raw[row, column], alone.raw[0, 0], rtol=1e-4, atol=1e-6)
    same = gradcam(model, images, [3, 8])
    assert same.targets.tolist() == [[3, 8]] * 3


def test_the_predicted_class_by_default(model, images):
    found = gradcam(model, images)
    with torch.no_grad():
        logits = model(images).logits
    assert found.targets.tolist() == logits.argmax(-1, keepdim=True).tolist()
    torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-5)


def test_small_images_are_looked_at_in_an_earlier_stage(model):
    assert gradcam(model, torch.randn(1, 3, 128, 160)).stage == 3
    small = gradcam(model, torch.randn(1, 3, 32, 32))
    assert (small.stage, small.raw.shape[-2:]) == (1, (4, 4))
    assert gradcam(model, torch.randn(1, 3, 8, 8)).stage == 0
    assert gradcam(model, torch.randn(1, 3, 32, 32), stage=-1).raw.shape[-2:] == (1, 1)
    assert gradcam(model, torch.randn(1, 3, 32, 32), method="cam").stage == 3


@pytest.mark.parametrize("method", ["gradcam", "cam"])
@pytest.mark.parametrize("frozen", [False, True])
def test_leaves_nothing_behind(model, images, method, frozen):
    model.requires_grad_(not frozen)
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with torch.no_grad():
        before = model(images).logits
    found = gradcam(model, images, method=method)
    assert torch.is_grad_enabled()
    assert not any(tensor.requires_grad for tensor in (found.maps, found.raw, found.logits))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert not images.requires_grad
    with torch.no_grad():
        assert gradcam(model, images, method=method).raw.equal(found.raw)
        assert not torch.is_grad_enabled()
        assert model(images).logits.equal(before)
    with torch.inference_mode():
        assert torch.allclose(gradcam(model, images.clone(), method=method).raw, found.raw, rtol=1e-4, atol=1e-6)


def test_hooks_are_gone_after_an_error(poolformer_config, images):
    model = PoolFormerForImageClassification(poolformer_config).eval()
    with pytest.raises(ValueError, match="pixel_values must be"):
        gradcam(model, images[:, :2])
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_low_precision_and_wrapped_models(model, images):
    expected = gradcam(model, images, 3)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["conv1"], modules_to_save=["classifier"])
    ).eval()
    torch.testing.assert_close(gradcam(adapted, images, 3).raw, expected.raw, rtol=1e-4, atol=1e-6)
    assert gradcam(adapted, images, 3, method="cam").raw.shape == (3, 1, 2, 3)
    coarse = gradcam(adapted.unload().bfloat16(), images, 3)
    assert coarse.maps.dtype == torch.float32
    # bfloat16 keeps three digits.
    torch.testing.assert_close(coarse.raw, expected.raw, rtol=0.1, atol=0.1 * expected.raw.abs().max().item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": 10}, r"0\.\.9"),
        ({"targets": -1}, r"0\.\.9"),
        ({"targets": [0.5]}, "numbers of classes"),
        ({"targets": "cat"}, "numbers of classes"),
        ({"targets": []}, "numbers of classes"),
        ({"targets": [[1], [2]]}, "do not fit 3 images"),
        ({"targets": [[1], [2, 3], [4]]}, "as many for each image"),
        ({"stage": 4}, "numbered from 0"),
        ({"stage": -5}, "numbered from 0"),
        ({"method": "cam", "stage": 0}, "last stage only"),
        ({"method": "scorecam"}, "gradcam or cam"),
    ],
)
def test_refused_in_words(model, images, options, message):
    with pytest.raises(UserError, match=message):
        gradcam(model, images, **options)


def test_refuses_what_is_no_classifier(poolformer_config, images):
    with pytest.raises(UserError, match=r"PoolFormerForSemanticSegmentation is not an image classifier"):
        gradcam(PoolFormerForSemanticSegmentation(poolformer_config).eval(), images)
    with pytest.raises(UserError, match="num_labels is 0"):
        gradcam(PoolFormerForImageClassification(PoolFormerConfig(depths=(1, 1, 1, 1), num_labels=0)).eval(), images)
    with pytest.raises(UserError, match=r"model\.eval\(\)"):
        gradcam(PoolFormerForImageClassification(poolformer_config).train(), images)


@pytest.mark.slow
def test_importing_the_package_imports_no_explanation(run_python):
    assert "gradcam" in dir(hf_poolformer)
    code = "import sys, hf_poolformer; print('hf_poolformer.explanation' in sys.modules, 'matplotlib' in sys.modules)"
    assert run_python(code).stdout.split() == ["False", "False"]
