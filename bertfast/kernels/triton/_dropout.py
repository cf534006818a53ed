"""The one dropout mask in Triton; :mod:`bertfast.masks` is its definition."""

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-7 on uint32 counters and keys: four uint32 words."""
    for _ in tl.static_range(7):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _lanes(seed, site, rows, first_group, GROUPS: tl.constexpr):
    """The 16-bit lanes of ``GROUPS`` column groups: ``(ROWS, GROUPS, 2, 2, 2)``, the eight of a
    group in order and in one thread."""
    key = tl.load(seed)
    group = (first_group + tl.arange(0, GROUPS)).to(tl.uint32)
    row = rows[:, None]
    nothing = tl.zeros((rows.shape[0], GROUPS), tl.uint32)
    w0, w1, w2, w3 = philox(
        group[None, :] + nothing,
        row.to(tl.uint32) + nothing,
        (row >> 32).to(tl.uint32) + nothing,
        nothing + site.to(tl.uint32),
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
    )
    # Words in order along two dimensions, then their halves.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.join(words & 0xFFFF, words >> 16)


@triton.jit
def keep_rows(seed, site, threshold, rows, first_column, COLUMNS: tl.constexpr):
    """True where a row-wise op keeps an element.

    Args:
        seed: pointer to the int64 seed.
        site, threshold: as the op has them.
        rows: int64 ``(ROWS,)``, the numbers of the rows.
        first_column: a multiple of 8.

    Returns:
        int1 ``(ROWS, COLUMNS)``.
    """
    lanes = _lanes(seed, site, rows, first_column // 8, COLUMNS // 8)
    return tl.reshape(lanes, (rows.shape[0], COLUMNS)) >= threshold.to(tl.uint32)


@triton.jit
def keep_scores(seed, site, threshold, rows, first_key, KEYS: tl.constexpr):
    """True where attention keeps a probability.

    Args:
        seed, site, threshold: as the op has them.
        rows: int64 ``(ROWS,)``, the numbers of the rows.
        first_key: a multiple of 64, as KEYS is.

    Returns:
        int1 ``(ROWS, KEYS)``. A tensor core's accumulator with queries as rows holds the columns
        ``c``, ``8 + c``, ... ``56 + c`` of a block of 64 in one thread: the lanes of one group.
    """
    lanes = _lanes(seed, site, rows, first_key // 8, KEYS // 8)
    lanes = tl.reshape(lanes, (rows.shape[0], KEYS // 64, 8, 8))
    lanes = tl.permute(lanes, (0, 1, 3, 2))
    return tl.reshape(lanes, (rows.shape[0], KEYS)) >= threshold.to(tl.uint32)
