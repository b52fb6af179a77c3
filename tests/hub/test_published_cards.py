"""Cards of the published checkpoints: all of them, against VARIANTS, the papers' figures and the Hub's rules."""

import importlib.util
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_poolformer import VARIANTS
from hf_poolformer.configuration_poolformer import FAMILIES
from hf_poolformer.hub import published_cards
from hf_poolformer.hub.metadata import CardError, check_metadata
from hf_poolformer.hub.published_cards import original_names, published_card


ROOT = Path(__file__).parents[2]

# Where the facts may point to: the authors, the papers, the Hub, and what the limits cite.
HOSTS = {"github.com", "arxiv.org", "huggingface.co", "www.image-net.org"}


@pytest.fixture(scope="module")
def cards():
    """All of them. To count 65 models takes a quarter of a minute, and tests/test_variants.py does it, so that here
    only those of FIGURES are counted."""
    with pytest.MonkeyPatch.context() as patch:
        count = published_cards.figures
        patch.setattr(published_cards, "figures", lambda name: count(name) if name in FIGURES else (10**7, 10**7, 2.0))
        return {name: published_card(name) for name in VARIANTS}


def metadata(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_every_published_checkpoint_has_one(cards):
    assert len(cards) == 65
    assert len(set(cards.values())) == 65


def test_metadata(cards):
    for name, text in cards.items():
        row, data = VARIANTS[name], metadata(text)
        check_metadata(data)
        assert data["library_name"] == "transformers"
        assert data["pipeline_tag"] == "image-classification"
        assert data["license"] == "apache-2.0"
        assert len(data["widget"]) == 3
        assert data["datasets"][-1] == ("imagenet-21k" if row.num_labels == 21841 else "ILSVRC/imagenet-1k")
        assert ("base_model" in data) == ("_384" in name or "in21ft1k" in name)
        results = ModelCard(text).data.eval_results or []
        assert [result.metric_value for result in results] == ([] if row.top1 is None else [round(row.top1 / 100, 4)])
        for result in results:
            assert result.verified is False
            assert result.source_url.startswith("https://")


def test_the_hub_s_validator_takes_them(cards, online, monkeypatch):
    """Through `ModelCard.validate`, to the loopback Hub: what is sent is what the real one would parse."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", online.url)
    for text in cards.values():
        ModelCard(text).validate()
    assert sum(path == "/api/validate-yaml" for _, path in online.requests) == 65


def test_base_models_are_of_the_same_architecture(cards):
    by_timm_name = {f"timm/{row.timm_name}": name for name, row in VARIANTS.items()}
    for name, text in cards.items():
        base = by_timm_name.get(metadata(text).get("base_model"))
        assert (base is not None) == ("_384" in name or "in21ft1k" in name)
        if base is not None:
            ours, theirs = VARIANTS[name].config, VARIANTS[base].config
            assert all(ours[key] == theirs[key] for key in ("token_mixers", "depths", "hidden_sizes"))
            assert base == (f"{name.partition('_384')[0].removesuffix('_in21ft1k')}" + ("_in21k" * ("in21" in name)))


def test_of_every_family_the_texts_are_there():
    folder = Path(__file__).parents[2] / "model_cards"
    assert sorted(path.stem for path in folder.glob("*.yaml")) == sorted(FAMILIES)
    assert all(published_cards.texts_of(family).mixing.endswith(".") for family in FAMILIES)
    assert {published_cards.parts_of(name)[2] for name in VARIANTS} == set(published_cards.TRAININGS)
    # No two checkpoints are published under one name.
    names = [original for name in VARIANTS for original in original_names(name)]
    assert len(names) == len(set(names)) > 65


# Parameters and 1e9 multiply-accumulates as the authors print them, or exactly (DESIGN, section 4).
FIGURES = {
    "poolformer_s12": ("11,915,176", "1.81 G"),
    "metaformer_ppaa_s12": ("16,535,592", "2.55 G"),
    "randformer_s12": ("12,127,010, of which 11,891,712 are trained", "1.89 G"),
    "caformer_b36": ("98,753,614", "23.16 G"),
    "caformer_b36_384_in21ft1k": ("98,753,614", "72.15 G"),
    "caformer_m36": ("56,204,878", "13.24 G"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_computed_figures(cards, name):
    parameters, macs = FIGURES[name]
    assert f"| parameters | {parameters}" in cards[name]
    assert f"| multiply-accumulates | {macs}" in cards[name]


def test_text(cards):
    for name, text in cards.items():
        row = VARIANTS[name]
        assert not re.search(r"\bNone\b|\bnan\b|\{\{|\}\}|\{%", text), name
        assert row.source in text
        assert ("trust_remote_code=True" in text) == (row.model_type == "metaformer")
        assert (f"{row.top1} %" in text) if row.top1 else "## Results" not in text
        assert f"{row.image_size} x {row.image_size} pixels" in text
        assert "## Limits" in text
        assert "## Intended use" in text
        assert "non-commercial" in text
        for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            compile(snippet, name, "exec")
        headings = re.findall(r"^#+ .*", text.split("\n---\n", 1)[1], re.MULTILINE)
        assert len(headings) == len(set(headings))


def test_links(cards):
    for name, text in cards.items():
        links = set(re.findall(r"https?://[^\s)`\"]+", text))
        for link in links:
            place = urlsplit(link)
            assert (place.scheme, place.netloc in HOSTS) == ("https", True), f"{name}: {link}"
        targets = re.findall(r"\]\(([^)]*)\)", text)
        assert all(target.startswith("https://") for target in targets), f"{name}: {targets}"
        paper = (
            "2111.11418" if VARIANTS[name].source.startswith("https://github.com/sail-sg/poolformer") else "2210.13452"
        )
        assert f"https://arxiv.org/abs/{paper}" in links
        assert "  |" not in text


def test_repository_in_the_examples():
    name = "caformer_s18"
    text = published_card(name, repo_id="me/ca")
    assert 'model="me/ca"' in text
    assert "\n# ca\n" in text
    assert "convert.py" not in text


def test_no_card_of_what_nobody_published():
    with pytest.raises(CardError, match="poolformer_s13 is no row of VARIANTS"):
        published_card("poolformer_s13")


@pytest.fixture(scope="module")
def make_cards():
    spec = importlib.util.spec_from_file_location("make_cards", ROOT / "scripts" / "make_cards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_script(make_cards, cards, tmp_path, capsys):
    assert make_cards(["poolformer_s12", "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "poolformer_s12" / "README.md").read_text() == cards["poolformer_s12"]
    assert "1 of 1 cards" in capsys.readouterr().out
    arguments = ["poolformer_s13", "--output_dir", str(tmp_path)]
    assert make_cards(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_make_cards(make_cards, tmp_path, capsys):
    assert make_cards(["--output_dir", str(tmp_path)]) == 0
    assert "65 of 65 cards" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*/README.md"))) == 65
