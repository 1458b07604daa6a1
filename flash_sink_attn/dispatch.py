"""Which tile configuration a call uses: the ladder from what the caller says down to a heuristic.

1. ``explicit``: the call's own configuration.
2. ``exact``: the tuned table's entry for exactly this kernel and shape.
3. ``nearest``: the table's nearest entry of the same family that the validity rule accepts for this shape, if it is
   near enough (:mod:`flash_sink_attn.nearest`).
4. ``other card``: exact, else nearest, in the table of another card of the same architecture; with one logged warning.
5. ``heuristic``: a rule of thumb from measurements on an H100.

``flash_sink_attn.explain`` says which rung a call stands on, and why.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable
from functools import cache, lru_cache
from importlib import metadata
from typing import Literal, NamedTuple

import torch

from flash_sink_attn.config import AttnConfig, Kernel, Limits, TileConfig, limits_of, reject_reason, split_head_dim
from flash_sink_attn.devices import gpu_slug
from flash_sink_attn.kernel_code import kernel_code_hash
from flash_sink_attn.nearest import FARTHEST, nearest
from flash_sink_attn.tuned_table import (
    ENV_VAR,
    Entry,
    ShapeKey,
    TunedTable,
    forget_tables,
    load_others,
    load_table,
)

Rung = Literal["explicit", "exact", "nearest", "other card", "heuristic"]

logger = logging.getLogger("flash_sink_attn")


class Choice(NamedTuple):
    """A configuration and the rung of the ladder it comes from."""

    config: TileConfig
    source: Rung


class Decision(NamedTuple):
    """How a kernel's configuration was found.

    Attributes:
        kernel: "fwd", "bwd_dq" or "bwd_dkdv".
        config: the configuration.
        source: the rung of the ladder.
        reason: why this rung and none above it, in words.
        entry: the tuned entry it comes from, None where it comes from none.
        table: the table of that entry.
        distance: of that entry's shape from the call's; 0 for the same shape.
    """

    kernel: Kernel
    config: TileConfig
    source: Rung
    reason: str
    entry: Entry | None = None
    table: TunedTable | None = None
    distance: float | None = None


class DeviceInfo(NamedTuple):
    """A device as dispatching sees it; without a GPU there is no slug and the limits are Hopper's."""

    slug: str | None
    arch: int


@lru_cache(maxsize=64)
def device_info(device: torch.device) -> DeviceInfo:
    """What ``device`` is; a CPU runs the interpreter, with the configurations of a Hopper card."""
    if device.type != "cuda":
        return DeviceInfo(None, 90)
    properties = torch.cuda.get_device_properties(device)
    return DeviceInfo(gpu_slug(properties.name), properties.major * 10 + properties.minor)


# Tried in order until one fits, the special ones first. From measurements on an H100: small tiles with a deep pipeline
# beat 128 x 128; a first operand in registers (REGISTER_A) halves what the matrix unit reads from shared memory, but
# costs occupancy; under a window packing the group saves reading K and V once per query head; at head dims above 64
# dK and dV run out of registers with 64 query rows and 4 warps.
_CANDIDATES: dict[Kernel, tuple[TileConfig, ...]] = {
    "fwd": (TileConfig(64, 64, 4, 3, TMA=True, REGISTER_A=True), TileConfig(64, 64, 4, 3, TMA=True),
            TileConfig(128, 64, 8, 2, TMA=True), TileConfig(64, 64, 4, 3), TileConfig(64, 64, 4, 2),
            TileConfig(64, 32, 4, 2), TileConfig(32, 32, 4, 1), TileConfig(16, 16, 4, 1)),
    "bwd_dq": (TileConfig(64, 64, 4, 3, TMA=True, REGISTER_A=True), TileConfig(128, 64, 8, 3, TMA=True),
               TileConfig(128, 32, 8, 3, TMA=True), TileConfig(64, 64, 4, 2),
               TileConfig(64, 32, 4, 2), TileConfig(64, 32, 8, 1), TileConfig(32, 32, 4, 1), TileConfig(16, 16, 4, 1)),
    "bwd_dkdv": (TileConfig(64, 128, 8, 3, TMA=True), TileConfig(32, 64, 4, 3, TMA=True), TileConfig(32, 64, 4, 3),
                 TileConfig(32, 64, 4, 2),
                 TileConfig(16, 64, 4, 3), TileConfig(32, 64, 8, 1), TileConfig(32, 32, 4, 1),
                 TileConfig(16, 16, 4, 1)),
}
_SMALL_DIM: dict[Kernel, tuple[TileConfig, ...]] = {
    "fwd": (),
    "bwd_dq": (TileConfig(64, 64, 4, 3, TMA=True), TileConfig(64, 64, 4, 2)),
    "bwd_dkdv": (TileConfig(64, 64, 4, 3, TMA=True), TileConfig(64, 64, 4, 3)),
}
_WINDOW: dict[Kernel, tuple[TileConfig, ...]] = {
    "fwd": (TileConfig(64, 32, 4, 3, PACK_GQA=True, SPLIT_LOOPS=False, TMA=True),
            TileConfig(64, 32, 4, 3, PACK_GQA=True, SPLIT_LOOPS=False),
            TileConfig(64, 32, 4, 3, SPLIT_LOOPS=False, TMA=True), TileConfig(64, 32, 4, 3, SPLIT_LOOPS=False)),
    "bwd_dq": (TileConfig(64, 64, 4, 3, SPLIT_LOOPS=False, TMA=True, REGISTER_A=True),
               TileConfig(64, 32, 4, 3, SPLIT_LOOPS=False, TMA=True), TileConfig(64, 32, 4, 3, SPLIT_LOOPS=False),
               TileConfig(64, 64, 4, 2, SPLIT_LOOPS=False)),
    "bwd_dkdv": (TileConfig(32, 64, 4, 3, SPLIT_LOOPS=False, TMA=True), TileConfig(32, 64, 4, 3, SPLIT_LOOPS=False),
                 TileConfig(16, 64, 4, 3, SPLIT_LOOPS=False)),
}
_WINDOW_SMALL_DIM: dict[Kernel, tuple[TileConfig, ...]] = {
    "fwd": (),
    "bwd_dq": (TileConfig(64, 32, 4, 3, SPLIT_LOOPS=False, TMA=True), TileConfig(64, 32, 4, 3, SPLIT_LOOPS=False)),
    "bwd_dkdv": (TileConfig(64, 64, 4, 3, SPLIT_LOOPS=False, TMA=True), TileConfig(64, 64, 4, 3, SPLIT_LOOPS=False)),
}
# Programs of one 64-row tile each that fill an H100 (132 multiprocessors) twice: up to here dK and dV are better off
# with many small programs, beyond with tiles that reuse more.
_FEW_PROGRAMS = 264
_LARGE_DIM: dict[Kernel, tuple[TileConfig, ...]] = {
    "fwd": (TileConfig(128, 64, 8, 2, TMA=True),), "bwd_dq": (), "bwd_dkdv": (TileConfig(64, 64, 8, 2, TMA=True),),
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
        return (TileConfig(64, 64, 4, 3 if key.window is None else 2, SPLIT_LOOPS=key.window is None, TMA=True),)
    if kernel == "fwd" and key.window is not None and key.window >= 512:  # most of its tiles need no mask
        return (TileConfig(64, 32, 4, 2, PACK_GQA=True, TMA=True),)
    if kernel == "fwd" and key.window is not None and key.varlen:  # the tail of a packed sequence costs registers
        return (TileConfig(64, 32, 4, 3, PACK_GQA=True, SPLIT_LOOPS=False),)
    return ()


def heuristic(kernel: Kernel, key: ShapeKey, limits: Limits) -> TileConfig:
    """A configuration that is safe, and good on Hopper, for a shape that nobody has tuned."""
    widest = max(key.head_dim, key.head_dim_v)
    small = widest <= 64
    candidates = (*(_SMALL_DIM[kernel] if small else ()), *(_LARGE_DIM[kernel] if widest > 128 else ()),
                  *_CANDIDATES[kernel])
    if key.window is not None:
        candidates = (*(_WINDOW_SMALL_DIM[kernel] if small else ()), *_WINDOW[kernel], *candidates)
    candidates = (*_for_this_size(kernel, key, small), *candidates)
    for config in candidates:
        if _fits(config, kernel, key, limits):
            return config
    return dataclasses.replace(candidates[-1], num_stages=1)


def decide(
    kernel: Kernel, key: ShapeKey, limits: Limits, own: TunedTable | None, others: Iterable[TunedTable] = ()
) -> Decision:
    """The rungs below ``explicit``, as a function of the tables alone; neither logs nor reads anything.

    Args:
        kernel: "fwd", "bwd_dq" or "bwd_dkdv".
        key: the call's shape.
        limits: of the GPU the call runs on.
        own: the table of that GPU, None where there is none.
        others: tables of other cards of its architecture, the ones to prefer first.
    """
    def usable(entry: Entry) -> bool:
        return reject_reason(entry.config, kernel, head_dim=key.head_dim, head_dim_v=key.head_dim_v,
                             group=key.heads_q // key.heads_kv, limits=limits) is None

    missed: list[str] = []
    for table in (*((own,) if own else ()), *others):
        lent = table is not own
        entry = table.entry(kernel, key)
        if entry is not None and usable(entry):
            what = "the entry for exactly this shape"
            found: tuple[Entry, float] | None = (entry, 0.0)
        else:
            found = nearest(kernel, key, table.of_kernel(kernel), usable)
            what = "" if found is None else f"the nearest entry, at distance {found[1]:.2f} of at most {FARTHEST:g}"
        if found is not None and found[1] <= FARTHEST:
            source: Rung = "other card" if lent else "exact" if entry is found[0] else "nearest"
            why = f"{what}, of {table.gpu}'s table" + (f"; {'; '.join(missed)}" if missed else "")
            return Decision(kernel, found[0].config, source, why, found[0], table, found[1])
        near = ("no usable entry of this kernel, head dims, kind of mask and kind of lengths" if found is None
                else f"its nearest entry is at distance {found[1]:.2f}, more than {FARTHEST:g}")
        missed.append(f"{table.gpu}'s table: {near}")
    why = "; ".join(missed) or "there is no tuned table for this device or its architecture"
    return Decision(kernel, heuristic(kernel, key, limits), "heuristic", why)


@lru_cache(maxsize=4096)
def _below_explicit(
    kernel: Kernel, key: ShapeKey, device: DeviceInfo, user_table: str | None
) -> tuple[Choice, Decision]:
    if device.slug is None:
        decision = decide(kernel, key, limits_of(device.arch), None)
    else:
        decision = decide(kernel, key, limits_of(device.arch), load_table(device.slug),
                          load_others(device.slug, device.arch))
    if decision.source == "other card" and decision.table is not None:
        _warn_lent(decision.table.gpu, device.slug or "")
    if decision.entry is not None and decision.table is not None:
        _warn_stale(decision.table.path, decision.entry.run, stale(decision.table, decision.entry))
    return Choice(decision.config, decision.source), decision


def stale(table: TunedTable, entry: Entry) -> str:
    """What of the software an entry was measured with is another one here, in words; "" = nothing known to be."""
    measured = table.runs.get(entry.run, {})
    here = {"triton": _triton_version(), "kernel_code": kernel_code_hash()}
    words = {"triton": "Triton", "kernel_code": "kernel code"}
    return " and ".join(f"{words[name]} {measured[name]} (here {value})" for name, value in here.items()
                        if measured.get(name) and measured[name] != value)


@cache
def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        import triton

        return str(triton.__version__)


@cache
def _warn_lent(of: str, here: str) -> None:
    logger.warning("no tuned entries for %r fit: tiles measured on %r are used, a card of the same architecture; "
                   "`python -m sweeps tune` measures this one", here, of)


@cache
def _warn_stale(path: str, run: str, difference: str) -> None:
    if difference:
        logger.warning("tuned table %s: the entries of run %s were measured with %s: they are used all the same",
                       path, run, difference)


def forget() -> None:
    """Read the tuned tables anew and decide anew: after a table was written, in the process that wrote it."""
    forget_tables()
    for cached in (_below_explicit, _warn_lent, _warn_stale):
        cached.cache_clear()


def explain_kernel(
    kernel: Kernel, key: ShapeKey, device: torch.device, explicit: AttnConfig | None = None
) -> Decision:
    """As :func:`choose`, with how the configuration was found."""
    if explicit is not None and (config := getattr(explicit, kernel)) is not None:
        return Decision(kernel, config, "explicit", "the call's own configuration")
    return _below_explicit(kernel, key, device_info(device), os.environ.get(ENV_VAR))[1]


def choose(kernel: Kernel, key: ShapeKey, device: torch.device, explicit: AttnConfig | None = None) -> Choice:
    """The configuration of one kernel for a call of shape ``key`` on ``device``.

    A shape seen before costs a dictionary lookup.

    Raises:
        TunedTableError: a tuned table is corrupt.
    """
    if explicit is not None and (config := getattr(explicit, kernel)) is not None:
        return Choice(config, "explicit")
    return _below_explicit(kernel, key, device_info(device), os.environ.get(ENV_VAR))[0]
