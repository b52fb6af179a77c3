"""The table of published variants, against the papers' figures and against timm."""

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_poolformer import VARIANTS, MetaFormerConfig
from hf_poolformer.configuration_poolformer import FAMILIES
from hf_poolformer.modeling_poolformer import AUTO_CLASSES


# Parameters, and 1e9 multiply-accumulates of convolutions and matrix products at 224 px with 1000 classes.
FIGURES = {
    "poolformer_s12": (11915176, 1.812),
    "poolformer_s24": (21388968, 3.392),
    "poolformer_s36": (30862760, 4.972),
    "poolformer_m36": (56172520, 8.759),
    "poolformer_m48": (73473448, 11.533),
    "metaformer_pppa_s12": (14038440, 1.920),
    "metaformer_ppaa_s12": (16535592, 2.549),
    "metaformer_pppf_s12": (11919978, 1.815),
    "metaformer_ppff_s12": (12150474, 1.888),
    "identityformer_s12": (11891712, 1.812),
    "randformer_s12": (12127010, 1.888),
    "poolformerv2_s12": (11891712, 1.812),
    "poolformerv2_m48": (73346056, 11.533),
    "convformer_s18": (26774448, 3.941),
    "convformer_b36": (99882616, 22.629),
    "caformer_s18": (26341656, 4.107),
    "caformer_m36": (56204878, 13.241),
    "caformer_b36": (98753614, 23.160),
}
# As the README of sail-sg/metaformer prints them, at 384 px.
FIGURES_384 = {"caformer_s18_384": 13.4, "caformer_b36_384": 72.2, "convformer_s36_384_in21ft1k": 22.4}


def meta_model(name):
    config = MetaFormerConfig.from_variant(name)
    (model_class,) = (c for c in AUTO_CLASSES["AutoModelForImageClassification"] if c.config_class is type(config))
    with torch.device("meta"):
        return model_class(config).eval()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def giga_macs(model, size):
    # The counter knows no fused attention on the meta device; the plain one is two matrix products, which it counts.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", FIGURES)
def test_parameters_and_macs_are_the_published_ones(name):
    model = meta_model(name)
    count, macs = FIGURES[name]
    assert parameters(model) == count
    assert giga_macs(model, 224) == pytest.approx(macs, rel=0.005)


@pytest.mark.parametrize("name", FIGURES_384)
def test_macs_at_384(name):
    assert VARIANTS[name].image_size == 384
    assert giga_macs(meta_model(name), 384) == pytest.approx(FIGURES_384[name], abs=0.05)


def test_the_random_matrices_are_not_trained():
    model = meta_model("randformer_s12")
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 11891712


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.timm_name])
def test_parameters_and_facts_are_those_of_timm(name):
    variant = VARIANTS[name]
    with torch.device("meta"):
        theirs = timm.create_model(variant.timm_name, num_classes=variant.num_labels)
    assert parameters(meta_model(name)) == parameters(theirs)
    facts = theirs.pretrained_cfg
    assert facts["input_size"] == (3, variant.image_size, variant.image_size)
    assert facts["crop_pct"] == variant.crop_pct
    assert facts["num_classes"] == variant.num_labels


def test_every_variant_of_timm_is_in_the_table():
    ours = {variant.timm_name for variant in VARIANTS.values() if variant.timm_name}
    assert ours == set(timm.list_models(module="metaformer", pretrained=True))


def test_the_table_is_complete():
    assert len(VARIANTS) == 5 + 5 + 3 * 5 + 2 * 4 * 5
    assert {variant.family for variant in VARIANTS.values()} == set(FAMILIES)
    assert len({variant.source for variant in VARIANTS.values()}) == len(VARIANTS)


@pytest.mark.parametrize(("name", "variant"), VARIANTS.items())
def test_rows_make_sense(name, variant):
    config = MetaFormerConfig.from_variant(name)
    assert config.model_type == ("poolformer" if variant.family == "poolformer" else "metaformer")
    assert name.startswith(variant.family)
    assert config.num_labels == variant.num_labels
    assert (variant.top1 is None) == (variant.num_labels == 21841)
    assert variant.top1 is None or 74 < variant.top1 < 89
    assert variant.drop_path_rate is None or 0.1 <= variant.drop_path_rate <= 0.8
    if config.model_type == "metaformer":
        assert config.image_size == variant.image_size == (384 if "384" in name else 224)


@pytest.mark.parametrize(
    ("name", "crop_pct", "layer_scale"),
    [
        ("poolformer_s24", 0.9, 1e-5),
        ("poolformer_s36", 0.9, 1e-6),
        ("poolformer_m36", 0.95, 1e-6),
        ("metaformer_id_s12", 0.9, 1e-5),
        ("metaformer_pppa_s12", 0.95, 1e-5),
        ("metaformer_pppf_s12", 0.9, 1e-5),
        ("metaformer_ppff_s12", 0.95, 1e-5),
    ],
)
def test_facts_of_the_first_paper(name, crop_pct, layer_scale):
    assert VARIANTS[name].crop_pct == crop_pct
    assert MetaFormerConfig.from_variant(name).layer_scale_init_value == layer_scale


def test_sources_are_the_authors_files():
    assert VARIANTS["metaformer_ppaa_s12"].source.endswith("/releases/download/v1.0/metaformer_ppaa_s12_224.pth.tar")
    assert VARIANTS["metaformer_id_s12"].source.endswith("/releases/download/v1.0/metaformer_id_s12.pth.tar")
    assert VARIANTS["caformer_b36_384_in21ft1k"].source.endswith("/main/caformer/caformer_b36_384_in21ft1k.pth")
