"""The model with kernels against the model without: same parameters, same function, same gradients."""

import collections
import copy
from functools import partial

import pytest
import torch

from hf_poolformer import MetaFormerConfig, MetaFormerForImageClassification, kernels
from hf_poolformer.kernels import (  # noqa: F401 which tests watch
    channel_mlp,
    inference,
    mlp_forward,
    pool_mixer,
    separable_conv,
    training,
)


TINY = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 8, 16, 16), "num_labels": 3, "mlp_ratio": 2}
V2 = {
    "norm_bias": False,
    "norm_eps": 1e-6,
    "use_bias": False,
    "use_layer_scale": False,
    "hidden_act": "star_relu",
    "res_scale_init_values": (None, None, 1.0, 1.0),
}
CHANNEL_NORM = {**V2, "norm_layer": "layer_norm", "attention_head_dim": 8}
FAMILIES = {
    "v1": {},
    "v2": V2,
    "other": {"pool_size": 5, "hidden_act": "silu"},
    "convformer": {**CHANNEL_NORM, "token_mixers": ("separable_conv",) * 4},
    "caformer": {**CHANNEL_NORM, "token_mixers": ("separable_conv",) * 2 + ("attention",) * 2},
    "identityformer": {**CHANNEL_NORM, "token_mixers": ("identity",) * 4},
}


def count_calls(patch) -> collections.Counter:
    """From now on, how often blocks call each operation."""
    calls = collections.Counter()
    for module in (kernels.pool_mixer, kernels.separable_conv, kernels.channel_mlp):
        name = module.__name__.rpartition(".")[2]
        original = getattr(module, name)
        counted = partial(lambda original, name, *args: calls.update([name]) or original(*args), original, name)
        patch.setattr(module, name, counted)
    # Of a stage that is one node of autograd.
    for name, operation in kernels.training.OPERATIONS.items():
        counted = partial(
            lambda original, name, *args: calls.update([name]) or original(*args), operation.forward, name
        )
        patch.setitem(kernels.training.OPERATIONS, name, operation._replace(forward=counted))
    return calls


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(values, id=name, marks=[pytest.mark.slow] * (name in ("other", "convformer", "v2")))
        for name, values in FAMILIES.items()
    ],
)
def test_the_model_is_the_same_function(settings, device, scramble, relative_error, monkeypatch):
    model = scramble(MetaFormerForImageClassification(MetaFormerConfig(**TINY, **settings))).to(device)
    fused = copy.deepcopy(model)
    pixel_values, labels = torch.randn(2, 3, 28, 20, device=device), torch.tensor([0, 2], device=device)
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "reference")
    wanted = model(pixel_values, labels=labels)
    wanted.loss.backward()

    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "triton")
    calls = count_calls(monkeypatch)
    got = fused(pixel_values, labels=labels)
    got.loss.backward()
    mixers = settings.get("token_mixers", ("pooling",) * 4)
    assert calls["channel_mlp"] == 4
    assert calls["pool_mixer"] == mixers.count("pooling") and calls["separable_conv"] == mixers.count("separable_conv")
    # float32: the folded norm multiplies in another order, four blocks deep.
    assert relative_error(got.logits, wanted.logits) < 2e-5
    for (name, parameter), other in zip(model.named_parameters(), fused.parameters(), strict=True):
        if name.endswith("before_norm.bias") and "token_mixers" not in settings:
            # Cancels in the mixer: rounding errors there, here zero, for which DistributedDataParallel waits.
            assert other.grad.shape == other.shape and other.grad.count_nonzero() == 0
        else:
            # The gradient of a scalar of StarReLU is a sum over everything, whose terms nearly cancel.
            assert relative_error(other.grad, parameter.grad) < (2e-3 if ".act" in name else 2e-4), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["v1", "v2", "convformer", "caformer"])
def test_inference_is_the_same_function(family, dtype, device, scramble, relative_error, monkeypatch):
    """Whole stages, in which branches hand on what they know of their results."""
    settings = {**TINY, **FAMILIES[family], "depths": (1, 2, 1, 2), "hidden_sizes": (8, 16, 24, 24)}
    model = scramble(MetaFormerForImageClassification(MetaFormerConfig(**settings))).to(device).eval()
    pixel_values, found = torch.randn(2, 3, 28, 20, device=device), []
    infer = kernels.inference.infer
    monkeypatch.setattr(kernels.inference, "infer", lambda *args: found.append(len(args[2])) or infer(*args))
    monkeypatch.setattr(kernels.mlp_forward, "WHOLE_CHANNELS", 16)
    with torch.no_grad():
        monkeypatch.setenv("HF_POOLFORMER_KERNELS", "reference")
        wanted = model(pixel_values).logits
        monkeypatch.setenv("HF_POOLFORMER_KERNELS", "triton")
        got = model.to(dtype)(pixel_values.to(dtype)).logits
    assert found == [2, 4, 2, 4]
    # bfloat16: as in conftest.py for a branch, a dozen of them deep.
    assert relative_error(got, wanted) < {torch.float32: 2e-5, torch.bfloat16: 6e-2}[dtype]


def test_blocks_that_are_not_plain_keep_their_modules(device, monkeypatch):
    monkeypatch.delenv("HF_POOLFORMER_KERNELS", raising=False)

    def block(**settings):
        model = MetaFormerForImageClassification(MetaFormerConfig(**{**TINY, **settings, "kernels": "triton"}))
        return model.metaformer.encoder.block[0][0].to(device)

    def branches(block):
        """Which branches of a block on its own kernels compute."""
        with monkeypatch.context() as patch:
            calls = count_calls(patch)
            block(torch.randn(1, 8, 2, 2, device=device))
        return "pool_mixer" in calls, "channel_mlp" in calls

    assert branches(block()) == (True, True)
    for other, fused in (
        ({"norm_layer": "layer_norm"}, (False, True)),
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


def test_statistics_of_samples_do_not_serve_a_norm_over_channels(device, scramble, relative_error, monkeypatch):
    """A mixer hands its result's statistics on to an MLP that has the same norm, and to no other."""
    model = scramble(MetaFormerForImageClassification(MetaFormerConfig(**TINY))).to(device)
    block = model.metaformer.encoder.block[0][0]
    other = MetaFormerForImageClassification(MetaFormerConfig(**TINY, norm_layer="layer_norm"))
    block.after_norm = scramble(other.metaformer.encoder.block[0][0].after_norm).to(device)
    x = torch.randn(2, 8, 5, 3, device=device)
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "reference")
    wanted = block(x)
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "triton")
    assert relative_error(block(x), wanted) < 2e-6


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_frozen_body_keeps_nothing_for_backward(rate, device, scramble, relative_error, monkeypatch):
    """As in linear probing: only the head learns."""
    model = (
        scramble(MetaFormerForImageClassification(MetaFormerConfig(**TINY, drop_path_rate=rate))).to(device).train()
    )
    model.metaformer.requires_grad_(False)
    pixel_values, labels = torch.randn(2, 3, 28, 20, device=device), torch.tensor([0, 2], device=device)
    found, kept = [], []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("HF_POOLFORMER_KERNELS", backend)
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
            model.zero_grad()
            output = model(pixel_values, labels=labels)
            output.loss.backward()
        assert max(each.numel() for each in kept) <= model.classifier.weight.numel()
        found.append((output.logits, model.classifier.weight.grad.clone()))
    for got, wanted in zip(*found[::-1], strict=True):
        assert relative_error(got, wanted) < 2e-5
