"""Forward kernel: online softmax over the visible key tiles; the sink joins the denominator at the end."""

from __future__ import annotations

from flash_sink_attn.kernels.common import (  # isort: skip
    CLIP,
    CLIPPING,
    FAR_BELOW,
    LN2,
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
def _softmax(
    l, m, q, q2, k, k2, n, key, position, edge, diagonal, window, scale_log2, BLOCK_N: tl.constexpr,
    BLOCK_D2: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BRANCH_MASKS: tl.constexpr,
):
    """A tile of keys, from key n on, joins the running maximum m and sum l of every row.

    Returns p in half precision, alpha by which what was summed before shrinks, and the new l and m.
    """
    s = dot(q, tl.trans(k))
    if BLOCK_D2:
        s = dot(q2, tl.trans(k2), s)
    if BRANCH_MASKS:
        if WINDOW:
            if n < edge:
                s = tl.where(key[None, :] > (position - opaque(window))[:, None], s, float("-inf"))
        if n + BLOCK_N > diagonal:
            key = opaque(n) + tl.arange(0, BLOCK_N)
            s = tl.where(key[None, :] <= position[:, None], s, float("-inf"))
    elif CAUSAL or WINDOW:
        s = tl.where(visible(position[:, None], key[None, :], window, CAUSAL, WINDOW), s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    p = tl.math.exp2(s * scale_log2 - m_new[:, None])
    alpha = tl.math.exp2(m - m_new)
    l = l * alpha + tl.sum(p, 1)
    return round_to(p, q.dtype), alpha, l, m_new


@triton.jit
def _attend(
    acc, acc2, l, m, q, q2, k_source, v_source, b, origin, head, begin, end, position, edge, diagonal, len_k, stride_k,
    stride_v, window, scale_log2, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_DV2: tl.constexpr, TMA: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, BRANCH_MASKS: tl.constexpr, STAGES: tl.constexpr,
):
    """Fold the keys of [begin, end) into the running maximum m, sum l and output acc of every row.

    position: of every row, in key coordinates. edge: keys before it are hidden from the last row; diagonal: keys from
    it on are hidden from the first row. CAUSAL, WINDOW: the masks that every tile gets, or with BRANCH_MASKS those that
    the tile is cut by. STAGES: depth of this loop's load pipeline, None for the launch's.
    """
    MASKED: tl.constexpr = CAUSAL or WINDOW
    row = tl.arange(0, BLOCK_N)
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        key = n + row
        inside = key < len_k
        # [BLOCK_N, BLOCK_D]
        k = stream_tile(k_source, b, origin, head, n, row, stride_k, inside, 0, BLOCK_N, BLOCK_D, D, MASKED, TMA)
        k2 = k
        if BLOCK_D2:
            k2 = stream_tile(k_source, b, origin, head, n, row, stride_k, inside, BLOCK_D, BLOCK_N, BLOCK_D2, D,
                             MASKED, TMA)
        p, alpha, l, m = _softmax(
            l, m, q, q2, k, k2, n, key, position, edge, diagonal, window, scale_log2, BLOCK_N, BLOCK_D2, CAUSAL, WINDOW,
            BRANCH_MASKS)
        # [BLOCK_N, BLOCK_DV]
        v = stream_tile(v_source, b, origin, head, n, row, stride_v, inside, 0, BLOCK_N, BLOCK_DV, DV, MASKED, TMA)
        acc = dot(p, v, acc * alpha[:, None])
        if BLOCK_DV2:
            v2 = stream_tile(v_source, b, origin, head, n, row, stride_v, inside, BLOCK_DV, BLOCK_N, BLOCK_DV2, DV,
                             MASKED, TMA)
            acc2 = dot(p, v2, acc2 * alpha[:, None])
    return acc, acc2, l, m


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qs", "stride_qh", "stride_kb", "stride_ks", "stride_kh", "stride_vb", "stride_vs", "stride_vh",
    "batch", "seqlen_q", "seqlen_k", "heads_kv", "num_tiles", "window",
])
def fwd_kernel(
    Q, K, V, KTail, VTail, Sinks, O, Lse, CuSeqlensQ, CuSeqlensK,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    batch, seqlen_q, seqlen_k, heads_kv, num_tiles, window, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_DV2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr, WINDOW: tl.constexpr, PACK_GQA: tl.constexpr, SPLIT_LOOPS: tl.constexpr,
    BRANCH_MASKS: tl.constexpr, STRIDE_UNIT: tl.constexpr, TMA: tl.constexpr, OWN_TMA: tl.constexpr,
    REGISTER_A: tl.constexpr, TAIL_N: tl.constexpr,
):
    """One program: BLOCK_M query rows of one head, or of all heads of a group when PACK_GQA.

    Q, K, V: (batch, seqlen, heads, head_dim) by strides in units of STRIDE_UNIT elements, which tells the compiler
    their alignment without a specialisation on their values. O: the same, contiguous. Lse: float32, contiguous,
    (batch, heads_q, seqlen_q). Varlen: the batch stride is unused, seqlen_q and seqlen_k are total token counts,
    Lse is (heads_q, total_q). window is read when WINDOW; scale_log2 = softmax scale * log2(e).

    With TMA, K and V are descriptors of one (1, BLOCK_N, 1, head_dim) tile of (batch, seqlen, heads, head_dim), of a
    packed batch one that clips; with TAIL_N, KTail and VTail are then their pointers. With OWN_TMA, Q is one of a
    (1, BLOCK_M, 1, head_dim) tile, or, when PACK_GQA, of (1, BLOCK_M / GROUP, 1, GROUP, head_dim) with the heads split
    in two dimensions. REGISTER_A: q stays in registers as the matrix instruction's first operand. SPLIT_LOOPS,
    BRANCH_MASKS, TAIL_N: see TileConfig.
    """
    ROWS_PER_TOKEN: tl.constexpr = GROUP if PACK_GQA else 1
    heads_q = heads_kv * GROUP
    heads = heads_kv if PACK_GQA else heads_q
    stride_qs = stride_qs * STRIDE_UNIT
    stride_qh = stride_qh * STRIDE_UNIT
    stride_ks = stride_ks * STRIDE_UNIT
    stride_vs = stride_vs * STRIDE_UNIT

    # Heads vary fastest, so that a group's programs find K and V in L2; the longest tiles of a causal mask go first.
    pid = tl.program_id(0)
    if VARLEN:
        head = pid % heads
        b, start_q, len_q, tile = find_sequence(CuSeqlensQ, batch, seqlen_q, pid // heads, ROWS_PER_TOKEN, BLOCK_M)
        tiles = (len_q * ROWS_PER_TOKEN + BLOCK_M - 1) // BLOCK_M
        tile = tiles - 1 - tile
        # no tile; or offsets that fall lead before a sequence's beginning
        if (tile < 0) | (tile >= tiles):
            return
        start_k = start_q
        len_k = len_q
        if CuSeqlensK is not None:
            start_k, len_k = sequence_bounds(CuSeqlensK, b, seqlen_k)
        q_origin = start_q.to(tl.int64) * stride_qs
        k_origin = start_k.to(tl.int64) * stride_ks
        v_origin = start_k.to(tl.int64) * stride_vs
        o_token = start_q.to(tl.int64)
        q_tma = 0
        q_token = start_q
        k_tma = start_k + len_k
        k_token = CLIP - len_k
    else:
        head = pid % heads
        b = (pid // heads) % batch
        tile = num_tiles - 1 - pid // (heads * batch)
        len_q = seqlen_q
        len_k = seqlen_k
        q_origin = b.to(tl.int64) * stride_qb * STRIDE_UNIT
        k_origin = b.to(tl.int64) * stride_kb * STRIDE_UNIT
        v_origin = b.to(tl.int64) * stride_vb * STRIDE_UNIT
        o_token = b.to(tl.int64) * seqlen_q
        q_tma = b
        k_tma = b
        q_token = 0
        k_token = 0

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
        head_q = head
    row_ok = first + token < len_q
    if OWN_TMA:
        if PACK_GQA:
            q = Q.load([q_tma, q_token + first, head_kv, 0, 0]).reshape([BLOCK_M, BLOCK_D])
        else:
            q = Q.load([q_tma, q_token + first, head, 0]).reshape([BLOCK_M, BLOCK_D])
    else:
        q_base = Q + q_origin + first.to(tl.int64) * stride_qs
        if PACK_GQA:
            q_base += (head_kv * GROUP).to(tl.int64) * stride_qh
            q_row = token * stride_qs + member * stride_qh
        else:
            q_base += head.to(tl.int64) * stride_qh
            q_row = token * stride_qs
        q = in_registers(load_tile(q_base, q_row, 1, row_ok, 0, BLOCK_D, D, True), row_ok, REGISTER_A)
    q2 = q
    if BLOCK_D2:
        q2 = in_registers(load_tile(q_base, q_row, 1, row_ok, BLOCK_D, BLOCK_D2, D, True), row_ok, REGISTER_A)
    STREAM: tl.constexpr = (CLIPPING if VARLEN else 1) if TMA else 0
    k_rows = K
    v_rows = V
    if not TMA:
        k_rows = K + k_origin + head_kv.to(tl.int64) * stride_kh * STRIDE_UNIT
        v_rows = V + v_origin + head_kv.to(tl.int64) * stride_vh * STRIDE_UNIT

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc2 = acc
    if BLOCK_DV2:
        acc2 = tl.zeros([BLOCK_M, BLOCK_DV2], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], FAR_BELOW, tl.float32)

    # Positions in key coordinates (bottom-right aligned) and the exact key range of the tile's rows.
    offset = len_k - len_q
    position = first + token + offset
    earliest = first + offset
    latest = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // ROWS_PER_TOKEN, len_q - 1) + offset
    begin = 0
    if WINDOW:
        begin = tl.maximum(earliest - window + 1, 0)
    end = tl.maximum(latest + 1, 0)
    edge = latest - window + 1
    diagonal = earliest + 1
    stop = end
    if TAIL_N:
        # What is left after the last whole tile, if it is little, is a small tile of its own, whose loads are under way
        # from here on.
        whole = begin + (end - begin) // BLOCK_N * BLOCK_N
        stop = tl.where(end - whole <= TAIL_N, whole, end)
        tail = tl.arange(0, TAIL_N)
        tail_ok = stop + tail < end
        k_base = (KTail if TMA else K) + k_origin + head_kv.to(tl.int64) * stride_kh * STRIDE_UNIT
        v_base = (VTail if TMA else V) + v_origin + head_kv.to(tl.int64) * stride_vh * STRIDE_UNIT
        k_base += stop * stride_ks.to(tl.int64)
        v_base += stop * stride_vs.to(tl.int64)
        k_tail = load_tile(k_base, tail, stride_ks, tail_ok, 0, BLOCK_D, D, True)
        v_tail = load_tile(v_base, tail, stride_vs, tail_ok, 0, BLOCK_DV, DV, True)
        k_tail2 = k_tail
        if BLOCK_D2:
            k_tail2 = load_tile(k_base, tail, stride_ks, tail_ok, BLOCK_D, BLOCK_D2, D, True)
        if BLOCK_DV2:
            v_tail2 = load_tile(v_base, tail, stride_vs, tail_ok, BLOCK_DV, BLOCK_DV2, DV, True)
    if SPLIT_LOOPS:
        cut = begin
        if WINDOW:
            # key tiles that start before the last row's window
            cut = tl.minimum(begin + tl.cdiv(tl.maximum(edge - begin, 0), BLOCK_N) * BLOCK_N, stop)
            acc, acc2, l, m = _attend(
                acc, acc2, l, m, q, q2, k_rows, v_rows, k_tma, k_token, head_kv, begin, cut, position, edge, diagonal,
                len_k, stride_ks, stride_vs, window, scale_log2, BLOCK_N, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV,
                BLOCK_DV2, STREAM, WINDOW == 2, True, False, None)
        # key tiles that end at or before the first row's own key
        last = tl.maximum(begin + tl.maximum((diagonal - begin) // BLOCK_N, 0) * BLOCK_N, cut)
        acc, acc2, l, m = _attend(
            acc, acc2, l, m, q, q2, k_rows, v_rows, k_tma, k_token, head_kv, cut, last, position, edge, diagonal,
            len_k, stride_ks, stride_vs, window, scale_log2, BLOCK_N, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2,
            STREAM, False, False, False, None)
        acc, acc2, l, m = _attend(
            acc, acc2, l, m, q, q2, k_rows, v_rows, k_tma, k_token, head_kv, last, stop, position, edge, diagonal,
            len_k, stride_ks, stride_vs, window, scale_log2, BLOCK_N, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2,
            STREAM, True, WINDOW == 2, False, None)
    else:
        acc, acc2, l, m = _attend(
            acc, acc2, l, m, q, q2, k_rows, v_rows, k_tma, k_token, head_kv, begin, stop, position, edge, diagonal,
            len_k, stride_ks, stride_vs, window, scale_log2, BLOCK_N, D, DV, BLOCK_D, BLOCK_D2, BLOCK_DV, BLOCK_DV2,
            STREAM, True, WINDOW > 0, BRANCH_MASKS, None)
    if TAIL_N:
        if stop < end:
            p, alpha, l, m = _softmax(
                l, m, q, q2, k_tail, k_tail2, stop, stop + tail, position, edge, diagonal, window, scale_log2, TAIL_N,
                BLOCK_D2, True, WINDOW > 0, False)
            acc = dot(p, v_tail, acc * alpha[:, None])
            if BLOCK_DV2:
                acc2 = dot(p, v_tail2, acc2 * alpha[:, None])

    # The sink enters here and not as the initial maximum: a sink far above the logits would flush P to zero in half.
    if Sinks is not None:
        sink = widen(tl.load(Sinks + head_q)) * LOG2E
        m_new = tl.maximum(m, sink)
        beta = tl.math.exp2(m - m_new)
        l = l * beta + tl.math.exp2(sink - m_new)
        m = m_new
    else:
        beta = tl.full([BLOCK_M], 1.0, tl.float32)
    # A row without a visible key and without a sink has l == 0: o = 0, lse = -inf.
    factor = beta / tl.where(l == 0.0, 1.0, l)
    lse = tl.where(l == 0.0, float("-inf"), (m + tl.math.log2(l)) * LN2)

    stride_oh: tl.constexpr = DV
    stride_os = heads_q * DV
    o_base = O + (o_token + first) * stride_os
    if PACK_GQA:
        o_base += (head_kv * GROUP).to(tl.int64) * stride_oh
        o_row = token * stride_os + member * stride_oh
    else:
        o_base += head.to(tl.int64) * stride_oh
        o_row = token * stride_os
    store_tile(o_base, o_row, 1, row_ok, acc * factor[:, None], 0, BLOCK_DV, DV)
    if BLOCK_DV2:
        store_tile(o_base, o_row, 1, row_ok, acc2 * factor[:, None], BLOCK_DV, BLOCK_DV2, DV)
    if VARLEN:
        lse_at = head_q * seqlen_q.to(tl.int64) + o_token + first + token
    else:
        lse_at = (b * heads_q + head_q).to(tl.int64) * seqlen_q + first + token
    tl.store(Lse + lse_at, lse, mask=row_ok)
