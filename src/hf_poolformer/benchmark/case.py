"""What one comparison measures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from hf_poolformer import VARIANTS, MetaFormerConfig, PoolFormerConfig
from hf_poolformer.foundation.errors import UserError


# For dry runs and tests: everything works, in seconds, and no figure means anything.
TINY = {"depths": (1, 1, 2, 1), "hidden_sizes": (8, 16, 32, 64), "num_labels": 10}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """
    One comparison.

    Attributes:
        mode: "infer" (forward), "train" (forward, backward and optimiser step) or "latency" (forward, one call at a
            time, waiting for its result).
        variant: one of `VARIANTS`, or "tiny". Of other families than PoolFormer, transformers has no built-in model.
        dtype: a key of `DTYPES`, of weights and images; no autocast.
        image_size: side of the square images in pixels.
        device: "cpu" or "cuda".
    """

    mode: str
    variant: str = "poolformer_s12"
    dtype: str = "float32"
    batch_size: int = 16
    image_size: int = 224
    device: str = "cpu"

    def __post_init__(self):
        if self.variant not in variants():
            raise UserError(f"--variant {self.variant}: it must be one of {', '.join(variants())}.")
        if self.batch_size < 1:
            raise UserError(f"--batch_size must be positive, not {self.batch_size}.")
        if self.image_size < 32:
            raise UserError(f"--image_size must be at least 32, not {self.image_size}.")

    @property
    def title(self) -> str:
        return f"{self.mode}, {self.variant}, {self.dtype}, batch {self.batch_size}, {self.image_size} px"

    @property
    def is_poolformer(self) -> bool:
        return self.config().model_type == "poolformer"

    def config(self) -> MetaFormerConfig:
        return PoolFormerConfig(**TINY) if self.variant == "tiny" else MetaFormerConfig.from_variant(self.variant)

    def change(self, **fields) -> Case:
        return dataclasses.replace(self, **fields)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) of unit variance and labels (B,), the same for everybody."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        images = torch.randn(shape, generator=generator).to(self.device, DTYPES[self.dtype])
        labels = torch.randint(0, self.config().num_labels, shape[:1], generator=generator)
        return images, labels.to(self.device)


def variants() -> list[str]:
    return ["tiny", *VARIANTS]
