import pytest
import torch

from bertfast import ops, testing


@pytest.mark.parametrize(("backend", "isa", "precision"), testing.gate_grid("gelu"))
def test_gate(backend, isa, precision, use_isa):
    if isa:
        use_isa(isa)
    testing.run_gates("gelu", backend, precision)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_reference_gradcheck(approximate):
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, b: ops.gelu(x, b, approximate=approximate, backend="reference"), (x, bias)
    )
    assert torch.autograd.gradcheck(
        lambda x: ops.gelu(x, approximate=approximate, backend="reference"), (x,)
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_every_finite_input_gives_a_finite_output_and_nan_stays(approximate):
    """Every bfloat16 value there is, on the kernel that computes in float."""
    values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = values.float().requires_grad_()
    out = ops.gelu(x, approximate=approximate, backend="cpu")
    (slope,) = torch.autograd.grad(out, x, torch.ones_like(out))
    finite = x.detach().isfinite()
    assert out[finite].isfinite().all()
    assert slope[finite].isfinite().all()
    assert out[x.isnan()].isnan().all()
    assert slope[x.isnan()].isnan().all()
    expected = torch.nn.functional.gelu(x.detach().double(), approximate=approximate)
    assert (out.detach() - expected)[finite & (x.abs() < 100)].abs().max() < 1e-6
    assert torch.equal(out[x > 10], x[x > 10])
    # Exactly nothing on the far left, not a rounding error times a huge x.
    assert out[finite & (x < -20)].abs().max() < 1e-30


def test_result_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    x, dout = torch.randn(2, 257, 515).unbind(0)
    bias = torch.randn(515)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, bias)]
            out = ops.gelu(*leaves, backend="cpu")
            results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_cpu_dispatches_no_torch_arithmetic():
    x, bias, dout = torch.randn(20, 24), torch.randn(24), torch.randn(20, 24)
    leaves = [x.requires_grad_(), bias.requires_grad_()]
    with testing.KernelOnly() as seen:
        torch.autograd.grad(ops.gelu(*leaves, backend="cpu"), leaves, dout)
    assert "empty_like" in seen.seen


MUTATIONS = {
    "cut off too early": ("cpu/gelu.cpp", "p, q, 5.5f", "p, q, 3.0f"),
    "slope cut off too early": ("cpu/gelu.cpp", "p, q, 5.9f", "p, q, 3.5f"),
    "a coefficient's digit": ("cpu/gelu.cpp", "3.38524889e-2f", "3.38824889e-2f"),
    "a slope coefficient's digit": ("cpu/gelu.cpp", "1.36698693e-2f", "1.36998693e-2f"),
    "0 and 1 exchanged": (
        "cpu/gelu.cpp",
        "x > 0.0f ? broadcast(1.0f)",
        "x < 0.0f ? broadcast(1.0f)",
    ),
    "tanh's cubic": ("cpu/gelu.cpp", "(-2.0f * 0.7978845608f * 0.044715f)", "(-0.07135f)"),
    "tanh's slope": ("cpu/gelu.cpp", "s + z * s * (1.0f - s) * du", "s + z * s * (1.0f - s)"),
    "exp's reduction": ("cpu/vector.h", "n * 2.12194440e-4f", "n * 2.0e-4f"),
    "no bias in backward": (
        "cpu/gelu.cpp",
        "Gelu::slope(io.get(x + c) + io.get(bias + c))",
        "Gelu::slope(io.get(x + c))",
    ),
    "bias of the wrong column": ("cpu/gelu.cpp", "io.get(bias + column + c)", "io.get(bias + c)"),
    "partial sums not cleared": (
        "cpu/gelu.cpp",
        "std::memset(dbias, 0, sizeof(float)",
        "std::memset(dbias, 0, 0 * sizeof(float)",
    ),
    "last block of rows left out": (
        "cpu/gelu.cpp",
        "block < a.blocks; ++block)\n      db +=",
        "block < a.blocks - 1; ++block)\n      db +=",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_gate_bites(name, mutants):
    with mutants.in_place(*MUTATIONS[name]):
        assert testing.gates_are_red("gelu", "cpu")


def test_unchanged_copy_passes(mutants):
    """The builds of test_gate_bites are red because of their change, and of nothing else."""
    with mutants.in_place("cpu/gelu.cpp", "5.5f", "5.5f"):
        assert not testing.gates_are_red("gelu", "cpu")
        assert not testing.gates_are_red("layernorm", "cpu")


TRITON_MUTATIONS = {
    "the bias left out": (
        "gelu.py",
        "z += tl.load(bias + c0 + c, mask=column_there, other=0.0).to(tl.float32)[None, :]",
        "z += 0.0",
    ),
    "the bias of the first piece": (
        "gelu.py",
        "z += tl.load(bias + c0 + c, mask",
        "z += tl.load(bias + c, mask",
    ),
    "no tails": (
        "gelu.py",
        "tl.abs(z) >= 5.5",
        "tl.abs(z) >= 55.0",
    ),
    "the slope's tails end too early": (
        "gelu.py",
        "tl.abs(z) >= 5.9",
        "tl.abs(z) >= 1.9",
    ),
    "tanh for erf": (
        "gelu.py",
        "_tanh_cdf(z) if TANH else _cdf(z)",
        "_tanh_cdf(z)",
    ),
    "no cubic in tanh's slope": (
        "gelu.py",
        "(z * z * (6.0 * _C * _A) + 2.0 * _C)",
        "(2.0 * _C)",
    ),
    "a coefficient of the slope": (
        "gelu.py",
        "p * t - 2.05656518e-2",
        "p * t + 2.05656518e-2",
    ),
    "only a program's last tile in dbias": (
        "gelu.py",
        "dbias += tl.sum(dz, axis=0)",
        "dbias = tl.sum(dz, axis=0)",
    ),
    "a program skips tiles": (
        "gelu.py",
        "tl.range(program, tiles, programs,",
        "tl.range(program, tiles, 2 * programs,",
    ),
    "the last rows left out": (
        "gelu.py",
        "row_there = r < tl.minimum(rows - first, ROWS).to(tl.int32)\n    column",
        "row_there = r < tl.minimum(rows - first - 1, ROWS).to(tl.int32)\n    column",
    ),
}


@pytest.mark.parametrize("name", TRITON_MUTATIONS)
def test_triton_gate_bites(name, triton_mutants):
    with triton_mutants.in_place(*TRITON_MUTATIONS[name]):
        assert testing.gates_are_red("gelu", "triton")


CUDA_MUTATIONS = {
    "the bias of the first columns": (
        "cuda/gelu.cu",
        "load<WIDE>(column, left)",
        "load<WIDE>(0, left)",
    ),
    "tanh without its cubic term": (
        "cuda/gelu.cu",
        "tanhf(sqrt_two_over_pi * (z + cubic * z * z * z))",
        "tanhf(sqrt_two_over_pi * z)",
    ),
    "the density without its constant": (
        "cuda/gelu.cu",
        "z * one_over_sqrt_two_pi * expf",
        "z * expf",
    ),
    "the slope of the tanh left out": (
        "cuda/gelu.cu",
        "* (1.0f - t * t) * inner_slope",
        "* (1.0f - t * t)",
    ),
    "dbias of one row of threads": (
        "cuda/sums.h",
        "for (int i = 0; i < strip_down; ++i)",
        "for (int i = 0; i < 1; ++i)",
    ),
    "dbias of the neighbouring column": (
        "cuda/sums.h",
        "const int own = threadIdx.x / group, j = threadIdx.x % group;",
        "const int own = threadIdx.x / group, j = threadIdx.x % group ^ 1;",
    ),
    "rows of the next blocks left out": (
        "cuda/gelu.cu",
        "row += int64_t{strip_down} * gridDim.y",
        "row += a.rows",
    ),
}


@pytest.mark.parametrize("name", CUDA_MUTATIONS)
def test_cuda_gate_bites(name, cuda_mutants):
    with cuda_mutants.in_place(*CUDA_MUTATIONS[name]):
        assert testing.gates_are_red("gelu", "cuda")


BAD = {
    "x: expected a floating-point": ({"x": torch.ones(2, 4, dtype=torch.int64)}, TypeError),
    "x: expected at least one dimension": ({"x": torch.ones(())}, ValueError),
    r"bias: expected shape \(4,\), got \(5,\)": ({"bias": torch.ones(5)}, ValueError),
    "bias: expected torch.float32": ({"bias": torch.ones(4).bfloat16()}, TypeError),
    "approximate: expected 'none' or 'tanh', got 'erf'": ({"approximate": "erf"}, ValueError),
    "gelu: backend 'cpu' cannot run: the input is torch.float64": (
        {"x": torch.ones(2, 4).double(), "backend": "cpu"},
        RuntimeError,
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    changes, error = BAD[message]
    with pytest.raises(error, match=message):
        ops.gelu(**{"x": torch.ones(2, 4), **changes})
