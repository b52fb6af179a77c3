"""Eight bits: a trained model keeps its answers, in a quarter of the bytes."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hf_poolformer.commands.export import main
from hf_poolformer.export import load
from hf_poolformer.export.format import Layer
from hf_poolformer.export.onnx import store_integers
from hf_poolformer.export.quantisation import groups


@pytest.mark.slow
@pytest.mark.parametrize("format", ["openvino", "onnx"])
def test_trained_digits(format, all_digits, make_settings, tmp_path, capsys):
    """Agreement and accuracy on digits that neither training nor calibration has seen."""
    from hf_poolformer.training.loop import train

    settings = make_settings(
        dataset_name=str(all_digits),
        output_dir=str(tmp_path / "run"),
        num_train_epochs=12,
        config_overrides=json.dumps(
            {
                "depths": [1, 1, 2, 1],
                "hidden_sizes": [32, 64, 96, 128],
                "patch_sizes": [3, 3, 3, 3],
                "strides": [2, 2, 2, 2],
                "padding": [1, 1, 1, 1],
                "layer_scale_init_value": 0.1,
            }
        ),
    )
    train(settings)
    arguments = [str(tmp_path / "run"), str(tmp_path / "out"), "--format", format, "--precision", "int8"]
    arguments += ["--calibration_dataset", str(all_digits), "--calibration_split", "test"]
    assert main([*arguments, "--calibration_size", "100", "--verification_size", "260"]) == 0
    report = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert report["agreement"] >= 0.98
    assert report["accuracy"] >= report["accuracy_before"] - 0.005
    weights = sum(file.stat().st_size for file in (tmp_path / "out").glob("model.*") if file.suffix != ".xml")
    # A quarter, and the graph itself, which of a model this small is a part.
    assert weights <= 0.32 * report["size_before"]
    assert load(tmp_path / "out")(torch.randn(2, 3, 32, 32)).logits.shape == (2, 10)


def test_which_layers_are_left_out_next():
    layers = [Layer("stem", True), Layer("fc1", False), Layer("down", True), Layer("head", False)]
    assert list(groups(layers).values()) == [[], ["stem", "head"], ["stem", "head", "down"]]


def test_integers_in_the_file():
    """The graph computes the same when its weights are stored as what they are quantised to."""
    import onnxruntime

    generator = np.random.default_rng(0)
    weight = generator.standard_normal((4, 3, 1, 1)).astype(np.float32)
    scale = (np.abs(weight).max((1, 2, 3)) / 127).astype(np.float32)
    constants = {"w": weight, "s": scale, "z": np.zeros(4, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=0),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], axis=0),
        helper.make_node("Conv", ["x", "d"], ["y"]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size, 2, 2]) for name, size in (("x", 3), ("y", 4))
    ]
    graph = helper.make_graph(
        nodes, "g", values[:1], values[1:], [numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = {"x": generator.standard_normal((1, 3, 2, 2)).astype(np.float32)}
    (before,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, x)
    store_integers(model)
    onnx.checker.check_model(model)
    assert "QuantizeLinear" not in {node.op_type for node in model.graph.node}
    assert {tensor.name: tensor.data_type for tensor in model.graph.initializer}["q"] == TensorProto.INT8
    (after,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, x)
    assert np.array_equal(before, after)
