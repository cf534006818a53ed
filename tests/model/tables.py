"""LevelDB tables written the plain way: to make test data, and to damage it with sound CRCs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)


def crc32c(data: bytes, crc: int = 0) -> int:
    """CRC-32C bit by bit, as it is defined."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def block(entries: Sequence[tuple[bytes, bytes]], interval: int = 16) -> bytes:
    """Entries with keys that share their starts, a restart every ``interval``."""
    out, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += (
            varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        )
        last = key
    restarts = restarts or [0]
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def table(
    blocks: Sequence[Sequence[tuple[bytes, bytes]]],
    compress: Callable[[bytes], bytes] | None = None,
) -> bytes:
    """A table of these blocks of entries, compressed by ``compress``."""
    out = b""

    def put(content: bytes) -> bytes:
        nonlocal out
        content, kind = (content, b"\0") if compress is None else (compress(content), b"\1")
        handle = varint(len(out)) + varint(len(content))
        out += content + kind + struct.pack("<I", masked(crc32c(content + kind)))
        return handle

    index = [(entries[-1][0] if entries else b"", put(block(entries))) for entries in blocks]
    handles = put(block([])) + put(block(index, interval=1))
    return out + handles.ljust(40, b"\0") + MAGIC
