"""Calls every native entry point under AddressSanitizer; run as a program by test_sanitized.py.

    python sanitized.py MODULE CALLS

Arguments a caller could get wrong are drawn by hypothesis: offsets, ids and labels of any value.
Every buffer is an allocation of its own of exactly the size the kernel is told, so that one byte
too far, read or written, ends the process with AddressSanitizer's report. It knows nothing of
torch, whose allocator would hide such a byte.
"""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sizes = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 63, 64, 65, 70, 130]))
sizes1 = sizes.filter(lambda n: n > 0)
int32s = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-2, 140))
int64s = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-2, 140))
thresholds = st.sampled_from([0, 6554, 65536])
calls = 0


class Buffers:
    """The allocations of one call; they live until it has returned."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.kept: list[np.ndarray] = []
        self.random = np.random.default_rng(draw(st.integers(0, 2**32)))

    def numbers(self, code: int, *shape: int) -> int:
        """Random floats (code 0) or bfloat16 (1)."""
        values = self.random.standard_normal(shape, np.float32)
        return self.keep(values if code == 0 else (values.view(np.uint32) >> 16).astype(np.uint16))

    def keep(self, array: np.ndarray) -> int:
        self.kept.append(np.ascontiguousarray(array))
        return self.kept[-1].ctypes.data

    def seed(self, threshold: int) -> int:
        return self.keep(np.array([5], np.int64)) if threshold else 0


def attention(lib: Any, draw: Callable[[Any], Any], b: Buffers) -> None:
    batch, queries, keys = draw(st.integers(0, 4)), draw(sizes), draw(sizes)
    heads, head_dim = draw(st.integers(1, 3)), draw(st.one_of(sizes1, st.just(256)))
    code, threshold, threads = draw(st.integers(0, 1)), draw(thresholds), draw(st.integers(1, 3))
    cu_seqlens = [
        b.keep(np.array(draw(st.lists(int32s, min_size=batch + 1, max_size=batch + 1)), np.int32))
        for _ in range(2)
    ]
    strides = (heads * head_dim, head_dim)
    dout, out = (b.numbers(code, queries, heads, head_dim) for _ in range(2))
    if draw(st.booleans()):  # in one tensor, read and written in place
        keys, step = queries, heads * head_dim * (4 if code == 0 else 2)
        strides = (3 * heads * head_dim, head_dim)
        qkv, dqkv = (b.numbers(code, queries, 3, heads, head_dim) for _ in range(2))
        q, k, v = (qkv + i * step if queries else qkv for i in range(3))
        dq, dk, dv = (dqkv + i * step if queries else dqkv for i in range(3))
    else:
        q, dq = (b.numbers(code, queries, heads, head_dim) for _ in range(2))
        k, v, dk, dv = (b.numbers(code, keys, heads, head_dim) for _ in range(4))
    logsumexp = b.numbers(0, heads, queries)
    size = (batch, queries, keys, heads, head_dim)
    options = (draw(st.floats(-2, 2)), draw(st.booleans()), threshold, 3, code, threads)
    seed = b.seed(threshold)
    first = lib.attention_forward(
        q, k, v, out, logsumexp, *cu_seqlens, seed, *size, *[strides] * 3, *options
    )
    second = lib.attention_backward(
        dout,
        q,
        k,
        v,
        out,
        logsumexp,
        dq,
        dk,
        dv,
        *cu_seqlens,
        seed,
        *size,
        *[strides] * 6,
        *options,
    )
    assert first == second == 0, (first, second)


def any_ids(draw: Callable[[Any], Any], b: Buffers, count: int) -> tuple[int, bool]:
    """``count`` integers of any value, and whether they are int64."""
    wide = draw(st.booleans())
    values = draw(st.lists(int64s if wide else int32s, min_size=count, max_size=count))
    return b.keep(np.array(values, np.int64 if wide else np.int32)), wide


def cross_entropy(lib: Any, draw: Callable[[Any], Any], b: Buffers) -> None:
    tokens, columns, vocabulary = draw(sizes), draw(sizes1), draw(sizes1)
    code, threads = draw(st.integers(0, 1)), draw(st.integers(1, 3))
    weight_code, bias_code = (min(code, draw(st.integers(0, 1))) for _ in range(2))
    some_bias = draw(st.booleans())
    labels, wide = any_ids(draw, b, tokens)
    hidden, dhidden = (b.numbers(code, tokens, columns) for _ in range(2))
    weight, dweight = (b.numbers(weight_code, vocabulary, columns) for _ in range(2))
    bias, dbias = (b.numbers(bias_code, vocabulary) if some_bias else 0 for _ in range(2))
    loss, logsumexp = b.numbers(0, 1), b.numbers(0, tokens)
    size = (tokens, columns, vocabulary, draw(st.sampled_from([-100, 0, 2**62])))
    options = (draw(st.booleans()), wide, code, weight_code, bias_code, threads)
    first = lib.cross_entropy_forward(
        hidden, weight, bias, labels, loss, logsumexp, *size, *options
    )
    second = lib.cross_entropy_backward(
        loss, hidden, weight, bias, labels, logsumexp, dhidden, dweight, dbias, *size, *options
    )
    assert first == second == 0, (first, second)


def embedding(lib: Any, draw: Callable[[Any], Any], b: Buffers) -> None:
    tokens, columns, blocks = draw(sizes), draw(sizes1), draw(st.integers(1, 3))
    rows = draw(sizes1), draw(sizes1), draw(sizes)  # words, positions, token types
    code, threshold, threads = draw(st.integers(0, 1)), draw(thresholds), draw(st.integers(1, 3))
    parameter_code = min(code, draw(st.integers(0, 1)))
    out_code = max(code, draw(st.integers(0, 1)))
    ids, wide = zip(*(any_ids(draw, b, tokens) for _ in rows), strict=True)
    tables, grads = ([b.numbers(code, n, columns) for n in rows] for _ in range(2))
    weight, bias, dweight, dbias = (b.numbers(parameter_code, columns) for _ in range(4))
    out, dout = (b.numbers(out_code, tokens, columns) for _ in range(2))
    statistics, ds = b.numbers(0, 2, tokens), b.numbers(0, tokens, columns)
    chunk = draw(st.sampled_from([1, 3, 64]))
    partial = b.numbers(0, blocks, 2, columns)
    parts = b.numbers(0, 3, -(-tokens // chunk), 2, columns)
    readers = b.keep(np.zeros((4, tokens, 2), np.int64))
    seed, size = b.seed(threshold), (*rows, tokens, columns)
    codes = (threshold, 3, code, parameter_code, out_code, threads)
    first = lib.embedding_forward(
        *ids, *tables, weight, bias, out, statistics, seed, *size, *wide, 1e-12, *codes
    )
    scratch = (ds, partial, parts, readers)
    padding = draw(st.integers(-1, rows[0] - 1))
    second = lib.embedding_backward(
        dout, *ids, *tables, weight, statistics, *grads, dweight, dbias, *scratch, seed,
        *size, blocks, chunk, padding, *wide, *codes,
    )  # fmt: skip
    assert first == second == 0, (first, second)


def rows(lib: Any, draw: Callable[[Any], Any], b: Buffers) -> None:
    """layernorm, gelu and dropout, whose arguments cannot be wrong but for their sizes."""
    count, columns, blocks = draw(sizes), draw(sizes1), draw(st.integers(1, 3))
    code, threshold, threads = draw(st.integers(0, 1)), draw(thresholds), draw(st.integers(1, 3))
    parameter_code = min(code, draw(st.integers(0, 1)))
    x, residual, out, total, dx, dresidual = (b.numbers(code, count, columns) for _ in range(6))
    weight, bias, dweight, dbias = (b.numbers(parameter_code, columns) for _ in range(4))
    statistics, partial = b.numbers(0, 2, count), b.numbers(0, blocks, 2, columns)
    seed, tanh = b.seed(threshold), draw(st.booleans())
    codes = (code, parameter_code, threads)
    statuses = [
        lib.layernorm_forward(
            x, residual, weight, bias, out, total, statistics, seed, count, columns, 1e-12,
            threshold, 3, *codes,
        ),
        lib.layernorm_backward(
            out, total, weight, statistics, dx, dresidual, dweight, dbias, partial, seed, count,
            columns, blocks, threshold, 3, *codes,
        ),
        lib.gelu_forward(x, bias, out, count, columns, tanh, *codes),
        lib.gelu_backward(
            out, x, bias, dx, dbias, partial, count, columns, blocks, tanh, *codes
        ),
        lib.dropout(x, out, b.seed(1), count, columns, threshold, 3, code, threads),
    ]  # fmt: skip
    assert statuses == [0] * 5, statuses


# Each with how many entry points it calls.
WORDS = {attention: 2, cross_entropy: 2, embedding: 2, rows: 5}


def main() -> None:
    path, count = sys.argv[1], int(sys.argv[2])
    spec = importlib.util.spec_from_file_location("_cpu", path)
    lib = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lib)
    calls_per_example = sum(WORDS.values())

    @settings(
        max_examples=-(-count // calls_per_example),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def every_word(data: st.DataObject) -> None:
        global calls
        lib.set_isa(data.draw(st.sampled_from(lib.isas())))
        for word, entry_points in WORDS.items():
            word(lib, data.draw, Buffers(data.draw))
            calls += entry_points

    every_word()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
