"""Checkpoints as trainers wrap them; what a file tells beside its weights; and what the converter has to assume."""

import argparse
import itertools
import json
import re

import numpy as np
import pytest
import torch
from golden_models import golden, relative_error
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

import hf_poolformer_cli
from hf_poolformer import PoolFormerBackbone, PoolFormerConfig, PoolFormerForImageClassification, PoolFormerModel
from hf_poolformer.conversion.convert import ConversionError, build_model, read_checkpoint, write_checkpoint
from hf_poolformer.hub.cards import folder_card


FAMILIES = ["poolformer_v1", "metaformer_ppaa", "randformer", "caformer"]


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def zeros(weights):
    return {key: torch.zeros_like(value) for key, value in weights.items()}


@pytest.fixture
def read(tmp_path):
    """Saves `content` and reads it again."""

    def read(content, file="poolformer.pth", **options):
        torch.save(content, tmp_path / file)
        return read_checkpoint(tmp_path / file, **options)

    return read


def assert_is(checkpoint, name):
    """The model computes what the golden one of that name does."""
    _, expected = golden(name)
    with torch.no_grad():
        logits = build_model(checkpoint)(expected["input.0"]).logits
    assert relative_error(logits, expected["logits.0"]) < 1e-5  # of float32, as in test_conversion.py


def file_of(name):
    return f"{name.removesuffix('_v1')}.pth"


# Wrappers ---------------------------------------------------------------------------------------------------

PREFIXES = ["module.", "_orig_mod.", "model.", "_fsdp_wrapped_module.", "net.", "encoder.", "backbone."]


@pytest.mark.parametrize("name", FAMILIES)
def test_prefixes_in_any_order(name, tmp_path):
    """Two of each, in both orders, give the very tensors; one file per family runs, too."""
    weights, _ = golden(name)
    path = tmp_path / file_of(name)
    torch.save(weights, path)
    plain = read_checkpoint(path).tensors
    for pair in [*itertools.permutations(PREFIXES, 2), ("student.module._orig_mod.", "_checkpoint_wrapped_module.")]:
        torch.save({"state_dict": prefixed("".join(pair), weights)}, path)
        checkpoint = read_checkpoint(path)
        assert checkpoint.tensors.keys() == plain.keys(), pair
        assert all(torch.equal(value, plain[key]) for key, value in checkpoint.tensors.items()), pair
    assert_is(checkpoint, name)


WRAPS = {
    "SWA": lambda w: {"n_averaged": torch.tensor(3), **prefixed("module.", w)},
    "SWA of a compiled model": lambda w: {
        "state_dict": {"n_averaged": torch.tensor(3), **prefixed("module._orig_mod.", w)},
        "epoch": 7,
    },
    "timm, EMA off": lambda w: {"epoch": 3, "state_dict": w, "state_dict_ema": None},
    "EMA that is empty": lambda w: {"model": w, "model_ema": {}},
    "EMA": lambda w: {"state_dict": zeros(w), "state_dict_ema": w, "optimizer": {"state": {0: {"step": 1}}}},
    "EMA with a counter": lambda w: {"model": zeros(w), "ema": {"module": prefixed("module.", w), "decay": 0.99}},
    "EMA without names": lambda w: {"model": w, "ema": {"decay": 0.9, "shadow_params": [*zeros(w).values()]}},
    "Lightning": lambda w: {
        "state_dict": prefixed("model.", w) | {"criterion.weight": torch.ones(3), "train_metric.total": torch.ones(1)},
        "hyper_parameters": {"lr": 1e-3},
        "pytorch-lightning_version": "2.5.0",
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0)}},
    },
    "Lightning, EMA as a part": lambda w: {
        "state_dict": {
            **prefixed("model._orig_mod.", zeros(w)),
            **prefixed("ema_model.module.", w),
            "ema_model.n_averaged": torch.tensor(9),
        }
    },
    "Lightning, EMA as a callback": lambda w: {
        "state_dict": prefixed("model.", zeros(w)),
        "callbacks": {"EMACallback": {"ema_state_dict": prefixed("model.", w)}},
    },
    "Lightning, WeightAveraging": lambda w: {
        "state_dict": prefixed("net.", w),
        "current_model_state": prefixed("net.", zeros(w)),
        "averaging_state": {"n_averaged": torch.tensor(2)},
    },
    # mmengine saves the averaged weights as state_dict, and the others under the name of the averaged.
    "mmengine": lambda w: {
        "meta": {"mmengine_version": "0.10.4"},
        "state_dict": w,
        "ema_state_dict": {"steps": torch.tensor(4), **prefixed("module.", zeros(w))},
    },
    "mmcv": lambda w: {"state_dict": {**w, **{f"ema_{k.replace('.', '_')}": v for k, v in zeros(w).items()}}},
    "FLOP counts": lambda w: {**w, "total_ops": torch.ones(1), "norm.total_params": torch.ones(1)},
    "blocks compiled alone": lambda w: {k.replace(".0.norm1", ".0._orig_mod.norm1"): v for k, v in w.items()},
    "numbers of NumPy": lambda w: {"state_dict": w, "metric": np.float64(77.2), "epoch": np.int64(3)},
}  # fmt: skip
SAID = {
    "SWA": "left out, as no part of the model: n_averaged",
    "SWA of a compiled model": "n_averaged",
    "timm, EMA off": "state_dict_ema in .* is empty, and was not used",
    "EMA that is empty": "model_ema in .* is empty",
    "EMA": r"several sets of weights \(state_dict, state_dict_ema\); state_dict_ema was taken.*--weights state_dict ",
    "EMA with a counter": "ema.module was taken, which is averaged",
    "EMA without names": "ema in .* holds no weights under names of a MetaFormer, and was not used",
    "Lightning": "left out, .*: criterion.weight, train_metric.total",
    "Lightning, EMA as a part": "state_dict.ema_model was taken",
    "Lightning, EMA as a callback": "callbacks.EMACallback.ema_state_dict.model was taken",
    "Lightning, WeightAveraging": "state_dict.net was taken",
    "mmengine": "; state_dict was taken, which is averaged",
    "mmcv": "left out, .*: ema_.*more",
    "FLOP counts": "left out, .*: total_ops, norm.total_params",
}


@pytest.mark.parametrize("name", ["poolformer_v1", "caformer"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_wrappers(wrap, name, read):
    checkpoint = read(WRAPS[wrap](golden(name)[0]), file_of(name))
    assert_is(checkpoint, name)
    if wrap in SAID:
        assert_said(SAID[wrap], checkpoint)


def assert_said(pattern, checkpoint):
    assert any(re.search(pattern, note) for note in checkpoint.notes), checkpoint.notes


@pytest.mark.parametrize(
    ("content", "weights"),
    [
        (lambda w: {"state_dict": w, "state_dict_ema": zeros(w)}, "state_dict"),
        (lambda w: {"state_dict": zeros(w), "ema": {"module": w}}, "ema.module"),
        (lambda w: {"state_dict": {**prefixed("student.", w), **prefixed("teacher.", zeros(w))}}, "student"),
        (lambda w: {"generator": zeros(w), "discriminator": w}, "discriminator"),
    ],
)
def test_a_set_of_weights_can_be_asked_for(content, weights, read):
    content = content(golden("caformer")[0])
    checkpoint = read(content, "caformer.pth", weights=weights)
    assert_is(checkpoint, "caformer")
    assert_said(f"{weights} was taken, as asked", checkpoint)
    with pytest.raises(ConversionError, match=r"holds no weights 'swa', or several; it holds \w+"):
        read(content, "caformer.pth", weights="swa")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda w: {**prefixed("student.", w), **prefixed("teacher.", w)}, "sets of weights: student, teacher; say"),
        (lambda w: {"ema": w, "swa": w}, "several sets of weights: ema, swa; say which.*--weights ema"),
        (lambda w: {**w, **prefixed("module.", w)}, "two tensors for head"),
        (lambda w: prefixed("model.", w | {"cls_token": torch.ones(1, 1, 8)}), "not keys of the official.*cls_token"),
        (lambda w: {"model": torch.nn.Linear(2, 2)}, r"holds torch.nn.modules.linear.Linear.*model.state_dict\(\)"),
        (lambda w: {"shadow_params": [*w.values()]}, "no named tensors are shadow_params"),
    ],
)
def test_what_is_not_clear_is_refused(content, message, read):
    with pytest.raises(ConversionError, match=message):
        read(content(golden("poolformer_v1")[0]))


def test_the_command_takes_a_set_of_weights(tmp_path, capsys):
    weights, _ = golden("caformer")
    torch.save({"state_dict": weights, "state_dict_ema": zeros(weights)}, tmp_path / "caformer.pth")
    words = ["convert", tmp_path / "caformer.pth", tmp_path / "out", "--weights", "state_dict"]
    assert hf_poolformer_cli.main([*map(str, words)]) == 0
    out = capsys.readouterr().out
    assert "note: of the weights in caformer.pth state_dict was taken" in out
    assert "note: assumed, since weights do not tell: attention_head_dim=32" in out
    assert read_checkpoint(tmp_path / "out").tensors["norm.weight"].abs().sum() > 0


@pytest.mark.parametrize("model_class", [PoolFormerForImageClassification, PoolFormerModel, PoolFormerBackbone])
@pytest.mark.parametrize(
    "wrap",
    [
        AveragedModel,
        torch.nn.DataParallel,
        lambda model: torch.compile(AveragedModel(torch.compile(model))),
        lambda model: torch.nn.ModuleDict({"net": torch.nn.ModuleDict({"encoder": AveragedModel(model)})}),
    ],
)
def test_wrapped_models_of_ours(wrap, model_class, read, scramble):
    model = scramble(model_class(PoolFormerConfig(depths=(1,) * 4, hidden_sizes=(8, 16, 24, 32), num_labels=4)))
    again = build_model(read(wrap(model).state_dict()))
    assert type(again) is model_class
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


# Assumptions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "assumed", "sure"),
    [
        ("poolformer_v1", ["pool_size=3", "norm_layer=group_norm", "hidden_act=gelu"], ["attention_head", "mixers"]),
        ("poolformer_v1_feat", ["pool_size=3", "use_residual=true"], ["head_norm_first", "attention"]),
        ("metaformer_pppa", ["attention_head_dim=32", "norm_layer=layer_norm", "pool_size=3"], ["mixers"]),
        ("metaformer_id", ["norm_layer=group_norm"], ["pool_size", "attention"]),
        (
            "caformer",
            ["attention_head_dim=32", "head_norm_first=false", "norm_eps=1e-06"],
            ["pool_size", "hidden_act"],
        ),
        ("poolformerv2", ["pool_size=3"], ["hidden_act", "token_mixers"]),
    ],
)
def test_what_weights_do_not_tell_is_said(name, assumed, sure, read, tmp_path):
    checkpoint = read(golden(name)[0], file_of(name))
    (note,) = [note for note in checkpoint.notes if note.startswith("assumed, since weights do not tell")]
    assert all(fact in note for fact in assumed)
    assert not any(fact in note for fact in sure)
    assert len(note) < 250
    write_checkpoint(checkpoint, tmp_path / "out", card=folder_card)
    card = (tmp_path / "out" / "README.md").read_text().replace("\\_", "_")
    assert all(fact in card for fact in assumed)
    # Said once and for all: now the configuration says it.
    assert not any("weights do not tell" in note for note in read_checkpoint(tmp_path / "out").notes)


def test_what_is_given_is_not_assumed(read):
    given = {"pool_size": 5, "norm_layer": "group_norm", "hidden_act": "gelu", "norm_eps": 1e-5}
    given |= {"head_norm_first": True, "use_residual": True}
    checkpoint = read(golden("poolformer_v1")[0], overrides=given)
    assert not any("weights do not tell" in note for note in checkpoint.notes)
    assert checkpoint.config.pool_size == 5


def test_mixers_that_only_their_format_tells_are_said(read):
    (note,) = [n for n in read(golden("metaformer_pppa")[0], "best.pth").notes if "weights do not tell" in n]
    assert 'token_mixers=["pooling", "pooling", "pooling", "attention"]' in note


def test_weights_unlike_those_of_their_family_are_said(read):
    checkpoint = read(golden("poolformer_v1_noscale_pool5")[0])
    assert_said("unlike those of the published poolformer: use_layer_scale=false", checkpoint)
    assert_said("pool_size=3", checkpoint)
    wide = golden("poolformer_v1")[0] | {"patch_embed.proj.weight": torch.ones(8, 5, 7, 7)}
    assert_said("num_channels=5", read(wide))
    assert_said("3 colours, though the model takes 5 channels", read(wide))


def test_labels_that_are_guessed_are_said(read):
    weights = golden("poolformer_v1")[0] | {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}
    assert_said("its 1000 classes were taken for those of ImageNet-1K", read(weights))
    names = [str(index) for index in range(1000)]
    assert not any("ImageNet-1K" in note for note in read(weights, labels=names).notes)


@pytest.mark.parametrize(
    ("content", "file", "fields"),
    [
        (lambda w: w, "poolformer_s12_pool5.pth", {"pool_size": 5}),
        (lambda w: w, "poolformer-relu.pth", {"hidden_act": "relu"}),
        (lambda w: w, "poolformer_layer_norm_pool7.pth", {"norm_layer": "layer_norm", "pool_size": 7}),
        (lambda w: w, "poolformer_no_residual.pth", {"use_residual": False}),
        (lambda w: {"state_dict": w, "args": argparse.Namespace(model="poolformer_pool9")}, "x.pth", {"pool_size": 9}),
        (lambda w: {"state_dict": w, "arch": "poolformer", "model_kwargs": {"pool_size": 5}}, "x", {"pool_size": 5}),
        (
            lambda w: {"state_dict": prefixed("net.", w), "hyper_parameters": {"model": {"pool_size": 7}}},
            "poolformer.ckpt",
            {"pool_size": 7},
        ),
        (
            lambda w: {"state_dict": w, "meta": {"cfg": "model = dict(type='poolformer_s12', pool_size=5)"}},
            "epoch_9.pth",
            {"pool_size": 5},
        ),
    ],
)
def test_what_is_written_beside_the_weights_is_used_and_said(content, file, fields, read):
    checkpoint = read(content(golden("poolformer_v1_noscale_pool5")[0]), file)
    assert checkpoint.family == "poolformer"
    assert {key: getattr(checkpoint.config, key) for key in fields} == fields
    for key, value in fields.items():
        assert_said(f"is written beside the weights: .*{key}={json.dumps(value).strip(chr(34))}", checkpoint)


def test_its_name_makes_pool_size_5_right(read):
    assert_is(read(golden("poolformer_v1_noscale_pool5")[0], "poolformer_pool5.pth"), "poolformer_v1_noscale_pool5")


def test_sizes_of_a_training_by_timm_are_used(read):
    args = argparse.Namespace(model="caformer_s18", img_size=192, crop_pct=0.8, mean=[0.5] * 3, std=[0.5] * 3)
    args.interpolation = "bilinear"
    checkpoint = read({"state_dict": golden("caformer")[0], "args": args})
    processor = checkpoint.processor
    assert (dict(processor.size)["shortest_edge"], processor.crop_pct, processor.resample) == (192, 0.8, 2)
    assert list(processor.image_mean) == [0.5] * 3
    assert not any("assumed of its images" in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    ("content", "file", "message"),
    [
        (lambda: golden("caformer")[0], "poolformer_s12.pth", "file name says poolformer_s12, .* those of caformer"),
        (lambda: golden("poolformer_v1")[0], "poolformer_s24.pth", r"says poolformer_s24, .* depths \[1, 1, 2, 1\]"),
        (
            lambda: {"state_dict": golden("caformer")[0], "arch": "randformer_s12"},
            "x.pth",
            "arch says randformer_s12, but its weights are those of caformer",
        ),
        (
            lambda: golden("poolformerv2")[0],
            "poolformerv2_gelu.pth",
            "says hidden_act=gelu, .* say hidden_act=star_relu",
        ),
        (
            lambda: {"state_dict": golden("poolformer_v1")[0], "args": {"hidden_act": "mish", "pool_size": "5"}},
            "poolformer.pth",
            "hidden_act=mish is written beside the weights, and was not understood",
        ),
    ],
)
def test_names_that_contradict_the_weights_are_said(content, file, message, read):
    assert_said(message, read(content(), file))


@pytest.mark.parametrize(
    ("content", "file", "message"),
    [
        (
            lambda w: {"state_dict": w, "arch": "metaformer_id_s12"},
            "poolformer.pth",
            "arch says metaformer_id but its",
        ),
        (
            lambda w: {"state_dict": w, "args": {"pool_size": 7}},
            "poolformer_pool5.pth",
            "pool_size=7 but its file name",
        ),
    ],
)
def test_statements_that_contradict_each_other_are_refused(content, file, message, read):
    with pytest.raises(ConversionError, match=message):
        read(content(golden("poolformer_v1")[0]), file)
    # What is asked for settles it.
    settled = read(content(golden("poolformer_v1")[0]), file, variant="poolformer", overrides={"pool_size": 9})
    assert settled.config.pool_size == 9


def test_nothing_of_a_file_gets_into_the_card_as_markup(tmp_path):
    weights, _ = golden("caformer")
    save_file(
        prefixed("net.", weights) | {"<img src=x>\n# Title [x](y)": torch.ones(1)}, tmp_path / "caformer.safetensors"
    )
    checkpoint = read_checkpoint(tmp_path / "caformer.safetensors")
    assert len(checkpoint.left_out) == 1
    write_checkpoint(checkpoint, tmp_path / "out", card=folder_card)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<img" not in card and "\n# Title" not in card and "[x](y)" not in card
