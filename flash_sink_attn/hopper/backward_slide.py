"""The Hopper backward for windows of at most 129 keys: one program slides over queries and keys at once.

A tile of 64 query rows sees three blocks of 64 keys, which are all there: so dQ is whole at once, and dK and dV, in
registers, are whole when the window has passed. Five matrix products per pair of tiles, nothing accumulated outside but
the blocks that two programs share, which a second kernel joins: see :func:`hopper_bwd_slide_kernel`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flash_sink_attn.hopper.backward_common import (
    above,
    opaque,
    scratch_offsets,
    scratch_put,
    up_to,
)
from flash_sink_attn.hopper.common import (
    LOG2E,
    advance,
    barrier_arrive,
    barrier_init,
    barrier_wait,
    barriers_declare,
    find_sequence,
    hold_half,
    load_block,
    place_of,
    store_block,
)


@gluon.jit
def _run(cu_q, work, run, VARLEN: gl.constexpr):
    """(ok, batch, key head, first tile of the run, end of it, tiles of the sequence, its length and start, number of
    its first tile among all sequences', run number): a run is ``run`` query tiles of one sequence."""
    batch, seqlen_q, heads_kv, rows, window = work
    tile = gl.program_id(0)
    head = tile % heads_kv
    number = tile // heads_kv
    if VARLEN:
        sequence, start, length, r = find_sequence(cu_q, batch, seqlen_q, number, 64 * run)
        b = 0
        base = start // 64 + sequence
        ok = (r >= 0) & (r * run * 64 < length)  # offsets that fall lead before a sequence's beginning
    else:
        runs = gl.cdiv(seqlen_q, 64 * run)
        r = number % runs
        b = number // runs
        length = seqlen_q
        start = 0
        base = b * (rows // 64)
        ok = True
    count = gl.cdiv(length, 64)
    return ok, b, head, r * run, gl.minimum(r * run + run, count), count, length, start, base


@gluon.jit
def _slide_load(q_desc, k_desc, v_desc, o_desc, do_desc, cu_q, smem, bars, work, run,
                GROUP: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr):
    """The loader of the slide: a ring of q, o and do, and K and V of the four blocks that are in use or come next."""
    k_smem, v_smem, q_smem, do_smem, o_smem, ds_smem, lse_smem, delta_smem, column_smem = smem
    kv_ready, q_ready, kv_empty, q_empty, rows_ready, dq_ready, ds_ready, ds_empty = bars
    ok, b, head, i0, i1, count, length, start, base = _run(cu_q, work, run, VARLEN)
    place, row0 = place_of(b, start, length, VARLEN)
    if ok:
        for block in range(i0 - 2, i0 + 1):
            s = block & 3
            # before the sequence: where the copy engine fills in zeros
            token = gl.where(block < 0, -65536, row0 + block * 64)
            mbarrier.expect(kv_ready.index(s), 2 * k_desc.block_type.nbytes)
            load_block(k_desc, place, token, head, 0, kv_ready.index(s), k_smem.index(s))
            load_block(v_desc, place, token, head, 0, kv_ready.index(s), v_smem.index(s))
        slot = 0
        phase = 1
        for i in range(i0, i1):
            for g in range(GROUP):
                head_q = head * GROUP + g
                barrier_wait(q_empty + slot, phase)
                mbarrier.expect(q_ready.index(slot), 3 * q_desc.block_type.nbytes)
                load_block(o_desc, place, row0 + i * 64, head_q, 0, q_ready.index(slot), o_smem.index(slot))
                load_block(do_desc, place, row0 + i * 64, head_q, 0, q_ready.index(slot), do_smem.index(slot))
                load_block(q_desc, place, row0 + i * 64, head_q, 0, q_ready.index(slot), q_smem.index(slot))
                slot, phase = advance(slot, phase, STAGES)
            # the next tile's new key block replaces block n - 4, dead since the end of tile n - 2
            n = i + 1
            if n < i1:
                s = n & 3
                use = n - i0 - 2
                if use >= 0:
                    barrier_wait(kv_empty + s, (use >> 2) & 1)
                mbarrier.expect(kv_ready.index(s), 2 * k_desc.block_type.nbytes)
                token = row0 + n * 64
                load_block(k_desc, place, token, head, 0, kv_ready.index(s), k_smem.index(s))
                load_block(v_desc, place, token, head, 0, kv_ready.index(s), v_smem.index(s))


@gluon.jit
def _slide_rows(Lse, DLse, Sinks, Part, slots, cu_q, smem, bars, work, run, GROUP: gl.constexpr, D: gl.constexpr,
                STAGES: gl.constexpr, VARLEN: gl.constexpr):
    """Two warps that turn O and dO into the rows' statistics, and those into parts of the sinks' gradient."""
    k_smem, v_smem, q_smem, do_smem, o_smem, ds_smem, lse_smem, delta_smem, column_smem = smem
    kv_ready, q_ready, kv_empty, q_empty, rows_ready, dq_ready, ds_ready, ds_empty = bars
    batch, seqlen_q, heads_kv, rows, window = work
    CHUNK: gl.constexpr = 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [2, 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    ok, b, head, i0, i1, count, length, start, base = _run(cu_q, work, run, VARLEN)
    if ok:
        row = gl.arange(0, 64, layout=FLAT)
        slot = 0
        phase = 0
        for i in range(i0, i1):
            for g in range(GROUP):
                head_q = head * GROUP + g
                if VARLEN:
                    row_at = head_q * seqlen_q.to(gl.int64) + start + i * 64
                else:
                    row_at = (b * (heads_kv * GROUP) + head_q) * seqlen_q.to(gl.int64) + i * 64
                # before the wait, so that their latency hides behind it
                lse2 = gl.load(Lse + row_at + row, mask=i * 64 + row < length, other=float("inf")) * LOG2E
                lse2 = gl.where(lse2 == float("-inf"), float("inf"), lse2)
                lse_gradient = gl.zeros_like(lse2)
                if DLse is not None:
                    lse_gradient = gl.load(DLse + row_at + row, mask=i * 64 + row < length, other=0.0)
                sink = 0.0
                if Sinks is not None:
                    sink = gl.load(Sinks + head_q).to(gl.float32) * LOG2E
                mbarrier.wait(q_ready.index(slot), phase)
                o = o_smem.index(slot).reshape([64, D])
                do = do_smem.index(slot).reshape([64, D])
                for c in gl.static_range(64 // CHUNK):
                    products = (o.slice(c * CHUNK, CHUNK).load(LAYOUT).to(gl.float32)
                                * do.slice(c * CHUNK, CHUNK).load(LAYOUT).to(gl.float32))
                    delta_smem.index(slot).slice(c * CHUNK, CHUNK).store(gl.sum(products, 1))
                lse_smem.index(slot).store(lse2)
                gl.thread_barrier()
                delta = gl.where(i * 64 + row < length, delta_smem.index(slot).load(FLAT) - lse_gradient, 0.0)
                delta_smem.index(slot).store(delta)
                barrier_arrive(rows_ready + slot, True)
                if Part is not None:
                    gl.store(Part + head_q.to(gl.int64) * slots + base + i, -gl.sum(gl.exp2(sink - lse2) * delta, 0))
                slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _slide_store(dq_desc, cu_q, smem, bars, work, run, GROUP: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr):
    """One warp that sends dQ out from O's place, so that no warpgroup waits for that."""
    k_smem, v_smem, q_smem, do_smem, o_smem, ds_smem, lse_smem, delta_smem, column_smem = smem
    kv_ready, q_ready, kv_empty, q_empty, rows_ready, dq_ready, ds_ready, ds_empty = bars
    ok, b, head, i0, i1, count, length, start, base = _run(cu_q, work, run, VARLEN)
    if ok:
        slot = 0
        phase = 0
        for i in range(i0, i1):
            for g in range(GROUP):
                barrier_wait(dq_ready + slot, phase)
                place, row0 = place_of(b, start, length, VARLEN)
                store_block(dq_desc, place, row0 + i * 64, head * GROUP + g, 0, o_smem.index(slot))
                tma.store_wait(0)
                barrier_arrive(q_empty + slot, True)
                slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _slide_compute(dk_desc, dv_desc, Shared, cu_q, smem, bars, work, run, scale, scale_log2,
                   INDEX: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
                   BUFFERS: gl.constexpr, VARLEN: gl.constexpr):
    """Warpgroup number INDEX of three: the key blocks INDEX, INDEX + 3, ...; a tile sees three in a row. In turn they
    make dQ of a tile and head from everybody's dS."""
    k_smem, v_smem, q_smem, do_smem, o_smem, ds_smem, lse_smem, delta_smem, column_smem = smem
    kv_ready, q_ready, kv_empty, q_empty, rows_ready, dq_ready, ds_ready, ds_empty = bars
    batch, seqlen_q, heads_kv, rows, window = work
    dtype: gl.constexpr = k_smem.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=D_LAYOUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    ok, b, head, i0, i1, count, length, start, base = _run(cu_q, work, run, VARLEN)
    if ok:
        key_in_block = gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
        zero = gl.zeros([64, 64], gl.float32, S_LAYOUT)
        zero_d = gl.zeros([64, D], gl.float32, D_LAYOUT)
        dk = zero_d
        dv = gl.zeros([64, D], gl.float32, D_LAYOUT)
        slot = 0
        phase = 0
        buffer = 0
        buffer_phase = 1
        turn = 0
        for i in range(i0, i1):
            distance = (i + (3 - INDEX)) % 3
            block = i - distance
            kv_slot = block & 3
            k = k_smem.index(kv_slot).reshape([64, D])
            v = v_smem.index(kv_slot).reshape([64, D])
            if (distance == 0) | (i == i0):
                mbarrier.wait(kv_ready.index(kv_slot), ((block - (i0 - 2)) >> 2) & 1)
            # distance of each key from the tile's first row; a block before the sequence is out of every window
            ahead = gl.where(block < 0, -1048576, -64 * distance)
            for _ in range(GROUP):
                q = q_smem.index(slot).reshape([64, D])
                do = do_smem.index(slot).reshape([64, D])
                mbarrier.wait(q_ready.index(slot), phase)
                s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
                barrier_wait(rows_ready + slot, phase)
                s = warpgroup_mma_wait(0, deps=[s])
                p = gl.exp2(s * scale_log2 - gl.expand_dims(lse_smem.index(slot).load(ROW), 0))
                # row numbers from shared memory: kept in registers they would be spilled
                if ahead + 63 > 0:
                    p = up_to(p, gl.expand_dims(key_in_block, 1) + ahead, gl.expand_dims(column_smem.load(ROW), 0))
                if ahead + window <= 63:
                    p = above(p, gl.expand_dims(key_in_block, 1) + (ahead + window),
                               gl.expand_dims(column_smem.load(ROW), 0))
                p16 = hold_half(gl.convert_layout(p.to(dtype), A_LAYOUT))
                dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
                dv_next = warpgroup_mma(p16, do, dv, is_async=True)
                dp = warpgroup_mma_wait(1, deps=[dp])
                ds = (p * (dp - gl.expand_dims(delta_smem.index(slot).load(ROW), 0))).to(dtype)
                barrier_wait(ds_empty + buffer, buffer_phase)
                ds_smem.index(buffer * 3 + INDEX).store(ds)
                fence_async_shared()
                barrier_arrive(ds_ready + buffer, True)
                ds = hold_half(gl.convert_layout(ds, A_LAYOUT))
                dk_next = warpgroup_mma(ds, q, dk, is_async=True)
                dv, dk = warpgroup_mma_wait(0, deps=[dv_next, dk_next])
                hold_half(p16)
                hold_half(ds)
                barrier_arrive(q_empty + slot, True)
                if turn == INDEX:
                    barrier_wait(ds_ready + buffer, buffer_phase ^ 1)
                    x = opaque(i)
                    dq = zero_d
                    for c in gl.static_range(3):
                        dq = warpgroup_mma(ds_smem.index(buffer * 3 + c).permute((1, 0)),
                                           k_smem.index((x - (x + (3 - c)) % 3) & 3).reshape([64, D]), dq,
                                           use_acc=c > 0, is_async=True)
                    dq = warpgroup_mma_wait(0, deps=[dq])
                    barrier_arrive(ds_empty + buffer, True)
                    # O itself was used up before rows_ready
                    o_smem.index(slot).reshape([64, D]).store((dq * scale).to(dtype))
                    fence_async_shared()
                    barrier_arrive(dq_ready + slot, True)
                turn += 1
                if turn == 3:
                    turn = 0
                buffer, buffer_phase = advance(buffer, buffer_phase, BUFFERS)
                slot, phase = advance(slot, phase, STAGES)
            if (distance == 2) | (i == i1 - 1):
                # no later tile of this run sees the block
                if block >= 0:
                    whole = (block >= i0) & ((block + 2 < i1) | (i1 == count))
                    if whole:
                        place, row0 = place_of(b, start, length, VARLEN)
                        v.store(dv.to(dtype))
                        fence_async_shared()
                        gl.thread_barrier()
                        store_block(dv_desc, place, row0 + block * 64, head, 0, v_smem.index(kv_slot))
                        tma.store_wait(0)
                        gl.thread_barrier()
                        v.store((dk * scale).to(dtype))
                        fence_async_shared()
                        gl.thread_barrier()
                        store_block(dk_desc, place, row0 + block * 64, head, 0, v_smem.index(kv_slot))
                        tma.store_wait(0)
                        gl.thread_barrier()
                    else:
                        # [tile, key head][0: the earlier run's part, 1: the later's][dK, dV][64, D]
                        later = (block < i0).to(gl.int32)
                        at = (((base + block) * heads_kv + head) * 2 + later).to(gl.int64) * (2 * 64 * D * 4)
                        pointer = Shared.to(gl.int64) + at + scratch_offsets(D_LAYOUT, D)
                        scratch_put(pointer, dk)
                        scratch_put(pointer + 64 * D * 4, dv)
                dk = zero_d
                dv = gl.zeros([64, D], gl.float32, D_LAYOUT)
            # block i - 2 is dead for everybody
            barrier_arrive(kv_empty + ((i - 2) & 3), True)


@gluon.jit(do_not_specialize=["batch", "seqlen_q", "heads_kv", "rows", "window", "run", "slots"])
def hopper_bwd_slide_kernel(
    q_desc, k_desc, v_desc, o_desc, do_desc, dq_desc, dk_desc, dv_desc, DLse, Lse, Sinks, Part, Shared, CuSeqlensQ,
    batch, seqlen_q, heads_kv, rows, window, run, slots, scale, scale_log2,
    GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, VARLEN: gl.constexpr,
    REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):
    """One program per ``run`` query tiles of a key head. Shared: float32 parts of the blocks that two runs see, see
    hopper_bwd_join_kernel."""
    dtype: gl.constexpr = q_desc.dtype
    PANEL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    k_smem = gl.allocate_shared_memory(dtype, [4] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [4] + v_desc.block_type.shape, v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    o_smem = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    ds_smem = gl.allocate_shared_memory(dtype, [BUFFERS * 3, 64, 64], PANEL)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 64], FLAT)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 64], FLAT)
    column_smem = gl.allocate_shared_memory(gl.int32, [64], FLAT)
    column_smem.store(gl.arange(0, 64, layout=gl.BlockedLayout([1], [32], [4], [0])))
    # Who arrives, how often, who waits for which parity; round r of a slot is its r-th use, from 0.
    # kv_ready: the loader once, and the bytes of K and V of a block; the warpgroup whose block it is waits for r % 2.
    # kv_empty: each warp of the three warpgroups at the end of tile i for block i - 2, which no later tile sees; the
    #   loader waits for that of block n - 4 before it puts block n in its place, parity of the slot's round before.
    # q_ready: the loader once, and the bytes of q, o and do; the three warpgroups and the rows' warps wait for r % 2.
    # rows_ready: each of the two warps of _slide_rows once, when a tile's statistics are stored and o is read; the
    #   warpgroups wait for r % 2.
    # dq_ready: each warp of the warpgroup whose turn it was, once dQ is in o's place; the storing warp waits for r % 2.
    # q_empty: each warp of the warpgroups once, when its products that read q and do have ended, and the storing warp
    #   once dQ has left; the loader waits for (r + 1) % 2: at round 0 the one before the first, passed at once.
    # ds_ready: each warp of the warpgroups once, when its part of dS is stored; whose turn it is waits for r % 2.
    # ds_empty: each of its warps, once the product that reads dS has ended; the warpgroups wait for (r + 1) % 2.
    kv_ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    barriers_declare(rows)
    kv_empty = 0
    q_empty = kv_empty + 4
    rows_ready = q_empty + STAGES
    dq_ready = rows_ready + STAGES
    ds_ready = dq_ready + STAGES
    ds_empty = ds_ready + BUFFERS
    for i in gl.static_range(4):
        mbarrier.init(kv_ready.index(i), count=1)
        barrier_init(kv_empty + i, 12)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        barrier_init(q_empty + i, 13)  # twelve that read q and do, and the one that sends dQ out
        barrier_init(rows_ready + i, 2)
        barrier_init(dq_ready + i, 4)
    for i in gl.static_range(BUFFERS):
        barrier_init(ds_ready + i, 12)
        barrier_init(ds_empty + i, 4)
    fence_async_shared()
    gl.thread_barrier()
    smem = (k_smem, v_smem, q_smem, do_smem, o_smem, ds_smem, lse_smem, delta_smem, column_smem)
    bars = (kv_ready, q_ready, kv_empty, q_empty, rows_ready, dq_ready, ds_ready, ds_empty)
    work = (batch, seqlen_q, heads_kv, rows, window)
    gl.warp_specialize([
            (_slide_compute, (dk_desc, dv_desc, Shared, CuSeqlensQ, smem, bars, work, run, scale,
              scale_log2, 0, D, GROUP, STAGES, BUFFERS, VARLEN)),
            (_slide_compute, (dk_desc, dv_desc, Shared, CuSeqlensQ, smem, bars, work, run, scale,
              scale_log2, 1, D, GROUP, STAGES, BUFFERS, VARLEN)),
            (_slide_compute, (dk_desc, dv_desc, Shared, CuSeqlensQ, smem, bars, work, run, scale,
              scale_log2, 2, D, GROUP, STAGES, BUFFERS, VARLEN)),
        (_slide_rows, (Lse, DLse, Sinks, Part, slots, CuSeqlensQ, smem, bars, work, run, GROUP, D, STAGES, VARLEN)),
        (_slide_store, (dq_desc, CuSeqlensQ, smem, bars, work, run, GROUP, STAGES, VARLEN)),
            (_slide_load, (q_desc, k_desc, v_desc, o_desc, do_desc, CuSeqlensQ, smem, bars, work, run, GROUP, STAGES,
              VARLEN)),
    ], [4, 4, 2, 1, 1], [REGISTERS, REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS])
