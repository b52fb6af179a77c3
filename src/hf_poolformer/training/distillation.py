"""Learning from a teacher: its answers to the very images the model sees, and the loss that compares the two."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ..data.classes import class_key
from ..data.transforms import input_size
from ..foundation.errors import UserError, one_line
from ..foundation.loading import load_checkpoint
from ..foundation.names import first_few
from ..foundation.tasks import TASKS, task_of_problem
from ..settings.classification import ClassificationSettings


def distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, kind: str = "soft", temperature: float = 1.0
) -> torch.Tensor:
    """What the teacher's answers cost a model that gives others; the mean over the images.

        soft  T^2 KL(softmax(teacher / T) || softmax(model / T)), arXiv 1503.02531 and equation 2 of arXiv 2012.12877
        hard  cross-entropy with the teacher's most probable label, equation 3 of arXiv 2012.12877

    Args:
        logits, teacher_logits: (batch, labels), of floating point.
        temperature: T.
    """
    if kind == "hard":
        return F.cross_entropy(logits, teacher_logits.argmax(dim=-1))
    own, teachers = (F.log_softmax(these / temperature, dim=-1) for these in (logits, teacher_logits))
    return F.kl_div(own, teachers, reduction="batchmean", log_target=True) * temperature**2


def binary_distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, kind: str = "soft", temperature: float = 1.0
) -> torch.Tensor:
    """As `distillation_loss` where an image has any number of labels; the mean over images and labels.

    soft  T^2 KL(teacher || model) of each label being there or not, with sigmoid(logits / T)
    hard  binary cross-entropy with the labels that the teacher thinks more probable than not
    """
    if kind == "hard":
        return F.binary_cross_entropy_with_logits(logits, (teacher_logits > 0).to(logits.dtype))
    own, teachers = logits / temperature, teacher_logits / temperature
    present = teachers.sigmoid() * (F.logsigmoid(teachers) - F.logsigmoid(own))
    absent = (-teachers).sigmoid() * (F.logsigmoid(-teachers) - F.logsigmoid(-own))
    return (present + absent).mean() * temperature**2


class Teacher:
    """A trained model that says what it thinks of a batch which was prepared for another model.

    It gets the same images, augmented and mixed: their normalisation is undone and its own applied, and they are
    resized (bilinear, antialiased) if its own image processor makes another size. It is in evaluation mode, without
    gradients, in the device's precision as accelerate sets it, and part of no checkpoint.

    Args:
        model: of transformers, of timm's through TimmWrapper; here a classifier.
        processor: its image processor; its colours must be an affine function of the image's.
        student_processor: that which the batches are prepared for.
        order: for each of the student's labels the number of it among the teacher's; empty if they are the same.

    Calling it with pixel values (batch, 3, height, width) returns float32 logits (batch, labels), the labels in the
    student's order.

    Raises:
        UserError: what the processor does to colours is not affine.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        student_processor: Any,
        accelerator: Accelerator,
        memory_format: torch.memory_format = torch.contiguous_format,
        order: Sequence[int] = (),
    ):
        device = accelerator.device
        # Stored in half precision, it computes in that only where the run does.
        self.model = model.float().eval().requires_grad_(False).to(device, memory_format=memory_format)
        self.accelerator = accelerator
        matrix, offset, self.size = colours(processor, input_size(student_processor))
        mean, std = (
            np.asarray(values, dtype=np.float64)
            for values in (student_processor.image_mean, student_processor.image_std)
        )
        # Ours is (x - mean) / std, theirs matrix x + offset, for x from 0 to 1.
        self.same_colours = np.allclose(matrix * std, np.eye(3), atol=1e-4) and np.allclose(
            matrix @ mean + offset, 0, atol=1e-4
        )
        self.matrix, self.offset = (
            torch.from_numpy(values).float().to(device) for values in (matrix * std, matrix @ mean + offset)
        )
        plain = list(order) == list(range(len(order)))
        self.order = None if plain else torch.tensor(order, device=device)

    def fingerprint(self) -> str:
        """Hexadecimal digits that another teacher does not have, wherever it lies."""
        sha = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            sha.update(name.encode())
            sha.update(tensor.cpu().numpy().tobytes())
        return sha.hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # A number in its unit may have more digits than half precision.
        numbers = self.model.config.problem_type == "regression"
        with contextlib.nullcontext() if numbers else self.accelerator.autocast():
            logits = self.model(pixel_values=self.adapt(pixel_values)).logits.float()
        return logits if self.order is None else logits[:, self.order]

    def adapt(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The images as the teacher's own processor would have normalised and sized them."""
        if not self.same_colours:
            # Sums of products one by one: a matrix product could be computed in TF32 or bfloat16.
            channels = [pixel_values[:, channel : channel + 1] for channel in range(3)]
            weights = self.matrix.T[:, None, :, None, None]  # one (1, 3, 1, 1) per channel of the student's
            pixel_values = sum((c * w for c, w in zip(channels, weights, strict=True)), self.offset[:, None, None])
        if pixel_values.shape[-2:] != self.size:
            pixel_values = F.interpolate(pixel_values, self.size, mode="bilinear", antialias=True)
        return pixel_values


def colours(processor: Any, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, torch.Size]:
    """What an image processor makes of a picture of this size: `matrix @ rgb + offset`, and its own size.

    Measured on pictures of one colour, which no resizing or cropping changes: processors state what they do in many
    ways, some of them in none.

    Args:
        size: height and width of the picture.

    Returns:
        matrix (3, 3) and offset (3,) for colours from 0 to 1, float64; height and width of the result.

    Raises:
        UserError: colours are changed in another way, or the result is no RGB image.
    """

    def result(rgb: Sequence[int]) -> torch.Tensor:
        picture = Image.new("RGB", (size[1], size[0]), tuple(rgb))
        return processor(picture, return_tensors="pt")["pixel_values"][0].double()

    try:
        made = [result(rgb) for rgb in ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (51, 102, 204))]
    except Exception as error:  # whatever a foreign processor may raise
        raise UserError(f"the teacher's image processor cannot prepare an RGB image: {one_line(error)}") from error
    shape = made[0].shape
    middle = [image[:, shape[-2] // 2, shape[-1] // 2].numpy() if image.ndim == 3 else image for image in made]
    if len(shape) != 3 or shape[0] != 3:
        raise UserError(f"the teacher's image processor makes {tuple(shape)} of an image, not (3, height, width).")
    offset = middle[0]
    matrix = np.stack([one - offset for one in middle[1:4]], axis=1)
    if not np.allclose(matrix @ np.array([0.2, 0.4, 0.8]) + offset, middle[4], atol=0.01 * np.abs(matrix).max()):
        raise UserError("the teacher's image processor changes colours in a way that cannot be applied to a batch.")
    return matrix, offset, shape[-2:]


def places_of_labels(teachers: Sequence[str], students: Sequence[str], name: str) -> list[int]:
    """For each of the student's labels the number of it among the teacher's.

    Raises:
        UserError: these are not the same labels. Labels that the teacher gives no names, LABEL_0 and so on, pass for
            the student's if they are as many.
    """
    teachers, students = list(teachers), list(students)
    unnamed = teachers == [f"LABEL_{index}" for index in range(len(students))]
    if unnamed or teachers == students:
        return list(range(len(students)))
    theirs, ours = ([class_key(label) or "" for label in labels] for labels in (teachers, students))
    if sorted(theirs) != sorted(ours) or len(set(theirs)) < len(theirs):
        same = "in another order and not all different" if sorted(theirs) == sorted(ours) else "others"
        raise UserError(
            f"the teacher {name} knows {len(teachers)} labels ({first_few(teachers, 3)}), {same} than the "
            f"{len(students)} here ({first_few(students, 3)}). Train it on this dataset first: --model_name_or_path "
            f"{name}"
        )
    number = {label: index for index, label in enumerate(theirs)}
    return [number[label] for label in ours]


def load_teacher(
    settings: ClassificationSettings,
    label_names: Sequence[str],
    student_processor: Any,
    accelerator: Accelerator,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Teacher:
    """The teacher of a run; every process loads it for itself.

    Raises:
        UserError: there is no such classifier, or it does not know these labels, or it was trained for another task.
    """
    name = settings.teacher
    model, processor, fresh = load_checkpoint(name, settings.origin_of_others())
    if fresh:
        raise UserError(f"the teacher {name} is not a trained classifier of its own shape: it lacks {fresh[0]}.")
    if not model.config.num_labels:
        raise UserError(f"the teacher {name} has no classes: it is a feature extractor (num_labels is 0).")
    task = task_of_problem(model.config.problem_type)
    if task.problem_type != TASKS[settings.task].problem_type:
        raise UserError(
            f"the teacher {name} was trained for {task.name}, and what it answers is nothing to learn "
            f"{settings.task} from. Train it for that first: --task {settings.task} --model_name_or_path {name}"
        )
    learnt = [model.config.id2label[index] for index in range(model.config.num_labels)]
    order = places_of_labels(learnt, label_names, name)
    return Teacher(model, processor, student_processor, accelerator, memory_format, order)
