"""What the fused operations take, for `torch.utils.flop_counter`: as there, products count, and nothing else does."""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from . import NAMESPACE


def count_products(
    operation: str, products: int, *, x: int, weight1: int, convolutions: int = 0, depthwise: int | None = None
) -> None:
    """
    Registers the formula of an operation of `torch.ops.hf_poolformer`.

    Args:
        products: matrix products between all tokens and a weight of the size of `weight1`.
        convolutions: depthwise convolutions of R channels with a weight of the size of `depthwise`.
        x, weight1, depthwise: places of these arguments, (B, C, H, W), (R, C) and (R, 1, window, window).
    """

    @register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), operation))
    def formula(*shapes: Sequence[int] | None, out_shape: Sequence[int] | None = None, **_: object) -> int:
        batch, channels, height, width = shapes[x]
        each = products * channels
        if depthwise is not None:
            each += convolutions * shapes[depthwise][2] * shapes[depthwise][3]
        return 2 * batch * height * width * shapes[weight1][0] * each
