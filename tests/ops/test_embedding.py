import pytest
import torch

from bertfast import ops, testing

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


def test_gradient_is_deterministic():
    torch.manual_seed(0)
    word, token_type, position, weight, bias = tables(64, torch.float32)
    ids, zeros = torch.randint(10, (5000,)), torch.zeros(5000, dtype=torch.long)
    out = ops.embedding(
        ids, zeros, torch.randint(8, (5000,)), word, token_type, position, weight, bias
    )
    dout = torch.randn_like(out)
    first, *others = (torch.autograd.grad(out, word, dout, retain_graph=True)[0] for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


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
