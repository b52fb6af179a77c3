"""The training loop, its parts, and what may be said to hold it up."""

import random

import pytest
import torch

from hf_poolformer.benchmark.case import Case
from hf_poolformer.benchmark.loop import PARTS, TOLERANCE, WARMUP, WHOLE, Watch, find_bottleneck, measure_loop


def rates(compute: float, loader: float, whole: float, **others: float) -> dict[str, float]:
    names = {"loop, synthetic images": compute, "loader alone": loader, WHOLE: whole}
    return {**names, **{f"{name} alone".replace("_", " "): rate for name, rate in others.items()}}


@pytest.mark.parametrize(
    ("measured", "together", "bottleneck"),
    [
        (rates(100, 400, 97), None, "compute"),
        (rates(400, 100, 95), None, "loader"),
        (rates(100, 105, 96), None, "loader and compute"),
        (rates(100, 120, 55), 56.0, "loader and compute"),
        (rates(100, 120, 55), 90.0, "compute and hand-over"),
        (rates(100, 400, 60), None, "compute and hand-over"),
        (rates(400, 300, 49, copy=50.0), None, "copy"),
        (rates(400, 3000, 200, device_stage=420.0), None, "device stage and compute"),
        # An H100's, when twelve steps were served from what had been read ahead.
        (rates(2790, 758, 2664), None, "not steady"),
    ],
)
def test_the_bottleneck_is_named(measured, together, bottleneck):
    found, explanation = find_bottleneck(measured, together)
    assert found == bottleneck
    assert "images/s" in explanation


def test_what_was_not_steady_names_no_bottleneck():
    assert "slowest part measured is the loader, 758.0" in find_bottleneck(rates(2790, 758, 2664))[1]
    found, explanation = find_bottleneck(rates(100, 400, 97), None, ["loader alone: it stalled"])
    assert found == "not steady" and explanation.startswith("loader alone: it stalled")


def test_no_rates_are_contradicted():
    generator = random.Random(0)
    found_so_far = set()
    for _ in range(2000):
        parts = {name: 10 ** generator.uniform(1, 4) for name in PARTS if generator.random() < 0.8}
        parts |= {name: 10 ** generator.uniform(1, 4) for name in ("loader alone", "loop, synthetic images")}
        least = min(parts.values())
        whole = least * generator.choice([generator.uniform(0.1, 1.5), 1.0, 0.7])
        together = generator.choice([None, least * generator.uniform(0.2, 2)])
        found, explanation = find_bottleneck({**parts, WHOLE: whole}, together)
        found_so_far.add(found)
        slowest = min(parts, key=parts.get)
        assert f"the {PARTS[slowest]}" in explanation
        assert (found == "not steady") == (whole > (1 + TOLERANCE) * least)
        if found == "not steady":
            continue
        named = found.split(" and ")
        assert PARTS[slowest] in named
        equal = {PARTS[name] for name, rate in parts.items() if rate <= (1 + TOLERANCE) * least}
        assert equal <= set(named)
        if whole >= (1 - TOLERANCE) * least:
            assert equal == set(named)
        else:  # something else than the slowest part alone
            assert len(named) > 1
    assert len(found_so_far) > 8


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def watch(self, watch: Watch, taking: float, making: float, ready: int = 0, count: int = 10**6):
        """Uses batches of four that take so long, the first of which are there, the others so long to make."""
        batch = {"pixel_values": torch.zeros(4, 1), "labels": torch.zeros(4)}

        def batches():
            free = 0.0  # when the next one is made, counted from the first that was not ready
            for number in range(count):
                if number >= ready:
                    free += making
                    self.now = max(self.now, free)
                yield batch

        for _ in watch(batches()):
            self.now += taking
        return watch.window


def test_a_steady_loop(monkeypatch):
    window = Clock(monkeypatch).watch(Watch("loop", 10.0, ahead=5), taking=0.1, making=0.02, ready=5)
    assert window.unsteady() == ""
    assert window.rate == pytest.approx(40, rel=0.02)
    assert window.waited == 0 and window.batches == pytest.approx(100, abs=2)


def test_a_loop_that_waits(monkeypatch):
    window = Clock(monkeypatch).watch(Watch("loop", 10.0, ahead=5), taking=0.1, making=0.2, ready=5)
    assert window.unsteady() == ""
    assert window.rate == pytest.approx(20, rel=0.05)
    assert window.waited / window.seconds == pytest.approx(0.5, rel=0.05)


def test_a_loop_that_lives_on_what_was_read_ahead(monkeypatch):
    # More was there than one could know: it lasts for three quarters of the window.
    window = Clock(monkeypatch).watch(Watch("loop", 10.0, ahead=5), taking=0.1, making=0.5, ready=80)
    assert "in the first half of the time" in window.unsteady()


def test_batches_made_are_held_against_those_used(monkeypatch):
    clock = Clock(monkeypatch)
    window = clock.watch(Watch("loop", 10.0, 5, "cpu", made=lambda: int(clock.now / 0.3)), taking=0.1, making=0.0)
    assert window.batches == pytest.approx(100, abs=2) and window.made == pytest.approx(33, abs=2)
    assert "the workers made" in window.unsteady()
    window = clock.watch(Watch("loop", 10.0, 5, "cpu", made=lambda: int(clock.now / 0.1)), taking=0.1, making=0.0)
    assert window.unsteady() == ""


@pytest.mark.parametrize(
    ("ahead", "count", "complaint"),
    [
        (50, 10**6, "try --seconds"),  # ten seconds hold 100 batches of the 200 it takes
        (200, 10**6, f"of the {200 + WARMUP} batches it takes after 10 s: try more --seconds"),
        (5, 50, "the data ended after 50 batches"),
        (5, 2, "the data ended after 2 batches"),
    ],
)
def test_too_little_time_or_data(monkeypatch, ahead, count, complaint):
    window = Clock(monkeypatch).watch(Watch("loop", 10.0, ahead), taking=0.1, making=0.0, count=count)
    assert complaint in window.unsteady()


@pytest.mark.parametrize(("workers", "where"), [(0, "no"), (1, "augment")])
def test_the_loop_runs_with_all_parts(monkeypatch, workers, where):
    monkeypatch.setattr("hf_poolformer.benchmark.loop.PHOTOGRAPH", (64, 48))
    monkeypatch.setattr("hf_poolformer.benchmark.loop.ROWS_PER_SHARD", 512)
    case = Case("train", "tiny", batch_size=4, image_size=32)
    report = measure_loop(case, seconds=0.3, workers=workers, device_preprocessing=where)
    assert list(report.rates) == ["loader alone", "device stage alone", "loop, synthetic images", WHOLE]
    assert min(report.rates.values()) > 0 and report.together > 0
    assert 0 <= report.data_wait_share < 1
    assert report.workers == workers and "files to 1 reading" in report.dealt
    assert report.bottleneck
    window = report.windows["loader alone"]
    # What one worker has sent, is making, and the batch that is held back.
    assert window.ahead == (4 if workers else 1) and window.made > 0
    assert not any("data ended" in complaint for complaint in report.unsteady)
