"""The definition of the one dropout mask that every backend shares.

The mask is a pure function of ``(seed, site, row, column)``: no state, so that forward, backward
and recomputation draw the same bits on every device. It comes from Philox4x32 with 7 rounds
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):

* key = (seed low, seed high); counter = (column group, row low, row high, site), 32-bit words;
* the four output words are eight 16-bit lanes, lane 2i the low half of word i, 2i+1 the high half;
* an element is kept when its lane >= t, ``t = round(p * 65536)``, and then scaled by
  ``65536 / (65536 - t)``, so that the expectation is exact.

Row-wise ops: row = packed token index; column c is lane ``c % 8`` of group ``c // 8``.

``attention``: row = packed query index * heads + head; column = key position in its own sequence.
In an aligned block of 64 columns, lane l of group ``(column // 64) * 8 + c`` sits at column
``8 * l + c``, which is where a tensor core's accumulator with queries as rows holds it.
"""

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
LANES = 1 << 16
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def dropout_threshold(p: float, name: str = "dropout_p") -> int:
    """``t = round(p * 65536)``: lanes below it are dropped. 0 draws nothing, 65536 drops all."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{name}: expected a probability, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:  # also refuses NaN
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {p}")
    return round(p * LANES)


def dropout_scale(threshold: int) -> float:
    """What a kept value is multiplied by; 0 when nothing is kept."""
    return LANES / (LANES - threshold) if threshold < LANES else 0.0


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-7 on broadcastable int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # The int64 product wraps modulo 2**64, which leaves the unsigned product's bits in place.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _WORD, product0 & _WORD
        high1, low1 = (product1 >> 32) & _WORD, product1 & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _lanes(seed: Tensor, site: int, rows: Tensor, groups: int) -> Tensor:
    """The 16-bit lanes of ``groups`` column groups: int64 ``(len(rows), groups, 8)``."""
    seed = seed.reshape(())
    column_group = torch.arange(groups, device=rows.device)
    rows = rows.unsqueeze(1)
    counter = (column_group, rows & _WORD, (rows >> 32) & _WORD, torch.full_like(rows, site))
    words = torch.stack(
        torch.broadcast_tensors(*philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))), dim=-1
    )
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-2)


def keep_mask(seed: Tensor, site: int, rows: Tensor, columns: int, threshold: int) -> Tensor:
    """The row-wise mask, True where an element is kept.

    Args:
        seed: int64, one element.
        site: the place in the model, a 32-bit number.
        rows: int64 ``(R,)``, the row numbers (packed token indices).
        columns: the row's length ``C``.
        threshold: from :func:`dropout_threshold`.

    Returns:
        bool ``(R, C)``.
    """
    lanes = _lanes(seed, site, rows, -(-columns // 8))
    return (lanes >= threshold).flatten(1)[:, :columns]


def attention_keep_mask(
    seed: Tensor, site: int, rows: Tensor, columns: int, threshold: int
) -> Tensor:
    """The mask of attention probabilities, True where an element is kept.

    As :func:`keep_mask`, with ``rows = packed query index * heads + head`` and the accumulator
    layout of the columns (this module's docstring).
    """
    blocks = -(-columns // 64)
    lanes = _lanes(seed, site, rows, blocks * 8)
    tile = (lanes >= threshold).reshape(rows.shape[0], blocks, 8, 8)
    return tile.transpose(2, 3).flatten(1)[:, :columns]
