import evaluate
import numpy as np
import pytest
from sklearn import metrics as reference

from hf_poolformer.evaluation import metrics


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    return rng.random((200, 7)), rng.integers(0, 6, 200)  # class 6 has no image


def test_against_scikit_learn(scores):
    scores, labels = scores
    ranked = np.argsort(-scores, axis=1)
    best = {"predictions": ranked[:, 0], "references": labels}
    accuracy = metrics.Accuracy(keep_in_memory=True).compute(**best)["accuracy"]
    assert accuracy == pytest.approx(reference.accuracy_score(labels, ranked[:, 0]))
    for k in (2, 5):
        top = metrics.TopKAccuracy(keep_in_memory=True).compute(predictions=ranked, references=labels, k=k)
        expected = reference.top_k_accuracy_score(labels, scores, k=k, labels=range(7))
        assert top == {f"top{k}_accuracy": pytest.approx(expected)}
    matrix = metrics.ConfusionMatrix(keep_in_memory=True).compute(**best, num_labels=7)["confusion_matrix"]
    assert np.array_equal(matrix, reference.confusion_matrix(labels, ranked[:, 0], labels=range(7)))
    per_class = metrics.PerClassAccuracy(keep_in_memory=True).compute(**best, num_labels=7)["per_class_accuracy"]
    expected = reference.recall_score(labels, ranked[:, 0], labels=range(6), average=None)
    assert per_class[:6] == pytest.approx(expected) and np.isnan(per_class[6])


def test_more_best_than_classes():
    top = metrics.TopKAccuracy(keep_in_memory=True).compute(predictions=[[1, 0], [0, 1]], references=[0, 1], k=5)
    assert top == {"top5_accuracy": 1.0}


def test_batches_add_up():
    accuracy = metrics.Accuracy(keep_in_memory=True)
    accuracy.add_batch(predictions=[1, 2], references=[1, 1])
    accuracy.add_batch(predictions=[0], references=[0])
    assert accuracy.compute()["accuracy"] == pytest.approx(2 / 3)
    assert isinstance(accuracy, evaluate.Metric)


def test_evaluates_script_parser_understands_the_file():
    from evaluate.loading import get_imports

    names = {name for kind, name, *_ in get_imports(metrics.__file__) if kind == "library"}
    assert names == {"datasets", "evaluate", "numpy"}
