"""What the Hopper kernels take by arithmetic, where that decides more than what is near was measured to take.

**Forward.** Persistent programs take tiles in turn. Which tile is the best changes with what its last one leaves empty
and with how the rounds come out: :func:`rows_time`.

**Backward**, by its form and by how many programs share a group's query heads: :func:`microseconds`. Tiles of keys that
see many queries take long, and a card that waits for them idles: a group's heads shared by more programs make these
shorter, but each leaves parts of dK and dV in float32 that are added up afterwards. Which form and how many programs
are the fastest changes with every doubling of a length or of the heads, too often for a table.

The constants were fitted to 1,703 times of 293 shapes on an H200 (2026-11-28 and 29, driver 580.159.04, Triton 3.6.0:
tests/data/h200-kinds.csv and runs under results/h200). With those measured since it is 2,401 times of 393 shapes: 128
to 32768 tokens, groups of 1 to 16, head dims 64, 96 and 128, without a window and with windows of 88 to 4096. The
error, in the median and at the ninth decile, is

- where dQ is added up 1.3 and 5% at head dim 64, 2 and 8% at 128; under a window, of which there are 97 times, 1.2 and
  3%, 4 and 8%; in one order, without a window, where programs walk abreast, of which there are 10 times, 3 and 4%;
- where products are made again 3 and 8%, where the kernel slides 3 and 8%.

All those times are of sections of as many programs as run at once (see :func:`shares_in_section`), and so is this: the
fastest kind of a shape by these formulas takes 1.007 of the time of the fastest measured in the mean, more than
1.05 in 21 of 453 cases, and 1.18 at worst. In the sections that launches have now the error of 101 times where dQ is
added up is 1.6% in the median and 5% at the ninth decile (tests/data/h200-sections.csv, to which one constant is
fitted).
"""

from __future__ import annotations

import functools
import heapq
import math
from itertools import accumulate
from typing import NamedTuple

from flash_sink_attn.config import HopperBwdForm
from flash_sink_attn.tuned_table import ShapeKey
from flash_sink_attn.validity import hopper_bwd_width

PROGRAMS_AT_ONCE = 132  # multiprocessors of an H100 and an H200
_BEHIND = 256  # columns of q of a program, up to which programs walk one behind the other, see one_behind
_KEYS = 128  # of a tile of the backward that adds dQ up, at head dims up to 128


class Kind(NamedTuple):
    """A form of the backward, and how many programs share a group's query heads at the same keys (and queries)."""

    form: HopperBwdForm
    shares: int


class _Adding(NamedTuple):
    """Of the form that adds dQ up, in microseconds.

    Attributes:
        step: of a program, for 64 queries of a head and 128 keys.
        window: by what factor a step takes longer under a window, where programs walk from head to head.
        begin: steps that a program costs besides those it goes through.
        element: of statistics, zeros and the final conversion, for a million elements of q.
        part: of writing and adding up what programs that share a group leave, for a million elements of their dK.
        launches: of whatever the shape.
    """

    step: float
    window: float
    begin: float
    element: float
    part: float
    launches: float


class _InOrder(NamedTuple):
    """How many times as long adding in one order takes.

    Attributes:
        one_behind: where programs walk so and L2 has room. In 24 shapes of 1024 to 16384 tokens on H200s (2026-11-29)
            it was 1.00 to 1.08 at head dim 64, but 1.16 where eight programs share a group of eight (2048 tokens), and
            1.01 to 1.20 at 128.
        abreast: where they walk so, how much longer with one query head for each program, and with more a share of it.
        window: under a short one, and what one of 4096 adds: ``apart``, or with all shares in one section ``together``,
            which at head dim 128 was not measured.
    """

    one_behind: float
    abreast: float
    window: float
    apart: float
    together: float


class _Recomputing(NamedTuple):
    """Of the form that makes products again for dQ, in microseconds.

    Attributes:
        block: of a multiprocessor that is full, for 64 queries of a head and 64 keys, in both kernels together.
        alone: as ``block``, of one program.
        crowded: by what share ``alone`` is longer where two programs have a multiprocessor.
        begin: blocks that a head of a tile costs besides those it multiplies.
        part, launches: as above.
        at_once: programs that share a multiprocessor.
        uneven: under a window, of what is computed without it, with one program for a group and 1.2 to 3 rounds of them
            of which the last is begun and less than 0.9 full: at head dim 128 1.11 in the median of 30 held-out shapes
            on H200s, with two programs 0.99; at 64 1.01 and 0.97, which is left so.
    """

    block: float
    alone: float
    crowded: float
    begin: float
    part: float
    launches: float
    at_once: int
    uneven: float


# By the width of a tile, see hopper_bwd_width.
_ADDING = {64: _Adding(1.12, 1.03, 2, 4.45, 4.6, 7.3), 128: _Adding(1.96, 1.1, 3, 4.55, 5.6, 5.4)}
_RECOMPUTING = {64: _Recomputing(0.795, 1.08, 0.34, 2.25, 4.4, 9.1, 3, 1.0),
                128: _Recomputing(1.3, 1.475, 0.46, 1.67, 5.4, 8.9, 2, 1.1)}
_EVEN_ROUNDS = 3  # with more of them programs no longer end together
# One kernel whose programs slide over tiles of 64 tokens, for each head of a group; from 1024 to 16384 tokens, 64/8
# heads, a window of 128.
_SLIDE_STEP, _SLIDE_LAUNCHES = 2.4, 20.0
_ORDER = {64: _InOrder(1.03, 0.67, 1.05, 0.25, 0.08), 128: _InOrder(1.06, 1.0, 1.06, 0.14, 0.14)}
# For each part beyond the fourth, which are added one after the other: 30/3 x 128, 1350 tokens, ten parts took 0.152 ms
# for 0.123 without this.
_MORE_PARTS = 1.7
# Rounds of programs that are gone through one by one. With more of them the card is full until a share of the longest
# program's time before the end, in the mean.
_ROUNDS_WALKED, _LAST_WAIT = 12, 0.37
# Shares are put into so many equal sections where that ends sooner than sections of as many as run at once do. But
# those walk in lock step, and read and add to the same tiles; more at once are apart, and what q, do and dQ of theirs
# exceed L2 by costs such a share of the time for each megabyte. Under a window walks are apart anyway, and each
# doubling costs a little.
_EQUAL_SECTIONS = (4, 3, 2, 1)
_L2_MB, _BEYOND_L2, _DOUBLING_UNDER_WINDOW = 50, 0.0008, 0.01
_ROW_BYTES = 8  # of q, do and dQ, for each column
_L2_MB_BEHIND = 52  # at most, where programs walk one behind the other and every tile is read all the time
_L2_MB_BEHIND_WIDE = 40  # the same above head dim 128, where programs have half as many keys
_PAIRS_TOGETHER = 16  # shares that go together where two programs add one dQ, under a window
_ROUNDS_TOGETHER = 4  # of programs with up to two heads, of a section in one order under a window above head dim 128
_WORTH, _WORTH_UNDER_WINDOW = 1.025, 1.005  # other sections are not thought of where they gain less
# What a tile of a forward costs besides the keys it multiplies, in keys; anything from 100 to 200 does.
_TILE_KEYS = 128


def tile_keys(seqlen_q: int, seqlen_k: int, window: int | None, block_m: int, block_n: int) -> list[int]:
    """What each tile of a head of a forward costs, in keys; the one with the last queries, the longest, first."""
    costs = []
    for first in reversed(range(0, seqlen_q, block_m)):
        begin = 0 if window is None else max(0, first + seqlen_k - seqlen_q - window + 1)
        end = min(seqlen_q, first + block_m) + seqlen_k - seqlen_q
        costs.append(_TILE_KEYS + max(0, -(-(end - begin) // block_n) * block_n))
    return costs


def longest_program(costs: list[int], sections: list[int], programs: int) -> int:
    """What the program with the most to do gets of a forward's persistent grid.

    As common.tile_of_round hands tiles out: forwards in one round, backwards in the next.

    Args:
        costs: of the tiles of a head, in their order.
        sections: how many heads each section has; it goes through the first tiles of all of them, then the second ones.
    """
    steps = [0] * (programs + 1)  # how much more a program has to do than the one before it
    number = 0
    for heads in sections:
        for cost in costs:
            left = heads
            while left:
                turn, at = divmod(number, programs)
                count = min(left, programs - at)
                low = programs - at - count if turn % 2 else at
                steps[low] += cost
                steps[low + count] -= cost
                number += count
                left -= count
    return max(accumulate(steps))


@functools.lru_cache(4096)
def rows_time(key: ShapeKey, block_m: int, block_n: int) -> float:
    """Time of a forward by persistent programs, one for each multiprocessor, in pairs of a query and a key.

    The longest program's, all heads in one section. In 65 shapes of head dim 64 without a window, on an H200
    (2026-11-28 and 29, 1024 to 32768 tokens, 18 to 64 heads), the better of 256 x 64 and 192 x 128 by this took 1.002
    of the time of the better one in the mean and 1.038 at worst.
    """
    costs = tile_keys(key.seqlen_q, key.seqlen_k, key.window, block_m, block_n)
    return float(block_m * longest_program(costs, [key.batch * key.heads_q], PROGRAMS_AT_ONCE))


@functools.lru_cache(4096)
def microseconds(key: ShapeKey, kind: Kind, ordered: bool = False, section: int | None = None) -> float:
    """Time of a backward with head dims up to 128.

    Args:
        ordered: whether dQ is added up in one order.
        section: shares that go together where dQ is added up, in place of what :func:`shares_in_section` says.
    """
    if kind.form == HopperBwdForm.SLIDE:
        return _sliding(key)
    if kind.form == HopperBwdForm.RECOMPUTE:
        return _recomputing(key, kind.shares)
    return _adding(key, kind.shares, ordered, section)


def group_of(key: ShapeKey) -> int:
    """Query heads of a key head."""
    return key.heads_q // key.heads_kv


def _units(key: ShapeKey) -> int:
    return key.batch * key.heads_kv


def _millions(key: ShapeKey, heads: int) -> float:
    return key.batch * key.seqlen_k * heads * hopper_bwd_width(key.head_dim) / 1e6


def _shared_parts(key: ShapeKey, shares: int, part: float) -> float:
    """Time of writing and adding up what the programs that share a group leave."""
    if shares == 1:
        return 0.0
    return part * _millions(key, key.heads_kv) * shares + _MORE_PARTS * max(0, shares - 4)


def _adding(key: ShapeKey, shares: int, ordered: bool, section: int | None) -> float:
    width = hopper_bwd_width(key.head_dim)
    cost = _ADDING[width]
    step = cost.step * (1.0 if key.window is None else cost.window)
    parts = _shared_parts(key, shares, cost.part)
    launched = _section(key, shares, ordered, section)
    time = cost.launches + step * launched.steps + cost.element * _millions(key, key.heads_q) + parts
    if not ordered:
        return time
    order, heads = _ORDER[width], -(-group_of(key) // shares)
    # (of a packed batch only the sum of the lengths is known)
    room = key.varlen or _share_megabytes(heads, key.seqlen_q, width) <= _L2_MB_BEHIND
    if one_behind(key.head_dim, heads, key.window) and room:
        return time * order.one_behind
    if key.window is None:
        return time * (1 + order.abreast / heads)
    one = launched.shares >= _units(key) * shares
    return time * (order.window + (order.together if one else order.apart) * min(key.window, key.seqlen_k) / 4096)


def _section(key: ShapeKey, shares: int, ordered: bool = False, section: int | None = None) -> Section:
    """The section of so many shares, by default the one of a launch, of the form that adds up."""
    shape = (key.seqlen_q, key.seqlen_k, key.window, key.head_dim, group_of(key), _units(key), shares)
    if section is None and not key.varlen:
        return shares_in_section(*shape, ordered=ordered)
    programs = _Programs.of(*shape, _KEYS, PROGRAMS_AT_ONCE)
    section = section or programs.section_at_once
    return Section(section, programs.steps(section))


def _share_megabytes(heads: int, seqlen_q: int, width: int) -> float:
    """q, do and dQ of the query heads that one program of each tile of keys goes through."""
    return heads * seqlen_q * width * _ROW_BYTES / 1e6


def one_behind(head_dim: int, heads: int, window: int | None) -> bool:
    """Whether the programs of a head walk one behind the other where dQ is added in one order (backward_walk).

    Args:
        heads: query heads of a program.
    """
    return window is None and heads * head_dim <= _BEHIND


class Section(NamedTuple):
    """A section of the programs that hold keys.

    Attributes:
        shares: of (batch, key head) pairs whose tiles go together.
        steps: until the last program has ended, 64 queries of a head each, with what a large section costs.
    """

    shares: int
    steps: float


@functools.lru_cache(4096)
def shares_in_section(
    seqlen_q: int, seqlen_k: int, window: int | None, head_dim: int, group: int, units: int, shares: int,
    block_n: int = _KEYS, programs: int = PROGRAMS_AT_ONCE, ordered: bool = False,
) -> Section:
    """The section that a backward of one length which adds dQ up is launched with, and what it takes.

    Sections of as many shares as run at once keep the programs in lock step, so that q, do and dQ come from L2; but
    where they leave the card partly idle, or the last is small, equal sections of more shares end sooner. On an H200
    (2026-11-29, of the time with as many as run at once) a causal backward of 28/7 heads x 128, 2350 tokens, two
    programs for a group, took 0.68 with 7 for 6; where nothing is to be gained, 64/8 x 128, 8192 tokens, 1.17 with 4
    for 2. tests/test_estimate.py has all that were measured.

    Under a window with dQ in one order all go together, so that fewer tiles of a head, of which each waits for its
    neighbour, run at once: 64/8 x 64, 8192 tokens, window 4096, 0.80 with 8 for 2.

    Where programs walk one behind the other (see :func:`one_behind`), the programs of an odd section have to start as
    those of an even one end: so the sections are of one size, even in number, and have room in L2. Of those that end
    first by counting the largest are taken, since fewer programs of a head at once leave each neighbour more time. On
    an H200 32/32 x 64, 2048 tokens, took 0.86 with 16 for 8; 28/4 x 128, 4096, seven programs for a group, 0.90 with 7
    for 4, which are seven sections, and 0.95 with 14, which are 59 MB.

    Args:
        group: query heads of a key head.
        units: (batch, key head) pairs.
        shares: programs that share a group at the same keys.
        block_n: keys of a tile.
        programs: that run at once; pairs of them, where two share a tile.
        ordered: whether dQ is added up in one order.

    Above head dim 128 see :func:`_wide_section`; of all else it is taken to behave as 128 does.
    """
    of = _Programs.of(seqlen_q, seqlen_k, window, head_dim, group, units, shares, block_n, programs)
    base, falling = of.section_at_once, ordered and window is None
    if ordered and one_behind(head_dim, of.heads[0], window):
        section = of.paired_section
        return Section(section, of.steps(section, falling))
    if head_dim > 128 and (wide := _wide_section(of, window, ordered, pairs=block_n > 64)):
        return Section(wide, of.steps(wide, falling))
    if not of.walked:
        return Section(base, of.steps(base))
    if ordered and window is not None:
        return Section(max(base, of.all_shares), of.steps(max(base, of.all_shares)))

    def cost(section: int) -> float:
        if section == base or window is not None:
            return 1 + _DOUBLING_UNDER_WINDOW * math.log2(section / base)
        return 1 + _BEYOND_L2 * max(0.0, of.megabytes * section - _L2_MB)

    most, worth = of.steps(base, falling), _WORTH if window is None else _WORTH_UNDER_WINDOW
    # in one order fewer tiles of a head, which wait for one another, are at once the better: as good is good enough
    best, least = base, most if falling else most / worth
    if most > worth * of.mean:
        for section in sorted({-(-of.all_shares // sections) for sections in _EQUAL_SECTIONS}):
            # no section takes less than the mean program, so most need not be gone through
            if section > base and of.mean * cost(section) < least:
                steps = of.steps(section, falling) * cost(section)
                if steps < least or falling and steps == least:
                    best, least = section, steps
    return Section(best, of.steps(best) * cost(best))


def _wide_section(of: _Programs, window: int | None, ordered: bool, pairs: bool) -> int | None:
    """The section above head dim 128 where it is known by measuring and not by counting, on H200s (2026-11-30).

    Under a window pairs of programs, whose sections of as many as run at once end unevenly, go by up to sixteen shares,
    in one order all together: 64/8 x 192/128, 4096 tokens, window 2048, 0.90 with 8 for 4. Of programs alone, measured
    at head dim 256, as many as run at once are the best without an order; in one order four rounds of programs, the
    fewer the more heads a program has: 16/16, 4096 tokens, window 1024, 0.83 with 8 for 16, 32/8 0.86 with 4 for 8.
    There, too, without a window two rounds of programs that have two heads: 16/8, 4096 and 8192 tokens, 0.85 and 0.81.

    Args:
        pairs: whether two programs share a tile. Of ``window`` and ``ordered`` see :func:`shares_in_section`.

    Returns:
        Shares, or None where counting decides.
    """
    base, heads = of.section_at_once, of.heads[0]
    if window is not None and pairs:
        return max(base, of.all_shares if ordered else min(of.all_shares, _PAIRS_TOGETHER))
    if window is not None and ordered:
        programs = of.at_once * max(1, min(_ROUNDS_TOGETHER, 2 * _ROUNDS_TOGETHER // heads))
        return max(base, min(of.all_shares, programs // len(of.seen)))
    if window is not None:
        return base
    if ordered and not pairs and heads == 2 and of.all_shares >= 4 * base:
        return 2 * base
    return None


class _Programs(NamedTuple):
    """The programs that hold keys of a backward that adds dQ up, one at a time on each multiprocessor.

    As backward_walk.key_tile numbers them: by sections of shares, in a section the first keys first, which under a
    causal mask most queries see.

    Attributes:
        seen: of each tile of keys: tiles of a head's queries that see some of it.
        heads: of each share of a group.
        all_shares: of all (batch, key head) pairs.
        begin: steps that a program costs besides those it goes through.
        at_once: programs that run at once.
        megabytes: of q, do and dQ of a share.
        room: in L2, for those of the shares of a section where programs walk one behind the other.
    """

    seen: tuple[int, ...]
    heads: tuple[int, ...]
    all_shares: int
    begin: float
    at_once: int
    megabytes: float
    room: float

    @classmethod
    def of(cls, seqlen_q: int, seqlen_k: int, window: int | None, head_dim: int, group: int, units: int, shares: int,
           block_n: int, at_once: int) -> _Programs:
        """As :func:`shares_in_section` has them."""
        offset, most = seqlen_k - seqlen_q, -(-group // shares)
        seen = []
        for first in range(0, max(1, seqlen_k), block_n):
            stop = seqlen_q
            if window is not None:
                stop = min(stop, max(0, first + block_n - 1 + window - offset))
            seen.append(max(0, -(-stop // 64) - max(0, first - offset) // 64))
        heads = tuple(min(most, group - share * most) for share in range(shares))
        # above 128, which was not fitted, a program begins as at 128
        width, begin = hopper_bwd_width(head_dim), _ADDING[min(128, hopper_bwd_width(head_dim))].begin
        return cls(tuple(seen), heads, units * shares, begin, at_once, _share_megabytes(most, seqlen_q, width),
                   _L2_MB_BEHIND if width <= 128 else _L2_MB_BEHIND_WIDE)

    @property
    def section_at_once(self) -> int:
        """As many shares as run at once."""
        return max(1, min(self.all_shares, self.at_once // len(self.seen)))

    @property
    def paired_section(self) -> int:
        """Of an even number of sections, with room for q, do and dQ in L2, what ends first; of as good ones the most
        shares."""
        least, worth = self.section_at_once, []
        for wanted in range(2, self.all_shares // least + 2, 2):
            section = -(-self.all_shares // wanted)
            count = -(-self.all_shares // section)
            even = count % 2 == 0 and count * section - self.all_shares <= section // 4
            if even and section >= least and section * self.megabytes <= self.room:
                worth.append(section)
        return min(worth, key=lambda section: self.steps(section, True), default=least)

    @property
    def walked(self) -> bool:
        """Whether they are gone through one by one."""
        return len(self.seen) * self.all_shares <= _ROUNDS_WALKED * self.at_once

    @property
    def mean(self) -> float:
        """Steps of a multiprocessor if all had as many."""
        each = sum(self.heads) * sum(self.seen) + len(self.heads) * len(self.seen) * self.begin
        return self.all_shares // len(self.heads) * each / self.at_once

    def steps(self, section: int, falling: bool = False) -> float:
        """Until the last program has ended. falling: the last keys first in every other section, as where dQ is added
        in one order without a window."""
        if not self.walked:
            return self.mean + _LAST_WAIT * (max(self.seen) * max(self.heads) + self.begin)
        ends, take = [0.0] * self.at_once, heapq.heapreplace  # who is free first takes the next program
        for number, low in enumerate(range(0, self.all_shares, section)):
            members = [self.heads[share % len(self.heads)] for share in range(low, min(self.all_shares, low + section))]
            for queries in reversed(self.seen) if falling and number % 2 == 0 else self.seen:
                for cost in [queries * member + self.begin for member in members]:
                    take(ends, ends[0] + cost)
        return max(ends)


def _recomputing(key: ShapeKey, shares: int) -> float:
    """Either the card is full all the time, or it waits for the longest programs: those of a causal mask that start
    first, or under a window, where most are as long, the last round of them."""
    cost, heads = _RECOMPUTING[hopper_bwd_width(key.head_dim)], -(-group_of(key) // shares)
    tiles = max(1, -(-key.seqlen_q // 64))
    seen = tiles if key.window is None else min(tiles, -(-(key.window + 63) // 64))  # blocks of the longest
    blocks = seen * (seen + 1) / 2 + (tiles - seen) * seen + cost.begin * tiles  # of a head
    full = key.batch * key.heads_q * blocks / PROGRAMS_AT_ONCE * cost.block
    programs = tiles * _units(key) * shares / PROGRAMS_AT_ONCE
    longest = seen + cost.begin
    if seen < tiles:
        rounds = blocks / longest * _units(key) * shares / (PROGRAMS_AT_ONCE * cost.at_once)
        crowd, rounds = float(programs > 1), rounds if rounds > _EVEN_ROUNDS else float(math.ceil(rounds))
        begun = programs / cost.at_once
        # (of a packed batch only rounded lengths are known)
        half = 1.2 < begun < _EVEN_ROUNDS and 0 < begun % 1 < 0.9 and not key.varlen
        uneven = cost.uneven if shares == 1 and half else 1.0
    else:
        crowd, rounds, uneven = min(1.0, max(0.0, programs - 1)), 1.0, 1.0
    wait = longest * heads * cost.alone * (1 + cost.crowded * crowd) * rounds
    parts = _shared_parts(key, shares, cost.part)
    return cost.launches + max(full, wait) * uneven + parts


def _sliding(key: ShapeKey) -> float:
    # as launch_backward: one program per multiprocessor, of two tiles at least
    run = max(2, -(-_units(key) * -(-key.seqlen_q // 64) // PROGRAMS_AT_ONCE))
    return _SLIDE_LAUNCHES + run * group_of(key) * _SLIDE_STEP
