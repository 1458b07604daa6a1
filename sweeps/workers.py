"""Several workers on one device: while one times, others may prepare, and the device belongs to one at a time.

A peer compiles on its first call, which takes longer than all its timing. So peers have workers of their own, whose
preparing overlaps the timing of others. Everything that keeps the device busy for long (inputs, run, gate, measure,
check) is done by the worker that was granted the device; it is granted in the order of asking.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sweeps.child import Child
from sweeps.supervisor import Outcome, Span, Supervisor

GPU_STAGES = ("inputs", "run", "gate", "measure", "check")
OURS = "ours"

Seconds = dict[str, float]


@dataclasses.dataclass(eq=False)
class Lane:
    """One worker's place.

    Attributes:
        name: "ours" or "peers", "peers 2" ...
        supervisor: of its process.
        job: what it is on, whatever the caller submitted; None = nothing.
        sources: the peers it has begun with. They stay with it, since what they compiled lives in its process.
    """

    name: str
    supervisor: Supervisor
    job: Any = None
    sources: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A job that has ended, how, and for how many seconds of its timing another worker was preparing (None = it was
    not timed)."""

    lane: Lane
    job: Any
    outcome: Outcome
    overlapped_s: float | None


class Workers:
    """Starts them when they are needed and hands the device round. Nothing here waits.

    Args:
        peers: workers for peers beside the one of ours; 0 = that one does everything.
        limit_s: seconds a job may stay in a stage, waiting for the device aside.
        on_stage: told (job, stage) of every stage a job enters.
        on_note: told of what a new worker has to say once.
    """

    def __init__(self, peers: int, limit_s: Callable[[str], float], on_stage: Callable[[Any, str], None],
                 on_note: Callable[[str], None]) -> None:
        self._on_stage = on_stage
        arguments = (str(1 + peers),)
        names = (OURS, *(f"peers {n}" if n > 1 else "peers" for n in range(1, peers + 1)))
        self.lanes = [
            Lane(name, Supervisor(limit_s, functools.partial(self._stage, number), on_note, arguments=arguments,
                                  make_room=functools.partial(self._make_room, number)))
            for number, name in enumerate(names)]

    @property
    def jobs(self) -> list[Any]:
        """What is being worked on."""
        return [lane.job for lane in self.lanes if lane.job is not None]

    def start_ours(self) -> None:
        """Starts the worker of ours where it does not run, ahead of its first trial."""
        _ = self.lanes[0].supervisor.idle

    def lanes_for(self, source: str, peer: bool) -> list[Lane]:
        """Who may take a job of this implementation, a single one once a peer has begun."""
        if not peer or len(self.lanes) == 1:
            return self.lanes[:1]
        return [lane for lane in self.lanes[1:] if source in lane.sources] or self.lanes[1:]

    def submit(self, lane: Lane, job: Any, source: str, request: Mapping[str, Any]) -> bool:
        """Hands an idle lane its next job; False where its worker has just ended by itself."""
        lane.job = job
        if not lane.supervisor.submit(request):
            lane.job = None
            return False
        lane.sources.add(source)
        return True

    def others_hold_memory(self, lane: Lane) -> bool:
        """Whether a job of this lane shared the device with another process."""
        return any(other.supervisor.running for other in self.lanes if other is not lane)

    def _make_room(self, number: int) -> bool:
        """Ends idle workers beside one that does not come up; whether there were others at all.

        What a peer is at work on can fill the device for longer than a few starts: 129 of 140 GiB for cuDNN's
        deterministic backward of 32768 tokens. It has limits of its own.
        """
        others = [lane for lane in self.lanes if lane is not self.lanes[number] and lane.supervisor.running]
        for lane in others:
            if lane.job is None:
                lane.supervisor.close()
        return bool(others)

    def leave_alone(self, lane: Lane) -> None:
        """Ends all other workers, which must have nothing to do, so that the device is this one's alone."""
        for other in self.lanes:
            if other is not lane:
                other.supervisor.close()

    def readable(self) -> list[Child]:
        """What becomes readable when :meth:`poll` has something to do."""
        return [child for lane in self.lanes for child in lane.supervisor.readable()]

    def time_left_s(self) -> float | None:
        """Seconds until some job is over its limit, None where none has one."""
        return min((left for lane in self.lanes if (left := lane.supervisor.time_left_s()) is not None), default=None)

    def poll(self) -> list[Finished]:
        """Takes in what the workers have said and grants the device; the jobs that ended.

        Raises:
            RunError: no worker comes up.
        """
        # all are listened to before any overlap is told: a busy parent may find one's row and another's stages together
        outcomes = [(lane, lane.supervisor.poll()) for lane in self.lanes]
        finished: list[Finished] = []
        for lane, outcome in outcomes:
            if outcome is not None:
                finished.append(Finished(lane, lane.job, outcome, self._overlap(lane, outcome.measured)))
                lane.job = None
        self._grant()
        return finished

    def close(self) -> None:
        for lane in self.lanes:
            lane.supervisor.close()

    @property
    def seconds(self) -> Seconds:
        """Where the time of all of them went, by stage."""
        total: defaultdict[str, float] = defaultdict(float)
        for lane in self.lanes:
            for stage, s in lane.supervisor.seconds.items():
                total[stage] += s
        return {stage: round(s, 3) for stage, s in total.items()}

    @property
    def by_worker(self) -> dict[str, Seconds]:
        """Where the time of each went, by stage; a worker that was never started is left out."""
        return {lane.name: {stage: round(s, 3) for stage, s in lane.supervisor.seconds.items()}
                for lane in self.lanes if lane.supervisor.seconds}

    @property
    def gpu_s(self) -> float:
        """Seconds in which one of them had the device and used it. Two never do at once, so they add up."""
        return sum(lane.supervisor.seconds[stage] for lane in self.lanes for stage in GPU_STAGES
                   if stage in lane.supervisor.seconds)

    def _stage(self, number: int, stage: str) -> None:
        self._on_stage(self.lanes[number].job, stage)

    def _grant(self) -> None:
        asking = [lane.supervisor for lane in self.lanes if lane.supervisor.asking_since is not None]
        if asking and not any(lane.supervisor.holding for lane in self.lanes):
            min(asking, key=lambda supervisor: supervisor.asking_since or 0.0).grant()

    def _overlap(self, lane: Lane, measured: Span | None) -> float | None:
        if measured is None:
            return None
        return _covered([span for other in self.lanes if other is not lane
                         for span in other.supervisor.preparing(measured)])


def _covered(spans: Sequence[Span]) -> float:
    """Seconds in at least one of the spans."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return round(total, 4)
