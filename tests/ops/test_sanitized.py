"""The native entry points stay in bounds whatever is in cu_seqlens, ids and labels."""

import os
import re
import subprocess
import sys
from pathlib import Path

import csrc_build
import pytest

from bertfast.kernels import cpu

CSRC = Path(__file__).parents[2] / "csrc"
PROGRAM = Path(__file__).with_name("sanitized.py")


@pytest.fixture(scope="module")
def preload():
    try:
        return csrc_build.sanitizer_preload()
    except csrc_build.BuildUnavailable as error:
        pytest.skip(str(error))


def build(source, folder, isas=None):
    return csrc_build.build_cpu(source, folder, sanitize=True, isas=isas).path


def run(module, calls, preload):
    environment = {
        **os.environ,
        "LD_PRELOAD": preload,
        # Python keeps what it allocates until the end, and its small objects out of malloc's sight.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, "-P", str(PROGRAM), str(module), str(calls)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_in_bounds(preload, tmp_path):
    best = cpu.library().isas()[-1]  # all of them take a minute to compile
    done = run(build(CSRC, tmp_path, [best]), 2000, preload)
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r"(\d+) calls", done.stdout)[1]) >= 2000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_in_bounds_for_a_hundred_thousand_calls(preload, tmp_path):
    done = run(build(CSRC, tmp_path), 100_000, preload)
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r"(\d+) calls", done.stdout)[1]) >= 100_000
