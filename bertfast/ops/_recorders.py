"""Whether somebody records what an op does, or computes something else along with it.

A launcher hands addresses to a kernel, so all that torch sees of it are the allocations. Whoever
writes down what torch dispatches, to run it again (``torch.jit.trace``, ``make_fx``), to work out
shapes (``FakeTensorMode``), to differentiate or to batch it (``torch.func``), or only to count,
needs the op to be one operation of torch's: the custom op.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _functorch,
    _get_dispatch_mode,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _TorchDispatchModeKey,
)
from torch.autograd import forward_ad

# A tensor of any other type may have no memory, or not hold its values in it: a FakeTensor, a
# DTensor, a quantised weight. A number of another type is a symbol.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.dtype, int, float, bool, str, type(None)})
# The dispatch modes of make_fx and FakeTensorMode; others watch, and the values go their way.
_GRAPH_MODES = (_TorchDispatchModeKey.PROXY, _TorchDispatchModeKey.FAKE)


def is_recorded(inputs: Sequence[Any]) -> bool:
    """Whether an op on these inputs must go by its custom op."""
    return (
        torch.compiler.is_compiling()
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack() > 0
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or not _PLAIN.issuperset(map(type, inputs))
    )


def is_transformed() -> bool:
    """Whether this runs inside ``torch.func.grad``, ``vmap`` and the like."""
    return _functorch.peek_interpreter_stack() is not None


def is_graph_recorded() -> bool:
    """Whether what is computed now will be run again on other values. (``torch.compile`` is not
    meant: it looks whether they still fit.)"""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return _get_tracing_state() is not None or (
        _len_torch_dispatch_stack() > 0 and any(map(_get_dispatch_mode, _GRAPH_MODES))
    )


def values_are_hidden() -> bool:
    """Whether no value may be looked at and no shape may depend on one: a graph is recorded, or the
    values are those of a whole batch (``torch.func.vmap``)."""
    return is_graph_recorded() or (not torch.compiler.is_compiling() and is_transformed())


def refuse_onnx(word: str) -> None:
    """Raise NotImplementedError where ``torch.onnx.export(dynamo=False)`` traces: the trace would
    be right, but ONNX has no operator for ours.

    Raises:
        NotImplementedError: the message names the op.
    """
    if _get_tracing_state() is not None and torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            f"bertfast.ops.{word}: ONNX has no operator for it; export transformers' model of the "
            "same weights"
        )


def refuse_forward_mode(word: str, inputs: Sequence[Any]) -> None:
    """Raise NotImplementedError where a tangent comes with an input: torch would drop it silently.

    Raises:
        NotImplementedError: the message names the op.
    """
    if forward_ad._current_level < 0:
        return
    for x in inputs:
        if isinstance(x, Tensor) and _has_tangent(x):
            raise NotImplementedError(
                f"bertfast.ops.{word}: forward-mode differentiation (torch.func.jvp, jacfwd, "
                "hessian, torch.autograd.forward_ad) is not supported; use reverse mode "
                "(torch.func.grad, vjp, jacrev), or what the op computes in plain torch"
            )


def _has_tangent(x: Tensor) -> bool:
    # What another transform has wrapped may have one beneath, where no formula of ours can see it.
    if _functorch.is_functorch_wrapped_tensor(x):
        return any(
            layer.key() == _functorch.TransformType.Jvp
            for layer in _functorch.get_interpreter_stack()
        )
    return forward_ad.unpack_dual(x).tangent is not None
