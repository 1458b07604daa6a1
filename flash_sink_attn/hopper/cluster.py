"""Two programs that are launched as a cluster: they meet, and send each other tiles of half precision.

Each knows itself as program number ``% 2``: clusters are pairs of neighbours. What Triton allocates and the barriers
of our own lie at the same addresses in both. Nothing here releases or acquires what was written to memory for the
cluster: that would be a fence for the whole GPU, which waits for all that was added to scratch. What is sent goes by
the copy engine, which tells the barrier when it is there, and who gives room back has only read.

Who has ended has no shared memory any more: a program must have waited for all that the other sends it or tells it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# FIRST: what cluster_send takes tiles from must be Triton's first allocation. Inline PTX cannot be told the address of
# one, only where all of them begin: ``global_smem``. Triton lays out the largest first, which in backward_pair is dS:
# the kernel asserts that. Where Triton put it can be seen without a card: its allocation pass, run on the kernel's
# ``ttgir``, writes the place of each into the module, and dS must have ``allocation.offset = 0``.


@gluon.jit
def cluster_init_fence(zero):
    """After the barriers' initialisation, before :func:`cluster_meet`. zero: any integer."""
    gl.inline_asm_elementwise("fence.mbarrier_init.release.cluster; mov.u32 $0, 0;", "=r,r", [zero], dtype=gl.int32,
                              is_pure=False, pack=1)


@gluon.jit
def cluster_meet(zero):
    """Until every thread of both programs is here, and their barriers are initialised. zero: any integer."""
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned; mov.u32 $0, 0;", "=r,r",
        [zero], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def cluster_arrive(number, rank):
    """As barrier_arrive, at a barrier of program ``rank`` of the cluster."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; mov.u32 a, own_barriers; mad.lo.u32 a, $1, 8, a; "
        "mapa.shared::cluster.u32 a, a, $2; bar.warp.sync -1; elect.sync _|p, -1; "
        "@p mbarrier.arrive.shared::cluster.b64 _, [a]; mov.u32 $0, 0; }",
        "=r,r,r", [number, rank], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def cluster_send(source, target, number, rank):
    """Of one warp: sends tile ``source``, 8 KiB, to tile ``target`` of program ``rank``, at whose barrier it arrives
    once; after a fence_async_shared of those who wrote it, and a barrier.

    source, target: which tile of 64 x 64 from the beginning of what Triton allocates, see FIRST above. They have to be
    the same for all of the warp in a way that the assembler sees: else it takes nothing in the kernel to be.
    """
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 from, to, a; mov.u32 from, global_smem; mad.lo.u32 to, $2, 8192, from; "
        "mad.lo.u32 from, $1, 8192, from; mapa.shared::cluster.u32 to, to, $4; mov.u32 a, own_barriers; "
        "mad.lo.u32 a, $3, 8, a; mapa.shared::cluster.u32 a, a, $4; bar.warp.sync -1; elect.sync _|p, -1; "
        "@p mbarrier.arrive.expect_tx.shared::cluster.b64 _, [a], 8192; "
        "@p cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [to], [from], 8192, [a]; "
        "mov.u32 $0, 0; }",
        "=r,r,r,r,r", [source, target, number, rank], dtype=gl.int32, is_pure=False, pack=1)
