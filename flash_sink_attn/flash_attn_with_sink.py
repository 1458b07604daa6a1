"""An attention sink on top of an installed FlashAttention that has none.

A sink adds exp(sink) to a row's softmax denominator and nothing to its numerator. From a sink-free output o and lse,
the output with the sink is o' = o * exp(lse - lse') where lse' = logaddexp(lse, sink). FlashAttention's own backward
rebuilds p = exp(s - lse') and delta = o' . do from whatever lse and output it is handed, so handing it lse' and o'
gives the exact gradients in one pass, and the sink's own gradient is - sum of exp(sink - lse') * delta.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash_sink_attn import _checks

_INSTALL = "install it with `pip install 'flash_sink_attn[flash]'`, or build flash_attn 2 or FlashAttention-3"


@dataclasses.dataclass(frozen=True)
class FlashCall:
    """What forward and backward of one FlashAttention call share.

    Attributes:
        softmax_scale: factor on the scores.
        causal: bottom-right aligned causal mask.
        window_size: keys visible left and right of the diagonal, -1 = unlimited.
        dropout_p: probability of dropping a softmax weight.
        alibi_slopes: float32 (heads,) or (batch, heads), None = no ALiBi.
        deterministic: ask for the deterministic backward.
        cu_seqlens: int32 (sequences + 1,) for varlen inputs, queries and keys alike; None = fixed length.
        max_seqlen: longest sequence of a varlen batch.
    """

    softmax_scale: float
    causal: bool
    window_size: tuple[int, int] = (-1, -1)
    dropout_p: float = 0.0
    alibi_slopes: Tensor | None = None
    deterministic: bool = False
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0


class FlashAttention(Protocol):
    """A FlashAttention whose backward takes output and lse as arguments.

    Layouts are (batch, seqlen, heads, head_dim) with lse (batch, heads, seqlen), and for varlen calls
    (total, heads, head_dim) with lse (heads, total); lse is float32 and natural.
    """

    name: str
    dropout_and_alibi: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: FlashCall) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output, sink-free lse, and the state of dropout's random numbers."""
        ...

    def backward(self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: FlashCall,
                 rng_state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv for the output and lse given."""
        ...


def _bind(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of ``arguments`` the installed version's function has; its interface changed names over the versions."""
    schema = getattr(getattr(function, "_opoverload", None), "_schema", None)  # a torch.library.custom_op
    names = {a.name for a in schema.arguments} if schema is not None else set(inspect.signature(function).parameters)
    for spellings in ({"causal", "is_causal"}, {"window_size", "window_size_left"}, {"softmax_scale"}):
        if names.isdisjoint(spellings):
            raise ImportError(f"FlashAttention: expected {getattr(function, '__name__', function)} to take one of "
                              f"{sorted(spellings)}, got {sorted(names)}; this version's interface is not known")
    return {name: value for name, value in arguments.items() if name in names}


def _common(call: FlashCall) -> dict[str, Any]:
    left, right = call.window_size
    arguments: dict[str, Any] = {
        "softmax_scale": call.softmax_scale, "causal": call.causal, "is_causal": call.causal,
        "window_size": (left, right), "window_size_left": left, "window_size_right": right, "softcap": 0.0,
    }
    if call.cu_seqlens is not None:
        arguments |= {"cu_seqlens_q": call.cu_seqlens, "cu_seqlens_k": call.cu_seqlens,
                      "max_seqlen_q": call.max_seqlen, "max_seqlen_k": call.max_seqlen}
    return arguments


class FlashAttention2:
    """The ``flash_attn`` package, 2.6 and later."""

    name = "flash_attn 2"
    dropout_and_alibi = True

    def __init__(self, interface: ModuleType | None = None) -> None:
        """Raises ImportError when the package is absent or its interface is not FlashAttention 2's."""
        self._interface = interface or importlib.import_module("flash_attn.flash_attn_interface")
        for needed in ("_flash_attn_forward", "_flash_attn_backward"):
            if not hasattr(self._interface, needed):
                raise ImportError(f"flash_attn: expected {needed} in flash_attn.flash_attn_interface, got none")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: FlashCall) -> tuple[Tensor, Tensor, Tensor | None]:
        varlen = "varlen_" if call.cu_seqlens is not None else ""
        function = getattr(self._interface, f"_flash_attn_{varlen}forward")
        # 4 results from 2.7 on, 8 before; out is always the first, (lse, mask, rng_state) the last three
        results = function(**_bind(function, _common(call) | {
            "q": q, "k": k, "v": v, "dropout_p": call.dropout_p, "alibi_slopes": call.alibi_slopes,
            "return_softmax": False}))
        return results[0], results[-3], results[-1]

    def backward(self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: FlashCall,
                 rng_state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        varlen = "varlen_" if call.cu_seqlens is not None else ""
        function = getattr(self._interface, f"_flash_attn_{varlen}backward")
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        function(**_bind(function, _common(call) | {
            "dout": do, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, "dq": dq, "dk": dk, "dv": dv,
            "dropout_p": call.dropout_p, "alibi_slopes": call.alibi_slopes, "deterministic": call.deterministic,
            "rng_state": rng_state}))
        return dq, dk, dv


class FlashAttention3:
    """FlashAttention-3, a top-level ``flash_attn_interface`` or one inside ``flash_attn_3``."""

    name = "FlashAttention-3"
    dropout_and_alibi = False

    def __init__(self, interface: ModuleType | None = None) -> None:
        """Raises ImportError when the package is absent or its interface is not FlashAttention-3's."""
        self.interface = interface or self._find()
        for needed in ("flash_attn_func", "_flash_attn_backward"):
            if not hasattr(self.interface, needed):
                raise ImportError(f"FlashAttention-3: expected {needed} in {self.interface.__name__}, got none")

    @property
    def has_backward(self) -> bool:
        """Whether the backward kernels are in this build, as far as its configuration says."""
        try:
            flags = importlib.import_module("flash_attn_config").CONFIG["build_flags"]
        except (ImportError, AttributeError, KeyError):
            return True
        return not flags.get("FLASHATTENTION_DISABLE_BACKWARD", False)

    @staticmethod
    def _find() -> ModuleType:
        try:
            return importlib.import_module("flash_attn_interface")
        except ModuleNotFoundError as error:
            if error.name != "flash_attn_interface":
                raise
            return importlib.import_module("flash_attn_3.flash_attn_interface")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: FlashCall) -> tuple[Tensor, Tensor, Tensor | None]:
        function = (self.interface.flash_attn_func if call.cu_seqlens is None
                    else self.interface.flash_attn_varlen_func)
        # old versions return (out, lse) always, newer ones on request
        out, lse = function(**_bind(function, _common(call) | {"q": q, "k": k, "v": v, "return_attn_probs": True}))[:2]
        return out, lse, None

    def backward(self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: FlashCall,
                 rng_state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        function = self.interface._flash_attn_backward
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        if call.cu_seqlens is None:
            absent = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))
        else:
            absent = {}
        absent |= dict.fromkeys(("sequed_q", "sequed_k", "seqused_q", "seqused_k"))
        function(**_bind(function, absent | _common(call) | {
            "dout": do, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, "dq": dq, "dk": dk, "dv": dv,
            "deterministic": call.deterministic}))
        return dq, dk, dv


def _rows(x: Tensor) -> Tensor:
    """(..., heads, rows) as a factor on (..., rows, heads, head_dim)."""
    return x.transpose(-1, -2).unsqueeze(-1)


def apply_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Turns sink-free attention into attention with a sink.

    Args:
        out: (batch, seqlen, heads, head_dim) or (total, heads, head_dim), sink-free.
        lse: (batch, heads, seqlen) or (heads, total), sink-free and natural; plus infinity (FlashAttention's way) or
            minus infinity for a row that sees no key.
        sink: (heads,), minus infinity = no sink for that head.

    Returns:
        The output in ``out``'s dtype and lse' = logaddexp(lse, sink) in float32 (float64 for float64 lse). lse' is plus
        infinity where a row has neither key nor sink, so that exp(x - lse') is 0 there.
    """
    infinity = float("inf")
    column = sink.to(lse.dtype)[:, None]
    lse = torch.where(lse == infinity, -infinity, lse)
    with_sink = torch.logaddexp(lse, column)
    with_sink = torch.where(with_sink == -infinity, infinity, with_sink)
    return (out * _rows(torch.exp(lse - with_sink))).to(out.dtype), with_sink


def sink_gradient(out: Tensor, do: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """dsink (heads,) in lse's dtype: - sum over batch and rows of exp(sink - lse) * (out . do).

    Args:
        out: output with the sink, (batch, seqlen, heads, head_dim) or (total, heads, head_dim).
        do: its gradient, same shape.
        lse: lse with the sink, (batch, heads, seqlen) or (heads, total).
        sink: (heads,).
    """
    delta = (out.to(lse.dtype) * do.to(lse.dtype)).sum(-1).transpose(-1, -2)
    share = torch.exp(sink.to(lse.dtype)[:, None] - lse)
    return -(share * delta).sum(-1) if lse.dim() == 2 else -(share * delta).sum((0, -1))


class _SinkOnTop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor, flash: FlashAttention,
                call: FlashCall) -> Tensor:
        out, lse, rng_state = flash.forward(q, k, v, call)
        out, lse = apply_sink(out, lse, sink.reshape(-1))
        ctx.save_for_backward(q, k, v, sink, out, lse, rng_state)
        ctx.flash, ctx.call = flash, call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, out, lse, rng_state = ctx.saved_tensors
        dq = dk = dv = dsink = None
        if any(ctx.needs_input_grad[:3]):
            do = do if do.stride(-1) == 1 else do.contiguous()
            dq, dk, dv = ctx.flash.backward(do, q, k, v, out, lse, ctx.call, rng_state)
        if ctx.needs_input_grad[3]:
            dsink = sink_gradient(out, do, lse, sink.reshape(-1)).to(sink.dtype).reshape(sink.shape)
        return dq, dk, dv, dsink, None, None


def _load(*, needs_backward: bool) -> FlashAttention | ModuleType:
    """FlashAttention 2, else 3, else the module of FlashAttention-4."""
    reasons = []
    for load in (FlashAttention2, FlashAttention3, lambda: importlib.import_module("flash_attn.cute")):
        try:
            flash = cast("FlashAttention | ModuleType", load())
            if needs_backward and isinstance(flash, FlashAttention3) and not flash.has_backward:
                reasons.append("this FlashAttention-3 was built without its backward")
                continue
            return flash
        except (ImportError, OSError, RuntimeError) as error:  # a wheel for another torch or CUDA fails in many ways
            reasons.append(str(error))
    raise ImportError(f"flash_attn_with_sink_func: no FlashAttention found ({'; '.join(reasons)}); {_INSTALL}")


def _check_sink(sink: Any, q: Tensor) -> None:
    if not isinstance(sink, Tensor):
        raise TypeError(f"sink: expected a tensor, got {type(sink).__name__}")
    if not sink.is_floating_point():
        raise TypeError(f"sink: expected a floating-point dtype, got {sink.dtype}")
    if sink.numel() != q.shape[2]:
        raise ValueError(f"sink: expected {q.shape[2]} elements, one logit per query head, got shape "
                         f"{tuple(sink.shape)}")
    if sink.device != q.device:
        raise ValueError(f"sink: expected q's device {q.device}, got {sink.device}")


def _is_number(x: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(x, kinds) and not isinstance(x, bool)


def _check_options(q: Tensor, k: Tensor, v: Tensor, dropout_p: Any, window_size: Any, alibi_slopes: Any) -> None:
    if v.shape != k.shape:
        raise ValueError(f"v: expected k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if not _is_number(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: expected a float, got {dropout_p!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")
    if not isinstance(window_size, (tuple, list)) or not all(_is_number(side, int) for side in window_size):
        raise TypeError(f"window_size: expected a pair of ints (left, right), got {window_size!r}")
    if len(window_size) != 2 or min(window_size) < -1:
        raise ValueError(f"window_size: expected (left, right), each -1 or more, got {window_size}")
    if alibi_slopes is None:
        return
    if not isinstance(alibi_slopes, Tensor):
        raise TypeError(f"alibi_slopes: expected a tensor or None, got {type(alibi_slopes).__name__}")
    if alibi_slopes.dtype != torch.float32:
        raise TypeError(f"alibi_slopes: expected float32, got {alibi_slopes.dtype}")
    if alibi_slopes.shape not in ((q.shape[2],), (q.shape[0], q.shape[2])):
        raise ValueError(f"alibi_slopes: expected shape ({q.shape[2]},) or {(q.shape[0], q.shape[2])}, got "
                         f"{tuple(alibi_slopes.shape)}")
    if alibi_slopes.device != q.device:
        raise ValueError(f"alibi_slopes: expected q's device {q.device}, got {alibi_slopes.device}")


def flash_attn_with_sink_func(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor:
    """Attention with a sink computed by an installed FlashAttention: ``flash_attn`` 2, else FlashAttention-3, else -4.

    Gradients flow to q, k, v and sink; they are exact and take one FlashAttention backward.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), float16 or bfloat16; head_dim a multiple of 8.
        k: (batch, seqlen_k, heads_kv, head_dim); heads_q is a multiple of heads_kv.
        v: like k, of the same shape.
        sink: one logit per query head, any shape with heads_q elements, any floating dtype; minus infinity = none.
        dropout_p: probability of dropping a softmax weight; other than 0 needs flash_attn 2.
        softmax_scale: factor on the scores, default head_dim ** -0.5.
        causal: causal mask aligned bottom-right.
        window_size: visible keys left and right of the diagonal, the diagonal itself not counted; -1 = unlimited.
        alibi_slopes: float32 (heads_q,) or (batch, heads_q); needs flash_attn 2.
        deterministic: ask FlashAttention for its deterministic backward.
        return_attn_probs: must be False; FlashAttention's probabilities know nothing of the sink.

    Returns:
        (batch, seqlen_q, heads_q, head_dim) in q's dtype. A row that sees no key is 0.

    Raises:
        ImportError: no FlashAttention is installed.
        ValueError, TypeError: an argument is wrong, or not supported by the FlashAttention found; the message names
            it, what was expected and what came.
    """
    _checks.check_qkv(q, k, v, varlen=False)
    _check_sink(sink, q)
    _check_options(q, k, v, dropout_p, window_size, alibi_slopes)
    for flag, value in (("causal", causal), ("deterministic", deterministic), ("return_attn_probs", return_attn_probs)):
        if not isinstance(value, bool):
            raise TypeError(f"{flag}: expected a bool, got {value!r}")
    if return_attn_probs:
        raise ValueError("return_attn_probs: expected False, got True; they would leave the sink out")
    scale = _checks.check_scale(softmax_scale, q.shape[-1])
    flash = _load(needs_backward=torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, sink)))
    if (dropout_p or alibi_slopes is not None) and (isinstance(flash, ModuleType) or not flash.dropout_and_alibi):
        name, given = ("dropout_p", dropout_p) if dropout_p else ("alibi_slopes", "a tensor")
        found = "FlashAttention-4" if isinstance(flash, ModuleType) else flash.name
        raise ValueError(f"{name}: {found} has none, only flash_attn 2 does; got {given}")
    left, right = window_size
    if isinstance(flash, ModuleType):  # FlashAttention-4 has sinks of its own
        own = sink if sink.dtype in (torch.float16, torch.bfloat16, torch.float32) else sink.float()
        result = flash.flash_attn_func(
            q, k, v, softmax_scale=scale, causal=causal, learnable_sink=own.reshape(-1), deterministic=deterministic,
            window_size=(None if left < 0 else left, None if right < 0 else right))
        return result[0] if isinstance(result, tuple) else result
    call = FlashCall(scale, causal, (left, right), float(dropout_p), alibi_slopes, deterministic)
    return cast(Tensor, _SinkOnTop.apply(q, k, v, sink, flash, call))
