"""Tiles that the kernels are fastest with on this GPU, timed and kept for the models to come."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..foundation.errors import UserError
from ..foundation.files import write_json
from .case import DTYPES, Case
from .rows import kernels, make_weights, transformers_model


def tune(arguments: argparse.Namespace) -> int:
    """
    Times the tiles of every kernel that a model launches in inference and in training, and writes down the fastest.

    Args:
        arguments: of `hf-poolformer benchmark tune`.

    Raises:
        UserError: there is no GPU, or no Triton, or the file cannot be written.
    """
    if not torch.cuda.is_available():
        raise UserError("tune times kernels on a GPU, and PyTorch sees none here.")
    try:
        from ..kernels import tiles
    except ImportError as error:
        raise UserError(f"tune times Triton's kernels, and {error.name} is not installed.") from error
    found: dict[tuple, Any] = {}
    for dtype in arguments.dtype or ["bfloat16"]:
        size, batch = arguments.image_size, arguments.batch_size or 256
        found |= fastest_tiles(Case("train", arguments.variant, dtype, batch, size, "cuda"))
    path = arguments.output or tiles.cache_file()
    write_json(path, merged(tiles.read(path), found))
    print(f"{len(found)} tiles are kept in {path}; models read them when they are next started.")
    return 0


def fastest_tiles(case: Case) -> dict[tuple, Any]:
    """Key of `launch.tuned`, with the device before it, -> the fastest tile, of a model in inference and training."""
    from ..kernels import ahead, launch

    model = transformers_model("ours", case, make_weights(case.config())).to(
        case.device, DTYPES[case.dtype], memory_format=torch.channels_last
    )
    images, _ = case.batch()
    with kernels("triton"), launch.every_tile(), ahead.compiling_aside():
        step(model, images)
    with kernels("triton"), launch.timing() as found, tqdm(desc=f"{case.title}: timing tiles", unit="") as bar:
        step(model, images)
        bar.update(len(found))
    return found


def step(model: nn.Module, images: torch.Tensor) -> None:
    """Launches everything that inference and training launch."""
    from ..kernels.ahead import differentiate

    with torch.no_grad():
        model.eval()(images)
    differentiate(model.train()(images), list(model.parameters()))


def merged(kept: dict[str, Any], found: dict[tuple, Any]) -> dict[str, Any]:
    """The table of `tiles.read` with what was found, which wins."""
    from ..kernels import tiles

    for (_, *key), tile in found.items():
        kernel, bits, channels, rows = tiles.entry(key)
        kept.setdefault(kernel, {}).setdefault(bits, {}).setdefault(channels, {})[rows] = list(tile)
    return kept
