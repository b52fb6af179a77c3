"""Operations as `torch.ops.hf_poolformer.*` for graphs, and the same functions called directly for everybody else.

What PyTorch's dispatcher does for an operation that is written in Python takes longer than launching its kernels. So
eager code calls an `autograd.Function`, whose forward, backward and what it keeps are those of the registered one.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch

from . import NAMESPACE
from .launch import empty_like_each, empty_nhwc


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
    fake: Callable[..., tuple],
    keep: Callable[[tuple, tuple], tuple[Sequence[torch.Tensor | None], Sequence[Any]]],
    parameters: Sequence[str],
    flag: str | None = None,
) -> Callable[..., tuple]:
    """
    Registers `name` and `name_backward`, and returns what eager code calls in place of the first.

    Args:
        forward, fake: as `register` takes them. Of the results, only the first has a gradient.
        backward: takes that gradient in channels_last memory, then what was kept, and last which gradients of the
            parameters are wanted; returns that of x, which is `forward`'s first argument, and those of the parameters,
            None or (0,) for what is not wanted. Its first argument is like x.
        keep: (inputs, results) -> the tensors, then the other arguments of `backward`; a result may be None.
        parameters: names of the arguments of both that get gradients beside x.
        flag: name of the argument of `forward` without which there is nothing kept, and no backward.
    """
    names, backward_names = list(inspect.signature(forward).parameters), list(inspect.signature(backward).parameters)
    places = [names.index(each) for each in parameters]
    backward_places = [backward_names.index(each) for each in parameters]

    def fake_backward(*inputs):
        g, *_, wanted = inputs
        return [empty_nhwc(g), *empty_like_each([inputs[place] for place in backward_places], wanted)]

    operation = register(name, forward, fake)
    operation_backward = register(f"{name}_backward", backward, fake_backward)

    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*(result for result in output[1:] if result is not None))
        ctx.set_materialize_grads(False)
        ctx.is_kept = flag is None or inputs[names.index(flag)]
        tensors, ctx.others = keep(inputs, output)
        ctx.save_for_backward(*tensors)

    def differentiate(ctx, backward, g, *_):
        grads: list[torch.Tensor | None] = [None] * len(names)
        if g is None:
            return tuple(grads)
        if not ctx.is_kept:
            raise RuntimeError(f"{name} was called with {flag}=False, so it has no backward")
        wanted = [ctx.needs_input_grad[place] for place in places]
        g = g.contiguous(memory_format=torch.channels_last)
        grads[0], *found = backward(g, *ctx.saved_tensors, *ctx.others, wanted)
        for place, grad, want in zip(places, found, wanted, strict=True):
            grads[place] = grad if want else None
        return tuple(grads)

    operation.register_autograd(
        lambda ctx, *gradients: differentiate(ctx, operation_backward, *gradients), setup_context=setup_context
    )

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            results = forward(*inputs)
            setup_context(ctx, inputs, results)
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
