"""What packing costs: every varlen case of a run beside the same sequences in calls of a fixed length.

Sequences of one length are one call; a batch of several lengths is compared with the sum of such calls.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from sweeps.cases import Case
from sweeps.measured import Measured
from sweeps.select import CaseResult, Selection
from sweeps.tables import (
    DTYPE_SHORT,
    NONE,
    fastest_of_each,
    impl_order,
    markdown,
    mask_label,
    model_label,
    number,
    sort_key,
    times,
    with_impl,
)

EQUAL, UNEQUAL = 1.03, 1.1      # the limits that docs/kernel.md states: of one length, and of several


@dataclasses.dataclass(frozen=True)
class Packing:
    """One implementation's fastest packed call, and its fastest calls that do the same without packing.

    Attributes:
        result: the varlen case.
        parts: (number of sequences, their length, the fastest call of that batch), longest first.
    """

    result: CaseResult
    packed: Measured
    parts: tuple[tuple[int, int, Measured], ...]

    @property
    def impl(self) -> str:
        return self.packed.impl

    @property
    def fixed_ms(self) -> float:
        return sum(m.latency_ms for _, _, m in self.parts)

    @property
    def ratio(self) -> float:
        """Time of the packed call over that of the others together."""
        return self.packed.latency_ms / self.fixed_ms

    @property
    def interval(self) -> tuple[float, float]:
        """What the 95% intervals of all the medians allow the ratio to be."""
        return (self.packed.low / sum(m.high for _, _, m in self.parts),
                self.packed.high / sum(m.low for _, _, m in self.parts))

    @property
    def limit(self) -> float:
        return EQUAL if len(self.parts) == 1 else UNEQUAL


def fixed_cases(case: Case) -> list[tuple[int, int, Case]]:
    """The calls of a fixed length that do what a varlen case does: (sequences, length, case), longest first."""
    counts = Counter(length for length in case.seqlens if length)
    return [(count, length, dataclasses.replace(case, batch=count, seqlen_q=length, seqlen_k=length, varlen="",
                                                seqlens=()))
            for length, count in sorted(counts.items(), reverse=True)]


def packings(selection: Selection) -> list[Packing]:
    """Of every varlen case and implementation for which the run has all the calls of a fixed length, too."""
    times_of = {r.case: fastest_of_each(r) for r in selection.results}
    found = []
    for result in sorted((r for r in selection.results if r.case.varlen), key=sort_key):
        fixed = [(count, length, times_of.get(case, {})) for count, length, case in fixed_cases(result.case)]
        packed = times_of[result.case]
        for impl in impl_order(packed):
            if all(impl in by_impl for _, _, by_impl in fixed):
                found.append(Packing(result, packed[impl], tuple((n, length, by_impl[impl])
                                                                 for n, length, by_impl in fixed)))
    return found


def packing_markdown(found: Sequence[Packing]) -> str:
    """The limits and how many rows keep them; then a row per case and implementation."""
    if not found:
        return "No varlen case has calls of a fixed length beside it: the run must hold each of its lengths as a batch."
    kept = sum(p.ratio <= p.limit for p in found)
    rows = []
    for p in found:
        c, (low, high) = p.result.case, p.interval
        sequences = " + ".join(f"{n} x {length}" for n, length, _ in p.parts)
        rows.append([model_label(p.result), c.pass_, DTYPE_SHORT[c.dtype], mask_label(c), sequences, p.impl,
                     number(p.packed.latency_ms, 4), " + ".join(number(m.latency_ms, 4) for _, _, m in p.parts),
                     f"{times(p.ratio)} ({low:.3f} to {high:.3f})", "" if p.ratio <= p.limit else "over",
                     with_impl(p.packed), _others(p)])
    head = ["model (heads x dim)", "pass", "dtype", "mask", "sequences", "implementation", "packed, ms", "fixed, ms",
            "packed / fixed", "limit", "packed config", "fixed configs"]
    return (f"{kept} of {len(found)} packed calls take at most {EQUAL:g} of the time of one call of a fixed length, or "
            f"with several lengths {UNEQUAL:g} of the sum of their calls. Device time in ms, cold L2, each with its "
            f"fastest configuration; in brackets what the intervals of the medians allow.\n\n"
            f"{markdown(head, rows, text_columns=6)}")


def _others(p: Packing) -> str:
    """The configurations of the fixed calls that are not the packed one's."""
    others = dict.fromkeys(with_impl(m) for _, _, m in p.parts if m.config != p.packed.config)
    return "; ".join(others) or NONE

