"""LAMB, the optimiser that CAFormer was trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .checkpoints import whole


class Lamb(torch.optim.Optimizer):
    """Adam whose step on each tensor is as long as the tensor times the learning rate (arXiv 1904.00962).

    For a tensor w with the gradient g, in step t:

        m = beta1 m + (1 - beta1) g                    v = beta2 v + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
        w = w - lr r u                                 r = |w| / |u|, or 1 where either is 0

    As in timm, with which the paper's models were trained: weight decay is part of u, and so of its length; tensors
    without weight decay (norms, biases, scales) keep r = 1, which makes their step Adam's. timm also clips the
    gradient's length to 1; here that is `max_grad_norm`, as for all optimisers.

    Nothing waits for the device. Tensors that FSDP has distributed are measured as wholes.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: part of each weight that is added to its step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for parameter in params:
            state = self.state[parameter]
            if not state:
                # On the CPU, where reading it waits for nobody; the names are AdamW's.
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in params]
        grads = [parameter.grad for parameter in params]
        first, second = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        steps = []
        for state in states:
            state["step"] += 1
            steps.append(int(state["step"]))
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(first, [1 - beta1**step for step in steps])
        torch._foreach_div_(updates, roots)
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            torch._foreach_mul_(updates, trust_ratios(params, updates))
        torch._foreach_add_(params, updates, alpha=-group["lr"])


def trust_ratios(params: list[torch.Tensor], updates: list[torch.Tensor]) -> list[torch.Tensor]:
    """|w| / |u| of each pair as a tensor without dimensions, 1 where either is 0."""
    lengths, steps = (
        torch.stack([whole(length) for length in torch._foreach_norm(tensors)]) for tensors in (params, updates)
    )
    return list(torch.where((lengths > 0) & (steps > 0), lengths / steps, 1.0).unbind())
