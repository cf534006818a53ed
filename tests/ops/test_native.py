"""The native entry points take anything without crashing the process."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertfast import ops, testing
from bertfast.errors import KernelError
from bertfast.kernels import cpu
from bertfast.kernels.cpu import check_launch

sizes = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 511, 512, 513, 4096, 4097]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@settings(max_examples=150)
@given(st.data())
def test_any_shape_layout_and_value(data):
    """Against the reference, and with a guard of known values around every output."""
    rows, columns = data.draw(st.integers(0, 6)), data.draw(sizes.filter(lambda n: n > 0))
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


sizes64 = st.sampled_from([-(2**63), -1, 0, 1, 2, 65537, 2**63 - 1])
words = st.sampled_from([0, 1, 65536, 65537, 2**32 - 1])
codes = st.integers(-2, 3)
# Name: how many addresses, then the numbers behind them.
ENTRY_POINTS = {
    "layernorm_forward": (8, [sizes64] * 2 + [st.floats(), words, words] + [codes] * 3),
    "layernorm_backward": (10, [sizes64] * 3 + [words, words] + [codes] * 3),
    "gelu_forward": (3, [sizes64] * 2 + [st.booleans()] + [codes] * 3),
    "gelu_backward": (6, [sizes64] * 3 + [st.booleans()] + [codes] * 3),
    "dropout": (3, [sizes64] * 2 + [words, words] + [codes] * 2),
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
