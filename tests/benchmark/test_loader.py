"""Loaders next to each other: the same images, the clock only on what is made while it runs."""

import json
import time

import pytest
import torch

from hf_poolformer.benchmark.loader import LoaderResult, Turn, judge
from hf_poolformer.commands import benchmark as command


def test_every_loader_is_timed(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    call = ["loader", "--batch_size", "8", "--image_size", "64", "--rounds", "1", "--seconds", "0.1"]
    assert command.main([*call, "--json", str(figures)]) == 0
    loading = json.loads(figures.read_text())["loading"]
    names = ["ours, files", "ours, Parquet", "timm, no prefetcher", "timm, prefetcher", "torchvision"]
    assert [result["name"] for result in loading["results"]] == names
    for result in loading["results"]:
        assert result["status"] == "passed" and result["images_per_second"] > 0, result
        assert result["cpu_seconds"] > 0 and result["times_timm"] > 0
    assert max(result["times_timm"] for result in loading["results"] if result["library"] == "timm") == 1
    assert "x timm" in capsys.readouterr().out


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_what_was_read_ahead_does_not_count(ahead):
    """A loader that hands out a batch when it has made `ahead` more takes no less time for those that are timed."""

    def batches():
        for made in range(turn.batches + 1 + ahead):
            if made < turn.batches:
                time.sleep(0.02)
            if made >= ahead and made - ahead < turn.batches:
                yield torch.empty(0)

    turn = Turn(before=1, timed=3, after=3)
    assert turn.take(batches)[0] >= 0.02
    with pytest.raises(RuntimeError, match="4 batches in place of 7"):
        turn.take(lambda: iter([torch.empty(0)] * 4))


@pytest.mark.parametrize(
    ("batch", "status"),
    [
        (torch.randn(2, 3, 8, 8), "passed"),
        (torch.randn(2, 3, 8, 8).double(), "failed"),
        (torch.randn(2, 3, 8, 9), "failed"),
        (torch.rand(2, 3, 8, 8) * 255, "failed"),
        (torch.randn(2, 3, 8, 8) + 1, "failed"),
    ],
    ids=["alike", "dtype", "shape", "not normalised", "another mean"],
)
def test_other_batches_fail(batch, status):
    result = LoaderResult("ours, files", "ours")
    judge(result, iter([batch]), (2, 3, 8, 8), standard=0.0)
    assert result.status == status and bool(result.note) == (status == "failed")
