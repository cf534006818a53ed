"""What holds for every Triton kernel; here they run in Triton's interpreter, on CPU tensors."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bertfast
from bertfast import ops, testing
from bertfast.backends import TABLE, _Missing, kernel
from bertfast.errors import BackendError
from bertfast.kernels import triton
from bertfast.masks import keep_mask

WORDS = [word for word, names in TABLE.items() if "triton" in names]
SEEDS, SITES = (0, -1, testing.SEED), (0, 7, 0xFFFFFFFF)


def test_the_interpreter_runs():
    assert triton.missing is None
    assert triton.interpreted


# One case of each word that launches each of its kernels.
SMALL = {
    "layernorm": testing.layernorm_case(37, 101, name="small", dropout_p=0.1),
    "gelu": testing.gelu_case(37, 101, name="small"),
    "embedding": testing.embedding_case(100, 24, name="small", dropout_p=0.1, vocabulary=3),
    "dropout": testing.dropout_case(37, 101, name="small"),
    "attention": testing.attention_case([37, 5], 2, 16, name="small", dropout_p=0.1),
    "cross_entropy": testing.cross_entropy_case(37, 16, 9001, name="small"),
}


def run(case, backend="triton", dtype=torch.float32):
    given = case.inputs(dtype)
    leaves = {name: given[name].detach().requires_grad_() for name in case.grads}
    out = case.op({**given, **leaves}, backend)
    dout = testing.upstream_gradient(out, case.upstream)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout)]


@pytest.mark.parametrize("word", WORDS)
def test_dispatches_no_torch_arithmetic(word):
    case = SMALL[word]
    given = case.inputs(torch.float32)
    leaves = {name: given[name].detach().requires_grad_() for name in case.grads}
    dout = torch.randn_like(case.op({**given, **leaves}, "triton"))
    # The interpreter copies its arguments by set_.
    allowed = ["set_"]
    # What looks whether ids or labels are in range, before the kernel.
    looks = ["lt", "ge", "ne", "bitwise_or", "bitwise_and_", "any", "_local_scalar_dense"]
    if word == "embedding":
        allowed += [*looks, "aminmax", "sort"]
    if word == "cross_entropy":
        allowed += looks
    with testing.KernelOnly(*allowed) as seen:
        out = case.op({**given, **leaves}, "triton")
        torch.autograd.grad(out, list(leaves.values()), dout)
    assert "empty_like" in seen.seen or "empty" in seen.seen


@pytest.mark.parametrize("word", WORDS)
def test_the_same_bits_every_time(word):
    first = run(SMALL[word])
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(SMALL[word]), strict=True))


@pytest.mark.parametrize("columns", [1, 8, 33, 768, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masks_are_the_reference_masks(columns, dtype):
    """Bit for bit, in every op that drops: ones tell kept from dropped."""
    x = torch.ones(50, columns, dtype=dtype)
    weight, bias = torch.zeros(columns, dtype=dtype), torch.ones(columns, dtype=dtype)
    ids, table = torch.zeros(50, dtype=torch.int64), torch.ones(1, columns, dtype=dtype)
    for seed, site in zip(map(testing.seed_tensor, SEEDS), SITES, strict=True):

        def masks(backend, seed=seed, site=site):
            norm = (x, weight, bias, None, seed, 1e-12, 20000, site, True)
            lookup = (ids, None, ids, table, None, table, weight, bias, seed, 1e-12, 20000)
            return (
                kernel("dropout", backend).forward(x, seed, 20000, site),
                kernel("layernorm", backend).forward(*norm)[1],
                kernel("embedding", backend).forward(*lookup, site, dtype)[0],
            )

        for got, expected in zip(masks("triton"), masks("reference"), strict=True):
            assert torch.equal(got != 0, expected != 0)
            if columns > 8:
                assert 0.2 < (got != 0).double().mean() < 0.9


def test_the_mask_of_rows_beyond_two_to_the_32(monkeypatch):
    """The row's high word counts; a launch cannot have so many rows here, so the first is moved."""
    word = kernel("dropout", "triton")
    columns, first, seed = 24, (1 << 32) + 5, testing.seed_tensor()
    keep_rows = word.keep_rows

    def moved(seed, site, threshold, rows, *rest):
        return keep_rows(seed, site, threshold, rows + first, *rest)

    monkeypatch.setattr(word, "keep_rows", moved)
    got = word.forward(torch.ones(4, columns), seed, 20000, 3)
    rows = first + torch.arange(4)
    assert torch.equal(got != 0, keep_mask(seed, 3, rows, columns, 20000))


@pytest.fixture
def outside(monkeypatch):
    """What a launch read or wrote outside of the tensors it was given."""
    from triton.runtime import interpreter

    tensors, found = [], []
    arguments_of = interpreter.GridExecutor._init_args_hst

    def remember(self, *arguments):
        made = arguments_of(self, *arguments)
        tensors[:] = [x for x in made[0] if isinstance(x, torch.Tensor)]
        return made

    def check(pointers, mask, size):
        used = pointers.data[mask.data.astype(bool)].astype("int64")
        inside = used != used
        for x in tensors:
            last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            end = x.data_ptr() + (last + 1) * x.element_size() if x.numel() else x.data_ptr()
            inside |= (used >= x.data_ptr()) & (used + size <= end)
        found.extend(used[~inside].tolist())

    builder = type(interpreter.interpreter_builder)
    load, store = builder.create_masked_load, builder.create_masked_store

    def watched_load(self, pointers, mask, *rest):
        check(pointers, mask, pointers.get_element_ty().primitive_bitwidth // 8)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        check(pointers, mask, value.data.itemsize)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", remember)
    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)
    return found


# Small cases in which tiles reach beyond the tensors.
WATCHED = {
    "layernorm": ("one_column-p0.1", "odd-p0.1", "piece_and_tail-p0.1"),
    "gelu": ("one_column-none", "odd-none", "no_bias"),
    "embedding": ("empty", "padding_idx", "under_a_vector"),
    "dropout": ("under_a_vector", "odd"),
    "attention": ("zero_lengths", "odd", "causal-cross", "cross-no_keys", "narrow_head"),
    "cross_entropy": ("one_token", "none_labelled", "odd", "few_classes", "few_labelled"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("word", WORDS)
def test_nothing_outside_of_the_tensors_is_touched(word, dtype, outside):
    cases = [case for case in testing.CASES[word] if case.name in WATCHED[word]]
    assert len(cases) == len(WATCHED[word])
    for case in cases:
        run(case, dtype=dtype)
        assert not outside, case


def test_an_access_outside_is_seen(outside, monkeypatch):
    word = kernel("dropout", "triton")
    monkeypatch.setattr(word.triton, "cdiv", lambda n, by: -(-n // by) + 1)
    word.forward(torch.ones(4, 24)[:3], testing.seed_tensor(), 20000, 3)
    assert not outside, "rows behind the last one are masked"
    # Of the tensor that is written, that is; the memory behind it is there.
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.empty(200)[:1])
    word.forward(torch.ones(4, 24), testing.seed_tensor(), 20000, 3)
    assert outside


sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 511, 513, 1025]))


@settings(max_examples=60)
@given(st.data())
def test_any_shape_and_layout(data):
    # Not 2 columns, whose norm is +-1 whatever is in them: a gradient of 0 has no error to compare.
    rows, columns = data.draw(st.integers(0, 9)), data.draw(sizes.filter(lambda n: n != 2))
    layout = data.draw(st.sampled_from(["contiguous", "sliced", "transposed"]))
    upstream = data.draw(st.sampled_from(["contiguous", "sliced", "transposed", "expanded"]))
    p = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    some = data.draw(st.booleans())
    word = data.draw(st.sampled_from(WORDS))
    if word == "layernorm":
        case = testing.layernorm_case(
            rows, columns, name="any", dropout_p=p, layout=layout, upstream=upstream, residual=some
        )
    elif word == "gelu":
        case = testing.gelu_case(
            rows, columns, name="any", layout=layout, upstream=upstream, bias=some
        )
    elif word == "dropout":
        case = testing.dropout_case(rows, columns, name="any", p=p or 0.5, layout=layout)
    elif word == "attention":
        # Not one key alone, whose softmax is 1 whatever its score is: again a gradient of 0.
        case = testing.attention_case(
            data.draw(st.lists(st.sampled_from([0, 7, 64, 65, 100]), max_size=2)),
            data.draw(st.integers(1, 2)), min(columns, 256), name="any", storage=rows,
            causal=some, dropout_p=p, packed=data.draw(st.booleans()), layout=layout,
            upstream=upstream,
        )  # fmt: skip
    elif word == "cross_entropy":
        # Not one class alone, whose softmax is 1: again a gradient of 0.
        case = testing.cross_entropy_case(
            data.draw(st.sampled_from([rows, 64, 129, 1025])), min(columns, 65),
            data.draw(st.sampled_from([2, 63, 65, 300])), name="any", bias=some, layout=layout,
            labelled=data.draw(st.sampled_from([0.0, 0.15, 1.0])),
            reduction=data.draw(st.sampled_from(["mean", "sum"])),
            label_dtype=data.draw(st.sampled_from([torch.int64, torch.int32])),
        )  # fmt: skip
    else:
        case = testing.embedding_case(
            rows, columns, name="any", dropout_p=p, token_types=some, upstream=upstream,
            vocabulary=data.draw(st.sampled_from([1, 2, 40])),
            ids=data.draw(st.sampled_from([torch.int64, torch.int32])),
            storage=data.draw(st.sampled_from([0, 3, 50])),
        )  # fmt: skip
    testing.run_gate(case, data.draw(st.sampled_from([torch.float32, torch.float16])), "triton")


@settings(max_examples=40)
@given(st.data())
def test_ids_of_any_value_stay_in_bounds(data):
    """Past the op's checks: an id that is no row reads zeros and gets no gradient."""
    tokens, columns = data.draw(st.sampled_from([0, 1, 9, 40])), data.draw(st.sampled_from([1, 24]))
    values = st.one_of(st.integers(-3, 12), st.sampled_from([-(2**63), 2**63 - 1, 2**31, 2**40]))
    rows = [data.draw(st.integers(1, 10)) for _ in range(3)]
    ids = [
        torch.tensor(data.draw(st.lists(values, min_size=tokens, max_size=tokens))).long()
        for _ in range(3)
    ]
    # Rows of NaN around each table: whoever reads outside of it shows.
    around = [torch.full((n + 6, columns), float("nan")) for n in rows]
    tables = [buffer[3:-3].normal_() for buffer in around]
    weight, bias, dout = torch.randn(columns), torch.randn(columns), torch.randn(tokens, columns)
    seed = testing.seed_tensor()
    # The same with ids in range: a row of zeros behind each table stands for those that are not.
    inside = [torch.where((i >= 0) & (i < n), i, n) for i, n in zip(ids, rows, strict=True)]
    extended = [torch.cat((table, torch.zeros(1, columns))) for table in tables]
    options = (1e-3, 6554, 3, torch.float32)

    def both(backend, ids, tables):
        module = kernel("embedding", backend)
        out, saved = module.forward(*ids, *tables, weight, bias, seed, *options)
        grads = module.backward(dout, *ids, *tables, weight, bias, saved, seed, 0, 6554, 3)
        return [out, *grads]

    got, expected = both("triton", ids, tables), both("reference", inside, extended)
    for i, (one, other) in enumerate(zip(got, expected, strict=True)):
        other = other[:-1] if 1 <= i <= 3 else other
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@settings(max_examples=40)
@given(st.data())
def test_labels_of_any_value_stay_in_bounds(data):
    """Past the op's checks: a label that is no class counts as none."""
    tokens, classes = data.draw(st.sampled_from([0, 1, 9, 140])), data.draw(st.integers(1, 70))
    values = st.one_of(st.integers(-3, 80), st.sampled_from([-(2**63), 2**63 - 1, 2**31, 2**40]))
    drawn = data.draw(st.lists(values, min_size=tokens, max_size=tokens))
    labels, ignored = torch.tensor(drawn).long(), data.draw(st.sampled_from([-100, 0, 75]))
    counts = (labels >= 0) & (labels < classes) & (labels != ignored)
    clean = torch.where(counts, labels, -100)
    hidden, weight = torch.randn(tokens, 24), torch.randn(classes, 24)
    hidden[~counts] = float("nan")
    bias, dloss = torch.randn(classes), torch.tensor(0.7)

    def both(backend, labels, ignored):
        module = kernel("cross_entropy", backend)
        loss, saved = module.forward(hidden, weight, bias, labels, ignored, "mean")
        rest = (hidden, weight, bias, labels, saved, ignored, "mean")
        return [loss, saved, *module.backward(dloss, *rest)]

    got, expected = both("triton", labels, ignored), both("reference", clean, -100)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_more_rows_than_a_grid_has_in_its_second_dimension():
    x = torch.ones(66_000, 8)
    options = {"p": 0.1, "seed": testing.seed_tensor(), "site": 3}
    expected = ops.dropout(x, **options, backend="reference")
    torch.testing.assert_close(ops.dropout(x, **options, backend="triton"), expected)


def test_what_it_does_not_take():
    x = torch.ones(2, 4)
    takes = kernel("gelu", "triton").supports
    assert takes(x) is None
    assert "takes torch.float32, torch.bfloat16 and torch.float16" in takes(x.double())
    assert "computes torch.bfloat16 wrongly" in takes(x.bfloat16())
    assert "takes CPU tensors" in takes(x.to("meta"))
    wide = torch.ones(1, 65537)
    assert takes(wide) is None
    assert "65537 columns; it takes up to 65536" in kernel("layernorm", "triton").supports(wide)
    assert "65537 columns" in kernel("embedding", "triton").supports(wide)
    with pytest.raises(BackendError, match=r"'triton' cannot run: .* up to 65536"):
        ops.layernorm(wide, wide[0], wide[0], backend="triton")


def test_on_a_gpu_it_takes_cuda_tensors(monkeypatch):
    monkeypatch.setattr(triton, "interpreted", False)
    assert "not on a CUDA device" in triton.unsupported(torch.ones(2))

    class Cuda:
        is_cuda, is_cpu, dtype = True, False, torch.bfloat16
        device = torch.device("cuda", 0)

    class Properties:
        major = 9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert triton.unsupported(Cuda()) is None
    Properties.major = 7
    assert "compute capability below 8.0" in triton.unsupported(Cuda())


@pytest.mark.parametrize(
    ("dtype", "chosen", "expected"),
    [
        (torch.float32, "ieee", "ieee"), (torch.float32, "none", "ieee"),
        (torch.float32, "tf32", "tf32"), (torch.bfloat16, "tf32", "ieee"),
    ],
)  # fmt: skip
def test_products_are_as_precise_as_torch_says(dtype, chosen, expected):
    """Chosen by torch's new names, after which asking for the old ones is an error."""

    class Cuda:
        is_cuda = True

    Cuda.dtype = dtype
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, chosen
    try:
        assert triton.product_precision(Cuda()) == expected
    finally:
        matmul.fp32_precision = before


def test_attention_in_float32_needs_shared_memory(monkeypatch):
    monkeypatch.setattr(triton, "interpreted", False)

    class Properties:
        major, shared_memory_per_block_optin = 8, 101376

    class Cuda:
        is_cuda, is_cpu, dtype = True, False, torch.float32
        device, shape = torch.device("cuda", 0), (3, 2, 64)

        def dim(self):
            return 3

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    takes, x = kernel("attention", "triton").supports, Cuda()
    assert takes(x) is None
    Cuda.shape = (3, 2, 100)
    assert "need 114688 bytes of shared memory in a block; cuda:0 has 101376" in takes(x)
    Cuda.dtype = torch.float16
    assert takes(x) is None


def test_nothing_is_interpreted_unasked():
    for dtype in (torch.float32, torch.float16):
        for row in bertfast.explain("cpu", dtype):
            assert row.backend != "triton"
            if row.op in WORDS and dtype == torch.float16:
                assert "asked for by name" in row.passed_over["triton"]
    with bertfast.backend("triton"):
        assert {row.op for row in bertfast.explain("cpu") if row.backend == "triton"} == {*WORDS}


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert triton._missing() == "triton is not installed"
    assert _Missing("triton is not installed").supports(torch.ones(2)) == "triton is not installed"
    monkeypatch.undo()
    monkeypatch.setattr(triton, "interpreted", False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert triton._missing() == "this torch was built without CUDA"


def tile(columns):
    return triton.tile(
        "a_kernel", columns, torch.device("cpu"), elements=4096, widest=8192, per_thread=32
    )


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 768, 1024, 4999, 8192, 8193, 65536])
def test_tiles_cover_rows(columns):
    t = tile(columns)
    for number in (t.rows, t.columns, t.warps):
        assert number & (number - 1) == 0
    assert t.columns >= 8
    assert t.columns >= min(columns, 2048 if columns % 16 else 8192)
    assert t.rows * t.columns <= max(4096, t.columns)
    assert t.warps <= 16


def test_a_measured_tile_comes_first(monkeypatch):
    measured = {"": {"a_kernel": {"1024": {"rows": 2, "warps": 8, "stages": 3}}}}
    monkeypatch.setattr(triton, "_tuned", lambda: measured)
    assert tile(768) == triton.Tile(2, 1024, 8, stages=3)
    assert tile(512).columns == 512


def test_the_measured_table_is_there():
    assert isinstance(triton._tuned(), dict)


@pytest.mark.parametrize("table", [{}, {"": {"a_kernel": {"1024": {"rows": 8, "warps": 4}}}}])
def test_very_long_rows_come_one_by_one(table, monkeypatch):
    """So that offsets inside a tile fit int32, whatever was measured."""
    monkeypatch.setattr(triton, "_tuned", lambda: table)

    def rows(columns):
        device = torch.device("cpu")
        t = triton.tile("a_kernel", columns, device, elements=4096, widest=1024, per_thread=32)
        return t.rows

    assert rows(65536) > 1
    assert rows(1 << 30) == 1


def test_no_kernel_counts_tiles_in_int32():
    """``tl.cdiv(n, block)`` adds before it divides, which is too much for an n just below 2^31."""
    for path in Path(triton.__file__).parent.glob("*.py"):
        assert "tl.cdiv" not in path.read_text()


def test_an_unchanged_copy_passes(triton_mutants):
    """So what fails a mutant's gate is the mutation."""
    with triton_mutants.in_place("dropout.py", "import torch", "import torch"):
        assert not testing.gates_are_red("dropout", "triton")


def test_squares_that_overflow_make_no_garbage():
    """Infinity minus infinity would give a variance of 0, and 1 / sqrt(eps) of everything."""
    x = torch.tensor([[3e27, 3.1e27, 1e27, 0.0, 0.0, 0.0, 7e26, 9e26]])
    for backend in ("cpu", "triton", "reference"):
        out = ops.layernorm(x, torch.ones(8), torch.full((8,), 2.0), backend=backend)
        assert torch.equal(out, torch.full((1, 8), 2.0)), backend


def test_sites_are_32_bit_words_of_one_type():
    assert triton.signed(7) == 7
    assert triton.signed(0xFFFFFFFF) == -1
