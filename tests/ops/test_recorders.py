"""An op under whoever records, transforms or watches it: the right value or a named refusal."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bertfast import ops, testing

# One case of each op's every kind of call.
CASES = [
    case
    for word, names in {
        "attention": ("odd", "cross"),
        "layernorm": ("odd-p0.1", "plain"),
        "gelu": ("odd-none", "no_bias"),
        "embedding": ("repeated_ids", "no_token_types"),
        "cross_entropy": ("odd", "no_bias"),
        "dropout": ("odd",),
    }.items()
    for case in testing.CASES[word]
    if case.name in names
]
by_case = pytest.mark.parametrize("case", CASES, ids=str)


class Call:
    """A case as a function of what it differentiates, and other values of the same shapes."""

    def __init__(self, case: testing.Case) -> None:
        self.word = case.word
        self.tensors = case.inputs(torch.float32)
        self.names = list(case.grads)
        self.op = case.op
        self.first = tuple(self.tensors[name] for name in self.names)
        generator = torch.Generator().manual_seed(1)
        self.second = tuple(torch.randn(x.shape, generator=generator) for x in self.first)
        self.dout = torch.randn(self(*self.first).shape, generator=generator)

    def __call__(self, *values: Tensor) -> Tensor:
        return self.op({**self.tensors, **dict(zip(self.names, values, strict=True))}, "cpu")

    def loss(self, values: tuple[Tensor, ...], dout: Tensor) -> Tensor:
        return (self(*values) * dout).sum()

    def gradients(self, values: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor, ...]:
        leaves = tuple(x.detach().clone().requires_grad_() for x in values)
        return torch.autograd.grad(self.loss(leaves, dout), leaves)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(params=[True, False], ids=["grad", "no_grad"])
def grad_mode(request: pytest.FixtureRequest) -> object:
    with torch.set_grad_enabled(request.param):
        yield


def with_make_fx(mode: str) -> Callable[..., Callable[..., Tensor]]:
    def record(call: Call) -> Callable[..., Tensor]:
        return make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(*call.first)

    return record


def with_jit(call: Call) -> Callable[..., Tensor]:
    return torch.jit.trace(lambda *values: call(*values), call.first)


RECORDERS = {
    "jit": with_jit,
    "make_fx-real": with_make_fx("real"),
    "make_fx-fake": with_make_fx("fake"),
    "make_fx-symbolic": with_make_fx("symbolic"),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("recorder", RECORDERS)
@by_case
def test_a_recording_computes_other_inputs(
    case: testing.Case, recorder: str, grad_mode: None
) -> None:
    call = Call(case)
    recorded = RECORDERS[recorder](call)
    assert torch.equal(recorded(*call.second), call(*call.second))
    leaves = tuple(x.clone().requires_grad_() for x in call.second)
    with torch.enable_grad():
        found = torch.autograd.grad((recorded(*leaves) * call.dout).sum(), leaves)
        assert same(found, call.gradients(call.second, call.dout))


@by_case
def test_shapes_are_worked_out_without_values(case: testing.Case, grad_mode: None) -> None:
    call = Call(case)
    expected = call(*call.first)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        values = tuple(mode.from_tensor(x) for x in call.first)
        inside = call(*values)
    # The mode is gone, the tensors without memory are still there.
    call.tensors = {
        name: mode.from_tensor(x) if isinstance(x, Tensor) else x
        for name, x in call.tensors.items()
    }
    for out in (inside, call(*values)):
        assert isinstance(out, FakeTensor)
        assert (out.shape, out.dtype) == (expected.shape, expected.dtype)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@by_case
def test_functorch_gradients_and_batches(case: testing.Case) -> None:
    call = Call(case)
    expected = call.gradients(call.first, call.dout)
    assert same(grad(call.loss)(call.first, call.dout), expected)
    both = tuple(torch.stack(pair) for pair in zip(call.first, call.second, strict=True))
    outs = vmap(call)(*both)
    with torch.no_grad():
        assert torch.equal(vmap(call)(*both), outs)
    assert torch.equal(outs[1], call(*call.second))
    second = call.gradients(call.second, call.dout)
    for found in (
        vmap(grad(call.loss), in_dims=(0, None))(both, call.dout),
        grad(lambda values: vmap(call.loss, in_dims=(0, None))(values, call.dout).sum())(both),
    ):
        assert same(tuple(x[0] for x in found), expected)
        assert same(tuple(x[1] for x in found), second)


@by_case
def test_forward_mode_is_refused_by_name(case: testing.Case, grad_mode: None) -> None:
    call = Call(case)
    refused = pytest.raises(
        NotImplementedError, match=rf"bertfast\.ops\.{case.word}.*: forward-mode"
    )
    with refused:
        jvp(call, call.first, call.second)
    with refused, forward_ad.dual_level():
        call(*(forward_ad.make_dual(x, x) for x in call.first))
    # Inside of another transform, which hides the tangent.
    with refused:
        jvp(lambda *values: grad(call.loss)(values, call.dout), call.first, call.second)
    with forward_ad.dual_level():  # where nothing has a tangent there is nothing to refuse
        assert torch.equal(call(*call.first), call(*call.first))


def test_a_functorch_gradient_of_the_gradient_is_refused_by_name() -> None:
    def penalty(x: Tensor) -> Tensor:
        return grad(lambda y: ops.gelu(y).sum())(x).square().sum()

    with pytest.raises(RuntimeError, match=r"bertfast\.ops\.gelu: double backward"):
        grad(penalty)(torch.randn(3, 4))


@by_case
def test_a_watcher_sees_the_op_forward_and_backward(case: testing.Case) -> None:
    call = Call(case)
    expected = call.gradients(call.first, call.dout)
    with FlopCounterMode(display=False):
        assert same(call.gradients(call.first, call.dout), expected)
    leaves = tuple(x.clone().requires_grad_() for x in call.first)
    loss = call.loss(leaves, call.dout)

    seen = []

    class Watcher(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Watcher():
        assert same(torch.autograd.grad(loss, leaves), expected)
    assert f"bertfast::{case.word}_backward" in seen


class Flagged(Tensor):
    """A subclass that torch gives back where it went in."""


def test_a_subclass_comes_back() -> None:
    x = torch.randn(3, 4)
    out = ops.gelu(x.as_subclass(Flagged))
    assert type(out) is Flagged
    assert torch.equal(out.as_subclass(Tensor), ops.gelu(x))


def test_a_parameter_is_taken_as_it_is() -> None:
    x, bias = torch.randn(3, 4), nn.Parameter(torch.randn(4))
    # The custom op's node is torch's GeneratedBackwardFor_bertfast_gelu.
    assert "Generated" not in ops.gelu(x, bias).grad_fn.name()


@by_case
def test_checkpoint_reads_saved_tensors_once(case: testing.Case) -> None:
    call = Call(case)
    leaves = tuple(x.clone().requires_grad_() for x in call.first)
    for create_graph in (False, True):
        out = checkpoint(call, *leaves, use_reentrant=False)
        found = torch.autograd.grad((out * call.dout).sum(), leaves, create_graph=create_graph)
        assert same(found, call.gradients(call.first, call.dout))


@pytest.mark.filterwarnings("ignore")
@by_case
def test_onnx_is_refused_by_name_and_writes_nothing(case: testing.Case) -> None:
    call = Call(case)

    class Model(nn.Module):
        def forward(self, *values: Tensor) -> Tensor:
            return call(*values)

    file, message = io.BytesIO(), rf"bertfast\.ops\.{case.word}: ONNX"
    with pytest.raises(NotImplementedError, match=message):
        torch.onnx.export(Model(), call.first, file, dynamo=False)
    assert file.getvalue() == b""


@pytest.mark.parametrize("layout", ["sparse", "mkldnn", "freed"])
def test_what_has_no_memory_is_refused(layout: str) -> None:
    x = torch.randn(3, 4)
    if layout == "freed":
        x.untyped_storage().resize_(0)
    else:
        x = x.to_sparse() if layout == "sparse" else x.to_mkldnn()
    with torch.no_grad(), pytest.raises((RuntimeError, TypeError)):
        ops.gelu(x)
