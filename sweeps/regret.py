"""What a choice of configurations costs: the time of the chosen one over the best one measured, case by case."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from flash_sink_attn.config import CONFIG_CLASS, IMPLS, KERNELS, AnyConfig, Kernel
from flash_sink_attn.dispatch import Decision
from flash_sink_attn.heuristic import heuristic
from flash_sink_attn.kernel_code import impl_of
from flash_sink_attn.tuned_table import ShapeKey
from flash_sink_attn.validity import Limits
from sweeps.cases import Case
from sweeps.measured import config_label
from sweeps.ours import kernel_of, shape_key
from sweeps.select import CaseResult, Selection

_J = TypeVar("_J", bound="Judged")
Choose = Callable[[Kernel, Case, ShapeKey], Decision]


@dataclasses.dataclass(frozen=True)
class Judged:
    """A choice for one case against what was measured for it; times in ms, None where the choice was not measured.

    Attributes:
        case: the case.
        ms: time of what was chosen.
        best_ms, best: time of the fastest that was measured, and what it is in words.
        heuristic_ms: time of what the heuristic alone would choose.
        measured: how many configurations of the case were measured.
    """

    case: Case
    ms: float | None
    best_ms: float
    best: str
    heuristic_ms: float | None
    measured: int

    @property
    def subject(self) -> str:
        """What was chosen for: a kernel or a pass."""
        raise NotImplementedError

    @property
    def rung(self) -> str:
        raise NotImplementedError

    @property
    def distance(self) -> float | None:
        """Of the tuned shape that was followed; None where the heuristic chose."""
        raise NotImplementedError

    @property
    def chosen(self) -> str:
        """The choice in words."""
        raise NotImplementedError

    @property
    def regret(self) -> float | None:
        """Time of the chosen over the best, 1.0 = the best was chosen."""
        return None if self.ms is None else self.ms / self.best_ms

    @property
    def heuristic_regret(self) -> float | None:
        return None if self.heuristic_ms is None else self.heuristic_ms / self.best_ms


@dataclasses.dataclass(frozen=True)
class Pick(Judged):
    """A choice of a configuration for one kernel.

    Attributes:
        decision: what was chosen, by which rung.
    """

    decision: Decision

    @property
    def subject(self) -> str:
        return self.decision.kernel

    @property
    def rung(self) -> str:
        return self.decision.source

    @property
    def distance(self) -> float | None:
        return self.decision.distance

    @property
    def chosen(self) -> str:
        return config_label(self.decision.config.to_dict())

    def row(self) -> dict[str, Any]:
        """A row of the CSV file."""
        d = self.decision
        return {"kernel": d.kernel, "case": self.case.id, "model": self.case.model, "rung": d.source,
                "distance": d.distance, "entry": d.entry.case if d.entry else "", "config": self.chosen,
                "latency_ms": self.ms, "best_config": self.best, "best_ms": self.best_ms,
                "regret": self.regret, "heuristic_ms": self.heuristic_ms, "heuristic_regret": self.heuristic_regret,
                "measured": self.measured, "reason": d.reason}


def call_key(case: Case) -> ShapeKey:
    """The key under which a call of this shape is looked up: a window that hides nothing is none."""
    keys = sum(case.seqlens) if case.varlen else case.seqlen_k
    return shape_key(dataclasses.replace(case, window=None) if case.window and case.window >= keys else case)


def picks(selection: Selection, choose: Choose, limits: Limits) -> list[Pick]:
    """One pick for each case of a single kernel and each implementation of ours that was timed on it."""
    found = []
    for result, impl in itertools.product(selection.results, IMPLS):
        case, kernel = result.case, kernel_of(impl, result.case.pass_)
        times = times_of(result, kernel) if kernel is not None else {}
        if kernel is None or not times:
            continue
        key = call_key(case)
        decision = choose(kernel, case, key)
        best = min(times, key=times.__getitem__)
        found.append(Pick(case, times.get(decision.config), times[best], config_label(best.to_dict()),
                          times.get(heuristic(kernel, key, limits)), len(times), decision))
    return found


def times_of(result: CaseResult, kernel: Kernel) -> dict[AnyConfig, float]:
    """Time in ms of every configuration of a kernel of ours that was measured for a case, fastest first."""
    times: dict[AnyConfig, float] = {}
    for m in sorted(result.ranked, key=lambda m: m.latency_ms):
        if m.impl == impl_of(kernel) and m.config:
            times.setdefault(CONFIG_CLASS[kernel].from_dict(m.config), m.latency_ms)
    return times


def summary_table(found: Sequence[Judged], subjects: Sequence[str] = KERNELS, what: str = "kernel") -> str:
    """Markdown: per subject and for all of them, median and worst regret of the choice and of the plain heuristic.

    Args:
        subjects: in the order of the rows.
        what: they are.
    """
    lines = [f"| {what} | cases | rungs | median | mean | worst | over 3% | over 10% | not measured "
             "| heuristic: median | mean | worst | not measured |",
             "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for name, own in [*((s, [p for p in found if p.subject == s]) for s in subjects), ("all", list(found))]:
        if own:
            regrets = [p.regret for p in own if p.regret is not None]
            plain = [p.heuristic_regret for p in own if p.heuristic_regret is not None]
            rungs = ", ".join(f"{n} {rung}" for rung, n in Counter(p.rung for p in own).most_common())
            over = f"{sum(r > 1.03 for r in regrets)} | {sum(r > 1.10 for r in regrets)}"
            lines.append(f"| {name} | {len(own)} | {rungs} | {_three(regrets)} | {over} | {len(own) - len(regrets)} | "
                         f"{_three(plain)} | {len(own) - len(plain)} |")
    return "\n".join(lines)


def _three(values: Sequence[float]) -> str:
    if not values:
        return "- | - | -"
    return f"{statistics.median(values):.3f} | {statistics.fmean(values):.3f} | {max(values):.3f}"


def costliest_first(found: Iterable[_J]) -> list[_J]:
    """By regret, the ones not measured before all others."""
    return sorted(found, key=lambda p: (p.regret is not None, -(p.regret or 0.0), p.case.id))


def case_table(found: Iterable[Judged]) -> str:
    """Markdown: every choice, the costliest first, the ones not measured before them."""
    lines = ["| case | rung | distance | chosen | ms | best | ms | regret |", "|---|---|---:|---|---:|---|---:|---:|"]
    for p in costliest_first(found):
        far = "" if p.distance is None else f"{p.distance:.2f}"
        ms = "not measured | " if p.ms is None else f"{p.ms:.4g} | "
        lines.append(f"| {p.case.id} | {p.rung} | {far} | {_cell(p.chosen)} | {ms}{_cell(p.best)} | "
                     f"{p.best_ms:.4g} | {'' if p.regret is None else f'{p.regret:.3f}'} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace(" | ", " + ")


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV; an empty cell is a value that does not exist."""
    text = io.StringIO()
    names = [*rows[0]] if rows else ["case"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)
    return text.getvalue()
