"""What a program with keys of the Hopper backward multiplies for a tile of queries, and how it adds to dQ."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from flash_sink_attn.hopper.backward_common import opaque_address, scratch_add, scratch_add_64
from flash_sink_attn.hopper.backward_walk import TURNS
from flash_sink_attn.hopper.common import barrier_arrive, barrier_wait
from flash_sink_attn.hopper.staging import staging_add, staging_drain


@gluon.jit
def start_scores(x, x2, y, y2, zero, D2: gl.constexpr):
    """Starts x y^T: S^T = K Q^T, or dP^T = V dO^T. With D2 in two parts, columns from 64 on in x2 and y2."""
    s = warpgroup_mma(x, y.permute((1, 0)), zero, use_acc=False, is_async=True)
    if D2:
        s = warpgroup_mma(x2, y2.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def start_sum(x, y, y2, total, total2, D2: gl.constexpr):
    """Starts total += x y: dV += P^T dO, or dK += dS^T Q. With D2 in two parts, as in :func:`start_scores`."""
    total = warpgroup_mma(x, y, total, is_async=True)
    if D2:
        LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=total2.type.layout, k_width=2)
        total2 = warpgroup_mma(gl.convert_layout(x, LAYOUT, assert_trivial=True), y2, total2, is_async=True)
    return total, total2


@gluon.jit
def ended(dv, dv2, dk, dk2, PENDING: gl.constexpr, D2: gl.constexpr):
    """dV and dK once at most PENDING products behind theirs are left."""
    if D2:
        dv, dv2, dk, dk2 = warpgroup_mma_wait(PENDING, deps=[dv, dv2, dk, dk2])
    else:
        dv, dk = warpgroup_mma_wait(PENDING, deps=[dv, dk])
    return dv, dv2, dk, dk2


@gluon.jit
def parts(block, PANEL: gl.constexpr, D: gl.constexpr, D2: gl.constexpr):
    """64 rows in shared memory as (all D columns, the same), or with D2 as (the first 64, the D2 behind them)."""
    if D2:
        panels = block._reinterpret(block.dtype, [2, 64, 64], PANEL)
        return panels.index(0), panels.index(1).slice(0, D2, dim=1)
    else:
        whole = block.reshape([64, D])
        return whole, whole


@gluon.jit
def dq_product(ds_panels, k_panels, buffer, zero, COLUMN: gl.constexpr, WARPGROUPS: gl.constexpr, D: gl.constexpr):
    """Starts 64 columns of dQ = dS K, or as many as ``zero`` has: the sum over all warpgroups' keys."""
    dq = zero
    for c in gl.static_range(WARPGROUPS):
        k = k_panels.index(c * (D // 64) + COLUMN)
        if zero.shape[1] < 64:
            k = k.slice(0, zero.shape[1], dim=1)
        dq = warpgroup_mma(ds_panels.index(buffer * WARPGROUPS + c).permute((1, 0)), k, dq, use_acc=c > 0,
                           is_async=True)
    return dq


@gluon.jit
def in_scratch(DQ, tile, offsets, D: gl.constexpr, STAGED: gl.constexpr):
    """Pointers to a tile's elements. offsets: from DQ where STAGED, which leaves no registers for pointers from tile to
    tile, else the pointers to tile 0's."""
    start = tile.to(gl.int64) * (D // 64 * 16384)
    if STAGED:
        return opaque_address(DQ) + start + offsets
    else:
        return offsets + start


@gluon.jit
def add_dq(pointer, places, dq, i, bars, ORDERED: gl.constexpr, STAGED: gl.constexpr, DQ_BY: gl.constexpr):
    """Adds dQ number ``i`` of this program to scratch; ORDERED, when its turn has come."""
    kv_ready, q_ready, do_ready, q_empty, do_empty, ds_ready, ds_empty, turn, added, passed = bars
    if ORDERED:
        barrier_wait(turn + i % TURNS, i // TURNS & 1)
    if STAGED:
        staging_add(pointer, places, dq)
    elif DQ_BY == 1:
        # a warpgroup with nothing else in registers has one address for each eight columns
        scratch_add(pointer, dq)
    else:
        scratch_add_64(pointer, dq)
    if ORDERED and not STAGED:
        barrier_arrive(added + i % TURNS, True)


@gluon.jit
def tell_added(i, added, ORDERED: gl.constexpr, STAGED: gl.constexpr):
    """ORDERED and STAGED: that what a warp adds to dQ number ``i`` is there, once the copy engine has added it; of -1
    nothing. A tile late, when that has long been so, and just before the next one's turn is waited for."""
    if ORDERED and STAGED:
        staging_drain(i)
        barrier_arrive(added + (i + TURNS) % TURNS, i >= 0)
