"""What the machine itself can do: the ceilings that the other benchmarks are held against."""

import pytest
import torch

from .kernels import DTYPES, precision


@pytest.mark.parametrize("megabytes", [3, 12, 256])
def bench_copy(benchmark, megabytes):
    """``copy_`` between two buffers; bytes read plus bytes written. 256 MB do not fit any cache."""
    source = torch.randn(megabytes * 1024 * 1024 // 4)
    target = torch.empty_like(source)
    benchmark.group = "copy"
    benchmark.extra_info.update(bytes=2 * source.numel() * 4, implementation="torch")
    benchmark.pedantic(target.copy_, (source,), rounds=30 if megabytes > 100 else 300, iterations=1)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_gemm(benchmark, dtype):
    """``F.linear`` at BERT-base's feed-forward size on 1024 tokens."""
    to, _ = precision(dtype)
    x, weight = torch.randn(1024, 768).to(to), torch.randn(3072, 768).to(to)
    benchmark.group = "gemm"
    benchmark.extra_info.update(flops=2 * 1024 * 768 * 3072, dtype=dtype, implementation="torch")
    benchmark.pedantic(torch.nn.functional.linear, (x, weight), rounds=30, warmup_rounds=3)
