"""The public attention functions: arguments, autograd, and the same operation as a custom op for torch.compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from flash_sink_attn import _checks
from flash_sink_attn.calls import Call, call_for, check, lse_shape, place
from flash_sink_attn.config import AttnConfig, Impl, TileConfig
from flash_sink_attn.options import Options
from flash_sink_attn.sliding_cache import SlidingCacheManager


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
    impl: Impl | None = None,
    deterministic: bool | None = None,
) -> Any:
    """Exact causal attention with one learned sink logit per query head.

    With s[i, j] = softmax_scale * dot(q[i], k[j]) over the keys j that query i sees,
    lse[i] = log(exp(sink) + sum_j exp(s[i, j])) and o[i] = sum_j exp(s[i, j] - lse[i]) * v[j]: the sink takes its share
    of the softmax and adds nothing to the output. Query i sees key j when 0 <= i + seqlen_k - seqlen_q - j < window:
    fewer queries than keys are the last ones. A row that sees no key gives o = 0 and lse = sink.

    Differentiable in q, k, v and sinks, through o and lse. Sums are accumulated in float32. The forward gives the same
    bits for the same inputs; so do the gradients where ``deterministic`` asks for that, and always with the portable
    kernels.

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
        disable_bf16_atomic_add: accepted for callers of the original interface, without effect: nothing is added up in
            half precision here.
        softmax_scale: default head_dim ** -0.5.
        return_lse: also return lse.
        config: tile sizes: an :class:`AttnConfig`, a mapping of kernel name to fields, or one :class:`TileConfig` for
            all portable kernels. What is not given comes from the tuned table of the GPU, else from a heuristic.
        impl: "triton" for the portable kernels, "hopper" for those that only Hopper cards can run; None (default) for
            whichever is faster on this shape by the tuned table or the heuristic, the portable ones where the others
            cannot run. A pass that ``config`` gives tiles of one implementation for uses that one.
        deterministic: True for gradients that are the same bits each time, which can cost some speed; None (default)
            and False for the fastest, whose sums may be added up in another order each time.

    Returns:
        o (batch, seqlen_q, heads_q, head_dim_v) in q's dtype, contiguous; with ``return_lse`` the pair (o, lse), lse
        float32 (batch, heads_q, seqlen_q), natural log, sink included.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what came. So does one
            for ``impl="hopper"`` where those kernels cannot run.

    Under autocast, floating-point q, k and v are cast to its dtype.
    """
    key, value, keys_seen = _resolve(k, v, window)
    q, key, value = _autocast(q, key, value)
    o, lse = _apply(q, key, value, sinks, False, None, None, None, None, keys_seen, softmax_scale, config, impl,
                    deterministic)
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
    impl: Impl | None = None,
    deterministic: bool | None = None,
) -> Any:
    """:func:`flash_sink_attn_func` on sequences packed along one dimension.

    Args:
        q: (total_q, heads_q, head_dim).
        k, v: (total_k, heads_kv, head_dim) and (total_k, heads_kv, head_dim_v).
        sinks, window, disable_bf16_atomic_add, softmax_scale, config, impl, deterministic: as in
            :func:`flash_sink_attn_func`.
        cu_seqlens: int32 (batch + 1,): sequence b holds the query tokens cu_seqlens[b] to cu_seqlens[b + 1]; rises
            from 0 to total_q, empty sequences allowed. On q's device, or on the CPU. Values on a GPU are checked only
            when the environment has FLASH_SINK_ATTN_CHECK=1 (it costs a synchronisation); unchecked wrong values leave
            the tokens concerned undefined (possibly NaN), but give no access out of bounds.
        cu_seqlens_k: the same for the keys; default cu_seqlens.
        max_seqlen_q, max_seqlen_k: longest sequence, in tokens. Only the lookup of tuned tile sizes uses them; default
            the totals. A maximum taken from cu_seqlens inside torch.compile keeps the graph whole with
            torch._dynamo.config.capture_scalar_outputs, and costs a synchronisation as it does outside.
        return_lse: also return lse.

    Returns:
        o (total_q, heads_q, head_dim_v); with ``return_lse`` (o, lse), lse float32 (heads_q, total_q).

    Raises:
        ValueError, TypeError: as in :func:`flash_sink_attn_func`.
    """
    key, value, keys_seen = _resolve(k, v, window)
    q, key, value = _autocast(q, key, value)
    o, lse = _apply(q, key, value, sinks, True, cu_seqlens, cu_seqlens_k, max_seqlen_q, max_seqlen_k, keys_seen,
                    softmax_scale, config, impl, deterministic)
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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, varlen: bool,
    cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, max_q: int | None, max_k: int | None, window: int | None,
    scale: float | None, config: Any, impl: Any, deterministic: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    given = (q, k, v, sinks, varlen, cu_q, cu_k, max_q, max_k, window, scale,
             _checks.as_attn_config(config) if isinstance(config, Mapping) else config, impl, deterministic)
    if torch.compiler.is_compiling():
        # Dynamo cannot see into the kernels; an op with a known signature keeps the graph whole.
        resolved, options = check(*given)
        return torch.ops.flash_sink_attn.forward(q, k, v, sinks, cu_q, cu_k, max_q, max_k, window, resolved,
                                                 options.encode())
    call = call_for(*given)
    cu_q, cu_k = place(q, k, cu_q, cu_k)
    if _nobody_differentiates(q, k, v, sinks):
        return call.forward(q, k, v, sinks, cu_q, cu_k)
    return _SinkAttention.apply(q, k, v, sinks, cu_q, cu_k, call)


def _nobody_differentiates(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has nothing to note, nor anybody who would hear from it that this function has no such
    derivative: forward mode and torch.func's transforms."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    return forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, sinks: Any, cu_q: Any, cu_k: Any, call: Call) -> Any:
        o, lse = call.forward(q, k, v, sinks, cu_q, cu_k)
        ctx.save_for_backward(q, k, v, sinks, o, lse, cu_q, cu_k)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Any, dlse: Any) -> Any:
        if do is None and dlse is None:
            return (None,) * 7
        q, k, v, sinks, o, lse, cu_q, cu_k = ctx.saved_tensors
        grads = ctx.call.backward(q, k, v, sinks, o, lse, do, dlse, cu_q, cu_k, ctx.needs_input_grad[:4])
        return (*grads, None, None, None)


_CALL = "Tensor? cu_q, Tensor? cu_k, SymInt? max_q, SymInt? max_k, int? window, float scale, str options"


def _call_of(q: Any, k: Any, v: Any, sinks: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, window: int | None,
             scale: float, text: str) -> Call:
    options = Options.decode(text)
    return call_for(q, k, v, sinks, cu_q is not None, cu_q, cu_k, max_q, max_k, window, scale, options.config,
                    options.impl, options.deterministic)


@torch.library.custom_op(
    "flash_sink_attn::forward", mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? sinks, {_CALL}) -> (Tensor, Tensor)")
def _forward_op(q, k, v, sinks, cu_q, cu_k, max_q, max_k, window, scale, options):  # type: ignore[no-untyped-def]
    call = _call_of(q, k, v, sinks, cu_q, cu_k, max_q, max_k, window, scale, options)
    return call.forward(q, k, v, sinks, *place(q, k, cu_q, cu_k))


@_forward_op.register_fake
def _(q, k, v, sinks, cu_q, cu_k, max_q, max_k, window, scale, options):  # type: ignore[no-untyped-def]
    return (q.new_empty(*q.shape[:-1], v.shape[-1]),
            q.new_empty(lse_shape(q, cu_q is not None), dtype=torch.float32))


@torch.library.custom_op(
    "flash_sink_attn::backward", mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor o, Tensor lse, Tensor? do, Tensor? dlse, "
           f"{_CALL}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)")
def _backward_op(q, k, v, sinks, o, lse, do, dlse, cu_q, cu_k, max_q, max_k, window, scale, options, needs):  # type: ignore[no-untyped-def]
    call = _call_of(q, k, v, sinks, cu_q, cu_k, max_q, max_k, window, scale, options)
    grads = call.backward(q, k, v, sinks, o, lse, do, dlse, *place(q, k, cu_q, cu_k), tuple(needs))
    return tuple(q.new_empty(0) if g is None else g for g in grads)


@_backward_op.register_fake
def _(q, k, v, sinks, o, lse, do, dlse, cu_q, cu_k, max_q, max_k, window, scale, options, needs):  # type: ignore[no-untyped-def]
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


