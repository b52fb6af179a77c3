import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers.models.poolformer.configuration_poolformer import PoolFormerConfig as BuiltInConfig

from hf_poolformer import VARIANTS, MetaFormerConfig, PoolFormerConfig
from hf_poolformer.configuration_poolformer import DenseHeadConfig


def test_json_has_exactly_the_built_in_keys(tmp_path):
    PoolFormerConfig(num_labels=7).save_pretrained(tmp_path / "ours")
    BuiltInConfig(num_labels=7).save_pretrained(tmp_path / "built-in")
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "built-in"))
    assert ours.pop("auto_map") == {"AutoConfig": "configuration_poolformer.PoolFormerConfig"}
    assert ours == theirs


def test_specialises_metaformer():
    assert issubclass(PoolFormerConfig, MetaFormerConfig)


@pytest.mark.parametrize(
    ("key", "value"),
    [("layer_norm_eps", 1e-3), ("norm_eps", 1e-3), ("token_mixers", ["identity"] * 4), ("image_size", 64), ("foo", 1)],
)
def test_stray_keys_are_kept_but_change_nothing(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "poolformer", key: value}))
    config = PoolFormerConfig.from_pretrained(tmp_path)
    assert config.norm_eps == 1e-5
    assert config.token_mixers == ("pooling",) * 4
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())[key] == value


@pytest.mark.parametrize("config_class", [PoolFormerConfig, MetaFormerConfig])
def test_thresholds_of_several_labels_belong_to_their_classes(config_class, tmp_path):
    thresholds = [0.25, 0.5, 1.0]
    config_class(num_labels=3, label_thresholds=thresholds).save_pretrained(tmp_path)
    assert config_class.from_pretrained(tmp_path).label_thresholds == thresholds
    # Of other classes they say nothing.
    assert config_class.from_pretrained(tmp_path, num_labels=2).label_thresholds is None
    assert config_class.from_pretrained(tmp_path, id2label={0: "a", 1: "b", 2: "c"}).label_thresholds is None
    for wrong, message in (([0.5, 1.5, 0.5], "must be in"), ([float("nan")] * 3, "must be in"), ([0.5], "1 entries")):
        with pytest.raises((ValueError, StrictDataclassError), match=f"label_thresholds .*{message}"):
            config_class(num_labels=3, label_thresholds=wrong)


def test_round_trip(config, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert loaded.to_json_string() == config.to_json_string()


@pytest.mark.parametrize("config_class", [PoolFormerConfig, MetaFormerConfig])
def test_backbone_features_survive_a_round_trip(config_class, tmp_path):
    config_class(out_features=["stage2", "stage4"]).save_pretrained(tmp_path)
    loaded = config_class.from_pretrained(tmp_path)
    assert loaded.out_features == ["stage2", "stage4"]
    assert loaded.out_indices == [2, 4]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depths": (2, 2)}, "depths has 2 entries"),
        ({"pool_size": 4}, "pool_size must be odd"),
        ({"drop_path_rate": 1.5}, "drop_path_rate must be in"),
        ({"depths": "2222"}, "depths"),
        ({"out_features": ["stage9"]}, "stage9"),
    ],
)
def test_wrong_fields_are_named(wrong, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        PoolFormerConfig(**wrong)


@pytest.mark.parametrize("labels", [True, 7])
def test_labels_that_are_none_are_no_configuration(labels):
    # With `num_labels`, they are counted before anything else looks at them.
    values = PoolFormerConfig().to_dict() | {"id2label": labels}
    with pytest.raises(ValueError, match="no configuration of a poolformer"):
        PoolFormerConfig.from_dict(values, num_labels=5)


def test_drop_path_grows_linearly_with_depth():
    rates = PoolFormerConfig(depths=(1, 1, 2, 1), drop_path_rate=0.4).drop_path_rates
    assert [rate for stage in rates for rate in stage] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    one = {"depths": (1,), "hidden_sizes": (8,), "num_encoder_blocks": 1}
    assert PoolFormerConfig(**one, drop_path_rate=0.4).drop_path_rates == [[0.0]]


def test_stage_resolution():
    config = MetaFormerConfig(image_size=(224, 72))
    assert [config.stage_resolution(stage) for stage in range(4)] == [(56, 18), (28, 9), (14, 5), (7, 3)]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_make_configurations(name):
    config = MetaFormerConfig.from_variant(name, num_labels=3)
    assert config.num_labels == 3
    assert config.model_type == VARIANTS[name].model_type


def test_labels_of_a_variant_come_with_their_number():
    config = MetaFormerConfig.from_variant("poolformer_s12", id2label={0: "sky", 1: "sea", 2: "land"})
    assert config.num_labels == 3
    assert config.id2label[1] == "sea"


def test_heads_for_dense_tasks_are_saved_only_where_they_differ(tmp_path):
    PoolFormerConfig(anchor_ratios=[0.5, 1.0, 2.0], fpn_feature_size=256, focal_gamma=3.0).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content.keys() & DenseHeadConfig.__annotations__.keys() == {"focal_gamma"}
    loaded = PoolFormerConfig.from_pretrained(tmp_path, fpn_feature_size=64)
    assert (loaded.focal_gamma, loaded.fpn_feature_size, tuple(loaded.anchor_ratios)) == (3.0, 64, (0.5, 1.0, 2.0))
    assert BuiltInConfig.from_pretrained(tmp_path).hidden_sizes == [64, 128, 320, 512]


def test_unknown_variant_names_the_nearest():
    with pytest.raises(ValueError, match="poolformer_s12"):
        MetaFormerConfig.from_variant("poolformer-s12")
