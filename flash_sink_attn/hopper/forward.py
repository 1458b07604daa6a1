"""Warp-specialised forward for Hopper in Gluon: one warp loads, one to four warpgroups of 64 query rows each compute.

docs/hopper.md draws who waits for whom. In short: the *loader* fills three rings in shared memory (Q per warpgroup,
K and V shared by all) through the copy engine; each *warpgroup* multiplies, exponentiates and multiplies again, holding
its output in registers, and hands every slot back when its last matrix product has read it.
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
    LETTERS,
    LOG2E,
    advance,
    barrier_arrive,
    barrier_init,
    barrier_wait,
    barriers_declare,
    concluded,
    draw,
    drawn,
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
    settle,
    store_block,
    tile_of,
    tile_of_round,
)


@gluon.jit
def _load_tile(tensors, place, rings, turn, shape: gl.constexpr):
    """Fills the slots for one tile; turn: tiles before it. Returns the slots that come next."""
    GROUP: gl.constexpr = shape[0]
    WARPGROUPS: gl.constexpr = shape[1]
    HEADS: gl.constexpr = shape[2]
    TOKENS: gl.constexpr = shape[3]
    BLOCK_N: gl.constexpr = shape[4]
    D: gl.constexpr = shape[5]
    D2: gl.constexpr = shape[6]
    STAGES: gl.constexpr = shape[8]
    Q_STAGES: gl.constexpr = shape[9]
    VARLEN: gl.constexpr = shape[10]
    WINDOW: gl.constexpr = shape[11]
    SPREAD: gl.constexpr = shape[12]
    descs, work, smem, bars, Counter = tensors
    q_desc, q2_desc, k_desc, k2_desc, v_desc = descs
    q_smem, q2_smem, k_smem, k2_smem, v_smem, o_smem = smem
    q_ready, k_ready, v_ready = bars
    batch, seqlen_q, seqlen_k, heads_kv, num_tiles, tiles_per_unit, section, window, cu_q, cu_k = work
    b, head_kv, member0, first, len_q, len_k, start_q, start_k = place
    slot, phase, q_slot, q_phase = rings
    Q_BYTES: gl.constexpr = q_desc.block_type.nbytes + (q2_desc.block_type.nbytes if D2 else 0)
    K_BYTES: gl.constexpr = k_desc.block_type.nbytes + (k2_desc.block_type.nbytes if D2 else 0)
    begin, blocks = keys_of(first, len_q, len_k, window, TOKENS, BLOCK_N, WINDOW)
    q_b, q_row = place_of(b, start_q, len_q, VARLEN)
    k_b, k_row = place_of(b, start_k, len_k, VARLEN)
    for i in range(HEADS):
        for c in gl.static_range(WARPGROUPS):
            token = q_row + first
            member = member0
            if SPREAD:
                member += (c + turn) % WARPGROUPS + WARPGROUPS * i
            else:
                token += c * 64
            at = c * Q_STAGES + q_slot
            if member < GROUP:
                head = head_kv * GROUP + member
                barrier_wait(2 * STAGES + at, q_phase)
                mbarrier.expect(q_ready.index(at), Q_BYTES)
                load_block(q_desc, q_b, token, head, 0, q_ready.index(at), q_smem.index(at))
                if D2:
                    load_block(q2_desc, q_b, token, head, D, q_ready.index(at), q2_smem.index(at))
            else:
                barrier_wait(2 * STAGES + at, q_phase)
                mbarrier.arrive(q_ready.index(at), count=1)
        q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)
        if i == 0:
            # right to left: the masked blocks at the diagonal come first
            key = k_row + begin + (blocks - 1) * BLOCK_N
            for _ in range(blocks):
                barrier_wait(slot, phase)
                mbarrier.expect(k_ready.index(slot), K_BYTES)
                load_block(k_desc, k_b, key, head_kv, 0, k_ready.index(slot), k_smem.index(slot))
                if D2:
                    load_block(k2_desc, k_b, key, head_kv, D, k_ready.index(slot), k2_smem.index(slot))
                barrier_wait(STAGES + slot, phase)
                mbarrier.expect(v_ready.index(slot), v_desc.block_type.nbytes)
                load_block(v_desc, k_b, key, head_kv, 0, v_ready.index(slot), v_smem.index(slot))
                slot, phase = advance(slot, phase, STAGES)
                key -= BLOCK_N
    return slot, phase, q_slot, q_phase


@gluon.jit
def _load(tensors, shape: gl.constexpr):
    """The loader: one warp. It runs ahead of the warpgroups by what the rings hold, across tiles too. In a packed batch
    it draws the program's tiles, and a letter for each tells the warpgroups."""
    GROUP: gl.constexpr = shape[0]
    WARPGROUPS: gl.constexpr = shape[1]
    HEADS: gl.constexpr = shape[2]
    TOKENS: gl.constexpr = shape[3]
    STAGES: gl.constexpr = shape[8]
    Q_STAGES: gl.constexpr = shape[9]
    VARLEN: gl.constexpr = shape[10]
    SPREAD: gl.constexpr = shape[12]
    descs, work, smem, bars, Counter = tensors
    num_tiles = work[4]
    CHUNK: gl.constexpr = WARPGROUPS * HEADS if SPREAD else 1
    LETTER: gl.constexpr = 2 * STAGES + WARPGROUPS * Q_STAGES
    # A ring's first round finds its slots empty: waiting for the phase before the first one returns at once.
    rings = (gl.to_tensor(0), gl.to_tensor(1), gl.to_tensor(0), gl.to_tensor(1))
    turn = gl.to_tensor(0)
    if VARLEN:
        # where all tiles are in the first round nobody has set the counter to zero
        more = gl.num_programs(0) < num_tiles
        tile = gl.program_id(0)
        while tile < num_tiles:
            ok, b, head_kv, member0, first, len_q, len_k, start_q, start_k = tile_of(
                tile, work, GROUP, CHUNK, TOKENS, VARLEN)
            if Counter is not None:
                # before the tile, which hides how long it takes
                ticket = draw(Counter, more)
            if ok:
                letter_write(turn % LETTERS, head_kv * GROUP + member0, first, len_q, len_k, start_q, start_k)
                barrier_arrive(LETTER + turn % LETTERS, True)
                rings = _load_tile(tensors, (b, head_kv, member0, first, len_q, len_k, start_q, start_k), rings, turn,
                                   shape)
                turn += 1
            tile = num_tiles
            if Counter is not None:
                tile = gl.where(more, gl.num_programs(0) + drawn(ticket), num_tiles)
        letter_write(turn % LETTERS, 0, -1, 0, 0, 0, 0)
        barrier_arrive(LETTER + turn % LETTERS, True)
    else:
        for round in range(gl.cdiv(num_tiles, gl.num_programs(0))):
            ok, b, head_kv, member0, first, len_q, len_k, start_q, start_k = tile_of(
                tile_of_round(round), work, GROUP, CHUNK, TOKENS, VARLEN)
            if ok:
                rings = _load_tile(tensors, (b, head_kv, member0, first, len_q, len_k, start_q, start_k), rings, turn,
                                   shape)
                turn += 1


@gluon.jit
def _scores(q, q2, k_smem, k2_smem, slot, zero, BLOCK_N: gl.constexpr, D: gl.constexpr, D2: gl.constexpr):
    """Starts S = Q K^T for the block in ``slot``; without D2, of as many of its first keys as ``zero`` has columns."""
    k = k_smem.index(slot).reshape([BLOCK_N, D]).slice(0, zero.shape[1], dim=0)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    if D2:
        s = warpgroup_mma(q2, k2_smem.index(slot).reshape([BLOCK_N, D2]).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _first_block(q, q2, k_smem, k2_smem, slot, reach, key, window, scale_log2, release, KEYS: gl.constexpr,
                 BOTH: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, P_LAYOUT: gl.constexpr):
    """(P, the running maximum, the sums) of a tile's first block, of which only the first KEYS keys are seen."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    s = _scores(q, q2, k_smem, k2_smem, slot, gl.zeros([64, KEYS], gl.float32, LAYOUT), BLOCK_N, D, D2)
    s = warpgroup_mma_wait(0, deps=[s])
    barrier_arrive(slot, release)
    s = hide(s, reach, key, window, None, True, BOTH)
    m = largest(quads(s))
    m = gl.maximum(gl.max(m, axis=1) * scale_log2, FAR_BELOW)
    m = gl.expand_dims(m, 1) + gl.zeros_like(largest(quads(s)))
    p, l = exponentials(s, m, gl.zeros_like(m), scale_log2)
    p = p.to(q.dtype)
    if KEYS < BLOCK_N:
        p = gl.join(p, gl.zeros_like(p)).permute((0, 2, 1)).reshape([64, BLOCK_N])
    m = gl.convert_layout(m, reach.type.layout, assert_trivial=True)
    l = gl.convert_layout(l, reach.type.layout, assert_trivial=True)
    return hold_half(gl.convert_layout(p, P_LAYOUT, assert_trivial=True)), m, l


@gluon.jit
def _step(acc, m, l, p16, q, q2, k_smem, k2_smem, v_smem, bars, slot, phase, before, before_phase, reach, key,
          window, scale_log2, more, release, hides, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, BLOCK_N: gl.constexpr,
          D: gl.constexpr, D2: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, SETTLE: gl.constexpr,
          S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr):
    """S of this block and O += P V of the block before run together; the softmax of this one overlaps the latter, but
    at head dim 256, where the registers that this takes cost more than it gives.

    On entry K of this block has arrived. ptxas would move the wait for O above the exponentials, since nothing in the
    code depends on their order, and leave the tensor cores idle: the spin on the next K's barrier between them is the
    end of a basic block, which it does not cross, and ``hold_*`` keeps P's computation on this side of it. Where it
    would still move the exponentials behind the spin, SETTLE keeps them.

    hides: whether the block has keys that some row does not see, None where that is known to be so.
    """
    q_ready, k_ready, v_ready = bars
    OVERLAP: gl.constexpr = DV < 256
    s = _scores(q, q2, k_smem, k2_smem, slot, gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT), BLOCK_N, D, D2)
    mbarrier.wait(v_ready.index(before), before_phase)
    acc = warpgroup_mma(p16, v_smem.index(before).reshape([BLOCK_N, DV]), acc, is_async=True)
    if OVERLAP:
        s = warpgroup_mma_wait(1, deps=[s])
    else:
        s, acc = warpgroup_mma_wait(0, deps=[s, acc])
        hold_half(p16)
        barrier_arrive(STAGES + before, release)
    barrier_arrive(slot, release)
    s = hide(s, reach, key, window, hides, CAUSAL, WINDOW)
    m_new, changed = follow(m, gl.convert_layout(largest(quads(s)), m.type.layout, assert_trivial=True) * scale_log2)
    alpha = gl.exp2(m - m_new)
    m = m_new
    p, l = exponentials(s, m, l * alpha, scale_log2)
    held = hold_half(gl.convert_layout(p.to(v_smem.dtype), P_LAYOUT))
    if SETTLE:
        l = settle(l)
    following, following_phase = advance(slot, phase, STAGES)
    mbarrier.wait(k_ready.index(following), following_phase, pred=more)
    if OVERLAP:
        acc = warpgroup_mma_wait(0, deps=[acc])
        hold_half(p16)
        barrier_arrive(STAGES + before, release)
    acc = rescale(acc, alpha, changed)
    return acc, m, l, held, slot, phase, following, following_phase


@gluon.jit
def _pass_on(count, slot, phase, bars, release, STAGES: gl.constexpr):
    """Hands back ``count`` slots of K and V that the warpgroup has no use for, where ``release``. Returns the next."""
    q_ready, k_ready, v_ready = bars
    for _ in range(count):
        # not before they were filled: an arrival would count for the round before
        mbarrier.wait(k_ready.index(slot), phase)
        barrier_arrive(slot, release)
        mbarrier.wait(v_ready.index(slot), phase)
        barrier_arrive(STAGES + slot, release)
        slot, phase = advance(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def _compute_tile(tensors, place, rings, turn, round, INDEX: gl.constexpr, shape: gl.constexpr):
    """One tile, as tile ``turn`` of the program. Returns the slots that come next and, where it is found meanwhile, the
    place after this one."""
    GROUP: gl.constexpr = shape[0]
    WARPGROUPS: gl.constexpr = shape[1]
    HEADS: gl.constexpr = shape[2]
    TOKENS: gl.constexpr = shape[3]
    BLOCK_N: gl.constexpr = shape[4]
    D: gl.constexpr = shape[5]
    D2: gl.constexpr = shape[6]
    DV: gl.constexpr = shape[7]
    STAGES: gl.constexpr = shape[8]
    Q_STAGES: gl.constexpr = shape[9]
    VARLEN: gl.constexpr = shape[10]
    WINDOW: gl.constexpr = shape[11]
    SPREAD: gl.constexpr = shape[12]
    SPLIT_LOOPS: gl.constexpr = shape[13]
    SHARE_Q: gl.constexpr = shape[14]
    o_desc, results, work, smem, bars = tensors
    Sinks, Lse, scale_log2 = results
    q_smem, q2_smem, k_smem, k2_smem, v_smem, o_smem = smem
    q_ready, k_ready, v_ready = bars
    batch, seqlen_q, seqlen_k, heads_kv, num_tiles, tiles_per_unit, section, window, cu_q, cu_k = work
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                       instr_shape=[16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    # Where the window's edge and the diagonal can meet in one block (WINDOW == 2), masked blocks get both comparisons.
    BOTH: gl.constexpr = WINDOW == 2
    EDGE_CAUSAL: gl.constexpr = WINDOW == 2
    AHEAD: gl.constexpr = shape[15]
    # elsewhere what it keeps in place takes 1 to 3% more than it gives
    SETTLE: gl.constexpr = DV == 64 and not WINDOW
    row = gl.arange(0, 64, layout=ROW_LAYOUT)
    ok, b, head_kv, member0, first, len_q, len_k, start_q = place
    slot, phase, q_slot, q_phase = rings
    following = place
    begin, blocks = keys_of(first, len_q, len_k, window, TOKENS, BLOCK_N, WINDOW)
    if not SPREAD:
        first += INDEX * 64
    # positions in key coordinates (bottom-right aligned) of the first and the last row
    earliest = first + len_k - len_q
    latest = earliest + 63
    reach = reaches(earliest, quads(gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)))
    rightmost = begin + (blocks - 1) * BLOCK_N
    # Blocks count from the right. [skip, diagonal) lie on the diagonal, [diagonal, edge) are free of masks,
    # [edge, stop) lie on the window's edge; all rows are blind to what is before skip and from stop on.
    skip = gl.minimum(gl.cdiv(gl.maximum(rightmost - latest, 0), BLOCK_N), blocks - 1)
    stop = blocks
    if WINDOW:
        stop = gl.minimum(gl.maximum(rightmost + BLOCK_N - 2 - earliest + window, 0) // BLOCK_N + 1, blocks)
        stop = gl.maximum(stop, skip + 1)
    edge = stop
    diagonal = gl.cdiv(gl.maximum(rightmost + BLOCK_N - 1 - earliest, 0), BLOCK_N)
    diagonal = gl.minimum(gl.maximum(diagonal, skip + 1), stop)
    if WINDOW:
        edge = gl.cdiv(gl.maximum(rightmost - latest + window, 0), BLOCK_N)
        edge = gl.minimum(gl.maximum(edge, diagonal), stop)
    tile_slot = slot
    tile_phase = phase
    for i in range(HEADS):
        member = member0
        last = True
        if SPREAD:
            member += (INDEX + turn) % WARPGROUPS + WARPGROUPS * i
            # the slots of K and V go back with the last head that this warpgroup has in the tile
            last = (i == HEADS - 1) | (member + WARPGROUPS >= GROUP)
        at = INDEX * Q_STAGES + q_slot
        if member < GROUP:
            slot = tile_slot
            phase = tile_phase
            slot, phase = _pass_on(skip, slot, phase, bars, last, STAGES)
            q = q_smem.index(at).reshape([64, D])
            q2 = q
            if D2:
                q2 = q2_smem.index(at).reshape([64, D2])
            acc = gl.zeros([64, DV], gl.float32, O_LAYOUT)
            key = rightmost - skip * BLOCK_N
            mbarrier.wait(q_ready.index(at), q_phase)
            mbarrier.wait(k_ready.index(slot), phase)
            # Half a block is all that a warpgroup sees whose rows end in the middle of it. (Not with D2, where S came
            # out wrong, see docs/hopper.md, Traps.)
            if BLOCK_N == 128 and D2 == 0 and latest < key + 64:
                p16, m, l = _first_block(q, q2, k_smem, k2_smem, slot, reach, key, window, scale_log2, last, 64, BOTH,
                                         BLOCK_N, D, D2, P_LAYOUT)
            else:
                p16, m, l = _first_block(q, q2, k_smem, k2_smem, slot, reach, key, window, scale_log2, last, BLOCK_N,
                                         BOTH, BLOCK_N, D, D2, P_LAYOUT)
            before = slot
            before_phase = phase
            slot, phase = advance(slot, phase, STAGES)
            mbarrier.wait(k_ready.index(slot), phase, pred=skip + 1 < stop)
            if SPLIT_LOOPS:
                for n in range(skip + 1, diagonal):
                    key -= BLOCK_N
                    acc, m, l, p16, before, before_phase, slot, phase = _step(
                        acc, m, l, p16, q, q2, k_smem, k2_smem, v_smem, bars, slot, phase, before, before_phase,
                        reach, key, window, scale_log2, n + 1 < stop, last, None, True, BOTH, BLOCK_N, D, D2, DV,
                        STAGES, SETTLE, S_LAYOUT, O_LAYOUT, P_LAYOUT)
                for n in range(diagonal, edge):
                    key -= BLOCK_N
                    acc, m, l, p16, before, before_phase, slot, phase = _step(
                        acc, m, l, p16, q, q2, k_smem, k2_smem, v_smem, bars, slot, phase, before, before_phase,
                        reach, key, window, scale_log2, n + 1 < stop, last, None, False, False, BLOCK_N, D, D2, DV,
                        STAGES, SETTLE, S_LAYOUT, O_LAYOUT, P_LAYOUT)
                if WINDOW:
                    for n in range(edge, stop):
                        key -= BLOCK_N
                        acc, m, l, p16, before, before_phase, slot, phase = _step(
                            acc, m, l, p16, q, q2, k_smem, k2_smem, v_smem, bars, slot, phase, before, before_phase,
                            reach, key, window, scale_log2, n + 1 < stop, last, None, EDGE_CAUSAL, True, BLOCK_N, D,
                            D2, DV, STAGES, SETTLE, S_LAYOUT, O_LAYOUT, P_LAYOUT)
            else:
                for n in range(skip + 1, stop):
                    key -= BLOCK_N
                    acc, m, l, p16, before, before_phase, slot, phase = _step(
                        acc, m, l, p16, q, q2, k_smem, k2_smem, v_smem, bars, slot, phase, before, before_phase,
                        reach, key, window, scale_log2, n + 1 < stop, last, (n < diagonal) | (n >= edge), True,
                        WINDOW > 0, BLOCK_N, D, D2, DV, STAGES, SETTLE, S_LAYOUT, O_LAYOUT, P_LAYOUT)
            # All of Q's readers are done. Its slot goes back now, unless the output is to pass through it.
            if not SHARE_Q:
                barrier_arrive(2 * STAGES + at, True)
            mbarrier.wait(v_ready.index(before), before_phase)
            acc = warpgroup_mma(p16, v_smem.index(before).reshape([BLOCK_N, DV]), acc, is_async=True)
            head_q = head_kv * GROUP + member
            m = gl.convert_layout(gl.max(m, axis=1), ROW_LAYOUT)
            l = gl.convert_layout(gl.sum(l, axis=1), ROW_LAYOUT)
            sink = None
            if Sinks is not None:
                sink = gl.load(Sinks + head_q).to(gl.float32) * LOG2E
            factor, lse = concluded(m, l, sink)
            token = first + row
            at_lse = lse_of(Lse, b, head_q, heads_kv * GROUP, seqlen_q, start_q, VARLEN)
            gl.store(at_lse + token, lse, mask=token < len_q)
            if AHEAD:
                following = _place(turn + 1, round + 1, work, shape)
            acc = warpgroup_mma_wait(0, deps=[acc])
            hold_half(p16)
            barrier_arrive(STAGES + before, last)
            slot, phase = _pass_on(blocks - stop, slot, phase, bars, last, STAGES)
            o = acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT)), 1)
            o = o.to(v_smem.dtype)
            if SHARE_Q:
                out_smem = q_smem.index(at)
            else:
                out_smem = o_smem.index(INDEX)
                tma.store_wait(0)
            out_smem.reshape([64, DV]).store(o)
            fence_async_shared()
            o_b, o_row = place_of(b, start_q, len_q, VARLEN)
            store_block(o_desc, o_b, o_row + first, head_q, 0, out_smem)
            if SHARE_Q:
                tma.store_wait(0)
                barrier_arrive(2 * STAGES + at, True)
        else:
            # no such head: its slot is passed on, so that loader and warpgroup count alike
            mbarrier.wait(q_ready.index(at), q_phase)
            barrier_arrive(2 * STAGES + at, True)
            if i == 0:
                # no head of this tile is this warpgroup's, but the slots wait for it all the same
                slot, phase = _pass_on(blocks, slot, phase, bars, True, STAGES)
        q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)
    return (slot, phase, q_slot, q_phase), following


@gluon.jit
def _place(turn, round, work, shape: gl.constexpr):
    """Tile ``turn`` of a packed batch's program, or the one of ``round``: (whether there is one, sequence, key head,
    first member of its group, first token, lengths, where the queries begin)."""
    GROUP: gl.constexpr = shape[0]
    WARPGROUPS: gl.constexpr = shape[1]
    HEADS: gl.constexpr = shape[2]
    STAGES: gl.constexpr = shape[8]
    Q_STAGES: gl.constexpr = shape[9]
    if shape[10]:
        LETTER: gl.constexpr = 2 * STAGES + WARPGROUPS * Q_STAGES
        barrier_wait(LETTER + turn % LETTERS, turn // LETTERS & 1)
        head, first, len_q, len_k, start_q, _ = letter_read(turn % LETTERS)
        return first >= 0, gl.to_tensor(0), head // GROUP, head % GROUP, first, len_q, len_k, start_q
    else:
        CHUNK: gl.constexpr = WARPGROUPS * HEADS if shape[12] else 1
        ok, b, head_kv, member0, first, len_q, len_k, start_q, start_k = tile_of(
            tile_of_round(round), work, GROUP, CHUNK, shape[3], False)
        return ok, b, head_kv, member0, first, len_q, len_k, start_q


@gluon.jit
def _compute(tensors, INDEX: gl.constexpr, shape: gl.constexpr):
    """Warpgroup number INDEX: 64 query rows of one head at a time."""
    work = tensors[2]
    AHEAD: gl.constexpr = shape[15]
    rings = (gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0))
    turn = gl.to_tensor(0)
    place = _place(0, 0, work, shape)
    if shape[10]:
        while place[0]:
            rings, place = _compute_tile(tensors, place, rings, turn, 0, INDEX, shape)
            turn += 1
            if not AHEAD:
                place = _place(turn, 0, work, shape)
    else:
        for round in range(gl.cdiv(work[4], gl.num_programs(0))):
            if not AHEAD:
                place = _place(0, round, work, shape)
            if place[0]:
                rings, place = _compute_tile(tensors, place, rings, turn, round, INDEX, shape)
                turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["batch", "seqlen_q", "seqlen_k", "heads_kv", "num_tiles", "tiles_per_unit", "section",
                              "window"])
def hopper_fwd_kernel(
    q_desc, q2_desc, k_desc, k2_desc, v_desc, o_desc, Sinks, Lse, CuSeqlensQ, CuSeqlensK, Counter,
    batch, seqlen_q, seqlen_k, heads_kv, num_tiles, tiles_per_unit, section, window, scale_log2,
    GROUP: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, DV: gl.constexpr,
    WARPGROUPS: gl.constexpr, HEADS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, VARLEN: gl.constexpr, WINDOW: gl.constexpr, SPREAD: gl.constexpr,
    SPLIT_LOOPS: gl.constexpr,
    SHARE_Q: gl.constexpr, REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):
    """Persistent over tiles of 64 rows per warpgroup: tile, tile + programs, ... of one length; of a packed batch each
    program's first, and then what it draws.

    *_desc: descriptors of (batch, seqlen, heads, head_dim) with blocks of (1, 64 or BLOCK_N, 1, part of the head dim),
    see descriptors.describe. Lse: float32 (batch, heads_q, seqlen_q), packed (heads_q, total_q). scale_log2 = softmax
    scale * log2(e). Counter: of a packed batch, one int32, 0 where there are more tiles than programs; None where there
    cannot be.

    SPREAD: the warpgroups take different heads of a group at the same tokens, HEADS of them one after the other while
    K and V stay; else consecutive tokens of one head. SHARE_Q: the output leaves through Q's slot. REGISTERS: of each
    warpgroup but the first, which gets what is left of maxnreg.
    """
    dtype: gl.constexpr = q_desc.dtype
    TOKENS: gl.constexpr = 64 if SPREAD else 64 * WARPGROUPS
    q_smem = gl.allocate_shared_memory(dtype, [WARPGROUPS * Q_STAGES] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q2_smem = q_smem
    k2_smem = k_smem
    if D2:
        q2_smem = gl.allocate_shared_memory(dtype, [WARPGROUPS * Q_STAGES] + q2_desc.block_type.shape, q2_desc.layout)
        k2_smem = gl.allocate_shared_memory(dtype, [STAGES] + k2_desc.block_type.shape, k2_desc.layout)
    o_smem = q_smem
    if not SHARE_Q:
        o_smem = gl.allocate_shared_memory(dtype, [WARPGROUPS] + o_desc.block_type.shape, o_desc.layout)
    # *_ready: the copy engine has filled the slot. *_empty: every warp that reads the slot has read it.
    q_ready = gl.allocate_shared_memory(gl.int64, [WARPGROUPS * Q_STAGES, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    barriers_declare(num_tiles)
    for i in gl.static_range(WARPGROUPS * Q_STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        barrier_init(2 * STAGES + i, 4)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        barrier_init(i, 4 * WARPGROUPS)
        barrier_init(STAGES + i, 4 * WARPGROUPS)
    if VARLEN:
        for i in gl.static_range(LETTERS):
            barrier_init(2 * STAGES + WARPGROUPS * Q_STAGES + i, 1)
    fence_async_shared()
    smem = (q_smem, q2_smem, k_smem, k2_smem, v_smem, o_smem)
    bars = (q_ready, k_ready, v_ready)
    work = (batch, seqlen_q, seqlen_k, heads_kv, num_tiles, tiles_per_unit, section, window, CuSeqlensQ, CuSeqlensK)
    # Where every warpgroup has rows in every tile, it finds the next tile while the tensor cores end this one; but not
    # where blocks that it has yet to pass on may fill the ring, which the loader of a packed batch waits for before it
    # tells of the next tile.
    AHEAD: gl.constexpr = not SPREAD and not (VARLEN and WINDOW and (WARPGROUPS - 1) * 64 // BLOCK_N >= STAGES)
    # by place, as _load and _compute take it apart
    shape: gl.constexpr = (GROUP, WARPGROUPS, HEADS, TOKENS, BLOCK_N, D, D2, DV, STAGES, Q_STAGES, VARLEN,
                           WINDOW, SPREAD, SPLIT_LOOPS, SHARE_Q, AHEAD)
    descs = (q_desc, q2_desc, k_desc, k2_desc, v_desc)
    results = (Sinks, Lse, scale_log2)
    load = (descs, work, smem, bars, Counter)
    compute = (o_desc, results, work, smem, bars)
    if WARPGROUPS == 1:
        gl.warp_specialize([(_compute, (compute, 0, shape)), (_load, (load, shape))], [1], [LOADER_REGISTERS])
    elif WARPGROUPS == 2:
        gl.warp_specialize([(_compute, (compute, 0, shape)), (_compute, (compute, 1, shape)), (_load, (load, shape))],
                           [4, 1], [REGISTERS, LOADER_REGISTERS])
    elif WARPGROUPS == 3:
        gl.warp_specialize([(_compute, (compute, 0, shape)), (_compute, (compute, 1, shape)),
                            (_compute, (compute, 2, shape)), (_load, (load, shape))],
                           [4, 4, 1], [REGISTERS, REGISTERS, LOADER_REGISTERS])
    else:
        gl.warp_specialize([(_compute, (compute, 0, shape)), (_compute, (compute, 1, shape)),
                            (_compute, (compute, 2, shape)), (_compute, (compute, 3, shape)), (_load, (load, shape))],
                           [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, LOADER_REGISTERS])
