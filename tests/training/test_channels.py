"""Training on images that are not RGB, from checkpoints that are: stems, transforms, and one run from end to end."""

import csv
import json
import random
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from multispectral import multispectral
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from hf_poolformer import PoolFormerImageProcessor
from hf_poolformer.commands.evaluate import main as evaluate
from hf_poolformer.commands.explain import main as explain
from hf_poolformer.commands.export import main as export
from hf_poolformer.commands.predict import main as predict
from hf_poolformer.commands.train import main as train_command
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.settings.classification import ClassificationSettings
from hf_poolformer.training.augmentation import TrainTransform
from hf_poolformer.training.channels import adapt_stem, adapt_weight, in_channels
from hf_poolformer.training.loop import train


tifffile = pytest.importorskip("tifffile")


# Stems -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7])
def test_weights_as_timm_adapts_them(number):
    manipulate = pytest.importorskip("timm.models._manipulate")
    weight = torch.randn(8, 3, 5, 5)
    assert torch.equal(adapt_weight(weight, number), manipulate.adapt_input_conv(number, weight))


def test_what_comes_out_keeps_its_size():
    weight, grey = torch.randn(8, 3, 5, 5).double(), torch.randn(2, 1, 9, 9).double()
    for number in (1, 2, 3, 4, 6):
        out = torch.nn.functional.conv2d(grey.expand(-1, number, -1, -1), adapt_weight(weight, number))
        assert out.shape == (2, 8, 5, 5)
        if number in (1, 3, 6):  # of whole repetitions a grey image makes the same of each
            right = torch.nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight)
            assert torch.allclose(out, right, rtol=1e-5, atol=1e-5)  # the weights are added in float32


TINY = {"num_labels": 3, "image_size": 32}
FOREIGN = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, patch_size=8, **TINY)
    ),
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, **TINY)),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(embed_dim=8, depths=[1], num_heads=[2], window_size=4, **TINY)
    ),
}


@pytest.mark.parametrize("kind", ["poolformer", "poolformerv2_s12", "caformer_s18", *FOREIGN])
def test_a_grey_stem_answers_as_the_colours_did(kind, make_checkpoint):
    if kind in FOREIGN:
        model = FOREIGN[kind]().eval()
    else:
        folder = make_checkpoint(metaformer=None if kind == "poolformer" else kind)
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        right = model(grey.expand(-1, 3, -1, -1)).logits
        adapted = adapt_stem(model, 1)
        assert adapted.config.num_channels == 1 and model.config.num_channels == 3 and not adapted.training
        assert torch.allclose(adapted(grey).logits, right, rtol=1e-3, atol=1e-4)  # float32, another order of sums
        assert adapt_stem(model, 5)(grey.expand(-1, 5, -1, -1)).logits.shape == right.shape


def test_stems_that_cannot_be_told():
    timm = pytest.importorskip("timm")
    assert timm
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet10t", num_labels=3))
    with pytest.raises(UserError, match="has no num_channels"):
        adapt_stem(model, 1)


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 48, "width": 32}),
        ConvNextImageProcessor(size={"shortest_edge": 48}),
    ],
)
def test_processors_of_other_models(processor):
    """Of an image that is grey, the processor for one channel makes the same as theirs of its colours."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    processor.image_mean, processor.image_std = [0.3] * 3, [0.2] * 3
    theirs = processor(Image.fromarray(pixels).convert("RGB"), return_tensors="pt")["pixel_values"][0]
    ours = in_channels(processor, 1)(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    assert ours.shape == (1, *theirs.shape[1:])
    level = 1 / 255 / 0.2
    assert (ours - theirs[:1]).abs().max() < 1.5 * level  # both round to 8 bits after each axis


# Transforms ------------------------------------------------------------------------------------------------------


def settings_of(**changes) -> ClassificationSettings:
    augmentation = {
        "crop_min_scale": 0.3,
        "affine_degrees": 20.0,
        "rand_augment_magnitude": 9.0,
        "rand_augment_ops": 3,
        "random_erasing": 0.0,
    }
    return ClassificationSettings.from_recipe(
        "finetune", output_dir="unused", train_dir="unused", **{**augmentation, **changes}
    )


def processor_of(number: int | None) -> PoolFormerImageProcessor:
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return PoolFormerImageProcessor(num_channels=number, image_mean=[0.5], image_std=[0.25], **size)


def transformed(transform: TrainTransform, pixels, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    random.seed(seed)
    draws = transform.draw(*pixels.shape[:2])
    return transform.normalise(transform.augment(transform.crop(pixels, draws)[None], [draws]), [draws])[0]


def test_grey_images_are_augmented_as_in_colour():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 1), dtype=np.uint8)
    colours, grey = (TrainTransform(settings_of(), processor_of(number)) for number in (None, 1))
    level = 1 / 255 / 0.25
    for seed in range(20):
        right = transformed(colours, np.repeat(pixels, 3, 2), seed)
        made = transformed(grey, pixels, seed)
        # Two ways of moving cut off what float32 has rounded, and a colour operation may then steepen a level.
        assert made.shape == (1, 32, 32) and ((made - right[:1]).abs() < 1.01 * level).float().mean() > 0.99


@pytest.mark.parametrize("number", [2, 4, 5])
def test_channels_move_together_and_keep_their_colours(number):
    """Each channel is moved as if it were alone; floats are not rounded."""
    settings = settings_of(random_erasing=1.0)
    transform = TrainTransform(settings, processor_of(number))
    assert set(transform.rand_augment.names) == {"rotate", "shear_x", "shear_y", "shift_x", "shift_y"}
    pixels = np.random.default_rng(0).random((40, 50, 1), dtype=np.float32) * 255
    channels = np.concatenate([pixels * (index + 1) / number for index in range(number)], 2)
    erased = 0
    for seed in range(10):
        made = transformed(transform, channels, seed) * 0.25 + 0.5
        inside = (made[-1] > 0) & (made.std(0) > 0)
        share = (made[0] / made[-1] * number)[inside]
        # Fill and noise are no multiples; bicubic overshoots are clipped.
        assert made.shape == (number, 32, 32) and ((share - 1).abs() < 1e-3).float().mean() > 0.4
        erased += int((made < -0.2).any())
    assert erased > 5


# Runs ------------------------------------------------------------------------------------------------------------


def test_from_colours_to_four_channels(make_checkpoint, tmp_path, capsys, monkeypatch):
    """Training, evaluation, prediction, explanation, export, pipeline and card of a model of four channels."""
    multispectral(tmp_path / "data")
    odd = np.zeros((40, 40, 5), np.uint16)
    tifffile.imwrite(tmp_path / "data" / "dry" / "odd.tif", odd, photometric="minisblack", planarconfig="contig")
    checkpoint, run = make_checkpoint(), tmp_path / "run"
    flags = f"--recipe demo --model_name_or_path {checkpoint} --train_dir {tmp_path / 'data'} --num_channels 4"
    flags += (
        f" --output_dir {run} --num_train_epochs 6 --per_device_train_batch_size 8 --num_workers 0 --eval_epochs 0"
    )
    flags += " --rand_augment_magnitude 6 --max_skipped 2 --train_val_split 0.25 --shuffle_buffer_size 50"
    assert train_command(flags.split()) == 0
    results = json.loads((run / "all_results.json").read_text())
    assert results["eval_accuracy"] == 1.0
    processor, model = AutoImageProcessor.from_pretrained(run), AutoModelForImageClassification.from_pretrained(run)
    assert processor.num_channels == model.config.num_channels == 4
    assert np.allclose(processor.image_mean, [3000 / 65535] * 3 + [4000 / 65535], rtol=0.05)
    capsys.readouterr()

    assert evaluate([str(run), "--dataset_name", str(tmp_path / "data"), "--max_skipped", "2", "--json"]) == 0
    answer = capsys.readouterr()
    assert json.loads(answer.out[answer.out.index("{") :])["eval_accuracy"] == 1.0

    table = tmp_path / "predictions.csv"
    common = ["--num_workers", "0", "--output", str(table), "--overwrite"]
    for name in (run, tmp_path / "export"):
        if name != run:
            assert export([str(run), str(name), "--format", "onnx"]) == 0
        assert predict([str(name), str(tmp_path / "data"), *common]) in (0, 1)
        rows = {row["path"]: row for row in csv.DictReader(table.open(newline=""))}
        broken = [row for row in rows.values() if row["error"]]
        assert len(rows) == 49 and [row["path"].endswith("odd.tif") for row in broken] == [True]
        assert "5 channels" in broken[0]["error"] and "takes 4" in broken[0]["error"]
        assert all(f"/{row['label']}/" in path for path, row in rows.items() if not row["error"])
    image = str(tmp_path / "data" / "wet" / "0.tif")
    assert predict([str(run), image, "--embeddings", *common]) == 0
    (row,) = csv.DictReader(table.open(newline=""))
    assert len(json.loads(row["embedding"])) == model.config.hidden_sizes[-1]
    found = pipeline("image-classification", model=str(run))(image)
    assert found[0]["label"] == "wet"
    assert explain([str(run), image, "--output", str(tmp_path / "explained.png")]) == 0
    assert explain([str(run), str(tmp_path / "data" / "dry" / "odd.tif"), "--output", str(tmp_path / "x.png")]) == 2

    (tmp_path / "image.tif").write_bytes(Path(image).read_bytes())
    snippets = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for snippet in snippets:
        (tmp_path / "snippet.py").write_text(re.sub(r'(model=|pretrained\()"[^"]*"', rf'\1"{run}"', snippet))
        runpy.run_path(str(tmp_path / "snippet.py"))
        assert "wet" in capsys.readouterr().out
    assert len(snippets) == 2


def test_grey_from_colours_and_on_from_there(make_settings_from, make_checkpoint, tmp_path):
    """A run on grey digits keeps its statistics when it is resumed, and a run from it needs no flag."""
    grey = make_settings_from(make_checkpoint(), num_channels=1, num_train_epochs=1)
    train(grey)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert processor.num_channels == 1 and len(processor.image_mean) == 1
    again = make_settings_from(str(tmp_path / "run"), output_dir=str(tmp_path / "again"), max_train_steps=1)
    train(again)
    assert AutoImageProcessor.from_pretrained(tmp_path / "again").image_mean == processor.image_mean
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "again").config.num_channels == 1


def test_statistics_of_the_checkpoint(make_settings_from, make_checkpoint, tmp_path):
    train(make_settings_from(make_checkpoint(), num_channels=1, image_statistics="checkpoint", max_train_steps=1))
    assert AutoImageProcessor.from_pretrained(tmp_path / "run").image_mean == pytest.approx([0.449], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "itself"}, "--teacher is for RGB"),
        ({"device_preprocessing": "augment"}, "--device_preprocessing augment is for RGB"),
        ({"num_channels": 4}, "1 channel .*takes 4"),
        ({"num_channels": None, "config_overrides": '{"num_channels": 1}'}, "--num_channels"),
    ],
)
def test_refused(changes, message, make_settings_from, make_checkpoint):
    checkpoint = make_checkpoint()
    changes = {name: checkpoint if value == "itself" else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        train(make_settings_from(checkpoint, **{"num_channels": 1, **changes}))
