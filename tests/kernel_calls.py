"""Run the kernels on buffers that were NaN before, and judge everything they wrote."""

from __future__ import annotations

from typing import Any

import torch

from flash_sink_attn.config import AttnConfig, TileConfig
from flash_sink_attn.dispatch import choose
from flash_sink_attn.kernels import launch
from flash_sink_attn.layout import Sequences
from flash_sink_attn.testing import AttentionInputs, check, truth_and_eager
from flash_sink_attn.tuned_table import ShapeKey

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def nan(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def run_kernels(
    x: AttentionInputs, *, window: int | None = None, config: AttnConfig | None = None,
    dlse: torch.Tensor | None = None, scale: float | None = None,
) -> dict[str, torch.Tensor]:
    """All outputs of the three kernels; configurations not given are the heuristic's."""
    q, k, v, varlen = x.q, x.k, x.v, x.cu_seqlens_q is not None
    key = ShapeKey(str(q.dtype).removeprefix("torch."), q.shape[-1], v.shape[-1], q.shape[-2], k.shape[-2], window,
                   1, x.max_seqlen_q, x.max_seqlen_k, varlen)
    tiles = {n: choose(n, key, q.device, config).config for n in ("fwd", "bwd_dq", "bwd_dkdv")}
    sequences = (Sequences(x.cu_seqlens_q.shape[0] - 1, q.shape[0], k.shape[0], x.cu_seqlens_q, x.cu_seqlens_k)
                 if varlen else Sequences(q.shape[0], q.shape[1], k.shape[1]))
    call: dict[str, Any] = {"sequences": sequences, "window": window, "scale": scale or q.shape[-1] ** -0.5}
    o = nan(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    lse = nan(*((q.shape[1], q.shape[0]) if varlen else (q.shape[0], q.shape[2], q.shape[1])), dtype=torch.float32)
    launch.forward(q, k, v, x.sinks, o, lse, config=tiles["fwd"], **call)
    dq, dk, dv = (nan(*t.shape, dtype=t.dtype) for t in (q, k, v))
    rows = launch.row_statistics(q, sequences).fill_(float("nan"))
    partials = dsinks = None
    if x.sinks is not None:
        partials = launch.sink_partials(q, k, sequences, tiles["bwd_dq"]).fill_(float("nan"))
        dsinks = nan(*x.sinks.shape, dtype=x.sinks.dtype)
    launch.backward_dq(q, k, v, x.sinks, o, lse, x.do, dlse, dq, rows, partials, config=tiles["bwd_dq"], **call)
    launch.backward_dkdv(q, k, v, rows, x.do, dk, dv, partials, dsinks, config=tiles["bwd_dkdv"], **call)
    outputs = {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return outputs if dsinks is None else outputs | {"dsinks": dsinks}


def assert_right(
    x: AttentionInputs, *, window: int | None = None, config: AttnConfig | None = None,
    dlse: torch.Tensor | None = None, scale: float | None = None,
) -> dict[str, torch.Tensor]:
    """Run the kernels on ``x`` and hold every output to the error rule."""
    outputs = run_kernels(x, window=window, config=config, dlse=dlse, scale=scale)
    truth, eager = truth_and_eager(x, window=window, dlse=dlse, softmax_scale=scale)
    wrong = [outcome.message for outcome in check(outputs, truth, eager, x.q.dtype).values() if not outcome.ok]
    assert not wrong, "; ".join(wrong)
    return outputs


def tiles(block_m: int, block_n: int, **choices: Any) -> AttnConfig:
    """One tile for all three kernels; PACK_GQA and TAIL_N for the forward only."""
    tile = TileConfig(block_m, block_n, **choices)
    plain = TileConfig(block_m, block_n, **(choices | {"PACK_GQA": False, "TAIL_N": 0}))
    return AttnConfig(fwd=tile, bwd_dq=plain, bwd_dkdv=plain)
