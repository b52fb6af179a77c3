"""After training, for each of what a classifier can be trained for: predict, pipeline, exports, explanation, cards."""

import contextlib
import csv
import io
import json
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    ImageClassificationPipeline,
    pipeline,
)

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
from hf_poolformer.app.answers import answer
from hf_poolformer.evaluation.classification import evaluate_checkpoint
from hf_poolformer.evaluation.rows import read_rows
from hf_poolformer.evaluation.settings import EvaluationSettings
from hf_poolformer.explanation.explainer import explain
from hf_poolformer.export import export_model, load
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.scores import choose
from hf_poolformer.hub.cards import folder_card
from hf_poolformer.prediction import Predictor, predict
from hf_poolformer.prediction.ray_data import Actor


EXPORTING = ("onnx", "onnxscript", "onnxruntime")
EXAMPLE = Path(__file__).parents[1] / "examples" / "onnx_predict.py"
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEMS = (SINGLE, MULTI, REGRESSION)
NAMES = {
    SINGLE: ["cat", "dog", "eel", "fox", "gnu", "hen", "ibis"],
    MULTI: ["always", "never", "cat, tabby", 'the "dog"', "fox\nred", "hen"],
    # One is called as a column is.
    REGRESSION: ["price, €", "label"],
}


def save(folder: Path, problem: str | None, names: list[str], **more) -> Path:
    torch.manual_seed(0)
    config = PoolFormerConfig(
        depths=(1, 1, 1, 1),
        hidden_sizes=(8, 16, 32, 64),
        id2label=dict(enumerate(names)),
        problem_type=problem,
        **more,
    )
    model = PoolFormerForImageClassification(config)
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.8)
        if problem == REGRESSION:
            model.classifier.bias.copy_(torch.linspace(-20, 300, len(names)))
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "crop_pct": 1.0}
    PoolFormerImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve of 32 x 32 pixels, which no processor resizes."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(12):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.BICUBIC).save(folder / f"{seed:02d}.png")
    return folder


def logits_of(model: Path, photos: Path) -> np.ndarray:
    """(images, outputs) by transformers, in float64 from there on."""
    network = AutoModelForImageClassification.from_pretrained(model).eval()
    processor = AutoImageProcessor.from_pretrained(model)
    images = [Image.open(path) for path in sorted(photos.iterdir())]
    with torch.inference_mode():
        return network(**processor(images, return_tensors="pt")).logits.double().numpy()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


@pytest.fixture(scope="module")
def models(tmp_path_factory, photos):
    """A folder for each problem. Of several labels one applies always, one never, the others to some of the photos."""
    root = tmp_path_factory.mktemp("models")
    made = {problem: save(root / problem, problem, NAMES[problem]) for problem in PROBLEMS}
    probabilities = sigmoid(logits_of(made[MULTI], photos))
    # In the middle of the widest gaps, so that rounding turns none.
    thresholds = [0.0, 1.0]
    for column in probabilities[:, 2:].T:
        values = np.sort(column)
        gap = np.diff(values).argmax()
        thresholds.append(float(values[gap : gap + 2].mean()))
    made[MULTI] = save(root / "labels", MULTI, NAMES[MULTI], label_thresholds=thresholds)
    return made


def thresholds_of(model: Path) -> np.ndarray:
    return np.array(json.loads((model / "config.json").read_text())["label_thresholds"])


def expected_labels(model: Path, photos: Path, thresholds=None) -> list[dict[str, float]]:
    """Of each image, the labels that it has and their probabilities, best first."""
    thresholds = thresholds_of(model) if thresholds is None else thresholds
    found = []
    for row in sigmoid(logits_of(model, photos)):
        order = [index for index in np.argsort(-row) if row[index] >= np.broadcast_to(thresholds, row.shape)[index]]
        found.append({NAMES[MULTI][index]: row[index] for index in order})
    return found


def table(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for key in row.keys() - {"path", "label", "error"}:
            row[key] = json.loads(row[key]) if row[key] else None
        row.update({key: row[key] or None for key in ("label", "error") if key in row})
    return rows


def test_the_labels_are_some(models, photos):
    counts = [len(labels) for labels in expected_labels(models[MULTI], photos)]
    assert min(counts) < max(counts) < len(NAMES[MULTI])


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_tables_of_several_labels(models, photos, tmp_path, suffix):
    (photos_and_junk := tmp_path / "in").mkdir()
    (photos_and_junk / "broken.png").write_bytes(b"junk")
    output = tmp_path / f"out{suffix}"
    predict(models[MULTI], [photos, photos_and_junk], output, num_workers=0, progress=False)
    *rows, broken = table(output)
    assert list(rows[0]) == ["path", "label", "score", "labels", "scores", "error"]
    for row, expected in zip(rows, expected_labels(models[MULTI], photos), strict=True):
        assert row["labels"] == list(expected)
        assert row["scores"] == pytest.approx(list(expected.values()), rel=1e-4)
        assert row["label"] == row["labels"][0] and row["score"] == row["scores"][0]
    assert broken["labels"] is broken["score"] is None and "not an image" in broken["error"]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_tables_of_numbers(models, photos, tmp_path, suffix):
    output = tmp_path / f"out{suffix}"
    predict(models[REGRESSION], [photos], output, num_workers=0, progress=False)
    rows = table(output)
    assert [key for key in rows[0] if key != "label"] == ["path", "price, €", "label (1)", "error"]
    found = np.array([[row["price, €"], row["label (1)"]] for row in rows])
    np.testing.assert_allclose(found, logits_of(models[REGRESSION], photos), rtol=1e-5)
    assert found[:, 1].min() > 250, "in units"
    if suffix == ".parquet":
        schema = pq.read_schema(output)
        assert schema.field("price, €").type == schema.field("label (1)").type == pa.float32()


def test_an_image_may_have_no_label(models, photos, tmp_path):
    for suffix in (".csv", ".jsonl", ".parquet"):
        predict(models[MULTI], [photos], tmp_path / f"t{suffix}", threshold=1.0, num_workers=0, progress=False)
        for row in table(tmp_path / f"t{suffix}"):
            assert row["labels"] == row["scores"] == []
            assert row["label"] is row["score"] is row["error"] is None


def test_thresholds_and_numbers_that_are_asked_for(models, photos, tmp_path):
    model, probabilities = models[MULTI], sigmoid(logits_of(models[MULTI], photos))

    def labels(**asked):
        predict(model, [photos], tmp_path / "t.jsonl", overwrite=True, num_workers=0, progress=False, **asked)
        return [row["labels"] for row in table(tmp_path / "t.jsonl")]

    above = [list(found) for found in expected_labels(model, photos, 0.4)]
    assert labels(threshold=0.4) == above
    assert labels(threshold=0.4, top_k=1) == [found[:1] for found in above]
    best = [[NAMES[MULTI][index] for index in np.argsort(-row)] for row in probabilities]
    assert labels(top_k=2) == [found[:2] for found in best], "whatever their thresholds"
    assert labels(top_k=100) == best


def test_choices_that_a_model_does_not_give(models, photos, tmp_path):
    for problem, asked, message in (
        (SINGLE, {"threshold": 0.5}, "several labels"),
        (REGRESSION, {"threshold": 0.5}, "several labels"),
        (REGRESSION, {"top_k": 3}, "gives numbers"),
        (MULTI, {"threshold": 1.5}, "between 0 and 1"),
        (MULTI, {"threshold": float("nan")}, "between 0 and 1"),
        (MULTI, {"top_k": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            predict(models[problem], [photos], tmp_path / "t.csv", progress=False, **asked)
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize("problem", [MULTI, REGRESSION])
def test_parts_go_on_after_a_stop(problem, models, photos, tmp_path):
    how = {"part_size": 5, "batch_size": 2, "num_workers": 0, "progress": False}
    asked = iter([False, False, False, False, True])
    with pytest.raises(KeyboardInterrupt):
        predict(models[problem], [photos], tmp_path / "out", should_stop=lambda: next(asked), **how)
    assert 0 < len(list((tmp_path / "out").glob("*.parquet"))) < 3
    assert predict(models[problem], [photos], tmp_path / "out", **how).predicted == 12
    predict(models[problem], [photos], tmp_path / "whole", **how)
    parts = [
        [pq.read_table(path) for path in sorted((tmp_path / name).glob("*.parquet"))] for name in ("out", "whole")
    ]
    assert all(one.equals(other) for one, other in zip(*parts, strict=True)) and len(parts[0]) == 3


def test_parts_of_other_thresholds_are_refused(models, photos, tmp_path):
    how = {"num_workers": 0, "progress": False}
    predict(models[MULTI], [photos], tmp_path / "out", **how)
    with pytest.raises(UserError, match=r"threshold None instead of 0\.4"):
        predict(models[MULTI], [photos], tmp_path / "out", threshold=0.4, **how)
    others = save(tmp_path / "other", MULTI, NAMES[MULTI], label_thresholds=[0.5] * 6)
    with pytest.raises(UserError, match="another model"):
        predict(others, [photos], tmp_path / "out", **how)


def test_on_a_cluster(models, photos):
    """The step of a Ray pipeline, without Ray."""
    content = [path.read_bytes() for path in sorted(photos.iterdir())]
    batch = pa.table({"bytes": content, "path": [str(number) for number in range(len(content))]})
    options = {"device": "cpu"}
    labels = Actor(str(models[MULTI]), "bytes", "path", {**options, "threshold": 0.4})(batch)
    assert labels["labels"].to_pylist() == [list(found) for found in expected_labels(models[MULTI], photos, 0.4)]
    numbers = Actor(str(models[REGRESSION]), "bytes", "path", options)(batch)
    assert numbers.column_names == ["path", "price, €", "label (1)", "error"]
    np.testing.assert_allclose(numbers["price, €"], logits_of(models[REGRESSION], photos)[:, 0], rtol=1e-5)


def test_features_stay_beside_the_answers(models, photos, tmp_path):
    for problem in (MULTI, REGRESSION):
        how = {"embeddings": True, "num_workers": 0, "progress": False}
        predict(models[problem], [photos], tmp_path / f"{problem}.parquet", **how)
        rows = table(tmp_path / f"{problem}.parquet")
        assert len(rows[0]["embedding"]) == 64 and list(rows[0])[-2:] == ["embedding", "error"]


@pytest.mark.parametrize("what", ["model", "export"])
def test_the_pipeline(what, models, exports, photos):
    images = [str(path) for path in sorted(photos.iterdir())]
    loaded = {
        problem: pipeline(
            "image-classification",
            model=load(exports[problem]) if what == "export" else str(models[problem]),
            image_processor=AutoImageProcessor.from_pretrained(models[problem]),
        )
        for problem in PROBLEMS
    }
    tolerance = {"rel": 1e-3 if what == "export" else 1e-4, "abs": 1e-6}
    assert all(len(found) == 5 for found in loaded[SINGLE](images))
    assert len(loaded[SINGLE](images[0], top_k=2)) == 2
    for asked, wanted in (({}, None), ({"threshold": 0.4}, 0.4)):
        expected = expected_labels(models[MULTI], photos, wanted)
        for found, right in zip(loaded[MULTI](images, batch_size=5, **asked), expected, strict=True):
            assert [entry["label"] for entry in found] == list(right)
            assert [entry["score"] for entry in found] == pytest.approx(list(right.values()), **tolerance)
    for found, row in zip(loaded[MULTI](images, top_k=2), sigmoid(logits_of(models[MULTI], photos)), strict=True):
        assert [entry["label"] for entry in found] == [NAMES[MULTI][index] for index in np.argsort(-row)[:2]]
    assert loaded[MULTI](images[0], threshold=1.0) == []
    for found, row in zip(loaded[REGRESSION](images), logits_of(models[REGRESSION], photos), strict=True):
        assert [entry["label"] for entry in found] == NAMES[REGRESSION]
        assert [entry["score"] for entry in found] == pytest.approx(row, rel=1e-4)


def test_the_pipeline_set_up_with_a_threshold(models, photos):
    image = str(photos / "00.png")
    classify = pipeline("image-classification", str(models[MULTI]), threshold=0.4)
    assert [entry["label"] for entry in classify(image)] == list(expected_labels(models[MULTI], photos, 0.4)[0])
    assert [entry["label"] for entry in classify(image, threshold=0.0)][-1:] != []
    with pytest.raises(ValueError, match="several labels"):
        pipeline("image-classification", str(models[SINGLE]))(image, threshold=0.4)
    with pytest.raises(ValueError, match="function_to_apply"):
        classify(image, threshold=0.4, function_to_apply="none")


def test_the_pipeline_of_transformers_alone(models, photos):
    """Right scores, of the best five labels; it knows no thresholds."""
    image = str(photos / "00.png")

    def stock(problem):
        model = AutoModelForImageClassification.from_pretrained(models[problem])
        processor = AutoImageProcessor.from_pretrained(models[problem])
        return ImageClassificationPipeline(model=model, image_processor=processor)

    row = sigmoid(logits_of(models[MULTI], photos)[0])
    found = stock(MULTI)(image)
    assert [entry["label"] for entry in found] == [NAMES[MULTI][index] for index in np.argsort(-row)[:5]]
    assert [entry["score"] for entry in found] == pytest.approx(np.sort(row)[::-1][:5], rel=1e-4)
    found = stock(REGRESSION)(image, function_to_apply="none")
    values = dict(zip(NAMES[REGRESSION], logits_of(models[REGRESSION], photos)[0], strict=True))
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(values, rel=1e-4)


def test_models_of_others_keep_their_pipeline(tmp_path, photos):
    """But for thresholds, where they were trained with some."""
    image = str(photos / "00.png")
    config = ConvNextConfig(depths=[1] * 4, hidden_sizes=[8] * 4, num_labels=7, problem_type=MULTI)
    for number, thresholds in enumerate((None, [0.0] * 6 + [1.0])):
        if thresholds:
            config.label_thresholds = thresholds
        ConvNextForImageClassification(config).save_pretrained(tmp_path / str(number))
        ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path / str(number))
        classify = pipeline("image-classification", str(tmp_path / str(number)))
        assert len(classify(image)) == (6 if thresholds else 5)
        assert classify(image, threshold=1.0) == []


@pytest.mark.parametrize("thresholds", [[0.5] * 5, [0.5] * 5 + [1.5], [0.5] * 5 + [None], "high"])
def test_thresholds_that_are_none(thresholds, models, photos, tmp_path):
    (tmp_path / "model").mkdir()
    for path in models[MULTI].iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"label_thresholds": thresholds}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="label_thresholds"):
        predict(tmp_path / "model", [photos], tmp_path / "t.csv", progress=False)
    with pytest.raises(Exception, match="label_thresholds"):
        pipeline("image-classification", str(tmp_path / "model"))
    if all(map(find_spec, EXPORTING)):
        with pytest.raises(UserError, match="label_thresholds"):
            export_model(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize("thresholds", [[0.3], None])
def test_one_label(thresholds, photos, tmp_path):
    """Which an image has or has not: a sigmoid, not a softmax of one."""
    model = save(tmp_path / "model", MULTI, ["cat"], label_thresholds=thresholds)
    probabilities = sigmoid(logits_of(model, photos))[:, 0]
    found = pipeline("image-classification", str(model))([str(path) for path in sorted(photos.iterdir())])
    for entries, probability in zip(found, probabilities, strict=True):
        expected = [probability] if probability >= (thresholds or [0.5])[0] else []
        assert [entry["score"] for entry in entries] == pytest.approx(expected, rel=1e-4)


def test_a_label_at_its_threshold_counts():
    """As it does where thresholds are chosen, and whatever the type of the number in which they were saved."""
    config = PoolFormerConfig(num_labels=3, problem_type=MULTI)
    config.label_thresholds = [torch.tensor(0.1).item(), 0.2, 1.0]
    ((found, scores),) = choose(torch.tensor([[0.1, 0.19, 1.0]]), config)
    assert found == [2, 0] and scores == pytest.approx([1.0, 0.1])


# Exports ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(models, tmp_path_factory):
    for library in EXPORTING:
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("exports")
    for problem, model in models.items():
        export_model(model, folder / problem, preprocessing=True, dynamic_size=False)
    return {problem: folder / problem for problem in models}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_export_answers_as_the_model(problem, models, exports, photos, tmp_path):
    tables = []
    for name, model in (("model", models[problem]), ("export", exports[problem])):
        predict(model, [photos], tmp_path / f"{name}.jsonl", num_workers=0, progress=False)
        tables.append(table(tmp_path / f"{name}.jsonl"))
    for right, got in zip(*tables, strict=True):
        assert right.keys() == got.keys() and right.get("labels") == got.get("labels")
        for name in right.keys() - {"path", "label", "labels", "error"}:
            assert got[name] == pytest.approx(right[name], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("problem", [MULTI, REGRESSION])
def test_an_export_is_evaluated_as_the_model(problem, models, exports, photos, tmp_path):
    """Its answers are probabilities, or numbers in units."""
    logits, names = logits_of(models[problem], photos), NAMES[problem]
    rng = np.random.default_rng(0)
    truth = rng.random(logits.shape) < 0.5 if problem == MULTI else logits + rng.normal(size=logits.shape)
    columns = {name: truth[:, index].tolist() for index, name in enumerate(names)}
    images = [path.read_bytes() for path in sorted(photos.iterdir())]
    pq.write_table(pa.table({"image": images, **columns}), tmp_path / "test.parquet")
    found = []
    rows = []
    for name, model in (("model", models[problem]), ("export", exports[problem])):
        report = str(tmp_path / name)
        settings = EvaluationSettings(dataset_name=str(tmp_path / "test.parquet"), num_workers=0, report=report)
        settings.model = str(model)
        found.append(evaluate_checkpoint(settings))
        rows.append(read_rows(report))
    assert rows[1].answers == pytest.approx(rows[0].answers, rel=1e-3, abs=1e-6)
    assert np.array_equal(rows[0].labels, rows[1].labels) and rows[0].labels == pytest.approx(
        truth.astype(float), rel=1e-6
    )
    if problem == MULTI:
        right = (sigmoid(logits) >= thresholds_of(models[problem])) == truth
        assert found[0]["eval_hamming_accuracy"] == pytest.approx(right.mean())
    else:
        assert found[0]["eval_mae"] == pytest.approx(np.abs(logits - truth).mean(), rel=1e-4)
    assert found[0].pop("task") == found[1].pop("task")
    for name in found[0].keys() - {"eval_runtime", "eval_samples_per_second", "eval_confidence_intervals"}:
        right, got = (figures[name] for figures in found)
        if isinstance(right, dict):  # None is the precision of a label that is never predicted
            assert [value is None for value in got.values()] == [value is None for value in right.values()], name
            right, got = ([value for value in figures.values() if value is not None] for figures in (right, got))
        # Of a probability next to 1, float32 does not keep how far away it is, which the loss is about.
        assert got == pytest.approx(right, rel=1e-2 if name == "eval_loss" else 1e-3), name


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_an_export_says_of_itself(problem, models, exports):
    import onnx

    manifest = json.loads((exports[problem] / "export.json").read_text())
    output = {SINGLE: "probabilities", MULTI: "probabilities", REGRESSION: "values"}[problem]
    task = {SINGLE: "image-classification", MULTI: "multi-label-classification", REGRESSION: "image-regression"}
    thresholds = thresholds_of(models[MULTI]).tolist() if problem == MULTI else None
    said = [manifest[name] for name in ("task", "problem_type", "output", "label_thresholds")]
    assert said == [task[problem], problem, output, thresholds]
    graph = onnx.load(exports[problem] / "model.onnx")
    assert [value.name for value in graph.graph.output] == [output]
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert (facts["task"], facts["problem_type"]) == (task[problem], problem)
    assert json.loads(facts["labels"]) == NAMES[problem]
    assert json.loads(facts.get("label_thresholds", "null")) == thresholds
    report = json.loads((exports[problem] / "verification.json").read_text())
    assert report["kind"] == {SINGLE: "classes", MULTI: "labels", REGRESSION: "numbers"}[problem]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_example_without_torch(problem, models, exports, photos):
    block = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'hf_poolformer')))\n"
    code = f"{block}import runpy; sys.argv = ['x', {str(exports[problem])!r}, {str(photos / '03.png')!r}]\n"
    code += f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = logits_of(models[problem], photos)[3]
    if problem == MULTI:
        expected = expected_labels(models[MULTI], photos)[3]
    elif problem == REGRESSION:
        expected = dict(zip(NAMES[REGRESSION], row, strict=True))
    else:
        shares = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        expected = {NAMES[SINGLE][index]: shares[index] for index in np.argsort(-row)[:5]}
    # A name may have a line break in it.
    found = re.findall(r"^ *([-\d.e]+)  ((?:.|\n(?! *[-\d.e]+  ))*)$", done.stdout.rstrip("\n"), re.MULTILINE)
    assert [name for _, name in found] == list(expected)
    assert [float(number) for number, _ in found] == pytest.approx(list(expected.values()), rel=2e-3)


# The page, heat maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_page(problem, models, photos):
    predictor = Predictor(str(models[problem]), device="cpu")
    image = Image.open(photos / "03.png")
    found = answer(predictor, image)
    assert found.picture is not None and found.note.startswith(f"Grad-CAM for “{found.choices[0]}”")
    row = logits_of(models[problem], photos)[3]
    if problem == REGRESSION:
        assert found.scores == {} and found.columns == ("target", "value") and found.choices == NAMES[REGRESSION]
        assert [name for name, _ in found.rows] == NAMES[REGRESSION]
        assert [float(value) for _, value in found.rows] == pytest.approx(row, rel=1e-3)
        assert "what makes this number larger" in found.note
    elif problem == MULTI:
        expected = expected_labels(models[MULTI], photos)[3]
        assert list(found.scores) == list(expected) and found.scores == pytest.approx(expected, rel=1e-4)
        assert set(found.choices) == {*expected, *(NAMES[MULTI][index] for index in np.argsort(-row)[:5])}
    else:
        assert list(found.scores) == found.choices and len(found.scores) == 5
    other = answer(predictor, image, found.choices[1])
    assert found.choices[1] in other.note and other.picture.tobytes() != found.picture.tobytes()


@pytest.mark.parametrize("problem", [MULTI, REGRESSION])
def test_the_page_for_a_model_without_a_map(problem, exports, models, photos):
    predictor = Predictor(str(exports[problem]), device="cpu")
    found, right = (
        answer(each, Image.open(photos / "03.png"))
        for each in (predictor, Predictor(str(models[problem]), device="cpu"))
    )
    assert found.picture is None and found.note.startswith("No heat map: ")
    assert found.scores == pytest.approx(right.scores, rel=1e-3) and list(found.scores) == list(right.scores)
    assert found.rows == right.rows


def test_a_label_that_applies_comes_before_a_better_one_that_does_not(photos, tmp_path):
    row = logits_of(save(tmp_path / "model", MULTI, NAMES[MULTI]), photos)[3]
    least, most = NAMES[MULTI][row.argmin()], NAMES[MULTI][row.argmax()]
    thresholds = [0.0 if name == least else 1.0 for name in NAMES[MULTI]]
    model = save(tmp_path / "model", MULTI, NAMES[MULTI], label_thresholds=thresholds)
    predictor, image = Predictor(str(model), device="cpu"), Image.open(photos / "03.png")
    found = answer(predictor, image)
    assert list(found.scores) == [least] and found.choices[:2] == [least, most]
    assert found.note.startswith(f"Grad-CAM for “{least}”")
    assert [entry.label for entry in explain(predictor, image, top_k=2).classes] == [least, most]


def test_the_page_for_an_image_without_a_label(photos, tmp_path):
    model = save(tmp_path / "model", MULTI, NAMES[MULTI], label_thresholds=[1.0] * 6)
    found = answer(Predictor(str(model), device="cpu"), Image.open(photos / "03.png"))
    assert found.scores == {} and found.columns == () and len(found.choices) == 5
    assert found.note.startswith("No label reaches its threshold. Grad-CAM for")


def test_the_map_of_a_number_is_of_its_gradient(models, photos):
    """Grad-CAM's weights by finite differences: a channel's, by what the number gains where the channel grows."""
    predictor = Predictor(str(models[REGRESSION]), device="cpu")
    image = Image.open(photos / "03.png")
    found = explain(predictor, image, top_k=2)
    assert [entry.label for entry in found.classes] == NAMES[REGRESSION], "in their order: numbers have no best"
    assert [entry.score for entry in found.classes] == pytest.approx(
        logits_of(models[REGRESSION], photos)[3], rel=1e-4
    )
    model = predictor.model.double()
    stage = model.base_model.encoder.block[found.stage]
    pixel_values = predictor.processor(image, return_tensors="pt")["pixel_values"].double()
    kept: dict[str, torch.Tensor] = {}

    def forward(change: torch.Tensor | None = None) -> torch.Tensor:
        def hook(module, inputs, output):
            kept["features"] = output if change is None else output + change
            return kept["features"]

        handle = stage.register_forward_hook(hook)
        with torch.no_grad():
            values = model(pixel_values).logits[0]
        handle.remove()
        return values

    before = forward()
    features = kept["features"]
    step, raw = 1e-4, torch.zeros(2, *features.shape[2:], dtype=torch.float64)
    for channel in range(features.shape[1]):
        change = torch.zeros_like(features)
        change[:, channel] = step
        gains = (forward(change) - before) / step / features[0, 0].numel()
        raw += gains[:, None, None] * features[0, channel]
    for entry, expected in zip(found.classes, raw, strict=True):
        scaled = expected.clamp(min=0) / expected.clamp(min=0).amax().clamp(min=1e-12)
        size = entry.heat.shape[0] // 32
        seen = torch.nn.functional.interpolate(scaled[None, None], (32, 32), mode="bilinear")[0, 0].numpy()
        # Laid on a picture that is larger by whole pixels; half of one is what its own interpolation may shift.
        np.testing.assert_allclose(entry.heat[size // 2 :: size, size // 2 :: size], seen, atol=0.08)


# Cards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("of", ["model", "export"])
def test_what_the_card_shows_runs(problem, of, models, exports, photos, tmp_path, monkeypatch):
    card = folder_card(models[problem]) if of == "model" else (exports[problem] / "README.md").read_text()
    kind = {SINGLE: "7 classes", MULTI: "6 labels", REGRESSION: "2 numbers"}[problem]
    assert kind in card
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == (2 if of == "model" else 1)
    Image.open(photos / "03.png").save(tmp_path / "photo.jpg", quality=100, subsampling=0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / models[problem].name).symlink_to(models[problem])
    for snippet in snippets:
        snippet = snippet.replace('load("."', f'load("{exports[problem]}"')
        (tmp_path / "snippet.py").write_text(snippet)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(tmp_path / "snippet.py"))
        said = printed.getvalue()
        if problem == REGRESSION:
            numbers = [float(line.rsplit(" ", 1)[1]) for line in said.splitlines()]
            assert numbers == pytest.approx(logits_of(models[REGRESSION], photos)[3], rel=0.05)
        else:
            assert any(name.splitlines()[0] in said for name in NAMES[problem])
    if problem == MULTI:
        assert "always" in said and "never" not in said, "by the thresholds"
