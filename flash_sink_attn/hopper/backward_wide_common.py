"""What the two kernels of the Hopper backward for head dims above 128 share: a program's 64 keys, tile by tile.

One warpgroup makes S, P and dV, another dP, dS and dK, and a warp loads: see backward_wide, whose programs are on their
own, and backward_pair, whose programs add one dQ by two. Here is what stands in both: the tiles in shared memory, the
barriers between the three (when nobody overwrites is told in the kernels), and what each does but for dQ.

``smem`` is what :func:`allocate_tiles` returns, ``bars`` begins with what :func:`allocate_barriers` does, ``work`` is
as for backward_walk.key_tile, and ``shape`` begins with (GROUP, D, D2, DV, STAGES, VARLEN, WINDOW).
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

from flash_sink_attn.hopper.backward_common import probabilities
from flash_sink_attn.hopper.backward_products import start_scores
from flash_sink_attn.hopper.backward_walk import first_tile, next_tile
from flash_sink_attn.hopper.common import (
    advance,
    barrier_arrive,
    barrier_init,
    barrier_wait,
    barriers_declare,
    hold_half,
    load_block,
    place_of,
    store_block,
)


@gluon.jit
def allocate_tiles(descs, KEYS: gl.constexpr, DS: gl.constexpr, shape: gl.constexpr):
    """Shared memory of KEYS tiles of K, one of V, STAGES of q, do and their rows' statistics, two of P and DS of dS.

    Without D2 what would hold the columns from D on is another name for what holds the others.
    """
    D2: gl.constexpr = shape[2]
    STAGES: gl.constexpr = shape[4]
    q_desc, q2_desc, k_desc, k2_desc, v_desc, do_desc = descs
    dtype: gl.constexpr = q_desc.dtype
    PANEL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    k_smem = gl.allocate_shared_memory(dtype, [KEYS] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [1] + v_desc.block_type.shape, v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES] + do_desc.block_type.shape, do_desc.layout)
    k2_smem = k_smem
    q2_smem = q_smem
    if D2:
        k2_smem = gl.allocate_shared_memory(dtype, [KEYS] + k2_desc.block_type.shape, k2_desc.layout)
        q2_smem = gl.allocate_shared_memory(dtype, [STAGES] + q2_desc.block_type.shape, q2_desc.layout)
    p_smem = gl.allocate_shared_memory(dtype, [2, 64, 64], PANEL)
    ds_smem = gl.allocate_shared_memory(dtype, [DS, 64, 64], PANEL)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 64], FLAT)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 64], FLAT)
    return k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem


@gluon.jit
def allocate_barriers(rows, STAGES: gl.constexpr):
    """(kv_ready, q_ready, do_ready, q_empty, do_empty, p_ready, ds_ready), initialised, and the first number that is
    free for others."""
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    barriers_declare(rows)
    q_empty = 0
    do_empty = q_empty + STAGES
    p_ready = do_empty + STAGES
    ds_ready = p_ready + 2
    mbarrier.init(kv_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=2)
        mbarrier.init(do_ready.index(i), count=2)
        barrier_init(q_empty + i, 8)
        barrier_init(do_empty + i, 8)
    for i in gl.static_range(2):
        barrier_init(p_ready + i, 4)
        barrier_init(ds_ready + i, 4)
    return (kv_ready, q_ready, do_ready, q_empty, do_empty, p_ready, ds_ready), ds_ready + 2


@gluon.jit
def load_keys(descs, b, row, head, ready, smem, INDEX: gl.constexpr, shape: gl.constexpr):
    """Starts the copies of 64 keys to tile INDEX of K; b, row, ready: see common.load_block."""
    D: gl.constexpr = shape[1]
    D2: gl.constexpr = shape[2]
    q_desc, q2_desc, k_desc, k2_desc, v_desc, do_desc = descs
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    load_block(k_desc, b, row, head, 0, ready, k_smem.index(INDEX))
    if D2:
        load_block(k2_desc, b, row, head, D, ready, k2_smem.index(INDEX))


@gluon.jit
def load_tiles(descs, Lse2, Delta, smem, bars, work, b, q_b, q_row, head, base, course, shape: gl.constexpr):
    """The ring of q, do and their rows' statistics, of all tiles of a course. q_b, q_row: see common.place_of."""
    GROUP: gl.constexpr = shape[0]
    D: gl.constexpr = shape[1]
    D2: gl.constexpr = shape[2]
    STAGES: gl.constexpr = shape[4]
    WINDOW: gl.constexpr = shape[6]
    q_desc, q2_desc, k_desc, k2_desc, v_desc, do_desc = descs
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    q_ready = bars[1]
    do_ready = bars[2]
    q_empty = bars[3]
    do_empty = bars[4]
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window = work
    BYTES: gl.constexpr = q_desc.block_type.nbytes + (q2_desc.block_type.nbytes if D2 else 0)
    row = gl.arange(0, 64, layout=gl.BlockedLayout([2], [32], [1], [0]))
    m, g, left, total = first_tile(course)
    slot = 0
    # A ring's first round finds its slots empty: waiting for the phase before the first one returns at once.
    phase = 1
    at = (b * (heads_kv * GROUP) + head * GROUP) * rows + base + row
    # one tile ahead, so that their latency hides behind the waits
    lse2 = gl.load(Lse2 + at + m * 64, mask=row < total * 64, other=0.0)
    delta = gl.load(Delta + at + m * 64, mask=row < total * 64, other=0.0)
    for i in range(total):
        head_q = head * GROUP + g
        barrier_wait(q_empty + slot, phase)
        mbarrier.expect(q_ready.index(slot), BYTES)
        load_block(q_desc, q_b, q_row + m * 64, head_q, 0, q_ready.index(slot), q_smem.index(slot))
        if D2:
            load_block(q2_desc, q_b, q_row + m * 64, head_q, D, q_ready.index(slot), q2_smem.index(slot))
        barrier_wait(do_empty + slot, phase)
        mbarrier.expect(do_ready.index(slot), do_desc.block_type.nbytes)
        load_block(do_desc, q_b, q_row + m * 64, head_q, 0, do_ready.index(slot), do_smem.index(slot))
        lse_smem.index(slot).store(lse2)
        mbarrier.arrive(q_ready.index(slot), count=1)
        delta_smem.index(slot).store(delta)
        mbarrier.arrive(do_ready.index(slot), count=1)
        slot, phase = advance(slot, phase, STAGES)
        m, g, left = next_tile(m, g, left, course, not WINDOW)
        following = at + g * rows + m * 64
        more = row < (total - 1 - i) * 64
        lse2 = gl.load(Lse2 + following, mask=more, other=0.0)
        delta = gl.load(Delta + following, mask=more, other=0.0)


@gluon.jit
def tiles_in_scratch(b, head, base, work, GROUP: gl.constexpr):
    """Number of the first tile of dQ of this program's heads, and tiles of one head."""
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window = work
    head_rows = rows // 64
    return (b * (heads_kv * GROUP) + head * GROUP) * head_rows + base // 64, head_rows


@gluon.jit
def positions(first, LAYOUT: gl.constexpr):
    """Numbers of 64 keys from ``first`` on and of 64 rows, in S^T's LAYOUT, for :func:`give_p`."""
    key = gl.expand_dims(first + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT)), 1)
    return key, gl.arange(0, 64, layout=gl.SliceLayout(0, LAYOUT))


@gluon.jit
def start_s(smem, slot, zero, shape: gl.constexpr):
    """Starts S^T = K Q^T with the query tile in ``slot``."""
    D: gl.constexpr = shape[1]
    D2: gl.constexpr = shape[2]
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    k = k_smem.index(0).reshape([64, D])
    q = q_smem.index(slot).reshape([64, D])
    if D2:
        return start_scores(k, k2_smem.index(0).reshape([64, D2]), q, q2_smem.index(slot).reshape([64, D2]), zero, D2)
    else:
        return start_scores(k, k, q, q, zero, D2)


@gluon.jit
def first_s(smem, bars, total, zero, shape: gl.constexpr):
    """S^T of the first tile and its rows' statistics, once K is there, too; of none anything."""
    mbarrier.wait(bars[0], 0)
    mbarrier.wait(bars[1].index(0), 0, pred=total > 0)
    s = start_s(smem, 0, zero, shape)
    lse2 = smem[6].index(0).load(gl.SliceLayout(0, zero.type.layout))
    return warpgroup_mma_wait(0, deps=[s]), lse2


@gluon.jit
def give_p(s, lse2, key, row, m, first, i, slot, smem, bars, work, scale_log2, LAYOUT: gl.constexpr,
           shape: gl.constexpr):
    """P^T of tile ``i``, which is in ``slot``, for the other warpgroup and, in registers, for the product with do.

    key, row: see :func:`positions`; m, first: as for backward_common.probabilities.
    """
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window = work
    q_empty = bars[3]
    p_ready = bars[5]
    p = probabilities(s, lse2, key, row, m, first, window, scale_log2, shape[6], not shape[2]).to(p_smem.dtype)
    p_smem.index(i & 1).store(p)
    barrier_arrive(p_ready + i % 2, True)
    barrier_arrive(q_empty + slot, True)
    return hold_half(gl.convert_layout(p, LAYOUT))


@gluon.jit
def start_dp(smem, slot, zero, shape: gl.constexpr):
    """Starts dP^T = V dO^T with the tile in ``slot``."""
    DV: gl.constexpr = shape[3]
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    return warpgroup_mma(v_smem.index(0).reshape([64, DV]), do_smem.index(slot).reshape([64, DV]).permute((1, 0)), zero,
                         use_acc=False, is_async=True)


@gluon.jit
def first_dp(smem, bars, total, zero, shape: gl.constexpr):
    """dP^T of the first tile, once V is there, too; of none anything."""
    mbarrier.wait(bars[0], 0)
    mbarrier.wait(bars[2].index(0), 0, pred=total > 0)
    return warpgroup_mma_wait(0, deps=[start_dp(smem, 0, zero, shape)])


@gluon.jit
def make_ds(dp, i, slot, smem, bars):
    """dS^T of tile ``i``, which is in ``slot``, from dP^T and what the other warpgroup gave of P^T."""
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    LAYOUT: gl.constexpr = dp.type.layout
    p_ready = bars[5]
    dp -= gl.expand_dims(delta_smem.index(slot).load(gl.SliceLayout(0, LAYOUT)), 0)
    barrier_wait(p_ready + i % 2, i // 2 & 1)
    return (p_smem.index(i & 1).load(LAYOUT).to(gl.float32) * dp).to(p_smem.dtype)


@gluon.jit
def start_dk(ds, smem, slot, dk, dk2, shape: gl.constexpr):
    """Starts dK += dS^T Q with the query tile in ``slot``; dk2 is there with D2 only."""
    D: gl.constexpr = shape[1]
    D2: gl.constexpr = shape[2]
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    dk = warpgroup_mma(ds, q_smem.index(slot).reshape([64, D]), dk, is_async=True)
    if D2:
        A2_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dk2.type.layout, k_width=2)
        dk2 = warpgroup_mma(gl.convert_layout(ds, A2_LAYOUT), q2_smem.index(slot).reshape([64, D2]), dk2, is_async=True)
    return dk, dk2


@gluon.jit
def store_dv(dv_desc, dv, smem, b, start_k, len_k, first_key, head, shape: gl.constexpr):
    """Stores dV by way of slot 0 of do."""
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    # The last dS told that the other warpgroup has read all tiles of do; this one's warps ask each other.
    gl.thread_barrier()
    do_smem.index(0).reshape([64, shape[3]]).store(dv.to(do_smem.dtype))
    fence_async_shared()
    gl.thread_barrier()
    k_b, k_row = place_of(b, start_k, len_k, shape[5])
    store_block(dv_desc, k_b, k_row + first_key, head, 0, do_smem.index(0))
    tma.store_wait(0)


@gluon.jit
def store_dk(dk_desc, dk2_desc, dk, dk2, scale, smem, b, start_k, len_k, first_key, head, shape: gl.constexpr):
    """Stores dK, times the softmax scale, by way of slot 0 of q."""
    D: gl.constexpr = shape[1]
    D2: gl.constexpr = shape[2]
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    dk *= scale
    if D2:
        dk2 *= scale
    # The last P told that the other warpgroup has read all tiles of q; this one's warps ask each other.
    gl.thread_barrier()
    q_smem.index(0).reshape([64, D]).store(dk.to(q_smem.dtype))
    if D2:
        q2_smem.index(0).reshape([64, D2]).store(dk2.to(q_smem.dtype))
    fence_async_shared()
    gl.thread_barrier()
    k_b, k_row = place_of(b, start_k, len_k, shape[5])
    store_block(dk_desc, k_b, k_row + first_key, head, 0, q_smem.index(0))
    if D2:
        store_block(dk2_desc, k_b, k_row + first_key, head, D, q2_smem.index(0))
    tma.store_wait(0)
