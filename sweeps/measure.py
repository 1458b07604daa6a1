"""The only timing code: samples of device time in milliseconds, and what the card was doing meanwhile.

A device sample is one call between two CUDA events, with the L2 cache flushed before it. The call is queued behind a
spinning kernel, so that everything it launches is waiting when the first event fires and no host gap is timed. Whether
that held is checked for every sample: when the host is done queueing, the first event must still be in the future.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sweeps.environment import nvml_handle

if TYPE_CHECKING:
    import torch

Call = Callable[[], None]

INTERPRETER_NOTE = "interpreter: times mean nothing"
HOST_BOUND_NOTE = "host_bound: the host could not keep ahead of the device, so host gaps are in the time"
GRAPH_NOTE = "timed as a replayed CUDA graph, since queueing the call takes longer than the spin"

_MAX_SPIN_MS = 30.0
_MAX_BATCH = 10
_BATCH_MS = 25.0
_MAX_RETAKES = 3
_CPU_SAMPLES = 2
_THROTTLE = {0x4: "sw_power_cap", 0x8: "hw_slowdown", 0x20: "sw_thermal", 0x40: "hw_thermal", 0x80: "hw_power_brake"}
_SLOWDOWN = 0x8 | 0x20 | 0x40 | 0x80  # a power cap is how the card works under load: recorded, not fought


@dataclasses.dataclass(frozen=True)
class Sampling:
    """When to stop.

    Attributes:
        precision: relative half-width of the median's 95% interval that is good enough.
        min_samples: never fewer on a GPU, unless ``max_ms`` is over after three. At least 6, the fewest that have such
            an interval.
        max_samples: never more.
        max_ms: time for sampling, milliseconds, flushes and spins included.
        warmup_ms: calls before the first sample, milliseconds.
        wall_ms: time for the wall-clock samples, milliseconds.
    """

    precision: float = 0.01
    min_samples: int = 10
    max_samples: int = 200
    max_ms: float = 150.0
    warmup_ms: float = 10.0
    wall_ms: float = 20.0


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
            "timing": self.mode, "host_ms": self.host_ms, "late_samples": self.late,
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


def timer_for(device: torch.device) -> DeviceTimer | CpuTimer:
    """The timer of a device; one per process, since a GPU's is calibrated."""
    return DeviceTimer(device) if device.type == "cuda" else CpuTimer()


class CpuTimer:
    """A few calls by the clock. Triton's interpreter says nothing about a GPU, and the note says so."""

    def measure(self, call: Call, sampling: Sampling) -> Timing:
        samples: list[float] = []
        while len(samples) < _CPU_SAMPLES:
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e3)
        return Timing(tuple(samples), "samples", "cpu", INTERPRETER_NOTE)

    def allocated(self) -> int | None:
        return None

    def peak_memory(self, call: Call, held: int | None) -> int | None:
        return None


class DeviceTimer:
    """Times calls on one CUDA device, on its current stream."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._torch = torch
        self._device = device
        card = torch.cuda.get_device_properties(device)
        l2_bytes = getattr(card, "L2_cache_size", 0) or 64 << 20
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device)
        self._sensors = Sensors(str(getattr(card, "uuid", "")) or None, device.index or 0)
        self._cycles_per_ms = self._calibrate()

    def measure(self, call: Call, sampling: Sampling) -> Timing:
        """Samples until the median is known to ``sampling.precision``; the call has run before."""
        host_ms, device_ms = self._warm_up(call, sampling.warmup_ms)
        timed, mode, note, tainted = call, "spin", "", False
        spin_ms = min(max(0.1, 2 * host_ms + 0.05), _MAX_SPIN_MS)
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
            count = max(1, min(_MAX_BATCH, goal - len(samples), int(_BATCH_MS / (device_ms + spin_ms + 0.1))))
            batch, reading = self._batch(timed, count, spin_ms)
            in_time = [ms for ms, was_late in batch if not was_late]
            if mode != "host_bound":
                late += count - len(in_time)
                if 2 * len(in_time) < count:
                    if spin_ms < _MAX_SPIN_MS:
                        spin_ms = min(2 * spin_ms, _MAX_SPIN_MS)
                    elif mode == "spin" and 1.5 * host_ms > spin_ms and (replay := self._capture(call)):
                        timed, mode, note, samples = replay, "graph", GRAPH_NOTE, []
                    else:
                        # A call that is quick to queue and still late waits for the device inside: nothing hides that.
                        tainted = mode == "spin" and 1.5 * host_ms > spin_ms
                        mode, note, samples, spin_ms = "host_bound", HOST_BOUND_NOTE, [], 0.1
                    continue
            if reading and reading.throttle & _SLOWDOWN and retakes < _MAX_RETAKES:
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
        return Timing(tuple(samples), stop, mode, note, host_ms, late, tainted=tainted, **_summary(readings))

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

    def _warm_up(self, call: Call, warmup_ms: float) -> tuple[float, float]:
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

    def _batch(self, call: Call, count: int, spin_ms: float) -> tuple[list[tuple[float, bool]], Reading | None]:
        """``count`` samples as (ms, whether the host was late), and the sensors while they ran."""
        cycles = int(spin_ms * self._cycles_per_ms)
        marks = []
        for _ in range(count):
            start, end = self._event(), self._event()
            self._flush.zero_()
            self._torch.cuda._sleep(cycles)
            start.record()
            call()
            end.record()
            marks.append((start, end, start.query()))  # it has fired already: the device was not kept waiting
        reading = self._sensors.read()
        self._torch.cuda.synchronize(self._device)
        return [(start.elapsed_time(end), was_late) for start, end, was_late in marks], reading

    def _capture(self, call: Call) -> Call | None:
        """The call as one replayed CUDA graph, or None where it cannot be captured."""
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
                call()
            graph.replay()
            cuda.synchronize(self._device)
        except Exception:  # what a callee does that a capture forbids surfaces as many kinds of error
            return None
        return graph.replay


@dataclasses.dataclass(frozen=True)
class Reading:
    """One look at the sensors; what the card does not tell is None."""

    sm_clock_mhz: float | None
    mem_clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    throttle: int


class Sensors:
    """Clocks, power, temperature and throttle reasons through NVML, without root; silent where there is none."""

    def __init__(self, uuid: str | None, index: int = 0) -> None:
        self._nvml = nvml_handle(uuid, index)

    def read(self) -> Reading | None:
        if self._nvml is None:
            return None
        nvml, handle = self._nvml
        reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or \
            nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        power_mw = _ask(nvml.nvmlDeviceGetPowerUsage, handle)
        return Reading(
            sm_clock_mhz=_ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            mem_clock_mhz=_ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            power_w=None if power_mw is None else power_mw / 1e3,
            temperature_c=_ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            throttle=int(_ask(reasons, handle) or 0))


def _ask(function: Callable[..., Any], *arguments: Any) -> float | None:
    try:
        return float(function(*arguments))
    except Exception:  # each card supports its own subset
        return None


def _summary(readings: Sequence[Reading]) -> dict[str, Any]:
    def over(name: str, fold: Callable[[list[float]], float]) -> float | None:
        known = [value for r in readings if (value := getattr(r, name)) is not None]
        return fold(known) if known else None

    seen = functools.reduce(lambda bits, r: bits | r.throttle, readings, 0)
    return {
        "sm_clock_mhz": over("sm_clock_mhz", statistics.median),
        "mem_clock_mhz": over("mem_clock_mhz", statistics.median),
        "power_w": over("power_w", max), "temperature_c": over("temperature_c", max),
        "throttle": tuple(name for bit, name in _THROTTLE.items() if seen & bit),
    }
