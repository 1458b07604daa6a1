"""Energy of a call: the card's own energy counter over a loop that is long enough for it.

The counter (NVML's total energy, in mJ) moves in steps, about ten a second. Power is therefore taken between two of
its steps, while the call is repeated without a pause; energy per call is that power times the loop's time per call.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from typing import Any

_IN_FLIGHT = 3          # bursts queued at a time, so that the device never waits for the host
_SETTLE_MS = 30.0       # before the first step counts: clocks and power follow the load
_LIMIT = 8              # give up after this many times the asked duration, at least _PATIENCE_MS
_PATIENCE_MS = 1000.0


@dataclasses.dataclass(frozen=True)
class Energy:
    """Attributes:
        energy_j: joules of one call, the whole card's, idle share included.
        power_w: mean power over the loop.
        call_ms: milliseconds of one call in the loop, where the L2 cache is as the calls leave it.
        span_ms: time between the two steps of the counter.
        calls: calls in the loop.
    """

    energy_j: float
    power_w: float
    call_ms: float
    span_ms: float
    calls: int

    def fields(self) -> dict[str, Any]:
        """What a record says about it."""
        return {"energy_j": self.energy_j, "energy_power_w": self.power_w, "energy_call_ms": self.call_ms,
                "energy_span_ms": self.span_ms, "energy_calls": self.calls}


def loop_energy(counter_mj: Callable[[], float | None], burst: Callable[[], None], calls_per_burst: int,
                event: Callable[[], Any], duration_ms: float) -> Energy | None:
    """Repeats a call until its energy is known.

    Args:
        counter_mj: reads the counter, millijoules; None where the card has none.
        burst: queues ``calls_per_burst`` calls, some milliseconds of work, without waiting for them.
        event: makes a CUDA event with timing.
        duration_ms: the least time between the two steps of the counter.

    Returns:
        None where there is no counter, or it did not move in time.
    """
    if counter_mj() is None:
        return None
    marks: deque[Any] = deque()
    first_mark = last_mark = None
    done = 0                                   # bursts completed between the two marks
    first: tuple[float, float] | None = None   # (ms, mJ) at the first step that counts
    last: tuple[float, float] | None = None
    begin = time.perf_counter()
    value = counter_mj()
    while True:
        while len(marks) < _IN_FLIGHT:
            burst()
            mark = event()
            mark.record()
            marks.append(mark)
        now_ms = (time.perf_counter() - begin) * 1e3
        reading = counter_mj()
        if reading is not None and reading != value:
            value = reading
            if first is None:
                first = (now_ms, reading) if now_ms >= _SETTLE_MS else None
            else:
                last = (now_ms, reading)
        while marks and marks[0].query():
            last_mark = marks.popleft()
            if first_mark is None:
                first_mark = last_mark
            else:
                done += 1
        enough = first is not None and last is not None and last[0] - first[0] >= duration_ms
        if (enough and done) or now_ms > max(_LIMIT * duration_ms, _PATIENCE_MS):
            break
    if marks:  # (all are done where the host looked late)
        marks[-1].synchronize()
    if first is None or last is None or not enough or not done:
        return None
    call_ms = first_mark.elapsed_time(last_mark) / (done * calls_per_burst)  # type: ignore[union-attr]
    power_w = (last[1] - first[1]) / (last[0] - first[0])  # mJ per ms
    return Energy(power_w * call_ms / 1e3, power_w, call_ms, last[0] - first[0], done * calls_per_burst)
