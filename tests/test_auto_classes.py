"""Each kind of process a user may have: with this package, with plain transformers, with remote code."""

import json

import pytest
import torch
import transformers
from PIL import Image

import hf_poolformer
from hf_poolformer import (
    TOKEN_MIXERS,
    MetaFormerConfig,
    MetaFormerForImageClassification,
    PoolFormerForImageClassification,
)


@pytest.fixture(autouse=True)
def same_order_of_summation(monkeypatch):
    """The built-in model's, so that its logits can be held to; the kernels' own tests are elsewhere."""
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "reference")


TINY = {"depths": (1, 1, 2, 1), "hidden_sizes": (8, 16, 32, 64), "num_labels": 10}


# Loads folders, compares logits with the stored ones, prints the module of each class.
LOAD = """
import sys, torch, transformers
trust, *folders = sys.argv[1:]
for folder in folders:
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=trust == "trust")
    for pixel_values, wanted in torch.load(folder + "/logits.pt", weights_only=True):
        with torch.no_grad():
            got = model.eval()(pixel_values).logits
        error = ((got - wanted).abs().max() / wanted.abs().max()).item()
        assert error < 1e-6, error
    print(type(model).__module__)
"""

BUILT_IN_SAVES = """
import sys, torch
from transformers import PoolFormerConfig, PoolFormerForImageClassification
torch.manual_seed(1)
folder = sys.argv[1]
model = PoolFormerForImageClassification(PoolFormerConfig(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 32, 64])).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    inputs = [torch.randn(1, 3, *size) for size in ((224, 224), (96, 72), (320, 224))]
    torch.save([(x, model(x).logits) for x in inputs], folder + "/logits.pt")
model.save_pretrained(folder)
"""


def save_with_logits(model, folder, sizes):
    model.save_pretrained(folder)
    with torch.no_grad():
        pairs = [(pixel_values, model(pixel_values).logits) for pixel_values in (torch.randn(1, 3, *s) for s in sizes)]
    torch.save(pairs, folder / "logits.pt")


def test_ours_loads_without_this_package(poolformer_config, scramble, tmp_path, run_python):
    model = scramble(PoolFormerForImageClassification(poolformer_config))
    save_with_logits(model, tmp_path, [(224, 224), (96, 72), (320, 224)])
    assert run_python(LOAD, "no", tmp_path, without_package=True).stdout.startswith("transformers.models.poolformer")
    assert run_python(LOAD, "trust", tmp_path, without_package=True).stdout.startswith("transformers_modules.")


def test_the_built_in_model_loads_in_ours(tmp_path, run_python):
    run_python(BUILT_IN_SAVES, tmp_path, without_package=True)
    assert run_python("import hf_poolformer\n" + LOAD, "no", tmp_path).stdout.startswith("hf_poolformer.")


def test_every_mixer_loads_by_remote_code_and_only_so(scramble, tmp_path, run_python):
    folders = []
    for mixer in TOKEN_MIXERS:
        config = MetaFormerConfig(**TINY, token_mixers=(mixer,) * 4, image_size=64)
        folders.append(tmp_path / mixer)
        save_with_logits(scramble(MetaFormerForImageClassification(config)), folders[-1], [(64, 64)])
    modules = run_python(LOAD, "trust", *folders, without_package=True).stdout.split()
    assert len(modules) == len(folders)
    assert all(module.startswith("transformers_modules.") for module in modules)
    # Without consent it is refused, not loaded wrongly and silently as something else.
    refused = run_python(LOAD, "no", folders[0], without_package=True, check=False)
    assert refused.returncode != 0
    assert "trust_remote_code=True" in refused.stderr


def test_a_model_loaded_by_remote_code_can_be_saved_again(poolformer_config, tmp_path, run_python):
    PoolFormerForImageClassification(poolformer_config).save_pretrained(tmp_path / "first")
    code = """
import sys, transformers
model = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[2])
"""
    run_python(code, tmp_path / "first", tmp_path / "second", without_package=True)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert second["auto_map"] == first["auto_map"]
    assert {path.name for path in (tmp_path / "second").iterdir()} == {p.name for p in (tmp_path / "first").iterdir()}


@pytest.mark.parametrize("model_type", ["poolformer", "metaformer"])
def test_auto_classes_are_ours(model_type, tmp_path):
    config_class = type(transformers.AutoConfig.for_model(model_type))
    assert config_class.__module__ == "hf_poolformer.configuration_poolformer"
    config = config_class(depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 32, 64))
    prefix = "PoolFormer" if model_type == "poolformer" else "MetaFormer"
    names = {"AutoModel": "Model", "AutoModelForImageClassification": "ForImageClassification"}
    for auto_name, suffix in names.items():
        auto_class, model_class = getattr(transformers, auto_name), getattr(hf_poolformer, prefix + suffix)
        assert type(auto_class.from_config(config)) is model_class
        model_class(config).save_pretrained(tmp_path / suffix)
        assert type(auto_class.from_pretrained(tmp_path / suffix)) is model_class
    backbone = transformers.AutoBackbone.from_config(config)
    assert type(backbone) is getattr(hf_poolformer, prefix + "Backbone")


@pytest.mark.parametrize("model_type", ["poolformer", "metaformer"])
def test_pipeline(model_type, tmp_path):
    config_class = transformers.AutoConfig.for_model(model_type).__class__
    config = config_class(depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 32, 64), id2label={0: "cat", 1: "dog", 2: "owl"})
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    hf_poolformer.PoolFormerImageProcessor().save_pretrained(tmp_path)
    classify = transformers.pipeline("image-classification", str(tmp_path))
    assert type(classify.image_processor) is hf_poolformer.PoolFormerImageProcessor
    result = classify(Image.new("L", (50, 70), 90))
    assert {entry["label"] for entry in result} == {"cat", "dog", "owl"}
    assert sum(entry["score"] for entry in result) == pytest.approx(1.0)


def test_image_processor_backends(tmp_path):
    hf_poolformer.PoolFormerImageProcessor(crop_pct=0.95).save_pretrained(tmp_path)
    MetaFormerConfig().save_pretrained(tmp_path)
    default = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pil = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(default) is hf_poolformer.PoolFormerImageProcessor
    assert type(pil) is hf_poolformer.PoolFormerImageProcessorPil
    assert default.crop_pct == pil.crop_pct == 0.95


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)):
        PoolFormerForImageClassification.from_pretrained(tmp_path)
