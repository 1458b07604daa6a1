"""Backward, second kernel: dK and dV, and the sum of the dsinks that the dQ kernel left in parts.

Each output element is written once by one program and every sum has a fixed order: no atomics, the same bits each run.
"""

from __future__ import annotations

from flash_sink_attn.kernels.common import (  # isort: skip
    CLIP,
    CLIPPING,
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
)

import triton
import triton.language as tl


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
def _stream_rows(source, b, head, first, BLOCK_M: tl.constexpr, TMA: tl.constexpr):
    """A row statistic of BLOCK_M rows through its descriptor."""
    if TMA == CLIPPING:
        return source.load([CLIP // 4, b, head, first]).reshape([BLOCK_M])
    else:
        return source.load([b, head, first]).reshape([BLOCK_M])


@triton.jit
def _keep_columns(eights, first, key, FROM: tl.constexpr):
    """``eights``, (rows, columns / 8, 8), where first + column >= its row's ``key`` (FROM) or is less than it, else 0.

    Eights of columns are a thread's registers and the rest of them its lane, as the matrix instruction leaves its
    result: so each comparison is with a constant. Compared with their own numbers, all columns of a thread take a
    register each: at head dim 128 under a window they spill, and the kernel takes 1.16 of the time. Where there is one
    comparison, or registers to spare (also in the forward and dQ), it is the other way round, by 1 to 7%.
    """
    COUNT: tl.constexpr = eights.shape[1]
    column = (8 * tl.arange(0, COUNT))[None, :, None]
    left = key[:, None, None] - (first + tl.arange(0, 8))[None, None, :]
    kept = column >= left if FROM else column < left
    return tl.where(kept, eights, 0.0)


@triton.jit
def divide(i, by, inverse):
    """i // by and i % by of an int32 ``i`` >= 0, where ``inverse`` is (2**32 - 1) // by as uint32.

    The product is the quotient or one less. The compiler's division is some thirty of a step's four hundred
    instructions.
    """
    quotient = tl.umulhi(tl.cast(i, tl.uint32), inverse).to(tl.int32)
    rest = i - quotient * by
    return tl.where(rest < by, quotient, quotient + 1), tl.where(rest < by, rest, rest - by)


@triton.jit
def _dkdv_loop(
    dk, dk2, dv, dv2, k, k2, v, v2, q_source, g_source, lse_source, delta_source, b, origin, stat_b, stat_origin, head,
    first_m, tiles, key, first_key, last_key, len_q, offset, stride_rows, stride_qs, stride_qh, stride_gs, stride_gh,
    window, scale_log2,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_DV2: tl.constexpr, TMA: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, BRANCH_MASKS: tl.constexpr, STAGES: tl.constexpr,
):
    """Add ``tiles`` query tiles from row first_m on, of every head of the group, to dk / scale and dv.

    head: the group's first query head. b, origin, stat_b, stat_origin: where the descriptors of TMA have the
    sequence's row 0. STAGES: depth of the load pipeline, None for the launch's.
    """
    row = tl.arange(0, BLOCK_M)
    steps = tiles * GROUP
    if steps > 0:
        inverse = tl.full([], 0xFFFFFFFF, tl.uint32) // tiles.to(tl.uint32)
        if not TMA:
            # The row statistics of the next tile are loaded while this one is worked on: they are too small for the
            # compiler to pipeline, and waiting for them would stall every step.
            lse2, delta = _row_statistics(lse_source, delta_source, 0, first_m, len_q, stride_rows, BLOCK_M)
        # One flat loop over (head, tile): a nested one would drain the load pipeline at every head.
        for i in tl.range(0, steps, num_stages=STAGES):
            member, tile = divide(i, tiles, inverse)
            start = first_m + tile * BLOCK_M
            query = start + row
            row_ok = query < len_q
            q_tile = q_source
            g_tile = g_source
            if TMA:
                lse2 = _stream_rows(lse_source, stat_b, head + member, stat_origin + start, BLOCK_M, TMA)
                delta = _stream_rows(delta_source, stat_b, head + member, stat_origin + start, BLOCK_M, TMA)
            else:
                q_tile = q_source + member * stride_qh.to(tl.int64)
                g_tile = g_source + member * stride_gh.to(tl.int64)
            # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
            q = stream_tile(q_tile, b, origin, head + member, start, row, stride_qs, row_ok, 0, BLOCK_M, BLOCK_D, D,
                            True, TMA)
            do = stream_tile(g_tile, b, origin, head + member, start, row, stride_gs, row_ok, 0, BLOCK_M, BLOCK_DV,
                             DV, True, TMA)
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
            if BRANCH_MASKS and WINDOW:
                BLOCK_N: tl.constexpr = p.shape[0]
                eights = p.reshape([BLOCK_N, BLOCK_M // 8, 8])  # (in the branches Triton 3.9 cannot compile it)
                if start + offset < last_key:
                    eights = _keep_columns(eights, offset + opaque(start), key, True)
                if start + BLOCK_M + offset - window > first_key:
                    eights = _keep_columns(eights, start + offset - opaque(window), key, False)
                p = eights.reshape([BLOCK_N, BLOCK_M])
            elif BRANCH_MASKS:
                if start + offset < last_key:
                    p = tl.where((row + (offset + opaque(start)))[None, :] >= key[:, None], p, 0.0)
            elif CAUSAL or WINDOW:
                p = tl.where(visible((query + offset)[None, :], key[:, None], window, CAUSAL, WINDOW), p, 0.0)
            p_half = round_to(p, k.dtype)
            dv = dot(p_half, do, dv)
            if BLOCK_DV2:
                dv2 = dot(p_half, do2, dv2)
            ds = round_to(p * (dp - delta[None, :]), k.dtype)
            if not TMA:
                following, tile = divide(tl.minimum(i + 1, steps - 1), tiles, inverse)
                lse2, delta = _row_statistics(lse_source, delta_source, following, first_m + tile * BLOCK_M, len_q,
                                              stride_rows, BLOCK_M)
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
    BRANCH_MASKS: tl.constexpr, STRIDE_UNIT: tl.constexpr, TMA: tl.constexpr, REGISTER_A: tl.constexpr,
):
    """One program: BLOCK_N keys of one key head, summed over the query heads of its group.

    DK, DV_: contiguous. Lse2, Delta: as dq_kernel leaves them. With TMA, Q and DO are descriptors of one
    (1, BLOCK_M, 1, head_dim) tile, Lse2 and Delta of one (1, 1, BLOCK_M) tile, of a packed batch ones that clip, the
    statistics' in units of 16 rows (see launch._row_descriptor). REGISTER_A: k and v stay in registers. SinkPartials
    (num_partials, heads_q) is summed into DSinks (heads_q,) by the last program of each key head, which has the least
    work under a causal mask; both may be None.
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
        if CuSeqlensK is None:
            b, start_k, len_k, tile = find_sequence(CuSeqlensQ, batch, seqlen_q, pid // heads_kv, 1, BLOCK_N)
        else:
            b, start_k, len_k, tile = find_sequence(CuSeqlensK, batch, seqlen_k, pid // heads_kv, 1, BLOCK_N)
        if (tile < 0) | (tile * BLOCK_N >= len_k):
            return
        start_q = start_k
        len_q = len_k
        if CuSeqlensK is not None:
            start_q, len_q = sequence_bounds(CuSeqlensQ, b, seqlen_q)
        q_origin = start_q.to(tl.int64) * stride_qs
        g_origin = start_q.to(tl.int64) * stride_gs
        k_origin = start_k.to(tl.int64) * stride_ks
        v_origin = start_k.to(tl.int64) * stride_vs
        k_token = start_k.to(tl.int64)
        q_tma = start_q + len_q
        q_token = CLIP - len_q
        first_stat = (start_q // 16 + b) * 16
        sixteens = (len_q + 15) // 16
        stat_tma = start_q // 16 + b + sixteens
        stat_token = CLIP - sixteens * 16
        stat_origin = (head_kv * GROUP) * stride_rows.to(tl.int64) + first_stat
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
        q_tma = b
        stat_tma = b
        q_token = 0
        stat_token = 0
        stat_origin = (b * heads_q + head_kv * GROUP).to(tl.int64) * stride_rows

    row = tl.arange(0, BLOCK_N)
    first = tile * BLOCK_N
    last = first + BLOCK_N - 1
    key = first + row
    row_ok = key < len_k
    k_base = K + k_origin + first.to(tl.int64) * stride_ks + head_kv.to(tl.int64) * stride_kh * STRIDE_UNIT
    v_base = V + v_origin + first.to(tl.int64) * stride_vs + head_kv.to(tl.int64) * stride_vh * STRIDE_UNIT
    STREAM: tl.constexpr = (CLIPPING if VARLEN else 1) if TMA else 0
    if TMA:
        q_rows = Q
        g_rows = DO
        lse_rows = Lse2
        delta_rows = Delta
    else:
        q_rows = Q + q_origin + (head_kv * GROUP).to(tl.int64) * stride_qh
        g_rows = DO + g_origin + (head_kv * GROUP).to(tl.int64) * stride_gh
        lse_rows = Lse2 + stat_origin
        delta_rows = Delta + stat_origin
    k = in_registers(load_tile(k_base, row, stride_ks, row_ok, 0, BLOCK_D, D, True), row_ok, REGISTER_A)
    v = in_registers(load_tile(v_base, row, stride_vs, row_ok, 0, BLOCK_DV, DV, True), row_ok, REGISTER_A)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    k2, v2, dk2, dv2 = k, v, dk, dv
    if BLOCK_D2:
        k2 = in_registers(load_tile(k_base, row, stride_ks, row_ok, BLOCK_D, BLOCK_D2, D, True), row_ok, REGISTER_A)
        dk2 = tl.zeros([BLOCK_N, BLOCK_D2], tl.float32)
    if BLOCK_DV2:
        v2 = in_registers(load_tile(v_base, row, stride_vs, row_ok, BLOCK_DV, BLOCK_DV2, DV, True), row_ok, REGISTER_A)
        dv2 = tl.zeros([BLOCK_N, BLOCK_DV2], tl.float32)

    # Query rows that see any of these keys: [begin, end), in query coordinates, begin aligned for _row_statistics.
    offset = len_k - len_q
    begin = tl.minimum(tl.maximum(first - offset, 0), len_q) // 16 * 16
    end = len_q
    if WINDOW:
        end = tl.maximum(tl.minimum(first + BLOCK_N - 1 - offset + window, len_q), begin)
    tiles = tl.cdiv(end - begin, BLOCK_M)
    group_head = head_kv * GROUP
    if SPLIT_LOOPS:
        # tiles whose first row comes before the last of these keys
        cut = tl.minimum(tl.cdiv(tl.maximum(first + BLOCK_N - 1 - offset - begin, 0), BLOCK_M), tiles)
        dk, dk2, dv, dv2 = _dkdv_loop(
            dk, dk2, dv, dv2, k, k2, v, v2, q_rows, g_rows, lse_rows, delta_rows, q_tma, q_token, stat_tma, stat_token,
            group_head, begin, cut, key, first, last, len_q, offset, stride_rows, stride_qs, stride_qh, stride_gs,
            stride_gh, window, scale_log2, GROUP, BLOCK_M, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2, STREAM, True,
            WINDOW == 2, False, None)
        begin += cut * BLOCK_M
        tiles -= cut
        cut = tiles
        if WINDOW:
            # tiles whose last row still sees the first of these keys
            cut = tl.minimum(tl.maximum((first - offset + window - begin) // BLOCK_M, 0), tiles)
        dk, dk2, dv, dv2 = _dkdv_loop(
            dk, dk2, dv, dv2, k, k2, v, v2, q_rows, g_rows, lse_rows, delta_rows, q_tma, q_token, stat_tma, stat_token,
            group_head, begin, cut, key, first, last, len_q, offset, stride_rows, stride_qs, stride_qh, stride_gs,
            stride_gh, window, scale_log2, GROUP, BLOCK_M, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2, STREAM, False,
            False, False, None)
        if WINDOW:
            dk, dk2, dv, dv2 = _dkdv_loop(
                dk, dk2, dv, dv2, k, k2, v, v2, q_rows, g_rows, lse_rows, delta_rows, q_tma, q_token, stat_tma,
                stat_token, group_head, begin + cut * BLOCK_M, tiles - cut, key, first, last, len_q, offset,
                stride_rows, stride_qs, stride_qh, stride_gs, stride_gh, window, scale_log2, GROUP, BLOCK_M, D, DV,
                BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2, STREAM, False, True, False, None)
    else:
        dk, dk2, dv, dv2 = _dkdv_loop(
            dk, dk2, dv, dv2, k, k2, v, v2, q_rows, g_rows, lse_rows, delta_rows, q_tma, q_token, stat_tma, stat_token,
            group_head, begin, tiles, key, first, last, len_q, offset, stride_rows, stride_qs, stride_qh, stride_gs,
            stride_gh, window, scale_log2, GROUP, BLOCK_M, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2, STREAM, True,
            WINDOW > 0, BRANCH_MASKS, None)
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
