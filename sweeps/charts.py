"""The interactive charts of the HTML report, as Vega-Lite specifications made with Altair.

A specification is written once and drawn with many sets of records (``sweeps.chart_data``): the page's script puts the
records, the height and the colours of the reader's theme in. Nothing is told by colour alone: an implementation has a
marker shape of its own too, and a dash pattern tells whose results lack the sink.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from sweeps.devices import Card
from sweeps.plot_style import MODEL_COLOURS, OURS, SLOWER, look

Spec = dict[str, Any]

# matplotlib's markers as Vega's shapes; paths fill the square from -1 to 1.
_PATHS = {
    "o": "M0,-1A1,1,0,0,1,0,1A1,1,0,0,1,0,-1Z", "s": "M-.85,-.85H.85V.85H-.85Z", "D": "M0,-1.1L1.1,0L0,1.1L-1.1,0Z",
    "^": "M0,-1L1,.85H-1Z", "v": "M0,1L1,-.85H-1Z", "<": "M-1,0L.85,-1V1Z", ">": "M1,0L-.85,-1V1Z",
    "x": "M-1,-.6L-.6,-1L0,-.4L.6,-1L1,-.6L.4,0L1,.6L.6,1L0,.4L-.6,1L-1,.6L-.4,0Z",
    "P": "M-.4,-1H.4V-.4H1V.4H.4V1H-.4V.4H-1V-.4H-.4Z", "X": "M-1,-.3L-.3,-1L0,-.7L.3,-1L1,-.3L.7,0L1,.3L.3,1L0,.7"
    "L-.3,1L-1,.3L-.7,0Z", "p": "M0,-1L.95,-.31L.59,.81H-.59L-.95,-.31Z",
    "h": "M0,-1L.87,-.5V.5L0,1L-.87,.5V-.5Z", "H": "M-.5,-.87H.5L1,0L.5,.87H-.5L-1,0Z",
    "8": "M-.41,-1H.41L1,-.41V.41L.41,1H-.41L-1,.41V-.41Z",
    "*": "M0,-1.2L.3,-.4L1.15,-.37L.48,.15L.71,.97L0,.5L-.71,.97L-.48,.15L-1.15,-.37L-.3,-.4Z",
}
_STAGE_COLOURS = ("#332288", "#117733", "#D55E00", "#E69F00", "#56B4E9", "#CC79A7", "#999933", "#8C8C8C", "#882255")
_DASHES = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3))


def marker_path(name: str) -> str:
    """The shape of an implementation as an SVG path in the square from -1 to 1."""
    return _PATHS[look(name)[1]]


def run_looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and path of each of several runs."""
    paths = [_PATHS[m] for m in "osD^vP*xph"]
    return {n: (MODEL_COLOURS[i % len(MODEL_COLOURS)], paths[i % len(paths)]) for i, n in enumerate(names)}


def implementation_looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and path of each implementation, the same in every report."""
    return {n: (look(n)[0], marker_path(n)) for n in names}


def specifications(looks: dict[str, tuple[str, str]], card: Card | None = None,
                   points: Sequence[Mapping[str, Any]] = (), stages: Sequence[str] = ()) -> dict[str, Spec]:
    """Every specification of a page, by the names that ``chart_data.Chart.spec`` uses.

    Args:
        looks: colour and path of every line's name.
        card: its ceilings are drawn in the roofline; None leaves that out.
        points: what the roofline shows, see ``chart_data.roofline_points``.
        stages: names told apart in the chart of where the time went.
    """
    found = {
        "curve-ms": _curve(looks, "ms", ("low", "high"), "device time, ms", log=True),
        "curve-tflops": _curve(looks, "tflops", ("tlow", "thigh"), "TFLOP/s", log=False),
        "dots-ms": _dots(looks, "ms", ("low", "high"), "device time, ms", log=True),
        "dots-tflops": _dots(looks, "tflops", ("tlow", "thigh"), "TFLOP/s", log=False),
        "heat": _heat(), "speedup": _speedup(), "stages": _stages(stages),
    }
    if card is not None:
        found["roofline"] = _roofline(card, points)
    return {name: chart.to_dict() for name, chart in found.items()}


def _data() -> alt.NamedData:
    return alt.NamedData(name="values")


def _hidden(chart: Any) -> Any:
    """Lets the page's legend hide lines by name."""
    hidden = alt.param(name="hidden", value=[])
    return chart.add_params(hidden).transform_filter("indexof(hidden, datum.impl) < 0")


def _looks(looks: dict[str, tuple[str, str]]) -> tuple[alt.Color, alt.Shape]:
    names = list(looks)
    colour = alt.Color("impl:N", legend=None, scale=alt.Scale(domain=names, range=[c for c, _ in looks.values()]))
    shape = alt.Shape("impl:N", legend=None, scale=alt.Scale(domain=names, range=[p for _, p in looks.values()]))
    return colour, shape


def _tooltip() -> list[alt.Tooltip]:
    return [alt.Tooltip("impl:N", title="implementation"), alt.Tooltip("length:N", title="tokens"),
            alt.Tooltip("ms:Q", title="ms", format=".4~g"), alt.Tooltip("interval:N", title="95% interval"),
            alt.Tooltip("tflops:Q", title="TFLOP/s", format=".4~g"), alt.Tooltip("config:N", title="config"),
            alt.Tooltip("sink:N", title="result")]


def _curve(looks: dict[str, tuple[str, str]], field: str, ends: tuple[str, str], title: str, *, log: bool) -> Any:
    colour, shape = _looks(looks)
    scale = alt.Scale(type="log", nice=False, padding=8) if log else alt.Scale(zero=True)
    x = alt.X("n:Q", title="sequence length, tokens", scale=alt.Scale(type="log", base=2, padding=12, nice=False),
              axis=alt.Axis(grid=False, labelOverlap=True, tickCount=6, labelExpr=(
                  "datum.value >= 1024 && datum.value % 1024 == 0 ? datum.value / 1024 + 'k' : datum.label")))
    y = alt.Y(f"{field}:Q", title=title, scale=scale, axis=alt.Axis(format="~g", tickCount=5, labelOverlap=True))
    dash = alt.StrokeDash("sink:N", legend=None, scale=alt.Scale(
        domain=["with the sink", "without the sink"], range=[[1, 0], [5, 4]]))
    base = alt.Chart(_data())
    line = base.mark_line().encode(x=x, y=y, color=colour, strokeDash=dash, order="n:Q", detail="impl:N",
                                   size=alt.condition("datum.ours", alt.value(2.8), alt.value(1.4)))
    bars = base.mark_rule(strokeWidth=1.2).encode(
        x=x, y=alt.Y(f"{ends[0]}:Q", title=title, scale=scale), y2=f"{ends[1]}:Q", color=colour)
    points = base.mark_point(filled=True, opacity=1).encode(
        x=x, y=y, color=colour, shape=shape, tooltip=_tooltip(),
        size=alt.condition("datum.ours", alt.value(80), alt.value(52)))
    return _hidden(alt.layer(line, bars, points).properties(width="container", height=230))


def _dots(looks: dict[str, tuple[str, str]], field: str, ends: tuple[str, str], title: str, *, log: bool) -> Any:
    colour, shape = _looks(looks)
    scale = alt.Scale(type="log", nice=False, padding=14) if log else alt.Scale(zero=True)
    x = alt.X(f"{field}:Q", title=title, scale=scale, axis=alt.Axis(format="~g", tickCount=5, labelOverlap=True))
    y = alt.Y("impl:N", title=None, sort=alt.EncodingSortField(field="ms", order="ascending"),
              axis=alt.Axis(grid=True, domain=False, ticks=False))
    base = alt.Chart(_data())
    rule = base.mark_rule(strokeWidth=1.6).encode(x=alt.X(f"{ends[0]}:Q", title=title, scale=scale),
                                                  x2=f"{ends[1]}:Q", y=y, color=colour)
    points = base.mark_point(filled=True, opacity=1, size=85).encode(x=x, y=y, color=colour, shape=shape,
                                                                     tooltip=_tooltip())
    text = base.mark_text(align="left", dx=9, fontSize=10).encode(x=x, y=y, text=alt.Text(f"{field}:Q", format=".4~g"))
    return _hidden(alt.layer(rule, points, text).properties(width="container", height=alt.Step(20)))


def _heat() -> Any:
    x = alt.X("n:O", title="BLOCK_N, keys", axis=alt.Axis(labelAngle=0, domain=False, ticks=False))
    y = alt.Y("m:O", title="BLOCK_M, queries", sort="descending", axis=alt.Axis(domain=False, ticks=False))
    tooltip = [alt.Tooltip("config:N", title="config"), alt.Tooltip("interval:N", title="95% interval"),
               alt.Tooltip("over:N", title="time"), alt.Tooltip("registers:N", title="registers")]
    base = alt.Chart(_data())
    scale = alt.Scale(domain=[1, 2], clamp=True, range=["#08519c", "#6baed6", "#deebf7"], interpolate="lab")
    cells = base.mark_rect(stroke="#ffffff", strokeWidth=1).encode(
        x=x, y=y, tooltip=tooltip,
        color=alt.condition("isValid(datum.ratio)", alt.Color("ratio:Q", scale=scale, legend=None),
                            alt.value("#bdbdbd")))
    best = base.transform_filter("datum.best").mark_rect(
        filled=False, stroke=OURS, strokeWidth=3.5).encode(x=x, y=y)
    ink = alt.condition("isValid(datum.ratio) && datum.ratio < 1.45", alt.value("#ffffff"), alt.value("#111111"))
    first = base.mark_text(fontSize=11, dy=-5).encode(x=x, y=y, text="text:N", color=ink)
    second = base.mark_text(fontSize=8, dy=8).encode(x=x, y=y, text="rest:N", color=ink)
    return alt.layer(cells, best, first, second).properties(width="container", height=alt.Step(42))


def _speedup() -> Any:
    y = alt.Y("label:N", title=None, sort=alt.EncodingSortField(field="order", order="ascending"),
              axis=alt.Axis(labelLimit=330, domain=False, ticks=False))
    x = alt.X("speedup:Q", title="times faster than the rival (log scale)",
              scale=alt.Scale(type="log", nice=False, padding=34),
              axis=alt.Axis(format="~g", tickCount=6, labelOverlap=True))
    who = alt.Color("who:N", title=None, legend=alt.Legend(orient="top", direction="horizontal"), scale=alt.Scale(
        domain=["ours is faster", "ours is slower"], range=[OURS, SLOWER]))
    tooltip = [alt.Tooltip("label:N", title="cases"), alt.Tooltip("against:N", title="rival"),
               alt.Tooltip("text:N", title="mean speedup"), alt.Tooltip("each:N", title="by length")]
    base = alt.Chart(_data())
    bars = base.mark_bar(height=12).encode(x=x, x2=alt.datum(1), y=y, color=who, tooltip=tooltip)
    line = alt.Chart(alt.InlineData(values=[{"one": 1}])).mark_rule(strokeWidth=1.4).encode(x=alt.X("one:Q"))
    text = base.mark_text(fontSize=11, align=alt.expr("datum.speedup >= 1 ? 'left' : 'right'"),
                          dx=alt.expr("datum.speedup >= 1 ? 4 : -4")).encode(x=x, y=y, text="text:N")
    return alt.layer(bars, line, text).properties(width="container", height=alt.Step(20))


def _stages(stages: Sequence[str]) -> Any:
    order = alt.EncodingSortField(field="total", order="descending")
    colours = [_STAGE_COLOURS[i % len(_STAGE_COLOURS)] for i in range(len(stages))]
    bars = alt.Chart(_data()).mark_bar(stroke="#ffffff", strokeWidth=0.6).encode(
        y=alt.Y("impl:N", title=None, sort=order, axis=alt.Axis(domain=False, ticks=False)),
        x=alt.X("seconds:Q", title="seconds", stack="zero"),
        color=alt.Color("stage:N", sort=list(stages), title=None, scale=alt.Scale(domain=list(stages), range=colours),
                        legend=alt.Legend(orient="top", direction="horizontal", columns=4)),
        order=alt.Order("rank:Q"),
        tooltip=[alt.Tooltip("impl:N", title="implementation"), alt.Tooltip("stage:N"), alt.Tooltip("text:N"),
                 alt.Tooltip("trials:Q", title="trials")],
    ).transform_calculate(rank=f"indexof({list(stages)!r}, datum.stage)")
    return bars.properties(width="container", height=alt.Step(22))


def _roofline(card: Card, points: Sequence[Mapping[str, Any]]) -> Any:
    models = sorted({p["model"] for p in points})
    left, right = min(p["x"] for p in points) / 1.5, max(p["x"] for p in points) * 2
    low = min(p["y"] for p in points) / 1.5
    colours = [MODEL_COLOURS[i % len(MODEL_COLOURS)] for i in range(len(models))]
    x = alt.X("x:Q", title="useful FLOPs per compulsory byte",
              scale=alt.Scale(type="log", nice=False, domain=[left, right]),
              axis=alt.Axis(format="~g", tickCount=6, labelOverlap=True))
    y = alt.Y("y:Q", title="TFLOP/s", scale=alt.Scale(type="log", nice=False, domain=[low, card.peak_tflops * 1.3]),
              axis=alt.Axis(format="~g", tickCount=6, labelOverlap=True))
    legend = alt.Legend(orient="bottom", columns=2, labelLimit=260, symbolLimit=30)
    colour = alt.Color("model:N", title=None, scale=alt.Scale(domain=models, range=colours), legend=legend)
    shape = alt.Shape("pass:N", title=None, legend=alt.Legend(orient="bottom"),
                      scale=alt.Scale(domain=["fwd", "bwd"], range=["circle", "square"]))
    tooltip = [alt.Tooltip("case:N"), alt.Tooltip("impl:N", title="implementation"), alt.Tooltip("ms:N", title="ms"),
               alt.Tooltip("interval:N", title="95% interval"), alt.Tooltip("y:Q", title="TFLOP/s", format=".4~g"),
               alt.Tooltip("peak:N", title="of the data sheet"), alt.Tooltip("config:N")]
    base = alt.Chart(_data())
    marks = [base.transform_filter(f"datum.who {sign} 'ours'").mark_point(filled=filled, size=60, strokeWidth=1.5,
                                                                          opacity=0.9).encode(
        x=x, y=y, color=colour, shape=shape, tooltip=tooltip) for sign, filled in (("!=", False), ("==", True))]
    roofs = [("data sheet", card.peak_tb_per_s, card.peak_tflops)]
    if card.copy_tb_per_s is not None and card.gemm_tflops is not None:
        roofs.append(("measured", card.ceiling_tb_per_s, card.ceiling_tflops))
    names = [f"{name}: {rate:g} TB/s, {peak:g} TFLOP/s" for name, rate, peak in roofs]
    values = [{"x": float(i), "y": min(rate * float(i), peak), "roof": text} for (_, rate, peak), text
              in zip(roofs, names, strict=True) for i in np.geomspace(left, right, 160)]
    lines = alt.Chart(alt.InlineData(values=values)).mark_line(strokeWidth=1.6, clip=True).encode(
        x=x, y=y, strokeDash=alt.StrokeDash("roof:N", title=None, legend=alt.Legend(orient="top", labelLimit=330,
                                                                                  direction="vertical"),
                                            scale=alt.Scale(domain=list(reversed(names)),
                                                            range=[list(d) for d in _DASHES[:len(names)]])))
    return alt.layer(lines, *marks).properties(width="container", height=420)
