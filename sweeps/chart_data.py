"""What the interactive charts show: plain records of a selection, one list per chart, JSON-ready.

Times are in ms, rates in TFLOP/s; ``low`` and ``high`` are the ends of the 95% interval of the median.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sweeps.columns import WHOLE_PASSES
from sweeps.cost import compulsory_bytes, flops
from sweeps.heatmaps import TILED_PASSES, tile_cells
from sweeps.overview import RIVALS
from sweeps.registry import is_peer
from sweeps.select import CaseResult, Measured, Selection, config_label
from sweeps.tables import (
    DTYPE_SHORT,
    family_key,
    fastest_of_each,
    geometric_mean,
    grouped,
    impl_order,
    length_label,
    mask_label,
    model_label,
    number,
    percent,
    with_impl,
)

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Chart:
    """One chart of the page.

    Attributes:
        id: unique on the page; also the name of a saved file.
        spec: which of the page's specifications draws it, see ``sweeps.charts``.
        title: shown above it.
        values: its records.
        rows: how many bars or rows of cells it has, which makes its height; 0 = the specification's own height.
    """

    id: str
    spec: str
    title: str
    values: list[Record]
    rows: int = 0

    def to_dict(self) -> Record:
        return {"spec": self.spec, "title": self.title, "values": self.values, "rows": self.rows}


@dataclasses.dataclass(frozen=True)
class Panels:
    """Charts under one heading: what one model and precision have in common."""

    title: str
    charts: tuple[Chart, ...]


def interval_text(m: Measured) -> str:
    """``0.1113 to 0.1121 ms (±0.4%)``."""
    return f"{number(m.low, 4)} to {number(m.high, 4)} ms (±{percent(m.half_width)})"


def implementations(selection: Selection) -> list[str]:
    """Those that were timed, ours first."""
    return impl_order(i for r in selection.results for i in fastest_of_each(r))


def without_sink(selection: Selection) -> set[str]:
    """Implementations whose results contain no sink."""
    return {i for r in selection.results for i, m in fastest_of_each(r).items() if not m.row.get("applies_sink")}


def _point(r: CaseResult, impl: str, m: Measured, run: str = "") -> Record:
    work = flops(r.case) / 1e9
    return {
        "impl": impl, "run": run, "n": r.case.seqlen_k, "length": length_label(r.case), "ms": m.latency_ms,
        "low": m.low, "high": m.high, "tflops": work / m.latency_ms, "tlow": work / m.high, "thigh": work / m.low,
        "config": m.label if m.config else "its own", "interval": interval_text(m), "ours": not is_peer(impl),
        "sink": "with the sink" if m.row.get("applies_sink") else "without the sink",
    }


def family_title(result: CaseResult) -> str:
    """``fwd, window 128``, with what else tells a family from others of its model and precision."""
    c = result.case
    extra = f", batch {c.batch}" if c.batch > 1 and not c.varlen else ""
    queries = "" if c.seqlen_q == c.seqlen_k else f", {c.seqlen_q} queries"
    return f"{c.pass_}, {mask_label(c)}{extra}{queries}"


def group_title(result: CaseResult) -> str:
    """``gpt-oss (64/8 x 64), bf16``."""
    return f"{model_label(result)}, {DTYPE_SHORT[result.case.dtype]}"


def curve_panels(selection: Selection) -> list[Panels]:
    """A line chart per family with several lengths, a dot chart per family with one; grouped by model and precision."""
    whole = [r for r in selection.results if r.case.pass_ in WHOLE_PASSES and (r.best or r.peers)]
    panels: list[Panels] = []
    total = 0
    for group in grouped(whole, lambda r: family_key(r)[:7]):
        charts = []
        for family in sorted(grouped(group, family_key), key=lambda f: len(f) == 1):
            values = [_point(r, impl, m) for r in family for impl, m in sorted(fastest_of_each(r).items())]
            single = len({r.case.seqlen_k for r in family}) == 1
            if single and len(values) < 2:      # one point is no picture
                continue
            title = family_title(family[0]) + (f", {length_label(family[0].case)}" if single else "")
            charts.append(Chart(f"curve-{total}", "dots" if single else "curve", title, values,
                                len({v["impl"] for v in values}) if single else 0))
            total += 1
        if charts:
            panels.append(Panels(group_title(group[0]), tuple(charts)))
    return panels


def heat_panels(selection: Selection) -> list[Panels]:
    """BLOCK_M x BLOCK_N of every case swept over tiles; grouped by model, precision and mask."""
    tiled = [r for r in selection.results if r.case.pass_ in TILED_PASSES
             and any((row.get("config") or {}).get("BLOCK_M") for row in r.own_rows)]
    panels: list[Panels] = []
    total = 0
    for group in grouped(tiled, lambda r: (*family_key(r)[:8], r.case.varlen, r.case.sinks)):
        charts = []
        for r in sorted(group, key=lambda r: (TILED_PASSES.index(r.case.pass_), r.case.batch, r.case.seqlen_q,
                                              r.case.seqlen_k)):
            values = [_cell(r, m, n, found) for (m, n), found in sorted(tile_cells(r).items())]
            batch = f", batch {r.case.batch}" if r.case.batch > 1 and not r.case.varlen else ""
            charts.append(Chart(f"heat-{total}", "heat", f"{r.case.pass_}, {length_label(r.case)}{batch}", values,
                                len({v["m"] for v in values})))
            total += 1
        c = group[0].case
        title = f"{group_title(group[0])}, {mask_label(c)}" + (f", {c.varlen}" if c.varlen else "")
        panels.append(Panels(title, tuple(charts)))
    return panels


def _cell(r: CaseResult, m: int, n: int, found: Measured | str) -> Record:
    if isinstance(found, str) or r.best is None:
        status = found if isinstance(found, str) else "no winner"
        return {"m": m, "n": n, "text": status.replace("_", " "), "rest": "", "ratio": None, "best": False,
                "config": f"{m}x{n}", "interval": status.replace("_", " "), "over": "", "registers": ""}
    ratio = found.latency_ms / r.best.latency_ms
    registers, spills = found.row.get("registers"), found.row.get("spills")
    return {
        "m": m, "n": n, "text": number(found.latency_ms), "rest": config_label(found.config).partition(" ")[2],
        "ratio": ratio, "best": found is r.best, "config": with_impl(found), "interval": interval_text(found),
        "over": f"{number(ratio)}x the best", "registers": f"{registers}, {spills} spilled" if registers else "",
    }


def speedup_charts(selection: Selection) -> list[Chart]:
    """One chart per rival: a bar per family, the geometric mean over its lengths."""
    whole = [r for r in selection.results if r.case.pass_ in WHOLE_PASSES and r.best]
    charts = []
    for rival, said in RIVALS.items():
        values: list[Record] = []
        for family in grouped(whole, family_key):
            each = [(r, s) for r in family if (s := r.speedup(r.rivals[rival])) is not None]
            mean = geometric_mean([s for _, s in each])
            if mean is None:
                continue
            lengths = ", ".join(f"{length_label(r.case)}: {number(s)}x" for r, s in each)
            names = sorted({m.impl for r, _ in each if (m := r.rivals[rival]) is not None and is_peer(m.impl)})
            values.append({"label": _family_line(family), "speedup": mean, "text": f"{number(mean)}x", "each": lengths,
                           "against": ", ".join(names) or said, "who": "ours is faster" if mean >= 1 else
                           "ours is slower", "order": len(values)})
        if values:
            charts.append(Chart(f"speedup-{rival}", "speedup", f"over {said}", values, len(values)))
    return charts


def _family_line(family: Sequence[CaseResult]) -> str:
    r = family[0]
    lengths = [length_label(x.case) for x in family]
    name = r.model or model_label(r)
    span = lengths[0] if len(lengths) == 1 else f"{lengths[0]}-{lengths[-1]}"
    title = family_title(r).replace(", window ", " w")
    return f"{name} {DTYPE_SHORT[r.case.dtype]} {title}, {span.partition(' (varlen')[0]}"


def roofline_points(selection: Selection) -> list[Record]:
    """Our best and the fastest peer with the sink of every case: TFLOP/s over useful FLOPs per compulsory byte."""
    values: list[Record] = []
    for r in selection.results:
        if r.case.pass_ not in ("fwd", "bwd") or r.best is None:
            continue
        work = flops(r.case)
        for who, m in (("ours", r.best), ("fastest peer", r.best_peer)):
            if m is not None:
                values.append({
                    "x": work / compulsory_bytes(r.case), "y": work / m.latency_ms / 1e9, "model": model_label(r),
                    "pass": r.case.pass_, "who": who, "impl": m.impl, "case": r.case.id, "ms": number(m.latency_ms, 4),
                    "config": m.label if m.config else "its own", "interval": interval_text(m),
                    "peak": f"{percent(pct / 100)} of peak" if (pct := m.row.get("pct_peak")) else ""})
    return values


def stage_values(rows: Iterable[Mapping[str, Any]]) -> list[Record]:
    """Seconds that the trials of each implementation took by stage, with how many trials; building ahead apart."""
    spent: dict[tuple[str, str], float] = {}
    trials: dict[str, int] = {}
    for row in rows:
        seconds = dict(row.get("seconds") or {})
        if not seconds:
            continue
        trials[row["impl"]] = trials.get(row["impl"], 0) + 1
        for stage, value in seconds.items():
            spent[row["impl"], stage] = spent.get((row["impl"], stage), 0.0) + float(value)
    total = {i: sum(v for (impl, _), v in spent.items() if impl == i) for i in trials}
    return [{"impl": impl, "stage": stage, "seconds": round(seconds, 3), "trials": trials[impl],
             "text": f"{number(seconds)} s, {percent(seconds / total[impl])} of {impl}", "total": total[impl]}
            for (impl, stage), seconds in spent.items() if seconds > 0]


def beside_panels(runs: Sequence[tuple[str, Selection]]) -> list[Panels]:
    """Our best of several runs over the sequence length, a line per run; families that one run alone has as well."""
    results = [(name, r) for name, selection in runs for r in selection.results
               if r.case.pass_ in WHOLE_PASSES and r.best]
    families: dict[tuple[object, ...], list[tuple[str, CaseResult]]] = {}
    for name, r in results:
        families.setdefault(family_key(r)[1:], []).append((name, r))
    panels: dict[str, list[Chart]] = {}
    for i, members in enumerate(families.values()):
        single = len({r.case.seqlen_k for _, r in members}) == 1
        values = []
        for name, r in sorted(members, key=lambda item: item[1].case.seqlen_k):
            assert r.best is not None
            values.append(_point(r, name, r.best, name) | {"ours": True, "impl": name})
        title = family_title(members[0][1]) + (f", {length_label(members[0][1].case)}" if single else "")
        chart = Chart(f"beside-{i}", "dots" if single else "curve", title, values,
                      len({v["impl"] for v in values}) if single else 0)
        panels.setdefault(group_title(members[0][1]), []).append(chart)
    return [Panels(title, tuple(charts)) for title, charts in panels.items()]
