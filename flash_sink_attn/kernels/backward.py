"""Backward kernels: dQ (with delta and the sinks' partial sums on its way), then dK and dV (which finish dsinks).

Each output element is written once by one program and every sum has a fixed order: no atomics, the same bits each run.
"""

from __future__ import annotations

from flash_sink_attn.kernels.common import (  # isort: skip
    LOG2E,
    dot,
    find_tile,
    load_tile,
    round_to,
    sequence_bounds,
    store_tile,
    stream_tile,
    visible,
    widen,
)

import triton
import triton.language as tl


@triton.jit
def _lse_log2(lse):
    """A row that sees no key and has no sink has lse = -inf; +inf makes its p = exp2(s - lse) vanish instead."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def _dq_loop(
    dq, dq2, q, q2, do, do2, lse2, delta, k_source, v_source, b, head, begin, end, position, len_k, stride_k, stride_v,
    window, scale_log2,
    BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_DV2: tl.constexpr, TMA: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):
    """Add the keys of [begin, end) to dq / scale."""
    MASKED: tl.constexpr = CAUSAL or WINDOW
    row = tl.arange(0, BLOCK_N)
    for n in tl.range(begin, end, BLOCK_N):
        key = n + row
        inside = key < len_k
        k = stream_tile(k_source, b, head, n, row, stride_k, inside, 0, BLOCK_N, BLOCK_D, D, MASKED, TMA)
        v = stream_tile(v_source, b, head, n, row, stride_v, inside, 0, BLOCK_N, BLOCK_DV, DV, MASKED, TMA)
        s = dot(q, tl.trans(k))
        dp = dot(do, tl.trans(v))
        if BLOCK_D2:
            k2 = stream_tile(k_source, b, head, n, row, stride_k, inside, BLOCK_D, BLOCK_N, BLOCK_D2, D, MASKED, TMA)
            s = dot(q2, tl.trans(k2), s)
        if BLOCK_DV2:
            v2 = stream_tile(v_source, b, head, n, row, stride_v, inside, BLOCK_DV, BLOCK_N, BLOCK_DV2, DV, MASKED, TMA)
            dp = dot(do2, tl.trans(v2), dp)
        p = tl.math.exp2(s * scale_log2 - lse2[:, None])
        if MASKED:
            p = tl.where(visible(position[:, None], key[None, :], window, CAUSAL, WINDOW), p, 0.0)
        ds = round_to(p * (dp - delta[:, None]), q.dtype)
        dq = dot(ds, k, dq)
        if BLOCK_D2:
            dq2 = dot(ds, k2, dq2)
    return dq, dq2


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qs", "stride_qh", "stride_kb", "stride_ks", "stride_kh", "stride_vb", "stride_vs", "stride_vh",
    "stride_gb", "stride_gs", "stride_gh", "stride_rows", "batch", "seqlen_q", "seqlen_k", "heads_kv", "num_tiles",
    "window",
])
def dq_kernel(
    Q, K, V, Sinks, O, DO, Lse, DLse, DQ, Lse2, Delta, SinkPartials, CuSeqlensQ, CuSeqlensK,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_rows,
    batch, seqlen_q, seqlen_k, heads_kv, num_tiles, window, scale, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_DV2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr, WINDOW: tl.constexpr, SPLIT_LOOPS: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: BLOCK_M query rows of one query head. Conventions as in fwd_kernel.

    DO: like O, by strides stride_g*. O, DQ: contiguous. Lse, DLse: float32 (batch, heads_q, seqlen_q), varlen
    (heads_q, total_q). SinkPartials: float32 (tiles, heads_q), the tile's share of dsinks. DLse, DQ, SinkPartials may
    be None. With TMA, K and V are descriptors of one (1, BLOCK_N, 1, head_dim) tile.

    Lse2, Delta: float32, what dkdv_kernel needs of each row: lse in units of log2 (+inf where lse is -inf and beyond
    the last row) and rowsum(o * do) - dlse. A head's rows are stride_rows * 16 apart; sequence b of a packed batch
    begins at row (start // 16 + b) * 16, which leaves each room to round its length up to a multiple of 16.
    """
    heads_q = heads_kv * GROUP
    stride_qs = stride_qs * STRIDE_UNIT
    stride_ks = stride_ks * STRIDE_UNIT
    stride_vs = stride_vs * STRIDE_UNIT
    stride_gs = stride_gs * STRIDE_UNIT
    pid = tl.program_id(0)
    head = pid % heads_q
    head_kv = head // GROUP
    if VARLEN:
        slot = pid // heads_q
        b, tile = find_tile(CuSeqlensQ, batch, seqlen_q, slot, 1, BLOCK_M)
        if b >= batch:
            if SinkPartials is not None:
                tl.store(SinkPartials + slot * heads_q + head, 0.0)
            return
        start_q, len_q = sequence_bounds(CuSeqlensQ, b, seqlen_q)
        start_k, len_k = sequence_bounds(CuSeqlensK, b, seqlen_k)
        tile = (len_q + BLOCK_M - 1) // BLOCK_M - 1 - tile
        q_origin = start_q.to(tl.int64) * stride_qs
        k_origin = start_k.to(tl.int64) * stride_ks
        v_origin = start_k.to(tl.int64) * stride_vs
        g_origin = start_q.to(tl.int64) * stride_gs
        o_token = start_q.to(tl.int64)
        lse_origin = head * seqlen_q.to(tl.int64) + o_token
        rows_origin = head * stride_rows.to(tl.int64) * 16 + (start_q // 16 + b) * 16
    else:
        b = (pid // heads_q) % batch
        tile = num_tiles - 1 - pid // (heads_q * batch)
        slot = b * num_tiles + tile
        len_q = seqlen_q
        len_k = seqlen_k
        q_origin = b.to(tl.int64) * stride_qb * STRIDE_UNIT
        k_origin = b.to(tl.int64) * stride_kb * STRIDE_UNIT
        v_origin = b.to(tl.int64) * stride_vb * STRIDE_UNIT
        g_origin = b.to(tl.int64) * stride_gb * STRIDE_UNIT
        o_token = b.to(tl.int64) * seqlen_q
        lse_origin = (b * heads_q + head).to(tl.int64) * seqlen_q
        rows_origin = (b * heads_q + head).to(tl.int64) * stride_rows * 16

    row = tl.arange(0, BLOCK_M)
    first = tile * BLOCK_M
    row_ok = first + row < len_q
    stride_os = heads_q * DV
    o_base = O + (o_token + first) * stride_os + head.to(tl.int64) * DV
    g_base = DO + g_origin + first.to(tl.int64) * stride_gs + head.to(tl.int64) * stride_gh * STRIDE_UNIT
    do = load_tile(g_base, row, stride_gs, row_ok, 0, BLOCK_DV, DV, True)
    o = load_tile(o_base, row, stride_os, row_ok, 0, BLOCK_DV, DV, True)
    delta = tl.sum(widen(o) * widen(do), 1)
    do2 = do
    if BLOCK_DV2:
        do2 = load_tile(g_base, row, stride_gs, row_ok, BLOCK_DV, BLOCK_DV2, DV, True)
        o2 = load_tile(o_base, row, stride_os, row_ok, BLOCK_DV, BLOCK_DV2, DV, True)
        delta += tl.sum(widen(o2) * widen(do2), 1)
    if DLse is not None:
        delta -= tl.load(DLse + lse_origin + first + row, mask=row_ok, other=0.0)
    lse2 = _lse_log2(tl.load(Lse + lse_origin + first + row, mask=row_ok, other=float("-inf")))
    inside = first + row < (len_q + 15) // 16 * 16
    tl.store(Lse2 + rows_origin + first + row, lse2, mask=inside)
    tl.store(Delta + rows_origin + first + row, delta, mask=inside)
    if SinkPartials is not None:
        sink = widen(tl.load(Sinks + head)) * LOG2E
        tl.store(SinkPartials + slot * heads_q + head, -tl.sum(tl.math.exp2(sink - lse2) * delta, 0))
    if DQ is not None:
        q_base = Q + q_origin + first.to(tl.int64) * stride_qs + head.to(tl.int64) * stride_qh * STRIDE_UNIT
        if TMA:
            k_source = K
            v_source = V
        else:
            k_source = K + k_origin + head_kv.to(tl.int64) * stride_kh * STRIDE_UNIT
            v_source = V + v_origin + head_kv.to(tl.int64) * stride_vh * STRIDE_UNIT
        q = load_tile(q_base, row, stride_qs, row_ok, 0, BLOCK_D, D, True)
        q2 = q
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dq2 = dq
        if BLOCK_D2:
            q2 = load_tile(q_base, row, stride_qs, row_ok, BLOCK_D, BLOCK_D2, D, True)
            dq2 = tl.zeros([BLOCK_M, BLOCK_D2], tl.float32)

        offset = len_k - len_q
        earliest = first + offset
        position = earliest + row
        latest = tl.minimum(first + BLOCK_M, len_q) - 1 + offset
        begin = 0
        if WINDOW:
            begin = tl.maximum(earliest - window + 1, 0)
        end = tl.maximum(latest + 1, 0)
        if SPLIT_LOOPS:
            edge = begin
            if WINDOW:
                edge = tl.minimum(begin + tl.cdiv(tl.maximum(latest + 1 - window - begin, 0), BLOCK_N) * BLOCK_N, end)
                dq, dq2 = _dq_loop(
                    dq, dq2, q, q2, do, do2, lse2, delta, k_source, v_source, b, head_kv, begin, edge, position, len_k,
                    stride_ks, stride_vs, window, scale_log2, BLOCK_N, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2,
                    TMA, WINDOW == 2,
                    True)
            diagonal = tl.maximum(begin + tl.maximum((earliest + 1 - begin) // BLOCK_N, 0) * BLOCK_N, edge)
            dq, dq2 = _dq_loop(
                dq, dq2, q, q2, do, do2, lse2, delta, k_source, v_source, b, head_kv, edge, diagonal, position, len_k,
                stride_ks, stride_vs, window, scale_log2, BLOCK_N, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2, TMA,
                False, False)
            dq, dq2 = _dq_loop(
                dq, dq2, q, q2, do, do2, lse2, delta, k_source, v_source, b, head_kv, diagonal, end, position, len_k,
                stride_ks, stride_vs, window, scale_log2, BLOCK_N, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2, TMA,
                True, WINDOW == 2)
        else:
            dq, dq2 = _dq_loop(
                dq, dq2, q, q2, do, do2, lse2, delta, k_source, v_source, b, head_kv, begin, end, position, len_k,
                stride_ks, stride_vs, window, scale_log2, BLOCK_N, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2, TMA,
                True, WINDOW > 0)
        stride_dq = heads_q * D
        dq_base = DQ + (o_token + first) * stride_dq + head.to(tl.int64) * D
        store_tile(dq_base, row, stride_dq, row_ok, dq * scale, 0, BLOCK_D, D)
        if BLOCK_D2:
            store_tile(dq_base, row, stride_dq, row_ok, dq2 * scale, BLOCK_D, BLOCK_D2, D)


@triton.jit
def _row_statistics(lse_base, delta_base, member, start, len_q, stride_rows, BLOCK_M: tl.constexpr):
    """lse2 and delta of BLOCK_M rows of the group's head ``member``; p = exp2(s - lse2) vanishes beyond len_q.

    Every offset and bound is a multiple of 16, as dq_kernel lays them out, so that threads load vectors.
    """
    row = start + tl.arange(0, BLOCK_M)
    inside = row < (len_q + 15) // 16 * 16
    head = member * stride_rows.to(tl.int64)
    lse2 = tl.load(lse_base + head + row, mask=inside, other=float("inf"))
    return lse2, tl.load(delta_base + head + row, mask=inside, other=0.0)


@triton.jit
def _dkdv_loop(
    dk, dk2, dv, dv2, k, k2, v, v2, q_source, g_source, lse_base, delta_base, b, head, first_m, tiles, key, len_q,
    offset,
    stride_rows, stride_qs, stride_qh, stride_gs, stride_gh, window, scale_log2,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_DV2: tl.constexpr, TMA: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Add ``tiles`` query tiles from row first_m on, of every head of the group, to dk / scale and dv.

    head: the group's first query head.
    """
    row = tl.arange(0, BLOCK_M)
    steps = tiles * GROUP
    if steps > 0:
        # The row statistics of the next tile are loaded while this one is worked on: they are too small for the
        # compiler to pipeline, and waiting for them would stall every step.
        lse2, delta = _row_statistics(lse_base, delta_base, 0, first_m, len_q, stride_rows, BLOCK_M)
        # One flat loop over (head, tile): a nested one would drain the load pipeline at every head.
        for i in tl.range(0, steps):
            member = i // tiles
            start = first_m + (i % tiles) * BLOCK_M
            query = start + row
            row_ok = query < len_q
            if TMA:
                q_tile = q_source
                g_tile = g_source
            else:
                q_tile = q_source + member * stride_qh.to(tl.int64)
                g_tile = g_source + member * stride_gh.to(tl.int64)
            # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
            q = stream_tile(q_tile, b, head + member, start, row, stride_qs, row_ok, 0, BLOCK_M, BLOCK_D, D, True, TMA)
            do = stream_tile(g_tile, b, head + member, start, row, stride_gs, row_ok, 0, BLOCK_M, BLOCK_DV, DV, True,
                             TMA)
            # [BLOCK_N, BLOCK_M]
            s = dot(k, tl.trans(q))
            dp = dot(v, tl.trans(do))
            if BLOCK_D2:
                q2 = load_tile(q_tile + start * stride_qs.to(tl.int64), row, stride_qs, row_ok, BLOCK_D, BLOCK_D2, D,
                               True)
                s = dot(k2, tl.trans(q2), s)
            if BLOCK_DV2:
                do2 = load_tile(g_tile + start * stride_gs.to(tl.int64), row, stride_gs, row_ok, BLOCK_DV, BLOCK_DV2,
                                DV, True)
                dp = dot(v2, tl.trans(do2), dp)
            p = tl.math.exp2(s * scale_log2 - lse2[None, :])
            if CAUSAL or WINDOW:
                p = tl.where(visible((query + offset)[None, :], key[:, None], window, CAUSAL, WINDOW), p, 0.0)
            p_half = round_to(p, k.dtype)
            dv = dot(p_half, do, dv)
            if BLOCK_DV2:
                dv2 = dot(p_half, do2, dv2)
            ds = round_to(p * (dp - delta[None, :]), k.dtype)
            following = tl.minimum(i + 1, steps - 1)
            lse2, delta = _row_statistics(
                lse_base, delta_base, following // tiles, first_m + (following % tiles) * BLOCK_M, len_q, stride_rows,
                BLOCK_M)
            dk = dot(ds, q, dk)
            if BLOCK_D2:
                dk2 = dot(ds, q2, dk2)
    return dk, dk2, dv, dv2


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qs", "stride_qh", "stride_kb", "stride_ks", "stride_kh", "stride_vb", "stride_vs", "stride_vh",
    "stride_gb", "stride_gs", "stride_gh", "stride_rows", "batch", "seqlen_q", "seqlen_k", "heads_kv", "num_tiles",
    "num_partials",
    "window",
])
def dkdv_kernel(
    Q, K, V, DO, Lse2, Delta, DK, DV_, SinkPartials, DSinks, CuSeqlensQ, CuSeqlensK,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_rows,
    batch, seqlen_q, seqlen_k, heads_kv, num_tiles, num_partials, window, scale, scale_log2,
    GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_DV2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, VARLEN: tl.constexpr, WINDOW: tl.constexpr, SPLIT_LOOPS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, TMA: tl.constexpr,
):
    """One program: BLOCK_N keys of one key head, summed over the query heads of its group.

    With TMA, Q and DO are descriptors of one (1, BLOCK_M, 1, head_dim) tile. DK, DV_: contiguous. Lse2, Delta: as
    dq_kernel leaves them. SinkPartials (num_partials, heads_q) is summed into DSinks (heads_q,) by the last program of
    each key head, which has the least work under a causal mask; both may be None.
    """
    heads_q = heads_kv * GROUP
    stride_qs = stride_qs * STRIDE_UNIT
    stride_qh = stride_qh * STRIDE_UNIT
    stride_ks = stride_ks * STRIDE_UNIT
    stride_vs = stride_vs * STRIDE_UNIT
    stride_gs = stride_gs * STRIDE_UNIT
    stride_gh = stride_gh * STRIDE_UNIT
    stride_rows = stride_rows * 16
    pid = tl.program_id(0)
    head_kv = pid % heads_kv
    if DSinks is not None:
        if pid >= tl.num_programs(0) - heads_kv:
            member = tl.arange(0, BLOCK_GROUP)
            total = tl.zeros([128, BLOCK_GROUP], tl.float32)
            for i in range(0, num_partials, 128):
                at = i + tl.arange(0, 128)
                total += tl.load(
                    SinkPartials + at[:, None] * heads_q + (head_kv * GROUP + member)[None, :],
                    mask=(at < num_partials)[:, None] & (member < GROUP)[None, :], other=0.0)
            dsinks = tl.sum(total, 0)
            tl.store(DSinks + head_kv * GROUP + member, round_to(dsinks, DSinks.dtype.element_ty), mask=member < GROUP)
    if VARLEN:
        b, tile = find_tile(CuSeqlensK, batch, seqlen_k, pid // heads_kv, 1, BLOCK_N)
        if b >= batch:
            return
        start_q, len_q = sequence_bounds(CuSeqlensQ, b, seqlen_q)
        start_k, len_k = sequence_bounds(CuSeqlensK, b, seqlen_k)
        q_origin = start_q.to(tl.int64) * stride_qs
        g_origin = start_q.to(tl.int64) * stride_gs
        k_origin = start_k.to(tl.int64) * stride_ks
        v_origin = start_k.to(tl.int64) * stride_vs
        k_token = start_k.to(tl.int64)
        rows_origin = (head_kv * GROUP) * stride_rows.to(tl.int64) + (start_q // 16 + b) * 16
    else:
        b = (pid // heads_kv) % batch
        tile = pid // (heads_kv * batch)
        len_q = seqlen_q
        len_k = seqlen_k
        q_origin = b.to(tl.int64) * stride_qb * STRIDE_UNIT
        g_origin = b.to(tl.int64) * stride_gb * STRIDE_UNIT
        k_origin = b.to(tl.int64) * stride_kb * STRIDE_UNIT
        v_origin = b.to(tl.int64) * stride_vb * STRIDE_UNIT
        k_token = b.to(tl.int64) * seqlen_k
        rows_origin = (b * heads_q + head_kv * GROUP).to(tl.int64) * stride_rows

    row = tl.arange(0, BLOCK_N)
    first = tile * BLOCK_N
    key = first + row
    row_ok = key < len_k
    k_base = K + k_origin + first.to(tl.int64) * stride_ks + head_kv.to(tl.int64) * stride_kh * STRIDE_UNIT
    v_base = V + v_origin + first.to(tl.int64) * stride_vs + head_kv.to(tl.int64) * stride_vh * STRIDE_UNIT
    if TMA:
        q_source = Q
        g_source = DO
    else:
        q_source = Q + q_origin + (head_kv * GROUP).to(tl.int64) * stride_qh
        g_source = DO + g_origin + (head_kv * GROUP).to(tl.int64) * stride_gh
    lse_base = Lse2 + rows_origin
    delta_base = Delta + rows_origin
    k = load_tile(k_base, row, stride_ks, row_ok, 0, BLOCK_D, D, True)
    v = load_tile(v_base, row, stride_vs, row_ok, 0, BLOCK_DV, DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    k2, v2, dk2, dv2 = k, v, dk, dv
    if BLOCK_D2:
        k2 = load_tile(k_base, row, stride_ks, row_ok, BLOCK_D, BLOCK_D2, D, True)
        dk2 = tl.zeros([BLOCK_N, BLOCK_D2], tl.float32)
    if BLOCK_DV2:
        v2 = load_tile(v_base, row, stride_vs, row_ok, BLOCK_DV, BLOCK_DV2, DV, True)
        dv2 = tl.zeros([BLOCK_N, BLOCK_DV2], tl.float32)

    # Query rows that see any of these keys: [begin, end), in query coordinates, begin aligned for _row_statistics.
    offset = len_k - len_q
    begin = tl.minimum(tl.maximum(first - offset, 0), len_q) // 16 * 16
    end = len_q
    if WINDOW:
        end = tl.maximum(tl.minimum(first + BLOCK_N - 1 - offset + window, len_q), begin)
    tiles = tl.cdiv(end - begin, BLOCK_M)
    if SPLIT_LOOPS:
        # tiles whose first row comes before the last of these keys
        cut = tl.minimum(tl.cdiv(tl.maximum(first + BLOCK_N - 1 - offset - begin, 0), BLOCK_M), tiles)
        dk, dk2, dv, dv2 = _dkdv_loop(
            dk, dk2, dv, dv2, k, k2, v, v2, q_source, g_source, lse_base, delta_base, b, head_kv * GROUP, begin, cut,
            key, len_q, offset,
            stride_rows, stride_qs, stride_qh, stride_gs, stride_gh, window, scale_log2,
            GROUP, BLOCK_M, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2, TMA, True, WINDOW == 2)
        begin += cut * BLOCK_M
        tiles -= cut
        cut = tiles
        if WINDOW:
            # tiles whose last row still sees the first of these keys
            cut = tl.minimum(tl.maximum((first - offset + window - begin) // BLOCK_M, 0), tiles)
        dk, dk2, dv, dv2 = _dkdv_loop(
            dk, dk2, dv, dv2, k, k2, v, v2, q_source, g_source, lse_base, delta_base, b, head_kv * GROUP, begin, cut,
            key, len_q, offset,
            stride_rows, stride_qs, stride_qh, stride_gs, stride_gh, window, scale_log2,
            GROUP, BLOCK_M, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2, TMA, False, False)
        if WINDOW:
            dk, dk2, dv, dv2 = _dkdv_loop(
                dk, dk2, dv, dv2, k, k2, v, v2, q_source, g_source, lse_base, delta_base, b, head_kv * GROUP,
                begin + cut * BLOCK_M,
                tiles - cut, key, len_q, offset, stride_rows, stride_qs, stride_qh, stride_gs, stride_gh, window,
                scale_log2, GROUP, BLOCK_M, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2, TMA, False, True)
    else:
        dk, dk2, dv, dv2 = _dkdv_loop(
            dk, dk2, dv, dv2, k, k2, v, v2, q_source, g_source, lse_base, delta_base, b, head_kv * GROUP, begin,
            tiles, key, len_q, offset,
            stride_rows, stride_qs, stride_qh, stride_gs, stride_gh, window, scale_log2,
            GROUP, BLOCK_M, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2, TMA, True, WINDOW > 0)

    stride_dk = heads_kv * D
    stride_dv = heads_kv * DV
    dk_base = DK + (k_token + first) * stride_dk + head_kv.to(tl.int64) * D
    dv_base = DV_ + (k_token + first) * stride_dv + head_kv.to(tl.int64) * DV
    store_tile(dk_base, row, stride_dk, row_ok, dk * scale, 0, BLOCK_D, D)
    store_tile(dv_base, row, stride_dv, row_ok, dv, 0, BLOCK_DV, DV)
    if BLOCK_D2:
        store_tile(dk_base, row, stride_dk, row_ok, dk2 * scale, BLOCK_D, BLOCK_D2, D)
    if BLOCK_DV2:
        store_tile(dv_base, row, stride_dv, row_ok, dv2, BLOCK_DV, BLOCK_DV2, DV)
