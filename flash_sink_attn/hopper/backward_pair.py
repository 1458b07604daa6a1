"""The Hopper backward for head dim 192 with values of 128, by pairs of programs that add one dQ.

What backward_wide's programs wait for is L2: each adds a float32 dQ of 64 x 192 for every tile of queries and 64 keys.
Here two neighbours, launched as a cluster, have 128 keys that follow each other. Both go through the same tiles of
queries, each makes dK and dV of its own 64 keys and dS of every tile, and the tiles take turns in whose dQ they are:

    tile               0             1             2             3
    first program      makes dS      sends dS      makes dS      sends dS
                                     adds dQ(0)                  adds dQ(2)
    second program     sends dS      makes dS      sends dS      makes dS
                                                   adds dQ(1)

Whose a tile is, adds dQ = dS K + (the other's dS) (the other's K) to scratch: it holds K of both, and the other's dS
comes through the cluster's shared memory, 8 KiB a tile. So for each tile and 128 keys there is one addition to L2
instead of two, and besides K of both nothing more is read. Who adds does so a tile late, when the other's dS has come.
All else is as in backward_wide. See :func:`hopper_bwd_pair_kernel`.
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
from flash_sink_attn.hopper.cluster import cluster_arrive, cluster_init_fence, cluster_meet, cluster_send
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

# Tiles of dS in shared memory: of this program, tile i's in i % OWN, and behind them what the other one sent. These are
# numbers for cluster_send, too: see FIRST in hopper.cluster.
OWN: gl.constexpr = gl.constexpr(4)
SENT: gl.constexpr = gl.constexpr(2)


@gluon.jit
def _keys_of_pair(cu_q, cu_k, work, shape: gl.constexpr):
    """(ok, rank in the pair, batch, key head, first key of this program, keys' minus queries' length, (length, start)
    of the queries' sequence and of the keys', where its statistics begin, course of both programs).

    All but the rank and the first key are the same in both: who has nothing to do has no partner that waits.
    """
    GROUP: gl.constexpr = shape[0]
    VARLEN: gl.constexpr = shape[5]
    WINDOW: gl.constexpr = shape[6]
    ok, b, head, place, first_key, offset, len_q, len_k, start_q, start_k, base, course = key_tile(
        cu_q, cu_k, work, 128, GROUP, 1, WINDOW, VARLEN, not WINDOW, shape[7], True)
    rank = gl.program_id(0) % 2
    return ok, rank, b, head, first_key + 64 * rank, offset, (len_q, start_q), (len_k, start_k), base, course


@gluon.jit
def _load(descs, Lse2, Delta, cu_q, cu_k, smem, bars, work, shape: gl.constexpr):
    """The loader: V and both programs' K once, then a ring of q, do and their rows' statistics."""
    q_desc, q2_desc, k_desc, k2_desc, v_desc, do_desc = descs
    kv_ready = bars[0]
    ok, rank, b, head, first_key, offset, of_q, of_k, base, course = _keys_of_pair(cu_q, cu_k, work, shape)
    q_b, q_row = place_of(b, of_q[1], of_q[0], shape[5])
    k_b, k_row = place_of(b, of_k[1], of_k[0], shape[5])
    if ok:
        mbarrier.expect(kv_ready, 2 * (k_desc.block_type.nbytes + k2_desc.block_type.nbytes) + v_desc.block_type.nbytes)
        load_keys(descs, k_b, k_row + first_key, head, kv_ready, smem, 0, shape)
        # The second program's keys may all lie beyond the sequence's end. Then these copies, and its own of K and V,
        # are of zeros and as many bytes: beyond the tensor, or in a packed batch where a descriptor clips.
        load_keys(descs, k_b, k_row + (first_key + 64 - 128 * rank), head, kv_ready, smem, 1, shape)
        load_block(v_desc, k_b, k_row + first_key, head, 0, kv_ready, smem[2].index(0))
    cluster_meet(gl.program_id(0))
    await_launch_before()
    if ok:
        load_tiles(descs, Lse2, Delta, smem, bars, work, b, q_b, q_row, head, base, course, shape)


@gluon.jit
def _send(cu_q, cu_k, bars, work, shape: gl.constexpr):
    """The warp that sends dS of the other program's tiles."""
    made = bars[7]
    sent = bars[8]
    ok, rank, b, head, first_key, offset, of_q, of_k, base, course = _keys_of_pair(cu_q, cu_k, work, shape)
    cluster_meet(gl.program_id(0))
    if ok:
        m, g, left, total = first_tile(course)
        for n in range((total + rank) // 2):
            barrier_wait(made + n % 2, n // 2 & 1)
            cluster_send((2 * n + 1 - rank) & 3, OWN + n % 2, sent + n % 2, 1 - rank)


@gluon.jit
def _accompany(rows):
    """What a warp does that is there only because Triton would fill up the last warpgroup, with warps that never meet
    the other program."""
    cluster_meet(rows)


@gluon.jit
def _take_turns(Turn, cu_q, cu_k, turn, added, passed, work, order: gl.constexpr):
    """In place of one that accompanies, where dQ is added in one order: see backward_walk."""
    cluster_meet(gl.program_id(0))
    take_turns(Turn, cu_q, cu_k, turn, added, passed, work, order)


@gluon.jit
def _pass_turns(Turn, cu_q, cu_k, turn, added, passed, work, order: gl.constexpr):
    cluster_meet(gl.program_id(0))
    pass_turns(Turn, cu_q, cu_k, turn, added, passed, work, order)


@gluon.jit
def _start_dq(smem, sent, i, zero, PART: gl.constexpr):
    """Starts dQ of tile ``i``, which is this program's, once the other's dS has come: part 0 is the first D columns,
    part 1 the D2 behind them, as wide as ``zero``."""
    WIDTH: gl.constexpr = zero.shape[1]
    k_smem = smem[PART]
    ds_smem = smem[9]
    barrier_wait(sent + (i // 2 & 1), i // 4 & 1)
    dq = warpgroup_mma(ds_smem.index(i & 3).permute((1, 0)), k_smem.index(0).reshape([64, WIDTH]), zero, use_acc=False,
                       is_async=True)
    return warpgroup_mma(ds_smem.index(OWN + (i // 2 & 1)).permute((1, 0)), k_smem.index(1).reshape([64, WIDTH]), dq,
                         is_async=True)


@gluon.jit
def _add_dq(offsets, tile, dq, i, bars, rank, shape: gl.constexpr):
    """Adds dQ of tile ``i``, number ``tile`` in scratch, whose products have ended: what was sent for it has been read.
    offsets: of tile 0 in scratch."""
    kv_ready, q_ready, do_ready, q_empty, do_empty, p_ready, ds_ready, made, sent, free, turn, added, passed = bars
    n = i // 2
    cluster_arrive(free + (n & 1), 1 - rank)
    if shape[7]:
        barrier_wait(turn + n % TURNS, n // TURNS & 1)
    scratch_add_64(offsets + tile.to(gl.int64) * ((shape[1] + shape[2]) * 256), dq)
    if shape[7]:
        barrier_arrive(added + n % TURNS, True)


@gluon.jit
def _compute_values(dv_desc, DQ, cu_q, cu_k, smem, bars, work, scale_log2, shape: gl.constexpr):
    """The warpgroup that makes S, P and dV, and the first D columns of dQ.

    P is 0 of keys and queries that do not see each other, and both programs go through all tiles that the pair's 128
    keys are seen from. So where the first 64 see a tile's end and the second nothing, or under a window the other way
    round, the mask leaves nothing of P, and dS is 0. It does too where the second 64 lie beyond the sequence's end:
    they come after all queries. (Rows beyond the last query have an infinite lse.) Then K is 0 as well.
    """
    GROUP: gl.constexpr = shape[0]
    D: gl.constexpr = shape[1]
    DV: gl.constexpr = shape[3]
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    kv_ready, q_ready, do_ready, q_empty, do_empty, p_ready, ds_ready, made, sent, free, turn, added, passed = bars
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    V_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=V_LAYOUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    ok, rank, b, head, first_key, offset, of_q, of_k, base, course = _keys_of_pair(cu_q, cu_k, work, shape)
    cluster_meet(gl.program_id(0))
    if ok:
        key, row = positions(first_key - offset, S_LAYOUT)
        zero = gl.zeros([64, 64], gl.float32, S_LAYOUT)
        dq_zero = gl.zeros([64, D], gl.float32, Q_LAYOUT)
        dv = gl.zeros([64, DV], gl.float32, V_LAYOUT)
        offsets = DQ.to(gl.int64) + scratch_offsets(Q_LAYOUT, D)
        m, g, left, total = first_tile(course)
        slot = 0
        phase = 0
        tile0, head_rows = tiles_in_scratch(b, head, base, work, GROUP)
        before = tile0 + g * head_rows + m
        # from the first one on each turn starts the next one's
        s, lse2 = first_s(smem, bars, total, zero, shape)
        for i in range(total):
            p = give_p(s, lse2, key, row, m, first_key - offset, i, slot, smem, bars, work, scale_log2, A_LAYOUT, shape)
            do = do_smem.index(slot).reshape([64, DV])
            mbarrier.wait(do_ready.index(slot), phase)
            current = tile0 + g * head_rows + m
            m, g, left = next_tile(m, g, left, course, not shape[6])
            following, following_phase = advance(slot, phase, shape[4])
            # Both ways wait for dS of the tile before, at the first one for the phase before the first, which is passed
            # at once. All of a way stands in it: no product may be in flight where ways meet, ptxas would serialise.
            if (i + rank) % 2 == 1 and i > 0:
                # the tile before is this program's
                dv = warpgroup_mma(p, do, dv, is_async=True)
                barrier_wait(ds_ready + (i + 1) % 2, (i + 1) // 2 & 1 ^ 1)
                dq = _start_dq(smem, sent, i - 1, dq_zero, 0)
                dv = warpgroup_mma_wait(2, deps=[dv])
                hold_half(p)
                barrier_arrive(do_empty + slot, True)
                mbarrier.wait(q_ready.index(following), following_phase, pred=i + 1 < total)
                s = start_s(smem, following, zero, shape)
                dq = warpgroup_mma_wait(2, deps=[dq])
                _add_dq(offsets, before, dq, i - 1, bars, rank, shape)
                s = warpgroup_mma_wait(0, deps=[s])
            else:
                dv = warpgroup_mma(p, do, dv, is_async=True)
                mbarrier.wait(q_ready.index(following), following_phase, pred=i + 1 < total)
                s = start_s(smem, following, zero, shape)
                dv = warpgroup_mma_wait(2, deps=[dv])
                hold_half(p)
                barrier_arrive(do_empty + slot, True)
                barrier_wait(ds_ready + (i + 1) % 2, (i + 1) // 2 & 1 ^ 1)
                s = warpgroup_mma_wait(0, deps=[s])
            before = current
            lse2 = lse_smem.index(following).load(ROW)
            slot = following
            phase = following_phase
        if total > 0:
            # whoever adds: it tells that the other warpgroup has read all tiles of do
            barrier_wait(ds_ready + (total + 1) % 2, (total + 1) // 2 & 1 ^ 1)
            if (total + rank) % 2 == 1:
                dq = warpgroup_mma_wait(0, deps=[_start_dq(smem, sent, total - 1, dq_zero, 0)])
                _add_dq(offsets, before, dq, total - 1, bars, rank, shape)
        # of keys beyond the sequence's end nothing is written, as nothing was loaded
        store_dv(dv_desc, dv, smem, b, of_k[1], of_k[0], first_key, head, shape)


@gluon.jit
def _compute_keys(dk_desc, dk2_desc, DQ, cu_q, cu_k, smem, bars, work, scale, shape: gl.constexpr):
    """The warpgroup that makes dP, dS and dK, and the last D2 columns of dQ."""
    GROUP: gl.constexpr = shape[0]
    D: gl.constexpr = shape[1]
    D2: gl.constexpr = shape[2]
    k_smem, k2_smem, v_smem, q_smem, q2_smem, do_smem, lse_smem, delta_smem, p_smem, ds_smem = smem
    kv_ready, q_ready, do_ready, q_empty, do_empty, p_ready, ds_ready, made, sent, free, turn, added, passed = bars
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    # of dQ and of dK's last columns
    K2_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D2, 16])
    ok, rank, b, head, first_key, offset, of_q, of_k, base, course = _keys_of_pair(cu_q, cu_k, work, shape)
    cluster_meet(gl.program_id(0))
    if ok:
        zero = gl.zeros([64, 64], gl.float32, S_LAYOUT)
        dk = gl.zeros([64, D], gl.float32, K_LAYOUT)
        dk2 = gl.zeros([64, D2], gl.float32, K2_LAYOUT)
        dq_zero = dk2
        offsets = DQ.to(gl.int64) + D * 256 + scratch_offsets(K2_LAYOUT, D2)
        m, g, left, total = first_tile(course)
        slot = 0
        phase = 0
        tile0, head_rows = tiles_in_scratch(b, head, base, work, GROUP)
        before = tile0 + g * head_rows + m
        # from the first one on each turn starts the next one's
        dp = first_dp(smem, bars, total, zero, shape)
        for i in range(total):
            ds = make_ds(dp, i, slot, smem, bars)
            # the tile is the other program's
            send = (i + rank) % 2 == 1
            if send:
                barrier_wait(free + (i // 2 & 1), (i // 4 + 1) & 1)
            ds_smem.index(i & 3).store(ds)
            fence_async_shared()
            barrier_arrive(made + (i // 2 & 1), send)
            barrier_arrive(ds_ready + i % 2, True)
            barrier_arrive(do_empty + slot, True)
            ds = hold_half(gl.convert_layout(ds, gl.DotOperandLayout(operand_index=0, parent=K_LAYOUT, k_width=2)))
            mbarrier.wait(q_ready.index(slot), phase)
            current = tile0 + g * head_rows + m
            m, g, left = next_tile(m, g, left, course, not shape[6])
            following, following_phase = advance(slot, phase, shape[4])
            # the ways as in _compute_values
            if send and i > 0:
                dk, dk2 = start_dk(ds, smem, slot, dk, dk2, shape)
                barrier_wait(ds_ready + (i + 1) % 2, (i - 1) // 2 & 1)
                dq = _start_dq(smem, sent, i - 1, dq_zero, 1)
                dk, dk2 = warpgroup_mma_wait(2, deps=[dk, dk2])
                hold_half(ds)
                barrier_arrive(q_empty + slot, True)
                mbarrier.wait(do_ready.index(following), following_phase, pred=i + 1 < total)
                dp = start_dp(smem, following, zero, shape)
                dq = warpgroup_mma_wait(1, deps=[dq])
                _add_dq(offsets, before, dq, i - 1, bars, rank, shape)
                dp = warpgroup_mma_wait(0, deps=[dp])
            else:
                dk, dk2 = start_dk(ds, smem, slot, dk, dk2, shape)
                mbarrier.wait(do_ready.index(following), following_phase, pred=i + 1 < total)
                dp = start_dp(smem, following, zero, shape)
                dk, dk2 = warpgroup_mma_wait(1, deps=[dk, dk2])
                hold_half(ds)
                barrier_arrive(q_empty + slot, True)
                dp = warpgroup_mma_wait(0, deps=[dp])
            before = current
            slot = following
            phase = following_phase
        if total > 0:
            if (total + rank) % 2 == 1:
                barrier_wait(ds_ready + (total + 1) % 2, (total - 1) // 2 & 1)
                dq = warpgroup_mma_wait(0, deps=[_start_dq(smem, sent, total - 1, dq_zero, 1)])
                _add_dq(offsets, before, dq, total - 1, bars, rank, shape)
        store_dk(dk_desc, dk2_desc, dk, dk2, scale, smem, b, of_k[1], of_k[0], first_key, head, shape)
        # until the other program has done with the last two tiles that it was sent, see hopper.cluster
        foreign = (total + rank) // 2
        if foreign > 0:
            barrier_wait(free + ((foreign - 1) & 1), (foreign - 1) // 2 & 1)
        if foreign > 1:
            barrier_wait(free + (foreign & 1), (foreign - 2) // 2 & 1)


@gluon.jit(do_not_specialize=["batch", "seqlen_q", "seqlen_k", "heads_kv", "rows", "tiles", "section", "window"])
def hopper_bwd_pair_kernel(
    q_desc, q2_desc, k_desc, k2_desc, v_desc, do_desc, dk_desc, dk2_desc, dv_desc, DQ, Turn, Lse2, Delta,
    CuSeqlensQ, CuSeqlensK,
    batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window, scale, scale_log2,
    GROUP: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
    VARLEN: gl.constexpr, WINDOW: gl.constexpr, ORDERED: gl.constexpr, REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    """Two programs, a cluster, per 128 keys of a key head, which walk the query tiles that see any of them.

    ``tiles`` and ``section`` are of such pairs; all other arguments are as hopper_bwd_wide_kernel's, with D2 not 0.
    """
    # by place, as the partitions take it apart
    shape: gl.constexpr = (GROUP, D, D2, DV, STAGES, VARLEN, WINDOW, ORDERED)
    descs = (q_desc, q2_desc, k_desc, k2_desc, v_desc, do_desc)
    gl.static_assert((OWN + SENT) * 64 > STAGES * D and (OWN + SENT) * 64 > STAGES * DV, "dS must be allocated first")
    smem = allocate_tiles(descs, 2, OWN + SENT, shape)
    # Who arrives, how often, who waits for which parity; round r of a slot is its r-th use, i the i-th tile, from 0.
    # Tile i is owned by the program of rank i % 2, which adds its dQ in tile i + 1; to the other it is foreign.
    # n = i / 2 counts the tiles of one owner, F is how many of all are foreign here.
    # kv_ready: the loader once, and the bytes of V and both programs' K; both warpgroups wait for parity 0.
    # q_ready, do_ready: the loader twice (with the bytes it expects, and once the rows' statistics are stored); both
    #   warpgroups wait for parity r % 2.
    # q_empty, do_empty: each of the eight warps once, when its product that reads the slot has ended and, of lse the
    #   first four and of delta the others, it has read the statistics; the loader waits, before it fills the slot for
    #   round r, for parity (r + 1) % 2: at round 0 the one before the first, which is passed at once.
    # p_ready: two, for even and odd tiles, since the first warpgroup may be two tiles ahead of what the second waits
    #   for; each warp that makes P once, when its part of tile i's is stored; those that make dS wait, in tile i, for
    #   parity i / 2 % 2.
    # ds_ready: two likewise; each warp that makes dS once, when its part of tile i's is stored, owned or foreign; those
    #   that make P wait for parity i / 2 % 2 in tile i + 1, and after the last tile for its; those that make dS wait
    #   for it there where tile i is owned, since each reads all of dS.
    # Then three pairs, for even and odd n, of which only ``made`` is of this program's warps alone.
    # made: each warp that makes dS once, when its part of a foreign tile's is stored; the warp that sends it waits for
    #   parity n / 2 % 2.
    # sent: the other program's sender once, and the bytes of its dS, which the copy engine tells when they are there;
    #   both warpgroups of the owner wait for parity n / 2 % 2 before they multiply.
    # free: each of the owner's eight warps once, at the other program's barrier, when its product that reads what was
    #   sent has ended; the other program's warps that make dS wait for parity (n / 2 + 1) % 2 before they store tile n
    #   (at n = 0 and 1 the phase before the first), and at the end for the phases of n = F - 1 and F - 2.
    # turn, added, passed (ORDERED): as hopper_bwd_keys_kernel's, of the owned tiles: number n is tile i's. Who waits
    #   for its turn holds the other program up, too, within few tiles; both wait only for pairs with lower numbers.
    # No barrier is a phase ahead of who waits for it: P(i + 2) is made after all of dS(i), that after all have waited
    # for P(i), and of ds_ready, made, sent and free each next phase needs those who wait for this one: made(n + 2) is
    # told after free(n), which the owner tells after sent(n), which is sent after made(n) was waited for.
    # Nobody else waits to overwrite.
    # P(i) goes where P(i - 2) was, after the wait for all of dS(i - 2), which was made of it: in tile i - 1, both ways.
    # What is sent of tile n goes where that of n - 2 was, and is stored to be sent, as dS(i), where dS(i - 4) was: when
    # free of n - 2 has come the owner has read the one, and so the copy engine the other.
    # An owned dS(i) goes where the owned dS(i - 4) was. The first warpgroup has read that before it made P(i - 2), and
    # the warps that store have waited for P(i). Of the second each warp has read it in tile i - 3, before it made its
    # part of dS(i - 2), for all of which each has waited in tile i - 1.
    bars, made = allocate_barriers(rows, STAGES)
    sent = made + 2
    free = sent + 2
    turn = free + 2
    added = turn + TURNS
    passed = added + TURNS
    for i in gl.static_range(2):
        barrier_init(made + i, 4)
        barrier_init(sent + i, 1)
        barrier_init(free + i, 8)
    if ORDERED:
        for i in gl.static_range(TURNS):
            barrier_init(turn + i, 1)
            barrier_init(added + i, 8)
            barrier_init(passed + i, 1)
    cluster_init_fence(rows)
    fence_async_shared()
    gl.thread_barrier()
    bars = bars + (made, sent, free, turn, added, passed)
    work = (batch, seqlen_q, seqlen_k, heads_kv, rows, tiles, section, window)
    values = (dv_desc, DQ, CuSeqlensQ, CuSeqlensK, smem, bars, work, scale_log2, shape)
    keys = (dk_desc, dk2_desc, DQ, CuSeqlensQ, CuSeqlensK, smem, bars, work, scale, shape)
    load = (descs, Lse2, Delta, CuSeqlensQ, CuSeqlensK, smem, bars, work, shape)
    send = (CuSeqlensQ, CuSeqlensK, bars, work, shape)
    # the last two are all that is left of the last warpgroup, see _accompany
    if ORDERED:
        order: gl.constexpr = (128, GROUP, 1, VARLEN, WINDOW, not WINDOW, ORDERED, 0, True, False)
        turns = (Turn, CuSeqlensQ, CuSeqlensK, turn, added, passed, work, order)
        gl.warp_specialize([
            (_compute_values, values), (_compute_keys, keys), (_load, load), (_send, send), (_take_turns, turns),
            (_pass_turns, turns),
        ], [4, 1, 1, 1, 1], [REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS])
    else:
        gl.warp_specialize([
            (_compute_values, values), (_compute_keys, keys), (_load, load), (_send, send), (_accompany, (rows,)),
            (_accompany, (rows,)),
        ], [4, 1, 1, 1, 1], [REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS])
