"""What the Hopper kernels share: barriers, masks, the running maximum, the map from tiles to sequences."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from flash_sink_attn import layout

CLIP: gl.constexpr = gl.constexpr(layout.CLIP)
LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN2: gl.constexpr = gl.constexpr(0.6931471805599453)
# The running maximum before any key: finite, so that minus infinity less it is minus infinity and not NaN.
FAR_BELOW: gl.constexpr = gl.constexpr(-1e30)


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The slot after ``slot`` in a ring, and its phase: that flips when the ring wraps."""
    if STAGES == 1:
        return slot, phase ^ 1
    else:
        following = slot + 1
        wrapped = following == STAGES
        return gl.where(wrapped, 0, following), phase ^ wrapped.to(gl.int32)


@gluon.jit
def hold_half(x):
    """``x`` (16 bits wide) through an empty volatile instruction: what computes it stays before, its registers live
    up to here. An asynchronous matrix product reads its operand's registers until it is waited for."""
    return gl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=2)


@gluon.jit
def quads(x):
    """(rows, columns) as (rows, columns / 8, 4, 2): the third dimension is a quad's lane, the others are registers.

    The matrix instruction leaves each row of its result to four lanes, two columns in eight to each.
    """
    return gl.reshape(x, [x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.jit
def per_row(x, like):
    """(rows, 4), one value per row and lane, in the layout that goes with ``like`` of :func:`quads`, broadcastable."""
    x = gl.convert_layout(x, gl.SliceLayout(1, gl.SliceLayout(3, like.type.layout)), assert_trivial=True)
    return gl.expand_dims(gl.expand_dims(x, 1), 3)


def _hide(causal: bool, window: bool) -> str:
    """32 scores of two rows ($0 ..), minus infinity where the column is not in its row's range.

    The columns that a thread holds are constants but for its lane, which the bounds allow for: each comparison is one
    instruction with the column inside it. Operands after the 32 tied ones: the last column that a row sees, and the
    last before its window, 32 times each, of which every fourth pair is the same row's.
    """
    lines = []
    for i in range(32):
        column, last, before = 8 * (i >> 2) + (i & 1), f"${64 + (i & 2)}", f"${(96 if causal else 64) + (i & 2)}"
        if causal and window:
            test = f"setp.lt.s32 q, {before}, {column}; setp.ge.and.s32 p, {last}, {column}, q;"
        else:
            test = f"setp.ge.s32 p, {last}, {column};" if causal else f"setp.lt.s32 p, {before}, {column};"
        lines.append(f"{test} selp.f32 ${i}, ${i}, 0fFF800000, p;")
    return "{ .reg .pred p, q; " + " ".join(lines) + " }"


HIDE_FUTURE: gl.constexpr = gl.constexpr(_hide(True, False))
HIDE_PAST: gl.constexpr = gl.constexpr(_hide(False, True))
HIDE_BOTH: gl.constexpr = gl.constexpr(_hide(True, True))
_TIES = ["=f"] * 32 + [str(i) for i in range(32)]
ONE_BOUND: gl.constexpr = gl.constexpr(",".join(_TIES + ["r"] * 32))
TWO_BOUNDS: gl.constexpr = gl.constexpr(",".join(_TIES + ["r"] * 64))


@gluon.jit
def reaches(first, like):
    """first + row - 2 * lane for the rows and lanes of ``like`` of :func:`quads`: (rows, 4) int32, see :func:`hide`."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, like.type.layout))
    row = gl.expand_dims(gl.arange(0, like.shape[0], layout=gl.SliceLayout(1, LAYOUT)), 1)
    lane = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT)), 0)
    return first + row - 2 * lane


@gluon.jit
def hide(s, reach, key, window, hides, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """Minus infinity for the keys from ``key`` on that the rows of ``reach`` do not see; where ``hides``, if given."""
    if CAUSAL or WINDOW:
        if hides is None:
            s = _hidden(s, reach, key, window, CAUSAL, WINDOW)
        else:
            if hides:
                s = _hidden(s, reach, key, window, CAUSAL, WINDOW)
    return s


@gluon.jit
def _hidden(s, reach, key, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """As :func:`hide`, always.

    With gl.where ptxas computes all predicates first and packs them into bit masks, 200 instructions more for a block.
    """
    parts = quads(s)
    # an instruction sequence covers 64 columns
    GROUPS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, parts.type.layout)))
    group = gl.arange(0, s.shape[1] // 8, layout=GROUPS) // 8 * 64
    group = gl.expand_dims(gl.expand_dims(gl.expand_dims(group, 0), 2), 3)
    last = per_row(reach - key, parts) - group
    before = last - window
    if CAUSAL and WINDOW:
        parts = gl.inline_asm_elementwise(HIDE_BOTH, TWO_BOUNDS, [parts, last, before], dtype=gl.float32,
                                          is_pure=True, pack=32)
    elif CAUSAL:
        parts = gl.inline_asm_elementwise(HIDE_FUTURE, ONE_BOUND, [parts, last], dtype=gl.float32, is_pure=True,
                                          pack=32)
    else:
        parts = gl.inline_asm_elementwise(HIDE_PAST, ONE_BOUND, [parts, before], dtype=gl.float32, is_pure=True,
                                          pack=32)
    return gl.convert_layout(gl.reshape(parts, s.shape), s.type.layout, assert_trivial=True)


# How far scores may rise above the running maximum before it follows them: 8 powers of two (as PTX writes 8.0). P stays
# below 2**8, which float16 holds as well as it holds 1, and what was summed so far needs no factor.
_SLACK = "0f41000000"


def _follow() -> str:
    """Two rows of a thread: $4, $5 the largest scores it holds, $6, $7 the running maxima; $0, $1 the new ones, and
    $2, $3 whether any of the warp's changed.

    As long as no thread of the warp has a score more than the slack above, nothing changes and nothing is exchanged.
    Else the quad of lanes that holds a row agrees on its maximum.
    """
    agree = "".join(f"shfl.sync.bfly.b32 s, t{row}, {lane}, 0x1f, -1; max.f32 t{row}, t{row}, s; "
                    for lane in (1, 2) for row in (0, 1))
    return ("{ .reg .pred p, q; .reg .f32 t0, t1, s, d0, d1; "
            "sub.f32 d0, $4, $6; sub.f32 d1, $5, $7; max.f32 d0, d0, d1; "
            f"setp.gt.f32 p, d0, {_SLACK}; vote.sync.any.pred q, p, -1; "
            "mov.f32 $0, $6; mov.f32 $1, $7; mov.f32 t0, $4; mov.f32 t1, $5; selp.b32 $2, 1, 0, q; mov.b32 $3, $2; "
            f"@!q bra.uni SAME; {agree}"
            f"sub.f32 d0, t0, $0; setp.gt.f32 p, d0, {_SLACK}; @p mov.f32 $0, t0; "
            f"sub.f32 d1, t1, $1; setp.gt.f32 p, d1, {_SLACK}; @p mov.f32 $1, t1; SAME: }}")


def _rescale(count: int) -> str:
    """``count`` values of two rows ($0 ..), times their row's factor, where the last operand says so."""
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * count + (i & 2)};" for i in range(count))
    return f"{{ .reg .pred q; setp.ne.b32 q, ${3 * count}, 0; @!q bra.uni SAME; {products} SAME: }}"


FOLLOW: gl.constexpr = gl.constexpr(_follow())
RESCALE: gl.constexpr = gl.constexpr(_rescale(32))
RESCALE_TIES: gl.constexpr = gl.constexpr(",".join(["=f"] * 32 + [str(i) for i in range(32)] + ["f"] * 32 + ["r"] * 32))


@gluon.jit
def largest(x):
    """The largest of the columns that a lane holds: (rows, 4) of :func:`quads`' result."""
    return gl.max(gl.max(x, axis=3), axis=1)


@gluon.jit
def total(x):
    """As :func:`largest`, the sum."""
    return gl.sum(gl.sum(x, axis=3), axis=1)


@gluon.jit
def exponentials(s, m, l, scale_log2):
    """(P in the layout of ``s``, unrounded; l plus its lanes' sums). m, l: (64, 4), see quads."""
    parts = quads(s)
    p = gl.exp2(parts * scale_log2 - per_row(m, parts))
    l += gl.convert_layout(total(p), l.type.layout, assert_trivial=True)
    return gl.convert_layout(gl.reshape(p, s.shape), s.type.layout, assert_trivial=True), l


@gluon.jit
def settle(l):
    """``l``, (64, 4), as it is: what it was computed of is computed before anything that follows.

    The assembler moves arithmetic past a wait, but not past a store. This one, after the barriers, never happens: its
    predicate is that a sum of exponentials is -1.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p, q; setp.eq.f32 p, $2, 0fBF800000; setp.eq.f32 q, $3, 0fBF800000; or.pred p, p, q; "
        "@p st.volatile.shared.f32 [own_barriers + 1020], $2; mov.f32 $0, $2; mov.f32 $1, $3; }",
        "=&f,=&f,f,f", [l], dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def follow(m, scores):
    """(The running maxima after ``scores``, both (rows, 4): those that are exceeded by more than the slack, replaced;
    whether any of the warp's rows was, int32)."""
    return gl.inline_asm_elementwise(FOLLOW, "=&f,=&f,=&r,=&r,f,f,f,f", [scores, m], dtype=(gl.float32, gl.int32),
                                     is_pure=False, pack=2)


@gluon.jit
def rescale(acc, alpha, changed):
    """``acc`` times ``alpha``, (rows, 4), where ``changed``, which is one value for a warp."""
    parts = quads(acc)
    parts = gl.inline_asm_elementwise(RESCALE, RESCALE_TIES, [parts, per_row(alpha, parts), per_row(changed, parts)],
                                      dtype=gl.float32, is_pure=False, pack=32)
    return gl.convert_layout(gl.reshape(parts, acc.shape), acc.type.layout, assert_trivial=True)


@gluon.jit
def concluded(m, l, sink):
    """(What O is to be multiplied by, lse) of rows with running maximum ``m``, in units of log2, and sum ``l``.

    The sink (in units of log2, or None) enters here and not as the initial maximum: one far above the logits would
    flush P to zero in half precision.
    """
    beta = gl.full(m.shape, 1.0, gl.float32, m.type.layout)
    if sink is not None:
        m_new = gl.maximum(m, sink)
        beta = gl.exp2(m - m_new)
        l = l * beta + gl.exp2(sink - m_new)
        m = m_new
    # A row without a visible key and without a sink has l == 0: o = 0, lse = -inf.
    return beta / gl.where(l == 0.0, 1.0, l), gl.where(l == 0.0, float("-inf"), (m + gl.log2(l)) * LN2)


@gluon.jit
def sequence_bounds(cu_seqlens, index, total):
    """First token and length of sequence ``index``; clamped, so that no content of cu_seqlens reaches out of bounds."""
    start = gl.minimum(gl.maximum(gl.load(cu_seqlens + index), 0), total)
    end = gl.minimum(gl.maximum(gl.load(cu_seqlens + index + 1), start), total)
    return start, end - start


@gluon.jit
def find_sequence(cu_seqlens, batch, total, slot, BLOCK: gl.constexpr):
    """The sequence that has a slot: (its number, its first token, its length, which of its tiles the slot is for).

    Sequence i's slots begin at start_i // BLOCK + i: far enough apart for all of its tiles, and without a sum over
    sequences. Up to one slot of each is for no tile, and so are all beyond the last one's; where offsets fall, the tile
    may lie before the sequence.
    """
    low = gl.to_tensor(0)
    high = low + batch
    start = gl.minimum(gl.maximum(gl.load(cu_seqlens), 0), total)
    end = gl.minimum(gl.maximum(gl.load(cu_seqlens + batch), start), total)
    while high - low > 1:
        middle = (low + high) // 2
        token = gl.minimum(gl.maximum(gl.load(cu_seqlens + middle), 0), total)
        here = token // BLOCK + middle <= slot
        low = gl.where(here, middle, low)
        start = gl.where(here, token, start)
        high = gl.where(here, high, middle)
        end = gl.where(here, end, token)
    return low, start, gl.maximum(end - start, 0), slot - start // BLOCK - low


@gluon.jit
def keys_of(first, len_q, len_k, window, TOKENS: gl.constexpr, BLOCK_N: gl.constexpr, WINDOW: gl.constexpr):
    """First key of the rows of TOKENS tokens from ``first`` on, and how many blocks of BLOCK_N they need from there; at
    least one, if all masked."""
    offset = len_k - len_q
    end = gl.minimum(first + TOKENS, len_q) + offset
    begin = 0
    if WINDOW:
        begin = gl.maximum(first + offset - window + 1, 0)
    return begin, gl.maximum(gl.cdiv(gl.maximum(end - begin, 0), BLOCK_N), 1)


@gluon.jit
def lse_of(Lse, b, head, heads, seqlen_q, start_q, VARLEN: gl.constexpr):
    """Where a sequence's lse of a query head begins: of (batch, heads, seqlen_q), or packed of (heads, total_q)."""
    if VARLEN:
        return Lse + head * seqlen_q.to(gl.int64) + start_q
    else:
        return Lse + (b * heads + head).to(gl.int64) * seqlen_q


@gluon.jit
def place_of(b, start, length, VARLEN: gl.constexpr):
    """Where the descriptors have row 0 of sequence ``b``, for load_block and store_block."""
    if VARLEN:
        return start + length, CLIP - length
    else:
        return b, 0


@gluon.jit
def _coordinates(desc, b, row, head, column):
    """In (batch, seqlen, heads, head_dim), or in a descriptor that clips, see layout.clipping."""
    RANK: gl.constexpr = len(desc.block_type.shape)
    if RANK == 5:
        return CLIP, b, row, head, column
    else:
        return b, row, head, column


@gluon.jit
def load_block(desc, b, row, head, column, ready, block, pred=True):
    """Starts the copy of a block to shared memory, which will arrive at the barrier ``ready``; b, row: see place_of."""
    tma.async_copy_global_to_shared(desc, _coordinates(desc, b, row, head, column), ready, block, pred=pred)


# Triton 3.9 has async_store for what was async_copy_shared_to_global before.
store_bulk = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def store_block(desc, b, row, head, column, block):
    """Starts the copy of a block from shared memory."""
    store_bulk(desc, _coordinates(desc, b, row, head, column), block)


# Launches of one call overlap: a kernel that was launched as dependent starts its programs once all of the one before
# have called start_dependents or have ended, and whatever that one wrote is there after await_launch_before. Each
# program of a dependent kernel waits: so when it has ended, all before it has.


@gluon.jit
def start_dependents():
    """Lets the programs of the next launch start where there is room; they wait in :func:`await_launch_before`."""
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32,
                              is_pure=False, pack=1)


@gluon.jit
def await_launch_before():
    """Until the launch before this one has ended and all that it wrote can be read, by the whole program: who is told
    by a thread that waited need not wait."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


# Barriers of our own. mbarrier.arrive of Triton 3.6 first makes the whole warpgroup meet, so that one thread can speak
# for it, and then the compiler makes it meet again: four times a step. Here each warp speaks for itself.


@gluon.jit
def barriers_declare(zero):
    """Shared memory for 96 barriers, named by their number in what follows, and above them for LETTERS letters; once,
    before any use. zero: any integer.

    It lies before what Triton allocates, whose tiles must begin at multiples of 1 KiB: hence the size. Its address is a
    constant for the assembler: no register holds it.
    """
    gl.inline_asm_elementwise(".shared .align 1024 .b8 own_barriers[1024]; mov.u32 $0, own_barriers;", "=r,r", [zero],
                              dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def barrier_init(number, count):
    """To be followed by a fence and a barrier of all threads."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t, a; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; mov.u32 a, own_barriers; "
        "mad.lo.u32 a, $1, 8, a; @p mbarrier.init.shared::cta.b64 [a], $2; mov.u32 $0, 0; }", "=r,r,r",
        [number, count], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def barrier_arrive(number, condition):
    """Of each warp that calls it, once all its threads are here; where ``condition``."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; bar.warp.sync -1; elect.sync _|p, -1; setp.ne.and.b32 p, $2, 0, p; "
        "mov.u32 a, own_barriers; mad.lo.u32 a, $1, 8, a; @p mbarrier.arrive.shared::cta.b64 _, [a]; mov.u32 $0, 0; }",
        "=r,r,r", [number, gl.to_tensor(condition).to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def barrier_wait(number, phase):
    """Until the phase of that parity is complete."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; mov.u32 a, own_barriers; mad.lo.u32 a, $1, 8, a; "
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [a], $2; @!p bra.uni WAIT; mov.u32 $0, 0; }",
        "=r,r,r", [number, phase], dtype=gl.int32, is_pure=False, pack=1)


# Tiles of a packed batch are as long as its sequences are, so programs draw theirs: each the next one as its last
# begins. One warp draws, looks up the sequence and tells the others by a letter. Letters are a ring without a barrier
# that says which are read: who writes letter r has waited for the slots of q of tile r - 1, which a warpgroup gives
# back at the end of tile r - 1 - Q_STAGES, whose letter it has read. So LETTERS must be more than Q_STAGES.
LETTERS: gl.constexpr = gl.constexpr(8)


@gluon.jit
def draw(counter, condition):
    """Draws the next number where ``condition``; for :func:`drawn`, which waits for it."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 $0, 0; mov.u32 t, %laneid; setp.ne.u32 p, $2, 0; "
        "setp.eq.and.u32 p, t, 0, p; @p atom.relaxed.gpu.global.add.u32 $0, [$1], 1; }", "=&r,l,r",
        [counter.to(gl.int64), condition.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def drawn(ticket):
    """The number that the warp has drawn."""
    return gl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, 0, 0x1f, -1;", "=r,r", [ticket], dtype=gl.int32,
                                     is_pure=False, pack=1)


@gluon.jit
def letter_write(letter, head, first, len_q, len_k, start_q, start_k):
    """What a tile is, for :func:`letter_read`; first: below zero after the last one."""
    gl.inline_asm_elementwise(
        "{ .reg .b32 a; mov.u32 a, own_barriers; mad.lo.u32 a, $1, 32, a; "
        "st.shared.v4.b32 [a + 768], {$3, $4, $5, $6}; st.shared.v2.b32 [a + 784], {$2, $7}; mov.u32 $0, 0; }",
        "=r,r,r,r,r,r,r,r", [letter, head, first, len_q, len_k, start_q, start_k], dtype=gl.int32, is_pure=False,
        pack=1)


@gluon.jit
def letter_read(letter):
    """(head, first, len_q, len_k, start_q, start_k) as they were written."""
    first, len_q, len_k, start_q, head, start_k = gl.inline_asm_elementwise(
        "{ .reg .b32 a; mov.u32 a, own_barriers; mad.lo.u32 a, $6, 32, a; "
        "ld.volatile.shared.v4.b32 {$0, $1, $2, $3}, [a + 768]; ld.volatile.shared.v2.b32 {$4, $5}, [a + 784]; }",
        "=&r,=&r,=&r,=&r,=&r,=&r,r", [letter],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1)
    return head, first, len_q, len_k, start_q, start_k


@gluon.jit
def tile_of_round(round):
    """The number of a program's tile in a round: forwards in one, backwards in the next.

    Tiles go from long to short. Were it forwards each time, the first program would have the longest of every round, at
    8192 tokens 5% more than the mean.
    """
    programs = gl.num_programs(0)
    at = gl.program_id(0)
    if round % 2 == 1:
        at = programs - 1 - at
    return round * programs + at


@gluon.jit
def tile_of(tile, work, GROUP: gl.constexpr, CHUNK: gl.constexpr, TOKENS: gl.constexpr, VARLEN: gl.constexpr):
    """What tile number ``tile`` is: (ok, sequence, key head, first member of its group, first token, length of the
    queries and keys, where in a packed batch they begin).

    Tiles go by sections of so many heads that their K and V stay in L2; within one the longest rows of a causal mask
    go first, and heads vary fastest, so that programs that run together share K and V.
    """
    batch, seqlen_q, seqlen_k, heads_kv, num_tiles, tiles_per_unit, section, window, cu_q, cu_k = work
    CHUNKS: gl.constexpr = (GROUP + CHUNK - 1) // CHUNK
    exists = tile < num_tiles
    tile = gl.minimum(tile, num_tiles - 1)  # a division by zero would follow
    if VARLEN:
        units = heads_kv * CHUNKS
        sequence, start_q, len_q, t = find_sequence(cu_q, batch, seqlen_q, tile // units, TOKENS)
        unit = tile % units
        start_k = start_q
        len_k = len_q
        if cu_k is not None:
            start_k, len_k = sequence_bounds(cu_k, sequence, seqlen_k)
        tiles = gl.cdiv(len_q, TOKENS)
        t = tiles - 1 - t
        ok = exists & (t >= 0) & (t < tiles)
        head_kv = unit // CHUNKS
        b = 0
    else:
        per_section = section * tiles_per_unit
        s = tile // per_section
        r = tile - s * per_section
        here = gl.minimum(section, batch * heads_kv * CHUNKS - s * section)
        t = tiles_per_unit - 1 - r // here
        unit = s * section + r % here
        head_kv = (unit // CHUNKS) % heads_kv
        b = unit // (CHUNKS * heads_kv)
        ok = exists
        len_q = seqlen_q
        len_k = seqlen_k
        start_q = 0
        start_k = 0
    return ok, b, head_kv, (unit % CHUNKS) * CHUNK, t * TOKENS, len_q, len_k, start_q, start_k
