"""The model with kernels against the model without: same parameters, same function, same gradients."""

import copy

import pytest
import torch

from hf_poolformer import MetaFormerConfig, MetaFormerForImageClassification
from hf_poolformer.modeling_poolformer import MetaFormerBlock


TINY = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 8, 16, 16), "num_labels": 3, "mlp_ratio": 2}
V2 = {
    "norm_bias": False,
    "norm_eps": 1e-6,
    "use_bias": False,
    "use_layer_scale": False,
    "hidden_act": "star_relu",
    "res_scale_init_values": (None, None, 1.0, 1.0),
}


@pytest.mark.parametrize("settings", [{}, V2, {"pool_size": 5, "hidden_act": "silu"}], ids=["v1", "v2", "other"])
def test_the_model_is_the_same_function(settings, device, scramble, relative_error, monkeypatch):
    model = scramble(MetaFormerForImageClassification(MetaFormerConfig(**TINY, **settings))).to(device)
    fused = copy.deepcopy(model)
    pixel_values, labels = torch.randn(2, 3, 36, 28, device=device), torch.tensor([0, 2], device=device)
    wanted = model(pixel_values, labels=labels)
    wanted.loss.backward()

    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "triton")
    calls = []
    original = MetaFormerBlock.fused_forward
    monkeypatch.setattr(MetaFormerBlock, "fused_forward", lambda *args: calls.append(1) or original(*args))
    got = fused(pixel_values, labels=labels)
    got.loss.backward()
    assert len(calls) == 4
    # float32: the folded norm multiplies in another order, four blocks deep.
    assert relative_error(got.logits, wanted.logits) < 2e-5
    for (name, parameter), other in zip(model.named_parameters(), fused.parameters(), strict=True):
        if name.endswith("before_norm.bias"):
            # Cancels in the mixer: exactly no gradient here, rounding errors there.
            assert other.grad is None or other.grad.abs().max() == 0
        else:
            assert relative_error(other.grad, parameter.grad) < 2e-4, name


def test_blocks_that_are_not_plain_keep_their_modules():
    def block(**settings):
        model = MetaFormerForImageClassification(MetaFormerConfig(**{**TINY, **settings}))
        return model.metaformer.encoder.block[0][0]

    assert block().is_fusible()
    for other in (
        {"norm_layer": "layer_norm"},
        {"token_mixers": ("identity",) * 4},
        {"use_residual": False},
        {"use_mlp": False},
        {"hidden_act": "gelu_new"},
    ):
        assert not block(**other).is_fusible(), other
    hooked = block()
    hooked.output.conv1.register_forward_hook(lambda *_: None)
    assert not hooked.is_fusible()
    adapted = block()
    adapted.output.conv2 = torch.nn.Sequential(adapted.output.conv2)
    assert not adapted.is_fusible()
