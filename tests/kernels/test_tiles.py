"""Which tile a kernel takes: what the user timed, what was measured, or a rule; and what fits."""

import json
import os
import subprocess
import sys

import pytest
import torch


tiles = pytest.importorskip("hf_poolformer.kernels.tiles", reason="Triton is not installed")
from hf_poolformer.kernels import launch  # noqa: E402
from hf_poolformer.kernels.tiles import Tiles, bucket  # noqa: E402


SMALL, MIDDLE, LARGE = Tiles(64, 64, 64, 4, 4), Tiles(128, 64, 64, 8, 3), Tiles(128, 128, 64, 8, 3)
CANDIDATES = [LARGE, MIDDLE, SMALL]


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of compute capability 9.0, of whose owner nothing is known."""
    monkeypatch.setattr(tiles, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(tiles, "_shared_memory", lambda device: 232448)
    monkeypatch.setattr(tiles, "_own", lambda device: {})
    measured = {64: {20: SMALL}, 128: {18: MIDDLE}, 320: {16: LARGE}}
    monkeypatch.setattr(tiles, "MEASURED", {9: {"expand": {16: measured}}})
    return monkeypatch


def best(kernel="expand", rows=2**20, channels=64, dtype=torch.bfloat16, candidates=CANDIDATES):
    return tiles.order((0, kernel, dtype, dtype, bucket(rows), channels, 4 * channels), candidates)[0]


def test_measured_shapes_and_their_neighbours(hopper):
    assert [
        best(channels=width, rows=rows) for width, rows in ((64, 2**20), (128, 2**18), (320, 2**16))
    ] == CANDIDATES[::-1]
    assert best(channels=96, rows=2**19) == MIDDLE, "the nearest number of channels, 128"
    assert best(rows=2**17) == SMALL and best(rows=2**16 - 1) == best(channels=128, rows=2**16)
    assert best(dtype=torch.float16) == SMALL and best(dtype=torch.float32) == LARGE, "by the size of a number"


def test_without_measurements_the_first_that_fits(hopper):
    assert best("unknown") == LARGE
    assert best("unknown", rows=49) == SMALL, "one image is to be spread over the GPU"
    hopper.setattr(tiles, "_shared_memory", lambda device: 48 * 1024)
    assert best("unknown") == MIDDLE, "128 x 128 takes 64 KiB for two steps of 64"
    hopper.setattr(tiles, "_capability", lambda device: (8, 6))
    hopper.setattr(tiles, "_shared_memory", lambda device: 99 * 1024)
    assert best("expand", channels=128) == LARGE, "another architecture: the rule"


def test_what_the_user_timed_comes_first(hopper, tmp_path):
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps({"expand": {"16": {"64": {"20": list(MIDDLE)}, "128": {"18": [1, 2, 3, 4, 5]}}}}))
    own = tiles.read(file)
    hopper.setattr(tiles, "_own", lambda device: own)
    assert best() == MIDDLE
    assert best(channels=128, rows=2**18) == MIDDLE, "a tile that no longer exists is not taken"


@pytest.mark.parametrize("text", ["", "[1]", '{"expand": 3}', '{"expand": {"x": {}}}', "\xff"])
def test_a_broken_file_is_left_aside(text, tmp_path, caplog):
    file = tmp_path / "tiles.json"
    file.write_text(text, encoding="latin-1")
    assert tiles.read(file) == {} and "left aside" in caplog.text
    assert tiles.read(tmp_path / "none.json") == {}


def test_a_tile_that_does_not_fit_gives_way(hopper, monkeypatch):
    class Driver:
        class active:
            @staticmethod
            def get_current_device():
                return 0

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch.triton.runtime, "driver", Driver)
    monkeypatch.setattr(launch, "_orders", {})
    tried = []

    def run(tile):
        tried.append(tile)
        if tile != LARGE:
            raise launch.OutOfResources(1, 0, "shared memory")
        return "done"

    key = ("expand", torch.bfloat16, bucket(2**20), 64)
    assert launch.tuned(key, CANDIDATES, run) == launch.tuned(key, CANDIDATES, run) == "done"
    assert tried == [SMALL, LARGE, LARGE], "what does not fit is not tried again"
    with pytest.raises(launch.OutOfResources):
        launch.tuned(("contract", *key[1:]), [SMALL, MIDDLE], run)


def test_what_was_measured_is_still_offered():
    """A tile that a module no longer names would be passed over without a word. Not in the interpreter, whose tiles
    are others."""
    program = """
from hf_poolformer.kernels import mlp_backward, mlp_forward, products, tiles
for kernel, by_bits in tiles.MEASURED[9].items():
    whole = kernel.startswith("channel_mlp")
    offered = mlp_backward.TILES_BACKWARD if kernel == "expand_backward" else products.TILES
    offered = mlp_forward.TILES_WHOLE if whole else offered
    for by_rows in by_bits[16].values():
        for tile in by_rows.values():
            assert tuple(tile) in [tuple(each) for each in offered], (kernel, tile)
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
