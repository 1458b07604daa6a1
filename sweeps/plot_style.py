"""What all plots share: colours, markers, axes, names of files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sweeps.select import CaseResult
from sweeps.tables import DTYPE_SHORT, model_label

OURS, SLOWER, INK, PALE = "#D55E00", "#0072B2", "#222222", "#D9D9D9"
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.labelsize": 9, "axes.edgecolor": "#888888",
    "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.7, "xtick.color": INK, "ytick.color": INK,
    "legend.frameon": False, "legend.fontsize": 8.5, "figure.titlesize": 11.5, "figure.titleweight": "bold",
    "savefig.dpi": 150, "hatch.linewidth": 0.5, "svg.fonttype": "none", "svg.hashsalt": "flash_sink_attn",
}
# Colours that stay apart under the common kinds of colour blindness, and a marker of its own for every name.
LOOKS = {
    "triton": (OURS, "o"), "hopper": ("#000000", "*"), "eager": ("#8C8C8C", "x"), "sdpa_flash": ("#56B4E9", "<"),
    "sdpa_cudnn": ("#44AA99", ">"), "flex": ("#CC79A7", "P"), "fa2": ("#88CCEE", "p"), "fa3": ("#0072B2", "s"),
    "fa4": ("#332288", "D"), "cudnn": ("#117733", "^"), "tilelang": ("#999933", "h"), "gptoss_triton": ("#E69F00", "X"),
    "upstream": ("#882255", "v"),
}
_SPARE = ("#661100", "#6699CC", "#AA4466", "#4B4B4B")
MODEL_COLOURS = (OURS, "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#882255", "#999933",
                 "#000000")
PANELS_PER_ROW = 6


def look(impl: str) -> tuple[str, str]:
    """Colour and marker of an implementation, the same in every plot."""
    n = sum(map(ord, impl))
    return LOOKS.get(impl) or (_SPARE[n % 4], "dHp8"[n // 4 % 4])


def slug(text: str) -> str:
    """A file-name form of a label."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def file_label(result: CaseResult) -> str:
    """Model, heads and dim, precision: what one file of panels holds constant."""
    return f"{model_label(result)} {DTYPE_SHORT[result.case.dtype]}"


def figure_of(rows: int, columns: int, width: float, height: float, **more: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def plain_log(axis: Any, base: float = 10, subs: Sequence[float] = (1.0,)) -> None:
    """Ticks of a log axis as plain numbers."""
    axis.set_major_locator(LogLocator(base, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return [items[i:i + size] for i in range(0, len(items), size)]
