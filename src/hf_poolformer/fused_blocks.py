"""Blocks and stages by kernels, where the model around them has decided so and their modules allow it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .backends import DECISION, Decision, decide, decided, holds, infers, namespace, triton_kernels, under_autocast
from .branches import MIXERS, MLPS, find_branch, find_branches, find_operations, module_branch
from .findings import remembered
from .fused_embeddings import entering_statistics
from .fused_operations import Branch, channel_mlp, infer_branches, pool_mixer, separable_conv
from .plain_modules import formula


def unless_fused(fused: Callable[[nn.Module, torch.Tensor], torch.Tensor | None]) -> Callable[[Callable], Callable]:
    """Decorator of the forward of a block or a stage, for where `fused(module, x)` has no result."""

    def decorate(forward: Callable) -> Callable:
        @functools.wraps(forward)
        def run(self, hidden_states: torch.Tensor) -> torch.Tensor:
            result = fused(self, hidden_states)
            return forward(self, hidden_states) if result is None else result

        return run

    return decorate


def fused_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """A block of x (B, C, H, W), each branch in one operation where its parts allow it; None if plain PyTorch is to
    compute."""
    decision = decided(x, block.config.kernels)
    if decision.backend == "reference":
        return None
    if infers(decision):
        return _inferred_block(block, x, decision)
    return _operated_block(block, x, decision, entering_statistics(x), False)[0]


def fused_stage(stage: nn.ModuleList, x: torch.Tensor) -> torch.Tensor | None:
    """
    All blocks of a stage by kernels, whatever computes their branches being found only once. Without gradients a CPU
    takes a few samples at a time through all of them, which keeps these in the caches, and a GPU goes from launch to
    launch. In training on a GPU, blocks hand on the statistics of their results.

    None where plain PyTorch is to compute, or blocks are to be called one by one.
    """
    if torch.compiler.is_compiling():
        return _stage_of_graph(stage, x)
    decision = DECISION.get()
    if decision is None or decision.backend == "reference" or not holds(decision):
        return None
    if torch.is_grad_enabled():
        return _trained_stage(stage, x, decision) if decision.backend == "triton" else None
    branches = remembered(find_branches, stage, x, decision)
    return infer_branches(stage, x, branches, decision.backend, entering_statistics(x)) if branches else None


def _stage_of_graph(stage: nn.ModuleList, x: torch.Tensor) -> torch.Tensor | None:
    """The same in a graph, on a GPU and without gradients: the stage is one operation."""
    if torch.is_grad_enabled() or len(stage) == 0 or formula(stage[0]) != "block":
        return None
    decision = decide(x, stage[0].config.kernels, whole=True)
    branches = find_branches(stage, x, decision) if decision.backend == "triton" else None
    if branches is None:
        return None
    x, dtype = under_autocast(x)
    values = [value for _, arguments in branches for value in arguments.values()]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    numbers = [value for value in values if isinstance(value, float)]
    text = ", ".join([f"('{name}', {_literal(arguments)})" for name, arguments in branches])
    run = getattr(torch.ops, namespace("triton")).infer_stage
    return run(x.contiguous(memory_format=torch.channels_last), tensors, numbers, f"[{text}]", dtype)


def _literal(arguments: dict[str, Any]) -> str:
    """Arguments as kernels/stages.py reads them in a graph. Written for torch.compile, which knows no `repr`, and may
    make a symbol of each float that it meets."""
    items = []
    for name, value in arguments.items():
        text = f"'{value}'" if isinstance(value, str) else f"{value}"
        text = "..." if isinstance(value, torch.Tensor) else "0.0" if isinstance(value, float) else text
        items.append(f"'{name}': {text}")
    return "{" + ", ".join(items) + "}"


def _trained_stage(stage: nn.ModuleList, x: torch.Tensor, decision: Decision) -> torch.Tensor | None:
    blocks = list(stage)
    if any(formula(block) != "block" or (block.gradient_checkpointing and block.training) for block in blocks):
        return None
    found = [_recordable(*remembered(find_operations, block, x, decision)) for block in blocks]
    statistics = entering_statistics(x)
    if all(found):
        branches = [branch for both in found for branch in both]
        norms = [block.before_norm.bias for block in blocks]
        if _needs_gradient(x, *norms, *(value for _, arguments in branches for value in arguments.values())):
            x, dtype = under_autocast(x)
            x = x.contiguous(memory_format=torch.channels_last)
            rest = [rest for bias in norms for rest in ({"norm_bias": bias}, {})]
            # Drawn in the order in which the blocks would draw them.
            masks = [block.drop_path.mask(x) for block in blocks for _ in range(2)]
            branches = [
                (name, {**arguments, **more, "mask": mask})
                for (name, arguments), more, mask in zip(branches, rest, masks, strict=True)
            ]
            return triton_kernels().training.train(stage, x, branches, dtype, statistics)
        if not any(block.drop_path.drops for block in blocks):
            return infer_branches(stage, x, branches, decision.backend, statistics)
    for block in blocks:
        x, statistics = _operated_block(block, x, decision, statistics, block is not blocks[-1])
    return x


def _needs_gradient(*values: Any) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _recordable(
    mixer: dict[str, Any] | None, separable: dict[str, Any] | None, mlp: dict[str, Any] | None
) -> list[Branch] | None:
    """The branches of a block, if both are operations, all of whose tensors are contiguous."""
    first = ("pool_mixer", mixer) if mixer is not None else ("separable_conv", separable)
    branches = [first, ("channel_mlp", mlp)]
    for _, arguments in branches:
        if arguments is None:
            return None
        for value in arguments.values():
            if isinstance(value, torch.Tensor) and not value.is_contiguous():
                return None
    return branches


def _operated_block(
    block: nn.Module, x: torch.Tensor, decision: Decision, known: torch.Tensor | None, hands_on: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    A block of x (B, C, H, W) by operations that have gradients, or by modules where there is none.

    Args:
        known: statistics of the samples of x (B, 2), or None.
        hands_on: whether those of the result are wanted.

    Returns:
        The result, and those statistics, where they cost no pass of their own, or None.
    """
    found = find_operations if torch.compiler.is_compiling() else functools.partial(remembered, find_operations)
    mixer, separable, mlp = found(block, x, decision)
    statistics = {}  # of what the second branch gets, by the kind of norm that wants them
    if mixer is not None:
        rest = {"norm_bias": block.before_norm.bias, "mask": block.drop_path.mask(x), "statistics": known}
        x, statistics["group"] = pool_mixer(
            x, **mixer, **rest, with_statistics=block.use_mlp, backend=decision.backend
        )
    elif separable is not None:
        x = separable_conv(x, **separable, mask=block.drop_path.mask(x))
    else:
        branch = module_branch(block, x, decision)
        x, statistics["channel"] = (block.mix_tokens(x), None) if branch is None else branch
    if mlp is None:
        return block.mix_channels(x), None
    rest = {"mask": block.drop_path.mask(x), "statistics": statistics.get(mlp["norm"])}
    with_statistics = hands_on and mlp["norm"] == "group"
    return channel_mlp(x, **mlp, **rest, with_statistics=with_statistics, backend=decision.backend)


def _inferred_block(block: nn.Module, x: torch.Tensor, decision: Decision) -> torch.Tensor:
    """A block by the functions of inference, but for branches that only modules can compute."""
    mixer = find_branch(block, x, decision, MIXERS)
    if mixer is None:
        x = block.mix_tokens(x)
    mlp = find_branch(block, x, decision, MLPS)
    branches = [branch for branch in (mixer, mlp) if branch is not None]
    x = infer_branches(block, x, branches, decision.backend) if branches else x
    return block.mix_channels(x) if mlp is None else x
