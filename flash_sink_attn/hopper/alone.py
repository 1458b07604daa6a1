"""Forward of one warpgroup that loads for itself: 64 query rows, no warp beside it, so that three programs share a
multiprocessor at head dim 128 and four at 64.

With a loader's warpgroup beside it a program takes twice the threads, and two fit at head dim 128: too few to hide what
a short row is made of, a beginning and an end. Here one block of K and two of V are in shared memory, and what a step
needs is loaded during the softmax of the step before, across tiles too: block j's step starts the copies of block j's
V, which its own product needs one step later, and of the K that comes next; where the next block is another tile's,
also of that tile's q. The output leaves through the slot of the last V.

Who waits for whom: the copy engine arrives at ``q_ready``, ``k_ready`` and ``v_ready``, and all threads wait for them
before they use what came. Copies are started when all four warps have waited for the products that read the slots,
hence the program's barrier in every step. Block j is the j-th use of ``k_ready`` and ``v_ready``, so that its parity at
both is j % 2, and its V is in slot j % 2.
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
    barriers_declare,
    concluded,
    exponentials,
    follow,
    hide,
    hold_half,
    keys_of,
    largest,
    letter_read,
    letter_write,
    load_block,
    lse_of,
    place_of,
    quads,
    reaches,
    rescale,
    store_block,
    tile_of,
    tile_of_round,
)


@gluon.jit
def _tile(round, work, GROUP: gl.constexpr, VARLEN: gl.constexpr, WINDOW: gl.constexpr):
    """The program's tile of this round: (whether there is one, member of the batch, key head, query head, first token,
    lengths and beginnings of queries and keys, first key, blocks of keys)."""
    window = work[7]
    ok, b, head_kv, member, first, len_q, len_k, start_q, start_k = tile_of(
        tile_of_round(round), work, GROUP, 1, 64, VARLEN)
    begin, blocks = keys_of(first, len_q, len_k, window, 64, 64, WINDOW)
    return ok, b, head_kv, head_kv * GROUP + member, first, len_q, len_k, start_q, start_k, begin, blocks


@gluon.jit
def _place(ok, b, head_kv, head, first, len_q, len_k, start_q, start_k, begin, blocks, seqlen_q, seqlen_k,
           VARLEN: gl.constexpr):
    """What :func:`_tile` found as ``following`` of :func:`_bring`."""
    q_b, q_row = place_of(b, start_q, len_q, VARLEN)
    k_b, k_row = place_of(b, start_k, len_k, VARLEN)
    return ok, q_b, q_row + first, head, k_b, k_row + begin + (blocks - 1) * 64, head_kv


@gluon.jit
def _round_with_tile(round, work, GROUP: gl.constexpr, VARLEN: gl.constexpr, WINDOW: gl.constexpr):
    """The first round from ``round`` on in which a packed batch's program has a tile, or the one after the last."""
    rounds = gl.cdiv(work[4], gl.num_programs(0))
    round = gl.to_tensor(round)
    found = _tile(round, work, GROUP, VARLEN, WINDOW)[0]
    while (round < rounds) & (not found):
        round += 1
        found = _tile(round, work, GROUP, VARLEN, WINDOW)[0]
    return round


@gluon.jit
def _scores(q, k_smem, D: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Starts S = Q K^T."""
    return warpgroup_mma(q, k_smem.reshape([64, D]).permute((1, 0)), gl.zeros([64, 64], gl.float32, S_LAYOUT),
                         use_acc=False, is_async=True)


@gluon.jit
def _first(descs, smem, bars, place):
    """Starts the copies of q and the first K of a tile that no step has started them for; place: as ``following`` of
    :func:`_bring`."""
    ok, q_b, token, head_q, k_b, key, head = place
    q_desc, k_desc, v_desc = descs
    q_smem, k_smem, v_smem = smem
    q_ready, k_ready, v_ready = bars
    mbarrier.expect(q_ready, q_desc.block_type.nbytes)
    mbarrier.expect(k_ready, k_desc.block_type.nbytes)
    gl.thread_barrier()
    load_block(q_desc, q_b, token, head_q, 0, q_ready, q_smem)
    load_block(k_desc, k_b, key, head, 0, k_ready, k_smem)


@gluon.jit
def _expect(descs, bars, n_ok, more):
    """Announces what :func:`_bring` will start. Apart from it, so that the one barrier of the program between them,
    which its slots need, also is the one that Triton puts between uses of a barrier."""
    q_desc, k_desc, v_desc = descs
    q_ready, k_ready, v_ready = bars
    mbarrier.expect(k_ready, k_desc.block_type.nbytes, pred=more | n_ok)
    mbarrier.expect(v_ready, v_desc.block_type.nbytes)
    mbarrier.expect(q_ready, q_desc.block_type.nbytes, pred=n_ok & (not more))


@gluon.jit
def _bring(descs, smem, bars, here, following, key, slot, more):
    """Starts the copies of a step, into slots that nobody reads any more.

    Args:
        here: where the descriptors have the keys' row 0, two coordinates, and the key head.
        following: of the program's next tile: whether there is one; where its q is, two coordinates, and its query
            head; where its first block of keys is, and its key head.
        key: first key of the step's block.
        slot: of its V.
        more: whether the tile has another block.
    """
    q_desc, k_desc, v_desc = descs
    q_smem, k_smem, v_smem = smem
    q_ready, k_ready, v_ready = bars
    b, row, head = here
    n_ok, n_q_b, n_token, n_head_q, n_k_b, n_key, n_head = following
    load_block(k_desc, gl.where(more, b, n_k_b), gl.where(more, row + key - 64, n_key), gl.where(more, head, n_head), 0,
               k_ready, k_smem, pred=more | n_ok)
    load_block(v_desc, b, row + key, head, 0, v_ready, v_smem.index(slot))
    load_block(q_desc, n_q_b, n_token, n_head_q, 0, q_ready, q_smem, pred=n_ok & (not more))


@gluon.jit
def _step(acc, m, l, p16, j, key, descs, smem, bars, here, following, reach, window, scale_log2, more, hides,
          CAUSAL: gl.constexpr, WINDOW: gl.constexpr, D: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr):
    """S of block j and O += P V of the block before run together; the softmax of this one overlaps the latter. As in
    :func:`flash_sink_attn.hopper.forward._step`, where the reasons for its order are. On entry K of this block and V of
    the one before have arrived."""
    q_smem, k_smem, v_smem = smem
    q_ready, k_ready, v_ready = bars
    s = _scores(q_smem.reshape([64, D]), k_smem, D, S_LAYOUT)
    acc = warpgroup_mma(p16, v_smem.index((j - 1) & 1).reshape([64, D]), acc, is_async=True)
    _expect(descs, bars, following[0], more)
    s = warpgroup_mma_wait(1, deps=[s])
    gl.thread_barrier()
    _bring(descs, smem, bars, here, following, key, j & 1, more)
    s = hide(s, reach, key, window, hides, CAUSAL, WINDOW)
    m_new, changed = follow(m, gl.convert_layout(largest(quads(s)), m.type.layout, assert_trivial=True) * scale_log2)
    alpha = gl.exp2(m - m_new)
    m = m_new
    p, l = exponentials(s, m, l * alpha, scale_log2)
    held = hold_half(gl.convert_layout(p.to(v_smem.dtype), P_LAYOUT))
    # first the one with a predicate: it is what ends the basic block
    mbarrier.wait(k_ready, (j + 1) & 1, pred=more)
    mbarrier.wait(v_ready, j & 1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    hold_half(p16)
    acc = rescale(acc, alpha, changed)
    return acc, m, l, held, j + 1


@gluon.jit(do_not_specialize=["batch", "seqlen_q", "seqlen_k", "heads_kv", "num_tiles", "tiles_per_unit", "section",
                              "window"])
def hopper_alone_kernel(
    q_desc, k_desc, v_desc, o_desc, Sinks, Lse, CuSeqlensQ, CuSeqlensK,
    batch, seqlen_q, seqlen_k, heads_kv, num_tiles, tiles_per_unit, section, window, scale_log2,
    GROUP: gl.constexpr, D: gl.constexpr, VARLEN: gl.constexpr, WINDOW: gl.constexpr, SPLIT_LOOPS: gl.constexpr,
):
    """Persistent over tiles of 64 rows of one head: tile, tile + programs, ...

    Arguments as of :func:`flash_sink_attn.hopper.forward.hopper_fwd_kernel`; all descriptors have blocks of 64 rows.
    """
    dtype: gl.constexpr = q_desc.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    # Where the window's edge and the diagonal can meet in one block (WINDOW == 2), masked blocks get both comparisons.
    BOTH: gl.constexpr = WINDOW == 2
    EDGE_CAUSAL: gl.constexpr = WINDOW == 2
    q_smem = gl.allocate_shared_memory(dtype, [1] + q_desc.block_type.shape, q_desc.layout).index(0)
    k_smem = gl.allocate_shared_memory(dtype, [1] + k_desc.block_type.shape, k_desc.layout).index(0)
    v_smem = gl.allocate_shared_memory(dtype, [2] + v_desc.block_type.shape, v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    k_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    v_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    if VARLEN:
        barriers_declare(num_tiles)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(k_ready, count=1)
    mbarrier.init(v_ready, count=1)
    fence_async_shared()
    gl.thread_barrier()
    descs = (q_desc, k_desc, v_desc)
    smem = (q_smem, k_smem, v_smem)
    bars = (q_ready, k_ready, v_ready)
    work = (batch, seqlen_q, seqlen_k, heads_kv, num_tiles, tiles_per_unit, section, window, CuSeqlensQ, CuSeqlensK)
    row = gl.arange(0, 64, layout=ROW_LAYOUT)
    # blocks so far, and the parity of the next tile's q
    j = 0
    q_parity = 0
    at = 0
    if VARLEN:
        at = _round_with_tile(0, work, GROUP, VARLEN, WINDOW)
    ok, b, head_kv, head, first, len_q, len_k, start_q, start_k, begin, blocks = _tile(at, work, GROUP, VARLEN, WINDOW)
    turn = 0
    if VARLEN:
        letter_write(0, head, first, len_q, len_k, start_q, start_k)
    if ok:
        _first(descs, smem, bars, _place(ok, b, head_kv, head, first, len_q, len_k, start_q, start_k, begin, blocks,
                                         seqlen_q, seqlen_k, VARLEN))
    for round in range(gl.cdiv(num_tiles, gl.num_programs(0))):
        if ok:
            if VARLEN:
                # kept over a tile in registers, it would take more of them than there are
                head, first, len_q, len_k, start_q, start_k = letter_read(turn & 1)
                b = 0
                head_kv = head // GROUP
                begin, blocks = keys_of(first, len_q, len_k, window, 64, 64, WINDOW)
                turn += 1
            k_b, k_row = place_of(b, start_k, len_k, VARLEN)
            here = (k_b, k_row, head_kv)
            # positions in key coordinates (bottom-right aligned) of the first and the last row
            earliest = first + len_k - len_q
            reach = reaches(earliest, quads(gl.zeros([64, 64], gl.float32, S_LAYOUT)))
            key = begin + (blocks - 1) * 64
            # Blocks count from the right. [0, diagonal) lie on the diagonal, [diagonal, edge) are free of masks, [edge,
            # blocks) lie on the window's edge.
            edge = blocks
            diagonal = gl.minimum(gl.maximum(gl.cdiv(gl.maximum(key + 63 - earliest, 0), 64), 1), blocks)
            if WINDOW:
                edge = gl.cdiv(gl.maximum(key - (earliest + 63) + window, 0), 64)
                edge = gl.minimum(gl.maximum(edge, diagonal), blocks)
            acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
            more = 1 < blocks
            mbarrier.wait(q_ready, q_parity)
            q_parity ^= 1
            mbarrier.wait(k_ready, j & 1)
            s = _scores(q_smem.reshape([64, D]), k_smem, D, S_LAYOUT)
            # while the tensor cores are busy: what comes after this tile, and its sink
            n_at = round + 1
            if VARLEN:
                n_at = _round_with_tile(at + 1, work, GROUP, VARLEN, WINDOW)
            n_ok, n_b, n_head_kv, n_head, n_first, n_len_q, n_len_k, n_start_q, n_start_k, n_begin, n_blocks = _tile(
                n_at, work, GROUP, VARLEN, WINDOW)
            if VARLEN:
                letter_write(turn & 1, n_head, n_first, n_len_q, n_len_k, n_start_q, n_start_k)
            following = _place(n_ok, n_b, n_head_kv, n_head, n_first, n_len_q, n_len_k, n_start_q, n_start_k, n_begin,
                               n_blocks, seqlen_q, seqlen_k, VARLEN)
            sink = None
            if Sinks is not None:
                sink = gl.load(Sinks + head).to(gl.float32) * LOG2E
            _expect(descs, bars, n_ok, more)
            s = warpgroup_mma_wait(0, deps=[s])
            # the last tile's output has left the slot of its last V
            tma.store_wait(0)
            gl.thread_barrier()
            _bring(descs, smem, bars, here, following, key, j & 1, more)
            s = hide(s, reach, key, window, None, True, BOTH)
            m = largest(quads(s))
            m = gl.maximum(gl.max(m, axis=1) * scale_log2, FAR_BELOW)
            m = gl.expand_dims(m, 1) + gl.zeros_like(largest(quads(s)))
            p, l = exponentials(s, m, gl.zeros_like(m), scale_log2)
            p16 = hold_half(gl.convert_layout(p.to(dtype), P_LAYOUT))
            mbarrier.wait(k_ready, (j + 1) & 1, pred=more)
            mbarrier.wait(v_ready, j & 1)
            j += 1
            if SPLIT_LOOPS:
                for n in range(1, diagonal):
                    key -= 64
                    acc, m, l, p16, j = _step(
                        acc, m, l, p16, j, key, descs, smem, bars, here, following, reach, window, scale_log2,
                        n + 1 < blocks, None, True, BOTH, D, S_LAYOUT, P_LAYOUT)
                for n in range(diagonal, edge):
                    key -= 64
                    acc, m, l, p16, j = _step(
                        acc, m, l, p16, j, key, descs, smem, bars, here, following, reach, window, scale_log2,
                        n + 1 < blocks, None, False, False, D, S_LAYOUT, P_LAYOUT)
                if WINDOW:
                    for n in range(edge, blocks):
                        key -= 64
                        acc, m, l, p16, j = _step(
                            acc, m, l, p16, j, key, descs, smem, bars, here, following, reach, window, scale_log2,
                            n + 1 < blocks, None, EDGE_CAUSAL, True, D, S_LAYOUT, P_LAYOUT)
            else:
                for n in range(1, blocks):
                    key -= 64
                    acc, m, l, p16, j = _step(
                        acc, m, l, p16, j, key, descs, smem, bars, here, following, reach, window, scale_log2,
                        n + 1 < blocks, (n < diagonal) | (n >= edge), True, WINDOW > 0, D, S_LAYOUT, P_LAYOUT)
            last = (j - 1) & 1
            acc = warpgroup_mma(p16, v_smem.index(last).reshape([64, D]), acc, is_async=True)
            m = gl.convert_layout(gl.max(m, axis=1), ROW_LAYOUT)
            l = gl.convert_layout(gl.sum(l, axis=1), ROW_LAYOUT)
            factor, lse = concluded(m, l, sink)
            token = first + row
            at_lse = lse_of(Lse, b, head, heads_kv * GROUP, seqlen_q, start_q, VARLEN)
            gl.store(at_lse + token, lse, mask=token < len_q)
            acc = warpgroup_mma_wait(0, deps=[acc])
            hold_half(p16)
            o = acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT)), 1)
            o = o.to(dtype)
            # every warp has read the slot
            gl.thread_barrier()
            v_smem.index(last).reshape([64, D]).store(o)
            fence_async_shared()
            o_b, o_row = place_of(b, start_q, len_q, VARLEN)
            store_block(o_desc, o_b, o_row + first, head, 0, v_smem.index(last))
            if VARLEN:
                at = n_at
            ok = n_ok
            b = n_b
            head_kv = n_head_kv
            head = n_head
            first = n_first
            len_q = n_len_q
            len_k = n_len_k
            start_q = n_start_q
            start_k = n_start_k
            begin = n_begin
            blocks = n_blocks
    tma.store_wait(0)
