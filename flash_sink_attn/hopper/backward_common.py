"""What the kernels of the Hopper backward share: packed tiles, tails, masks, and the order of scratch tiles."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_sink_attn.hopper.common import ONE_BOUND, sequence_bounds

# The float32 tiles in scratch lie as the matrix instruction leaves them, so that each thread moves 16 bytes at once:
# [column / 64][warp][column / 8 % 8][lane / 4][lane % 4][row / 8 % 2][column % 2].


@gluon.jit
def other_bounds(cu_seqlens, sequence, total, start, length):
    """Bounds of the other side's sequence, where that has its own."""
    if cu_seqlens is not None:
        start, length = sequence_bounds(cu_seqlens, sequence, total)
    return start, length


def _keep(test: str) -> str:
    """32 values of two rows ($0 ..), 0 where the bound of its row does not compare with the column so.

    As common.hide: the columns that a thread holds are constants but for its lane, which the bounds allow for. Operands
    after the 32 tied ones: the bounds 32 times, of which every fourth pair is the same row's.
    """
    kept = " ".join(f"setp.{test}.s32 p, ${64 + (i & 2)}, {8 * (i >> 2) + (i & 1)}; selp.f32 ${i}, ${i}, 0f00000000, p;"
                    for i in range(32))
    return "{ .reg .pred p; " + kept + " }"


KEEP_UP_TO: gl.constexpr = gl.constexpr(_keep("le"))
KEEP_ABOVE: gl.constexpr = gl.constexpr(_keep("gt"))


@gluon.jit
def up_to(p, key, row, CONSTANTS: gl.constexpr = False):
    """0 for the elements with key > row. CONSTANTS: of (64, 64), where ``row`` rises with the column by 1."""
    if CONSTANTS:
        return gl.inline_asm_elementwise(KEEP_UP_TO, ONE_BOUND, [p, key - row], dtype=gl.float32, is_pure=True, pack=32)
    else:
        # one instruction pair each, see common.hide
        return gl.inline_asm_elementwise("{ .reg .pred p; setp.le.s32 p, $2, $3; selp.f32 $0, $1, 0f00000000, p; }",
                                         "=f,f,r,r", [p, key, row], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def above(p, key, row, CONSTANTS: gl.constexpr = False):
    """0 for the elements with key <= row. CONSTANTS: as of :func:`up_to`."""
    if CONSTANTS:
        return gl.inline_asm_elementwise(KEEP_ABOVE, ONE_BOUND, [p, key - row], dtype=gl.float32, is_pure=True, pack=32)
    else:
        return gl.inline_asm_elementwise("{ .reg .pred p; setp.gt.s32 p, $2, $3; selp.f32 $0, $1, 0f00000000, p; }",
                                         "=f,f,r,r", [p, key, row], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def probabilities(s, lse2, key, row, m, first_key, window, scale_log2, WINDOW: gl.constexpr,
                  CONSTANTS: gl.constexpr = False):
    """P^T of 64 keys from ``first_key`` on (in positions of queries) and query tile ``m``; key, row: (64, 1), (64,).

    CONSTANTS: masks compare with constants (:func:`up_to`), which is fewer instructions and not always faster.
    """
    p = gl.exp2(s * scale_log2 - gl.expand_dims(lse2, 0))
    if m * 64 < first_key + 63:
        p = up_to(p, key, gl.expand_dims(m * 64 + row, 0), CONSTANTS)
    if WINDOW:
        if m * 64 + 63 >= first_key + window:
            p = above(p, key, gl.expand_dims(m * 64 - window + row, 0), CONSTANTS)
    return p


@gluon.jit
def opaque(x):
    """``x``, computed where it stands: keeps what depends on it from being hoisted into registers that spill."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def opaque_address(x):
    """As :func:`opaque`, of a pointer, in bytes."""
    return gl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [x.to(gl.int64)], dtype=gl.int64, is_pure=False, pack=1)


@gluon.jit
def scratch_offsets(LAYOUT: gl.constexpr, COLUMNS: gl.constexpr):
    """Bytes from a scratch tile's start to each element of an accumulator; a warp's rows of 64 columns lie together."""
    r = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT)), 1)
    c = gl.expand_dims(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    x = (c // 64) * 16384 + (r // 16) * 4096 + (c % 64 // 8) * 512 + (r % 8) * 64
    x += ((c % 8) // 2) * 16 + ((r // 8) % 2) * 8 + (c % 2) * 4
    return x.to(gl.int64)


@gluon.jit
def scratch_add(pointer, x):
    gl.inline_asm_elementwise("{ red.relaxed.gpu.global.add.v4.f32 [$1], {$5, $6, $7, $8}; mov.b32 $0, 0; }",
                              "=r,l,l,l,l,f,f,f,f", [pointer, x], dtype=gl.int8, is_pure=False, pack=4)


def apart(four: int) -> int:
    """Bytes in scratch from the first four values of a thread to four number ``four``."""
    return four // 8 * 16384 + four % 8 * 512


def _add(count: int) -> str:
    """``count`` values of a thread to where the first pointer says and, by fours, :func:`apart` from there; operands
    are results, four to a register, then pointers, then values."""
    fours, first = count // 4, count // 4 + count
    adds = " ".join(f"red.relaxed.gpu.global.add.v4.f32 [${fours} + {apart(j)}], "
                    f"{{{', '.join(f'${first + 4 * j + i}' for i in range(4))}}};" for j in range(fours))
    return f"{{ {adds} {' '.join(f'mov.b32 ${i}, 0;' for i in range(fours))} }}"


def _add_operands(count: int) -> str:
    return ",".join(["=r"] * (count // 4) + ["l"] * count + ["f"] * count)


ADD_16: gl.constexpr = gl.constexpr(_add(16))
ADD_16_OPERANDS: gl.constexpr = gl.constexpr(_add_operands(16))
ADD_32: gl.constexpr = gl.constexpr(_add(32))
ADD_32_OPERANDS: gl.constexpr = gl.constexpr(_add_operands(32))


@gluon.jit
def scratch_add_64(pointer, x):
    """As :func:`scratch_add` for 32 columns or a multiple of 64: one address in registers for each of these."""
    if x.shape[1] == 32:
        gl.inline_asm_elementwise(ADD_16, ADD_16_OPERANDS, [pointer, x], dtype=gl.int8, is_pure=False, pack=16)
    else:
        gl.inline_asm_elementwise(ADD_32, ADD_32_OPERANDS, [pointer, x], dtype=gl.int8, is_pure=False, pack=32)


@gluon.jit
def scratch_put(pointer, x):
    gl.inline_asm_elementwise("{ st.global.v4.f32 [$1], {$5, $6, $7, $8}; mov.b32 $0, 0; }",
                              "=r,l,l,l,l,f,f,f,f", [pointer, x], dtype=gl.int8, is_pure=False, pack=4)


def _store_16() -> str:
    """16 values ($20 .., two to a register) of two rows of a thread to where the first and the third pointer ($4, $6)
    say, 16 bytes each; nothing where that is null.

    Of 32 columns of a row each of four lanes has two in eight. They trade, neighbours first and then those two apart,
    until each has eight that follow each other.
    """
    lines = ["mov.u32 l, %laneid; and.b32 s, l, 1; setp.ne.u32 odd, s, 0; and.b32 s, l, 2; setp.ne.u32 high, s, 0;"]
    for row in (0, 1):
        values = [f"${20 + 2 * i + row}" for i in range(4)]
        for bit, upper, name in ((1, "odd", "v"), (2, "high", "o")):
            traded = [f"{name}{i}" for i in range(4)]
            for low in (i for i in range(4) if not i & bit):
                high = low | bit
                lines.append(f"selp.b32 s, {values[low]}, {values[high]}, {upper}; "
                             f"shfl.sync.bfly.b32 s, s, {bit}, 0x1f, -1; "
                             f"selp.b32 {traded[low]}, s, {values[low]}, {upper}; "
                             f"selp.b32 {traded[high]}, {values[high]}, s, {upper};")
            values = traded
        pointer = f"${4 + 2 * row}"
        lines.append(f"setp.ne.u64 p, {pointer}, 0; @p st.global.v4.b32 [{pointer}], {{{', '.join(values)}}};")
    lines += [f"mov.b32 ${i}, 0;" for i in range(4)]
    return "{ .reg .pred odd, high, p; .reg .b32 l, s, v0, v1, v2, v3, o0, o1, o2, o3; " + " ".join(lines) + " }"


STORE_16: gl.constexpr = gl.constexpr(_store_16())
STORE_16_OPERANDS: gl.constexpr = gl.constexpr(",".join(["=&r"] * 4 + ["l"] * 16 + ["r"] * 8))


@gluon.jit
def store_rows(pointer, row, inside, x, D: gl.constexpr, D_TRUE: gl.constexpr):
    """Stores a (64, D) accumulator in half precision to rows of D_TRUE elements, 16 bytes a lane.

    row, inside: (64, 1), the rows' numbers from ``pointer`` on and whether they are there.
    """
    column = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, x.type.layout)), 0)
    first = column // 32 * 32 + column % 8 // 2 * 8
    at = pointer.to(gl.int64) + row * (D_TRUE * 2) + first * 2
    at = gl.where(inside & (first < D_TRUE), at, gl.zeros_like(at))
    gl.inline_asm_elementwise(STORE_16, STORE_16_OPERANDS, [at, x], dtype=gl.int8, is_pure=False, pack=16)


@gluon.jit
def sum_sinks(Part, DSinks, slots, heads_q, NUM_WARPS: gl.constexpr):
    """The programs sum the heads' parts of their sinks' gradients, each in one order."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([4 // NUM_WARPS], [32], [NUM_WARPS], [0])
    lane = gl.arange(0, 128, layout=LAYOUT)
    for head in range(gl.program_id(0), heads_q, gl.num_programs(0)):
        part = Part + gl.to_tensor(head).to(gl.int64) * slots
        x = gl.zeros([128], gl.float32, LAYOUT)
        for first in range(0, slots, 128):
            x += gl.load(part + first + lane, mask=first + lane < slots, other=0.0)
        gl.store(DSinks + head, gl.sum(x, axis=0))
