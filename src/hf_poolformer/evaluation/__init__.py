"""Metrics, evaluations of saved and of half-trained models, and their pictures."""
