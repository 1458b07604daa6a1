"""The timing code on a simulated device whose true times are known, and what it makes of samples and sensors."""

from __future__ import annotations

import math
import random
import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeps import measure, sensors, walltime
from sweeps.failures import classify, message, shorten
from sweeps.measure import CpuTimer, DeviceTimer, Timing, median_interval, relative_half_width
from sweeps.sampling import Sampling


class Machine:
    """A host and a device with one queue, in milliseconds: what is queued runs when the queue before it is through."""

    CYCLES_PER_MS = 1_980_000

    def __init__(self, launch_ms: float = 0.004, event_zero_ms: float = 0.0) -> None:
        self.host = 0.0     # the host's clock
        self.device = 0.0   # when the device is through with what it has
        self.launch_ms = launch_ms
        self.event_zero_ms = event_zero_ms  # what a pair of events shows beside what is between them
        self.l2_cold = False
        self.alive = self.peak = 0

    def queue(self, ms: float) -> None:
        self.host += self.launch_ms
        self.device = max(self.device, self.host) + ms

    def kernel(self, ms: float) -> None:
        self.queue(ms if self.l2_cold else ms / 10)
        self.l2_cold = False

    def synchronize(self, *_: object) -> None:
        self.host = max(self.host, self.device) + 0.005

    def flush(self) -> None:
        self.queue(0.04)
        self.l2_cold = True

    def torch(self) -> Any:
        """As much of the torch module as the timer uses."""
        machine = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                machine.queue(0.0)
                self.at = machine.device

            def query(self) -> bool:
                return machine.host >= self.at

            def synchronize(self) -> None:
                machine.synchronize()

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at + machine.event_zero_ms

        def no_graphs() -> None:
            raise RuntimeError("no graphs here")

        cuda = types.SimpleNamespace(
            Event=Event, _sleep=lambda cycles: self.queue(cycles / self.CYCLES_PER_MS), synchronize=self.synchronize,
            Stream=lambda device: no_graphs(), memory_allocated=lambda device: self.alive,
            max_memory_allocated=lambda device: self.peak,
            reset_peak_memory_stats=lambda device: setattr(self, "peak", self.alive),
            get_device_properties=lambda device: types.SimpleNamespace(L2_cache_size=50 << 20))
        buffer = types.SimpleNamespace(zero_=self.flush)

        def empty(size: int, **_: object) -> Any:
            assert size >= 2 * (50 << 20)
            return buffer

        return types.SimpleNamespace(cuda=cuda, empty=empty, int8=None)


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], DeviceTimer]:
    def make(machine: Machine) -> DeviceTimer:
        monkeypatch.setitem(sys.modules, "torch", machine.torch())
        monkeypatch.setattr(sensors, "nvml_handle", lambda uuid, index: None)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: machine.host / 1e3)
        monkeypatch.setattr(measure.time, "sleep", lambda s: setattr(machine, "host", machine.host + s * 1e3))
        return DeviceTimer(types.SimpleNamespace(index=0, type="cuda"))  # type: ignore[arg-type]
    return make


def test_device_time_is_cold_and_holds_no_host_gaps(simulate: Callable[[Machine], DeviceTimer]) -> None:
    machine = Machine()

    def call() -> None:
        for _ in range(30):
            machine.host += 0.05  # 1.5 ms of Python around 0.3 ms of kernels
            machine.queue(0.01)
        machine.kernel(0.5)

    timing = simulate(machine).measure(call, Sampling())
    assert timing.mode == "spin" and timing.stop_reason == "precision" and timing.late == 0 and timing.note == ""
    assert timing.latency_ms == pytest.approx(0.8, rel=1e-6)
    assert timing.host_ms == pytest.approx(30 * 0.054 + 0.004, rel=0.02)
    assert len(timing.samples_ms) == 10


def test_what_a_pair_of_events_shows_around_nothing_is_in_no_sample(simulate: Callable[[Machine], DeviceTimer]) -> None:
    machine = Machine(event_zero_ms=0.0029)
    timing = simulate(machine).measure(lambda: machine.kernel(0.02), Sampling())
    assert timing.samples_ms == pytest.approx([0.02] * 10) and timing.latency_ms == pytest.approx(0.02)
    assert timing.row_fields()["event_zero_ms"] == pytest.approx(0.0029)
    samples, _ = simulate(machine).batch([lambda: None], 0.1)
    assert samples[0][0] > 0  # ratios of samples are taken


def test_a_call_that_waits_for_the_device_is_marked_host_bound(simulate: Callable[[Machine], DeviceTimer]) -> None:
    machine = Machine()

    def call() -> None:
        machine.queue(0.1)
        machine.synchronize()  # like .item() in the middle
        machine.host += 0.3
        machine.queue(0.1)

    timing = simulate(machine).measure(call, Sampling())
    assert timing.mode == "host_bound" and timing.note == measure.HOST_BOUND_NOTE and not timing.tainted
    assert timing.latency_ms > 0.45  # what it would have hidden: 0.2


def test_a_call_too_long_for_any_spin_becomes_host_bound_and_taints_where_no_graph_can_be_made(
        simulate: Callable[[Machine], DeviceTimer]) -> None:
    machine = Machine()

    def call() -> None:
        machine.queue(0.1)
        machine.host += 40.0
        machine.queue(0.1)

    timing = simulate(machine).measure(call, Sampling(max_ms=500))
    assert timing.mode == "host_bound" and timing.tainted and timing.latency_ms > 39


def test_one_late_sample_is_thrown_away(simulate: Callable[[Machine], DeviceTimer]) -> None:
    machine = Machine()
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        machine.kernel(0.2)
        if calls == 5:
            machine.host += 50.0  # the host was busy with something else between two launches
        machine.queue(0.1)

    timing = simulate(machine).measure(call, Sampling(warmup_ms=0.0))
    assert timing.mode == "spin" and timing.late == 1 and max(timing.samples_ms) == pytest.approx(0.3)


@pytest.mark.parametrize(("noise", "sampling", "reason"), [
    (0.001, Sampling(precision=0.01), "precision"),
    (0.5, Sampling(precision=0.01, max_samples=30, max_ms=1e9), "samples"),
    (0.5, Sampling(precision=0.01, max_samples=10**6, max_ms=20.0), "time"),
])
def test_sampling_stops_for_the_reason_it_says(
        simulate: Callable[[Machine], DeviceTimer], noise: float, sampling: Sampling, reason: str) -> None:
    machine, random_ = Machine(), random.Random(1)
    timer = simulate(machine)
    start = machine.host
    timing = timer.measure(lambda: machine.kernel(random_.uniform(1 - noise, 1 + noise)), sampling)
    fields = timing.row_fields()
    assert timing.stop_reason == fields["stop_reason"] == reason
    assert fields["samples"] == len(fields["samples_ms"]) <= sampling.max_samples
    assert fields["latency_ms_p20"] <= fields["latency_ms"] <= fields["latency_ms_p80"]
    if reason == "precision":
        assert fields["half_width"] <= 0.01 and fields["samples"] >= 10
    if reason == "time":
        assert machine.host - start > 20.0


def test_a_slow_call_has_three_samples_whatever_the_time_limit(simulate: Callable[[Machine], DeviceTimer]) -> None:
    machine = Machine()
    timing = simulate(machine).measure(lambda: machine.kernel(900.0), Sampling(max_ms=100.0))
    assert timing.samples_ms == pytest.approx([900.0] * 3) and timing.stop_reason == "time"


def test_memory_is_what_was_prepared_and_what_the_run_adds(simulate: Callable[[Machine], DeviceTimer]) -> None:
    machine = Machine()
    machine.alive = 1000
    timer = simulate(machine)

    def call() -> None:
        machine.peak = max(machine.peak, machine.alive + 300)

    assert timer.peak_memory(call, held=50) == 350


class FakeSensors:
    def __init__(self, *throttles: int) -> None:
        self.throttles, self.reads = list(throttles), 0

    def read(self) -> sensors.Reading:
        self.reads += 1
        throttle = self.throttles.pop(0) if self.throttles else 0
        return sensors.Reading(1900.0 + self.reads, 2600.0, 500.0 + self.reads, 60.0, throttle)


def test_samples_under_thermal_slowdown_are_taken_again_and_a_power_cap_is_recorded(
        simulate: Callable[[Machine], DeviceTimer]) -> None:
    machine = Machine()
    timer = simulate(machine)
    sensors = FakeSensors(0x20, 0x40, 0x4)
    timer._sensors = sensors  # type: ignore[assignment]
    timing = timer.measure(lambda: machine.kernel(1.0), Sampling(max_samples=10))
    assert timing.throttle == ("sw_power_cap",) and sensors.reads == 3 and len(timing.samples_ms) == 10
    assert (timing.sm_clock_mhz, timing.mem_clock_mhz, timing.power_w, timing.temperature_c) == (1903, 2600, 503, 60)


def test_a_lasting_slowdown_is_kept_and_marked(simulate: Callable[[Machine], DeviceTimer]) -> None:
    machine = Machine()
    timer = simulate(machine)
    timer._sensors = FakeSensors(*[0x40] * 100)  # type: ignore[assignment]
    timing = timer.measure(lambda: machine.kernel(1.0), Sampling())
    assert timing.throttle == ("hw_thermal",) and len(timing.samples_ms) >= 10


@pytest.mark.parametrize("count", [6, 7, 10, 25, 100])
def test_the_median_interval_covers_the_median_as_often_as_it_says(count: int) -> None:
    interval = median_interval(range(count))
    assert interval is not None and interval[0] + interval[1] == count - 1
    outside = 2 * sum(math.comb(count, k) for k in range(int(interval[0]) + 1)) / 2**count
    closer = 2 * sum(math.comb(count, k) for k in range(int(interval[0]) + 2)) / 2**count
    assert outside <= 0.05 < closer  # it holds 95%, and the next narrower one does not


def test_five_samples_have_no_interval() -> None:
    assert median_interval([1.0] * 5) is None and relative_half_width([1.0] * 5) is None
    assert relative_half_width([9.0, 10.0, 10.0, 10.0, 10.0, 12.0]) == pytest.approx(0.15)


def test_one_sample_is_its_own_quantiles() -> None:
    fields = Timing((2.0,), "time", "spin").row_fields()
    assert (fields["latency_ms"], fields["latency_ms_p20"], fields["latency_ms_p80"]) == (2.0, 2.0, 2.0)


def test_cpu_times_say_that_they_mean_nothing() -> None:
    calls: list[int] = []
    timing = CpuTimer().measure(lambda: calls.append(1), Sampling())
    assert timing.note == measure.INTERPRETER_NOTE and timing.mode == "cpu"
    assert len(calls) == len(timing.samples_ms) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_host_does_not_show() -> None:
    timer = DeviceTimer(torch.device("cuda", 0))
    cycles = int(0.05 * timer._cycles_per_ms)
    slow = Sampling(max_ms=1000.0)

    def call() -> None:
        for _ in range(20):
            measure.time.sleep(1e-4)
            torch.cuda._sleep(cycles)

    timing = timer.measure(call, slow)
    assert timing.mode == "spin" and timing.host_ms is not None and timing.host_ms > 2.0
    assert timing.latency_ms == pytest.approx(1.0, rel=0.3)

    def waits() -> None:
        torch.cuda._sleep(cycles)
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)

    assert timer.measure(waits, slow).mode == "host_bound"


# ---- wall time


class FakeWallTime:
    """Behaves like lm-profiler's, whose cuda=None synchronises CUDA even where there is none."""

    def __init__(self, name: str, cuda: Any = None) -> None:
        self.time: list[float] = []
        self.cuda = cuda if isinstance(cuda, list) else [cuda]

    def __enter__(self) -> None:
        self._synchronize()

    def __exit__(self, *_: object) -> None:
        self._synchronize()
        self.time.append(0.25)

    def _synchronize(self) -> None:
        for _ in self.cuda:
            raise AssertionError("Torch not compiled with CUDA enabled")


def install(monkeypatch: pytest.MonkeyPatch, wall_time: Any) -> None:
    module = types.ModuleType("profiler")
    if wall_time is not None:
        module.WallTime = wall_time  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "profiler", module)
    walltime.find_wall_time.cache_clear()


@pytest.fixture(autouse=True)
def forget_wall_time() -> Any:
    yield
    walltime.find_wall_time.cache_clear()


def test_lm_profiler_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeWallTime)
    assert walltime.find_wall_time() == (FakeWallTime, "")
    result = walltime.measure_wall(lambda: None, cuda=False, budget_ms=1e9)
    assert (result.wall_ms, result.source, result.calls) == (250.0, "lm-profiler", 50)


@pytest.mark.parametrize(("impostor", "says"), [
    (None, "no class WallTime"),
    (lambda name, cuda=None: None, "no class WallTime"),
    (type("WallTime", (), {"__init__": lambda self: None}), "cannot be used as"),
    (type("WallTime", (FakeWallTime,), {"__exit__": lambda self, *a: None}), "does not collect seconds"),
])
def test_another_module_called_profiler_is_not_taken(monkeypatch: pytest.MonkeyPatch, impostor: Any, says: str) -> None:
    install(monkeypatch, impostor)
    found, why = walltime.find_wall_time()
    assert found is None and says in why and "our own clock" in why
    assert walltime.measure_wall(lambda: None, cuda=False, min_calls=1).source == "perf_counter"


def test_without_lm_profiler_our_own_clock_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "profiler", None)  # makes the import fail
    walltime.find_wall_time.cache_clear()
    clock = iter(range(100))
    monkeypatch.setattr(walltime.time, "perf_counter", lambda: float(next(clock)))
    result = walltime.measure_wall(lambda: None, cuda=False, budget_ms=1.0)
    assert result.source == "perf_counter" and result.wall_ms == 1000.0 and result.calls == 3
    assert "not installed" in walltime.find_wall_time()[1]


# ---- what errors mean


class OutOfResources(Exception):
    pass


class CompilationError(Exception):
    pass


@pytest.mark.parametrize(("error", "status"), [
    (OutOfResources("shared memory"), "out_of_resources"),
    (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
    (RuntimeError("CUDA error: out of memory"), "oom"),
    (MemoryError(), "oom"),
    (CompilationError("at 3:4"), "compile_error"),
    (RuntimeError("PassManager::run failed"), "compile_error"),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), "runtime_error"),
    (KeyError("x"), "runtime_error"),
])
def test_errors_have_the_status_of_their_cause(error: Exception, status: str) -> None:
    assert classify(error) == status
    assert classify(error, building=True) == ("out_of_resources" if status == "out_of_resources" else "compile_error")


def test_messages_fit_on_a_line_and_name_no_place_of_this_machine() -> None:
    here = Path(__file__).resolve()
    try:
        raise ValueError(f"cannot read {Path.home()}/x and {here}\n" + "very long " * 200 + "the cause")
    except ValueError as error:
        text = message(error)
    assert "\n" not in text and len(text) < 800 and text.startswith("ValueError: cannot read")
    assert str(here.parent.parent) not in text and str(Path.home()) + "/" not in text
    assert "the cause" in text and "tests/test_measure.py" in text
    assert shorten("short") == "short" and len(shorten("x" * 5000, 100)) == 100


def test_statistics_of_a_timing_agree_with_its_samples() -> None:
    samples = tuple(float(x) for x in range(1, 12))
    fields = Timing(samples, "samples", "spin", host_ms=0.5, throttle=("hw_thermal",)).row_fields()
    assert fields["latency_ms"] == statistics.median(samples) == 6.0
    assert (fields["latency_ms_p20"], fields["latency_ms_p80"]) == (3.0, 9.0)
    assert fields["throttle"] == ["hw_thermal"] and fields["host_ms"] == 0.5
