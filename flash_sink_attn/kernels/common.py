"""What the forward and the backward kernels share: addressing, masks and the map from programs to tiles."""

from __future__ import annotations

from flash_sink_attn._mode import INTERPRETING  # isort: skip  (before any triton.jit)

import triton
import triton.language as tl

from flash_sink_attn import layout

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# A finite stand-in for minus infinity as the running maximum: (-inf) - (-inf) is NaN, exp2(-inf - FAR_BELOW) is 0.
FAR_BELOW: tl.constexpr = tl.constexpr(-1.0e38)

# Values of the kernels' WINDOW parameter. With MEETING a tile can be cut by the window's edge and by the diagonal at
# once; with APART no tile is, so each masked loop needs one comparison only.
NO_WINDOW, APART, MEETING = 0, 1, 2

# A value of TMA where a tile is streamed through a packed batch's descriptor, which clips: see layout.clipping.
CLIPPING: tl.constexpr = tl.constexpr(2)
CLIP: tl.constexpr = tl.constexpr(layout.CLIP)


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
def find_sequence(cu_seqlens, batch, total, slot, ROWS_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """The sequence that has a slot: (its number, its first token, its length, which of its tiles the slot is for).

    Sequence i's slots begin at start_i * ROWS_PER_TOKEN // BLOCK + i: far enough apart for all of its tiles, and
    without a sum over sequences. Up to one slot of each is for no tile, and so are all beyond the last one's. Every
    program searches for itself, in two loads and one for each doubling of the batch, mostly from L1: less than a map
    costs that another launch would build, or a grid padded to the longest sequence.
    """
    low = tl.full([], 0, tl.int32)
    high = low + batch
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + batch), start), total)
    while high - low > 1:
        middle = (low + high) // 2
        token = tl.minimum(tl.maximum(tl.load(cu_seqlens + middle), 0), total)
        here = _first_slot(token, middle, ROWS_PER_TOKEN, BLOCK) <= slot
        low = tl.where(here, middle, low)
        start = tl.where(here, token, start)
        high = tl.where(here, high, middle)
        end = tl.where(here, end, token)
    return low, start, tl.maximum(end - start, 0), slot - _first_slot(start, low, ROWS_PER_TOKEN, BLOCK)


@triton.jit
def _first_slot(token, sequence, ROWS_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    if ROWS_PER_TOKEN > 1:
        return (token.to(tl.int64) * ROWS_PER_TOKEN // BLOCK).to(tl.int32) + sequence
    else:
        return token // BLOCK + sequence


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

    source: with TMA a descriptor of (batch, seqlen, heads, head_dim), or with TMA == CLIPPING one that clips, in which
    the sequence has row 0 at (CLIP, b, origin); else a pointer to row 0 of the head, whose rows are ``stride`` elements
    apart.
    """
    if TMA == CLIPPING:
        return source.load([CLIP, b, origin + first, head, FIRST]).reshape([BLOCK, BLOCK_D])
    elif TMA:
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

