"""Selection to tuned table: what the kernel package reads to choose its tiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flash_sink_attn.tuned_table as tuned_table
from flash_sink_attn.config import Kernel, TileConfig
from flash_sink_attn.devices import gpu_slug
from flash_sink_attn.tuned_table import Entry, ShapeKey, TunedTable
from sweeps.cases import Case
from sweeps.ours import shape_key
from sweeps.select import CaseResult, Selection, select
from sweeps.store import read_environment, read_rows

IMPLEMENTATION = "triton"   # whose configurations the table holds
BACKWARD: tuple[Kernel, ...] = ("bwd_dq", "bwd_dkdv")
_PROVENANCE = ("sm_count", "driver", "cuda", "torch", "triton", "kernel_source", "timing_mode", "git_commit")


def default_path(slug: str) -> Path:
    """The table that comes with the package, ``flash_sink_attn/tuned/<slug>.json``."""
    return Path(tuned_table.__file__).resolve().parent / "tuned" / f"{slug}.json"


def export(run_dir: Path, to: Path | None = None, *, allow_interpreter: bool = False) -> Path:
    """Write the winners of a run into the tuned table of its card.

    An existing table is merged with: see :func:`merge` for which entry stays.

    Args:
        run_dir: a run directory.
        to: the table file; default the package's for the card the run was made on.
        allow_interpreter: also export a run of Triton's interpreter, whose times mean nothing.

    Returns:
        The file written.

    Raises:
        ValueError: an interpreter run, a run without a timed winner of ours, or ``to`` is another card's table.
        TunedTableError: the existing table is corrupt.
        StoreError: ``run_dir`` is not a run.
    """
    run_dir = Path(run_dir)
    env = read_environment(run_dir)
    gpu = env["gpu"]
    if gpu == "cpu" and not allow_interpreter:
        raise ValueError(f"run: {run_dir} was made in Triton's interpreter, and its times say nothing about a GPU; "
                         "expected a run made on one")
    slug, run = gpu_slug(gpu), run_dir.resolve().name
    # a run resumed on another card holds rows that are not this card's
    entries = table_entries(select(read_rows(run_dir)).on(gpu), run)
    if not entries:
        raise ValueError(f"run: {run_dir} has no timed winner of {IMPLEMENTATION!r}, so there is nothing to export")
    provenance = {"date": env.get("started"), "gpu_name": gpu, **{name: env.get(name) for name in _PROVENANCE}}
    path = default_path(slug) if to is None else Path(to)
    new = TunedTable.build(slug, entries, {run: provenance}, str(path))
    (merge(TunedTable.load(path), new) if path.exists() else new).save(path)
    return path


def table_entries(selection: Selection, run: str) -> list[Entry]:
    """One entry per kernel and key.

    The backward kernels get the pair that won the whole backward, and each its own winner only where no whole backward
    was timed. A case that the untuned heuristic won without a name to its tiles has no entry: the heuristic serves it.
    Of cases that share a key those with sinks go first, then those with more tokens, then the faster.
    """
    found: dict[tuple[str, ShapeKey], Entry] = {}
    ordered = sorted((r for r in selection.results if r.case.pass_ in ("fwd", "bwd", *BACKWARD)),
                     key=lambda r: (not r.case.sinks, r.case.pass_ in BACKWARD, -_tokens(r.case), _own_time(r)))
    for result in ordered:
        for entry in _entries_of(result, run):
            found.setdefault((entry.kernel, entry.key), entry)
    return list(found.values())


def _tokens(case: Case) -> int:
    return sum(case.seqlens) if case.varlen else case.batch * case.seqlen_q


def _own_time(result: CaseResult) -> float:
    return min((m.latency_ms for m in result.ranked if m.impl == IMPLEMENTATION), default=float("inf"))


def _entries_of(result: CaseResult, run: str) -> Iterable[Entry]:
    best = next((m for m in result.ranked if m.impl == IMPLEMENTATION), None)
    if best is None or not best.config:
        return
    case, default = result.case, result.default
    kernels: Mapping[Any, Any] = (
        {k: best.config[k] for k in BACKWARD if k in best.config} if case.pass_ == "bwd" else {case.pass_: best.config})
    for kernel, config in kernels.items():
        yield Entry(kernel=kernel, key=shape_key(case), config=TileConfig.from_dict(config), latency_ms=best.latency_ms,
                    measured_as=case.pass_, default_ms=default.latency_ms if default else None, case=case.id, run=run)


def merge(old: TunedTable, new: TunedTable) -> TunedTable:
    """Both tables' entries; where both have one for a kernel and key, the faster proven one.

    Times prove something only about each other when they are of the same run's kernels: an entry measured on other
    kernel sources or another Triton, or on another varlen batch of the same key, gives way to the newer run. So does an
    entry of the same run (it was exported again), and a backward kernel timed alone to a pair timed as a whole.

    Raises:
        ValueError: the tables are of different cards.
    """
    if old.gpu != new.gpu:
        raise ValueError(f"to: {old.path} is the tuned table of {old.gpu!r}, expected one of {new.gpu!r}: entries are "
                         "never shared between cards")
    runs = {**old.runs, **new.runs}
    kept = dict(old.entries)
    for at, entry in new.entries.items():
        if at not in kept or _replaces(entry, kept[at], runs):
            kept[at] = entry
    return TunedTable.build(new.gpu, kept.values(), runs, new.path)


def _replaces(new: Entry, old: Entry, runs: Mapping[str, Mapping[str, Any]]) -> bool:
    if new.run == old.run:
        return True
    if new.measured_as != old.measured_as:
        return new.measured_as == "bwd"
    ours, theirs = runs[new.run], runs[old.run]
    same_kernels = all(ours.get(name) == theirs.get(name) for name in ("kernel_source", "triton", "timing_mode"))
    if not same_kernels or (new.key.varlen and new.case != old.case):
        return str(ours.get("date") or "") > str(theirs.get("date") or "")
    return new.latency_ms < old.latency_ms
