"""Metrics as `evaluate.Metric` classes that come with the package: `evaluate.load` would fetch them from the Hub."""

# One import per line: evaluate's script parser does not understand `import a, b` should this file be loaded by path.
import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """Top-1 accuracy: `compute(predictions=[label, ...], references=[label, ...])["accuracy"]`."""

    def _info(self):
        return _info("Share of predictions that equal the label.")

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class TopKAccuracy(evaluate.Metric):
    """Top-k accuracy from ranked labels.

    `compute(predictions=[[best, second, ...], ...], references=[label, ...], k=5)["top5_accuracy"]`. Where fewer than
    k labels are ranked (there are fewer classes), those that are count.
    """

    def _info(self):
        return _info("Share of images whose label is among the k best.", datasets.Sequence(datasets.Value("int64")))

    def _compute(self, predictions, references, k=5):
        ranked = np.asarray(predictions)[:, :k]
        hits = (ranked == np.asarray(references)[:, None]).any(axis=1)
        return {f"top{k}_accuracy": float(np.mean(hits))}


class PerClassAccuracy(evaluate.Metric):
    """Accuracy of each class, in the order of the labels; NaN for a class without images.

    `compute(predictions=..., references=..., num_labels=N)["per_class_accuracy"]` is a list of N numbers.
    """

    def _info(self):
        return _info("Share of each class's images that are recognised.")

    def _compute(self, predictions, references, num_labels):
        predictions, references = np.asarray(predictions), np.asarray(references)
        images = np.bincount(references, minlength=num_labels)
        correct = np.bincount(references[predictions == references], minlength=num_labels)
        with np.errstate(invalid="ignore"):
            return {"per_class_accuracy": (correct / np.where(images, images, np.nan)).tolist()}


class ConfusionMatrix(evaluate.Metric):
    """Counts, one row per true label and one column per predicted one.

    `compute(predictions=..., references=..., num_labels=N)["confusion_matrix"]` is an int64 array (N, N).
    """

    def _info(self):
        return _info("Number of images for each pair of true and predicted label.")

    def _compute(self, predictions, references, num_labels):
        pairs = np.asarray(references) * num_labels + np.asarray(predictions)
        return {"confusion_matrix": np.bincount(pairs, minlength=num_labels**2).reshape(num_labels, num_labels)}


def _info(description, predictions=None):
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="predictions and references: labels as integers from 0.",
        features=datasets.Features(
            {"predictions": predictions or datasets.Value("int64"), "references": datasets.Value("int64")}
        ),
    )
