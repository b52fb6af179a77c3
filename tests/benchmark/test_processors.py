"""Processors: same pixels as the built-in ones, on real photographs."""

import pytest
import torch

from hf_poolformer.benchmark.processors import ProcessorResult, judge, measure_processors
from hf_poolformer.data.photographs import jpegs, photographs, resized


def test_photographs_are_real_and_differ():
    images = photographs()
    assert len(images) >= 2 and {image.mode for image in images} == {"RGB"}
    batch = resized((50, 40), 2 * len(images))
    assert {image.size for image in batch} == {(50, 40)}
    assert len({image.tobytes() for image in batch}) == len(batch)
    files = jpegs((50, 40), 6)
    assert all(file.startswith(b"\xff\xd8") for file in files) and len(set(files)) == 6
    assert jpegs((50, 40), 6) == files


def test_processors_agree_and_are_timed():
    processing = measure_processors((320, 240), batch_size=2, rounds=1, seconds=0.1)
    assert [result.name for result in processing.results] == [
        f"{library} {backend}"
        for backend in ("torchvision, tensors", "torchvision, PIL images", "PIL")
        for library in ("built-in", "ours")
    ]
    for result in processing.results:
        assert result.status == "passed", result
        assert result.images_per_second > 0 and result.times_built_in > 0
        assert result.library == "ours" or (result.error, result.times_built_in) == (0.0, 1.0)


@pytest.mark.parametrize(("change", "status"), [(1 / 255, "passed"), (10 / 255, "failed"), (None, "failed")])
def test_other_pixels_fail(change, status):
    result = ProcessorResult("ours PIL", "ours", "PIL")
    expected = torch.zeros(1, 3, 8, 8)
    pixels = expected.clone()
    if change is None:
        pixels = pixels[..., :4]
    else:
        pixels[0, 1, 2, 3] = change  # of the scaled image; the standard deviation is one here
    judge(result, pixels, expected, image_std=[1.0, 1.0, 1.0])
    assert result.status == status
