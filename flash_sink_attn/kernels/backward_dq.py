"""Backward, first kernel: dQ, and on its way delta = rowsum(o do) - dlse and each tile's share of dsinks.

Each output element is written once by one program and every sum has a fixed order: no atomics, the same bits each run.
"""

from __future__ import annotations

from flash_sink_attn.kernels.common import (  # isort: skip
    CLIP,
    CLIPPING,
    LOG2E,
    dot,
    find_sequence,
    in_registers,
    load_tile,
    opaque,
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
    dq, dq2, q, q2, do, do2, lse2, delta, k_source, v_source, b, origin, head, begin, end, position, edge, diagonal,
    len_k, stride_k, stride_v, window, scale_log2,
    BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_DV2: tl.constexpr, TMA: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BRANCH_MASKS: tl.constexpr, STAGES: tl.constexpr,
):
    """Add the keys of [begin, end) to dq / scale; arguments as in the forward's loop."""
    MASKED: tl.constexpr = CAUSAL or WINDOW
    row = tl.arange(0, BLOCK_N)
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        key = n + row
        inside = key < len_k
        k = stream_tile(k_source, b, origin, head, n, row, stride_k, inside, 0, BLOCK_N, BLOCK_D, D, MASKED, TMA)
        v = stream_tile(v_source, b, origin, head, n, row, stride_v, inside, 0, BLOCK_N, BLOCK_DV, DV, MASKED, TMA)
        s = dot(q, tl.trans(k))
        dp = dot(do, tl.trans(v))
        if BLOCK_D2:
            k2 = stream_tile(k_source, b, origin, head, n, row, stride_k, inside, BLOCK_D, BLOCK_N, BLOCK_D2, D,
                             MASKED, TMA)
            s = dot(q2, tl.trans(k2), s)
        if BLOCK_DV2:
            v2 = stream_tile(v_source, b, origin, head, n, row, stride_v, inside, BLOCK_DV, BLOCK_N, BLOCK_DV2, DV,
                             MASKED, TMA)
            dp = dot(do2, tl.trans(v2), dp)
        p = tl.math.exp2(s * scale_log2 - lse2[:, None])
        if MASKED and not BRANCH_MASKS:
            p = tl.where(visible(position[:, None], key[None, :], window, CAUSAL, WINDOW), p, 0.0)
        ds = p * (dp - delta[:, None])
        if BRANCH_MASKS:
            # (here and not at p: a branch waits for both products, which otherwise overlap with the exponentials)
            if WINDOW:
                if n < edge:
                    ds = tl.where(key[None, :] > (position - opaque(window))[:, None], ds, 0.0)
            if n + BLOCK_N > diagonal:
                ds = tl.where((opaque(n) + row)[None, :] <= position[:, None], ds, 0.0)
        ds = round_to(ds, q.dtype)
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
    GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_DV2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, VARLEN: tl.constexpr, WINDOW: tl.constexpr, PACK_GQA: tl.constexpr,
    SPLIT_LOOPS: tl.constexpr, BRANCH_MASKS: tl.constexpr, STRIDE_UNIT: tl.constexpr, TMA: tl.constexpr,
    OWN_TMA: tl.constexpr, REGISTER_A: tl.constexpr,
):
    """One program: BLOCK_M query rows of one head, or of all heads of a group when PACK_GQA. As fwd_kernel, and:

    DO: like O, by strides stride_g*; with OWN_TMA a descriptor like Q's. O, DQ: contiguous. Lse, DLse: float32 (batch,
    heads_q, seqlen_q), varlen (heads_q, total_q). SinkPartials: float32 (tiles, heads_q), the tile's share of dsinks.
    DLse, DQ, SinkPartials may be None.

    Lse2, Delta: float32, what dkdv_kernel needs of each row: lse in units of log2 (+inf where lse is -inf and beyond
    the last row) and rowsum(o * do) - dlse. A head's rows are stride_rows * 16 apart; sequence b of a packed batch
    begins at row (start // 16 + b) * 16, which leaves each room to round its length up to a multiple of 16.
    """
    ROWS_PER_TOKEN: tl.constexpr = GROUP if PACK_GQA else 1
    heads_q = heads_kv * GROUP
    heads = heads_kv if PACK_GQA else heads_q
    stride_qs = stride_qs * STRIDE_UNIT
    stride_qh = stride_qh * STRIDE_UNIT
    stride_ks = stride_ks * STRIDE_UNIT
    stride_vs = stride_vs * STRIDE_UNIT
    stride_gs = stride_gs * STRIDE_UNIT
    stride_gh = stride_gh * STRIDE_UNIT
    stride_rows = stride_rows * 16
    in_group = tl.arange(0, BLOCK_GROUP)
    pid = tl.program_id(0)
    head = pid % heads
    if VARLEN:
        slot = pid // heads
        b, start_q, len_q, tile = find_sequence(CuSeqlensQ, batch, seqlen_q, slot, ROWS_PER_TOKEN, BLOCK_M)
        tiles = (len_q * ROWS_PER_TOKEN + BLOCK_M - 1) // BLOCK_M
        tile = tiles - 1 - tile
        if (tile < 0) | (tile >= tiles):
            if SinkPartials is not None:
                at = SinkPartials + slot * heads_q + head * ROWS_PER_TOKEN
                tl.store(at + in_group, tl.zeros([BLOCK_GROUP], tl.float32), mask=in_group < ROWS_PER_TOKEN)
            return
        start_k = start_q
        len_k = len_q
        if CuSeqlensK is not None:
            start_k, len_k = sequence_bounds(CuSeqlensK, b, seqlen_k)
        q_origin = start_q.to(tl.int64) * stride_qs
        k_origin = start_k.to(tl.int64) * stride_ks
        v_origin = start_k.to(tl.int64) * stride_vs
        g_origin = start_q.to(tl.int64) * stride_gs
        o_token = start_q.to(tl.int64)
        q_tma = 0
        q_token = start_q
        k_tma = start_k + len_k
        k_token = CLIP - len_k
        first_lse = o_token
        first_stat = (start_q // 16 + b) * 16
    else:
        b = (pid // heads) % batch
        tile = num_tiles - 1 - pid // (heads * batch)
        slot = b * num_tiles + tile
        len_q = seqlen_q
        len_k = seqlen_k
        q_origin = b.to(tl.int64) * stride_qb * STRIDE_UNIT
        k_origin = b.to(tl.int64) * stride_kb * STRIDE_UNIT
        v_origin = b.to(tl.int64) * stride_vb * STRIDE_UNIT
        g_origin = b.to(tl.int64) * stride_gb * STRIDE_UNIT
        o_token = b.to(tl.int64) * seqlen_q
        q_tma = b
        k_tma = b
        q_token = 0
        k_token = 0
        first_lse = b.to(tl.int64) * heads_q * seqlen_q
        first_stat = b.to(tl.int64) * heads_q * stride_rows

    row = tl.arange(0, BLOCK_M)
    first = tile * BLOCK_M // ROWS_PER_TOKEN
    if PACK_GQA:
        head_kv = head
        token = (tile * BLOCK_M + row) // GROUP - first
        member = (tile * BLOCK_M + row) % GROUP
        head_q = head * GROUP + member
    else:
        head_kv = head // GROUP
        token = row
        member = 0
        head_q = head
    row_ok = first + token < len_q

    # The first head's rows of the tile, and each row's distance from there.
    first_head = (head_kv * GROUP if PACK_GQA else head).to(tl.int64)
    stride_os = heads_q * DV
    o_base = O + (o_token + first) * stride_os + first_head * DV
    o_row = token * stride_os + member * DV
    # All loads come before anything waits for one; but q in two parts, held so long, leaves the rest too few registers.
    LATE_Q: tl.constexpr = BLOCK_D2 > 0
    q_base = Q
    g_base = DO
    if OWN_TMA:
        if PACK_GQA:
            q = Q.load([q_tma, q_token + first, head_kv, 0, 0]).reshape([BLOCK_M, BLOCK_D])
            do = DO.load([q_tma, q_token + first, head_kv, 0, 0]).reshape([BLOCK_M, BLOCK_DV])
        else:
            q = Q.load([q_tma, q_token + first, head, 0]).reshape([BLOCK_M, BLOCK_D])
            do = DO.load([q_tma, q_token + first, head, 0]).reshape([BLOCK_M, BLOCK_DV])
    else:
        q_base = Q + q_origin + first.to(tl.int64) * stride_qs + first_head * stride_qh
        g_base = DO + g_origin + first.to(tl.int64) * stride_gs + first_head * stride_gh
        g_row = token * stride_gs + member * stride_gh
        q_row = token * stride_qs + member * stride_qh
        if not LATE_Q:
            q = load_tile(q_base, q_row, 1, row_ok, 0, BLOCK_D, D, True)
        do = load_tile(g_base, g_row, 1, row_ok, 0, BLOCK_DV, DV, True)
    o = load_tile(o_base, o_row, 1, row_ok, 0, BLOCK_DV, DV, True)
    lse_at = first_lse + first_head * seqlen_q + first + (member * seqlen_q.to(tl.int64) + token)
    lse = tl.load(Lse + lse_at, mask=row_ok, other=float("-inf"))
    delta = tl.sum(widen(o) * widen(do), 1)
    do2 = do
    if BLOCK_DV2:
        do2 = load_tile(g_base, g_row, 1, row_ok, BLOCK_DV, BLOCK_DV2, DV, True)
        o2 = load_tile(o_base, o_row, 1, row_ok, BLOCK_DV, BLOCK_DV2, DV, True)
        delta += tl.sum(widen(o2) * widen(do2), 1)
    if DLse is not None:
        delta -= tl.load(DLse + lse_at, mask=row_ok, other=0.0)
    if OWN_TMA:
        # (rows that do not exist may be those of the next packed sequence)
        delta = tl.where(row_ok, delta, 0.0)
    lse2 = _lse_log2(lse)
    stat_at = first_stat + first_head * stride_rows + first + (member * stride_rows.to(tl.int64) + token)
    rounded = (len_q + 15) // 16 * 16
    if PACK_GQA:
        tl.store(Lse2 + stat_at, lse2, mask=row_ok)
        tl.store(Delta + stat_at, delta, mask=row_ok)
        if (tile + 1) * BLOCK_M >= len_q * GROUP:
            beyond = len_q + tl.arange(0, 16)
            at = first_stat + (head_kv * GROUP + in_group)[:, None] * stride_rows.to(tl.int64) + beyond[None, :]
            inside = (in_group < GROUP)[:, None] & (beyond < rounded)[None, :]
            tl.store(Lse2 + at, tl.full([BLOCK_GROUP, 16], float("inf"), tl.float32), mask=inside)
            tl.store(Delta + at, tl.zeros([BLOCK_GROUP, 16], tl.float32), mask=inside)
    else:
        tl.store(Lse2 + stat_at, lse2, mask=first + row < rounded)
        tl.store(Delta + stat_at, delta, mask=first + row < rounded)
    if SinkPartials is not None:
        share = -tl.math.exp2(widen(tl.load(Sinks + head_q)) * LOG2E - lse2) * delta
        if PACK_GQA:
            if BLOCK_GROUP == GROUP and BLOCK_M % GROUP == 0:
                shares = tl.sum(share.reshape([BLOCK_M // GROUP, GROUP]), 0)
            else:
                shares = tl.sum(tl.where(member[:, None] == in_group[None, :], share[:, None], 0.0), 0)
            tl.store(SinkPartials + slot * heads_q + head_kv * GROUP + in_group, shares, mask=in_group < GROUP)
        else:
            tl.store(SinkPartials + slot * heads_q + head, tl.sum(share, 0))
    if DQ is not None:
        STREAM: tl.constexpr = (CLIPPING if VARLEN else 1) if TMA else 0
        k_rows = K
        v_rows = V
        if not TMA:
            k_rows = K + k_origin + head_kv.to(tl.int64) * stride_kh * STRIDE_UNIT
            v_rows = V + v_origin + head_kv.to(tl.int64) * stride_vh * STRIDE_UNIT
        if LATE_Q:
            q = load_tile(q_base, q_row, 1, row_ok, 0, BLOCK_D, D, True)
        q = in_registers(q, row_ok, REGISTER_A and not OWN_TMA)
        do = in_registers(do, row_ok, REGISTER_A and not OWN_TMA)
        q2 = q
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dq2 = dq
        if BLOCK_D2:
            q2 = in_registers(load_tile(q_base, q_row, 1, row_ok, BLOCK_D, BLOCK_D2, D, True), row_ok, REGISTER_A)
            dq2 = tl.zeros([BLOCK_M, BLOCK_D2], tl.float32)
        if BLOCK_DV2:
            do2 = in_registers(do2, row_ok, REGISTER_A)

        offset = len_k - len_q
        earliest = first + offset
        position = earliest + token
        latest = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // ROWS_PER_TOKEN, len_q - 1) + offset
        begin = 0
        if WINDOW:
            begin = tl.maximum(earliest - window + 1, 0)
        end = tl.maximum(latest + 1, 0)
        edge = latest - window + 1
        diagonal = earliest + 1
        if SPLIT_LOOPS:
            cut = begin
            if WINDOW:
                cut = tl.minimum(begin + tl.cdiv(tl.maximum(edge - begin, 0), BLOCK_N) * BLOCK_N, end)
                dq, dq2 = _dq_loop(
                    dq, dq2, q, q2, do, do2, lse2, delta, k_rows, v_rows, k_tma, k_token, head_kv, begin, cut,
                    position, edge, diagonal, len_k, stride_ks, stride_vs, window, scale_log2, BLOCK_N, D, DV, BLOCK_D,
                    BLOCK_D2, BLOCK_DV, BLOCK_DV2, STREAM, WINDOW == 2, True, False, None)
            last = tl.maximum(begin + tl.maximum((diagonal - begin) // BLOCK_N, 0) * BLOCK_N, cut)
            dq, dq2 = _dq_loop(
                dq, dq2, q, q2, do, do2, lse2, delta, k_rows, v_rows, k_tma, k_token, head_kv, cut, last,
                position, edge, diagonal, len_k, stride_ks, stride_vs, window, scale_log2, BLOCK_N, D, DV, BLOCK_D,
                BLOCK_D2, BLOCK_DV, BLOCK_DV2, STREAM, False, False, False, None)
            dq, dq2 = _dq_loop(
                dq, dq2, q, q2, do, do2, lse2, delta, k_rows, v_rows, k_tma, k_token, head_kv, last, end,
                position, edge, diagonal, len_k, stride_ks, stride_vs, window, scale_log2, BLOCK_N, D, DV, BLOCK_D,
                BLOCK_D2, BLOCK_DV, BLOCK_DV2, STREAM, True, WINDOW == 2, False, None)
        else:
            dq, dq2 = _dq_loop(
                dq, dq2, q, q2, do, do2, lse2, delta, k_rows, v_rows, k_tma, k_token, head_kv, begin, end, position,
                edge, diagonal, len_k, stride_ks, stride_vs, window, scale_log2, BLOCK_N, D, DV, BLOCK_D, BLOCK_D2,
                BLOCK_DV, BLOCK_DV2, STREAM, True, WINDOW > 0, BRANCH_MASKS, None)
        stride_dq = heads_q * D
        dq_base = DQ + (o_token + first) * stride_dq + first_head * D
        dq_row = token * stride_dq + member * D
        store_tile(dq_base, dq_row, 1, row_ok, dq * scale, 0, BLOCK_D, D)
        if BLOCK_D2:
            store_tile(dq_base, dq_row, 1, row_ok, dq2 * scale, BLOCK_D, BLOCK_D2, D)
