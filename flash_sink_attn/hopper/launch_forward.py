"""From tensors to a launch of the Hopper forward: descriptors, grid and constexprs. Arguments are taken as valid."""

from __future__ import annotations

import functools
from typing import Any

import torch

from flash_sink_attn.config import HOPPER_LOADER_REGISTERS, HopperFwdConfig
from flash_sink_attn.hopper import sections
from flash_sink_attn.hopper.alone import hopper_alone_kernel
from flash_sink_attn.hopper.descriptors import describe, padded
from flash_sink_attn.hopper.forward import hopper_fwd_kernel
from flash_sink_attn.hopper.window import hopper_window_kernel
from flash_sink_attn.launcher import launch, workspace
from flash_sink_attn.layout import LOG2E, Sequences
from flash_sink_attn.validity import split_head_dim


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, o: torch.Tensor, lse: torch.Tensor,
    *, sequences: Sequences, window: int | None, scale: float, config: HopperFwdConfig,
) -> Any:
    """Write o (like q with v's head dim, contiguous) and lse (float32, contiguous). Returns the compiled kernel."""
    c = config
    if c.PACK_HEADS and window is not None and window - 1 <= c.BLOCK_N * (c.num_stages - 1):
        return _packed(q, k, v, sinks, o, lse, sequences, window, scale, c)
    (first, second), width_v = split_head_dim(q.shape[-1]), padded(v.shape[-1])
    heads_kv, group = k.shape[-2], q.shape[-2] // k.shape[-2]
    tokens = 64 if c.HEADS else c.BLOCK_M
    heads = c.HEADS if c.HEADS and _fits_ring(window, c) else 1
    chunks = -(-group // (heads * c.warpgroups)) if c.HEADS else group
    tiles = sequences.tiles(sequences.seqlen_q, 1, tokens)
    units = heads_kv * chunks * (1 if sequences.varlen else sequences.batch)
    at_once = max(1, c.PROGRAMS_PER_SM) * _multiprocessors(q.device)
    programs = min(tiles * units, at_once) if c.PROGRAMS_PER_SM else tiles * units
    # (a packed batch has no sections; a grid that is not persistent takes tiles much as one that is)
    section = units if sequences.varlen else chunks * sections.key_heads(
        units // chunks, chunks, sequences.seqlen_k * (q.shape[-1] + v.shape[-1]) * k.element_size(),
        sequences.seqlen_q, sequences.seqlen_k, window, tokens, c.BLOCK_N, at_once)
    q_desc, k_desc = describe(q, 64, first), describe(k, c.BLOCK_N, first)
    if not c.LOADER:
        return launch(hopper_alone_kernel, programs, q.device, [
            q_desc, k_desc, describe(v, 64, width_v), describe(o, 64, width_v), sinks, lse, sequences.cu_seqlens_q,
            sequences.cu_seqlens_k, sequences.batch, sequences.seqlen_q, sequences.seqlen_k, heads_kv, tiles * units,
            tiles, section, window or 0, scale * LOG2E,
        ], {
            "GROUP": group, "D": first, "VARLEN": sequences.varlen,
            "WINDOW": _window_mode(window, 64), "SPLIT_LOOPS": c.SPLIT_LOOPS,
        }, num_warps=4, maxnreg=c.registers_per_thread)
    counter = None
    if sequences.varlen and c.PROGRAMS_PER_SM:
        # whose tiles are all in the first round, draw none
        counter = workspace((1,), torch.int32, q.device, zero=programs < tiles * units)
    return launch(hopper_fwd_kernel, programs, q.device, [
        q_desc, describe(q, 64, second) if second else q_desc, k_desc,
        describe(k, c.BLOCK_N, second) if second else k_desc, describe(v, c.BLOCK_N, width_v), describe(o, 64, width_v),
        sinks, lse, sequences.cu_seqlens_q, sequences.cu_seqlens_k, counter, sequences.batch, sequences.seqlen_q,
        sequences.seqlen_k, heads_kv, tiles * units, tiles, section, window or 0, scale * LOG2E,
    ], {
        "GROUP": group, "D": first, "D2": second, "DV": width_v, "WARPGROUPS": c.warpgroups,
        "HEADS": heads, "BLOCK_N": c.BLOCK_N, "STAGES": c.num_stages, "Q_STAGES": c.Q_STAGES,
        "VARLEN": sequences.varlen, "WINDOW": _window_mode(window, c.BLOCK_N), "SPREAD": c.HEADS > 0,
        "SPLIT_LOOPS": c.SPLIT_LOOPS, "SHARE_Q": c.SHARE_Q, "REGISTERS": c.warpgroup_registers,
        "LOADER_REGISTERS": HOPPER_LOADER_REGISTERS,
    }, num_warps=4, maxnreg=c.registers_per_thread)


def _packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, o: torch.Tensor, lse: torch.Tensor,
    sequences: Sequences, window: int, scale: float, c: HopperFwdConfig,
) -> Any:
    heads_kv, group = k.shape[-2], q.shape[-2] // k.shape[-2]
    tiles = sequences.tiles(sequences.seqlen_q, 1, 64)
    units = heads_kv * (group // (c.PACK_HEADS * c.HEADS)) * (1 if sequences.varlen else sequences.batch)
    programs = tiles * units
    if c.PROGRAMS_PER_SM:
        programs = min(programs, c.PROGRAMS_PER_SM * _multiprocessors(q.device))
    return launch(hopper_window_kernel, programs, q.device, [
        describe(q, 64 // c.PACK_HEADS, 64, c.PACK_HEADS), describe(k, 64, 64, clipped=False),
        describe(v, 64, 64, clipped=False), describe(o, 64 // c.PACK_HEADS, 64, c.PACK_HEADS),
        sinks, lse, sequences.cu_seqlens_q, sequences.cu_seqlens_k, sequences.batch, sequences.seqlen_q,
        sequences.seqlen_k, heads_kv, tiles * units, tiles, units, window, scale * LOG2E,
    ], {
        "GROUP": group, "PACK": c.PACK_HEADS, "HEADS": c.HEADS, "STAGES": c.num_stages, "Q_STAGES": c.Q_STAGES,
        "VARLEN": sequences.varlen, "LOADER_REGISTERS": HOPPER_LOADER_REGISTERS,
    }, num_warps=4, maxnreg=c.registers_per_thread)


def _fits_ring(window: int | None, config: HopperFwdConfig) -> bool:
    """Whether all keys that 64 tokens see are in shared memory at once."""
    return window is not None and window + 63 <= config.num_stages * config.BLOCK_N


def _window_mode(window: int | None, block: int) -> int:
    """0: none; 1: its edge and the diagonal never meet in one block of one warpgroup's 64 rows; 2: they can."""
    if window is None:
        return 0
    return 1 if window >= 64 + block - 2 else 2


@functools.lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    # without a card: of an H100, as good as any to compile for
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
