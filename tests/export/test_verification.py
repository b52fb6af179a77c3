"""A check that sees the fault: by output, next to its spread, for what the answers mean; at every size."""

import json
from types import SimpleNamespace

import pytest
import torch

from hf_poolformer import (
    MetaFormerConfig,
    MetaFormerForImageClassification,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerForSemanticSegmentation,
    PoolFormerImageProcessor,
)
from hf_poolformer.export import deployable, export_model, load
from hf_poolformer.export.verification import LEAST_AGREEMENT, Comparison, kind_of, sizes
from hf_poolformer.foundation.errors import UserError


SMALL = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 32, 64)}
# Kind of answers, and what the configuration says of them.
KINDS = {
    "classes": {"num_labels": 5},
    "labels": {"num_labels": 3, "problem_type": "multi_label_classification"},
    "numbers": {"num_labels": 3, "problem_type": "regression"},
    "number": {"num_labels": 1, "problem_type": "regression"},
}
# What the last layer adds: offsets far larger than what the images make of a difference.
OFFSETS = {"classes": [300.0] * 5, "labels": [20.0, -0.5, -7.0], "numbers": [300.0, -2000.0, 5.0], "number": [300.0]}


def make(kind: str, factor: float = 0.1) -> PoolFormerForImageClassification:
    """With outputs that spread by a tenth to one around their offsets, once `save_model` has moved the weights."""
    torch.manual_seed(0)
    model = PoolFormerForImageClassification(PoolFormerConfig(**SMALL, **KINDS[kind]))
    with torch.no_grad():
        model.classifier.weight.mul_(factor)
        model.classifier.bias.copy_(torch.tensor(OFFSETS[kind]))
    return model


def compare(kind: str, got: torch.Tensor, right: torch.Tensor, precision: str = "bfloat16", **config):
    """The check of answers that were made up."""
    task = "semantic-segmentation" if kind == "pixels" else "image-classification"
    settings = {**KINDS.get(kind, {"num_labels": right.shape[1]}), **config}
    config = SimpleNamespace(**{"problem_type": None, **settings, "num_labels": right.shape[1]})
    manifest = SimpleNamespace(task=task, format="torch", precision=precision, preprocessing=False)
    return Comparison(SimpleNamespace(manifest=manifest, config=config), right)(got, right, "images")


def answers(kind: str, spread: float = 0.2) -> torch.Tensor:
    shape = (40, 6, 4, 4) if kind == "pixels" else (40, 1 if kind == "number" else 4)
    return 300 + spread * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision", deployable.DTYPES)
@pytest.mark.parametrize("kind", [*KINDS, "pixels"])
def test_rounding_is_judged_by_the_spread(kind, precision):
    """In steps of 2 around 300 the answers of all images are one; where nothing is rounded there is no error."""
    right = answers(kind)
    check, _ = compare(kind, right.bfloat16().float(), right, precision)
    assert not check.passed and check.error > 0.5
    check, agreement = compare(kind, right.clone(), right, precision)
    assert check.passed and check.error == 0 and agreement == 1


@pytest.mark.parametrize("kind", ["classes", "labels", "numbers", "pixels"])
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_one_output_that_no_longer_varies(kind, precision):
    right = answers(kind)
    got = right.clone()
    got[:, 2] = right[:, 2].mean()
    check, _ = compare(kind, got, right, precision)
    assert not check.passed and check.output == 2


@pytest.mark.parametrize("kind", [*KINDS, "pixels"])
def test_small_differences_pass_at_any_offset_and_unit(kind):
    for spread in (0.2, 50.0):
        right = answers(kind, spread)
        got = right + 0.02 * spread * torch.randn(right.shape, generator=torch.Generator().manual_seed(1))
        check, agreement = compare(kind, got, right)
        assert check.passed and agreement >= LEAST_AGREEMENT
        assert check.difference == pytest.approx(0.02 * spread, rel=0.5)


@pytest.mark.parametrize("kind", [*KINDS, "pixels"])
def test_what_is_not_finite_fails(kind):
    right = answers(kind)
    for wrong in (torch.nan, torch.inf):
        got = right.clone()
        got[3, 0] = wrong
        assert not compare(kind, got, right, "int8")[0].passed


def test_ties_may_turn_and_choices_may_not():
    right = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    right = right.clamp(max=2)
    right[:, 1] = right[:, 0] = 3.0
    right[:, 0] += 1e-3
    got = right.clone()
    got[:, 1] += 2e-3
    check, agreement = compare("classes", got, right)
    assert check.agreement == 0 and agreement == 1
    check, agreement = compare("classes", right.flip(1), right)
    assert agreement < LEAST_AGREEMENT
    right = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    assert compare("labels", -right, right)[1] < LEAST_AGREEMENT


def test_labels_are_compared_at_their_own_thresholds():
    """A shift that turns a label at its threshold, and none at others."""
    logits = torch.arange(-40, 40)[:, None].repeat(1, 3) / 10 + 0.05
    got = logits + 1.0
    thresholds = [0.5, 0.02, 1.0]  # logits of 0, of -3.89, and more than any
    check, _ = compare("labels", got, logits, label_thresholds=thresholds)
    assert check.agreement == pytest.approx(1 - (10 + 1) / 240)
    assert compare("labels", got, logits)[0].agreement == pytest.approx(1 - 30 / 240), "0.5 where none are given"


def test_outputs_that_do_not_vary_are_held_to_what_float32_holds():
    right = torch.full((40, 2), 300.0)
    assert compare("numbers", right + 1e-5, right)[0].passed
    assert not compare("numbers", right + 0.1, right)[0].passed


def test_kinds():
    for settings, task, kind in (
        ((7, None), "image-classification", "classes"),
        ((1, None), "image-classification", "numbers"),
        ((0, None), "image-classification", "numbers"),
        ((3, "regression"), "image-classification", "numbers"),
        ((1, "multi_label_classification"), "image-classification", "labels"),
        ((3, None), "semantic-segmentation", "pixels"),
    ):
        assert kind_of(SimpleNamespace(num_labels=settings[0], problem_type=settings[1]), task) == kind


@pytest.mark.parametrize(
    ("kind", "format", "precision"),
    [
        ("numbers", "openvino", "bfloat16"),
        ("classes", "openvino", "bfloat16"),
        ("number", "openvino", "int8"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("labels", "openvino", "bfloat16"),
                ("numbers", "torch", "bfloat16"),
                ("number", "onnx", "float16"),
                ("labels", "onnx", "int8"),
                ("numbers", "openvino", "float16"),
                ("classes", "torch", "bfloat16"),
            )
        ),
    ],
)
def test_low_precision_answers_what_the_model_answers(kind, format, precision, save_model, photos, tmp_path):
    """Other images than it was verified on: right within a share of the spread, for any offset."""
    model = make(kind)
    folder = save_model(model)
    calibration = str(photos) if precision == "int8" else None
    summary = export_model(
        folder, tmp_path / "out", format=format, precision=precision, calibration_dataset=calibration
    )
    x = torch.nn.functional.interpolate(torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(2)), size=64)
    with torch.no_grad():
        right = model(x).logits
    got = load(tmp_path / "out", trust_remote_code=format == "torch")(x).logits
    if kind == "classes":
        got, right = (logits - logits.mean(1, keepdim=True) for logits in (got, right))
    # Bfloat16 has 8 bits, and a network adds up some roundings; eight bits of integers are coarser.
    allowed = {"float16": 0.02, "bfloat16": 0.1, "int8": 0.5}[precision]
    assert ((got - right).square().mean(0).sqrt() < allowed * right.std(0)).all()
    if kind == "number" and precision == "int8":  # which have no choice to agree on
        for attempt in summary.manifest.quantisation["attempts"]:
            quality = attempt["quality"]
            assert quality["agreement"] == pytest.approx(1 - quality["error"] ** 2)
    report = json.loads((tmp_path / "out" / "verification.json").read_text())
    said = str(summary) + (tmp_path / "out" / "README.md").read_text()
    assert report["kind"] == ("numbers" if kind == "number" else kind)
    assert ("best class" in said) == (kind == "classes") and "accuracy" not in said
    assert report["arithmetic"] in said


def test_an_export_that_answers_one_number_is_refused(save_model, tmp_path, monkeypatch):
    """Of answers in bfloat16 nothing is left of the differences: by how much, and what to do."""
    monkeypatch.setattr(deployable, "activated", lambda logits, activation: logits.bfloat16().float())
    with pytest.raises(UserError, match=r"off by .* spreads by .*--precision float32"):
        export_model(save_model(make("number")), tmp_path / "out", format="torch", precision="bfloat16")
    assert not (tmp_path / "out").exists()


def test_what_float16_cannot_hold_is_refused(save_model, tmp_path):
    """Activations of 100 000s, which the next norm makes harmless, are infinite in float16."""
    model = make("classes")
    folder = save_model(model)
    with torch.no_grad():
        model.base_model.encoder.patch_embeddings[0].projection.weight.mul_(1e5)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"not what the model is: .*--precision float32"):
        export_model(folder, tmp_path / "out", precision="float16", dynamic_size=False)


def test_sizes_begin_with_the_smallest():
    found = sizes([64, 64], 3, 32)
    assert (
        found[0] == (1, 3, 3) and {(2, 32, 32), (1, 31, 33)} <= set(found) and (64, 64) not in {s[1:] for s in found}
    )
    assert min(min(shape[1:]) for shape in sizes([64, 64], 40, 32)) >= 40


def small_sizes(model: torch.nn.Module, exported) -> None:
    for number, height, width in ((1, 3, 3), (2, 16, 17), (1, 31, 31), (3, 32, 32), (1, 33, 40), (2, 97, 64)):
        x = torch.randn(number, 3, height, width)
        with torch.no_grad():
            right = model(x).logits
        got = exported(x).logits
        # Float32 in another order of summation.
        assert got.shape == right.shape and (got - right).abs().max() < 2e-5 * right.abs().max(), (height, width)
    with pytest.raises(ValueError, match="3x3 pixels and more, not of 2x9"):
        exported(torch.randn(1, 3, 2, 9))


@pytest.mark.parametrize("format", ["torch", "onnx", "openvino"])
def test_small_and_odd_sizes(format, save_model, tmp_path):
    """Of a model whose own images leave the last stage one token."""
    model = make("classes", 1.0)
    folder = save_model(model)
    square = {"height": 32, "width": 32}
    PoolFormerImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    assert export_model(folder, tmp_path / "out", format=format).manifest.image_size == [32, 32]
    small_sizes(model, load(tmp_path / "out", trust_remote_code=format == "torch"))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "onnx", "openvino"])
def test_small_and_odd_sizes_of_segmenters(format, save_model, tmp_path):
    config = PoolFormerConfig(**SMALL, num_labels=4)
    config.fpn_feature_size, config.decoder_hidden_size = 16, 16
    model = PoolFormerForSemanticSegmentation(config)
    folder = save_model(model)
    export_model(folder, tmp_path / "out", format=format)
    small_sizes(model, load(tmp_path / "out", trust_remote_code=format == "torch"))


@pytest.mark.slow
def test_small_and_odd_sizes_compiled(save_model, tmp_path):
    model = make("classes", 1.0)
    folder = save_model(model)
    export_model(folder, tmp_path / "out", format="torch", compile=True)
    small_sizes(model, load(tmp_path / "out", trust_remote_code=True))


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_as_many_heads_as_tokens(format, tmp_path, scramble):
    """Of which OpenVINO, compiled for fixed shapes, takes one for the other."""
    config = MetaFormerConfig(
        depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 32, 64), attention_head_dim=16, num_labels=5, image_size=64,
        token_mixers=("pooling", "pooling", "attention", "attention"), layer_scale_init_value=1.0,
    )  # fmt: skip
    model = scramble(MetaFormerForImageClassification(config))
    model.save_pretrained(tmp_path / "model")
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    PoolFormerImageProcessor(**size).save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "out", format=format)
    exported = load(tmp_path / "out")
    for shape in ((1, 3, 64, 64), (5, 3, 64, 64), (2, 3, 16, 32)):  # 4 heads and tokens; and 2
        pixel_values = torch.randn(shape)
        with torch.no_grad():
            wanted = model(pixel_values).logits
        assert (exported(pixel_values).logits - wanted).norm() < 1e-4 * wanted.norm()
