"""`predict --device_preprocessing auto`: what is measured, chosen and kept, with the CPU in the place of a GPU."""

import io
import json
import types

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.prediction import predict, run, ways
from hf_poolformer.prediction.inference import Predictor
from hf_poolformer.prediction.parts import offer_run
from hf_poolformer.prediction.pixels import Preprocessing
from hf_poolformer.training.device_choice import Rates
from hf_poolformer.training.device_pipeline import Preprocessing as Way


NO, DECODE = Way("no"), Way("decode", "torchvision")


def encode(seed: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 32, 64), num_labels=3)
    PoolFormerForImageClassification(config).save_pretrained(tmp_path / "model")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    PoolFormerImageProcessor(**size).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def photographs(tmp_path):
    (tmp_path / "photographs").mkdir()
    for seed in range(10):
        (tmp_path / "photographs" / f"{seed}.jpg").write_bytes(encode(seed))
    return tmp_path / "photographs"


@pytest.fixture
def decoding(monkeypatch):
    """A CPU that decodes as a GPU would."""
    monkeypatch.setattr("hf_poolformer.prediction.pixels._decoder", lambda *_: "torchvision")


def on_a_gpu():
    processor, device = PoolFormerImageProcessor(), torch.device("cuda")
    return types.SimpleNamespace(processor=processor, device=device, preprocessing=Preprocessing(processor, device))


@pytest.mark.parametrize(
    ("no", "decode", "workers", "chosen"),
    [
        (Rates(200, 3000), Rates(5000, 2800), 8, "decode"),  # the workers hold it up
        (Rates(200, 3000), Rates(5000, 2800), 14, "no"),  # within a fifth
        (Rates(200, 1000), Rates(5000, 800), 8, "no"),  # the model does
        (Rates(200, 1000), Rates(5000, 900), 0, "decode"),  # without workers: one after the other
    ],
)
def test_what_is_faster_is_chosen_and_said(monkeypatch, decoding, no, decode, workers, chosen):
    monkeypatch.setattr(ways, "cores", lambda: 16)
    monkeypatch.setattr(ways, "measured_rates", lambda *_: {NO: no, DECODE: decode})
    where, said = ways.choose_way(on_a_gpu(), [], None, 32, workers)
    assert where == chosen
    name = "no" if chosen == "no" else "decode by torchvision"
    assert said.startswith(f"device_preprocessing auto: {name} (no {no.expected(workers):.0f}, decode by torchvision ")
    assert f"expected of {workers} workers" in said


def test_where_there_is_nothing_to_choose(monkeypatch, decoding, caplog):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    cpu = types.SimpleNamespace(device=torch.device("cpu"))
    assert ways.choose_way(cpu, [], None, 32, 2) == ("no", "")
    monkeypatch.setattr(ways, "measured_rates", fail)
    where, said = ways.choose_way(on_a_gpu(), [], 30, 32, 2)
    assert where == "no" and "30 images are too few to measure" in said
    assert ways.choose_way(on_a_gpu(), [], 30_000, 32, 2) == ("no", "") and "measuring failed" in caplog.text

    def refuse(*_):
        raise UserError("nothing here decodes JPEGs on cuda (torchvision: no nvJPEG): leave it out")

    monkeypatch.setattr("hf_poolformer.prediction.pixels._decoder", refuse)
    where, said = ways.choose_way(on_a_gpu(), [], 30_000, 32, 2)
    assert where == "no" and "no nvJPEG" in said


def test_measuring_leaves_the_predictor_as_it_was(model, decoding):
    predictor = Predictor(str(model), device="cpu")
    before, threads = predictor.preprocessing, torch.get_num_threads()
    both = {NO: before, DECODE: Preprocessing(predictor.processor, predictor.device, "decode")}
    items = [*((f"{seed}.jpg", encode(seed)) for seed in range(5)), ("broken", b"junk")]
    rates = ways.measured_rates(predictor, both, items, 8)
    assert list(rates) == [NO, DECODE] and all(rate.worker > 0 and rate.device > 0 for rate in rates.values())
    assert predictor.preprocessing is before and torch.get_num_threads() == threads
    assert both[DECODE].decoded == both[DECODE].held_back == before.held_back == 0


def rows(folder):
    return pq.read_table(folder).to_pylist()


def test_a_table_by_the_chosen_way(model, photographs, tmp_path, decoding, monkeypatch, capsys):
    given = []

    def choose(predictor, items, total, batch_size, workers):
        given.append((len(list(items)), total, batch_size, workers))
        return "decode", "device_preprocessing auto: decode by torchvision"

    monkeypatch.setattr(run, "choose_way", choose)
    options = {"device": "cpu", "batch_size": 4, "num_workers": 0}
    predict(model, [photographs], tmp_path / "auto.parquet", device_preprocessing="auto", **options)
    assert given == [(10, 10, 4, 0)]
    assert "device_preprocessing auto: decode by torchvision" in capsys.readouterr().err
    predict(model, [photographs], tmp_path / "asked.parquet", device_preprocessing="decode", **options)
    assert rows(tmp_path / "auto.parquet") == rows(tmp_path / "asked.parquet")


def test_a_folder_keeps_to_its_way(model, photographs, tmp_path, decoding, monkeypatch):
    """Killed in its middle; begun by another process while this one measured; on a machine that cannot."""
    output, calls = tmp_path / "parts", []
    monkeypatch.setattr(run, "choose_way", lambda *_: calls.append(1) or ("decode", ""))
    options = {"device": "cpu", "batch_size": 2, "part_size": 4, "num_workers": 0, "device_preprocessing": "auto"}
    asked = iter([False, False, False, True])
    with pytest.raises(KeyboardInterrupt):
        predict(model, [photographs], output, should_stop=lambda: next(asked), **options)
    monkeypatch.setattr(run, "choose_way", None)  # not asked again
    summary = predict(model, [photographs], output, **options)
    assert summary.complete and summary.predicted == 10 and calls == [1]
    [manifest] = [path for path in output.glob(".*.json") if "run" in json.loads(path.read_text())]
    about = json.loads(manifest.read_text())
    assert about["run"]["device_preprocessing"] == "decode"
    with pytest.raises(UserError, match="device_preprocessing decode instead of no"):
        predict(model, [photographs], output, **{**options, "device_preprocessing": "no"})

    def overtaken(predictor, *_):
        offer_run(tmp_path / "other", about["run"], {})
        return "no", ""

    monkeypatch.setattr(run, "choose_way", overtaken)
    assert predict(model, [photographs], tmp_path / "other", **options).complete
    assert rows(tmp_path / "other") == rows(output)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"was begun with --device_preprocessing decode\. .*needs a CUDA GPU"):
        predict(model, [photographs], output, **options)
