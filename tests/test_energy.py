"""Energy of a call, on a simulated card whose power and counter are known."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest

from sweeps import energy, measure, sensors
from sweeps.energy import Energy, loop_energy
from sweeps.measure import CpuTimer
from sweeps.sensors import Reading, Sensors
from tests.test_measure import Machine, simulate  # noqa: F401 (a fixture)


class Card:
    """Bursts of known length run one after another; the counter moves every ``step_ms`` and counts ``watts``."""

    def __init__(self, burst_ms: float, watts: float = 600.0, step_ms: float = 100.0, look_ms: float = 0.2) -> None:
        self.burst_ms, self.watts, self.step_ms, self.look_ms = burst_ms, watts, step_ms, look_ms
        self.now = 12.3
        self.queue_end = 0.0
        self.bursts = self.reads = 0

    def counter(self) -> float | None:
        self.reads += 1
        self.now += self.look_ms
        return 1e6 + self.watts * self.step_ms * (self.now // self.step_ms)

    def burst(self) -> None:
        self.bursts += 1
        self.queue_end = max(self.queue_end, self.now) + self.burst_ms

    def event(self) -> Any:
        made = types.SimpleNamespace(at=None)
        made.record = lambda: setattr(made, "at", self.queue_end)
        made.query = lambda: self.now >= made.at
        made.synchronize = lambda: setattr(self, "now", max(self.now, made.at))
        made.elapsed_time = lambda end: end.at - made.at
        return made

    def measure(self, monkeypatch: pytest.MonkeyPatch, duration_ms: float, calls: int = 10) -> Energy | None:
        monkeypatch.setattr(energy.time, "perf_counter", lambda: self.now / 1e3)
        return loop_energy(self.counter, self.burst, calls, self.event, duration_ms)


def test_a_host_that_finds_everything_done_whenever_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device idles in between, so the energy is not the call's alone; but there is an answer and no error."""
    found = Card(1.0, look_ms=50.0).measure(monkeypatch, 150.0)
    assert found is not None and found.power_w == pytest.approx(600.0, rel=0.01)


@pytest.mark.parametrize("step_ms", [20.0, 100.0])
@pytest.mark.parametrize("burst_ms", [1.0, 10.0, 40.0])
def test_energy_is_power_between_steps_of_the_counter_times_time_per_call(
        monkeypatch: pytest.MonkeyPatch, step_ms: float, burst_ms: float) -> None:
    card = Card(burst_ms, step_ms=step_ms)
    found = card.measure(monkeypatch, 150.0)
    assert found is not None and found.span_ms >= 150.0
    assert found.power_w == pytest.approx(600.0, rel=0.01)
    assert found.call_ms == pytest.approx(burst_ms / 10, rel=0.01)
    assert found.energy_j == pytest.approx(600.0 * burst_ms / 10 / 1e3, rel=0.015)
    assert found.fields()["energy_j"] == found.energy_j and found.calls >= 10


def test_the_device_never_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(10.0)
    found = card.measure(monkeypatch, 300.0)
    assert found is not None
    assert card.queue_end >= card.now - 1.0  # there was work until the end
    assert card.now - 12.3 < 300 + 2 * 100 + 3 * 10 + 50  # and it ended soon after the second step


def test_a_counter_that_stands_still_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(10.0, watts=0.0)
    assert card.measure(monkeypatch, 50.0) is None and card.now < 12.3 + 1100


def test_without_a_counter_nothing_is_run() -> None:
    card = Card(10.0)
    assert loop_energy(lambda: None, card.burst, 1, card.event, 100.0) is None and card.bursts == 0
    assert CpuTimer().energy(lambda: None, 100.0) is None


def test_the_timer_repeats_the_call_without_a_pause(
        simulate: Callable[[Machine], Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    machine = Machine()
    timer = simulate(machine)
    seen: dict[str, Any] = {}

    def watch(counter: Any, burst: Any, calls: int, event: Any, duration_ms: float) -> None:
        before = machine.device
        burst()
        seen.update(calls=calls, duration=duration_ms, busy=machine.device - max(before, machine.host - 0.004 * calls))

    monkeypatch.setattr(measure, "loop_energy", watch)
    timer.energy(lambda: machine.queue(0.5), 120.0)  # a graph cannot be captured here: calls one after another
    assert seen["duration"] == 120.0 and seen["calls"] == 19  # 10 ms of calls that take 0.5 ms and a bit
    assert timer.capture_failed


def test_the_sensors_read_the_counter_and_tell_a_slowdown_from_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = types.SimpleNamespace(nvmlDeviceGetTotalEnergyConsumption=lambda handle: 5_000 + handle)
    monkeypatch.setattr(sensors, "nvml_handle", lambda uuid, index: (nvml, 7))
    assert Sensors(None).energy_mj() == 5007.0
    monkeypatch.setattr(sensors, "nvml_handle", lambda uuid, index: (types.SimpleNamespace(
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1 / 0), 7))
    assert Sensors(None).energy_mj() is None
    monkeypatch.setattr(sensors, "nvml_handle", lambda uuid, index: None)
    assert Sensors(None).energy_mj() is None and Sensors(None).read() is None
    slowed = [Reading(None, None, None, None, bits).slowed for bits in (0, 0x4, 0x8, 0x20, 0x40, 0x80)]
    assert slowed == [False, False, True, True, True, True]
