"""What the Hopper kernels take by arithmetic, where that decides more than what is near was measured to take.

**Forward.** Persistent programs take tiles in turn. Which tile is the best changes with what its last one leaves empty
and with how the rounds come out: :func:`rows_time`.

**Backward**, by its form and by how many programs share a group's query heads: :func:`microseconds`. Tiles of keys that
see many queries take long, and a card that waits for them idles: a group's heads shared by more programs make these
shorter, but each leaves parts of dK and dV in float32 that are added up afterwards. Which form and how many programs
are the fastest changes with every doubling of a length or of the heads, too often for a table.

The constants are fitted to 684 times of 131 shapes with six groups on an H200 (2026-11-28, driver 580.159.04, Triton
3.6.0): 512 to 8192 tokens, head dims 64, 96 and 128, without a window and with windows of 128 and 256. With 83 shapes
measured afterwards (groups of 5 to 16, 512 to 16384 tokens, windows up to 480), which changed how rounds under a window
are counted and no constant, the error is 3 to 4% in the median and 10% at the ninth decile; the fastest kind of a shape
by these formulas takes 1.008 of the time of the fastest measured in the mean, more than 1.05 in 13 of 214 shapes, and
1.18 at worst.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from flash_sink_attn.config import HopperBwdForm
from flash_sink_attn.tuned_table import ShapeKey
from flash_sink_attn.validity import hopper_bwd_width

PROGRAMS_AT_ONCE = 132  # multiprocessors of an H100 and an H200


class Kind(NamedTuple):
    """A form of the backward, and how many programs share a group's query heads at the same keys (and queries)."""

    form: HopperBwdForm
    shares: int


class _Adding(NamedTuple):
    """Of the form that adds dQ up, in microseconds.

    Attributes:
        step: of a program, for 64 queries of a head and 128 keys.
        element: of statistics, zeros and the final conversion, for a million elements of q.
        part: of writing and adding up what programs that share a group leave, for a million elements of their dK.
        launches: of whatever the shape.
    """

    step: float
    element: float
    part: float
    launches: float


class _Recomputing(NamedTuple):
    """Of the form that makes products again for dQ, in microseconds.

    Attributes:
        block: of a multiprocessor that is full, for 64 queries of a head and 64 keys, in both kernels together.
        alone: as ``block``, of one program.
        crowded: by what share ``alone`` is longer where two programs have a multiprocessor.
        begin: blocks that a head of a tile costs besides those it multiplies.
        part, launches: as above.
        at_once: programs that share a multiprocessor.
    """

    block: float
    alone: float
    crowded: float
    begin: float
    part: float
    launches: float
    at_once: int


# By the width of a tile, see hopper_bwd_width.
_ADDING = {64: _Adding(1.06, 6.8, 6.2, 7.6), 128: _Adding(1.89, 6.4, 7.1, 8.3)}
_RECOMPUTING = {64: _Recomputing(0.81, 1.08, 0.38, 2.3, 4.4, 10.5, 3),
                128: _Recomputing(1.305, 1.44, 0.52, 1.6, 5.2, 13.3, 2)}
_EVEN_ROUNDS = 3  # with more of them programs no longer end together
# One kernel whose programs slide over tiles of 64 tokens, for each head of a group; from 1024 to 16384 tokens, 64/8
# heads, a window of 128.
_SLIDE_STEP, _SLIDE_LAUNCHES = 2.4, 20.0
# Adding in one order takes the sum of the two times as long with up to 2048 tokens; the second shrinks with more.
_ORDER = {64: (1.05, 0.08), 128: (1.06, 0.17)}
_SECTION_FILLS = 0.9  # of the multiprocessors, see _rounds
# What a tile of a forward costs besides the keys it multiplies, in keys; anything from 100 to 200 does.
_TILE_KEYS = 128
_FEW_TILES = 12 * PROGRAMS_AT_ONCE  # with more of them the rounds come out even


@functools.lru_cache(4096)
def rows_time(key: ShapeKey, block_m: int, block_n: int) -> float:
    """Time of a forward by persistent programs, one for each multiprocessor, in pairs of a query and a key.

    The longest program's, where there are few tiles. In 50 shapes of head dim 64 without a window, on an H200
    (2026-11-28, 1024 to 16384 tokens, 12 to 64 heads), the better of 256 x 64 and 192 x 128 by this took 1.001 of the
    time of the better one in the mean and 1.016 at worst.
    """
    tiles, heads = -(-key.seqlen_q // block_m), key.batch * key.heads_q
    pairs = []  # of each tile of a head, the longest first, as programs take them
    for tile in reversed(range(tiles)):
        end = min(key.seqlen_k, max(0, (tile + 1) * block_m + key.seqlen_k - key.seqlen_q))
        before = 0 if key.window is None else max(0, tile * block_m + key.seqlen_k - key.seqlen_q - key.window + 1)
        pairs.append((-(-end // block_n) * block_n - before // block_n * block_n + _TILE_KEYS) * block_m)
    if tiles * heads > _FEW_TILES:
        return sum(pairs) * heads / PROGRAMS_AT_ONCE
    programs = [0] * PROGRAMS_AT_ONCE
    for number in range(tiles * heads):
        turn, at = divmod(number, PROGRAMS_AT_ONCE)
        # as tile_of_round: forwards in one round, backwards in the next
        programs[PROGRAMS_AT_ONCE - 1 - at if turn % 2 else at] += pairs[number // heads]
    return float(max(programs))


def microseconds(key: ShapeKey, kind: Kind, ordered: bool = False) -> float:
    """Time of a backward with head dims up to 128. ``ordered``: dQ is added up in one order.

    Adding dQ up is estimated as if there were no window.
    """
    if kind.form == HopperBwdForm.SLIDE:
        return _sliding(key)
    if kind.form == HopperBwdForm.RECOMPUTE:
        return _recomputing(key, kind.shares)
    return _adding(key, kind.shares, ordered)


def group_of(key: ShapeKey) -> int:
    """Query heads of a key head."""
    return key.heads_q // key.heads_kv


def _units(key: ShapeKey) -> int:
    return key.batch * key.heads_kv


def _millions(key: ShapeKey, heads: int) -> float:
    return key.batch * key.seqlen_k * heads * hopper_bwd_width(key.head_dim) / 1e6


def _adding(key: ShapeKey, shares: int, ordered: bool) -> float:
    width = hopper_bwd_width(key.head_dim)
    cost, heads = _ADDING[width], -(-group_of(key) // shares)
    longest = -(-key.seqlen_q // 64) * heads * cost.step
    parts = cost.part * _millions(key, key.heads_kv) * shares if shares > 1 else 0.0
    time = cost.launches + _rounds(key, shares) * longest + cost.element * _millions(key, key.heads_q) + parts
    least, more = _ORDER[width]
    return time * (least + more * min(1.0, 2048 / max(1, key.seqlen_k))) if ordered else time


def _rounds(key: ShapeKey, shares: int) -> float:
    """How often the time of the longest program the form that adds up takes.

    A section is as many heads, or shares of them, as run at once. Programs of one section start together and end one by
    one, those of the next take over one by one and end together: two sections take as long as the longest program, and
    so does a last one alone. Sections that leave much of the card idle do not keep to that.
    """
    tiles = max(1, -(-key.seqlen_k // 128))
    section = max(1, PROGRAMS_AT_ONCE // tiles)
    if section * tiles > _SECTION_FILLS * PROGRAMS_AT_ONCE:
        return float((-(-_units(key) * shares // section) + 1) // 2)
    return max(1.0, _units(key) * shares * tiles / PROGRAMS_AT_ONCE / 2 + 0.3)


def _recomputing(key: ShapeKey, shares: int) -> float:
    """Either the card is full all the time, or it waits for the longest programs: those of a causal mask that start
    first, or under a window, where all are as long, the last round of them."""
    cost, heads = _RECOMPUTING[hopper_bwd_width(key.head_dim)], -(-group_of(key) // shares)
    tiles = max(1, -(-key.seqlen_q // 64))
    seen = tiles if key.window is None else min(tiles, -(-(key.window + 63) // 64))  # blocks of the longest
    blocks = seen * (seen + 1) / 2 + (tiles - seen) * seen
    full = key.batch * key.heads_q * (blocks + cost.begin * tiles) / PROGRAMS_AT_ONCE * cost.block
    programs = tiles * _units(key) * shares / PROGRAMS_AT_ONCE
    if seen < tiles:
        rounds = programs / cost.at_once
        crowd, rounds = float(programs > 1), rounds if rounds > _EVEN_ROUNDS else float(math.ceil(rounds))
    else:
        crowd, rounds = min(1.0, max(0.0, programs - 1)), 1.0
    longest = (seen + cost.begin) * heads * cost.alone * (1 + cost.crowded * crowd) * rounds
    parts = cost.part * _millions(key, key.heads_kv) * shares if shares > 1 else 0.0
    return cost.launches + max(full, longest) + parts


def _sliding(key: ShapeKey) -> float:
    # as launch_backward: one program per multiprocessor, of two tiles at least
    run = max(2, -(-_units(key) * -(-key.seqlen_q // 64) // PROGRAMS_AT_ONCE))
    return _SLIDE_LAUNCHES + run * group_of(key) * _SLIDE_STEP
