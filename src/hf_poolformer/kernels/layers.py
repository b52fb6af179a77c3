"""What `from_pretrained(..., use_kernels=True, kernel_config=...)` of transformers takes from this package where it is
published alone (hub/kernel_repository.py).

The `kernels` library loads the package and puts the forward of a layer in the place of a module's own. Here that one
is called again: `hf_poolformer.backends`, which travels with the model, finds the package that was loaded, and decides
for each input whether kernels compute.
"""

from typing import Any

import torch
from torch import nn


# The library wants layers without attributes and methods of their own, and with the signature that they replace.


class MetaFormerEncoder(nn.Module):
    """The encoder of every model but backbones."""

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        return type(self).forward(self, pixel_values, **kwargs)


class MetaFormerBackboneEncoder(nn.Module):
    """The encoder of a backbone."""

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return type(self).forward(self, pixel_values)
