"""Answers and features for files, folders and datasets of any length, written as a table or as parts."""

from .inference import Predictor
from .run import Summary, predict


__all__ = ["Predictor", "Summary", "predict"]
