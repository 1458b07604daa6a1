"""What the forward and the backward kernels share: addressing, masks and the map from programs to tiles."""

from __future__ import annotations

from flash_sink_attn._mode import INTERPRETING  # isort: skip  (before any triton.jit)

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# A finite stand-in for minus infinity as the running maximum: (-inf) - (-inf) is NaN, exp2(-inf - FAR_BELOW) is 0.
FAR_BELOW: tl.constexpr = tl.constexpr(-1.0e38)

# Values of the kernels' WINDOW parameter. With MEETING a tile can be cut by the window's edge and by the diagonal at
# once; with APART no tile is, so each masked loop needs one comparison only.
NO_WINDOW, APART, MEETING = 0, 1, 2


# Triton's interpreter holds bfloat16 as raw 16-bit integers: its dot would multiply those, its casts cut the low bits
# off instead of rounding and make a zero 2^-126. All of it is mended here, where it costs a compiled kernel nothing.
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETING)


@triton.jit
def widen(x):
    """``x`` in float32."""
    if _INTERPRETED:
        if x.dtype == tl.bfloat16:
            return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc), operands in half precision, accumulated in float32."""
    if _INTERPRETED:
        a = widen(a)
        b = widen(b)
    return tl.dot(a, b, acc)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 ``x`` rounded to the nearest value of ``dtype``."""
    if _INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def sequence_bounds(cu_seqlens, index, total):
    """First token and length of sequence ``index``; clamped, so that no content of cu_seqlens reaches out of bounds."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + index), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + index + 1), start), total)
    return start, end - start


@triton.jit
def find_tile(cu_seqlens, batch, total, tile, ROWS_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """Map a global tile number to (sequence, tile within it); sequence == batch when there is no such tile.

    Every program walks the prefix sums of the sequences' tile counts itself: a few loads from L2 instead of a map
    built by another launch or a grid padded to the longest sequence. (A search that also returned the sequence's bounds
    cost 22 registers and 10% of a windowed forward's time.)
    """
    CHUNK: tl.constexpr = 128
    sequence = 0
    tiles_before = 0
    tiles_seen = 0
    for first in range(0, batch, CHUNK):
        index = first + tl.arange(0, CHUNK)
        inside = index < batch
        start = tl.load(cu_seqlens + index, mask=inside, other=0)
        end = tl.load(cu_seqlens + index + 1, mask=inside, other=0)
        start = tl.minimum(tl.maximum(start, 0), total)
        end = tl.minimum(tl.maximum(end, start), total)
        tiles = tl.where(inside, ((end - start) * ROWS_PER_TOKEN + BLOCK - 1) // BLOCK, 0)
        passed = inside & (tiles_seen + tl.cumsum(tiles, 0) <= tile)
        sequence += tl.sum(passed.to(tl.int32), 0)
        tiles_before += tl.sum(tl.where(passed, tiles, 0), 0)
        tiles_seen += tl.sum(tiles, 0)
    return sequence, tile - tiles_before


@triton.jit
def load_tile(
    base, row, stride, row_ok, FIRST: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """Load columns FIRST to FIRST + BLOCK_D of the rows at ``base + row * stride``; what lies outside reads as 0.

    row: [BLOCK] offsets small enough that row * stride fits 32 bits; row_ok: [BLOCK], used when MASK_ROWS.
    """
    column = FIRST + tl.arange(0, BLOCK_D)
    pointers = base + row[:, None] * stride + column[None, :]
    if FIRST + BLOCK_D > D:
        if MASK_ROWS:
            return tl.load(pointers, mask=row_ok[:, None] & (column < D)[None, :], other=0.0)
        return tl.load(pointers, mask=(column < D)[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=row_ok[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def stream_tile(
    source, b, origin, head, first, row, stride, row_ok, FIRST: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, D: tl.constexpr, MASK_ROWS: tl.constexpr, TMA: tl.constexpr,
):
    """Load BLOCK rows from row ``first`` of one head of one sequence on.

    source: with TMA a descriptor of (batch, seqlen, heads, head_dim), in which the sequence begins at row ``origin``;
    else a pointer to row 0 of the head, ``stride`` elements from row to row.
    """
    if TMA:
        return source.load([b, origin + first, head, FIRST]).reshape([BLOCK, BLOCK_D])
    else:  # (not redundant: Triton compiles what follows a return)
        return load_tile(source + first * stride.to(tl.int64), row, stride, row_ok, FIRST, BLOCK_D, D, MASK_ROWS)


@triton.jit
def in_registers(tile, row_ok, REGISTER_A: tl.constexpr):
    """``tile``, if REGISTER_A such that tl.dot takes it from registers and not from shared memory.

    The compiler leaves an operand in shared memory that comes straight from a load. Rows that do not exist are zero
    already.
    """
    if REGISTER_A:
        return tl.where(row_ok[:, None], tile, 0.0)
    else:
        return tile


@triton.jit
def store_tile(base, row, stride, row_ok, tile, FIRST: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """The inverse of load_tile, rounding to the element type of ``base``."""
    column = FIRST + tl.arange(0, BLOCK_D)
    pointers = base + row[:, None] * stride + column[None, :]
    tile = round_to(tile, base.dtype.element_ty)
    if FIRST + BLOCK_D > D:
        tl.store(pointers, tile, mask=row_ok[:, None] & (column < D)[None, :])
    else:
        tl.store(pointers, tile, mask=row_ok[:, None])


@triton.jit
def visible(query, key, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """query, key: broadcastable positions in key coordinates; at least one of the two comparisons is asked for."""
    if CAUSAL:
        if WINDOW:
            return (key <= query) & (key > query - window)
        return key <= query
    return key > query - window


@triton.jit
def opaque(x):
    """``x``, an int32 scalar; what depends on it stays in the branch in which this is called.

    Else the compiler computes a branch's masks always and selects, which costs more than masking always.
    """
    if _INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)

