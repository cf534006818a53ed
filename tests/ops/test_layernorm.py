import pytest
import torch

from bertfast import ops, testing
from bertfast.backends import kernel
from bertfast.kernels import cpu

SEED = testing.seed_tensor()


@pytest.mark.parametrize(("backend", "isa", "precision"), testing.gate_grid("layernorm"))
def test_gate(backend, isa, precision, use_isa):
    if isa:
        use_isa(isa)
    testing.run_gates("layernorm", backend, precision)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("with_residual", [False, True])
def test_reference_gradcheck(dropout_p, with_residual):
    x, residual = (torch.randn(4, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(9, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(x, weight, bias, residual):
        return ops.layernorm(
            x,
            weight,
            bias,
            residual=residual if with_residual else None,
            dropout_p=dropout_p,
            seed=SEED,
            backend="reference",
        )

    assert torch.autograd.gradcheck(call, (x, weight, bias, residual))


@pytest.mark.parametrize("columns", [1, 8, 33, 768, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_mask_is_the_reference_mask(columns, dtype, use_isa):
    """Bit for bit, on every instruction set: x = 1, no residual, weight 1 tells kept from dropped
    through the saved sum."""
    x = torch.ones(50, columns, dtype=dtype)
    weight, bias = torch.ones(columns), torch.zeros(columns)

    def total(backend):
        return kernel("layernorm", backend).forward(*arguments)[1]

    for seed in (0, -1, testing.SEED):
        for site in (0, 7, 0xFFFFFFFF):
            arguments = (x, weight, bias, None, testing.seed_tensor(seed), 1e-12, 20000, site, True)
            expected = total("reference")
            for isa in cpu.library().isas():
                use_isa(isa)
                assert torch.equal(total("cpu"), expected), isa


def test_result_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    x, residual, dout = torch.randn(3, 257, 515).unbind(0)
    weight, bias = torch.randn(515), torch.randn(515)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
            out = ops.layernorm(
                *leaves[:3], residual=leaves[3], dropout_p=0.1, seed=SEED, backend="cpu"
            )
            results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_cpu_dispatches_no_torch_arithmetic():
    x, residual, dout = (torch.randn(20, 24) for _ in range(3))
    leaves = [x, torch.randn(24), torch.randn(24), residual]
    leaves = [t.requires_grad_() for t in leaves]
    with testing.KernelOnly() as seen:
        out = ops.layernorm(
            *leaves[:3], residual=leaves[3], dropout_p=0.1, seed=SEED, backend="cpu"
        )
        torch.autograd.grad(out, leaves, dout)
    assert "empty" in seen.seen or "empty_like" in seen.seen


def test_reference_would_fail_the_dispatch_test():
    x = torch.randn(20, 24)
    with testing.KernelOnly(), pytest.raises(AssertionError, match="a kernel dispatched"):
        ops.layernorm(x, torch.ones(24), torch.ones(24), backend="reference")


MUTATIONS = {
    "mean and rstd swapped": (
        "cpu/layernorm.cpp",
        "a.statistics[r] = statistics.mean;\n    a.statistics[a.rows + r] = statistics.rstd;",
        "a.statistics[r] = statistics.rstd;\n    a.statistics[a.rows + r] = statistics.mean;",
    ),
    "the tail counts in the variance": (
        "cpu/norm.h",
        "io.counted(io.get(row + c) - about)",
        "(io.get(row + c) - about)",
    ),
    "variance about zero": (
        "cpu/norm.h",
        "io.counted(io.get(row + c) - about)",
        "io.counted(io.get(row + c))",
    ),
    "eps dropped": ("cpu/norm.h", " + eps)", ")"),
    "no 1 / (1 - p)": ("cpu/dropout.h", "v * scale_", "v"),
    "lanes in the wrong order": (
        "cpu/dropout.h",
        "out[2 * i] = a[i];\n    out[2 * i + 1] = b[i];",
        "out[2 * i] = b[i];\n    out[2 * i + 1] = a[i];",
    ),
    "six rounds": ("philox.h", "philox_rounds = 7", "philox_rounds = 6"),
    "every row of four has the first one's mask": (
        "cpu/layernorm.cpp",
        "masks[r].draw(row + r, first, last - first)",
        "masks[r].draw(row, first, last - first)",
    ),
    "the second piece of a row has the first one's mask": (
        "cpu/dropout.h",
        "(first_column + column) / 8",
        "column / 8",
    ),
    "partial sums not cleared": (
        "cpu/norm.h",
        "std::memset(dweight, 0,",
        "std::memset(dbias, 0, 0 *",
    ),
    "no mean of g * xhat": ("cpu/norm.h", "- xhat * mean_gx[r]", ""),
    "dresidual masked too": (
        "cpu/layernorm.cpp",
        "if (dresidual) io.put(dresidual + at, ds);",
        "if (dresidual) io.put(dresidual + at, masks[r].apply(ds, c - first));",
    ),
    "no tail": ("cpu/vector.h", "if (column < end) body", "if (column < 0) body"),
    "statistics of the unrounded sum": ("cpu/layernorm.cpp", "v = as_stored(x, v);", ""),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_gate_bites(name, mutants):
    with mutants.in_place(*MUTATIONS[name]):
        assert testing.gates_are_red("layernorm", "cpu")


TRITON_MUTATIONS = {
    "eps dropped": (
        "_norm.py",
        "tl.rsqrt(variance + eps)",
        "tl.rsqrt(variance)",
    ),
    "variance about zero": (
        "_norm.py",
        "d = tl.where(inside, v - about[:, None], 0.0)",
        "d = tl.where(inside, v, 0.0)",
    ),
    "what is beyond the row counts in the variance": (
        "_norm.py",
        "d = tl.where(inside, v - about[:, None], 0.0)",
        "d = v - about[:, None]",
    ),
    "the rest of the mean forgotten": (
        "_norm.py",
        "return about + rest,",
        "return about,",
    ),
    "rstd saved for the mean": (
        "layernorm.py",
        "tl.store(statistics + first + r, mean, mask=there)",
        "tl.store(statistics + first + r, rstd, mask=there)",
    ),
    "statistics of the unrounded sum": (
        "layernorm.py",
        "    return v.to(stored.dtype)\n",
        "    return v\n",
    ),
    "no 1 / (1 - p)": (
        "layernorm.py",
        "v = tl.where(keep, v * scale, 0.0)",
        "v = tl.where(keep, v, 0.0)",
    ),
    "six rounds": (
        "_dropout.py",
        "static_range(7)",
        "static_range(6)",
    ),
    "words in the wrong order": (
        "_dropout.py",
        "tl.join(tl.join(w0, w2), tl.join(w1, w3))",
        "tl.join(tl.join(w0, w1), tl.join(w2, w3))",
    ),
    "halves swapped": (
        "_dropout.py",
        "tl.join(words & 0xFFFF, words >> 16)",
        "tl.join(words >> 16, words & 0xFFFF)",
    ),
    "the seed's high word ignored": (
        "_dropout.py",
        "(key >> 32).to(tl.uint32),",
        "key.to(tl.uint32),",
    ),
    "every tile has the first one's mask": (
        "layernorm.py",
        "keep = keep_rows(seed, site, threshold, first + r, c0, c.shape[0])\n        v =",
        "keep = keep_rows(seed, site, threshold, r, c0, c.shape[0])\n        v =",
    ),
    "every piece has the first one's mask": (
        "layernorm.py",
        "keep = keep_rows(seed, site, threshold, first + r, c0, c.shape[0])\n        v =",
        "keep = keep_rows(seed, site, threshold, first + r, 0, c.shape[0])\n        v =",
    ),
    "dresidual scaled too": (
        "layernorm.py",
        "tl.store(dresidual + at, ds.to(dx",
        "tl.store(dresidual + at, (ds * scale).to(dx",
    ),
    "no mean of g * xhat": (
        "_norm.py",
        " - xhat * mean_gx[:, None]",
        "",
    ),
    "only a program's last tile in dweight": (
        "layernorm.py",
        "dweight += tl.sum(dy * xhat, axis=0)",
        "dweight = tl.sum(dy * xhat, axis=0)",
    ),
    "only the first programs are summed": (
        "_norm.py",
        "for first in range(0, programs, ROWS):",
        "for first in range(0, 1, ROWS):",
    ),
    "half of the programs": (
        "_norm.py",
        "mask=(row < programs)[:, None]",
        "mask=(row < programs // 2)[:, None]",
    ),
    "pieces joined without their distance": (
        "layernorm.py",
        "squares += step * step * (c0 * share)",
        "squares += 0.0",
    ),
    "a long row's gradient without its mean": (
        "layernorm.py",
        "mean_g = tl.load(means + first + r, mask=there, other=0.0)",
        "mean_g = tl.zeros((ROWS,), tl.float32)",
    ),
}


@pytest.mark.parametrize("name", TRITON_MUTATIONS)
def test_triton_gate_bites(name, triton_mutants):
    with triton_mutants.in_place(*TRITON_MUTATIONS[name]):
        assert testing.gates_are_red("layernorm", "triton")


CUDA_MUTATIONS = {
    "no mean in the output": (
        "cuda/layernorm.cu",
        "(s.value[j] - of.mean) * of.rstd * w.value[j]",
        "s.value[j] * of.rstd * w.value[j]",
    ),
    "statistics of another row": (
        "cuda/layernorm.cu",
        "a.statistics[a.rows + row] = of.rstd;",
        "a.statistics[a.rows + first] = of.rstd;",
    ),
    "the sum is not rounded before its statistics": (
        "cuda/layernorm.cu",
        "s.value[j] = to_float(from_float<T>(s.value[j]));",
        "",
    ),
    "a row of a block is left out": (
        "cuda/layernorm.cu",
        "const bool there = row < a.rows;\n    Group s[",
        "const bool there = row < a.rows && own < 3;\n    Group s[",
    ),
    "elements behind a row's end count in the streamed sums": (
        "cuda/layernorm.cu",
        "const float d = j < left ? s.value[j] - about : 0.0f;",
        "const float d = s.value[j] - about;",
    ),
    "no second mean in ds": (
        "cuda/layernorm.cu",
        "- means.a - p.xhat.value[j] * means.b",
        "- means.a",
    ),
    "the residual's gradient is dropped out, too": (
        "cuda/layernorm.cu",
        "store_group<WIDE>(static_cast<T*>(a.dresidual) + at, ds, left);",
        "store_group<WIDE>(static_cast<T*>(a.dresidual) + at, mask.apply(ds, row, number), left);",
    ),
    "only the first warp's share of dweight": (
        "cuda/layernorm.cu",
        "other < Shape::ROWS - 1; ++other)",
        "other < 0; ++other)",
    ),
    "dbias in dweight's place": (
        "cuda/layernorm.cu",
        "Group sum = which == 0 ? dweight[i] : dbias[i];",
        "Group sum = which == 0 ? dbias[i] : dweight[i];",
    ),
    "shares of the streamed rows overwritten": (
        "cuda/sums.h",
        "for (int i = 0; i < strip_down; ++i)",
        "for (int i = 0; i < 1; ++i)",
    ),
    "the last block's share left out": (
        "cuda/sums.h",
        "i < a.blocks; i += sum_down",
        "i < a.blocks - 1; i += sum_down",
    ),
    "columns beyond 4096 dropped": (
        "cuda/layernorm.cu",
        "return f(InRegisters<256, 4>{});",
        "return f(InRegisters<256, 2>{});",
    ),
    "no dx of streamed rows": (
        "cuda/layernorm.cu",
        "store_ds<T, DROPOUT, WIDE>(a, mask, p,",
        "if (!WIDE) store_ds<T, DROPOUT, WIDE>(a, mask, p,",
    ),
    "the sum before is overwritten": (
        "cuda/common.h",
        "// What is there from the sum before has been read by all.\n    __syncthreads();",
        "",
    ),
    "rows that start anywhere taken for aligned": (
        "cuda/common.h",
        "return reinterpret_cast<uintptr_t>(p) % 16 == 0;",
        "return p != nullptr || p == nullptr;",
    ),
    "a warp's sum for the block's": (
        "cuda/common.h",
        "for (int i = 0; i < warps; ++i) {\n      v.a",
        "for (int i = 0; i < 1; ++i) {\n      v.a",
    ),
    "the half of a warp": (
        "cuda/common.h",
        "for (int lanes = 16; lanes > 0; lanes /= 2)",
        "for (int lanes = 8; lanes > 0; lanes /= 2)",
    ),
}


@pytest.mark.parametrize("name", CUDA_MUTATIONS)
def test_cuda_gate_bites(name, cuda_mutants):
    with cuda_mutants.in_place(*CUDA_MUTATIONS[name]):
        assert testing.gates_are_red("layernorm", "cuda")


BAD = {
    "x: expected a floating-point": ({"x": torch.ones(2, 4, dtype=torch.int64)}, TypeError),
    "x: expected a tensor": ({"x": [1.0]}, TypeError),
    r"x: expected shape \(\.\.\., C\)": ({"x": torch.ones(())}, ValueError),
    r"weight: expected shape \(4,\), got \(5,\)": ({"weight": torch.ones(5)}, ValueError),
    "weight: expected torch.float32": ({"weight": torch.ones(4).half()}, TypeError),
    "bias: expected a tensor": ({"bias": None}, TypeError),
    "bias: expected device cpu": ({"bias": torch.ones(4, device="meta")}, ValueError),
    "residual: expected torch.float32": ({"residual": torch.ones(2, 4).double()}, TypeError),
    r"residual: expected shape \(2, 4\)": ({"residual": torch.ones(4)}, ValueError),
    "eps: expected a number >= 0": ({"eps": -1.0}, ValueError),
    "eps: expected a number, got str": ({"eps": "a"}, TypeError),
    "site: expected an int, got float": ({"dropout_p": 0.1, "seed": SEED, "site": 1.5}, TypeError),
    "dropout_p: expected a probability from 0 to 1, got 1.5": ({"dropout_p": 1.5}, ValueError),
    "dropout_p: expected a probability from 0 to 1, got nan": (
        {"dropout_p": float("nan")},
        ValueError,
    ),
    "dropout_p: expected a probability, got str": ({"dropout_p": "0.1"}, TypeError),
    "seed: expected an int64 tensor of one element when": ({"dropout_p": 0.1}, ValueError),
    "seed: expected an int64 tensor of one element, got torch.int32": (
        {"dropout_p": 0.1, "seed": torch.zeros(1, dtype=torch.int32)},
        TypeError,
    ),
    "site: expected a 32-bit": ({"dropout_p": 0.1, "seed": SEED, "site": 1 << 32}, ValueError),
    "backend: expected one of": ({"backend": "tpu"}, ValueError),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    changes, error = BAD[message]
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(4), "bias": torch.ones(4), **changes}
    with pytest.raises(error, match=message):
        ops.layernorm(**arguments)
