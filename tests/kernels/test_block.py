"""The model with kernels against the model without: same parameters, same function, same gradients."""

import copy
from functools import partial

import pytest
import torch

from hf_poolformer import MetaFormerConfig, MetaFormerForImageClassification


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
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "reference")
    wanted = model(pixel_values, labels=labels)
    wanted.loss.backward()

    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "triton")
    calls = []
    original = torch.ops.hf_poolformer.channel_mlp
    monkeypatch.setattr(torch.ops.hf_poolformer, "channel_mlp", lambda *args: calls.append(1) or original(*args))
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


def test_blocks_that_are_not_plain_keep_their_modules(device, monkeypatch):
    monkeypatch.delenv("HF_POOLFORMER_KERNELS", raising=False)

    def block(**settings):
        model = MetaFormerForImageClassification(MetaFormerConfig(**{**TINY, **settings, "kernels": "triton"}))
        return model.metaformer.encoder.block[0][0].to(device)

    def branches(block):
        """Which branches of a block on its own kernels compute."""
        calls = []
        with monkeypatch.context() as patch:
            for name in ("pool_mixer", "channel_mlp"):
                original = getattr(torch.ops.hf_poolformer, name)
                counted = partial(lambda original, name, *args: calls.append(name) or original(*args), original, name)
                patch.setattr(torch.ops.hf_poolformer, name, counted)
            block(torch.randn(1, 8, 2, 2, device=device))
        return "pool_mixer" in calls, "channel_mlp" in calls

    assert branches(block()) == (True, True)
    for other, fused in (
        ({"norm_layer": "layer_norm"}, (False, False)),
        ({"token_mixers": ("identity",) * 4}, (False, True)),
        ({"use_residual": False}, (False, False)),
        ({"use_mlp": False}, (True, False)),
        ({"hidden_act": "gelu_new"}, (True, False)),
    ):
        assert branches(block(**other)) == fused, other
    hooked = block()
    hooked.output.conv1.register_forward_hook(lambda *_: None)
    assert branches(hooked) == (True, False)
    adapted = block()
    adapted.output.conv2 = torch.nn.Sequential(adapted.output.conv2)
    assert branches(adapted) == (True, False)
