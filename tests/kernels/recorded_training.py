"""Recorded launches against the functions that made them, by Triton's IR: to the bit. Prints what it compared.

    TRITON_INTERPRET=0 PYTHONPATH=src:tests/kernels python tests/kernels/recorded_training.py

Launches get addresses here, and read and write what is there. Everything allocated is filled with NaN.
"""

import os
from typing import Any

import torch
import triton_ir
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from hf_poolformer import MetaFormerConfig, MetaFormerForImageClassification
from hf_poolformer.kernels import launch, mlp_forward, recordings


os.environ["HF_POOLFORMER_KERNELS"] = "triton"
launch.Kernel.__getitem__ = triton_ir.launch_addresses
mlp_forward.WHOLE_CHANNELS = 16  # the first stage in one kernel, the others in two
repeated: list[int] = []


def poison(name):
    original = getattr(torch, name)

    def run(*args, **kwargs):
        made = original(*args, **kwargs)
        with _disable_current_modes():
            # All bits of a number being set, it is none.
            return made.fill_(float("nan") if made.is_floating_point() else 255 if made.dtype == torch.uint8 else 0)

    setattr(torch, name, run)


def count(repeat):
    def run(recording, given):
        repeated.append(len(recording._steps))
        return repeat(recording, given)

    return run


POOLING: dict[str, Any] = {"token_mixers": ("pooling",) * 3, "depths": (2, 1, 2)}
# The second paper's.
CHANNEL_NORM = {"norm_layer": "layer_norm", "norm_bias": False, "use_bias": False, "hidden_act": "star_relu"}
CONVFORMER: dict[str, Any] = {**CHANNEL_NORM, "token_mixers": ("separable_conv",) * 3, "depths": (1, 1, 2)}
CAFORMER = {**CONVFORMER, "token_mixers": ("separable_conv", "attention", "attention"), "attention_head_dim": 8}
# With everything that those do without.
OTHER = {**CAFORMER, "token_mixers": ("attention",) * 3, "norm_bias": True, "use_bias": True, "hidden_act": "gelu"}


def build(dtype: torch.dtype, res_scale: float | None, settings: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config = MetaFormerConfig(
        **settings,
        num_encoder_blocks=3,
        hidden_sizes=(16, 24, 20),
        position_embeddings=(False,) * 3,
        res_scale_init_values=(None, res_scale, None),
        patch_sizes=(3, 3, 3),
        strides=(2, 2, 1),
        padding=(1, 1, 1),
        layer_scale_init_value=1.0,
        drop_path_rate=0.3,
        mlp_ratio=2,
        num_channels=5,  # more than the kernel of the stem takes
        num_labels=3,
    )
    model = MetaFormerForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def outcome(model: nn.Module, step: int, gradients: bool, autocast: bool) -> list[torch.Tensor]:
    torch.manual_seed(step)  # of images, and of what drop path draws
    images = torch.randn(2, 5, 14, 10, dtype=next(model.parameters()).dtype)
    model.zero_grad()
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model.train(gradients)(images).logits
    if gradients:
        logits.float().square().sum().backward()
    return [logits.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def main() -> None:
    recordings.Recording.repeat = count(recordings.Recording.repeat)
    record = recordings.Recorded.__call__
    for name, settings, dtype, res_scale, frozen, autocast, stages in CASES:
        model = build(dtype, res_scale, settings)
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(not (frozen and frozen in path))
        for gradients in (False, True):
            for step in range(3):
                recordings.Recorded.__call__ = record
                repeated.clear()
                got = outcome(model, step, gradients, autocast)
                recordings.Recorded.__call__ = lambda self, given, *others, kind=None: self._function(given, *others)
                wanted = outcome(model, step, gradients, autocast)
                times = len(repeated)
                assert times == (step > 0) * (2 * stages if gradients else 3), (name, dtype, gradients, step, times)
                assert len(got) == len(wanted)
                for mine, theirs in zip(got, wanted, strict=True):
                    assert torch.isfinite(theirs).all()
                    assert torch.equal(mine, theirs), (name, dtype, frozen, gradients, step)
                print(name, dtype, gradients, step, f"{len(got)} tensors, {sum(repeated)} steps repeated", flush=True)


# The last: how many of the three stages are recorded in training, all of whose branches are operations.
CASES = (
    ("pooling", POOLING, torch.bfloat16, None, "", False, 3),
    ("pooling", POOLING, torch.float32, 1.0, "", False, 3),
    ("pooling, frozen", POOLING, torch.float32, None, "conv1", False, 3),
    ("pooling, autocast", POOLING, torch.float32, None, "", True, 3),
    ("convformer", CONVFORMER, torch.float32, 1.0, "", False, 3),
    ("convformer, half", CONVFORMER, torch.bfloat16, None, "", False, 3),
    ("convformer, frozen", CONVFORMER, torch.bfloat16, 1.0, "pwconv1", False, 3),
    ("convformer, autocast", CONVFORMER, torch.float32, None, "", True, 3),
    ("caformer", CAFORMER, torch.bfloat16, 1.0, "", False, 1),
    ("caformer, autocast", CAFORMER, torch.float32, 1.0, "", True, 1),
    ("other", OTHER, torch.bfloat16, None, "", False, 0),
)


if __name__ == "__main__":
    for name in ("empty", "empty_like", "empty_strided"):
        poison(name)
    main()
