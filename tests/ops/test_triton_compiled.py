"""What the compiler makes of the Triton kernels for GPUs that are not here.

The table is committed; one that changes is to be looked at, and written anew by
``TRITON_INTERPRET=0 python tests/ops/triton_compiled.py --write``.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("triton_compiled.py")
COMMITTED = json.loads(PROGRAM.with_suffix(".json").read_text())
ARCHITECTURES = [name for name in COMMITTED if name.startswith("sm_")]


def compile_for(architecture):
    """In a process of its own: in this one the kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", str(PROGRAM), architecture.removeprefix("sm_")],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)[architecture]


@pytest.fixture(scope="module")
def tables():
    with ThreadPoolExecutor(2) as two:
        return dict(zip(ARCHITECTURES, two.map(compile_for, ARCHITECTURES), strict=True))


def test_the_architectures():
    assert ARCHITECTURES == ["sm_80", "sm_90", "sm_100"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills(tables, architecture):
    spilling = {name: row for name, row in tables[architecture].items() if row["stack"]}
    assert not spilling


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_are_read_and_written_16_bytes_at_a_time(tables, architecture):
    """Where columns are a multiple of 16. Narrower are what a program reads or writes once for a
    row: statistics, ids (8 bytes), the seed; a finished sum; and embedding's table gradients in 16
    bits. One tile element by element would be 16 accesses and more."""
    for name, row in tables[architecture].items():
        word, columns, *_ = name.split()
        widths = row["global_access_bytes"]
        wide = widths.get("16", 0) >= 2
        narrow = (
            widths.get("2", 0) <= 1
            and widths.get("4", 0) <= 8
            and (widths.get("8", 0) <= 2 or word == "embedding")
        )
        if int(columns) % 16 == 0:
            assert wide and narrow, (name, widths)
        elif "_sum_" not in name:
            assert not wide, (name, widths)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_committed_table(tables, architecture):
    """Made by the Triton that ``constraints.txt`` names; another may allot registers otherwise."""
    import triton

    if triton.__version__ != COMMITTED["triton"]:
        pytest.skip(f"the table was made by Triton {COMMITTED['triton']}")
    made, committed = tables[architecture], COMMITTED[architecture]
    changed = {
        name: (made.get(name), committed.get(name))
        for name in {*made, *committed}
        if made.get(name) != committed.get(name)
    }
    assert not changed, "now, and committed"
