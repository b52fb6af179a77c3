"""Checkpoints of every publisher, through the converter and back; and what must be refused."""

import argparse
import json
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from golden_models import GOLDEN, golden, relative_error
from safetensors.torch import load_file, save_file
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from timm.models.metaformer import GroupNorm1 as TimmGroupNorm
from timm.models.metaformer import GroupNorm1NoBias as TimmGroupNormNoBias
from torchvision.models import resnet18
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from transformers.models.poolformer import configuration_poolformer as built_in_configuration
from transformers.models.poolformer import modeling_poolformer as built_in
from warm import warm_python

from hf_poolformer import (
    VARIANTS,
    MetaFormerConfig,
    MetaFormerForImageClassification,
    PoolFormerBackbone,
    PoolFormerConfig,
    PoolFormerForImageClassification,
)
from hf_poolformer.conversion.convert import ConversionError, build_model, convert, read_checkpoint, write_checkpoint
from hf_poolformer.foundation.tasks import BACKBONE
from hf_poolformer.hub.cards import folder_card


ROOT = Path(__file__).resolve().parents[2]
# Those of mmdetection are heads without a backbone.
FILES = sorted(path.stem for path in GOLDEN.glob("*.safetensors") if not path.stem.startswith("mmdet_"))
# What no weight of the file tells.
OVERRIDES = {"poolformer_v1_noscale_pool5": {"pool_size": 5}}
FAMILY = {
    "poolformer_v1": "poolformer",
    "poolformer_v1_feat": "poolformer",
    "poolformer_v1_noscale_pool5": "poolformer",
}
SIZE = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)}
# timm's constructor arguments beyond the sizes.
TIMM_MODELS = {
    "poolformer": {
        "downsample_norm": None,
        "mlp_act": torch.nn.GELU,
        "mlp_bias": True,
        "norm_layers": TimmGroupNorm,
        "layer_scale_init_values": 1e-5,
        "res_scale_init_values": None,
        "use_mlp_head": False,
    },
    "poolformerv2": {"norm_layers": TimmGroupNormNoBias, "use_mlp_head": False},
    "identityformer": {
        "norm_layers": TimmGroupNormNoBias,
        "use_mlp_head": False,
        "token_mixers": torch.nn.Identity,
    },
    "convformer": {"norm_layers": LayerNorm2dNoBias, "token_mixers": SepConv},
    "caformer": {
        "norm_layers": [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
        "token_mixers": [SepConv, SepConv, Attention, Attention],
    },
}


@pytest.fixture
def official(tmp_path):
    """Saves a golden model as its authors would, and returns the path."""

    def save(name="poolformer_v1", file=None, change=lambda weights: weights):
        path = tmp_path / (file or f"{name}.pth")
        torch.save(change(golden(name)[0]), path)
        return path

    return save


@pytest.fixture
def timm_model(scramble):
    return lambda family: scramble(MetaFormer(num_classes=10, **SIZE, **TIMM_MODELS[family]))


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key


# Acceptance -------------------------------------------------------------------------------------------------


def test_there_is_a_file_of_every_family():
    assert len(FILES) == 13


@pytest.mark.parametrize("name", FILES)
def test_official_checkpoints_compute_what_the_official_code_computes(name, official, tmp_path):
    checkpoint = convert(official(name), tmp_path / "out", overrides=OVERRIDES.get(name))
    assert checkpoint.family == FAMILY.get(name, name)
    model_class = build_model(checkpoint).__class__
    model = model_class.from_pretrained(tmp_path / "out").eval()
    expected = golden(name)[1]
    for index in (0, 1):
        if f"input.{index}" not in expected:
            continue
        with torch.no_grad():
            outputs = model(expected[f"input.{index}"])
        if checkpoint.task is BACKBONE:
            assert len(outputs.feature_maps) == 4
            for stage, feature_map in enumerate(outputs.feature_maps):
                assert relative_error(feature_map, expected[f"feature_maps.{index}.{stage}"]) < 1e-5
        else:
            assert relative_error(outputs.logits, expected[f"logits.{index}"]) < 1e-5


@pytest.mark.parametrize("name", FILES)
def test_official_round_trip_is_bit_equal(name, official, tmp_path):
    convert(official(name), tmp_path / "ours", overrides=OVERRIDES.get(name))
    convert(tmp_path / "ours", tmp_path / "back", to="official")
    (path,) = (tmp_path / "back").iterdir()
    assert_same(torch.load(path, weights_only=True), golden(name)[0])
    assert read_checkpoint(path).family == FAMILY.get(name, name)


@pytest.mark.parametrize("family", TIMM_MODELS)
def test_timm_round_trip_is_bit_equal(family, timm_model, tmp_path):
    weights = timm_model(family).state_dict()
    torch.save(weights, tmp_path / f"{family}.pth")
    checkpoint = convert(tmp_path / f"{family}.pth", tmp_path / "ours")
    assert checkpoint.family == family
    convert(tmp_path / "ours", tmp_path / "back", to="timm")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), weights)


@pytest.mark.parametrize("family", ["poolformerv2", "identityformer"])
def test_logits_are_those_of_timm(family, timm_model, tmp_path):
    theirs = timm_model(family)
    save_file(theirs.state_dict(), tmp_path / f"{family}.safetensors")
    ours = build_model(read_checkpoint(tmp_path / f"{family}.safetensors"))
    pixel_values = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(ours(pixel_values).logits, theirs(pixel_values)) < 1e-5


@pytest.mark.parametrize("family", ["convformer", "caformer"])
def test_timm_has_another_epsilon_in_the_mlp_head(family, timm_model, tmp_path):
    theirs = timm_model(family)
    assert theirs.head.fc.norm.eps == 1e-6  # official: nn.LayerNorm's 1e-5
    with torch.no_grad():
        theirs.head.fc.fc1.weight.mul_(0.03)  # small activations, where the epsilon shows
        theirs.head.fc.fc1.bias.zero_()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = build_model(read_checkpoint(tmp_path / "model.safetensors"))
    pixel_values = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        logits = ours(pixel_values).logits
        assert relative_error(logits, theirs(pixel_values)) > 1e-5
        theirs.head.fc.norm.eps = 1e-5
        assert relative_error(logits, theirs(pixel_values)) < 1e-5


def test_timm_pools_before_the_norm_in_poolformer_v1(timm_model, tmp_path):
    theirs = timm_model("poolformer")
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    assert any("pools before the final norm" in note for note in checkpoint.notes)
    ours = build_model(checkpoint)
    pixel_values = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        outputs = ours(pixel_values, output_hidden_states=True)
        features = theirs.forward_features(pixel_values)
        assert relative_error(outputs.hidden_states[-1], features) < 1e-5
        assert relative_error(outputs.logits, theirs(pixel_values)) > 1e-3
        norm = theirs.head.norm
        normed = torch.nn.functional.group_norm(features, 1, norm.weight, norm.bias, eps=1e-5)
        assert relative_error(outputs.logits, theirs.head.fc(normed.mean([2, 3]))) < 1e-5


# Formats and wrappers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": weights, "epoch": 3, "args": argparse.Namespace(model="poolformer_s12")},
        lambda weights: {"model": weights},
        lambda weights: {"module." + key: value for key, value in weights.items()},
        lambda weights: {"state_dict": {"module._orig_mod." + key: value for key, value in weights.items()}},
    ],
)
def test_wrappers_and_prefixes_are_taken_off(wrap, official):
    path = official(change=wrap)
    assert_same(read_checkpoint(path).tensors, read_checkpoint(official(file="poolformer.pth")).tensors)


def test_averaged_weights_are_preferred_and_it_is_said(official):
    def both(weights):
        return {
            "state_dict": {key: torch.zeros_like(value) for key, value in weights.items()},
            "state_dict_ema": weights,
        }

    checkpoint = read_checkpoint(official(change=both))
    assert checkpoint.tensors["norm.weight"].abs().sum() > 0
    assert any("state_dict_ema was taken" in note for note in checkpoint.notes)


def test_old_files_that_are_no_zip_archives(tmp_path):
    weights, _ = golden("caformer")
    torch.save(weights, tmp_path / "caformer.pth.tar", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "caformer.pth.tar").family == "caformer"


@pytest.mark.parametrize("first", [0, 2])  # checkpoints of detectors that begin with stage 2 have no norm0
def test_dense_checkpoints_of_other_heads_give_their_backbone_and_name_the_rest(first, official, tmp_path):
    head = {"neck.lateral_convs.0.conv.weight": torch.zeros(1), "bbox_head.atss_cls.bias": torch.zeros(1)}

    def dense(weights):
        kept = {key: value for key, value in weights.items() if first == 0 or not key.startswith("norm0")}
        return {"meta": {"epoch": 12}, "state_dict": {**{f"backbone.{k}": v for k, v in kept.items()}, **head}}

    checkpoint = convert(official("poolformer_v1_feat", "atss.pth", dense), tmp_path / "out")
    assert checkpoint.left_out == list(head)
    assert any("bbox_head.atss_cls.bias" in note for note in checkpoint.notes)
    backbone = PoolFormerBackbone.from_pretrained(tmp_path / "out").eval()
    expected = golden("poolformer_v1_feat")[1]
    with torch.no_grad():
        feature_maps = backbone(expected["input.0"]).feature_maps
    stages = range(first // 2, 4)
    assert len(feature_maps) == len(stages)
    for stage, feature_map in zip(stages, feature_maps, strict=True):
        assert relative_error(feature_map, expected[f"feature_maps.0.{stage}"]) < 1e-5


@pytest.mark.parametrize("safe", [True, False])
def test_folders_of_the_built_in_poolformer(safe, tmp_path, scramble):
    config = built_in_configuration.PoolFormerConfig(
        depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 32, 64], pool_size=5, id2label={0: "cat", 1: "dog", 2: "eel"}
    )
    model = scramble(built_in.PoolFormerForImageClassification(config))
    folder = tmp_path / "built-in"
    model.save_pretrained(folder)
    if not safe:  # as the sail/poolformer_* repositories are
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        old = {"feature_extractor_type": "PoolFormerFeatureExtractor", "crop_pct": 0.95, "size": 224, "resample": 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(old))
    convert(folder, tmp_path / "out")
    ours = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert ours.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixel_values).logits, model(pixel_values).logits)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").crop_pct == (0.9 if safe else 0.95)


def test_our_own_files_without_their_folder(tmp_path, scramble):
    config = MetaFormerConfig(depths=SIZE["depths"], hidden_sizes=SIZE["dims"], token_mixers=["attention"] * 4)
    model = scramble(MetaFormerForImageClassification(config))
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").unlink()
    again = build_model(read_checkpoint(tmp_path / "ours" / "model.safetensors"))
    assert_same(again.state_dict(), model.state_dict())
    assert again.config.norm_layer == "layer_norm"


def test_sharded_folders(tmp_path, scramble):
    model = scramble(PoolFormerForImageClassification(PoolFormerConfig(depths=(1,) * 4, hidden_sizes=(8, 16, 24, 32))))
    model.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert_same(build_model(read_checkpoint(tmp_path / "ours")).state_dict(), model.state_dict())


def test_half_precision_stays(official, tmp_path):
    path = official(change=lambda weights: {key: value.half() for key, value in weights.items()})
    convert(path, tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    convert(tmp_path / "out", tmp_path / "back", to="official")
    assert_same(torch.load(tmp_path / "back" / "poolformer.pth"), torch.load(path))


def test_checkpoints_without_a_classifier(official, tmp_path):
    def headless(weights):
        return {key: value for key, value in weights.items() if not key.startswith("head")}

    convert(official("caformer", change=headless), tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 64)


# Full size --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s12(tmp_path_factory):
    """Random weights of poolformerv2_s12, by timm's own code."""
    torch.manual_seed(0)
    model = timm.create_model("poolformerv2_s12").eval()
    path = tmp_path_factory.mktemp("s12") / "model.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def timm_folder(folder, weights, **config):
    folder.mkdir()
    os.link(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_timm_folder_becomes_a_complete_one_and_back(s12, tmp_path):
    theirs, path = s12
    published = {"tag": "sail_in1k", "input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bilinear"}
    source = timm_folder(tmp_path / "in", path, architecture="poolformerv2_s12", pretrained_cfg=published)
    checkpoint = convert(source, tmp_path / "out", card=folder_card)
    assert checkpoint.variant == "poolformerv2_s12"

    classify = pipeline("image-classification", model=str(tmp_path / "out"))
    assert classify.model.config.id2label[207] == "golden retriever"
    assert classify.image_processor.crop_pct == 0.875
    assert classify.image_processor.resample == 2
    pixel_values = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(pixel_values)
        assert relative_error(classify.model(pixel_values).logits, expected) < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert VARIANTS["poolformerv2_s12"].source in card
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors", ".py", ".md"}

    convert(tmp_path / "out", tmp_path / "back", to="timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    assert len({path.stat().st_mode for out in ("out", "back") for path in (tmp_path / out).iterdir()}) == 1
    assert again.pretrained_cfg["crop_pct"] == 0.875
    assert again.pretrained_cfg["label_names"][207] == "golden retriever"
    with torch.no_grad():
        assert torch.equal(again(pixel_values), expected)


def test_full_size_is_recognised_by_shapes(s12, tmp_path):
    checkpoint = read_checkpoint(s12[1])
    assert checkpoint.variant == "poolformerv2_s12"
    assert checkpoint.processor.crop_pct == 1.0
    convert(s12[1], tmp_path / "official", to="official")
    # Under the official names identityformer_s12 is possible too; its file name tells.
    path = tmp_path / "official" / "poolformerv2_s12.pth"
    assert read_checkpoint(path).variant == "poolformerv2_s12"
    renamed = path.rename(tmp_path / "identityformer_s12.pth")
    assert read_checkpoint(renamed).variant == "identityformer_s12"
    renamed = renamed.rename(tmp_path / "checkpoint.pth")
    with pytest.raises(ConversionError, match=r"may be identityformer or poolformerv2.*--variant"):
        read_checkpoint(renamed)
    assert read_checkpoint(renamed, variant="identityformer").variant == "identityformer_s12"
    with pytest.raises(ConversionError, match=r"--variant poolformerv2_m36 has depths \(6, 6, 18, 6\)"):
        read_checkpoint(renamed, variant="poolformerv2_m36")


def zeros(name, rows=1000, file="model", folder=None):
    """A file of the right shapes for `name`, without the memory: every tensor is one expanded number."""
    config = MetaFormerConfig.from_variant(name, num_labels=rows)
    with torch.device("meta"):
        model = MetaFormerForImageClassification(config)
    path = folder / f"{file}.pth"
    torch.save({key: torch.zeros(()).expand(value.shape) for key, value in model.state_dict().items()}, path)
    return path


def test_trainings_of_one_architecture_are_told_by_name(tmp_path):
    path = zeros("caformer_s18", folder=tmp_path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.variant is None
    assert any("--variant" in note for note in checkpoint.notes)
    assert checkpoint.config.image_size == 224
    checkpoint = read_checkpoint(path, variant="caformer_s18_384")
    assert checkpoint.variant == "caformer_s18_384"
    assert checkpoint.config.image_size == 384
    assert dict(checkpoint.processor.size)["shortest_edge"] == 384
    renamed = path.rename(tmp_path / "caformer_s18_384_in21ft1k.pth")
    checkpoint = read_checkpoint(renamed)
    assert checkpoint.variant == "caformer_s18_384_in21ft1k"
    assert checkpoint.config.id2label[0] == "tench"


def test_imagenet_21k_is_told_by_its_classes(tmp_path):
    checkpoint = read_checkpoint(zeros("convformer_s18", rows=21841, folder=tmp_path))
    assert checkpoint.variant == "convformer_s18_in21k"
    assert checkpoint.config.num_labels == 21841


@pytest.mark.parametrize(
    ("name", "size", "crop_pct"), [("metaformer_ppaa_s12", 224, 0.95), ("randformer_s12", 224, 1.0)]
)
def test_input_size_is_told_by_position_embeddings_and_token_matrices(name, size, crop_pct, tmp_path):
    checkpoint = read_checkpoint(zeros(name, folder=tmp_path))
    assert checkpoint.variant == name
    assert checkpoint.config.image_size == size
    assert checkpoint.processor.crop_pct == crop_pct


# Labels -----------------------------------------------------------------------------------------------------


def test_labels_are_kept_and_counted(official, tmp_path):
    names = [f"kind {index}" for index in range(10)]
    convert(official(), tmp_path / "out", labels=names)
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config
    assert list(config.id2label.values()) == names
    assert config.label2id["kind 7"] == 7
    with pytest.raises(ConversionError, match=r"3 labels were given, but .* has 10 classes"):
        read_checkpoint(official(), labels=names[:3])
    with pytest.raises(ConversionError, match=r"repeated are kind 0"):
        read_checkpoint(official(), labels=["kind 0"] * 10)


# Refusals ---------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_malicious_pickle_is_refused_and_not_run(official, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = official(change=lambda weights: {"state_dict": weights, "meta": Malicious()})
    with pytest.raises(ConversionError, match=r"was refused: .* holds \w+\.system, which could run code"):
        convert(path, tmp_path / "out")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ConversionError, match=r"run"):
        convert(tmp_path / "bare.pth", tmp_path / "out")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_truncated_files_are_refused(suffix, share, official, tmp_path):
    path = tmp_path / f"whole{suffix}"
    weights = golden("poolformer_v1")[0]
    torch.save(weights, path) if suffix == ".pth" else save_file(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConversionError, match=r"truncated|no PyTorch checkpoint"):
        convert(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "page.pth").write_text("<html>Sign in</html>")
    with pytest.raises(ConversionError, match=r"no PyTorch checkpoint"):
        read_checkpoint(tmp_path / "page.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ConversionError, match=r"no state dict but Tensor"):
        read_checkpoint(tmp_path / "tensor.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    with pytest.raises(ConversionError, match=r"no named tensors are epoch"):
        read_checkpoint(tmp_path / "numbers.pth")
    torch.save({0: torch.zeros(3)}, tmp_path / "unnamed.pth")
    with pytest.raises(ConversionError, match=r"no named tensors are 0"):
        read_checkpoint(tmp_path / "unnamed.pth")


def test_foreign_checkpoints_are_refused(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ConversionError, match=r"resnet18.pth is no PoolFormer or MetaFormer checkpoint"):
        read_checkpoint(tmp_path / "resnet18.pth")
    folder = tmp_path / "resnet"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    save_file(golden("poolformer_v1")[0], folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"no weights in this folder"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"network.0.0.gamma": torch.ones(8)}, "not keys of the official.*: network.0.0.gamma"),
        (lambda w: w | {"network.4.1.token_mixer.weight": torch.ones(3)}, "not used: encoder.block.2.1.token_mixer"),
        (
            lambda w: {k: v for k, v in w.items() if k != "network.0.0.mlp.fc2.bias"},
            "missing: .*0.0.output.conv2.bias",
        ),
        (lambda w: {k: v for k, v in w.items() if not k.startswith("network.4.0")}, "of stage 3 these lack: 0"),
        (lambda w: w | {"network.4.999999999.norm1.weight": torch.ones(32)}, "blocks 0 to 999999999 of stage 3"),
        (lambda w: {k: v for k, v in w.items() if not k.startswith("network.6")}, "four stages, here are blocks of 3"),
        (
            lambda w: {k: v for k, v in w.items() if not k.startswith("network.5")},
            "network.4.0.* and network.6.0.* both are our encoder.block.2.0",
        ),
        (lambda w: w | {"norm.weight": torch.ones(63)}, r"of another shape: norm.weight \(63,\) instead of \(64,\)"),
        (lambda w: w | {"norm.weight": torch.full((64,), torch.nan)}, "NaN or infinity in norm.weight"),
        (lambda w: w | {"norm.weight": torch.full((64,), torch.inf)}, "NaN or infinity in norm.weight"),
        (lambda w: w | {"norm.weight": torch.ones(64, dtype=torch.int8)}, "no floating-point numbers: norm.weight"),
        (lambda w: w | {"patch_embed.proj.weight": torch.ones(8, 3, 9, 9)}, r"kernels \[9, 3, 3, 3\]"),
        (lambda w: w | {"head.weight": torch.ones(10, 32)}, "of another shape: classifier.weight"),
    ],
)
def test_every_key_is_used_exactly_once(change, message, official, tmp_path):
    with pytest.raises(ConversionError, match=message):
        convert(official(change=change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pooling_and_identity_are_not_guessed(official):
    path = official("metaformer_id", file="checkpoint.pth")
    with pytest.raises(ConversionError, match=r"may be poolformer or metaformer_id: .*--variant poolformer"):
        read_checkpoint(path)
    assert read_checkpoint(path, variant="metaformer_id").config.token_mixers == ("identity",) * 4
    assert read_checkpoint(path, variant="poolformer").config.model_type == "poolformer"
    assert read_checkpoint(path, overrides={"token_mixers": ["identity"] * 4}).family == "metaformer_id"
    with pytest.raises(ConversionError, match=r"is no caformer: its keys are those of poolformer or metaformer_id"):
        read_checkpoint(path, variant="caformer")
    with pytest.raises(ConversionError, match=r"unknown variant 'poolformer_s13'; near it are .*poolformer_s12"):
        read_checkpoint(path, variant="poolformer_s13")


def test_architectures_of_ones_own(tmp_path, scramble):
    mixers = ["pooling", "depthwise_conv", "attention", "spatial_mlp"]
    config = MetaFormerConfig(
        depths=SIZE["depths"], hidden_sizes=SIZE["dims"], token_mixers=mixers, norm_layer="layer_norm", image_size=96
    )
    model = scramble(MetaFormerForImageClassification(config))
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    with pytest.raises(ConversionError, match=r"the mixers of stages 1 have no weights"):
        read_checkpoint(tmp_path / "mine.safetensors")
    checkpoint = read_checkpoint(tmp_path / "mine.safetensors", overrides={"token_mixers": mixers})
    assert (checkpoint.family, checkpoint.config.image_size) == (None, 96)
    pixel_values = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(build_model(checkpoint)(pixel_values).logits, model(pixel_values).logits)
    with pytest.raises(ConversionError, match=r"timm has no depthwise_conv and no spatial_mlp mixer"):
        write_checkpoint(checkpoint, tmp_path / "timm", to="timm")
    with pytest.raises(ConversionError, match=r"has no field pool_sise"):
        read_checkpoint(tmp_path / "mine.safetensors", overrides={"token_mixers": mixers, "pool_sise": 3})


def test_what_timm_has_no_name_for(official, tmp_path):
    for name, message in [
        ("randformer", "timm has no random mixer"),
        ("metaformer_pppa", "no names for encoder.patch_embeddings.3.position_embeddings"),
        ("poolformer_v1_feat", "no names for hidden_states_norms.stage1.weight"),
    ]:
        with pytest.raises(ConversionError, match=message):
            convert(official(name), tmp_path / "out", to="timm")
        assert not (tmp_path / "out").exists()


def test_missing_files_and_an_unreachable_hub(tmp_path):
    with pytest.raises(ConversionError, match=r"no such file or folder"):
        read_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(ConversionError, match=r"neither a file or folder here nor could it be fetched from the Hub"):
        read_checkpoint("timm/poolformer_s12.sail_in1k")


# Folders ----------------------------------------------------------------------------------------------------


def test_folders_are_not_overwritten_unasked(official, tmp_path):
    out = tmp_path / "out"
    convert(official(), out)
    with pytest.raises(ConversionError, match=r"is not empty; give another folder, or --overwrite"):
        convert(official("caformer"), out)
    assert read_checkpoint(out).family == "poolformer"
    convert(official("caformer"), out, overwrite=True)
    assert read_checkpoint(out).family == "caformer"
    (out / "thesis.tex").write_text("dear")
    with pytest.raises(ConversionError, match=r"is not replaced: thesis.tex"):
        convert(official(), out, overwrite=True)
    assert (out / "thesis.tex").exists()
    with pytest.raises(ConversionError, match=r"is a file"):
        convert(official(), out / "thesis.tex")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_nothing_half_written_is_left(official, tmp_path):
    out = tmp_path / "out"
    convert(official(), out)

    def card(folder, name):
        raise OSError("disk full")

    with pytest.raises(ConversionError, match=r"cannot write to .*disk full"):
        convert(official("caformer"), out, overwrite=True, card=card)
    assert read_checkpoint(out).family == "poolformer"
    with pytest.raises(ConversionError, match=r"disk full"):
        convert(official("caformer"), tmp_path / "new", card=card)
    assert {path.suffix for path in tmp_path.iterdir()} == {".pth", ""}
    assert not (tmp_path / "new").exists()


# The script -------------------------------------------------------------------------------------------------


def run_script(*arguments):
    command = [warm_python(), str(ROOT / "scripts" / "convert.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_script_end_to_end(official, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"kind {index}" for index in range(10)))
    path = official("poolformer_v1_noscale_pool5", "poolformer.pth.tar")
    done = run_script(path, tmp_path / "out", "--labels", labels, "--set", "pool_size=5")
    assert done.returncode == 0, done.stderr
    assert "poolformer.pth.tar: official (first paper) format, poolformer, 79346 numbers" in done.stdout
    expected = golden("poolformer_v1_noscale_pool5")[1]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label[9] == "kind 9"
    with torch.no_grad():
        assert relative_error(model(expected["input.0"]).logits, expected["logits.0"]) < 1e-5


def test_script_refuses_in_one_line(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    done = run_script(tmp_path / "resnet18.pth", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: resnet18.pth is no PoolFormer")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
