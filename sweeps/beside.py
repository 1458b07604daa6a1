"""Several runs side by side, of one card or of several: H100 beside H200, this month beside last."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeps.chart_data import beside_panels
from sweeps.html_report import MissingPackages, check_packages, panel_charts, render
from sweeps.overview import INTERPRETER_WARNING, count, headline, provenance
from sweeps.select import CaseResult, Selection, select_run
from sweeps.store import read_environment
from sweeps.tables import (
    DTYPE_SHORT,
    NONE,
    geometric_mean,
    length_label,
    markdown,
    mask_label,
    model_label,
    number,
    percent,
    sort_key,
    times,
    with_impl,
)
from sweeps.trial_table import trial_table


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: a name that no other of the page has, its environment and what was measured on its card."""

    name: str
    env: Mapping[str, Any]
    selection: Selection


def read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """The runs, named by their directories; equal names get their parent's in front, or a number behind.

    Raises:
        StoreError: one is not a run.
    """
    paths = [Path(p).resolve() for p in run_dirs]
    parents = {p.name: {q.parent for q in paths if q.name == p.name} for p in paths}
    names = [f"{p.parent.name}/{p.name}" if len(parents[p.name]) > 1 else p.name for p in paths]
    names = [f"{n} #{names[:i].count(n) + 1}" if names.count(n) > 1 else n for i, n in enumerate(names)]
    runs = []
    for name, path in zip(names, paths, strict=True):
        env = read_environment(path)
        runs.append(Run(name, env, select_run(path).on(env["gpu"])))
    return runs


def write_beside(run_dirs: Sequence[Path], page: Path) -> str:
    """Write one page on several runs, and its tables as Markdown beside it (same name, .md).

    Returns:
        "" or, where the page could not be written, why; the Markdown is there all the same.

    Raises:
        StoreError: one is not a run.
        ValueError: fewer than two runs.
    """
    if len(run_dirs) < 2:
        raise ValueError(f"run_dirs: expected two runs or more, got {len(run_dirs)}")
    runs = read_runs(run_dirs)
    table = _table(runs)
    facts = _facts(runs)
    page.parent.mkdir(parents=True, exist_ok=True)
    parts = ["# " + " beside ".join(r.name for r in runs)]
    parts += [f"**{r.name}**: {r.env['gpu']}, {r.env.get('started') or 'date unknown'}\n\n{headline(r.selection)}"
              for r in runs]
    parts.append("Our best of every case in ms; the last columns are the first run's time over that run's.")
    parts.append(markdown([c["title"] for c in table["columns"]], [r["cells"] for r in table["rows"]], text_columns=5))
    parts.append(markdown(["", *(r.name for r in runs)], [[name, *values] for name, values, _ in facts],
                          text_columns=1 + len(runs)))
    page.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    try:
        check_packages()
    except MissingPackages as missing:
        return str(missing)
    page.write_text(beside_page(runs), encoding="utf-8")
    return ""


def beside_page(runs: Sequence[Run]) -> str:
    """The page of several runs.

    Raises:
        MissingPackages: the packages of the extra "report" are not installed.
    """
    check_packages()
    from sweeps.charts import run_looks, specifications

    names = [r.name for r in runs]
    panels = beside_panels([(r.name, r.selection) for r in runs])
    looks = run_looks(names)
    data = {"name": "runs", "specs": specifications(looks), "charts": panel_charts(panels), "hidden": [],
            "looks": [{"name": n, "colour": c, "path": p, "sink": True} for n, (c, p) in looks.items()],
            "trials": trial_table([(r.name, r.selection.rows) for r in runs])}
    cards = [{"name": r.name, "gpu": r.env["gpu"], "started": r.env.get("started") or "date unknown",
              "lines": [line.removeprefix("- ").replace("**", "").replace("`", "")
                        for line in headline(r.selection).splitlines()]
              + ([INTERPRETER_WARNING] if r.env["gpu"] == "cpu" else [])} for r in runs]
    sections = [("answer", "side by side"), ("curves", "over the length"), ("trials", "all trials"),
                ("provenance", "provenance")]
    return render("beside.html.j2", data, title=" beside ".join(names), sections=sections,
                  subtitle=count(len(runs), "run"), runs=cards, table=_table(runs), curves=panels,
                  provenance=_facts(runs))


def _table(runs: Sequence[Run]) -> dict[str, Any]:
    """A row per case that any run has a time for: every run's best of ours, and its time under the first run's."""
    found: dict[str, dict[str, CaseResult]] = {}
    for run in runs:
        for r in run.selection.results:
            if r.best:
                found.setdefault(r.case.id, {})[run.name] = r
    columns = [{"title": t, "number": False} for t in ("model (heads x dim)", "pass", "dtype", "mask", "tokens")]
    columns += [{"title": f"{r.name}, ms", "number": True} for r in runs]
    columns += [{"title": f"{r.name}, config", "number": False} for r in runs]
    columns += [{"title": f"{r.name}, faster by", "number": True} for r in runs[1:]]
    rows = []
    ratios: dict[str, list[float]] = {r.name: [] for r in runs[1:]}
    for case_id, by_run in sorted(found.items(), key=lambda item: sort_key(next(iter(item[1].values())))[1:]):
        r = next(iter(by_run.values()))
        batch = f"{r.case.batch} x " if r.case.batch > 1 and not r.case.varlen else ""
        cells = [model_label(r), r.case.pass_, DTYPE_SHORT[r.case.dtype], mask_label(r.case),
                 f"{batch}{length_label(r.case)}"]
        best = {name: x.best for name, x in by_run.items() if x.best}
        cells += [f"{number(m.latency_ms, 4)} ±{percent(m.half_width)}" if (m := best.get(n.name)) else NONE
                  for n in runs]
        cells += [with_impl(m) if (m := best.get(n.name)) else NONE for n in runs]
        first = best.get(runs[0].name)
        for run in runs[1:]:
            own = best.get(run.name)
            ratio = first.latency_ms / own.latency_ms if first and own else None
            if ratio is not None:
                ratios[run.name].append(ratio)
            cells.append(times(ratio))
        rows.append({"case": case_id, "cells": cells})
    mean = ["geometric mean", *[""] * (4 + 2 * len(runs)), *(times(geometric_mean(v)) for v in ratios.values())]
    return {"columns": columns, "rows": [*rows, {"case": "", "cells": mean}] if any(ratios.values()) else rows}


def _facts(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Names and every run's value of it; True where they differ."""
    facts = [provenance(r.env, r.selection) for r in runs]
    names = dict.fromkeys(n for f in facts for n in f)
    return [(n, [f.get(n, NONE) for f in facts], len({f.get(n) for f in facts}) > 1) for n in names]
