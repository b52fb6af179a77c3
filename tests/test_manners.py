"""What users of transformers do with any model: load it as another class, choose the attention, ask for tuples, save
a class of their own, misspell a field."""

import json
import logging
import re
from unittest import mock

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch.nn import functional as F

import hf_poolformer
from hf_poolformer import MetaFormerConfig, PoolFormerConfig


SMALL = {
    "depths": (1, 1, 1, 1),
    "hidden_sizes": (8, 16, 24, 32),
    "num_labels": 3,
    "fpn_feature_size": 8,
    "decoder_hidden_size": 8,
    "box_head_hidden_size": 16,
    "rpn_num_proposals": 20,
    "max_detections": 5,
}
MIXED = {"token_mixers": ("pooling", "pooling", "attention", "attention"), "attention_head_dim": 8}
KINDS = (
    "Model",
    "ForImageClassification",
    "Backbone",
    "ForSemanticSegmentation",
    "ForObjectDetection",
    "ForInstanceSegmentation",
)
TYPES = ("PoolFormer", "MetaFormer")


def model_class(model_type: str, kind: str = "ForImageClassification"):
    return getattr(hf_poolformer, model_type + kind)


def build(model_type: str, kind: str = "ForImageClassification", **fields):
    chosen = model_class(model_type, kind)
    return chosen(chosen.config_class(**{**SMALL, **fields})).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A classifier's folder of each kind."""
    torch.manual_seed(0)
    built_in = transformers.ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8)
    models = {
        "PoolFormer": build("PoolFormer"),
        "MetaFormer": build("MetaFormer", image_size=64),
        "attention": build("MetaFormer", **MIXED),
        "resnet": transformers.ResNetForImageClassification(built_in),
    }
    places = {}
    for name, model in models.items():
        places[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(places[name])
    return places


# Of the other model type


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("saved", "loaded"), [TYPES, TYPES[::-1]])
def test_weights_of_the_other_type_are_loaded(saved, loaded, kind, folders):
    model = model_class(loaded, kind).from_pretrained(folders[saved])
    assert model.config.model_type == loaded.lower()
    wanted = load_file(folders[saved] / "model.safetensors")
    encoder = {name: value for name, value in model.state_dict().items() if "encoder." in name}
    assert len(encoder) == sum("encoder." in name for name in wanted)
    for name, value in encoder.items():
        assert torch.equal(value, wanted[f"{saved.lower()}.{name[name.index('encoder.') :]}"])


@pytest.mark.parametrize(("saved", "loaded"), [TYPES, TYPES[::-1]])
def test_it_is_saved_as_what_it_is_now(saved, loaded, folders, tmp_path):
    pixel_values = torch.randn(2, 3, 64, 64)
    model = model_class(loaded).from_pretrained(folders[saved])
    model.save_pretrained(tmp_path)
    assert {name.split(".")[0] for name in load_file(tmp_path / "model.safetensors")} >= {loaded.lower()}
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is model_class(loaded)
    wanted = model_class(saved).from_pretrained(folders[saved])(pixel_values).logits
    for got in (model(pixel_values).logits, again(pixel_values).logits):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # of float32 in another order


@pytest.mark.parametrize("given", ["own", "other", "built-in", "path"])
def test_a_given_configuration_is_taken_as_the_class_s_own(given, folders):
    folder = folders["PoolFormer"]
    config = {
        "own": lambda: MetaFormerConfig(**SMALL),
        "other": lambda: PoolFormerConfig(**SMALL),
        "built-in": lambda: transformers.models.poolformer.PoolFormerConfig.from_pretrained(folder),
        "path": lambda: folder,
    }[given]()
    model, info = model_class("MetaFormer").from_pretrained(folder, config=config, output_loading_info=True)
    assert type(model.config) is MetaFormerConfig
    assert not info["missing_keys"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_poolformer_is_refused(kind, folders):
    with pytest.raises(ValueError, match=r"no PoolFormer v1: its token_mixers"):
        model_class("PoolFormer", kind).from_pretrained(folders["attention"])
    with pytest.raises(ValueError, match="no PoolFormer v1"):
        model_class("PoolFormer", kind).from_pretrained(folders["attention"], config=PoolFormerConfig(**SMALL))


@pytest.mark.parametrize("model_type", TYPES)
def test_another_architecture_is_refused(model_type, folders):
    with pytest.raises(ValueError, match=rf"{re.escape(str(folders['resnet']))}: .*a resnet, not of a"):
        model_class(model_type).from_pretrained(folders["resnet"])


@pytest.mark.parametrize("model_type", TYPES)
def test_weights_without_one_that_fits_are_refused(model_type):
    chosen, state_dict = model_class(model_type), {"stem.conv.weight": torch.zeros(8, 3, 7, 7)}
    with pytest.raises(ValueError, match="all would be random"):
        chosen.from_pretrained(None, config=chosen.config_class(**SMALL), state_dict=state_dict)


def test_widths_of_which_none_fits_are_refused(folders):
    with pytest.raises(ValueError, match="shapes are not those"):
        model_class("PoolFormer").from_pretrained(
            folders["PoolFormer"], hidden_sizes=(4, 6, 10, 12), ignore_mismatched_sizes=True
        )


def test_a_new_head_is_no_reason_to_refuse(folders):
    _, info = model_class("MetaFormer").from_pretrained(
        folders["PoolFormer"], num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(("built", "given"), [TYPES, TYPES[::-1]])
def test_a_model_is_built_from_its_own_configuration(built, given):
    with pytest.raises(TypeError, match=f"{built}Config.from_dict"):
        model_class(built)(model_class(given).config_class(**SMALL))


# Attention


def calls_of_sdpa(model: torch.nn.Module) -> tuple[int, torch.Tensor]:
    real = F.scaled_dot_product_attention
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", side_effect=real) as spy:
        logits = model(torch.ones(1, 3, 64, 64).cumsum(-1) / 64).logits
    return spy.call_count, logits


@pytest.mark.parametrize("kind", ["ForImageClassification", "ForSemanticSegmentation"])
@pytest.mark.parametrize("when", ["config", "loading", "later"])
def test_attention_is_computed_as_asked(kind, when, tmp_path):
    model = build("MetaFormer", kind, **MIXED)
    assert model.config._attn_implementation == "sdpa"
    number, wanted = calls_of_sdpa(model)
    assert number == 2
    if when == "config":
        config = MetaFormerConfig(**SMALL, **MIXED, attn_implementation="eager")
        eager = type(model)(config).eval()
        eager.load_state_dict(model.state_dict())
    elif when == "loading":
        model.save_pretrained(tmp_path)
        eager = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    else:
        eager = model
        eager.set_attn_implementation("eager")
    number, got = calls_of_sdpa(eager)
    assert number == 0
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)  # of float32 in another order
    eager.set_attn_implementation("sdpa")
    assert calls_of_sdpa(eager)[0] == 2


def test_attention_of_the_user_s_own_is_used():
    def uniform(module, query, key, value, attention_mask, **kwargs):
        return value.mean(2, keepdim=True).expand_as(value).transpose(1, 2), None

    transformers.AttentionInterface.register("uniform", uniform)
    model = build("MetaFormer", **MIXED)
    pixel_values, wanted = torch.randn(1, 3, 64, 64), []
    model.base_model.encoder.block[2][0].token_mixer.proj.register_forward_pre_hook(lambda _, x: wanted.append(x[0]))
    model.set_attn_implementation("uniform")
    model(pixel_values)
    torch.testing.assert_close(wanted[0], wanted[0].mean(1, keepdim=True).expand_as(wanted[0]))


def test_eager_attention_gives_its_weights():
    model = build("MetaFormer", **MIXED, attn_implementation="eager")
    attentions = model(torch.randn(2, 3, 64, 64), output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 3, 16, 16), (2, 4, 4, 4)]
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert model(torch.randn(2, 3, 64, 64)).attentions is None


def test_poolformer_has_no_attention_to_choose():
    # As transformers' own PoolFormer and ConvNext.
    with pytest.raises(ValueError, match="does not support"):
        build("PoolFormer", attn_implementation="sdpa")


# Tuples


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", TYPES)
def test_tuples_by_configuration(model_type, kind):
    model = build(model_type, kind, return_dict=False)
    pixel_values = torch.randn(1, 3, 64, 64)
    for more in ({}, {"output_hidden_states": True}):
        torch.manual_seed(0)
        got = model(pixel_values, **more)
        assert isinstance(got, tuple)
        named = model(pixel_values, return_dict=True, **more)
        assert [type(value) for value in got] == [type(value) for value in named.to_tuple()]
        first = got[0][0] if isinstance(got[0], tuple) else got[0]
        wanted = named.to_tuple()[0]
        torch.testing.assert_close(first, wanted[0] if isinstance(wanted, tuple) else wanted)


LABELS = {
    "ForImageClassification": torch.tensor([1, 2]),
    "ForSemanticSegmentation": torch.ones(2, 64, 64, dtype=torch.long),
    "ForObjectDetection": [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]])}] * 2,
}


@pytest.mark.parametrize("kind", LABELS)
def test_the_loss_comes_first(kind):
    model = build("PoolFormer", kind, return_dict=False)
    pixel_values = torch.randn(2, 3, 64, 64)
    loss = model(pixel_values, labels=LABELS[kind], output_hidden_states=True)[0]
    assert loss.shape == ()
    torch.testing.assert_close(loss, model(pixel_values, labels=LABELS[kind], return_dict=True).loss)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_traced_with_tuples(kind, tmp_path):
    build("MetaFormer", kind, **MIXED).save_pretrained(tmp_path)
    model = model_class("MetaFormer", kind).from_pretrained(tmp_path, return_dict=False)
    traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64))
    pixel_values = torch.randn(1, 3, 64, 64)
    got, wanted = traced(pixel_values)[0], model(pixel_values)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)  # of float32 in another order


# Code beside a model


class InMain(hf_poolformer.PoolFormerForImageClassification):
    __module__ = "__main__"


class Unregistered(hf_poolformer.PoolFormerForSemanticSegmentation):
    pass


class OwnConfig(PoolFormerConfig):
    model_type = "own"


class WithOwnConfig(hf_poolformer.PoolFormerForImageClassification):
    config_class = OwnConfig


def code_named(folder) -> set[str]:
    auto_map = json.loads((folder / "config.json").read_text()).get("auto_map", {})
    return {f"{place.split('.')[0]}.py" for place in auto_map.values()}


def code_there(folder) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


@pytest.mark.parametrize("subclass", [InMain, Unregistered, WithOwnConfig])
def test_a_subclass_names_only_code_that_is_there(subclass, tmp_path):
    subclass(subclass.config_class(**SMALL)).save_pretrained(tmp_path)
    assert code_named(tmp_path) <= code_there(tmp_path)
    assert "test_manners.py" not in code_there(tmp_path)  # nobody said that it may be published


def test_a_registered_subclass_is_saved_with_its_code(tmp_path, monkeypatch):
    source = "import hf_poolformer\nclass Mine(hf_poolformer.MetaFormerForImageClassification):\n    pass\n"
    (tmp_path / "users_own.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import users_own

    users_own.Mine.register_for_auto_class("AutoModelForImageClassification")
    users_own.Mine(MetaFormerConfig(**SMALL)).save_pretrained(tmp_path / "saved")
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageClassification"] == "users_own.Mine"
    assert code_named(tmp_path / "saved") <= code_there(tmp_path / "saved")


@pytest.mark.parametrize("what", ["model", "configuration"])
@pytest.mark.parametrize("whose", ["ours", "built-in"])
def test_saved_again_by_whomever(whose, what, folders, tmp_path):
    library = hf_poolformer if whose == "ours" else transformers.models.poolformer
    name = "PoolFormerForImageClassification" if what == "model" else "PoolFormerConfig"
    getattr(library, name).from_pretrained(folders["PoolFormer"]).save_pretrained(tmp_path)
    assert code_named(tmp_path) == (code_there(tmp_path) if what == "configuration" else code_named(tmp_path))
    assert code_named(tmp_path) <= code_there(tmp_path)
    # As complete as before where there is code.
    assert (what == "configuration" or whose == "built-in") or code_named(tmp_path) == code_named(
        folders["PoolFormer"]
    )


# Labels


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"problem_type": "regression", "num_labels": 1}, torch.zeros(1)),
        ({"problem_type": "regression", "num_labels": 1}, torch.zeros(2, 2)),
        ({"num_labels": 1}, torch.zeros(3)),
        ({"problem_type": "regression"}, torch.zeros(3)),
        ({"problem_type": "regression"}, torch.zeros(2, 1)),
        ({"problem_type": "multi_label_classification"}, torch.zeros(2)),
        ({}, torch.tensor([1])),
        ({}, torch.tensor(1)),
        ({}, torch.zeros(2, 4)),
    ],
)
def test_labels_of_another_shape_are_refused(fields, labels):
    with pytest.raises(ValueError, match="labels must have shape"):
        build("PoolFormer", **fields)(torch.zeros(2, 3, 32, 32), labels=labels)


# Fields

NAN = float("nan")
NONSENSE = {
    "depths": [(0, 1, 1, 1), (-1, 1, 1, 1), (1.5, 1, 1, 1), 3],
    "hidden_sizes": [(0, 8, 8, 8)],
    "patch_sizes": [(0, 3, 3, 3)],
    "strides": [(0, 2, 2, 2)],
    "padding": [(-1, 1, 1, 1)],
    "num_channels": [0, True],
    "num_encoder_blocks": [0, 5],
    "image_size": [0, (224,), (224, 224, 3), [0, 5], []],
    "pool_size": [0, 2, True],
    "attention_head_dim": [0],
    "mlp_ratio": [0, -1.0, NAN, 1e-4],
    "norm_eps": [0.0, NAN],
    "norm_layer": ["layernorm"],
    "embedding_norm": ["rms"],
    "head_type": ["lineer"],
    "drop_path_rate": [-0.1, 1, NAN],
    "initializer_range": [-0.1, NAN],
    "layer_scale_init_value": [NAN],
    "res_scale_init_values": [(NAN, None, None, None), (None,)],
    "position_embeddings": [True, (1, 0, 0, 0)],
    "out_features": [["stage9"]],
    "id2label": [{0: "a", 2: "b"}, {1: "a"}, {"a": "b"}, ["a"]],
    "num_labels": [-1, "5", True, 10**9],
    "problem_type": ["clasification"],
    "kernels": ["fast"],
    "fpn_feature_size": [0],
    "anchor_ratios": [(), (0.0,)],
    "rpn_negative_iou": [0.9],
    "focal_alpha": [2.0],
    "classifier_dropout_prob": [1.0],
    "mask_head_num_convs": [-1],
}
CASES = [(field, value) for field, values in NONSENSE.items() for value in values]


@pytest.mark.parametrize(("field", "value"), CASES)
@pytest.mark.parametrize("way", ["constructor", "file", "override"])
def test_nonsense_is_refused_with_the_name_of_the_field(way, field, value, tmp_path):
    errors = pytest.raises((ValueError, StrictDataclassError), match=field)
    if way == "constructor":
        with errors:
            MetaFormerConfig(**{field: value})
        return
    values = {"model_type": "metaformer"} | ({field: value} if way == "file" else {})
    (tmp_path / "config.json").write_text(json.dumps(values))
    with errors:
        MetaFormerConfig.from_pretrained(tmp_path, **({field: value} if way == "override" else {}))


def test_a_field_set_later_is_refused_by_the_model():
    config = PoolFormerConfig(**SMALL)
    config.pool_size = 4
    with pytest.raises((ValueError, StrictDataclassError), match="pool_size"):
        model_class("PoolFormer")(config)


def test_names_and_number_of_classes_agree(folders):
    with pytest.raises(ValueError, match="num_labels=5, but id2label names 2"):
        PoolFormerConfig(num_labels=5, id2label={0: "a", 1: "b"})
    # Of a checkpoint, the names go with another number, as in transformers.
    assert PoolFormerConfig.from_pretrained(folders["PoolFormer"], num_labels=5).num_labels == 5
    config = PoolFormerConfig.from_pretrained(folders["PoolFormer"], id2label={"0": "cat", "1": "dog"})
    assert (config.id2label, config.label2id) == ({0: "cat", 1: "dog"}, {"cat": 0, "dog": 1})


@pytest.fixture
def warnings():
    """What the package's configuration file says; transformers' loggers do not propagate."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("hf_poolformer.configuration_poolformer")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


@pytest.mark.parametrize("way", ["constructor", "override"])
@pytest.mark.parametrize(
    ("name", "meant"),
    [("depht", "depths"), ("hidden_size", "hidden_sizes"), ("poolsize", "pool_size"), ("num_label", "num_labels")],
)
def test_a_misspelt_field_is_told(way, name, meant, folders, warnings):
    if way == "constructor":
        assert getattr(PoolFormerConfig(**{name: 3}), name) == 3
    else:
        PoolFormerConfig.from_pretrained(folders["PoolFormer"], **{name: 3})
    assert any(f"{name!r}" in text and f"Did you mean {meant!r}" in text for text in warnings)


@pytest.mark.parametrize("config_class", [PoolFormerConfig, MetaFormerConfig])
def test_keys_of_old_checkpoints_are_no_misspellings(config_class, tmp_path, warnings):
    stray = {"layer_norm_eps": 1e-6, "drop_rate": 0.0, "qkv_bias": True, "image_size": "224", "norm_eps": 3.0}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "poolformer", **stray}))
    config = config_class.from_pretrained(tmp_path)
    assert (config.norm_eps, config.layer_norm_eps) == (1e-5, 1e-6)
    assert not [text for text in warnings if "Did you mean" in text]
