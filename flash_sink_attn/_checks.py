"""Validation of the public functions' arguments. Every error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from flash_sink_attn._mode import COMPILE_ONLY, INTERPRETING
from flash_sink_attn.config import IMPLS, KERNELS, MAX_HEAD_DIM, AttnConfig, TileConfig
from flash_sink_attn.dispatch import device_info
from flash_sink_attn.validity import limits_of, reject_reason

HALF = (torch.float16, torch.bfloat16)
CHECK_VALUES = "FLASH_SINK_ATTN_CHECK"


def check_tensors(q: Any, k: Any, v: Any, sinks: Any, *, varlen: bool) -> None:
    """Raise TypeError or ValueError unless q, k, v and sinks belong together, where our kernels can read them."""
    check_qkv(q, k, v, varlen=varlen)
    if q.device.type != "cuda" and not (q.device.type == "cpu" and (INTERPRETING or COMPILE_ONLY)):
        where = "a CUDA device, or a CPU when there is no CUDA device or TRITON_INTERPRET=1"
        raise ValueError(f"q: expected a tensor on {where}, got {q.device}")
    if sinks is None:
        return
    if not isinstance(sinks, torch.Tensor):
        raise TypeError(f"sinks: expected a tensor or None, got {type(sinks).__name__}")
    if sinks.shape != (q.shape[-2],):
        raise ValueError(f"sinks: expected shape ({q.shape[-2]},), one logit per query head, got {tuple(sinks.shape)}")
    if sinks.dtype not in (*HALF, torch.float32):
        raise TypeError(f"sinks: expected float32, float16 or bfloat16, got {sinks.dtype}")
    if sinks.device != q.device:
        raise ValueError(f"sinks: expected q's device {q.device}, got {sinks.device}")


def check_qkv(q: Any, k: Any, v: Any, *, varlen: bool) -> None:
    """Raise TypeError or ValueError unless q, k and v belong together."""
    rank = 3 if varlen else 4
    layout = "(total_tokens, heads, head_dim)" if varlen else "(batch, seqlen, heads, head_dim)"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dim() != rank:
            raise ValueError(f"{name}: expected {rank} dimensions {layout}, got shape {tuple(x.shape)}")
        if x.dtype not in HALF:
            raise TypeError(f"{name}: expected float16 or bfloat16, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
        if x.shape[-1] % 8 or not 8 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: expected a head dim that is a multiple of 8 from 8 to {MAX_HEAD_DIM}, "
                             f"got {x.shape[-1]}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected q's head dim {q.shape[-1]}, got {k.shape[-1]}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"v: expected k's leading dimensions {tuple(k.shape[:-1])}, got {tuple(v.shape[:-1])}")
    if not varlen and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: expected q's batch {q.shape[0]}, got {k.shape[0]}")
    if k.shape[-2] < 1 or q.shape[-2] < 1 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"q: expected a number of heads that is a multiple of k's {k.shape[-2]}, got {q.shape[-2]}")


def check_window(window: Any) -> None:
    """Raise unless window is None or an int of at least 1."""
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window: expected an int, None or a cache manager, got {window!r}")
    if window < 1:
        raise ValueError(f"window: expected at least 1 (a query's own key counts), got {window}")


def check_scale(softmax_scale: Any, head_dim: int) -> float:
    """The scale to use; ``head_dim ** -0.5`` for None."""
    if softmax_scale is None:
        return head_dim**-0.5
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale: expected a float or None, got {softmax_scale!r}")
    if not 0 < softmax_scale < math.inf:  # dynamo has no math.isfinite of a number that varies
        raise ValueError(f"softmax_scale: expected a finite number above 0, got {softmax_scale}")
    return float(softmax_scale)


def check_cu_seqlens(name: str, cu_seqlens: Any, device: torch.device) -> None:
    """Raise unless cu_seqlens has the right type, dtype, shape and device."""
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name}: expected shape (batch + 1,) with batch >= 1, got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device.type != "cpu" and cu_seqlens.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} or on the CPU, got {cu_seqlens.device}")


def check_packed(q: torch.Tensor, k: torch.Tensor, cu_seqlens: Any, cu_seqlens_k: Any, max_seqlen_q: Any,
                 max_seqlen_k: Any) -> None:
    """Raise unless what says how packed tokens form sequences has the right types and shapes."""
    check_cu_seqlens("cu_seqlens", cu_seqlens, q.device)
    if cu_seqlens_k is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(f"cu_seqlens_k: expected a tensor, since k has {k.shape[0]} tokens and q {q.shape[0]}")
    else:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q.device)
        if cu_seqlens_k.shape != cu_seqlens.shape:
            raise ValueError(f"cu_seqlens_k: expected cu_seqlens's shape {tuple(cu_seqlens.shape)}, "
                             f"got {tuple(cu_seqlens_k.shape)}")
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        # Whether it is negative torch.compile cannot ask of a number that only the device knows; the op asks at last.
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)
                                  or (not torch.compiler.is_compiling() and value < 0)):
            raise ValueError(f"{name}: expected an int of at least 0 or None, got {value!r}")


def cu_seqlens_on(device: torch.device, name: str, cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """cu_seqlens on ``device``; its values are checked where that costs no synchronisation, or on request.

    Raises:
        ValueError: the values do not rise from 0 to ``total``.
    """
    if cu_seqlens.device.type == "cpu" or os.environ.get(CHECK_VALUES, "0") not in ("", "0"):
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != total or any(a > b for a, b in zip(values, values[1:], strict=False)):
            raise ValueError(f"{name}: expected values that rise from 0 to the {total} tokens, got "
                             f"{values if len(values) <= 8 else [*values[:4], '...', *values[-3:]]}")
    return cu_seqlens.to(device, non_blocking=True).contiguous()


def as_attn_config(config: Any) -> AttnConfig | None:
    """The ``config`` argument as an AttnConfig; a single TileConfig holds for all portable kernels.

    Raises:
        TypeError: it is something else. ValueError: a mapping with unknown or missing fields.
    """
    if isinstance(config, TileConfig):
        return AttnConfig.everywhere(config)
    if isinstance(config, Mapping):
        config = AttnConfig.from_dict(config)
    if config is not None and not isinstance(config, AttnConfig):
        raise TypeError(f"config: expected an AttnConfig, a TileConfig, a mapping or None, got {type(config).__name__}")
    return config


def check_config(config: AttnConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError unless every configuration given can work on these tensors."""
    limits = limits_of(device_info(q.device).arch)
    for kernel in KERNELS:
        tile = getattr(config, kernel)
        reason = tile and reject_reason(tile, kernel, head_dim=q.shape[-1], head_dim_v=v.shape[-1],
                                        group=q.shape[-2] // k.shape[-2], limits=limits)
        if reason:
            raise ValueError(f"config: {kernel}: {reason}")


def check_impl(impl: Any, deterministic: Any) -> None:
    """Raise unless impl is None or an implementation's name, and deterministic None or a bool."""
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl: expected one of {list(IMPLS)} or None, got {impl!r}")
    if deterministic is not None and not isinstance(deterministic, bool):
        raise TypeError(f"deterministic: expected a bool or None, got {deterministic!r}")
