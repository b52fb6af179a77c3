import json

import pandas
import pytest

import hf_poolformer_cli
from hf_poolformer.commands import predict
from hf_poolformer.prediction.run import PART_SIZE


def test_the_summary_as_json(things, tmp_path, capsys):
    output = tmp_path / "table.csv"
    (tmp_path / "broken.png").write_bytes(b"not an image")
    words = [things.model, things.photos, tmp_path / "broken.png", "--output", output, "--json", "--num_workers", 0]
    assert hf_poolformer_cli.main(["predict", *map(str, words)]) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert (summary["predicted"], summary["broken"], summary["output"]) == (24, 1, str(output))
    assert "broken.png" in printed.err
    assert len(pandas.read_csv(output)) == 25


def test_nothing_but_broken_images_is_a_failure(things, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    words = [things.model, tmp_path / "broken.png", "--output", tmp_path / "table.csv"]
    assert hf_poolformer_cli.main(["predict", *map(str, words)]) == 1


def test_defaults_are_those_of_the_function():
    assert predict.PART_SIZE == PART_SIZE


@pytest.mark.parametrize("name", ["table.csv", "folder"])
def test_an_output_that_exists_is_kept(name, things, tmp_path, capsys):
    output = tmp_path / name
    if output.suffix:
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "mine").write_text("mine")
    words = [things.model, things.image, "--output", output]
    assert hf_poolformer_cli.main(["predict", *map(str, words)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert (output if output.suffix else output / "mine").read_text() == "mine"
