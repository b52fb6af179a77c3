"""Blocks of attention and of other mixers that run as modules, between kernels for the norm and for the shortcut."""

import collections
import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_poolformer import MetaFormerConfig, MetaFormerModel
from hf_poolformer.kernels import inference, statistics, token_norm


SHAPE = {
    "num_encoder_blocks": 2,
    "depths": (1, 1),
    "hidden_sizes": (8, 16),
    "token_mixers": ("identity", "attention"),
    "position_embeddings": (False, False),
    "res_scale_init_values": (None, 1.0),
    "attention_head_dim": 8,
    "mlp_ratio": 1,
    "norm_layer": "layer_norm",
    "embedding_norm": "layer_norm",
    "norm_eps": 1e-6,
    "use_layer_scale": False,
    "hidden_act": "star_relu",
}
PLAIN = {"norm_bias": False, "use_bias": False}
# As in test_changed_models.py.
CLOSE, CLOSE_GRADIENTS, CHANGED = 1e-5, 3e-4, 3e-5


@pytest.fixture
def make(device, scramble):
    def run(**settings):
        return scramble(MetaFormerModel(MetaFormerConfig(**{**SHAPE, **PLAIN, **settings}))).to(device)

    return run


@pytest.fixture
def pixel_values(device):
    return torch.randn(2, 3, 16, 12, device=device)


@pytest.fixture
def launched(monkeypatch):
    """How often a kernel normalised, and added to a shortcut; and how often tokens were read for their statistics."""
    calls = collections.Counter()
    for module, name in (
        (token_norm, "normalise"),
        (token_norm, "add_to_shortcut"),
        (inference, "normalise"),
        (inference, "add_to_shortcut"),
        (token_norm, "normalise_backward"),
        (statistics, "whole_rows"),
    ):
        original = getattr(module, name)

        def counted(*args, name=name, original=original, **settings):
            calls[name] += 1
            return original(*args, **settings)

        monkeypatch.setattr(module, name, counted)
    return calls


@pytest.fixture
def outcome(monkeypatch):
    """Features of a model and the gradients of all that is trained."""

    def run(model, pixel_values, kernels, autocast=None):
        monkeypatch.setenv("HF_POOLFORMER_KERNELS", kernels)
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast(pixel_values.device.type, autocast, enabled=autocast is not None):
            features = model(pixel_values).last_hidden_state
        (features * torch.linspace(-1, 1, features.numel(), device=features.device).view_as(features)).sum().backward()
        return features.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    return run


@pytest.fixture
def agree(outcome, relative_error):
    def run(model, pixel_values):
        wanted, gradients = outcome(model, pixel_values, "reference")
        got, others = outcome(model, pixel_values, "triton")
        assert got.dtype == wanted.dtype and relative_error(got, wanted) < CLOSE
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            # A scalar of StarReLU sums over everything, much of which cancels.
            assert relative_error(others[name], gradient) < CLOSE_GRADIENTS * (10 if ".act" in name else 1), name

    return run


@pytest.mark.parametrize("settings", [{}, {"norm_bias": True, "use_bias": True, "use_layer_scale": True}])
def test_every_norm_and_shortcut(settings, make, pixel_values, launched, agree):
    agree(make(**settings), pixel_values)
    # Two of embeddings, two of blocks, whose MLPs have the statistics of what was added.
    assert launched == {"normalise": 4, "add_to_shortcut": 2, "normalise_backward": 4}


def test_dropped_samples(make, pixel_values, launched, agree):
    model = make(drop_path_rate=0.5).train()
    agree(model, torch.cat([pixel_values] * 2))
    assert launched["add_to_shortcut"] == 2


def test_inference_computes_the_same(make, pixel_values, launched, outcome):
    model = make()
    features, _ = outcome(model, pixel_values, "triton")
    launched.clear()
    with torch.no_grad():
        assert torch.equal(model(pixel_values).last_hidden_state, features)
    assert launched == {"normalise": 4, "add_to_shortcut": 2}


@pytest.mark.parametrize("residual_scale", [1.0, None])
def test_autocast(residual_scale, make, pixel_values, launched, monkeypatch, relative_error, outcome):
    model = make(res_scale_init_values=(residual_scale,) * 2)
    wanted, gradients = outcome(model, pixel_values, "reference")
    dtypes, original = [], token_norm.normalise
    monkeypatch.setattr(token_norm, "normalise", lambda *args: dtypes.append(args[4]) or original(*args))
    features, others = outcome(model, pixel_values, "triton", torch.bfloat16)
    # bfloat16 rounds to 2^-8, the interpreter cuts off; two blocks deep.
    assert features.dtype == torch.float32 and relative_error(features, wanted) < 6e-2
    for name, gradient in gradients.items():
        assert others[name].dtype == torch.float32
        # The activation's two numbers are sums whose terms cancel: of these, half precision leaves the size only.
        tolerance = 4.0 if ".act" in name else 0.15
        assert relative_error(others[name], gradient) < tolerance, name
    # Products read what was rounded for them; else it is PyTorch's float32.
    stem, identity, downsampling, *attention = dtypes
    assert stem == identity == torch.float32 and {downsampling, *attention} == {torch.bfloat16}


def test_an_input_of_another_memory_format(make, pixel_values, monkeypatch):
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "triton")
    block = make().encoder.block[1][0]
    x = torch.randn(2, 16, 3, 4, device=pixel_values.device)
    with torch.no_grad():
        torch.testing.assert_close(block(x), block(x.contiguous(memory_format=torch.channels_last)), rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, make, pixel_values, outcome):
    """Of blocks, and of the embeddings, as wrappers do it."""
    model = make()
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for embedding in again.encoder.patch_embeddings:
        embedding.forward = partial(checkpoint, embedding.forward, use_reentrant=use_reentrant)
    x = pixel_values.requires_grad_()
    wanted, gradients = outcome(model.train(), x, "triton")
    got, others = outcome(again.train(), x, "triton")
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    torch.testing.assert_close(others, gradients, rtol=0, atol=0)


def test_in_training_compiled_functions_leave_it_to_the_compiler(
    make, pixel_values, launched, monkeypatch, relative_error
):
    """Without gradients a stage is one operation of the graph, within which these kernels are launched."""
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "triton")
    model = make()
    wanted = model(pixel_values).last_hidden_state
    launched.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(pixel_values).last_hidden_state, wanted) < CLOSE
    assert not launched["normalise"] and not launched["add_to_shortcut"]


def test_no_kernel_where_none_is_wanted(make, pixel_values, launched, outcome):
    outcome(make(), pixel_values, "reference")
    outcome(make(norm_layer="group_norm", embedding_norm="none"), pixel_values, "triton")
    assert not launched["normalise"] and not launched["add_to_shortcut"]


def hooked(module):
    module.register_forward_hook(lambda module, args, output: 2 * output)
    return module


def own_forward(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)
    return module


def subclass(module):
    kind = type(module)
    module.__class__ = type("Mine", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    return module


def attributes(**values):
    def run(module):
        for name, value in values.items():
            setattr(module, name, value)
        return module

    return run


class Mean(nn.Module):
    """A mixer whose result is broadcast."""

    def forward(self, x):
        return x.mean((2, 3), keepdim=True)


class Through(nn.Module):
    """A mixer that computes in another precision."""

    def forward(self, x):
        return 2 * x.double()


# Place in the encoder -> change -> how many shortcuts and norms kernels then still compute, of 2 and 4.
CHANGES = {
    "block.1.0.before_norm": {"hook": (1, 3), "of torch": (1, 3), "identity": (1, 3), "eps": (2, 4), "bias": (2, 4)},
    "block.1.0.token_mixer": {"own forward": (2, 4), "mean": (1, 4), "convolution": (2, 4)},
    "block.1.0.token_mixer.qkv": {"subclass": (2, 4)},
    "block.1.0.drop_path": {"subclass": (1, 3)},
    "block.1.0": {"hook": (2, 4), "merge": (1, 3), "no shortcut": (1, 3), "scale of one number": (1, 3)},
    "patch_embeddings.1.pre_norm": {"hook": (2, 3), "own forward": (2, 3), "of torch": (2, 3), "eps": (2, 4)},
    "patch_embeddings.0.post_norm": {"subclass": (2, 3), "bias": (2, 4)},
    "patch_embeddings.1.projection": {"hook": (2, 4)},
}
HOW = {
    "hook": hooked,
    "own forward": own_forward,
    "subclass": subclass,
    "of torch": lambda norm: nn.GroupNorm(2, norm.normalized_shape[0]),
    "identity": lambda norm: nn.Identity(),
    "eps": attributes(eps=0.5),
    "bias": lambda norm: attributes(bias=nn.Parameter(torch.linspace(-1, 1, norm.normalized_shape[0])))(norm),
    "mean": lambda mixer: Mean(),
    "convolution": lambda mixer: nn.Conv2d(16, 16, 3, padding=1),
    "merge": attributes(merge=lambda shortcut, branch, *scales: shortcut - branch),
    "no shortcut": attributes(use_residual=False),
    "scale of one number": attributes(res_scale_1=nn.Parameter(torch.tensor([0.3]))),
}
CASES = [(place, name) for place, changes in CHANGES.items() for name in changes]


@pytest.mark.parametrize("place, name", CASES, ids=[f"{place}: {name}" for place, name in CASES])
def test_a_changed_part(place, name, make, pixel_values, device, launched, monkeypatch, relative_error):
    model = make()

    def features(kernels):
        monkeypatch.setenv("HF_POOLFORMER_KERNELS", kernels)
        with torch.no_grad():
            return model(pixel_values).last_hidden_state

    before = features("reference")
    model.encoder.set_submodule(place, HOW[name](model.encoder.get_submodule(place)).to(device))
    after = features("reference")
    assert relative_error(after, before) > CHANGED, "a change that changes nothing"
    assert relative_error(features("triton"), after) < CLOSE
    assert (launched["add_to_shortcut"], launched["normalise"]) == CHANGES[place][name]


def test_gradients_around_a_mixer_whose_result_is_broadcast(make, pixel_values, agree):
    """Its norm is the kernel's, the addition PyTorch's."""
    model = make()
    model.encoder.block[1][0].token_mixer = Mean()
    agree(model, pixel_values)


def test_a_mixer_in_another_precision(make, device, monkeypatch):
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "triton")
    block = make(use_mlp=False).encoder.block[1][0]
    block.token_mixer = Through()
    x = torch.randn(2, 16, 3, 4, device=device)
    with torch.no_grad():
        result = block(x)
        torch.testing.assert_close(result, block.mix_tokens(x), rtol=1e-5, atol=1e-5)
    assert result.dtype == torch.float64


def test_a_model_under_torch_func_takes_plain_modules(make, pixel_values, launched, monkeypatch):
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "triton")
    model = make()
    embedding = model.encoder.patch_embeddings[0]
    with torch.no_grad():
        each = torch.func.vmap(lambda image: embedding(image[None])[0])(pixel_values)
        assert not launched["normalise"]
        torch.testing.assert_close(each, embedding(pixel_values), rtol=1e-4, atol=1e-5)
    assert launched["normalise"] == 1
