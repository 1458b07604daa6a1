"""report.html: one file that opens from disk without a network, made of templates, Vega-Lite and DataTables.

The libraries come out of Python packages (vl-convert-python has Vega, itables has DataTables) and are written into the
page, so that it can be mailed, attached and read years later. Page and script lie in sweeps/templates.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from sweeps.chart_data import (
    Chart,
    Panels,
    curve_panels,
    heat_panels,
    implementations,
    roofline_points,
    speedup_charts,
    stage_values,
    without_sink,
)
from sweeps.devices import Card
from sweeps.overview import (
    INTERPRETER_WARNING,
    RIVALS,
    certainty,
    count,
    counts_line,
    pass_summaries,
    provenance,
    without_winner,
)
from sweeps.select import Selection, best_row, config_label
from sweeps.sittings import sitting_lines
from sweeps.tables import (
    DTYPE_SHORT,
    NONE,
    answers,
    failure_groups,
    family_length,
    family_winners,
    impl_order,
    length_label,
    lengths_span,
    mask_label,
    model_label,
    number,
    percent,
    shorten,
    sort_key,
    times,
)
from sweeps.trial_table import trial_table

NEEDS = ("altair", "itables", "jinja2", "vl_convert")     # of the extra "report"
STAGES = ("compile", "import", "inputs", "prepare", "waiting", "run", "gate", "measure", "check")


class MissingPackages(RuntimeError):
    """The packages that write the HTML are not installed; the message says which, and what to do."""


def check_packages(run_dir: Path | None = None) -> None:
    """Find out whether report.html can be written here.

    Raises:
        MissingPackages: it cannot.
    """
    from importlib.util import find_spec

    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise MissingPackages(
            f"report.html needs {', '.join(missing).replace('_', '-')}: pip install 'flash_sink_attn[report]', then "
            f"python -m sweeps report {run_dir or 'RUN'}, here or on any machine that has the run directory")


def run_page(name: str, env: Mapping[str, Any], selection: Selection, card: Card | None,
             sittings: Sequence[Mapping[str, Any]] = (), reading: Iterable[str] = (),
             others: Sequence[str] = ()) -> str:
    """The page of one run.

    Args:
        name: of the run; the page's title.
        env: env.json.
        selection: rows and winners of the run's card.
        card: its ceilings make the roofline; None leaves the roofline out.
        sittings: summary.json's records of the commands that made the run, none where a run has no such file.
        reading: lines that explain the columns.
        others: cards whose rows lie in the same directory and are not shown.

    Raises:
        MissingPackages: see :func:`check_packages`.
    """
    check_packages()
    from sweeps.charts import implementation_looks, specifications

    curves, heats, speedups = curve_panels(selection), heat_panels(selection), speedup_charts(selection)
    stage_records = stage_values(selection.rows)
    stages = _ordered({r["stage"] for r in stage_records}, STAGES)
    points = roofline_points(selection) if card is not None else []
    roofline = Chart("roofline", "roofline", "best of each case and its fastest peer", points) if points else None
    spent = Chart("stages", "stages", "seconds by implementation and stage", stage_records,
                  len({r["impl"] for r in stage_records})) if stage_records else None
    charts = [c for g in (*curves, *heats) for c in g.charts] + speedups + [c for c in (roofline, spent) if c]
    looks = implementation_looks(implementations(selection))
    specs = specifications(looks, card if points else None, points, stages)
    no_sink = without_sink(selection)
    # tens of times slower, it would squeeze all others together
    eager_hidden = "eager" in looks and len(looks) > 2
    data = {
        "name": name, "specs": specs, "charts": {c.id: c.to_dict() for c in charts},
        "looks": [{"name": i, "colour": colour, "path": path, "sink": i not in no_sink}
                  for i, (colour, path) in looks.items()],
        "trials": trial_table([(name, selection.rows)]),
        "hidden": ["eager"] if eager_hidden else [],
    }
    sections = [("answer", "best block sizes"), ("curves", "over the length") if curves else None,
                ("speedups", "speedups") if speedups else None, ("tiles", "over the block sizes") if heats else None,
                ("roofline", "roofline") if roofline else None, ("time", "where the time went"),
                ("trials", "all trials"), ("failures", "what did not work"), ("provenance", "provenance")]
    return render(
        "report.html.j2", data, title=name, sections=[s for s in sections if s],
        warning=INTERPRETER_WARNING if env["gpu"] == "cpu" else "",
        subtitle=f"{env['gpu']}, {env.get('started') or 'date unknown'}. {counts_line(selection)}",
        cards=_cards(selection), sure=_sure(selection), answer=_answer(selection), cases=case_table(selection),
        reading=reading, curves=curves, eager_hidden=eager_hidden, speedups=speedups, heats=heats, roofline=roofline,
        stages=spent,
        sittings={"lines": sitting_lines(sittings)}, stage_table=_stage_table(stage_records, stages),
        failures=_failures(selection), provenance=provenance(env, selection), others=", ".join(others))


def render(template: str, data: Mapping[str, Any], **context: Any) -> str:
    """A page of sweeps/templates with its libraries, its data and its script inside."""
    import jinja2
    from markupsafe import Markup

    loader = jinja2.FunctionLoader(lambda name: _template(name))
    env = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True,
                             undefined=jinja2.StrictUndefined)
    # Inside a script element only "</" and "<!--" could end or change it.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    assets = {name: Markup(body) for name, body in _assets().items()}
    return env.get_template(template).render(data=Markup(text), assets=assets, **context)


@cache
def _assets() -> dict[str, str]:
    import vl_convert

    bundle: Any = vl_convert.javascript_bundle     # its type stub asks for an argument that has a default
    library = resources.files("itables") / "html"
    found = {"css": _template("style.css"), "js": _template("script.js"),
             "vega": bundle(),
             "table_js": (library / "dt_bundle.js").read_text(encoding="utf-8"),
             "table_css": (library / "dt_bundle.css").read_text(encoding="utf-8")}
    return {name: body.replace("</script", "<\\/script") for name, body in found.items()}


def _template(name: str) -> str:
    return (resources.files("sweeps") / "templates" / name).read_text(encoding="utf-8")


def _ordered(names: Iterable[str], known: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda n: (known.index(n) if n in known else len(known), n))


def _cards(selection: Selection) -> list[dict[str, Any]]:
    cards = []
    for p in pass_summaries(selection):
        speedups = [{"mean": f"{number(s.mean)}x", "rival": RIVALS[s.rival],
                     "range": "" if s.cases == 1 else f"{number(s.low)}x to {number(s.high)}x"} for s in p.speedups]
        won = f"Fastest of all that apply the sink in {p.won} of {count(p.against, 'case')}." if p.against else ""
        cards.append({"title": p.pass_, "cases": count(p.cases, "case"), "speedups": speedups, "won": won})
    return cards


def _sure(selection: Selection) -> dict[str, Any] | None:
    sure = certainty(selection)
    if sure is None:
        return None
    return {"alone": sure.clear, "cases": sure.cases, "half_width": percent(sure.half_width),
            "lost": ", ".join(r.case.id for r in without_winner(selection))}


def _answer(selection: Selection) -> list[dict[str, Any]]:
    rows = []
    for a in answers(selection):
        first, c = a.family[0], a.family[0].case
        runs = family_winners(a.family)
        winners = [{"parts": label.split(" | "), "lengths": "" if len(runs) == 1 else lengths_span(own),
                    "data": json.dumps({r.case.id: best_row(r)["config"] for r in own})} for label, own in runs]
        speedups = {"vs eager": a.speedups["eager"], "vs flash": a.speedups["flash"],
                    "vs untuned": a.speedups["default"]}
        rows.append({
            "model": model_label(first), "pass_": c.pass_, "dtype": DTYPE_SHORT[c.dtype], "mask": mask_label(c),
            "length": family_length(a.family), "winners": winners, "alone": f"{a.clear} of {a.timed}",
            "interval": NONE if a.half_width is None else f"±{percent(a.half_width)}",
            "speedups": [(name, {"text": times(s), "kind": _kind(s)})
                         for name, s in speedups.items()]})
    return rows


def _kind(speedup: float | None) -> str:
    """How a speedup is marked; what rounds to 1.00x is neither."""
    return "" if speedup is None or 0.995 <= speedup < 1.005 else "win" if speedup > 1 else "loss"


# Columns of best.csv that a run has only where it measured them, with their headings and texts.
_OPTIONAL = (
    ("source", "from", str), ("energy_j", "energy, J", lambda v: number(float(v), 3)),
    ("tflops_per_w", "TFLOP/s per W", lambda v: number(float(v), 3)),
    ("wall_disagrees", "wall time says", lambda v: "another" if v is True or v == "True" else "the same"),
)


def case_table(selection: Selection) -> dict[str, Any]:
    """Every case of best.csv, its values as written there."""
    found = [(r, best_row(r)) for r in sorted(selection.results, key=sort_key) if r.own_rows]
    extra = [o for o in _OPTIONAL if any(row.get(o[0]) not in (None, "") for _, row in found)]
    columns = [{"title": t, "number": False} for t in ("model (heads x dim)", "pass", "dtype", "mask", "tokens",
                                                       "best config")]
    columns += [{"title": t, "number": True} for t in ("ms", "TFLOP/s", "runner-up", "tied", "vs eager", "vs flash",
                                                       "vs untuned", "best peer, ms", *(o[1] for o in extra))]
    rows = []
    for r, row in found:
        batch = f"{r.case.batch} x " if r.case.batch > 1 and not r.case.varlen else ""
        head = [model_label(r), r.case.pass_, DTYPE_SHORT[r.case.dtype], mask_label(r.case),
                f"{batch}{length_label(r.case)}"]
        if row["latency_ms"] is None:
            cells = [*head, row["message"], *[NONE] * (len(columns) - 6)]
        else:
            half = (row["latency_ms_high"] - row["latency_ms_low"]) / 2 / row["latency_ms"]
            peer = f"{row['best_peer']} {number(row['best_peer_ms'], 4)}" if row["best_peer"] else NONE
            label = config_label(json.loads(row["config"]))
            cells = [*head, label if row["impl"] == "triton" else f"{row['impl']}: {label}",
                     f"{number(row['latency_ms'], 4)} ±{percent(half)}", number(row["tflops"]),
                     percent(row["margin"]), f"{row['ties']}", times(row["speedup_vs_eager"]),
                     times(row["speedup_vs_flash"]), times(row["speedup_vs_default"]), peer,
                     *(NONE if row.get(name) in (None, "") else text(row[name]) for name, _, text in extra)]
        rows.append({"case": row["case"], "gpu": row["gpu"], "config": row["config"] or "", "impl": row["impl"] or "",
                     "cells": cells})
    return {"columns": columns, "rows": rows}


def _stage_table(records: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> dict[str, Any]:
    spent = {(r["impl"], r["stage"]): r["seconds"] for r in records}
    trials = {r["impl"]: r["trials"] for r in records}
    impls = sorted(trials, key=lambda i: -sum(v for (impl, _), v in spent.items() if impl == i))
    rows = [[i, f"{trials[i]}", *(_seconds(spent[i, s]) if (i, s) in spent else NONE for s in stages),
             _seconds(sum(v for (impl, _), v in spent.items() if impl == i))] for i in impls]
    return {"columns": ["seconds in", "trials", *stages, "all"], "rows": rows}


def _seconds(value: float) -> str:
    return "<0.1" if value < 0.05 else f"{value:.1f}"


def _failures(selection: Selection) -> list[dict[str, Any]]:
    kinds: dict[str, list[Any]] = {}
    for group in failure_groups(selection):
        kinds.setdefault(group.status, []).append(group)
    return [{"status": status, "harmless": groups[0].harmless, "count": count(sum(g.count for g in groups), "trial"),
             "impls": ", ".join(impl_order(i for g in groups for i in g.impls)),
             "groups": [{"impls": ", ".join(g.impls), "passes": ", ".join(g.passes), "count": g.count,
                         "message": shorten(g.message, 500) or NONE} for g in groups]}
            for status, groups in kinds.items()]


def panel_charts(panels: Iterable[Panels]) -> dict[str, dict[str, Any]]:
    """The charts of panels by their ids, JSON-ready."""
    return {c.id: c.to_dict() for p in panels for c in p.charts}
