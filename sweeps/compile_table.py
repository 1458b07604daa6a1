"""What a compile-only run found out about every configuration: compile.csv, and the same as Markdown."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeps.bound import KERNELS, Bound, bound
from sweeps.cases import Case
from sweeps.devices import Card
from sweeps.select import config_label
from sweeps.tables import markdown, number, percent

COUNTS = ("instructions", "hgmma", "tma", "local", "mufu")
RESOURCES = ("registers", "spills", "shared_bytes")
PREDICTED = ("blocks_per_sm", "warps_per_sm", "occupancy_limit", "programs", "waves", "wasted_work", "bound_memory_ms",
             "bound_tensor_ms", "bound_exp_ms", "bound_latency_ms", "bound_ms", "binds")
COLUMNS = ("case", "impl", "pass", "config", "status", "message", *RESOURCES, *COUNTS, *PREDICTED, "cache_hit",
           "compile_s", "duplicate_of")
_MS = ("memory", "tensor", "exp", "latency")
CSV, MARKDOWN = "compile.csv", "compile.md"

Row = Mapping[str, Any]


def predicted(row: Row, card: Card | None) -> Bound | None:
    """The bound of a row's configuration on ``card``; None where its kernel was not built or is not one of ours."""
    tiles = {"BLOCK_M", "BLOCK_N"} <= set(row["config"])
    if card is None or row["impl"] != "triton" or row["pass"] not in KERNELS or row["registers"] is None or not tiles:
        return None
    return bound(Case.from_dict(row["case_fields"]), row["config"], card, registers=row["registers"],
                 shared_bytes=row["shared_bytes"] or 0)


def table(rows: Iterable[Row], card: Card | None) -> list[dict[str, Any]]:
    """One record per row of the log, with COLUMNS; None = not known.

    Within a case the configurations stand by their bound, lowest first; those without one come last. A duplicate has
    the figures of its own build, which are those of the configuration it equals.
    """
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found = predicted(row, card)
        record: dict[str, Any] = {name: row.get(name) for name in COLUMNS}
        if found is not None:
            record |= {"blocks_per_sm": found.blocks, "warps_per_sm": found.warps, "occupancy_limit": found.limit,
                       "programs": found.programs, "waves": found.waves, "wasted_work": found.wasted,
                       **{f"bound_{name}_ms": found.parts[name] for name in _MS}, "bound_ms": found.ms,
                       "binds": found.binds}
        cases.setdefault(row["case"], []).append(record)
    return [record for records in cases.values()
            for record in sorted(records, key=lambda r: (r["bound_ms"] is None, r["bound_ms"] or 0.0))]


def write(run_dir: Path, rows: Iterable[Row], card: Card | None) -> list[Path]:
    """Writes compile.csv and compile.md into the run directory; returns their paths."""
    records = table(rows, card)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: _cell(value) for name, value in record.items()})
    paths = [run_dir / CSV, run_dir / MARKDOWN]
    paths[0].write_text(text.getvalue())
    paths[1].write_text(as_markdown(records, card))
    return paths


def card_name(rows: Sequence[Row]) -> str:
    """The card that a compile-only run was made for; "" where it names none."""
    return next((row["gpu"] for row in rows if row["gpu"] != "none"), "")


def as_markdown(records: Sequence[Mapping[str, Any]], card: Card | None) -> str:
    """What all cases have in common, then one table per case, then what did not build."""
    built = [r for r in records if r["registers"] is not None]
    name = card.name if card else "a card that is not known: no occupancy and no bounds"
    parts = [f"# Built for {name}", _summary(records, built)]
    for case, own in _by(built, "case").items():
        parts += [f"## {case}", markdown(
            ["config", "registers", "spills", "shared KiB", "blocks/SM", "limited by", "waves", "masked", "HGMMA",
             "TMA", "LDL/STL", "MUFU", "instructions", "bound ms", "binds"],
            [[config_label(r["config"]), f"{r['registers']}", f"{r['spills']}",
              f"{(r['shared_bytes'] or 0) / 1024:.0f}", _text(r["blocks_per_sm"]), r["occupancy_limit"] or "-",
              number(r["waves"]), percent(r["wasted_work"]),
              *(_text(r[name]) for name in ("hgmma", "tma", "local", "mufu", "instructions")), number(r["bound_ms"], 4),
              r["binds"] or "-"] for r in own])]
    failed = [r for r in records if r["status"] not in ("ok", "duplicate")]
    if failed:
        parts += ["## Not built", markdown(
            ["case", "config", "status", "why"],
            [[r["case"], config_label(r["config"]), r["status"], str(r["message"])] for r in failed], text_columns=4)]
    return "\n\n".join(parts) + "\n"


def _summary(records: Sequence[Mapping[str, Any]], built: Sequence[Mapping[str, Any]]) -> str:
    bounds = [r for r in built if r["bound_ms"] is not None]
    binds = ", ".join(f"{name} {len(own)}" for name, own in sorted(_by(bounds, "binds").items()))
    lines = [f"{len(built)} of {len(records)} configurations built, {sum(r['spills'] > 0 for r in built)} of them "
             f"spill, {sum(r['hgmma'] == 0 for r in built)} use no tensor core."]
    if bounds:
        lines.append(f"What binds: {binds}. Blocks per SM: {statistics.median(r['blocks_per_sm'] for r in bounds):g} "
                     "in the median. The bound is a time below which the configuration should not get; how it is made "
                     "stands in sweeps/bound.py. Counts are of instructions in the code, not of those executed.")
    return "\n".join(lines)


def _by(records: Iterable[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record[key], []).append(record)
    return groups


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return json.dumps(value, sort_keys=True)
    return " ".join(value.split()) if isinstance(value, str) else value
