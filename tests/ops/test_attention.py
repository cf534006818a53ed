import pytest
import torch

from bertfast import ops, testing
from bertfast.ops.dropout import attention_keep_mask

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
