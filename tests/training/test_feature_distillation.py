"""Students of a teacher's features, on images that have no labels."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from digits import TINY_MODEL, digit_rows
from killed import assert_same, losses, run
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_poolformer import PoolFormerImageProcessor
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.processes import Stopped
from hf_poolformer.foundation.tasks import FEATURE_DISTILLATION
from hf_poolformer.prediction.run import predict
from hf_poolformer.settings.command_line import parse
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training import loop
from hf_poolformer.training.feature_distillation import MEASURED, SimilarityJudge, load_feature_teacher
from hf_poolformer.training.loop import train
from hf_poolformer.training.preparation import training_accelerator


COLOURS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.2, 0.3]}


def resnet():
    """Its map has 16 channels; 24 px a side."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config), ViTImageProcessor(size={"height": 24, "width": 24}, **COLOURS)


def vit():
    """Trained as a classifier, whose pooler is nobody's."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
    return ViTForImageClassification(config), ViTImageProcessor(size={"height": 16, "width": 16}, **COLOURS)


def timm():
    """As in a checkpoint of timm's, without a processor of its own."""
    pytest.importorskip("timm")
    normalisation = {"input_size": [3, 32, 32], "mean": COLOURS["image_mean"], "std": COLOURS["image_std"]}
    config = {"architecture": "test_resnet", "num_classes": 3, "label_names": ["a", "b", "c"]}
    model = TimmWrapperForImageClassification(
        TimmWrapperConfig.from_dict({**config, "pretrained_cfg": {**normalisation, "crop_pct": 1.0}})
    )
    return model, None


# What each gives, written down with its own parts.
FEATURES = {
    resnet: lambda model, pixels: model.resnet(pixels).last_hidden_state.mean((2, 3)),
    vit: lambda model, pixels: model.vit(pixels).last_hidden_state[:, 0],
    timm: lambda model, pixels: model.timm_model.forward_head(
        model.timm_model.forward_features(pixels), pre_logits=True
    ),
}


@pytest.fixture
def make_teacher(tmp_path):
    """Saves a classifier with random weights, and returns its folder."""

    def make(build=resnet, name="teacher"):
        model, processor = build()
        model.save_pretrained(tmp_path / name)
        if processor is not None:
            processor.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.fixture
def make_distillation(make_settings, make_teacher):
    """As `make_settings`, for features of the digits."""

    def make(**changes) -> TrainingSettings:
        if "teacher" not in changes:
            changes["teacher"] = make_teacher()
        return make_settings(**{"task": FEATURE_DISTILLATION, **changes})

    return make


def cosine_and_derivative(p, t):
    """Of each row of p and t, and what the mean of 1 - cos changes by with p; float64, derived by hand."""
    length, others = np.linalg.norm(p, axis=1, keepdims=True), np.linalg.norm(t, axis=1, keepdims=True)
    cosine = (p * t).sum(1, keepdims=True) / (length * others)
    return cosine[:, 0], -(t / (length * others) - cosine * p / length**2) / len(p)


def with_a_dead_channel():
    model, processor = resnet()
    for name, parameter in model.named_parameters():
        if "stages.1" in name and "normalization" in name and ("shortcut" in name or "layer.1" in name):
            parameter.data[0] = -1.0 if name.endswith("bias") else 0.0
    return model, processor


def test_loss_and_gradient_are_the_formulas(make_distillation, make_teacher, tmp_path, monkeypatch):
    step, seen = loop.optimiser_step, {}

    def checked(run, window):
        (batch,), model, teacher = window, run.state.model, run.task.teacher
        with torch.no_grad():
            features = model(pixel_values=batch["pixel_values"]).last_hidden_state.mean((2, 3)).double().numpy()
            given = teacher.model(teacher.adapt(batch["pixel_values"])).last_hidden_state.mean((2, 3)).double().numpy()
        normed = features - features.mean(1, keepdims=True)
        normed /= np.sqrt((normed**2).mean(1, keepdims=True) + 1e-5)
        weight, bias = (values.detach().double().numpy() for values in model.projection.parameters())
        choices = run.progress.choices
        assert not given[:, 0].any() and choices["teacher_mean"][0] == 0 and choices["teacher_std"][0] > 0
        wanted = (given - np.array(choices["teacher_mean"])) / np.array(choices["teacher_std"])
        cosine, derivative = cosine_and_derivative(normed @ weight.T + bias, wanted)
        (loss,) = run.task.losses(run, batch)
        assert loss.item() == pytest.approx((1 - cosine).mean(), rel=1e-4)  # float32
        loss.backward()
        expected = derivative.T @ normed
        found = model.projection.weight.grad.double().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        run.state.optimizer.zero_grad()
        seen["compared"] = True
        return step(run, window)

    monkeypatch.setattr(loop, "optimiser_step", checked)
    train(make_distillation(teacher=make_teacher(with_a_dead_channel), max_train_steps=1))
    assert seen
    # The digits have labels, of which the encoder knows nothing.
    config = AutoModel.from_pretrained(tmp_path / "run").config
    assert not config.id2label and not config.label2id


@pytest.mark.parametrize("build", FEATURES)
def test_features_are_those_of_the_teacher(make_distillation, make_teacher, build):
    """On a batch that was normalised for the student, against what the teacher's own processor makes of the image."""
    settings = make_distillation(teacher=make_teacher(build))
    students = PoolFormerImageProcessor(size={"shortest_edge": 32}, crop_size=32, crop_pct=1.0)
    teacher = load_feature_teacher(settings, students, training_accelerator(settings, fsdp=False))
    model, processor = type(build()[0]).from_pretrained(settings.teacher).eval(), build()[1]
    image = Image.fromarray(np.full((32, 32, 3), (200, 100, 50), dtype=np.uint8))  # which resizing leaves as it is
    if processor is None:
        mean, std = (torch.tensor(COLOURS[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        pixels = ((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std)[None]
    else:
        pixels = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = FEATURES[build](model, pixels)
    found = teacher(students(image, return_tensors="pt")["pixel_values"])
    assert not found.requires_grad and not any(p.requires_grad for p in teacher.model.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_folder_without_labels_to_a_classifier(make_distillation, make_settings_from, tmp_path, capsys, caplog):
    """Images in no folders for classes; the encoder is then loaded, asked for features, and fine-tuned."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, row in enumerate(digit_rows()[:240]):
        (pictures / f"{index:03}.png").write_bytes(row["image"]["bytes"])
    settings = make_distillation(dataset_name=None, train_dir=str(pictures), num_train_epochs=4, eval_epochs=1)
    results = train(settings)
    folder = tmp_path / "run"
    told = capsys.readouterr().out
    assert "feature-distillation: 0.04M parameters, " in told and " training images at 32x32" in told
    assert 'pipeline("image-feature-extraction"' in told
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    course = [row["eval_similarity"] for row in rows if "eval_similarity" in row]
    assert len(course) == 4 and course[-1] > course[0] + 0.05 and course[-1] == results["eval_similarity"]
    assert results["eval_loss"] == pytest.approx(1 - results["eval_similarity"])
    assert results["eval_samples"] == 240 - training_images(told)
    card = (folder / "README.md").read_text()
    assert "image encoder, " in card and "with teacher as the teacher (feature distillation)" in card
    assert "| Similarity to the teacher |" in card and str(tmp_path) not in card

    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__ == "PoolFormerModel" and not hasattr(model, "projection")
    saved, kept = (
        load_file(path / "model.safetensors") for path in (folder, max((folder / "checkpoints").iterdir(), key=str))
    )
    assert kept.keys() - saved.keys() == {"projection.weight", "projection.bias"}

    predict(str(folder), [pictures], tmp_path / "e.jsonl", embeddings=True, num_workers=0, progress=False)
    rows = (tmp_path / "e.jsonl").read_text().splitlines()
    assert len(rows) == 240 and len(json.loads(rows[0])["embedding"]) == TINY_MODEL["hidden_sizes"][-1]

    tuned = make_settings_from(str(folder), output_dir=str(tmp_path / "tuned"), max_train_steps=1, learning_rate=0.0)
    train(tuned)
    assert [record.message for record in caplog.records if "head" in record.message] == [
        "New head: the checkpoint is an encoder, without one."
    ]
    classifier = load_file(tmp_path / "tuned/model.safetensors")
    assert {name.removeprefix("poolformer.") for name in classifier} - saved.keys() == {
        "classifier.weight",
        "classifier.bias",
        "norm.weight",
        "norm.bias",
    }
    assert all(torch.equal(tensor, classifier[f"poolformer.{name}"]) for name, tensor in saved.items())


def training_images(told):
    """The training images that a run said it has."""
    return int(told.split(" training images at")[0].split()[-1])


SETTINGS = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 3,
    "logging_steps": 1,
    "shuffle_buffer_size": 40,
    "crop_min_scale": 0.5,
    "random_erasing": 0.5,
    "drop_path_rate": 0.2,
    "ema_decay": 0.9,
    "resume_from_checkpoint": "latest",
}


def test_stopped_and_resumed_is_the_same_run(make_distillation, make_teacher, tmp_path, monkeypatch):
    changes = {**SETTINGS, "teacher": make_teacher()}
    train(make_distillation(**changes, output_dir=str(tmp_path / "whole")))
    step = loop.optimiser_step

    def stopped(run, window):
        if run.progress.step == 9:  # within the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, window)

    parts = make_distillation(**changes, output_dir=str(tmp_path / "parts"))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "optimiser_step", stopped)
        train(parts)
    train(parts)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    last = max((tmp_path / "whole/checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1])).name
    assert_same_weights(*(tmp_path / run / "checkpoints" / last for run in ("parts", "whole")))
    averages = [
        torch.load(tmp_path / run / "checkpoints" / last / "state.pt")["ema"]["weights"]["projection.weight"]
        for run in ("parts", "whole")
    ]
    assert torch.equal(*averages)
    other = make_teacher(vit, "other")
    with pytest.raises(UserError, match="with another --teacher"):
        train(make_distillation(**{**changes, "teacher": other}, output_dir=str(tmp_path / "parts")))


def assert_same_weights(mine, theirs):
    weights, expected = (load_file(folder / "model.safetensors") for folder in (mine, theirs))
    assert "projection.weight" in weights and weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


@pytest.mark.slow
def test_two_processes_are_one(make_distillation, make_teacher, tmp_path):
    """Each with half of the images of a step: the same first losses up to the order of sums, then nearly so."""
    changes = {"teacher": make_teacher(), "max_train_steps": 6, "logging_steps": 1, "total_train_batch_size": 320}
    changes |= {"per_device_train_batch_size": 320, "num_train_epochs": 6, "affine_degrees": 0.0}
    changes |= {"affine_translate": 0.0, "affine_scale": 0.0}  # all images in each step, none moved
    for count in (1, 2):
        assert run(make_distillation(**changes, output_dir=str(tmp_path / f"of-{count}")), count)
    one, two = (losses(tmp_path / f"of-{count}") for count in (1, 2))
    assert one[0] == pytest.approx(two[0], rel=1e-4) and one == pytest.approx(two, rel=1e-2)


def test_the_command_line_knows_the_task_by_what_is_learned(tmp_path):
    flags = ["--recipe", "demo", "--dataset_name", "x", "--output_dir", "y", "--teacher", "t"]
    for named in (["--distillation", "features"], ["--task", FEATURE_DISTILLATION]):
        settings = parse([*flags, *named])
        assert (settings.task, settings.distillation) == (FEATURE_DISTILLATION, "features")
    assert parse([*flags, "--distillation", "hard"]).task == "image-classification"
    settings.save(tmp_path / "settings.yaml")
    assert parse(["--config_file", str(tmp_path / "settings.yaml")]) == parse(
        [*flags, *named, "--config_file", str(tmp_path / "settings.yaml")]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distillation", "features"], "--task feature-distillation needs a teacher: --teacher MODEL"),
        (["--task", FEATURE_DISTILLATION, "--mixup_alpha", "0.8"], "unknown flag: --mixup_alpha"),
        (["--task", FEATURE_DISTILLATION, "--distillation", "soft"], "--distillation: invalid choice: 'soft'"),
        (["--task", "image-classification", "--distillation", "features"], "invalid choice: 'features'"),
    ],
)
def test_mistakes_in_flags_are_reported(flags, message):
    with pytest.raises(UserError, match=message):
        parse(["--recipe", "demo", "--dataset_name", "x", "--output_dir", "y", *flags])


def test_teachers_that_teach_nothing_are_refused(make_distillation, tmp_path):
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"cannot load an image encoder from .*text"):
        train(make_distillation(teacher=str(tmp_path / "text")))
    resnet()[1].save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="a BertModel gives no features of an image"):
        train(make_distillation(teacher=str(tmp_path / "text")))
    model, processor = resnet()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "constant")
    processor.save_pretrained(tmp_path / "constant")
    with pytest.raises(UserError, match=f"the same features for each of {MEASURED} images"):
        train(make_distillation(teacher=str(tmp_path / "constant")))


def test_similarity_is_that_of_all_processes():
    judges = [SimilarityJudge() for _ in range(2)]
    judges[0].add(torch.tensor([1.0, 0.5, 0.0]))
    judges[1].add(torch.tensor([-0.5]))
    assert SimilarityJudge().compute([judge.state() for judge in judges]) == {
        "eval_similarity": 0.25,
        "eval_loss": 0.75,
    }
