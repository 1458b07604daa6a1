"""Selection to tuned table: what the kernel package reads to choose its tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flash_sink_attn.tuned_table as tuned_table
from flash_sink_attn.config import CONFIG_CLASS, IMPLS, KERNELS_OF, Impl, Kernel, reproducible
from flash_sink_attn.devices import gpu_slug
from flash_sink_attn.kernel_code import CODE_FIELD, impl_of, kernel_code_hash
from flash_sink_attn.nearest import family
from flash_sink_attn.tuned_table import Entry, ShapeKey, TunedTable
from sweeps.cases import Case
from sweeps.cover import smallest_cover
from sweeps.environment import kernel_source_hash
from sweeps.measured import Measured, config_json
from sweeps.ours import kernel_of, shape_key
from sweeps.select import CaseResult, Selection, select_run
from sweeps.store import read_environment

BACKWARD: tuple[Kernel, ...] = KERNELS_OF["triton"]["bwd"]
TOLERANCE = 0.01    # how much slower than the best a configuration may be that stands for several shapes
_PROVENANCE = ("sm_count", "driver", "cuda", "torch", "triton", "kernel_source", *CODE_FIELD.values(), "timing_mode",
               "git_commit")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export did.

    Attributes:
        path: the file written.
        entries: how many entries this run gave.
        total: how many the file holds now.
        winners: how many different configurations won, by kernel and family, summed up.
        chosen: how many different ones the entries use, counted likewise.
        worst: the largest time of an entry over the best of its case, at most 1 + the tolerance.
    """

    path: Path
    entries: int
    total: int
    winners: int
    chosen: int
    worst: float


def default_path(slug: str) -> Path:
    """The table that comes with the package, ``flash_sink_attn/tuned/<slug>.json``."""
    return Path(tuned_table.__file__).resolve().parent / "tuned" / f"{slug}.json"


def export(run_dir: Path, to: Path | None = None, *, tolerance: float = TOLERANCE,
           allow_interpreter: bool = False) -> Exported:
    """Write the winners of a run into the tuned table of its card.

    An existing table is merged with: see :func:`merge` for which entry stays.

    Args:
        run_dir: a run directory.
        to: the table file; default the package's for the card the run was made on.
        tolerance: see :func:`table_entries`; 0 exports every case's own winner.
        allow_interpreter: also export a run of Triton's interpreter, whose times mean nothing.

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
    selection = select_run(run_dir).on(gpu)
    entries = table_entries(selection, run, tolerance)
    if not entries:
        raise ValueError(f"run: {run_dir} has no timed winner of {' or '.join(IMPLS)}, so there is nothing to export")
    provenance = {"date": env.get("started"), "gpu_name": gpu, **{name: env.get(name) for name in _PROVENANCE}}
    for impl, field in CODE_FIELD.items():
        if provenance[field] is None and provenance["kernel_source"] == kernel_source_hash():
            provenance[field] = kernel_code_hash(impl)  # the run is older than this field, but of this very source
    path = default_path(slug) if to is None else Path(to)
    new = TunedTable.build(slug, entries, {run: provenance}, str(path), env.get("arch"))
    table = merge(TunedTable.load(path), new) if path.exists() else new
    table.save(path)
    return Exported(path, len(entries), len(table.entries), distinct(table_entries(selection, run, 0.0)),
                    distinct(entries), max(e.latency_ms / (e.best_ms or e.latency_ms) for e in entries))


def exported_line(done: Exported) -> str:
    """What an export did, for people."""
    return (f"{done.path}: {done.entries} entries of this run, {done.total} in all; {done.chosen} configurations stand "
            f"for {done.winners} that won, the largest loss {100 * (done.worst - 1):.2f}%")


def distinct(entries: Iterable[Entry]) -> int:
    """How many different configurations the families of these entries use, summed up."""
    return len({(family(e.kernel, e.key), e.config) for e in entries})


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A configuration that may stand in the table for a case: its time and the best one of the same measurement."""

    config: Mapping[str, Any]
    latency_ms: float
    best_ms: float
    measured_as: str

    @property
    def ratio(self) -> float:
        return max(1.0, self.latency_ms / self.best_ms)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A kernel and key that gets an entry, and what may stand there, the winner first."""

    kernel: Kernel
    key: ShapeKey
    case: str
    default_ms: float | None
    candidates: tuple[_Candidate, ...]

    @property
    def place(self) -> tuple[str, ShapeKey]:
        """What of a table it fills: see :attr:`flash_sink_attn.tuned_table.Entry.slot`."""
        return next(_entry(self, c, "") for c in self.candidates).slot

    @property
    def measured_as(self) -> str:
        """What the winner was measured as, and with it the default."""
        return self.candidates[0].measured_as


def table_entries(selection: Selection, run: str, tolerance: float = TOLERANCE) -> list[Entry]:
    """One entry per kernel and key, of both implementations, so that a call can compare them; of a Hopper backward that
    gives other bits each time a second one, the fastest that gives the same.

    Of each family (see :func:`flash_sink_attn.nearest.family`) the fewest configurations are used with which every case
    has one that was timed at most ``tolerance`` slower than its best, and every case gets the fastest of those:
    :func:`sweeps.cover.smallest_cover`. What differs by so little is mostly noise, and fewer configurations are fewer
    kernels to build.

    The backward kernels have the pair that won the whole backward for their best, and each its own winner only where no
    whole backward was timed. A case that the untuned heuristic won without a name to its tiles has no entry: the
    heuristic serves it. Of cases that share a key those with sinks go first, then those with more tokens, then the
    faster.
    """
    slots: dict[tuple[str, ShapeKey], _Slot] = {}
    parts = {r.case.id: r for r in selection.results}
    for impl in IMPLS:
        ordered = sorted((r for r in selection.results if r.case.pass_ in ("fwd", "bwd", *BACKWARD)), key=lambda r: (
            not r.case.sinks, r.case.pass_ in BACKWARD, -_tokens(r.case), _own_time(r, impl)))
        for result in ordered:
            for slot in _slots_of(result, impl, parts, tolerance):
                slots.setdefault(slot.place, slot)
    families: dict[tuple[Any, ...], list[_Slot]] = {}
    for (name, _), slot in slots.items():
        families.setdefault((name, *family(slot.kernel, slot.key)), []).append(slot)
    return [entry for members in families.values() for entry in _entries_of(members, run)]


def _entries_of(slots: list[_Slot], run: str) -> Iterator[Entry]:
    options = [{config_json(c.config): c for c in reversed(slot.candidates)} for slot in slots]
    chosen = smallest_cover([{text: c.ratio for text, c in of.items()} for of in options])
    for slot, of, text in zip(slots, options, chosen, strict=True):
        yield _entry(slot, of[text], run)


def _entry(slot: _Slot, c: _Candidate, run: str) -> Entry:
    default_ms = slot.default_ms if c.measured_as == slot.measured_as else None
    return Entry(kernel=slot.kernel, key=slot.key, config=CONFIG_CLASS[slot.kernel].from_dict(c.config),
                 latency_ms=c.latency_ms, measured_as=c.measured_as, default_ms=default_ms, case=slot.case, run=run,
                 best_ms=min(c.best_ms, c.latency_ms))


def _tokens(case: Case) -> int:
    return sum(case.seqlens) if case.varlen else case.batch * case.seqlen_q


def _own_time(result: CaseResult, impl: str) -> float:
    return min((m.latency_ms for m in result.ranked if m.impl == impl), default=float("inf"))


def _slots_of(result: CaseResult, impl: Impl, by_id: Mapping[str, CaseResult], tolerance: float) -> Iterator[_Slot]:
    ranked = [m for m in result.ranked if m.impl == impl]
    if not ranked or not ranked[0].config:
        return
    case = result.case
    default_ms = next((m.latency_ms for m in (result.default, *ranked) if m is not None and m.impl == impl
                       and m.row.get("is_default")), None)
    kernel = kernel_of(impl, case.pass_)
    if kernel is not None:
        candidates = _near(ranked, ranked[0], tolerance, case.pass_)
        if kernel != "hopper_bwd":
            yield _Slot(kernel, shape_key(case), case.id, default_ms, candidates)
            return
        same_bits = [m for m in ranked if m.config and reproducible(CONFIG_CLASS[kernel].from_dict(m.config))]
        if ranked[0] not in same_bits:
            others = tuple(c for c in candidates if not reproducible(CONFIG_CLASS[kernel].from_dict(c.config)))
            yield _Slot(kernel, shape_key(case), case.id, default_ms, others)
        if same_bits:
            candidates = _near(same_bits, same_bits[0], tolerance, case.pass_)
            yield _Slot(kernel, shape_key(case), case.id, default_ms, candidates)
        return
    best = ranked[0]
    for kernel in BACKWARD:
        if kernel not in best.config:
            continue
        winner = _Candidate(best.config[kernel], best.latency_ms, best.latency_ms, "bwd")
        part = by_id.get(case.with_pass(kernel).id)
        timed = [m for m in part.ranked if m.impl == impl] if part else []
        same = next((m for m in timed if config_json(m.config) == config_json(winner.config)), None)
        others = () if same is None else tuple(c for c in _near(timed, same, tolerance, kernel)
                                               if config_json(c.config) != config_json(winner.config))
        yield _Slot(kernel, shape_key(case), case.id, default_ms, (winner, *others))


def _near(timed: Iterable[Measured], best: Measured, tolerance: float, measured_as: str) -> tuple[_Candidate, ...]:
    """The named configurations at most ``tolerance`` slower than ``best``, itself first."""
    others = (m for m in timed if m is not best and m.config and m.latency_ms <= best.latency_ms * (1 + tolerance))
    return tuple(_Candidate(m.config, m.latency_ms, best.latency_ms, measured_as)
                 for m in (best, *(others if tolerance > 0 else ())))


def merge(old: TunedTable, new: TunedTable) -> TunedTable:
    """Both tables' entries; where both have one for a kernel and key, the faster proven one.

    Times prove something only about each other when they are of the same kernels: what was measured on other kernel
    code or another Triton, or on another varlen batch of the same key, gives way to the newer run, also the
    entry with or without the same bits each time where the newer run has but one of them. An entry of the same run
    gives way (it was exported again), and a backward kernel timed alone to a pair timed as a whole.

    Raises:
        ValueError: the tables are of different cards.
    """
    if old.gpu != new.gpu:
        raise ValueError(f"to: {old.path} is the tuned table of {old.gpu!r}, expected one of {new.gpu!r}: entries are "
                         "never shared between cards")
    runs = {**old.runs, **new.runs}
    again = {(entry.kernel, entry.key): entry for entry in new.entries.values()}
    kept = {at: entry for at, entry in old.entries.items()
            if (newer := again.get((entry.kernel, entry.key))) is None or not _outdates(newer, entry, runs)}
    for at, entry in new.entries.items():
        if at not in kept or _replaces(entry, kept[at], runs):
            kept[at] = entry
    return TunedTable.build(new.gpu, kept.values(), runs, new.path, new.arch or old.arch)


def _comparable(new: Entry, old: Entry, runs: Mapping[str, Mapping[str, Any]]) -> bool:
    ours, theirs = runs[new.run], runs[old.run]
    # a hash of what runs on the GPU, which launchers and comments leave as it is; older runs have that of all sources
    code = CODE_FIELD[impl_of(new.kernel)]
    if not (ours.get(code) and theirs.get(code)):
        code = "kernel_source"
    same_kernels = all(ours.get(name) == theirs.get(name) for name in (code, "triton", "timing_mode"))
    return same_kernels and (not new.key.varlen or new.case == old.case)


def _outdates(new: Entry, old: Entry, runs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether nothing that was measured for the old entry says anything beside the newer run."""
    newer = str(runs[new.run].get("date") or "") > str(runs[old.run].get("date") or "")
    return new.run != old.run and not _comparable(new, old, runs) and newer


def _replaces(new: Entry, old: Entry, runs: Mapping[str, Mapping[str, Any]]) -> bool:
    if new.run == old.run:
        return True
    if not _comparable(new, old, runs):
        return False  # the older of them: what the newer one outdates is gone
    if new.measured_as != old.measured_as:
        return new.measured_as == "bwd"
    return new.latency_ms < old.latency_ms
