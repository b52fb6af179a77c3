"""A model that somebody changed computes what plain PyTorch makes of it: with and without gradients, on every path."""

import contextlib
import copy
import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from hf_poolformer import (
    TOKEN_MIXERS,
    MetaFormerConfig,
    MetaFormerForImageClassification,
    backends,
    fused_operations,
    ops,
)
from hf_poolformer.export.graph import fold
from hf_poolformer.modeling_poolformer import DropPath, MetaFormerBlock, MetaFormerGroupNorm, MetaFormerMLP
from hf_poolformer.token_mixers import Pooling, StarReLU


SHAPE = {
    "num_encoder_blocks": 2,
    "depths": (3, 1),
    "hidden_sizes": (8, 16),
    "token_mixers": ("pooling", "pooling"),
    "res_scale_init_values": (None, 1.0),
    "position_embeddings": (False, False),
    "layer_scale_init_value": 1.0,
    "mlp_ratio": 2,
    "num_labels": 3,
}
# HF_POOLFORMER_KERNELS, and whether gradients are wanted. The first is what one gets by doing nothing.
CPU = [("auto", False), ("auto", True), ("cpu", False), ("cpu", True)]
TRITON = [("triton", False), ("triton", True)]
# Triton's interpreter takes seconds for each.
PATHS = [pytest.param(CPU, id="cpu"), pytest.param(TRITON, id="triton", marks=pytest.mark.slow)]
# Relative, float32 over four blocks: the fused norm multiplies in another order. Gradients sum over all tokens.
# The smallest change, GELU by tanh in one of the blocks, moves logits by 5e-5.
CLOSE, CLOSE_GRADIENTS, CHANGED = 1e-5, 3e-4, 3e-5


class Doubled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 2 * self.module(x)


def subclass(module: nn.Module) -> nn.Module:
    """The same module as one of a subclass that gives twice as much."""
    kind = type(module)
    module.__class__ = type("Mine", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    return module


def own_forward(module: nn.Module) -> nn.Module:
    """The same module with a forward of its own, as offloading and `kernelize` put it there."""
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)
    return module


def with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: 2 * output)
    return module


def with_pre_hook(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return module


def with_backward_hook(module: nn.Module) -> nn.Module:
    module.register_full_backward_hook(lambda module, into, out: tuple(None if g is None else 2 * g for g in into))
    return module


def with_backward_pre_hook(module: nn.Module) -> nn.Module:
    module.register_full_backward_pre_hook(lambda module, out: tuple(2 * g for g in out))
    return module


def attribute(**values):
    """Sets attributes of a module, and leaves it in its place."""

    def run(module):
        for name, value in values.items():
            setattr(module, name, value)
        return module

    return run


def parametrized(name):
    def run(module):
        parametrize.register_parametrization(module, name, nn.Softplus())
        return module

    return run


def mixer(name):
    config = MetaFormerConfig(**{**SHAPE, "token_mixers": (name, name)}, image_size=32)
    return lambda _: TOKEN_MIXERS[name](config, 0)


def conv(inputs, outputs, size=1, **settings):
    return lambda _: nn.Conv2d(inputs, outputs, size, padding=size // 2, **settings)


def star_relu(**learned):
    act = StarReLU()
    for name, value in learned.items():
        setattr(act, name, nn.Parameter(value))
    return lambda _: act


VALUES = torch.linspace(-1.0, 1.5, 8)
ANYWHERE = {
    "subclass": subclass,
    "forward of its own": own_forward,
    "hook": with_hook,
    "pre-hook": with_pre_hook,
    "backward hook": with_backward_hook,
    "backward pre-hook": with_backward_pre_hook,
}
# Place in the first block ("" is the block) -> what is done there: the module comes back changed, or another does.
CHANGES = {
    "": ANYWHERE
    | {
        "no shortcut": attribute(use_residual=False),
        "no MLP": attribute(use_mlp=False),
        "other merge": attribute(merge=lambda shortcut, branch, *scales: shortcut - branch),
        "no layer scale": attribute(layer_scale_1=None),
        "no second layer scale": attribute(layer_scale_2=None),
        "layer scale of one number": attribute(layer_scale_2=nn.Parameter(torch.tensor([0.3]))),
        "other layer scale": attribute(layer_scale_1=nn.Parameter(VALUES.clone())),
        "residual scale": attribute(res_scale_1=nn.Parameter(VALUES.clone())),
        "residual scale of one number": attribute(res_scale_2=nn.Parameter(torch.tensor([0.3]))),
        "parametrized layer scale": parametrized("layer_scale_1"),
        "identity": lambda block: nn.Identity(),
        "sequence": lambda block: nn.Sequential(block, nn.Tanh()),
        "bare convolution": conv(8, 8, 3),
        "drop path in training mode only there": lambda block: block.drop_path.train() and block,
    },
    "drop_path": ANYWHERE
    | {
        "rate": lambda part: attribute(rate=0.5)(part).train(),
        "identity": lambda part: nn.Identity(),
        "scaling": Doubled,
    },
    "before_norm": ANYWHERE
    | {
        "four groups": attribute(num_groups=4),
        "eps": attribute(eps=0.5),
        "no weight": attribute(weight=None, bias=None),
        "no bias": attribute(bias=None),
        "of torch, two groups": lambda norm: nn.GroupNorm(2, 8),
        "identity": lambda norm: nn.Identity(),
        "instance norm": lambda norm: nn.InstanceNorm2d(8),
        "parametrized": parametrized("weight"),
    },
    "after_norm": ANYWHERE
    | {
        "two groups": attribute(num_groups=2),
        "eps": attribute(eps=0.5),
        "no weight": attribute(weight=None, bias=None),
        "no bias": attribute(bias=None),
        "of torch": lambda norm: nn.GroupNorm(1, 8),
        "local response": lambda norm: nn.LocalResponseNorm(3),
    },
    "token_mixer": ANYWHERE
    | {name: mixer(name) for name in ("identity", "attention", "separable_conv", "depthwise_conv")}
    | {"the average alone": lambda mixer: mixer.pool, "doubled": Doubled},
    "token_mixer.pool": ANYWHERE
    | {
        "counts padding": attribute(count_include_pad=True),
        "divisor": attribute(divisor_override=5),
        "size": attribute(kernel_size=5, padding=2),
        "size of one": attribute(kernel_size=1, padding=0),
        "size in a pair": attribute(kernel_size=(3, 3)),
        "a row": attribute(kernel_size=(1, 3), padding=(0, 1)),
        "rounded up": attribute(ceil_mode=True),
        "maximum": lambda pool: nn.MaxPool2d(3, 1, 1),
        "mirrored borders": lambda pool: nn.Sequential(nn.ReflectionPad2d(1), nn.AvgPool2d(3, 1)),
        "learned": conv(8, 8, 3, groups=8),
    },
    "output": ANYWHERE
    | {
        "dropout": lambda mlp: nn.Sequential(mlp, nn.Dropout(0.5)).eval(),
        "one layer": conv(8, 8),
        "wider": lambda mlp: attribute(conv1=nn.Conv2d(8, 24, 1), conv2=nn.Conv2d(24, 8, 1))(mlp),
    },
    "output.act_fn": ANYWHERE
    | {
        name: lambda act, name=name: ACT2FN[name]
        for name in ("relu", "silu", "relu2", "gelu_python", "gelu_new", "quick_gelu", "mish", "tanh", "linear")
    }
    | {
        "gelu of torch": lambda act: nn.GELU(),
        "gelu of torch by tanh": lambda act: nn.GELU("tanh"),
        "function inside": attribute(act=torch.tanh),
        "prelu": lambda act: nn.PReLU(),
        "star_relu": star_relu(),
        "star_relu, other numbers": star_relu(scale=torch.tensor([0.5]), bias=torch.tensor([2.0])),
        "star_relu per channel": star_relu(scale=torch.linspace(0.5, 1.5, 16)[:, None, None]),
        "star_relu of a number without shape": star_relu(bias=torch.tensor(2.0)),
        "sequence": lambda act: nn.Sequential(act, nn.Hardtanh(-0.2, 0.2)),
    },
    "output.conv1": ANYWHERE
    | {
        "3x3": conv(8, 16, 3),
        "groups": conv(8, 16, groups=4),
        "groups set": lambda layer: attribute(groups=2, weight=nn.Parameter(layer.weight[:, :4].detach().clone()))(
            layer
        ),
        "dilated and wrapped": lambda layer: nn.Conv2d(8, 16, 3, padding=2, dilation=2, padding_mode="circular"),
        "weight of 3x3": lambda layer: attribute(weight=nn.Parameter(torch.randn(16, 8, 3, 3)), padding=(1, 1))(layer),
        "no bias": attribute(bias=None),
        "sequence": lambda layer: nn.Sequential(layer),
        "convolves in its own way": attribute(_conv_forward=lambda x, weight, bias: nn.functional.conv2d(x, -weight)),
        "weight norm": parametrizations.weight_norm,
        "spectral norm": parametrizations.spectral_norm,
        "old weight norm": torch.nn.utils.weight_norm,
        "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        "written through data": lambda layer: layer.weight.data.mul_(1.5) is not None and layer,
    },
    "output.conv2": ANYWHERE
    | {
        "3x3": conv(16, 8, 3),
        "groups": conv(16, 8, groups=2),
        "transposed": lambda layer: nn.ConvTranspose2d(16, 8, 1),
        "parametrized bias": parametrized("bias"),
    },
}
CASES = [(place, name) for place, changes in CHANGES.items() for name in changes]
# What leaves the function of a model, or its value in inference, as it is.
SAME = {
    *((place, "backward hook") for place in CHANGES),
    *((place, "backward pre-hook") for place in CHANGES),
    ("", "drop path in training mode only there"),
    ("drop_path", "identity"),
    ("before_norm", "no bias"),
    ("before_norm", "pre-hook"),
    ("after_norm", "pre-hook"),
    ("token_mixer.pool", "size in a pair"),
    ("token_mixer.pool", "rounded up"),
    ("output", "dropout"),
    ("output.act_fn", "gelu_python"),
    ("output.act_fn", "gelu of torch"),
    ("output.conv1", "sequence"),
    ("output.conv1", "weight norm"),
    ("output.conv1", "old weight norm"),
}


def set_block(change):
    """Changes the first stage, a list of blocks; what comes back, if anything, takes its place."""

    def run(encoder):
        stage = encoder.block[0]
        changed = change(stage)
        encoder.block[0] = stage if changed is None else changed

    return run


def set_projection(stage, change):
    def run(encoder):
        embedding = encoder.patch_embeddings[stage]
        embedding.projection = change(embedding.projection)

    return run


# Of the encoder.
REBUILT = {
    "slice of a stage": set_block(lambda stage: stage[1:]),
    "no block": set_block(lambda stage: stage[:0]),
    "block less": set_block(lambda stage: stage.__delitem__(1)),
    "block more": set_block(lambda stage: stage.append(copy.deepcopy(stage[0]))),
    "other order": set_block(lambda stage: stage[::-1]),
    "shared block": set_block(lambda stage: stage.__setitem__(2, stage[0])),
    "convolution between blocks": set_block(lambda stage: stage.insert(1, nn.Conv2d(8, 8, 3, padding=1))),
    "identity for a stage": set_block(lambda stage: nn.Identity()),
    "sequence for a stage": set_block(lambda stage: nn.Sequential(*stage)),
    "hook of a stage": set_block(with_hook),
    "stem of two": set_projection(0, lambda conv: nn.Sequential(conv, nn.ReLU())),
    "doubled projection": set_projection(1, Doubled),
    "projection without a weight": set_projection(1, lambda conv: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 1))),
    "parametrized projection": set_projection(1, parametrizations.weight_norm),
    "hook of a projection": set_projection(1, with_hook),
}
SAME_REBUILT = {"sequence for a stage", "parametrized projection"}


def doubled_output(module, args, output):
    return 2 * output if isinstance(module, nn.Conv2d) else None


def doubled_input(module, args):
    return (2 * args[0],) if isinstance(module, nn.AvgPool2d) else None


@contextlib.contextmanager
def patched(kind):
    original = kind.forward
    kind.forward = lambda self, x: 2 * original(self, x)
    try:
        yield
    finally:
        kind.forward = original


@contextlib.contextmanager
def global_hook(register, hook):
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


# What changes every model there is, while it lasts.
AROUND = {
    "hook of all modules": lambda: global_hook(hooks.register_module_forward_hook, doubled_output),
    "pre-hook of all modules": lambda: global_hook(hooks.register_module_forward_pre_hook, doubled_input),
    **{
        f"{kind.__name__}.forward": lambda kind=kind: patched(kind)
        for kind in (MetaFormerBlock, MetaFormerGroupNorm, MetaFormerMLP, DropPath, Pooling, nn.AvgPool2d)
    },
}


@pytest.fixture
def model(scramble):
    return scramble(MetaFormerForImageClassification(MetaFormerConfig(**SHAPE)))


@pytest.fixture
def choose(device, monkeypatch):
    """Chooses who computes, and brings a model there: Triton's kernels may need a GPU."""

    def run(model, kernels):
        monkeypatch.setenv("HF_POOLFORMER_KERNELS", kernels)
        return model.to(device if kernels == "triton" else "cpu")

    return run


@pytest.fixture
def outcomes(choose):
    """Logits of a model and, where they are wanted, gradients."""

    def run(model, kernels, grad):
        choose(model, kernels).zero_grad()
        torch.manual_seed(0)
        pixel_values = torch.randn(2, 3, 16, 12).to(model.device)
        with torch.set_grad_enabled(grad):
            logits = model(pixel_values).logits
        if not grad:
            return logits.cpu(), {}
        logits.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        gradients = {name: gradient.cpu() for name, gradient in gradients.items() if gradient is not None}
        return logits.detach().cpu(), gradients

    return run


@pytest.fixture
def agree(outcomes, relative_error):
    """Every path against plain PyTorch with gradients; returns its logits."""

    def run(model, paths):
        wanted, gradients = outcomes(model, "reference", True)
        for kernels, grad in paths:
            logits, others = outcomes(model, kernels, grad)
            assert relative_error(logits, wanted) < CLOSE, (kernels, grad)
            # Biases that cancel have no gradient but rounding errors, which are small beside the others.
            tiny = 1e-4 * max((gradient.norm() for gradient in gradients.values()), default=0.0)
            for name, gradient in others.items():
                if gradient.norm() > tiny or gradients[name].norm() > tiny:
                    assert relative_error(gradient, gradients[name]) < CLOSE_GRADIENTS, (kernels, name)
        return wanted

    return run


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("place, name", CASES, ids=[f"{place or 'block'}: {name}" for place, name in CASES])
def test_a_changed_part(place, name, paths, model, agree, relative_error):
    before = agree(model, paths)  # what was found then must not be what is computed later
    block = model.metaformer.encoder.block[0][0]
    changed = CHANGES[place][name](block.get_submodule(place))
    if place:
        block.set_submodule(place, changed)
    else:
        model.metaformer.encoder.block[0][0] = changed
    after = agree(model, paths)
    assert (relative_error(after, before) > CHANGED) == ((place, name) not in SAME), "a change that changes nothing"


@pytest.mark.parametrize("place, name", CASES, ids=[f"{place or 'block'}: {name}" for place, name in CASES])
def test_a_changed_part_in_a_folded_graph(place, name, model, outcomes, relative_error):
    """What exports are made of: only what is known is folded."""
    block = model.metaformer.encoder.block[0][0]
    changed = CHANGES[place][name](block.get_submodule(place))
    if place:
        block.set_submodule(place, changed)
    else:
        model.metaformer.encoder.block[0][0] = changed
    model.eval()  # as an export is, drop path included
    wanted, _ = outcomes(model, "reference", False)
    assert relative_error(outcomes(fold(model), "reference", False)[0], wanted) < CLOSE


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("name", REBUILT)
def test_a_rebuilt_encoder(name, paths, model, agree, relative_error):
    before = agree(model, paths)
    REBUILT[name](model.metaformer.encoder)
    assert (relative_error(agree(model, paths), before) > CHANGED) == (name not in SAME_REBUILT)


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("name", AROUND)
def test_what_changes_all_models(name, paths, model, agree, relative_error):
    before = agree(model, paths)
    with AROUND[name]():
        assert relative_error(agree(model, paths), before) > CHANGED
    assert relative_error(agree(model, paths), before) == 0


def step(**settings):
    def run(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **settings)
        model.train()
        model(torch.randn(2, 3, 24, 20)).logits.square().sum().backward()
        optimizer.step()
        return model.eval()

    return run


def load(**settings):
    def run(model):
        model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()}, **settings)
        return model

    return run


def write(how):
    def run(model):
        with torch.no_grad():
            for parameter in model.parameters():
                how(parameter)
        return model

    return run


def swap(model):
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(1.5 * parameter.detach()))
    return model


def merge_adapter(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["conv1", "conv2"], init_lora_weights=False)
    return peft.get_peft_model(model, config).merge_and_unload().requires_grad_()


NEW_WEIGHTS = {
    "fused AdamW": step(fused=True),
    "AdamW, many at a time": step(foreach=True),
    "AdamW": step(foreach=False),
    "load_state_dict": load(assign=False),
    "assigned state": load(assign=True),
    "written in place": write(lambda parameter: parameter.mul_(1.5)),
    "written through data": write(lambda parameter: parameter.data.mul_(1.5)),
    "new data": write(lambda parameter: setattr(parameter, "data", 1.5 * parameter.data)),
    "written through NumPy": write(lambda parameter: parameter.numpy().__imul__(1.5)),
    "new parameters": swap,
    "a merged adapter": merge_adapter,
    "through another precision": lambda model: model.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("name", NEW_WEIGHTS)
def test_new_weights_are_used(name, paths, model, agree, outcomes, relative_error):
    """Whatever was computed with the old ones before."""
    before, _ = outcomes(model, "reference", True)
    agree(model, paths)
    assert relative_error(agree(NEW_WEIGHTS[name](model), paths), before) > CHANGED


@pytest.mark.parametrize("paths", PATHS)
def test_an_equal_number_in_the_place_of_another(paths, model, agree, relative_error):
    """Two tensors of one number compare as equal, but only one of them is the model's."""
    act = star_relu()(None)
    model.metaformer.encoder.block[0][0].output.act_fn = act
    before = agree(model, paths)
    act.scale = nn.Parameter(act.scale.detach().clone())
    assert relative_error(agree(model, paths), before) == 0
    with torch.no_grad():
        act.scale.mul_(1.5)
    assert relative_error(agree(model, paths), before) > CHANGED


@pytest.mark.parametrize("paths", PATHS)
def test_parts_in_another_precision_are_refused_as_by_torch(paths, model, outcomes):
    model.metaformer.encoder.block[0][0].output.conv1.to(torch.bfloat16)
    for kernels, grad in [("reference", True), *paths]:
        with pytest.raises(RuntimeError, match="type"):
            outcomes(model, kernels, grad)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "cpu", "triton"])
def test_hooks_of_the_pool_see_what_it_computed(kernels, grad, model, choose):
    choose(model, kernels)
    seen = []
    for module in model.modules():
        if isinstance(module, nn.AvgPool2d):
            module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        module.register_full_backward_hook(lambda module, into, out: None)
    with torch.set_grad_enabled(grad):
        logits = model(torch.randn(2, 3, 24, 20).to(model.device)).logits
    assert len(seen) == 4
    for x, pooled in seen:
        torch.testing.assert_close(pooled, nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
    if grad:
        logits.sum().backward()


@pytest.mark.parametrize("kernels", ["reference", "auto", "cpu", "triton"])
def test_the_counter_of_operations_sees_all_of_them(kernels, model, choose):
    pixel_values = torch.randn(2, 3, 24, 20).to(choose(model, kernels).device)
    counts = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            model(pixel_values)
        counts.append(counter.get_total_flops())
    # Stem and downsampling, then four MLPs, in multiplications and additions; the classifier.
    tokens = (6 * 5, 3 * 3)
    blocks = 3 * 2 * tokens[0] * 8 * 16 + 2 * tokens[1] * 16 * 32
    by_hand = 2 * (tokens[0] * 8 * 3 * 49 + tokens[1] * 16 * 8 * 9 + blocks + 16 * 3) * 2
    assert counts == [by_hand, by_hand]


@pytest.mark.parametrize("kernels", ["reference", "cpu", "triton"])
def test_fused_operations_have_formulas_of_their_own(kernels, device):
    where = device if kernels == "triton" else "cpu"
    x = torch.randn(2, 6, 4, 4, requires_grad=True, device=where)
    weight1, weight2 = torch.randn(10, 6, device=where), torch.randn(6, 10, device=where)
    assert backends.takes(backends.decide(x, kernels), x) == (kernels != "reference")  # registers them
    compute = ops.channel_mlp if kernels == "reference" else partial(fused_operations.channel_mlp, backend=kernels)
    with FlopCounterMode(display=False) as counter:
        compute(x, weight1, weight2, activation="gelu", eps=1e-5)
    assert counter.get_total_flops() == 2 * 2 * 2 * 16 * 6 * 10


@pytest.mark.parametrize("size", [(24, 20), (64, 64)])
def test_under_vmap(size, model, relative_error):
    """One image at a time, of a size at which the weights of the projections are larger than their input."""
    images = torch.randn(3, 3, *size)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            each = torch.func.vmap(lambda image: model(image[None]).logits[0])(images)
            assert relative_error(each, model(images).logits) < CLOSE


class Loud(torch.Tensor):
    """A tensor that may compute in another way, as far as anybody knows."""


def test_subclasses_of_tensors_and_modes_take_plain_pytorch(model, monkeypatch):
    called = []
    kernels = pytest.importorskip("hf_poolformer.kernels.cpu")
    infer = kernels.infer
    monkeypatch.setattr(kernels, "infer", lambda *args: called.append(1) or infer(*args))
    pixel_values = torch.randn(2, 3, 24, 20)

    class Watching(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        model(pixel_values)
        assert len(called) == 2, "both stages are fused"
        with torch.device("cpu"):
            model(pixel_values)
        assert len(called) == 4, "the default device changes nothing"
        called.clear()
        wanted = model(pixel_values).logits
        called.clear()
        with Watching():
            torch.testing.assert_close(model(pixel_values).logits, wanted)
        torch.testing.assert_close(model(pixel_values.as_subclass(Loud)).logits.as_subclass(torch.Tensor), wanted)
    assert called == []


class Scaled(torch.Tensor):
    """A weight that is kept as something else, as quantised and sharded ones are: here half of what it is."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, device=half.device)

    def __init__(self, half):
        self.half = half

    def __repr__(self):  # graphs are logged
        return "Scaled()"

    def __tensor_flatten__(self):
        return ["half"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Scaled(inner["half"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Scaled(args[0].half)
        return function(*tree_map_only(Scaled, lambda each: 2 * each.half, args), **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_that_are_no_plain_tensors_take_plain_pytorch(compiled, model, relative_error):
    """In a graph, too: operations have no rule for what a weight may be."""
    pixel_values, operations = torch.randn(2, 3, 24, 20), []

    def backend(graph, examples):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        wanted = model(pixel_values).logits
        conv = model.metaformer.encoder.block[0][1].output.conv1
        conv.weight = nn.Parameter(Scaled(conv.weight.detach() / 2), requires_grad=False)
        torch.compiler.reset()
        run = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        assert relative_error(run(pixel_values).logits, wanted) < CLOSE
    blocks = sum(SHAPE["depths"])
    assert operations.count("hf_poolformer.cpu_channel_mlp") == (blocks - 1 if compiled else 0)
    assert operations.count("hf_poolformer.cpu_pool_mixer") == (blocks if compiled else 0)


@pytest.mark.parametrize(
    ("kernels", "names"),
    [
        ("auto", {"nothing", "another activation", "a hook"}),  # each is a compilation of seconds
        pytest.param("auto", None, marks=pytest.mark.slow),
        pytest.param("cpu", None, marks=pytest.mark.slow),
    ],
    ids=["some", "auto", "cpu"],
)
def test_changes_after_compilation(kernels, names, model, monkeypatch, relative_error):
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", kernels)
    torch.compiler.reset()
    # Past its limit of 8 recompilations a compiled model runs as plain PyTorch, which proves nothing;
    # and hooks that came after the compilation are looked for only when asked to.
    settings = torch._dynamo.config.patch(recompile_limit=64, skip_nnmodule_hook_guards=False)
    compiled = settings(torch.compile(model, backend="aot_eager"))
    pixel_values = torch.randn(2, 3, 24, 20)
    block = model.metaformer.encoder.block[0][0]
    grads = itertools.cycle([False, True])  # what is guarded is the same
    for name, change in {
        "nothing": lambda: None,
        "another activation": lambda: setattr(block.output, "act_fn", nn.ReLU()),
        "the average counts padding": lambda: setattr(block.token_mixer.pool, "count_include_pad", True),
        "groups": lambda: setattr(block.after_norm, "num_groups", 2),
        "no layer scale": lambda: setattr(block, "layer_scale_2", None),
        "a hook": lambda: with_hook(block.output.conv2),
    }.items():
        if names is not None and name not in names:
            continue
        change()
        with torch.set_grad_enabled(next(grads)):
            assert relative_error(compiled(pixel_values).logits, model(pixel_values).logits) < CLOSE, name


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", [lambda module: module, own_forward, with_hook], ids=["", "forward", "hook"])
@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_nobody_keeps_a_model_that_has_computed(kernels, change, grad, model, outcomes):
    encoder = model.metaformer.encoder
    for module in (encoder.block[0], encoder.block[0][0], encoder.block[0][0].output, encoder.block[1]):
        change(module)
    for _ in range(2):
        outcomes(model, kernels, grad)
    # Not the fixture's model itself, which pytest holds.
    stages = [weakref.ref(stage) for stage in encoder.block]
    weights = [weakref.ref(parameter) for parameter in encoder.block.parameters()]
    model.metaformer.encoder.block = nn.ModuleList()
    del encoder, module
    gc.collect()
    assert not any(each() is not None for each in (*stages, *weights))


def replicate(module, factor):
    """As DataParallel does it in every forward: modules that share all attributes but their weights."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replicate(child, factor)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else factor * parameter.detach())
    return replica


@pytest.mark.parametrize("kernels, grad", [*CPU, *TRITON])
def test_replicas_compute_with_their_own_weights(kernels, grad, model, choose, monkeypatch, relative_error):
    body = choose(model, kernels).metaformer.encoder
    images = torch.randn(2, 3, 16, 12, device=model.device)
    outcomes = {}
    for who in ("reference", kernels):
        monkeypatch.setenv("HF_POOLFORMER_KERNELS", who)
        with torch.set_grad_enabled(grad):
            body(images)  # so that there is something to share
            outcomes[who] = [replicate(body, factor)(images).last_hidden_state for factor in (1.0, 1.5, 0.5)]
    for got, wanted in zip(outcomes[kernels], outcomes["reference"], strict=True):
        assert relative_error(got, wanted) < CLOSE
