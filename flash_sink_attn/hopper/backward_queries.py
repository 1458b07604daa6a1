"""The Hopper backward, programs that hold queries: dQ where it is made by itself, and the statistics of the rows.

One loader warp, one or two warpgroups of one head's 64 rows each: see :func:`hopper_bwd_queries_kernel`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flash_sink_attn.hopper.backward_common import above, other_bounds, store_rows, up_to
from flash_sink_attn.hopper.common import (
    LOG2E,
    advance,
    find_sequence,
    hold_half,
    load_block,
    place_of,
    start_dependents,
)


@gluon.jit
def _query_tile(cu_q, cu_k, work, WINDOW: gl.constexpr, VARLEN: gl.constexpr, BLOCK_N: gl.constexpr,
                SPLIT: gl.constexpr, HEADS: gl.constexpr):
    """(ok, batch, key head, first head of this program's share of the group, slot of its part of the sinks' gradient,
    first row, keys' minus queries' length, lengths, where the sequences and its statistics begin, first key, key
    blocks)."""
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window = work
    tile = gl.program_id(0)
    if VARLEN:
        share = tile % SPLIT
        head = tile // SPLIT % heads_kv
        slot = tile // SPLIT // heads_kv
        sequence, start_q, len_q, m = find_sequence(cu_q, batch, seqlen_q, slot, 64)
        start_k, len_k = other_bounds(cu_k, sequence, seqlen_k, start_q, len_q)
        b = 0
        base = (start_q // 64 + sequence) * 64
        m = gl.cdiv(len_q, 64) - 1 - m
        ok = (m >= 0) & (m * 64 < len_q)
    else:
        s = tile // (section * tiles)
        r = tile - s * (section * tiles)
        here = gl.minimum(section, batch * heads_kv * SPLIT - s * section)
        m = tiles - 1 - r // here
        unit = s * section + r % here
        share = unit % SPLIT
        head = unit // SPLIT % heads_kv
        b = unit // SPLIT // heads_kv
        slot = b * tiles + m
        ok = True
        len_q = seqlen_q
        len_k = seqlen_k
        start_q = 0
        start_k = 0
        base = 0
    offset = len_k - len_q
    end = gl.minimum(m * 64 + 64, len_q) + offset
    begin = 0
    if WINDOW:
        begin = gl.maximum(m * 64 + offset - window + 1, 0)
    blocks = gl.cdiv(gl.maximum(end - begin, 0), BLOCK_N)
    return ok, b, head, share * HEADS, slot, m * 64, offset, len_q, len_k, start_q, start_k, base, begin, blocks


@gluon.jit
def _load_keys(q_desc, k_desc, v_desc, o_desc, do_desc, cu_q, cu_k, smem, bars, work, WARPGROUPS: gl.constexpr,
               GROUP: gl.constexpr, SPLIT: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
               Q_STAGES: gl.constexpr, VARLEN: gl.constexpr, WINDOW: gl.constexpr):
    """The loader of a program that holds queries: q, o and do of one head per warpgroup, K and V for all."""
    HEADS: gl.constexpr = (GROUP + SPLIT - 1) // SPLIT
    q_smem, o_smem, do_smem, k_smem, v_smem = smem
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = bars
    ok, b, head, low, part, row0, offset, len_q, len_k, start_q, start_k, base, begin, blocks = _query_tile(
        cu_q, cu_k, work, WINDOW, VARLEN, BLOCK_N, SPLIT, HEADS)
    if ok:
        q_b, q_row = place_of(b, start_q, len_q, VARLEN)
        k_b, k_row = place_of(b, start_k, len_k, VARLEN)
        slot = 0
        phase = 1
        q_slot = 0
        q_phase = 1
        for i in range((HEADS + WARPGROUPS - 1) // WARPGROUPS):
            for c in gl.static_range(WARPGROUPS):
                member = low + i * WARPGROUPS + c
                at = c * Q_STAGES + q_slot
                if member < gl.minimum(low + HEADS, GROUP):
                    head_q = head * GROUP + member
                    mbarrier.wait(q_empty.index(at), q_phase)
                    mbarrier.expect(q_ready.index(at), 3 * q_desc.block_type.nbytes)
                    load_block(q_desc, q_b, q_row + row0, head_q, 0, q_ready.index(at), q_smem.index(at))
                    load_block(do_desc, q_b, q_row + row0, head_q, 0, q_ready.index(at), do_smem.index(at))
                    load_block(o_desc, q_b, q_row + row0, head_q, 0, q_ready.index(at), o_smem.index(at))
            q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)
            key = k_row + begin
            for _ in range(blocks):
                mbarrier.wait(k_empty.index(slot), phase)
                mbarrier.expect(k_ready.index(slot), k_desc.block_type.nbytes)
                load_block(k_desc, k_b, key, head, 0, k_ready.index(slot), k_smem.index(slot))
                mbarrier.wait(v_empty.index(slot), phase)
                mbarrier.expect(v_ready.index(slot), v_desc.block_type.nbytes)
                load_block(v_desc, k_b, key, head, 0, v_ready.index(slot), v_smem.index(slot))
                slot, phase = advance(slot, phase, STAGES)
                key += BLOCK_N


@gluon.jit
def _head_statistics(Lse, DLse, Sinks, at, member, first_head, seqlen_q, inside, there):
    """(lse, its gradient, the sink) of the group's head ``member`` where it is ``there``: to be loaded a head ahead,
    since its first exponentials wait for them."""
    at += member * seqlen_q.to(gl.int64)
    lse = gl.load(Lse + at, mask=inside & there, other=float("inf"))
    gradient = gl.zeros_like(lse)
    if DLse is not None:
        gradient = gl.load(DLse + at, mask=inside & there, other=0.0)
    sink = 0.0
    if Sinks is not None:
        sink = gl.load(Sinks + first_head + member, mask=there, other=0.0).to(gl.float32)
    return lse, gradient, sink


@gluon.jit
def _compute_queries(DQ, DLse, Lse, Sinks, Lse2, Delta, Part, slots, cu_q, cu_k, smem, bars, work, scale,
                     scale_log2, INDEX: gl.constexpr, WARPGROUPS: gl.constexpr, GROUP: gl.constexpr,
                     SPLIT: gl.constexpr, D: gl.constexpr, D_TRUE: gl.constexpr, BLOCK_N: gl.constexpr,
                     STAGES: gl.constexpr, Q_STAGES: gl.constexpr, VARLEN: gl.constexpr, WINDOW: gl.constexpr,
                     KEEP: gl.constexpr):
    """Warpgroup number INDEX: 64 queries of every WARPGROUPS-th head of a group. KEEP: q and do stay in registers, so
    that the next head's can come while this one's are used."""
    HEADS: gl.constexpr = (GROUP + SPLIT - 1) // SPLIT
    q_smem, o_smem, do_smem, k_smem, v_smem = smem
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = bars
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window = work
    dtype: gl.constexpr = k_smem.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                       instr_shape=[16, BLOCK_N, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=D_LAYOUT, k_width=2)
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S_LAYOUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ok, b, head, low, part, row0, offset, len_q, len_k, start_q, start_k, base, begin, blocks = _query_tile(
        cu_q, cu_k, work, WINDOW, VARLEN, BLOCK_N, SPLIT, HEADS)
    token = row0 + gl.arange(0, 64, layout=ROW)
    inside = token < len_q
    position = gl.expand_dims(token + offset, 1)
    column = gl.expand_dims(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT)), 0)
    zero = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    slot = 0
    phase = 0
    q_slot = 0
    q_phase = 0
    high = gl.minimum(low + HEADS, GROUP)
    # of the packed batch's tokens, or the sequence's, in one head after the other
    row_at = (b * (heads_kv * GROUP) + head * GROUP) * seqlen_q.to(gl.int64) + start_q + token
    lse, lse_gradient, sink = _head_statistics(Lse, DLse, Sinks, row_at, low + INDEX, head * GROUP, seqlen_q,
                                               inside, ok & (low + INDEX < high))
    for i in range((HEADS + WARPGROUPS - 1) // WARPGROUPS):
        member = low + i * WARPGROUPS + INDEX
        if member < high:
            head_q = head * GROUP + member
            unit = b * (heads_kv * GROUP) + head_q
            if ok:
                at = INDEX * Q_STAGES + q_slot
                lse2 = gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
                sink2 = sink * LOG2E
                gradient = lse_gradient
                lse, lse_gradient, sink = _head_statistics(Lse, DLse, Sinks, row_at, member + WARPGROUPS, head * GROUP,
                                                           seqlen_q, inside, member + WARPGROUPS < high)
                mbarrier.wait(q_ready.index(at), q_phase)
                o = o_smem.index(at).reshape([64, D])
                do = do_smem.index(at).reshape([64, D])
                q = q_smem.index(at).reshape([64, D])
                if KEEP:
                    q_operand = hold_half(q.load(Q_LAYOUT))
                    do_operand = hold_half(do.load(Q_LAYOUT))
                    do16 = gl.convert_layout(do_operand, D_LAYOUT, assert_trivial=True)
                else:
                    q_operand = q
                    do_operand = do
                    do16 = do.load(D_LAYOUT)
                delta = gl.sum(o.load(D_LAYOUT).to(gl.float32) * do16.to(gl.float32), 1)
                if KEEP:
                    # nobody reads these slots any more: the next head's rows come while this one is computed
                    mbarrier.arrive(q_empty.index(at), count=1)
                delta = gl.where(inside, gl.convert_layout(delta, ROW) - gradient, 0.0)
                at_row = unit * rows.to(gl.int64) + base + token
                gl.store(Delta + at_row, delta)
                gl.store(Lse2 + at_row, lse2)
                if Part is not None:
                    gl.store(Part + head_q.to(gl.int64) * slots + part, -gl.sum(gl.exp2(sink2 - lse2) * delta, 0))
                dq = gl.zeros([64, D], gl.float32, D_LAYOUT)
                key = begin
                for _ in range(blocks):
                    k = k_smem.index(slot).reshape([BLOCK_N, D])
                    v = v_smem.index(slot).reshape([BLOCK_N, D])
                    mbarrier.wait(k_ready.index(slot), phase)
                    s = warpgroup_mma(q_operand, k.permute((1, 0)), zero, use_acc=False, is_async=True)
                    mbarrier.wait(v_ready.index(slot), phase)
                    dp = warpgroup_mma(do_operand, v.permute((1, 0)), zero, use_acc=False, is_async=True)
                    s = warpgroup_mma_wait(1, deps=[s])
                    p = gl.exp2(s * scale_log2 - gl.expand_dims(lse2, 1))
                    if row0 + offset < key + (BLOCK_N - 1):
                        p = up_to(p, key + column, position)
                    if WINDOW:
                        if row0 + offset + 63 >= key + window:
                            p = above(p, key + window + column, position)
                    dp = warpgroup_mma_wait(0, deps=[dp])
                    mbarrier.arrive(v_empty.index(slot), count=1)
                    ds = hold_half(gl.convert_layout((p * (dp - gl.expand_dims(delta, 1))).to(dtype), A_LAYOUT))
                    dq = warpgroup_mma(ds, k, dq, is_async=True)
                    dq = warpgroup_mma_wait(0, deps=[dq])
                    hold_half(ds)
                    if KEEP:
                        # up to here: ptxas has given their registers to others where nothing in the loop said so
                        hold_half(q_operand)
                        hold_half(do_operand)
                    mbarrier.arrive(k_empty.index(slot), count=1)
                    slot, phase = advance(slot, phase, STAGES)
                    key += BLOCK_N
                dq *= scale
                out = gl.expand_dims(row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, D_LAYOUT)), 1)
                rows_at = (b * seqlen_q + start_q + out).to(gl.int64) * (heads_kv * GROUP) + head_q
                store_rows(DQ, rows_at, out < len_q, dq.to(dtype), D, D_TRUE)
                if not KEEP:
                    mbarrier.arrive(q_empty.index(at), count=1)
            elif Part is not None:
                # a slot without a tile
                gl.store(Part + head_q.to(gl.int64) * slots + part, 0.0)
        elif ok:
            # no head is left for this warpgroup, but the slots of K and V wait for it all the same
            for _ in range(blocks):
                mbarrier.wait(k_ready.index(slot), phase)
                mbarrier.arrive(k_empty.index(slot), count=1)
                mbarrier.wait(v_ready.index(slot), phase)
                mbarrier.arrive(v_empty.index(slot), count=1)
                slot, phase = advance(slot, phase, STAGES)
        q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)


@gluon.jit(do_not_specialize=["batch", "seqlen_q", "seqlen_k", "heads_kv", "rows", "tiles", "section", "window",
                              "slots"])
def hopper_bwd_queries_kernel(
    q_desc, k_desc, v_desc, o_desc, do_desc, DQ, DLse, Lse, Sinks, Lse2, Delta, Part, CuSeqlensQ, CuSeqlensK,
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window, slots, scale, scale_log2,
    GROUP: gl.constexpr, SPLIT: gl.constexpr, D: gl.constexpr, D_TRUE: gl.constexpr, WARPGROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, VARLEN: gl.constexpr, WINDOW: gl.constexpr,
    REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr, KEEP: gl.constexpr,
):
    """One program per 64 queries, key head, and share of its group of query heads: dQ of these, and the statistics and
    parts of the sinks' gradient that hopper_bwd_keys_kernel reads."""
    start_dependents()
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [WARPGROUPS * Q_STAGES] + q_desc.block_type.shape, q_desc.layout)
    o_smem = gl.allocate_shared_memory(dtype, [WARPGROUPS * Q_STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [WARPGROUPS * Q_STAGES] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [WARPGROUPS * Q_STAGES, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # Triton's barriers, not our own as in the other kernels: their 1 KiB of shared memory would be what keeps a second
    # program off the multiprocessor at head dim 128.
    # q_ready: one arrival, the loader's, and the bytes of q, o and do; the warpgroup of these slots waits, round r of a
    # slot for parity r % 2. q_empty: one arrival, of that warpgroup, once it has read q, o and do for the last time.
    # k_ready, v_ready: as q_ready, every warpgroup waits. k_empty, v_empty: one arrival of each warpgroup. The loader
    # waits for *_empty, at round r for parity (r + 1) % 2, which at round 0 is the one before the first.
    q_empty = gl.allocate_shared_memory(gl.int64, [WARPGROUPS * Q_STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WARPGROUPS * Q_STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=WARPGROUPS)
        mbarrier.init(v_empty.index(i), count=WARPGROUPS)
    fence_async_shared()
    gl.thread_barrier()
    smem = (q_smem, o_smem, do_smem, k_smem, v_smem)
    bars = (q_ready, q_empty, k_ready, k_empty, v_ready, v_empty)
    work = (batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window)
    if WARPGROUPS == 1:
        gl.warp_specialize([
            (_compute_queries, (DQ, DLse, Lse, Sinks, Lse2, Delta, Part, slots, CuSeqlensQ, CuSeqlensK, smem,
              bars, work, scale, scale_log2, 0, WARPGROUPS, GROUP, SPLIT, D, D_TRUE, BLOCK_N, STAGES, Q_STAGES, VARLEN,
              WINDOW, KEEP)),
            (_load_keys, (q_desc, k_desc, v_desc, o_desc, do_desc, CuSeqlensQ, CuSeqlensK, smem, bars, work,
              WARPGROUPS, GROUP, SPLIT, BLOCK_N, STAGES, Q_STAGES, VARLEN, WINDOW)),
        ], [1], [LOADER_REGISTERS])
    else:
        gl.warp_specialize([
            (_compute_queries, (DQ, DLse, Lse, Sinks, Lse2, Delta, Part, slots, CuSeqlensQ, CuSeqlensK, smem,
              bars, work, scale, scale_log2, 0, WARPGROUPS, GROUP, SPLIT, D, D_TRUE, BLOCK_N, STAGES, Q_STAGES, VARLEN,
              WINDOW, KEEP)),
            (_compute_queries, (DQ, DLse, Lse, Sinks, Lse2, Delta, Part, slots, CuSeqlensQ, CuSeqlensK, smem,
              bars, work, scale, scale_log2, 1, WARPGROUPS, GROUP, SPLIT, D, D_TRUE, BLOCK_N, STAGES, Q_STAGES, VARLEN,
              WINDOW, KEEP)),
            (_load_keys, (q_desc, k_desc, v_desc, o_desc, do_desc, CuSeqlensQ, CuSeqlensK, smem, bars, work,
              WARPGROUPS, GROUP, SPLIT, BLOCK_N, STAGES, Q_STAGES, VARLEN, WINDOW)),
        ], [4, 1], [REGISTERS, LOADER_REGISTERS])
