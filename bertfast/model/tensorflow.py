"""TensorFlow's V2 checkpoints, read without TensorFlow.

A checkpoint ``bert_model.ckpt`` is an index, ``bert_model.ckpt.index``, and the tensors' bytes one
after another in ``bert_model.ckpt.data-00000-of-00001``, or in several such shards. The index is
a table in LevelDB's format (``table_format.md`` in its sources): sorted keys and values in blocks,
a block of blocks, a footer. A key is a variable's name and a value the protocol buffer
``BundleEntryProto``; the empty key has ``BundleHeaderProto`` (``tensor_bundle.proto`` in
TensorFlow's sources).

Every number in these files may be a stranger's. Each is compared with the file it points into
before anything is read or allocated; blocks and tensors are held against their CRC-32C.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bertfast.errors import CheckpointError
from bertfast.model.crc32c import masked_crc32c

MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
FOOTER = 48
# Type byte and CRC behind each block.
TRAILER = 5
UNCOMPRESSED, SNAPPY = 0, 1

# BERT-large with an optimizer's two slots has 1,200 variables in an index of 75 kB. Beyond these
# an index is damaged or hostile.
MAX_INDEX_BYTES = 2**24
ENTRY_BYTES = 2**8  # what an entry costs here at least
MAX_SHARDS = 10**5
MAX_DIMENSIONS = 8

# DataType in TensorFlow's types.proto, of what can be a weight.
DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}


class Variable(NamedTuple):
    """Where a variable lies; ``dtype`` is None for one that is no tensor of floats, and
    ``partitioned`` says that its parts lie elsewhere."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    partitioned: bool


class Checkpoint:
    """The variables of the checkpoint with this prefix, by name; :meth:`read` reads one.

    Args:
        prefix: path without ``.index``.

    Raises:
        CheckpointError: the index is missing or damaged, a shard is missing or too short.
    """

    def __init__(self, prefix: Path) -> None:
        self.index = prefix.with_name(f"{prefix.name}.index")
        entries = read_table(self.index)
        key, header = next(entries, (b"", b""))
        if key or not header:
            raise _damaged(self.index, "a header under the empty key")
        self.shards = self._shards(prefix, header)
        sizes: dict[int, int] = {}
        self.variables: dict[str, Variable] = {}
        for key, value in entries:
            # The parts of partitioned variables have keys that start with a zero byte.
            if not key.startswith(b"\0"):
                name = _text(self.index, key)
                variable = self._variable(name, value)
                self._check_range(name, variable, sizes)
                self.variables[name] = variable

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """A variable's shape and dtype. Raises CheckpointError for what :meth:`read` cannot read:
        no floats, nothing at all, or a variable in several parts."""
        variable = self.variables[name]
        if variable.partitioned:
            raise CheckpointError(f"{self.index}: expected {name} in one piece, got partitions")
        if variable.dtype is None:
            dtypes = ", ".join(map(str, DTYPES.values()))
            raise CheckpointError(f"{self.index}: expected {name} in one of {dtypes}, got another")
        if 0 in variable.shape:
            raise CheckpointError(
                f"{self.index}: expected {name} with values, got the shape {variable.shape}"
            )
        return variable.shape, variable.dtype

    def read(self, name: str) -> Tensor:
        """A variable's value, on the CPU. Raises CheckpointError if its CRC is another one."""
        shape, dtype = self.layout(name)
        variable, file = self.variables[name], self.shards[self.variables[name].shard]
        value = torch.empty(shape, dtype=dtype, device="cpu")
        data: Any = value.reshape(-1).view(torch.uint8).numpy()
        try:
            with open(file, "rb", buffering=0) as opened:
                opened.seek(variable.offset)
                left = memoryview(data)
                while left and (count := opened.readinto(left)):
                    left = left[count:]
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
        crc = masked_crc32c(data)
        if left or crc != variable.crc:
            raise CheckpointError(
                f"{file}: expected {name} with the CRC-32C {variable.crc:08x}, got {crc:08x}: "
                "the file is damaged"
            )
        return value

    def _shards(self, prefix: Path, header: bytes) -> dict[int, Path]:
        fields = _fields(self.index, header, "its header")
        count, big_endian = _number(fields, 1), _number(fields, 2)
        if not 1 <= count < MAX_SHARDS:
            raise _damaged(self.index, f"1 to {MAX_SHARDS - 1} shards", str(count))
        if big_endian:
            raise _damaged(self.index, "a checkpoint of a little-endian machine", "another")
        shards = [f"{prefix.name}.data-{i:05d}-of-{count:05d}" for i in range(count)]
        return {i: prefix.with_name(shard) for i, shard in enumerate(shards)}

    def _variable(self, name: str, value: bytes) -> Variable:
        fields = _fields(self.index, value, name)
        shape: list[int] = []
        for part in _messages(self.index, fields, 2, name):
            for dimension in _messages(self.index, _fields(self.index, part, name), 2, name):
                shape.append(_number(_fields(self.index, dimension, name), 1))
                if len(shape) > MAX_DIMENSIONS:
                    raise _damaged(self.index, f"{name} of at most {MAX_DIMENSIONS} dimensions")
        return Variable(
            DTYPES.get(_number(fields, 1)), tuple(shape), _number(fields, 3), _number(fields, 4),
            _number(fields, 5), _number(fields, 6), 7 in fields,
        )  # fmt: skip

    def _check_range(self, name: str, variable: Variable, sizes: dict[int, int]) -> None:
        """Hold a variable's place against its shape and the size of its shard."""
        dtype, shape, shard, offset, size, _, partitioned = variable
        if partitioned:
            return
        if dtype is not None:
            needed = dtype.itemsize
            for length in shape:
                needed *= length
            if needed != size:
                raise _damaged(
                    self.index, f"{needed} bytes for {name} of shape {shape} in {dtype}", str(size)
                )
        if shard not in self.shards:
            raise _damaged(self.index, f"{name} in one of {len(self.shards)} shards", str(shard))
        file = self.shards[shard]
        if shard not in sizes:
            try:
                sizes[shard] = file.stat().st_size if file.is_file() else -1
            except OSError:
                sizes[shard] = -1
        if sizes[shard] < 0:
            raise CheckpointError(
                f"{self.index}: expected the file {file.name} beside it, which is missing"
            )
        if offset + size > sizes[shard]:
            raise CheckpointError(
                f"{file}: expected at least {offset + size} bytes, which {name} needs, got "
                f"{sizes[shard]}: the file is cut short"
            )


def is_table(file: Path) -> bool:
    """Whether a file ends as a table does: an index, or a checkpoint in TensorFlow's V1 format."""
    try:
        with open(file, "rb") as opened:
            opened.seek(-len(MAGIC), os.SEEK_END)
            return opened.read() == MAGIC
    except OSError:
        return False


def _damaged(file: Path, expected: str, got: str = "something else") -> CheckpointError:
    return CheckpointError(f"{file}: expected {expected}, got {got}: the file is damaged")


def _text(file: Path, name: bytes) -> str:
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if not text.isprintable() or not text:
        raise _damaged(file, "names of variables", repr(name[:40]))
    return text


def read_table(file: Path) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table, in order."""
    try:
        with open(file, "rb") as opened:
            data = opened.read(MAX_INDEX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_INDEX_BYTES:
        raise CheckpointError(f"{file}: expected at most {MAX_INDEX_BYTES} bytes, got more")
    if len(data) < FOOTER or not data.endswith(MAGIC):
        raise CheckpointError(
            f"{file}: expected the index of a TensorFlow checkpoint, got {len(data)} bytes "
            f"starting {data[:16]!r}, without its footer"
        )
    body, footer = data[:-FOOTER], data[-FOOTER : -len(MAGIC)]
    _, at = _handle(file, footer, 0)  # of the block of filters, which TensorFlow leaves empty
    (offset, size), _ = _handle(file, footer, at)
    budget = _Budget(file)
    last = None
    for _, handle in _entries(file, _block(file, body, offset, size, budget), budget):
        (offset, size), _ = _handle(file, handle, 0)
        for key, value in _entries(file, _block(file, body, offset, size, budget), budget):
            if last is not None and key <= last:
                raise _damaged(file, "keys in order", repr(key[:40]))
            last = key
            yield key, value


class _Budget:
    """What an index may take unpacked: one block can be named, or one key be longer, a million
    times in a small file."""

    def __init__(self, file: Path) -> None:
        self.file, self.left = file, MAX_INDEX_BYTES

    def take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise CheckpointError(
                f"{self.file}: expected an index of at most {MAX_INDEX_BYTES} bytes unpacked, "
                "got more"
            )


def _handle(file: Path, data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """A block's offset and size, and where in ``data`` they end."""
    offset, at = _varint(file, data, at)
    size, at = _varint(file, data, at)
    return (offset, size), at


def _block(file: Path, body: bytes, offset: int, size: int, budget: _Budget) -> bytes:
    """A block's content, unpacked."""
    end = offset + size
    if end + TRAILER > len(body):
        raise _damaged(file, f"blocks within its {len(body)} bytes", f"one that ends at {end}")
    kind, crc = body[end], int.from_bytes(body[end + 1 : end + TRAILER], "little")
    found = masked_crc32c(body[offset : end + 1])
    if found != crc:
        raise _damaged(file, f"a block with the CRC-32C {crc:08x}", f"{found:08x}")
    if kind == SNAPPY:
        return _unsnap(file, body[offset:end], budget)
    if kind != UNCOMPRESSED:
        raise _damaged(file, "blocks as they are or by snappy", f"compression {kind}")
    budget.take(size)
    return body[offset:end]


def _entries(file: Path, block: bytes, budget: _Budget) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a block. A key shares its start with the one before; the places at the end
    of the block, where one may start to search, are for lookups."""
    if len(block) < 4:
        raise _damaged(file, "a block of 4 bytes or more", str(len(block)))
    (restarts,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise _damaged(file, f"a block with {restarts} restarts", f"{len(block)} bytes")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(file, block, at)
        own, at = _varint(file, block, at)
        length, at = _varint(file, block, at)
        if shared > len(key) or at + own + length > end:
            raise _damaged(file, "entries within their block", f"{shared}, {own}, {length} bytes")
        budget.take(shared + own + ENTRY_BYTES)
        key = key[:shared] + block[at : at + own]
        at += own + length
        yield key, block[at - length : at]


def _unsnap(file: Path, data: bytes, budget: _Budget) -> bytes:
    """Undo snappy (``format_description.txt`` in its sources): a length, then literals and copies
    of what is already there."""
    length, at = _varint(file, data, 0)
    budget.take(length)
    out = bytearray()
    while at < len(data):
        tag, kind = data[at] >> 2, data[at] & 3
        # How many bytes follow the tag: a long literal's length, or a copy's offset.
        extra = (max(tag - 59, 0), 1, 2, 4)[kind]
        number = int.from_bytes(data[at + 1 : at + 1 + extra], "little")
        at += 1 + extra
        if kind == 0:
            count = (number if extra else tag) + 1
            piece = data[at : at + count]
            at += count
        else:
            count = tag + 1
            if kind == 1:
                count, number = (tag & 7) + 4, number | tag >> 3 << 8
            if not 1 <= number <= len(out):
                raise _damaged(file, "copies of what came before", f"an offset of {number}")
            # A copy may reach into itself, which repeats.
            start = len(out) - number
            piece = bytes(out[start : start + count])
            piece = (piece * (count // len(piece) + 1))[:count]
        if len(piece) != count or len(out) + count > length:
            break
        out += piece
    if at != len(data) or len(out) != length:
        raise _damaged(file, f"{length} bytes unpacked by snappy")
    return bytes(out)


def _varint(file: Path, data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number of 64 bits, seven of them to a byte, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        number |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            if number >> 64:
                break
            return number, at
    raise _damaged(file, "numbers of 64 bits")


def _fields(file: Path, message: bytes, name: str) -> dict[int, list[int | bytes]]:
    """The fields of a protocol buffer by number: integers and the bytes of strings."""
    fields: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(file, message, at)
        value: int | bytes
        if tag & 7 == 0:
            value, at = _varint(file, message, at)
        else:
            length = {1: 8, 5: 4}.get(tag & 7)
            if tag & 7 == 2:
                length, at = _varint(file, message, at)
            if length is None or at + length > len(message):
                raise _damaged(file, f"an entry for {name}")
            value = message[at : at + length]
            at += length
            if tag & 7 != 2:
                value = int.from_bytes(value, "little")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: dict[int, list[int | bytes]], field: int) -> int:
    """The last integer given for a field, as the format has it; 0 for none."""
    value = fields.get(field, [0])[-1]
    return value if isinstance(value, int) else 0


def _messages(
    file: Path, fields: dict[int, list[int | bytes]], field: int, name: str
) -> Iterator[bytes]:
    for value in fields.get(field, []):
        if not isinstance(value, bytes):
            raise _damaged(file, f"an entry for {name}")
        yield value
