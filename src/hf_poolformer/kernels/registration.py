"""Operations as `torch.ops.hf_poolformer.*` for graphs, and the same functions called directly for everybody else.

What PyTorch's dispatcher does for an operation that is written in Python takes longer than launching its kernels. So
eager code calls an `autograd.Function`, whose forward, backward and what it keeps are those of the registered one.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch

from . import NAMESPACE


def register(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> torch.library.CustomOpDef:
    """
    `torch.ops.hf_poolformer.<name>` of a function with annotations, whose first argument is a tensor.

    Where the function, or what stands for it where there is no data (`fake`), returns None in a sequence, the
    operation returns a tensor of shape (0,), of the dtype of the first argument. Where it returns a view, the
    operation returns a copy: its results may share no memory.
    """

    def filled(compute: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: torch.Tensor, *rest: Any) -> Any:
            found = compute(x, *rest)
            return found if isinstance(found, torch.Tensor) else type(found)(_as_result(each, x) for each in found)

        return run

    signature = inspect.signature(function)
    results = signature.return_annotation
    if results is not torch.Tensor:
        is_list = results == list[torch.Tensor | None]
        results = list[torch.Tensor] if is_list else tuple[(torch.Tensor,) * len(get_args(results))]
    run = filled(function)
    # Without defaults: graphs leave out arguments that have them, and gradients are counted by place.
    parameters = [each.replace(default=inspect.Parameter.empty) for each in signature.parameters.values()]
    run.__signature__ = signature.replace(parameters=parameters, return_annotation=results)
    operation = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=())
    operation.register_fake(filled(fake))
    return operation


def _as_result(found: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    if found is None:
        return like.new_empty((0,))
    return found.clone() if found._is_view() else found


def differentiable(
    name: str,
    forward: Callable[..., tuple],
    backward: Callable[..., Sequence[torch.Tensor | None]],
    *,
    fakes: tuple[Callable[..., tuple], Callable[..., Sequence[torch.Tensor | None]]],
    keep: Callable[[Any, tuple, tuple], None],
    differentiate: Callable[..., tuple],
) -> Callable[..., tuple]:
    """
    Registers `name` and `name_backward`, and returns what eager code calls in place of the first.

    Args:
        forward, backward, fakes: as `register` takes them, the fakes of both.
        keep: (ctx, inputs, results) -> None, what is called `setup_context` elsewhere; a result may be None.
        differentiate: (ctx, backward, *gradients of results) -> gradients of inputs; calls `backward`, which returns
            None or (0,) for gradients that are not wanted.
    """
    operation = register(name, forward, fakes[0])
    operation_backward = register(f"{name}_backward", backward, fakes[1])
    operation.register_autograd(
        lambda ctx, *gradients: differentiate(ctx, operation_backward, *gradients),
        setup_context=lambda ctx, inputs, output: keep(ctx, inputs, output),
    )

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            results = forward(*inputs)
            keep(ctx, inputs, results)
            return results

        @staticmethod
        def backward(ctx, *gradients):
            # Under create_graph the registered one says that it has no derivative.
            is_direct = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_watched())
            return differentiate(ctx, backward if is_direct else operation_backward, *gradients)

    def call(*inputs: Any) -> tuple:
        return Direct.apply(*inputs) if torch.is_grad_enabled() else forward(*inputs)

    return call


def _is_watched() -> bool:
    return torch._C._len_torch_dispatch_stack() > 0
