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
    """But attention in float32 and of heads beyond 128, which the committed table holds."""
    spilling = {name for name, row in tables[architecture].items() if row["stack"]}
    for name in spilling:
        assert name.startswith("attention"), name
        assert name.endswith("float32") or "x256" in name, name


PRODUCTS = {
    "attention": ("_forward", "_backward_heads", "_backward_keys", "_backward_queries"),
    "cross_entropy": ("_statistics", "_dlogits", "_gradients"),
}
PRODUCT = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_are_the_tensor_cores(tables, architecture):
    """Each generation's own instruction, in 16 bits, where a tile has 64 rows for it."""
    seen = set()
    for name, row in tables[architecture].items():
        word, size, *_, kernel, dtype = name.replace(":2", "").split()
        if (
            kernel in PRODUCTS.get(word, ())
            and dtype != "float32"
            and size not in ("101", "512x256")
        ):
            assert row["instructions"].get(PRODUCT[architecture], 0), name
            seen.add((word, kernel))
    assert len(seen) >= 7 - (architecture == "sm_80"), (
        "of sm_80, heads are too wide for one program"
    )


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_dropout_adds_no_shared_memory_to_attention(tables, architecture):
    """The mask lies as the accumulators do. (sm_100 keeps a row in a thread, and passes it through
    shared memory.)"""
    rows, compared = tables[architecture], 0
    for name, row in rows.items():
        if (
            name.startswith("attention")
            and " p0.1 _forward " in name
            and not name.endswith("float32")
        ):
            if "x256" in name:
                continue
            without = rows[name.replace(" p0.1 ", " p0.0 ")]
            for what in ("st.shared", "stmatrix", "bar.sync"):
                got = row["instructions"].get(what, 0), without["instructions"].get(what, 0)
                assert got[0] <= got[1], (name, what, got)
            compared += 1
    assert compared >= 7


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_are_read_and_written_16_bytes_at_a_time(tables, architecture):
    """Where columns are a multiple of 16. Narrower are what a program reads or writes once for a
    row: statistics, ids (8 bytes), the seed; a finished sum; and embedding's table gradients in 16
    bits. One tile element by element would be 16 accesses and more."""
    for name, row in tables[architecture].items():
        word, columns, *_, kernel, dtype = name.replace(":2", "").split()
        widths = row["global_access_bytes"]
        if word in PRODUCTS:
            # Operands are copied to shared memory, or loaded where nothing is loaded ahead. Ids
            # come 8 bytes at a time, a bias and the numbers of a row one by one.
            copies = row.get("async_copy_bytes", {})
            if kernel in PRODUCTS[word] and columns != "101" and dtype != "float32":
                assert copies.get("16", 0) >= 8 or widths.get("16", 0) >= 4, (name, row)
                assert set(copies) <= {"8", "16"} and widths.get("2", 0) <= 1, (name, row)
            continue
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
