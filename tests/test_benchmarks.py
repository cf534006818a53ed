"""The benchmarks' report and memory measurement, which no benchmark would find wrong."""

import importlib.util
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report, memory = _load("report"), _load("memory")


def entry(group, implementation, seconds, **info):
    return {
        "group": group,
        "extra_info": {"implementation": implementation, **info},
        "stats": {"median": seconds, "data": [seconds]},
    }


@pytest.fixture
def data():
    """One group of each kind."""
    benchmarks = [
        entry("copy", "torch", size / 32, bytes=2 * size * 1024 * 1024) for size in (3, 12, 256)
    ]
    for dtype, flops in (("float32", 100e9), ("bfloat16", 400e9)):
        benchmarks.append(entry("gemm", "torch", 1.0, flops=flops, dtype=dtype))
    for word in ("gelu", "layernorm"):
        for call in report.CALLS:
            benchmarks.append(entry(f"{word} overhead", call, 5e-6))
    for group, seconds in (("inference", 0.1), ("outside gemm", 0.05), ("training step", 1.0)):
        about = {"case": "8x128", "dtype": "float32", "tokens": 640, "padded_tokens": 1024}
        benchmarks.append(entry(f"{group} float32", "bertfast", seconds, **about))
        benchmarks.append(entry(f"{group} float32", "transformers", 3 * seconds, **about))
    about = {"case": "2000 texts", "dtype": "float32", "tokens": 640, "padded_tokens": 1024}
    for times, name in ((1, "bertfast"), (4, "transformers"), (2, "sentence-transformers")):
        benchmarks.append(entry("embed texts float32", name, times, **about))
    for times, name in ((1.5, "bertfast"), (2, "torch")):
        benchmarks.append(entry("start-up embed", name, times, case="a verb"))
    about = {"case": "8x128", "dtype": "float32"}
    for times, name in ((1, "bertfast"), (2, "transformers"), (0.5, "no_logits")):
        benchmarks.append(entry("accelerated step 8x128 float32", name, times, **about))
    for direction in ("forward", "forward+backward"):
        about = {"case": "4x512 p0.1", "dtype": "bfloat16", "flops": 100e9}
        about |= {"peak_bytes": 3_000_000, "returned_bytes": 1_000_000}
        for times, name in enumerate(("bertfast", "sdpa", "eager", "compile"), 1):
            group = f"attention {direction} 4x512 p0.1 bfloat16"
            benchmarks.append(entry(group, name, times, **about))
    group = "cross_entropy forward+backward 1024x768x30522 bfloat16-mixed"
    about = {"case": "", "dtype": "bfloat16-mixed", "flops": 100e9}
    for times, name in enumerate(("bertfast", "eager", "compile"), 1):
        benchmarks.append(entry(group, name, times * 1e-4, **about))
        benchmarks.append(entry("dropout forward float32", name, times, bytes=32e6, **about))
    about = {"versions": {"torch": "1"}, "cpu": {"model": "CPU"}, "torch": {"threads": 2}}
    machine = {"bertfast": {**about, "kernels": {"isa": "avx2"}}}
    return {"machine_info": machine, "benchmarks": benchmarks, "commit_info": {}}


def test_the_report_of_a_small_file(data):
    lines = report.report(data, "some.json").splitlines()
    assert "| 8x128, float32 (640 of 1024 tokens) | 100 ms | 300 ms | 3.0× |" in lines
    # A peer that was not measured leaves its cells empty.
    assert "| 8x128, float32 (640 of 1024 tokens) | 1000 ms | 3000 ms | 3.0× |  |  |" in lines
    embedded = (
        "| 2000 texts, float32 (640 of 1024 tokens) | 1000 ms | 4000 ms | 4.0× | 2000 ms | 2.0× |"
    )
    assert embedded in lines
    accelerated = "| 8x128, float32 | 2000 ms |  |  | 1000 ms | 2.0× | 500 ms | 4.0× |"
    assert accelerated in lines
    assert "| a verb | 1500 ms | 2000 ms | 0.75 |" in lines
    attention = "| 4x512 p0.1 bfloat16 | 1000 ms | 2.0× | 3.0× | 4.0× | 100 GFLOP/s | 25% of linear"
    assert any(line.startswith(attention) and "| 2 / 2 MB | 2.0× |" in line for line in lines)
    kernel = "cross_entropy forward+backward 1024x768x30522 bfloat16-mixed"
    assert any(line.startswith(f"| {kernel} | 100 µs | 2.0× | 3.0× |") for line in lines)
    assert sum(line.startswith("| dropout") for line in lines) == 1


def test_the_slim_file_has_the_same_report(data):
    before = report.report(data, "some.json")
    slim = report.slim(data)
    assert "commit_info" not in slim
    assert all("data" not in benchmark["stats"] for benchmark in slim["benchmarks"])
    assert report.report(slim, "some.json") == before


def test_the_tables_go_between_the_markers():
    readme = f"before {report.BEGIN} old {report.END} after"
    expected = f"before {report.BEGIN}\n\nnew\n\n{report.END} after"
    assert report.insert(readme, "new") == expected
    with pytest.raises(ValueError, match="markers"):
        report.insert("no markers", "new")


def test_peak_memory_counts_what_is_freed_again():
    size = 64 * 1024 * 1024

    def call():
        torch.ones(size, dtype=torch.uint8)
        return torch.ones(size // 4, dtype=torch.uint8)

    found = memory.peak_growth(call)
    if found is None:  # not Linux, or one that keeps its mark to itself
        return
    growth, returned = found
    assert returned.numel() == size // 4
    assert size <= growth + 2**20
    assert growth < 1.5 * size
