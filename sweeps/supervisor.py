"""The parent's side of the worker: one process on one device, held to a limit at every stage, replaced when it ends."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from sweeps.child import Child, explain_exit
from sweeps.failures import shorten

_START_LIMIT_S = 180.0
_MAX_FAILED_STARTS = 2


class RunError(RuntimeError):
    """The run cannot go on, whatever the trial; the message says why. What was written stays."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the trial that was submitted ended.

    Attributes:
        fields: of its row; status and message are always among them.
        stage: where it was when its worker ended under it, "" when the worker told its row itself.
    """

    fields: dict[str, Any]
    stage: str = ""


class Supervisor:
    """Starts the worker when it is first needed and again whenever it has ended. Nothing here waits.

    Args:
        limit_s: seconds a trial may stay in a stage.
        on_stage: told of every stage the trial enters.
        on_note: told of what a new worker has to say once.
        module: what to run as the worker.

    Attributes:
        seconds: where time went, by stage; "waiting" is a ready worker without a trial, "starting" a new one's start.
    """

    def __init__(self, limit_s: Callable[[str], float], on_stage: Callable[[str], None], on_note: Callable[[str], None],
                 module: str = "sweeps.worker") -> None:
        self._limit_s, self._on_stage, self._on_note, self._module = limit_s, on_stage, on_note, module
        self._child: Child | None = None
        self._ready = self._busy = False
        self._failed_starts = 0
        self._stage = ""
        self._since = time.monotonic()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @property
    def idle(self) -> bool:
        """Whether a trial can be submitted. Asking starts the worker where there is none."""
        if self._child is None:
            self._child = Child(self._module)
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
        self._busy = True
        self._enter("import")
        return True

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
                self._enter("waiting")
            elif message["event"] == "stage":
                self._enter(message["stage"])
            elif message["event"] == "row":
                self._busy = False
                outcome = Outcome(message["row"])
                self._enter("waiting")
                alive = alive and not message["leaving"]
        left = self.time_left_s()
        if not alive:
            outcome = self._ended(explain_exit(self._child.close())) or outcome
        elif left is not None and left < 0:
            outcome = self._overdue()
        return outcome

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None
        self._enter("")

    def _limit(self) -> float | None:
        if self._child is None or (self._ready and not self._busy):
            return None
        return self._limit_s(self._stage) if self._ready else _START_LIMIT_S

    def _ended(self, how: str) -> Outcome | None:
        """The worker is gone: its trial, if it had one, crashed."""
        outcome = self._outcome("crashed", f"the worker ended ({how})")
        if not self._ready:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
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
        return Outcome({"status": status, "message": message}, self._stage)

    def _tail(self) -> str:
        return shorten(self._child.tail()) if self._child else ""

    def _forget(self) -> None:
        self._child = None
        self._ready = self._busy = False
        self._enter("starting")

    def _enter(self, stage: str) -> None:
        now = time.monotonic()
        if self._stage:
            self.seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now
        if self._busy:
            self._on_stage(stage)
