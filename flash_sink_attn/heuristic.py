"""Rules of thumb for shapes that nobody has tuned: tiles of every kernel, and where the Hopper kernels go first."""

from __future__ import annotations

import dataclasses

from flash_sink_attn.config import (
    AnyConfig,
    HopperBwdConfig,
    HopperBwdForm,
    HopperFwdConfig,
    Kernel,
    Pass,
    TileConfig,
    reproducible,
)
from flash_sink_attn.estimate import group_of
from flash_sink_attn.regimes import (
    best_kind,
    few_rows,
    few_tiles,
    fits_ring,
    idles,
    large_tile,
    loads_itself,
    packs_alone,
    portable_backward,
    portable_window,
    short_window,
    small_dims,
    splits_heads,
    wants_more_at_once,
)
from flash_sink_attn.tuned_table import ShapeKey
from flash_sink_attn.validity import HOPPER_BWD_HEAD_DIMS, HOPPER_HEAD_DIMS, Limits, reject_reason, split_head_dim

# Where the Hopper kernels are used without a measurement of the shape or one near it: (pass, head dim of q and k, of
# v, whether there is a window).
_DIMS: dict[Pass, tuple[tuple[int, int], ...]] = {"fwd": HOPPER_HEAD_DIMS, "bwd": HOPPER_BWD_HEAD_DIMS}
PREFER_HOPPER: frozenset[tuple[Pass, int, int, bool]] = frozenset(
    (pass_, d, dv, windowed) for windowed in (False, True) for pass_, dims in _DIMS.items() for d, dv in dims)

# Tried in order until the validity rule accepts one.
_HOPPER_FWD = (HopperFwdConfig(128, 128, PROGRAMS_PER_SM=1),
               # head dims 192/128: 0.81 to 0.90 of the time of the next, causal and with a window of 1024 (an H200)
               HopperFwdConfig(192, 64, 3, SHARE_Q=True, PROGRAMS_PER_SM=1),
               HopperFwdConfig(128, 64, SHARE_Q=True), HopperFwdConfig(128, 64), HopperFwdConfig(64, 64))
# Large tiles, without a window and with one; at head dim 128 those of 192 rows, at 64 those of 128 keys among them. A
# second tile of q took 0.5 to 2% from 128 x 128 at 1024 to 8192 tokens (under windows it cost 6 to 9%), 1 to 3% from
# 256 x 64 under windows. One loop with its masks behind a branch took 0 to 2% from 128 x 128 without a window and 1 to
# 8% from 192 x 64 with one (it added up to 3% to that without, and 2 to 11% to 256 x 64 but for windows up to 512).
_HOPPER_FWD_LARGE: dict[tuple[int, int], tuple[HopperFwdConfig, HopperFwdConfig]] = {
    (128, 128): (HopperFwdConfig(128, 128, Q_STAGES=2, SPLIT_LOOPS=False, PROGRAMS_PER_SM=1),
                 HopperFwdConfig(128, 128, PROGRAMS_PER_SM=1)),
    (192, 64): (HopperFwdConfig(192, 64, 4, SHARE_Q=True, PROGRAMS_PER_SM=1),
                HopperFwdConfig(192, 64, 3, Q_STAGES=2, SPLIT_LOOPS=False, SHARE_Q=True, PROGRAMS_PER_SM=1)),
    (192, 128): (HopperFwdConfig(192, 128, 3, PROGRAMS_PER_SM=1),) * 2,
    (256, 64): (HopperFwdConfig(256, 64, 4, PROGRAMS_PER_SM=1),
                HopperFwdConfig(256, 64, 4, Q_STAGES=2, PROGRAMS_PER_SM=1)),
}
_HOPPER_FWD_WINDOW = (HopperFwdConfig(64, 64, Q_STAGES=2, SHARE_Q=True, PROGRAMS_PER_SM=2),
                      HopperFwdConfig(64, 64, PROGRAMS_PER_SM=2))
_HOPPER_FWD_ALONE = (HopperFwdConfig(64, 64, PROGRAMS_PER_SM=3, LOADER=False),)
_HOPPER_FWD_ALONE_SMALL_DIM = (HopperFwdConfig(64, 64, PROGRAMS_PER_SM=4, LOADER=False, maxnreg=128),)
_HOPPER_FWD_FEW_ROWS = (HopperFwdConfig(64, 64, PROGRAMS_PER_SM=2),)
# With a second tile of q of 192 columns two programs no longer fit a multiprocessor: 0.137 ms, without 0.107.
_HOPPER_FWD_WINDOW_LARGE_DIM = (HopperFwdConfig(64, 64, SHARE_Q=True, PROGRAMS_PER_SM=2),)
# Those that take several heads need a ring that holds all keys of 64 tokens; two stages are for windows beyond.
_HOPPER_FWD_WINDOW_SMALL_DIM = (
    HopperFwdConfig(64, 64, 3, Q_STAGES=2, HEADS=2, PACK_HEADS=4, maxnreg=80),
    HopperFwdConfig(64, 64, 5, Q_STAGES=2, HEADS=2, PACK_HEADS=4, maxnreg=128),
    HopperFwdConfig(64, 64, 3, Q_STAGES=2, HEADS=1, PACK_HEADS=4, PROGRAMS_PER_SM=3, maxnreg=80),
    HopperFwdConfig(64, 64, 3, Q_STAGES=2, HEADS=4, PROGRAMS_PER_SM=3, maxnreg=80),
    HopperFwdConfig(64, 64, 2, PROGRAMS_PER_SM=3, maxnreg=80))
# At head dim 192 the first is of two programs: 0.81 to 0.94 of the time of one without a window, 0.77 to 0.97 with.
_HOPPER_BWD = (HopperBwdConfig(64, 128), HopperBwdConfig(64, 128, DETERMINISTIC=True), HopperBwdConfig(64, 64, FORM=1))
_HOPPER_BWD_LARGE_DIM = (HopperBwdConfig(64, 64), HopperBwdConfig(64, 64, DETERMINISTIC=True))
_HOPPER_BWD_SMALL_DIM = (HopperBwdConfig(64, 128, 3), HopperBwdConfig(64, 128, 3, DETERMINISTIC=True))
_HOPPER_BWD_RECOMPUTE = (HopperBwdConfig(64, 64, FORM=1),)
_HOPPER_BWD_SLIDE = (HopperBwdConfig(64, 192, 4, FORM=2), HopperBwdConfig(64, 192, 3, FORM=2))

# Tried in order until one fits, the special ones first. From measurements on an H100: small tiles with a deep pipeline
# beat 128 x 128; a first operand in registers (REGISTER_A) halves what the matrix unit reads from shared memory, but
# costs occupancy; under a window packing the group saves reading K and V once per query head. On an H200: dK and dV
# with one loop and masks by branches are 4 to 20% faster than with three loops or one that masks all.
_CANDIDATES: dict[str, tuple[TileConfig, ...]] = {
    "fwd": (TileConfig(64, 64, 4, 3, TMA=True, REGISTER_A=True), TileConfig(64, 64, 4, 3, TMA=True),
            TileConfig(128, 64, 8, 2, TMA=True), TileConfig(64, 64, 4, 3), TileConfig(64, 64, 4, 2),
            TileConfig(64, 32, 4, 2), TileConfig(32, 32, 4, 1), TileConfig(16, 16, 4, 1)),
    "bwd_dq": (TileConfig(64, 64, 4, 3, TMA=True, REGISTER_A=True), TileConfig(128, 64, 8, 3, TMA=True),
               TileConfig(128, 32, 8, 3, TMA=True), TileConfig(64, 64, 4, 2),
               TileConfig(64, 32, 4, 2), TileConfig(64, 32, 8, 1), TileConfig(32, 32, 4, 1), TileConfig(16, 16, 4, 1)),
    "bwd_dkdv": (TileConfig(64, 64, 4, 2, SPLIT_LOOPS=False, TMA=True, BRANCH_MASKS=True),
                 TileConfig(64, 128, 8, 3, TMA=True), TileConfig(32, 64, 4, 3, TMA=True), TileConfig(32, 64, 4, 3),
                 TileConfig(32, 64, 4, 2),
                 TileConfig(16, 64, 4, 3), TileConfig(32, 64, 8, 1), TileConfig(32, 32, 4, 1),
                 TileConfig(16, 16, 4, 1)),
}
_SMALL_DIM: dict[str, tuple[TileConfig, ...]] = {
    "fwd": (),
    "bwd_dq": (TileConfig(64, 64, 4, 3, TMA=True), TileConfig(64, 64, 4, 2)),
    "bwd_dkdv": (TileConfig(64, 64, 4, 3, SPLIT_LOOPS=False, TMA=True, BRANCH_MASKS=True), TileConfig(64, 64, 4, 3)),
}
_WINDOW: dict[str, tuple[TileConfig, ...]] = {
    "fwd": tuple(TileConfig(64, 32, 4, 3, PACK_GQA=pack, SPLIT_LOOPS=False, TMA=tma, TAIL_N=16, BRANCH_MASKS=True)
                 for pack in (True, False) for tma in (True, False)),
    "bwd_dq": (TileConfig(64, 64, 4, 2, SPLIT_LOOPS=False, TMA=True, BRANCH_MASKS=True),
               TileConfig(64, 32, 4, 3, SPLIT_LOOPS=False, TMA=True), TileConfig(64, 32, 4, 3, SPLIT_LOOPS=False),
               TileConfig(64, 64, 4, 2, SPLIT_LOOPS=False)),
    "bwd_dkdv": (TileConfig(64, 64, 4, 2, SPLIT_LOOPS=False, TMA=True, BRANCH_MASKS=True),
                 TileConfig(32, 64, 4, 3, SPLIT_LOOPS=False), TileConfig(16, 64, 4, 3, SPLIT_LOOPS=False)),
}
_WINDOW_SMALL_DIM: dict[str, tuple[TileConfig, ...]] = {
    "fwd": (TileConfig(64, 64, 4, 2, PACK_GQA=True, SPLIT_LOOPS=False, TMA=True, REGISTER_A=True, TAIL_N=16,
                       BRANCH_MASKS=True),),
    "bwd_dq": (TileConfig(64, 32, 4, 2, PACK_GQA=True, SPLIT_LOOPS=False, TMA=True),
               TileConfig(64, 32, 4, 3, SPLIT_LOOPS=False, TMA=True), TileConfig(64, 32, 4, 3, SPLIT_LOOPS=False)),
    "bwd_dkdv": (TileConfig(64, 64, 4, 3, SPLIT_LOOPS=False, TMA=True, BRANCH_MASKS=True),
                 TileConfig(64, 64, 4, 3, SPLIT_LOOPS=False)),
}
# Programs of one 64-row tile each that fill an H100 (132 multiprocessors) twice: up to here dK and dV are better off
# with many small programs, beyond with tiles that reuse more.
_FEW_PROGRAMS = 264
_LARGE_DIM: dict[str, tuple[TileConfig, ...]] = {
    "fwd": (TileConfig(128, 64, 8, 2, TMA=True),), "bwd_dq": (),
    "bwd_dkdv": (TileConfig(32, 64, 8, 3, SPLIT_LOOPS=False, TMA=True, BRANCH_MASKS=True),),
}
# What a thread needs besides accumulators (addresses, masks, row statistics), measured on compiled kernels.
_OTHER_REGISTERS = 80


def _fits(config: TileConfig, kernel: Kernel, key: ShapeKey, limits: Limits) -> bool:
    """Whether the configuration is likely to run without spilling; stricter than the validity rule, a bound."""
    c = config
    if reject_reason(c, kernel, head_dim=key.head_dim, head_dim_v=key.head_dim_v, group=key.heads_q // key.heads_kv,
                     limits=limits):
        return False
    d, dv = sum(split_head_dim(key.head_dim)), sum(split_head_dim(key.head_dim_v))
    # per row of the side that accumulates: accumulator columns; and elements of the own and the streamed tiles
    columns, side, own, streamed = {
        "fwd": (dv + c.BLOCK_N, c.BLOCK_M, c.BLOCK_M * d, c.BLOCK_N),
        "bwd_dq": (d + c.BLOCK_N, c.BLOCK_M, c.BLOCK_M * (d + dv), c.BLOCK_N),
        "bwd_dkdv": (d + dv + c.BLOCK_M, c.BLOCK_N, c.BLOCK_N * (d + dv), c.BLOCK_M),
    }[kernel]
    registers = side * columns // (32 * c.num_warps)
    shared = 2 * (own + streamed * (d + dv) * c.num_stages)
    return registers + _OTHER_REGISTERS <= limits.registers_per_thread and shared <= limits.shared_bytes


def _for_this_size(kernel: Kernel, key: ShapeKey, small: bool) -> tuple[TileConfig, ...]:
    """What goes before everything else because of the window's or the batch's size."""
    if kernel == "bwd_dkdv" and not small and -(-key.seqlen_k // 64) * key.heads_kv * key.batch <= _FEW_PROGRAMS:
        return (TileConfig(64, 64, 4, 3 if key.window is None else 2, SPLIT_LOOPS=False, TMA=True, BRANCH_MASKS=True),)
    if kernel == "fwd" and wants_more_at_once(key):
        return (TileConfig(64, 64, 4, 3, TMA=True),)
    if kernel == "fwd" and key.window is not None and key.window >= 512 and not small:  # its rows see many tiles of 32
        return (TileConfig(64, 64, 4, 3, SPLIT_LOOPS=False, TMA=True, REGISTER_A=True, BRANCH_MASKS=True),)
    if kernel == "bwd_dq" and key.window is not None and key.window >= 512 and small:
        return (TileConfig(64, 64, 4, 3, SPLIT_LOOPS=False, TMA=True, BRANCH_MASKS=True),)
    return ()


def _portable(kernel: Kernel, key: ShapeKey, limits: Limits) -> TileConfig:
    widest = max(key.head_dim, key.head_dim_v)
    small = widest <= 64
    candidates = (*(_SMALL_DIM[kernel] if small else ()), *(_LARGE_DIM[kernel] if widest > 128 else ()),
                  *_CANDIDATES[kernel])
    if key.window is not None:
        candidates = (*(_WINDOW_SMALL_DIM[kernel] if small else ()), *_WINDOW[kernel], *candidates)
    candidates = (*_for_this_size(kernel, key, small), *candidates)
    for config in candidates:
        if _fits(config, kernel, key, limits) and not splits_heads(config, key):
            return config
    return dataclasses.replace(candidates[-1], num_stages=1)


def _hopper_forwards(key: ShapeKey) -> tuple[HopperFwdConfig, ...]:
    small = small_dims(key)
    special: tuple[HopperFwdConfig, ...]
    if loads_itself(key):
        special = _HOPPER_FWD_ALONE_SMALL_DIM if small else _HOPPER_FWD_ALONE
    elif few_rows(key):
        special = _HOPPER_FWD_FEW_ROWS
    elif short_window(key):
        special = _HOPPER_FWD_WINDOW_SMALL_DIM if small else (
            _HOPPER_FWD_WINDOW_LARGE_DIM if key.head_dim > 128 else _HOPPER_FWD_WINDOW)
        if packs_alone(key):  # one head instead of two makes twice as many programs
            special = tuple(dataclasses.replace(c, HEADS=min(c.HEADS, 1)) if c.PACK_HEADS else c for c in special)
        special = tuple(c for c in special if not idles(c, key) and (not c.HEADS or fits_ring(c, key.window)) and (
            c.PACK_HEADS or group_of(key) % max(1, c.HEADS) == 0))  # else heads that are not there take their time
    else:
        tile = large_tile(key)
        special = () if tile is None else (_HOPPER_FWD_LARGE[tile][key.window is not None],)
    return (*special, *_HOPPER_FWD)


def _hopper_backwards(key: ShapeKey, deterministic: bool) -> tuple[HopperBwdConfig, ...]:
    adding = (*(_HOPPER_BWD_SMALL_DIM if small_dims(key) else ()), *_HOPPER_BWD, *_HOPPER_BWD_LARGE_DIM)
    best = best_kind(key, deterministic)
    of = {HopperBwdForm.ACCUMULATE: adding, HopperBwdForm.RECOMPUTE: _HOPPER_BWD_RECOMPUTE,
          HopperBwdForm.SLIDE: _HOPPER_BWD_SLIDE}[best.form]
    candidates = (*(dataclasses.replace(c, SPLIT_GROUP=best.shares) for c in of), *adding)
    return tuple(config for config in candidates if not deterministic or reproducible(config))


def _hopper(kernel: Kernel, key: ShapeKey, limits: Limits, deterministic: bool) -> AnyConfig:
    candidates: tuple[AnyConfig, ...] = (
        _hopper_forwards(key) if kernel == "hopper_fwd" else _hopper_backwards(key, deterministic))
    valid = (c for c in candidates if reject_reason(
        c, kernel, head_dim=key.head_dim, head_dim_v=key.head_dim_v, group=key.heads_q // key.heads_kv,
        limits=limits) is None)
    return next(valid, candidates[-1])


def heuristic(kernel: Kernel, key: ShapeKey, limits: Limits, deterministic: bool = False) -> AnyConfig:
    """A configuration that is good on Hopper, for a shape that nobody has tuned.

    One of a portable kernel is safe for any shape. The Hopper kernels are not there for every shape: for one they
    cannot do, the validity rule rejects what comes.

    Args:
        deterministic: only such configurations as give the same bits each time.
    """
    if kernel in ("hopper_fwd", "hopper_bwd"):
        return _hopper(kernel, key, limits, deterministic)
    return _portable(kernel, key, limits)


def prefers_hopper(pass_: Pass, key: ShapeKey, limits: Limits) -> bool:
    """Whether the Hopper kernels go before the portable ones where neither has been measured."""
    if (few_tiles(key) or portable_window(key)) if pass_ == "fwd" else portable_backward(key):
        return False
    return limits.wgmma and (pass_, key.head_dim, key.head_dim_v, key.window is not None) in PREFER_HOPPER
