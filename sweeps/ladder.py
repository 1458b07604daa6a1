"""How good the dispatcher's nearest rung is, judged by leave-one-out on the rows of a run.

For each case the tuned table is made without it; what the ladder then chooses is looked up among the times that were
measured for the case. The rule of :mod:`flash_sink_attn.nearest` was derived from these figures.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from flash_sink_attn.config import IMPLS, KERNELS, AnyConfig, Kernel
from flash_sink_attn.devices import gpu_slug
from flash_sink_attn.dispatch import Decision, decide
from flash_sink_attn.heuristic import heuristic
from flash_sink_attn.nearest import FARTHEST, distance, family
from flash_sink_attn.tuned_table import Entry, ShapeKey, TunedTable
from flash_sink_attn.validity import limits_of
from sweeps.cases import Case
from sweeps.export import table_entries
from sweeps.ours import kernel_of
from sweeps.regret import Pick, call_key, case_table, csv_text, picks, summary_table, times_of
from sweeps.select import Selection, select_run
from sweeps.spec import DEFAULT_ARCH
from sweeps.store import read_environment

_BINS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, float("inf"))
_FIELDS = ("kernel", "head dim", "value head dim", "window or none", "fixed or packed")


def leave_one_out(selection: Selection, gpu: str, arch: int) -> list[Pick]:
    """What the ladder would choose for each case of a run if the run had not had that case.

    Args:
        selection: of a run, one card.
        gpu: the card's slug.
        arch: its compute capability.
    """
    entries, limits = table_entries(selection, "run"), limits_of(arch)

    def choose(kernel: Kernel, case: Case, key: ShapeKey) -> Decision:
        others = [e for e in entries if e.key != key]
        return decide(kernel, key, limits, TunedTable.build(gpu, others, {"run": {}}, arch=arch))

    return picks(selection, choose, limits)


def distance_table(selection: Selection, arch: int) -> str:
    """Markdown: every ordered pair of cases of a family, by distance: the one's best tile on the other, and the
    heuristic's there."""
    pairs = _pairs(selection, arch)
    lines = ["| distance | pairs | mean | worst | heuristic there: mean | worst |", "|---|---:|---:|---:|---:|---:|"]
    low = 0.0
    for high in _BINS:
        here = [(r, h) for differs, far, r, h in pairs if not differs and low <= far < high]
        plain = [h for _, h in here if h is not None]
        if here:
            lines.append(f"| {low:g} to {high:g} | {len(here)} | {_two([r for r, _ in here])} | {_two(plain)} |")
        low = high
    return "\n".join(lines)


def family_table(selection: Selection, arch: int) -> str:
    """Markdown: what it costs to take an entry from another family, for each field a family consists of; pairs at most
    FARTHEST apart."""
    by_field: dict[str, list[float]] = defaultdict(list)
    for differs, far, regret, _ in _pairs(selection, arch):
        if far <= FARTHEST and len(differs) <= 2:
            by_field[" and ".join(differs) or "nothing"].append(regret)
    lines = ["| what differs | pairs | mean | worst |", "|---|---:|---:|---:|"]
    ordered = sorted(by_field.items(), key=lambda item: statistics.fmean(item[1]))
    return "\n".join(lines + [f"| {name} | {len(regrets)} | {_two(regrets)} |" for name, regrets in ordered])


def _two(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} | {max(values):.3f}" if values else "- | -"


def _pairs(selection: Selection, arch: int) -> list[tuple[tuple[str, ...], float, float, float | None]]:
    """(fields of the family that differ, distance, regret of the other's winner, regret of the heuristic)."""
    found, limits = [], limits_of(arch)
    timed: dict[Kernel, list[tuple[ShapeKey, dict[AnyConfig, float], Entry]]] = {kernel: [] for kernel in KERNELS}
    entries = {(e.kernel, e.key): e for e in table_entries(selection, "run", 0.0)}
    for result in selection.results:
        key = call_key(result.case)
        for impl in IMPLS:
            kernel = kernel_of(impl, result.case.pass_)
            if kernel is not None and (entry := entries.get((kernel, key))) is not None:
                timed[kernel].append((key, times_of(result, kernel), entry))
    for kernel, cases in timed.items():
        for key, times, entry in cases:
            best = min(times.values())
            plain = times.get(heuristic(kernel, key, limits))
            for _, _, other in cases:
                ms = times.get(other.config)
                if other is entry or ms is None:
                    continue
                differs = tuple(name for name, a, b in zip(_FIELDS, family(kernel, key), family(kernel, other.key),
                                                           strict=True) if a != b)
                found.append((differs, distance(kernel, key, other.key), ms / best,
                              None if plain is None else plain / best))
    return found


def ladder_report(run_dir: Path) -> str:
    """Writes ``ladder.md`` and ``ladder.csv`` into a run directory, and returns the Markdown's tables.

    Raises:
        StoreError: no run there. ValueError: no timed case of ours in it.
    """
    env = read_environment(run_dir)
    selection, arch = select_run(run_dir).on(env["gpu"]), env.get("arch") or DEFAULT_ARCH
    found = leave_one_out(selection, gpu_slug(env["gpu"]), arch)
    if not found:
        raise ValueError(f"run: {run_dir} has no timed case of a single kernel of ours")
    text = "\n\n".join([
        f"Leave-one-out on {run_dir.resolve().name} ({env['gpu']}): time of what the ladder chooses without the case's "
        "own entry, over the best measured. The heuristic was written with H100 runs in view, so beside an H100 run of "
        "the same shapes it looks better than it is.", summary_table(found),
        "The other's tile on a case of the same family, by distance:", distance_table(selection, arch),
        f"The other's tile on a case of another family, at most {FARTHEST:g} away:", family_table(selection, arch)])
    (run_dir / "ladder.md").write_text(f"# The ladder\n\n{text}\n\n{case_table(found)}\n")
    (run_dir / "ladder.csv").write_text(csv_text([p.row() for p in found]))
    return text
