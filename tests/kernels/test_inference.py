"""Inference on the CPU of the second paper's families: whole stages of all mixers, and what somebody changed."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from hf_poolformer import MetaFormerConfig, MetaFormerForImageClassification, fused_operations, ops
from hf_poolformer.kernels import cpu
from hf_poolformer.modeling_poolformer import MetaFormerBlock
from hf_poolformer.token_mixers import Attention, StarReLU


pytestmark = pytest.mark.skipif(not cpu.has_onednn(torch.float32), reason="PyTorch was built without oneDNN")

SHAPE = {"depths": (2, 1, 2, 1), "hidden_sizes": (8, 16, 32, 64), "num_labels": 3, "image_size": 64}
FAMILIES = ("caformer_s18", "convformer_s18", "identityformer_s12", "randformer_s12", "poolformerv2_s12")
# Relative, of logits: oneDNN sums in another order, and the lower precisions round every activation once.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
DTYPES = [dtype for dtype in TOLERANCE if cpu.has_onednn(dtype)]
BLOCK_SIZES = {"one block": cpu.FORWARD_BLOCK, "sample by sample": 1}


@pytest.fixture(params=BLOCK_SIZES.values(), ids=BLOCK_SIZES)
def block_size(request, monkeypatch):
    monkeypatch.setattr(cpu, "FORWARD_BLOCK", request.param)


@pytest.fixture
def make(scramble):
    def run(variant, **settings):
        return scramble(MetaFormerForImageClassification(MetaFormerConfig.from_variant(variant, **SHAPE, **settings)))

    return run


@pytest.fixture
def inferred(monkeypatch):
    """Names of the classes of the branches that were computed, in the order of their computation."""
    names, infer = [], cpu.infer

    def noted(x, branches):
        names.extend(type(branch).__name__ for branch in branches)
        return infer(x, branches)

    monkeypatch.setattr(cpu, "infer", noted)
    return names


@pytest.fixture
def agree(monkeypatch, relative_error):
    """Logits by doing nothing against those of plain PyTorch, which it returns."""

    def run(model, x, bound=TOLERANCE[torch.float32]):
        with torch.no_grad():
            monkeypatch.setenv("HF_POOLFORMER_KERNELS", "reference")
            wanted = model(x).logits
            monkeypatch.delenv("HF_POOLFORMER_KERNELS")
            got = model(x).logits
        assert got.dtype == wanted.dtype
        assert relative_error(got, wanted) < bound
        return wanted

    return run


# --- branches, against float64 ---------------------------------------------------------------------------------------


def vectors(sizes, dtype):
    values = {name: 0.3 * torch.randn(size) for name, size in sizes.items()}
    for name in ("norm_weight", "res_scale", "act_scale"):
        if name in values:
            values[name] += 1
    return {name: value.to(dtype) for name, value in values.items()}


def check_branch(operation, shape, sizes, dtype, relative_error, **settings):
    x = (2 * torch.randn(shape) + 3).to(dtype)
    parameters = vectors(sizes, dtype)
    everything = {
        "separable_conv": ("norm_weight", "act_scale", "act_bias", "layer_scale", "res_scale"),
        "channel_mlp": (
            "norm_weight",
            "norm_bias",
            "bias1",
            "bias2",
            "act_scale",
            "act_bias",
            "layer_scale",
            "res_scale",
        ),
    }[operation]
    missing = dict.fromkeys(set(everything) - parameters.keys())
    with torch.no_grad():
        y = fused_operations.infer_branches(
            torch.nn.Identity(), x, [(operation, {**parameters, **missing, **settings})], "cpu"
        )
        exact = {name: value.double() for name, value in parameters.items()}
        wanted = getattr(ops, operation)(x.double(), **exact, **settings)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    # As in conftest.py, for one branch.
    assert relative_error(y, wanted) < {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [(), ("norm_weight", "act_scale", "act_bias", "res_scale"), ("layer_scale",)])
@pytest.mark.parametrize("shape, size", [((3, 20, 7, 5), 7), ((2, 17, 1, 1), 7), ((1, 6, 5, 3), 3)])
def test_the_separable_branch(shape, size, names, dtype, block_size, poisoned, relative_error):
    channels, inner = shape[1], 2 * shape[1] + 1
    sizes = {"weight1": (inner, channels, 1, 1), "depthwise_weight": (inner, 1, size, size)}
    sizes |= {"weight2": (channels, inner, 1, 1)}
    sizes |= {name: (1,) if name.startswith("act") else (channels,) for name in names}
    check_branch("separable_conv", shape, sizes, dtype, relative_error, eps=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["channel", "group"])
@pytest.mark.parametrize(
    "names, activation",
    [
        ((), "gelu"),
        (("norm_weight", "act_scale", "act_bias", "res_scale"), "star_relu"),
        (("norm_weight", "norm_bias", "bias1", "bias2", "act_scale", "act_bias", "layer_scale"), "star_relu"),
        (("bias2", "layer_scale"), "squared_relu"),
    ],
)
def test_the_mlp_branch(names, activation, norm, dtype, block_size, poisoned, relative_error):
    sizes = {"weight1": (43, 20, 1, 1), "weight2": (20, 43, 1, 1)}
    sizes |= {name: (1,) if name.startswith("act") else (43,) if name == "bias1" else (20,) for name in names}
    settings = {"activation": activation, "norm": norm, "eps": 1e-6}
    check_branch("channel_mlp", (3, 20, 7, 5), sizes, dtype, relative_error, **settings)


# --- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", FAMILIES)
def test_every_family_infers_whole_stages(variant, dtype, make, agree, inferred, block_size, poisoned):
    model = make(variant).to(dtype)
    agree(model, torch.randn(3, 3, 64, 64, dtype=dtype), TOLERANCE[dtype])
    mixers = {"separable_conv": "SeparableConv", "attention": "Attention", "pooling": "Pooling"}
    stages = zip(SHAPE["depths"], model.config.token_mixers, strict=True)
    assert inferred == [name for depth, mixer in stages for name in [mixers.get(mixer, "Mixing"), "MLP"] * depth]


@pytest.mark.parametrize("variant", FAMILIES)
def test_one_image_and_odd_sizes(variant, make, agree):
    model = make(variant)
    sizes = [(64, 64)] if variant.startswith("randformer") else [(64, 64), (33, 47), (32, 100)]
    for size in sizes:
        agree(model, torch.randn(1, 3, *size))
        agree(model.to(memory_format=torch.channels_last), torch.randn(2, 3, *size))
    if variant.startswith("randformer"):
        with torch.no_grad(), pytest.raises(ValueError, match="mixes exactly"):
            model(torch.randn(1, 3, 32, 128))


@pytest.mark.skipif(not cpu.has_onednn(torch.bfloat16), reason="this CPU has no bfloat16")
@pytest.mark.parametrize("variant", FAMILIES)
def test_autocast(variant, make, agree, block_size):
    with torch.autocast("cpu", torch.bfloat16):
        agree(make(variant), torch.randn(3, 3, 64, 64), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    "settings", [{"layer_scale_init_value": 1.0}, {"norm_bias": True, "use_bias": True}, {"use_mlp": False}]
)
def test_other_configurations(settings, make, agree, inferred):
    if "layer_scale_init_value" in settings:
        settings = {**settings, "use_layer_scale": True}
    agree(make("caformer_s18", **settings), torch.randn(2, 3, 64, 64))
    assert "Attention" in inferred


def test_training_is_plain_pytorch(make, inferred):
    model, x = make("caformer_s18").train(), torch.randn(2, 3, 64, 64)
    model(x, labels=torch.tensor([0, 1])).loss.backward()
    assert not inferred
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_are_read_anew_in_every_call(make, agree):
    """Also where nothing tells that they changed."""
    model, x = make("caformer_s18"), torch.randn(2, 3, 64, 64)
    before = agree(model, x)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    assert not torch.allclose(agree(model, x), before, rtol=1e-3)


def test_the_input_of_a_stage_is_left_alone(make):
    """Residuals are added in place, but not in what the caller holds."""
    model = make("caformer_s18")
    model.config.kernels = "cpu"
    for stage, shape in zip(
        model.metaformer.encoder.block, ((2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)), strict=False
    ):
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        before = x.clone()
        with torch.no_grad():
            for block in stage:
                block(x)
        assert torch.equal(x, before)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_computed_as_the_configuration_says(attention, make, agree, inferred):
    model, x = make("caformer_s18"), torch.randn(2, 3, 64, 64)
    model.set_attn_implementation(attention)
    agree(model, x)
    assert ("Attention" in inferred) == (attention == "sdpa")
    with torch.no_grad():
        attentions = model(x, output_attentions=True).attentions
    assert len(attentions or ()) == (3 if attention == "eager" else 0)


# --- what somebody changed -------------------------------------------------------------------------------------------


class Adapter(nn.Linear):
    """As adapters of low rank do it: a subclass whose forward adds to the layer's."""

    def forward(self, x):
        return super().forward(x) + x @ self.weight.t()


def adapted(layer):
    layer.__class__ = Adapter
    return layer


def hooked(module):
    module.register_forward_hook(lambda module, args, output: 2 * output)
    return module


def own_forward(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)
    return module


def attributes(**values):
    def run(module):
        for name, value in values.items():
            setattr(module, name, value)
        return module

    return run


class Twice(StarReLU):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


# Place in the first block of a stage -> changes, each of which gives another function.
SEPARABLE = {
    "before_norm": {
        "hook": hooked,
        "of torch, over a group": lambda norm: nn.GroupNorm(2, 8),
        "identity": lambda norm: nn.Identity(),
        "eps": attributes(eps=0.5),
        "bias": attributes(bias=nn.Parameter(torch.linspace(-1, 1, 8))),
    },
    "token_mixer": {"hook": hooked, "own forward": own_forward},
    "token_mixer.pwconv1": {"hook": hooked, "bias": lambda conv: nn.Conv2d(8, 16, 1)},
    "token_mixer.act": {
        "hook": hooked,
        "another": lambda act: nn.GELU(),
        "subclass": lambda act: Twice(),
        "per channel": attributes(scale=nn.Parameter(torch.linspace(0.5, 1.5, 16)[:, None, None])),
    },
    "token_mixer.dwconv": {
        "hook": hooked,
        "own forward": own_forward,
        "dilated": attributes(dilation=(2, 2), padding=(6, 6)),
        "mirrored borders": lambda conv: nn.Conv2d(16, 16, 7, 1, 3, groups=16, bias=False, padding_mode="reflect"),
        "smaller": lambda conv: nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False),
        "bias": lambda conv: nn.Conv2d(16, 16, 7, 1, 3, groups=16),
        "in pairs": lambda conv: nn.Conv2d(16, 16, 7, 1, 3, groups=8, bias=False),
        "weight norm": lambda conv: parametrizations.weight_norm(nn.Conv2d(16, 16, 7, 1, 3, groups=16, bias=False)),
    },
    "token_mixer.pwconv2": {"hook": hooked, "3x3": lambda conv: nn.Conv2d(16, 8, 3, 1, 1)},
}
ATTENTION = {
    "token_mixer": {"hook": hooked, "attends in its own way": attributes(attend=lambda q, k, v: v.transpose(1, 2))},
    "token_mixer.qkv": {"hook": hooked, "adapter": adapted, "bias": lambda layer: nn.Linear(32, 96)},
    "token_mixer.proj": {"own forward": own_forward, "bias": lambda layer: nn.Linear(32, 32)},
    "before_norm": {"identity": lambda norm: nn.Identity()},
    "after_norm": {
        "identity": lambda norm: nn.Identity(),
        "over all": lambda norm: nn.GroupNorm(1, 32),
        "hook": hooked,
    },
}
CASES = [
    (stage, place, name)
    for stage, changes in ((0, SEPARABLE), (2, ATTENTION))
    for place in changes
    for name in changes[place]
]


@pytest.mark.parametrize("stage, place, name", CASES, ids=[f"{place}: {name}" for _, place, name in CASES])
def test_a_changed_part(stage, place, name, make, agree, relative_error):
    model, x = make("caformer_s18"), torch.randn(2, 3, 64, 64)
    before = agree(model, x)
    block = model.metaformer.encoder.block[stage][0]
    block.set_submodule(place, (SEPARABLE, ATTENTION)[stage > 0][place][name](block.get_submodule(place)))
    after = agree(model, x)
    assert relative_error(after, before) > 1e-4, "the change has an effect, and it was seen"


def test_all_but_the_changed_branch_is_fused(make, agree, inferred):
    model = make("caformer_s18")
    hooked(model.metaformer.encoder.block[2][0].token_mixer.qkv)
    agree(model, torch.randn(2, 3, 64, 64))
    assert inferred == ["SeparableConv", "MLP"] * 3 + ["MLP"] + ["Attention", "MLP"] * 2


@pytest.mark.parametrize(
    ("owner", "method", "change"),
    [
        (Attention, "attend", lambda original: lambda self, *args: 2 * original(self, *args)),
        (MetaFormerBlock, "merge", lambda original: lambda self, *args: 2 * original(self, *args)),
        (nn.Conv2d, "_conv_forward", lambda original: lambda self, *args: 2 * original(self, *args)),
    ],
    ids=["attend", "merge", "_conv_forward"],
)
def test_a_method_that_was_replaced_on_its_class(owner, method, change, make, agree, monkeypatch, relative_error):
    model, x = make("caformer_s18"), torch.randn(2, 3, 64, 64)
    before = agree(model, x)
    monkeypatch.setattr(owner, method, change(getattr(owner, method)))
    assert relative_error(agree(model, x), before) > 1e-3, "the change does something"
