"""Plots of a selection, drawn with matplotlib's Agg canvas: no display, no global state, no torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from sweeps.columns import WHOLE_PASSES
from sweeps.cost import compulsory_bytes, flops
from sweeps.devices import Card
from sweeps.heatmaps import heatmap_figures
from sweeps.plot_style import (
    INK,
    MODEL_COLOURS,
    OURS,
    PANELS_PER_ROW,
    SLOWER,
    STYLE,
    chunks,
    figure_of,
    file_label,
    look,
    plain_log,
    slug,
)
from sweeps.registry import is_peer
from sweeps.select import CaseResult, Selection
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
)


def write_plots(selection: Selection, card: Card | None, directory: Path, warning: str = "") -> list[Path]:
    """Draw every plot the rows allow, as PNG files with an SVG beside each.

    Args:
        selection: what to draw.
        card: its ceilings make the roofline; None leaves the roofline out.
        directory: created where absent; plots of an earlier report in it are removed.
        warning: one line put on every plot.

    Returns:
        The PNG files, in the order of a report.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for old in [*directory.glob("*.png"), *directory.glob("*.svg")]:
        old.unlink()
    figures: dict[str, Figure] = {}
    with mpl.rc_context(STYLE):
        figures |= speedup_figures(selection)
        figures |= curve_figures(selection)
        if card is not None:
            figures |= roofline_figures(selection, card)
        figures |= heatmap_figures(selection)
        paths = []
        for name, figure in figures.items():
            if warning:
                figure.suptitle(f"{figure.get_suptitle()}\n{warning}", color="#B00020")
            paths.append(directory / f"{name}.png")
            figure.savefig(paths[-1])
            figure.set_layout_engine("none")    # laid out already; doing it again would take as long as the drawing
            # without a date and with ids from a fixed salt, the same rows give the same bytes
            figure.savefig(paths[-1].with_suffix(".svg"), metadata={"Date": None})
    return paths


# Curves over the sequence length


def curve_figures(selection: Selection) -> dict[str, Figure]:
    """Latency above TFLOP/s over the sequence length, a line per implementation; a file per model and precision.

    Families (pass, mask, batch) with one length only are drawn as bars, where a file has nothing but such.
    """
    whole = [r for r in selection.results if r.case.pass_ in WHOLE_PASSES and (r.best or r.peers)]
    figures = {}
    for group in grouped(whole, lambda r: family_key(r)[:7]):
        families = grouped(group, family_key)
        lines = [f for f in families if len({r.case.seqlen_k for r in f}) > 1]
        for part, chunk in enumerate(chunks(lines or families, PANELS_PER_ROW)):
            figure = _curves(chunk) if lines else _latency_bars(chunk)
            figure.suptitle(file_label(group[0]))
            figures[f"latency-{slug(file_label(group[0]))}" + (f"-{part + 1}" if part else "")] = figure
    return figures


def _family_title(result: CaseResult) -> str:
    c = result.case
    extra = f", {c.varlen}" if c.varlen else (f", batch {c.batch}" if c.batch > 1 else "")
    queries = "" if c.seqlen_q == c.seqlen_k else f", {c.seqlen_q} queries"
    return f"{c.pass_}, {mask_label(c)}{extra}{queries}"


def _case_title(result: CaseResult) -> str:
    """The family's title, which already names a varlen batch, and the length."""
    name, length = result.case.varlen, length_label(result.case)
    return _family_title(result) + (length.removeprefix(name) if name else f", {length}")


def _curves(families: Sequence[Sequence[CaseResult]]) -> Figure:
    width = max(6.4, 3.1 * len(families) + 0.6)
    figure, axes = figure_of(2, len(families), width, 6.4, sharex="col")
    measured = [m for f in families for r in f for m in fastest_of_each(r).values()]
    without_sink = {m.impl for m in measured if not m.row.get("applies_sink")}
    impls = impl_order(m.impl for m in measured)
    for column, family in enumerate(families):
        latency, rate = axes[0][column], axes[1][column]
        for impl in reversed(impls):                        # ours last, on top
            points = [(r.case.seqlen_k, fastest_of_each(r)[impl]) for r in family if impl in fastest_of_each(r)]
            if not points:
                continue
            colour, marker = look(impl)
            ours = not is_peer(impl)
            edge = (colour, 1.2) if marker == "x" else ("white", 0.6)
            style: dict[str, Any] = {
                "color": colour, "marker": marker, "markersize": 6.5 if ours else 5, "linewidth": 2.6 if ours else 1.3,
                "linestyle": "--" if impl in without_sink else "-", "markeredgecolor": edge[0],
                "markeredgewidth": edge[1], "zorder": 4 if ours else 3, "label": impl}
            latency.plot([x for x, _ in points], [m.latency_ms for _, m in points], **style)
            rates = [(x, m.row["tflops"]) for x, m in points if m.row.get("tflops")]
            rate.plot([x for x, _ in rates], [y for _, y in rates], **style)
        lengths = sorted({r.case.seqlen_k for r in family})
        latency.set(title=_family_title(family[0]), xscale="log", yscale="log")
        rate.set(xscale="log", ylim=(0, None), xlabel="sequence length, tokens")
        rate.set_xticks(lengths, [_short_length(n) for n in lengths])
        rate.minorticks_off()
        plain_log(latency.yaxis, subs=(1.0,) if _decades(latency) > 1.5 else (1.0, 2.0, 5.0))
    axes[0][0].set_ylabel("device time, ms")
    axes[1][0].set_ylabel("TFLOP/s")
    handles = {h.get_label(): h for row in axes for ax in row for h in ax.get_lines()}
    figure.legend([handles[i] for i in impls], [i + (" (no sink)" if i in without_sink else "") for i in impls],
                  loc="outside lower center", ncols=min(len(impls), max(3, int(width / 1.25))), handlelength=2.6)
    return figure


def _decades(ax: Axes) -> float:
    low, high = ax.get_ylim()
    return float(np.log10(high / low)) if low > 0 else 9.0


def _short_length(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else f"{n}"


def _latency_bars(families: Sequence[Sequence[CaseResult]]) -> Figure:
    impls = max(len(fastest_of_each(r)) for f in families for r in f)
    panels = [r for f in families for r in f]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = figure_of(rows, columns, max(6.4, 4.2 * columns), 0.9 + rows * (0.9 + 0.27 * impls))
    for ax, r in itertools.zip_longest(axes.flat, panels):
        if r is None:
            ax.set_visible(False)
            continue
        ordered = sorted(fastest_of_each(r).values(), key=lambda m: -m.latency_ms)
        low = min(m.latency_ms for m in ordered) / 2
        for y, m in enumerate(ordered):
            sink = bool(m.row.get("applies_sink"))
            ax.barh(y, m.latency_ms - low, left=low, height=0.72, color=look(m.impl)[0], hatch=None if sink else "////",
                    edgecolor="white", linewidth=0)
            rate = f"  ({number(m.row['tflops'])} TFLOP/s)" if m.row.get("tflops") else ""
            ax.text(m.latency_ms * 1.06, y, f"{number(m.latency_ms)} ms{rate}", va="center", fontsize=8)
        ax.set_yticks(range(len(ordered)),
                      [m.impl + ("" if m.row.get("applies_sink") else " (no sink)") for m in ordered])
        for tick, m in zip(ax.get_yticklabels(), ordered, strict=True):
            tick.set_fontweight("bold" if not is_peer(m.impl) else "normal")
        high = max(m.latency_ms for m in ordered)
        ax.set_title(_case_title(r))
        ax.set(xscale="log", xlim=(low, high * (high / low) ** 0.75), xlabel="device time, ms",
               ylim=(len(ordered) - impls - 0.6, len(ordered) - 0.4))
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        plain_log(ax.xaxis, subs=(1.0,) if high / low > 30 else (1.0, 2.0, 5.0))
    return figure


# Speedups


def speedup_figures(selection: Selection) -> dict[str, Figure]:
    """Bars of eager's, FlashAttention's and the untuned heuristic's time over ours.

    ``speedup`` has a bar per family, the geometric mean over its lengths; ``speedup-<model>`` one per case.
    """
    whole = [r for r in selection.results if r.case.pass_ in WHOLE_PASSES and r.best]
    if not whole:
        return {}
    families = grouped(whole, family_key)
    figure = _speedup_bars([(f"{model_label(f[0])}, {DTYPE_SHORT[f[0].case.dtype]}, {_family_title(f[0])}", f)
                            for f in families], mean=True)
    figure.suptitle("Speedup, geometric mean over the lengths")
    figures = {"speedup": figure}
    for group in grouped(whole, lambda r: family_key(r)[:6]):
        if len(group) > len(grouped(group, family_key)):
            for part, chunk in enumerate(chunks(group, 40)):
                names = [f"{DTYPE_SHORT[r.case.dtype]}, {_case_title(r)}" for r in chunk]
                figure = _speedup_bars([(name, [r]) for name, r in zip(names, chunk, strict=True)], mean=False)
                figure.suptitle(f"{model_label(group[0])}: speedup")
                figures[f"speedup-{slug(model_label(group[0]))}" + (f"-{part + 1}" if part else "")] = figure
    return figures


def _speedup_bars(bars: Sequence[tuple[str, Sequence[CaseResult]]], *, mean: bool) -> Figure:
    figure, axes = figure_of(1, 3, 12.5, max(2.0, 1.25 + 0.27 * len(bars)), sharey=True)
    titles = {"eager": "over eager", "flash": "over the best of\nFlashAttention and cuDNN",
              "default": "over our untuned heuristic"}
    for ax, (name, title) in zip(axes[0], titles.items(), strict=True):
        seen = []
        for y, (_, results) in enumerate(reversed(bars)):
            values = [s for r in results if (s := r.speedup(r.rivals[name])) is not None]
            value = geometric_mean(values)
            if value is None:
                ax.text(1.0, y, "  no time", va="center", fontsize=8, color="#777777")
                continue
            seen.append(value)
            ax.barh(y, value - 1, left=1, height=0.7, color=OURS if value >= 1 else SLOWER, alpha=0.9,
                    hatch=None if value >= 1 else "////", edgecolor="white", linewidth=0)
            flash = results[0].flash if name == "flash" and not mean else None
            ax.text(max(value, 1), y, f" {number(value)}x{f'  {flash.impl}' if flash else ''}", va="center", fontsize=8)
        top, bottom = max([*seen, 1.1]), min([*seen, 1.0])
        if name == "eager":
            ax.set_xscale("log")
            ax.set_xlim(min(bottom, 1) * 0.9, top ** 1.25)
            plain_log(ax.xaxis, subs=(1.0,) if top > 30 else (1.0, 2.0, 5.0))
        else:
            ax.set_xlim(bottom - 0.05 * (top - bottom), top + 0.35 * (top - min(bottom, 1)))
        ax.axvline(1, color=INK, linewidth=1)
        ax.set_title(title)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
    axes[0][0].set_yticks(range(len(bars)), [label for label, _ in reversed(bars)])
    axes[0][0].set_ylim(-0.6, len(bars) - 0.4)
    return figure


# Roofline


def roofline_figures(selection: Selection, card: Card) -> dict[str, Figure]:
    """TFLOP/s over arithmetic intensity (useful FLOPs per compulsory byte) under the card's ceilings.

    A filled marker is our best, the hollow one above or below it the fastest peer that applies the sink.
    """
    whole = sorted((r for r in selection.results if r.case.pass_ in ("fwd", "bwd") and r.best),
                   key=lambda r: (model_label(r), r.case.pass_))
    if not whole:
        return {}
    figure, axes = figure_of(1, 1, 9.6, 5.6)
    ax = axes[0][0]
    models = sorted({model_label(r) for r in whole})
    colours = dict(zip(models, itertools.cycle(MODEL_COLOURS)))
    markers = {"fwd": "o", "bwd": "s"}
    xs, ys = [], []
    for r in whole:
        assert r.best is not None
        work = flops(r.case)
        x, y = work / compulsory_bytes(r.case), work / r.best.latency_ms / 1e9
        colour, marker = colours[model_label(r)], markers[r.case.pass_]
        if r.best_peer:
            peer = work / r.best_peer.latency_ms / 1e9
            ax.plot([x, x], [y, peer], color=colour, linewidth=0.8, alpha=0.6, zorder=2)
            ax.plot([x], [peer], marker, color=colour, markersize=6, markerfacecolor="white", markeredgewidth=1.1,
                    zorder=3)
            ys.append(peer)
        ax.plot([x], [y], marker, color=colour, markersize=7, markeredgecolor="white", markeredgewidth=0.7, zorder=4)
        xs.append(x)
        ys.append(y)
    left, right = min(xs) / 2, max(xs) * 2.5
    intensity = np.geomspace(left, right, 400)
    measured = card.copy_tb_per_s is not None and card.gemm_tflops is not None
    ax.plot(intensity, np.minimum(card.peak_tb_per_s * intensity, card.peak_tflops), color="#999999", linestyle="--",
            linewidth=1.2, label=f"data sheet: {card.peak_tb_per_s:g} TB/s, {card.peak_tflops:g} TFLOP/s")
    if measured:
        ax.plot(intensity, np.minimum(card.ceiling_tb_per_s * intensity, card.ceiling_tflops), color=INK, linewidth=1.6,
                label=f"measured: copy {card.ceiling_tb_per_s:g} TB/s, GEMM {card.ceiling_tflops:g} TFLOP/s")
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(ys) / 1.6, card.peak_tflops * 1.3),
           xlabel="useful FLOPs per compulsory byte", ylabel="TFLOP/s",
           title=f"{card.name}: best of each case (filled) and its fastest peer (hollow)")
    plain_log(ax.xaxis, subs=(1.0, 3.0))
    plain_log(ax.yaxis, subs=(1.0, 2.0, 5.0))
    handles = [*ax.get_legend_handles_labels()[0],
               *(Line2D([], [], color=INK, marker=m, linestyle="none", label=p) for p, m in markers.items()),
               *(Patch(color=colours[m], label=m) for m in models)]
    figure.legend(handles=handles, loc="outside right upper")
    return {"roofline": figure}
