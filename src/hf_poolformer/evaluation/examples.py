"""Some of the images of an evaluation, to look at."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Example:
    """An image with what was found of it.

    Attributes:
        pixel_values: (channels, height, width) as the model saw it, normalised.
        answers: what the task's judge keeps of an image; see `metrics`.
    """

    pixel_values: torch.Tensor
    answers: dict[str, np.ndarray]


class Examples:
    """A sample of the images, spread over all of them: in evaluations with the same images in one order the same ones.

    Args:
        count: images at most.
    """

    def __init__(self, count: int = 16):
        self.count, self.seen = count, 0
        self.random = random.Random(0)
        self.kept: dict[int, tuple[int, Example]] = {}

    def add(self, pixel_values: torch.Tensor, answers: Mapping[str, torch.Tensor]) -> None:
        """A batch: (B, channels, height, width), and (B, ...) for each answer.

        The device is waited for only where an image is kept, which becomes rarer.
        """
        for index in range(len(pixel_values)):
            # Each image so far is kept with the same probability (reservoir sampling).
            place = self.seen if self.seen < self.count else self.random.randrange(self.seen + 1)
            if place < self.count:
                found = {name: values[index].cpu().numpy() for name, values in answers.items()}
                self.kept[place] = self.seen, Example(pixel_values[index].cpu().clone(), found)
            self.seen += 1

    def chosen(self) -> list[Example]:
        """In the order of the evaluation."""
        return [example for _, example in sorted(self.kept.values(), key=lambda kept: kept[0])]
