import json

import pytest

import hf_poolformer_cli
from hf_poolformer.commands import UserError, convert
from hf_poolformer.conversion import convert as conversion


def test_targets_are_those_of_the_function():
    assert convert.TARGETS == conversion.TARGETS


def test_there_and_back(things, tmp_path, capsys):
    words = [things.model, tmp_path / "official", "--to", "official", "--variant", "poolformer"]
    assert hf_poolformer_cli.main(["convert", *map(str, words)]) == 0
    assert str(tmp_path / "official") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("labels.txt", "cat\ndog\n", ["cat", "dog"]),
        ("labels.json", json.dumps({"1": "dog", "0": "cat"}), ["cat", "dog"]),
        ("list.json", json.dumps(["cat", "dog"]), ["cat", "dog"]),
    ],
)
def test_labels(name, text, labels, tmp_path):
    (tmp_path / name).write_text(text)
    assert convert.read_labels(tmp_path / name) == labels


@pytest.mark.parametrize(("name", "text"), [("x.json", "{"), ("x.json", '{"1": "a"}'), ("x.txt", "a\n\nb")])
def test_labels_that_cannot_be_read(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        convert.read_labels(tmp_path / name)


def test_fields():
    assert convert.read_fields(["pool_size=5", "hidden_act=relu"]) == {"pool_size": 5, "hidden_act": "relu"}
    with pytest.raises(UserError, match="FIELD=VALUE"):
        convert.read_fields(["pool_size"])
