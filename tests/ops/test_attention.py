import sys

import pytest
import torch

from bertfast import ops, testing
from bertfast.backends import kernel
from bertfast.errors import BackendError
from bertfast.kernels import cpu, cuda
from bertfast.masks import attention_keep_mask

SEED = testing.seed_tensor()


def cu(*lengths):
    return testing.cu_seqlens_of(lengths)


@pytest.mark.parametrize(("backend", "isa", "precision"), testing.gate_grid("attention"))
def test_gate(backend, isa, precision, use_isa):
    if isa:
        use_isa(isa)
    testing.run_gates("attention", backend, precision)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_gradcheck(causal, dropout_p):
    options = {"causal": causal, "dropout_p": dropout_p, "seed": SEED, "backend": "reference"}
    q = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(8, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lengths = {"cu_seqlens_q": cu(4, 0, 3), "cu_seqlens_k": cu(2, 3, 3)}
    assert torch.autograd.gradcheck(
        lambda q, k, v: ops.attention(
            q, k, v, **lengths, max_seqlen_q=4, max_seqlen_k=3, **options
        ),
        (q, k, v),
    )
    qkv = torch.randn(7, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda qkv: ops.attention_qkvpacked(qkv, cu_seqlens=cu(4, 0, 2), max_seqlen=4, **options),
        (qkv,),
    )


def test_sequences_do_not_see_each_other():
    """Each sequence alone gives what it gives in the batch, dropout included in its own rows."""
    torch.manual_seed(0)
    lengths = (5, 9, 1)
    qkv = torch.randn(15, 3, 2, 4)
    out = ops.attention_qkvpacked(qkv, cu_seqlens=cu(*lengths), max_seqlen=9)
    for piece, alone in zip(qkv.split(lengths), out.split(lengths), strict=True):
        length = piece.shape[0]
        expected = ops.attention_qkvpacked(piece, cu_seqlens=cu(length), max_seqlen=length)
        torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-6)


def test_storage_rows_are_zero_and_send_zero_gradients():
    qkv = torch.randn(10, 3, 2, 4)
    qkv[6:] = float("nan")
    qkv.requires_grad_()
    out = ops.attention_qkvpacked(qkv, cu_seqlens=cu(2, 4), max_seqlen=4)
    (grad,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    assert torch.equal(out[6:], torch.zeros(4, 2, 4))
    assert torch.equal(grad[6:], torch.zeros(4, 3, 2, 4))
    assert grad.isfinite().all()


def test_a_query_that_sees_no_key_gives_zero():
    q = torch.randn(5, 1, 4, requires_grad=True)
    kv = torch.randn(3, 1, 4)
    out = ops.attention(
        q,
        kv,
        kv,
        cu_seqlens_q=cu(5),
        cu_seqlens_k=cu(3),
        max_seqlen_q=5,
        max_seqlen_k=3,
        causal=True,
    )
    (grad,) = torch.autograd.grad(out, q, torch.randn_like(out))
    # Query i sees key j <= i + Sk - Sq = i - 2.
    assert torch.equal(out[:2], torch.zeros(2, 1, 4))
    assert torch.equal(grad[:2], torch.zeros(2, 1, 4))
    torch.testing.assert_close(out[2], kv[0])


def test_dropout_uses_the_accumulator_layout():
    """With v the identity, the output is the masked, scaled probabilities themselves."""
    length, heads, p = 70, 3, 0.25
    torch.manual_seed(0)
    q, k = torch.randn(2, length, heads, length).unbind(0)
    v = torch.eye(length).unsqueeze(1).expand(length, heads, length)
    options = {"cu_seqlens_q": cu(length), "max_seqlen_q": length}
    kept = ops.attention(q, k, v, **options, dropout_p=p, seed=SEED, site=4)
    every = ops.attention(q, k, v, **options)
    rows = torch.arange(length * heads)
    mask = attention_keep_mask(SEED, 4, rows, length, round(p * 65536))
    expected = every.flatten(0, 1) * mask / (1 - p)
    torch.testing.assert_close(kept.flatten(0, 1), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3])
def test_cpu_mask_is_the_reference_mask(dtype, heads, use_isa):
    """Bit for bit, on every instruction set: with equal scores and v the identity, an output is
    zero exactly where the probability was dropped."""
    lengths, width = (130, 1, 70), 256
    queries = sum(lengths)
    q = torch.zeros(queries, heads, width, dtype=dtype)
    v = torch.zeros(queries, heads, width, dtype=dtype)
    start = 0
    for length in lengths:
        v[start : start + length] = torch.eye(length, width, dtype=dtype).unsqueeze(1)
        start += length
    options = {"cu_seqlens_q": cu(*lengths), "max_seqlen_q": 130, "dropout_p": 0.3}

    def kept(backend, seed, site):
        out = ops.attention(
            q, q, v, **options, seed=testing.seed_tensor(seed), site=site, backend=backend
        )
        return out != 0

    for seed in (0, -1, testing.SEED):
        for site in (0, 7, 0xFFFFFFFF):
            expected = kept("reference", seed, site)
            assert 0.2 < expected[:130, :, :130].double().mean() < 0.8
            for isa in cpu.library().isas():
                use_isa(isa)
                assert torch.equal(kept("cpu", seed, site), expected), isa


@pytest.mark.parametrize(
    ("name", "dtype", "width"),
    [
        ("triton", torch.float32, 256),
        ("triton", torch.float16, 256),
        ("cuda", torch.float16, 128),
        ("cuda", torch.bfloat16, 128),
    ],
)
def test_gpu_mask_is_the_reference_mask(name, dtype, width):
    """As above, forward in both ways of finding a program's sequence."""
    for lengths in ((130, 1, 70), (64, 64)):
        queries, start = sum(lengths), 0
        q = torch.zeros(queries, 3, width, dtype=dtype)
        v = torch.zeros(queries, 3, width, dtype=dtype)
        for length in lengths:
            v[start : start + length] = torch.eye(length, width, dtype=dtype).unsqueeze(1)
            start += length
        for seed, site in ((0, 0xFFFFFFFF), (-1, 0), (testing.SEED, 7)):
            kept = [
                ops.attention(
                    q, q, v, cu_seqlens_q=cu(*lengths), max_seqlen_q=max(lengths), dropout_p=0.3,
                    seed=testing.seed_tensor(seed), site=site, backend=backend,
                )
                != 0
                for backend in (name, "reference")
            ]  # fmt: skip
            assert torch.equal(*kept)
            assert 0.2 < kept[0][: lengths[0], :, : lengths[0]].double().mean() < 0.8


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(300,), (200, 3, 40), (1, 0, 2)])
def test_result_does_not_depend_on_the_number_of_threads(lengths, causal):
    """Not even where threads share one head's backward, as in the first of these batches."""
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths) + 2, 3, 1, 24, requires_grad=True)
    dout = torch.randn(sum(lengths) + 2, 1, 24)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        out = ops.attention_qkvpacked(
            qkv,
            cu_seqlens=cu(*lengths),
            max_seqlen=max(lengths),
            causal=causal,
            dropout_p=0.1,
            seed=SEED,
            backend="cpu",
        )
        results.append((out.detach(), *torch.autograd.grad(out, qkv, dout)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_are_the_same_bits_every_time():
    qkv = torch.randn(500, 3, 4, 32, requires_grad=True)
    dout = torch.randn(500, 4, 32)
    out = ops.attention_qkvpacked(qkv, cu_seqlens=cu(300, 200), max_seqlen=300, backend="cpu")
    first, *others = (torch.autograd.grad(out, qkv, dout, retain_graph=True)[0] for _ in range(20))
    assert all(torch.equal(first, other) for other in others)


def test_logsumexp_is_what_the_reference_saves():
    q, k, v = torch.randn(3, 40, 2, 8).unbind(0)
    lengths = cu(25, 0, 9), cu(30, 4, 0)

    def forward(backend):
        arguments = (q, k, v, *lengths, 25, 30, 0.3, True, None, 0, 0)
        return kernel("attention", backend).forward(*arguments)

    (out, logsumexp), (expected, expected_logsumexp) = forward("cpu"), forward("reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(logsumexp, expected_logsumexp)
    assert torch.isneginf(logsumexp[:, 25:34]).all(), "no keys"
    assert not logsumexp[:, 34:].any(), "storage"


def test_an_infinite_score_is_not_hidden():
    q = torch.full((4, 1, 8), 1e38)
    out = ops.attention(q, q, q, cu_seqlens_q=cu(4), max_seqlen_q=4, backend="cpu")
    assert not out.isfinite().any()


@pytest.mark.parametrize("isa", cpu.library().isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overflowing", [range(80), range(60, 130), range(130)])
def test_a_score_of_minus_infinity_weighs_nothing(overflowing, dtype, isa, use_isa):
    """Not even where a whole block of keys has no other, the first one included."""
    use_isa(isa)
    torch.manual_seed(0)
    length, outputs = 130, []
    q, k, v, dout = (torch.rand(length, 2, 16, dtype=dtype) for _ in range(4))
    # float32 does not hold the product.
    q[..., 0], k[list(overflowing), :, 0] = 1e20, -1e20
    k[[i for i in range(length) if i not in overflowing], :, 0] = 0.0
    for backend in ("cpu", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = ops.attention(*leaves, cu_seqlens_q=cu(length), max_seqlen_q=length, backend=backend)
        outputs.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 2e-3)
    for cpu_result, expected in zip(*outputs, strict=True):
        assert expected.isfinite().all()
        # The column of 1e20 times the rounding of a sum that is zero is no number to compare.
        torch.testing.assert_close(cpu_result[..., 1:], expected[..., 1:], rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_nobody_sees_do_not_tell_the_number_of_threads(dtype):
    torch.manual_seed(0)
    q, k, v = torch.rand(3, 384, 2, 16, dtype=dtype).unbind()
    v[383] = v[137] = float("nan")
    results = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        out = ops.attention(
            q, k, v, cu_seqlens_q=cu(384), max_seqlen_q=384, causal=True, backend="cpu"
        )
        assert out[:64].isfinite().all()
        results.append(out.nan_to_num(7.0))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_cpu_dispatches_no_torch_arithmetic():
    qkv = torch.randn(20, 3, 2, 8, requires_grad=True)
    dout = torch.randn(20, 2, 8)
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(1))
    dropout = {"dropout_p": 0.1, "seed": SEED, "backend": "cpu"}
    lengths = cu(12, 5)
    with testing.KernelOnly() as seen:
        out = ops.attention_qkvpacked(qkv, cu_seqlens=lengths, max_seqlen=12, **dropout)
        torch.autograd.grad(out, qkv, dout)
        out = ops.attention(q, k, v, cu_seqlens_q=lengths, max_seqlen_q=12, **dropout)
        torch.autograd.grad(out, (q, k, v), dout)
    assert "empty" in seen.seen
    assert "copy_" not in seen.seen, "queries, keys and values are read in place"


def test_reference_would_fail_the_dispatch_test():
    qkv = torch.randn(20, 3, 2, 8)
    with testing.KernelOnly(), pytest.raises(AssertionError, match="a kernel dispatched"):
        ops.attention_qkvpacked(qkv, cu_seqlens=cu(20), max_seqlen=20, backend="reference")


SOURCE = "cpu/attention.cpp"
MUTATIONS = {
    "the outputs so far are not rescaled": (
        SOURCE,
        "store(out + c, load(out + c) * rescale[j]);",
        "store(out + c, load(out + c));",
    ),
    "a dropped probability does not count in the sum": (
        SOURCE,
        "total += p;\n          if (a.seed) p = keep(p, lanes + c, a.threshold);",
        "if (a.seed) p = keep(p, lanes + c, a.threshold);\n          total += p;",
    ),
    "keys behind the last one count": (
        SOURCE,
        "if (visible[j] - c < width) p = first_lanes(p, visible[j] - c, Floats{});",
        "",
    ),
    "the largest score of a negative scale": (SOURCE, "a.scale < 0.0f ? 0x80000000u : 0u", "0u"),
    "no 1 / (1 - p) in forward": (
        SOURCE,
        "sees ? kept_scale / total : 0.0f",
        "sees ? 1.0f / total : 0.0f",
    ),
    "no 1 / (1 - p) in dv": (
        SOURCE,
        "size.sums, rows, size.head_dim, kept_scale);",
        "size.sums, rows, size.head_dim, 1.0f);",
    ),
    "causal aligned at the top left": (
        SOURCE,
        "const int64_t last = i + keys - queries + 1;",
        "const int64_t last = i + 1;",
    ),
    "no row dot": (
        SOURCE,
        "probability * (dp - row_dots[slot * block + r + j])",
        "probability * dp",
    ),
    "the second row has the first one's mask": (
        SOURCE,
        "p[j] = keep(probability, lanes[j] + c, a.threshold);",
        "p[j] = keep(probability, lanes[0] + c, a.threshold);",
    ),
    "every block has the first one's mask": (
        "cpu/dropout.h",
        "static_cast<uint64_t>(block * 8 + first)",
        "static_cast<uint64_t>(first)",
    ),
    "lanes of the row-wise layout": (
        "cpu/dropout.h",
        "std::memcpy(lanes + 16 * i + 8 + first, &high, sizeof(high));",
        "std::memcpy(lanes + 16 * i + 8 + first, &low, sizeof(low));",
    ),
    "storage keeps what was there": (
        SOURCE,
        "clear_rows(x, token, head, last, tokens, heads, head_dim);",
        "",
    ),
    "a block of keys starts with the last one's gradient": (
        SOURCE,
        "std::memset(dk, 0, bytes);",
        "",
    ),
    "the columns of the second panel are the first one's": (
        "cpu/matmul.h",
        "columns -= panel_columns, panels += panel_stride,",
        "columns -= panel_columns, panels += 0 * panel_stride,",
    ),
    "the depth's second part is left out": (
        "cpu/matmul.h",
        "k < depth; k += depth_together",
        "k < smaller(depth, depth_together); k += depth_together",
    ),
    "transposed within blocks only": (
        "cpu/matmul.h",
        "  exchange_rows<1>(rows);",
        "",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_gate_bites(name, mutants):
    with mutants.in_place(*MUTATIONS[name]):
        assert testing.gates_are_red("attention", "cpu")


TRITON_MUTATIONS = {
    "the outputs so far are not rescaled": (
        "attention.py",
        "sums * rescale[:, None]",
        "sums",
    ),
    "no 1 / (1 - p) in forward": (
        "attention.py",
        "tl.where(sees, kept_scale / tl",
        "tl.where(sees, 1.0 / tl",
    ),
    "small probabilities do not count in the sum": (
        "attention.py",
        "total = total * rescale + tl.sum(p, axis=1)",
        "total = total * rescale + tl.sum(p * (p > 0.01), axis=1)",
    ),
    "keys behind the last one count": (
        "attention.py",
        "return (j < keys)[None, :]",
        "return (j >= 0)[None, :]",
    ),
    "causal aligned at the top left": (
        "attention.py",
        "tl.arange(0, M) + keys - queries\n        return",
        "tl.arange(0, M)\n        return",
    ),
    "minus infinity subtracted from itself": (
        "attention.py",
        'base = tl.where(now == float("-inf"), 0.0, now)',
        "base = now",
    ),
    "the last block of keys left out": (
        "attention.py",
        "for first_key in range(0, end, N):",
        "for first_key in range(0, end - 1, N):",
    ),
    "no 1 / (1 - p) in dv": (
        "attention.py",
        "_store_rows(dv, dvalues * kept_scale, row",
        "_store_rows(dv, dvalues, row",
    ),
    "the gradient of what was dropped": (
        "attention.py",
        "dp = tl.where(keep, dp * kept_scale, 0.0)",
        "dp = dp * kept_scale",
    ),
    "no row dots": (
        "attention.py",
        "p * (dp - dots[:, None])",
        "p * dp",
    ),
    "dq without its scale": (
        "attention.py",
        "_store_rows(dq, drows * scale, begin_q,",
        "_store_rows(dq, drows, begin_q,",
    ),
    "the first head's mask for all": (
        "attention.py",
        "number = (begin_q + r) * heads + h",
        "number = (begin_q + r) * heads",
    ),
    "lanes of the row-wise layout": (
        "_dropout.py",
        "tl.permute(lanes, (0, 1, 3, 2))",
        "tl.permute(lanes, (0, 1, 2, 3))",
    ),
    "storage keeps what was there": (
        "attention.py",
        "while first < tokens:",
        "while first < 0 * tokens:",
    ),
    "the sequence before is found": (
        "attention.py",
        "i = tl.maximum(found - 1, 0)",
        "i = tl.maximum(found - 2, 0)",
    ),
    "every block of keys has the first one's mask": (
        "attention.py",
        "threshold, number, first_key, N), p, 0.0)",
        "threshold, number, 0, N), p, 0.0)",
    ),
}


@pytest.mark.parametrize("name", TRITON_MUTATIONS)
def test_triton_gate_bites(name, triton_mutants):
    with triton_mutants.in_place(*TRITON_MUTATIONS[name]):
        assert testing.gates_are_red("attention", "triton")


CUDA_MUTATIONS = {
    "tiles written and read in another order": (
        "cuda/tile.h",
        "return memory + begin + row * pieces + (piece ^ swizzle(row));",
        "return memory + begin + row * pieces + piece;",
    ),
    "every eighth row swizzled alike": (
        "cuda/tile.h",
        "lane_row * pieces + (lane_piece ^ swizzle(lane_row))",
        "lane_row * pieces + (lane_piece ^ swizzle(lane_row % 4))",
    ),
    "the copies of forward are not waited for": (
        "cuda/attention.cu",
        "wait_for_copies<0>();\n    // All",
        "wait_for_copies<1>();\n    // All",
    ),
    "the copies of backward are not waited for": (
        "cuda/attention_backward.cu",
        "wait_for_copies<0>();\n    // All have finished the queries",
        "wait_for_copies<1>();\n    // All have finished the queries",
    ),
    "lanes of the transposed left operand": (
        "cuda/tile.h",
        "load_matrices<true>(a, at(row, piece, lane_id() / 16 * 8 + lane_id() % 8, "
        "lane_id() / 8 % 2));",
        "load_matrices<true>(a, at(row, piece, lane_id() % 16, lane_id() / 16));",
    ),
    "lanes of the right operand": (
        "cuda/tile.h",
        "load_matrices<true>(b, at(row, piece, lane_id() % 16, lane_id() / 16));",
        "load_matrices<true>(b, at(row, piece, lane_id() / 16 * 8 + lane_id() % 8, "
        "lane_id() / 8 % 2));",
    ),
    "forward reads the block of keys before": (
        "cuda/attention.cu",
        "const int buffer = key / key_block % buffers * a.key_rows;\n      const View",
        "const int buffer = (key / key_block + 1) % buffers * a.key_rows;\n      const View",
    ),
    "the second pass reads the queries before": (
        "cuda/attention_backward.cu",
        "const int buffer = first / rows % buffers * rows;\n    const Tile",
        "const int buffer = (first / rows + 1) % buffers * rows;\n    const Tile",
    ),
    "the gradients are read before all have put them": (
        "cuda/attention_backward.cu",
        "if (KEYS) {\n      __syncthreads();",
        "if (KEYS) {",
    ),
    "keys behind the last one count": (
        "cuda/attention.h",
        "last[i] = keys - 1;",
        "last[i] = key_block;",
    ),
    "the last sixteen keys are left out": (
        "cuda/attention.h",
        "(keys + 15) / 16",
        "keys / 16",
    ),
    "causal aligned at the top left": (
        "cuda/attention.h",
        "const int beyond = s.keys - s.queries - first_key;",
        "const int beyond = -first_key;",
    ),
    "the mask's columns in another order": (
        "cuda/attention.h",
        "first_key / 8 + lane_id() % 4 * 2 + i % 2",
        "first_key / 8 + lane_id() % 4 + i % 2 * 4",
    ),
    "the second half has the first one's mask": (
        "cuda/attention_backward.cu",
        "mask.keeps(half * tiles + n, e)",
        "mask.keeps(n, e)",
    ),
    "rows g and g + 8 exchanged in shared memory": (
        "cuda/attention_backward.cu",
        "i % 2 == 1, scores[k][i]",
        "i % 2 == 0, scores[k][i]",
    ),
    "the outputs so far are not rescaled": (
        "cuda/attention.cu",
        "sums[n][e] *= rescale[e / 2];",
        "sums[n][e] *= 1.0f;",
    ),
    "no 1 / (1 - p) in forward": (
        "cuda/attention.cu",
        "0.0f : kept_scale / total[j]",
        "0.0f : 1.0f / total[j]",
    ),
    "no row dots": (
        "cuda/attention_backward.cu",
        "* mask.scale : 0.0f) - facts[e / 2].dots)",
        "* mask.scale : 0.0f))",
    ),
    "dv gets the scale of dk": (
        "cuda/attention_backward.cu",
        "of_keys ? a.scale : a.seed",
        "!of_keys ? a.scale : a.seed",
    ),
    "the first pass keeps nothing of the second head": (
        "cuda/attention_backward.cu",
        "reinterpret_cast<const RowFacts*>(a.facts)[head * a.tokens_q",
        "reinterpret_cast<const RowFacts*>(a.facts)[0 * a.tokens_q",
    ),
    "the sequence before is found": (
        "cuda/attention.h",
        "low += (last > 0 ? last : 0) * step;",
        "low += (last > 1 ? last - 1 : 0) * step;",
    ),
    "storage keeps what was there": (
        "cuda/attention.h",
        "* x.head + i % a.head_dim] = 0;",
        "* x.head + i % a.head_dim] |= 0;",
    ),
    "the second half of wide columns is the first one's": (
        "cuda/attention_backward.cu",
        "column = number / 8 * width;",
        "column = 0;",
    ),
}


@pytest.mark.parametrize("name", CUDA_MUTATIONS)
def test_cuda_gate_bites(name, cuda_mutants):
    with cuda_mutants.in_place(*CUDA_MUTATIONS[name]):
        assert testing.gates_are_red("attention", "cuda")


def test_what_cuda_does_not_take():
    takes = kernel("attention", "cuda").supports
    assert takes(torch.ones(1, 1, 128).half()) is None
    assert "takes torch.bfloat16 and torch.float16" in takes(torch.ones(1, 1, 64))
    assert "heads have 129 elements; it takes up to 128" in takes(torch.ones(1, 1, 129).half())
    assert "there are 65536 heads" in takes(torch.ones(1, 65536, 1).half())


def test_cuda_takes_any_bound_of_the_lengths():
    q = torch.randn(260, 1, 8).half()
    lengths = {"cu_seqlens_q": cu(*[2] * 130), "backend": "cuda"}
    outputs = [
        ops.attention(q, q, q, max_seqlen_q=most, **lengths) for most in (2, 260, sys.maxsize)
    ]
    assert outputs[0].isfinite().all()
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0])


@pytest.mark.parametrize("strided", [5, None, [0, 8, 8], (0, 8), (0, 8, 8, 8), (-1, 8, 8), "q"])
def test_the_cuda_binding_checks_its_arguments(strided):
    good = (0, 8, 8)
    numbers = (0, 0, 0, 0, 0, 0, 0, 1, 8, 0, 0, 1.0, 0, 0, False, 1, 4, 1, 16, False, 0)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        cuda.library().attention(0, 1, 0, 0, good, strided, good, good, 0, *[good] * 4, *numbers)


def test_cuda_says_how_much_shared_memory_it_needs(monkeypatch):
    of_cuda = kernel("attention", "cuda")
    monkeypatch.setattr(of_cuda, "shared_memory_of", lambda x: 99 * 1024)
    assert of_cuda.supports(torch.ones(1, 1, 64).half()) is None
    said = "heads of 100 need 131072 bytes of shared memory in a block; cpu has 101376"
    assert of_cuda.supports(torch.ones(1, 1, 100).half()) == said


@pytest.mark.parametrize("there", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("head_dim", [8, 64, 96, 128])
def test_the_plan_fits_its_device(head_dim, there):
    """One block always; and as many as planned wherever a tile is copied ahead."""
    of_cuda = kernel("attention", "cuda")
    if of_cuda.shared_bytes(of_cuda.PASS_OF_KEYS, head_dim, 8, 1, 64, False) > there:
        assert (head_dim, there) in ((96, 99 * 1024), (128, 99 * 1024)), "refused by supports"
        return
    for length in (1, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 4096):
        whole = of_cuda.whole_head(length, length, head_dim, there)
        rest = (of_cuda.HEADS,) if whole else (of_cuda.QUERIES, of_cuda.PASS_OF_KEYS)
        for one in (of_cuda.FORWARD, *rest):
            warps, heads, keys, ahead, needed = of_cuda.plan(one, length, length, head_dim, there)
            assert needed <= there
            if ahead:
                blocks = of_cuda.blocks_at_once(one, head_dim, warps)
                assert blocks * (needed + 1024) <= there + 1024
            assert 4 <= warps * heads <= 16
            assert keys == 64 or length <= keys
            if one == of_cuda.HEADS:
                assert length <= 16 * warps
    assert not of_cuda.whole_head(257, 257, head_dim, there)


@pytest.mark.parametrize("there", [99 * 1024, 163 * 1024])
@pytest.mark.parametrize("name", ["several_blocks", "two_passes", "full_width", "split-cross"])
def test_cuda_with_less_shared_memory(name, there, monkeypatch):
    """Without tiles copied ahead, or in two passes where one would not fit."""
    of_cuda = kernel("attention", "cuda")
    (case,) = (case for case in testing.CASES["attention"] if case.name == name)
    monkeypatch.setattr(of_cuda, "shared_memory_of", lambda x: there)
    if (name, there) == ("full_width", 99 * 1024):
        with pytest.raises(BackendError, match="need 131072 bytes of shared memory"):
            case.op(case.inputs(torch.float16), "cuda")
        return
    testing.run_gates("attention", "cuda", "float16", cases=[case])


BAD = {
    r"q: expected shape \(T, heads, d\)": ({"q": torch.ones(4, 8)}, ValueError),
    "1 <= d <= 256": ({"q": torch.ones(4, 2, 257)}, ValueError),
    "k: expected torch.float32 as q": ({"k": torch.ones(4, 2, 8).double()}, TypeError),
    r"k: expected shape \(4, 2, 8\), got \(4, 2, 9\)": ({"k": torch.ones(4, 2, 9)}, ValueError),
    r"k: expected shape \(4, 2, 8\), got \(5, 2, 8\)": (
        {"k": torch.ones(5, 2, 8), "v": torch.ones(5, 2, 8)},
        ValueError,
    ),
    r"v: expected shape \(4, 2, 8\), got \(3, 2, 8\)": ({"v": torch.ones(3, 2, 8)}, ValueError),
    "cu_seqlens_q: expected an int32 tensor": (
        {"cu_seqlens_q": torch.tensor([0, 4])},
        TypeError,
    ),
    "cu_seqlens_q: expected to start at 0, got 1": (
        {"cu_seqlens_q": torch.tensor([1, 4], dtype=torch.int32)},
        ValueError,
    ),
    "cu_seqlens_q: expected values that never fall, got 3 before 2": (
        {"cu_seqlens_q": torch.tensor([0, 3, 2], dtype=torch.int32)},
        ValueError,
    ),
    "cu_seqlens_q: expected to end at or before 4 tokens, got 5": (
        {"cu_seqlens_q": torch.tensor([0, 5], dtype=torch.int32)},
        ValueError,
    ),
    r"cu_seqlens_q: expected shape \(batch \+ 1,\)": (
        {"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)},
        ValueError,
    ),
    "max_seqlen_q: expected at least the longest sequence, 4, got 3": (
        {"max_seqlen_q": 3},
        ValueError,
    ),
    "max_seqlen_q: expected an int, got float": ({"max_seqlen_q": 4.0}, TypeError),
    "max_seqlen_q: expected an int, got NoneType": ({"max_seqlen_q": None}, TypeError),
    "max_seqlen_q: expected a number >= 0, got -1": ({"max_seqlen_q": -1}, ValueError),
    "scale: expected a number, got str": ({"scale": "a"}, TypeError),
    "causal: expected a bool, got str": ({"causal": "a"}, TypeError),
    "max_seqlen_k: expected a number beside cu_seqlens_k": ({"cu_seqlens_k": cu(4)}, ValueError),
    "cu_seqlens_k: expected shape": (
        {"cu_seqlens_k": cu(2, 2), "max_seqlen_k": 4},
        ValueError,
    ),
    "dropout_p: expected a probability": ({"dropout_p": -0.1}, ValueError),
    "seed: expected an int64 tensor": ({"dropout_p": 0.1}, ValueError),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    changes, error = BAD[message]
    q = torch.ones(4, 2, 8)
    arguments = {"q": q, "k": q, "v": q, "cu_seqlens_q": cu(4), "max_seqlen_q": 4, **changes}
    with pytest.raises(error, match=message):
        ops.attention(**arguments)


def test_bad_packed_input():
    with pytest.raises(ValueError, match=r"qkv: expected shape \(T, 3, heads, d\)"):
        ops.attention_qkvpacked(torch.ones(4, 2, 2, 8), cu_seqlens=cu(4), max_seqlen=4)
    with pytest.raises(ValueError, match="max_seqlen: expected at least the longest sequence"):
        ops.attention_qkvpacked(torch.ones(4, 3, 2, 8), cu_seqlens=cu(4), max_seqlen=2)
