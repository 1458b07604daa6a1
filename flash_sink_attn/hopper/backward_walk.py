"""The tiles that a program with keys of the Hopper backward goes through, and whose turn it is to add to one."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_sink_attn.hopper.common import (
    await_launch_before,
    barrier_arrive,
    barrier_wait,
    find_sequence,
    sequence_bounds,
)

# Tiles of dQ that may have their turn before they are added.
TURNS: gl.constexpr = gl.constexpr(4)
# ORDERED, how programs walk where dQ is added in an order of keys: not at all; so that those of a head read and add to
# the same tile at about the same time; so that each comes to a tile when its neighbour has left it.
NO_ORDER: gl.constexpr = gl.constexpr(0)
ABREAST: gl.constexpr = gl.constexpr(1)
ONE_BEHIND: gl.constexpr = gl.constexpr(2)


@gluon.jit
def key_tile(cu_q, cu_k, work, BLOCK_N: gl.constexpr, GROUP: gl.constexpr, SPLIT: gl.constexpr, WINDOW: gl.constexpr,
             VARLEN: gl.constexpr, TOGETHER: gl.constexpr, ORDERED: gl.constexpr, PAIR: gl.constexpr = False):
    """(ok, batch, key head, place of its parts of dK and dV, first key, keys' minus queries' length, lengths, where the
    sequences and its statistics begin, course of the walk).

    Tiles go by sections of ``section`` shares of (batch, key head) pairs, longest first under a causal mask; but
    shortest first in every other section where dQ is added in order (see :func:`_keep_order`). Each of the SPLIT shares
    has some of the group's query heads. In a packed batch each sequence has sections of its own, of so many shares that
    they are about ``section`` programs. PAIR: a tile is for two neighbouring programs.
    """
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window = work
    HEADS: gl.constexpr = (GROUP + SPLIT - 1) // SPLIT
    tile = gl.program_id(0)
    if PAIR:
        tile = tile // 2
    if VARLEN:
        units = heads_kv * SPLIT
        if cu_k is None:
            sequence, start_k, len_k, n = find_sequence(cu_q, batch, seqlen_k, tile // units, BLOCK_N)
            start_q = start_k
            len_q = len_k
        else:
            sequence, start_k, len_k, n = find_sequence(cu_k, batch, seqlen_k, tile // units, BLOCK_N)
            start_q, len_q = sequence_bounds(cu_q, sequence, seqlen_q)
        b = 0
        base = (start_q // 64 + sequence) * 64
        slot = start_k // BLOCK_N + sequence
        slots = (start_k + len_k) // BLOCK_N + sequence + 1 - slot
        tiles = gl.cdiv(len_k, BLOCK_N)
        ok = (n >= 0) & (n < slots)
        shares = gl.minimum(gl.maximum(section // gl.maximum(tiles, 1), 1), units)
        r = tile - slot * units
        s = r // (shares * slots)
        r -= s * (shares * slots)
        here = gl.maximum(gl.minimum(shares, units - s * shares), 1)
        # as sections of one size would: programs that start as others end walk the other way
        even = (slot * units + s * (shares * slots) + section // 2) // section % 2 == 0
        n = r // here
        if ORDERED and TOGETHER:
            n = gl.where(even & (n < tiles), tiles - 1 - n, n)
        ok = ok & (n < tiles)
        unit = s * shares + r % here
        share = unit % SPLIT
        head = unit // SPLIT
        place = ((slot + n) * heads_kv + head) * SPLIT + share
    else:
        s = tile // (section * tiles)
        r = tile - s * (section * tiles)
        here = gl.minimum(section, batch * heads_kv * SPLIT - s * section)
        even = s % 2 == 0
        n = r // here
        if ORDERED and TOGETHER:
            n = gl.where(even, tiles - 1 - n, n)
        unit = s * section + r % here
        share = unit % SPLIT
        head = unit // SPLIT % heads_kv
        b = unit // SPLIT // heads_kv
        ok = True
        len_q = seqlen_q
        len_k = seqlen_k
        start_q = 0
        start_k = 0
        base = 0
        place = (unit // SPLIT * tiles + n) * SPLIT + share
    first_key = n * BLOCK_N
    offset = len_k - len_q
    begin = gl.maximum(first_key - offset, 0) // 64
    stop = len_q
    if WINDOW:
        stop = gl.minimum(len_q, gl.maximum(first_key + (BLOCK_N - 1) + window - offset, 0))
    count = gl.maximum(gl.cdiv(stop, 64) - begin, 0)
    down = even
    if not TOGETHER:
        down = True
    elif ORDERED == ONE_BEHIND:
        down = not even
    first = gl.where(down, begin + count - 1, begin)
    low = share * HEADS
    course = (first, count, gl.where(down, -1, 1), low, gl.minimum(low + HEADS, GROUP), even)
    return ok, b, head, place, first_key, offset, len_q, len_k, start_q, start_k, base, course


@gluon.jit
def first_tile(course):
    """(Query tile, head of the group, tiles of this head that follow, tiles in all) where a walk begins."""
    first, count, step, low, high, even = course
    return first, low, count - 1, count * (high - low)


@gluon.jit
def next_tile(m, g, left, course, TOGETHER: gl.constexpr):
    """The tile after query tile ``m`` of the group's head ``g``; left: tiles of this head that follow (not TOGETHER).

    TOGETHER: all heads of a tile, then the next tile, from the end down in one section and from the beginning up in the
    next, so that the programs of a head read and add to the same tiles at about the same time: those that start
    together do on the way down, those that take over one by one as earlier programs end do on the way up. (The other
    way round where they are to come one behind the other.) Else all tiles of a head, from the end down, then the next
    head: under a window, where programs end at different tiles, they at least meet in the same head.
    """
    first, count, step, low, high, even = course
    if TOGETHER:
        g += 1
        wrap = g == high
        m = gl.where(wrap, m + step, m)
        g = gl.where(wrap, low, g)
    else:
        wrap = left == 0
        m = gl.where(wrap, first, m + step)
        g = gl.where(wrap, g + 1, g)
        left = gl.where(wrap, count - 1, left - 1)
    return m, g, left


@gluon.jit
def _await_turn(pointer, number):
    """Until the word at ``pointer`` is ``number``; what was added before it was set has then been added."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; TURN: ld.acquire.gpu.global.b32 t, [$1]; setp.ne.b32 p, t, $2; @p bra TURN; "
        "mov.u32 $0, 0; }", "=r,l,r", [pointer, number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _set_turn(pointer, number):
    """Once all that this program's warps have added, and told this one of, is visible to the whole GPU."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; bar.warp.sync -1; elect.sync _|p, -1; @p st.release.gpu.global.b32 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [pointer, number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _set_turns(pointer, number, condition, other, other_number, other_condition):
    """As :func:`_set_turn`, each of two words where its condition is."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p, q; bar.warp.sync -1; elect.sync _|p, -1; @p fence.acq_rel.gpu; "
        "setp.ne.and.b32 q, $3, 0, p; @q st.relaxed.gpu.global.b32 [$1], $2; "
        "setp.ne.and.b32 q, $6, 0, p; @q st.relaxed.gpu.global.b32 [$4], $5; mov.u32 $0, 0; }", "=r,l,r,r,l,r,r",
        [pointer, number, condition.to(gl.int32), other, other_number, other_condition.to(gl.int32)], dtype=gl.int32,
        is_pure=False, pack=1)


@gluon.jit
def _keep_order(Turn, cu_q, cu_k, turn, added, passed, work, order: gl.constexpr, TAKES: gl.constexpr):
    """One of two warps that let this program's dQ be added in an order of keys, so that sums have the same bits each
    time: the one that waits for the turn (TAKES), and the one that passes it on.

    In even sections, where programs start together and those with the last keys end first, the last keys go first: who
    ends first is held up least, and the next section's first program comes the sooner. Everywhere else the first keys
    do: in odd sections programs start one by one as those end, and with a window each is where its neighbour was.

    A turn takes a microsecond or more to pass. ABREAST each program of a head waits so long for its neighbour at the
    first tile, and then is as far behind it. ONE_BEHIND nobody waits if a turn is passed while a program goes through
    two tiles of queries (one where it has 64 keys): on the way up from its own diagonal a program that starts with all
    the others comes to each tile so much after its neighbour with later keys, and on the way down one that starts as
    much later as its walk is shorter comes to it as much after its neighbour with earlier keys. But then what the
    programs of a head read is spread over all its tiles, and has to have room in L2.

    A program waits only for those with a lower program number, which the GPU starts before it: nobody waits in a
    circle. LATE: who adds begins with a tile of zeros that needs no turn. PAIR: of two programs' tiles every
    other one is this one's, which count on their own. APART: of the i-th tile the last columns are added in step i and
    the first ones in step i + 1; each half has a word of its own, so that a turn is kept for no more than a step.
    """
    BLOCK_N: gl.constexpr = order[0]
    GROUP: gl.constexpr = order[1]
    SPLIT: gl.constexpr = order[2]
    VARLEN: gl.constexpr = order[3]
    WINDOW: gl.constexpr = order[4]
    TOGETHER: gl.constexpr = order[5]
    ORDERED: gl.constexpr = order[6]
    LATE: gl.constexpr = order[7]
    PAIR: gl.constexpr = order[8]
    APART: gl.constexpr = order[9]
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window = work
    ok, b, head, place, first_key, offset, len_q, len_k, start_q, start_k, base, course = key_tile(
        cu_q, cu_k, work, BLOCK_N, GROUP, SPLIT, WINDOW, VARLEN, TOGETHER, ORDERED, PAIR)
    await_launch_before()
    if ok:
        n = first_key // BLOCK_N
        head_rows = rows // 64
        tile0 = (b * (heads_kv * GROUP) + head * GROUP) * head_rows + base // 64
        m, g, left, total = first_tile(course)
        if PAIR:
            rank = gl.program_id(0) % 2
            if rank == 1:
                m, g, left = next_tile(m, g, left, course, TOGETHER)
            total = (total + 1 - rank) // 2
        if LATE:
            if total > 0:
                if TAKES:
                    barrier_arrive(turn, True)
                else:
                    barrier_wait(added, 0)
                    barrier_arrive(passed, True)
        steps = total + LATE
        if APART:
            steps = total + (total > 0).to(gl.int32)
        pointer = Turn.to(gl.int64)
        before = 0
        for i in range(LATE, steps):
            late = pointer + 4
            late_before = before
            pointer = Turn.to(gl.int64) + (tile0 + g * head_rows + m).to(gl.int64) * 8
            slot = i % TURNS
            # tiles of keys that add before this one does
            before = n
            if WINDOW:
                before -= gl.maximum(m * 64 + offset - window + 1, 0) // BLOCK_N
            if TOGETHER:
                last = gl.minimum((m * 64 + 63 + offset) // BLOCK_N, gl.cdiv(len_k, BLOCK_N) - 1)
                before = gl.where(course[5], last - n, n)
            if TAKES:
                # a slot's first round has none before it to wait for
                barrier_wait(passed + slot, (i // TURNS + 1) & 1)
                if APART:
                    if (before > 0) & (i < total):
                        _await_turn(pointer, before)
                    if (late_before > 0) & (i > 0):
                        _await_turn(late, late_before)
                else:
                    if before > 0:
                        _await_turn(pointer, before)
                barrier_arrive(turn + slot, True)
            else:
                barrier_wait(added + slot, (i // TURNS) & 1)
                if APART:
                    _set_turns(pointer, before + 1, i < total, late, late_before + 1, i > 0)
                else:
                    _set_turn(pointer, before + 1)
                barrier_arrive(passed + slot, True)
            m, g, left = next_tile(m, g, left, course, TOGETHER)
            if PAIR:
                m, g, left = next_tile(m, g, left, course, TOGETHER)


@gluon.jit
def take_turns(Turn, cu_q, cu_k, turn, added, passed, work, order: gl.constexpr):
    """The warp that waits for this program's turns, see :func:`_keep_order`."""
    _keep_order(Turn, cu_q, cu_k, turn, added, passed, work, order, True)


@gluon.jit
def pass_turns(Turn, cu_q, cu_k, turn, added, passed, work, order: gl.constexpr):
    """The warp that passes them on, see :func:`_keep_order`."""
    _keep_order(Turn, cu_q, cu_k, turn, added, passed, work, order, False)
