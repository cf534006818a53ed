"""Calls every emulated CUDA entry point under AddressSanitizer; test_emulation.py runs it.

    python sanitized_cuda.py MODULE CALLS

As in sanitized.py, every buffer is an allocation of its own of exactly the size the kernel is told.
"""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sanitized import Buffers, int32s, thresholds

from bertfast.kernels.cuda.attention import (
    FORWARD,
    HEADS,
    PASS_OF_KEYS,
    QUERIES,
    plan,
    whole_head,
)

WORDS = ("layernorm", "gelu", "dropout", "attention")
rows = st.sampled_from([0, 1, 3, 9, 20])
columns = st.one_of(st.integers(1, 40), st.sampled_from([101, 256, 264, 1030, 1032, 4104]))
# Under the sanitizers a product of tiles takes as long as rows of the other kernels.
some_lengths = st.one_of(st.sampled_from([0, 1, 5, 17, 30]), st.sampled_from([1, 70]))
calls = 0


class Half(Buffers):
    def numbers(self, code: int, *shape: int) -> int:
        """Random floats (code 0), or bits of 16-bit ones (1, 2)."""
        return super().numbers(min(code, 1), *shape)


def layernorm(lib: Any, draw: Callable[[Any], Any], b: Half) -> list[int]:
    n, c, code = draw(rows), draw(columns), draw(st.integers(0, 2))
    threshold, wide, some = draw(thresholds), draw(st.booleans()), draw(st.booleans())
    parameters, blocks = 0 if wide else code, draw(st.integers(1, 4))
    seed = b.seed(threshold)
    residual = b.numbers(code, n, c) if some else 0
    x, out, dout, dx = (b.numbers(code, n, c) for _ in range(4))
    total = b.numbers(code, n, c)
    weight, bias, dweight, dbias = (b.numbers(parameters, c) for _ in range(4))
    statistics, partial = b.numbers(0, 2, n), b.numbers(0, blocks, 2, c)
    dresidual = b.numbers(code, n, c) if some and threshold else 0
    kept = total if draw(st.booleans()) else 0
    return [
        lib.layernorm_forward(
            0, 1, 0, x, residual, weight, bias, out, kept, statistics, seed, n, c, 1e-5,
            threshold, 3, code, wide,
        ),
        lib.layernorm_backward(
            0, 1, 0, dout, total, weight, statistics, dx, dresidual, dweight, dbias, partial, seed,
            n, c, blocks, threshold, 3, code, wide,
        ),
    ]  # fmt: skip


def gelu(lib: Any, draw: Callable[[Any], Any], b: Half) -> list[int]:
    n, c, code = draw(rows), draw(columns), draw(st.integers(0, 2))
    wide, some, tanh = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    if not some:
        n = 1
    blocks = draw(st.integers(1, 4))
    bias, dbias = (b.numbers(0 if wide else code, c) if some else 0 for _ in range(2))
    partial = b.numbers(0, blocks, c) if some else 0
    x, out, dout, dx = (b.numbers(code, n, c) for _ in range(4))
    return [
        lib.gelu_forward(0, 1, 0, x, bias, out, n, c, tanh, code, wide),
        lib.gelu_backward(
            0, 1, 0, dout, x, bias, dx, dbias, partial, n, c, blocks, tanh, code, wide
        ),
    ]


def dropout(lib: Any, draw: Callable[[Any], Any], b: Half) -> list[int]:
    n, c, code = draw(rows), draw(columns), draw(st.integers(0, 2))
    x, out = (b.numbers(code, n, c) for _ in range(2))
    return [lib.dropout(0, 1, 0, x, out, b.seed(1), n, c, draw(thresholds), 3, code)]


def attention(lib: Any, draw: Callable[[Any], Any], b: Half) -> list[int]:
    heads, d = draw(st.integers(1, 2)), draw(st.sampled_from([1, 8, 31, 32, 48, 64, 72, 96, 128]))
    cross, code, threshold = draw(st.booleans()), draw(st.integers(1, 2)), draw(thresholds)
    batch = draw(st.integers(0, 3))

    def sequences() -> tuple[int, int, int]:
        """Ends, tokens and the longest: of sequences, or any numbers there are."""
        lengths = draw(st.lists(some_lengths, min_size=batch, max_size=batch))
        ends = np.cumsum([0, *lengths], dtype=np.int32)
        if draw(st.integers(0, 3)) == 0:
            ends = np.array(
                draw(st.lists(int32s, min_size=batch + 1, max_size=batch + 1)), np.int32
            )
        return b.keep(ends), sum(lengths) + draw(st.integers(0, 3)), max([0, *lengths])

    end_q, tokens_q, longest_q = sequences()
    end_k, tokens_k, longest_k = sequences() if cross else (end_q, tokens_q, longest_q)
    causal, there = draw(st.booleans()), 227 * 1024

    def strided(tokens: int) -> tuple[int, int, int]:
        return b.numbers(code, tokens, heads, d), heads * d, d

    q, out, dout, dq = (strided(tokens_q) for _ in range(4))
    k, v, dk, dv = (strided(tokens_k) for _ in range(4))
    logsumexp, facts = b.numbers(0, heads, tokens_q), b.numbers(0, heads, tokens_q, 2)
    sizes = (
        end_q, end_k, b.seed(threshold), tokens_q, tokens_k, batch, heads, d, longest_q, longest_k,
        -0.3, threshold, 0xFFFFFFFF, causal, code,
    )  # fmt: skip

    no_backward = ((0, 0, 0),) * 4

    def launch(kernel: int) -> int:
        backward = no_backward if kernel == FORWARD else (dout, dq, dk, dv)
        return lib.attention(
            0, 1, 0, kernel, q, k, v, out, logsumexp, *backward, facts, *sizes,
            *plan(kernel, longest_q, longest_k, d, there),
        )  # fmt: skip

    whole = whole_head(longest_q, longest_k, d, there) and draw(st.booleans())
    return [
        launch(kernel) for kernel in (FORWARD, *((HEADS,) if whole else (QUERIES, PASS_OF_KEYS)))
    ]


def main(path: str, count: int) -> None:
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    lib = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lib)

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def call(data: st.DataObject) -> None:
        global calls
        word = data.draw(st.sampled_from(WORDS))
        statuses = globals()[word](lib, data.draw, Half(data.draw))
        assert not any(statuses), lib.status_text(max(statuses))
        calls += len(statuses)

    np.seterr(all="ignore")
    call()
    print(f"{calls} calls")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
