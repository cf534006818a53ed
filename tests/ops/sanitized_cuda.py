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
from sanitized import Buffers, thresholds

WORDS = ("layernorm", "gelu", "dropout")
rows = st.sampled_from([0, 1, 3, 9, 20])
columns = st.one_of(st.integers(1, 40), st.sampled_from([101, 256, 264, 1030, 1032, 4104]))
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
