"""The time until a first training step, of a program of its own."""

import sys

import pytest
from warm import warm_python

from hf_poolformer.benchmark.case import Case
from hf_poolformer.benchmark.first_step import measure_first_steps
from hf_poolformer.foundation.errors import UserError


@pytest.mark.slow
def test_two_programs_are_timed():
    steps = measure_first_steps(Case("train", "tiny", batch_size=2, image_size=64))
    assert steps.cold > 1 and steps.warm > 1, "importing PyTorch alone takes as long"


def test_a_failure_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", warm_python())
    with pytest.raises(UserError, match="the first step failed"):
        measure_first_steps(Case("train", "tiny", batch_size=2, image_size=64, device="meta"))
