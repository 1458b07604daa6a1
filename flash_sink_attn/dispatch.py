"""Which tile configuration a call uses: explicit, else the tuned table's exact entry, else a heuristic."""

from __future__ import annotations

import dataclasses
import os
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from flash_sink_attn.config import AttnConfig, Kernel, Limits, TileConfig, limits_of, reject_reason, split_head_dim
from flash_sink_attn.devices import gpu_slug
from flash_sink_attn.tuned_table import ENV_VAR, ShapeKey, load_table


class Choice(NamedTuple):
    """A configuration and the rung of the ladder it comes from."""

    config: TileConfig
    source: Literal["explicit", "tuned", "heuristic"]


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
# beat 128 x 128; under a window packing the group saves reading K and V once per query head; at head dims above 64 the
# backward runs out of registers with 64 query rows and 4 warps.
_CANDIDATES: dict[Kernel, tuple[TileConfig, ...]] = {
    "fwd": (TileConfig(64, 64, 4, 3, TMA=True), TileConfig(128, 64, 8, 2, TMA=True), TileConfig(64, 64, 4, 3),
            TileConfig(64, 64, 4, 2), TileConfig(64, 32, 4, 2), TileConfig(32, 32, 4, 1), TileConfig(16, 16, 4, 1)),
    "bwd_dq": (TileConfig(128, 64, 8, 3, TMA=True), TileConfig(128, 32, 8, 3, TMA=True), TileConfig(64, 64, 4, 2),
               TileConfig(64, 32, 4, 2), TileConfig(64, 32, 8, 1), TileConfig(32, 32, 4, 1), TileConfig(16, 16, 4, 1)),
    "bwd_dkdv": (TileConfig(32, 64, 4, 3, TMA=True), TileConfig(32, 64, 4, 3), TileConfig(32, 64, 4, 2),
                 TileConfig(16, 64, 4, 3), TileConfig(32, 64, 8, 1), TileConfig(32, 32, 4, 1),
                 TileConfig(16, 16, 4, 1)),
}
_SMALL_DIM: dict[Kernel, tuple[TileConfig, ...]] = {
    "fwd": (TileConfig(64, 128, 4, 2, TMA=True),),
    "bwd_dq": (TileConfig(64, 64, 4, 3, TMA=True), TileConfig(64, 64, 4, 2)),
    "bwd_dkdv": (TileConfig(64, 64, 4, 3, TMA=True), TileConfig(64, 64, 4, 3)),
}
_WINDOW: dict[Kernel, tuple[TileConfig, ...]] = {
    "fwd": (TileConfig(64, 32, 4, 3, PACK_GQA=True, SPLIT_LOOPS=False, TMA=True),
            TileConfig(64, 32, 4, 3, PACK_GQA=True, SPLIT_LOOPS=False),
            TileConfig(64, 32, 4, 3, SPLIT_LOOPS=False, TMA=True), TileConfig(64, 32, 4, 3, SPLIT_LOOPS=False)),
    "bwd_dq": (TileConfig(64, 32, 4, 3, SPLIT_LOOPS=False, TMA=True), TileConfig(64, 32, 4, 3, SPLIT_LOOPS=False),
               TileConfig(64, 64, 4, 2, SPLIT_LOOPS=False)),
    "bwd_dkdv": (TileConfig(32, 64, 4, 3, SPLIT_LOOPS=False, TMA=True), TileConfig(32, 64, 4, 3, SPLIT_LOOPS=False),
                 TileConfig(16, 64, 4, 3, SPLIT_LOOPS=False)),
}
_WINDOW_SMALL_DIM: dict[Kernel, tuple[TileConfig, ...]] = {
    "fwd": (), "bwd_dq": (),
    "bwd_dkdv": (TileConfig(64, 64, 4, 3, SPLIT_LOOPS=False, TMA=True), TileConfig(64, 64, 4, 3, SPLIT_LOOPS=False)),
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


def heuristic(kernel: Kernel, key: ShapeKey, limits: Limits) -> TileConfig:
    """A configuration that is safe, and good on Hopper, for a shape that nobody has tuned."""
    small = max(key.head_dim, key.head_dim_v) <= 64
    candidates = (*(_SMALL_DIM[kernel] if small else ()), *_CANDIDATES[kernel])
    if key.window is not None:
        candidates = (*(_WINDOW_SMALL_DIM[kernel] if small else ()), *_WINDOW[kernel], *candidates)
    for config in candidates:
        if _fits(config, kernel, key, limits):
            return config
    return dataclasses.replace(candidates[-1], num_stages=1)


@lru_cache(maxsize=4096)
def _tuned_or_heuristic(kernel: Kernel, key: ShapeKey, device: DeviceInfo, user_table: str | None) -> Choice:
    limits = limits_of(device.arch)
    table = load_table(device.slug) if device.slug else None
    tuned = table.exact(kernel, key) if table else None
    if tuned is not None:
        return Choice(tuned, "tuned")
    return Choice(heuristic(kernel, key, limits), "heuristic")


def choose(kernel: Kernel, key: ShapeKey, device: torch.device, explicit: AttnConfig | None = None) -> Choice:
    """The configuration of one kernel for a call of shape ``key`` on ``device``.

    Raises:
        TunedTableError: the tuned table is corrupt.
    """
    if explicit is not None and (config := getattr(explicit, kernel)) is not None:
        return Choice(config, "explicit")
    return _tuned_or_heuristic(kernel, key, device_info(device), os.environ.get(ENV_VAR))
