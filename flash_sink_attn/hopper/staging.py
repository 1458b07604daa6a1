"""dQ on its way to scratch through shared memory: a warp stores what it has and goes on, and the copy engine adds it.

The shared memory is a static array beside that of the barriers (see common.barriers_declare): 47 KiB at most.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_sink_attn.hopper.backward_common import apart

_TILE = 64 * 64 * 4  # bytes of 64 columns
# At head dim 192 the first warpgroup has 128 columns. All 192 would take the 48 KiB that static arrays may have, and
# the barriers lie in one: so it adds the last eight itself.
_FOURS = 15
BESIDE_192: gl.constexpr = gl.constexpr(4 * _FOURS * 512)  # where the other warpgroup's 64 columns go
STAGING_BYTES = {64: _TILE, 128: 2 * _TILE, 192: BESIDE_192.value + _TILE}  # by dQ's columns
_DECLARE = {columns: f".shared .align 1024 .b8 own_staging[{size}]; mov.u32 $0, own_staging;"
            for columns, size in STAGING_BYTES.items()}
DECLARE_64: gl.constexpr = gl.constexpr(_DECLARE[64])
DECLARE_128: gl.constexpr = gl.constexpr(_DECLARE[128])
DECLARE_192: gl.constexpr = gl.constexpr(_DECLARE[192])


def _fours(count: int) -> tuple[int, list[str]]:
    """Where the pointers begin among the operands of ``count`` values, and the values by fours. Operands are results,
    four to a register, then pointers, then bytes from the array's start, then values."""
    first = count // 4 + 2 * count
    return count // 4, [f"{{{', '.join(f'${first + 4 * j + i}' for i in range(4))}}}" for j in range(count // 4)]


def _add(count: int) -> gl.constexpr:
    """Stores ``count`` values of a thread, once those before are read, and lets the copy engine add what a warp has
    stored, and the thread the rest."""
    pointer, fours = _fours(count)
    stored = min(len(fours), _FOURS)
    # a lane that has asked for nothing waits for nothing
    lines = ["cp.async.bulk.wait_group.read 0; bar.warp.sync -1; "
             f"mov.u32 to, own_staging; add.u32 to, to, ${pointer + count};"]
    lines += [f"st.shared.v4.f32 [to + {j * 512}], {four};" for j, four in enumerate(fours[:stored])]
    # whoever is elected asks for all that the warp has stored: from lane 0's
    lines.append("fence.proxy.async.shared::cta; bar.warp.sync -1; elect.sync _|one, -1; mov.u32 lane, %laneid; "
                 "mul.lo.u32 lane, lane, 16; sub.u32 to, to, lane; cvt.u64.u32 far, lane; "
                 f"sub.u64 far, ${pointer}, far;")
    lines += [f"@one cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [far + {apart(j)}], [to + {j * 512}], "
              f"{min(8, stored - j) * 512};" for j in range(0, stored, 8)]
    lines.append("cp.async.bulk.commit_group;")
    lines += [f"red.relaxed.gpu.global.add.v4.f32 [${pointer} + {apart(j)}], {fours[j]};"
              for j in range(stored, len(fours))]
    lines += [f"mov.b32 ${i}, 0;" for i in range(count // 4)]
    return gl.constexpr("{ .reg .pred one; .reg .b32 lane, to; .reg .b64 far; " + " ".join(lines) + " }")


def _operands(count: int) -> gl.constexpr:
    return gl.constexpr(",".join(["=r"] * (count // 4) + ["l"] * count + ["r"] * count + ["f"] * count))


STAGE_64: gl.constexpr = _add(64)
STAGE_32: gl.constexpr = _add(32)
STAGE_16: gl.constexpr = _add(16)
STAGE_OPERANDS_64: gl.constexpr = _operands(64)
STAGE_OPERANDS_32: gl.constexpr = _operands(32)
STAGE_OPERANDS_16: gl.constexpr = _operands(16)


@gluon.jit
def staging_declare(zero, COLUMNS: gl.constexpr):
    """The shared memory for dQ of so many columns; once, before any use. zero: any integer."""
    ASM: gl.constexpr = DECLARE_64 if COLUMNS == 64 else DECLARE_128 if COLUMNS == 128 else DECLARE_192
    gl.inline_asm_elementwise(ASM, "=r,r", [zero], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def staging_places(BASE: gl.constexpr, LAYOUT: gl.constexpr, COLUMNS: gl.constexpr):
    """Bytes from the array's start to where a thread's values go: its warp's place, of four from BASE on, and in it as
    in scratch."""
    r = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT)), 1)
    c = gl.expand_dims(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    PLACE: gl.constexpr = BESIDE_192 // 4 if COLUMNS == 128 else COLUMNS * 64
    return BASE + (r // 16) * PLACE + (r % 8) * 64 + ((c % 8) // 2) * 16


@gluon.jit
def staging_add(pointer, to, dq):
    """Adds an accumulator to scratch by way of the places ``to``. pointer: as for scratch_add."""
    if dq.shape[1] == 128:
        gl.inline_asm_elementwise(STAGE_64, STAGE_OPERANDS_64, [pointer, to, dq], dtype=gl.int8, is_pure=False, pack=64)
    elif dq.shape[1] == 64:
        gl.inline_asm_elementwise(STAGE_32, STAGE_OPERANDS_32, [pointer, to, dq], dtype=gl.int8, is_pure=False, pack=32)
    else:
        gl.inline_asm_elementwise(STAGE_16, STAGE_OPERANDS_16, [pointer, to, dq], dtype=gl.int8, is_pure=False, pack=16)


@gluon.jit
def staging_drain(zero):
    """Until all is in scratch that the warp has had added. zero: any integer."""
    gl.inline_asm_elementwise("cp.async.bulk.wait_group 0; bar.warp.sync -1; mov.u32 $0, 0;", "=r,r", [zero],
                              dtype=gl.int32, is_pure=False, pack=1)
