"""Turns a forward and a backward launcher into a differentiable operation.

In eager mode an op is a ``torch.autograd.Function`` over its launchers, which is the cheapest
differentiable call torch has. While torch is compiling, or whoever else records what it dispatches,
it is a pair of ``torch.library`` custom ops over the same launchers, which ``torch.compile`` keeps
whole instead of breaking the graph.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from bertfast.ops._recorders import (
    is_recorded,
    is_transformed,
    refuse_forward_mode,
    refuse_onnx,
)

# The launcher of each custom op, by its name in torch: for who watches what goes on in it.
LAUNCHERS: dict[str, Callable[..., Any]] = {}


class Operator:
    """One op word, differentiable in eager mode and where somebody records.

    Args:
        word: the op's name; the custom ops are ``bertfast::<word>`` and
            ``bertfast::<word>_backward``.
        forward: launcher; its first output is the op's result, the others are saved. Its
            annotations give the custom op's schema, so outputs are tensors that alias nothing.
        backward: launcher for the gradients.
        forward_fake, backward_fake: the same signatures, giving empty tensors of the right shapes.
        save: ``save(ctx, inputs, outputs)`` keeps what ``gradients`` needs.
        gradients: ``gradients(ctx, saved, dout, backward)`` returns one gradient (or None) per
            input of ``forward``; ``saved`` are the saved tensors, which may be read only once
            (a checkpoint computes them when they are), and ``backward`` is the launcher or the
            custom op over it.
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
        gradients: Callable[..., tuple[Tensor | None, ...]],
    ) -> None:
        forward, backward = _outside_autocast(forward), _outside_autocast(backward)
        self.word = word
        self.forward = forward
        forward_op, backward_op = _custom_ops(
            word, forward, backward, forward_fake, backward_fake, save, gradients
        )
        self.custom_op = forward_op
        forward, backward = _either(forward, forward_op), _either(backward, backward_op)
        self.function = _function(word, self.forward, backward, save, gradients)
        self.transformable = _transformable(word, forward, backward, save, gradients)

    def __call__(self, *inputs: Any) -> Tensor:
        if is_recorded(inputs):
            return self._recorded(*inputs)
        if not torch.is_grad_enabled():
            return _first(self.forward(*inputs))
        return self.function.apply(*inputs)

    def _recorded(self, *inputs: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            refuse_forward_mode(self.word, inputs)
            refuse_onnx(self.word)
            if is_transformed():
                return _first(self.transformable.apply(*inputs))
        return _first(self.custom_op(*inputs))


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


def _either(launcher: Callable[..., Any], custom_op: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher, or the custom op over it where somebody records the backward pass."""

    def call(*inputs: Any) -> Any:
        return custom_op(*inputs) if is_recorded(inputs) else launcher(*inputs)

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
            saved = ctx.saved_tensors
            if not torch.is_grad_enabled():
                return gradients(ctx, saved, dout, backward)
            # create_graph=True: tie the gradients to all they depend on, so that differentiating
            # them again fails loudly instead of leaving a term out.
            return Gradient.apply(lambda: gradients(ctx, saved, dout, backward), dout, *saved)

    Eager.__name__ = Eager.__qualname__ = f"bertfast_{word}"
    return Eager


def _transformable(
    word: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    save: Callable[..., None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> type[torch.autograd.Function]:
    """The op as ``torch.func`` transforms it, which does not know how to differentiate a custom op.

    It takes longer than the eager function, since what is saved must be outputs.
    """

    class Gradient(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return backward(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Tensor) -> Any:
            _refuse(word)

    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return forward(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = _outputs(output)
            ctx.mark_non_differentiable(*outputs[1:])
            save(ctx, inputs, outputs)

        @staticmethod
        def backward(ctx: Any, dout: Tensor, *_: Any) -> Any:
            return gradients(ctx, ctx.saved_tensors, dout, Gradient.apply)

    Transformable.__name__ = Transformable.__qualname__ = f"bertfast_{word}"
    return Transformable


def _custom_ops(
    word: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    save: Callable[..., None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    forward_op = torch.library.custom_op(f"bertfast::{word}", forward, mutates_args=())
    forward_op.register_fake(forward_fake)
    backward_op = torch.library.custom_op(f"bertfast::{word}_backward", backward, mutates_args=())
    backward_op.register_fake(backward_fake)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, inputs, _outputs(output))

    def run_backward(ctx: Any, dout: Tensor, *_: Any) -> Any:
        return gradients(ctx, ctx.saved_tensors, dout, backward_op)

    def refuse_double(ctx: Any, *_: Any) -> Any:
        _refuse(word)

    forward_op.register_autograd(run_backward, setup_context=setup_context)
    backward_op.register_autograd(refuse_double)
    LAUNCHERS[f"bertfast::{word}"] = forward
    LAUNCHERS[f"bertfast::{word}_backward"] = backward
    return forward_op, backward_op
