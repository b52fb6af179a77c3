"""The training loop with tensors that are there and with streamed photographs."""

import pytest
import torch

from hf_poolformer.benchmark.case import Case
from hf_poolformer.benchmark.loop import Synthetic, find_bottleneck, loader_rate, measure_loop


def rates(compute: float, decode: float, whole: float, **others: float) -> dict[str, float]:
    names = {"loop, synthetic images": compute, "loader alone": decode, "loop, streamed photographs": whole}
    return {**names, **others}


@pytest.mark.parametrize(
    ("measured", "shared_cores", "bottleneck"),
    [
        (rates(100, 400, 97), False, "compute"),
        (rates(400, 100, 95), False, "decode"),
        (rates(400, 100, 80), True, "decode"),
        (rates(100, 120, 55), True, "decode and compute"),
        (rates(100, 400, 60), False, "hand-over"),
        (rates(400, 300, 45, **{"copy alone": 50.0}), False, "copy"),
    ],
)
def test_the_bottleneck_is_named(measured, shared_cores, bottleneck):
    found, explanation = find_bottleneck(measured, shared_cores)
    assert found == bottleneck
    assert "images/s" in explanation or "images" in explanation


def test_a_loader_is_timed_without_its_start():
    loader = Synthetic({"pixel_values": torch.zeros(4, 3, 8, 8)})
    loader.set_epoch(3)
    assert loader_rate(loader, batch_size=4, batches=5) > 1000


def test_the_loop_runs_with_both(monkeypatch):
    monkeypatch.setattr("hf_poolformer.benchmark.loop.PHOTOGRAPH", (64, 48))
    case = Case("train", "tiny", batch_size=4, image_size=32)
    report = measure_loop(case, steps=2, workers=0)
    assert set(report.rates) == {"loop, synthetic images", "loader alone", "loop, streamed photographs"}
    assert min(report.rates.values()) > 0
    assert 0 <= report.data_wait_share < 1
    assert report.bottleneck
