"""Finals: which candidates go on from the first pass to be timed again, case by case.

The first pass times candidates seconds apart: it cannot tell apart those that are close, and now and then something
holds one up. The finals' round names, of every case, who is worth another look. A worker then times them against each
other, in the same moments: :mod:`sweeps.contest`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from flash_sink_attn.nearest import distance
from sweeps.cases import PASSES, Case, family
from sweeps.measure import median_interval
from sweeps.ours import shape_key
from sweeps.plan import PARTS, Plan, Trial
from sweeps.registry import is_peer
from sweeps.sampling import FinalSampling
from sweeps.spec import Finals, Timing

_WALL_WITHIN = 0.03     # a candidate whose wall time is below the fastest one's by more than this goes on as well
# Of a leader next door over the best one here. In two sweeps it was more in six and seven rows, backwards of short
# sequences, which are timed again for nothing, and in one row each that was twice too slow though nobody was at work.
_DOUBTFUL = 1.4
_MOST_DOUBTFUL = 2
_DUEL_PRECISION = 0.005


@dataclasses.dataclass(frozen=True)
class Final:
    """One case and those who run for it.

    Attributes:
        case: the workload.
        entrants: the candidates, the fastest of the first pass first. A single one is there for its energy only.
        against_peers: it is a duel (:mod:`sweeps.duels`): our winner comes first, peers follow, nobody drops out, and
            nothing but their ratios is wanted.
    """

    case: Case
    entrants: tuple[Trial, ...]
    against_peers: bool = False

    @property
    def id(self) -> str:
        """Stable: the case, and a hash of the entrants' trial ids, whose order plays no part."""
        names = "\n".join(sorted(entrant.id for entrant in self.entrants))
        kind = "duel" if self.against_peers else "final"
        return f"{self.case.id}/{kind}-{hashlib.sha256(names.encode()).hexdigest()[:10]}"

    @property
    def seed(self) -> int:
        """Of the blocks' random order."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:4], "big")

    def sampling(self, base: FinalSampling) -> FinalSampling:
        """``base`` for this case: a part of a backward has no energy of its own, since nobody calls it alone."""
        if self.against_peers:
            return dataclasses.replace(base, race=False, precision=max(base.precision, _DUEL_PRECISION), wall_ms=0.0,
                                       energy_ms=0.0)
        return dataclasses.replace(base, energy_ms=0.0) if self.case.pass_ in PARTS else base


def final_sampling(timing: Timing) -> FinalSampling:
    """What the config says about finals, in the form that goes to the worker."""
    return FinalSampling(**{f.name: getattr(timing.finals, f.name) for f in dataclasses.fields(FinalSampling)})


def finals_round(rows: Iterable[Mapping[str, Any]], plan: Plan) -> list[Final]:
    """Who goes on, shape by shape.

    Of every case of the plan: the candidates of ours whose interval overlaps the fastest one's or whose time is within
    ``timing.finals.within`` of it, at most ``max_entrants``; the untuned default takes the last place rather than miss
    it; whoever is quicker by wall time than the fastest by device time; and beyond those, of each implementation, who
    leads on the nearest other shape, or nearly, and here seems much slower than others of it: something may have held
    it up. Who is alone then goes on where the energy of a whole pass is wanted.

    Args:
        rows: rows of the log; those of the environment of the last one count.

    Returns:
        [] where finals are off, and on a machine without a GPU unless the config turns them on.
    """
    found = [row for row in rows if not is_peer(row["impl"])]
    settings = plan.spec.timing.finals
    if settings.enabled is False or not found or (settings.enabled is None and found[-1]["gpu"] == "cpu"):
        return []
    timed: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in found:
        if row["environment"] == found[-1]["environment"]:
            of_case = timed.setdefault(row["case"], {})
            of_case.pop(row["trial"], None)
            if row["status"] == "ok" and row.get("latency_ms") is not None:
                of_case[row["trial"]] = row
    cases = {trial.case.id: trial.case for trial in plan.first} | {
        trial.case.id: trial.case for whole in plan.wholes for trial in whole}
    shapes = list(dict.fromkeys(case.shape_id for case in cases.values()))
    finals = []
    for case in sorted(cases.values(), key=lambda c: (shapes.index(c.shape_id), PASSES.index(c.pass_))):
        own = list(timed.get(case.id, {}).values())
        entrants = _entrants(own, settings)
        doubtful = _doubtful(own, _next_door(case, cases.values(), timed), settings.within)
        entrants += [row for row in doubtful if row not in entrants]
        wants_energy = settings.energy_ms > 0 and case.pass_ not in PARTS and found[-1]["gpu"] != "cpu"
        if len(entrants) > 1 or (entrants and wants_energy):
            finals.append(Final(case, tuple(trial_of(case, row) for row in entrants)))
    return finals


def trial_of(case: Case, row: Mapping[str, Any]) -> Trial:
    """The trial that made a row."""
    return Trial(case, row["impl"], row["config"], row.get("options") or {}, is_default=bool(row.get("is_default")))


def _entrants(rows: list[Mapping[str, Any]], settings: Finals) -> list[Mapping[str, Any]]:
    """Of the timed rows of a case those that go on, the fastest first."""
    distinct: dict[Any, Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (not row["config"], row["latency_ms"], row["trial"])):
        distinct.setdefault((row["impl"], row.get("binary") or row["trial"]), row)  # {} only where nobody names it
    ranked = sorted(distinct.values(), key=lambda row: (row["latency_ms"], row["trial"]))
    if not ranked:
        return []
    best = ranked[0]
    bound = max(best["latency_ms"] * (1 + settings.within), _interval(best)[1])
    near = [row for row in ranked if row["latency_ms"] <= bound or _interval(row)[0] <= _interval(best)[1]]
    chosen = near[:settings.max_entrants]
    default = next((row for row in near if row.get("is_default")), None)
    if default is not None and default not in chosen:
        chosen[-1] = default
    quick = min((row for row in ranked if row.get("wall_ms")), key=lambda row: (row["wall_ms"], row["trial"]),
                default=None)
    if (quick is not None and quick not in chosen and best.get("wall_ms")
            and quick["wall_ms"] < best["wall_ms"] * (1 - _WALL_WITHIN)):
        chosen = [*chosen[:settings.max_entrants - 1], quick]
    return chosen


def _next_door(case: Case, cases: Iterable[Case], timed: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The timed rows of the nearest other shape of the family, by the measure that the dispatcher has."""
    others = [c for c in cases if c.id != case.id and c.pass_ == case.pass_ and family(c) == family(case)
              and timed.get(c.id)]
    if not others:
        return []
    nearest = min(others, key=lambda c: (distance(case.pass_, shape_key(case), shape_key(c)), c.id))
    return list(timed[nearest.id].values())


def _doubtful(rows: Iterable[Mapping[str, Any]], next_door: Iterable[Mapping[str, Any]],
              within: float) -> list[Mapping[str, Any]]:
    """Of each implementation those of ``rows``, two at most, that are much slower than its best of them although they
    are the fastest of ``next_door``, or ``within`` of it."""
    def by_impl(of: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
        found: dict[str, list[Mapping[str, Any]]] = {}
        for row in sorted(of, key=lambda row: (row["latency_ms"], row["trial"])):
            if row["config"]:
                found.setdefault(row["impl"], []).append(row)
        return found

    doubtful = []
    there = by_impl(next_door)
    for impl, ranked in by_impl(rows).items():
        near = there.get(impl, [])
        leaders = [row["config"] for row in near if row["latency_ms"] <= near[0]["latency_ms"] * (1 + within)]
        doubtful += [row for row in ranked if row["config"] in leaders
                     and row["latency_ms"] > _DOUBTFUL * ranked[0]["latency_ms"]][:_MOST_DOUBTFUL]
    return doubtful


def _interval(row: Mapping[str, Any]) -> tuple[float, float]:
    samples = row.get("samples_ms") or [row["latency_ms"]]
    return median_interval(samples) or (min(samples), max(samples))
