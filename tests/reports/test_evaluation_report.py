"""Reports of evaluations: synthetic rows, hostile and extreme, and one real run from images to page."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score, precision_score, recall_score

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
from hf_poolformer.evaluation.processes import named_results
from hf_poolformer.evaluation.rows import KEY, schema_of
from hf_poolformer.foundation.tasks import TASKS
from hf_poolformer.reports import material
from hf_poolformer.reports.evaluation import write_evaluation_report


HOSTILE = ['<script>alert("x")</script>', "a'b\"c\nd\0e", "\u202eright", "\\udcff $x^2$", "n" * 10_000]


def lists(values, kind):
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind), values.shape[1])


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Writes the report of synthetic answers; gives (report.json, report.html, the folder)."""
    seen = []

    def pictures_of(dataset, positions, side):
        seen.append(len(positions))
        return {position: Image.new("RGB", (24, 16), (position % 255, 90, 90)) for position in positions if position}

    monkeypatch.setattr(material, "pictures_of", pictures_of)

    def run(task, names, labels, answers, thresholds=None, broken=(), **columns):
        judge = TASKS[task].new_judge(len(names), thresholds=thresholds, intervals=len(labels) <= 500)
        logits = torch.from_numpy(np.asarray(answers, dtype=np.float32))
        truth = torch.from_numpy(np.asarray(labels))
        judge.add(truth, logits)
        results = named_results(judge.compute([judge.state()]), names)
        values = judge.of_batch(truth, logits)
        count, reads = len(labels), TASKS[task].reads
        table = {
            "path": [f"<b>{index}\udcff.png".encode("utf-8", "replace").decode() for index in range(count)],
            "split": ["test"] * count,
            "position": np.arange(count),
            "loss": (values["losses"] if reads != "numbers" else (logits - truth).square().mean(1)).numpy(),
        }
        if reads == "class":
            scores = values["scores"].numpy()
            guess = scores.argmax(1)
            table |= {
                "label": [names[index] for index in labels],
                "label_index": np.asarray(labels),
                "prediction": [names[index] for index in guess],
                "prediction_index": guess,
                "probability": scores.max(1),
                "probabilities": lists(scores, pa.float32()),
            }
        elif reads == "classes":
            bits = np.asarray(labels, dtype=np.uint8)
            table |= {
                "labels": [[names[index] for index in np.flatnonzero(row)] for row in bits],
                "predicted": [[]] * count,
                "targets": lists(bits, pa.uint8()),
                "probabilities": lists(values["scores"].numpy(), pa.float32()),
            }
        else:
            table |= {"targets": lists(truth.numpy(), pa.float32()), "answers": lists(logits.numpy(), pa.float32())}
        about = {"model": "m", "dataset": "d", "split": "test", "task": task, "label_names": names}
        about |= {"thresholds": thresholds, "slice_by": list(columns)}
        kinds = schema_of(task, len(names))
        arrays = {name: pa.array(table[name], kind) for name, kind in kinds.items()}
        written = pa.table({**arrays, **columns}).replace_schema_metadata({KEY: json.dumps(about)})
        pq.write_table(written, tmp_path / "images.parquet")
        settings = SimpleNamespace(model="models/<m>", dataset_name="d", split="test", report=str(tmp_path))
        dataset = SimpleNamespace(unread_columns=("camera",))
        results |= {"eval_samples": count, "broken": list(broken)}
        page = write_evaluation_report(tmp_path, settings, None, None, dataset, results)

        def refuse(constant):
            raise AssertionError(f"{constant} in report.json")

        data = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
        return data, page.read_text(), tmp_path

    run.pictures = seen
    return run


def class_answers(images=300, classes=4, seed=0, right=2.5):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, images)
    logits = draw.normal(0, 1, (images, classes))
    logits[np.arange(images), labels] += right
    return labels, logits


def test_one_label(report):
    labels, logits = class_answers(right=4)
    flipped = np.arange(0, 300, 25)
    given = labels.copy()
    given[flipped] = (labels[flipped] + 1) % 4
    names = [f"class {index}" for index in range(4)]
    camera = ["old" if index % 3 else "new" for index in range(300)]
    data, page, folder = report("image-classification", names, given, logits, camera=camera)
    predicted = logits.argmax(1)
    of_class = {row["label"]: row for row in data["classes"]}
    for key, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        expected = score(given, predicted, average=None)
        np.testing.assert_allclose([of_class[name][key] for name in names], expected)
        for row in of_class.values():
            assert row[f"{key}_interval"][0] < row[key] < row[f"{key}_interval"][1]
    assert sum(map(sum, data["confusion_matrix"])) == 300
    assert data["calibration"]["error"] == pytest.approx(data["figures"]["eval_calibration_error"])
    errors = pq.read_table(folder / "label_errors.parquet").to_pylist()
    assert [row["rank"] for row in errors] == list(range(1, len(errors) + 1))
    assert len(errors) == data["label_errors"]["images"]
    first = [row for row in errors[:10] if row["position"] in flipped]
    assert len(first) >= 7 and all(row["suggested"] == names[labels[row["position"]]] for row in first)
    assert {(part["column"], part["value"]) for part in data["slices"]} == {("camera", "old"), ("camera", "new")}
    assert 0 < data["slices"][0]["accuracy_interval"][0] < data["slices"][0]["accuracy"] < 1
    for title in ("Figures", "Likely label errors", "Highest losses", "Confusions", "Slices", "Calibration"):
        assert f">{title}" in page
    assert "an exported model has no gradients" in page  # or any other that is none of ours
    assert all(command.split()[0] in ("hf-poolformer", "python", "#") for command in data["next"])


def test_hostile_names_do_nothing(report):
    labels, logits = class_answers(classes=5, right=0.5)
    values = [HOSTILE[index % 3] for index in range(300)]
    broken = [{"path": HOSTILE[0], "split": "test", "position": 300, "error": HOSTILE[1]}]
    data, page, _ = report("image-classification", HOSTILE, labels, logits, broken=broken, **{"<i>": values})
    body = page[page.index("<body") :]
    assert body.count("<script") == 1 and "<i>" not in body and "<b>" not in body and "<m>" not in body
    assert not re.search("[\0\u202e]", page) and "n" * 1000 not in page
    assert data["labels"] == HOSTILE and len(set(data["names"])) == 5


def test_a_class_whose_folder_holds_another(report):
    labels, logits = class_answers(images=500, right=5)
    kept = np.flatnonzero(labels != 3)
    given = np.where((labels == 1) & (np.arange(500) % 2 == 0), 3, labels)[kept]
    data, page, _ = report("image-classification", list("abcd"), given, logits[kept])
    assert [(row["label"], row["looks_like"]) for row in data["mislabelled_classes"]] == [("d", "b")]
    assert "Classes that look mislabelled" in page
    assert any("“d” look like “b”" in line for line in data["findings"])


@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_few_and_many_classes(report, classes):
    """One class; a model without a mistake; 1000 classes, most without images, in a page of bounded size."""
    labels, logits = class_answers(images=200, classes=classes, right={1: 0, 2: 50, 1000: 1}[classes])
    data, page, folder = report("image-classification", [f"c{index}" for index in range(classes)], labels, logits)
    assert len(page) < 800_000 and max(report.pictures) < 100
    if classes == 1000:
        assert data["confusion_matrix"] is None and len(data["confused_pairs"]) == 50
    else:
        assert not data["confused_pairs"] and not pq.read_table(folder / "label_errors.parquet").num_rows
        assert "The model doubts no label" in page


def test_several_labels(report):
    draw = np.random.default_rng(0)
    true = draw.random((400, 4)) < [0.5, 0.3, 0.05, 0]
    logits = draw.normal(np.where(true, 2.5, -2.5), 1.2)
    targets = true.copy()
    targets[:10, 0] ^= True
    names = ["sky", "sea", "rare", "never"]
    thresholds = [0.5, 0.4, 0.3, 0.5]
    lot = [index % 2 for index in range(400)]
    data, page, folder = report(
        "multi-label-classification", names, targets.astype(np.int64), logits, thresholds, lot=lot
    )
    found = pq.read_table(folder / "label_errors.parquet").to_pylist()
    assert sum(row["position"] < 10 and row["label"] == "sky" for row in found[:10]) >= 7
    assert all((row["error"] == "extra") == bool(targets[row["position"], names.index(row["label"])]) for row in found)
    (sky,) = (row for row in data["classes"] if row["label"] == "sky")
    predicted = 1 / (1 + np.exp(-logits[:, 0])) >= 0.5
    assert sky["f1"] == pytest.approx(f1_score(targets[:, 0], predicted))
    assert sky["threshold"] == 0.5 and sky["f1_at_best"] >= sky["f1"]
    curve = data["threshold_curves"]
    assert curve["labels"]["sky"]["f1"][50] == pytest.approx(sky["f1"])
    assert len(curve["thresholds"]) == len(curve["together"]["f1"]) == 101
    assert [part["verdict"] for part in data["slices"]] == ["within chance"] * 2
    assert ">Thresholds" in page and ">Labels" in page


@pytest.mark.parametrize("targets", [1, 2])
def test_numbers(report, targets):
    draw = np.random.default_rng(0)
    truth = draw.normal(10, 3, (300, targets)).astype(np.float32)
    answers = truth * 0.6 + 4 + draw.normal(0, 0.5, truth.shape)  # towards the mean: biased at both ends
    answers[7] += 20
    heat = draw.random(300).tolist()
    names = ["age", "weight"][:targets]
    data, page, folder = report("image-regression", names, truth, answers, heat=heat)
    assert data["largest_errors"][0]["position"] == 7
    age = data["targets"][0]
    assert age["mae"] == pytest.approx(np.abs(answers - truth)[:, 0].mean(), rel=1e-4)
    assert [row["biased"] for row in age["ranges"]][::4] == [True, True]
    assert age["ranges"][0]["bias"] > 0 > age["ranges"][-1]["bias"] + 0.5 and age["intervals"]["mae"]
    assert any("Of small “age”" in line and "too large" in line for line in data["findings"])
    assert len(data["slices"]) == 4 and data["slices"][0]["mae_interval"]
    assert ("r2" in data["slices"][0]) == (targets == 1)
    assert not (folder / "label_errors.parquet").exists() and ">Largest errors" in page


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Red and green images, three of which lie in the wrong folder, and a model that has learned others."""
    folder = tmp_path_factory.mktemp("colours")
    draw = np.random.default_rng(0)

    def image(green):
        pixels = draw.integers(0, 90, (32, 32, 3))
        pixels[:, :, green] += 120
        return Image.fromarray(pixels.astype(np.uint8))

    for name in ("green", "red"):
        (folder / "images/test" / name).mkdir(parents=True)
    for index in range(40):
        green = index % 2
        name = ["red", "green"][green ^ (index in (4, 9, 30))]
        image(green).save(folder / "images/test" / name / f"{index}.png")
    torch.manual_seed(0)
    config = PoolFormerConfig(
        depths=(1, 1, 1, 1),
        hidden_sizes=(8, 8, 16, 16),
        id2label={0: "green", 1: "red"},
        label2id={"green": 0, "red": 1},
    )
    model, processor = PoolFormerForImageClassification(config), PoolFormerImageProcessor(size=32, crop_pct=1.0)
    # The classifier alone is fitted, to random features.
    learned = processor([image(index % 2) for index in range(32)], return_tensors="pt")["pixel_values"]
    seen = []
    model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.eval()
    with torch.no_grad():
        model(learned)
        features = torch.cat([seen[0], torch.ones(32, 1)], 1).double()
        wanted = torch.tensor([[-3.0, 3.0], [3.0, -3.0]] * 16).double()
        fitted = torch.linalg.solve(features.T @ features + 1e-4 * torch.eye(17), features.T @ wanted).float()
        model.classifier.weight.copy_(fitted[:-1].T)
        model.classifier.bias.copy_(fitted[-1])
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


def test_a_run_from_images_to_page(colours, tmp_path):
    from hf_poolformer.commands.evaluate import main

    arguments = [
        str(colours / "model"),
        "--dataset_name",
        str(colours / "images"),
        "--report",
        str(tmp_path / "report"),
    ]
    assert main([*arguments, "--num_workers", "0"]) == 0
    errors = pq.read_table(tmp_path / "report/label_errors.parquet").to_pylist()
    assert {row["path"].rpartition("/")[2] for row in errors[:3]} == {"4.png", "9.png", "30.png"}
    data = json.loads((tmp_path / "report/report.json").read_text())
    assert {row["position"] for row in data["highest_losses"][:3]} == {row["position"] for row in errors[:3]}
    page = (tmp_path / "report/report.html").read_text()
    section = page[page.index(">Highest losses</h2>") : page.index(">Confusions</h2>")]
    assert "Beside each image, Grad-CAM" in section
    first = section[section.index("<li") : section.index("</li>")]
    assert first.count("<img") == 3 and "label doubted" in first  # the image, for the prediction, for the label
