"""What compute-sanitizer's racecheck says of kernels that are right, and of one that is not:

    compute-sanitizer --tool racecheck python -m tests.racecheck_controls empty handed handed_by_warps unguarded

Each is two partitions of one program. ``empty``: they share nothing. ``handed``: one stores, the other loads, and both
wait for each other at Triton's mbarriers. ``handed_by_warps``: the same, with the barriers of
flash_sink_attn.hopper.common for the way back. ``unguarded``: nobody waits. Only the last one can be wrong, and it says
so; docs/hopper.md tells what racecheck makes of the four.
"""

from __future__ import annotations

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from flash_sink_attn.hopper.common import barrier_arrive, barrier_init, barrier_wait, barriers_declare

MODES = ("empty", "handed", "handed_by_warps", "unguarded")
ROUNDS = 4
HANDED: gl.constexpr = gl.constexpr(1)
HANDED_BY_WARPS: gl.constexpr = gl.constexpr(2)


@gluon.jit
def _take(smem, filled, empty, Out, rounds, MODE: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    total = gl.zeros([128], gl.float32, LAYOUT)
    if MODE != 0:
        phase = 0
        for _ in range(rounds):
            if MODE == HANDED or MODE == HANDED_BY_WARPS:
                mbarrier.wait(filled.index(0), phase)
            total += smem.index(0).load(LAYOUT)
            if MODE == HANDED:
                mbarrier.arrive(empty.index(0), count=1)
            if MODE == HANDED_BY_WARPS:
                barrier_arrive(0, True)
            phase ^= 1
    gl.store(Out + gl.arange(0, 128, layout=LAYOUT), total)


@gluon.jit
def _give(smem, filled, empty, Out, rounds, MODE: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    if MODE != 0:
        x = gl.arange(0, 128, layout=LAYOUT).to(gl.float32)
        phase = 1
        for i in range(rounds):
            if MODE == HANDED:
                mbarrier.wait(empty.index(0), phase)
            if MODE == HANDED_BY_WARPS:
                barrier_wait(0, phase)
            smem.index(0).store(x + i)
            mbarrier.arrive(filled.index(0), count=1)
            phase ^= 1


@gluon.jit
def control_kernel(Out, rounds, MODE: gl.constexpr):
    smem = gl.allocate_shared_memory(gl.float32, [1, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    filled = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    barriers_declare(rounds)
    barrier_init(0, 4)
    mbarrier.init(filled.index(0), count=1)
    mbarrier.init(empty.index(0), count=1)
    fence_async_shared()
    gl.thread_barrier()
    arguments = (smem, filled, empty, Out, rounds, MODE)
    gl.warp_specialize([(_take, arguments), (_give, arguments)], [1], [24])


def main(modes: list[str]) -> int:
    for mode in modes or MODES:
        out = torch.zeros(128, device="cuda")
        control_kernel[(1,)](out, ROUNDS, MODES.index(mode), num_warps=4, maxnreg=64)
        wanted = torch.arange(128.0) * ROUNDS + sum(range(ROUNDS)) if mode != "empty" else torch.zeros(128)
        print(f"{mode}: {'right' if torch.equal(out.cpu(), wanted) else 'wrong'}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
