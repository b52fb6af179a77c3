"""Convolutions of patch embeddings against float64, by themselves and in a model: results, gradients, statistics."""

from functools import partial

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from hf_poolformer import MetaFormerConfig, MetaFormerForImageClassification, backends, ops


# x (B, C, H, W), output channels, kernel, stride, padding, bias.
STEM = ((2, 3, 13, 11), 20, (7, 7), [4, 4], [2, 2], True)
CASES = {
    "stem": STEM,
    # The width of the image and the stride of windows allow loads of several numbers.
    "stem, even": ((1, 3, 16, 16), 6, (7, 7), [4, 4], [2, 2], False),
    "grey": ((2, 1, 9, 12), 5, (7, 7), [4, 4], [2, 2], True),
    "four channels": ((1, 4, 8, 10), 17, (3, 3), [2, 2], [1, 1], True),
    "patches side by side": ((1, 3, 9, 8), 8, (4, 4), [4, 4], [0, 0], True),
    "height is not width": ((2, 2, 7, 12), 4, (2, 5), [1, 3], [0, 4], False),
    # Of an image smaller than the window, oneDNN (torch 2.14) makes bfloat16 weight gradients of unwritten memory.
    "one token": ((1, 3, 5, 5), 4, (7, 7), [4, 4], [2, 2], True),
}


@pytest.fixture(autouse=True)
def registered(device):
    assert backends.why_not_triton(torch.ones(1, 1, 1, 1, device=device)) is None


def make(case, dtype, device):
    shape, outputs, kernel, stride, padding, with_bias = case
    x = (torch.randn(shape, device=device) + 0.5).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(outputs, shape[1], *kernel, device=device) / 8).to(dtype)
    bias = torch.randn(outputs, device=device).to(dtype) if with_bias else None
    return x, weight, bias, stride, padding


def check(case, dtype, device, relative_error, tolerance):
    x, weight, bias, stride, padding = make(case, dtype, device)
    given = [None if each is None else each.double().requires_grad_() for each in (x, weight, bias)]
    wanted = F.conv2d(*given, stride=stride, padding=padding)
    grad = torch.randn_like(wanted).to(dtype)
    wanted.backward(grad.double())

    tensors = [None if each is None else each.requires_grad_() for each in (x, weight, bias)]
    y, statistics = torch.ops.hf_poolformer.patch_embedding(*tensors, stride, padding, True)
    y.backward(grad)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, wanted) < tolerance[dtype]
    assert not statistics.requires_grad
    # Of the values as they are stored.
    assert relative_error(statistics, ops.sample_statistics(y.double())) < 1e-5
    for mine, exact in zip(tensors, given, strict=True):
        if mine is not None:
            assert mine.grad.dtype == dtype
            assert relative_error(mine.grad, exact.grad) < tolerance[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_result_gradients_and_statistics(case, dtype, device, poisoned, relative_error, tolerance):
    check(case, dtype, device, relative_error, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])  # models leave float32 to cuDNN
@pytest.mark.parametrize("outputs", [64, 96, 192])
@pytest.mark.parametrize("size", [(224, 224), (223, 161)])
def test_at_real_sizes(size, outputs, dtype, device, poisoned, relative_error, tolerance):
    case = ((8, 3, *size), outputs, (7, 7), [4, 4], [2, 2], True)
    check(case, dtype, device, relative_error, tolerance)


def test_a_weight_may_lie_in_any_order(device, poisoned):
    x, weight, bias, *geometry = make(STEM, torch.float32, device)
    results = []
    for arranged in (weight, weight.contiguous(memory_format=torch.channels_last), weight.mT.contiguous().mT):
        y, statistics = torch.ops.hf_poolformer.patch_embedding(x, arranged, bias, *geometry, False)
        assert statistics.shape == (0, 2)
        results.append(y)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_window_ends_at_the_borders_of_its_image(device, poisoned):
    """Neither the end of the row before nor the sample before gets into a window."""
    x, weight, bias, *_ = make(STEM, torch.float32, device)
    x[0] = float("nan")
    x[1, :, :6] = float("inf")
    x[1, :, 8:] = float("nan")
    y, _ = torch.ops.hf_poolformer.patch_embedding(x, weight[:, :, 2:4], bias, [6, 4], [0, 2], False)
    wanted = F.conv2d(x[1:], weight[:, :, 2:4], bias, (6, 4), (0, 2))
    torch.testing.assert_close(y[1:, :, 1], wanted[:, :, 1])
    assert y[1, :, 1].isfinite().all() and y[0].isnan().all()


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad, device):
    for with_statistics in (False, True):
        x, weight, bias, *geometry = make(CASES["four channels"], torch.float32, device)
        tensors = (each.requires_grad_(grad) for each in (x, weight, bias))
        torch.library.opcheck(torch.ops.hf_poolformer.patch_embedding.default, (*tensors, *geometry, with_statistics))


def test_its_products_are_counted_as_those_of_a_convolution(device):
    x, weight, bias, stride, padding = make(STEM, torch.float32, device)
    counts = []
    for run in (torch.ops.hf_poolformer.patch_embedding, F.conv2d):
        rest = (stride, padding, False) if run is not F.conv2d else (stride, padding)
        with FlopCounterMode(display=False) as counter:
            run(x, weight, bias, *rest)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_statistics", [False, True])
def test_a_bias_is_added_in_place(with_statistics, dtype, device, poisoned):
    kernels = backends.triton_kernels().patch_embedding
    y = torch.randn(3, 20, 7, 5, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(20, device=device)
    # Whole numbers: the interpreter cuts bits off where a GPU rounds.
    y, bias = (4 * y).round(), (4 * bias).round()
    wanted = y + bias.to(dtype)[:, None, None]
    statistics = kernels.add_bias(y, bias, with_statistics)
    assert torch.equal(y, wanted)
    if with_statistics:
        torch.testing.assert_close(statistics, ops.sample_statistics(wanted.double()).float())
    else:
        assert statistics is None


# ---------------------------------------------------------------------------------------------------------------------
# In a model

SHAPE = {"num_encoder_blocks": 2, "depths": (1, 1), "hidden_sizes": (12, 16), "mlp_ratio": 2, "num_labels": 3}
SHAPE |= {"token_mixers": ("pooling",) * 2, "res_scale_init_values": (None,) * 2, "position_embeddings": (False,) * 2}


@pytest.fixture
def model(device, scramble, monkeypatch):
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "triton")
    return scramble(MetaFormerForImageClassification(MetaFormerConfig(**SHAPE))).to(device, torch.bfloat16)


@pytest.fixture
def calls(monkeypatch, registered):
    """Names of the kernels of embeddings that run, and of the pass that makes the statistics of a block's input."""
    found = []
    kernels = backends.triton_kernels()
    for owner, name in (
        (kernels.patch_embedding, "convolve"),
        (kernels.patch_embedding, "add_bias"),
        (kernels.statistics, "sample_statistics"),
        (kernels.inference, "sample_statistics"),
    ):
        original = getattr(owner, name)
        counted = partial(lambda original, name, *args: found.append(name) or original(*args), original, name)
        monkeypatch.setattr(owner, name, counted)
    return found


def images(device, dtype=torch.bfloat16):
    return torch.randn(2, 3, 11, 16, device=device).to(dtype)


# Two bfloat16 embeddings and two blocks, each cutting off 2^-8 in the interpreter.
CLOSE = 0.06


def compare(model, pixel_values, relative_error, monkeypatch, **settings):
    with monkeypatch.context() as patch:
        patch.setenv("HF_POOLFORMER_KERNELS", "reference")
        wanted = model(pixel_values, **settings).logits
    got = model(pixel_values, **settings).logits
    assert relative_error(got, wanted) < CLOSE
    return got


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_an_embedding_hands_its_statistics_to_the_first_block(
    inference, model, device, calls, relative_error, monkeypatch
):
    with inference():
        compare(model, images(device), relative_error, monkeypatch)
    assert calls == ["convolve", "add_bias"], "no pass for the statistics of a stage's input"


def test_training(model, device, calls, relative_error, monkeypatch):
    weight = model.metaformer.encoder.patch_embeddings[0].projection.weight
    compare(model, images(device), relative_error, monkeypatch).square().sum().backward()
    assert weight.grad.isfinite().all() and weight.grad.any()
    # The second embedding, of many channels, is left to cuDNN.
    assert calls == ["convolve", "sample_statistics"]


def test_autocast_gives_what_pytorch_gives(model, device, calls, relative_error, monkeypatch):
    projection = model.float().metaformer.encoder.patch_embeddings[0].projection
    x = images(device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        compare(model, x, relative_error, monkeypatch)
        calls.clear()
        y = model.metaformer.encoder.patch_embeddings[0](x)
        wanted = projection(x)
    assert calls == ["convolve"] and y.dtype == wanted.dtype == torch.bfloat16
    assert relative_error(y, wanted) < 1e-2
    calls.clear()
    compare(model, x, relative_error, monkeypatch)
    assert "convolve" not in calls, "float32 is left to cuDNN, which may use TF32"


def test_compiled_into_one_graph(model, device, relative_error):
    embedding = model.metaformer.encoder.patch_embeddings[0]
    x, operations = images(device), []

    def backend(graph, examples):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(embedding, fullgraph=True, backend=backend)
    assert relative_error(compiled(x), embedding.projection(x)) < 1e-2
    # PyTorch 2.11 cannot see that the convolution is a plain one, and keeps it: right as well.
    if Version(torch.__version__) >= Version("2.14"):
        assert any("patch_embedding" in each for each in operations), operations


def hooked(module):
    module.register_forward_hook(lambda module, args, output: 2 * output)


def changed_in_place(module):
    module.register_forward_hook(lambda module, args, output: output.mul_(2))


def changed_before(module):
    module.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))


def subclassed(module):
    kind = type(module)
    module.__class__ = type("Mine", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})


def replaced(make):
    def run(embedding):
        embedding.projection = make(embedding.projection)

    return run


def conv(**settings):
    return lambda before: nn.Conv2d(3, 12, 7, stride=4, **settings).to(before.weight.device, before.weight.dtype)


NO_CONVOLUTION = {
    "hook": lambda embedding: hooked(embedding.projection),
    "subclass": lambda embedding: subclassed(embedding.projection),
    "circular": replaced(conv(padding=2, padding_mode="circular")),
    "dilated": replaced(conv(padding=5, dilation=2)),
    "groups": lambda embedding: setattr(embedding, "projection", nn.Conv2d(3, 12, 7, 4, 2, groups=3)),
    "sequence": replaced(lambda conv: nn.Sequential(conv, nn.Tanh())),
    "parametrized": replaced(parametrizations.weight_norm),
}


@pytest.mark.parametrize("name", NO_CONVOLUTION)
def test_a_changed_convolution_runs_as_it_is(name, device, model, calls, relative_error):
    embedding = model.metaformer.encoder.patch_embeddings[0]
    NO_CONVOLUTION[name](embedding)
    embedding.to(device, torch.bfloat16)
    x = images(device)
    with torch.no_grad():
        assert relative_error(embedding(x), embedding.projection(x)) < 1e-2
    assert "convolve" not in calls


# What changes the input of a block between the embedding and it.
BETWEEN = {
    "hook of the embedding": lambda embedding, stage: changed_in_place(embedding),
    "hook of the norm": lambda embedding, stage: changed_in_place(embedding.post_norm),
    "hook of the convolution": lambda embedding, stage: changed_in_place(embedding.projection),
    "pre-hook of the stage": lambda embedding, stage: changed_before(stage),
    "pre-hook of the block": lambda embedding, stage: changed_before(stage[0]),
    "subclass of the embedding": lambda embedding, stage: subclassed(embedding),
    "norm": lambda embedding, stage: setattr(embedding, "post_norm", nn.LeakyReLU(inplace=True)),
    "identity in front": lambda embedding, stage: stage.insert(0, nn.LeakyReLU(inplace=True)),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_statistics_are_of_what_the_block_gets(name, device, model, calls, relative_error, monkeypatch):
    encoder = model.metaformer.encoder
    BETWEEN[name](encoder.patch_embeddings[0], encoder.block[0])
    with torch.inference_mode():
        compare(model, images(device), relative_error, monkeypatch)
    assert calls.count("sample_statistics") == 1, "the first stage looks for itself"
