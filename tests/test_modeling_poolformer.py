"""The model against independent implementations: the built-in classes, the official outputs, PyTorch."""

import copy
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments
from transformers.models.poolformer import modeling_poolformer as built_in
from transformers.models.poolformer.configuration_poolformer import PoolFormerConfig as BuiltInConfig

from hf_poolformer import (
    TOKEN_MIXERS,
    VARIANTS,
    MetaFormerBackbone,
    MetaFormerConfig,
    MetaFormerForImageClassification,
    MetaFormerModel,
    PoolFormerBackbone,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerModel,
    backends,
)
from hf_poolformer.modeling_poolformer import DropPath


CLASSES = {
    "poolformer": (PoolFormerModel, PoolFormerForImageClassification, PoolFormerBackbone),
    "metaformer": (MetaFormerModel, MetaFormerForImageClassification, MetaFormerBackbone),
}


def classifier(config: MetaFormerConfig) -> MetaFormerForImageClassification:
    return CLASSES[config.model_type][1](config)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


# --- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (96, 72), (320, 224), (33, 47)])
@pytest.mark.parametrize("settings", [{}, {"use_layer_scale": False}, {"pool_size": 5, "mlp_ratio": 2.0}])
def test_logits_equal_the_built_in_ones(settings, size, scramble):
    tiny = {"depths": (1, 1, 2, 1), "hidden_sizes": (8, 16, 32, 64), "num_labels": 10}
    ours = scramble(PoolFormerForImageClassification(PoolFormerConfig(**tiny, **settings)))
    theirs = built_in.PoolFormerForImageClassification(BuiltInConfig(**tiny, **settings)).eval()
    theirs.load_state_dict(ours.state_dict())
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        got, wanted = ours(pixel_values, output_hidden_states=True), theirs(pixel_values, output_hidden_states=True)
    # The eager model does the same operations in the same order, so the very same numbers come out.
    assert relative_error(got.logits, wanted.logits) < 1e-6
    assert len(got.hidden_states) == len(wanted.hidden_states) == 4
    for ours_state, their_state in zip(got.hidden_states, wanted.hidden_states, strict=True):
        assert relative_error(ours_state, their_state) < 1e-6


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_other_numbers_of_stages_are_the_built_in_ones_too(stages, scramble, tmp_path):
    settings = {"num_encoder_blocks": stages, "depths": [1] * stages, "hidden_sizes": [8, 16, 24, 32, 40][:stages]}
    if stages > 4:
        settings |= {"patch_sizes": [7, 3, 3, 3, 3], "strides": [4, 2, 2, 2, 2], "padding": [2, 1, 1, 1, 1]}
    theirs = scramble(built_in.PoolFormerForImageClassification(BuiltInConfig(**settings)))
    theirs.save_pretrained(tmp_path)
    ours = PoolFormerForImageClassification.from_pretrained(tmp_path).eval()
    pixel_values = torch.randn(2, 3, 96, 72)
    assert relative_error(ours(pixel_values).logits, theirs(pixel_values).logits) < 1e-6
    backbone = PoolFormerBackbone(PoolFormerConfig(**settings, out_indices=list(range(1, stages + 1))))
    assert [maps.shape[1] for maps in backbone(pixel_values).feature_maps] == settings["hidden_sizes"]


def test_integer_targets_of_a_regression_are_no_classes():
    model = PoolFormerForImageClassification(PoolFormerConfig(num_labels=2, problem_type="regression"))
    targets = torch.tensor([[5, 300], [-7, 2]])
    outputs = model(torch.randn(2, 3, 32, 32), labels=targets)
    torch.testing.assert_close(outputs.loss, nn.functional.mse_loss(outputs.logits, targets.float()))


def test_parameter_count_of_s12():
    with torch.device("meta"):
        model = PoolFormerForImageClassification(MetaFormerConfig.from_variant("poolformer_s12"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_915_176


def test_gradients_equal_the_built_in_ones_in_float64(poolformer_config, scramble):
    ours = scramble(PoolFormerForImageClassification(poolformer_config)).double()
    tiny = {"depths": (1, 1, 2, 1), "hidden_sizes": (8, 16, 32, 64), "num_labels": 10}
    theirs = built_in.PoolFormerForImageClassification(BuiltInConfig(**tiny)).double()
    theirs.load_state_dict(ours.state_dict())
    # Without DropPath the training step is the same function.
    pixel_values, labels = torch.randn(3, 3, 64, 48, dtype=torch.float64), torch.tensor([1, 9, 4])
    for model in (ours, theirs):
        model.train()
        model(pixel_values, labels=labels).loss.backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-9, atol=1e-12, msg=name)


# --- training behaviour ----------------------------------------------------------------------------------------------


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    drop = DropPath(0.25).train()
    dropped = drop(torch.ones(4000, 2, 3, 3))
    per_sample = dropped.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert sorted(per_sample.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(dropped), dropped)


def test_one_drop_path_per_branch():
    config = PoolFormerConfig(drop_path_rate=0.3)
    model = PoolFormerModel(config)
    blocks = [block for stage in model.encoder.block for block in stage]
    assert [block.drop_path.rate for block in blocks] == pytest.approx([0.3 * i / 11 for i in range(12)])
    calls = []
    for block in blocks:
        block.drop_path.register_forward_hook(lambda *_: calls.append(1))
    model.train()(torch.randn(1, 3, 32, 32))
    assert len(calls) == 2 * len(blocks)


def test_initialisation_is_the_official_one():
    model = PoolFormerForImageClassification(PoolFormerConfig.from_variant("poolformer_s12"))
    for name, parameter in model.named_parameters():
        if "output.conv" in name or "classifier" in name:
            if name.endswith("weight"):
                assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            else:
                assert parameter.abs().max() == 0, name
        elif "projection" in name:
            # PyTorch's default: uniform within 1/sqrt(fan in).
            weight = model.get_submodule(name.rpartition(".")[0]).weight
            bound = weight[0].numel() ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        elif "layer_scale" in name:
            assert (parameter == 1e-5).all(), name


def test_gradients_reach_every_parameter_with_and_without_checkpointing(config):
    model = classifier(config).train()
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable()
    pixel_values, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 9])
    for each in (model, again):
        each(pixel_values, labels=labels).loss.backward()
    wanted = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, msg=name)


# --- interface -------------------------------------------------------------------------------------------------------


def test_save_and_load_are_bit_equal(config, scramble, tmp_path):
    model = scramble(classifier(config))
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    wanted = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    # Products round by the alignment of their operands in memory, so only the weights are equal to the bit.
    pixel_values = torch.randn(1, 3, 64, 64)
    assert relative_error(loaded.eval()(pixel_values).logits, model(pixel_values).logits) < 1e-6


def test_old_pickled_weights_load(poolformer_config, scramble, tmp_path):
    model = scramble(PoolFormerForImageClassification(poolformer_config))
    poolformer_config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = PoolFormerForImageClassification.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_pickled_code_is_not_run(poolformer_config, tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    poolformer_config.save_pretrained(tmp_path)
    torch.save({"classifier.weight": Hostile()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        PoolFormerForImageClassification.from_pretrained(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_meta_device_and_device_map(poolformer_config, scramble, tmp_path):
    with torch.device("meta"):
        model = PoolFormerForImageClassification(poolformer_config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model = scramble(PoolFormerForImageClassification(poolformer_config))
    model.save_pretrained(tmp_path)
    placed = PoolFormerForImageClassification.from_pretrained(tmp_path, device_map="auto")
    pixel_values = torch.randn(1, 3, 64, 64)
    assert relative_error(placed(pixel_values).logits.cpu(), model(pixel_values).logits) < 1e-6


def test_outputs(config):
    base_class, classifier_class, _ = CLASSES[config.model_type]
    pixel_values = torch.randn(2, 3, 64, 64)
    outputs = base_class(config).eval()(pixel_values, output_hidden_states=True)
    shapes = [(2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4), (2, 64, 2, 2)]
    assert [tuple(state.shape) for state in outputs.hidden_states] == shapes
    assert torch.equal(outputs.last_hidden_state, outputs.hidden_states[-1])
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean((2, 3)))
    model = classifier_class(config).eval()
    as_tuple = model(pixel_values, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], model(pixel_values).logits)


def test_no_labels_makes_a_feature_extractor(config):
    config.num_labels = 0
    model = classifier(config).eval()
    assert model(torch.randn(2, 3, 64, 64)).logits.shape == (2, 64)
    with pytest.raises(ValueError, match="feature extractor"):
        model(torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels", "loss"),
    [
        ("single_label_classification", 3, torch.tensor([0, 2]), nn.CrossEntropyLoss()),
        ("multi_label_classification", 3, torch.tensor([[0.0, 1, 1], [1, 0, 0]]), nn.BCEWithLogitsLoss()),
        ("regression", 1, torch.tensor([0.3, -2.0]), lambda a, b: nn.functional.mse_loss(a.squeeze(), b)),
        ("regression", 2, torch.tensor([[0.3, 1.0], [-2.0, 0.0]]), nn.MSELoss()),
    ],
)
@pytest.mark.parametrize("inferred", [False, True])
def test_problem_types(problem_type, num_labels, labels, loss, inferred):
    if inferred and (problem_type, num_labels) == ("regression", 2):
        pytest.skip("two real targets are inferred as multi-label, as everywhere in transformers")
    config = PoolFormerConfig(
        depths=(1, 1, 1, 1),
        hidden_sizes=(8, 8, 8, 8),
        num_labels=num_labels,
        problem_type=None if inferred else problem_type,
    )
    model = PoolFormerForImageClassification(config)
    outputs = model(torch.randn(2, 3, 32, 32), labels=labels)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))
    assert model.config.problem_type == problem_type


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 4, 64, 64), (1, 2, 3, 64, 64), (1, 64, 64, 3)])
def test_wrong_pixel_values_are_described(poolformer_config, shape):
    for model_class in CLASSES["poolformer"]:
        with pytest.raises(ValueError, match=r"pixel_values must be \(batch, 3, height, width\)"):
            model_class(poolformer_config)(torch.randn(shape))


@pytest.mark.parametrize("labels", [[10, 0], [-1, 0]])
def test_labels_out_of_range_are_named(poolformer_config, labels):
    model = PoolFormerForImageClassification(poolformer_config)
    with pytest.raises(ValueError, match=rf"0\.\.9 .*\[{labels[0]}\]"):
        model(torch.randn(2, 3, 64, 64), labels=torch.tensor(labels))


def test_a_checkpoint_of_another_shape_is_refused(poolformer_config, tmp_path):
    PoolFormerForImageClassification(poolformer_config).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        PoolFormerForImageClassification.from_pretrained(tmp_path, num_labels=3)
    loaded = PoolFormerForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert loaded.classifier.weight.shape == (3, 64)


# --- backbone --------------------------------------------------------------------------------------------------------


def official_backbone_names(state_dict: dict) -> dict:
    """Golden v1 backbone keys as ours. network.0, 2, 4, 6 are the stages, the odd ones their embeddings."""
    renamed = {}
    for name, tensor in state_dict.items():
        parts = name.split(".")
        if parts[0] == "patch_embed":
            parts[:2] = ["encoder", "patch_embeddings", "0", "projection"]
        elif parts[0].startswith("norm"):
            parts[0] = f"hidden_states_norms.stage{int(parts[0][4:]) // 2 + 1}"
        elif parts[2] == "proj":
            parts[:3] = ["encoder", "patch_embeddings", str((int(parts[1]) + 1) // 2), "projection"]
        else:
            parts[:2] = ["encoder", "block", str(int(parts[1]) // 2)]
        name = ".".join(parts).replace("mlp.fc", "output.conv")
        renamed[name.replace("norm1", "before_norm").replace("norm2", "after_norm")] = tensor
    return renamed


def test_feature_maps_equal_the_official_ones():
    golden = load_file(Path(__file__).parent / "fixtures" / "golden" / "poolformer_v1_feat.safetensors")
    state_dict = {k.removeprefix("state_dict."): v for k, v in golden.items() if k.startswith("state_dict.")}
    config = PoolFormerConfig(depths=(1, 1, 2, 1), hidden_sizes=(8, 16, 32, 64), out_indices=[1, 2, 3, 4])
    backbone = PoolFormerBackbone(config).eval()
    backbone.load_state_dict(official_backbone_names(state_dict))
    for index in range(2):
        feature_maps = backbone(golden[f"input.{index}"]).feature_maps
        for stage, feature_map in enumerate(feature_maps):
            assert relative_error(feature_map, golden[f"feature_maps.{index}.{stage}"]) < 1e-5


def test_backbone_interface(config):
    config.out_features = ["stem", "stage2", "stage4"]
    backbone = CLASSES[config.model_type][2](config).eval()
    outputs = backbone(torch.randn(2, 3, 64, 64), output_hidden_states=True)
    assert backbone.channels == [8, 16, 64]
    shapes = [(2, 8, 16, 16), (2, 16, 8, 8), (2, 64, 2, 2)]
    assert [tuple(feature_map.shape) for feature_map in outputs.feature_maps] == shapes
    assert len(outputs.hidden_states) == len(backbone.stage_names) == 5
    assert backbone(torch.randn(2, 3, 64, 64)).hidden_states is None


def test_backbone_takes_the_weights_of_a_classifier(poolformer_config, scramble, tmp_path):
    model = scramble(PoolFormerForImageClassification(poolformer_config))
    model.save_pretrained(tmp_path)
    backbone = PoolFormerBackbone.from_pretrained(tmp_path, out_features=["stage4"]).eval()
    pixel_values = torch.randn(1, 3, 64, 64)
    states = backbone(pixel_values, output_hidden_states=True).hidden_states
    assert relative_error(states[-1], model.poolformer(pixel_values).last_hidden_state) < 1e-6


# --- PyTorch's and transformers' machinery ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",  # the baseline has four of the mixers
    ["poolformer", "baseline", *(pytest.param(name, marks=pytest.mark.slow) for name in TOKEN_MIXERS)],
    indirect=True,
)
def test_compiles_to_one_graph_forward_and_backward(config, scramble):
    torch.compiler.reset()  # each case compiles the same functions for another model
    model = scramble(classifier(config))
    # This backend checks the graphs; what inductor makes of them is PyTorch's business and takes half a minute.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    pixel_values, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 3])
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixel_values).logits, model(pixel_values).logits)
    gradients = []
    for each in (compiled, model):
        model.zero_grad()
        each(pixel_values, labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",  # attention, convolutions and pooling of every size are exported by tests/export/test_run.py, too
    ["poolformer", "baseline", *(pytest.param(name, marks=pytest.mark.slow) for name in TOKEN_MIXERS)],
    indirect=True,
)
def test_exports_with_dynamic_batch_and_size(config, scramble):
    model = scramble(classifier(config))
    fixed = {"spatial_mlp", "random"} & set(config.token_mixers)
    shape = {0: torch.export.Dim("batch", max=512)}
    if not fixed:
        shape[2] = torch.export.Dim("height", min=64, max=2048)
        shape[3] = torch.export.Dim("width", min=64, max=2048)
    example = torch.randn(2, 3, 64, 64) if fixed else torch.randn(2, 3, 96, 128)
    exported = torch.export.export(
        model, (), {"pixel_values": example}, dynamic_shapes={"pixel_values": shape}
    ).module()
    for size in ((1, 3, 64, 64), (5, 3, 64, 64) if fixed else (5, 3, 225, 160)):
        pixel_values = torch.randn(size)
        logits = exported(pixel_values=pixel_values).logits
        torch.testing.assert_close(logits, model(pixel_values).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_close_to_float32(poolformer_config, scramble, dtype):
    model = scramble(PoolFormerForImageClassification(poolformer_config)).train()
    pixel_values, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 3])
    wanted = model(pixel_values, labels=labels)
    with torch.autocast("cpu", dtype=dtype):
        got = model(pixel_values, labels=labels)
    # bfloat16 has 8 bits of mantissa; ten products deep.
    assert relative_error(got.logits.float(), wanted.logits) < 0.05
    got.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.gpu
def test_a_gpu_computes_the_same(config, scramble):
    model = scramble(classifier(config))
    pixel_values, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 3])
    wanted = model(pixel_values, labels=labels)
    got = copy.deepcopy(model).cuda()(pixel_values.cuda(), labels=labels.cuda())
    # float32 sums in another order, ten products deep; cuDNN convolves in TF32 (10 bits) unless told not to.
    assert relative_error(got.logits.cpu(), wanted.logits) < 5e-3
    got.loss.backward()


def errors(got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> list[float]:
    """Of each tensor, relative to its norm. Some gradients are zero but for what cancels: none counts as smaller than
    a thousandth of all of them."""
    least = 1e-3 * torch.stack([each.norm() for each in wanted]).norm()
    return [((a.double() - b).norm() / (b.norm() + least)).item() for a, b in zip(got, wanted, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernels", "dtype", "batch"),
    [("triton", torch.float32, 4), ("auto", torch.bfloat16, 128)],
    ids=["triton", "auto"],
)
@pytest.mark.parametrize("family", ["poolformer", "caformer"])
def test_kernels_on_a_gpu_compute_the_same(family, kernels, dtype, batch, scramble):
    """Logits and every gradient against float64, with branches as large as their shortcuts: none can hide."""
    device = "cuda"
    # One width, so that few kernels have to be compiled; every map of the first stages is several tiles high.
    small = {"depths": (1,) * 4, "hidden_sizes": (64,) * 4, "num_labels": 10}
    if family == "poolformer":
        config = PoolFormerConfig(**small, layer_scale_init_value=1.0)
    else:
        mixers = ("separable_conv", "pooling", "attention", "identity")
        config = MetaFormerConfig.from_variant("caformer_s18", **small, token_mixers=mixers)
    model = scramble(classifier(config)).to(device, dtype)
    images, labels = torch.randn(batch, 3, 96, 80, device=device, dtype=dtype), torch.arange(batch, device=device) % 10
    assert backends.decide(images, kernels).backend == "triton"

    def run(model, kernels, images):
        model = copy.deepcopy(model)
        model.config.kernels = kernels
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            output = model(images, labels=labels)
            output.loss.backward()
        return output.logits, tuple(parameter.grad for parameter in model.parameters())

    logits, grads = run(copy.deepcopy(model).double(), "reference", images.double())
    # What plain PyTorch is off by in this precision, and a factor for sums in another order. A row that the mixer
    # loses shows as 0.05 of the logits and 0.2 of its scales' gradients, an order above what bfloat16 costs.
    plain_logits, plain_grads = run(model, "reference", images)
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    of_logits = max(3 * max(errors((plain_logits,), (logits,))), rounding)
    of_grads = max(3 * max(errors(plain_grads, grads)), 3 * rounding)
    names = [name for name, _ in model.named_parameters()]
    for format in (torch.contiguous_format, torch.channels_last):
        arranged = model.to(memory_format=format)
        found_logits, found_grads = run(arranged, kernels, images.contiguous(memory_format=format))
        assert max(errors((found_logits,), (logits,))) < of_logits
        wrong = {name: off for name, off in zip(names, errors(found_grads, grads), strict=True) if not off < of_grads}
        assert not wrong, of_grads


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("learning", [0, 1])
def test_a_frozen_body_in_channels_last(poolformer_config, scramble, learning, side):
    """PyTorch 2.11 ends the process here: its GroupNorm writes gradients of an input that wants none."""
    model = scramble(PoolFormerForImageClassification(poolformer_config)).train()
    model.poolformer.requires_grad_(False)
    if learning:
        model.poolformer.encoder.block[-learning:].requires_grad_(True)
    pixel_values, labels = torch.randn(2, 3, side, side), torch.tensor([0, 1])
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout).zero_grad()
        model(pixel_values.contiguous(memory_format=layout), labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected, found = gradients
    assert found.keys() == expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    whole = max(gradient.norm() for gradient in expected.values())  # some are zero but for rounding
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-5 * whole, name  # float32, sums in another order


def test_channels_last_is_kept(poolformer_config, scramble):
    model = scramble(PoolFormerModel(poolformer_config))
    pixel_values = torch.randn(2, 3, 64, 64)
    wanted = model(pixel_values).last_hidden_state
    got = model.to(memory_format=torch.channels_last)(pixel_values.to(memory_format=torch.channels_last))
    assert got.last_hidden_state.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(got.last_hidden_state, wanted) < 1e-5


def test_attention_copies_nothing_in_channels_last():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    names = []
    config = MetaFormerConfig(token_mixers=("attention",) * 4, hidden_sizes=(64,) * 4)
    attention = TOKEN_MIXERS["attention"](config, 0)
    x, grad = (torch.randn(2, 64, 3, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    with Names():
        attention(x.requires_grad_()).backward(grad)
    assert not {"clone", "copy_", "_to_copy", "contiguous"} & set(names)
    # The gradients of query, key and value become one, which the product needs.
    assert names.count("stack") == 1


def test_trainer_trains(poolformer_config, tmp_path):
    images = torch.randn(16, 3, 32, 32)
    dataset = [{"pixel_values": image, "labels": index % 2} for index, image in enumerate(images)]
    poolformer_config.num_labels = 2
    model = PoolFormerForImageClassification(poolformer_config)
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=30,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


def test_peft_lora_on_the_mlp(poolformer_config, scramble):
    peft = pytest.importorskip("peft")
    model = scramble(PoolFormerForImageClassification(poolformer_config))
    pixel_values = torch.randn(2, 3, 64, 64)
    wanted = model(pixel_values).logits
    lora = peft.LoraConfig(r=4, target_modules=["conv1", "conv2"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(model, lora)
    torch.testing.assert_close(adapted(pixel_values).logits, wanted)  # starts as the identity
    adapted(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert sum("lora_B" in name for name in trained) == 2 * sum(poolformer_config.depths)


# --- families --------------------------------------------------------------------------------------------------------


def test_user_defined_mixer(monkeypatch):
    class Shift(nn.Module):
        def __init__(self, config, stage):
            super().__init__()

        def forward(self, hidden_states):
            return hidden_states.roll(1, dims=-1)

    monkeypatch.setitem(TOKEN_MIXERS, "shift", Shift)
    model = MetaFormerForImageClassification(MetaFormerConfig(token_mixers=("shift",) * 4, depths=(1, 1, 1, 1)))
    assert model(torch.randn(1, 3, 64, 64)).logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [("token_mixers", ("pooling", "pooling", "pooling", "atention")), ("norm_layer", "rms"), ("hidden_act", "relux")],
)
def test_unknown_parts_are_named(field, value):
    with pytest.raises((ValueError, StrictDataclassError), match="not one of"):
        MetaFormerModel(MetaFormerConfig(**{field: value}))


@pytest.mark.parametrize("mixer", ["spatial_mlp", "random"])
def test_fixed_token_mixers_name_their_resolution(mixer):
    model = MetaFormerModel(MetaFormerConfig(token_mixers=("pooling", "pooling", "pooling", mixer), image_size=64))
    with pytest.raises(ValueError, match="mixes exactly 2x2 tokens but got 3x2"):
        model(torch.randn(1, 3, 96, 64))


def test_position_embeddings_interpolate():
    config = MetaFormerConfig(position_embeddings=(True, False, False, False), image_size=64, depths=(1, 1, 1, 1))
    model = MetaFormerModel(config).eval()
    embed = model.encoder.patch_embeddings[0]
    torch.nn.init.constant_(embed.position_embeddings, 3.0)
    without = embed.projection(pixel_values := torch.randn(1, 3, 96, 80))
    torch.testing.assert_close(embed(pixel_values), without + 3.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_build(name):
    config = MetaFormerConfig.from_variant(name)
    with torch.device("meta"):
        model = classifier(config)
    assert len(model.base_model.encoder.block[0]) == config.depths[0]
