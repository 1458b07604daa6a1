"""Whether our device time is the hardware's: the same calls by our events, by CUPTI and by Nsight Compute.

Ours is a pair of CUDA events around a call, less what they show around nothing. CUPTI (through torch.profiler) tells
when each kernel starts and ends, and is judged by its span, from the first start to the last end: of a call of several
kernels it has the gaps, as ours has. Nsight Compute tells each kernel's duration alone; they are summed. All see a
flushed L2 cache, and all are taken after the same calls at full load, in turn, since a card under its power cap drifts.
Where even that does not bring them together, events around the very launches CUPTI saw tell the clock from the card.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeps.measure import Call, DeviceTimer, spin_for
from sweeps.subjects import SMALLEST, SUBJECTS, heat

RELATIVE, ABSOLUTE_MS = 0.02, 0.001     # device time agrees within the larger of these
ROUNDS = 2
NCU_CALLS = 7
_ROUND_MS = 60.0
_SPIN_KERNEL = "spin_kernel"
_GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
_UNITS_MS = {"ns": 1e-6, "nsecond": 1e-6, "us": 1e-3, "usecond": 1e-3, "ms": 1.0, "msecond": 1.0, "s": 1e3,
             "second": 1e3}
_METRIC = "gpu__time_duration.sum"
_NCU_TIMEOUT_S = 180.0

Profile = Callable[[Call], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """One call by all clocks; medians in milliseconds, None = not measured.

    Attributes:
        name: of ``sweeps.subjects.SUBJECTS``.
        ours_ms, graph_ms: by our events, launched and as a replayed CUDA graph.
        profiled_ms: by our events while CUPTI was watching the same launches.
        cupti_ms, cupti_span_ms: the kernels' summed durations; from the first one's start to the last one's end.
        ncu_ms: the kernels' summed durations by Nsight Compute.
        kernels: of one call.
        samples: of ours.
        note: why a value is missing, "" = none is.
    """

    name: str
    ours_ms: float
    graph_ms: float | None
    profiled_ms: float
    cupti_ms: float
    cupti_span_ms: float
    ncu_ms: float | None
    kernels: int
    samples: int
    note: str = ""

    def agrees(self) -> bool:
        """Whether ours is within 2% or 1 us of CUPTI's span or of Nsight Compute's time."""
        return any(theirs is not None and near(self.ours_ms, theirs) for theirs in (self.cupti_span_ms, self.ncu_ms))

    def row(self) -> dict[str, Any]:
        """A line of agreement.csv."""
        row = {"call": self.name} | {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                                     if f.name not in ("name", "note")}
        for name, theirs in (("cupti", self.cupti_ms), ("cupti_span", self.cupti_span_ms), ("ncu", self.ncu_ms)):
            row |= {f"minus_{name}_us": None if theirs is None else 1e3 * (self.ours_ms - theirs),
                    f"minus_{name}_pct": None if theirs is None else 100 * (self.ours_ms / theirs - 1)}
        return row | {"agrees": self.agrees(), "note": self.note}


def near(ours_ms: float, theirs_ms: float) -> bool:
    """Within 2% of theirs, or 1 us."""
    return abs(ours_ms - theirs_ms) <= max(RELATIVE * theirs_ms, ABSOLUTE_MS)


# ---- CUPTI


def calls_of(trace: Mapping[str, Any]) -> list[list[tuple[float, float]]]:
    """(start, duration) in ms of the device's work in each call of a torch.profiler trace.

    A call follows a spinning kernel; the flush before the next spin is not part of it, nor is what comes before the
    first.
    """
    events = sorted((float(e["ts"]), float(e["dur"]), str(e["name"])) for e in trace["traceEvents"]
                     if e.get("ph") == "X" and e.get("cat") in _GPU_EVENTS)
    spins = [n for n, (_, _, name) in enumerate(events) if _SPIN_KERNEL in name]
    ends = [*(following - 1 for following in spins[1:]), len(events)][:len(spins)]
    return [[(start / 1e3, duration / 1e3) for start, duration, _ in events[spin + 1:end]]
            for spin, end in zip(spins, ends, strict=True)]


def cupti_profile(work: Call) -> Mapping[str, Any]:
    """The trace of what ``work`` did on the device."""
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            work()
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found: Mapping[str, Any] = json.loads(path.read_text())
        return found


# ---- Nsight Compute


def ncu_command(names: Iterable[str], count: int) -> list[str]:
    """Nsight Compute over some subjects, one after the other, with neither its clock control nor its cache control."""
    return ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--metrics", _METRIC, "--clock-control", "none",
            "--cache-control", "none", "--profile-from-start", "off", sys.executable, "-m", "sweeps.subjects",
            str(count), *names]


def ncu_calls_ms(text: str, count: int) -> list[list[float]]:
    """Milliseconds of each of ``count`` calls, its kernels summed, for every subject, from Nsight Compute's CSV.

    Raises:
        ValueError: the text has no such table, or a subject's kernels do not divide among the calls.
    """
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"no table in Nsight Compute's output: {' '.join(text.split())[-300:]}")
    units, *rows = csv.DictReader(io.StringIO("\n".join(lines[start:])))
    if _METRIC not in units or units[_METRIC] not in _UNITS_MS:
        raise ValueError(f"Nsight Compute's table has no {_METRIC} in a known unit, got {units.get(_METRIC)!r}")
    subjects: list[list[float]] = []
    for row in rows:
        if row.get("Kernel Name") and _SPIN_KERNEL in row["Kernel Name"]:
            subjects.append([])  # each begins with one
        elif row.get(_METRIC) and subjects:
            subjects[-1].append(float(row[_METRIC].replace(",", "")) * _UNITS_MS[units[_METRIC]])
    found = []
    for times in subjects:
        size = len(times) // count
        if not times or size * count != len(times):
            raise ValueError(f"Nsight Compute saw {len(times)} kernels in {count} calls")
        found.append([sum(times[n:n + size]) for n in range(0, len(times), size)])
    return found


def ncu_ms(names: Sequence[str]) -> tuple[dict[str, float], str]:
    """The subjects' medians by Nsight Compute, and why there are none, "" = there are.

    It is started once for all of them: starting takes longer than measuring.
    """
    paths = os.pathsep.join([str(Path(__file__).resolve().parent.parent), *(path for path in sys.path if path)])
    try:
        done = subprocess.run(ncu_command(names, NCU_CALLS), capture_output=True, text=True, timeout=_NCU_TIMEOUT_S,
                              env={**os.environ, "PYTHONPATH": paths})
        times = ncu_calls_ms(done.stdout, NCU_CALLS)
        if len(times) != len(names):
            raise ValueError(f"Nsight Compute saw {len(times)} of {len(names)} calls: {done.stderr[-200:]}")
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return {}, f"ncu: {str(error)[:300]}"
    return {name: statistics.median(own) for name, own in zip(names, times, strict=True)}, ""


# ---- the comparison


def compare(name: str, call: Call, timer: DeviceTimer, profile: Profile = cupti_profile) -> Agreement:
    """One call by our clock and CUPTI's, in turn.

    Args:
        call: has run before.
        profile: CUPTI's view of some work, as a torch.profiler trace.

    Raises:
        ValueError: CUPTI saw no kernel of the call.
    """
    host_ms, call_ms = timer.warm_up(call, 5.0)
    spin_ms = spin_for(3 * host_ms) + 0.3  # a profiler makes queueing slower
    count = max(5, min(30, int(_ROUND_MS / (call_ms + spin_ms))))
    replay = timer.capture(call)
    ours: list[float] = []
    graph: list[float] = []
    profiled: list[float] = []
    kernels: list[list[tuple[float, float]]] = []

    def take(timed: Call, into: list[float]) -> None:
        heat(timer, timed)
        samples, _ = timer.batch([timed] * count, spin_ms)
        into += [ms for ms, late in samples if not late]

    for _ in range(ROUNDS):
        take(call, ours)
        if replay is not None:
            take(replay, graph)
        kernels += calls_of(profile(lambda: take(call, profiled)))
    if not ours or not profiled or not kernels or not all(kernels):
        raise ValueError(f"{name}: expected kernels in every call and the host ahead of the device, got {len(ours)} "
                         f"samples of ours, {len(kernels)} calls seen by CUPTI")
    return Agreement(
        name, statistics.median(ours), statistics.median(graph) if graph else None, statistics.median(profiled),
        statistics.median(sum(ms for _, ms in own) for own in kernels),
        statistics.median(own[-1][0] + own[-1][1] - own[0][0] for own in kernels), None,
        statistics.mode(map(len, kernels)), len(ours))


def run_agreement(timer: DeviceTimer, device: Any, *, names: Iterable[str] = SUBJECTS,
                  keep: Callable[[Sequence[Agreement]], None] = lambda found: None,
                  say: Callable[[str], None] = print) -> list[Agreement]:
    """Every subject by our clock and CUPTI's.

    A subject that cannot be compared is said and left out.

    Args:
        keep: given what is there after every subject, since the next one may be the last.
        say: told what comes next.
    """
    import torch

    cupti_profile(lambda: torch.cuda.synchronize(device))  # the first profile pays for loading CUPTI
    found: list[Agreement] = []
    for name in names:
        try:
            call = SUBJECTS[name](device)
            call()
            found.append(compare(name, call, timer))
        except (ValueError, RuntimeError, StopIteration) as error:
            say(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        finally:
            call = None  # type: ignore[assignment]  # its tensors would be in the next one's way
            torch.cuda.empty_cache()
        say(f"{name}: {1e3 * found[-1].ours_ms:.2f} us, CUPTI {1e3 * found[-1].cupti_ms:.2f} us")
        keep(found)
    return found


def add_ncu(found: Sequence[Agreement], names: Collection[str],
            ask: Callable[[Sequence[str]], tuple[dict[str, float], str]] = ncu_ms) -> list[Agreement]:
    """The comparisons, with Nsight Compute's time or why it is missing in those that are named."""
    times, note = ask([one.name for one in found if one.name in names])
    return [dataclasses.replace(one, ncu_ms=times.get(one.name), note=note) if one.name in names else one
            for one in found]


def write_agreement(folder: Path, found: Sequence[Agreement], zero: float, facts: Mapping[str, Any]) -> None:
    """Writes agreement.csv and agreement.md. ``zero``: the timer's, milliseconds."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [one.row() | {"event_zero_ms": zero} for one in found]
    with (folder / "agreement.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "agreement.md").write_text(markdown(found, zero, facts))


def markdown(found: Sequence[Agreement], zero: float, facts: Mapping[str, Any]) -> str:
    """The comparison as text."""
    judged = [one for one in found if one.name != SMALLEST]
    asked = [one for one in judged if one.ncu_ms is not None]
    by_ncu = f", {sum(near(one.ours_ms, one.ncu_ms or 0.0) for one in asked)} of {len(asked)} with Nsight Compute"
    lines = [
        "# Device time beside the hardware's", "",
        ", ".join(f"{name} {value}" for name, value in facts.items() if value), "",
        f"{sum(one.agrees() for one in judged)} of {len(judged)} calls agree within 2% or 1 us with the hardware: "
        f"{sum(near(one.ours_ms, one.cupti_span_ms) for one in judged)} with CUPTI's span{by_ncu if asked else ''}.",
        "",
        f"Ours is without the {1e3 * zero:.2f} us that a pair of events shows around nothing."]
    lines += ["", "us; the differences are ours less theirs. \"same launches\": our events while CUPTI was watching, "
              "less its span of them.", "",
              "| call | kernels | ours | graph | CUPTI | span | ncu | to span | same launches | to ncu | |",
              "| --- " + "| ---: " * 9 + "| --- |"]
    for one in found:
        def us(ms: float | None) -> str:
            return "" if ms is None else f"{1e3 * ms:.2f}"

        def difference(theirs: float | None, ours: float = one.ours_ms) -> str:
            return "" if theirs is None else f"{1e3 * (ours - theirs):+.2f} ({100 * (ours / theirs - 1):+.2f}%)"

        verdict = "offset" if one.name == SMALLEST else "agrees" if one.agrees() else "**differs**"
        lines.append(f"| {one.name} | {one.kernels} | {us(one.ours_ms)} | {us(one.graph_ms)} | {us(one.cupti_ms)} | "
                     f"{us(one.cupti_span_ms)} | {us(one.ncu_ms)} | {difference(one.cupti_span_ms)} | "
                     f"{difference(one.cupti_span_ms, one.profiled_ms)} | {difference(one.ncu_ms)} | {verdict} |")
    notes = list(dict.fromkeys(f"{one.name}: {one.note}" for one in found if one.note))
    return "\n".join([*lines, *(["", *(f"- {note}" for note in notes)] if notes else [])]) + "\n"
