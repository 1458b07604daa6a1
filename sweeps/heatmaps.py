"""Heat maps of BLOCK_M x BLOCK_N, one per case."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter

from sweeps.plot_style import INK, OURS, PALE, PANELS_PER_ROW, chunks, figure_of, file_label, slug
from sweeps.select import CaseResult, Measured, Selection, config_label
from sweeps.tables import family_key, grouped, length_label, mask_label, number

TILED_PASSES = ("fwd", "bwd_dq", "bwd_dkdv", "bwd")     # the last where one kernel does all of it


def heatmap_figures(selection: Selection) -> dict[str, Figure]:
    """BLOCK_M x BLOCK_N of every case swept over tiles: the best over the other tunables in each cell.

    A file per model, precision and mask; a row per kernel, a column per length.
    """
    tiled = [r for r in selection.results if r.case.pass_ in TILED_PASSES
             and any(row.get("config", {}).get("BLOCK_M") for row in r.own_rows)]
    figures = {}
    for group in grouped(tiled, lambda r: (*family_key(r)[:8], r.case.varlen, r.case.sinks)):
        c = group[0].case
        title = f"{file_label(group[0])} {mask_label(c)}" + (f" {c.varlen}" if c.varlen else "")
        columns = [g[0] for g in grouped(group, lambda r: r.case.shape_id)]
        columns.sort(key=lambda r: (r.case.batch, r.case.seqlen_q, r.case.seqlen_k))
        for part, chunk in enumerate(chunks(columns, PANELS_PER_ROW)):
            shapes = [r.case.shape_id for r in chunk]
            figure = _heatmaps([r for r in group if r.case.shape_id in shapes], shapes)
            figure.suptitle(title)
            figures[f"tiles-{slug(title)}" + (f"-{part + 1}" if part else "")] = figure
    return figures


def tile_cells(result: CaseResult) -> dict[tuple[int, int], Measured | str]:
    """For every (BLOCK_M, BLOCK_N) tried: its fastest candidate, or the commonest status where none was ok."""
    cells: dict[tuple[int, int], Measured | str] = {}
    statuses: dict[tuple[int, int], list[str]] = {}
    for row in result.own_rows:
        config = row.get("config") or {}
        if "BLOCK_M" in config and "BLOCK_N" in config:
            statuses.setdefault((config["BLOCK_M"], config["BLOCK_N"]), []).append(row["status"])
    for cell, names in statuses.items():
        cells[cell] = max(sorted(set(names)), key=names.count)
    for m in reversed(result.ranked):
        if "BLOCK_M" in m.config and "BLOCK_N" in m.config:
            cells[m.config["BLOCK_M"], m.config["BLOCK_N"]] = m
    return cells


def _heatmaps(group: Sequence[CaseResult], shapes: Sequence[str]) -> Figure:
    passes = [p for p in TILED_PASSES if any(r.case.pass_ == p for r in group)]
    tried = [cell for r in group for cell in tile_cells(r)]
    ms, ns = sorted({m for m, _ in tried}), sorted({n for _, n in tried})
    panel_w, panel_h = 0.86 * len(ns) + 0.35, 0.56 * len(ms) + 0.55
    figure, axes = figure_of(len(passes), len(shapes), max(4.4, panel_w * len(shapes) + 1.6),
                             panel_h * len(passes) + 1.6)
    colours, norm = mpl.colormaps["Blues_r"], Normalize(1.0, 2.0)
    at = {(r.case.pass_, r.case.shape_id): r for r in group}
    for (i, pass_), (j, shape) in itertools.product(enumerate(passes), enumerate(shapes)):
        ax, r = axes[i][j], at.get((pass_, shape))
        if r is None:
            ax.set_visible(False)
            continue
        _heatmap(ax, r, ms, ns, colours, norm)
        batch = f"batch {r.case.batch}, " if len({x.case.batch for x in group}) > 1 else ""
        ax.set_title(f"{pass_}, {batch}{length_label(r.case)}")
        if i == len(passes) - 1 or at.get((passes[i + 1], shape)) is None:
            ax.set_xlabel("BLOCK_N, keys")
        if j == 0:
            ax.set_ylabel("BLOCK_M, queries")
    bar = figure.colorbar(mpl.cm.ScalarMappable(norm, colours), ax=axes, extend="max", shrink=min(1.0, 2.2 / panel_h),
                          aspect=24, pad=0.015)
    bar.set_label("time over the case's best")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
    # the legend of a narrow figure would be cut off
    wide = figure.get_size_inches()[0] > 8.5
    cell = "best of the case; a cell is the best time in ms" + (" " if wide else "\n") + "over the other tunables"
    figure.legend([Patch(facecolor="none", edgecolor=OURS, linewidth=2.2),
                   Patch(facecolor="#F2F2F2", edgecolor="#9A9A9A", hatch="////", linewidth=0),
                   Patch(facecolor="white", edgecolor=PALE)],
                  [cell, "no candidate was ok", "not tried"],
                  loc="outside lower left", ncols=3 if wide else 1)
    return figure


def _heatmap(ax: Axes, r: CaseResult, ms: list[int], ns: list[int], colours: Any, norm: Normalize) -> None:
    cells = tile_cells(r)
    for (y, m), (x, n) in itertools.product(enumerate(ms), enumerate(ns)):
        found = cells.get((m, n))
        corner = (x - 0.5, y - 0.5)
        if isinstance(found, Measured) and r.best is not None:
            colour = colours(norm(found.latency_ms / r.best.latency_ms))
            ax.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white", linewidth=1))
            ink = "white" if np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.55 else INK
            rest = config_label(found.config).split(" ", 1)
            weight = "bold" if found is r.best else "normal"
            ax.text(x, y + 0.17, number(found.latency_ms), ha="center", va="center", fontsize=8.5, color=ink,
                    weight=weight)
            ax.text(x, y - 0.24, textwrap.fill(rest[1], 13) if len(rest) > 1 else "", ha="center", va="center",
                    fontsize=6.0, color=ink, linespacing=0.95)
            if found is r.best:
                ax.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=OURS, linewidth=2.2,
                                       zorder=5))
        elif isinstance(found, str):
            ax.add_patch(Rectangle(corner, 1, 1, facecolor="#F2F2F2", edgecolor="#C4C4C4", hatch="////", linewidth=0))
            status = found.replace("out_of_resources", "out of\nresources").replace("_", "\n")
            ax.text(x, y, status, ha="center", va="center", fontsize=6.2, color=INK, linespacing=0.95,
                    bbox={"facecolor": "#F2F2F2", "edgecolor": "none", "pad": 0.8})
        else:
            ax.add_patch(Rectangle(corner, 1, 1, facecolor="white", edgecolor=PALE, linewidth=0.6))
    ax.set(xlim=(-0.5, len(ns) - 0.5), ylim=(-0.5, len(ms) - 0.5), xticks=range(len(ns)), yticks=range(len(ms)),
           xticklabels=ns, yticklabels=ms)
    ax.set_box_aspect(0.56 * len(ms) / (0.86 * len(ns)))
    ax.grid(visible=False)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
