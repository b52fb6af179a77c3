"""The registered operations under torch.library.opcheck, compile, export, checkpointing, and beside each other."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_poolformer import MetaFormerConfig, MetaFormerModel, fused_operations, ops


DIM, INNER = 6, 10


class Block(nn.Module):
    """Both operations, the second with the statistics of the first, as a PoolFormer block has them."""

    def __init__(self):
        super().__init__()
        self.vectors = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(INNER if name == "bias1" else DIM))
                for name in ("weight", "scale1", "scale2", "norm_weight", "norm_bias", "bias1", "bias2")
            }
        )
        self.conv1, self.conv2 = nn.Conv2d(DIM, INNER, 1), nn.Conv2d(INNER, DIM, 1)

    def arguments(self):
        v = self.vectors
        mixer = {"pool_size": 3, "eps": 1e-5, "weight": v["weight"], "layer_scale": v["scale1"]}
        names = ("norm_weight", "norm_bias", "bias1", "bias2")
        mlp = {"weight1": self.conv1.weight, "weight2": self.conv2.weight, "activation": "gelu", "eps": 1e-5}
        return mixer, {**mlp, "layer_scale": v["scale2"], **{name: v[name] for name in names}}

    def forward(self, x):
        mixer, mlp = self.arguments()
        x, statistics = fused_operations.pool_mixer(x, **mixer, with_statistics=True, backend="triton")
        return fused_operations.channel_mlp(x, **mlp, statistics=statistics, backend="triton")[0]

    def by_formula(self, x):
        mixer, mlp = self.arguments()
        return ops.channel_mlp(ops.pool_mixer(x, **mixer), **mlp)


@pytest.fixture
def block(device):
    return Block().to(device)


@pytest.fixture
def x(device):
    return torch.randn(2, DIM, 3, 4, device=device)


def outcome(run, module, x):
    """Result and all gradients of `run(x)`, which goes through the module's parameters."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def assert_same(first, second, **tolerances):
    assert len(first) == len(second)
    torch.testing.assert_close(first, second, **tolerances)


def mixer_arguments(device, grad):
    x = torch.randn(2, DIM, 3, 4, device=device).contiguous(memory_format=torch.channels_last)
    statistics = ops.sample_statistics(x)
    vectors = [torch.randn(DIM, device=device, requires_grad=grad) for _ in range(3)]
    return x.requires_grad_(grad), statistics, *vectors, torch.tensor([0.0, 1.25], device=device)


def mlp_arguments(device, grad):
    x, statistics, *_, mask = mixer_arguments(device, grad)
    sizes = [(DIM,), (DIM,), (INNER, DIM), (INNER,), (DIM, INNER), (DIM,), (1,), (1,), (DIM,), (DIM,)]
    return x, statistics, *(torch.randn(size, device=device, requires_grad=grad) for size in sizes), mask


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_of_the_forward_operations(grad, device):
    x = torch.randn(2, DIM, 3, 4, device=device).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.hf_poolformer.sample_statistics.default, (x,))
    torch.library.opcheck(torch.ops.hf_poolformer.token_statistics.default, (x,))
    # The last flag asks for the statistics of the result; then comes the norm's bias.
    mixer = (*mixer_arguments(device, grad), 3, 1e-5, grad, torch.randn(DIM, device=device, requires_grad=grad))
    torch.library.opcheck(torch.ops.hf_poolformer.pool_mixer.default, mixer)
    x, statistics, *rest = mlp_arguments(device, grad)
    for known in (statistics, torch.ops.hf_poolformer.token_statistics(x.detach())):
        mlp = (x, known, *rest, "star_relu", 1e-5, torch.float32, grad, grad)
        torch.library.opcheck(torch.ops.hf_poolformer.channel_mlp.default, mlp)


def test_opcheck_of_the_backward_operations(device):
    x, *rest = mixer_arguments(device, False)
    g = torch.randn_like(x)
    statistics, *scales, mask = rest
    for wanted in ([False] * 4, [True] * 4):
        arguments = (g, x, statistics, *scales, scales[0], mask, 3, 1e-5, wanted)
        torch.library.opcheck(torch.ops.hf_poolformer.pool_mixer_backward.default, arguments)
    x, statistics, *parameters, mask = mlp_arguments(device, False)
    preactivation = torch.randn(24, INNER, device=device)
    for wanted in ([False] * 10, [True] * 10):
        arguments = (g, x, statistics, preactivation, *parameters, mask, "star_relu", 1e-5, wanted)
        torch.library.opcheck(torch.ops.hf_poolformer.channel_mlp_backward.default, arguments)


def test_a_block_agrees_with_the_reference(block, x):
    assert_same(outcome(block, block, x), outcome(block.by_formula, block, x), rtol=1e-4, atol=1e-4)


def test_compiles_into_one_graph(block, x):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same(outcome(compiled, block, x), outcome(block, block, x))


def test_compiles_for_any_size(block, x):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((2, DIM, 3, 4), (3, DIM, 5, 2)):
        x = torch.randn(size, device=x.device)
        assert_same(outcome(compiled, block, x), outcome(block, block, x))


def exported_operations(program):
    """Those of ours; statistics that nobody has yet are a pass of their own."""
    names = {str(node.target) for node in program.graph.nodes if "hf_poolformer" in str(node.target)}
    return names - {"hf_poolformer.sample_statistics.default"}


def test_exports_with_the_operations_if_asked_to(block, x):
    program = torch.export.export(block.eval(), (x,))
    assert exported_operations(program) == {"hf_poolformer.pool_mixer.default", "hf_poolformer.channel_mlp.default"}
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("kernels", [None, "triton"])
def test_a_block_of_a_model_exports_plain_operations_unless_asked_for_others(kernels, x, monkeypatch):
    monkeypatch.delenv("HF_POOLFORMER_KERNELS", raising=False)
    config = MetaFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(DIM, 8, 8, 8), kernels=kernels)
    block = MetaFormerModel(config).encoder.block[0][0].to(x.device).eval()
    program = torch.export.export(block, (x,))
    asked = {"hf_poolformer.pool_mixer.default", "hf_poolformer.channel_mlp.default"}
    assert exported_operations(program) == (asked if kernels else set())
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, block, x):
    def run(x):
        return checkpoint(block, x, use_reentrant=use_reentrant)

    assert_same(outcome(run, block, x), outcome(block, block, x))


def test_autocast_in_a_compiled_graph(block, x):
    def run(x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return block(x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(outcome(compiled, block, x), outcome(run, block, x))
    assert run(x).dtype == torch.float32


def test_two_steps_of_training_do_not_disturb_each_other(block, x):
    other = copy.deepcopy(block)
    first = outcome(block, block, x)
    outcome(other, other, torch.randn_like(x))
    assert_same(outcome(block, block, x), first, rtol=0, atol=0)


def test_what_was_not_saved_has_no_backward(device):
    arguments = (*mlp_arguments(device, True), "star_relu", 1e-5, torch.float32, False, False)
    y, *_ = torch.ops.hf_poolformer.channel_mlp(*arguments)
    with pytest.raises(RuntimeError, match="save=False"):
        y.sum().backward()
