"""FLOP and bytes against the published counts."""

import pytest

from hf_poolformer.benchmark.case import Case
from hf_poolformer.benchmark.floor import Ceilings, floor_seconds, measure_ceilings, operations


# GMACs and parameters of DESIGN 4, which are the authors'.
PUBLISHED = {
    "poolformer_s12": (1.812, 11915176),
    "poolformer_s24": (3.392, 21388968),
    "poolformer_s36": (4.972, 30862760),
    "poolformer_m36": (8.759, 56172520),
    "poolformer_m48": (11.533, 73473448),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_flop_are_the_published_ones(variant):
    macs, parameters = PUBLISHED[variant]
    flop = sum(operation.flop for operation in operations(Case("infer", variant, batch_size=3)))
    assert flop == pytest.approx(3 * 2 * macs * 1e9, rel=1e-3)
    optimiser = list(operations(Case("train", variant, batch_size=3)))[-1]
    assert optimiser.bytes == 7 * 4 * parameters


def test_bytes_follow_precision_and_training():
    def moved(name: str, **fields) -> float:
        case = Case(**{"mode": "infer", "batch_size": 8, **fields})
        return sum(operation.bytes for operation in operations(case) if operation.name == name)

    # Two activations per mixer: 2 blocks of 64 x 56 x 56, 2 of 128 x 28 x 28, 6 of 320 x 14 x 14, 2 of 512 x 7 x 7.
    elements = 8 * (2 * 64 * 56**2 + 2 * 128 * 28**2 + 6 * 320 * 14**2 + 2 * 512 * 7**2)
    assert moved("mixer") == 2 * elements * 4
    assert moved("mixer", dtype="bfloat16") == 2 * elements * 2
    assert moved("mixer", mode="train") == 5 * elements * 4
    assert moved("mlp") > moved("mixer")  # the weights, too


def test_the_floor_is_the_longer_of_arithmetic_and_traffic():
    case = Case("infer", batch_size=4)
    flop = sum(operation.flop for operation in operations(case))
    moved = sum(operation.bytes for operation in operations(case))
    assert floor_seconds(case, Ceilings(1e9, float("inf"))) == pytest.approx(flop / 1e9)
    assert floor_seconds(case, Ceilings(float("inf"), 1e9)) == pytest.approx(moved / 1e9)
    both = floor_seconds(case, Ceilings(1e9, 1e9))
    assert max(flop, moved) / 1e9 <= both <= (flop + moved) / 1e9


def test_training_takes_three_times_the_products():
    def flop(mode: str) -> float:
        return sum(operation.flop for operation in operations(Case(mode)))

    stem = 16 * 2 * 56**2 * 64 * 3 * 49
    assert flop("train") == 3 * flop("infer") - stem  # images need no gradient


def test_ceilings_are_those_of_some_computer():
    ceilings = measure_ceilings("cpu", "float32")
    assert 1e8 < ceilings.flop_per_second < 1e14
    assert 1e8 < ceilings.bytes_per_second < 1e13
