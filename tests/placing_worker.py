"""``python -m tests.placing_worker``: a worker without a GPU whose finals go round placements all the same.

Its timer is not the interpreter's, and every call takes 50 us, to all appearance. With CONTEXT_BREAKS in the
environment the device's context is found broken once a placement fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from sweeps import worker
from sweeps.child import connect
from sweeps.placements import PLACING

Call = Callable[[], None]


class Timer:
    """What of a timer a final needs.

    Args:
        bytes_: what is said to be allocated, a number each time it is asked for; the last one stays.
        call_ms: what every call takes.
    """

    capture_failed = False

    def __init__(self, bytes_: Sequence[int] = (0,), call_ms: float = 0.05) -> None:
        self._bytes, self._call_ms = list(bytes_), call_ms

    def warm_up(self, call: Call, warmup_ms: float) -> tuple[float, float]:
        call()
        return 0.01, self._call_ms

    def batch(self, calls: Sequence[Call], spin_ms: float) -> tuple[list[tuple[float, bool]], None]:
        for call in calls:
            call()
        return [(self._call_ms, False)] * len(calls), None

    def energy(self, call: Call, duration_ms: float) -> None:
        return None

    def allocated(self) -> int:
        return self._bytes.pop(0) if len(self._bytes) > 1 else self._bytes[0]


if __name__ == "__main__":
    worker.timer_for = lambda device: Timer()
    if os.environ.get("CONTEXT_BREAKS"):
        worker.Worker._healthy = lambda self: self._stage != PLACING
    worker._serve(connect(), 1)
    os._exit(0)
