"""Stages in graphs: one registered operation each, which computes what the branches one by one do."""

import pytest
import torch

from hf_poolformer import (
    MetaFormerConfig,
    MetaFormerForImageClassification,
    PoolFormerConfig,
    PoolFormerForImageClassification,
)
from hf_poolformer.kernels import ahead, stages


SHAPE = {"depths": (2, 1, 1, 1), "hidden_sizes": (8, 16, 16, 32), "num_labels": 3, "image_size": 32}
VARIANTS = ("poolformer_s12", "poolformerv2_s12", "convformer_s18", "caformer_s18")
OPERATION = "hf_poolformer.infer_stage"


@pytest.fixture
def make(scramble, device, monkeypatch):
    def run(variant, **settings):
        config = MetaFormerConfig.from_variant(variant, **SHAPE, **settings)
        is_first = isinstance(config, PoolFormerConfig)
        model = (PoolFormerForImageClassification if is_first else MetaFormerForImageClassification)(config)
        return scramble(model).to(device)

    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "triton")
    torch.compiler.reset()
    return run


@pytest.fixture
def images(device):
    return torch.randn(3, 3, 16, 24, device=device)


class Graph:
    """A backend of torch.compile that runs graphs as they are, and keeps the names of our operations in them."""

    def __init__(self):
        self.operations = []

    def __call__(self, graph, examples):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        self.operations += [name for name in names if "hf_poolformer" in name]
        return graph


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stage_is_one_operation_of_a_graph(variant, make, images, relative_error, monkeypatch):
    model, graph = make(variant), Graph()
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend=graph)(images).logits
        monkeypatch.setenv("HF_POOLFORMER_KERNELS", "reference")
        wanted = model(images).logits
    assert graph.operations == [OPERATION] * 4
    # float32 in another order; on a GPU the reference's convolutions may round to TF32.
    assert relative_error(got, wanted) < (1e-5 if images.device.type == "cpu" else 5e-3)


@pytest.mark.parametrize("variant", ["poolformer_s12", "caformer_s18"])
def test_compiled_and_functionalised_for_batches_of_any_size(variant, make, images, relative_error):
    model = make(variant, norm_eps=1e-2)  # which shows
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (images, images[:2]):
            assert relative_error(compiled(batch).logits, model(batch).logits) < 1e-5


def test_autocast(make, images, relative_error):
    model = make("caformer_s18")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
        got, wanted = compiled(images).logits, model(images).logits
    assert got.dtype == wanted.dtype
    # The embeddings' convolutions and the norms between are operations of the graph here: each rounds to 2^-8.
    assert relative_error(got, wanted) < 3e-2


def test_training_and_what_is_not_plain_have_no_such_operation(make, images):
    model = make("poolformer_s12")
    graph = Graph()
    torch.compile(model.train(), fullgraph=True, backend=graph)(images)
    assert graph.operations and OPERATION not in graph.operations
    model.eval()
    model.poolformer.encoder.block[0][1].token_mixer.pool = torch.nn.AvgPool2d(3, 1, 1)  # counts the padding
    torch.compiler.reset()
    graph = Graph()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=graph)(images)
    assert graph.operations.count(OPERATION) == 3


def test_weights_that_are_shared_and_change(make, images, relative_error):
    model = make("poolformer_s12")
    first, second = model.poolformer.encoder.block[0]
    second.output = first.output
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        before = compiled(images).logits
        assert relative_error(before, model(images).logits) < 1e-5
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        after = compiled(images).logits
        assert relative_error(after, model(images).logits) < 1e-5
    assert not torch.allclose(after, before, rtol=1e-2)


def test_a_rehearsal_that_fails_is_told_and_costs_nothing(make, images, relative_error, monkeypatch, caplog):
    model, run = make("poolformer_s12"), stages.run

    def fail_aside(*arguments):
        if ahead._collected.get() is not None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
        return run(*arguments)

    monkeypatch.setattr(ahead, "INTERPRETED", False)
    monkeypatch.setattr(stages, "run", fail_aside)
    stages.stage_of.cache_clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            got = compiled(images).logits
        monkeypatch.setattr(ahead, "INTERPRETED", True)
        assert relative_error(got, model(images).logits) < 1e-5
    told = [record.getMessage() for record in caplog.records if "one by one" in record.getMessage()]
    # Once for each stage, not at every call.
    assert len(told) == 4 and not any("Tried" in text for text in told)


def test_opcheck(device):
    x = torch.randn(2, 8, 5, 4, device=device).contiguous(memory_format=torch.channels_last)
    vectors = [torch.randn(8, device=device) for _ in range(2)]
    text = "[('pool_mixer', {'pool_size': 3, 'eps': 0.0, 'weight': ..., 'layer_scale': ..., 'res_scale': None})]"
    assert stages.stage_of(text).branches[0][1]["weight"] is ...
    # The dispatcher's own tests: schema, the fake's shape and strides, and what autograd makes of it.
    torch.library.opcheck(torch.ops.hf_poolformer.infer_stage.default, (x, vectors, [1e-5], text, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("variant", ["poolformer_s12", "caformer_s18"])
def test_inductor_at_real_sizes(variant, mode, device, scramble, relative_error, monkeypatch):
    """Again and again, as a CUDA graph, too; other images give other logits."""
    config = MetaFormerConfig.from_variant(variant)
    is_first = isinstance(config, PoolFormerConfig)
    model = scramble((PoolFormerForImageClassification if is_first else MetaFormerForImageClassification)(config))
    model = model.to(device, torch.bfloat16).eval()
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "triton")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(4):
            images = torch.randn(4, 3, 224, 224, device=device, dtype=torch.bfloat16)
            # bfloat16, whose roundings lie elsewhere in a graph.
            assert relative_error(compiled(images).logits.clone(), model(images).logits) < 4e-2
