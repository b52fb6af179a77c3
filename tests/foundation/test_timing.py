"""Turns, medians, spread and working memory."""

import sys
import time

import pytest
import torch

from hf_poolformer.foundation.timing import Deadline, Timing, WorkingMemory, take_turns


def test_medians_and_quartiles():
    timing = Timing([4.0, 1.0, 2.0, 3.0, 100.0])
    assert timing.median == 3.0
    assert timing.spread == pytest.approx((4.0 - 2.0) / 3.0)  # one stray round does not count
    assert Timing([2.0]).spread == 0.0


def test_rows_take_turns_in_alternating_order():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = take_turns(steps, device="cpu", rounds=4)
    order = [name for place, name in enumerate(calls) if place == 0 or calls[place - 1] != name]
    # Where one round ends with the row that begins the next, the two turns run into one.
    assert "".join(order) == "cbabcbabc"
    assert calls.count("a") == calls.count("b") == calls.count("c") == 8  # each turn begins with one unobserved
    assert all(len(timing.seconds) == 4 for timing in timings.values())


def test_time_is_measured_and_bounded():
    steps = {"slow": lambda: time.sleep(0.02), "fast": lambda: None}
    timings = take_turns(steps, device="cpu", rounds=1000, seconds=0.05)
    assert 3 <= len(timings["slow"].seconds) < 10
    assert timings["slow"].median >= 0.02 > timings["fast"].median


def test_short_steps_fill_their_turn():
    timings = take_turns({"short": lambda: time.sleep(0.002)}, device="cpu", rounds=2, turn=0.02)
    assert len(timings["short"].seconds) > 4
    together = take_turns({"short": lambda: time.sleep(0.002)}, device="cpu", rounds=2, turn=0.02, together=True)
    assert len(together["short"].seconds) == 2
    assert 0.002 <= together["short"].median < 0.02


def test_nothing_to_time():
    assert take_turns({}, device="cpu", rounds=3) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
def test_working_memory_is_the_peak_of_the_step():
    kept = torch.ones(1 << 24)  # 64 MB that were there before do not count
    with WorkingMemory("cpu") as memory:
        torch.ones(1 << 24).add(kept).sum()
    # Two arrays of 64 MB, and whatever the allocator rounds up to.
    assert 120 << 20 < memory.bytes < 160 << 20
    with WorkingMemory("cpu") as again:
        torch.ones(1 << 24).sum()
    assert 60 << 20 < again.bytes < 90 << 20


def test_deadline():
    assert Deadline(None).left == float("inf")
    assert 0 < Deadline(5.0).left <= 5.0
    assert Deadline(0.0).left <= 0.0
