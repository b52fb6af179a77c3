"""Answers and weights that are no numbers (NaN, infinity): an error wherever somebody would take them for results."""

from __future__ import annotations

import torch
from torch import nn

from .errors import UserError


def finite_answers(outputs: torch.Tensor) -> torch.Tensor:
    """Of outputs (B, ...), which are finite throughout: bool (B,)."""
    return outputs.isfinite().flatten(1).all(dim=1)


def check_finite(outputs: torch.Tensor, what: str) -> None:
    """
    Args:
        outputs: of a model, (B, ...).
        what: whose they are.

    Raises:
        UserError: those of an image or more hold NaN or infinity.
    """
    finite = finite_answers(outputs)
    refuse_not_finite(len(finite) - int(finite.sum()), len(finite), what)


def refuse_not_finite(count: int, total: int, what: str) -> None:
    """Raises a UserError if `count`, of `total` images, is not zero."""
    if count:
        raise UserError(
            f"{what} gives no finite scores (but NaN or infinity) for {count} of {total} images. A run that has "
            "diverged leaves such a model, take an earlier checkpoint; float16 overflows, take bfloat16 or float32"
        )


def check_weights(model: nn.Module, name: str) -> None:
    """
    Raises:
        UserError: a weight of the model called `name` is NaN or infinite.
    """
    refuse_weights([key for key, value in model.state_dict().items() if not all_finite(value)], name)


def refuse_weights(broken: list[str], name: str) -> None:
    """Raises a UserError if there are `broken` weights."""
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise UserError(
            f"{name} is damaged: NaN or infinity in its weights {', '.join(broken[:3])}{more}. A run that has "
            "diverged leaves such a model; take an earlier checkpoint"
        )


def all_finite(values: torch.Tensor) -> bool:
    if values.is_meta or not (values.is_floating_point() or values.is_complex()):
        return True
    if values.element_size() < 2:
        values = values.float()  # torch computes nothing on 8 bits
    return bool(values.isfinite().all())
