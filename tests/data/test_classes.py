"""One function from stored value to class: what training learns from a value, evaluation takes it for."""

import io
import json
import os
import sys
import unicodedata
from decimal import Decimal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from transformers import PretrainedConfig

from hf_poolformer.data.classes import CONFIG_FIELD, Classes, UnknownClass, class_key
from hf_poolformer.data.datasets import open_datasets
from hf_poolformer.evaluation.classification import evaluate_checkpoint
from hf_poolformer.evaluation.settings import EvaluationSettings
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.training.loop import train


COLOURS = [(220, 40, 40), (40, 40, 220), (40, 220, 40)]
ACCENTED = ["café", "Kälte", "Ångström"]


def write(path, labels, kinds=None):
    """Parquet as pandas writes it: pictures whose colour is their kind, labels as they are given."""
    rng = np.random.default_rng(len(labels))
    path.parent.mkdir(exist_ok=True, parents=True)
    kinds = [index % 3 for index in range(len(labels))] if kinds is None else kinds
    images = []
    for kind in kinds:
        pixels = np.clip(rng.normal(COLOURS[kind], 20, (16, 16, 3)), 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        images.append({"bytes": stream.getvalue(), "path": None})
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": pyarrow.array(labels)}), path)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (3, "3"),
        (3.0, "3"),
        (np.float32(3), "3"),
        (np.int8(-1), "-1"),
        (True, "1"),
        (np.bool_(False), "0"),
        (Decimal("2.00"), "2"),
        (Decimal("0.25"), "0.25"),
        (0.5, "0.5"),
        ("03", "03"),
        (" cat\n", "cat"),
        ("NA", "NA"),
        ("None", "None"),
        ("nan", "nan"),
        (unicodedata.normalize("NFD", "café"), unicodedata.normalize("NFC", "café")),
        (None, None),
        (float("nan"), None),
        ("  ", None),
    ],
)
def test_keys(value, key):
    assert class_key(value) == key


def test_a_key_must_be_told():
    with pytest.raises(UnknownClass, match="bytes"):
        class_key(b"cat")


def test_values_found_in_a_column():
    numbers = Classes.stored({"10", "9", "1"})
    assert numbers.names == ("1", "9", "10")
    assert [numbers.index(value) for value in (9, 10.0, "1", -1, None)] == [1, 2, 0, None, None]
    with pytest.raises(UnknownClass, match=r"label 2 is none of the 3 classes: 1, 9, 10"):
        numbers.index(2)


def test_a_table_with_gaps_survives_the_configuration(tmp_path):
    coco = Classes.keyed({"1": "person", "90": "toothbrush", "13": "stop sign"})
    assert coco.names == ("person", "stop sign", "toothbrush")
    labels = {"id2label": dict(enumerate(coco.names)), "label2id": {n: i for i, n in enumerate(coco.names)}}
    PretrainedConfig(**labels, **{CONFIG_FIELD: coco.for_config()}).save_pretrained(tmp_path)
    loaded = Classes.of_config(PretrainedConfig.from_pretrained(tmp_path))
    assert [loaded.index(value) for value in (1, 13, 90.0, "90", "toothbrush")] == [0, 1, 2, 2, 2]
    for value in (0, 2):  # not positions: the table has keys
        with pytest.raises(UnknownClass, match=r"1 \(person\), 13 \(stop sign\), 90 \(toothbrush\)"):
            loaded.index(value)


@pytest.mark.parametrize("classes", [Classes.numbered(["cat", "dog"]), Classes.stored(["cat", "dog"])])
def test_names_alone_need_no_table(classes):
    assert classes.for_config() is None


def test_names_that_are_numbers_are_no_positions():
    named = Classes.named(["1", "2", "3"])
    assert named.index(1) == 0 and named.index("3") == 2
    with pytest.raises(UnknownClass):
        named.index(0)
    assert Classes.named(["cat", "dog"]).index(1) == 1


@pytest.mark.parametrize("table", [["cat"], {"1": 7}, {"1": "0"}])
def test_a_broken_table_is_an_error(table):
    config = PretrainedConfig(id2label={0: "a", 1: "b"}, **{CONFIG_FIELD: table})
    with pytest.raises(UserError, match=CONFIG_FIELD):
        Classes.of_config(config)


LABELLINGS = {
    "with gaps from one": [1, 40, 1000],
    "floats": [1.0, 2.0, 3.0],
    "texts of numbers": ["001", "2", "10"],
    "decomposed, missing, spaces": [unicodedata.normalize("NFD", "café"), "NA", " both "],
}


@pytest.mark.parametrize("labels", LABELLINGS.values(), ids=LABELLINGS)
def test_evaluation_takes_labels_as_training_did(make_settings, tmp_path, labels):
    data = tmp_path / "data"
    write(data / "train.parquet", [labels[index % 3] for index in range(60)])
    # A split that lacks a class, in which every other number would mean another one.
    write(data / "validation.parquet", [labels[1 + index % 2] for index in range(20)], [1, 2] * 10)
    trained = train(make_settings(dataset_name=str(data), num_train_epochs=10, learning_rate=1e-2))
    assert trained["eval_accuracy"] == 1.0
    settings = EvaluationSettings(dataset_name=str(data), num_workers=0)
    settings.model = str(tmp_path / "run")
    measured = evaluate_checkpoint(settings)
    assert measured["eval_accuracy"] == 1.0 and measured["eval_samples"] == 20
    assert measured["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-4)


def test_one_spelling_in_training_and_another_in_evaluation(make_settings, tmp_path):
    composed = [unicodedata.normalize("NFC", name) for name in ACCENTED]
    decomposed = [unicodedata.normalize("NFD", name) for name in ACCENTED]
    write(tmp_path / "data" / "train.parquet", [(composed, decomposed)[index % 2][index % 3] for index in range(60)])
    opened = open_datasets(dataset_name=tmp_path / "data", train_val_split=0)["train"]
    assert sorted(opened.label_names) == sorted(composed) and opened.counts == (20, 20, 20)


def test_folders_in_two_spellings_are_one_class(tmp_path):
    names = {"composed": unicodedata.normalize("NFC", "é"), "decomposed": unicodedata.normalize("NFD", "é"), "b": "b"}
    for index, name in enumerate(names.values()):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), COLOURS[index]).save(tmp_path / name / f"{index}.png")
    opened = open_datasets(dataset_name=tmp_path, train_val_split=0)["train"]
    assert opened.label_names == ["b", "é"] and opened.counts == (1, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_folders_whose_names_are_no_text_are_classes(tmp_path):
    for name in (b"caf\xe9", b"tea"):
        os.mkdir(os.fsencode(tmp_path) + b"/" + name)
        Image.new("RGB", (8, 8)).save(os.fsdecode(os.fsencode(tmp_path) + b"/" + name + b"/1.png"))
    opened = open_datasets(dataset_name=tmp_path, train_val_split=0)["train"]
    assert opened.label_names == [r"caf\xe9", "tea"]


@pytest.mark.parametrize(
    ("labels", "names", "unlabelled"),
    [
        ([0, 1, 2, -1], ["0", "1", "2"], 15),
        ([1, 2, -100, None], ["1", "2"], 30),
        ([1.0, 2.0, None, None], ["1", "2"], 30),
        ([-1, 1], ["-1", "1"], 0),
        ([-2, -1, 0, 1], ["-2", "-1", "0", "1"], 0),
        (["a", "b", "", None], ["a", "b"], 30),
        ([True, False], ["0", "1"], 0),
    ],
)
def test_what_stands_for_no_label(tmp_path, labels, names, unlabelled):
    write(tmp_path / "data.parquet", [labels[index % len(labels)] for index in range(60)])
    opened = open_datasets(dataset_name=tmp_path / "data.parquet", train_val_split=0)["train"]
    assert opened.label_names == names and opened.unlabelled == unlabelled
    assert sum(opened.counts) == 60 - unlabelled


@pytest.mark.parametrize(
    ("training", "validation", "message"),
    [
        ([0, 1, 2], [0, 1, 7], r"none of the classes 0, 1, 2: '7' \(20 rows\)"),
        (["cat", "dog", "eel"], [0, 1, 2], r"none of the classes cat, dog, eel: '0'"),
        (["cat", "dog"], ["cat", "Dog"], r"'Dog' \(30 rows\)"),
        ([0, 1], [-1, -1], "stands for `no label`"),
        ([0, 1], [None, None], "no row has a label"),
        ([0.25, 0.5], [0.25, 0.75], r"fractions, 0\.\d+ for one, which --task image-regression learns"),
    ],
)
def test_validation_labels_are_judged_when_they_are_opened(tmp_path, training, validation, message):
    write(tmp_path / "train.parquet", [training[index % len(training)] for index in range(60)])
    array = [validation[index % len(validation)] for index in range(60)]
    write(tmp_path / "validation.parquet", array)
    with pytest.raises(UserError, match=message):
        open_datasets(dataset_name=tmp_path)


def test_texts_in_one_split_and_numbers_in_the_other(tmp_path):
    write(tmp_path / "train.parquet", [str(index % 3) for index in range(60)])
    write(tmp_path / "validation.parquet", [float(index % 3) for index in range(30)])
    opened = open_datasets(dataset_name=tmp_path)
    assert opened["validation"].counts == (10, 10, 10)


def test_the_model_says_what_its_classes_are(make_settings, tmp_path):
    write(tmp_path / "train.parquet", [index % 3 + 1 for index in range(60)])
    train(make_settings(dataset_name=str(tmp_path / "train.parquet"), num_train_epochs=1))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["id2label"] == {"0": "1", "1": "2", "2": "3"}
