"""The Hopper backward for head dims above 128: dK, dV and a share of dQ by programs of 64 keys.

64 keys are all whose dK and dV the registers of a multiprocessor hold. Two warpgroups share the products and not the
columns: the first makes S, P and dV, the second dP, dS and dK, so that each multiplies 64 x 64 in front of its
exponentials or sums and as wide a tile as there is behind them; what one needs of the other, P and dS, passes through
shared memory. See :func:`hopper_bwd_wide_kernel`, and backward_pair for two programs that add one dQ.
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

from flash_sink_attn.hopper.backward_common import scratch_add_64, scratch_offsets
from flash_sink_attn.hopper.backward_walk import TURNS, first_tile, key_tile, next_tile, pass_turns, take_turns
from flash_sink_attn.hopper.backward_wide_common import (
    allocate_barriers,
    allocate_tiles,
    first_dp,
    first_s,
    give_p,
    load_keys,
    load_tiles,
    make_ds,
    positions,
    start_dk,
    start_dp,
    start_s,
    store_dk,
    store_dv,
    tiles_in_scratch,
)
from flash_sink_attn.hopper.common import (
    advance,
    await_launch_before,
    barrier_arrive,
    barrier_init,
    barrier_wait,
    hold_half,
    load_block,
    place_of,
)
from flash_sink_attn.hopper.staging import (
    BESIDE_192,
    staging_add,
    staging_declare,
    staging_drain,
    staging_places,
)


@gluon.jit
def _load(descs, Lse2, Delta, cu_q, cu_k, smem, bars, work, shape: gl.constexpr):
    """The loader: K and V once, then a ring of q, do and their rows' statistics."""
    GROUP: gl.constexpr = shape[0]
    D2: gl.constexpr = shape[2]
    VARLEN: gl.constexpr = shape[5]
    WINDOW: gl.constexpr = shape[6]
    ORDERED: gl.constexpr = shape[7]
    q_desc, q2_desc, k_desc, k2_desc, v_desc, do_desc = descs
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    kv_ready, q_ready, do_ready, q_empty, do_empty, p_ready, ds_ready, turn, added, passed = bars
    ok, b, head, place, first_key, offset, len_q, len_k, start_q, start_k, base, course = key_tile(
        cu_q, cu_k, work, 64, GROUP, 1, WINDOW, VARLEN, not WINDOW, ORDERED)
    q_b, q_row = place_of(b, start_q, len_q, VARLEN)
    k_b, k_row = place_of(b, start_k, len_k, VARLEN)
    BYTES: gl.constexpr = k_desc.block_type.nbytes + (k2_desc.block_type.nbytes if D2 else 0)
    if ok:
        mbarrier.expect(kv_ready, BYTES + v_desc.block_type.nbytes)
        load_keys(descs, k_b, k_row + first_key, head, kv_ready, smem, 0, shape)
        load_block(v_desc, k_b, k_row + first_key, head, 0, kv_ready, v_smem.index(0))
    await_launch_before()
    if ok:
        load_tiles(descs, Lse2, Delta, smem, bars, work, b, q_b, q_row, head, base, course, shape)


@gluon.jit
def _start_dq(smem, i, zero, INDEX: gl.constexpr, D: gl.constexpr, D2: gl.constexpr):
    """Starts dQ = dS K of tile ``i`` for a part of the columns, as wide as ``zero``.

    Without D2 part number INDEX of all; with it the first warpgroup (INDEX 0) makes D columns and the second D2.
    """
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    ds = ds_smem.index(i & 1).permute((1, 0))
    if D2 == 0:
        PANEL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        WIDTH: gl.constexpr = zero.shape[1]
        k = k_smem._reinterpret(k_smem.dtype, [D // WIDTH, 64, WIDTH], PANEL).index(INDEX)
        return warpgroup_mma(ds, k, zero, use_acc=False, is_async=True)
    elif INDEX == 0:
        return warpgroup_mma(ds, k_smem.index(0).reshape([64, D]), zero, use_acc=False, is_async=True)
    else:
        return warpgroup_mma(ds, k2_smem.index(0).reshape([64, D2]), zero, use_acc=False, is_async=True)


@gluon.jit
def _add_dq(pointer, places, dq, STAGED: gl.constexpr):
    if STAGED:
        staging_add(pointer, places, dq)
    else:
        scratch_add_64(pointer, dq)


@gluon.jit
def _compute_values(dv_desc, DQ, cu_q, cu_k, smem, bars, work, scale_log2, shape: gl.constexpr):
    """The warpgroup that makes S, P and dV, and the first columns of dQ."""
    GROUP: gl.constexpr = shape[0]
    D: gl.constexpr = shape[1]
    D2: gl.constexpr = shape[2]
    DV: gl.constexpr = shape[3]
    STAGES: gl.constexpr = shape[4]
    VARLEN: gl.constexpr = shape[5]
    WINDOW: gl.constexpr = shape[6]
    ORDERED: gl.constexpr = shape[7]
    STAGED: gl.constexpr = shape[8]
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    kv_ready, q_ready, do_ready, q_empty, do_empty, p_ready, ds_ready, turn, added, passed = bars
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window = work
    # at head dim 256 the registers hold 64 columns of dQ at a time beside dV
    PARTS: gl.constexpr = 1 if D2 else D // 128
    PART: gl.constexpr = D if D2 else 64
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    V_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                       instr_shape=[16, PART, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=V_LAYOUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    ok, b, head, place, first_key, offset, len_q, len_k, start_q, start_k, base, course = key_tile(
        cu_q, cu_k, work, 64, GROUP, 1, WINDOW, VARLEN, not WINDOW, ORDERED)
    if ok:
        key, row = positions(first_key - offset, S_LAYOUT)
        zero = gl.zeros([64, 64], gl.float32, S_LAYOUT)
        dq_zero = gl.zeros([64, PART], gl.float32, Q_LAYOUT)
        dv = gl.zeros([64, DV], gl.float32, V_LAYOUT)
        offsets = DQ.to(gl.int64) + scratch_offsets(Q_LAYOUT, PART)
        places = staging_places(0, Q_LAYOUT, PART)
        m, g, left, total = first_tile(course)
        slot = 0
        phase = 0
        tile0, head_rows = tiles_in_scratch(b, head, base, work, GROUP)
        # dQ is a tile late, so that the other warpgroup makes dS meanwhile; the first one's is of zeros
        before = tile0 + g * head_rows + m
        ds_smem.index(1).store(zero.to(ds_smem.dtype))
        fence_async_shared()
        gl.thread_barrier()
        # from the first one on each turn starts the next one's
        s, lse2 = first_s(smem, bars, total, zero, shape)
        for i in range(total):
            p = give_p(s, lse2, key, row, m, first_key - offset, i, slot, smem, bars, work, scale_log2, A_LAYOUT, shape)
            do = do_smem.index(slot).reshape([64, DV])
            mbarrier.wait(do_ready.index(slot), phase)
            dv = warpgroup_mma(p, do, dv, is_async=True)
            current = tile0 + g * head_rows + m
            m, g, left = next_tile(m, g, left, course, not WINDOW)
            following, following_phase = advance(slot, phase, STAGES)
            # dS of the tile before: at the first one the phase before the first, which is passed at once
            barrier_wait(ds_ready + (i + 1) % 2, (i + 1) // 2 & 1 ^ 1)
            dq = _start_dq(smem, i + 1, dq_zero, 0, D, D2)
            dv = warpgroup_mma_wait(1, deps=[dv])
            hold_half(p)
            barrier_arrive(do_empty + slot, True)
            to = offsets + before.to(gl.int64) * ((D + D2) * 256)
            before = current
            if ORDERED:
                barrier_wait(turn + i % TURNS, i // TURNS & 1)
            for c in gl.static_range(1, PARTS):
                more = _start_dq(smem, i + 1, dq_zero, c, D, D2)
                dq = warpgroup_mma_wait(1, deps=[dq])
                _add_dq(to + (c - 1) * (PART * 256), places, dq, STAGED)
                dq = more
            mbarrier.wait(q_ready.index(following), following_phase, pred=i + 1 < total)
            s = start_s(smem, following, zero, shape)
            dq = warpgroup_mma_wait(2 if D2 else 1, deps=[dq])
            _add_dq(to + (PARTS - 1) * (PART * 256), places, dq, STAGED)
            if ORDERED:
                barrier_arrive(added + i % TURNS, True)
            lse2 = lse_smem.index(following).load(ROW)
            # not carried in flight over the back edge: ptxas would serialise all products (C7514)
            s = warpgroup_mma_wait(0, deps=[s])
            slot = following
            phase = following_phase
        if total > 0:
            barrier_wait(ds_ready + (total + 1) % 2, (total + 1) // 2 & 1 ^ 1)
            to = offsets + before.to(gl.int64) * ((D + D2) * 256)
            if ORDERED:
                barrier_wait(turn + total % TURNS, total // TURNS & 1)
            for c in gl.static_range(PARTS):
                dq = warpgroup_mma_wait(0, deps=[_start_dq(smem, total + 1, dq_zero, c, D, D2)])
                _add_dq(to + c * (PART * 256), places, dq, STAGED)
            if ORDERED:
                barrier_arrive(added + total % TURNS, True)
        store_dv(dv_desc, dv, smem, b, start_k, len_k, first_key, head, shape)
        if STAGED:
            staging_drain(rows)


@gluon.jit
def _compute_keys(dk_desc, dk2_desc, DQ, cu_q, cu_k, smem, bars, work, scale, shape: gl.constexpr):
    """The warpgroup that makes dP, dS and dK, and the last columns of dQ."""
    GROUP: gl.constexpr = shape[0]
    D: gl.constexpr = shape[1]
    D2: gl.constexpr = shape[2]
    STAGES: gl.constexpr = shape[4]
    VARLEN: gl.constexpr = shape[5]
    WINDOW: gl.constexpr = shape[6]
    ORDERED: gl.constexpr = shape[7]
    STAGED: gl.constexpr = shape[8]
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    kv_ready, q_ready, do_ready, q_empty, do_empty, p_ready, ds_ready, turn, added, passed = bars
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window = work
    PARTS: gl.constexpr = 1 if D2 else D // 128
    PART: gl.constexpr = D2 if D2 else 64
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    # of dQ, and of dK's last columns where they are a tile of their own: just as wide
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                       instr_shape=[16, PART, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=K_LAYOUT, k_width=2)
    ok, b, head, place, first_key, offset, len_q, len_k, start_q, start_k, base, course = key_tile(
        cu_q, cu_k, work, 64, GROUP, 1, WINDOW, VARLEN, not WINDOW, ORDERED)
    if ok:
        zero = gl.zeros([64, 64], gl.float32, S_LAYOUT)
        dq_zero = gl.zeros([64, PART], gl.float32, Q_LAYOUT)
        dk = gl.zeros([64, D], gl.float32, K_LAYOUT)
        dk2 = dq_zero
        COLUMN: gl.constexpr = D + D2 - PARTS * PART
        offsets = DQ.to(gl.int64) + COLUMN * 256 + scratch_offsets(Q_LAYOUT, PART)
        places = staging_places(BESIDE_192, Q_LAYOUT, PART)
        m, g, left, total = first_tile(course)
        slot = 0
        phase = 0
        tile0, head_rows = tiles_in_scratch(b, head, base, work, GROUP)
        # from the first one on each turn starts the next one's
        dp = first_dp(smem, bars, total, zero, shape)
        for i in range(total):
            ds = make_ds(dp, i, slot, smem, bars)
            ds_smem.index(i & 1).store(ds)
            fence_async_shared()
            barrier_arrive(ds_ready + i % 2, True)
            barrier_arrive(do_empty + slot, True)
            ds = hold_half(gl.convert_layout(ds, A_LAYOUT))
            mbarrier.wait(q_ready.index(slot), phase)
            dk, dk2 = start_dk(ds, smem, slot, dk, dk2, shape)
            current = tile0 + g * head_rows + m
            m, g, left = next_tile(m, g, left, course, not WINDOW)
            following, following_phase = advance(slot, phase, STAGES)
            barrier_wait(ds_ready + i % 2, i // 2 & 1)
            dq = _start_dq(smem, i, dq_zero, PARTS, D, D2)
            if D2:
                dk, dk2 = warpgroup_mma_wait(1, deps=[dk, dk2])
            else:
                dk = warpgroup_mma_wait(1, deps=[dk])
            hold_half(ds)
            barrier_arrive(q_empty + slot, True)
            to = offsets + current.to(gl.int64) * ((D + D2) * 256)
            if ORDERED:
                barrier_wait(turn + i % TURNS, i // TURNS & 1)
            for c in gl.static_range(1, PARTS):
                more = _start_dq(smem, i, dq_zero, PARTS + c, D, D2)
                dq = warpgroup_mma_wait(1, deps=[dq])
                _add_dq(to + (c - 1) * (PART * 256), places, dq, STAGED)
                dq = more
            mbarrier.wait(do_ready.index(following), following_phase, pred=i + 1 < total)
            dp = start_dp(smem, following, zero, shape)
            dq = warpgroup_mma_wait(1, deps=[dq])
            _add_dq(to + (PARTS - 1) * (PART * 256), places, dq, STAGED)
            if ORDERED:
                barrier_arrive(added + i % TURNS, True)
            # not carried in flight over the back edge, as above
            dp = warpgroup_mma_wait(0, deps=[dp])
            slot = following
            phase = following_phase
        if ORDERED:
            # the other warpgroup has a step more
            barrier_arrive(added + total % TURNS, total > 0)
        store_dk(dk_desc, dk2_desc, dk, dk2, scale, smem, b, start_k, len_k, first_key, head, shape)
        if STAGED:
            staging_drain(rows)


@gluon.jit(do_not_specialize=["batch", "seqlen_q", "seqlen_k", "heads_kv", "rows", "tiles", "section", "window"])
def hopper_bwd_wide_kernel(
    q_desc, q2_desc, k_desc, k2_desc, v_desc, do_desc, dk_desc, dk2_desc, dv_desc, DQ, Turn, Lse2, Delta, CuSeqlensQ,
    CuSeqlensK,
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window, scale, scale_log2,
    GROUP: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
    VARLEN: gl.constexpr, WINDOW: gl.constexpr, ORDERED: gl.constexpr, STAGED: gl.constexpr, REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    """One program per 64 keys of a key head, which walks the query tiles that see them, all heads of a tile in turn.

    *_desc: descriptors of (batch, seqlen, heads, head_dim) with blocks of (1, 64, 1, D) or DV, and those with a 2 of
    the columns from D on in blocks of (1, 64, 1, D2), where D2 is not 0; see descriptors.describe. DQ: float32 scratch
    of zeros, (64, D + D2) for each tile of each head in the order of scratch_offsets. Turn: with ORDERED, int32 zeros,
    two for each 64 rows of DQ: how many tiles of keys have added to their last columns, and to their first. Lse2,
    Delta, STAGED: as hopper_bwd_keys_kernel's.
    """
    # by place, as the partitions take it apart
    shape: gl.constexpr = (GROUP, D, D2, DV, STAGES, VARLEN, WINDOW, ORDERED, STAGED)
    descs = (q_desc, q2_desc, k_desc, k2_desc, v_desc, do_desc)
    smem = allocate_tiles(descs, 1, 2, shape)
    # Who arrives, how often, who waits for which parity; round r of a slot is its r-th use, i the i-th tile, from 0.
    # kv_ready: the loader once, and the bytes of K and V; both warpgroups wait for parity 0.
    # q_ready, do_ready: the loader twice (with the bytes it expects, and once the rows' statistics are stored); both
    #   warpgroups wait for parity r % 2.
    # q_empty, do_empty: each of the eight warps once, when its product that reads the slot has ended and, of lse the
    #   first four and of delta the others, it has read the statistics; the loader waits, before it fills the slot for
    #   round r, for parity (r + 1) % 2: at round 0 the one before the first, which is passed at once.
    # p_ready, ds_ready: two each, for even and odd tiles, since the first warpgroup may be two tiles ahead of what the
    #   second waits for. p_ready: each warp that makes P once, when its part of tile i's is stored; those that make dS
    #   wait for parity i / 2 % 2. ds_ready: the other way round; those that make P wait for tile i's in tile
    #   i + 1 (in tile 0 for the phase before the first, and after the last tile for its), and those that make dS wait
    #   for it too, since each reads all of dS.
    # turn (ORDERED): the warp of take_turns once, when both turns of step i have come, the second warpgroup's for tile
    #   i and the first one's for tile i - 1; both wait for it before they add. added: each of the eight warps once,
    #   when it has added its columns of step i. In the step after the last tile the second warpgroup has nothing to
    #   add: it arrives when the first one has made that tile's P, and so has arrived for all steps before the last
    #   two. passed: as hopper_bwd_keys_kernel's.
    # Nobody waits to overwrite. P(i) goes where P(i - 2) was, after the wait for all of dS(i - 2), which was made of
    # it. dS(i) goes where dS(i - 2) was, which both warpgroups' products have read: the first has said so with P(i)
    # and the second with dS(i - 1), for both of which all warps that write have waited.
    bars, turn = allocate_barriers(rows, STAGES)
    added = turn + TURNS
    passed = added + TURNS
    if ORDERED:
        for i in gl.static_range(TURNS):
            barrier_init(turn + i, 1)
            barrier_init(added + i, 8)
            barrier_init(passed + i, 1)
    fence_async_shared()
    gl.thread_barrier()
    bars = bars + (turn, added, passed)
    work = (batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window)
    values = (dv_desc, DQ, CuSeqlensQ, CuSeqlensK, smem, bars, work, scale_log2, shape)
    keys = (dk_desc, dk2_desc, DQ, CuSeqlensQ, CuSeqlensK, smem, bars, work, scale, shape)
    load = (descs, Lse2, Delta, CuSeqlensQ, CuSeqlensK, smem, bars, work, shape)
    if STAGED:
        staging_declare(rows, D + D2)
    if ORDERED:
        order: gl.constexpr = (64, GROUP, 1, VARLEN, WINDOW, not WINDOW, ORDERED, 0, False, True)
        turns = (Turn, CuSeqlensQ, CuSeqlensK, turn, added, passed, work, order)
        gl.warp_specialize([
            (_compute_values, values), (_compute_keys, keys), (_load, load),
            (take_turns, turns), (pass_turns, turns),
        ], [4, 1, 1, 1], [REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS])
    else:
        gl.warp_specialize([(_compute_values, values), (_compute_keys, keys), (_load, load)], [4, 1],
                           [REGISTERS, LOADER_REGISTERS])
