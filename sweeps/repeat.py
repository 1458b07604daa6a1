"""``python -m sweeps repeat``: how often a sweep comes to the same winners, and what a wrong pick costs.

The sweep is run several times, each in a process and a directory of its own, the first with an empty kernel cache and
the others with the one it leaves. Long afterwards everything that a run chose, held for tied or let into its finals is
timed against each other once more, at length, on eight placements of the inputs and without anybody dropping out: the
truth that picks are judged by. The regret of a pick is its time over that of the true best, less 1, on the average of
the placements.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeps.cases import Case
from sweeps.finals import Final
from sweeps.measured import Measured, config_label
from sweeps.paired import ratio, standing
from sweeps.plan import Trial
from sweeps.select import CaseResult, Selection, select_run
from sweeps.spec import Finals, SweepSpec
from sweeps.store import StoreError, read_finals, read_sittings
from sweeps.verdict import Key, key_of

TRUTH = Finals(enabled=True, precision=0.001, tie_margin=0.003, max_blocks=600, max_ms=2000.0, warmup_ms=20.0,
               wall_ms=0.0, energy_ms=0.0, placements=8, race=False)
_MAX_ENTRANTS = 10


@dataclasses.dataclass(frozen=True)
class Picks:
    """What the runs chose for one case.

    Attributes:
        case: the workload.
        winners: of each run, in their order; None where it has none.
        equal: whether all runs chose the same configuration.
        tied: whether any two runs' winners are equal, or each run held both for tied, or the truth finds no difference
            between them beyond its margin, on the average of the placements.
        regrets: of each run's winner, 0.01 = 1% slower than the true best; None where it is not known.
        truth: the true best, None where no final told.
    """

    case: Case
    winners: tuple[Measured | None, ...]
    equal: bool
    tied: bool
    regrets: tuple[float | None, ...]
    truth: str | None


@dataclasses.dataclass(frozen=True)
class Repeatability:
    """The answer.

    Attributes:
        cases: by case.
        busy: share of each run in which its device was at work, None where it is not known.
        elapsed_s: of each run, seconds.
        cached: share of our kernels that each run found built, None where it is not known.
    """

    cases: tuple[Picks, ...]
    busy: tuple[float | None, ...]
    elapsed_s: tuple[float | None, ...]
    cached: tuple[float | None, ...]

    @property
    def regrets(self) -> list[float]:
        return [regret for picks in self.cases for regret in picks.regrets if regret is not None]

    def summary(self) -> dict[str, Any]:
        """The figures of repeat.json; shares are of the cases."""
        count, regrets = len(self.cases), self.regrets
        return {
            "runs": len(self.busy), "cases": count,
            "equal": sum(picks.equal for picks in self.cases) / count if count else None,
            "equal_or_tied": sum(picks.tied for picks in self.cases) / count if count else None,
            "regret_median": statistics.median(regrets) if regrets else None,
            "regret_worst": max(regrets, default=None), "gpu_busy": list(self.busy), "elapsed_s": list(self.elapsed_s),
            "cached_share": list(self.cached)}


def run_dirs(folder: Path, times: int) -> list[Path]:
    """Where the runs of a repetition lie."""
    return [folder / f"run-{number}" for number in range(1, times + 1)]


def is_complete(run_dir: Path) -> bool:
    """Whether the run in this directory went to its end."""
    try:
        sittings = read_sittings(run_dir)
    except StoreError:
        return False
    return bool(sittings) and sittings[-1].get("stopped") == "" and not sittings[-1].get("remaining")


def truth_spec(spec: SweepSpec) -> SweepSpec:
    """The sweep's settings for the last, long finals."""
    return spec.model_copy(update={"timing": spec.timing.model_copy(update={"finals": TRUTH})})


def truth_round(selections: Sequence[Selection]) -> list[Final]:
    """The last finals: of every case all that a run chose, held for tied or let into its final, if they differ."""
    found: list[Final] = []
    for case, results in _by_case(selections):
        seen: Counter[Key] = Counter()
        trials: dict[Key, Trial] = {}
        for result in results:
            chosen = [*result.tied, *(result.verdict.entrants if result.verdict else ())]
            for candidate in {key_of(m): m for m in chosen}.values():
                key = key_of(candidate)
                seen[key] += 1 + _MAX_ENTRANTS * (candidate is result.best)  # every winner is in, whoever is not
                trials.setdefault(key, _trial(case, candidate))
        entrants = sorted(seen, key=lambda key: (-seen[key], key))[:_MAX_ENTRANTS]
        if len(entrants) > 1:
            found.append(Final(case, tuple(trials[key] for key in entrants)))
    return found


def _trial(case: Case, candidate: Measured) -> Trial:
    row = candidate.row
    return Trial(case, candidate.impl, candidate.config, row.get("options") or {},
                 is_default=bool(row.get("is_default")) and row["config"] == candidate.config)


def _by_case(selections: Sequence[Selection]) -> list[tuple[Case, list[CaseResult]]]:
    """Every case that a run has a winner for, with the results of the runs that know it."""
    found: dict[str, tuple[Case, list[CaseResult]]] = {}
    for selection in selections:
        for result in selection.results:
            found.setdefault(result.case.id, (result.case, []))[1].append(result)
    return [(case, results) for case, results in found.values() if any(result.best for result in results)]


def judge(selections: Sequence[Selection], truth: Iterable[Mapping[str, Any]],
          sittings: Sequence[Sequence[Mapping[str, Any]]]) -> Repeatability:
    """Compares the runs' picks with each other and with the truth.

    Args:
        selections: of each run.
        truth: records of the last finals.
        sittings: of each run, as ``sweeps.store.read_sittings`` gives them.
    """
    records = {record["case"]: record for record in truth if record.get("status") == "ok"}
    cases = []
    for case, _ in _by_case(selections):
        results = [selection.get(case.id) for selection in selections]
        cases.append(_picks(case, results, records.get(case.id)))

    def last(name: str) -> tuple[float | None, ...]:
        return tuple(own[-1].get(name) if own else None for own in sittings)

    return Repeatability(tuple(cases), last("gpu_busy"), last("elapsed_s"), last("cached_share"))


def _picks(case: Case, results: Sequence[CaseResult | None], record: Mapping[str, Any] | None) -> Picks:
    winners = tuple(result.best if result else None for result in results)
    keys = [key_of(winner) if winner else None for winner in winners]
    ties = [{key_of(m) for m in result.tied} if result else set() for result in results]
    times = _true_times(record)
    best = None
    if times:
        best = list(times)[standing(list(times.values()), TRUTH.tie_margin).best]

    def regret(key: Key | None) -> float | None:
        if key is None:
            return None
        if len(set(keys)) == 1 and record is None:
            return 0.0  # nothing was ever near it
        return None if best is None or key not in times else 0.0 if key == best else (
            ratio(times[best], times[key]).ratio - 1)

    def same(a: int, b: int) -> bool:
        first, second = keys[a], keys[b]
        if first is None or second is None:
            return False
        if first == second or (second in ties[a] and first in ties[b]):
            return True
        return first in times and second in times and ratio(times[first], times[second]).within(TRUTH.tie_margin)

    pairs = list(itertools.combinations(range(len(keys)), 2))
    return Picks(case, winners, len(set(keys)) == 1 and keys[0] is not None, all(same(a, b) for a, b in pairs),
                 tuple(max(0.0, r) if (r := regret(key)) is not None else None for key in keys),
                 None if best is None else best[1])


def _true_times(record: Mapping[str, Any] | None) -> dict[Key, Sequence[float]]:
    entrants = record["entrants"] if record else []
    return {(e["impl"], json.dumps(e["config"], sort_keys=True)): e["samples_ms"] for e in entrants
            if e.get("status") == "ok" and e.get("samples_ms")}


# ---- files


def write_repeat(folder: Path, times: int) -> Repeatability:
    """Writes repeat.json, repeat.csv and repeat.md from the runs and the truth in ``folder``.

    Raises:
        StoreError: a run is not there.
    """
    runs = run_dirs(folder, times)
    found = judge([select_run(run) for run in runs], read_finals(folder / "truth"), [read_sittings(r) for r in runs])
    summary = found.summary()
    (folder / "repeat.json").write_text(json.dumps(summary, indent=1) + "\n")
    rows = [_row(picks) for picks in found.cases]
    with (folder / "repeat.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["case"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "repeat.md").write_text(markdown(found))
    return found


def _row(picks: Picks) -> dict[str, Any]:
    row: dict[str, Any] = {"case": picks.case.id, "model": picks.case.model, "equal": picks.equal, "tied": picks.tied,
                           "truth": picks.truth}
    for number, (winner, regret) in enumerate(zip(picks.winners, picks.regrets, strict=True), 1):
        row |= {f"run{number}": json.dumps(winner.config, sort_keys=True) if winner else None,
                f"run{number}_ms": winner.latency_ms if winner else None, f"run{number}_regret": regret}
    return row


def _percent(value: float | None, digits: int = 1) -> str:
    return "unknown" if value is None else f"{100 * value:.{digits}f}%"


def markdown(found: Repeatability) -> str:
    """The answer as text: a line per figure, then a table of the cases."""
    s = found.summary()
    lines = [
        "# Repeatability", "",
        f"{s['runs']} runs of {s['cases']} cases.", "",
        f"- winners equal in {_percent(s['equal'])} of the cases, equal or tied in {_percent(s['equal_or_tied'])}",
        f"- regret of a pick: {_percent(s['regret_median'], 2)} in the median, {_percent(s['regret_worst'], 2)} in the "
        "worst case",
        *(f"- run {n}: {'unknown' if t is None else f'{t:.0f} s'}, device busy {_percent(b, 0)}, "
          f"{_percent(c, 0)} of our kernels found in the cache"
          for n, (b, t, c) in enumerate(zip(found.busy, found.elapsed_s, found.cached, strict=True), 1)),
        "", "Regret: the pick's time over the true best's, less 1, both timed long afterwards in the same blocks.", ""]
    runs = range(1, s["runs"] + 1)
    lines += ["| case | winners | " + " | ".join(f"regret {n}" for n in runs) + " | picks |",
              "| --- | --- | " + " | ".join("---:" for _ in runs) + " | --- |"]
    for picks in found.cases:
        verdict = "equal" if picks.equal else "tied" if picks.tied else "**differ**"
        regrets = " | ".join(_percent(r, 2) for r in picks.regrets)
        labels = list(dict.fromkeys(config_label(w.config) if w else "none" for w in picks.winners))
        name = f"{picks.case.model} {picks.case.id}".strip()
        lines.append(f"| {name} | {' / '.join(labels).replace('|', '+')} | {regrets} | {verdict} |")
    return "\n".join(lines) + "\n"
