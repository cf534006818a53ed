"""Turns a forward and a backward launcher into a differentiable operation.

In eager mode an op is a ``torch.autograd.Function`` over its launchers, which is the cheapest
differentiable call torch has. While torch is compiling it is a pair of ``torch.library`` custom
ops over the same launchers, which ``torch.compile`` keeps whole instead of breaking the graph.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


class Operator:
    """One op word, differentiable in eager mode and under ``torch.compile``.

    Args:
        word: the op's name; the custom ops are ``bertfast::<word>`` and
            ``bertfast::<word>_backward``.
        forward: launcher; its first output is the op's result, the others are saved. Its
            annotations give the custom op's schema, so outputs are tensors that alias nothing.
        backward: launcher for the gradients.
        forward_fake, backward_fake: the same signatures, giving empty tensors of the right shapes.
        save: ``save(ctx, inputs, outputs)`` keeps what ``gradients`` needs.
        gradients: ``gradients(ctx, dout, backward)`` returns one gradient (or None) per input of
            ``forward``; ``backward`` is the launcher or the custom op over it.
    """

    def __init__(
        self,
        word: str,
        *,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        forward_fake: Callable[..., Any],
        backward_fake: Callable[..., Any],
        save: Callable[[Any, Sequence[Any], Sequence[Tensor]], None],
        gradients: Callable[[Any, Tensor, Callable[..., Any]], tuple[Tensor | None, ...]],
    ) -> None:
        forward, backward = _outside_autocast(forward), _outside_autocast(backward)
        self.forward = forward
        self.function = _function(word, forward, backward, save, gradients)
        self.custom_op = _custom_op(
            word, forward, backward, forward_fake, backward_fake, save, gradients
        )

    def __call__(self, *inputs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return _first(self.custom_op(*inputs))
        if not torch.is_grad_enabled():
            return _first(self.forward(*inputs))
        return self.function.apply(*inputs)


def _first(outputs: Any) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _outputs(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _outside_autocast(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast must not reach into a launcher: the op's contract fixes every dtype in it."""

    @functools.wraps(launcher)
    def call(*inputs: Any) -> Any:
        device = "cpu" if inputs[0].is_cpu else inputs[0].device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return launcher(*inputs)
        return launcher(*inputs)

    return call


def _refuse(word: str) -> NoReturn:
    raise RuntimeError(
        f"bertfast.ops.{word}: double backward is not supported; "
        "its gradient cannot itself be differentiated (create_graph=True)"
    )


def _function(
    word: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    save: Callable[..., None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> type[torch.autograd.Function]:
    class Gradient(torch.autograd.Function):
        """Passes gradients of the first order on and refuses those of the second."""

        @staticmethod
        def forward(ctx: Any, compute: Callable[[], Any], *differentiable: Tensor) -> Any:
            return compute()

        @staticmethod
        def backward(ctx: Any, *_: Tensor) -> Any:
            _refuse(word)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            outputs = _outputs(forward(*inputs))
            save(ctx, inputs, outputs)
            return outputs[0]

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> Any:
            if not torch.is_grad_enabled():
                return gradients(ctx, dout, backward)
            # create_graph=True: tie the gradients to all they depend on, so that differentiating
            # them again fails loudly instead of leaving a term out.
            return Gradient.apply(lambda: gradients(ctx, dout, backward), dout, *ctx.saved_tensors)

    Eager.__name__ = Eager.__qualname__ = f"bertfast_{word}"
    return Eager


def _custom_op(
    word: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    save: Callable[..., None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    forward_op = torch.library.custom_op(f"bertfast::{word}", forward, mutates_args=())
    forward_op.register_fake(forward_fake)
    backward_op = torch.library.custom_op(f"bertfast::{word}_backward", backward, mutates_args=())
    backward_op.register_fake(backward_fake)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, inputs, _outputs(output))

    def run_backward(ctx: Any, dout: Tensor, *_: Any) -> Any:
        return gradients(ctx, dout, backward_op)

    def refuse_double(ctx: Any, *_: Any) -> Any:
        _refuse(word)

    forward_op.register_autograd(run_backward, setup_context=setup_context)
    backward_op.register_autograd(refuse_double)
    return forward_op
