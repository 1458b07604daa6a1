"""What the card says of itself through NVML, without root: clocks, power, temperature, throttle reasons, energy."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from sweeps.environment import nvml_handle

_THROTTLE = {0x4: "sw_power_cap", 0x8: "hw_slowdown", 0x20: "sw_thermal", 0x40: "hw_thermal", 0x80: "hw_power_brake"}
_SLOWDOWN = 0x8 | 0x20 | 0x40 | 0x80  # a power cap is how the card works under load: recorded, not fought


@dataclasses.dataclass(frozen=True)
class Reading:
    """One look at the sensors; what the card does not tell is None."""

    sm_clock_mhz: float | None
    mem_clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    throttle: int

    @property
    def slowed(self) -> bool:
        """Whether heat or a fault held the card back, so that what was timed meanwhile is to be taken again."""
        return bool(self.throttle & _SLOWDOWN)


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

    def energy_mj(self) -> float | None:
        """Millijoules since the driver was loaded; moves in steps. None where the card has no such counter."""
        if self._nvml is None:
            return None
        nvml, handle = self._nvml
        return _ask(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)


def _ask(function: Callable[..., Any], *arguments: Any) -> float | None:
    try:
        return float(function(*arguments))
    except Exception:  # each card supports its own subset
        return None


def summary(readings: Sequence[Reading]) -> dict[str, Any]:
    """Medians of the clocks, the highest power and temperature, the names of all throttle reasons seen."""
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
