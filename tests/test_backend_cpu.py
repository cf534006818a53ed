"""The model's tests once more, on nothing but the native CPU kernels."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_model_test_runs_on_the_native_kernels():
    """``BERTFAST_BACKEND=cpu`` makes an op that has no kernel for its input an error."""
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(TESTS / "model"),
        ],
        env={**os.environ, "BERTFAST_BACKEND": "cpu"},
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
