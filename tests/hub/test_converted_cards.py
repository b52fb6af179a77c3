"""From an official checkpoint to the Hub: the card of `make cards`, and where the weights were converted from."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hf_poolformer import VARIANTS, MetaFormerConfig
from hf_poolformer.commands.convert import main as convert_command
from hf_poolformer.configuration_poolformer import FAMILIES
from hf_poolformer.conversion.convert import Checkpoint, empty_model, model_keys, write_checkpoint
from hf_poolformer.conversion.key_maps import OFFICIAL_FIRST
from hf_poolformer.foundation.tasks import CLASSIFICATION, TASKS
from hf_poolformer.hub import published_cards
from hf_poolformer.hub.cards import folder_card
from hf_poolformer.hub.contents import collect
from hf_poolformer.hub.published_cards import published_card
from hf_poolformer.image_processing_poolformer import PoolFormerImageProcessor


# The smallest variant of each family.
SMALLEST = {family: next(name for name in VARIANTS if VARIANTS[name].family == family) for family in FAMILIES}


@pytest.fixture(autouse=True)
def uncounted(monkeypatch):
    """Counting multiply-accumulates takes seconds, and tests/test_variants.py does it."""
    monkeypatch.setattr(published_cards, "figures", lambda name: (10**7, 10**7, 2.0))


def write_official(folder, name, file=None):
    """Weights as the authors would write them, all zeros, under the name they gave."""
    config = MetaFormerConfig.from_variant(name)
    model = empty_model(config, TASKS[CLASSIFICATION]).to_empty(device="cpu")
    tensors = {bare: torch.zeros(1).expand(model.state_dict()[key].shape) for bare, key in model_keys(model).items()}
    checkpoint = Checkpoint(
        config=config,
        tensors=tensors,
        task=TASKS[CLASSIFICATION],
        format=OFFICIAL_FIRST,
        family=VARIANTS[name].family,
        variant=name,
        processor=PoolFormerImageProcessor(),
        source="random",
    )
    write_checkpoint(checkpoint, folder / "theirs", to="official")
    (written,) = (folder / "theirs").iterdir()
    return written.rename(folder / (file or VARIANTS[name].source.rpartition("/")[2]))


@pytest.fixture
def official_file(tmp_path):
    return functools.partial(write_official, tmp_path)


def without_conversion(text):
    section = re.compile(r"## Conversion\n.*?(?=## )", re.DOTALL)
    assert len(section.findall(text)) == 1
    return section.sub("", text)


@pytest.mark.parametrize("name", SMALLEST.values())
def test_the_walk_ends_in_the_card_of_the_published_checkpoint(name, official_file, tmp_path, capsys):
    assert convert_command([str(official_file(name)), str(tmp_path / "my-copy")]) == 0
    card = (tmp_path / "my-copy" / "README.md").read_text()
    assert without_conversion(card) == published_card(name, folder="my-copy")
    assert "\n# my-copy\n" in card and 'model="my-copy"' in card
    (tmp_path / "scratch").mkdir()
    contents = collect(tmp_path / "my-copy", f"me/{name}", tmp_path / "scratch")
    assert without_conversion(contents.text("README.md")) == published_card(name, repo_id=f"me/{name}")
    # And where somebody has thrown the card away.
    (tmp_path / "my-copy" / "README.md").unlink()
    assert folder_card(tmp_path / "my-copy", repo_id=f"me/{name}") == contents.text("README.md")


def test_a_checkpoint_of_ones_own_is_not_taken_for_the_authors(official_file, tmp_path, capsys):
    assert (
        convert_command(
            [str(official_file("poolformer_s12", "thesis.pth")), str(tmp_path / "out"), "--variant", "poolformer_s12"]
        )
        == 0
    )
    card = (tmp_path / "out" / "README.md").read_text()
    data = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert "model-index" not in data and "datasets" not in data
    assert "`thesis.pth`" in card and re.search("SHA-256 `[0-9a-f]{64}`", card)
    assert "the authors' checkpoint of this architecture" in card and VARIANTS["poolformer_s12"].source in card
    assert "How and on what it was trained is not recorded here." in card
    assert "weights its authors published" not in card


@pytest.fixture(scope="module")
def converted_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published_cards, "figures", lambda name: (10**7, 10**7, 2.0))
        assert convert_command([str(write_official(folder, "poolformer_s12")), str(folder / "copy")]) == 0
        assert "model-index" in folder_card(folder / "copy")
    return folder / "copy"


@pytest.fixture
def converted(converted_once, tmp_path):
    """A copy, for a test that changes it."""
    return Path(shutil.copytree(converted_once, tmp_path / "copy"))


@pytest.mark.parametrize("changed", ["weights", "labels"])
def test_what_was_changed_after_the_conversion_is_no_longer_the_authors(converted, changed, tmp_path):
    def warning():
        (tmp_path / "scratch").mkdir(exist_ok=True)
        notes = collect(converted, "me/copy", tmp_path / "scratch").notes
        return [note for note in notes if "changed since" in note]

    assert warning() == []
    if changed == "weights":
        weights = load_file(converted / "model.safetensors")
        weights["classifier.bias"] = weights["classifier.bias"] + 1
        save_file(weights, converted / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((converted / "config.json").read_text())
        config["id2label"]["0"] = "another"
        (converted / "config.json").write_text(json.dumps(config))
    card = folder_card(converted)
    assert "model-index" not in card and "Conversion" not in card
    file = "model.safetensors" if changed == "weights" else "config.json"
    (said,) = warning()
    assert f"README.md was written when the model was converted, and {file} changed since" in said
    (converted / "README.md").unlink()
    assert warning() == []


BAD = {
    "source": [{"a": 1}, ["x"], 5, None],
    "format": [3, None],
    "sha256": [5, "| [a](b) |", ["a"], "AB" * 32],
    "variant": [7, ["a"], {"a": 1}],
    "notes": [5, None, "text", [1], {"a": 1}],
    "files": [None, {}, {"model.safetensors": "0" * 64}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values], ids=repr)
def test_a_note_that_nobody_here_wrote_is_none(converted, key, value):
    path = converted / "conversion.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert "Conversion" not in folder_card(converted)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000], ids=range(6))
def test_a_damaged_note_is_none(converted, content):
    (converted / "conversion.json").write_bytes(content)
    assert "Conversion" not in folder_card(converted)


def test_what_a_note_says_is_text(converted):
    path, hostile = converted / "conversion.json", "`<b>|![x](//elsewhere/x.png)\n# head"
    note = {**json.loads(path.read_text()), "source": hostile, "format": hostile, "notes": [hostile]}
    path.write_text(json.dumps(note))
    section = folder_card(converted).split("## Conversion")[1].split("\n## ")[0]
    assert section.count("elsewhere") == 3 and "\n# head" not in section
    outside = re.sub(r"`[^`]*`", "", section)  # of code
    assert "![" not in outside and "<b>" not in outside
