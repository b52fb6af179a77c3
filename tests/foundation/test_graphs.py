"""`graphed`: the model itself where there is no GPU, and the bookkeeping of graphs, recorded by a stub."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_poolformer import (
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerForSemanticSegmentation,
    PoolFormerImageProcessor,
    graphed,
)
from hf_poolformer.foundation import graphs
from hf_poolformer.kernels import GRAPHING
from hf_poolformer.prediction.inference import Predictor


class View(nn.Module):
    """Its result shares memory with its input, so what a replay would compute is there as soon as that is copied."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls: list[bool] = []

    def forward(self, pixel_values, scale=None):
        self.calls.append(GRAPHING.get())
        return ImageClassifierOutput(logits=pixel_values.flatten(1))


@pytest.fixture
def cuda(monkeypatch):
    """Streams and graphs that note what is done to them, on the CPU."""
    noted = SimpleNamespace(recorded=[], replayed=0)

    class Graph:
        def replay(self):
            noted.replayed += 1

        def pool(self):
            return "pool"

    @contextlib.contextmanager
    def record(graph, pool=None, capture_error_mode=None):
        noted.recorded.append((pool, capture_error_mode))
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(graphs, "can_record", lambda images, model: not model.training and not torch.is_grad_enabled())
    return noted


@pytest.fixture
def model():
    return View().eval()


def images(batch=2, value=None):
    return torch.randn(batch, 3, 4, 4) if value is None else torch.full((batch, 3, 4, 4), float(value))


def test_on_the_cpu_it_is_the_model():
    model = PoolFormerForImageClassification(PoolFormerConfig(depths=(1,) * 4, hidden_sizes=(8,) * 4)).eval()
    fast, x = graphed(model), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(fast(pixel_values=x).logits, model(x).logits)
    assert fast(x).logits.requires_grad, "with gradients, too"
    assert fast.model is model


@torch.no_grad()
def test_a_shape_is_recorded_when_it_comes_again(cuda, model):
    fast = graphed(model)
    fast(images())
    assert not cuda.recorded and model.calls == [False]
    for value in range(3):
        with torch.inference_mode() if value == 1 else contextlib.nullcontext():
            assert torch.equal(fast(images(value=value)).logits, images(value=value).flatten(1))
    assert cuda.recorded == [(None, "thread_local")] and cuda.replayed == 3
    assert model.calls == [False, *[True] * (graphs.REHEARSALS + 1)]
    assert not GRAPHING.get()


@torch.no_grad()
def test_results_stay_what_they_were(cuda, model):
    fast = graphed(model)
    kept = [fast(images(value=value)).logits for value in range(4)]
    assert [int(each[0, 0]) for each in kept] == [0, 1, 2, 3]


@torch.no_grad()
def test_shapes_share_their_memory_and_are_few(cuda, model, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    fast = graphed(model)
    for batch in (1, 2, 3) * 3:
        assert fast(images(batch)).logits.shape[0] == batch
    assert [pool for pool, _ in cuda.recorded] == [None, "pool"]


@torch.no_grad()
def test_another_weight_is_recorded_anew_and_another_value_is_not(cuda, model):
    fast = graphed(model)
    for change in (lambda: model.weight.add_(1), lambda: setattr(model, "weight", nn.Parameter(torch.zeros(1)))):
        for _ in range(3):
            fast(images())
        change()
    assert len(cuda.recorded) == 1
    for _ in range(2):
        fast(images())
    assert len(cuda.recorded) == 2


def test_what_is_no_inference_runs_as_it_is(cuda, model):
    fast = graphed(model)
    for _ in range(3):
        fast(images())  # with gradients
        with torch.no_grad():
            fast(images(), scale=2)
            model.train()
            fast(images())
            model.eval()
    assert not cuda.recorded


@torch.no_grad()
def test_a_model_that_cannot_be_recorded_runs_as_it_is(cuda, model, monkeypatch, caplog):
    def refuse(*arguments, **keywords):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    fast = graphed(model)
    for value in range(4):
        assert torch.equal(fast(images(value=value)).logits, images(value=value).flatten(1))
    assert caplog.text.count("without a CUDA graph: operation not permitted when stream is capturing\n") == 1
    assert not GRAPHING.get()


@torch.no_grad()
def test_a_model_for_segmentation(cuda):
    config = PoolFormerConfig(depths=(1,) * 4, hidden_sizes=(8,) * 4, num_labels=3, fpn_feature_size=8)
    model, x = PoolFormerForSemanticSegmentation(config).eval(), torch.randn(1, 3, 64, 64)
    fast = graphed(model)
    for _ in range(3):
        torch.testing.assert_close(fast(pixel_values=x).logits, model(x).logits)
    assert len(cuda.recorded) == 1 and cuda.replayed == 2


@pytest.mark.parametrize("num_labels", [3, 0])
def test_features_that_predict_writes(num_labels, cuda, tmp_path):
    """They come out of a graph like answers, whether a head takes them or there is none."""
    config = PoolFormerConfig(depths=(1,) * 4, hidden_sizes=(8,) * 4, num_labels=num_labels, image_size=32)
    PoolFormerForImageClassification(config).save_pretrained(tmp_path)
    PoolFormerImageProcessor(size={"height": 32, "width": 32}, crop_pct=1.0).save_pretrained(tmp_path)
    predictor = Predictor(str(tmp_path), device="cpu", embeddings=True)  # which has answered once to measure itself
    image = Image.new("RGB", (32, 32), (200, 30, 90))
    found = [predictor.rows(predictor.preprocessing.load([("image", image)]))[0] for _ in range(3)]
    assert len(cuda.recorded) == 1 and cuda.replayed == 3
    pixels = predictor.processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        (features,) = predictor.model(pixels).logits
    for row in found:
        assert row["error"] is None and row["embedding"].shape == (8,)
        if num_labels:
            scores = predictor.model.classifier(torch.from_numpy(row["embedding"])).softmax(-1)
            assert sorted(scores.tolist(), reverse=True) == pytest.approx(row["scores"], abs=1e-6)
        else:
            torch.testing.assert_close(torch.from_numpy(row["embedding"]), features)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_on_a_gpu(dtype, relative_error):
    config = PoolFormerConfig(depths=(1,) * 4, hidden_sizes=(32, 64, 64, 64), num_labels=10)
    model = PoolFormerForImageClassification(config).cuda().to(dtype, memory_format=torch.channels_last).eval()
    fast = graphed(model)
    with torch.inference_mode():
        for batch in (1, 2, 1, 2, 1, 2):
            x = torch.randn(batch, 3, 64, 64, device="cuda", dtype=dtype)
            assert relative_error(fast(x).logits, model(x).logits) < (2e-2 if dtype == torch.bfloat16 else 5e-3)
    assert sum(recording is not None for recording in fast._recordings.values()) == 2
