"""The Hopper backward, programs that hold keys: dK and dV, and in the form that accumulates their share of dQ.

One loader warp, one or two warpgroups of 64 keys each, and at head dim 64 one more that makes dQ: see
:func:`hopper_bwd_keys_kernel`. docs/hopper.md draws the forms.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from flash_sink_attn.hopper.backward_common import probabilities, scratch_offsets, scratch_put, sum_sinks
from flash_sink_attn.hopper.backward_products import (
    add_dq,
    dq_product,
    ended,
    in_scratch,
    parts,
    start_scores,
    start_sum,
    tell_added,
)
from flash_sink_attn.hopper.backward_walk import TURNS, first_tile, key_tile, next_tile, pass_turns, take_turns
from flash_sink_attn.hopper.common import (
    advance,
    await_launch_before,
    barrier_arrive,
    barrier_init,
    barrier_wait,
    barriers_declare,
    hold_half,
    load_block,
    place_of,
    store_block,
)
from flash_sink_attn.hopper.staging import staging_declare, staging_drain, staging_places


@gluon.jit
def _load_rows(q_desc, k_desc, v_desc, do_desc, Lse2, Delta, Part, DSinks, slots, cu_q, cu_k, smem, bars, work,
               shape: gl.constexpr):
    """The loader of a program that holds keys: K and V once, then a ring of q, do and their rows' statistics."""
    WARPGROUPS: gl.constexpr = shape[0]
    GROUP: gl.constexpr = shape[1]
    SPLIT: gl.constexpr = shape[2]
    STAGES: gl.constexpr = shape[4]
    VARLEN: gl.constexpr = shape[6]
    WINDOW: gl.constexpr = shape[7]
    TOGETHER: gl.constexpr = shape[8]
    ORDERED: gl.constexpr = shape[9]
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem = smem
    kv_ready, q_ready, do_ready, q_empty, do_empty, ds_ready, ds_empty, turn, added, passed = bars
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window = work
    ok, b, head, place, first_key, offset, len_q, len_k, start_q, start_k, base, course = key_tile(
        cu_q, cu_k, work, 64 * WARPGROUPS, GROUP, SPLIT, WINDOW, VARLEN, TOGETHER, ORDERED)
    q_b, q_row = place_of(b, start_q, len_q, VARLEN)
    k_b, k_row = place_of(b, start_k, len_k, VARLEN)
    if ORDERED:
        # With the wait behind these loads ptxas put the multiplications of dS elsewhere, 5% slower at head dim 128 when
        # dQ left from registers.
        await_launch_before()
    if ok:
        mbarrier.expect(kv_ready, 2 * WARPGROUPS * k_desc.block_type.nbytes)
        for c in gl.static_range(WARPGROUPS):
            load_block(k_desc, k_b, k_row + first_key + c * 64, head, 0, kv_ready, k_smem.index(c))
        for c in gl.static_range(WARPGROUPS):
            load_block(v_desc, k_b, k_row + first_key + c * 64, head, 0, kv_ready, v_smem.index(c))
    if not ORDERED:
        await_launch_before()
    if ok:
        row = gl.arange(0, 64, layout=gl.BlockedLayout([2], [32], [1], [0]))
        m, g, left, total = first_tile(course)
        slot = 0
        # A ring's first round finds its slots empty: waiting for the phase before the first one returns at once.
        phase = 1
        at = (b * (heads_kv * GROUP) + head * GROUP) * rows + base + row
        # one tile ahead, so that their latency hides behind the waits
        lse2 = gl.load(Lse2 + at + g * rows + m * 64, mask=row < total * 64, other=0.0)
        delta = gl.load(Delta + at + g * rows + m * 64, mask=row < total * 64, other=0.0)
        for i in range(total):
            head_q = head * GROUP + g
            barrier_wait(q_empty + slot, phase)
            mbarrier.expect(q_ready.index(slot), q_desc.block_type.nbytes)
            load_block(q_desc, q_b, q_row + m * 64, head_q, 0, q_ready.index(slot), q_smem.index(slot))
            barrier_wait(do_empty + slot, phase)
            mbarrier.expect(do_ready.index(slot), do_desc.block_type.nbytes)
            load_block(do_desc, q_b, q_row + m * 64, head_q, 0, do_ready.index(slot), do_smem.index(slot))
            lse_smem.index(slot).store(lse2)
            mbarrier.arrive(q_ready.index(slot), count=1)
            delta_smem.index(slot).store(delta)
            mbarrier.arrive(do_ready.index(slot), count=1)
            slot, phase = advance(slot, phase, STAGES)
            m, g, left = next_tile(m, g, left, course, TOGETHER)
            following = at + g * rows + m * 64
            more = row < (total - 1 - i) * 64
            lse2 = gl.load(Lse2 + following, mask=more, other=0.0)
            delta = gl.load(Delta + following, mask=more, other=0.0)
    if DSinks is not None:
        sum_sinks(Part, DSinks, slots, heads_kv * GROUP, 1)


@gluon.jit
def _compute_keys(dk_desc, dv_desc, Sums, DQ, cu_q, cu_k, smem, bars, work, scale, scale_log2,
                  INDEX: gl.constexpr, shape: gl.constexpr):
    """Warpgroup number INDEX: 64 keys, their dK and dV in registers.

    DQ_BY 0: no dQ. 1: dS goes to the warpgroup of :func:`_compute_dq`. 2: these warpgroups themselves, 64 columns each,
    one tile late, so that none waits for the other's dS. ROUNDED: dS from P as it was rounded for dV; saves registers.
    KEEP: K stays in registers, which spares shared memory a read of it for each tile. D2: see hopper_bwd_keys_kernel.
    """
    WARPGROUPS: gl.constexpr = shape[0]
    GROUP: gl.constexpr = shape[1]
    SPLIT: gl.constexpr = shape[2]
    D: gl.constexpr = shape[3]
    STAGES: gl.constexpr = shape[4]
    BUFFERS: gl.constexpr = shape[5]
    VARLEN: gl.constexpr = shape[6]
    WINDOW: gl.constexpr = shape[7]
    TOGETHER: gl.constexpr = shape[8]
    ORDERED: gl.constexpr = shape[9]
    DQ_BY: gl.constexpr = shape[10]
    ROUNDED: gl.constexpr = shape[11]
    KEEP: gl.constexpr = shape[12]
    D2: gl.constexpr = shape[13]
    STAGED: gl.constexpr = shape[14]
    PARTS: gl.constexpr = 2 if D2 else 1  # of each product
    # The order within a tile is what was fastest of those that were measured, see docs/hopper.md.
    AHEAD: gl.constexpr = DQ_BY == 1 or not ORDERED  # the next tile's lse is loaded while its S is multiplied
    # dP begins after the exponentials, and not beside them
    LATE: gl.constexpr = DQ_BY == 0 or DQ_BY == 2 and (not D2 if WINDOW else not ORDERED)
    CONSTANTS: gl.constexpr = WINDOW and (DQ_BY == 1 and not ORDERED or DQ_BY == 2 and not D2)  # of the masks
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem = smem
    kv_ready, q_ready, do_ready, q_empty, do_empty, ds_ready, ds_empty, turn, added, passed = bars
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window = work
    dtype: gl.constexpr = k_smem.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    # with D2 only 64 of a tile's columns and the D2 behind them are multiplied: the copy engine has added the others
    WIDE: gl.constexpr = 64 if D2 else D
    NARROW: gl.constexpr = D2 or D
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDE, 16])
    D2_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                        instr_shape=[16, NARROW, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=D_LAYOUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    PANEL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    K_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S_LAYOUT, k_width=2)
    ok, b, head, place, first_key, offset, len_q, len_k, start_q, start_k, base, course = key_tile(
        cu_q, cu_k, work, 64 * WARPGROUPS, GROUP, SPLIT, WINDOW, VARLEN, TOGETHER, ORDERED)
    if ok:
        first_key += INDEX * 64
        k, k2 = parts(k_smem.index(INDEX), PANEL, D, D2)
        v, v2 = parts(v_smem.index(INDEX), PANEL, D, D2)
        key = gl.expand_dims(first_key - offset + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT)), 1)
        row = gl.arange(0, 64, layout=ROW)
        zero = gl.zeros([64, 64], gl.float32, S_LAYOUT)
        dk = gl.zeros([64, WIDE], gl.float32, D_LAYOUT)
        dv = gl.zeros([64, WIDE], gl.float32, D_LAYOUT)
        dk2 = dk
        dv2 = dv
        if D2:
            dk2 = gl.zeros([64, D2], gl.float32, D2_LAYOUT)
            dv2 = gl.zeros([64, D2], gl.float32, D2_LAYOUT)
        m, g, left, total = first_tile(course)
        slot = 0
        phase = 0
        buffer = 0
        buffer_phase = 1
        head_rows = rows // 64  # tiles of one head
        tile0 = (b * (heads_kv * GROUP) + head * GROUP) * head_rows + base // 64
        if DQ_BY == 2:
            k_panels = k_smem._reinterpret(dtype, [WARPGROUPS * (D // 64), 64, 64], PANEL)
            ds_panels = ds_smem._reinterpret(dtype, [BUFFERS * WARPGROUPS, 64, 64], PANEL)
            DQ_COLUMNS: gl.constexpr = NARROW if D2 and INDEX else 64
            DQ_LAYOUT: gl.constexpr = D2_LAYOUT if D2 and INDEX else S_LAYOUT
            dq_zero = gl.zeros([64, DQ_COLUMNS], gl.float32, DQ_LAYOUT)
            offsets = INDEX * 16384 + scratch_offsets(DQ_LAYOUT, DQ_COLUMNS)
            if not STAGED:
                offsets = DQ.to(gl.int64) + INDEX * 16384 + scratch_offsets(DQ_LAYOUT, DQ_COLUMNS)
            places = staging_places(INDEX * 16384, DQ_LAYOUT, DQ_COLUMNS)
            # a dS of zeros stands for the tile before the first
            before = tile0 + g * head_rows + m
            ds_smem.index(INDEX).store(gl.zeros([64, 64], dtype, S_LAYOUT))
            fence_async_shared()
            barrier_arrive(ds_ready, True)
        mbarrier.wait(kv_ready, 0)
        k_operand = k
        if KEEP:
            k_operand = hold_half(k.load(K_LAYOUT))
        # S of the first tile; from then on each turn starts the next one's
        mbarrier.wait(q_ready.index(0), 0, pred=total > 0)
        q_first, q2_first = parts(q_smem.index(0), PANEL, D, D2)
        s = start_scores(k_operand, k2, q_first, q2_first, zero, D2)
        if AHEAD:
            lse2 = lse_smem.index(0).load(ROW)
        s = warpgroup_mma_wait(0, deps=[s])
        for i in range(total):
            q, q2 = parts(q_smem.index(slot), PANEL, D, D2)
            do, do2 = parts(do_smem.index(slot), PANEL, D, D2)
            if not LATE:
                mbarrier.wait(do_ready.index(slot), phase)
                dp = start_scores(v, v2, do, do2, zero, D2)
            if not AHEAD:
                lse2 = lse_smem.index(slot).load(ROW)
            p = probabilities(s, lse2, key, row, m, first_key - offset, window, scale_log2, WINDOW,
                              CONSTANTS)
            p16 = hold_half(gl.convert_layout(p.to(dtype), A_LAYOUT))
            if DQ_BY == 2:
                tell_added(i - 1, added, ORDERED, STAGED)
            if LATE:
                mbarrier.wait(do_ready.index(slot), phase)
                dp = start_scores(v, v2, do, do2, zero, D2)
            dv, dv2 = start_sum(p16, do, do2, dv, dv2, D2)
            if DQ_BY == 1:
                delta = delta_smem.index(slot).load(ROW)
            dp = warpgroup_mma_wait(PARTS, deps=[dp])
            if ROUNDED:
                p = gl.convert_layout(p16, S_LAYOUT).to(gl.float32)
            if DQ_BY != 1:
                delta = delta_smem.index(slot).load(ROW)
            ds = (p * (dp - gl.expand_dims(delta, 0))).to(dtype)
            if DQ_BY == 1:
                barrier_wait(ds_empty + buffer, buffer_phase)
                ds_smem.index(buffer * WARPGROUPS + INDEX).store(ds)
                fence_async_shared()
                barrier_arrive(ds_ready + buffer, True)
                buffer, buffer_phase = advance(buffer, buffer_phase, BUFFERS)
            elif DQ_BY == 2:
                ds_smem.index(((i + 1) & 3) * WARPGROUPS + INDEX).store(ds)
                fence_async_shared()
                barrier_arrive(ds_ready + ((i + 1) & 3), True)
            ds = hold_half(gl.convert_layout(ds, A_LAYOUT))
            dk, dk2 = start_sum(ds, q, q2, dk, dk2, D2)
            current = tile0 + g * head_rows + m
            m, g, left = next_tile(m, g, left, course, TOGETHER)
            following, following_phase = advance(slot, phase, STAGES)
            if DQ_BY == 2:
                barrier_wait(ds_ready + (i & 3), (i >> 2) & 1)
                dq = dq_product(ds_panels, k_panels, i & 3, dq_zero, INDEX, WARPGROUPS, D)
                mbarrier.wait(q_ready.index(following), following_phase, pred=i + 1 < total)
                dv, dv2, dk, dk2 = ended(dv, dv2, dk, dk2, WARPGROUPS, D2)
            else:
                mbarrier.wait(q_ready.index(following), following_phase, pred=i + 1 < total)
            if DQ_BY == 2:
                hold_half(p16)
                hold_half(ds)
            q_next, q2_next = parts(q_smem.index(following), PANEL, D, D2)
            s = start_scores(k_operand, k2, q_next, q2_next, zero, D2)
            if DQ_BY == 2:
                barrier_arrive(do_empty + slot, True)
                barrier_arrive(q_empty + slot, True)
                dq = warpgroup_mma_wait(PARTS, deps=[dq])
                add_dq(in_scratch(DQ, before, offsets, D, STAGED), places, dq, i, bars, ORDERED, STAGED, DQ_BY)
                before = current
            else:
                dv, dv2, dk, dk2 = ended(dv, dv2, dk, dk2, PARTS, D2)
                hold_half(p16)
                hold_half(ds)
                barrier_arrive(do_empty + slot, True)
                barrier_arrive(q_empty + slot, True)
            if AHEAD:
                lse2 = lse_smem.index(following).load(ROW)
            # not carried in flight over the back edge: ptxas would serialise all products (C7514)
            s = warpgroup_mma_wait(0, deps=[s])
            slot = following
            phase = following_phase
        if DQ_BY == 2:
            barrier_wait(ds_ready + (total & 3), (total >> 2) & 1)
            dq = dq_product(ds_panels, k_panels, total & 3, dq_zero, INDEX, WARPGROUPS, D)
            tell_added(total - 1, added, ORDERED, STAGED)
            dq = warpgroup_mma_wait(0, deps=[dq])
            if total > 0:
                add_dq(in_scratch(DQ, before, offsets, D, STAGED), places, dq, total, bars, ORDERED, STAGED, DQ_BY)
                tell_added(total, added, ORDERED, STAGED)
            if STAGED:
                staging_drain(rows)
        dk *= scale
        dk2 *= scale
        if SPLIT > 1:
            at = (place * WARPGROUPS + INDEX).to(gl.int64) * (2 * 64 * D * 4)
            pointer = Sums.to(gl.int64) + at + scratch_offsets(D_LAYOUT, WIDE)
            scratch_put(pointer, dk)
            scratch_put(pointer + 64 * D * 4, dv)
            if D2:
                pointer2 = Sums.to(gl.int64) + at + 16384 + scratch_offsets(D2_LAYOUT, D2)
                scratch_put(pointer2, dk2)
                scratch_put(pointer2 + 64 * D * 4, dv2)
        else:
            k_b, k_row = place_of(b, start_k, len_k, VARLEN)
            # V of this warpgroup is read by nobody else: dV, then dK, leave through its place
            v.store(dv.to(dtype))
            if D2:
                v2.store(dv2.to(dtype))
            fence_async_shared()
            gl.thread_barrier()
            store_block(dv_desc, k_b, k_row + first_key, head, 0, v_smem.index(INDEX))
            tma.store_wait(0)
            gl.thread_barrier()
            v.store(dk.to(dtype))
            if D2:
                v2.store(dk2.to(dtype))
            fence_async_shared()
            gl.thread_barrier()
            store_block(dk_desc, k_b, k_row + first_key, head, 0, v_smem.index(INDEX))
            tma.store_wait(0)


# Partitions share what they are called with, and a number in it would be one at run time only.
@gluon.jit
def _compute_first(dk_desc, dv_desc, Sums, DQ, cu_q, cu_k, smem, bars, work, scale, scale_log2, shape: gl.constexpr):
    _compute_keys(dk_desc, dv_desc, Sums, DQ, cu_q, cu_k, smem, bars, work, scale, scale_log2, 0, shape)


@gluon.jit
def _compute_second(dk_desc, dv_desc, Sums, DQ, cu_q, cu_k, smem, bars, work, scale, scale_log2, shape: gl.constexpr):
    _compute_keys(dk_desc, dv_desc, Sums, DQ, cu_q, cu_k, smem, bars, work, scale, scale_log2, 1, shape)


@gluon.jit
def _compute_dq(DQ, cu_q, cu_k, smem, bars, work, shape: gl.constexpr):
    """The warpgroup that multiplies the others' dS by K and adds the product to scratch."""
    WARPGROUPS: gl.constexpr = shape[0]
    GROUP: gl.constexpr = shape[1]
    SPLIT: gl.constexpr = shape[2]
    D: gl.constexpr = shape[3]
    BUFFERS: gl.constexpr = shape[5]
    VARLEN: gl.constexpr = shape[6]
    WINDOW: gl.constexpr = shape[7]
    TOGETHER: gl.constexpr = shape[8]
    ORDERED: gl.constexpr = shape[9]
    DQ_BY: gl.constexpr = shape[10]
    STAGED: gl.constexpr = shape[14]
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem = smem
    kv_ready, q_ready, do_ready, q_empty, do_empty, ds_ready, ds_empty, turn, added, passed = bars
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window = work
    dtype: gl.constexpr = k_smem.dtype
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    PANEL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ok, b, head, place, first_key, offset, len_q, len_k, start_q, start_k, base, course = key_tile(
        cu_q, cu_k, work, 64 * WARPGROUPS, GROUP, SPLIT, WINDOW, VARLEN, TOGETHER, ORDERED)
    if ok:
        k_panels = k_smem._reinterpret(dtype, [WARPGROUPS * (D // 64), 64, 64], PANEL)
        ds_panels = ds_smem._reinterpret(dtype, [BUFFERS * WARPGROUPS, 64, 64], PANEL)
        offsets = DQ.to(gl.int64) + scratch_offsets(Q_LAYOUT, 64)
        places = staging_places(0, Q_LAYOUT, 64)
        zero = gl.zeros([64, 64], gl.float32, Q_LAYOUT)
        head_rows = rows // 64
        tile0 = (b * (heads_kv * GROUP) + head * GROUP) * head_rows + base // 64
        m, g, left, total = first_tile(course)
        buffer = 0
        phase = 0
        mbarrier.wait(kv_ready, 0)
        for i in range(total):
            barrier_wait(ds_ready + buffer, phase)
            dq = dq_product(ds_panels, k_panels, buffer, zero, 0, WARPGROUPS, D)
            tell_added(i - 1, added, ORDERED, STAGED)
            pointer = offsets + (tile0 + g * head_rows + m).to(gl.int64) * 16384
            m, g, left = next_tile(m, g, left, course, TOGETHER)
            dq = warpgroup_mma_wait(0, deps=[dq])
            barrier_arrive(ds_empty + buffer, True)
            add_dq(pointer, places, dq, i, bars, ORDERED, STAGED, DQ_BY)
            buffer, phase = advance(buffer, phase, BUFFERS)
        tell_added(total - 1, added, ORDERED, STAGED)
        if STAGED:
            staging_drain(rows)


@gluon.jit(do_not_specialize=["batch", "seqlen_q", "seqlen_k", "heads_kv", "rows", "tiles", "section", "window",
                              "slots"])
def hopper_bwd_keys_kernel(
    q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, Sums, DQ, Turn, Lse2, Delta, Part, DSinks, CuSeqlensQ,
    CuSeqlensK, batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window, slots, scale, scale_log2,
    GROUP: gl.constexpr, SPLIT: gl.constexpr, D: gl.constexpr, WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr, BUFFERS: gl.constexpr, VARLEN: gl.constexpr, WINDOW: gl.constexpr, TOGETHER: gl.constexpr,
    DQ_BY: gl.constexpr, ORDERED: gl.constexpr, STAGED: gl.constexpr, ROUNDED: gl.constexpr, REGISTERS: gl.constexpr,
    DQ_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr, KEEP: gl.constexpr, D2: gl.constexpr,
):
    """One program per 64 * WARPGROUPS keys of a key head, and with SPLIT one for each share of the query heads.

    *_desc: descriptors of (batch, seqlen, heads, head_dim) with blocks of (1, 64, 1, D), see descriptors.describe.
    Sums: with SPLIT, float32 parts of dK and dV, tiles of 64 x D (see scratch_offsets) [tile of keys, share, warpgroup,
    dK or dV]. DQ: float32 scratch of zeros, tiles of 64 x
    64 [batch, head, row / 64, column / 64]. Turn: with ORDERED, int32 zeros, two for each 64 rows of
    DQ: the first says how many tiles of keys have added to them. Lse2, Delta: float32 (batch, heads_q, rows), a packed
    batch (heads_q, rows) with sequence i from row (start_i // 64 + i) * 64 on; +inf and 0 beyond a sequence.
    Part, DSinks: where given, the programs sum each head's ``slots`` parts. D2: 0, or at head dim 96 the 32 columns of
    it behind the first 64: only those of D = 128 are multiplied. STAGED: dQ goes to scratch by way of shared
    memory, see staging.
    """
    dtype: gl.constexpr = q_desc.dtype
    PANEL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    k_smem = gl.allocate_shared_memory(dtype, [WARPGROUPS] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [WARPGROUPS] + v_desc.block_type.shape, v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES] + do_desc.block_type.shape, do_desc.layout)
    ds_smem = q_smem
    if DQ_BY:
        ds_smem = gl.allocate_shared_memory(dtype, [BUFFERS * WARPGROUPS, 64, 64], PANEL)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 64], FLAT)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 64], FLAT)
    # Who arrives, how often, who waits for which parity; round r of a slot is its r-th use, from 0.
    # kv_ready: the loader once, and the bytes of all K and V; every warpgroup waits for parity 0.
    # q_ready, do_ready: the loader twice (with the bytes it expects, and once the rows' statistics are stored); the
    #   warpgroups with keys wait for parity r % 2.
    # q_empty, do_empty: each warp of those warpgroups once, when its product that reads the slot has ended; the loader
    #   waits, before it fills the slot for round r, for parity (r + 1) % 2: at round 0 the one before the first, which
    #   is passed at once.
    # ds_ready: each warp of the warpgroups with keys once, when its part of dS is stored; who multiplies it waits for
    #   parity r % 2. ds_empty (DQ_BY 1): each warp of the dQ warpgroup once, when that product has ended; the
    #   warpgroups with keys wait for parity (r + 1) % 2. With DQ_BY 2 nobody waits to overwrite: what is written at
    #   turn i was read at turn i - 3, which the other warpgroup had behind it when it stored its dS of turn i - 2; and
    #   for that its arrival was waited for at turn i - 1.
    # turn (ORDERED): the warp of take_turns once, when the tile's turn has come; who adds dQ waits for parity r % 2.
    #   added: each warp that adds once, when it has issued its additions or, if STAGED, the copy engine has added
    #   them; the passing warp waits for parity r % 2.
    #   passed: the passing warp once, when the next program has its turn; the taking warp waits, before round r, for
    #   parity (r + 1) % 2. Nobody can be lapped: round r + 1 of a slot begins once round r has been passed on.
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    barriers_declare(rows)
    q_empty = 0
    do_empty = q_empty + STAGES
    ds_ready = do_empty + STAGES
    ds_empty = ds_ready + BUFFERS
    turn = ds_empty + BUFFERS
    added = turn + TURNS
    passed = added + TURNS
    if STAGED:
        staging_declare(rows, D)
    mbarrier.init(kv_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=2)
        mbarrier.init(do_ready.index(i), count=2)
        barrier_init(q_empty + i, 4 * WARPGROUPS)
        barrier_init(do_empty + i, 4 * WARPGROUPS)
    for i in gl.static_range(BUFFERS):
        barrier_init(ds_ready + i, 4 * WARPGROUPS)
        barrier_init(ds_empty + i, 4)
    if ORDERED:
        for i in gl.static_range(TURNS):
            barrier_init(turn + i, 1)
            barrier_init(added + i, 4 if DQ_BY == 1 else 4 * WARPGROUPS)
            barrier_init(passed + i, 1)
    fence_async_shared()
    gl.thread_barrier()
    smem = (k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem)
    bars = (kv_ready, q_ready, do_ready, q_empty, do_empty, ds_ready, ds_empty, turn, added, passed)
    work = (batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window)
    # by place, as the partitions take it apart
    shape: gl.constexpr = (WARPGROUPS, GROUP, SPLIT, D, STAGES, BUFFERS, VARLEN, WINDOW, TOGETHER, ORDERED, DQ_BY,
                           ROUNDED, KEEP, D2, STAGED)
    order: gl.constexpr = (64 * WARPGROUPS, GROUP, SPLIT, VARLEN, WINDOW, TOGETHER, ORDERED, DQ_BY - 1, False,
                           False)
    keys = (dk_desc, dv_desc, Sums, DQ, CuSeqlensQ, CuSeqlensK, smem, bars, work, scale, scale_log2, shape)
    load = (q_desc, k_desc, v_desc, do_desc, Lse2, Delta, Part, DSinks, slots, CuSeqlensQ, CuSeqlensK, smem, bars, work,
            shape)
    sum_up = (DQ, CuSeqlensQ, CuSeqlensK, smem, bars, work, shape)
    turns = (Turn, CuSeqlensQ, CuSeqlensK, turn, added, passed, work, order)
    if DQ_BY == 1 and ORDERED:
        gl.warp_specialize([
            (_compute_first, keys),
            (_compute_second, keys),
            (_compute_dq, sum_up),
            (_load_rows, load),
            (take_turns, turns),
            (pass_turns, turns),
        ], [4, 4, 1, 1, 1], [REGISTERS, DQ_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS])
    elif DQ_BY == 1:
        gl.warp_specialize([
            (_compute_first, keys),
            (_compute_second, keys),
            (_compute_dq, sum_up),
            (_load_rows, load),
        ], [4, 4, 1], [REGISTERS, DQ_REGISTERS, LOADER_REGISTERS])
    elif WARPGROUPS == 1:
        gl.warp_specialize([
            (_compute_first, keys),
            (_load_rows, load),
        ], [1], [LOADER_REGISTERS])
    elif ORDERED:
        gl.warp_specialize([
            (_compute_first, keys),
            (_compute_second, keys),
            (_load_rows, load),
            (take_turns, turns),
            (pass_turns, turns),
        ], [4, 1, 1, 1], [REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS])
    else:
        gl.warp_specialize([
            (_compute_first, keys),
            (_compute_second, keys),
            (_load_rows, load),
        ], [4, 1], [REGISTERS, LOADER_REGISTERS])
