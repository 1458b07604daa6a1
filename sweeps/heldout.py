"""How good the dispatcher is on shapes that it has no entry for: what it would use against the best that was measured.

What a pass of a call uses is an implementation and the configurations of its kernels, so both are judged together: the
time of the choice is looked up among the rows of both implementations, and the best is the best of all of them.

Two ways to shapes that were never tuned: a run of such shapes, ``configs/heldout.yaml``; and, without a GPU, any runs
there are, each of their cases with a table that has nothing of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from flash_sink_attn import selection
from flash_sink_attn.config import IMPLS, KERNELS_OF, AnyConfig, Impl, Pass
from flash_sink_attn.devices import gpu_slug
from flash_sink_attn.tuned_table import ShapeKey, TunedTable
from flash_sink_attn.validity import limits_of
from sweeps.cases import Case
from sweeps.export import default_path
from sweeps.measured import config_label
from sweeps.ours import tiles_of
from sweeps.regret import Judged, call_key, case_table, costliest_first, csv_text, summary_table
from sweeps.select import CaseResult, select_run
from sweeps.spec import DEFAULT_ARCH
from sweeps.store import read_environment

PASSES: tuple[Pass, ...] = ("fwd", "bwd")
Used = tuple[Impl, tuple[AnyConfig, ...]]   # an implementation, and the configurations of its kernels as they launch
Times = dict[Used, float]
Select = Callable[[Pass, ShapeKey], selection.Selection]
# A pass stands where the lowest of its kernels does.
_RUNGS = ("exact", "nearest", "other card", "heuristic")
_SHOWN = 12     # costliest cases in the terminal


@dataclasses.dataclass(frozen=True)
class PassPick(Judged):
    """What the dispatcher would use for one pass of one shape.

    Attributes:
        selection: implementation and configurations, and why.
        best_impl: implementation of the fastest that was measured.
    """

    selection: selection.Selection
    best_impl: Impl

    @property
    def subject(self) -> str:
        return self.selection.pass_

    @property
    def rung(self) -> str:
        return max((d.source for d in self.selection.decisions), key=_RUNGS.index)

    @property
    def distance(self) -> float | None:
        return max((d.distance for d in self.selection.decisions if d.distance is not None), default=None)

    @property
    def chosen(self) -> str:
        return used_label(used_by(self.selection))

    def row(self) -> dict[str, Any]:
        """A row of the CSV file."""
        decisions = self.selection.decisions
        entries = dict.fromkeys(d.entry.case for d in decisions if d.entry is not None)
        return {"pass": self.subject, "case": self.case.id, "model": self.case.model, "impl": self.selection.impl,
                "rung": self.rung, "distance": self.distance, "entry": " + ".join(entries), "chosen": self.chosen,
                "latency_ms": self.ms, "best_impl": self.best_impl, "best": self.best, "best_ms": self.best_ms,
                "regret": self.regret, "heuristic_ms": self.heuristic_ms, "heuristic_regret": self.heuristic_regret,
                "measured": self.measured, "why_impl": self.selection.reason,
                "why_config": "; ".join(d.reason for d in decisions)}


def used_by(chosen: selection.Selection) -> Used:
    """What a selection launches, in the form that measured rows are looked up by."""
    return chosen.impl, tuple(d.config for d in chosen.decisions)


def used_label(used: Used) -> str:
    """``hopper 64x128 s2``, ``triton dq 64x64 w4 s3 | dkdv 64x64 w4 s3``."""
    impl, configs = used
    if len(configs) == 1:
        return f"{impl} {config_label(configs[0].to_dict())}"
    return f"{impl} " + config_label({k: c.to_dict() for k, c in zip(KERNELS_OF[impl]["bwd"], configs, strict=True)})


def times_of(result: CaseResult) -> Times:
    """Time in ms of everything of ours that was measured for a forward or a whole backward, by implementation and
    configurations; the fastest first."""
    times: Times = {}
    for m in sorted(result.ranked, key=lambda m: m.latency_ms):
        impl = next((name for name in IMPLS if name == m.impl), None)
        if impl is not None and m.config:
            tiles = tiles_of(result.case, m.config, impl)
            configs = tuple(getattr(tiles, kernel) for kernel in KERNELS_OF[impl][cast(Pass, result.case.pass_)])
            times.setdefault((impl, configs), m.latency_ms)
    return times


def judge(case: Case, times: Times, select: Select, arch: int) -> PassPick:
    """The choice for one case; ``times`` are those measured for it, at least one."""
    pass_, key = cast(Pass, case.pass_), call_key(case)
    chosen, plain = select(pass_, key), selection.decide(pass_, key, limits_of(arch), None)
    best = min(times, key=times.__getitem__)
    return PassPick(case, times.get(used_by(chosen)), times[best], used_label(best), times.get(used_by(plain)),
                    len(times), chosen, best[0])


class _Tables:
    """The table that is judged, on the rung on which it would stand on the card of some runs."""

    def __init__(self, gpu: str, arch: int, path: Path | None) -> None:
        self.slug, self.arch = gpu_slug(gpu), arch
        self.table = TunedTable.load(path or default_path(self.slug))

    def select(self, pass_: Pass, key: ShapeKey, without: ShapeKey | None = None) -> selection.Selection:
        """What a call uses; ``without``: a shape of which the table is to know nothing."""
        table = self.table
        if without is not None:
            table = dataclasses.replace(
                table, entries={slot: e for slot, e in table.entries.items() if e.key != without})
        own, others = (table, ()) if table.gpu == self.slug else (None, (table,))
        return selection.decide(pass_, key, limits_of(self.arch), own, others)


def heldout(run_dir: Path, table: Path | None = None) -> list[PassPick]:
    """What the dispatcher chooses with a table for each case of a run, beside the best that the run measured.

    Args:
        run_dir: a run, such as one of ``configs/heldout.yaml``, whose default rows are the dispatcher's choices.
        table: the tuned table; default the packaged one of the run's card. A table of another card of the same
            architecture stands on the rung it would stand on there.

    Raises:
        StoreError: no run there. TunedTableError: the table is corrupt or absent. ValueError: no timed case of ours.
    """
    measured, gpu, arch = _measured([run_dir])
    tables = _Tables(gpu, arch, table)
    return [judge(case, times, tables.select, arch) for case, times in measured]


def leave_one_out(run_dirs: Sequence[Path], table: Path | None = None) -> list[PassPick]:
    """What the dispatcher would choose for each case of some runs if its table had no entry of that shape.

    Of a configuration that several of the runs measured for a case the newest run's time counts.

    Args:
        run_dirs: runs on one card.
        table: as in :func:`heldout`.

    Raises:
        As :func:`heldout`; ValueError: the runs are of different cards, or their times mean different things.
    """
    measured, gpu, arch = _measured(run_dirs)
    tables = _Tables(gpu, arch, table)
    return [judge(case, times, lambda pass_, key: tables.select(pass_, key, without=key), arch)
            for case, times in measured]


def _measured(run_dirs: Sequence[Path]) -> tuple[list[tuple[Case, Times]], str, int]:
    """The cases of some runs with their times; the name of the card, and its compute capability."""
    envs = {run_dir: read_environment(run_dir) for run_dir in run_dirs}
    cards = sorted({env["gpu"] for env in envs.values()})
    if len(cards) != 1:
        raise ValueError(f"runs: expected runs on one card, got {', '.join(cards) or 'none'}")
    modes = sorted({str(env.get("timing_mode")) for env in envs.values()})
    if len(modes) != 1:
        raise ValueError(f"runs: expected times of one timing mode, got {', '.join(modes)}")
    found: dict[str, tuple[Case, Times]] = {}
    for run_dir in sorted(envs, key=lambda run: str(envs[run].get("started") or ""), reverse=True):
        for result in select_run(run_dir).on(cards[0]).results:
            if result.case.pass_ in PASSES and (times := times_of(result)):
                known = found.setdefault(result.case.id, (result.case, {}))[1]
                for used, ms in times.items():
                    known.setdefault(used, ms)
    if not found:
        names = ", ".join(str(run_dir) for run_dir in run_dirs)
        raise ValueError(f"run: {names} has no timed forward or whole backward of ours")
    return list(found.values()), cards[0], next(iter(envs.values())).get("arch") or DEFAULT_ARCH


def heldout_report(run_dir: Path, table: Path | None = None) -> str:
    """Writes ``heldout.md`` and ``heldout.csv`` into a run directory, and returns the Markdown's summary."""
    found = heldout(run_dir, table)
    exact = sum(p.rung == "exact" for p in found)
    text = (f"{_head(found, [run_dir])}: time of the implementation and the configuration that the dispatcher chooses "
            f"with {_name(table)}, over the best of both implementations that was measured for the case."
            + (f" {exact} of them are in the table and so not held out." if exact else ""))
    return _write(run_dir, "heldout", "Held-out shapes", text, found)


def leave_one_out_report(run_dirs: Sequence[Path], table: Path | None = None) -> str:
    """Writes ``leave-one-out.md`` and ``.csv`` into the first of the run directories; returns the Markdown's summary
    and the costliest cases."""
    found = leave_one_out(run_dirs, table)
    text = (f"{_head(found, run_dirs)}: time of the implementation and the configuration that the dispatcher would "
            f"choose with {_name(table)} if that had no entry of the case's shape, over the best of both "
            "implementations that was measured for the case. Of several runs' times of one configuration the newest "
            "counts.")
    timed = costliest_first(p for p in found if p.regret is not None)
    summary = _write(run_dirs[0], "leave-one-out", "Leave-one-out", text, found)
    return f"{summary}\n\nThe costliest:\n\n{case_table(timed[:_SHOWN])}"


def _head(found: Sequence[PassPick], run_dirs: Sequence[Path]) -> str:
    shapes, gpu = len({p.case.shape_id for p in found}), read_environment(run_dirs[0])["gpu"]
    runs = ", ".join(run_dir.resolve().name for run_dir in run_dirs)
    return f"{len(found)} cases of {shapes} shapes on {gpu}, run{'s' * (len(run_dirs) > 1)} {runs}"


def _name(table: Path | None) -> str:
    return table.name if table else "the packaged table"


def _write(run_dir: Path, name: str, title: str, text: str, found: Sequence[PassPick]) -> str:
    wrong = sum(p.selection.impl != p.best_impl for p in found)
    summary = (f"{text}\n\n{summary_table(found, PASSES, 'pass')}\n\nThe other implementation had the best in {wrong} "
               "cases.")
    (run_dir / f"{name}.md").write_text(f"# {title}\n\n{summary}\n\n{case_table(found)}\n")
    (run_dir / f"{name}.csv").write_text(csv_text([p.row() for p in found]))
    return summary
