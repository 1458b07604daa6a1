"""From tensors to kernel launches: grids, strides and constexprs. Arguments are taken as valid; api.py checks them.

Every function also takes tensors on the "meta" device: it then builds its kernels and launches nothing, which is how
a process without a GPU compiles them (see flash_sink_attn.compile_only).
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_sink_attn import launcher
from flash_sink_attn._mode import INTERPRETING
from flash_sink_attn.config import TileConfig
from flash_sink_attn.kernels.backward_dkdv import dkdv_kernel
from flash_sink_attn.kernels.backward_dq import dq_kernel
from flash_sink_attn.kernels.common import APART, MEETING, NO_WINDOW
from flash_sink_attn.kernels.forward import fwd_kernel
from flash_sink_attn.layout import CLIP, LOG2E, Sequences, clipping, describable, launchable, strides_of
from flash_sink_attn.machine_code import fault_of
from flash_sink_attn.validity import split_head_dim

logger = logging.getLogger("flash_sink_attn")


def _window_mode(window: int | None, tokens_per_tile: int, block: int) -> int:
    if window is None:
        return NO_WINDOW
    return APART if window >= tokens_per_tile + block - 2 else MEETING


_templates: dict[tuple[Any, ...], TensorDescriptor] = {}


def _describe(x: torch.Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """A descriptor. Triton checks what it makes; here that is done once per kind of tensor, since every launch pays."""
    key = (x.dtype, len(shape), *block)
    template = _templates.get(key)
    if template is None:
        template = TensorDescriptor(x, shape, strides, block)
        _templates[key] = copy.copy(template)
        _templates[key].base = None
        return template
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(template.__dict__, base=x, shape=shape, strides=strides)
    return made


def _descriptor(x: torch.Tensor, block: int) -> TensorDescriptor:
    """Of ``block`` rows of one head of (batch, seqlen, heads, head_dim); of a packed batch one that clips."""
    if x.dim() == 3:
        (tokens, heads, head_dim), (s, h, _) = x.shape, x.stride()
        sizes, strides = clipping(tokens, s, x.element_size())
        return _describe(x, [*sizes, heads, head_dim], [*strides, h, 1], [1, 1, block, 1, head_dim])
    return _describe(x, list(x.shape), list(x.stride()), [1, block, 1, x.shape[-1]])


def _own_descriptor(x: torch.Tensor, block: int, group: int) -> TensorDescriptor:
    """The same for the tile that is a program's own, of which rows that do not exist may be anything: a packed batch is
    one long sequence. With a ``group``, of block / group rows of all heads of a group, the heads split in two
    dimensions."""
    shape, stride = x.shape, x.stride()
    if len(shape) == 3:
        batch, b = 1, shape[0] * stride[0]
        (seqlen, heads, head_dim), (s, h, _) = shape, stride
    else:
        (batch, seqlen, heads, head_dim), (b, s, h, _) = shape, stride
    if group > 1:
        return _describe(x, [batch, seqlen, heads // group, group, head_dim], [b, s, h * group, h, 1],
                         [1, block // group, 1, group, head_dim])
    return _describe(x, [batch, seqlen, heads, head_dim], [b, s, h, 1], [1, block, 1, head_dim])


def _row_descriptor(rows: torch.Tensor, block: int, varlen: bool) -> TensorDescriptor:
    """Of ``block`` rows of one head of (batch, heads, rows).

    Of a packed batch one that clips, as :func:`clipping`, but that strides are multiples of 16 bytes and a row here has
    four: a sequence's first row and its length rounded up are multiples of 16, and row r of it is at (CLIP / 4,
    (first + rounded) / 16, head, CLIP - rounded + r).
    """
    if not varlen:
        return _describe(rows, list(rows.shape), list(rows.stride()), [1, 1, block])
    _, heads, count = rows.shape
    return _describe(rows, [CLIP // 4 + 1, count // 16 + 1, heads, CLIP], [2**34 - 4, 16, count, 1], [1, 1, 1, block])


def _own_tma(config: TileConfig, group: int, *tensors: torch.Tensor) -> bool:
    """Whether a program loads the tile that is its own through descriptors, which leaves it in registers."""
    return config.REGISTER_A and config.whole_tokens(group) and describable(*tensors)


def _launch(kernel: Any, programs: int, device: torch.device, config: TileConfig, runtime: Sequence[Any],
            constants: Mapping[str, Any]) -> Any:
    """Launch or compile, see flash_sink_attn.launcher.launch.

    Raises:
        launcher.MiscompiledError: the machine code overwrites an operand that it still needs.
    """
    def check(compiled: Any) -> str | None:
        if fault := fault_of(compiled):
            logger.warning("%s: REGISTER_A is ignored, since %s", kernel.__name__, fault)
        return fault

    return launcher.launch(kernel, programs, device, runtime, constants, num_warps=config.num_warps,
                           num_stages=config.num_stages, maxnreg=config.maxnreg,
                           check=check if config.REGISTER_A and not INTERPRETING else None)


def _soundly(launch: Callable[[TileConfig], Any], config: TileConfig) -> Any:
    """``launch(config)``, or the same without REGISTER_A where the compiler's code for it is wrong."""
    try:
        return launch(config)
    except launcher.MiscompiledError:
        return launch(dataclasses.replace(config, REGISTER_A=False))


def _shape_constants(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, group_block: bool) -> dict[str, int]:
    d, dv, group = q.shape[-1], v.shape[-1], q.shape[-2] // k.shape[-2]
    block_d, block_d2 = split_head_dim(d)
    block_dv, block_dv2 = split_head_dim(dv)
    return {"GROUP": group, **({"BLOCK_GROUP": triton.next_power_of_2(group)} if group_block else {}),
            "D": d, "DV": dv, "BLOCK_D": block_d, "BLOCK_D2": block_d2, "BLOCK_DV": block_dv, "BLOCK_DV2": block_dv2}


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, o: torch.Tensor, lse: torch.Tensor,
    *, sequences: Sequences, window: int | None, scale: float, config: TileConfig,
) -> Any:
    """Write o (like q with v's head dim, contiguous) and lse (float32, contiguous). Returns the compiled kernel."""
    q, k, v = launchable(q), launchable(k), launchable(v)
    constants = _shape_constants(q, k, v, group_block=False)
    strides, unit = strides_of(q, k, v)
    group, heads_kv = constants["GROUP"], k.shape[-2]

    def launch(c: TileConfig) -> Any:
        rows_per_token = group if c.PACK_GQA else 1
        tokens = _tokens_per_tile(c, rows_per_token)
        tiles = sequences.tiles(sequences.seqlen_q, rows_per_token, c.BLOCK_M)
        programs = tiles * (q.shape[-2] // rows_per_token) * (1 if sequences.varlen else sequences.batch)
        tma = c.TMA and describable(k, v)
        own_tma = tma and _own_tma(c, group, q)
        return _launch(fwd_kernel, programs, q.device, c, [
            _own_descriptor(q, c.BLOCK_M, rows_per_token) if own_tma else q,
            *((_descriptor(k, c.BLOCK_N), _descriptor(v, c.BLOCK_N)) if tma else (k, v)),
            *((k, v) if tma and c.TAIL_N else (None, None)), sinks, o, lse, sequences.cu_seqlens_q,
            sequences.cu_seqlens_k, *strides, sequences.batch, sequences.seqlen_q, sequences.seqlen_k, heads_kv, tiles,
            window or 0, scale * LOG2E,
        ], constants | {
            "BLOCK_M": c.BLOCK_M, "BLOCK_N": c.BLOCK_N, "VARLEN": sequences.varlen,
            "WINDOW": _window_mode(window, tokens, c.BLOCK_N), "PACK_GQA": c.PACK_GQA, "SPLIT_LOOPS": c.SPLIT_LOOPS,
            "BRANCH_MASKS": c.BRANCH_MASKS, "STRIDE_UNIT": unit, "TMA": tma, "OWN_TMA": own_tma,
            "REGISTER_A": c.REGISTER_A, "TAIL_N": c.TAIL_N})

    return _soundly(launch, config)


def _tokens_per_tile(config: TileConfig, rows_per_token: int) -> int:
    """The most tokens that a tile's rows can belong to."""
    return config.BLOCK_M if rows_per_token == 1 else (config.BLOCK_M + rows_per_token - 2) // rows_per_token + 1


def sink_partials(q: torch.Tensor, k: torch.Tensor, sequences: Sequences, config: TileConfig) -> torch.Tensor:
    """The buffer of per-tile dsinks that :func:`backward_dq` fills for ``config``: float32 (tiles, heads_q)."""
    rows_per_token = q.shape[-2] // k.shape[-2] if config.PACK_GQA else 1
    tiles = sequences.tiles(sequences.seqlen_q, rows_per_token, config.BLOCK_M)
    tiles *= 1 if sequences.varlen else sequences.batch
    return launcher.workspace((tiles, q.shape[-2]), torch.float32, q.device)


def row_statistics(q: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """The buffer through which :func:`backward_dq` hands each row's statistics to :func:`backward_dkdv`.

    float32 (2, batch or 1, heads_q, rows): lse in units of log2, and rowsum(o * do) - dlse. See dq_kernel for the rows.
    """
    rows = -(-sequences.seqlen_q // 16) * 16 + (16 * sequences.batch if sequences.varlen else 0)
    batch = 1 if sequences.varlen else sequences.batch
    return launcher.workspace((2, batch, q.shape[-2], rows), torch.float32, q.device)


def backward_dq(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, o: torch.Tensor, lse: torch.Tensor,
    do: torch.Tensor, dlse: torch.Tensor | None, dq: torch.Tensor | None, rows: torch.Tensor,
    partials: torch.Tensor | None, *, sequences: Sequences, window: int | None, scale: float, config: TileConfig,
) -> Any:
    """Write the :func:`row_statistics`, and where they are given dq and the sinks' partials."""
    q, k, v, do = launchable(q), launchable(k), launchable(v), launchable(do)
    constants = _shape_constants(q, k, v, group_block=True)
    strides, unit = strides_of(q, k, v, do)
    group, heads_kv = constants["GROUP"], k.shape[-2]

    def launch(c: TileConfig) -> Any:
        rows_per_token = group if c.PACK_GQA else 1
        tokens = _tokens_per_tile(c, rows_per_token)
        tiles = sequences.tiles(sequences.seqlen_q, rows_per_token, c.BLOCK_M)
        programs = tiles * (q.shape[-2] // rows_per_token) * (1 if sequences.varlen else sequences.batch)
        tma = c.TMA and describable(k, v)
        own_tma = tma and _own_tma(c, group, q, do)
        return _launch(dq_kernel, programs, q.device, c, [
            _own_descriptor(q, c.BLOCK_M, rows_per_token) if own_tma else q,
            *((_descriptor(k, c.BLOCK_N), _descriptor(v, c.BLOCK_N)) if tma else (k, v)),
            sinks, o, _own_descriptor(do, c.BLOCK_M, rows_per_token) if own_tma else do, lse, dlse, dq, rows[0],
            rows[1], partials, sequences.cu_seqlens_q, sequences.cu_seqlens_k, *strides, rows.shape[-1] // 16,
            sequences.batch, sequences.seqlen_q, sequences.seqlen_k, heads_kv, tiles, window or 0, scale, scale * LOG2E,
        ], constants | {
            "BLOCK_M": c.BLOCK_M, "BLOCK_N": c.BLOCK_N, "VARLEN": sequences.varlen,
            "WINDOW": _window_mode(window, tokens, c.BLOCK_N), "PACK_GQA": c.PACK_GQA, "SPLIT_LOOPS": c.SPLIT_LOOPS,
            "BRANCH_MASKS": c.BRANCH_MASKS, "STRIDE_UNIT": unit, "TMA": tma, "OWN_TMA": own_tma,
            "REGISTER_A": c.REGISTER_A})

    return _soundly(launch, config)


def backward_dkdv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, do: torch.Tensor,
    dk: torch.Tensor, dv: torch.Tensor, partials: torch.Tensor | None, dsinks: torch.Tensor | None,
    *, sequences: Sequences, window: int | None, scale: float, config: TileConfig,
) -> Any:
    """Write dk and dv (contiguous) and, where given, dsinks (heads_q,) from the partials of :func:`backward_dq`."""
    q, k, v, do = launchable(q), launchable(k), launchable(v), launchable(do)
    constants = _shape_constants(q, k, v, group_block=True)
    strides, unit = strides_of(q, k, v, do)
    heads_kv = k.shape[-2]

    def launch(c: TileConfig) -> Any:
        tiles = sequences.tiles(sequences.seqlen_k, 1, c.BLOCK_N)
        programs = tiles * heads_kv * (1 if sequences.varlen else sequences.batch)
        tma = c.TMA and describable(q, do)
        return _launch(dkdv_kernel, programs, q.device, c, [
            _descriptor(q, c.BLOCK_M) if tma else q, k, v, _descriptor(do, c.BLOCK_M) if tma else do,
            *((_row_descriptor(x, c.BLOCK_M, sequences.varlen) for x in (rows[0], rows[1])) if tma
              else (rows[0], rows[1])), dk, dv, partials, dsinks,
            sequences.cu_seqlens_q, sequences.cu_seqlens_k, *strides, rows.shape[-1] // 16, sequences.batch,
            sequences.seqlen_q, sequences.seqlen_k, heads_kv, tiles, 0 if partials is None else partials.shape[0],
            window or 0, scale, scale * LOG2E,
        ], constants | {
            "BLOCK_M": c.BLOCK_M, "BLOCK_N": c.BLOCK_N, "VARLEN": sequences.varlen,
            "WINDOW": _window_mode(window, c.BLOCK_M, c.BLOCK_N), "SPLIT_LOOPS": c.SPLIT_LOOPS,
            "BRANCH_MASKS": c.BRANCH_MASKS, "STRIDE_UNIT": unit, "TMA": tma, "REGISTER_A": c.REGISTER_A})

    return _soundly(launch, config)


def backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, o: torch.Tensor, lse: torch.Tensor,
    do: torch.Tensor, dlse: torch.Tensor | None, dq: torch.Tensor | None, dk: torch.Tensor | None,
    dv: torch.Tensor | None, dsinks: torch.Tensor | None, *, sequences: Sequences, window: int | None, scale: float,
    dq_config: TileConfig, dkdv_config: TileConfig,
) -> None:
    """Both backward kernels: write the gradients that are given (contiguous), and touch no other."""
    call: dict[str, Any] = {"sequences": sequences, "window": window, "scale": scale}
    rows = row_statistics(q, sequences)
    partials = None if dsinks is None else sink_partials(q, k, sequences, dq_config)
    backward_dq(q, k, v, sinks, o, lse, do, dlse, dq, rows, partials, config=dq_config, **call)
    if dk is not None or dv is not None:
        # one kernel makes both
        dk = launcher.workspace(k.shape, k.dtype, k.device) if dk is None else dk
        dv = launcher.workspace(v.shape, v.dtype, v.device) if dv is None else dv
        if dk.numel():
            backward_dkdv(q, k, v, rows, do, dk, dv, partials, dsinks, config=dkdv_config, **call)
            return
    if dsinks is not None and partials is not None:
        launcher.not_replayable("dsinks are summed up by PyTorch")
        dsinks.copy_(partials.sum(0))
