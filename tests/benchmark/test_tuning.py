"""Tiles are timed on a GPU, kept, and found again."""

import json

import pytest
import torch

from hf_poolformer.benchmark import tuning
from hf_poolformer.commands import benchmark as command


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would tune")
def test_it_needs_a_gpu(capsys):
    assert command.main(["tune"]) == 2
    assert "PyTorch sees none here" in capsys.readouterr().err


def test_what_is_found_is_read_when_the_next_model_starts(monkeypatch, tmp_path, capsys):
    tiles = pytest.importorskip("hf_poolformer.kernels.tiles", reason="Triton is not installed")
    tile = tiles.Tiles(64, 128, 64, 8, 3)
    key = (0, "expand", torch.bfloat16, torch.bfloat16, tiles.bucket(2**20), 64, 256)
    cases = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning, "fastest_tiles", lambda case: cases.append(case) or {key: tile})
    file = tmp_path / "cache" / "tiles.json"
    monkeypatch.setattr(tiles, "cache_file", lambda device=0: file)
    file.parent.mkdir()
    file.write_text(json.dumps({"contract": {"16": {"64": {"20": [1, 2, 3, 4, 5]}}}}))
    assert command.main(["tune", "--variant", "poolformer_m48", "--image_size", "512", "--batch_size", "8"]) == 0
    assert (cases[0].variant, cases[0].image_size, cases[0].batch_size) == ("poolformer_m48", 512, 8)
    assert tiles.read(file) == {
        "contract": {16: {64: {20: (1, 2, 3, 4, 5)}}},
        "expand": {16: {64: {20: tuple(tile)}}},
    }
    assert str(file) in capsys.readouterr().out
    monkeypatch.setattr(tiles, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(tiles, "_shared_memory", lambda device: 232448)
    tiles._own.cache_clear()
    assert tiles.order(key, [tiles.Tiles(64, 64, 64, 4, 4), tile])[0] == tile
    tiles._own.cache_clear()
