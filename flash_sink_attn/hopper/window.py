"""Forward for short windows at head dim 64: 64 rows are a few tokens of several heads, K and V stay for all of them.

A tile of 64 tokens of one head needs window + 63 keys, of 16 tokens of four heads only window + 15. So a program loads
the keys of 64 tokens once, and its warpgroup takes these tokens piece by piece: a piece of 64 / PACK tokens of PACK
heads is multiplied with the keys before it in blocks of 64, and with its own in one small block. As rows of 64 halfs
are as long as the pattern in which the copy engine swizzles them, a block may begin at any multiple of 8 rows.
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

from flash_sink_attn.hopper.common import (
    FAR_BELOW,
    LOG2E,
    advance,
    barrier_arrive,
    barrier_init,
    barrier_wait,
    barriers_declare,
    concluded,
    exponentials,
    follow,
    hold_half,
    largest,
    load_block,
    lse_of,
    per_row,
    place_of,
    quads,
    rescale,
    store_block,
    tile_of,
    tile_of_round,
)


@gluon.jit
def _rows(buffer, first, COUNT: gl.constexpr):
    """COUNT rows from row ``first`` on, a multiple of 8, of a buffer in pieces of 8 rows."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return buffer.index(first // 8)._reinterpret(buffer.dtype, [COUNT, 64], LAYOUT)


@gluon.jit
def _load(tensors, shape: gl.constexpr):
    """The loader: per tile K and V from right to left, and the pieces of q."""
    descs, work, smem, bars = tensors
    q_desc, k_desc, v_desc = descs
    q_smem, k_smem, v_smem, o_smem = smem
    q_ready, k_ready, v_ready = bars
    batch, seqlen_q, seqlen_k, heads_kv, num_tiles, tiles_per_unit, section, window, cu_q, cu_k = work
    GROUP: gl.constexpr = shape[0]
    PACK: gl.constexpr = shape[1]
    HEADS: gl.constexpr = shape[2]
    STAGES: gl.constexpr = shape[3]
    Q_STAGES: gl.constexpr = shape[4]
    VARLEN: gl.constexpr = shape[5]
    TOKENS: gl.constexpr = 64 // PACK
    phase = 1
    q_slot = 0
    q_phase = 1
    for round in range(gl.cdiv(num_tiles, gl.num_programs(0))):
        ok, b, head_kv, member0, first, len_q, len_k, start_q, start_k = tile_of(
            tile_of_round(round), work, GROUP, PACK * HEADS, 64, VARLEN)
        if ok:
            q_b, q_row = place_of(b, start_q, len_q, VARLEN)
            # (may lie before the sequence, and so K and V of a packed batch are one long sequence)
            key = start_k + first + len_k - len_q - 64 * (STAGES - 1)
            for i in range(PACK * HEADS):
                barrier_wait(STAGES + q_slot, q_phase)
                mbarrier.expect(q_ready.index(q_slot), q_desc.block_type.nbytes)
                load_block(q_desc, q_b, q_row + first + i % PACK * TOKENS, head_kv * GROUP + member0 + i // PACK * PACK,
                           0, q_ready.index(q_slot), q_smem.index(q_slot))
                q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)
                if i == 0:
                    for at in gl.static_range(STAGES - 1, -1, -1):
                        barrier_wait(at, phase)
                        mbarrier.expect(k_ready.index(at), k_desc.block_type.nbytes)
                        block = k_smem.index(8 * at)._reinterpret(k_smem.dtype, k_desc.block_type.shape,
                                                                 k_desc.layout)
                        load_block(k_desc, b, key + 64 * at, head_kv, 0, k_ready.index(at), block)
                        mbarrier.expect(v_ready.index(at), v_desc.block_type.nbytes)
                        block = v_smem.index(8 * at)._reinterpret(v_smem.dtype, v_desc.block_type.shape,
                                                                 v_desc.layout)
                        load_block(v_desc, b, key + 64 * at, head_kv, 0, v_ready.index(at), block)
            phase ^= 1


@gluon.jit
def _zero_rows(tile, before, rows):
    """Zeroes the rows of a block of 64 before row ``before`` and from ``rows`` on."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, LAYOUT))
    for i in gl.static_range(4):
        part = tile.slice(i * 16, 16, dim=0)
        x = part.load(LAYOUT)
        part.store(gl.where(gl.expand_dims((row + i * 16 >= before) & (row + i * 16 < rows), 1), x, gl.zeros_like(x)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _hide(s, bounds, key, OWN: gl.constexpr):
    """Minus infinity for keys outside their row's bounds, (rows, 4) each: the last key seen, the last before the first.
    """
    last, before = bounds
    parts = quads(s)
    WIDTH: gl.constexpr = s.shape[1]
    COLUMNS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, parts.type.layout))
    column = gl.expand_dims(8 * gl.arange(0, WIDTH // 8, layout=gl.SliceLayout(1, COLUMNS)), 1) + gl.expand_dims(
        gl.arange(0, 2, layout=gl.SliceLayout(0, COLUMNS)), 0)
    column = gl.expand_dims(gl.expand_dims(column, 0), 2)
    if OWN:
        parts = gl.inline_asm_elementwise(
            "{ .reg .pred p, q; setp.gt.s32 q, $2, $4; setp.le.and.s32 p, $2, $3, q; "
            "selp.f32 $0, $1, 0fFF800000, p; }", "=f,f,r,r,r",
            [parts, column, per_row(last - key, parts), per_row(before - key, parts)], dtype=gl.float32, is_pure=True,
            pack=1)
    else:
        parts = gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p; }", "=f,f,r,r",
            [parts, column, per_row(before - key, parts)], dtype=gl.float32, is_pure=True, pack=1)
    return gl.convert_layout(gl.reshape(parts, s.shape), s.type.layout, assert_trivial=True)


@gluon.jit
def _step(acc, m, l, p16, before_rows, q, k_smem, v_smem, v_ready, rows, bounds, key, phase, scale_log2, more,
          k_ready, MASKED: gl.constexpr, BEFORE: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr):
    """As forward._step: S of the block at ``rows`` and O += P V of the BEFORE rows run together."""
    s = warpgroup_mma(q, _rows(k_smem, rows, 64).permute((1, 0)), gl.zeros([64, 64], gl.float32, S_LAYOUT),
                      use_acc=False, is_async=True)
    # of two blocks that the rows before may span, the right one has been waited for
    mbarrier.wait(v_ready.index(before_rows // 64), phase)
    acc = warpgroup_mma(p16, _rows(v_smem, before_rows, BEFORE), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    if MASKED:
        s = _hide(s, bounds, key, False)
    m_new, changed = follow(m, gl.convert_layout(largest(quads(s)), m.type.layout, assert_trivial=True) * scale_log2)
    alpha = gl.exp2(m - m_new)
    p, l = exponentials(s, m_new, l * alpha, scale_log2)
    held = hold_half(gl.convert_layout(p.to(v_smem.dtype), P_LAYOUT))
    # the spin ends a basic block: see forward._step
    mbarrier.wait(k_ready.index(gl.maximum(rows - 64, 0) // 64), phase, pred=more)
    acc = warpgroup_mma_wait(0, deps=[acc])
    hold_half(p16)
    acc = rescale(acc, alpha, changed)
    return acc, m_new, l, held


@gluon.jit
def _compute(tensors, shape: gl.constexpr):
    """The warpgroup that computes: one piece of 64 rows after the other."""
    o_desc, results, work, smem, bars = tensors
    Sinks, Lse, scale_log2 = results
    q_smem, k_smem, v_smem, o_smem = smem
    q_ready, k_ready, v_ready = bars
    batch, seqlen_q, seqlen_k, heads_kv, num_tiles, tiles_per_unit, section, window, cu_q, cu_k = work
    GROUP: gl.constexpr = shape[0]
    PACK: gl.constexpr = shape[1]
    HEADS: gl.constexpr = shape[2]
    STAGES: gl.constexpr = shape[3]
    Q_STAGES: gl.constexpr = shape[4]
    VARLEN: gl.constexpr = shape[5]
    TOKENS: gl.constexpr = 64 // PACK
    OWN: gl.constexpr = TOKENS
    PAST: gl.constexpr = 64 * (STAGES - 1)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, OWN, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S_LAYOUT, k_width=2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    row = gl.arange(0, 64, layout=ROW_LAYOUT)
    phase = 0
    q_slot = 0
    q_phase = 0
    like = largest(quads(gl.zeros([64, 64], gl.float32, S_LAYOUT)))
    LANES: gl.constexpr = like.type.layout
    row4 = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, LANES)) // PACK, 1)
    lane4 = gl.expand_dims(2 * gl.arange(0, 4, layout=gl.SliceLayout(0, LANES)), 0)
    for round in range(gl.cdiv(num_tiles, gl.num_programs(0))):
        ok, b, head_kv, member0, first, len_q, len_k, start_q, start_k = tile_of(
            tile_of_round(round), work, GROUP, PACK * HEADS, 64, VARLEN)
        if ok:
            base = first + len_k - len_q - PAST  # key of row 0 of the buffers
            if VARLEN:
                # 0 * NaN: what the copy engine brought from the sequences beside this one must be 0
                if (base < 0) | (base + PAST + 64 > len_k):
                    for at in gl.static_range(STAGES):
                        mbarrier.wait(v_ready.index(at), phase)
                        _zero_rows(v_smem.index(8 * at)._reinterpret(v_smem.dtype, [64, 64], v_smem.layout),
                                   -base - 64 * at, len_k - base - 64 * at)
            for i in range(PACK * HEADS):
                token0 = first + i % PACK * TOKENS
                earliest = token0 + len_k - len_q
                own = PAST + i % PACK * TOKENS  # the row of the piece's first key
                position = earliest + row4
                bounds = (position - lane4, gl.maximum(position - window, -1) - lane4)
                # blocks of 64 keys before the piece, from right to left: [0, inside) need no mask, [inside, blocks) do
                behind = gl.maximum(earliest, 0)
                # (at least one block, if nobody sees it)
                blocks = gl.maximum(gl.cdiv(gl.minimum(window - 1, behind), 64), 1)
                inside = gl.minimum(gl.maximum(window - TOKENS, 0), behind) // 64
                q = q_smem.index(q_slot).reshape([64, 64])
                acc = gl.zeros([64, 64], gl.float32, S_LAYOUT)
                mbarrier.wait(q_ready.index(q_slot), q_phase)
                mbarrier.wait(k_ready.index(STAGES - 1), phase)
                s = warpgroup_mma(q, _rows(k_smem, own, OWN).permute((1, 0)), gl.zeros([64, OWN], gl.float32, D_LAYOUT),
                                  use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                s = _hide(s, bounds, earliest, True)
                m = gl.maximum(gl.max(largest(quads(s)), axis=1) * scale_log2, FAR_BELOW)
                m = gl.convert_layout(m, gl.SliceLayout(1, LANES), assert_trivial=True)
                m = gl.expand_dims(m, 1) + gl.zeros([64, 4], gl.float32, LANES)
                p, l = exponentials(s, m, gl.zeros([64, 4], gl.float32, LANES), scale_log2)
                small = hold_half(gl.convert_layout(p.to(v_smem.dtype), P_LAYOUT))
                rows = own - 64
                key = earliest - 64
                mbarrier.wait(k_ready.index(rows // 64), phase)
                # what the first block's scores run beside is the product of the small block
                if inside > 0:
                    acc, m, l, p16 = _step(acc, m, l, small, own, q, k_smem, v_smem, v_ready, rows, bounds, key, phase,
                                           scale_log2, 1 < blocks, k_ready, False, OWN, S_LAYOUT, P_LAYOUT)
                else:
                    acc, m, l, p16 = _step(acc, m, l, small, own, q, k_smem, v_smem, v_ready, rows, bounds, key, phase,
                                           scale_log2, 1 < blocks, k_ready, True, OWN, S_LAYOUT, P_LAYOUT)
                for n in range(1, inside):
                    rows -= 64
                    key -= 64
                    acc, m, l, p16 = _step(acc, m, l, p16, rows + 64, q, k_smem, v_smem, v_ready, rows, bounds, key,
                                           phase, scale_log2, n + 1 < blocks, k_ready, False, 64, S_LAYOUT, P_LAYOUT)
                for n in range(gl.maximum(inside, 1), blocks):
                    rows -= 64
                    key -= 64
                    acc, m, l, p16 = _step(acc, m, l, p16, rows + 64, q, k_smem, v_smem, v_ready, rows, bounds, key,
                                           phase, scale_log2, n + 1 < blocks, k_ready, True, 64, S_LAYOUT, P_LAYOUT)
                barrier_arrive(STAGES + q_slot, True)
                mbarrier.wait(v_ready.index(rows // 64), phase)
                acc = warpgroup_mma(p16, _rows(v_smem, rows, 64), acc, is_async=True)
                m1 = gl.convert_layout(gl.max(m, axis=1), ROW_LAYOUT)
                l1 = gl.convert_layout(gl.sum(l, axis=1), ROW_LAYOUT)
                token = token0 + row // PACK
                head_q = head_kv * GROUP + member0 + i // PACK * PACK + row % PACK
                sink = None
                if Sinks is not None:
                    sink = gl.load(Sinks + head_q).to(gl.float32) * LOG2E
                factor, lse = concluded(m1, l1, sink)
                at_lse = lse_of(Lse, b, head_q, heads_kv * GROUP, seqlen_q, start_q, VARLEN)
                gl.store(at_lse + token, lse, mask=token < len_q)
                acc = warpgroup_mma_wait(0, deps=[acc])
                hold_half(p16)
                if i == PACK * HEADS - 1:
                    for at in gl.static_range(STAGES):
                        # not to be handed back before it was filled, even if no piece needed it
                        mbarrier.wait(k_ready.index(at), phase)
                        mbarrier.wait(v_ready.index(at), phase)
                        barrier_arrive(at, True)
                o = (acc * gl.expand_dims(factor, 1)).to(v_smem.dtype)
                tma.store_wait(0)
                o_smem.index(0).reshape([64, 64]).store(o)
                fence_async_shared()
                o_b, o_row = place_of(b, start_q, len_q, VARLEN)
                store_block(o_desc, o_b, o_row + token0, head_kv * GROUP + member0 + i // PACK * PACK, 0,
                            o_smem.index(0))
                q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)
            phase ^= 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["batch", "seqlen_q", "seqlen_k", "heads_kv", "num_tiles", "tiles_per_unit", "section",
                              "window"])
def hopper_window_kernel(
    q_desc, k_desc, v_desc, o_desc, Sinks, Lse, CuSeqlensQ, CuSeqlensK,
    batch, seqlen_q, seqlen_k, heads_kv, num_tiles, tiles_per_unit, section, window, scale_log2,
    GROUP: gl.constexpr, PACK: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    VARLEN: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):
    """Persistent over tiles of 64 tokens of PACK * HEADS heads of a group; one warpgroup computes.

    q_desc, o_desc: blocks of (1, 64 / PACK, PACK, 64). k_desc, v_desc: of (1, 64, 1, 64); STAGES of them hold all that
    64 tokens see: window - 1 <= 64 * (STAGES - 1). The rest as hopper_fwd_kernel.
    """
    dtype: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [Q_STAGES] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [8 * STAGES, 8, 64], LAYOUT)
    v_smem = gl.allocate_shared_memory(dtype, [8 * STAGES, 8, 64], LAYOUT)
    o_smem = gl.allocate_shared_memory(dtype, [1] + o_desc.block_type.shape, o_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    barriers_declare(num_tiles)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        barrier_init(STAGES + i, 4)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        barrier_init(i, 4)
    fence_async_shared()
    smem = (q_smem, k_smem, v_smem, o_smem)
    bars = (q_ready, k_ready, v_ready)
    work = (batch, seqlen_q, seqlen_k, heads_kv, num_tiles, tiles_per_unit, section, window, CuSeqlensQ, CuSeqlensK)
    shape: gl.constexpr = (GROUP, PACK, HEADS, STAGES, Q_STAGES, VARLEN)
    descs = (q_desc, k_desc, v_desc)
    results = (Sinks, Lse, scale_log2)
    load = (descs, work, smem, bars)
    compute = (o_desc, results, work, smem, bars)
    gl.warp_specialize([(_compute, (compute, shape)), (_load, (load, shape))], [1], [LOADER_REGISTERS])
