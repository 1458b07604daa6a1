"""The public attention functions: arguments, autograd, and the same operation as a custom op for torch.compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from flash_sink_attn import _checks, _mode
from flash_sink_attn.config import AttnConfig, TileConfig
from flash_sink_attn.dispatch import choose
from flash_sink_attn.kernels import launch
from flash_sink_attn.layout import Sequences
from flash_sink_attn.sliding_cache import SlidingCacheManager
from flash_sink_attn.tuned_table import ShapeKey

_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
# q, k, v, sinks
_Grads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def flash_sink_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None = None,
    window: int | SlidingCacheManager | None = None,
    disable_bf16_atomic_add: bool | None = None,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    config: AttnConfig | TileConfig | Mapping[str, Any] | None = None,
) -> Any:
    """Exact causal attention with one learned sink logit per query head.

    With s[i, j] = softmax_scale * dot(q[i], k[j]) over the keys j that query i sees,
    lse[i] = log(exp(sink) + sum_j exp(s[i, j])) and o[i] = sum_j exp(s[i, j] - lse[i]) * v[j]: the sink takes its share
    of the softmax and adds nothing to the output. Query i sees key j when 0 <= i + seqlen_k - seqlen_q - j < window:
    fewer queries than keys are the last ones. A row that sees no key gives o = 0 and lse = sink.

    Differentiable in q, k, v and sinks, through o and lse. Sums are accumulated in float32 in a fixed order: the same
    inputs give the same bits.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), float16 or bfloat16. Any strides with a contiguous last dimension are
            read in place. head_dim: a multiple of 8, at most 256.
        k: (batch, seqlen_k, heads_kv, head_dim); heads_kv divides heads_q, query head h uses key head
            h // (heads_q // heads_kv).
        v: (batch, seqlen_k, heads_kv, head_dim_v).
        sinks: (heads_q,), float32, float16 or bfloat16, in natural-log units like the scaled scores; finite, or minus
            infinity for a head without one; None for plain attention.
        window: how many keys a query sees, its own included; None for all before it. Or a
            :class:`SlidingCacheManager`, whose window, keys and values are then the ones used.
        disable_bf16_atomic_add: accepted for callers of the original interface; there are no atomics to disable.
        softmax_scale: default head_dim ** -0.5.
        return_lse: also return lse.
        config: tile sizes: an :class:`AttnConfig`, a mapping of kernel name to fields, or one :class:`TileConfig` for
            all kernels. What is not given comes from the tuned table of the GPU, else from a heuristic.

    Returns:
        o (batch, seqlen_q, heads_q, head_dim_v) in q's dtype, contiguous; with ``return_lse`` the pair (o, lse), lse
        float32 (batch, heads_q, seqlen_q), natural log, sink included.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what came.

    Under autocast, floating-point q, k and v are cast to its dtype.
    """
    key, value, keys_seen = _resolve(k, v, window)
    q, key, value = _autocast(q, key, value)
    _checks.check_tensors(q, key, value, sinks, varlen=False)
    _checks.check_window(keys_seen)
    scale = _checks.check_scale(softmax_scale, q.shape[-1])
    o, lse = _apply(q, key, value, sinks, None, None, 0, 0, keys_seen, scale, config)
    return (o, lse) if return_lse else o


def flash_sink_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    window: int | SlidingCacheManager | None = None,
    disable_bf16_atomic_add: bool | None = None,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    config: AttnConfig | TileConfig | Mapping[str, Any] | None = None,
) -> Any:
    """:func:`flash_sink_attn_func` on sequences packed along one dimension.

    Args:
        q: (total_q, heads_q, head_dim).
        k, v: (total_k, heads_kv, head_dim) and (total_k, heads_kv, head_dim_v).
        sinks, window, disable_bf16_atomic_add, softmax_scale, config: as in :func:`flash_sink_attn_func`.
        cu_seqlens: int32 (batch + 1,): sequence b holds the query tokens cu_seqlens[b] to cu_seqlens[b + 1]; rises
            from 0 to total_q, empty sequences allowed. On q's device, or on the CPU. Values on a GPU are checked only
            when the environment has FLASH_SINK_ATTN_CHECK=1 (it costs a synchronisation); unchecked wrong values leave
            the tokens concerned undefined (possibly NaN), but give no access out of bounds.
        cu_seqlens_k: the same for the keys; default cu_seqlens.
        max_seqlen_q, max_seqlen_k: longest sequence, in tokens. Only the lookup of tuned tile sizes uses them; default
            the totals.
        return_lse: also return lse.

    Returns:
        o (total_q, heads_q, head_dim_v); with ``return_lse`` (o, lse), lse float32 (heads_q, total_q).

    Raises:
        ValueError, TypeError: as in :func:`flash_sink_attn_func`.
    """
    key, value, keys_seen = _resolve(k, v, window)
    q, key, value = _autocast(q, key, value)
    _checks.check_tensors(q, key, value, sinks, varlen=True)
    _checks.check_window(keys_seen)
    scale = _checks.check_scale(softmax_scale, q.shape[-1])
    _checks.check_packed(q, key, cu_seqlens, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    o, lse = _apply(q, key, value, sinks, cu_seqlens, cu_seqlens_k, max_seqlen_q or q.shape[0],
                    max_seqlen_k or key.shape[0], keys_seen, scale, config)
    return (o, lse) if return_lse else o


def _resolve(k: Any, v: Any, window: Any) -> tuple[Any, Any, int | None]:
    """Keys, values and window of a call, a cache manager's where the window is one; not yet checked."""
    if not isinstance(window, SlidingCacheManager):
        return k, v, window
    if window.key is None:
        raise ValueError("window: expected a SlidingCacheManager after update(k, v), got one without keys")
    return window.key, window.val, window.sliding_window


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    device_type = getattr(getattr(tensors[0], "device", None), "type", "cuda")
    if device_type not in ("cuda", "cpu") or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in tensors)


def _apply(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None, max_q: int, max_k: int, window: int | None, scale: float, given: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    config = _checks.as_attn_config(given)
    if torch.compiler.is_compiling():
        # Dynamo cannot see into the kernels; an op with a known signature keeps the graph whole.
        text = "" if config is None else config.encode()
        return torch.ops.flash_sink_attn.forward(q, k, v, sinks, cu_q, cu_k, max_q, max_k, window, scale, text)
    return _SinkAttention.apply(q, k, v, sinks, *_on_device(q, k, cu_q, cu_k), max_q, max_k, window, scale, config)


def _on_device(
    q: torch.Tensor, k: torch.Tensor, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both cu_seqlens where the kernels read them, with their values checked; the second None where it is the first."""
    if cu_q is None:
        return None, None
    on_q = _checks.cu_seqlens_on(q.device, "cu_seqlens", cu_q, q.shape[0])
    if cu_k is None or (cu_k is cu_q and q.shape[0] == k.shape[0]):
        return on_q, None
    return on_q, _checks.cu_seqlens_on(q.device, "cu_seqlens_k", cu_k, k.shape[0])


def _sequences(q: torch.Tensor, k: torch.Tensor, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None) -> Sequences:
    if cu_q is None:
        return Sequences(q.shape[0], q.shape[1], k.shape[1])
    return Sequences(cu_q.shape[0] - 1, q.shape[0], k.shape[0], cu_q, cu_k)


def _shape_key(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, varlen: bool, max_q: int, max_k: int
) -> ShapeKey:
    dims = (_DTYPE_NAMES[q.dtype], q.shape[-1], v.shape[-1], q.shape[-2], k.shape[-2], window)
    if varlen:
        return ShapeKey.packed(*dims, q.shape[0], max_q, max_k)
    return ShapeKey.fixed(*dims, q.shape[0], q.shape[1], k.shape[1])


def _effective_window(window: int | None, k: torch.Tensor, varlen: bool) -> int | None:
    """None for a window that hides nothing: faster, and its arithmetic stays within 32 bits however large it was."""
    return None if window is not None and window >= k.shape[0 if varlen else 1] else window


def _lse_shape(q: torch.Tensor, varlen: bool) -> tuple[int, ...]:
    return (q.shape[1], q.shape[0]) if varlen else (q.shape[0], q.shape[2], q.shape[1])


def _run_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None, max_q: int, max_k: int, window: int | None, scale: float, config: AttnConfig | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if _mode.PROBLEM is not None:
        raise ImportError(_mode.PROBLEM)
    if config is not None:
        _checks.check_config(config, q, k, v)
    varlen = cu_q is not None
    window = _effective_window(window, k, varlen)
    sinks = None if sinks is None else sinks.contiguous()
    o = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(_lse_shape(q, varlen), dtype=torch.float32, device=q.device)
    tile = choose("fwd", _shape_key(q, k, v, window, varlen, max_q, max_k), q.device, config).config
    launch.forward(q, k, v, sinks, o, lse, sequences=_sequences(q, k, cu_q, cu_k), window=window, scale=scale,
                   config=tile)
    return o, lse


def _run_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, o: torch.Tensor, lse: torch.Tensor,
    do: torch.Tensor | None, dlse: torch.Tensor | None, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None,
    max_q: int, max_k: int, window: int | None, scale: float, config: AttnConfig | None,
    needs: tuple[bool, bool, bool, bool],
) -> _Grads:
    needs_dq, needs_dk, needs_dv, needs_dsinks = needs
    varlen = cu_q is not None
    window = _effective_window(window, k, varlen)
    sinks = None if sinks is None else sinks.contiguous()
    if do is None:
        do = torch.zeros_like(o)
    if dlse is not None:
        dlse = dlse.to(torch.float32).contiguous()
    sequences = _sequences(q, k, cu_q, cu_k)
    key = _shape_key(q, k, v, window, varlen, max_q, max_k)
    call: dict[str, Any] = {"sequences": sequences, "window": window, "scale": scale}
    tile = choose("bwd_dq", key, q.device, config).config
    rows = launch.row_statistics(q, sequences)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if needs_dq else None
    partials = launch.sink_partials(q, k, sequences, tile) if needs_dsinks else None
    launch.backward_dq(q, k, v, sinks, o, lse, do, dlse, dq, rows, partials, config=tile, **call)
    dk = dv = dsinks = None
    if needs_dk or needs_dv:
        tile = choose("bwd_dkdv", key, q.device, config).config
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if partials is not None and sinks is not None:
        if dk is not None and dk.numel():
            dsinks = torch.empty_like(sinks)
        else:
            # without keys to launch over, or without need of their gradients, nobody sums up the partials
            dsinks = partials.sum(0).to(sinks.dtype)
            partials = None
    if dk is not None and dv is not None:
        launch.backward_dkdv(q, k, v, rows, do, dk, dv, partials, dsinks if partials is not None else None,
                             config=tile, **call)
    return dq, dk if needs_dk else None, dv if needs_dv else None, dsinks


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, sinks: Any, cu_q: Any, cu_k: Any, *call: Any) -> Any:
        o, lse = _run_forward(q, k, v, sinks, cu_q, cu_k, *call)
        ctx.save_for_backward(q, k, v, sinks, o, lse, cu_q, cu_k)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Any, dlse: Any) -> Any:
        if do is None and dlse is None:
            return (None,) * 11
        q, k, v, sinks, o, lse, cu_q, cu_k = ctx.saved_tensors
        grads = _run_backward(q, k, v, sinks, o, lse, do, dlse, cu_q, cu_k, *(*ctx.call, ctx.needs_input_grad[:4]))
        return (*grads, *(None,) * 7)


_CALL = "Tensor? cu_q, Tensor? cu_k, SymInt max_q, SymInt max_k, int? window, float scale, str config"


def _config_of(text: str) -> AttnConfig | None:
    return AttnConfig.decode(text) if text else None


@torch.library.custom_op(
    "flash_sink_attn::forward", mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? sinks, {_CALL}) -> (Tensor, Tensor)")
def _forward_op(q, k, v, sinks, cu_q, cu_k, max_q, max_k, window, scale, config):  # type: ignore[no-untyped-def]
    return _run_forward(q, k, v, sinks, *_on_device(q, k, cu_q, cu_k), max_q, max_k, window, scale, _config_of(config))


@_forward_op.register_fake
def _(q, k, v, sinks, cu_q, cu_k, max_q, max_k, window, scale, config):  # type: ignore[no-untyped-def]
    return (q.new_empty(*q.shape[:-1], v.shape[-1]),
            q.new_empty(_lse_shape(q, cu_q is not None), dtype=torch.float32))


@torch.library.custom_op(
    "flash_sink_attn::backward", mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor o, Tensor lse, Tensor? do, Tensor? dlse, "
           f"{_CALL}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)")
def _backward_op(q, k, v, sinks, o, lse, do, dlse, cu_q, cu_k, max_q, max_k, window, scale, config, needs):  # type: ignore[no-untyped-def]
    grads = _run_backward(q, k, v, sinks, o, lse, do, dlse, *_on_device(q, k, cu_q, cu_k), max_q, max_k, window, scale,
                          _config_of(config), tuple(needs))
    return tuple(q.new_empty(0) if g is None else g for g in grads)


@_backward_op.register_fake
def _(q, k, v, sinks, o, lse, do, dlse, cu_q, cu_k, max_q, max_k, window, scale, config, needs):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) if need else q.new_empty(0)
                 for x, need in zip((q, k, v, sinks), needs, strict=True))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, sinks, cu_q, cu_k, *call = inputs
    ctx.save_for_backward(q, k, v, sinks, *output, cu_q, cu_k)
    ctx.call = call


def _op_backward(ctx: Any, do: Any, dlse: Any) -> Any:
    q, k, v, sinks, o, lse, cu_q, cu_k = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    grads = torch.ops.flash_sink_attn.backward(q, k, v, sinks, o, lse, do, dlse, cu_q, cu_k, *ctx.call, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 7)


torch.library.register_autograd("flash_sink_attn::forward", _op_backward, setup_context=_setup_context)


