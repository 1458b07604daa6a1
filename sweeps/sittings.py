"""The commands that made a run, in words: how long each took, how busy the GPU was, where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Sitting = Mapping[str, Any]


def sitting_lines(sittings: Sequence[Sitting]) -> list[str]:
    """One sentence or two for each sitting, see ``sweeps.runner.RunSummary.sitting``; [] for a run without any."""
    return [_line(i, s, len(sittings)) for i, s in enumerate(sittings, 1)]


def _line(number: int, sitting: Sitting, of: int) -> str:
    what = [f"{_seconds(sitting['elapsed_s'])} for {sitting.get('new_rows', 0)} trials"]
    if sitting.get("new_finals"):
        what[0] += f" and {sitting['new_finals']} finals"
    if (busy := sitting.get("gpu_busy")) is not None:
        what.append(f"the GPU busy {100 * busy:.0f}% of it")
    if (cached := sitting.get("cached_share")) is not None:
        what.append("nothing built before (cold)" if cached == 0 else
                    f"{100 * cached:.0f}% of our configurations found built")
    if sitting.get("stopped"):
        what.append(f"stopped: {sitting['stopped']}")
    name = f"Sitting {number} of {of}: " if of > 1 else "The run took "
    stages = {k: v for k, v in (sitting.get("seconds") or {}).items() if v}
    ordered = sorted(stages.items(), key=lambda item: -item[1])
    spent = f" The workers' seconds: {', '.join(f'{k} {v:.0f}' for k, v in ordered)}." if ordered else ""
    return name + ", ".join(what) + "." + spent


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"
