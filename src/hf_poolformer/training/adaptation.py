"""Training a small part of a checkpoint: its head alone (linear probe), or its head and low-rank adapters (LoRA)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..foundation.errors import UserError
from ..foundation.loading import belongs_to_head
from ..settings.classification import ClassificationSettings


def adapt(model: PreTrainedModel, settings: ClassificationSettings) -> None:
    """Freezes what the settings say is not to be trained, and puts adapters in if they are wanted.

    Raises:
        UserError: PEFT is not installed; the model has nothing to adapt, or a head that is not recognised.
    """
    if settings.freeze_backbone:
        model.requires_grad_(False)
    elif settings.lora:
        add_adapters(model, settings.lora, settings.lora_alpha, settings.lora_dropout)
    else:
        return
    model.get_submodule(head_name(model, "--lora and --freeze_backbone")).requires_grad_(True)


def head_name(model: PreTrainedModel, who: str) -> str:
    """Of the module at the end that depends on the labels; the norm before it does not.

    Args:
        who: has to know it, in the message.

    Raises:
        UserError: there is none, or more than one.
    """
    names = {name.split(".")[0] for name, _ in model.named_parameters() if belongs_to_head(name, model)}
    if len(names) != 1:
        raise UserError(f"{who} must know which part of a {type(model).__name__} is its head, and cannot tell.")
    return names.pop()


def adapted_layers(model: PreTrainedModel) -> list[str]:
    """Names of the layers that get adapters: every matrix product of the backbone that PEFT can merge.

    These are linear layers and 1x1 convolutions without groups: in all families `output.conv1` and `output.conv2` of
    the channel MLPs; the mixers' `qkv` and `proj` (attention), `pwconv1` and `pwconv2` (separable convolution) and
    `fc` (spatial MLP). Stem, downsampling and depthwise convolutions are none, nor is the head.
    """
    return [
        name
        for name, layer in model.named_modules()
        if not belongs_to_head(f"{name}.", model)
        and (
            type(layer) is nn.Linear
            or (type(layer) is nn.Conv2d and layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1)
        )
    ]


def add_adapters(model: PreTrainedModel, rank: int, alpha: float | None = None, dropout: float = 0.0) -> None:
    """Freezes a model and puts LoRA adapters (arXiv 2106.09685) beside its products; they begin as zero.

    The model keeps its class. Its fused operations leave layers with adapters to plain PyTorch.

    Args:
        alpha: what an adapter adds is multiplied by alpha / rank; None: twice the rank.

    Raises:
        UserError: PEFT is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("--lora needs PEFT. Install it with: pip install 'hf-poolformer[lora]'") from error
    names = adapted_layers(model)
    if not names:
        raise UserError(f"--lora: a {type(model).__name__} has neither linear layers nor 1x1 convolutions to adapt.")
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=dropout, target_modules=names
    )
    inject_adapter_in_model(config, model)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with adapters in which they are added to the weights: as if there had never been any."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return model


class LinearProbe(nn.Module):
    """A classifier of which the head alone is trained: the rest runs as it does in use, and without gradients.

    So it takes the fused path of inference, drops no paths, and leaves statistics of batch norms as they are.

    Calling it with `pixel_values` returns the model's outputs. `model` is the whole model, under its own names.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model, self.head_name = model, head_name(model, "--freeze_backbone")

    @property
    def head(self) -> nn.Module:
        return self.model.get_submodule(self.head_name)

    def train(self, mode: bool = True) -> LinearProbe:
        super().train(mode)
        self.model.eval()
        self.head.train(mode)
        return self

    def forward(self, pixel_values: torch.Tensor) -> Any:
        wanted = torch.is_grad_enabled()

        def begin(*_: Any) -> None:
            torch.set_grad_enabled(wanted)

        with torch.no_grad(), self.head.register_forward_pre_hook(begin):
            return self.model(pixel_values=pixel_values)


def describe_parameters(model: nn.Module) -> str:
    """How many there are, and how many of them are trained if that is another number."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"{total / 1e6:.2f}M parameters" + (f", {trained:,} of them trained" if trained < total else "")
