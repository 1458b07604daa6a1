"""The contest: candidates that the first pass could not tell apart, timed against each other in the same moments.

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
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from sweeps.energy import Energy
from sweeps.failures import message
from sweeps.final_timing import FinalTiming
from sweeps.measure import (
    BATCH_MS,
    CPU_SAMPLES,
    HOST_BOUND_NOTE,
    INTERPRETER_NOTE,
    MAX_SPIN_MS,
    Call,
    CpuTimer,
    relative_half_width,
    spin_for,
)
from sweeps.paired import MIN_PAIRS, standing
from sweeps.sampling import FinalSampling, Sampling
from sweeps.sensors import Reading
from sweeps.walltime import wall_clock

_GROWTH = 1.5           # of the blocks from one look to the next
_MAX_CHUNK = 30         # samples queued at a time
_MAX_RETAKES = 3
_COOLING_S = 0.1
_LATE_SHARE = 0.5       # of blocks in which the host came late: more make the spin longer
_MIN_WALL_BLOCKS = MIN_PAIRS
# Milliseconds until a call is done. Placements were seen to change calls of 50 us, by 1 to 2%; the blocks of calls of
# more than this are dear, so that none should be asked for on their account.
PLACED_UP_TO_MS = 1.0

T = TypeVar("T")
# Given how many placements are wanted in all: the same calls on others than the first, and why not on as many as that
# ("" = it is as many).
Elsewhere = Callable[[int], tuple[Sequence[Sequence[Call]], str]]


class BlockTimer(Protocol):
    """What of a timer the contest needs; see :class:`sweeps.measure.DeviceTimer`."""

    capture_failed: bool

    def warm_up(self, call: Call, warmup_ms: float) -> tuple[float, float]: ...

    def batch(self, calls: Sequence[Call], spin_ms: float) -> tuple[list[tuple[float, bool]], Reading | None]: ...

    def energy(self, call: Call, duration_ms: float) -> Energy | None: ...


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
