"""The native entry points take anything without crashing the process."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertfast import ops, testing
from bertfast.backends import kernel
from bertfast.errors import KernelError
from bertfast.kernels import cpu
from bertfast.kernels.cpu import check_launch

sizes = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 511, 512, 513, 4096, 4097]))
lengths = st.one_of(st.integers(0, 9), st.sampled_from([24, 25, 64, 65, 130]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@settings(max_examples=150)
@given(st.data())
def test_any_shape_layout_and_value(data):
    """Against the reference, and with a guard of known values around every output."""
    # Not 2 columns, whose norm is +-1 whatever is in them: a gradient of 0 has no error to compare.
    rows, columns = data.draw(st.integers(0, 6)), data.draw(sizes.filter(lambda n: n not in (0, 2)))
    dtype, mixed = data.draw(dtypes), data.draw(st.booleans())
    isa = data.draw(st.sampled_from(cpu.library().isas()))
    layout = data.draw(st.sampled_from(["contiguous", "sliced", "transposed"]))
    upstream = data.draw(st.sampled_from(["contiguous", "sliced", "transposed", "expanded"]))
    p = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    case = data.draw(
        st.sampled_from(
            [
                testing.layernorm_case(
                    rows, columns, name="any", dropout_p=p, layout=layout, upstream=upstream
                ),
                testing.layernorm_case(
                    rows, columns, name="any", dropout_p=p, layout=layout, residual=False
                ),
                testing.gelu_case(rows, columns, name="any", layout=layout, upstream=upstream),
                testing.gelu_case(rows, columns, name="any", bias=False, approximate="tanh"),
                testing.dropout_case(rows, columns, name="any", p=p or 0.5, layout=layout),
                testing.attention_case(
                    data.draw(st.lists(lengths, max_size=3)),
                    data.draw(st.integers(1, 3)),
                    min(columns, 256),
                    name="any",
                    storage=rows,
                    causal=data.draw(st.booleans()),
                    dropout_p=p,
                    packed=data.draw(st.booleans()),
                    layout=layout,
                    upstream=upstream,
                ),
                testing.cross_entropy_case(
                    data.draw(lengths),
                    columns,
                    data.draw(st.sampled_from([1, 2, 65, 1500])),
                    name="any",
                    bias=data.draw(st.booleans()),
                    layout=layout,
                ),
                testing.embedding_case(
                    rows,
                    columns,
                    name="any",
                    vocabulary=data.draw(st.sampled_from([1, 2, 40, 1500])),
                    dropout_p=p,
                    token_types=data.draw(st.booleans()),
                    padding_idx=data.draw(st.sampled_from([None, 0])),
                    storage=data.draw(st.sampled_from([0, 3, 200])),
                    ids=data.draw(st.sampled_from([torch.int64, torch.int32])),
                    autocast=data.draw(st.booleans()),
                    upstream=upstream,
                ),
            ]
        )
    )
    before = cpu.library().isa()
    cpu.library().set_isa(isa)
    try:
        testing.run_gate(case, dtype, "cpu", mixed=mixed and dtype == torch.bfloat16)
    finally:
        cpu.library().set_isa(before)


@settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, 1e38, -1e38, float("inf"), float("nan")]), min_size=1
    ),
    dtypes,
)
def test_any_value(values, dtype):
    x = torch.tensor([values], dtype=dtype, requires_grad=True)
    weight = torch.ones(len(values))
    for out in (ops.gelu(x, backend="cpu"), ops.layernorm(x, weight, weight, backend="cpu")):
        torch.autograd.grad(out, x, torch.ones_like(out))


ids_of_any_value = st.one_of(
    st.integers(-3, 12), st.sampled_from([-(2**63), 2**63 - 1, -(2**31), 2**31 - 1, 2**32, 2**40])
)


def guarded(table):
    """A copy of ``table`` with 99 rows of NaN on either side: what is behind is told by its value,
    and what is written there by its being a number."""
    around = torch.full((99, table.shape[1]), float("nan"), dtype=table.dtype)
    buffer = torch.cat((around, table.detach(), around))
    return buffer, buffer[99:-99]


@settings(max_examples=100)
@given(st.data())
def test_ids_of_any_value_stay_in_bounds(data):
    """Straight to the launcher, past the op's checks: an id that is no row reads zeros and gets no
    gradient, and nothing outside of the tables is read or written."""
    tokens = data.draw(st.one_of(st.integers(0, 9), st.just(150)))
    columns = data.draw(st.sampled_from([1, 7, 24, 200]))
    rows = [data.draw(st.integers(0, 10)) for _ in range(3)]
    padding, threshold = data.draw(st.integers(-1, 10)), data.draw(st.sampled_from([0, 6554]))
    drawn = [
        data.draw(st.lists(ids_of_any_value, min_size=tokens, max_size=tokens)) for _ in range(3)
    ]
    ids = [torch.tensor(values, dtype=torch.int64) for values in drawn]
    if data.draw(st.booleans()):
        ids = [values.clamp(-(2**31), 2**31 - 1).int() for values in ids]
    tables = [torch.randn(n, columns) for n in rows]
    weight, bias, dout = torch.randn(columns), torch.randn(columns), torch.randn(tokens, columns)
    seed = testing.seed_tensor() if threshold else None
    # The same with ids in range: a row of zeros behind each table stands for those that are not.
    inside = [torch.where((i >= 0) & (i < n), i, n).long() for i, n in zip(ids, rows, strict=True)]
    extended = [torch.cat((table, torch.zeros(1, columns))) for table in tables]

    options = (1e-12, threshold, 3, torch.float32)
    reference = kernel("embedding", "reference")
    expected, statistics = reference.forward(*inside, *extended, weight, bias, seed, *options)
    isa = data.draw(st.sampled_from(cpu.library().isas()))
    before = cpu.library().isa()
    cpu.library().set_isa(isa)
    try:
        native = kernel("embedding", "cpu")
        views = [guarded(table)[1] for table in tables]
        out, saved = native.forward(*ids, *views, weight, bias, seed, *options)
        # Rows that are nothing but zeros are all the same: only the others are to be compared.
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        mask = (padding, threshold, 3)
        buffers = []
        with pytest.MonkeyPatch.context() as patch:
            empty_like = torch.empty_like

            def empty_in_guards(x):
                if x.dim() != 2:
                    return empty_like(x)
                buffers.append(guarded(torch.full_like(x, 7.0)))
                return buffers[-1][1]

            patch.setattr(torch, "empty_like", empty_in_guards)
            grads = native.backward(dout, *ids, *views, weight, bias, saved, seed, *mask)
    finally:
        cpu.library().set_isa(before)
    assert len(buffers) == 3
    for buffer, _ in buffers:
        assert buffer[:99].isnan().all()
        assert buffer[-99:].isnan().all()
    reference_mask = (padding if padding < rows[0] else -1, *mask[1:])
    wanted = reference.backward(
        dout, *inside, *extended, weight, bias, statistics, seed, *reference_mask
    )
    for i, (grad, other) in enumerate(zip(grads, wanted, strict=True)):
        other = other[:-1] if i < 3 else other
        # One column, or a row of zeros: rstd is 1e6, and rounding is blown up by it.
        scale = float(statistics[1].max()) if tokens else 1.0
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5 * max(1.0, scale))


sizes64 = st.sampled_from([-(2**63), -1, 0, 1, 2, 65537, 2**63 - 1])
words = st.sampled_from([0, 1, 65536, 65537, 2**32 - 1])
codes = st.integers(-2, 3)
# Name: how many addresses, then the numbers behind them.
strides = st.tuples(sizes64, sizes64)
ENTRY_POINTS = {
    "attention_forward": (
        8,
        [sizes64] * 5 + [strides] * 3 + [st.floats(), st.booleans(), words, words] + [codes] * 2,
    ),
    "attention_backward": (
        12,
        [sizes64] * 5 + [strides] * 6 + [st.floats(), st.booleans(), words, words] + [codes] * 2,
    ),
    "cross_entropy_forward": (6, [sizes64] * 4 + [st.booleans()] * 2 + [codes] * 4),
    "cross_entropy_backward": (9, [sizes64] * 4 + [st.booleans()] * 2 + [codes] * 4),
    "layernorm_forward": (8, [sizes64] * 2 + [st.floats(), words, words] + [codes] * 3),
    "layernorm_backward": (10, [sizes64] * 3 + [words, words] + [codes] * 3),
    "gelu_forward": (3, [sizes64] * 2 + [st.booleans()] + [codes] * 3),
    "gelu_backward": (6, [sizes64] * 3 + [st.booleans()] + [codes] * 3),
    "dropout": (3, [sizes64] * 2 + [words, words] + [codes] * 2),
    "embedding_forward": (
        11,
        [sizes64] * 5 + [st.booleans()] * 3 + [st.floats(), words, words] + [codes] * 4,
    ),
    "embedding_backward": (
        19,
        [sizes64] * 8 + [st.booleans()] * 3 + [words, words] + [codes] * 4,
    ),
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
@settings(max_examples=100)
@given(data=st.data())
def test_null_addresses_and_senseless_numbers_are_refused(name, data):
    """Every address is null, so a launch that ran would crash; none may, except of nothing."""
    addresses, numbers = ENTRY_POINTS[name]
    drawn = [data.draw(number) for number in numbers]
    status = getattr(cpu.library(), name)(*[0] * addresses, *drawn)
    assert status > 0 or ("gelu" in name and 0 in drawn[:2])


def test_every_entry_point_is_tried():
    library = cpu.library()
    kernels = {name for name in dir(library) if callable(getattr(library, name))}
    about_itself = {"isa", "isas", "set_isa"}
    assert {name for name in kernels if not name.startswith("_")} - about_itself == {*ENTRY_POINTS}


def test_a_sign_that_is_only_a_flag():
    """torch keeps the sign of a conjugate's imaginary part beside the memory."""
    x = torch.complex(torch.randn(5), torch.randn(5)).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(ops.gelu(x, backend="cpu"), ops.gelu(x, backend="reference"))


def test_another_default_device_is_no_matter():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    with torch.device("meta"):
        out = ops.layernorm(x, weight, weight) + ops.gelu(x, weight)
        torch.autograd.grad(out, x, out.detach())


def test_a_refused_launch_names_kernel_and_numbers():
    with pytest.raises(
        KernelError, match=r"_cpu\.gelu_forward refused its argument group 2: rows=3"
    ):
        check_launch(2, "gelu_forward", rows=3)
    with pytest.raises(KernelError, match="ran out of memory"):
        check_launch(-1, "layernorm_forward", rows=3)
    check_launch(0, "gelu_forward")


def test_set_isa_knows_its_names():
    with pytest.raises(ValueError, match="BERTFAST_CPU_ISA: expected one of baseline"):
        cpu.library().set_isa("mmx")
