"""Bulk prediction in its steady state."""

import pytest

from hf_poolformer.benchmark import predict as module
from hf_poolformer.benchmark.case import Case
from hf_poolformer.benchmark.predict import (
    MODEL,
    PIPELINE,
    READING,
    WHOLE,
    find_bottleneck,
    measure_predict,
    steady_rate,
)
from hf_poolformer.benchmark.report import Report
from hf_poolformer.commands.benchmark import parser as benchmark_parser
from hf_poolformer.commands.predict import parser as predict_parser
from hf_poolformer.foundation.timing import Deadline
from hf_poolformer.prediction import predict


@pytest.mark.parametrize(
    ("reading", "model", "whole", "shared_cores", "bottleneck"),
    [
        (100, 400, 97, False, "reading"),
        (400, 100, 95, True, "model"),
        (100, 120, 55, True, "reading and model"),
        (100, 120, 55, False, "hand-over"),
        (100, 120, 30, True, "hand-over"),
    ],
)
def test_the_bottleneck_is_named(reading, model, whole, shared_cores, bottleneck):
    found, explanation = find_bottleneck({READING: reading, MODEL: model, WHOLE: whole}, shared_cores)
    assert found == bottleneck
    assert all(f"{number}" in explanation for number in (reading, model, whole))


def test_neither_the_start_nor_the_end_counts():
    # Three batches that were ready, five of a second each, three that come out of a buffer.
    times = [0.0, 0.1, 0.2, 1.2, 2.2, 3.2, 4.2, 5.2, 5.3, 5.4, 5.5]
    assert steady_rate(times, margin=3, batch_size=10) == pytest.approx(10)


@pytest.fixture
def measured(monkeypatch):
    """A short measurement on the CPU, and the report's tables."""
    monkeypatch.setattr(module, "PHOTOGRAPH", (64, 48))

    def measure(device_preprocessing):
        report = Report("", "cpu", Deadline(None))
        case = Case("infer", "tiny", batch_size=4, image_size=32)
        options = {"workers": 0, "batches": 2, "rounds": 1, "device_preprocessing": device_preprocessing}
        report.predict = measure_predict(case, report.deadline, **options)
        return report.predict, report.to_markdown()

    return measure


def test_all_parts_are_measured(measured):
    found, tables = measured("no")
    assert set(found.rates) == {READING, MODEL, WHOLE, PIPELINE}
    assert min(found.rates.values()) > 0
    assert f"Bottleneck: {found.bottleneck}" in tables and "JPEG files, --device_preprocessing no**" in tables


def test_auto_is_what_predict_takes_it_for(measured, monkeypatch):
    """On a CPU there is nothing to choose; elsewhere the choice is asked for once, and followed by all parts."""
    found, tables = measured("auto")
    assert (found.chosen, found.choice) == ("no", "")
    assert "--device_preprocessing auto, which chose no**" in tables

    asked, used = [], []

    def choose(predictor, items, total, batch_size, workers):
        asked.append((predictor.preprocessing.where, len(list(items)), total, batch_size, workers))
        return "decode", "device_preprocessing auto: decode by torchvision (...)"

    def predict_by(*arguments, device_preprocessing, **options):
        used.append(device_preprocessing)
        return predict(*arguments, device_preprocessing=device_preprocessing, **options)

    monkeypatch.setattr(module, "choose_way", choose)
    monkeypatch.setattr(module, "predict", predict_by)
    # A CPU that decodes as a GPU would.
    monkeypatch.setattr("hf_poolformer.prediction.pixels._decoder", lambda *_: "torchvision")
    found, tables = measured("auto")
    assert asked == [("no", found.images, found.images, 4, 0)] and used == ["decode"]
    assert found.chosen == "decode" and min(found.rates.values()) > 0
    assert "--device_preprocessing auto, which chose decode**" in tables
    assert "device_preprocessing auto: decode by torchvision (...)" in tables


def test_the_command_has_the_choices_of_predict():
    def choices(parser):
        [action] = [action for action in parser._actions if action.dest == "device_preprocessing"]
        return action.choices, action.default, action.help

    [commands] = [action for action in benchmark_parser()._actions if action.dest == "command"]
    assert choices(commands.choices["predict"]) == choices(predict_parser())
