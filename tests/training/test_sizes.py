"""Training images whose size changes between epochs."""

import random

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_poolformer import PoolFormerImageProcessor
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.training.augmentation import TrainTransform
from hf_poolformer.training.classification import ClassificationTraining
from hf_poolformer.training.loop import train


@pytest.fixture
def sizes_seen(monkeypatch):
    """(height, width) of the batches that are trained on, in their order."""
    seen, losses = [], ClassificationTraining.losses

    def watched(self, run, batch):
        seen.append((run.progress.epoch, *batch["pixel_values"].shape[-2:]))
        return losses(self, run, batch)

    monkeypatch.setattr(ClassificationTraining, "losses", watched)
    return seen


@pytest.mark.parametrize(("mode", "workers"), [("no", 2), ("augment", 0)])
def test_each_epoch_has_its_size(make_settings, sizes_seen, tmp_path, capfd, mode, workers):
    train(
        make_settings(
            size_schedule={"1": 16, "2": 24},
            num_train_epochs=3,
            max_train_steps=None,
            device_preprocessing=mode,
            num_workers=workers,
            crop_min_scale=0.5,
            random_erasing=1.0,
            rand_augment_magnitude=9.0,
        )
    )
    assert sorted(set(sizes_seen)) == [(0, 32, 32), (1, 16, 16), (2, 24, 24)]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert dict(processor.crop_size) == {"height": 32, "width": 32}
    assert "at 32x32, 16x16 from epoch 2, 24x24 from epoch 3" in capfd.readouterr().out


def test_an_example_is_what_a_processor_of_that_size_makes(make_settings):
    """All that depends on the size follows it: crops, movements, noise and how finely an image is decoded."""
    changes = {
        "crop_min_scale": 0.3,
        "rand_augment_magnitude": 9.0,
        "random_erasing": 1.0,
        "affine_translate": 0.2,
        "reduced_decoding": True,
    }

    def processor(side):
        return PoolFormerImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    changing = TrainTransform(make_settings(**changes, size_schedule={"0": 16, "5": 48}), processor(32))
    picture = Image.effect_noise((200, 150), 90).convert("RGB")
    for epoch, side in ((0, 16), (4, 16), (5, 48), (99, 48)):
        fixed = TrainTransform(make_settings(**changes), processor(side))
        for seed in range(8):
            results = []
            for transform in (changing.at_epoch(99).at_epoch(epoch), fixed):
                random.seed(seed)
                torch.manual_seed(seed)
                draws = transform.draw(150, 200)
                results.append((draws, transform.reduction(draws, 150, 200)))
                random.seed(seed)
                torch.manual_seed(seed)
                results.append(transform(picture))
            assert results[0] == results[2]
            assert torch.equal(results[1], results[3]) and results[1].shape == (3, side, side)
    assert changing.at_epoch(0).height == 16 and changing.height == 32


def test_mixers_of_a_fixed_number_of_tokens_refuse_it(make_settings):
    overrides = '{"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "image_size": 32}'
    settings = make_settings(config_name="randformer_s12", config_overrides=overrides, size_schedule={"0": 16})
    with pytest.raises(UserError, match="--size_schedule: this architecture mixes a fixed number of tokens"):
        train(settings)
