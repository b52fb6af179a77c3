"""The CPU's kernels against float64 autograd of the reference (tested in test_ops.py), and what they leave alone."""

import contextlib
import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from torch.nn import functional as F

from hf_poolformer import MetaFormerConfig, MetaFormerForImageClassification, backends, fused_operations, ops
from hf_poolformer.kernels import cpu


pytestmark = pytest.mark.skipif(not cpu.has_onednn(torch.float32), reason="PyTorch was built without oneDNN")

V1 = ("norm_weight", "norm_bias", "bias1", "bias2", "layer_scale")
V2 = ("norm_weight", "res_scale")
ALL = (*V1, "res_scale")
# As in conftest.py; oneDNN rounds to nearest.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
DTYPES = [dtype for dtype in TOLERANCE if cpu.has_onednn(dtype)]
TINY = {"depths": (2, 1, 1, 1), "hidden_sizes": (8, 8, 16, 16), "num_labels": 3, "mlp_ratio": 2}


@pytest.fixture(params=[None, 1], ids=["one block", "sample by sample"])
def block_size(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(cpu, "FORWARD_BLOCK", request.param)
        monkeypatch.setattr(cpu, "BACKWARD_BLOCK", request.param)


def by_kernels(operation, **arguments):
    return getattr(fused_operations, operation)(**arguments, backend="cpu")[0]


def by_formula(operation, **arguments):
    return getattr(ops, operation)(**arguments)


def outcome(compute, operation, x, parameters, grad, **settings):
    """y and the gradients of x and the parameters."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in {"x": x, **parameters}.items()}
    y = compute(operation, **leaves, **settings)
    y.backward(grad.to(y.dtype))
    return {"y": y} | {name: leaf.grad for name, leaf in leaves.items()}


def check(operation, x, parameters, relative_error, bound, context=None, judged=1, **settings):
    """`judged` is 0 at tokens whose gradients nobody compares, (batch, 1, height, width)."""
    grad = torch.randn(x.shape).to(x.dtype) * judged
    with context or contextlib.nullcontext():
        got = outcome(by_kernels, operation, x, parameters, grad, **settings)
    exact = {name: value.double() for name, value in parameters.items()}
    wanted = outcome(by_formula, operation, x.double(), exact, grad.double(), **settings)
    assert got["y"].is_contiguous(memory_format=torch.channels_last)
    for name, value in got.items():
        assert value.dtype == (x if name in ("x", "y") else parameters[name]).dtype, name
        assert relative_error(value, wanted[name]) < bound, name


def mixer_parameters(dim, names, dtype=torch.float32):
    return {name: torch.randn(dim).to(dtype) for name in names}


def mlp_parameters(dim, inner, names, activation, dtype=torch.float32):
    sizes = {"weight1": (inner, dim, 1, 1), "weight2": (dim, inner, 1, 1)}
    sizes |= {name: (inner if name == "bias1" else dim,) for name in names}
    if activation == "star_relu":
        sizes |= {"act_scale": (1,), "act_bias": (1,)}
    parameters = {name: 0.3 * torch.randn(size) for name, size in sizes.items()}
    for name in ("norm_weight", "res_scale", "act_scale"):
        if name in parameters:
            parameters[name] += 1
    return {name: value.to(dtype) for name, value in parameters.items()}


def activations(shape, dtype=torch.float32):
    return (2 * torch.randn(shape) + 3).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [(), ("weight", "layer_scale"), ("weight", "layer_scale", "res_scale")])
@pytest.mark.parametrize("shape, pool_size", [((3, 20, 7, 5), 3), ((2, 17, 1, 1), 3), ((1, 6, 5, 3), 7)])
def test_pooling_branch(shape, pool_size, names, dtype, block_size, poisoned, relative_error):
    mask = torch.tensor([1.25, 0.0, 1.25])[: shape[0]]
    parameters = mixer_parameters(shape[1], names, dtype)
    # Of one token the branch is zero, and gradients of the scales have no direction to be right in.
    if shape[-1] == 1:
        parameters = {name: value for name, value in parameters.items() if name == "res_scale"}
    settings = {"mask": mask, "pool_size": pool_size, "eps": 1e-5}
    check("pool_mixer", activations(shape, dtype), parameters, relative_error, TOLERANCE[dtype], **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names, activation", [(V1, "gelu"), (V2, "star_relu"), (ALL, "silu"), ((), "relu")])
@pytest.mark.parametrize("shape, inner", [((3, 20, 7, 5), 43), ((2, 33, 1, 1), 16)])
def test_mlp_branch(shape, inner, names, activation, dtype, block_size, poisoned, relative_error):
    parameters = mlp_parameters(shape[1], inner, names, activation, dtype)
    settings = {"mask": torch.tensor([1.25, 0.0, 1.25])[: shape[0]], "activation": activation, "eps": 1e-5}
    x, judged = activations(shape, dtype), 1
    if activation == "relu" and dtype != torch.float32:
        # A unit that rounds across zero, which it does on one processor and not on another, has another derivative.
        units = F.conv2d(F.group_norm(x.double(), 1), parameters["weight1"].double())
        judged = (units.abs().amin(1, keepdim=True) > 4 * torch.finfo(dtype).eps).to(dtype)
        assert judged.mean() > 0.2
    check("channel_mlp", x, parameters, relative_error, TOLERANCE[dtype], judged=judged, **settings)


@pytest.mark.parametrize("activation", list(ops.ACTIVATIONS))
def test_activations_with_and_without_gradients(activation, relative_error):
    x, parameters = activations((2, 5, 4, 3)), mlp_parameters(5, 9, ALL, activation)
    settings = {"activation": activation, "eps": 1e-5}
    check("channel_mlp", x, parameters, relative_error, TOLERANCE[torch.float32], **settings)
    with torch.no_grad():
        got = by_kernels("channel_mlp", x=x, **parameters, **settings)
        wanted = by_formula("channel_mlp", x=x, **parameters, **settings)
    assert relative_error(got, wanted) < TOLERANCE[torch.float32]


@pytest.mark.skipif(not cpu.has_onednn(torch.bfloat16), reason="this CPU has no bfloat16")
def test_autocast_keeps_float32_around_the_products(relative_error):
    x, parameters = activations((3, 20, 5, 7)), mlp_parameters(20, 41, V1, "gelu")
    context = torch.autocast("cpu", torch.bfloat16)
    settings = {"activation": "gelu", "eps": 1e-5, "context": context}
    check("channel_mlp", x, parameters, relative_error, TOLERANCE[torch.bfloat16], **settings)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x = activations((2, 6, 3, 4)).requires_grad_(grad)
    *scales, norm_bias = [torch.randn(6, requires_grad=grad) for _ in range(4)]
    mask = torch.tensor([0.0, 1.25])
    torch.library.opcheck(torch.ops.hf_poolformer.cpu_pool_mixer.default, (x, *scales, mask, 3, 1e-5, norm_bias))
    sizes = [(6,), (6,), (10, 6), (10,), (6, 10), (6,), (1,), (1,), (6,), (6,)]
    vectors = [torch.randn(size, requires_grad=grad) for size in sizes]
    arguments = (x, *vectors, mask, "star_relu", 1e-5, torch.float32, grad)
    torch.library.opcheck(torch.ops.hf_poolformer.cpu_channel_mlp.default, arguments)


@pytest.fixture
def model(scramble):
    return scramble(MetaFormerForImageClassification(MetaFormerConfig(**TINY))).eval()


@pytest.fixture
def pixel_values():
    return torch.randn(3, 3, 36, 28)


@pytest.fixture
def count_operations(monkeypatch):
    """Runs a function and counts what it computes with kernels: (pooling branches, MLPs, sequences of branches in
    inference, branches in them)."""

    def run(function):
        counts = dict.fromkeys(("pool_mixer", "channel_mlp", "infer", "branches"), 0)
        with monkeypatch.context() as patch:
            for name in ("pool_mixer", "channel_mlp", "infer"):
                owner = cpu if name == "infer" else torch.ops.hf_poolformer
                name_there = name if name == "infer" else f"cpu_{name}"
                original = getattr(owner, name_there)

                def counted(*args, original=original, name=name):
                    counts[name] += 1
                    counts["branches"] += len(args[1]) if name == "infer" else 0
                    return original(*args)

                patch.setattr(owner, name_there, counted)
            function()
        return tuple(counts.values())

    return run


def test_a_model_takes_them_by_itself(model, pixel_values, count_operations, monkeypatch, relative_error, block_size):
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "reference")
    with torch.no_grad():
        wanted = model(pixel_values).logits
        assert count_operations(lambda: model(pixel_values)) == (0, 0, 0, 0)
        monkeypatch.delenv("HF_POOLFORMER_KERNELS")
        assert count_operations(lambda: model(pixel_values)) == (0, 0, 4, 10)
        # float32: other orders of summation, five blocks deep.
        assert relative_error(model(pixel_values).logits, wanted) < 1e-5
    assert count_operations(lambda: model(pixel_values)) == (0, 0, 0, 0), "with gradients: plain PyTorch is faster"
    assert relative_error(model(pixel_values).logits, wanted) < 1e-5


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (5, 3, 33, 40), (2, 3, 64, 64)])
def test_every_size_and_inference_tensors(shape, model, monkeypatch, relative_error):
    x = torch.randn(shape)
    with torch.inference_mode():
        inference_model = copy.deepcopy(model)
        assert next(inference_model.parameters()).is_inference()
        monkeypatch.setenv("HF_POOLFORMER_KERNELS", "reference")
        wanted = model(x).logits
        monkeypatch.delenv("HF_POOLFORMER_KERNELS")
        for each in (model, inference_model):
            assert relative_error(each(x).logits, wanted) < 1e-5


def test_the_configuration_chooses_and_the_environment_overrides(
    pixel_values, count_operations, monkeypatch, tmp_path
):
    monkeypatch.delenv("HF_POOLFORMER_KERNELS", raising=False)
    model = MetaFormerForImageClassification(MetaFormerConfig(**TINY, kernels="reference")).eval()
    model.save_pretrained(tmp_path)
    model = MetaFormerForImageClassification.from_pretrained(tmp_path)
    assert count_operations(lambda: model(pixel_values)) == (0, 0, 0, 0)
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "cpu")
    assert count_operations(lambda: model(pixel_values)) == (5, 5, 0, 0)
    assert "kernels" not in MetaFormerConfig(**TINY).to_dict(), "no key of the built-in model's"
    with pytest.raises(StrictDataclassFieldValidationError, match=r"expected one of .*triton.*got quick"):
        MetaFormerConfig(**TINY, kernels="quick")


@pytest.mark.parametrize(
    "where", ["encoder.block.0.0", "encoder.block.0.0.output.conv1", "encoder.block.1.0.after_norm"]
)
def test_hooks_are_called(where, model, pixel_values):
    called = []
    model.metaformer.get_submodule(where).register_forward_hook(lambda *_: called.append(where))
    with torch.no_grad():
        model(pixel_values)
    assert called == [where]


def test_replaced_forwards_and_adapters_are_called(model, pixel_values, count_operations):
    """accelerate's offloading replaces `forward`, adapters replace the layer."""
    conv = model.metaformer.encoder.block[0][0].output.conv1
    conv.forward = copy.copy(conv.forward)
    with torch.no_grad():
        assert count_operations(lambda: model(pixel_values)) == (0, 0, 5, 9), "all but one branch"
    del conv.forward
    model.metaformer.encoder.block[1][0].output.conv2 = nn.Sequential(
        model.metaformer.encoder.block[1][0].output.conv2
    )
    with torch.no_grad():
        assert count_operations(lambda: model(pixel_values)) == (0, 0, 4, 9)


def test_drop_path_is_drawn_without_gradients_too(scramble, pixel_values, monkeypatch):
    model = scramble(MetaFormerForImageClassification(MetaFormerConfig(**TINY, drop_path_rate=0.5))).train()
    logits = {}
    with torch.no_grad():
        for kernels in ("reference", "auto", "cpu"):
            monkeypatch.setenv("HF_POOLFORMER_KERNELS", kernels)
            torch.manual_seed(1)
            logits[kernels] = model(pixel_values).logits
        torch.testing.assert_close(logits["auto"], logits["reference"])
        torch.testing.assert_close(logits["cpu"], logits["reference"])
        assert not torch.allclose(model.eval()(pixel_values).logits, logits["reference"])


def test_function_transforms_and_higher_derivatives_take_the_reference(model, pixel_values, monkeypatch):
    monkeypatch.delenv("HF_POOLFORMER_KERNELS", raising=False)
    parameters = dict(model.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).logits.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, pixel_values)
    assert all(gradient.shape[0] == 3 and gradient.isfinite().all() for gradient in per_sample.values())
    with torch.no_grad():
        _, tangent = torch.func.jvp(lambda x: model(x).logits, (pixel_values,), (torch.ones_like(pixel_values),))
        assert tangent.isfinite().all()
        each = torch.func.vmap(lambda image: model(image[None]).logits)(pixel_values)
        torch.testing.assert_close(each[:, 0], model(pixel_values).logits)


def test_compiled_into_one_graph(model, pixel_values, relative_error, monkeypatch):
    for grad, backend in ((False, "auto"), (True, "auto"), (True, "cpu")):
        monkeypatch.setenv("HF_POOLFORMER_KERNELS", backend)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.set_grad_enabled(grad):
            assert relative_error(compiled(pixel_values).logits, model(pixel_values).logits) < 1e-5


def test_all_parameters_get_a_gradient(model, pixel_values, monkeypatch):
    """DistributedDataParallel waits for each of them, also for the norm's bias that cancels."""
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "cpu")
    model(pixel_values, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_they_cannot_compute_has_a_reason():
    x, odd = torch.ones(1, 2, 3, 3), torch.ones(2).as_subclass(type("Other", (torch.Tensor,), {}))
    assert backends.why_not_cpu(x, torch.ones(2), None) is None
    for bad, parameter, reason in (
        (x.double(), None, "no fast products of torch.float64"),
        (x[0], None, "not (batch, channels, height, width)"),
        (x[:0], None, "x is empty"),
        (x.to("meta"), None, "not on the CPU"),
        (x, odd, "a parameter is a Other"),
    ):
        assert reason in backends.why_not_cpu(bad, parameter)
        with torch.no_grad():
            assert not backends.takes(backends.decide(bad), bad, parameter)
        with pytest.raises(RuntimeError, match="The kernels cannot run"):
            backends.takes(backends.decide(bad, "cpu"), bad, parameter)
