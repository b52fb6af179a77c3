"""The peers of the papers' tables as models that run, and the backbones of some of them in this package's own heads.

timm and transformers have nearly all of them. ResMLP-B24 of the papers has patches of 16 pixels, timm's of the same
name patches of 8; Swin-Mixer (arXiv 2103.14030, appendix A3.3; `swin_mlp` in the authors' code) is in neither.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PvtConfig, PvtForImageClassification

from hf_poolformer import PoolFormerConfig


class WindowMixer(nn.Module):
    """
    Spatial MLP of Swin-Mixer: a fully connected layer over the positions of a window, one for each head of channels.

    Shifted windows do not wrap around as those of Swin do: the map is padded with zeros by one window in all.
    """

    def __init__(self, dim: int, num_heads: int, window: int, shift: int):
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        tokens = num_heads * window**2
        self.mix = nn.Conv1d(tokens, tokens, 1, groups=num_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to the same shape; H and W are multiples of the window."""
        if self.shift:
            before = self.window - self.shift
            x = F.pad(x, (0, 0, before, self.shift, before, self.shift))
        batch, height, width, dim = x.shape
        side, heads = self.window, self.num_heads
        grid = (batch, height // side, side, width // side, side, heads, dim // heads)
        # To (B, rows, columns, heads, side, side, C / heads): a window's tokens, head by head, are the channels.
        windows = x.view(grid).permute(0, 1, 3, 5, 2, 4, 6)
        mixed = self.mix(windows.reshape(-1, heads * side**2, dim // heads))
        x = mixed.view(windows.shape).permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, dim)
        if self.shift:
            x = x[:, before : height - self.shift, before : width - self.shift]
        return x


class SwinMixerBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, window: int, shift: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer = WindowMixer(dim, num_heads, window, shift)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Swin's: four neighbours side by side, LayerNorm, twice the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        neighbours = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))


class SwinMixer(nn.Module):
    """
    Swin with spatial MLPs in place of attention; the numbers are those of `configs/swin_mlp_*` in the authors' code.

    Args:
        dim: of the first stage; doubles from stage to stage, as do the heads.
        head_dim: channels per head, the D of the model's name.
        pixels: side of the images, of which there is one size only.
    """

    def __init__(self, dim: int, depths: tuple[int, ...], head_dim: int, window: int, pixels: int):
        super().__init__()
        self.patches, self.patch_norm = nn.Conv2d(3, dim, 4, stride=4), nn.LayerNorm(dim)
        stages: list[nn.Module] = []
        side = pixels // 4
        for stage, depth in enumerate(depths):
            if stage:
                stages.append(PatchMerging(dim))
                side, dim = side // 2, 2 * dim
            size = min(window, side)
            # A window as large as the map has nowhere to be shifted to.
            shifts = [index % 2 * (size // 2) if side > window else 0 for index in range(depth)]
            stages += [SwinMixerBlock(dim, dim // head_dim, size, shift) for shift in shifts]
        self.stages = nn.Sequential(*stages)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 1000)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.patch_norm(self.patches(pixel_values).permute(0, 2, 3, 1))
        return self.head(self.norm(self.stages(x)).mean(dim=(1, 2)))


def resmlp_b24() -> nn.Module:
    """arXiv 2105.03404, table 1: 24 blocks of 768 channels, patches of 16 pixels."""
    from functools import partial

    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    return MlpMixer(
        patch_size=16,
        num_blocks=24,
        embed_dim=768,
        mlp_ratio=4,
        block_layer=partial(ResBlock, init_values=1e-6),
        norm_layer=Affine,
    )


HERE: dict[str, Callable[[], nn.Module]] = {
    "resmlp_b24": resmlp_b24,
    "swin_mixer_t_d24": lambda: SwinMixer(96, (2, 2, 6, 2), 24, window=8, pixels=256),
    "swin_mixer_t_d6": lambda: SwinMixer(96, (2, 2, 6, 2), 6, window=8, pixels=256),
    # Swin's own 32 channels per head, though the papers call it D24.
    "swin_mixer_b_d24": lambda: SwinMixer(128, (2, 2, 18, 2), 32, window=7, pixels=224),
}
# PVT (arXiv 2102.12122, table 1). All else is what transformers' configuration says.
PVT_DEPTHS = {
    "pvt_tiny": (2, 2, 2, 2),
    "pvt_small": (3, 4, 6, 3),
    "pvt_medium": (3, 4, 18, 3),
    "pvt_large": (3, 8, 27, 3),
}


def build_peer(library: str, name: str) -> nn.Module:
    """
    A classifier of ImageNet-1K with random weights.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    if library == "timm":
        import timm

        return timm.create_model(name)
    if library == "transformers":
        return PvtForImageClassification(PvtConfig(depths=PVT_DEPTHS[name]))
    return HERE[name]()


class PeerBackbone(nn.Module):
    """The feature maps of a peer, strides 4 to 32, in the form in which this package's heads take them."""

    def __init__(self, library: str, name: str):
        super().__init__()
        if library == "timm":
            import timm

            self.model = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4))
            self.channels = self.model.feature_info.channels()
        else:
            self.model = build_peer(library, name).pvt
            self.channels = list(self.model.config.hidden_sizes)
        self.first_stage = 1

    def feature_maps(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        if not hasattr(self.model, "encoder"):
            return self.model(pixel_values)
        maps, x = [], pixel_values
        for embed, blocks in zip(self.model.encoder.patch_embeddings, self.model.encoder.block, strict=True):
            x, height, width = embed(x)
            for block in blocks:
                (x,) = block(x, height, width)
            # The class token of the last stage is no place on the map.
            x = x[:, x.shape[1] - height * width :].transpose(1, 2).unflatten(2, (height, width))
            maps.append(x)
        return maps

    def forward(self, pixel_values: torch.Tensor, **_: object) -> SimpleNamespace:
        maps = self.feature_maps(pixel_values)[self.first_stage - 1 :]
        return SimpleNamespace(feature_maps=tuple(maps), hidden_states=None)


def with_peer_backbone(model_class: type[nn.Module], library: str, name: str, num_labels: int) -> nn.Module:
    """One of this package's segmenters and detectors, with a peer's backbone in the place of PoolFormer."""
    backbone = PeerBackbone(library, name)
    model = model_class(PoolFormerConfig(hidden_sizes=backbone.channels, depths=[1] * 4, num_labels=num_labels))
    backbone.first_stage = getattr(model_class, "first_stage", 1)
    setattr(model, model.base_model_prefix, backbone)
    return model
