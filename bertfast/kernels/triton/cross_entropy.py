"""cross_entropy in Triton: the decoder's product and the loss, a block of the vocabulary at a time.

The labelled tokens are listed on the device, and their number stays there: programs that turn out
to have none end at once. A label that is no class counts as none, like ``ignore_index``.

Forward keeps each block's largest logit and sum of exponentials, which are then joined. Backward
takes a chunk of the vocabulary at a time: its logits are computed again, their gradients put into a
scratch tensor, and that multiplied by the decoder and by the tokens. Every sum has one order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels import triton as shared
from bertfast.kernels.device import on_device
from bertfast.kernels.layout import dense, dense_or_none
from bertfast.kernels.triton import Tile, generation, product_precision

supports = shared.unsupported

_LOG2_E = tl.constexpr(1.4426950408889634)
# Tokens whose labels one program looks at; rows or columns, and blocks at a time, it joins.
_LISTED = 1024
_ROWS, _COLUMNS, _BLOCKS = 32, 64, 32
# What backward's scratch tensor is to take, and the classes of a chunk; powers of two.
_SCRATCH_BYTES = 1 << 24
_LEAST_CLASSES, _MOST_CLASSES = 1024, 8192


@triton.jit
def _is_labelled(labels, at, tokens, classes, ignore_index):
    label = tl.load(labels + at, mask=at < tokens, other=-1).to(tl.int64)
    return ((label >= 0) & (label < classes) & (label != ignore_index)).to(tl.int32)


@triton.jit(do_not_specialize=["tokens", "classes", "ignore_index"])
def _list_labelled(
    labels, listed, count, tokens, classes, ignore_index, LISTED: tl.constexpr
):  # fmt: skip
    """The numbers of the labelled tokens in order, and how many they are."""
    first = tl.program_id(0).to(tl.int64) * LISTED
    i = tl.arange(0, LISTED)
    before = tl.zeros((LISTED,), tl.int64)
    for start in tl.range(0, first, LISTED):
        before += _is_labelled(labels, start + i, tokens, classes, ignore_index)
    own = _is_labelled(labels, first + i, tokens, classes, ignore_index)
    begin = tl.sum(before, axis=0)
    tl.store(listed + begin + tl.cumsum(own, axis=0) - own, first + i, mask=own != 0)
    if first + LISTED >= tokens:
        tl.store(count, begin + tl.sum(own, axis=0))


@triton.jit
def _tile_of_task(task, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A task's first row and column, where ``inner`` consecutive ones have the same columns."""
    return task % inner * ROWS, task // inner * COLUMNS


@triton.jit
def _tiles(n, TILE: tl.constexpr):
    return (n + tl.full((), TILE - 1, tl.int64)) // TILE


@triton.jit
def _tokens_at(listed, first, count, M: tl.constexpr):
    """The numbers of M listed tokens, 0 behind the last one, and which are there."""
    there = first + tl.arange(0, M) < count
    return tl.load(listed + first + tl.arange(0, M), mask=there, other=0), there


@triton.jit
def _logits(
    hidden, weight, bias, token, class_, known, columns,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The tokens' float32 logits of N classes; minus infinity where a class is not known."""
    k = tl.arange(0, K)
    x = hidden + (token * columns)[:, None] + k[None, :]
    # Rows that are not there are some that are.
    w = weight + (tl.where(known, class_, 0) * columns)[:, None] + k[None, :]
    # What a logit begins with; it takes fewer registers than adding a bias and masking at the end.
    start = tl.where(known, 0.0, float("-inf"))
    if bias is not None:
        start += tl.load(bias + class_, mask=known, other=0.0).to(tl.float32)
    z = tl.zeros((M, N), tl.float32) + start[None, :]
    for first in range(0, columns, K):
        inside = (first + k < columns)[None, :]
        a = tl.load(x, mask=inside, other=0.0)
        b = tl.load(w, mask=inside, other=0.0)
        high = b.to(a.dtype)
        z = tl.dot(a, tl.trans(high), z, input_precision=PRECISION)
        if b.dtype != a.dtype:
            # A float32 decoder beside 16-bit tokens, and what rounding left out of it.
            low = (b - high.to(tl.float32)).to(a.dtype)
            z = tl.dot(a, tl.trans(low), z, input_precision=PRECISION)
        x += K
        w += K
    return z


@triton.jit(do_not_specialize=["tokens", "classes"])
def _statistics(
    hidden, weight, bias, labels, listed, count, largest_of, total_of, target,
    tokens, classes, columns,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The largest logit of each token and block of classes, and the sum of exponentials."""
    task, labelled = tl.program_id(0).to(tl.int64), tl.load(count)
    inner = _tiles(labelled, M)
    if task < inner * _tiles(classes, N):
        first, first_class = _tile_of_task(task, inner, M, N)
        token, there = _tokens_at(listed, first, labelled, M)
        class_ = first_class + tl.arange(0, N)
        z = _logits(
            hidden, weight, bias, token, class_, class_ < classes, columns, PRECISION, M, N, K
        )
        largest = tl.max(z, axis=1)
        # Minus infinity, where a block has no other, must not be subtracted from itself.
        base = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.sum(tl.exp2((z - base[:, None]) * _LOG2_E), axis=1)
        block = first_class // N
        r = first + tl.arange(0, M)
        tl.store(largest_of + block * tokens + r, largest, mask=there)
        tl.store(total_of + block * tokens + r, total, mask=there)
        label = tl.load(labels + token, mask=there, other=-1).to(tl.int64)
        is_target = class_[None, :] == label[:, None]
        own = (label >= first_class) & (label < first_class + N)
        tl.store(target + r, tl.sum(tl.where(is_target, z, 0.0), axis=1), mask=there & own)


@triton.jit(do_not_specialize=["tokens"])
def _join_blocks(
    largest_of, total_of, target, listed, count, logsumexp, losses, tokens, blocks,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """logsumexp of each labelled token over all blocks, and its loss."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    labelled = tl.load(count)
    if first < labelled:
        token, there = _tokens_at(listed, first, labelled, ROWS)
        r = first + tl.arange(0, ROWS)
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        sums = tl.zeros((BLOCKS, ROWS), tl.float32)
        for start in range(0, blocks, BLOCKS):
            b = start + tl.arange(0, BLOCKS)
            at = b[:, None].to(tl.int64) * tokens + r[None, :]
            inside = (b < blocks)[:, None] & there[None, :]
            z = tl.load(largest_of + at, mask=inside, other=float("-inf"))
            total = tl.load(total_of + at, mask=inside, other=0.0)
            now = tl.maximum(largest, tl.max(z, axis=0))
            base = tl.where(now == float("-inf"), 0.0, now)
            sums = sums * tl.exp2((largest - base) * _LOG2_E)[None, :]
            sums += total * tl.exp2((z - base[None, :]) * _LOG2_E)
            largest = now
        lse = largest + tl.log(tl.where(there, tl.sum(sums, axis=0), 1.0))
        tl.store(logsumexp + token, lse, mask=there)
        tl.store(losses + r, lse - tl.load(target + r, mask=there, other=0.0), mask=there)


@triton.jit
def _sum_losses(losses, count, loss, MEAN: tl.constexpr, LISTED: tl.constexpr):
    i = tl.arange(0, LISTED)
    labelled = tl.load(count)
    total = tl.zeros((LISTED,), tl.float32)
    for first in tl.range(0, labelled, LISTED):
        total += tl.load(losses + first + i, mask=first + i < labelled, other=0.0)
    result = tl.sum(total, axis=0)
    tl.store(loss, result / _divisor(labelled) if MEAN else result)


@triton.jit
def _divisor(labelled):
    return tl.maximum(labelled, 1).to(tl.float32)


@triton.jit(do_not_specialize=["begin", "classes"])
def _dlogits(
    hidden, weight, bias, labels, listed, count, logsumexp, dlogits, parts,
    begin, classes, vocabulary, columns, width,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """``softmax - onehot`` of the listed tokens and a chunk of the classes, in rows of ``width``,
    and its sums over M tokens. The loss's gradient and the mean's divisor come in later: in
    float16 small values times these would be 0."""
    task, labelled = tl.program_id(0).to(tl.int64), tl.load(count)
    inner = _tiles(labelled, M)
    if task < inner * _tiles(classes, N):
        first, first_class = _tile_of_task(task, inner, M, N)
        token, there = _tokens_at(listed, first, labelled, M)
        class_ = first_class + tl.arange(0, N)
        known = class_ < classes
        z = _logits(hidden, weight, bias, token, class_, known, columns, PRECISION, M, N, K)
        lse = tl.load(logsumexp + token, mask=there, other=float("inf"))
        label = tl.load(labels + token, mask=there, other=-1).to(tl.int64) - begin
        dz = tl.exp2((z - lse[:, None]) * _LOG2_E)
        dz = tl.where(class_[None, :] == label[:, None], dz - 1.0, dz)
        dz = tl.where(there[:, None], dz, 0.0)
        # Zeros behind the last class, so that who reads them needs no mask within a row.
        to = dlogits + first * width + first_class
        at = tl.arange(0, M)[:, None] * width + tl.arange(0, N)[None, :]
        tl.store(to + at, dz.to(dlogits.dtype.element_ty), mask=there[:, None])
        if parts is not None:
            to = parts + first // M * vocabulary + begin + class_
            tl.store(to, tl.sum(dz, axis=0), mask=known)


@triton.jit
def _scale(dloss, labelled, MEAN: tl.constexpr):
    scale = tl.load(dloss)
    return scale / _divisor(labelled) if MEAN else scale


@triton.jit
def _add_dhidden(
    dlogits, weight, listed, dhidden, wide, scale, labelled, task, inner,
    classes, width, columns, LAST: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Adds a chunk's ``dlogits weight`` to what the chunks before it gave, in float32 ``wide``; the
    last one's sums are done."""
    first, first_column = _tile_of_task(task, inner, M, N)
    token, there = _tokens_at(listed, first, labelled, M)
    r, c = first + tl.arange(0, M), first_column + tl.arange(0, N)
    k = tl.arange(0, K)
    inside = c < columns
    x = dlogits + r[:, None] * width + k[None, :]
    w = weight + k.to(tl.int64)[:, None] * columns + c[None, :]
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, classes, K):
        here = start + k < classes
        a = tl.load(x, mask=there[:, None], other=0.0)
        b = tl.load(w, mask=here[:, None] & inside[None, :], other=0.0)
        sums = tl.dot(a, b.to(a.dtype), sums, input_precision=PRECISION)
        x += K
        w += K * columns
    # Addresses of so many elements would fill the registers, were they needed before the loop, too.
    mine = there[:, None] & inside[None, :]
    at = r[:, None] * columns + c[None, :]
    sums += tl.load(wide + at, mask=mine, other=0.0)
    if LAST:
        to = dhidden + token[:, None] * columns + c[None, :]
        tl.store(to, (sums * scale).to(dhidden.dtype.element_ty), mask=mine)
    else:
        tl.store(wide + at, sums, mask=mine)


@triton.jit
def _find_dweight(
    dlogits, hidden, listed, dweight, scale, labelled, task, inner, classes, width, columns,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """``dlogits^T hidden`` of M classes and N columns."""
    first_class, first_column = _tile_of_task(task, inner, M, N)
    class_, c = first_class + tl.arange(0, M), first_column + tl.arange(0, N)
    known, inside = class_ < classes, c < columns
    sums = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, labelled, K):
        token, there = _tokens_at(listed, start, labelled, K)
        x = dlogits + (start + tl.arange(0, K))[:, None] * width + class_[None, :]
        a = tl.load(x, mask=there[:, None], other=0.0)
        b = tl.load(
            hidden + token[:, None] * columns + c[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
    to = dweight + class_[:, None] * columns + c[None, :]
    tl.store(to, (sums * scale).to(dweight.dtype.element_ty), mask=known[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["classes"])
def _gradients(
    dloss, dlogits, hidden, weight, listed, count, dhidden, wide, dweight,
    classes, columns, width, LAST: tl.constexpr, MEAN: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """What a chunk of the classes adds to dhidden, and its rows of dweight: two products in one
    launch, since neither alone has tiles for a whole GPU. One tile to a program, as they take
    different times."""
    task = tl.program_id(0).to(tl.int64)
    labelled = tl.load(count)
    scale = _scale(dloss, labelled, MEAN)
    of_tokens, of_classes = _tiles(labelled, M), _tiles(classes, M)
    across = _tiles(columns, N)
    if task < of_tokens * across:
        _add_dhidden(
            dlogits, weight, listed, dhidden, wide, scale, labelled, task, of_tokens,
            classes, width, columns, LAST, PRECISION, M, N, K,
        )  # fmt: skip
    elif task < (of_tokens + of_classes) * across:
        _find_dweight(
            dlogits, hidden, listed, dweight, scale, labelled, task - of_tokens * across,
            of_classes, classes, width, columns, PRECISION, M, N, K,
        )  # fmt: skip


@triton.jit
def _sum_dbias(
    dloss, parts, count, dbias, vocabulary,
    MEAN: tl.constexpr, M: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums over M tokens each, added up."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < vocabulary
    labelled = tl.load(count)
    total = tl.zeros((BLOCKS, COLUMNS), tl.float32)
    for first in tl.range(0, _tiles(labelled, M), BLOCKS):
        b = first + tl.arange(0, BLOCKS)
        at = b[:, None].to(tl.int64) * vocabulary + c[None, :]
        there = b < _tiles(labelled, M)
        total += tl.load(parts + at, mask=there[:, None] & inside[None, :], other=0.0)
    result = tl.sum(total, axis=0) * _scale(dloss, labelled, MEAN)
    tl.store(dbias + c, result.to(dbias.dtype.element_ty), mask=inside)


# Rows, columns, warps and stages in 16 bits, where a multiprocessor of generation 8 multiplies with
# both operands in registers: the largest that spill nothing. Two programs of four warps fit a
# multiprocessor, so that one's logits are worked on while the other's are multiplied.
# Forward and backward have the same tile for their logits, and so the same bits. Mixed is with a
# float32 decoder, which takes more shared memory, of which generation 8 has 99 KB to a program.
_TILES = {
    "cross_entropy_logits": {8: (64, 128, 4, 3), 9: (128, 128, 4, 3), 10: (64, 128, 4, 3)},
    "cross_entropy_gradients": {8: (64, 128, 4, 3), 9: (128, 128, 8, 4)},
    "cross_entropy_mixed_logits": {8: (128, 64, 8, 2), 9: (128, 64, 8, 3)},
    "cross_entropy_mixed_gradients": {8: (128, 64, 8, 2), 9: (128, 64, 8, 3)},
}


def tile_of(
    kernel: str, columns: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Tile:
    """What a kernel's programs work on, however long a row is."""
    if columns % 16:
        # Rows that start anywhere are read element by element, each with an address of its own.
        return Tile(32, 64, 4)
    if dtype == torch.float32:
        # Products on the plain cores, whose operands are all in registers.
        return Tile(128, 64, 8, stages=2)
    of_generation = _TILES[kernel]
    rows, width, warps, stages = of_generation[min(generation(device), max(of_generation))]
    measured = shared.measured_tile(kernel, width, device)
    return measured or Tile(rows, width, warps, stages=stages)


def _tile(kernel: str, hidden: Tensor, weight: Tensor) -> Tile:
    mixed = "mixed_" if weight.dtype != hidden.dtype else ""
    name = f"cross_entropy_{mixed}{kernel}"
    return tile_of(name, hidden.shape[1], hidden.device, hidden.dtype)


def _depth(dtype: torch.dtype) -> int:
    """How much of a row is multiplied at a time."""
    return 16 if dtype == torch.float32 else 64


def _labelled(labels: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    tokens = labels.shape[0]
    listed = torch.empty(tokens, dtype=torch.int64, device=labels.device)
    count = torch.empty((), dtype=torch.int64, device=labels.device)
    _list_labelled[max(1, triton.cdiv(tokens, _LISTED)),](
        labels, listed, count, tokens, classes, ignore_index, _LISTED
    )
    return listed, count


def _grid(tile: Tile, rows: int, columns: int) -> tuple[int]:
    return (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    hidden, weight, labels = dense(hidden), dense(weight), labels.contiguous()
    bias = dense_or_none(bias)
    (tokens, columns), (vocabulary, _) = hidden.shape, weight.shape
    tile = _tile("logits", hidden, weight)
    blocks = triton.cdiv(vocabulary, tile.columns)
    options: dict[str, Any] = {"dtype": torch.float32, "device": hidden.device}
    loss, logsumexp = torch.empty((), **options), torch.zeros(tokens, **options)
    parts = torch.empty(2, blocks, tokens, **options).unbind()
    target, losses = torch.empty(tokens, **options), torch.empty(tokens, **options)
    with on_device(hidden):
        listed, count = _labelled(labels, vocabulary, ignore_index)
        if tokens:
            _statistics[_grid(tile, tokens, vocabulary)](
                hidden, weight, bias, labels, listed, count, *parts, target,
                tokens, vocabulary, columns, product_precision(hidden),
                tile.rows, tile.columns, _depth(hidden.dtype),
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            _join_blocks[triton.cdiv(tokens, _ROWS),](
                *parts, target, listed, count, logsumexp, losses, tokens, blocks, _ROWS, _BLOCKS
            )
        _sum_losses[1,](losses, count, loss, reduction == "mean", _LISTED)
    return loss, logsumexp


def backward(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logsumexp: Tensor,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dloss, hidden, weight = dense(dloss), dense(hidden), dense(weight)
    labels, logsumexp, bias = labels.contiguous(), dense(logsumexp), dense_or_none(bias)
    (tokens, columns), (vocabulary, _) = hidden.shape, weight.shape
    dtype, device = hidden.dtype, hidden.device
    dhidden, dweight = torch.zeros_like(hidden), torch.empty_like(weight)
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    mean, precision, depth = reduction == "mean", product_precision(hidden), _depth(dtype)
    first, second = (_tile(kernel, hidden, weight) for kernel in ("logits", "gradients"))
    # A row holds the last tile of its classes, as it is written and as it is read.
    classes = max(_classes_at_once(tokens, vocabulary, dtype), first.columns, second.rows)
    dlogits = torch.empty(tokens, classes, dtype=dtype, device=device)
    options: dict[str, Any] = {"dtype": torch.float32, "device": device}
    wide = torch.zeros(tokens, columns, **options)
    groups = triton.cdiv(tokens, first.rows)
    parts = None if bias is None else torch.empty(groups, vocabulary, **options)
    with on_device(hidden):
        listed, count = _labelled(labels, vocabulary, ignore_index)
        for begin in range(0, vocabulary, classes):
            rows, drows = (x[begin : begin + classes] for x in (weight, dweight))
            its_bias = None if bias is None else bias[begin : begin + classes]
            if tokens:
                _dlogits[_grid(first, tokens, len(rows))](
                    hidden, rows, its_bias, labels, listed, count, logsumexp, dlogits, parts,
                    begin, len(rows), vocabulary, columns, classes, precision,
                    first.rows, first.columns, depth,
                    num_warps=first.warps, num_stages=first.stages,
                )  # fmt: skip
            # A tile more, since neither tokens nor classes need fill their last one.
            _gradients[_grid(second, tokens + len(rows) + second.rows, columns)](
                dloss, dlogits, hidden, rows, listed, count, dhidden, wide, drows,
                len(rows), columns, classes,
                begin + classes >= vocabulary, mean, precision,
                second.rows, second.columns, depth,
                num_warps=second.warps, num_stages=second.stages,
            )  # fmt: skip
        if parts is not None:
            _sum_dbias[triton.cdiv(vocabulary, _COLUMNS),](
                dloss, parts, count, dbias, vocabulary, mean, first.rows, _BLOCKS, _COLUMNS
            )
    return dhidden, dweight, dbias


def _classes_at_once(tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """The classes of backward's chunks, a power of two."""
    fitting = _SCRATCH_BYTES // (dtype.itemsize * max(tokens, 1))
    below = 1 << (max(fitting, 1).bit_length() - 1)
    return min(max(below, _LEAST_CLASSES), _MOST_CLASSES, shared.power_of_two(vocabulary))
