import csv
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from hf_poolformer import MetaFormerConfig, MetaFormerForImageClassification
from hf_poolformer.foundation.errors import Diverged, UserError
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training import ablation


pytestmark = pytest.mark.usefixtures("drawn")
SCRIPT = Path(__file__).parents[2] / "scripts" / "ablate.py"
TINY = '{"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "patch_sizes": [3, 3, 3, 3], "strides": [2, 2, 2, 2]'
TINY += ', "padding": [1, 1, 1, 1]}'


@pytest.fixture
def base(tmp_path) -> TrainingSettings:
    return TrainingSettings.from_recipe("demo", dataset_name="nowhere", output_dir=str(tmp_path))


@pytest.mark.parametrize("name", ablation.ROWS)
def test_every_row_is_one_architecture(name, base, tmp_path):
    settings = ablation.settings_of_row(ablation.ROWS[name], base, tmp_path, seed=3)
    assert settings.seed == 3
    config = MetaFormerConfig.from_variant(settings.config_name, num_labels=10, **settings.overrides())
    MetaFormerForImageClassification(config)
    assert list(config.hidden_sizes) == [32, 64, 128, 192]  # the recipe's dimensions, not S12's
    for field, value in ablation.ROWS[name].overrides.items():
        assert getattr(config, field) == value
    if "token_mixers" not in ablation.ROWS[name].overrides:
        assert config.token_mixers == ["pooling"] * 4


def test_the_model_of_another_recipe_is_no_base(tmp_path):
    given = {"dataset_name": "nowhere", "output_dir": str(tmp_path)}
    with pytest.raises(UserError, match=r"--recipe scratch trains another model.*--config_name poolformer_s12"):
        ablation.measure("baseline", TrainingSettings.from_recipe("scratch", **given), tmp_path / "run", seed=0)
    assert not (tmp_path / "run").exists()
    named = TrainingSettings.from_recipe("scratch", **given, config_name="poolformer_s12")
    settings = ablation.settings_of_row(ablation.ROWS["baseline"], named, tmp_path, seed=0)
    assert settings.overrides() == {"token_mixers": ["pooling"] * 4, "image_size": 96}


def test_rows_are_chosen_by_name_group_or_all():
    assert ablation.choose_rows(["all"]) == list(ablation.ROWS)
    assert ablation.choose_rows(["no_mlp", "norm"]) == ["layer_norm", "batch_norm", "no_norm", "no_mlp"]
    with pytest.raises(UserError, match="unknown rows attention"):
        ablation.choose_rows(["attention", "baseline"])


def test_a_diverged_row_is_a_result(base, tmp_path, monkeypatch):
    def diverge(settings):
        raise Diverged("the loss is nan")

    monkeypatch.setattr(ablation, "train", diverge)
    result = ablation.measure("no_norm", base, tmp_path / "run", seed=0)
    assert result["diverged"]
    monkeypatch.setattr(ablation, "train", lambda settings: pytest.fail("trained again"))
    assert ablation.measure("no_norm", base, tmp_path / "run", seed=0) == result


def test_summary_over_seeds():
    runs = [
        {"row": "baseline", "accuracy": 0.5, "diverged": False},
        {"row": "baseline", "accuracy": 0.6, "diverged": False},
        {"row": "no_norm", "accuracy": None, "diverged": True},
    ]
    baseline, no_norm = ablation.summarise(runs)
    assert baseline["accuracy"] == pytest.approx(55)
    # The standard error is 5, and Student's t of one degree of freedom 12.706.
    assert (baseline["low"], baseline["high"]) == pytest.approx((55 - 63.531, 55 + 63.531), abs=1e-3)
    assert (no_norm["accuracy"], no_norm["diverged"], no_norm["paper_imagenet"]) == (None, 1, 46.1)
    assert no_norm["low"] is None


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 36])
def test_student_t(freedom):
    assert ablation.student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_the_table_has_intervals_and_the_rank_correlation(tmp_path):
    accuracies = {"baseline": (0.80, 0.82), "identity": (0.70, 0.71), "random": (0.75, 0.75), "no_norm": (0.72, None)}
    runs = [
        {"row": row, "accuracy": accuracy, "diverged": accuracy is None}
        for row, both in accuracies.items()
        for accuracy in both
    ]
    lines = ablation.summarise(runs)
    ablation.write_table(lines, tmp_path, "a | b")
    text = (tmp_path / "ablation.md").read_text()
    assert "| token mixer | global random matrix | 75.00 | 75.00 to 75.00 | 2 | 75.8 |" in text
    assert "| norm | none | 72.00 (1 diverged) |  | 2 | 46.1 |" in text
    # Ours in the order of the table: 81, 70, 75, 72; the paper's: 77.2, 74.3, 75.8, 46.1.
    assert f"(Spearman): {stats.spearmanr([81, 70, 75, 72], [77.2, 74.3, 75.8, 46.1]).statistic:.2f}." in text
    assert ablation.rank_correlation(lines[:2]) is None
    ablation.draw_table(lines, tmp_path / "ablation.png", "a $b")
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_script_writes_table_and_plot_and_does_not_train_twice(digits, tmp_path):
    command = [sys.executable, SCRIPT, "--rows", "baseline", "no_mlp", "--recipe", "demo", "--dataset_name", digits]
    command += ["--output_dir", tmp_path, "--max_train_steps", "2", "--num_workers", "0", "--config_overrides", TINY]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    with open(tmp_path / "ablation.csv") as file:
        assert [row["row"] for row in csv.DictReader(file)] == ["baseline", "no_mlp"]
    assert "| other | no channel MLP |" in (tmp_path / "ablation.md").read_text()
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0
    assert "step" not in again.stderr  # no progress bar: nothing was trained
