"""What holds for every op: compiled as in eager, no double backward, autocast, threads."""

import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from bertfast import ops, testing
from bertfast.backends import TABLE

# A small case of every shape of call an op has: optional arguments there and not there.
COMPILED = [
    case
    for word, names in {
        "attention": ("odd", "cross", "base", "zero_lengths"),
        "layernorm": ("odd-p0.1", "plain", "odd-p0.0", "empty-p0.1", "no_residual-p0.5"),
        "gelu": ("odd-none", "odd-tanh", "no_bias"),
        "embedding": ("repeated_ids", "no_token_types", "padding_idx"),
        "cross_entropy": ("odd", "no_bias", "sum", "none_labelled"),
        "dropout": ("odd",),
    }.items()
    for case in testing.CASES[word]
    if case.name in names
]


def dtype_for(word, backend):
    """What every backend of a word but attention's on CUDA takes, here."""
    there = testing.precisions_of(word, backend)
    return torch.float32 if "float32" in there else torch.float16


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_full_graph_compile_passes_the_gate(case):
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    for backend in TABLE[case.word]:
        testing.run_gate(case, dtype_for(case.word, backend), backend, apply=compiled)
    torch.compiler.reset()


def test_compiling_first_in_a_fresh_process():
    """Nothing may be imported, or decided for good, on the first call in eager mode."""
    code = """
import torch, bertfast
from bertfast import ops
from bertfast.kernels import cpu, reference
ran = []
for module in (cpu.gelu, reference.gelu):
    def forward(x, bias, approximate, name=module.__name__, inner=module.forward):
        ran.append(name.split(".")[-2])
        return inner(x, bias, approximate)
    module.forward = forward
call = torch.compile(lambda x: ops.gelu(x), fullgraph=True, backend="aot_eager")
x = torch.randn(4, 8)
call(x)
with bertfast.backend("reference"):
    call(x)
call(x)
print(*ran)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["cpu", "reference", "cpu"], done.stderr


def test_inductor_compiles_a_whole_layer():
    """One pass through the real code generator; the other tests stop before it."""
    weight, bias = torch.randn(16), torch.randn(16)

    def layer(x, seed):
        y = ops.layernorm(x, weight, bias, residual=x, dropout_p=0.1, seed=seed)
        return ops.gelu(y * 2, bias)

    x = torch.randn(5, 16, requires_grad=True)
    seed = testing.seed_tensor()
    expected = layer(x, seed)
    out = torch.compile(layer, fullgraph=True)(x, seed)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    dout = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, x, dout), torch.autograd.grad(expected, x, dout)
    )
    torch.compiler.reset()


class Recorder:
    """Stands in for an op's launchers to see the arguments its custom ops get."""

    def __init__(self, case, backend):
        self.calls = []
        tensors = case.inputs(dtype_for(case.word, backend))
        for name in case.grads:
            tensors[name].requires_grad_()
        before = torch.compiler.is_compiling
        torch.compiler.is_compiling = lambda: True
        try:
            with self:
                out = case.op(tensors, backend)
                torch.autograd.grad(out, [tensors[n] for n in case.grads], torch.randn_like(out))
        finally:
            torch.compiler.is_compiling = before

    def __enter__(self):
        from torch.utils._python_dispatch import TorchDispatchMode

        recorder = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.namespace == "bertfast":
                    recorder.calls.append((func, args))
                return func(*args, **(kwargs or {}))

        self.mode = Mode()
        self.mode.__enter__()
        return self

    def __exit__(self, *error):
        self.mode.__exit__(*error)


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_opcheck(case):
    for backend in TABLE[case.word]:
        calls = Recorder(case, backend).calls
        assert len(calls) == 2, "one forward and one backward op"
        (forward, inputs), (backward, grad_inputs) = calls
        differentiable = [
            x.detach().requires_grad_()
            if isinstance(x, torch.Tensor) and x.is_floating_point()
            else x
            for x in inputs
        ]
        opcheck(forward, differentiable)
        # Backward has no derivative of its own, so the autograd checks do not apply to it.
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in grad_inputs]
        opcheck(backward, detached, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_double_backward_is_refused(case):
    tensors = case.inputs(torch.float64)
    wanted = []
    for name in case.grads:
        tensors[name].requires_grad_()
        wanted.append(tensors[name])
    out = case.op(tensors, "reference")
    dout = torch.randn_like(out).requires_grad_()
    grads = torch.autograd.grad(out, wanted, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), [*wanted, dout])


# Not embedding, where autocast's dtype starts: see test_embedding.
@pytest.mark.parametrize("case", [c for c in COMPILED if c.word != "embedding"], ids=str)
def test_autocast_does_not_reach_into_an_op(case):
    tensors = case.inputs(torch.float32)
    expected = case.op(tensors, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        out = case.op(tensors, "reference")
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)


def test_an_input_that_needs_no_gradient_gets_none():
    x = torch.randn(3, 4, requires_grad=True)
    frozen = torch.randn(4)
    out = ops.layernorm(x, frozen, frozen, residual=torch.randn(3, 4))
    out.backward(torch.randn_like(out))
    assert x.grad is not None
    assert frozen.grad is None
