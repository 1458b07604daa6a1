"""From tensors to kernel launches: grids, strides and constexprs. Arguments are taken as valid; api.py checks them.

Every function also takes tensors on the "meta" device: it then builds its kernels and launches nothing, which is how
a process without a GPU compiles them (see flash_sink_attn.compile_only).
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_sink_attn.config import TileConfig, split_head_dim
from flash_sink_attn.kernels.backward import dkdv_kernel, dq_kernel
from flash_sink_attn.kernels.common import APART, MEETING, NO_WINDOW
from flash_sink_attn.kernels.forward import fwd_kernel

# Offsets inside a tile are 32-bit: at most 256 rows times a stride.
_MAX_STRIDE = 2**31 // 256 - 1
_LOG2E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Sequences:
    """How tokens form sequences.

    Fixed length: ``cu_seqlens_*`` None. Varlen: int32 (batch + 1,) on the device of the tensors.
    ``seqlen_*`` are per sequence, or total token counts when varlen.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None

    @property
    def varlen(self) -> bool:
        return self.cu_seqlens_q is not None

    def tiles(self, length: int, rows_per_token: int, block: int) -> int:
        """Tiles of one sequence, or an upper bound on those of all sequences when varlen."""
        whole = triton.cdiv(length * rows_per_token, block)
        return whole + self.batch if self.varlen else whole


def launchable(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if the kernels can address it by strides, else a contiguous copy."""
    strides = x.stride()
    if strides[-1] == 1 and strides[-3] <= _MAX_STRIDE and strides[-2] <= _MAX_STRIDE:
        return x
    return x.contiguous()


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """(batch, token, head) strides in elements; the batch stride of a varlen tensor is 0."""
    s = x.stride()
    return (s[0], s[1], s[2]) if x.dim() == 4 else (0, s[0], s[1])


def _stride_arguments(**tensors: torch.Tensor) -> dict[str, int]:
    """Stride arguments by name, in units of 8 elements (16 bytes) where all of them allow it."""
    strides = {name: _strides(x) for name, x in tensors.items()}
    unit = 1 if any(value % 8 for triple in strides.values() for value in triple) else 8
    arguments = {f"stride_{name}{axis}": value // unit
                 for name, triple in strides.items() for axis, value in zip("bsh", triple, strict=True)}
    return arguments | {"STRIDE_UNIT": unit}


def _window_mode(window: int | None, tokens_per_tile: int, block: int) -> int:
    if window is None:
        return NO_WINDOW
    return APART if window >= tokens_per_tile + block - 2 else MEETING


def _launch(kernel: Any, programs: int, device: torch.device, config: TileConfig, arguments: dict[str, Any]) -> Any:
    """Launch on ``device`` (returns the compiled kernel, None when interpreted), or only compile on meta."""
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.maxnreg is not None:
        options["maxnreg"] = config.maxnreg
    if device.type == "meta":
        return kernel.warmup(**arguments, **options, grid=(programs,))
    if not programs:
        return None
    # Triton launches on the current device
    away = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if away else contextlib.nullcontext():
        return kernel[(programs,)](**arguments, **options)


def _descriptors(sequences: Sequences, block: int, *tensors: torch.Tensor) -> list[TensorDescriptor] | None:
    """Descriptors of one (1, block, 1, head_dim) tile, or None where the copy engine cannot address the tensors.

    It clips at the end of a (batch, seqlen, heads, head_dim) tensor's sequences, but not at those of a packed batch,
    where the next sequence's rows (and any NaN among them) would come along.
    """
    if sequences.varlen or any(
            x.data_ptr() % 16 or any(stride % 8 or not stride for stride in x.stride()[:3]) or not x.numel()
            for x in tensors):
        return None
    return [TensorDescriptor(x, list(x.shape), list(x.stride()), [1, block, 1, x.shape[-1]]) for x in tensors]


def _shape_constants(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    block_d, block_d2 = split_head_dim(q.shape[-1])
    block_dv, block_dv2 = split_head_dim(v.shape[-1])
    return {"GROUP": q.shape[-2] // k.shape[-2], "D": q.shape[-1], "DV": v.shape[-1],
            "BLOCK_D": block_d, "BLOCK_D2": block_d2, "BLOCK_DV": block_dv, "BLOCK_DV2": block_dv2}


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, o: torch.Tensor, lse: torch.Tensor,
    *, sequences: Sequences, window: int | None, scale: float, config: TileConfig,
) -> Any:
    """Write o (like q with v's head dim, contiguous) and lse (float32, contiguous). Returns the compiled kernel."""
    q, k, v = launchable(q), launchable(k), launchable(v)
    constants = _shape_constants(q, k, v)
    group, heads_kv = constants["GROUP"], k.shape[-2]
    rows_per_token = group if config.PACK_GQA else 1
    tokens = config.BLOCK_M if rows_per_token == 1 else (config.BLOCK_M + group - 2) // group + 1
    tiles = sequences.tiles(sequences.seqlen_q, rows_per_token, config.BLOCK_M)
    heads = heads_kv * (1 if config.PACK_GQA else group)
    programs = tiles * heads * (1 if sequences.varlen else sequences.batch)
    streamed = _descriptors(sequences, config.BLOCK_N, k, v) if config.TMA else None
    k_source, v_source = streamed or (k, v)
    return _launch(fwd_kernel, programs, q.device, config, {
        "Q": q, "K": k_source, "V": v_source, "TMA": streamed is not None, "Sinks": sinks, "O": o, "Lse": lse,
        "CuSeqlensQ": sequences.cu_seqlens_q, "CuSeqlensK": sequences.cu_seqlens_k,
        "batch": sequences.batch, "seqlen_q": sequences.seqlen_q, "seqlen_k": sequences.seqlen_k,
        "heads_kv": heads_kv, "num_tiles": tiles, "window": window or 0, "scale_log2": scale * _LOG2E,
        "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "VARLEN": sequences.varlen,
        "WINDOW": _window_mode(window, tokens, config.BLOCK_N), "PACK_GQA": config.PACK_GQA,
        "SPLIT_LOOPS": config.SPLIT_LOOPS,
    } | constants | _stride_arguments(q=q, k=k, v=v))


def sink_partials(q: torch.Tensor, sequences: Sequences, config: TileConfig) -> torch.Tensor:
    """The buffer of per-tile dsinks that :func:`backward_dq` fills for ``config``: float32 (tiles, heads_q)."""
    tiles = sequences.tiles(sequences.seqlen_q, 1, config.BLOCK_M) * (1 if sequences.varlen else sequences.batch)
    return torch.empty(tiles, q.shape[-2], dtype=torch.float32, device=q.device)


def row_statistics(q: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """The buffer through which :func:`backward_dq` hands each row's statistics to :func:`backward_dkdv`.

    float32 (2, batch or 1, heads_q, rows): lse in units of log2, and rowsum(o * do) - dlse. See dq_kernel for the rows.
    """
    rows = triton.cdiv(sequences.seqlen_q, 16) * 16 + (16 * sequences.batch if sequences.varlen else 0)
    batch = 1 if sequences.varlen else sequences.batch
    return torch.empty(2, batch, q.shape[-2], rows, dtype=torch.float32, device=q.device)


def backward_dq(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, o: torch.Tensor, lse: torch.Tensor,
    do: torch.Tensor, dlse: torch.Tensor | None, dq: torch.Tensor | None, rows: torch.Tensor,
    partials: torch.Tensor | None, *, sequences: Sequences, window: int | None, scale: float, config: TileConfig,
) -> Any:
    """Write the :func:`row_statistics`, and where they are given dq and the sinks' partials."""
    q, k, v, do = launchable(q), launchable(k), launchable(v), launchable(do)
    constants = _shape_constants(q, k, v)
    heads_kv = k.shape[-2]
    tiles = sequences.tiles(sequences.seqlen_q, 1, config.BLOCK_M)
    programs = tiles * q.shape[-2] * (1 if sequences.varlen else sequences.batch)
    streamed = _descriptors(sequences, config.BLOCK_N, k, v) if config.TMA else None
    k_source, v_source = streamed or (k, v)
    return _launch(dq_kernel, programs, q.device, config, {
        "Q": q, "K": k_source, "V": v_source, "TMA": streamed is not None, "Sinks": sinks, "O": o, "DO": do,
        "Lse": lse, "DLse": dlse, "DQ": dq, "Lse2": rows[0],
        "Delta": rows[1], "stride_rows": rows.shape[-1] // 16,
        "SinkPartials": partials, "CuSeqlensQ": sequences.cu_seqlens_q, "CuSeqlensK": sequences.cu_seqlens_k,
        "batch": sequences.batch, "seqlen_q": sequences.seqlen_q, "seqlen_k": sequences.seqlen_k,
        "heads_kv": heads_kv, "num_tiles": tiles, "window": window or 0, "scale": scale, "scale_log2": scale * _LOG2E,
        "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "VARLEN": sequences.varlen,
        "WINDOW": _window_mode(window, config.BLOCK_M, config.BLOCK_N), "SPLIT_LOOPS": config.SPLIT_LOOPS,
    } | constants | _stride_arguments(q=q, k=k, v=v, g=do))


def backward_dkdv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, do: torch.Tensor,
    dk: torch.Tensor, dv: torch.Tensor, partials: torch.Tensor | None, dsinks: torch.Tensor | None,
    *, sequences: Sequences, window: int | None, scale: float, config: TileConfig,
) -> Any:
    """Write dk and dv (contiguous) and, where given, dsinks (heads_q,) from the partials of :func:`backward_dq`."""
    q, k, v, do = launchable(q), launchable(k), launchable(v), launchable(do)
    constants = _shape_constants(q, k, v)
    heads_kv = k.shape[-2]
    tiles = sequences.tiles(sequences.seqlen_k, 1, config.BLOCK_N)
    programs = tiles * heads_kv * (1 if sequences.varlen else sequences.batch)
    streamed = _descriptors(sequences, config.BLOCK_M, q, do) if config.TMA else None
    q_source, do_source = streamed or (q, do)
    return _launch(dkdv_kernel, programs, q.device, config, {
        "Q": q_source, "K": k, "V": v, "DO": do_source, "TMA": streamed is not None, "Lse2": rows[0], "Delta": rows[1],
        "stride_rows": rows.shape[-1] // 16, "DK": dk, "DV_": dv, "SinkPartials": partials,
        "DSinks": dsinks, "CuSeqlensQ": sequences.cu_seqlens_q, "CuSeqlensK": sequences.cu_seqlens_k,
        "batch": sequences.batch, "seqlen_q": sequences.seqlen_q, "seqlen_k": sequences.seqlen_k,
        "heads_kv": heads_kv, "num_tiles": tiles, "num_partials": 0 if partials is None else partials.shape[0],
        "window": window or 0, "scale": scale, "scale_log2": scale * _LOG2E,
        "BLOCK_GROUP": triton.next_power_of_2(constants["GROUP"]),
        "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "VARLEN": sequences.varlen,
        "WINDOW": _window_mode(window, config.BLOCK_M, config.BLOCK_N), "SPLIT_LOOPS": config.SPLIT_LOOPS,
    } | constants | _stride_arguments(q=q, k=k, v=v, g=do))
