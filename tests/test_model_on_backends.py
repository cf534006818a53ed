"""The model's tests once more, with all ops on one backend: an op that has no kernel for its input
is then an error."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Side by side. Triton's kernels are interpreted and CUDA's emulated, which is slow: they are left
# out of tests about files, configurations and bad input. CUDA has kernels for four of the six ops,
# and attention in 16 bits only, in which tests/training/test_gate.py trains.
RUNS = {
    "cpu": [["."]],
    "triton": [
        ["test_oracle.py", "test_minilm.py"],
        ["test_behaviour.py", "test_heads.py", "test_packing.py"],
    ],
    "cuda,cpu,reference": [
        ["test_oracle.py", "test_minilm.py"],
        ["test_behaviour.py", "test_heads.py", "test_packing.py"],
    ],
}


def run_tests(backend, files):
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *(str(TESTS / "model" / file) for file in files),
        ],
        env={**os.environ, "BERTFAST_BACKEND": backend},
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


@pytest.mark.parametrize("backend", RUNS)
def test_the_model_runs_on_the_kernels_of(backend):
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(run_tests, backend, files) for files in RUNS[backend]]
        assert sum(run.result() for run in runs) > 200
