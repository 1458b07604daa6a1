"""The Hopper backward in plain Triton: what comes before and after the kernels of the matrix products."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _find(cu_seqlens, batch, total, tile, block):
    """As common.find_sequence."""
    low = tl.full([], 0, tl.int32)
    high = low + batch
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + batch), start), total)
    while high - low > 1:
        middle = (low + high) // 2
        token = tl.minimum(tl.maximum(tl.load(cu_seqlens + middle), 0), total)
        here = token // block + middle <= tile
        low = tl.where(here, middle, low)
        start = tl.where(here, token, start)
        high = tl.where(here, high, middle)
        end = tl.where(here, end, token)
    return low, start, tl.maximum(end - start, 0), tile - start // block - low


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["batch", "total"])
def hopper_bwd_offsets_kernel(CuSeqlens, Rising, batch, total):
    """A packed batch's offsets as they are where they are right, and never falling where they are not: every tile of
    a sequence then has a program. One program."""
    before = 0
    for first in range(0, batch + 1, 128):
        index = first + tl.arange(0, 128)
        x = tl.load(CuSeqlens + index, mask=index <= batch, other=0)
        x = tl.maximum(tl.associative_scan(tl.minimum(tl.maximum(x, 0), total), 0, _larger), before)
        tl.store(Rising + index, x, mask=index <= batch)
        before = tl.max(x, 0)


@triton.jit(do_not_specialize=["batch", "seqlen", "heads", "tiles"])
def hopper_bwd_rows_kernel(
    O, DO, Lse, DLse, Sinks, Lse2, Delta, Part, DQ, Turn, CuSeqlens, stride_b, stride_t, stride_h, batch, seqlen,
    heads, tiles,
    D: tl.constexpr, D_TRUE: tl.constexpr, WIDTH: tl.constexpr, VARLEN: tl.constexpr,
):
    """Statistics of 64 rows of a head, their part of its sink's gradient, and zeros for their dQ and,
    where its sum has an order, whose turn it is.

    tiles: of a sequence, of a packed batch the number of slots. Strides of DO, in elements. D, D_TRUE: of O and DO, the
    power of two and the head dim. WIDTH: columns of DQ, a multiple of 64.
    """
    gdc_launch_dependents()
    pid = tl.program_id(0).to(tl.int64)
    tile = pid % tiles
    unit = pid // tiles
    h = unit % heads
    b = unit // heads
    length = seqlen
    start = 0
    t = tile
    if VARLEN:
        sequence, start, length, t = _find(CuSeqlens, batch, seqlen, tile, 64)
    row = t * 64 + tl.arange(0, 64)
    inside = (row < length) & (row >= 0)
    column = tl.arange(0, D)
    whole = inside[:, None] & (column < D_TRUE)[None, :]
    o_at = (((b * seqlen + start + row) * heads + h) * D_TRUE)[:, None] + column[None, :]
    do_at = (b * stride_b + (start + row) * stride_t + h * stride_h)[:, None] + column[None, :]
    o = tl.load(O + o_at, mask=whole, other=0.0)
    do = tl.load(DO + do_at, mask=whole, other=0.0)
    for c in tl.static_range(WIDTH // 64):
        tl.store(DQ + pid * (64 * WIDTH) + c * 4096 + tl.arange(0, 4096), tl.zeros([4096], tl.float32))
    if Turn is not None:
        tl.store(Turn + pid * 2 + tl.arange(0, 2), tl.zeros([2], tl.int32))
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = unit * seqlen + start + row
    lse2 = tl.load(Lse + at, mask=inside, other=float("inf")) * 1.4426950408889634
    lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
    if DLse is not None:
        delta -= tl.load(DLse + at, mask=inside, other=0.0)
    tl.store(Delta + pid * 64 + tl.arange(0, 64), delta)
    tl.store(Lse2 + pid * 64 + tl.arange(0, 64), lse2)
    if Part is not None:
        sink = tl.load(Sinks + h).to(tl.float32) * 1.4426950408889634
        slots = batch * tiles
        if VARLEN:
            slots = tiles
        tl.store(Part + h * slots + b * tiles + tile, -tl.sum(tl.math.exp2(sink - lse2) * delta, 0))


@triton.jit
def _sum_parts(Part, DSinks, h, slots):
    x = tl.zeros([128], tl.float32)
    for first in range(0, slots, 128):
        i = first + tl.arange(0, 128)
        x += tl.load(Part + h * slots + i, mask=i < slots, other=0.0)
    tl.store(DSinks + h, tl.sum(x, 0))


@triton.jit
def _ordered(x, COLUMNS: tl.constexpr):
    """A scratch tile as (64, COLUMNS)."""
    x = tl.reshape(x, [COLUMNS // 64, 4, 8, 8, 4, 2, 2])
    return tl.reshape(tl.permute(x, (1, 5, 3, 0, 2, 4, 6)), [64, COLUMNS])


@triton.jit
def _round(pid, Scratch, DQ, Part, DSinks, CuSeqlens, batch, seqlen, heads, tiles, slots, scale,
           D: tl.constexpr, D_TRUE: tl.constexpr, VARLEN: tl.constexpr):
    """dQ from scratch, 64 rows of a head, times the softmax scale; a head's first program sums its sink's parts."""
    tile = pid % tiles
    unit = pid // tiles
    h = unit % heads
    b = unit // heads
    if Part is not None:
        if (tile == 0) & (b == 0):
            _sum_parts(Part, DSinks, h, slots)
    length = seqlen
    start = 0
    t = tile
    if VARLEN:
        sequence, start, length, t = _find(CuSeqlens, batch, seqlen, tile, 64)
    row = t * 64 + tl.arange(0, 64)
    to = ((b * seqlen + start + row) * heads + h) * D_TRUE
    for c in tl.static_range(D // 64):
        x = tl.load(Scratch + pid * (64 * D) + c * 4096 + tl.arange(0, 4096))
        x = _ordered((x * scale).to(DQ.dtype.element_ty), 64)
        column = c * 64 + tl.arange(0, 64)
        inside = ((row < length) & (row >= 0))[:, None] & (column < D_TRUE)[None, :]
        tl.store(DQ + to[:, None] + column[None, :], x, mask=inside)


@triton.jit
def _add_shares(pid, Sums, DK, DV, CuSeqlens, batch, seqlen, heads_kv, tiles, SPLIT: tl.constexpr,
                WARPGROUPS: tl.constexpr, D: tl.constexpr, D_TRUE: tl.constexpr, VARLEN: tl.constexpr):
    """dK or dV of 64 keys, from what SPLIT programs found for their shares of the query heads."""
    which = pid % 2
    warpgroup = pid // 2 % WARPGROUPS
    place = pid // 2 // WARPGROUPS
    start = 0
    length = seqlen
    if VARLEN:
        head = place % heads_kv
        b = 0
        sequence, start, length, n = _find(CuSeqlens, batch, seqlen, place // heads_kv, 64 * WARPGROUPS)
    else:
        n = place % tiles
        head = place // tiles % heads_kv
        b = place // tiles // heads_kv
    first = (n * WARPGROUPS + warpgroup) * 64
    if first < length:
        total = tl.zeros([64 * D], tl.float32)
        for share in tl.static_range(SPLIT):
            at = (((place * SPLIT + share) * WARPGROUPS + warpgroup) * 2 + which) * (64 * D)
            total += tl.load(Sums + at + tl.arange(0, 64 * D))
        total = _ordered(total.to(DK.dtype.element_ty), D)
        row = first + tl.arange(0, 64)
        column = tl.arange(0, D)[None, :]
        inside = (row < length)[:, None] & (column < D_TRUE)
        to = ((b * seqlen + start + row) * heads_kv + head)[:, None] * D_TRUE + column
        if which == 0:
            tl.store(DK + to, total, mask=inside)
        else:
            tl.store(DV + to, total, mask=inside)


@triton.jit(do_not_specialize=["batch", "seqlen_q", "seqlen_k", "heads_q", "heads_kv", "tiles_q", "tiles_k", "slots",
                               "rounds"])
def hopper_bwd_finish_kernel(
    Scratch, DQ, Sums, DK, DV, Part, DSinks, CuSeqlensQ, CuSeqlensK, batch, seqlen_q, seqlen_k, heads_q, heads_kv,
    tiles_q, tiles_k, slots, rounds, scale,
    SPLIT: tl.constexpr, WARPGROUPS: tl.constexpr, D: tl.constexpr, D_TRUE: tl.constexpr, VARLEN: tl.constexpr,
):
    """What is left once all products are done: the first ``rounds`` programs make dQ of its sums where it was added up
    in Scratch, the others dK and dV of the parts in Sums where programs shared a group.

    tiles_q, tiles_k: of 64 queries, and of 64 * WARPGROUPS keys, in a sequence; of a packed batch the number of slots.
    """
    gdc_wait()
    pid = tl.program_id(0).to(tl.int64)
    if pid < rounds:
        if Scratch is not None:
            _round(pid, Scratch, DQ, Part, DSinks, CuSeqlensQ, batch, seqlen_q, heads_q, tiles_q, slots, scale, D,
                   D_TRUE, VARLEN)
    elif Sums is not None:
        _add_shares(pid - rounds, Sums, DK, DV, CuSeqlensK, batch, seqlen_k, heads_kv, tiles_k, SPLIT, WARPGROUPS, D,
                    D_TRUE, VARLEN)


@triton.jit(do_not_specialize=["batch", "seqlen", "heads_kv", "heads_q", "rows", "run", "runs", "slots"])
def hopper_bwd_join_kernel(
    Shared, DK, DV, Part, DSinks, CuSeqlens, batch, seqlen, heads_kv, heads_q, rows, run, runs, slots, scale,
    D: tl.constexpr, VARLEN: tl.constexpr,
):
    """dK or dV of one of the two blocks before a run, which that one and the run before have a part of; then the sinks.

    runs: of a sequence, of a packed batch the number of slots.
    """
    pid = tl.program_id(0)
    gdc_wait()
    blocks = runs * 4 * heads_kv
    if not VARLEN:
        blocks = (runs - 1) * 4 * heads_kv * batch
    if pid >= blocks:
        if Part is not None:
            _sum_parts(Part, DSinks, (pid - blocks).to(tl.int64), slots)
    else:
        head = pid % heads_kv
        rest = pid // heads_kv
        which = rest % 2
        e = (rest // 2) % 2
        number = rest // 4
        start = 0
        length = seqlen
        b = 0
        if VARLEN:
            sequence, start, length, r = _find(CuSeqlens, batch, seqlen, number, 64 * run)
            base = start // 64 + sequence
        else:
            r = number % (runs - 1) + 1
            b = number // (runs - 1)
            base = b * (rows // 64)
        if (r > 0) & (r * run * 64 < length):
            block = r * run - 2 + e
            at = ((base + block) * heads_kv + head).to(tl.int64) * (4 * 64 * D) + which * (64 * D)
            x = tl.arange(0, 64 * D)
            total = tl.load(Shared + at + x) + tl.load(Shared + at + 2 * 64 * D + x)
            total = _ordered(tl.where(which == 0, total * scale, total).to(DK.dtype.element_ty), D)
            row = block * 64 + tl.arange(0, 64)
            to = ((b * seqlen + start + row).to(tl.int64) * heads_kv + head)[:, None] * D + tl.arange(0, D)[None, :]
            if which == 0:
                tl.store(DK + to, total, mask=(row < length)[:, None])
            else:
                tl.store(DV + to, total, mask=(row < length)[:, None])
