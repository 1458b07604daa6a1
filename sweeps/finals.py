"""Finals: the candidates that the first pass could not tell apart, timed against each other in the same moments.

A block is every entrant once, in random order, each sampled as in the first pass (flushed, behind a spin). What drifts,
clocks and heat, is the same for all of a block and drops out of their ratios (:mod:`sweeps.paired`). Each block has the
next one of several placements of the inputs (:mod:`sweeps.placements`), so that who wins does not win by where this
process happens to have its memory. The contest is looked at after 8, 12, 18, ... blocks; who is slower by then drops
out, and it ends when one is left, or when those that are left are as good as each other, known precisely enough, or out
of time. A winner whose own time is not yet known as well as a first pass asks for is then sampled alone. What is
decided stands, whatever fails of what comes after it: that, wall time, or energy.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from flash_sink_attn.nearest import distance
from sweeps.cases import PASSES, Case, family
from sweeps.energy import Energy
from sweeps.failures import message
from sweeps.measure import (
    BATCH_MS,
    CPU_SAMPLES,
    HOST_BOUND_NOTE,
    INTERPRETER_NOTE,
    MAX_SPIN_MS,
    Call,
    CpuTimer,
    median_interval,
    relative_half_width,
    spin_for,
)
from sweeps.ours import shape_key
from sweeps.paired import MIN_PAIRS, Standing, standing
from sweeps.plan import PARTS, Plan, Trial
from sweeps.registry import is_peer
from sweeps.sampling import FinalSampling, Sampling
from sweeps.sensors import Reading, summary
from sweeps.spec import Finals, Timing
from sweeps.walltime import wall_clock

__all__ = ["Final", "FinalSampling", "FinalTiming", "final_sampling", "finals_round", "time_finalists",
           "trial_of"]

_GROWTH = 1.5           # of the blocks from one look to the next
_MAX_CHUNK = 30         # samples queued at a time
_MAX_RETAKES = 3
_COOLING_S = 0.1
_LATE_SHARE = 0.5       # of blocks in which the host came late: more make the spin longer
_WALL_WITHIN = 0.03     # a candidate whose wall time is below the fastest one's by more than this goes on as well
_MIN_WALL_BLOCKS = MIN_PAIRS
# Of a leader next door over the best one here. In two sweeps it was more in six and seven rows, backwards of short
# sequences, which are timed again for nothing, and in one row each that was twice too slow though nobody was at work.
_DOUBTFUL = 1.4
_MOST_DOUBTFUL = 2
_DUEL_PRECISION = 0.005
# Milliseconds until a call is done. Placements were seen to change calls of 50 us, by 1 to 2%; the blocks of calls of
# more than this are dear, so that none should be asked for on their account.
PLACED_UP_TO_MS = 1.0

T = TypeVar("T")
# Given how many placements are wanted in all: the same calls on others than the first, and why not on as many as that
# ("" = it is as many).
Elsewhere = Callable[[int], tuple[Sequence[Sequence[Call]], str]]


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


# ---- who goes on


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


# ---- the contest


class BlockTimer(Protocol):
    """What of a timer the contest needs; see :class:`sweeps.measure.DeviceTimer`."""

    capture_failed: bool

    def warm_up(self, call: Call, warmup_ms: float) -> tuple[float, float]: ...

    def batch(self, calls: Sequence[Call], spin_ms: float) -> tuple[list[tuple[float, bool]], Reading | None]: ...

    def energy(self, call: Call, duration_ms: float) -> Energy | None: ...


@dataclasses.dataclass(frozen=True)
class FinalTiming:
    """Samples of a contest and how they came about. Times in milliseconds; lists are in the order of the calls.

    Attributes:
        samples_ms: per entrant, block by block; one that dropped out has fewer. Equal positions are of one block. Of a
            winner the last may be of blocks with nobody else in them.
        standing: how it ended.
        stop_reason: "winner" (all others are slower), "tie" (those left are as good as each other), "precision",
            "time", "samples", or "alone" (nobody to compare with).
        mode: "spin", "host_bound" or "cpu".
        note: what a reader must know about the times, "" = nothing.
        host_ms: what the host needs to queue each call.
        wall_samples_ms: per entrant, what a caller waits, block by block; empty where not asked for.
        wall_source: which clock took them, "" = none did.
        energy: of those that may be chosen; None for the others and where the card does not tell.
        late_blocks, retaken_blocks: thrown away because the host came late, or heat held the card back.
        readings: the sensors, chunk by chunk.
        seed: of the random order.
        tie_margin: by how much rivals may differ and still be as good as each other.
        block_placements: of each block, the number of the placement that it was taken on.
        placements_note: why there are not as many placements as were asked for, "" = there are.
        tainted: the process should be replaced, because a failed graph capture may have left traces.
        incomplete: what could not be taken once the contest was decided, and why; part of ``note``. "" = nothing.
    """

    samples_ms: tuple[tuple[float, ...], ...]
    standing: Standing
    stop_reason: str
    mode: str
    note: str
    host_ms: tuple[float, ...]
    wall_samples_ms: tuple[tuple[float, ...], ...]
    wall_source: str
    energy: tuple[Energy | None, ...]
    late_blocks: int
    retaken_blocks: int
    readings: tuple[Reading, ...]
    seed: int
    tie_margin: float
    block_placements: tuple[int, ...] = ()
    placements_note: str = ""
    tainted: bool = False
    incomplete: str = ""

    def row_fields(self) -> dict[str, Any]:
        """The record's fields, JSON-able. ``entrants`` has one dict per call, in their order; ``block_placements`` is
        empty where all blocks had the same."""
        entrants = []
        count = len(set(self.block_placements))
        for n, samples in enumerate(self.samples_ms):
            own, walls, energy = self.standing.ratios[n], self.wall_samples_ms[n], self.energy[n]
            entrants.append({
                "samples_ms": [round(ms, 6) for ms in samples], "samples": len(samples),
                "latency_ms": statistics.median(samples), "ratio": own.ratio, "ratio_low": own.low,
                "ratio_high": own.high, "tied": n in self.standing.tied, "host_ms": self.host_ms[n],
                "wall_ms": statistics.median(walls) if walls else None,
                "wall_samples_ms": [round(ms, 6) for ms in walls],
                **(energy.fields() if energy else {"energy_j": None})})
        described = summary(self.readings)
        return {"entrants": entrants, "stop_reason": self.stop_reason, "blocks": max(map(len, self.samples_ms)),
                "timing": self.mode, "note": self.note, "wall_source": self.wall_source, "seed": self.seed,
                "tie_margin": self.tie_margin, "placements": count, "placements_note": self.placements_note,
                "block_placements": list(self.block_placements) if count > 1 else [],
                "late_blocks": self.late_blocks, "retaken_blocks": self.retaken_blocks,
                **described, "throttle": list(described["throttle"])}


def time_finalists(timer: BlockTimer, calls: Sequence[Call], sampling: FinalSampling, seed: int,
                   elsewhere: Elsewhere | None = None) -> FinalTiming:
    """Times every call in randomised blocks until it is known which is the fastest.

    Wall time and energy are taken on the first placement alone: a caller's next call finds its tensors where they were.

    Args:
        timer: of the device, ``sweeps.measure.timer_for``. The interpreter's takes two blocks, which decide nothing.
        calls: at least one; each has run before.
        sampling: when to stop.
        seed: of the random order.
        elsewhere: makes the calls on further placements, in the order of ``calls``, each of which has then run before;
            asked for at most once, and only where several placements are wanted, there are rivals, and the quickest of
            them is done within PLACED_UP_TO_MS. None = there is but one placement.

    Raises:
        ValueError: no calls.
    """
    if not calls:
        raise ValueError("calls: expected at least one, got none")
    if isinstance(timer, CpuTimer):
        sampling = dataclasses.replace(sampling, max_blocks=CPU_SAMPLES, wall_ms=0.0, energy_ms=0.0)
        elsewhere = None
    contest = _Contest(timer, calls, sampling, seed)
    if elsewhere is not None and sampling.placements > 1 and len(calls) > 1:
        contest.spread(elsewhere)
    reason = contest.run()
    problems: list[str] = []
    if reason == "winner":
        _unless_it_fails("more samples of the winner", contest.settle, None, problems)
    ended = standing(contest.samples, sampling.tie_margin, contest.block_placements)
    no_walls: tuple[tuple[tuple[float, ...], ...], str] = ((),) * len(calls), ""
    walls, source = _unless_it_fails("wall time", lambda: _wall_blocks(calls, sampling, seed), no_walls, problems)
    energy: list[Energy | None] = [None] * len(calls)
    for n, call in enumerate(calls):
        if sampling.energy_ms > 0 and n in ended.tied and ended.ratios[n].ratio <= 1 + sampling.tie_margin:
            energy[n] = _unless_it_fails("energy", functools.partial(timer.energy, call, sampling.energy_ms), None,
                                         problems)
    mode, note = ("host_bound", HOST_BOUND_NOTE) if contest.host_bound else ("spin", "")
    if isinstance(timer, CpuTimer):
        mode, note = "cpu", INTERPRETER_NOTE
    incomplete = "; ".join(problems)
    return FinalTiming(tuple(map(tuple, contest.samples)), ended, reason, mode,
                       "; ".join(filter(None, (note, incomplete))), contest.host_ms, walls, source, tuple(energy),
                       contest.late, contest.retaken, tuple(contest.readings), seed, sampling.tie_margin,
                       tuple(contest.block_placements), contest.placements_note, timer.capture_failed, incomplete)


def _unless_it_fails(what: str, take: Callable[[], T], otherwise: T, problems: list[str]) -> T:
    """What ``take`` returns; where it fails, as for memory that others have taken by now, ``otherwise``, and a line in
    ``problems``."""
    try:
        return take()
    except Exception as error:
        problems.append(f"no {what}: {message(error)}")
        return otherwise


class _Contest:
    def __init__(self, timer: BlockTimer, calls: Sequence[Call], sampling: FinalSampling, seed: int) -> None:
        self._timer, self._sampling = timer, sampling
        self._places: list[Sequence[Call]] = [calls]
        self._random = random.Random(seed)
        warm = [timer.warm_up(call, sampling.warmup_ms) for call in calls]
        self.host_ms = tuple(host for host, _ in warm)
        self._call_ms = [total for _, total in warm]
        self._spin_ms = spin_for(max(self.host_ms))
        self._active = list(range(len(calls)))
        self.samples: list[list[float]] = [[] for _ in calls]
        self.block_placements: list[int] = []
        self.placements_note = ""
        self.readings: list[Reading] = []
        self.late = self.retaken = self._retakes = 0
        self.host_bound = False
        self._begin = 0.0

    @property
    def _blocks(self) -> int:
        return len(self.block_placements)

    def spread(self, elsewhere: Elsewhere) -> None:
        """Has the blocks go round other placements as well, where the calls are short enough for it to matter."""
        quickest = min(self._call_ms)
        if quickest > PLACED_UP_TO_MS:
            self.placements_note = f"1: a call takes {quickest:.3g} ms, more than {PLACED_UP_TO_MS:g}"
            return
        others, self.placements_note = elsewhere(self._sampling.placements)
        self._places += others

    def run(self) -> str:
        """Takes blocks until one of the reasons to stop holds; returns it."""
        look = min(max(MIN_PAIRS, len(self._places)), self._sampling.max_blocks)
        self._begin = time.perf_counter()
        while True:
            self._chunk(look - self._blocks)
            elapsed_ms = self._elapsed_ms()
            out_of_time = self._blocks > 0 and elapsed_ms > self._sampling.max_ms * (
                1 if self._blocks >= MIN_PAIRS else 4 if self._blocks >= 3 else 16)
            if self._blocks < look and not out_of_time:
                continue
            if len(self.samples) == 1:
                return "alone"
            if reason := self._look():
                return reason
            if out_of_time:
                return "time"
            if look >= self._sampling.max_blocks:
                return "samples"
            look = min(self._sampling.max_blocks, int(look * _GROWTH))

    def settle(self) -> None:
        """More samples of the winner, within the limits of the contest. Eight may tell who is fastest and say little of
        how fast: 35 us were known to 10% so."""
        winner, = self._active
        while self._blocks < self._sampling.max_blocks and (self.host_bound or self._spin_ms < MAX_SPIN_MS):
            half_width = relative_half_width(self.samples[winner])
            if half_width is not None and half_width <= Sampling.precision:
                return
            if self._elapsed_ms() > self._sampling.max_ms:
                return
            self._chunk(min(MIN_PAIRS, self._sampling.max_blocks - self._blocks))

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self._begin) * 1e3

    def _look(self) -> str:
        """Drops who is slower; returns why the contest is over, "" = it is not."""
        if self._blocks < MIN_PAIRS:
            return ""
        now = standing(self.samples, self._sampling.tie_margin, self.block_placements)
        if not self._sampling.race:
            widest = max(own.half_width for own in now.ratios)
            return "precision" if widest <= self._sampling.precision else ""
        self._active = [n for n in self._active if n in now.tied]
        if len(now.tied) == 1:
            return "winner"
        if now.decided:
            return "tie"
        return "precision" if now.half_width <= self._sampling.precision else ""

    def _chunk(self, wanted: int) -> None:
        """Takes some blocks, at most those wanted; whole ones that count are added."""
        block_ms = sum(self._call_ms[n] + self._spin_ms + 0.1 for n in self._active)
        size = len(self._active)
        count = max(1, min(wanted, int(BATCH_MS / block_ms), _MAX_CHUNK // size))
        places = self._next_places(count)
        order = [(place, n) for place in places for n in self._random.sample(self._active, size)]
        try:
            timed, reading = self._timer.batch([self._places[place][n] for place, n in order], self._spin_ms)
        except Exception as error:  # as memory for a call's temporaries that others have taken by now
            if len(self._places) == 1:
                raise
            self.placements_note = f"1 from block {self._blocks + 1} on: {message(error)}"
            del self._places[1:]
            return
        if reading and reading.slowed and self._retakes < _MAX_RETAKES:
            self._retakes += 1
            self.retaken += count
            time.sleep(_COOLING_S)
            return
        blocks = [list(zip(order[i:i + size], timed[i:i + size], strict=True)) for i in range(0, len(order), size)]
        in_time = [block for block in blocks if self.host_bound or not any(late for _, (_, late) in block)]
        self.late += len(blocks) - len(in_time)
        if len(in_time) < _LATE_SHARE * len(blocks):
            self._wait_longer()
            return
        if reading:
            self.readings.append(reading)
        for block in in_time:
            self.block_placements.append(block[0][0][0])
            for (_, n), (ms, _) in block:
                self.samples[n].append(ms)

    def _next_places(self, count: int) -> list[int]:
        """Of so many blocks: always a placement that has the fewest, whichever blocks were thrown away."""
        taken, chosen = Counter(self.block_placements), []
        for _ in range(count):
            chosen.append(min(range(len(self._places)), key=lambda place: (taken[place], place)))
            taken[chosen[-1]] += 1
        return chosen

    def _wait_longer(self) -> None:
        """More time for the host to queue a call; where no time is enough, all samples are taken anew as they come."""
        if self._spin_ms < MAX_SPIN_MS:
            self._spin_ms = min(2 * self._spin_ms, MAX_SPIN_MS)
            return
        self.host_bound, self._spin_ms = True, 0.1
        self._active = list(range(len(self.samples)))
        self.samples, self.block_placements = [[] for _ in self.samples], []


def _wall_blocks(calls: Sequence[Call], sampling: FinalSampling,
                 seed: int) -> tuple[tuple[tuple[float, ...], ...], str]:
    """Wall time of every entrant in randomised blocks, and the clock that took it."""
    samples: list[list[float]] = [[] for _ in calls]
    if sampling.wall_ms <= 0 or len(calls) == 1:
        return tuple(map(tuple, samples)), ""
    clock, source = wall_clock(cuda=True)
    shuffle = random.Random(seed)
    begin = time.perf_counter()
    while len(samples[0]) < _MIN_WALL_BLOCKS or (
            len(samples[0]) < sampling.max_blocks and (time.perf_counter() - begin) * 1e3 < sampling.wall_ms):
        for n in shuffle.sample(range(len(calls)), len(calls)):
            samples[n].append(clock(calls[n]))
    return tuple(map(tuple, samples)), source
