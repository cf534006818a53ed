"""CRC-32C by folding is CRC-32C."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertfast.model import crc32c as module
from bertfast.model.crc32c import DEGREE, GENERATOR, TERMS, crc32c, masked_crc32c

from . import tables


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"a", 0xC1D04330),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_known_answers(data, crc):
    """Of RFC 3720, and the usual check value."""
    assert crc32c(data) == crc32c(np.frombuffer(data, np.uint8)) == crc


def test_masked():
    assert (
        masked_crc32c(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) % 2**32
    )


def test_the_sparse_polynomial_is_a_multiple_of_the_generator():
    generator = 1 << 32 | int(f"{GENERATOR:032b}"[::-1], 2)
    rest = 1 << DEGREE | sum(1 << term for term in TERMS)
    for place in range(DEGREE, 31, -1):
        if rest >> place & 1:
            rest ^= generator << place - 32
    assert rest == 0


def by_bytes(data: bytes) -> int:
    """With a table of bytes; :func:`tables.crc32c` vouches for it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = module.TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def test_the_table_is_that_of_single_bytes():
    data = np.random.default_rng(0).bytes(3000)
    assert by_bytes(data) == tables.crc32c(data)


# Around where nothing, bytes, or words and bytes are folded, and at every place in a word.
LENGTHS = [0, 1, 3, 4, DEGREE - 1, DEGREE, DEGREE + 1, DEGREE + 5, 8 * DEGREE, 200_003]
LENGTHS += [8 * DEGREE + more for more in range(1, 18)]


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length):
    data = np.random.default_rng(length).bytes(length)
    assert crc32c(data) == by_bytes(data)


@settings(max_examples=25)
@given(st.integers(0, 40_000), st.integers(1, 20_000), st.integers(0, 2**32))
def test_pieces(length, piece, seed):
    data = np.random.default_rng(seed).bytes(length)
    before, module.PIECE = module.PIECE, piece
    try:
        assert crc32c(data) == by_bytes(data)
    finally:
        module.PIECE = before


def test_it_leaves_the_data_as_it_is_and_sees_each_bit():
    data = np.random.default_rng(0).integers(0, 256, 70_000, dtype=np.uint8)
    before, crc = data.copy(), crc32c(data)
    for place in (0, 3, 4, 6777, 54_215, 54_216, 69_999):
        for bit in (1, 128):
            data[place] ^= bit
            assert crc32c(data) != crc
            data[place] ^= bit
    assert (data == before).all()
