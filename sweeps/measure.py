"""The only timing code: samples of device time in milliseconds, and what the card was doing meanwhile.

A device sample is one call between two CUDA events, with the L2 cache flushed before it. The call is queued behind a
spinning kernel, so that everything it launches is waiting when the first event fires and no host gap is timed. Whether
that held is checked for every sample: when the host is done queueing, the first event must still be in the future.
What the same pair of events shows around nothing (1.9 to 2.9 us on H100s and an H200) is no kernel's time and is taken
off every sample.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sweeps.energy import Energy, loop_energy
from sweeps.sampling import Sampling
from sweeps.sensors import Reading, Sensors, summary

if TYPE_CHECKING:
    import torch

Call = Callable[[], None]

INTERPRETER_NOTE = "interpreter: times mean nothing"
HOST_BOUND_NOTE = "host_bound: the host could not keep ahead of the device, so host gaps are in the time"
GRAPH_NOTE = "timed as a replayed CUDA graph, since queueing the call takes longer than the spin"

MAX_SPIN_MS = 30.0
_MAX_BATCH = 10
BATCH_MS = 25.0  # of work queued at a time
_MAX_RETAKES = 3
CPU_SAMPLES = 2
_ZERO_SAMPLES = 30
_EVENT_TICK_MS = 32e-6  # of the events' clock on an H100; no sample is shorter
_BURST_MS = 10.0
_MAX_BURST_CALLS = 500


@dataclasses.dataclass(frozen=True)
class Timing:
    """Samples of one call and how they came about. Times in milliseconds.

    Attributes:
        samples_ms: every sample that counts, in the order taken.
        stop_reason: "precision", "time" or "samples".
        mode: "spin", "graph", "host_bound" or "cpu".
        note: what a reader must know about the times, "" = nothing.
        host_ms: what the host needs to queue the call; None on a CPU.
        late: samples thrown away because the host came late.
        zero_ms: what a pair of events shows around nothing, which every sample is without.
        sm_clock_mhz, mem_clock_mhz, power_w, temperature_c: medians (power and temperature: highest) of what NVML said
            while the samples ran, None without it.
        throttle: names of the reasons seen.
        tainted: the process should be replaced, because a failed graph capture may have left traces.
    """

    samples_ms: tuple[float, ...]
    stop_reason: str
    mode: str
    note: str = ""
    host_ms: float | None = None
    late: int = 0
    zero_ms: float = 0.0
    sm_clock_mhz: float | None = None
    mem_clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    throttle: tuple[str, ...] = ()
    tainted: bool = False

    @property
    def latency_ms(self) -> float:
        return statistics.median(self.samples_ms)

    def row_fields(self) -> dict[str, Any]:
        """What a row says about the time."""
        fifths = (statistics.quantiles(self.samples_ms, n=5, method="inclusive") if len(self.samples_ms) > 1
                  else [self.samples_ms[0]] * 4)
        return {
            "latency_ms": self.latency_ms, "latency_ms_p20": fifths[0], "latency_ms_p80": fifths[3],
            "samples": len(self.samples_ms), "samples_ms": [round(s, 6) for s in self.samples_ms],
            "half_width": relative_half_width(self.samples_ms), "stop_reason": self.stop_reason,
            "timing": self.mode, "host_ms": self.host_ms, "late_samples": self.late, "event_zero_ms": self.zero_ms,
            "sm_clock_mhz": self.sm_clock_mhz, "mem_clock_mhz": self.mem_clock_mhz, "power_w": self.power_w,
            "temperature_c": self.temperature_c, "throttle": list(self.throttle),
        }


@functools.lru_cache(maxsize=4096)
def _interval_rank(count: int) -> int | None:
    """The largest r such that the r-th smallest and r-th largest of ``count`` samples enclose the median with 95%."""
    below, rank = 0, 0
    for k in range(count // 2):
        below += math.comb(count, k)
        if 2 * below > 0.05 * 2**count:
            break
        rank = k + 1
    return rank or None


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """The 95% confidence interval of the median by order statistics; None for fewer than 6 samples."""
    rank = _interval_rank(len(samples))
    if rank is None:
        return None
    ordered = sorted(samples)
    return ordered[rank - 1], ordered[-rank]


def relative_half_width(samples: Sequence[float]) -> float | None:
    """Half the width of :func:`median_interval` over the median; None for fewer than 6 samples."""
    interval = median_interval(samples)
    if interval is None:
        return None
    return (interval[1] - interval[0]) / 2 / statistics.median(samples)


def spin_for(host_ms: float) -> float:
    """How long to keep the device waiting, so that a call that takes the host this long is queued by then; ms."""
    return min(max(0.1, 2 * host_ms + 0.05), MAX_SPIN_MS)


def timer_for(device: torch.device) -> DeviceTimer | CpuTimer:
    """The timer of a device; one per process, since a GPU's is calibrated."""
    return DeviceTimer(device) if device.type == "cuda" else CpuTimer()


class CpuTimer:
    """A few calls by the clock. Triton's interpreter says nothing about a GPU, and the note says so."""

    capture_failed = False

    def measure(self, call: Call, sampling: Sampling) -> Timing:
        samples, _ = self.batch([call] * CPU_SAMPLES, 0.0)
        return Timing(tuple(ms for ms, _ in samples), "samples", "cpu", INTERPRETER_NOTE)

    def batch(self, calls: Sequence[Call], spin_ms: float) -> tuple[list[tuple[float, bool]], Reading | None]:
        """One sample of each call, none of them late, and no sensors."""
        samples = []
        for call in calls:
            start = time.perf_counter()
            call()
            samples.append(((time.perf_counter() - start) * 1e3, False))
        return samples, None

    def warm_up(self, call: Call, warmup_ms: float) -> tuple[float, float]:
        """Nothing: the interpreter has no clocks to raise."""
        return 0.0, 0.0

    def synchronize(self) -> None:
        pass

    def energy(self, call: Call, duration_ms: float) -> Energy | None:
        return None

    def allocated(self) -> int | None:
        return None

    def peak_memory(self, call: Call, held: int | None) -> int | None:
        return None


class DeviceTimer:
    """Times calls on one CUDA device, on its current stream.

    Attributes:
        capture_failed: a graph capture failed here, which may have left traces in the process.
        zero_ms: what a pair of events shows around nothing at all, milliseconds; measured once.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._torch = torch
        self._device = device
        card = torch.cuda.get_device_properties(device)
        l2_bytes = getattr(card, "L2_cache_size", 0) or 64 << 20
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device)
        self._sensors = Sensors(str(getattr(card, "uuid", "")) or None, device.index or 0)
        self._cycles_per_ms = self._calibrate()
        self.capture_failed = False
        around_nothing, _ = self._between_events([lambda: None] * _ZERO_SAMPLES, spin_for(0.0))
        self.zero_ms = statistics.median([ms for ms, late in around_nothing if not late] or [0.0])

    def measure(self, call: Call, sampling: Sampling) -> Timing:
        """Samples until the median is known to ``sampling.precision``; the call has run before."""
        host_ms, device_ms = self.warm_up(call, sampling.warmup_ms)
        timed, mode, note, tainted = call, "spin", "", False
        spin_ms = spin_for(host_ms)
        samples: list[float] = []
        readings: list[Reading] = []
        late = retakes = 0
        stop = "time"
        begin = time.perf_counter()
        while True:
            elapsed_ms = (time.perf_counter() - begin) * 1e3
            if elapsed_ms > sampling.max_ms and len(samples) >= 3:
                break
            if len(samples) >= sampling.max_samples:
                stop = "samples"
                break
            goal = sampling.min_samples if len(samples) < sampling.min_samples else sampling.max_samples
            count = max(1, min(_MAX_BATCH, goal - len(samples), int(BATCH_MS / (device_ms + spin_ms + 0.1))))
            batch, reading = self.batch([timed] * count, spin_ms)
            in_time = [ms for ms, was_late in batch if not was_late]
            if mode != "host_bound":
                late += count - len(in_time)
                if 2 * len(in_time) < count:
                    if spin_ms < MAX_SPIN_MS:
                        spin_ms = min(2 * spin_ms, MAX_SPIN_MS)
                    elif mode == "spin" and 1.5 * host_ms > spin_ms and (replay := self.capture(call)):
                        timed, mode, note, samples = replay, "graph", GRAPH_NOTE, []
                    else:
                        # A call that is quick to queue and still late waits for the device inside: nothing hides that.
                        tainted = mode == "spin" and 1.5 * host_ms > spin_ms
                        mode, note, samples, spin_ms = "host_bound", HOST_BOUND_NOTE, [], 0.1
                    continue
            if reading and reading.slowed and retakes < _MAX_RETAKES:
                retakes += 1
                time.sleep(0.05)
                continue
            samples += [ms for ms, _ in batch] if mode == "host_bound" else in_time
            if reading:
                readings.append(reading)
            half_width = relative_half_width(samples) if len(samples) >= sampling.min_samples else None
            if half_width is not None and half_width <= sampling.precision:
                stop = "precision"
                break
        return Timing(tuple(samples), stop, mode, note, host_ms, late, self.zero_ms, tainted=tainted,
                      **summary(readings))

    def allocated(self) -> int | None:
        """Bytes of tensors alive on the device."""
        return self._torch.cuda.memory_allocated(self._device)

    def peak_memory(self, call: Call, held: int | None) -> int | None:
        """Runs the call once: the most bytes alive for it, beyond its inputs.

        That is ``held``, what its preparation allocated and kept, plus what the run itself adds to what was alive.
        """
        cuda = self._torch.cuda
        cuda.synchronize(self._device)
        cuda.reset_peak_memory_stats(self._device)
        alive = cuda.memory_allocated(self._device)
        call()
        cuda.synchronize(self._device)
        return max(0, held or 0) + cuda.max_memory_allocated(self._device) - alive

    def _event(self) -> torch.cuda.Event:
        return self._torch.cuda.Event(enable_timing=True)

    def _calibrate(self) -> float:
        """Cycles of the spinning kernel per millisecond, at the clock of a card at work."""
        cuda = self._torch.cuda
        cycles = 4_000_000
        rate = 0.0
        for _ in range(10):  # the first ones raise the clock; the highest rate makes the longest spin
            start, end = self._event(), self._event()
            start.record()
            cuda._sleep(cycles)
            end.record()
            end.synchronize()
            rate = max(rate, cycles / start.elapsed_time(end))
        return rate

    def warm_up(self, call: Call, warmup_ms: float) -> tuple[float, float]:
        """(host ms to queue the call, ms until it is done), from calls that begin with an idle device."""
        cuda = self._torch.cuda
        host: list[float] = []
        total: list[float] = []
        begin = time.perf_counter()
        while len(host) < 2 or (len(host) < 100 and (time.perf_counter() - begin) * 1e3 < warmup_ms):
            cuda.synchronize(self._device)
            start = time.perf_counter()
            call()
            queued = time.perf_counter()
            cuda.synchronize(self._device)
            host.append((queued - start) * 1e3)
            total.append((time.perf_counter() - start) * 1e3)
        return statistics.median_high(host[len(host) // 2:]), statistics.median(total)

    def batch(self, calls: Sequence[Call], spin_ms: float) -> tuple[list[tuple[float, bool]], Reading | None]:
        """One sample of each call, in the order given, and the sensors while they ran.

        Returns:
            Per call (ms, less ``zero_ms``; whether the host was late), and the reading, None without NVML.
        """
        samples, reading = self._between_events(calls, spin_ms)
        return [(max(ms - self.zero_ms, _EVENT_TICK_MS), was_late) for ms, was_late in samples], reading

    def _between_events(self, calls: Sequence[Call], spin_ms: float
                        ) -> tuple[list[tuple[float, bool]], Reading | None]:
        cycles = int(spin_ms * self._cycles_per_ms)
        marks = []
        for call in calls:
            start, end = self._event(), self._event()
            self.flush()
            self._torch.cuda._sleep(cycles)
            start.record()
            call()
            end.record()
            marks.append((start, end, start.query()))  # it has fired already: the device was not kept waiting
        reading = self._sensors.read()
        self.synchronize()
        return [(start.elapsed_time(end), was_late) for start, end, was_late in marks], reading

    def flush(self) -> None:
        """Queues what leaves nothing of earlier calls in the L2 cache: a write of twice its size."""
        self._flush.zero_()

    def synchronize(self) -> None:
        self._torch.cuda.synchronize(self._device)

    def energy(self, call: Call, duration_ms: float) -> Energy | None:
        """The call's energy from a loop of at least ``duration_ms``; None where the card does not tell."""
        _, call_ms = self.warm_up(call, 0.0)
        count = max(1, min(_MAX_BURST_CALLS, int(_BURST_MS / call_ms)))
        burst = self.capture(call, count)
        if burst is None:
            def burst() -> None:
                for _ in range(count):
                    call()
        return loop_energy(self._sensors.energy_mj, burst, count, self._event, duration_ms)

    def capture(self, call: Call, count: int = 1) -> Call | None:
        """``count`` calls as one replayed CUDA graph, or None where they cannot be captured."""
        cuda = self._torch.cuda
        try:
            stream = cuda.Stream(self._device)
            stream.wait_stream(cuda.current_stream(self._device))
            with cuda.stream(stream):
                call()
            cuda.current_stream(self._device).wait_stream(stream)
            cuda.synchronize(self._device)
            graph = cuda.CUDAGraph()
            with cuda.graph(graph, stream=stream):
                for _ in range(count):
                    call()
            graph.replay()
            cuda.synchronize(self._device)
        except Exception:  # what a callee does that a capture forbids surfaces as many kinds of error
            self.capture_failed = True
            return None
        return graph.replay
