"""Heads that take over the rows of the labels which a checkpoint knows by the same names."""

import logging

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_poolformer.foundation.errors import UserError
from hf_poolformer.training.adaptation import LinearProbe
from hf_poolformer.training.initialisation import initial_model


LEARNT = ["n01440764", "crane", "dog", "crane", "n02123045", "café"]
# Known, known in Unicode's other spelling, not known, known but to be two things there.
NAMES = ["n02123045", "cafe\u0301", "n09999999", "crane"]


@pytest.fixture
def start(make_checkpoint):
    """Makes a checkpoint with these labels, and with a linear head or one like CAFormer's."""

    def make(head, labels=LEARNT, **changes):
        return make_checkpoint(labels=labels, metaformer="caformer_s18" if head == "mlp" else None, **changes)

    return make


def rows_of(model):
    layer = getattr(model.classifier, "fc2", model.classifier)
    return layer.weight.detach(), layer.bias.detach()


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_rows_follow_their_names(start, make_settings_from, caplog, head):
    folder = start(head)
    model, _, _ = initial_model(make_settings_from(folder, head_mapping="names"), NAMES)
    before = AutoModelForImageClassification.from_pretrained(folder)
    assert [model.config.id2label[index] for index in range(4)] == NAMES
    for mine, theirs in zip(rows_of(model), rows_of(before), strict=True):
        assert torch.equal(mine[:2], theirs[[4, 5]])
        torch.testing.assert_close(mine[2:], theirs.mean(0, keepdim=True).expand_as(mine[2:]))
    assert "2 of 4 labels keep their rows of the checkpoint's 6; the others begin as the mean" in caplog.text
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits, known = model.eval()(images).logits, before.eval()(images).logits
    torch.testing.assert_close(logits[:, :2], known[:, [4, 5]])
    torch.testing.assert_close(logits[:, 2], known.mean(1))


def test_as_many_labels_in_another_order_that_are_not_the_same(start, make_settings_from):
    folder = start("mlp", ["a", "b", "c"])
    model, _, _ = initial_model(make_settings_from(folder, head_mapping="names"), ["c", "a", "d"])
    before = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(rows_of(model)[0][:2], rows_of(before)[0][[2, 0]])


@pytest.mark.parametrize(
    ("labels", "mapping"), [(LEARNT, "off"), (["a", "b"], "names"), ([f"LABEL_{i}" for i in range(6)], "names")]
)
def test_otherwise_the_head_is_new(start, make_settings_from, caplog, labels, mapping):
    folder, names = start("mlp", labels), ["LABEL_4", "n02123045"]
    model, _, _ = initial_model(make_settings_from(folder, head_mapping=mapping), names)
    before = AutoModelForImageClassification.from_pretrained(folder)
    assert "New head" in caplog.text and "keep their rows" not in caplog.text
    assert not torch.equal(model.classifier.fc1.weight, before.classifier.fc1.weight)
    assert not any(torch.equal(row, known) for row in rows_of(model)[0] for known in rows_of(before)[0])


def test_rows_of_numbers_are_no_rows_of_classes(start, make_settings_from, caplog):
    folder = start("mlp", ["a", "b", "c"], problem_type="regression")
    initial_model(make_settings_from(folder, head_mapping="names"), ["c", "a"])
    assert "New head" in caplog.text and "keep their rows" not in caplog.text


def test_the_checkpoints_own_labels_keep_their_head_in_silence(start, make_settings_from, caplog):
    folder = start("mlp", ["a", "b"])
    with caplog.at_level(logging.INFO):
        model, _, _ = initial_model(make_settings_from(folder, head_mapping="names"), ["a", "b"])
    assert torch.equal(rows_of(model)[0], rows_of(AutoModelForImageClassification.from_pretrained(folder))[0])
    assert "ead:" not in caplog.text and "New head" not in caplog.text


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_dropout_before_the_last_layer(start, make_settings_from, make_settings, head):
    if head == "linear":
        overrides = '{"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}'
        settings = make_settings(config_name="metaformer_id_s12", config_overrides=overrides, head_dropout=0.5)
    else:
        settings = make_settings_from(start("mlp", ["a", "b"]), head_dropout=0.5)
    model, _, _ = initial_model(settings, ["a", "b"])
    assert model.config.head_dropout == 0.5
    layer, seen = getattr(model.classifier, "fc2", model.classifier), []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        model.eval()(images)
        model.train()(images)
        LinearProbe(model).train()(images)  # --freeze_backbone
    whole, *dropped = seen
    assert not (whole == 0).any()
    for values in dropped:
        gone = values == 0
        assert 0.4 < gone.float().mean() < 0.6  # of thousands
        torch.testing.assert_close(values[~gone], 2 * whole[~gone])


def test_dropout_is_refused_where_there_is_none(start, make_settings_from):
    folder = start("linear", ["a", "b"])
    with pytest.raises(UserError, match=r"--head_dropout 0\.2: a poolformer has no dropout before"):
        initial_model(make_settings_from(folder, head_dropout=0.2), ["a", "b"])
    initial_model(make_settings_from(folder, head_dropout=0.0), ["a", "b"])


def test_a_checkpoints_own_dropout_stays_unless_another_is_given(start, make_settings_from):
    folder = start("mlp", ["a", "b"], head_dropout=0.3)
    for given, rate in ((None, 0.3), (0.0, 0.0), (0.1, 0.1)):
        assert initial_model(make_settings_from(folder, head_dropout=given), ["a", "b"])[0].config.head_dropout == rate
