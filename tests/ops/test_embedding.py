import pytest
import torch

from bertfast import ops, testing
from bertfast.backends import kernel
from bertfast.kernels import cpu

SEED = testing.seed_tensor()


@pytest.mark.parametrize(("backend", "isa", "precision"), testing.gate_grid("embedding"))
def test_gate(backend, isa, precision, use_isa):
    if isa:
        use_isa(isa)
    testing.run_gates("embedding", backend, precision)


def tables(columns=6, dtype=torch.float64):
    made = (torch.randn(rows, columns, dtype=dtype) for rows in (10, 2, 8))
    vectors = (torch.randn(columns, dtype=dtype) for _ in range(2))
    return [t.requires_grad_() for t in (*made, *vectors)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_gradcheck(dropout_p):
    ids, types = torch.tensor([[3, 3, 0], [9, 3, 1]]), torch.ones(2, 3).long()
    positions = torch.arange(3).expand(2, 3)
    assert torch.autograd.gradcheck(
        lambda *t: ops.embedding(
            ids, types, positions, *t, dropout_p=dropout_p, seed=SEED, backend="reference"
        ),
        tables(),
    )


def test_padding_row_gets_no_gradient_but_is_read():
    word, token_type, position, weight, bias = tables()
    ids = torch.tensor([0, 3, 0])
    zeros = torch.zeros(3, dtype=torch.long)
    out = ops.embedding(
        ids, zeros, torch.arange(3), word, token_type, position, weight, bias, padding_idx=0
    )
    grad, position_grad = torch.autograd.grad(out, (word, position), torch.randn_like(out))
    assert torch.equal(grad[0], torch.zeros(6, dtype=torch.float64))
    assert grad[3].abs().sum() > 0
    assert (position_grad[:3].abs().sum(-1) > 0).all()


def inputs(tokens, columns, dtype=torch.float32, vocabulary=10):
    """Ids and leaves for ``ops.embedding``, in its order."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(n, (tokens,), generator=generator) for n in (vocabulary, 2, 8)]
    shapes = ((vocabulary, columns), (2, columns), (8, columns), (columns,), (columns,))
    return ids, [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradient_is_deterministic(backend):
    ids, leaves = inputs(5000, 64)
    out = ops.embedding(*ids, *leaves, backend=backend)
    dout = torch.randn_like(out)
    first, *others = (torch.autograd.grad(out, leaves, dout, retain_graph=True) for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "columns"), [(257, 515), (3000, 64), (2, 40000)])
def test_result_does_not_depend_on_the_number_of_threads(tokens, columns, dtype):
    ids, leaves = inputs(tokens, columns, dtype, vocabulary=70)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = ops.embedding(
                *ids, *leaves, padding_idx=1, dropout_p=0.1, seed=SEED, backend="cpu"
            )
            dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("columns", [1, 8, 33, 768, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_mask_is_the_reference_mask(columns, dtype, use_isa):
    """Bit for bit, on every instruction set: weight 0 and bias 1 leave the mask alone, and so does
    the gradient of the one token's bias."""
    ids = torch.zeros(50, dtype=torch.long)
    table = torch.ones(1, columns, dtype=dtype)
    weight, bias = torch.zeros(columns), torch.ones(columns)
    for seed in (0, -1, testing.SEED):
        for site in (0, 7, 0xFFFFFFFF):
            mask = (testing.seed_tensor(seed), 20000, site)

            def masks(backend, mask=mask):
                module = kernel("embedding", backend)
                model = (table, table, table, weight, bias)
                seed, *rest = mask
                out, statistics = module.forward(ids, ids, ids, *model, seed, 1e-12, *rest, dtype)
                one = (ids[:1], ids[:1], ids[:1])
                statistics = torch.stack((statistics[0, :1], statistics[1, :1]))
                grads = module.backward(
                    torch.ones(1, columns, dtype=dtype), *one, *model, statistics, seed, -1, *rest
                )
                return out, grads[4]

            expected = masks("reference")
            assert torch.equal(expected[0][0].float() != 0, expected[1] != 0)
            for isa in cpu.library().isas():
                use_isa(isa)
                for given, wanted in zip(masks("cpu"), expected, strict=True):
                    assert torch.equal(given, wanted), isa


def test_cpu_dispatches_no_torch_arithmetic():
    ids, leaves = inputs(20, 24)
    dout = torch.randn(20, 24)
    # What looks whether the ids are in range, before the kernel.
    with testing.KernelOnly("aminmax", "_local_scalar_dense") as seen:
        out = ops.embedding(*ids, *leaves, dropout_p=0.1, seed=SEED, backend="cpu")
        torch.autograd.grad(out, leaves, dout)
    assert "new_empty" in seen.seen
    assert seen.seen.count("aminmax") == 3


def test_rows_nobody_reads_are_zero_in_a_table_of_its_usual_size():
    """Where the gradient is large enough to lie in large pages."""
    ids, leaves = inputs(100, 768, vocabulary=30522)
    out = ops.embedding(*ids, *leaves, backend="cpu")
    with testing.poisoned_allocations():
        (grad,) = torch.autograd.grad(out, leaves[0], torch.randn_like(out))
    assert grad.isfinite().all()
    read = torch.zeros(30522, dtype=torch.bool)
    read[ids[0]] = True
    assert torch.equal(grad.abs().sum(-1) > 0, read)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ids_of_any_shape_stride_and_width(backend):
    ids, leaves = inputs(12, 24)
    expected = ops.embedding(*ids, *leaves, backend=backend)
    word_ids = ids[0].reshape(3, 4).T.contiguous().T
    type_ids = torch.stack((ids[1], ids[1] + 99), -1).reshape(3, 4, 2)[..., 0].int()
    out = ops.embedding(word_ids, type_ids, ids[2].reshape(3, 4), *leaves, backend=backend)
    assert not word_ids.is_contiguous()
    assert torch.equal(out.reshape(12, 24), expected)


def test_tables_of_any_layout():
    ids, leaves = inputs(12, 24)
    turned = [t.detach().T.contiguous().T if t.dim() == 2 else t for t in leaves]
    out = ops.embedding(*ids, *turned, backend="cpu")
    assert torch.equal(out, ops.embedding(*ids, *leaves, backend="cpu"))
    leaves = [t.detach().requires_grad_() for t in turned]
    out = ops.embedding(*ids, *leaves, backend="cpu")
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    expected = torch.autograd.grad(ops.embedding(*ids, *leaves, backend="reference"), leaves, dout)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted)


MUTATIONS = {
    "token types left out": ("cpu/embedding.cpp", " + io.get(row[2] + c)", ""),
    "ids taken for 32-bit": ("cpu/embedding.cpp", "table.wide ? ", "false ? "),
    "mean and rstd swapped": (
        "cpu/embedding.cpp",
        "a.statistics[t] = statistics.mean;",
        "a.statistics[t] = statistics.rstd;",
    ),
    "dropout before the bias": (
        "cpu/embedding.cpp",
        "if (a.seed) y = mask.apply(y, c - first);",
        "if (a.seed) y = mask.apply(y - io.get(bias + c), c - first) + io.get(bias + c);",
    ),
    "every token has the first one's mask": (
        "cpu/embedding.cpp",
        "mask.draw(t, first",
        "mask.draw(0, first",
    ),
    "no mask in backward": (
        "cpu/embedding.cpp",
        "a.seed ? mask.apply(v, c - first) : v",
        "v",
    ),
    "every token of four has the first one's mask in backward": (
        "cpu/embedding.cpp",
        "mask.draw(token + r, first",
        "mask.draw(token, first",
    ),
    "the padding row gets a gradient": (
        "cpu/embedding.cpp",
        "row >= 0 && row != table.padding",
        "row >= 0",
    ),
    "sorted by the low digit alone": ("cpu/embedding.cpp", "shift += bits", "shift += 63"),
    "sorted by two digits alone": (
        "cpu/embedding.cpp",
        "shift < 63 && (table.rows - 1) >> shift > 0",
        "shift < 18 && (table.rows - 1) >> shift > 0",
    ),
    "a row's last reader left out": (
        "cpu/embedding.cpp",
        "r < last; ++r)\n      for (int i",
        "r < last - 1; ++r)\n      for (int i",
    ),
    "columns behind the last strip left out": (
        "cpu/embedding.cpp",
        "for_columns(c, columns, [&](int64_t at",
        "for_columns(c, c, [&](int64_t at",
    ),
    "a row in several chunks is what its last chunk says": (
        "cpu/embedding.cpp",
        "else if (last == end && g.continues(c))",
        "else if (last == end + 1)",
    ),
    "a row's second chunk left out": (
        "cpu/embedding.cpp",
        "next = c + 1; next <",
        "next = c + 2; next <",
    ),
    "a chunk in the middle of a row starts it anew": (
        "cpu/embedding.cpp",
        " || (g.continued(c) && g.row(g.first(c)) == row)",
        "",
    ),
    "rows nobody reads not cleared": (
        "cpu/embedding.cpp",
        "std::memset(grad + row * a.columns, 0,",
        "std::memset(grad + row * a.columns, 0, 0 *",
    ),
    "the rows behind the last one read not cleared": (
        "cpu/embedding.cpp",
        "&& g.row(low) < end ? g.row(low) : end;",
        "&& g.row(low) < end ? g.row(low) : row;",
    ),
    "partial sums not cleared": (
        "cpu/norm.h",
        "std::memset(dweight, 0,",
        "std::memset(dbias, 0, 0 *",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_gate_bites(name, mutants):
    with mutants.in_place(*MUTATIONS[name]):
        assert testing.gates_are_red("embedding", "cpu")


def test_unchanged_copy_passes(mutants):
    """The builds of test_gate_bites are red because of their change, and of nothing else."""
    with mutants.in_place("cpu/embedding.cpp", "shift += bits", "shift += bits"):
        assert not testing.gates_are_red("embedding", "cpu")


def test_autocast_decides_the_output_dtype():
    word, token_type, position, weight, bias = tables(dtype=torch.float32)
    ids = torch.tensor([1, 2])
    arguments = (ids, ids.clamp(max=1), ids, word, token_type, position, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.embedding(*arguments)
        normed = ops.layernorm(out, weight, bias, residual=out)
    assert out.dtype == normed.dtype == torch.bfloat16
    assert ops.embedding(*arguments).dtype == torch.float32
    expected = ops.embedding(*arguments).bfloat16()
    assert torch.equal(out, expected)


def test_float16_autocast():
    """The native kernel writes no float16: its launcher converts."""
    ids, leaves = inputs(20, 24)
    results = []
    for backend in ("cpu", "reference"):
        with torch.autocast("cpu", torch.float16):
            out = ops.embedding(*ids, *leaves, backend=backend)
        assert out.dtype == torch.float16
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        results.append([out.detach(), *grads])
    for given, wanted in zip(*results, strict=True):
        torch.testing.assert_close(given, wanted)


TRITON_MUTATIONS = {
    "positions left out": (
        "embedding.py",
        "v += _read(position, positions, position_ids,",
        "_read(position, positions, position_ids,",
    ),
    "types read from the words": (
        "embedding.py",
        "_read(token_type, types, token_type_ids,",
        "_read(word, types, token_type_ids,",
    ),
    "a dropped value is not zero": (
        "embedding.py",
        "y * scale, 0.0)",
        "y * scale, b[None, :])",
    ),
    "backward without the mask": (
        "embedding.py",
        "            dy = tl.where(keep, dy * scale, 0.0)",
        "            dy = dy * scale",
    ),
    "a run's end not seen": (
        "embedding.py",
        "if e == CHUNK - 1 or _id_at",
        "if e == CHUNK - 1 and _id_at",
    ),
    "sums of runs that began before go to the table": (
        "embedding.py",
        "if began_before & (id == first):",
        "if began_before & (id != first):",
    ),
    "runs that go on are not joined": (
        "embedding.py",
        "elif goes_on:",
        "elif goes_on & (id < 0):",
    ),
    "only the next chunks are joined": (
        "embedding.py",
        "following += JOINED",
        "following += 1 << 20",
    ),
    "a run's first part left out": (
        "embedding.py",
        "total += tl.sum(sums, axis=0)",
        "total = tl.sum(sums, axis=0)",
    ),
    "the order of the tokens ignored": (
        "embedding.py",
        "token = tl.load(order + begin + i, mask=there, other=0)",
        "token = begin + i",
    ),
    "padding_idx has a gradient": (
        "embedding.py",
        "elif (id >= 0) & (id < table_rows) & (id != skip):",
        "elif (id >= 0) & (id < table_rows):",
    ),
    "the sort is of the wrong ids": (
        "embedding.py",
        "dposition = _table_gradient(ids[2], ds, tables[2], -1)",
        "dposition = _table_gradient(ids[2].flip(0), ds, tables[2], -1)",
    ),
}


@pytest.mark.parametrize("name", TRITON_MUTATIONS)
def test_triton_gate_bites(name, triton_mutants):
    with triton_mutants.in_place(*TRITON_MUTATIONS[name]):
        assert testing.gates_are_red("embedding", "triton")


BAD = {
    "input_ids: expected values from 0 to 9, got 10 at position 1": (
        {"input_ids": torch.tensor([1, 10])},
        ValueError,
    ),
    "input_ids: expected values from 0 to 9, got -1": (
        {"input_ids": torch.tensor([-1, 0])},
        ValueError,
    ),
    "token_type_ids: expected values from 0 to 1, got 2": (
        {"token_type_ids": torch.tensor([0, 2])},
        ValueError,
    ),
    "position_ids: expected values from 0 to 7, got 8": (
        {"position_ids": torch.tensor([0, 8])},
        ValueError,
    ),
    "input_ids: expected an int64 or int32 tensor": ({"input_ids": torch.ones(2)}, TypeError),
    r"position_ids: expected shape \(2,\)": ({"position_ids": torch.zeros(3).long()}, ValueError),
    "token_type_ids, token_type: expected both or neither": ({"token_type": None}, ValueError),
    r"position: expected shape \(rows, 6\)": ({"position": torch.ones(8, 5)}, ValueError),
    "token_type: expected torch.float32": ({"token_type": torch.ones(2, 6).double()}, TypeError),
    r"weight: expected shape \(6,\)": ({"weight": torch.ones(5)}, ValueError),
    "padding_idx: expected a row of word": ({"padding_idx": 10}, ValueError),
    "position_ids: expected an int64 or int32 tensor": (
        {"position_ids": torch.ones(2, dtype=torch.int16)},
        TypeError,
    ),
    "input_ids: expected values from 0 to 9, got -9223372036854775808": (
        {"input_ids": torch.tensor([0, -(2**63)])},
        ValueError,
    ),
    "embedding: backend 'cpu' cannot run: the input is torch.float64": (
        {
            "word": torch.ones(10, 6).double(),
            "position": torch.ones(8, 6).double(),
            "token_type": torch.ones(2, 6).double(),
            "backend": "cpu",
        },
        RuntimeError,
    ),
    "padding_idx: expected an int, got str": ({"padding_idx": "a"}, TypeError),
    r"word: expected shape \(V, C\)": ({"word": torch.ones(6)}, ValueError),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    changes, error = BAD[message]
    word, token_type, position, weight, bias = (t.detach() for t in tables(dtype=torch.float32))
    arguments = {
        "input_ids": torch.tensor([0, 9]),
        "token_type_ids": torch.tensor([0, 1]),
        "position_ids": torch.tensor([0, 7]),
        "word": word,
        "token_type": token_type,
        "position": position,
        "weight": weight,
        "bias": bias,
        **changes,
    }
    with pytest.raises(error, match=message):
        ops.embedding(**arguments)
