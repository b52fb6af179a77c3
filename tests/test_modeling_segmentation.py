"""Semantic segmentation: sizes, losses against plain computation, saving, pipelines, PyTorch's machinery."""

import copy
import json

import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from hf_poolformer import (
    MetaFormerConfig,
    MetaFormerForSemanticSegmentation,
    PoolFormerBackbone,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerForSemanticSegmentation,
    PoolFormerImageProcessor,
)


SMALL_HEAD = {"fpn_feature_size": 12, "decoder_hidden_size": 8}


def segmenter(config: MetaFormerConfig) -> MetaFormerForSemanticSegmentation:
    for name, value in SMALL_HEAD.items():
        setattr(config, name, value)
    poolformer = config.model_type == "poolformer"
    return (PoolFormerForSemanticSegmentation if poolformer else MetaFormerForSemanticSegmentation)(config)


@pytest.fixture
def model(poolformer_config, scramble) -> PoolFormerForSemanticSegmentation:
    return scramble(segmenter(poolformer_config))


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


# --- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "millions"), [("s12", 15.7), ("s24", 25.1), ("s36", 34.6), ("m36", 59.8)])
def test_parameters_are_those_of_the_paper(variant, millions):
    """
    Table 5 of arXiv 2111.11418. It gives 23.2 for S24, with which its own S12, S36 and M36 do not agree: from one S to
    the next come 9.47 million parameters of blocks (table 1), and the head is the same.
    """
    with torch.device("meta"):
        config = PoolFormerConfig.from_variant(f"poolformer_{variant}", num_labels=150)
        model = PoolFormerForSemanticSegmentation(config)
    assert round(model.num_parameters() / 1e6, 1) == millions


def test_initialisation_is_that_of_mmsegmentation():
    model = PoolFormerForSemanticSegmentation(PoolFormerConfig(num_labels=150, depths=(1, 1, 1, 1)))
    for name, parameter in (*model.neck.named_parameters(), *model.decode_head.named_parameters()):
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name.startswith("classifier"):
            assert parameter.detach().std() == pytest.approx(0.01, rel=0.05), name
        else:
            outputs, inputs, *kernel = parameter.shape
            taps = kernel[0] * kernel[1]
            xavier = "lateral" in name or "fpn" in name
            std = (2 / ((inputs + outputs) * taps)) ** 0.5 if xavier else (2 / (outputs * taps)) ** 0.5
            assert parameter.detach().std() == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize("size", [(64, 64), (70, 101), (33, 250)])
def test_loss_is_the_mean_over_pixels_that_count(size, model):
    pixel_values, labels = torch.randn(2, 3, *size), torch.randint(0, 10, (2, *size))
    labels[torch.rand(labels.shape) < 0.3] = 255
    output = model(pixel_values, labels=labels)
    assert output.logits.shape == (2, 10, (size[0] - 3) // 4 + 1, (size[1] - 3) // 4 + 1)
    upsampled = F.interpolate(output.logits, size=size, mode="bilinear", align_corners=False)
    log_probabilities = upsampled.log_softmax(1).permute(0, 2, 3, 1)
    counted = labels != 255
    wanted = -log_probabilities[counted].gather(1, labels[counted][:, None]).mean()
    torch.testing.assert_close(output.loss, wanted)


def test_labels_may_have_another_size_and_ignore_index(poolformer_config):
    poolformer_config.semantic_loss_ignore_index = -100
    model = segmenter(poolformer_config).eval()
    labels = torch.randint(0, 10, (1, 50, 40))
    labels[:, :25] = -100
    output = model(torch.randn(1, 3, 64, 64), labels=labels)
    upsampled = F.interpolate(output.logits, size=(50, 40), mode="bilinear", align_corners=False)
    torch.testing.assert_close(output.loss, F.cross_entropy(upsampled[:, :, 25:], labels[:, 25:]))


def test_an_image_without_labels_gives_no_nan(model):
    model.train()
    labels = torch.full((2, 64, 64), 255)
    loss = model(torch.randn(2, 3, 64, 64), labels=labels).loss
    assert loss == 0
    loss.backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


@pytest.mark.parametrize("size", [(64, 64), (70, 101)])
def test_gradients_reach_every_parameter_with_and_without_checkpointing(config, size):
    if {"spatial_mlp", "random"} & set(config.token_mixers) and size != (64, 64):
        pytest.skip("made for one size")
    config.classifier_dropout_prob = 0.0
    model = segmenter(config).train()
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable()
    pixel_values, labels = torch.randn(2, 3, *size), torch.randint(0, 10, (2, *size))
    for each in (model, again):
        each(pixel_values, labels=labels).loss.backward()
    wanted = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # A shift before pooling is what pooling subtracts again: its gradient is zero.
            shift = "pooling" in config.token_mixers and name.endswith("before_norm.bias")
            assert shift or parameter.grad.any(), name
            torch.testing.assert_close(parameter.grad, wanted[name].grad, msg=name)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((1, 32, 32), 10), r"0\.\.9 .*contain \[10\]"),
        (torch.full((1, 32, 32), -1), r"contain \[-1\]"),
        (torch.zeros(1, 1, 32, 32, dtype=torch.long), "batch, height, width"),
        (torch.zeros(2, 32, 32, dtype=torch.long), "with 1 images"),
    ],
)
def test_wrong_labels_are_described(labels, message, model):
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 3, 32, 32), labels=labels)


def test_one_class_is_refused(poolformer_config):
    poolformer_config.num_labels = 1
    with pytest.raises(ValueError, match="two classes"):
        segmenter(poolformer_config)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_save_and_load_are_bit_equal(config, scramble, tmp_path):
    model = scramble(segmenter(config))
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config.fpn_feature_size == 12


def test_classifiers_and_backbones_give_their_weights(poolformer_config, scramble, tmp_path):
    classifier = scramble(PoolFormerForImageClassification(poolformer_config))
    classifier.save_pretrained(tmp_path / "classifier")
    segmenter, report = PoolFormerForSemanticSegmentation.from_pretrained(
        tmp_path / "classifier", num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert not any("encoder" in key for key in report["missing_keys"])
    wanted = classifier.state_dict()
    encoder = {name: tensor for name, tensor in segmenter.state_dict().items() if "encoder" in name}
    assert encoder
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in encoder.items())
    # And back: the backbone of a segmenter, with its norms.
    scramble(segmenter).save_pretrained(tmp_path / "segmenter")
    backbone = PoolFormerBackbone.from_pretrained(tmp_path / "segmenter", out_indices=[1, 2, 3, 4]).eval()
    pixel_values = torch.randn(1, 3, 64, 64)
    for got, kept in zip(
        backbone(pixel_values).feature_maps, segmenter.poolformer(pixel_values).feature_maps, strict=True
    ):
        assert relative_error(got, kept) < 1e-6


def test_the_head_takes_all_stages_whatever_the_configuration_names(poolformer_config):
    poolformer_config.out_features = ["stage2"]
    model = segmenter(poolformer_config)
    assert model.poolformer.out_features == ["stage1", "stage2", "stage3", "stage4"]
    assert poolformer_config.out_features == ["stage2"]


def test_other_numbers_of_stages():
    config = PoolFormerConfig(depths=(1, 1, 1), hidden_sizes=(8, 16, 32), num_encoder_blocks=3, num_labels=4)
    assert segmenter(config)(torch.randn(1, 3, 64, 96)).logits.shape == (1, 4, 16, 24)


def test_a_classifier_s_folder_has_none_of_the_dense_heads(poolformer_config, tmp_path):
    PoolFormerForImageClassification(poolformer_config).save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert not {"modeling_segmentation.py", "modeling_detection.py"} & files
    content = json.loads((tmp_path / "config.json").read_text())
    assert not any("Segmentation" in name or "Detection" in name for name in content["auto_map"])
    assert not any(name.startswith(("fpn_", "rpn_", "roi_", "decoder_")) for name in content)


LOAD = """
import sys, torch, transformers
folder = sys.argv[1]
model = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
with torch.no_grad():
    pixel_values, wanted = torch.load(folder + "/logits.pt", weights_only=True)
    got = model(pixel_values).logits
assert ((got - wanted).abs().max() / wanted.abs().max()).item() < 1e-6
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True, out_indices=[1, 4])
backbone = transformers.AutoBackbone.from_config(config, trust_remote_code=True)
assert len(backbone(pixel_values).feature_maps) == 2
assert not any("detection" in name for name in sys.modules if name.startswith("transformers_modules."))
segment = transformers.pipeline("image-segmentation", folder, trust_remote_code=True)
found = segment(folder + "/image.png")
assert found and all(each["mask"].size == (70, 50) for each in found), found
model.save_pretrained(folder + "/again")
"""


@pytest.mark.parametrize("model_type", ["poolformer", pytest.param("metaformer", marks=pytest.mark.slow)])
def test_remote_code_in_a_process_without_the_package(model_type, scramble, tmp_path, run_python):
    config_class = PoolFormerConfig if model_type == "poolformer" else MetaFormerConfig
    model = scramble(segmenter(config_class(depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 32, 64), num_labels=3)))
    model.save_pretrained(tmp_path)
    PoolFormerImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False).save_pretrained(tmp_path)
    Image.new("RGB", (70, 50), (90, 10, 10)).save(tmp_path / "image.png")
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.save((pixel_values, model(pixel_values).logits), tmp_path / "logits.pt")
    run_python(LOAD, tmp_path, without_package=True)
    first, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in (".", "again"))
    assert first["auto_map"] == again["auto_map"]
    assert (tmp_path / "again" / "modeling_segmentation.py").exists()


@pytest.mark.parametrize("subtask", [None, "semantic"])
def test_pipeline(subtask, scramble, tmp_path, capfd):
    id2label = {0: "sky", 1: "sea", 2: "land"}
    config = PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 32, 64), id2label=id2label)
    model = scramble(segmenter(config))
    model.save_pretrained(tmp_path)
    processor = PoolFormerImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    processor.save_pretrained(tmp_path)
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    segment = transformers.pipeline("image-segmentation", str(tmp_path))
    assert type(segment.model) is PoolFormerForSemanticSegmentation
    assert "is not supported" not in capfd.readouterr().err
    found = segment(image, **({"subtask": subtask} if subtask else {}))
    with torch.no_grad():
        logits = model(**processor(image, return_tensors="pt")).logits
    wanted = F.interpolate(logits, size=(60, 90), mode="bilinear", align_corners=False)[0].argmax(0)
    assert {each["label"] for each in found} == {id2label[i] for i in wanted.unique().tolist()}
    for each in found:
        mask = pil_to_tensor(each["mask"])[0] > 0
        (label,) = (index for index, name in id2label.items() if name == each["label"])
        assert torch.equal(mask, wanted == label)


# --- PyTorch's machinery ---------------------------------------------------------------------------------------------


def test_compiles_to_one_graph_forward_and_backward(model):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    pixel_values, labels = torch.randn(2, 3, 64, 96), torch.randint(0, 10, (2, 64, 96))
    gradients = []
    for each in (compiled, model):
        model.zero_grad()
        each(pixel_values, labels=labels).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


DYNAMIC = {
    0: torch.export.Dim("batch", max=512),
    2: torch.export.Dim("height", min=64, max=2048),
    3: torch.export.Dim("width", min=64, max=2048),
}
SIZES = [(1, 3, 64, 64), (3, 3, 225, 170)]


@pytest.mark.slow  # tests/export/test_run.py exports one as well
def test_exports_with_dynamic_batch_and_size(model):
    exported = torch.export.export(
        model, (), {"pixel_values": torch.randn(2, 3, 96, 128)}, dynamic_shapes={"pixel_values": DYNAMIC}
    ).module()
    for size in SIZES:
        pixel_values = torch.randn(size)
        got, wanted = exported(pixel_values=pixel_values).logits, model(pixel_values).logits
        # float32, summed in another order; a logit near zero is the difference of larger ones.
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.slow
def test_exports_to_onnx_with_dynamic_batch_and_size(model, tmp_path):
    runtime = pytest.importorskip("onnxruntime")

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model(pixel_values).logits

    path = str(tmp_path / "model.onnx")
    torch.onnx.export(
        Logits().eval(),
        (torch.randn(2, 3, 96, 128),),
        path,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes=(DYNAMIC,),
        dynamo=True,
        verbose=False,
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in SIZES:
        pixel_values = torch.randn(size)
        (got,) = session.run(None, {"pixel_values": pixel_values.numpy()})
        assert relative_error(torch.from_numpy(got), model(pixel_values).logits) < 1e-4


def test_bfloat16(model):
    pixel_values, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 10, (2, 64, 64))
    wanted = model(pixel_values, labels=labels)
    got = copy.deepcopy(model).bfloat16()(pixel_values.bfloat16(), labels=labels)
    # bfloat16 has 8 bits of mantissa; fifteen products deep.
    assert relative_error(got.logits.float(), wanted.logits) < 0.1
    assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=0.05)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = model(pixel_values, labels=labels)
    assert trained.loss.dtype == torch.float32
    trained.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_channels_last_is_kept(model):
    pixel_values = torch.randn(2, 3, 64, 64)
    wanted = model(pixel_values).logits
    got = model.to(memory_format=torch.channels_last)(pixel_values.to(memory_format=torch.channels_last)).logits
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_batch_norms_can_be_synchronised(model):
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 7
    assert all(name.startswith("decode_head.") for name in norms)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == 7


def test_it_learns(poolformer_config):
    """Bright pixels from dark ones, in forty steps."""
    poolformer_config.num_labels = 2
    model = segmenter(poolformer_config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(41):
        blocks = (torch.rand(4, 1, 8, 8) > 0.5).float()
        pixel_values = F.interpolate(blocks, scale_factor=8.0).expand(-1, 3, -1, -1)
        labels = pixel_values[:, 0].long()
        if step == 40:
            break
        model(pixel_values, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model.eval()(pixel_values).logits
    predicted = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False).argmax(1)
    assert (predicted == labels).float().mean() > 0.95
