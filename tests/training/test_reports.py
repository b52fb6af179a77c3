"""What a finished run says of itself."""

import pytest

from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training.reports import summary


ADVICE = "Data was the bottleneck: see --num_workers"


@pytest.mark.parametrize(
    ("waited", "preprocessing", "advice"),
    [
        (0.9, "no", f"{ADVICE} and --device_preprocessing auto.\n"),
        (0.9, "augment", f"{ADVICE} and --device_preprocessing auto.\n"),
        (0.9, "decode", f"{ADVICE}.\n"),
        (0.9, "auto", f"{ADVICE}.\n"),
        (0.01, "no", ""),
    ],
)
def test_it_says_when_data_was_the_bottleneck_and_which_flags_help(tmp_path, waited, preprocessing, advice):
    settings = TrainingSettings.from_recipe(
        train_dir="x", output_dir=str(tmp_path), device_preprocessing=preprocessing
    )
    figures = dict.fromkeys(("train_runtime", "train_samples_per_second"), 1.0)
    results = {**figures, "train_data_wait_share": waited, "step": 1, "skipped_images": 0}
    said = summary(tmp_path, results, settings, "")
    assert f"{waited:.0%} of the time waiting for data" in said
    assert (advice in said) if advice else ("bottleneck" not in said)
