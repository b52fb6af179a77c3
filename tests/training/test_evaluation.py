import functools
import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

import hf_poolformer_cli
from hf_poolformer import PoolFormerForImageClassification, PoolFormerImageProcessor
from hf_poolformer.evaluation import processes
from hf_poolformer.evaluation.classification import evaluate, evaluate_checkpoint
from hf_poolformer.evaluation.pictures import write_confusion_matrix, write_label_figures, write_scatter
from hf_poolformer.evaluation.processes import named_results
from hf_poolformer.evaluation.settings import EvaluationSettings
from hf_poolformer.evaluation.shared_metrics import TaskFigures
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.strict_json import to_json
from hf_poolformer.foundation.tasks import CLASSIFICATION, MULTI_LABEL, REGRESSION, TASKS
from hf_poolformer.training import reports


pytestmark = pytest.mark.usefixtures("drawn")


@pytest.fixture
def model(poolformer_config, scramble):
    return scramble(PoolFormerForImageClassification(poolformer_config))


@pytest.fixture
def images():
    return torch.randn(25, 3, 32, 32)


def batches(images, labels, size=8):
    for start in range(0, len(labels), size):
        skipped = ["bad.png: truncated"] if start == 0 else []
        yield {
            "pixel_values": images[start : start + size],
            "labels": labels[start : start + size],
            "skipped": skipped,
        }


def test_against_scikit_learn(model, images):
    labels = torch.arange(25) % 9
    results = evaluate(model.train(), batches(images, labels), accelerator=Accelerator(), num_labels=10)
    assert model.training
    with torch.no_grad():
        scores = model.eval()(pixel_values=images).logits.softmax(1).double().numpy()
    truth = labels.numpy()
    assert results["eval_accuracy"] == accuracy_score(truth, scores.argmax(1))
    assert results["eval_top5_accuracy"] == top_k_accuracy_score(truth, scores, k=5, labels=range(10))
    scores /= scores.sum(1, keepdims=True)
    assert results["eval_loss"] == pytest.approx(log_loss(truth, scores, labels=range(10)), rel=1e-4)
    assert results["eval_samples"] == 25 and results["eval_skipped_images"] == 1
    assert results["confusion_matrix"].sum() == 25
    assert math.isnan(results["eval_per_class_accuracy"][9])
    named = named_results(results, [f"class {index}" for index in range(10)])
    assert named["eval_per_class_accuracy"]["class 9"] is None and "confusion_matrix" not in named


@pytest.mark.parametrize("classes", [2, 5])
def test_five_best_of_five_classes_say_nothing(poolformer_config, images, classes):
    poolformer_config.num_labels = classes
    model = PoolFormerForImageClassification(poolformer_config)
    labels = torch.arange(25) % classes
    results = evaluate(model, batches(images, labels), accelerator=Accelerator(), num_labels=classes)
    assert results["eval_samples"] == 25 and not [name for name in results if "top" in name]


@pytest.mark.parametrize("labels", [torch.tensor([3, 10]), torch.tensor([-1, 3])])
def test_labels_out_of_range(model, images, labels):
    with pytest.raises(UserError, match="labels go from 0 to 9"):
        evaluate(model, batches(images[:2], labels), accelerator=Accelerator(), num_labels=10)


def test_what_fails_on_one_process_fails_on_all(model, images, monkeypatch):
    labels = torch.arange(25) % 10

    def gathered(mine):
        return [*mine, {**mine[0], "fault": "an image of the other process has label 7"}]

    monkeypatch.setattr(processes, "gather_object", gathered)
    with pytest.raises(UserError, match="other process has label 7"):
        evaluate(model, batches(images, labels), accelerator=Accelerator(), num_labels=10)
    monkeypatch.setattr(processes, "gather_object", lambda mine: mine)
    model.train()
    with pytest.raises(UserError, match="label"):
        evaluate(model, batches(images, labels + 100), accelerator=Accelerator(), num_labels=10)
    assert model.training


def test_nothing_to_evaluate(model):
    with pytest.raises(UserError, match="no image to evaluate"):
        evaluate(model, [], accelerator=Accelerator(), num_labels=10)


def test_a_stop_gives_no_result(model, images):
    labels = torch.zeros(25, dtype=torch.long)
    assert not evaluate(
        model, batches(images, labels), accelerator=Accelerator(), num_labels=10, should_stop=lambda: 15
    )


@pytest.fixture
def checkpoint(poolformer_config, tmp_path):
    def save(names):
        poolformer_config.id2label = dict(enumerate(names))
        poolformer_config.label2id = {name: index for index, name in enumerate(names)}
        torch.manual_seed(0)
        PoolFormerForImageClassification(poolformer_config).save_pretrained(tmp_path / "model")
        square = {"height": 32, "width": 32}
        PoolFormerImageProcessor(size={"shortest_edge": 32}, crop_size=square, crop_pct=1.0).save_pretrained(
            tmp_path / "model"
        )
        return str(tmp_path / "model")

    return save


def settings_of(model, **values):
    settings = EvaluationSettings(**{"num_workers": 0, **values})
    settings.model = model
    return settings


def test_labels_are_matched_by_name(checkpoint, digits):
    names = [f"digit {number}" for number in range(10)]
    straight = evaluate_checkpoint(settings_of(checkpoint(names), dataset_name=str(digits), split="test"))
    assert straight["eval_samples"] == 75
    # The same weights under reversed names: what was right for digit k now means digit 9 - k.
    turned = evaluate_checkpoint(settings_of(checkpoint(names[::-1]), dataset_name=str(digits), split="test"))
    assert turned["eval_samples"] == 75 and turned["eval_loss"] != straight["eval_loss"]


def test_other_labels_are_refused(checkpoint, digits):
    with pytest.raises(UserError, match="other labels than the checkpoint"):
        evaluate_checkpoint(settings_of(checkpoint([f"fruit {n}" for n in range(10)]), dataset_name=str(digits)))


def test_not_a_model(digits, tmp_path):
    with pytest.raises(UserError, match=r"not a model: it has no config\.json"):
        evaluate_checkpoint(settings_of(str(tmp_path), dataset_name=str(digits)))
    (tmp_path / "config.json").write_text('{"model_type": "poolformer"}')
    with pytest.raises(UserError, match="cannot load an image classifier"):
        evaluate_checkpoint(settings_of(str(tmp_path), dataset_name=str(digits)))


def test_a_headless_checkpoint_is_refused(checkpoint, digits):
    path = checkpoint([f"digit {number}" for number in range(10)])
    PoolFormerForImageClassification.from_pretrained(path).poolformer.save_pretrained(path)
    with pytest.raises(UserError, match="not a trained classifier"):
        evaluate_checkpoint(settings_of(path, dataset_name=str(digits)))


@pytest.mark.parametrize("count", [2, 10, 45, 1000])
def test_confusion_matrix_is_drawn_for_few_and_many_classes(tmp_path, count):
    matrix = np.eye(count, dtype=np.int64) * 9
    matrix[0, 1] = 1
    write_confusion_matrix(tmp_path / "matrix.png", matrix, [f"class {index}" for index in range(count)])
    assert (tmp_path / "matrix.png").stat().st_size > 5000
    assert [path.name for path in tmp_path.iterdir()] == ["matrix.png"]


@pytest.mark.parametrize("count", [1, 4, 70])
def test_figures_of_labels_are_drawn_for_few_and_many(tmp_path, count):
    figures = {name: np.linspace(0.2, 1, count) for name in ("precision", "recall", "f1")}
    figures["precision"][0] = math.nan  # never predicted
    write_label_figures(tmp_path / "labels.png", figures, [f"_$x$ {index}" for index in range(count)])
    assert (tmp_path / "labels.png").stat().st_size > 5000


@pytest.mark.parametrize("targets", [1, 2, 4, 12])
def test_numbers_are_drawn_against_the_truth(tmp_path, targets):
    truth = np.random.default_rng(0).normal(size=(7000, targets))
    write_scatter(tmp_path / "scatter.png", truth + 0.1, truth, [f"$x$ {index}" for index in range(targets)])
    assert (tmp_path / "scatter.png").stat().st_size > 5000


@pytest.mark.parametrize("task", [MULTI_LABEL, REGRESSION])
def test_labels_that_do_not_fit_are_refused(model, images, task):
    ask = functools.partial(evaluate, model, accelerator=Accelerator(), num_labels=10, task=task)
    with pytest.raises(UserError, match="has 4 numbers per image, but the model gives 10"):
        ask(batches(images, torch.zeros(25, 4)))
    labels = torch.zeros(25, 10)
    labels[9, 3] = math.nan
    with pytest.raises(UserError, match="a label that is no number"):
        ask(batches(images, labels))


def test_several_labels_and_numbers_of_a_model(model, images):
    """Through the loop: logits in evaluation mode, thresholds, answers, and a broken image."""
    truth = (torch.rand(25, 10) < 0.4).float()
    thresholds = torch.linspace(0.2, 0.8, 10).tolist()
    results = evaluate(
        model.train(),
        batches(images, truth),
        accelerator=Accelerator(),
        num_labels=10,
        task=MULTI_LABEL,
        thresholds=thresholds,
        intervals=True,
        keep_answers=True,
    )
    with torch.no_grad():
        logits = model.eval()(pixel_values=images).logits
    assert results["answers"] == pytest.approx(logits.sigmoid().numpy(), rel=1e-4)
    assert np.array_equal(results["references"], truth.numpy())
    right = (logits.sigmoid() >= torch.tensor(thresholds)) == truth.bool()
    assert results["eval_hamming_accuracy"] == pytest.approx(right.double().mean().item())
    assert results["eval_samples"] == 25 and results["eval_skipped_images"] == 1
    named = named_results(results, [f"label {index}" for index in range(10)])
    assert json.loads(to_json(named)) == named, "fit for JSON"
    low, high = named["eval_confidence_intervals"]["eval_per_class_recall"]["label 3"]
    assert 0 <= low <= named["eval_per_class_recall"]["label 3"] <= high <= 1
    targets = torch.randn(25, 10)
    results = evaluate(model, batches(images, targets), accelerator=Accelerator(), num_labels=10, task=REGRESSION)
    assert results["eval_mae"] == pytest.approx((logits - targets).abs().double().mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("task", "drawn", "limits"),
    [
        (CLASSIFICATION, {"top-1", "macro F1"}, (0.395, 1.01)),
        (REGRESSION, {"MAE", "RMSE"}, (0, None)),  # not R2, whose scale is another one
    ],
)
def test_curves_have_one_scale(tmp_path, monkeypatch, task, drawn, limits):
    kept = []
    monkeypatch.setattr(reports, "save_figure", lambda figure, path: kept.append(figure))
    values = {"eval_accuracy": 0.5, "eval_f1_macro": 0.46, "eval_loss": 1.0, "eval_r2": -40.0}
    rows = [{"step": step, **values, "eval_mae": 30.0, "eval_rmse": 50.0} for step in (1, 2)]
    reports.write_curves(tmp_path / "curves.png", rows, task)
    right = kept[0].axes[1]
    assert {line.get_label() for line in right.get_lines()} == drawn
    low, high = right.get_ylim()
    assert low == pytest.approx(limits[0], abs=0.005) and high == pytest.approx(limits[1] or high) and high > 0.5


@pytest.mark.parametrize("task", [MULTI_LABEL, REGRESSION])
def test_checkpoints_of_several_labels_and_of_numbers(checkpoint, poolformer_config, tmp_path, task, capsys):
    """Labels and targets are found by their names; thresholds are the model's; two columns in another order."""
    names = ["round", "red", "old"]
    poolformer_config.problem_type = TASKS[task].problem_type
    if task == MULTI_LABEL:
        poolformer_config.label_thresholds = [0.1, 0.5, 0.9]
    model = PoolFormerForImageClassification.from_pretrained(checkpoint(names)).eval()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    truth = rng.integers(0, 2, (20, 3)) if task == MULTI_LABEL else rng.normal(size=(20, 3)) * 100
    columns = {name: list(map(bool if task == MULTI_LABEL else float, truth[:, i])) for i, name in enumerate(names)}
    images = []
    for image in pixels:
        images.append(io.BytesIO())
        Image.fromarray(image).save(images[-1], "PNG")
    table = pa.table({"image": [image.getvalue() for image in images], **dict(reversed(columns.items()))})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data/test.parquet")
    command = ["evaluate", tmp_path / "model", "--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "out"]
    assert hf_poolformer_cli.main([*map(str, command), "--num_workers", "0"]) == 0
    line = capsys.readouterr().out
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    processor = PoolFormerImageProcessor.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        logits = model(**processor([Image.fromarray(image) for image in pixels], return_tensors="pt")).logits
    if task == MULTI_LABEL:
        right = (logits.sigmoid() >= torch.tensor([0.1, 0.5, 0.9])).numpy() == truth
        assert results["eval_hamming_accuracy"] == pytest.approx(right.mean())
        assert results["eval_per_class_samples"] == dict(zip(names, truth.sum(0).tolist(), strict=True))
        assert f"mAP {results['eval_average_precision']:.4g} (" in line and "label_figures.png" in line
    else:
        errors = np.abs(logits.numpy() - truth)
        found = results["eval_per_target_mae"]
        assert found == pytest.approx(dict(zip(names, errors.mean(0), strict=True)), rel=1e-5)
        assert f"MAE {results['eval_mae']:.4g} (" in line and "scatter.png" in line
    assert results["task"] == task and (tmp_path / "out" / TASKS[task].judge.picture).stat().st_size > 5000


@pytest.mark.parametrize("task", [CLASSIFICATION, MULTI_LABEL, REGRESSION])
def test_figures_are_a_metric_of_the_library_evaluate(task):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 4)).astype(np.float32)
    labels = {
        CLASSIFICATION: rng.integers(0, 4, 40),
        MULTI_LABEL: rng.integers(0, 2, (40, 4)).astype(np.float32),
        REGRESSION: rng.normal(size=(40, 4)).astype(np.float32),
    }[task]
    metric = TaskFigures(4, task)
    found = metric.compute(predictions=logits, references=labels)
    for start in range(0, 40, 16):  # anew, in batches
        metric.add_batch(predictions=logits[start : start + 16], references=labels[start : start + 16])
    again = metric.compute()
    assert found.keys() == again.keys() and all(np.array_equal(found[name], again[name]) for name in found)
    if task == CLASSIFICATION:
        assert found["eval_accuracy"] == accuracy_score(labels, logits.argmax(1))
    elif task == MULTI_LABEL:
        assert found["eval_exact_match"] == accuracy_score(labels, logits >= 0)
    else:
        assert found["eval_mae"] == pytest.approx(np.abs(logits - labels).mean(), rel=1e-5)
