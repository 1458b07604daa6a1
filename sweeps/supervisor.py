"""The parent's side of a worker: one process on one device, held to a limit at every stage, replaced when it ends."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

from sweeps.child import Child, explain_exit
from sweeps.failures import shorten

_START_LIMIT_S = 180.0
_MAX_FAILED_STARTS = 3
_KEPT_SPANS = 64
_BESIDE_OTHERS = ("starting", "prepare")  # stages that use the device a little without having it


class RunError(RuntimeError):
    """The run cannot go on, whatever the trial; the message says why. What was written stays."""


Span = tuple[float, float]  # begin and end, seconds of time.monotonic


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the trial (or final) that was submitted ended.

    Attributes:
        fields: of its row; status and message are always among them.
        stage: where it was when its worker ended under it, "" when the worker told its row itself.
        measured: when it was being timed, None = it never was.
    """

    fields: dict[str, Any]
    stage: str = ""
    measured: Span | None = None


class Supervisor:
    """Starts the worker when it is first needed and again whenever it has ended. Nothing here waits.

    A worker that says it is "waiting" asks for the device, and goes on once :meth:`grant` was called. It has the device
    until it says otherwise, tells its row, or ends.

    Args:
        limit_s: seconds a trial may stay in a stage; "waiting" has no limit.
        on_stage: told of every stage the trial enters.
        on_note: told of what a new worker has to say once.
        module, arguments: what to run as the worker.
        make_room: asked when no worker comes up, whether others were in the way, so that it is worth trying on.

    Attributes:
        asking_since: when it asked for the device that it has not been given yet, None = it does not ask.
        holding: whether it has the device.
        seconds: where time went, by stage; "idle" is a ready worker without a trial, "starting" a new one's start,
            "waiting" is for the device.
    """

    def __init__(self, limit_s: Callable[[str], float], on_stage: Callable[[str], None], on_note: Callable[[str], None],
                 module: str = "sweeps.worker", arguments: tuple[str, ...] = (),
                 make_room: Callable[[], bool] = lambda: False) -> None:
        self._limit_s, self._on_stage, self._on_note = limit_s, on_stage, on_note
        self._module, self._arguments, self._make_room = module, arguments, make_room
        self._child: Child | None = None
        self._ready = self._busy = False
        self._failed_starts = 0
        self._not_before = 0.0
        self._stage = ""
        self._since = time.monotonic()
        self._prepared: deque[Span] = deque(maxlen=_KEPT_SPANS)
        self._measured: Span | None = None
        self.asking_since: float | None = None
        self.holding = False
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @property
    def running(self) -> bool:
        """Whether a process is there, working or not: it may hold memory of the device."""
        return self._child is not None

    @property
    def idle(self) -> bool:
        """Whether a trial can be submitted. Asking starts the worker where there is none.

        Another worker's trial can fill the device's memory for a moment, so one that did not come up is tried again
        after a pause.
        """
        if self._child is None:
            if time.monotonic() < self._not_before:
                return False
            self._child = Child(self._module, arguments=self._arguments)
            self._ready = False
            self._enter("starting")
        return self._ready and not self._busy

    def submit(self, request: Mapping[str, Any]) -> bool:
        """Hands an idle worker its next trial; False where it has just ended by itself, and the trial is to blame for
        nothing."""
        assert self._child is not None and self.idle
        self._child.mark()
        if not self._child.send(request):
            return False
        self._busy, self._measured = True, None
        self._enter("import")
        return True

    def grant(self) -> None:
        """Gives the device to a worker that asks for it."""
        assert self._child is not None and self.asking_since is not None
        self.asking_since = None
        self._enter("waiting", holding=True)  # from now on with a limit, until it says what it does with the device
        self._child.send({"grant": True})  # one that has just ended is noticed by the next poll

    def preparing(self, within: Span) -> list[Span]:
        """When, in that time, its worker started or prepared a trial without having the device."""
        spans = list(self._prepared)
        if self._stage in _BESIDE_OTHERS and not self.holding:
            spans.append((self._since, time.monotonic()))
        clipped = [(max(begin, within[0]), min(end, within[1])) for begin, end in spans]
        return [(begin, end) for begin, end in clipped if begin < end]

    def readable(self) -> list[Child]:
        """What becomes readable when :meth:`poll` has something to do."""
        return [self._child] if self._child else []

    def time_left_s(self) -> float | None:
        """Seconds until the present stage is over its limit, None where it has none."""
        limit = self._limit()
        return None if limit is None else self._since + limit - time.monotonic()

    def poll(self) -> Outcome | None:
        """Takes in what the worker has said; the outcome of the trial if it has ended.

        Raises:
            RunError: no worker comes up.
        """
        if self._child is None:
            return None
        outcome: Outcome | None = None
        said, alive = self._child.listen()
        for message in said:
            if message["event"] == "ready":
                self._ready, self._failed_starts = True, 0
                self._on_note(message["note"])
                self._enter("idle")
            elif message["event"] == "stage":
                self._enter(message["stage"], message["at"], holding=self.holding and message["holding"])
                self.asking_since = self._since if message["stage"] == "waiting" else None
            elif message["event"] == "row":
                self._busy = False
                self._enter("idle")
                outcome = Outcome(message["row"], measured=self._measured)
                alive = alive and not message["leaving"]
        left = self.time_left_s()
        if not alive:
            outcome = self._ended(explain_exit(self._child.close())) or outcome
        elif left is not None and left < 0:
            outcome = self._overdue()
        return outcome

    def close(self) -> None:
        """Ends the worker; a later trial starts a new one."""
        if self._child is not None:
            self._child.kill()
        self._forget()
        self._enter("")

    def _limit(self) -> float | None:
        if self._child is None or (self._ready and not self._busy) or self.asking_since is not None:
            return None
        return self._limit_s(self._stage) if self._ready else _START_LIMIT_S

    def _ended(self, how: str) -> Outcome | None:
        """The worker is gone: its trial, if it had one, crashed."""
        outcome = self._outcome("crashed", f"the worker ended ({how})")
        if not self._ready:
            self._failed_starts += 1
            self._not_before = time.monotonic() + 2.0 ** (self._failed_starts - 1)
            if self._failed_starts >= _MAX_FAILED_STARTS:
                if self._make_room():
                    self._failed_starts = 0
                else:
                    raise RunError(f"no worker can be started ({how}): {self._tail()}")
        self._forget()
        return outcome

    def _overdue(self) -> Outcome | None:
        """The worker has been at one stage for too long and is killed; its trial timed out."""
        assert self._child is not None
        self._child.kill()
        outcome = self._outcome("timeout", f"longer than its limit of {self._limit():g} s")
        if outcome is None:
            raise RunError(f"no worker can be started: not ready after {_START_LIMIT_S:g} s: {self._tail()}")
        self._forget()
        return outcome

    def _outcome(self, status: str, what: str) -> Outcome | None:
        if not self._busy:
            return None
        tail = self._tail()
        message = f"{self._stage}: {what}" + (f": {tail}" if tail else "")
        return Outcome({"status": status, "message": message}, self._stage, self._measured)

    def _tail(self) -> str:
        return shorten(self._child.tail()) if self._child else ""

    def _forget(self) -> None:
        self._enter("")
        self._child = None
        self._ready = self._busy = False
        self.asking_since = None

    def _enter(self, stage: str, at: float | None = None, *, holding: bool = False) -> None:
        """``at``: when, by the clock that all processes of a machine share; default now."""
        now = time.monotonic() if at is None else at
        if self._stage:
            self.seconds[self._stage] += now - self._since
        if self._stage in _BESIDE_OTHERS and not self.holding:
            self._prepared.append((self._since, now))
        if self._stage == "measure":
            self._measured = (self._since, now)
        self._stage, self._since, self.holding = stage, now, holding
        if self._busy and stage:
            self._on_stage(stage)
