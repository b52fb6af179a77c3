"""Semantic segmentation, object detection and instance segmentation: data, metrics, training; used by scripts only."""
