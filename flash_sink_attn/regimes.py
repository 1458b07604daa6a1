"""Kinds of shapes between which the best configuration of a kernel changes at once and not by degrees.

The distance of :mod:`flash_sink_attn.nearest` measures degrees. Where a configuration means something else for another
shape (a form that the shape cannot slide in, heads that no longer fit the ring), or a shape needs something else (a
group shared by several programs), an entry is not lent however near it is: :func:`lends`. Where one implementation
gives way to the other at once, the comparison is not: :func:`compares`. The heuristic follows the same kinds.
"""

from __future__ import annotations

import functools
import math

from flash_sink_attn.config import (
    HOPPER_SLIDE_WINDOW,
    HopperBwdConfig,
    HopperBwdForm,
    HopperFwdConfig,
    Pass,
    TileConfig,
)
from flash_sink_attn.estimate import PROGRAMS_AT_ONCE, Kind, group_of, microseconds, rows_time
from flash_sink_attn.tuned_table import Entry, ShapeKey

# An entry of another shape is used where its kind is at most so much slower by the estimate than the best one.
_NEAR = 1.01
_MOST_SHARES = 16
# Forward tiles by head dims between which the estimate decides, and from what on: what it cannot tell apart,
# measurements of a near shape do.
_LARGE_TILES = {(64, 64): ((192, 128), (256, 64)), (128, 128): ((128, 128), (192, 64))}
_LARGE_NEAR = 1.01
# What a pair of a query and a key costs in a tile, of what it costs in the others: without a window, and with one. An
# H200: with 64/8, 48/6 and 60/12 heads x 128, 1420 to 8192 tokens, 192 x 64 took 0.934 to 0.952 of the time that the
# rounds let expect, and under windows of 1024 and 4096 with 28/4 heads 0.88 and 0.95; 256 x 64 with 64/8 x 64 under
# windows of 1024, 2048 and 4096 0.93, 0.98 and 1.01, since 192 x 128 computes half of a first block (2026-11-30).
_PAIRS = {(192, 64): (0.94, 0.9), (256, 64): (1.0, 0.96)}
# From here on, by head dims, most blocks of keys need no mask, and large tiles read them less often. With 8192 tokens
# and a window of 512 192 x 64 took 0.99 and 0.93 of the time of 64 rows at head dim 128 (28/4 and 64/8 heads); at 64
# small tiles took 0.95 of 256 x 64 with 512, and by arithmetic 1.2 with 1024. At 96 (32/8 heads, 4096 tokens) large
# ones took 1.12, 1.06 and 0.99 with 384, 512 and 768. Of other head dims little is known.
_SHORT_WINDOW = {(64, 64): 704, (128, 128): 512}
_SHORT_WINDOW_OTHERS = 1024
# Tiles of 192 rows at head dim 128, below which a somewhat longer window is short, too: 28/4 heads, 4096 tokens, window
# 512, which are 616, took 1.16 of the time of 64 rows, 900 of 36/4 (4800, 620) and 1204 of 28/4 (8192, 512) 0.95.
_FEW_LARGE_TILES, _SHORT_WINDOW_FEW = 6 * PROGRAMS_AT_ONCE, 640
_SHORT_SEQUENCE = 2048  # see few_tiles
_FEW_KEYS = 2304  # in a sequence, see loads_itself
# 64-row tiles of the portable forward at head dim 64, without a window, between which more programs at once are worth
# more than the first operand in registers, of which three run on a multiprocessor and without it five. With 432, 504,
# 576 and 672 tiles that took 0.97, 0.95, 0.95 and 0.92 of the time, with 288 and 336 1.03 and 1.02, with 864 1.11.
_MORE_AT_ONCE = (3 * PROGRAMS_AT_ONCE, 5.5 * PROGRAMS_AT_ONCE)
_FEW_ROW_TILES = 3.5  # of 64 rows for each multiprocessor, see few_rows
_PORTABLE_WINDOW = 512  # the longest, see portable_window
_PORTABLE_WINDOW_192 = 160  # at head dim 192, see portable_backward
_NARROW_WINDOW = 256  # see _too_narrow
_IDLE = 1.095  # rounds that are begun over those that are filled, see idles


def small_dims(key: ShapeKey) -> bool:
    """Whether the head dims are at most 64."""
    return max(key.head_dim, key.head_dim_v) <= 64


def short_window(key: ShapeKey) -> bool:
    """Whether the forward takes small tiles, several programs of which share a multiprocessor."""
    if key.window is None:
        return False
    few = _dims(key) == (128, 128) and key.batch * key.heads_q * -(-key.seqlen_q // 192) < _FEW_LARGE_TILES
    return key.window < (_SHORT_WINDOW_FEW if few else _SHORT_WINDOW.get(_dims(key), _SHORT_WINDOW_OTHERS))


def _dims(key: ShapeKey) -> tuple[int, int]:
    """The head dims, small ones as 64."""
    return (64, 64) if small_dims(key) else (key.head_dim, key.head_dim_v)


def _tiles_of(key: ShapeKey) -> tuple[tuple[int, int], ...]:
    """The large tiles between which the estimate decides, none where it does not."""
    return _LARGE_TILES.get(_dims(key), ())


def _large_time(key: ShapeKey, tile: tuple[int, int]) -> float:
    """Of a forward with large tiles, comparable among those of :func:`_tiles_of`."""
    return rows_time(key, *tile) * _PAIRS.get(tile, (1.0, 1.0))[hides_keys(key)]


def large_tile(key: ShapeKey) -> tuple[int, int] | None:
    """The fastest tile of a forward with no window or a long one by the estimate, (query rows, keys of a block)."""
    return min(_tiles_of(key), key=lambda tile: _large_time(key, tile), default=None)


def packs(key: ShapeKey) -> bool:
    """Whether a tile of a forward under a short window can hold several heads of a group."""
    group, window = group_of(key), key.window
    return small_dims(key) and window is not None and (
        group % 8 == 0 and window <= 257 or group % 4 == 0 and window <= 129)


def fits_ring(config: HopperFwdConfig, window: int | None) -> bool:
    """Whether all keys that 64 tokens see are in shared memory at once, which HEADS and PACK_HEADS need."""
    return window is not None and window + 63 <= config.num_stages * config.BLOCK_N


def packs_alone(key: ShapeKey) -> bool:
    """Whether programs that take eight heads of a group for 64 tokens all run at once, with room for more of them."""
    return key.batch * key.heads_kv * -(-key.seqlen_q // 64) * max(1, group_of(key) // 8) <= PROGRAMS_AT_ONCE


def idles(config: HopperFwdConfig, key: ShapeKey) -> bool:
    """Whether programs that take several heads and fill half a multiprocessor each leave much of the card idle.

    All of them take about as long, so a last round with few of them costs as much as a full one. Of tiles of one head
    took, in ms on an H200 with windows of 180 to 220: 288 programs for the 264 that run at once (2300 tokens) 0.0494
    for 0.0396, 456 (3600) 0.0679 for 0.0615, 480 (3800) 0.0681 for 0.0657, 1088 (8700) 0.149 for 0.145; but 968 (7700),
    in nearly four rounds, 0.109 for 0.119, and 1264 (10100) 0.160 for 0.168.
    """
    if not config.PACK_HEADS or config.PROGRAMS_PER_SM or config.registers_per_thread <= 80 or not config.HEADS:
        return False
    programs = key.batch * key.heads_kv * -(-key.seqlen_q // 64) * (group_of(key) // (config.PACK_HEADS * config.HEADS))
    rounds = programs / (2 * PROGRAMS_AT_ONCE)
    return rounds > 1 and math.ceil(rounds) > _IDLE * rounds


def wants_more_at_once(key: ShapeKey) -> bool:
    """Whether the portable forward is better off with more programs at once than with its operand in registers."""
    least, most = _MORE_AT_ONCE
    return small_dims(key) and not short_window(key) and least < _row_tiles(key) <= most


def loads_itself(key: ShapeKey) -> bool:
    """Whether the forward is faster with programs of 64 rows that load for themselves, three or four of which share a
    multiprocessor, than with a loader, or with larger tiles.

    On an H200, of the next best: at head dim 128 under windows of 128 and 256 with 28/4 heads 0.92 to 1.00 of the time,
    but 1.04 with 448 tiles of 64 rows and a window of 128; causal 0.93 to 0.99 with 512 to 1152 tiles of up to 2222
    tokens, but for 1.03 and 1.04 with 528 and 1056 of 1350; 1.13 and 1.06 with 320 and 448, 1.01 and 1.04 with 1536 and
    2048, 1.11 with 816 of 4300 tokens. At head dim 64 causal 0.85 to 0.97 with 432 to 1600 tiles of up to 2222 tokens,
    1.04 and 1.06 with 2048 and 2560, 1.09 and more of 3900 tokens and more. At head dim 128 without groups, where no
    other head reads the same keys, 1.14, 1.11, 1.03 and 1.01 with 460 to 700 tiles of 1450 to 1750 tokens. Of a packed
    batch, whose tiles the warps that compute look up, 1.06 to 1.10 with 28/4 heads and a window of 256.
    """
    tiles, dims = _row_tiles(key), (key.head_dim, key.head_dim_v)
    if key.varlen or dims not in ((64, 64), (128, 128)):
        return False
    if short_window(key):
        return dims == (128, 128) and tiles > 3 * PROGRAMS_AT_ONCE
    few, many = (3, 13) if dims == (64, 64) else (_FEW_ROW_TILES, 9.5)
    short = not hides_keys(key) and key.seqlen_k <= _FEW_KEYS and (dims == (64, 64) or group_of(key) > 1)
    return short and few * PROGRAMS_AT_ONCE < tiles <= many * PROGRAMS_AT_ONCE


def few_rows(key: ShapeKey) -> bool:
    """Whether a forward at head dim 128, with no window or a long one, has so few tiles that small ones are better:
    64 rows took 0.92 and 0.97 of the time of 128 with 320 and 448 of them."""
    return ((key.head_dim, key.head_dim_v) == (128, 128) and not short_window(key)
            and _row_tiles(key) <= _FEW_ROW_TILES * PROGRAMS_AT_ONCE)


def slides(key: ShapeKey) -> bool:
    """Whether the backward can slide over queries and keys at once (FORM 2)."""
    return (key.window is not None and key.window <= HOPPER_SLIDE_WINDOW and key.seqlen_q == key.seqlen_k
            and key.head_dim == 64 and group_of(key) > 1)


def few_tiles(key: ShapeKey) -> bool:
    """Whether the forward at head dims up to 64 has so few tiles of 192 rows that the card runs them in three rounds.

    The portable kernel's tiles of 64 rows were 2 to 15% faster in seven such shapes without a window, of up to 1450
    tokens; with 5050 tokens and 324 tiles they were 23% slower.
    """
    tiles = key.batch * key.heads_q * -(-key.seqlen_q // 192)
    return (small_dims(key) and not short_window(key) and not loads_itself(key) and key.seqlen_k <= _SHORT_SEQUENCE
            and tiles <= 3 * PROGRAMS_AT_ONCE)


def portable_window(key: ShapeKey) -> bool:
    """Whether the window is one under which the portable forward is the faster one at head dims up to 64.

    Up to 129 the Hopper kernel has all keys of 64 tokens in three blocks, and four heads of a group in a tile; more
    blocks leave less room for programs, and other groups have tiles of one head. In ms on an H200, portable and the
    best Hopper: 64/8 heads with a window of 200 0.0580 and 0.0657 at 3800 tokens, 0.1318 and 0.1453 at 8700; with 390
    0.0724 and 0.0827 at 3550, 0.1928 and 0.2203 at 9600; with 512 0.1984 and 0.2012 at 8192; 45/9 heads with 116 0.0435
    and 0.0451. Where the rounds of 64/8 heads come out even the Hopper kernel is ahead by up to 8% up to 256 (2048
    tokens with 192, 0.0328 and 0.0305). With a window of 1024 it is 0.3226 and 0.3128, and with 128 Hopper is 30%
    faster. Groups of less than four were not measured.
    """
    if not small_dims(key) or key.window is None or group_of(key) < 4:
        return False
    return key.window <= _PORTABLE_WINDOW and not (key.window <= 129 and packs(key))


def portable_backward(key: ShapeKey) -> bool:
    """Whether the window is one under which the portable backward is the faster one, at head dim 192.

    In ms on an H200, portable and the best Hopper, 64/8 heads x 192/128, 4096 and 8192 tokens: a window of 128 0.405
    and 0.430, 0.782 and 0.844; 192 0.488 and 0.480, 0.951 and 0.949; 256 0.571 and 0.531; 512 0.896 and 0.751; 2048
    2.62 and 1.64. At head dim 256 the Hopper kernel is ahead from 128 on: 0.268 and 0.202 with 16/16 heads, 0.368 and
    0.328 with 32/8 (results/h200/20261130T002358Z-windows-wide).
    """
    return key.head_dim == 192 and key.window is not None and key.window <= _PORTABLE_WINDOW_192


def compares(pass_: Pass, measured: ShapeKey, key: ShapeKey) -> bool:
    """Whether which implementation was the faster one at a shape says something about another shape.

    The configurations are another matter: either implementation's may be lent where this is not so, see :func:`lends`.
    """
    portable = portable_window if pass_ == "fwd" else portable_backward
    return portable(measured) == portable(key)


def kinds(key: ShapeKey) -> tuple[Kind, ...]:
    """Forms of a backward, with how many programs may share a group, that are worth a thought for a shape; where there
    is no estimate, the first of them is the best."""
    if key.head_dim > 128:
        return (Kind(HopperBwdForm.ACCUMULATE, 1),)
    # not measured with packed batches under a window
    shares = (1,) if key.varlen and hides_keys(key) else _shares(group_of(key))
    worth = [Kind(form, n) for form in (HopperBwdForm.ACCUMULATE, HopperBwdForm.RECOMPUTE) for n in shares]
    return (*worth, Kind(HopperBwdForm.SLIDE, 1)) if slides(key) else tuple(worth)


@functools.cache
def _shares(group: int) -> tuple[int, ...]:
    """Into how many shares of its query heads a group can be divided so that none is empty."""
    return tuple(n for n in range(1, min(group, _MOST_SHARES) + 1) if -(-group // -(-group // n)) == n)


@functools.lru_cache(4096)
def best_kind(key: ShapeKey, deterministic: bool = False) -> Kind:
    """The fastest of :func:`kinds` by the estimate."""
    worth = kinds(key)
    return worth[0] if len(worth) == 1 else min(worth, key=lambda kind: microseconds(key, kind, deterministic))


def _behind(key: ShapeKey, kind: Kind, deterministic: bool) -> float:
    """The kind's estimate over that of the best one."""
    best = microseconds(key, best_kind(key, deterministic), deterministic)
    return microseconds(key, kind, deterministic) / best


def lends(entry: Entry, key: ShapeKey, deterministic: bool = False) -> bool:
    """Whether the configuration that was the best for one shape says something about another one of its family.

    Args:
        entry: the configuration, its kernel and the shape that it was the best for.
        key: the shape it is to serve.
        deterministic: whether it has to give the same bits each time.
    """
    config, measured = entry.config, entry.key
    if isinstance(config, TileConfig):
        return entry.kernel != "fwd" or (
            wants_more_at_once(measured) == wants_more_at_once(key) and not _too_narrow(config, key)
            and not splits_heads(config, key))
    if isinstance(config, HopperFwdConfig):
        if config.HEADS and fits_ring(config, measured.window) != fits_ring(config, key.window):
            return False
        if config.PACK_HEADS and packs_alone(measured) != packs_alone(key):
            return False
        if idles(config, measured) != idles(config, key):
            return False
        if loads_itself(measured) != loads_itself(key) or few_rows(measured) != few_rows(key):
            return False
        if short_window(key) or short_window(measured):
            # (where it hides nothing, rows are as different as without a window)
            same = short_window(measured) == short_window(key) and hides_keys(measured) == hides_keys(key)
            if key.window is not None and measured.window is not None and key.window < measured.window:
                # tiles that are the best from some window on are not so before it: of 192 rows with 28/4 heads x 128
                # 0.99 of the time of 64 with 256 (32768 tokens), 1.22 with 128
                same = same and (config.BLOCK_M == 64 or config.HEADS > 0)
            return same and (config.PACK_HEADS > 0 or packs(measured) == packs(key))
        tile, best = (config.BLOCK_M, config.BLOCK_N), large_tile(key)
        if best is None:
            return True
        if tile not in _tiles_of(key):
            # small ones: with 28/4 heads x 128 1.05 of the time of 128 x 128 under a window of 1024, 1.16 with 4096
            return config.BLOCK_M > 64 or loads_itself(key) or few_rows(key)
        return _large_time(key, tile) <= _LARGE_NEAR * _large_time(key, best)
    return _lends_backward(config, key, deterministic)


def splits_heads(config: TileConfig, key: ShapeKey) -> bool:
    """Whether a packed tile of the portable forward ends within a token's heads while q stays in registers: pointers,
    and not the copy engine, then load q. It took 1.16 to 1.29 of the time with q in shared memory (35/5 and 42/6 heads
    x 64, windows of 104 and 225)."""
    return config.REGISTER_A and not config.whole_tokens(group_of(key))


def _too_narrow(config: TileConfig, key: ShapeKey) -> bool:
    """Whether a tile of the portable forward has few keys for a window: of 32 it took 1.15 of the time of 64 with a
    window of 390 (64/8 heads x 64, 3550 and 9600 tokens), as long with 175."""
    return small_dims(key) and key.window is not None and key.window > _NARROW_WINDOW and config.BLOCK_N < 64


def _lends_backward(config: HopperBwdConfig, key: ShapeKey, deterministic: bool) -> bool:
    if config.DETERMINISTIC and not deterministic:  # the best of its shape only where that is asked for
        return False
    kind, worth = Kind(HopperBwdForm(config.FORM), config.SPLIT_GROUP), kinds(key)
    return kind in worth and (len(worth) == 1 or _behind(key, kind, deterministic) <= _NEAR)


def hides_keys(key: ShapeKey) -> bool:
    """Whether there is a window that some query cannot see over."""
    return key.window is not None and key.window < key.seqlen_k


def _row_tiles(key: ShapeKey) -> int:
    """Tiles of 64 rows, of all query heads."""
    return key.batch * key.heads_q * -(-key.seqlen_q // 64)
