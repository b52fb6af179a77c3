"""
Our models through transformers' own exporters: what its users write gives PyTorch's answers.

Where the exporters are wrong, a test says so by its name; it fails when they are mended, and then it goes.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from hf_poolformer import (
    MetaFormerConfig,
    MetaFormerForImageClassification,
    PoolFormerBackbone,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerForSemanticSegmentation,
    PoolFormerModel,
)


exporters = pytest.importorskip("transformers.exporters", reason="this version of transformers has no exporters")
if not hasattr(exporters, "ExportedModel"):
    pytest.skip("exports that can be called came with transformers 5.23", allow_module_level=True)

PAGE = Path(__file__).resolve().parents[2] / "docs/deploy.md"
# The configuration, and what runs it.
FORMATS = {
    "dynamo": ("DynamoConfig", "torch"),
    "onnx": ("OnnxConfig", "onnxruntime"),
    "openvino": ("OpenVINOConfig", "openvino"),
    "executorch": ("ExecutorchConfig", "executorch"),
}
SMALL = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 32, 64)}
# A mixer of every family whose models take images of any size; what else is theirs, too.
MIXED = {
    **SMALL,
    "token_mixers": ("pooling", "depthwise_conv", "separable_conv", "attention"),
    "attention_head_dim": 16,
    "hidden_act": "star_relu",
    "head_type": "mlp",
    "embedding_norm": "layer_norm",
    "res_scale_init_values": (None, None, 1.0, 1.0),
}
# Ten times what was seen; float32 differs by the order of summation.
TOLERANCE = 1e-5
# All that OpenVINO looks at: see the test of its arithmetic below.
IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


def export(format: str, model: nn.Module, *, axes: tuple[int, ...] = (0,), shape=(2, 3, 96, 64), **options) -> Any:
    """As the documentation of transformers has it; `axes` of the images may vary."""
    config_class, library = FORMATS[format]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    sizes = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    if format == "executorch":  # which plans its memory for the largest
        sizes = {axis: torch.export.Dim(f"axis_{axis}", max=8 if axis == 0 else 256) for axis in axes}
    options.setdefault("dynamic_shapes", {"pixel_values": sizes} if axes else None)
    config = getattr(exporters, config_class)(**options)
    exporter = exporters.AutoHfExporter.from_config(config)
    exported = exporter.export(model, {"pixel_values": torch.randn(shape, dtype=model.dtype)}, config)
    return exported.to("cpu", config=IN_FLOAT32) if format == "openvino" else exported


def error(exported: Any, model: nn.Module, *shape: int) -> float:
    """The largest difference of an output, relative to its largest value."""
    pixel_values = torch.randn(shape, dtype=model.dtype)
    with torch.no_grad():
        right = model(pixel_values=pixel_values)
    got = exported(pixel_values=pixel_values)
    assert type(got) is type(right) and got.keys() == right.keys()
    pairs = list(zip(pytree.tree_leaves(dict(got)), pytree.tree_leaves(dict(right)), strict=True))
    assert all(ours.shape == theirs.shape for ours, theirs in pairs)
    return max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    torch.manual_seed(0)
    model = PoolFormerForImageClassification(PoolFormerConfig(**SMALL, num_labels=7)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    return model


@pytest.fixture(scope="module")
def in_openvino(classifier):
    return export("openvino", classifier)


def test_a_classifier_in_onnx(classifier, tmp_path, monkeypatch):
    """The page's own lines: from memory and from the folder; of the operations of ONNX alone."""
    monkeypatch.chdir(tmp_path)
    classifier.save_pretrained("outputs/pets")
    (lines,) = [
        code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "OnnxExporter" in code
    ]
    said: dict[str, Any] = {}
    exec(lines, said)
    assert {node.domain for node in said["exported"].program.graph} == {""}
    for model in (said["exported"], exporters.ExportedModel.from_pretrained("outputs/pets-onnx")):
        assert max(error(model, classifier, number, 3, 224, 224) for number in (1, 2, 5)) < TOLERANCE


def test_a_classifier_in_openvino(classifier, in_openvino, tmp_path):
    in_openvino.save_pretrained(tmp_path)
    for model in (in_openvino, exporters.ExportedModel.from_pretrained(tmp_path, config=IN_FLOAT32)):
        assert max(error(model, classifier, number, 3, 96, 64) for number in (1, 2, 5)) < TOLERANCE


def test_no_kernel_gets_into_a_graph(scramble):
    """The model has answered before, by kernels where it can; the graph is PyTorch's own operations."""
    model = scramble(MetaFormerForImageClassification(MetaFormerConfig(**MIXED, num_labels=5, image_size=64)))
    with torch.inference_mode():
        model(torch.randn(2, 3, 64, 64))
    exported = export("dynamo", model)
    called = [node.target for node in exported.program.graph.nodes if node.op == "call_function"]
    spaces = {getattr(target, "namespace", "python") for target in called}
    assert "aten" in spaces and spaces <= {"aten", "python"}
    assert error(exported, model, 3, 3, 96, 64) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("mixers", [MIXED["token_mixers"], ("identity", "spatial_mlp", "random", "random")])
def test_all_mixers(format, mixers, scramble):
    """At odd sizes, too, where the mixers leave the size free."""
    free = "random" not in mixers
    config = MetaFormerConfig(**{**MIXED, "token_mixers": mixers}, num_labels=5, image_size=64)
    model = scramble(MetaFormerForImageClassification(config))
    shape = (2, 3, 96, 64) if free else (2, 3, 64, 64)
    exported = export(format, model, axes=(0, 2, 3) if free else (0,), shape=shape)
    sizes = [(64, 64), (65, 97), (33, 40), (32, 64)] if free else [(64, 64)]
    for number in (1, 3):
        assert max(error(exported, model, number, 3, *size) for size in sizes) < TOLERANCE


HEADS = {
    "model": lambda: PoolFormerModel(PoolFormerConfig(**SMALL)),
    "backbone": lambda: PoolFormerBackbone(PoolFormerConfig(**SMALL, out_features=["stage1", "stage3", "stage4"])),
    "segmenter": lambda: PoolFormerForSemanticSegmentation(PoolFormerConfig(**SMALL, num_labels=4)),
    "multispectral": lambda: PoolFormerForImageClassification(PoolFormerConfig(**SMALL, num_channels=5)),
    "several labels": lambda: PoolFormerForImageClassification(
        PoolFormerConfig(**SMALL, num_labels=3, problem_type="multi_label_classification")
    ),
    "a number": lambda: PoolFormerForImageClassification(
        PoolFormerConfig(**SMALL, num_labels=1, problem_type="regression")
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("head", HEADS)
def test_heads_at_any_size(head, format, scramble):
    model = scramble(HEADS[head]())
    channels = model.config.num_channels
    exported = export(format, model, axes=(0, 2, 3), shape=(2, channels, 96, 64))
    for number, *size in ((2, 64, 64), (1, 65, 97), (3, 33, 40)):
        assert error(exported, model, number, channels, *size) < TOLERANCE


@pytest.mark.slow
def test_options_of_onnx(classifier, scramble):
    for options in ({"opset_version": 21}, {"ort_fusions": "cpu"}, {"optimize": False}):
        exported = export("onnx", classifier, **options)
        assert error(exported, classifier, 3, 3, 96, 64) < TOLERANCE, options
    # Every axis, as `dynamic=True` has it.
    exported = export("onnx", classifier, dynamic_shapes=None, dynamic=True)
    assert error(exported, classifier, 3, 3, 65, 97) < TOLERANCE


@pytest.mark.slow
def test_16_bits(scramble):
    """Against PyTorch in the same precision: two orders of summation differ by several of its roundings."""
    model = scramble(PoolFormerForImageClassification(PoolFormerConfig(**SMALL, num_labels=7))).half()
    assert error(export("onnx", model), model, 3, 3, 96, 64) < 1e-2


@pytest.mark.slow
def test_other_kernels_than_auto_do_not_fail_silently(scramble):
    """`reference` exports; kernels that were asked for by name are in the graph, which no other runtime takes."""
    model = scramble(PoolFormerForImageClassification(PoolFormerConfig(**SMALL, kernels="reference")))
    assert error(export("onnx", model), model, 3, 3, 96, 64) < TOLERANCE
    model.config.kernels = "cpu"
    with pytest.raises(Exception, match="hf_poolformer"):
        export("onnx", model)


@pytest.mark.slow
def test_one_image_as_an_example_fixes_the_batch(classifier):
    """With `dynamic=True` without a word, which the page says; an explicit axis is refused."""
    exported = export("onnx", classifier, shape=(1, 3, 96, 64), dynamic_shapes=None, dynamic=True)
    assert error(exported, classifier, 1, 3, 65, 97) < TOLERANCE
    with pytest.raises(RuntimeError, match="invalid dimensions"):
        exported(pixel_values=torch.zeros(2, 3, 96, 64))
    with pytest.raises(ValueError, match="specialized"):
        export("onnx", classifier, shape=(1, 3, 96, 64))


@pytest.mark.slow
@pytest.mark.parametrize("mixers", [("pooling",) * 4, MIXED["token_mixers"]])
def test_executorch(mixers, scramble):
    config = MetaFormerConfig(**{**MIXED, "token_mixers": mixers}, num_labels=5, image_size=64)
    model = scramble(MetaFormerForImageClassification(config))
    exported = export("executorch", model, shape=(2, 3, 64, 64))
    assert max(error(exported, model, number, 3, 64, 64) for number in (1, 2, 5)) < TOLERANCE


# ---------------------------------------------------------------------------------------------------------------------
# Where they are wrong


def test_fault_of_theirs_openvino_takes_bfloat16_for_float32(classifier, in_openvino):
    """
    They write into the graph that it is to be computed in float32, where OpenVINO's CPU plugin does not look.

    Whoever uses such an export says so when it is opened, as `export` above does.
    """
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16 to take")
    options = in_openvino.program.get_rt_info("runtime_options").astype(dict)
    assert options["INFERENCE_PRECISION_HINT"].astype(str) == "f32"
    as_one_gets_it = exporters.ExportedModel(in_openvino.components, in_openvino.export_format)
    assert error(as_one_gets_it, classifier, 5, 3, 96, 64) > 1e-3


def test_fault_of_theirs_pooling_in_executorch_for_cuda():
    """Of `ExecutorchConfig(backend="cuda")`: a convolution in its place counts the padding and knows no ceil_mode."""
    from transformers.exporters import exporter_executorch

    pool = exporter_executorch._patch_avg_pool2d(F.avg_pool2d)
    x = torch.rand(1, 2, 6, 6)
    valid = {"kernel_size": 3, "stride": 1, "padding": 1, "count_include_pad": False}
    assert (pool(x, **valid) - F.avg_pool2d(x, **valid)).abs().max() > 0.1
    rounded_up = {"kernel_size": 3, "stride": 2, "ceil_mode": True}
    assert pool(x, **rounded_up).shape != F.avg_pool2d(x, **rounded_up).shape


@pytest.mark.slow
def test_fault_of_theirs_executorch_takes_15_images_at_most(classifier):
    """
    Where the number of images may vary: PyTorch's choice of a convolution asks whether there are 16.

    Lowering a program traces it again, and what was asked then narrows the range for which memory is planned. The
    runtime says so: no answer is wrong. A batch of a fixed size is not limited.
    """
    batch = torch.export.Dim("batch", max=32)
    exported = export("executorch", classifier, dynamic_shapes={"pixel_values": {0: batch}}, shape=(2, 3, 64, 64))
    assert error(exported, classifier, 15, 3, 64, 64) < TOLERANCE
    with pytest.raises(RuntimeError, match="failed with error"):
        exported(pixel_values=torch.zeros(16, 3, 64, 64))
    fixed = export("executorch", classifier, axes=(), shape=(16, 3, 64, 64))
    assert error(fixed, classifier, 16, 3, 64, 64) < TOLERANCE
