"""Who computes the blocks: decided once per forward, for what reasons, and blocks on their own."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from hf_poolformer import TOKEN_MIXERS, MetaFormerBackbone, MetaFormerConfig, MetaFormerModel, backends
from hf_poolformer.token_mixers import Pooling


TINY = {"depths": (2, 1, 1, 1), "hidden_sizes": (8, 8, 16, 16), "mlp_ratio": 2, "layer_scale_init_value": 1.0}
NO_CPU_KERNELS = backends.why_not_cpu(torch.zeros(1, 8, 4, 4))
needs_cpu_kernels = pytest.mark.skipif(NO_CPU_KERNELS is not None, reason=str(NO_CPU_KERNELS))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("HF_POOLFORMER_KERNELS", raising=False)


@pytest.fixture
def decisions(monkeypatch):
    """The backends that were decided for, one entry per decision."""
    made, decide = [], backends.decide

    def noted(*args):
        decision = decide(*args)
        made.append(decision.backend)
        return decision

    monkeypatch.setattr(backends, "decide", noted)
    return made


def make(scramble, model_class=MetaFormerModel, **settings):
    return scramble(model_class(MetaFormerConfig(**TINY, **settings))).eval()


# --- once per forward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["reference", "auto", "cpu"])
@pytest.mark.parametrize("model_class", [MetaFormerModel, MetaFormerBackbone])
@pytest.mark.parametrize("grad", [False, True])
def test_a_forward_decides_once(kernels, model_class, grad, scramble, decisions):
    if kernels == "cpu" and NO_CPU_KERNELS:
        pytest.skip(NO_CPU_KERNELS)
    model = make(scramble, model_class, kernels=kernels)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            model(torch.randn(2, 3, 32, 32))
    fastest = "reference" if NO_CPU_KERNELS or grad else "cpu"
    assert decisions == [{"auto": fastest}.get(kernels, kernels)] * 2


@needs_cpu_kernels
def test_a_failed_forward_leaves_no_decision_behind(scramble, decisions):
    model = make(scramble, kernels="cpu")
    broken = model.encoder.block[1][0]
    broken.output = nn.Conv2d(1, 1, 1)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 32, 32))
    decisions.clear()
    block = model.encoder.block[0][0]
    block.config.kernels = "reference"
    block(torch.randn(2, 8, 4, 4))
    assert decisions == ["reference"], "it decided for itself"


@needs_cpu_kernels
def test_blocks_and_stages_on_their_own(scramble, decisions, relative_error):
    model = make(scramble)
    x = torch.randn(2, 8, 6, 5)
    stage = model.encoder.block[0]
    for part in (stage, stage[1:], stage[0]):
        outcomes = {}
        for kernels in ("reference", "auto", "cpu"):
            model.config.kernels = kernels
            decisions.clear()
            with torch.no_grad():
                outcomes[kernels] = part(x)
            assert set(decisions) == {"reference" if kernels == "reference" else "cpu"}
        for outcome in outcomes.values():
            assert relative_error(outcome, outcomes["reference"]) < 1e-5
        assert not torch.equal(outcomes["cpu"], outcomes["reference"]), "kernels round otherwise"


@needs_cpu_kernels
def test_the_configuration_is_asked_in_every_forward(scramble):
    model, x = make(scramble, kernels="reference"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x).last_hidden_state
        model.config.kernels = "cpu"
        fused = model(x).last_hidden_state
        model.config.kernels = "reference"
        assert torch.equal(model(x).last_hidden_state, before)
    assert not torch.equal(fused, before)


def selective():
    """Keeps nothing: a mode watches the block, in forward and when it is computed again."""
    return create_selective_checkpoint_contexts(lambda *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE)


@needs_cpu_kernels
@pytest.mark.parametrize(
    "how",
    [{"use_reentrant": False}, {"use_reentrant": True}, {"use_reentrant": False, "context_fn": selective}],
    ids=["plain", "reentrant", "selective"],
)
@pytest.mark.parametrize("kernels", ["auto", "cpu"])
def test_gradients_with_checkpointing(kernels, how, scramble, relative_error):
    """A block is computed again outside of its model's forward, and then as it was in it."""
    model, x = make(scramble, kernels=kernels).train(), torch.randn(2, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model.zero_grad()
        model(x).last_hidden_state.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if "before_norm.bias" not in name:  # it cancels: rounding errors, or zero
            assert relative_error(gradients[1][name], gradient) < 1e-4, name


@needs_cpu_kernels
def test_gradients_that_are_turned_on_within(scramble, decisions):
    """Somebody's part of a model turns on what kernels of inference do not have."""
    model = make(scramble)
    block = model.encoder.block[0][1]
    forward = block.forward

    def with_gradients(x):
        with torch.enable_grad():
            return forward(x)

    block.forward = with_gradients
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert decisions == ["cpu", "reference"]


# --- reasons ---------------------------------------------------------------------------------------------------------


def test_who_is_asked_for(monkeypatch):
    x = torch.randn(1, 2, 3, 3)
    fastest = "cpu" if NO_CPU_KERNELS is None else "reference"
    with torch.no_grad():
        assert backends.decide(x).backend == fastest
        assert backends.decide(x, "reference").backend == "reference"
        monkeypatch.setenv("HF_POOLFORMER_KERNELS", "auto")
        assert backends.decide(x, "reference").backend == fastest
    assert backends.decide(x).backend == "reference", "with gradients the CPU's kernels are not the fastest"
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "nonsense")
    with pytest.raises(ValueError, match="auto, cpu, triton, reference but is 'nonsense'"):
        backends.decide(x)
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "triton")
    monkeypatch.setattr(backends, "_why_no_kernels", lambda device, index: "there is no Triton")
    with pytest.raises(RuntimeError, match=r"cannot run: there is no Triton.*HF_POOLFORMER_KERNELS=auto"):
        backends.decide(x)
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "")
    backends.decide(x)  # empty is unset


@pytest.mark.parametrize(
    "x, parameter, reason",
    [
        (torch.ones(1, 2, 3, 3, dtype=torch.float64), None, "x is torch.float64"),
        (torch.ones(2, 3, 3), None, "not \\(batch, channels, height, width\\)"),
        (torch.ones(0, 2, 3, 3), None, "x is empty"),
        (torch.ones(1, 2, 3, 3), torch.ones(2, dtype=torch.int64), "a parameter is torch.int64"),
        (torch.ones(1, 2, 3, 3), torch.ones(2, device="meta"), "a parameter on meta"),
    ],
)
def test_what_kernels_do_not_support_has_a_reason(x, parameter, reason, monkeypatch):
    monkeypatch.setattr(backends, "_why_no_kernels", lambda device, index: None)
    with pytest.raises(RuntimeError, match=reason):
        backends.takes(backends.decide(x, "triton"), x, parameter)
    with torch.no_grad():
        assert not backends.takes(backends.decide(x), x, parameter)
    assert backends.why_not_triton(torch.ones(1, 2, 3, 3), torch.ones(2), None) is None


def test_unsupported_devices_have_a_reason():
    assert "CUDA GPUs only" in backends.why_not_triton(torch.ones(1, 2, 3, 3, device="meta"))


def test_without_triton_or_this_package_the_reference_works(run_python):
    code = """
import sys, torch
from hf_poolformer import MetaFormerConfig, MetaFormerModel, backends

x = torch.ones(1, 3, 32, 32)
model = MetaFormerModel(MetaFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(4, 4, 4, 4)))
for missing in ("hf_poolformer.kernels", "triton"):
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" or "hf_poolformer.kernels" in name]:
        del sys.modules[name]
    sys.modules[missing] = None
    with torch.no_grad():
        shape = tuple(model(x).last_hidden_state.shape)
    print(backends.why_not_triton(x), shape)
"""
    first, second = run_python(code).stdout.splitlines()
    assert first.startswith("hf_poolformer.kernels") and "is not installed" in first and "(1, 4, 1, 1)" in first
    assert "triton is not installed" in second and "(1, 4, 1, 1)" in second


def test_kernels_of_another_interface_are_left_alone(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "INTERFACE", backends.INTERFACE + 1)
    assert "has kernels of interface" in backends.why_not_triton(torch.ones(1, 2, 3, 3))


# --- modules ---------------------------------------------------------------------------------------------------------


class Twin(nn.Module):
    """Somebody's own mixer, which says that it computes what pooling does."""

    def __init__(self, config, stage):
        super().__init__()
        self.inner = Pooling(config, stage)

    def forward(self, hidden_states):
        return self.inner(hidden_states)

    @property
    def fused_pool_size(self):
        return self.inner.fused_pool_size


@needs_cpu_kernels
def test_a_new_mixer_says_itself_what_it_is_fused_to(monkeypatch, scramble, relative_error):
    from hf_poolformer.kernels import cpu

    monkeypatch.setitem(TOKEN_MIXERS, "twin", Twin)
    model = make(scramble, token_mixers=("twin",) * 4)
    x, stages, infer = torch.randn(2, 3, 32, 32), [], cpu.infer
    monkeypatch.setattr(cpu, "infer", lambda *args: stages.append(1) or infer(*args))
    with torch.no_grad():
        fused = model(x).last_hidden_state
    assert len(stages) == 4
    assert relative_error(fused, model(x).last_hidden_state) < 1e-5


@pytest.mark.parametrize("method", ["mix_tokens", "mix_channels", "merge"])
def test_subclasses_of_a_block_are_computed_as_they_say(method, scramble):
    model = make(scramble)
    block = model.encoder.block[0][0]
    kind = type(block)
    original = getattr(kind, method)
    block.__class__ = type("Mine", (kind,), {method: lambda self, *args: 2 * original(self, *args)})
    x = torch.randn(2, 3, 32, 32)
    outcomes = []
    for kernels in ("reference", "auto") if NO_CPU_KERNELS else ("reference", "auto", "cpu"):
        model.config.kernels = kernels
        with torch.no_grad():
            outcomes.append(model(x).last_hidden_state)
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome, outcomes[0], rtol=1e-4, atol=1e-5)


# --- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """The CPU, taken for an H100."""
    from hf_poolformer import kernels

    monkeypatch.setattr(backends, "_is_on_gpu", lambda x: True)
    monkeypatch.setattr(backends, "_why_no_kernels", lambda device, index: None)
    monkeypatch.setattr(backends, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(backends, "triton_kernels", lambda: kernels)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return monkeypatch


def images(pixels, dtype=torch.bfloat16, count=1):
    return torch.zeros(1, 3, 1, 1, dtype=dtype).expand(count, 3, 1, pixels)


MANY = images(backends.FEWEST_PIXELS, count=backends.FEWEST_IMAGES)


def test_on_a_gpu_auto_takes_what_was_fastest(gpu):
    decision = backends.decide(MANY)
    assert (decision.backend, decision.channels_last, decision.forced) == ("triton", True, False)
    # A block that is computed again for its gradients sees smaller maps of as many images.
    assert backends.decide(images(9, count=backends.FEWEST_IMAGES)).backend == "triton"
    assert "training on 95 images" in backends.why_not_fastest(images(10**6, count=95))
    assert backends.decide(images(10**6, count=95)).backend == "reference"
    with torch.no_grad():
        assert backends.decide(MANY).backend == "triton"
        assert backends.decide(MANY, "reference").backend == "reference"
        assert "pixels, unless a CUDA graph" in backends.why_not_fastest(images(9))
        small = backends.decide(images(9))
        assert (small.backend, small.channels_last) == ("reference", False)
        assert backends.decide(images(9), pools=True).backend == "triton"


def test_small_batches_take_kernels_in_cuda_graphs(gpu):
    from hf_poolformer.kernels import GRAPHING

    with torch.no_grad():
        token = GRAPHING.set(True)
        assert backends.decide(images(9)).backend == "triton"
        GRAPHING.reset(token)
        assert backends.decide(images(9)).backend == "reference"
        gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert backends.decide(images(9)).backend == "triton"


def test_what_was_not_fastest_on_a_gpu_has_a_reason(gpu):
    assert "TF32" in backends.why_not_fastest(images(backends.FEWEST_PIXELS, torch.float32))
    assert backends.why_not_fastest(images(9, torch.float16, count=128)) is None
    gpu.setattr(torch.compiler, "is_compiling", lambda: True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert "compiled" in backends.why_not_fastest(MANY, pools=True)
            whole = backends.why_not_fastest(MANY, whole=True)
            assert ("compiled" in whole) if grad else whole is None
            assert "few images" in backends.why_not_fastest(MANY[:1], whole=True) or grad
    gpu.undo()
    gpu.setattr(backends, "_is_on_gpu", lambda x: True)
    gpu.setattr(backends, "_why_no_kernels", lambda device, index: None)
    gpu.setattr(backends, "_capability", lambda index: (7, 5))
    assert "older than compute capability 8.0" in backends.why_not_fastest(MANY)
    assert backends.decide(MANY).backend == "reference"
    gpu.setattr(backends, "_why_no_kernels", lambda device, index: "there is no Triton")
    assert backends.why_not_fastest(MANY) == "there is no Triton"
