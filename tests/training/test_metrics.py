"""Figures against scikit-learn, and their intervals against loops."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn import metrics as reference

from hf_poolformer.evaluation import intervals, metrics
from hf_poolformer.evaluation.intervals import resamples, wilson
from hf_poolformer.evaluation.processes import describe_results, named_results
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.tasks import CLASSIFICATION, MULTI_LABEL, REGRESSION, TASKS


RANKS = 2e-6  # torchmetrics' curves are float32


def judged(task, labels, logits, parts=1, **options):
    """What `parts` processes find, each of which looked at its share in batches of 7."""
    labels, logits = torch.as_tensor(labels), torch.as_tensor(logits, dtype=torch.float32)
    judges = [TASKS[task].new_judge(logits.shape[1], **options) for _ in range(parts)]
    for index, judge in enumerate(judges):
        for mine in torch.arange(index, len(labels), parts).split(7):
            judge.add(labels[mine], logits[mine])
    return judges[0].compute([judge.state() for judge in judges])


def one_label(kind):
    """Labels, and logits of so many classes."""
    rng = np.random.default_rng(3)
    count = {"binary": 2, "binary without the second": 2, "one class absent": 7}.get(kind, 4)
    labels = rng.integers(0, count - (kind == "one class absent"), 120)
    logits = rng.normal(size=(120, count)) * 2
    logits[np.arange(120), labels] += 1
    if kind == "one class absent":
        logits[:, 6] -= 2  # and yet predicted sometimes
    if kind == "binary without the second":
        labels[:] = 0
    if kind == "one prediction":
        logits[:, 2] += 12
    if kind == "ties":  # between images, not between the best classes of one
        logits = logits.round()
        logits[np.arange(120), logits.argmax(1)] += 1
    if kind == "one image":
        labels, logits = labels[:1], logits[:1]
    return labels, logits


ONE_LABEL = (
    "many classes",
    "binary",
    "binary without the second",
    "one class absent",
    "one prediction",
    "ties",
    "one image",
)


def calibration_loop(probabilities, labels):
    """Guo et al., bin by bin."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    error = 0.0
    for index in range(15):
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


def expected_of_one_label(labels, probabilities):
    """By scikit-learn, in float64."""
    guess, count = probabilities.argmax(1), probabilities.shape[1]
    expected = {
        "accuracy": reference.accuracy_score(labels, guess),
        "balanced_accuracy": np.mean([(guess[labels == index] == index).mean() for index in np.unique(labels)]),
        "mcc": reference.matthews_corrcoef(labels, guess),
        "loss": reference.log_loss(labels, probabilities / probabilities.sum(1, keepdims=True), labels=range(count)),
        "calibration_error": calibration_loop(probabilities, labels),
    }
    for average in ("macro", "weighted"):
        found = reference.precision_recall_fscore_support(labels, guess, average=average, zero_division=0)
        expected |= dict(zip((f"precision_{average}", f"recall_{average}", f"f1_{average}"), found[:3], strict=True))
    ranked = [1] if count == 2 else range(count)
    some = [index for index in ranked if (labels == index).any()]
    both = [index for index in some if not (labels == index).all()]
    for name, score, present in (
        ("auroc", reference.roc_auc_score, both),
        ("average_precision", reference.average_precision_score, some),
    ):
        values = [score(labels == index, probabilities[:, index]) for index in present]
        expected[name] = np.mean(values) if values else math.nan
    return {f"eval_{name}": value for name, value in expected.items()}


@pytest.mark.parametrize("kind", ONE_LABEL)
def test_one_label_against_scikit_learn(kind):
    labels, logits = one_label(kind)
    results = judged(CLASSIFICATION, labels, logits)
    probabilities = torch.tensor(logits, dtype=torch.float32).softmax(1).numpy().astype(np.float64)
    for name, value in expected_of_one_label(labels, probabilities).items():
        exact = name not in ("eval_auroc", "eval_average_precision", "eval_loss")
        near = pytest.approx(value, rel=1e-9 if exact else RANKS, abs=1e-9, nan_ok=True)
        assert results[name] == near, name
    guess, count = probabilities.argmax(1), logits.shape[1]
    assert np.array_equal(results["confusion_matrix"], reference.confusion_matrix(labels, guess, labels=range(count)))
    found = reference.precision_recall_fscore_support(labels, guess, labels=range(count), zero_division=np.nan)
    for name, values in zip(("precision", "recall", "f1", "samples"), found, strict=True):
        assert results[f"eval_per_class_{name}"] == pytest.approx(values, nan_ok=True), name
    assert results["eval_per_class_accuracy"] == pytest.approx(found[1], nan_ok=True)
    five = reference.top_k_accuracy_score(labels, probabilities, k=5, labels=range(count)) if count > 5 else None
    assert results.get("eval_top5_accuracy") == five


def test_absent_classes_are_known_by_name_and_not_in_the_means():
    results = judged(CLASSIFICATION, *one_label("one class absent"))
    absent = named_results(results, "abcdefg")["eval_per_class_recall"]["g"]
    assert absent is None and results["eval_per_class_precision"][6] == 0
    # Of a class of which there is neither image nor prediction, nothing is known, and nothing is counted.
    labels, logits = one_label("many classes")
    wider = judged(CLASSIFICATION, labels, np.concatenate([logits, np.full((120, 1), -99.0)], axis=1))
    assert wider["eval_f1_macro"] == pytest.approx(judged(CLASSIFICATION, labels, logits)["eval_f1_macro"], rel=1e-12)


def several_labels(kind):
    rng = np.random.default_rng(4)
    labels = (rng.random((90, 5)) < [0.5, 0.3, 0.1, 0.05, 0.4]).astype(np.float32)
    logits = rng.normal(size=(90, 5)) * 1.5 + 1.5 * labels - 0.5
    if kind == "one label absent":
        labels[:, 3], logits[:, 3] = 0, -9
    if kind == "one label everywhere":
        labels[:, 1] = 1
    if kind == "one prediction":
        logits = np.tile([9.0, -9, -9, -9, -9], (90, 1))
    if kind == "ties":
        logits = logits.round()
    if kind == "single label":
        labels, logits = labels[:, :1], logits[:, :1]
    return labels, logits


def expected_of_several_labels(labels, probabilities, thresholds):
    guess = probabilities >= thresholds
    occurs = np.flatnonzero(labels.any(0) | guess.any(0))
    expected = {
        "exact_match": (labels == guess).all(1).mean(),
        "hamming_accuracy": 1 - reference.hamming_loss(labels.ravel(), guess.ravel()),
        "f1_micro": reference.f1_score(labels.ravel(), guess.ravel()),
        "loss": reference.log_loss(labels.ravel(), probabilities.astype(np.float64).ravel(), labels=[0, 1]),
    }
    found = [
        reference.precision_recall_fscore_support(labels[:, index], guess[:, index], average="binary", zero_division=0)
        for index in occurs
    ]
    names = ("precision_macro", "recall_macro", "f1_macro")
    expected |= dict(zip(names, np.mean([part[:3] for part in found], axis=0), strict=True))
    some = np.flatnonzero(labels.any(0))
    both = [index for index in some if not labels[:, index].all()]
    expected["auroc"] = np.mean([reference.roc_auc_score(labels[:, i], probabilities[:, i]) for i in both])
    expected["average_precision"] = np.mean(
        [reference.average_precision_score(labels[:, index], probabilities[:, index]) for index in some]
    )
    return {f"eval_{name}": value for name, value in expected.items()}


@pytest.mark.parametrize("thresholds", [None, [0.9, 0.2, 0.5, 0.0, 1.0]])
@pytest.mark.parametrize(
    "kind", ["several", "one label absent", "one label everywhere", "one prediction", "ties", "single label"]
)
def test_several_labels_against_scikit_learn(kind, thresholds):
    labels, logits = several_labels(kind)
    thresholds = thresholds[: logits.shape[1]] if thresholds else None
    results = judged(MULTI_LABEL, labels, logits, thresholds=thresholds)
    probabilities = torch.tensor(logits, dtype=torch.float32).sigmoid().numpy()
    for name, value in expected_of_several_labels(labels, probabilities, np.float32(thresholds or 0.5)).items():
        exact = name not in ("eval_auroc", "eval_average_precision", "eval_loss")
        assert results[name] == pytest.approx(value, rel=1e-9 if exact else 1e-5, nan_ok=True), name
    precision = results["eval_per_class_average_precision"]
    assert np.nanmean(precision) == pytest.approx(results["eval_average_precision"])
    assert np.isnan(precision).tolist() == (~labels.any(0)).tolist()
    assert results["eval_per_class_samples"] == labels.sum(0).tolist()


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e7])
@pytest.mark.parametrize("targets", [1, 3])
def test_numbers_against_scikit_learn(targets, unit):
    rng = np.random.default_rng(5)
    truth = (rng.normal(size=(80, targets)) * unit + 3 * unit).astype(np.float32)
    answers = (truth + rng.normal(size=truth.shape) * 0.3 * unit).astype(np.float32)
    results = judged(REGRESSION, truth, answers)
    both = truth.astype(np.float64), answers.astype(np.float64)
    for name, score in (
        ("mae", reference.mean_absolute_error),
        ("rmse", reference.root_mean_squared_error),
        ("r2", reference.r2_score),
    ):
        assert results[f"eval_{name}"] == pytest.approx(score(*both), rel=1e-9), name
        assert results[f"eval_per_target_{name}"] == pytest.approx(score(*both, multioutput="raw_values"), rel=1e-9)
    assert results["eval_loss"] == pytest.approx(reference.mean_squared_error(*both), rel=1e-9)
    assert np.array_equal(results["answers"], answers) and np.array_equal(results["references"], truth)


@pytest.mark.parametrize("images", [1, 30])
def test_what_is_the_same_everywhere_has_no_r2(images):
    truth = np.stack([np.full(images, 0.1), np.arange(images)], axis=1).astype(np.float32)
    results = judged(REGRESSION, truth, truth + np.float32(0.5), intervals=True)
    assert math.isnan(results["eval_per_target_r2"][0])
    assert results["eval_r2"] == pytest.approx(results["eval_per_target_r2"][1], nan_ok=True)
    named = named_results(results, ["same", "rising"])
    assert named["eval_per_target_r2"]["same"] is None and (named["eval_r2"] is None) == (images == 1)
    assert "answers" not in named


DATA = {
    CLASSIFICATION: one_label("many classes"),
    MULTI_LABEL: several_labels("several"),
    REGRESSION: (several_labels("several")[1].astype(np.float32), several_labels("ties")[1]),
}


@pytest.mark.parametrize("task", DATA)
def test_processes_count_every_image_once(task, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 20)
    whole, parts = (judged(task, *DATA[task], parts=count, intervals=True) for count in (1, 3))
    # One process may have had none.
    judge = TASKS[task].new_judge(DATA[task][1].shape[1], intervals=True)
    labels, logits = map(torch.as_tensor, DATA[task])
    judge.add(labels, logits)
    empty = TASKS[task].new_judge(judge.num_labels).state()
    for other in (parts, judge.compute([empty, judge.state()])):
        for name, value in whole.items():
            if isinstance(value, float):
                assert other[name] == pytest.approx(value, rel=1e-12), name  # sums in another order
        for name, interval in whole["eval_confidence_intervals"].items():
            assert np.array(other["eval_confidence_intervals"][name]) == pytest.approx(
                np.array(interval), rel=1e-12
            ), name


def test_wilson_against_scipy():
    for hits, count in ((0, 5), (5, 5), (3, 7), (47, 100), (1, 2000)):
        expected = binomtest(hits, count).proportion_ci(method="wilson")
        assert wilson(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert np.isnan(wilson(np.array([0]), np.array([0]))).all()


@pytest.mark.parametrize("kind", ["one class absent", "binary", "ties", "one prediction"])
def test_intervals_of_one_label_against_a_loop(kind, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 40)
    monkeypatch.setattr(intervals, "TOGETHER", 15)
    labels, logits = one_label(kind)
    found = judged(CLASSIFICATION, labels, logits, intervals=True)["eval_confidence_intervals"]
    order = canonical(CLASSIFICATION, labels, logits)
    drawn = []
    for weights in resamples(len(labels)):
        for column in weights.T.astype(int):
            taken = np.repeat(order, column)
            probabilities = torch.tensor(logits[taken], dtype=torch.float32).softmax(1).double().numpy()
            drawn.append(expected_of_one_label(labels[taken], probabilities))
    for name in drawn[0]:
        if name in ("eval_accuracy", "eval_recall_weighted"):
            hits = (logits.argmax(1) == labels).sum()
            expected = binomtest(int(hits), len(labels)).proportion_ci(method="wilson")
            assert found[name] == pytest.approx((expected.low, expected.high))
        else:
            expected = np.nanpercentile([row[name] for row in drawn], [2.5, 97.5])
            assert found[name] == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    assert all(len(found[f"eval_per_class_{name}"]) == logits.shape[1] for name in ("precision", "recall", "f1"))


def test_intervals_of_several_labels_against_a_loop(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 40)
    labels, logits = several_labels("one label absent")
    found = judged(MULTI_LABEL, labels, logits, intervals=True)["eval_confidence_intervals"]
    order = canonical(MULTI_LABEL, labels, logits)
    (weights,) = resamples(len(labels))
    probabilities = torch.tensor(logits, dtype=torch.float32).sigmoid().numpy()
    taken = [np.repeat(order, column) for column in weights.T.astype(int)]
    drawn = [expected_of_several_labels(labels[rows], probabilities[rows], np.float32(0.5)) for rows in taken]
    for name in drawn[0].keys() - {"eval_exact_match"}:
        expected = np.percentile([row[name] for row in drawn], [2.5, 97.5])
        assert found[name] == pytest.approx(expected, rel=1e-5), name
    exact = int((labels == (probabilities >= 0.5)).all(1).sum())
    expected = binomtest(exact, len(labels)).proportion_ci(method="wilson")
    assert found["eval_exact_match"] == pytest.approx((expected.low, expected.high))
    assert found["eval_per_class_recall"][3] is None and found["eval_per_class_recall"][0]


def test_intervals_of_numbers_against_a_loop(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 40)
    truth, answers = DATA[REGRESSION]
    found = judged(REGRESSION, truth, answers, intervals=True)["eval_confidence_intervals"]
    order = canonical(REGRESSION, truth, answers)
    (weights,) = resamples(len(truth))
    taken = [np.repeat(order, column) for column in weights.T.astype(int)]
    for name, score in (
        ("mae", reference.mean_absolute_error),
        ("rmse", reference.root_mean_squared_error),
        ("r2", reference.r2_score),
    ):
        drawn = [score(truth[rows].astype(np.float64), answers[rows], multioutput="raw_values") for rows in taken]
        assert found[f"eval_{name}"] == pytest.approx(np.percentile(np.mean(drawn, 1), [2.5, 97.5]), rel=1e-6), name
        of_each = np.percentile(drawn, [2.5, 97.5], axis=0).T
        assert np.array(found[f"eval_per_target_{name}"]) == pytest.approx(of_each, rel=1e-6), name


def canonical(task, labels, logits):
    """The order of images that are drawn: by what is known of them, which does not depend on the processes."""
    judge = TASKS[task].new_judge(logits.shape[1])
    judge.add(torch.as_tensor(labels), torch.as_tensor(logits, dtype=torch.float32))
    columns = judge.state()["columns"].values()
    return np.lexsort([values.reshape(len(values), -1)[:, 0] for values in columns])


def test_intervals_are_the_same_again_and_hold_their_figures():
    for task, data in DATA.items():
        first, second = (judged(task, *data, intervals=True) for _ in range(2))
        bounds = first["eval_confidence_intervals"]
        assert bounds == second["eval_confidence_intervals"]
        for figure in TASKS[task].figures:
            if figure.key in first and figure.key != "eval_calibration_error":  # which is biased: chance adds to it
                low, high = bounds[figure.key]
                assert low <= first[figure.key] <= high and low < high, figure.key


def test_a_large_test_set_needs_none(monkeypatch):
    monkeypatch.setattr(metrics, "SMALL_TEST_SET", 90)
    assert "eval_confidence_intervals" not in judged(MULTI_LABEL, *DATA[MULTI_LABEL], intervals=True)


@pytest.mark.parametrize("task", [CLASSIFICATION, MULTI_LABEL])
@pytest.mark.parametrize("parts", [1, 3])
def test_too_many_scores_are_left_out_and_named(task, parts, monkeypatch):
    labels, logits = DATA[task]
    whole = judged(task, labels, logits, intervals=True)
    monkeypatch.setattr(metrics, "MAX_SCORES", logits.size - 1)
    results = judged(task, labels, logits, parts=parts, intervals=True)
    assert math.isnan(results["eval_auroc"]) and math.isnan(results["eval_average_precision"])
    assert "eval_auroc" not in results["eval_confidence_intervals"]
    assert results["eval_f1_macro"] == pytest.approx(whole["eval_f1_macro"])
    speed = {"eval_samples": 5, "eval_samples_per_second": 1.0, "eval_skipped_images": 0}
    assert "without AUROC and average precision (of more than" in describe_results({**results, **speed}, TASKS[task])
    # Whoever asks for the answers gets them all.
    kept = judged(task, labels, logits, parts=parts, keep_answers=True)
    assert kept["answers"].shape == logits.shape and kept["eval_auroc"] == pytest.approx(whole["eval_auroc"])
    monkeypatch.setattr(metrics, "MAX_SCORES", logits.size)
    monkeypatch.setattr(metrics, "MAX_RESAMPLED_SCORES", logits.size - 1)
    results = judged(task, labels, logits, parts=parts, intervals=True)
    assert results["eval_auroc"] == pytest.approx(whole["eval_auroc"])
    assert "eval_auroc" not in results["eval_confidence_intervals"]


def test_answers_are_beside_their_labels():
    labels, logits = DATA[CLASSIFICATION]
    results = judged(CLASSIFICATION, labels, logits, parts=2, keep_answers=True)
    assert results["answers"].dtype == np.float32
    order = np.concatenate([np.arange(0, 120, 2), np.arange(1, 120, 2)])
    assert np.array_equal(results["references"], labels[order])
    assert results["answers"].argmax(1).tolist() == logits[order].argmax(1).tolist()


@pytest.mark.parametrize("task", DATA)
def test_answers_that_are_no_numbers_are_refused(task):
    labels, logits = DATA[task]
    broken = np.array(logits)
    broken[[3, 8], 0] = math.nan, math.inf
    with pytest.raises(UserError, match=r"no finite scores .* for 2 of"):
        judged(task, labels, broken)


@pytest.mark.parametrize("task", DATA)
def test_an_evaluation_gives_every_figure_of_its_row(task):
    labels, logits = DATA[task]
    results, row = judged(task, labels, logits), TASKS[task]
    shown = {figure.key for figure in row.figures_of(logits.shape[1])}
    assert shown | {figure.key for figure in row.per_class} <= results.keys()
    assert set(row.kept_by) == {figure.key for figure in row.figures}
    for key in row.kept_by:
        assert row.is_error(key) == any(name in key for name in ("loss", "mae", "rmse", "calibration"))


def test_lines():
    results = {"eval_accuracy": 0.5, "eval_f1_macro": 0.25, "eval_mcc": 0.1, "eval_loss": 0.6931}
    results |= {"eval_samples": 40, "eval_skipped_images": 2, "eval_samples_per_second": 12.34}
    results["eval_confidence_intervals"] = {"eval_accuracy": [0.35, 0.65], "eval_mcc": [-0.2, 0.4]}
    row = TASKS[CLASSIFICATION]
    assert describe_results(results, row) == (
        "top-1 0.500 (0.350 to 0.650), macro F1 0.250, loss 0.6931, 40 images at 12.3 images/s, "
        "2 broken images left out"
    )
    first = describe_results(results, row, "mcc")
    assert first.startswith("Matthews correlation 0.1 (-0.2 to 0.4), top-1 0.500, macro F1 0.250")
    numbers = {"eval_mae": 123456.789, "eval_rmse": 0.000123456, "eval_r2": None}
    numbers |= {"eval_samples": 4, "eval_skipped_images": 0, "eval_samples_per_second": 2.0}
    assert describe_results(numbers, TASKS[REGRESSION]).startswith("MAE 123457, RMSE 0.0001235, 4 images")
