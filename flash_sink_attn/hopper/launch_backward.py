"""From tensors to the launches of the Hopper backward: workspaces, descriptors, grids. Arguments are taken as valid."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flash_sink_attn.config import HOPPER_LOADER_REGISTERS, HOPPER_SLIDE_WINDOW, HopperBwdConfig, HopperBwdForm
from flash_sink_attn.estimate import one_behind, shares_in_section
from flash_sink_attn.hopper.backward_keys import hopper_bwd_keys_kernel
from flash_sink_attn.hopper.backward_pair import hopper_bwd_pair_kernel
from flash_sink_attn.hopper.backward_queries import hopper_bwd_queries_kernel
from flash_sink_attn.hopper.backward_rows import (
    hopper_bwd_finish_kernel,
    hopper_bwd_join_kernel,
    hopper_bwd_offsets_kernel,
    hopper_bwd_rows_kernel,
)
from flash_sink_attn.hopper.backward_slide import hopper_bwd_slide_kernel
from flash_sink_attn.hopper.backward_walk import ABREAST, NO_ORDER, ONE_BEHIND
from flash_sink_attn.hopper.backward_wide import hopper_bwd_wide_kernel
from flash_sink_attn.hopper.descriptors import describe
from flash_sink_attn.hopper.staging import STAGING_BYTES
from flash_sink_attn.launcher import MiscompiledError, launch, workspace
from flash_sink_attn.layout import LOG2E, Sequences
from flash_sink_attn.machine_code import fault_of
from flash_sink_attn.validity import hopper_bwd_shared, hopper_bwd_width, limits_of, split_head_dim

logger = logging.getLogger("flash_sink_attn")

# (batch, key head) pairs whose tiles go together where programs recompute: their tensors fit L2 many times over.
_SECTION = 64


@dataclasses.dataclass(frozen=True)
class _Call:
    """A backward: its tensors, all there, and what every launch needs to know of its shape.

    Attributes:
        tiles: of 64 query rows in a sequence, of a packed batch the number of slots for them (see find_sequence).
        rows: of a head in the statistics.
        slots: parts of a sink's gradient.
        units: (batch, key head) pairs; of a packed batch key heads.
        lse2, delta: the statistics, float32 (units * group * rows,).
        parts: of the sinks' gradients, float32 (heads_q * slots,), None where they have none.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None
    o: torch.Tensor
    lse: torch.Tensor
    do: torch.Tensor
    dlse: torch.Tensor | None
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dsinks: torch.Tensor | None
    sequences: Sequences
    window: int
    scale: float
    config: HopperBwdConfig
    parts: torch.Tensor | None
    lse2: torch.Tensor | None = None
    delta: torch.Tensor | None = None

    @property
    def heads_kv(self) -> int:
        return self.k.shape[-2]

    @property
    def group(self) -> int:
        return self.q.shape[-2] // self.k.shape[-2]

    @property
    def width(self) -> int:
        """Of a tile: the head dim and what the copy engine fills up."""
        return hopper_bwd_width(self.q.shape[-1])

    @property
    def tiles(self) -> int:
        return _slots(self.sequences, self.sequences.seqlen_q, 64)

    @property
    def rows(self) -> int:
        return self.tiles * 64

    @property
    def slots(self) -> int:
        return self.tiles * (1 if self.sequences.varlen else self.sequences.batch)

    @property
    def units(self) -> int:
        return self.heads_kv * (1 if self.sequences.varlen else self.sequences.batch)

    def described(self, x: torch.Tensor) -> Any:
        return describe(x, 64, self.width)


def _slots(sequences: Sequences, length: int, block: int) -> int:
    """Tiles of one sequence, or of a packed batch the slots for all: sequence i's begin at start_i // block + i."""
    return length // block + sequences.batch if sequences.varlen else -(-length // block)


def backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, o: torch.Tensor, lse: torch.Tensor,
    do: torch.Tensor, dlse: torch.Tensor | None, dq: torch.Tensor | None, dk: torch.Tensor | None,
    dv: torch.Tensor | None, dsinks: torch.Tensor | None, *, sequences: Sequences, window: int | None, scale: float,
    config: HopperBwdConfig, deterministic: bool,
) -> Any:
    """Write the gradients that are given (contiguous). Returns the compiled main kernel.

    Gradients that nobody wants are made all the same and thrown away. ``deterministic`` comes only with a
    configuration that gives the same bits each time.
    """
    assert config.reproducible or not deterministic
    if config.FORM == HopperBwdForm.SLIDE and not _slides(sequences, window):
        config = config.recomputing()

    def made(gradient: torch.Tensor | None, of: torch.Tensor) -> torch.Tensor:
        return workspace(of.shape, of.dtype, of.device) if gradient is None else gradient

    call = _Call(q, k, v, sinks, o, lse, do, dlse, made(dq, q), made(dk, k), made(dv, v), dsinks, sequences,
                 window or 0, scale, config, None)
    if dsinks is not None:
        # of a packed batch not every slot has a tile; where nobody goes through the slots, zeros must be there
        zero = config.FORM == HopperBwdForm.SLIDE and sequences.varlen
        parts = workspace((q.shape[-2] * call.slots,), torch.float32, q.device, zero=zero)
        call = dataclasses.replace(call, parts=parts)
    if config.FORM == HopperBwdForm.SLIDE:
        return _slide(call)
    statistics = (call.units * call.group * call.rows,)
    call = dataclasses.replace(call, lse2=workspace(statistics, torch.float32, q.device),
                               delta=workspace(statistics, torch.float32, q.device))
    return _accumulate(call) if config.FORM == HopperBwdForm.ACCUMULATE else _recompute(call)


def _slides(sequences: Sequences, window: int | None) -> bool:
    """Whether a tile of 64 rows sees at most three blocks of keys, which begin where tiles do."""
    same = sequences.seqlen_q == sequences.seqlen_k and sequences.cu_seqlens_k is None
    return same and window is not None and window <= HOPPER_SLIDE_WINDOW


# ------------------------------------------------------------------------------------------------------- three forms


def _accumulate(call: _Call) -> Any:
    """Statistics and zeros, then dK and dV with dQ added up in float32, then dQ in the tensor's own type."""
    c, device = _rising(call), call.q.device
    scratch = workspace((c.slots * c.q.shape[-2] * 64 * c.width,), torch.float32, device)
    heads, common = c.q.shape[-2], {"VARLEN": c.sequences.varlen}
    width_v = hopper_bwd_width(c.v.shape[-1])
    # for each 64 rows of a head: which tile of keys adds to them next, to their last columns and to the first where
    # these are added apart
    turn = workspace((c.slots * heads, 2), torch.int32, device) if c.config.DETERMINISTIC else None
    strides = c.do.stride()[:3] if c.do.dim() == 4 else (0, *c.do.stride()[:2])
    cu_q = c.sequences.cu_seqlens_q
    launch(hopper_bwd_rows_kernel, c.slots * heads, device, [
        c.o, c.do, c.lse, c.dlse, c.sinks, c.lse2, c.delta, c.parts, scratch, turn, cu_q, *strides, c.sequences.batch,
        c.sequences.seqlen_q, heads, c.tiles,
    ], {"D": width_v, "D_TRUE": c.v.shape[-1], "WIDTH": c.width} | common, num_warps=4 if width_v == 64 else 8)
    compiled, sums = (_wide(c, scratch, turn), None) if c.width > 128 else _keys(c, scratch, turn)
    _finish(c, scratch, sums)
    return compiled


def _rising(call: _Call) -> _Call:
    """With offsets that never fall where tiles of keys wait for one another. For a tile that no program has they would
    wait for ever, and so they would where two sequences share rows."""
    sequences = call.sequences
    if not (call.config.DETERMINISTIC and sequences.varlen):
        return call

    def risen(offsets: torch.Tensor, total: int) -> torch.Tensor:
        rising = workspace(offsets.shape, torch.int32, call.q.device)
        launch(hopper_bwd_offsets_kernel, 1, call.q.device, [offsets, rising, sequences.batch, total], {}, num_warps=4)
        return rising

    of_queries, of_keys = sequences.cu_seqlens_q, sequences.cu_seqlens_k
    assert of_queries is not None
    return dataclasses.replace(call, sequences=dataclasses.replace(
        sequences, cu_seqlens_q=risen(of_queries, sequences.seqlen_q),
        cu_seqlens_k=None if of_keys is None else risen(of_keys, sequences.seqlen_k)))


def _recompute(call: _Call) -> Any:
    """dQ and the statistics, then dK and dV, each from products of their own."""
    c, device = call, call.q.device
    warpgroups, split = c.config.BLOCK_M // 64, c.config.SPLIT_GROUP
    registers, maxnreg = (240, 168) if warpgroups == 2 else (0, 80 if c.width == 64 else 128)
    _launch_keeping(c.width == 128, hopper_bwd_queries_kernel, c.tiles * c.units * split, device, [
        *map(c.described, (c.q, c.k, c.v, c.o, c.do)), c.dq, c.dlse, c.lse, c.sinks, c.lse2, c.delta, c.parts,
        c.sequences.cu_seqlens_q, c.sequences.cu_seqlens_k, c.sequences.batch, c.sequences.seqlen_q,
        c.sequences.seqlen_k, c.heads_kv, c.rows, c.tiles, min(c.units * split, _SECTION), c.window, c.slots,
        c.scale, c.scale * LOG2E,
    ], {
        "GROUP": c.group, "SPLIT": split, "D": c.width, "D_TRUE": c.q.shape[-1],
        "WARPGROUPS": warpgroups, "BLOCK_N": 64, "STAGES": 2, "Q_STAGES": 1, "VARLEN": c.sequences.varlen,
        "WINDOW": c.window > 0, "REGISTERS": registers, "LOADER_REGISTERS": HOPPER_LOADER_REGISTERS,
    }, maxnreg)
    compiled, sums = _keys(c, None, None)
    _finish(c, None, sums)
    return compiled


def _keys(call: _Call, scratch: torch.Tensor | None, turn: torch.Tensor | None) -> tuple[Any, torch.Tensor | None]:
    """dK and dV, and with ``scratch`` dQ, in one order with ``turn``; without it the sinks' gradients, whose parts were
    written by the launch before. Where programs share a group, it returns their parts of dK and dV."""
    c, config = call, call.config
    warpgroups, split = config.BLOCK_N // 64, config.SPLIT_GROUP
    tiles = _slots(c.sequences, c.sequences.seqlen_k, config.BLOCK_N)
    accumulates = scratch is not None
    registers, dq_registers, maxnreg = {
        (True, 64): (200, 88, 128), (True, 128): (240, 0, 168)}.get((accumulates, c.width), (0, 0, 128))
    if not accumulates and warpgroups == 2:
        registers, maxnreg = 240, 168
    sums = workspace((tiles * c.units * split * warpgroups * 2 * 64 * c.width,), torch.float32,
                     c.q.device) if split > 1 else None
    # K in registers; under a window that was 3 to 15% slower in three of four shapes
    keep = accumulates and c.width == 64 and not c.window
    compiled = _launch_keeping(keep, hopper_bwd_keys_kernel, tiles * c.units * split, c.q.device, [
        *map(c.described, (c.q, c.k, c.v, c.do, c.dk, c.dv)), sums, scratch, turn, c.lse2, c.delta,
        *((None, None) if accumulates else (c.parts, c.dsinks)), c.sequences.cu_seqlens_q, c.sequences.cu_seqlens_k,
        c.sequences.batch, c.sequences.seqlen_q, c.sequences.seqlen_k, c.heads_kv, c.rows, tiles,
        _section(c, tiles, config.BLOCK_N, accumulates), c.window, c.slots, c.scale, c.scale * LOG2E,
    ], {
        "GROUP": c.group, "SPLIT": split, "D": c.width, "WARPGROUPS": warpgroups, "STAGES": config.num_stages,
        "BUFFERS": config.buffers(c.width), "VARLEN": c.sequences.varlen, "WINDOW": c.window > 0,
        "TOGETHER": accumulates and not c.window, "DQ_BY": (1 if c.width == 64 else 2) if accumulates else 0,
        "ORDERED": _walk(c, turn), "STAGED": accumulates and _staged(c),
        "ROUNDED": not accumulates or c.width > 64, "REGISTERS": registers, "DQ_REGISTERS": dq_registers,
        "LOADER_REGISTERS": HOPPER_LOADER_REGISTERS, "D2": split_head_dim(c.q.shape[-1])[1],
    }, config.maxnreg or maxnreg, dependent=True)
    return compiled, sums


def _finish(call: _Call, scratch: torch.Tensor | None, sums: torch.Tensor | None) -> None:
    """What is left: dQ and the sinks' gradients from ``scratch``, dK and dV from ``sums``, where there are such."""
    c, config = call, call.config
    heads, warpgroups = c.q.shape[-2], config.BLOCK_N // 64
    tiles_k = _slots(c.sequences, c.sequences.seqlen_k, config.BLOCK_N)
    rounds = 0 if scratch is None else c.slots * heads
    shares = 0 if sums is None else tiles_k * c.units * warpgroups * 2
    cu_q, own_k = c.sequences.cu_seqlens_q, c.sequences.cu_seqlens_k
    if rounds + shares:
        launch(hopper_bwd_finish_kernel, rounds + shares, c.q.device, [
            scratch, c.dq, sums, c.dk, c.dv, *((None, None) if scratch is None else (c.parts, c.dsinks)), cu_q,
            cu_q if own_k is None else own_k, c.sequences.batch, c.sequences.seqlen_q, c.sequences.seqlen_k, heads,
            c.heads_kv, c.tiles, tiles_k, c.slots, rounds, c.scale,
        ], {"SPLIT": config.SPLIT_GROUP, "WARPGROUPS": warpgroups, "D": c.width, "D_TRUE": c.q.shape[-1],
            "VARLEN": c.sequences.varlen}, num_warps=4, dependent=True)


def _overwritten(compiled: Any) -> str | None:
    """Why what stays in registers does not, or None."""
    if fault := fault_of(compiled):
        logger.warning("%s: its first operands come from shared memory, since %s", compiled.metadata.name, fault)
    return fault


def _launch_keeping(keep: bool, kernel: Any, programs: int, device: torch.device, runtime: Sequence[Any],
                    constants: Mapping[str, Any], maxnreg: int, dependent: bool = False) -> Any:
    """Launch a kernel with KEEP where ``keep``, or without it where the compiler's code for that is wrong."""
    def launched(keep: bool) -> Any:
        return launch(kernel, programs, device, runtime, {**constants, "KEEP": keep}, num_warps=4, maxnreg=maxnreg,
                      check=_overwritten if keep else None, dependent=dependent)

    try:
        return launched(keep)
    except MiscompiledError:
        return launched(False)


def _wide(call: _Call, scratch: torch.Tensor, turn: torch.Tensor | None) -> Any:
    """As :func:`_keys` with ``scratch``, for head dims above 128."""
    c = call
    pair = c.config.BLOCK_N == 128  # two programs, which add one dQ
    kernel, cluster = (hopper_bwd_pair_kernel, 2) if pair else (hopper_bwd_wide_kernel, 1)
    (first, second), width_v = split_head_dim(c.q.shape[-1]), c.v.shape[-1]
    tiles = _slots(c.sequences, c.sequences.seqlen_k, 64 * cluster)

    def described(x: torch.Tensor) -> tuple[Any, Any]:
        # without a second part anything stands for its descriptor
        return describe(x, 64, first), describe(x, 64, second or first)

    return launch(kernel, tiles * c.units, c.q.device, [
        *described(c.q), *described(c.k), describe(c.v, 64, width_v), describe(c.do, 64, width_v), *described(c.dk),
        describe(c.dv, 64, width_v), scratch, turn, c.lse2, c.delta, c.sequences.cu_seqlens_q, c.sequences.cu_seqlens_k,
        c.sequences.batch, c.sequences.seqlen_q, c.sequences.seqlen_k, c.heads_kv, c.rows, tiles,
        _section(c, tiles, 64 * cluster, True, cluster), c.window, c.scale, c.scale * LOG2E,
    ], {
        "GROUP": c.group, "D": first, "D2": second, "DV": width_v, "STAGES": c.config.num_stages,
        "VARLEN": c.sequences.varlen, "WINDOW": c.window > 0, "ORDERED": _walk(c, turn),
        **({} if pair else {"STAGED": _staged(c)}), "REGISTERS": 240, "LOADER_REGISTERS": HOPPER_LOADER_REGISTERS,
    }, num_warps=4, maxnreg=168, dependent=True, cluster=cluster)


def _slide(call: _Call) -> Any:
    """All gradients in one kernel, but for the blocks of keys that two of its programs see."""
    c, device = call, call.q.device
    # one program per multiprocessor; of two tiles at least, so that no block is shared by three
    tiles = c.sequences.seqlen_q // 64 if c.sequences.varlen else c.slots
    run = max(2, -(-tiles * c.heads_kv // _multiprocessors(device)))
    runs = _slots(c.sequences, c.sequences.seqlen_q, 64 * run)
    varlen = c.sequences.varlen
    cu_q = c.sequences.cu_seqlens_q
    shared = workspace((c.slots * c.heads_kv * 4 * 64 * c.width,), torch.float32, device)
    compiled = launch(hopper_bwd_slide_kernel, runs * c.units, device, [
        *map(c.described, (c.q, c.k, c.v, c.o, c.do, c.dq, c.dk, c.dv)), c.dlse, c.lse, c.sinks,
        c.parts, shared, cu_q, c.sequences.batch, c.sequences.seqlen_q, c.heads_kv, c.rows, c.window, run, c.slots,
        c.scale, c.scale * LOG2E,
    ], {
        "GROUP": c.group, "D": c.width, "STAGES": c.config.num_stages, "BUFFERS": c.config.buffers(c.width),
        "VARLEN": varlen, "REGISTERS": 160, "LOADER_REGISTERS": 32,
    }, num_warps=4, maxnreg=128)
    blocks = runs * 4 * c.heads_kv if varlen else (runs - 1) * 4 * c.units
    heads = c.q.shape[-2]
    launch(hopper_bwd_join_kernel, blocks + (0 if c.parts is None else heads), device, [
        shared, c.dk, c.dv, c.parts, c.dsinks, cu_q, c.sequences.batch, c.sequences.seqlen_q, c.heads_kv, heads,
        c.rows, run, runs, c.slots, c.scale,
    ], {"D": c.width, "VARLEN": varlen}, num_warps=4, dependent=True)
    return compiled


def _walk(call: _Call, turn: torch.Tensor | None) -> int:
    """``ORDERED`` of backward_walk: how programs walk where dQ is added in one order, which ``turn`` keeps."""
    c, heads = call, -(-call.group // call.config.SPLIT_GROUP)
    if turn is None:
        return int(NO_ORDER.value)
    return int((ONE_BEHIND if one_behind(c.q.shape[-1], heads, c.window or None) else ABREAST).value)


def _staged(call: _Call) -> bool:
    """Whether dQ goes to scratch by way of shared memory, see hopper.staging: where it finds room beside the tiles; not
    at head dim 64 under a window, where it gains nothing, and at 192 not in one order, where turns are passed late."""
    c, width = call, call.width
    if width not in STAGING_BYTES or width == 64 and c.window or width == 192 and c.config.DETERMINISTIC:
        return False
    shared = hopper_bwd_shared(c.config, c.q.shape[-1], c.v.shape[-1]) + STAGING_BYTES[width]
    return shared <= limits_of(90).shared_bytes


def _section(call: _Call, tiles: int, block_n: int, accumulates: bool, cluster: int = 1) -> int:
    """The ``section`` of backward_walk.key_tile: shares, or of a packed batch programs, that are to go together. Where
    dQ is accumulated, as many as run at once, or of one length so many that all end the soonest."""
    c, split = call, call.config.SPLIT_GROUP
    at_once = _multiprocessors(c.q.device) // cluster if accumulates else _SECTION * tiles
    if c.sequences.varlen:
        return at_once
    if not accumulates:
        return min(c.units * split, max(1, at_once // tiles))
    return shares_in_section(
        c.sequences.seqlen_q, c.sequences.seqlen_k, c.window or None, c.q.shape[-1], c.group, c.units, split, block_n,
        at_once, c.config.DETERMINISTIC).shares


@functools.lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    # without a card: of an H100, as good as any to compile for
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
