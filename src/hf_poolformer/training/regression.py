"""What training for numbers does its own way."""

from __future__ import annotations

from .classification import ClassificationTraining


class RegressionTraining(ClassificationTraining):
    pass
