"""What a caller waits for one call: lm-profiler's WallTime where it is installed, else our own clock.

lm-profiler is not on the package index; a distribution called ``profiler`` there is another project, so the module is
taken only when it has what it must have.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

LM_PROFILER = "lm-profiler"
OWN_CLOCK = "perf_counter"
_MAX_CALLS = 50


@dataclasses.dataclass(frozen=True)
class WallResult:
    """Attributes: wall_ms (median of warm calls, milliseconds), calls (how many), source (which clock)."""

    wall_ms: float
    calls: int
    source: str


def measure_wall(call: Callable[[], None], *, cuda: bool, budget_ms: float = 30.0, min_calls: int = 3) -> WallResult:
    """The median time from before a warm call to after a synchronisation, over at most 50 calls.

    Args:
        call: the call, which has run before.
        cuda: whether it works on the current CUDA device, which is synchronised before and after each call.
        budget_ms: after this time no further call is begun, once there are ``min_calls``.
    """
    clock, source = wall_clock(cuda)
    samples: list[float] = []
    begin = time.perf_counter()
    while _again(len(samples), min_calls, begin, budget_ms):
        samples.append(clock(call))
    return WallResult(statistics.median(samples), len(samples), source)


def wall_clock(cuda: bool) -> tuple[Callable[[Callable[[], None]], float], str]:
    """A clock that performs one call and says how many milliseconds it took, and which clock that is.

    Args:
        cuda: whether calls work on the current CUDA device, which is synchronised before and after each.
    """
    wall_time, _ = find_wall_time()
    if wall_time is not None:
        # cuda=None would synchronise the current device even under a torch without CUDA; an empty list does not.
        timer = wall_time("flash_sink_attn.sweeps", cuda=None if cuda else [])

        def profiled(call: Callable[[], None]) -> float:
            with timer:
                call()
            return float(timer.time[-1]) * 1e3

        return profiled, LM_PROFILER
    synchronize = _synchronize if cuda else _nothing

    def timed(call: Callable[[], None]) -> float:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        return (time.perf_counter() - start) * 1e3

    return timed, OWN_CLOCK


@functools.lru_cache(maxsize=1)
def find_wall_time() -> tuple[Any | None, str]:
    """lm-profiler's WallTime and "", or None and one sentence that says why our own clock is used."""
    try:
        module = importlib.import_module("profiler")
    except Exception as error:  # its own imports can fail in any way
        return None, f"lm-profiler is not installed ({_first_line(error)}); wall_ms is taken with our own clock"
    found = getattr(module, "WallTime", None)
    problem = _unfit(found)
    if problem:
        return None, (f"the installed module 'profiler' is not lm-profiler ({problem}); "
                      "wall_ms is taken with our own clock")
    return found, ""


def _unfit(candidate: Any) -> str:
    """What the candidate lacks to be WallTime(name, cuda=...), a context manager with a list of seconds in ``time``."""
    if not isinstance(candidate, type):
        return "it has no class WallTime"
    try:
        inspect.signature(candidate).bind("name", cuda=[])
        timer = candidate("flash_sink_attn.probe", cuda=[])
        with timer:
            pass
    except Exception as error:
        return f"its WallTime cannot be used as WallTime(name, cuda=...): {_first_line(error)}"
    taken = getattr(timer, "time", None)
    if not (isinstance(taken, list) and len(taken) == 1 and isinstance(taken[0], float) and 0 <= taken[0] < 60):
        return "its WallTime does not collect seconds in .time"
    return ""


def _again(done: int, needed: int, begin: float, budget_ms: float) -> bool:
    in_time = (time.perf_counter() - begin) * 1e3 < budget_ms
    return done < needed or (done < _MAX_CALLS and in_time)


def _synchronize() -> None:
    import torch

    torch.cuda.synchronize()


def _nothing() -> None:
    pass


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
