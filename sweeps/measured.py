"""A timed candidate: its configuration in words and columns, its time, and the interval of its median."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from flash_sink_attn.config import KERNELS, HopperBwdConfig, HopperFwdConfig, TileConfig
from sweeps.cases import Case
from sweeps.measure import median_interval

TILE_COLUMNS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
BACKWARD_KERNELS = {"dq": "bwd_dq", "dkdv": "bwd_dkdv"}
# Of the configurations of our kernels, beyond TILE_COLUMNS: what a field that is not given means.
TILE_DEFAULTS: dict[str, Any] = {
    field.name: field.default for config in (TileConfig, HopperFwdConfig, HopperBwdConfig)
    for field in dataclasses.fields(config) if field.name not in TILE_COLUMNS}
# How a field that is not at its default is said; {} stands for its value.
_SAID = {"PACK_GQA": "pack", "SPLIT_LOOPS": "oneloop", "maxnreg": "r{}", "TMA": "tma", "REGISTER_A": "rega",
         "TAIL_N": "tail{}", "BRANCH_MASKS": "branch",
         "Q_STAGES": "q{}", "HEADS": "h{}", "PACK_HEADS": "pack{}", "SHARE_Q": "shareq", "PROGRAMS_PER_SM": "p{}",
         "LOADER": "alone", "FORM": "form{}", "BUFFERS": "b{}", "SPLIT_GROUP": "split{}", "DETERMINISTIC": "det"}

Row = dict[str, Any]


def config_json(config: Mapping[str, Any]) -> str:
    """One text for equal configurations."""
    return json.dumps(config, sort_keys=True)


def config_label(config: Mapping[str, Any]) -> str:
    """A configuration for people: ``64x32 w4 s3 pack``; for a backward ``dq 64x64 w4 s3 | dkdv 32x64 w4 s3``.

    Beyond tile sizes, warps and stages it shows only what is not the default of the kernel's configurations.
    """
    nested = [k for k in KERNELS if isinstance(config.get(k), Mapping)]
    if nested:
        return " | ".join(f"{_kernel_label(k)} {config_label(config[k])}" for k in nested)
    if not {"BLOCK_M", "BLOCK_N"} <= set(config):
        return " ".join(f"{k}={v}" for k, v in sorted(config.items())) or "default"
    parts = [f"{config['BLOCK_M']}x{config['BLOCK_N']}"]
    parts += [f"{short}{config[name]}" for name, short in (("num_warps", "w"), ("num_stages", "s")) if name in config]
    for name, default in TILE_DEFAULTS.items():
        value = config.get(name, default)
        if value != default:
            parts.append(_SAID.get(name, f"{name}={{}}").format(value))
    others = sorted(set(config) - set(TILE_COLUMNS) - set(TILE_DEFAULTS))
    return " ".join(parts + [f"{name}={config[name]}" for name in others])


def _kernel_label(kernel: str) -> str:
    return kernel.removeprefix("hopper_").removeprefix("bwd_")


def interval(samples: Sequence[float], median: float) -> tuple[float, float]:
    """The 95% interval of the median, in the samples' unit.

    Fewer than six samples cannot give 95%: their range is returned, which holds the median with less confidence;
    without samples the median itself is, twice.
    """
    if not samples:
        return median, median
    low, high = median_interval(samples) or (min(samples), max(samples))
    return min(low, median), max(high, median)


def tile_columns(config: Mapping[str, Any]) -> Row:
    """BLOCK_M, BLOCK_N, num_warps and num_stages; for a pair of backward kernels dq_BLOCK_M ... dkdv_num_stages."""
    out: Row = {name: config.get(name) for name in TILE_COLUMNS}
    for prefix, kernel in BACKWARD_KERNELS.items():
        part = config.get(kernel)
        out |= {f"{prefix}_{name}": part.get(name) if isinstance(part, Mapping) else None for name in TILE_COLUMNS}
    return out


@dataclasses.dataclass(frozen=True)
class Measured:
    """One timed candidate of a case; times in ms, ``low`` and ``high`` the 95% interval of the median."""

    impl: str
    config: Mapping[str, Any]
    latency_ms: float
    low: float
    high: float
    row: Row

    @classmethod
    def of(cls, row: Row, config: Mapping[str, Any]) -> Measured:
        latency = float(row["latency_ms"])
        return cls(row["impl"], config, latency, *interval(row.get("samples_ms") or (), latency), row)

    @property
    def case(self) -> Case:
        return Case.from_dict(self.row["case_fields"])

    @property
    def label(self) -> str:
        return config_label(self.config)

    @property
    def half_width(self) -> float:
        """Half the interval, relative to the median."""
        return (self.high - self.low) / 2 / self.latency_ms
