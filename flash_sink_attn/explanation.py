"""Which implementation and which tile configuration each kernel of a call uses, and why."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from flash_sink_attn import _checks, api
from flash_sink_attn.calls import call_for
from flash_sink_attn.config import AnyConfig, Kernel, Pass
from flash_sink_attn.dispatch import Decision, stale
from flash_sink_attn.selection import Selection

_PASSES: dict[str, tuple[Pass, ...]] = {
    "fwd": ("fwd",), "bwd": ("bwd",), "bwd_dq": ("bwd",), "bwd_dkdv": ("bwd",), "fwd_bwd": ("fwd", "bwd"),
}


class Explanation(tuple[Decision, ...]):
    """The decisions of a call's kernels, in the order they launch; printing it says them in words.

    Attributes:
        selections: of each pass, which implementation was chosen, why, and what the other one would use.
    """

    selections: tuple[Selection, ...]

    @classmethod
    def of(cls, selections: tuple[Selection, ...], only: Kernel | None = None) -> Explanation:
        """The decisions of these passes, or that of one kernel."""
        found = cls(d for s in selections for d in s.decisions if only is None or d.kernel == only)
        found.selections = selections
        return found

    def __str__(self) -> str:
        return "\n".join(_pass_in_words(selection, self) for selection in self.selections)

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
    """Say which implementation a call uses, and from which rung of the ladder, and which tuned entry, every one of its
    kernels takes its configuration.

    Nothing is launched. How an implementation is chosen is described in :mod:`flash_sink_attn.selection`, the ladder in
    :mod:`flash_sink_attn.dispatch`.

    Args:
        q, k, v, sinks, *args, **kwargs: the arguments of the call, in the same order and by the same names: those of
            ``flash_sink_attn_func`` where q has four dimensions, of ``flash_sink_attn_varlen_func`` (``cu_seqlens``
            fifth) where it has three. ``v`` left out is like ``k``.
        pass_: "fwd", "bwd", "bwd_dq", "bwd_dkdv" or "fwd_bwd" (default): whose kernels.

    Returns:
        A tuple of :class:`flash_sink_attn.dispatch.Decision`, also by kernel name: ``explain(q, k)["fwd"].config``.
        ``print`` shows it in words, with the implementation that was not chosen.

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
    config = _checks.as_attn_config(given["config"])
    found = call_for(query, keys, value, sinks, varlen, given.get("cu_seqlens"), given.get("cu_seqlens_k"),
                     given.get("max_seqlen_q"), given.get("max_seqlen_k"), window, given["softmax_scale"], config,
                     given["impl"], given["deterministic"])
    selections = tuple(found.select(name, {"q": query, "k": keys, "v": value}) for name in _PASSES[pass_])
    return Explanation.of(selections, pass_ if pass_ in ("bwd_dq", "bwd_dkdv") else None)  # type: ignore[arg-type]


def _pass_in_words(selection: Selection, shown: Explanation) -> str:
    lines = [f"{selection.pass_}: impl={selection.impl}: {selection.reason}",
             *(_in_words(d) for d in selection.decisions if d in shown)]
    if selection.impl == "triton" and selection.problem is not None:
        lines.append(f"  not hopper: {selection.problem}")
    else:
        lines += [f"  not {d.kernel}: {d.source}: {_tile(d.config)}{_time(d)}" for d in selection.others]
    return "\n".join(lines)


def _time(decision: Decision) -> str:
    entry = decision.entry
    return "" if entry is None else f", {entry.latency_ms:.4g} ms as {entry.measured_as} at {entry.case}"


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


def _tile(config: AnyConfig) -> str:
    fields = config.to_dict()
    tile = f"{fields.pop('BLOCK_M')}x{fields.pop('BLOCK_N')}"
    return f"{tile} num_warps={config.num_warps} " + " ".join(
        f"{name}={value}" for name, value in fields.items() if name != "num_warps")
