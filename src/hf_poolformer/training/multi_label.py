"""What training for several labels per image does its own way."""

from __future__ import annotations

from .classification import ClassificationTraining


class MultiLabelTraining(ClassificationTraining):
    pass
