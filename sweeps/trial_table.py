"""The table of all trials as the HTML report holds it: columns, and a list of values per row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sweeps.cases import Case
from sweeps.select import config_label
from sweeps.tables import DTYPE_SHORT, PASS_ORDER, heads_label, length_label, mask_label, shorten

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
    """A heading; ``number`` sorts and filters by value, ``list`` is filtered by picking from its values."""

    title: str
    value: Callable[[Row, Case], Any]
    number: bool = False
    list: bool = False


def _figure(name: str, factor: float = 1.0, digits: int = 4) -> Callable[[Row, Case], float | None]:
    def value(row: Row, case: Case) -> float | None:
        found = row.get(name)
        return None if found is None else float(f"{float(found) * factor:.{digits}g}")

    return value


def _number(title: str, name: str, factor: float = 1.0, digits: int = 4) -> Column:
    return Column(title, _figure(name, factor, digits), number=True)


def _interval(row: Row, case: Case) -> float | None:
    width = row.get("half_width")
    return None if width is None else float(f"{100 * width:.2g}")


COLUMNS = (
    Column("model", lambda r, c: r.get("model") or "", list=True),
    Column("heads x dim", lambda r, c: heads_label(c), list=True),
    Column("pass", lambda r, c: c.pass_, list=True),
    Column("dtype", lambda r, c: DTYPE_SHORT[c.dtype], list=True),
    Column("mask", lambda r, c: mask_label(c), list=True),
    Column("batch", lambda r, c: c.batch, number=True),
    Column("tokens", lambda r, c: c.seqlen_k, number=True),
    Column("impl", lambda r, c: r["impl"], list=True),
    Column("config", lambda r, c: "untuned" if r.get("is_default") and not r.get("config")
           else config_label(r["config"]) if r.get("config") else ""),
    Column("status", lambda r, c: r["status"], list=True),
    _number("ms", "latency_ms"), Column("±%", _interval, number=True), _number("TFLOP/s", "tflops"),
    _number("% peak", "pct_peak", digits=3), _number("GB/s", "gb_per_s"), _number("wall ms", "wall_ms"),
    _number("vs eager", "speedup_vs_eager", digits=3), _number("vs flash", "speedup_vs_flash", digits=3),
    _number("vs untuned", "speedup_vs_default", digits=3), _number("regs", "registers"), _number("spills", "spills"),
    _number("shared KiB", "shared_bytes", 1 / 1024, 3), _number("compile s", "compile_s", digits=3),
    _number("SM MHz", "sm_clock_mhz"), _number("W", "power_w", digits=3), _number("°C", "temperature_c", digits=3),
    _number("samples", "samples"), Column("stopped by", lambda r, c: r.get("stop_reason") or "", list=True),
    Column("lengths", lambda r, c: "" if c.seqlen_q == c.seqlen_k and not c.varlen else length_label(c)),
    Column("message", lambda r, c: shorten(str(r.get("message") or r.get("note") or ""))),
)


def _place(item: tuple[Case, Row]) -> tuple[Any, ...]:
    """By model, precision, mask, pass and length; within a case the fastest first, and what has no time last."""
    c, row = item
    ms = row.get("latency_ms") if row["status"] == "ok" else None
    return (row.get("model") or "", c.heads_q, c.heads_kv, c.head_dim, c.dtype, c.window is not None, c.window or 0,
            PASS_ORDER.index(c.pass_), c.varlen, c.batch, c.seqlen_q, c.seqlen_k, ms is None, ms or 0.0)


def trial_table(runs: Iterable[tuple[str, Iterable[Row]]]) -> dict[str, Any]:
    """Columns and rows, JSON-ready; with several runs the first column names the run.

    Args:
        runs: name and rows (speedups filled, see ``sweeps.select``) of each.
    """
    named = [(name, list(rows)) for name, rows in runs]
    columns = [{"title": c.title, "number": c.number, "list": c.list} for c in COLUMNS]
    several = len(named) > 1
    table = []
    for name, rows in named:
        for case, row in sorted(((Case.from_dict(r["case_fields"]), r) for r in rows), key=_place):
            values = [c.value(row, case) for c in COLUMNS]
            table.append([name, *values] if several else values)
    return {"columns": [{"title": "run", "number": False, "list": True}, *columns] if several else columns,
            "rows": table}
