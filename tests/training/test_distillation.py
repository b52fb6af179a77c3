import copy
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    MobileViTImageProcessor,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTImageProcessor,
)

from hf_poolformer import PoolFormerImageProcessor
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.training import loop
from hf_poolformer.training.augmentation import TrainTransform
from hf_poolformer.training.distillation import Teacher, colours, distillation_loss, places_of_labels
from hf_poolformer.training.loop import train
from hf_poolformer.training.preparation import training_accelerator


NAMES = [f"digit {number}" for number in range(10)]


def points(folder):
    """Of the training curve."""
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def softmax(z):
    exponentials = np.exp(z - z.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def expected_gradient(kind, logits, teachers, temperature):
    """Derivative of the distillation loss by the logits (batch, labels), as one derives it by hand; float64."""
    if kind == "hard":
        return (softmax(logits) - np.eye(logits.shape[1])[teachers.argmax(1)]) / len(logits)
    return temperature * (softmax(logits / temperature) - softmax(teachers / temperature)) / len(logits)


@pytest.mark.parametrize(("kind", "temperature"), [("soft", 1.0), ("soft", 4.0), ("hard", 4.0)])
def test_loss_and_gradient_are_the_formulas(kind, temperature):
    generator = np.random.default_rng(0)
    logits, teachers = generator.normal(0, 3, (2, 7, 5))
    if kind == "hard":
        expected = -np.log(softmax(logits)[np.arange(7), teachers.argmax(1)]).mean()
    else:
        p, q = softmax(teachers / temperature), softmax(logits / temperature)
        expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum(1).mean()
    own = torch.tensor(logits, requires_grad=True)
    loss = distillation_loss(own, torch.tensor(teachers), kind, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    gradient = expected_gradient(kind, logits, teachers, temperature)
    np.testing.assert_allclose(own.grad.numpy(), gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_gradients_of_a_window_are_those_of_the_formulas(make_settings, make_checkpoint, monkeypatch, kind):
    """Two of three micro-batches, as at the end of an epoch: each counts as one half."""
    settings = make_settings(
        teacher=make_checkpoint("teacher"),
        distillation=kind,
        distillation_alpha=0.3,
        distillation_temperature=2.0,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=16,
        max_train_steps=1,
        max_grad_norm=0.0,
        label_smoothing=0.1,
    )
    step, seen = loop.optimiser_step, {}

    def checked(run, window):
        window = window[:2]
        student = copy.deepcopy(run.state.model).double()
        teacher = copy.deepcopy(run.task.teacher.model).double()
        for batch in window:
            pixels = batch["pixel_values"].double()
            logits = student(pixels).logits
            values, theirs = logits.detach().numpy(), teacher(pixels).logits.detach().numpy()
            targets = 0.9 * np.eye(10)[batch["labels"].numpy()] + 0.01
            gradient = 0.7 * (softmax(values) - targets) / len(values)
            gradient += 0.3 * expected_gradient(kind, values, theirs, 2.0)
            logits.backward(torch.tensor(gradient) / 2)
        expected = {name: parameter.grad for name, parameter in student.named_parameters()}
        take = run.state.optimizer.step

        def compare():
            for name, parameter in run.state.model.named_parameters():
                # Float32 against float64, through four blocks.
                scale = expected[name].abs().max().item()
                torch.testing.assert_close(
                    parameter.grad.double(), expected[name], rtol=1e-3, atol=1e-4 * scale + 1e-9
                )
            seen["compared"] = True
            take()

        monkeypatch.setattr(run.state.optimizer, "step", compare)
        return step(run, window)

    monkeypatch.setattr(loop, "optimiser_step", checked)
    train(settings)
    assert seen


def test_a_distilled_run(make_settings, make_checkpoint, tmp_path):
    teacher = make_checkpoint("teacher")
    changes = {"max_train_steps": 4, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    before = {name: tensor.clone() for name, tensor in load_file(tmp_path / "teacher/model.safetensors").items()}
    train(make_settings(output_dir=str(tmp_path / "alone"), **changes))
    train(make_settings(output_dir=str(tmp_path / "run"), teacher=teacher, distillation_alpha=0.25, **changes))
    # The teacher is in no file, nor changed.
    for folder in ("", "checkpoints/step-4/"):
        mine, alone = (load_file(tmp_path / run / f"{folder}model.safetensors") for run in ("run", "alone"))
        assert mine.keys() == alone.keys()
        assert any(not torch.equal(mine[name], alone[name]) for name in mine)
    after = load_file(tmp_path / "teacher/model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    rows = points(tmp_path / "run")
    assert len(rows) == 2
    for row in rows:
        parts = 0.75 * row["label_loss"] + 0.25 * row["distillation_loss"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5) and row["distillation_loss"] > 0
    card = (tmp_path / "run/README.md").read_text()
    assert "with teacher as the teacher (soft distillation)" in card and str(tmp_path) not in card
    assert "| `distillation_alpha` | 0.25 |" in card and "lora" not in card
    assert "distillation" not in (tmp_path / "alone/README.md").read_text()


def test_labels_in_another_order_are_mapped_by_name(make_settings, make_checkpoint, tmp_path):
    order = [3, 1, 2, 0, 4, 9, 6, 7, 8, 5]
    teacher = make_checkpoint("teacher")
    model = AutoModelForImageClassification.from_pretrained(teacher)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter[order].clone())
    model.config.id2label = {place: NAMES[number] for place, number in enumerate(order)}
    model.config.label2id = {name: place for place, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path / "shuffled")
    AutoImageProcessor.from_pretrained(teacher).save_pretrained(tmp_path / "shuffled")
    for name, path in (("plain", teacher), ("mapped", str(tmp_path / "shuffled"))):
        train(make_settings(output_dir=str(tmp_path / name), teacher=path, max_train_steps=2, logging_steps=1))
    plain, mapped = (points(tmp_path / name) for name in ("plain", "mapped"))
    for mine, theirs in zip(plain, mapped, strict=True):
        assert mine["distillation_loss"] == pytest.approx(theirs["distillation_loss"], rel=1e-4)  # float32


def test_order_of_labels():
    assert places_of_labels(["a", "b", "c"], ["a", "b", "c"], "T") == [0, 1, 2]
    assert places_of_labels(["b", "c", "a"], ["a", "b", "c"], "T") == [2, 0, 1]
    assert places_of_labels(["LABEL_0", "LABEL_1"], ["a", "b"], "T") == [0, 1]
    # ImageNet has two kinds of crane.
    assert places_of_labels(["crane", "crane", "owl"], ["crane", "crane", "owl"], "T") == [0, 1, 2]
    with pytest.raises(UserError, match="not all different"):
        places_of_labels(["crane", "crane", "owl"], ["crane", "owl", "crane"], "T")
    with pytest.raises(UserError, match=r"the teacher T knows 2 labels \(a, b\), others than the 3 here"):
        places_of_labels(["a", "b"], ["a", "b", "c"], "T")
    with pytest.raises(UserError, match="--model_name_or_path T"):
        places_of_labels(["a", "b", "d"], ["a", "b", "c"], "T")


@pytest.mark.parametrize(
    ("processor", "tolerance"),
    [
        (ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5, 0.2, 0.3]), 1e-5),
        (PoolFormerImageProcessor(size={"shortest_edge": 32}, crop_size=32, crop_pct=1.0), 1e-5),
        # Channels reversed, no normalisation.
        (MobileViTImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), 1e-5),
        (ViTImageProcessor(size={"height": 32, "width": 32}, do_rescale=False, do_normalize=False), 1e-2),
        # Resized from 8 bits to 8 bits there, from the mixed examples in float32 here: 1/255 of 1/0.2.
        (ViTImageProcessor(size={"height": 48, "width": 48}, image_std=[0.5, 0.2, 0.3]), 0.02),
        (ViTImageProcessor(size={"height": 20, "width": 20}, image_std=[0.5, 0.2, 0.3]), 0.02),
    ],
    ids=["normalised", "same", "reversed", "bytes", "larger", "smaller"],
)
def test_the_teacher_sees_what_its_own_processor_makes(make_settings, processor, tolerance):
    students = PoolFormerImageProcessor(size={"shortest_edge": 32}, crop_size=32, crop_pct=1.0)
    settings = make_settings(affine_degrees=0.0, affine_translate=0.0, affine_scale=0.0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    example = TrainTransform(settings, students)(image)[None]
    teacher = Teacher(torch.nn.Identity(), processor, students, training_accelerator(settings, fsdp=False))
    expected = processor(image, return_tensors="pt")["pixel_values"].float()
    torch.testing.assert_close(teacher.adapt(example), expected, rtol=1e-5, atol=tolerance)
    if isinstance(processor, PoolFormerImageProcessor):
        assert teacher.adapt(example) is example


def test_a_processor_that_cannot_be_applied_to_a_batch():
    def squared(image, return_tensors):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        return {"pixel_values": pixels**2}

    with pytest.raises(UserError, match="changes colours in a way"):
        colours(squared, (8, 8))
    with pytest.raises(UserError, match=r"makes \(1, 8, 8\) of an image"):
        colours(lambda image, return_tensors: {"pixel_values": torch.zeros(1, 1, 8, 8)}, (8, 8))
    with pytest.raises(UserError, match="cannot prepare an RGB image"):
        colours(lambda image: image, (8, 8))


def test_a_teacher_of_timm(make_settings, tmp_path):
    pytest.importorskip("timm")
    config = TimmWrapperConfig.from_dict(
        {
            "architecture": "test_vit",  # of one size, unlike the student's
            "num_classes": 10,
            "label_names": NAMES,
            "pretrained_cfg": {"input_size": [3, 160, 160], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.95},
        }
    )
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path / "timm")
    results = train(make_settings(teacher=str(tmp_path / "timm"), max_train_steps=2, per_device_train_batch_size=8))
    assert results["step"] == 2
    # Its image processor says nothing that augmentation could go by.
    settings = dict.fromkeys(["config_name", "config_overrides", "drop_path_rate"])
    settings |= {"model_name_or_path": str(tmp_path / "timm"), "output_dir": str(tmp_path / "other")}
    with pytest.raises(UserError, match=r"a TimmWrapperImageProcessor, does not say its size.*hf-poolformer convert"):
        train(make_settings(**settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "fruit"}, r"knows 3 labels \(apple, pear, fig\), others than the 10 here \(digit 0"),
        ({"teacher": "/nowhere/at/all"}, "there is no folder /nowhere/at/all"),
        ({"distillation": "hard"}, "--distillation hard needs a teacher: --teacher MODEL"),
        ({"distillation_alpha": 1.5}, "--distillation_alpha must be between 0 and 1"),
        ({"distillation_temperature": 0.0}, "--distillation_temperature must be between"),
    ],
)
def test_mistakes_are_reported(make_settings, make_checkpoint, tmp_path, changes, message):
    if changes.get("teacher") == "fruit":
        changes = {"teacher": make_checkpoint("fruit", labels=["apple", "pear", "fig"])}
    with pytest.raises(UserError, match=message):
        train(make_settings(**changes))


def test_resuming_with_another_teacher_is_refused(make_settings, make_checkpoint, tmp_path):
    teacher = make_checkpoint("teacher")
    train(make_settings(teacher=teacher, max_train_steps=1))
    again = {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    other = make_checkpoint("other", drop_path_rate=0.1)  # the same but for what it knows
    for changes, message in (
        ({}, "was made with --teacher; go on with the same setting"),
        ({"teacher": other}, "with another --teacher"),
        ({"teacher": teacher, "distillation": "hard"}, "with --distillation soft"),
        ({"teacher": teacher, "distillation_temperature": 1.0}, "with --distillation_temperature 3.0"),
    ):
        with pytest.raises(UserError, match=message):
            train(make_settings(**changes, **again))
    moved = tmp_path / "teacher"
    moved.rename(tmp_path / "moved")
    assert train(make_settings(teacher=str(tmp_path / "moved"), **again))["step"] == 2


@pytest.mark.slow
def test_a_student_learns_more_with_a_teacher(make_settings, all_digits, tmp_path):
    """A teacher that has seen all training digits, students that see a quarter of them; tested on others."""
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(all_digits / "train-00000-of-00004.parquet", few / "train-00000-of-00001.parquet")
    for shard in all_digits.glob("test-*"):
        shutil.copy(shard, few)
    larger = {"depths": [1, 1, 2, 1], "hidden_sizes": [32, 64, 128, 192]}
    train(
        make_settings(
            dataset_name=str(all_digits),
            output_dir=str(tmp_path / "teacher"),
            config_overrides=json.dumps(larger),
            num_train_epochs=15,
            per_device_train_batch_size=64,
        )
    )
    accuracies = {}
    for teacher in (None, str(tmp_path / "teacher")):
        for seed in (0, 1, 2):
            results = train(
                make_settings(
                    dataset_name=str(few),
                    output_dir=str(tmp_path / f"student-{bool(teacher)}-{seed}"),
                    teacher=teacher,
                    num_train_epochs=30,
                    label_smoothing=0.0,
                    seed=seed,
                )
            )
            accuracies.setdefault(bool(teacher), []).append(results["eval_accuracy"])
    print(accuracies)
    assert np.mean(accuracies[True]) >= np.mean(accuracies[False])
