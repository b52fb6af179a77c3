"""Tiny models run through the official code, as their authors would save them."""

from pathlib import Path

import torch
from safetensors.torch import load_file


GOLDEN = Path(__file__).resolve().parents[1] / "fixtures" / "golden"


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(state dict under the official names, everything else) of a model run through the official code."""
    content = load_file(GOLDEN / f"{name}.safetensors")
    weights = {key.removeprefix("state_dict."): v for key, v in content.items() if key.startswith("state_dict.")}
    return weights, {key: value for key, value in content.items() if not key.startswith("state_dict.")}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
