"""What the fused operations take, for `torch.utils.flop_counter`: as there, products count, and nothing else does."""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula


def count_products(operation: str, products: int, *, x: int, weight1: int) -> None:
    """
    Registers the formula of an operation of `torch.ops.hf_poolformer`.

    Args:
        products: matrix products between all tokens and a weight of the size of `weight1`.
        x, weight1: places of these arguments, (B, C, H, W) and (R, C).
    """

    @register_flop_formula(getattr(torch.ops.hf_poolformer, operation))
    def formula(*shapes: Sequence[int] | None, out_shape: Sequence[int] | None = None, **_: object) -> int:
        batch, channels, height, width = shapes[x]
        return products * 2 * batch * height * width * channels * shapes[weight1][0]
