"""What a row says: the columns of results.csv, and beside them whatever later steps need to decide and to compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sweeps.columns import COLUMNS
from sweeps.compile_pool import CompileResult
from sweeps.cost import compulsory_bytes, flops
from sweeps.devices import Card
from sweeps.environment import fingerprint
from sweeps.ours import num_warps
from sweeps.plan import Trial

_TILE = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
_RESOURCES = ("registers", "spills", "shared_bytes", "hgmma", "tma", "local", "mufu", "instructions", "cache_hit",
              "binary")


def make_row(trial: Trial, key: str, env: Mapping[str, Any], card: Card | None, compiled: CompileResult | None,
             outcome: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the trial log.

    Args:
        card: peaks of the GPU, None where they are not known.
        compiled: what the compiler made ahead, None where it was not asked.
        outcome: status, message, versions and is_flash of the implementation, and what the worker measured; a None in
            it does not hide what is known here.

    Returns:
        All of COLUMNS (None = empty; the speedups are filled in by whoever compares rows), and key, trial, options,
        case_fields, versions, environment (its fingerprint), is_flash, is_default, applies_sink, hgmma, tma,
        local, mufu, instructions, cache_hit, binary, with
        what measure and worker add: samples_ms, half_width, timing, host_ms, throttle, seconds ...
    """
    case, config = trial.case, dict(trial.config)
    built = compiled.resources if compiled else {}
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= case.columns() | {name: config.get(name) for name in _TILE} | {name: built.get(name) for name in _RESOURCES}
    row["num_warps"] = num_warps(trial.impl, case.pass_, config)
    row |= {
        "gpu": env["gpu"], "model": case.model, "case": case.id, "impl": trial.impl, "config": config, "note": "",
        "compile_s": compiled.compile_s if compiled else None, "key": key, "trial": trial.id,
        "options": dict(trial.options), "case_fields": case.to_dict(),
        "environment": fingerprint(env), "is_default": trial.is_default, "applies_sink": None}
    row |= {name: value for name, value in outcome.items() if value is not None}
    if ms := row["latency_ms"]:
        row["tflops"] = flops(case) / ms / 1e9
        row["gb_per_s"] = compulsory_bytes(case) / ms / 1e6
        row["pct_peak"] = 100 * row["tflops"] / card.peak_tflops if card else None
    return row
