"""Kinds of shapes between which the best configuration of a kernel changes at once and not by degrees.

The distance of :mod:`flash_sink_attn.nearest` measures degrees. Where a configuration means something else for another
shape (a form that the shape cannot slide in, heads that no longer fit the ring), or a shape needs something else (a
group shared by several programs), an entry is not lent however near it is: :func:`lends`. The heuristic follows the
same kinds.
"""

from __future__ import annotations

from flash_sink_attn.config import HOPPER_SLIDE_WINDOW, HopperBwdConfig, HopperBwdForm, HopperFwdConfig, TileConfig
from flash_sink_attn.tuned_table import Entry, ShapeKey

PROGRAMS_AT_ONCE = 132  # multiprocessors of an H100
# Adding dq up outside costs two launches more and a pass over it in float32, two more products per pair of tiles cost
# by the window. At 8192 tokens the latter takes 1.04 of the time with 1024 keys at head dim 64; at head dim 128, with
# 28/4 heads, 0.97 with 1024, 1.03 with 2048 and 1.05 with 4096, of a version that took up to 5% longer. By whether the
# head dim is at most 64.
RECOMPUTE_WINDOW = {True: 512, False: 1400}
# Where dq has to be added up in order otherwise, and at head dim 64 the order costs less than the products.
_ORDERED_RECOMPUTE_WINDOW = {True: 512, False: 4096}
_SHARED_WINDOW = 1400  # of either head dim, see shares_in_window
_COST_OF_HALVES = 1.15  # see rounds_gain
# Where the sections say nothing, with 64/8 heads on an H200: two programs for each group took 0.99, 0.97 and 0.97 of
# the time with 16384 tokens at head dim 64, 32768 there and 16384 at 128, where a section has 97% of the
# multiprocessors, and 0.93, 0.95 and 0.97 with 6100 and 13000 tokens at head dim 64 and 7300 at 128, where it has 73 to
# 86%. With 97% and 4096 and 8192 tokens it was 1.00 to 1.04.
_LONG_SEQUENCE = 16384
_FULL_SECTION = 0.9
# From here on most blocks of keys need no mask, and large tiles read them less often.
SHORT_WINDOW = 1024
# Without a window, at head dims from 65 to 128. With up to 2048 tokens and 168 tiles of 128 keys making dq anew took
# 0.78 to 0.90 of the time in five shapes, with 448 and 512 tiles 0.98 and 1.09, with 4096 tokens and more from 0.97 to
# 1.13; without groups 0.90 and 0.95.
_SHORT_SEQUENCE = 2048
_FEW_KEYS = 2304  # in a sequence, see loads_itself
# Keys that a query sees in the mean: up to here 256 x 64 was the fastest forward tile at head dim 64 in all six shapes
# of a run, by 3 to 11%; with more 192 x 128 was, but for one of five.
_MANY_KEYS = 2048
# 64-row tiles of the portable forward at head dim 64, without a window, between which more programs at once are worth
# more than the first operand in registers, of which three run on a multiprocessor and without it five. With 432, 504,
# 576 and 672 tiles that took 0.97, 0.95, 0.95 and 0.92 of the time, with 288 and 336 1.03 and 1.02, with 864 1.11.
_MORE_AT_ONCE = (3 * PROGRAMS_AT_ONCE, 5.5 * PROGRAMS_AT_ONCE)
_FEW_ROW_TILES = 3.5  # of 64 rows for each multiprocessor, see few_rows


def small_dims(key: ShapeKey) -> bool:
    """Whether the head dims are at most 64."""
    return max(key.head_dim, key.head_dim_v) <= 64


def short_window(key: ShapeKey) -> bool:
    """Whether the forward takes small tiles, several programs of which share a multiprocessor."""
    return key.window is not None and key.window < SHORT_WINDOW


def many_keys(key: ShapeKey) -> bool:
    """Whether a query sees more than _MANY_KEYS keys in the mean."""
    return min(key.window or key.seqlen_k, (key.seqlen_k + 1) // 2) > _MANY_KEYS


def fits_ring(config: HopperFwdConfig, window: int | None) -> bool:
    """Whether all keys that 64 tokens see are in shared memory at once, which HEADS and PACK_HEADS need."""
    return window is not None and window + 63 <= config.num_stages * config.BLOCK_N


def packs_alone(key: ShapeKey) -> bool:
    """Whether programs that take eight heads of a group for 64 tokens all run at once, with room for more of them."""
    return key.batch * key.heads_kv * -(-key.seqlen_q // 64) * max(1, _group(key) // 8) <= PROGRAMS_AT_ONCE


def idles(config: HopperFwdConfig, key: ShapeKey) -> bool:
    """Whether programs that take several heads and fill half a multiprocessor each leave much of the card idle.

    All of them take about as long, so a second round with few of them doubles the time: 288 for the 264 that run at
    once took 0.0494 ms at 2300 tokens with a window of 180, where tiles of one head took 0.0396, and 456 at 3600 tokens
    0.0679 for 0.0615; at 7700 tokens, four rounds, it was 0.109 against 0.119.
    """
    if not config.PACK_HEADS or config.PROGRAMS_PER_SM or config.registers_per_thread <= 80 or not config.HEADS:
        return False
    programs = key.batch * key.heads_kv * -(-key.seqlen_q // 64) * (_group(key) // (config.PACK_HEADS * config.HEADS))
    at_once = 2 * PROGRAMS_AT_ONCE
    return at_once < programs < 1.8 * at_once


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
    1.04 and 1.06 with 2048 and 2560, 1.09 and more of 3900 tokens and more. Of a packed batch, whose tiles it has to
    find twice, 1.15.
    """
    tiles, dims = _row_tiles(key), (key.head_dim, key.head_dim_v)
    if key.varlen or dims not in ((64, 64), (128, 128)):
        return False
    if short_window(key):
        return dims == (128, 128) and tiles > 3 * PROGRAMS_AT_ONCE
    few, many = (3, 13) if dims == (64, 64) else (_FEW_ROW_TILES, 9.5)
    short = not hides_keys(key) and key.seqlen_k <= _FEW_KEYS
    return short and few * PROGRAMS_AT_ONCE < tiles <= many * PROGRAMS_AT_ONCE


def few_rows(key: ShapeKey) -> bool:
    """Whether a forward at head dim 128, with no window or a long one, has so few tiles that small ones are better:
    64 rows took 0.92 and 0.97 of the time of 128 with 320 and 448 of them."""
    return ((key.head_dim, key.head_dim_v) == (128, 128) and not short_window(key)
            and _row_tiles(key) <= _FEW_ROW_TILES * PROGRAMS_AT_ONCE)


def slides(key: ShapeKey) -> bool:
    """Whether the backward can slide over queries and keys at once (FORM 2)."""
    return (key.window is not None and key.window <= HOPPER_SLIDE_WINDOW and key.seqlen_q == key.seqlen_k
            and key.head_dim == 64 and _group(key) > 1)


def few_tiles(key: ShapeKey) -> bool:
    """Whether the forward at head dims up to 64 has so few tiles of 192 rows that the card runs them in three rounds.

    The portable kernel's tiles of 64 rows were 2 to 15% faster in seven such shapes without a window, of up to 1450
    tokens; with 5050 tokens and 324 tiles they were 23% slower.
    """
    tiles = key.batch * key.heads_q * -(-key.seqlen_q // 192)
    return (small_dims(key) and not short_window(key) and not loads_itself(key) and key.seqlen_k <= _SHORT_SEQUENCE
            and tiles <= 3 * PROGRAMS_AT_ONCE)


def recomputes(key: ShapeKey, deterministic: bool = False) -> bool:
    """Whether the backward is better off making dq in a kernel of its own (FORM 1) than adding it up."""
    if hides_keys(key):
        assert key.window is not None
        return key.window <= (_ORDERED_RECOMPUTE_WINDOW if deterministic else RECOMPUTE_WINDOW)[small_dims(key)]
    middle = not small_dims(key) and max(key.head_dim, key.head_dim_v) <= 128
    short = key.seqlen_k <= _SHORT_SEQUENCE and _units(key) * _key_tiles(key) <= 3 * PROGRAMS_AT_ONCE
    return middle and (short or _group(key) == 1 or _waits_for_few(key))


def _waits_for_few(key: ShapeKey) -> bool:
    """Whether adding dq up keeps the card waiting for its longest programs, shared or not, and making it anew does not.

    With 24/4 heads x 128 at 4900 tokens 156 programs took 0.991 ms, 312 half as long 0.990, and making dq anew 0.806:
    by arithmetic 59% of the card was busy. Where 79% are (48/8) it was the same, and with 32/2 heads, where the
    programs that make dq anew do not fill the card either, 1.07.
    """
    busy = _units(key) * _key_tiles(key) / 2 / PROGRAMS_AT_ONCE
    longest = min(_longest_programs(key, 1), _longest_programs(key, 2))
    # of 64 keys, two for each group, two of them on a multiprocessor, and half as long in the mean as the longest
    anew = _units(key) * -(-key.seqlen_k // 64) / 2 / PROGRAMS_AT_ONCE
    return _can_share(key) and busy < 0.65 * longest and anew > 0.8


def shares_group(key: ShapeKey) -> bool:
    """Whether a backward without a window is faster with two programs for each group at the same keys.

    A section is as many heads as run at once. Programs of one section start together and end one by one, those of the
    next take over one by one and end together: two sections take as long as the longest program, and so does a last one
    alone. Two programs for a group take half as long each, in twice as many sections. At 2048 tokens with 64/8 heads
    (one section) 0.254 ms instead of 0.367 at head dim 64, at 5120 tokens with 32/8 heads (three) 0.699 instead of
    0.847, and at 3001 with 64/8 heads (two) 0.578 instead of 0.575. Where it is the same, see _LONG_SEQUENCE.
    """
    if hides_keys(key) or not _can_share(key):
        return False
    one, two = _longest_programs(key, 1), _longest_programs(key, 2)
    fills = _section(key) * _key_tiles(key) > _FULL_SECTION * PROGRAMS_AT_ONCE
    return two < one or (two == one and (key.seqlen_k >= _LONG_SEQUENCE or not fills))


def shares_in_window(key: ShapeKey) -> bool:
    """Whether a backward under a window is faster with several programs for each group at the same keys.

    Under a long one the last keys are seen by few queries, and with few programs the card waits for the longest ones.
    At 8192 tokens with a window of 4096, of one program, two, four, and one for each head: 28/4 heads x 128 2.218,
    1.958, 1.866 and 1.862 ms, 64/8 x 64 2.201, 2.161, 2.153 and 2.243; with a window of 2048 28/4 x 128 1.233, 1.246,
    1.220 and 1.240, with 1024 0.728, 0.792, 0.791 and 0.830. Under a short one see rounds_gain.
    """
    if not hides_keys(key) or not _can_share(key):
        return False
    if (key.window or 0) > _SHARED_WINDOW:
        return _units(key) * _key_tiles(key) <= 4 * PROGRAMS_AT_ONCE
    return not small_dims(key) and recomputes(key) and rounds_gain(key)


def rounds_gain(key: ShapeKey) -> bool:
    """Whether programs of equal length at head dims above 64, 64 keys each, are done sooner in twice as many halves.

    Two of them run on a multiprocessor, and all take about as long. With 28/4 heads x 128 and a window of 256
    half a round became a quarter at 1024 tokens (0.065 ms instead of 0.091), with 24/4 and 300 at 5700 two rounds three
    halves (0.214 instead of 0.236); where it stayed at one, two and four rounds halves took 1.21, 1.02 and 1.15 of the
    time.
    """
    programs = 0 if key.varlen else _units(key) * -(-key.seqlen_k // 64)
    at_once = 2 * PROGRAMS_AT_ONCE
    return 0 < _COST_OF_HALVES * -(-2 * programs // at_once) / 2 < -(-programs // at_once)


def _longest_programs(key: ShapeKey, split: int) -> float:
    """Time of a backward over that of the longest of its programs without sharing."""
    sections = -(-_units(key) * split // _section(key))
    return (sections + 1) // 2 / split


def _section(key: ShapeKey) -> int:
    """Heads, or shares of their groups, whose programs start together."""
    return max(1, PROGRAMS_AT_ONCE // max(1, _key_tiles(key)))


def _units(key: ShapeKey) -> int:
    return key.batch * key.heads_kv


def _key_tiles(key: ShapeKey) -> int:
    return -(-key.seqlen_k // 128)


def lends(entry: Entry, key: ShapeKey, deterministic: bool = False) -> bool:
    """Whether the configuration that was the best for one shape says something about another one of its family.

    Args:
        entry: the configuration, its kernel and the shape that it was the best for.
        key: the shape it is to serve.
        deterministic: whether it has to give the same bits each time.
    """
    config, measured = entry.config, entry.key
    if isinstance(config, TileConfig):
        return entry.kernel != "fwd" or wants_more_at_once(measured) == wants_more_at_once(key)
    if isinstance(config, HopperFwdConfig):
        if config.HEADS and fits_ring(config, measured.window) != fits_ring(config, key.window):
            return False
        if config.PACK_HEADS and packs_alone(measured) != packs_alone(key):
            return False
        if idles(config, measured) != idles(config, key):
            return False
        if loads_itself(measured) != loads_itself(key):
            return False
        same = short_window(measured) == short_window(key)
        # short windows see few keys, whatever the sequence
        return same and (short_window(key) or not small_dims(key) or many_keys(measured) == many_keys(key))
    return _lends_backward(config, measured, key, deterministic)


def _lends_backward(config: HopperBwdConfig, measured: ShapeKey, key: ShapeKey, deterministic: bool) -> bool:
    if config.DETERMINISTIC and not deterministic:  # the best of its shape only where that is asked for
        return False
    if slides(measured) != slides(key) or config.FORM == HopperBwdForm.SLIDE and not slides(key):
        return False
    if recomputes(measured) != recomputes(key):
        return False
    # what is not of the kind was measured where the others were not tried
    if hides_keys(key):
        shared = config.SPLIT_GROUP > 1
        return shared == shares_in_window(key) or shared and config.FORM != HopperBwdForm.RECOMPUTE
    if recomputes(key):
        return config.FORM == HopperBwdForm.RECOMPUTE and (config.SPLIT_GROUP > 1 or not _can_share(key))
    return not _can_share(key) or (config.SPLIT_GROUP > 1) == shares_group(key)


def hides_keys(key: ShapeKey) -> bool:
    """Whether there is a window that some query cannot see over."""
    return key.window is not None and key.window < key.seqlen_k


def _row_tiles(key: ShapeKey) -> int:
    """Tiles of 64 rows, of all query heads."""
    return key.batch * key.heads_q * -(-key.seqlen_q // 64)


def _group(key: ShapeKey) -> int:
    return key.heads_q // key.heads_kv


def _can_share(key: ShapeKey) -> bool:
    return _group(key) > 1 and key.head_dim <= 128
