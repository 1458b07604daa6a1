"""Which tile configuration each kernel of a call uses, and why."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from flash_sink_attn import _checks, api
from flash_sink_attn.config import PORTABLE, Kernel, TileConfig
from flash_sink_attn.dispatch import Decision, explain_kernel, stale

_PASSES: dict[str, tuple[Kernel, ...]] = {
    "fwd": ("fwd",), "bwd": ("bwd_dq", "bwd_dkdv"), "bwd_dq": ("bwd_dq",), "bwd_dkdv": ("bwd_dkdv",),
    "fwd_bwd": PORTABLE,
}


class Explanation(tuple[Decision, ...]):
    """The decisions of a call's kernels, in the order they launch; printing it says them in words."""

    def __str__(self) -> str:
        return "\n".join(_in_words(decision) for decision in self)

    __repr__ = __str__

    def __getitem__(self, which: Any) -> Any:
        """A decision by its kernel's name, or as in any tuple."""
        if isinstance(which, str):
            found = next((decision for decision in self if decision.kernel == which), None)
            if found is None:
                raise KeyError(f"{which!r}: expected one of {[d.kernel for d in self]}")
            return found
        return super().__getitem__(which)


def explain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None, sinks: torch.Tensor | None = None, *args: Any,
    pass_: str = "fwd_bwd", **kwargs: Any,
) -> Explanation:
    """Say which rung of the ladder, and which tuned entry, every kernel of a call takes its configuration from.

    Nothing is launched. The ladder is described in :mod:`flash_sink_attn.dispatch`.

    Args:
        q, k, v, sinks, *args, **kwargs: the arguments of the call, in the same order and by the same names: those of
            ``flash_sink_attn_func`` where q has four dimensions, of ``flash_sink_attn_varlen_func`` (``cu_seqlens``
            fifth) where it has three. ``v`` left out is like ``k``.
        pass_: "fwd", "bwd", "bwd_dq", "bwd_dkdv" or "fwd_bwd" (default): whose kernels.

    Returns:
        A tuple of :class:`flash_sink_attn.dispatch.Decision`, also by kernel name: ``explain(q, k)["fwd"].config``.
        ``print`` shows it in words.

    Raises:
        ValueError, TypeError: as the call would; or ``pass_`` is none of these.
        TunedTableError: a tuned table is corrupt.
    """
    if pass_ not in _PASSES:
        raise ValueError(f"pass_: expected one of {list(_PASSES)}, got {pass_!r}")
    varlen = isinstance(q, torch.Tensor) and q.dim() == 3
    function = api.flash_sink_attn_varlen_func if varlen else api.flash_sink_attn_func
    call = inspect.signature(function).bind(q, k, k if v is None else v, sinks, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    keys, value, window = api._resolve(given["k"], given["v"], given["window"])
    query, keys, value = api._autocast(given["q"], keys, value)
    _checks.check_tensors(query, keys, value, sinks, varlen=varlen)
    _checks.check_window(window)
    _checks.check_scale(given["softmax_scale"], query.shape[-1])
    if varlen:
        _checks.check_packed(query, keys, *(given[name] for name in (
            "cu_seqlens", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")))
    config = _checks.as_attn_config(given["config"])
    if config is not None:
        _checks.check_config(config, query, keys, value)
    shape = api._shape_key(query, keys, value, api._effective_window(window, keys, varlen), varlen,
                           given.get("max_seqlen_q") or query.shape[0], given.get("max_seqlen_k") or keys.shape[0])
    return Explanation(explain_kernel(kernel, shape, query.device, config) for kernel in _PASSES[pass_])


def _in_words(decision: Decision) -> str:
    lines = [f"{decision.kernel}: {decision.source}: {_tile(decision.config)}", f"  {decision.reason}"]
    entry, table = decision.entry, decision.table
    if entry is not None and table is not None:
        untuned = "" if entry.default_ms is None else f", the heuristic {entry.default_ms:.4g} ms"
        lines.append(f"  entry: {entry.case}, {entry.latency_ms:.4g} ms as {entry.measured_as}{untuned}, "
                     f"run {entry.run} of {table.path or 'a table in memory'}")
        if difference := stale(table, entry):
            lines.append(f"  measured with other software: {difference}")
    return "\n".join(lines)


def _tile(c: TileConfig) -> str:
    extras = [f"{name}={getattr(c, name)}" for name in ("PACK_GQA", "SPLIT_LOOPS", "maxnreg", "TMA", "REGISTER_A")]
    return f"{c.BLOCK_M}x{c.BLOCK_N} num_warps={c.num_warps} num_stages={c.num_stages} {' '.join(extras)}"
