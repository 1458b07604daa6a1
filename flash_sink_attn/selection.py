"""Which implementation a call uses: the portable Triton kernels or the Hopper ones, each with its own configuration.

1. What the caller says: ``impl``, or a ``config`` that is for one implementation only.
2. What is measured: at the tuned shapes nearest to the call's, one of each, whichever was faster there, in the
   geometric mean; at the call's own shape alone where that is tuned. Where only one of the two was measured at the
   nearest, that one. A shape of another kind, or where one of them was measured with what is not for the call's kind
   (:mod:`flash_sink_attn.regimes`), says nothing, and the next one is asked.
3. The heuristic: :func:`flash_sink_attn.heuristic.prefers_hopper`.

Where the Hopper kernels are wanted by 2 or 3 and cannot run, the portable ones do, and one line in the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from math import log
from typing import NamedTuple

import torch

from flash_sink_attn import dispatch
from flash_sink_attn.config import IMPLS, KERNELS_OF, AttnConfig, Impl, Pass
from flash_sink_attn.dispatch import Decision
from flash_sink_attn.heuristic import prefers_hopper
from flash_sink_attn.hopper import support
from flash_sink_attn.options import Options
from flash_sink_attn.regimes import compares, lends
from flash_sink_attn.tuned_table import Entry, ShapeKey, TunedTable
from flash_sink_attn.validity import Limits, limits_of, reject_reason

logger = logging.getLogger("flash_sink_attn")


class Selection(NamedTuple):
    """What a pass of a call uses.

    Attributes:
        pass_: "fwd" or "bwd".
        impl: the implementation.
        decisions: the configurations of its kernels, in the order they launch.
        reason: why this implementation, in words.
        others: what the other implementation's kernels would use.
        problem: why the Hopper kernels cannot do this call, None = they can.
    """

    pass_: Pass
    impl: Impl
    decisions: tuple[Decision, ...]
    reason: str
    others: tuple[Decision, ...]
    problem: str | None


def asked_for(pass_: Pass, options: Options) -> tuple[Impl | None, str]:
    """The implementation that the caller's options leave no choice about, None = open; and by which of them.

    Raises:
        ValueError: ``impl`` says one thing and ``config`` another.
    """
    config = options.config or AttnConfig()
    given: list[Impl] = [impl for impl, of in KERNELS_OF.items() if any(getattr(config, k) for k in of[pass_])]
    if options.impl is None:
        return (given[0], f"the call's config is for impl={given[0]!r}") if len(given) == 1 else (None, "")
    if given and options.impl not in given:
        kernel = next(k for k in KERNELS_OF[given[0]][pass_] if getattr(config, k))
        raise ValueError(f"config: {kernel} is a kernel of impl={given[0]!r}, and impl={options.impl!r} is asked for")
    return options.impl, f"the call's impl={options.impl!r}"


def problem_of(
    pass_: Pass, key: ShapeKey, device: torch.device, options: Options, tensors: dict[str, torch.Tensor]
) -> str | None:
    """Why the Hopper kernels cannot do this call, None = they can."""
    problem = support.device_problem(device)
    if problem is None:
        limits = limits_of(dispatch.device_info(device).arch)
        problem = _config_problem(_decisions("hopper", pass_, key, device, options), key, limits,
                                  bool(options.deterministic))
    return problem or support.tensors_problem(**tensors)


def _config_problem(
    decisions: tuple[Decision, ...], key: ShapeKey, limits: Limits, deterministic: bool
) -> str | None:
    """Why these configurations of the Hopper kernels cannot do a call of this shape, None = they can."""
    for decision in decisions:
        reason = reject_reason(decision.config, decision.kernel, head_dim=key.head_dim, head_dim_v=key.head_dim_v,
                               group=key.heads_q // key.heads_kv, limits=limits)
        if reason is not None:
            return reason
        if deterministic and not getattr(decision.config, "reproducible", True):
            return f"{decision.config} gives other bits each time, and deterministic=True is asked for"
    return None


def _decisions(
    impl: Impl, pass_: Pass, key: ShapeKey, device: torch.device, options: Options
) -> tuple[Decision, ...]:
    return tuple(dispatch.explain_kernel(kernel, key, device, options.config, bool(options.deterministic))
                 for kernel in KERNELS_OF[impl][pass_])


def select(
    pass_: Pass, key: ShapeKey, device: torch.device, options: Options, tensors: dict[str, torch.Tensor]
) -> Selection:
    """What a pass of a call of shape ``key`` uses.

    Args:
        tensors: those that the Hopper kernels read through the copy engine, by name.

    Raises:
        ValueError: the caller asks for the Hopper kernels, and they cannot do this call; the message says why.
        TunedTableError: a tuned table is corrupt.
    """
    decisions = {impl: _decisions(impl, pass_, key, device, options) for impl in KERNELS_OF}
    forced, reason = asked_for(pass_, options)
    problem = problem_of(pass_, key, device, options, tensors)
    impl: Impl = forced or "triton"
    if forced is None:
        info = dispatch.device_info(device)
        if info.slug is None:
            impl, reason = "triton", "without a GPU there are only the portable kernels"
        else:
            impl, reason = wanted(pass_, key, limits_of(info.arch), decisions["triton"], decisions["hopper"],
                                  bool(options.deterministic))
        if impl == "hopper" and problem is not None:
            _log_fallback(pass_, problem)
            impl, reason = "triton", _instead(reason, problem)
    elif forced == "hopper" and problem is not None:
        asked = "impl: 'hopper'" if options.impl else f"config: {KERNELS_OF['hopper'][pass_][0]}"
        raise ValueError(f"{asked} was asked for, and the Hopper kernels cannot do this call: {problem}")
    other: Impl = "hopper" if impl == "triton" else "triton"
    return Selection(pass_, impl, decisions[impl], reason, decisions[other], problem)


def decide(
    pass_: Pass, key: ShapeKey, limits: Limits, own: TunedTable | None, others: Iterable[TunedTable] = (),
    deterministic: bool = False,
) -> Selection:
    """What a pass of a call that leaves everything open uses, as a function of the tables alone.

    Neither logs nor reads anything; the Hopper kernels are taken to run wherever the validity rule lets them.

    Args:
        pass_: "fwd" or "bwd".
        key: the call's shape.
        limits: of the GPU the call runs on.
        own: the table of that GPU, None where there is none.
        others: tables of other cards of its architecture, the ones to prefer first.
        deterministic: only configurations that give the same bits each time.
    """
    tables = tuple(others)
    decisions: dict[Impl, tuple[Decision, ...]] = {
        impl: tuple(dispatch.decide(kernel, key, limits, own, tables, deterministic) for kernel in of[pass_])
        for impl, of in KERNELS_OF.items()}
    impl, reason = wanted(pass_, key, limits, decisions["triton"], decisions["hopper"], deterministic)
    problem = _config_problem(decisions["hopper"], key, limits, deterministic)
    if impl == "hopper" and problem is not None:
        impl, reason = "triton", _instead(reason, problem)
    other: Impl = "hopper" if impl == "triton" else "triton"
    return Selection(pass_, impl, decisions[impl], reason, decisions[other], problem)


def _instead(reason: str, problem: str) -> str:
    return f"{reason}, but the Hopper kernels cannot do this call: {problem}"


@cache
def _log_fallback(pass_: Pass, problem: str) -> None:
    logger.warning("the Hopper kernels would be faster in the %s pass, but cannot run: %s; the portable ones are used",
                   {"fwd": "forward", "bwd": "backward"}[pass_], problem)


def wanted(
    pass_: Pass, key: ShapeKey, limits: Limits, portable: tuple[Decision, ...], hopper: tuple[Decision, ...],
    deterministic: bool,
) -> tuple[Impl, str]:
    """Whose kernels are faster on a GPU by all that is known, and why that is thought; a function of what is given."""
    near = [decision for group in (portable, hopper) if (decision := _farthest(group)) is not None]
    if not near:
        prefers = prefers_hopper(pass_, key, limits)
        return "hopper" if prefers else "triton", "the heuristic for shapes that nobody has tuned"
    points: list[tuple[str, float, float]] = []  # of the same table: where, and both times
    table = None
    for nearest in sorted(near, key=lambda d: (d.source == "other card", d.distance or 0.0)):
        assert nearest.entry is not None and nearest.table is not None
        if points and nearest.table is not table:
            break
        at = {impl: _entries_at(nearest, impl, pass_, deterministic) for impl in KERNELS_OF}
        if nearest.entry.key != key and not (compares(pass_, nearest.entry.key, key) and all(
                lends(e, key, deterministic) for of in at.values() for e in of)):
            continue
        if any(at[impl] and any(d.entry is None for d in decisions)
               for impl, decisions in zip(IMPLS, (portable, hopper), strict=True)):
            continue  # measured there with a configuration that this call cannot use
        ms = {impl: _time_of(at[impl], impl, pass_, decisions)
              for impl, decisions in zip(IMPLS, (portable, hopper), strict=True)}
        where = f"at {nearest.entry.case} of {nearest.table.gpu}'s table"
        if ms["hopper"] is None or ms["triton"] is None:
            if not points:
                return "triton" if ms["hopper"] is None else "hopper", f"the only one measured {where}"
            continue
        times = f"{where}: hopper {ms['hopper']:.4g} ms, triton {ms['triton']:.4g} ms"
        table, points = nearest.table, [*points, (times, ms["hopper"], ms["triton"])]
        if nearest.entry.key == key:
            break
    if points:
        # a tie at one shape says little about another: where each implementation has a nearest one, both count
        faster: Impl = "hopper" if sum(log(h / t) for _, h, t in points) < 0 else "triton"
        return faster, "the faster one " + " and ".join(dict.fromkeys(where for where, _, _ in points))
    prefers = prefers_hopper(pass_, key, limits)
    return "hopper" if prefers else "triton", (
        "the heuristic: near this shape the two were compared only with what is not for its kind")


def _farthest(decisions: tuple[Decision, ...]) -> Decision | None:
    """Of the kernels of a pass the one whose tuned entry is the farthest from the call; None where one has none."""
    if any(d.entry is None for d in decisions):
        return None
    return max(decisions, key=lambda d: (d.source == "other card", d.distance or 0.0))


def _entries_at(nearest: Decision, impl: Impl, pass_: Pass, deterministic: bool) -> list[Entry]:
    """The entries of an implementation's kernels at the shape of an entry, as far as its table has them."""
    assert nearest.entry is not None and nearest.table is not None
    entries = [nearest.table.entry(kernel, nearest.entry.key, deterministic) for kernel in KERNELS_OF[impl][pass_]]
    return [entry for entry in entries if entry is not None]


def _time_of(entries: list[Entry], impl: Impl, pass_: Pass, decisions: tuple[Decision, ...]) -> float | None:
    """Time in ms of a pass by an implementation, from its entries at one shape; None where some are missing.

    A backward of two kernels was timed as a whole, or each for itself.
    """
    if any(d.entry is None for d in decisions) or len(entries) < len(KERNELS_OF[impl][pass_]):
        return None  # nothing measured is usable for this call, or not all of it
    whole = next((entry for entry in entries if entry.measured_as == pass_), None)
    return sum(entry.latency_ms for entry in entries) if whole is None else whole.latency_ms
